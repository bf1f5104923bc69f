"""What README and docs/ say can be done can be done: files are there, options exist, snippets run as they are."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from hga_kvd import config
from hga_kvd.__main__ import app
from hga_kvd_client import connect
from typer.main import get_command
from wire import command

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "bench/README.md")]
DOCS += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCS}
FOLDERS = ("proto", "kvstore", "client", "model_patch", "tests", "bench", "docs")
every_text = pytest.mark.parametrize("name", TEXTS)
COMMAND = get_command(app)


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, content) of each fenced block in this language."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(name, block) for name, text in TEXTS.items() for block in pattern.findall(text)]


@every_text
def test_links_lead_somewhere(name: str) -> None:
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[name]):
        assert target.startswith("https://") or (folder / target).exists(), target


@every_text
def test_files_that_are_named_are_there(name: str) -> None:
    places = (*DOCS, *(path for part in FOLDERS for path in (ROOT / part).rglob("*")))
    ours = [f"/{path.relative_to(ROOT)}" for path in places]
    for path in re.findall(r"`([\w/]+\.(?:py|md|proto|jsonl))`", TEXTS[name]):
        elsewhere = path == "argparse.py" or "NAME" in path  # Python's; any
        assert elsewhere or any(our.endswith(f"/{path}") for our in ours), path


def commands_in(text: str) -> list[list[str]]:
    """Arguments of every `hga-kvd ...` in the text, in blocks and between backquotes."""
    inline = re.findall(r"`hga-kvd( [^`]*)?`", text)
    return [shlex.split(line, comments=True) for line in inline + re.findall(r"^hga-kvd( .*)?$", text, re.MULTILINE)]


@every_text
def test_commands_and_options_exist(name: str) -> None:
    for arguments in commands_in(TEXTS[name]):
        known = COMMAND.commands.get(arguments[0]) if arguments else None  # type: ignore[attr-defined]
        assert known or not arguments or arguments[0].startswith("-"), arguments
        options = {option for parameter in (known or COMMAND).params for option in parameter.opts}
        assert {part.split("=")[0] for part in arguments if part.startswith("--")} <= options, arguments


@every_text
def test_targets_of_make_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = re.findall(r"`make ([a-z]+)[^`]*`|^make ([a-z]+)", TEXTS[name], re.MULTILINE)
    assert {inline or line for inline, line in said} <= targets


@every_text
def test_variables_are_known(name: str) -> None:
    code = "".join(path.read_text() for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("client/**/*.py")])
    for variable in re.findall(r"HGA_KVD_[A-Z_]+[A-Z]", TEXTS[name]):
        known = variable.removeprefix("HGA_KVD_").lower() in config.Settings.model_fields
        assert known or variable in ("HGA_KVD_CONFIG", "HGA_KVD_TARGET") or f'"{variable}"' in code, variable


def test_the_settings_file_of_the_example_is_taken(tmp_path: Path) -> None:
    (content,) = (block for _, block in blocks("toml"))
    (tmp_path / "kvd.toml").write_text(content)
    settings = config.load({}, tmp_path / "kvd.toml")
    assert {name: getattr(settings, name) for name in tomllib.loads(content)} == {
        "nvme": Path("/mnt/kv"),
        "ram": 16 << 30,
        "nvme_max": 800 << 30,
        "listen": ("unix:/run/hga-kvd/kvd.sock", "127.0.0.1:50051"),
        "metrics": "127.0.0.1:9464",
    }


def test_snippets_run_as_they_are(daemon, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Every Python block, on a small model or random K/V, and shorter; then README's shell lines about what they stored."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "patch")
    import tiny  # noqa: PLC0415 (of tests/patch, which is no package)

    monkeypatch.setenv("HGA_KVD_TARGET", daemon("--ram", "256MiB").target)
    ids, few = tiny.text(150), torch.Generator().manual_seed(1)
    given = {
        "model": tiny.make("llama"),
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8},
        "token_ids": ids[0].numpy(),
        "k": torch.randn(3, 150, 64, generator=few),
        "v": torch.randn(3, 150, 64, generator=few),
        "q": torch.randn(9, 150, 64, generator=few),
        "scale": 0.125,
    }
    snippets = blocks("python")
    assert {name for name, _ in snippets} >= {"README.md", "docs/client.md", "docs/patch.md"}
    for name, snippet in snippets:
        with torch.no_grad():
            exec(compile(snippet.replace("**inputs, max_new_tokens=200", "**inputs"), name, "exec"), dict(given))
        with connect() as client:
            (kept,) = client.list()
            assert (kept.name, kept.chunk_count) in {("my-document", 2), ("my-document", 5)}, name
            if name == snippets[-1][0]:
                break
            client.connection.delete(kept.session_id)
    monkeypatch.chdir(tmp_path)
    (lines,) = (block for name, block in blocks("sh") if name == "README.md" and "hga-kvd stat" in block)
    ran = []
    for line in lines.splitlines():
        _, *arguments = shlex.split(line, comments=True)
        if arguments[0] in ("stat", "verify", "export"):
            done = command(*arguments)
            assert done.exit_code == 0, (arguments, done.output)
            ran.append(arguments[0])
    assert ran == ["stat", "verify", "export"], lines
    assert command("import", "doc.kvx", "--name", "again").exit_code == 0
