"""Settings: one frozen object, built once by `__main__`, the only place where a limit has a number.

Sources, strongest first: command line, environment (HGA_KVD_*), a TOML file (--config or HGA_KVD_CONFIG), the defaults
here. Sizes are bytes, or text such as `4GiB`, `512MB`. This file and `__main__` are the only ones that look at the
environment. Every option is described for users in docs/configuration.md; a test holds the two together.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from hga_kvd.errors import StartRefused

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_BYTES_MAX = (1 << 63) - 1
# sun_path holds 107 bytes and a NUL; the handover socket adds ".shm" and the lock file ".lock".
SOCKET_PATH_BYTES_MAX = 102


def parse_size(value: int | str | float) -> int:
    """Bytes of `4GiB`, `512MB`, `1.5g` or a plain number. Raises ValueError with what is accepted."""
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", str(value), re.ASCII)
    if isinstance(value, bool) or not match or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    number, unit = match[1], _UNITS[match[2].lower()]
    return math.floor(float(number) * unit) if "." in number else int(number) * unit


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=_BYTES_MAX)]


def parse_address(value: str) -> str:
    """`HOST:PORT` or `[IPV6]:PORT`, as it is. Raises ValueError."""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{value!r} is not an address; write HOST:PORT with a port from 0 to 65535")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{value!r} is not an address; write an IPv6 host in brackets, as in [::1]:50051")
    return value


def parse_target(value: str) -> str:
    """`unix:PATH` (also for `/PATH` and `unix:///PATH`) or `HOST:PORT`. Raises ValueError with what is accepted."""
    if not value.startswith(("unix:", "/")):
        return parse_address(value)
    path = value.removeprefix("unix:")
    path = path.removeprefix("//") if path.startswith("///") else path
    if not path.strip("/") or path.endswith("/") or "\0" in path:
        raise ValueError(f"{value!r} is not a socket path; write unix:/DIRECTORY/NAME")
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"the socket path {path!r} is longer than {SOCKET_PATH_BYTES_MAX} bytes; use a shorter one")
    return f"unix:{path}"


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def default_listen() -> str:
    """A unix socket in a directory that only this user can enter."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "hga-kvd" if runtime else Path(f"/tmp/hga-kvd-{os.getuid()}")
    return f"unix:{base / 'kvd.sock'}"


class Settings(BaseSettings):
    """Frozen. `load` builds the daemon's; tests and tools may construct one directly."""

    model_config = SettingsConfigDict(env_prefix="HGA_KVD_", env_ignore_empty=True, frozen=True, extra="forbid")

    nvme: Path | None = None  # directory of the segments; None: RAM only
    ram: Size = 1 * GIB  # arena
    nvme_max: Size = 0  # bytes that segments may take; 0: what the file system has, less nvme_reserve
    # Whether sessions that nobody has open and that are not pinned are deleted, oldest first, when space is short.
    evict: Literal["none", "lru"] = "none"
    # unix:PATH (one at most) or HOST:PORT, several allowed; in the environment separated by commas
    listen: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default_factory=lambda: (default_listen(),)
    )
    io_engine: Literal["auto", "uring", "liburing", "posix"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics: str | None = None  # HOST:PORT for Prometheus

    # Limits. Over one of them: LimitExceeded with the number.
    # gRPC falls from 1.1 to 0.6 GB/s when messages grow from 4 to 16 MiB (DESIGN section 4).
    message_bytes_max: Annotated[Size, Field(ge=4 * KIB, le=256 * MIB)] = 4 * MIB
    # 64 K keys of 8 KiB are 512 MiB: more than any decode step, less than a runaway loop.
    fetch_keys_max: int = Field(default=65536, gt=0)
    fetch_bytes_max: Size = 512 * MIB
    append_bytes_max: Size = 1 * GIB  # one Append stream
    # Payloads of Append streams on their way into memory, and large answers that clients have not read yet, all together.
    inflight_bytes_max: Size = 2 * GIB
    # A stream that stalls holds one of rpc_threads. 1 GiB over a slow link (100 Mbit/s) takes 90 s.
    append_stream_s_max: float = Field(default=120, gt=0, le=86400)
    # Calls with payload that wait for their turn, of one tenant; 64 clients with a lane have one each.
    waiting_calls_max: int = Field(default=256, gt=0, le=65536)
    region_bytes_max: Size = 1 * GIB  # one client's shared memory
    regions_bytes_max: Size = 4 * GIB  # all clients': 64 of those that the client library asks for
    clients_max: int = Field(default=64, gt=0, le=4096)
    sessions_max: int = Field(default=65536, gt=0)
    geometries_max: int = Field(default=1024, gt=0)  # of sessions opened since the start, about 5 KiB each
    # Of one session: 268 M tokens. A link frame names them all, in a table of at most 64 MiB.
    chunks_max: int = Field(default=1 << 22, gt=0, le=1 << 23)
    summary_bytes_max: Size = 1 * MIB  # one chunk, one kind
    # Of one chunk. The basis of a session's sketches is kinds of one chunk, each summary_bytes_max: 25 of them for 48
    # layers, 4 KV heads and dim 128; 84 for 80 layers and 8 KV heads.
    summary_kinds_max: int = Field(default=128, gt=0, le=1024)
    rpc_threads: int = Field(default=16, gt=0, le=1024)
    # 32 to 64 reads in flight reach full bandwidth; 128 only adds latency (DESIGN section 4).
    queue_depth: int = Field(default=64, gt=0, le=4096)
    segment_bytes: Size = 256 * MIB
    # Kept free on the file system for the manifest and for other programs.
    nvme_reserve: Size = 64 * MIB
    # Bytes a second that are verified in the background; 0: none. 8 MiB/s is 0.5 % of a disk of 1.6 GB/s: 1 TB in 36 h.
    scrub_rate: Size = 8 * MIB
    grace_s: float = Field(default=10, ge=0, le=3600)  # what calls in flight get to finish at SIGTERM

    @field_validator("listen")
    @classmethod
    def _targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        targets = tuple(dict.fromkeys(parse_target(target) for target in value))
        if not targets:
            raise ValueError("there must be at least one address to listen on")
        # The handover socket of shared memory stands beside *the* unix socket; a call does not tell which it came by.
        if sum(target.startswith("unix:") for target in targets) > 1:
            raise ValueError("there may be only one unix socket; TCP addresses may be several")
        return targets

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: str | None) -> str | None:
        return value if value is None else parse_address(value)

    @property
    def socket_path(self) -> Path | None:
        """The unix socket among `listen`, if there is one."""
        return next((Path(t.removeprefix("unix:")) for t in self.listen if t.startswith("unix:")), None)


def unknown_variables() -> list[str]:
    """Of the environment: what looks like a setting, and is none. Clients and commands know two more, native.py one."""
    known = {f"HGA_KVD_{name.upper()}" for name in (*Settings.model_fields, "config", "target", "native")}
    return sorted(name for name in os.environ if name.upper().startswith("HGA_KVD_") and name.upper() not in known)


class _FileSource(PydanticBaseSettingsSource):
    """The settings of a TOML file that was already read: weaker than all other sources."""

    def __init__(self, settings_cls: type[BaseSettings], content: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self.content = dict(content)

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self.content.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self.content


def load(command_line: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Settings from all sources; `command_line` holds only what was given there.

    Raises: StartRefused with one line that names the option as the user wrote it, the value, and what is accepted.
    """
    content: dict[str, Any] = {}
    if config is not None:
        try:
            content = tomllib.loads(config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise StartRefused(f"cannot read the settings file {config}: {reason}") from error
        except tomllib.TOMLDecodeError as error:
            raise StartRefused(f"the settings file {config} is not valid TOML: {error}") from error

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, _FileSource(settings_cls, content)

    try:
        return Layered(**command_line)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if name in command_line:
            source = f"option --{name.replace('_', '-')}"
        elif os.environ.get(f"HGA_KVD_{name.upper()}"):
            source = f"environment variable HGA_KVD_{name.upper()}"
        else:
            source = f"{name} in {config}"
        if first["type"] == "extra_forbidden":
            raise StartRefused(f"{source}: there is no such setting; docs/configuration.md lists all") from error
        message = first["msg"].removeprefix("Value error, ")
        given = first["input"]
        shown = "" if isinstance(given, tuple) or message.startswith(repr(given)) else f" (it is {given!r})"
        raise StartRefused(f"{source}: {message}{shown}") from error
