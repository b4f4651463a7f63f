"""Tensors of a model that have a row for every token id, and copies of the model with more rows.

Everything here works on the model's files. No model is built.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from router.errors import UnusableInput
from router.reserved import ReservedRows

OUTPUT_LAYERS = (
    "lm_head",
    "language_model.lm_head",
    "model.language_model.lm_head",
    "embed_out",  # GPT-NeoX
    "output",  # InternLM 2
)
"""Known names of the layer that maps the last hidden state to logits."""
INPUT_LAYERS = (
    "model.embed_tokens",
    "language_model.model.embed_tokens",
    "model.language_model.embed_tokens",
    "transformer.wte",  # GPT-2, GPT-J, MPT
    "wte",  # GPT-2 as it was published
    "gpt_neox.embed_in",
    "model.decoder.embed_tokens",  # OPT
    "decoder.embed_tokens",
    "transformer.word_embeddings",  # Falcon, BLOOM
    "word_embeddings",
    "model.tok_embeddings",  # InternLM 2
    "backbone.embeddings",  # Mamba
)
"""Known names of the layer that maps token ids to vectors; its matrix may also be the output's."""
VOCABULARY_TENSORS = frozenset(
    [f"{layer}.weight" for layer in OUTPUT_LAYERS + INPUT_LAYERS]
    + [f"{layer}.bias" for layer in OUTPUT_LAYERS]
)
PLAIN_TYPES = ("F32", "F16", "BF16")
MODEL_CONFIG = "config.json"


class CheckpointError(UnusableInput):
    """A checkpoint, or the pair it is used with, is not usable; the message names the file."""


class VocabularyTensors(NamedTuple):
    """The tensors of a model that have a row for every token id."""

    files: dict[str, str]
    """The file of each tensor, by the tensor's name."""
    outputs: tuple[str, ...]
    """Names of the output matrix: two if a tied matrix is in the files twice."""
    rows: int
    """Number of rows of the output matrix."""

    @classmethod
    def of(cls, model: Path) -> "VocabularyTensors":
        """The vocabulary tensors of a model.

        Raises:
            CheckpointError: the output matrix is quantised, or has an unknown name.
        """
        files = _tensors(model)
        output = _first_layer(OUTPUT_LAYERS, files)
        source = _first_layer(INPUT_LAYERS, files)
        if output is None and source is None:
            raise CheckpointError(f"none of {OUTPUT_LAYERS[0]}.weight, {INPUT_LAYERS[0]}.weight in {model}")
        if output is None and _is_tied(model) is False:
            raise CheckpointError(
                f"the output matrix of {model} is not tied to {source}, and not in its files"
            )
        layers = list(filter(None, (output, source)))
        names = [f"{layer}.weight" for layer in layers]
        _check_plain(model, files, layers[0], "output")
        outputs = names[:1]
        if len(names) == 2 and _is_same(model, files, names):
            outputs = names
        if f"{output}.bias" in files:
            names.append(f"{output}.bias")
        rows = _shape(model, files, outputs[0])[0]
        return cls({name: files[name] for name in names if name in files}, tuple(outputs), rows)

    def read(self, model: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors with these names; None: all of them."""
        tensors: dict[str, Tensor] = {}
        for name in self.files if names is None else names:
            with opened(model / self.files[name]) as file:
                tensors[name] = file.get_tensor(name)
        return tensors

    def check_growth(self, model: Path) -> None:
        """Raises CheckpointError if the input matrix is quantised, or has another number of rows."""
        files = _tensors(model)
        for name in self.files:
            layer = name.removesuffix(".weight").removesuffix(".bias")
            _check_plain(model, files, layer, "input" if layer in INPUT_LAYERS else "output")
            found = _shape(model, files, name)[0]
            if found != self.rows:
                raise CheckpointError(f"{name} of {model} has {found} rows, {self.outputs[0]} {self.rows}")

    def grown(self, model: Path, rows: int) -> dict[str, Tensor]:
        """All tensors, with ``rows`` rows each; the new rows are zero. Raises what `check_growth` raises."""
        self.check_growth(model)
        tensors = self.read(model)
        for name, tensor in tensors.items():
            wider = tensor.new_zeros(rows, *tensor.shape[1:])
            wider[: self.rows] = tensor
            tensors[name] = wider
        return tensors


def vocabulary_rows(model: Path) -> int:
    """Number of rows of the model's vocabulary, by its configuration or else by its output matrix.

    Raises:
        CheckpointError: the configuration's number is unusable, or there is none and the matrix is unknown.
    """
    config = _config(model)
    rows = (config.get("text_config") or config).get("vocab_size")
    if rows is None:
        return VocabularyTensors.of(model).rows
    if not isinstance(rows, int):
        raise CheckpointError(f"{model / MODEL_CONFIG}: vocab_size is {rows!r}")
    return rows


def check_decoder(model: Path) -> None:
    """Raises CheckpointError for a model with an encoder: it cannot continue another model's text."""
    config = _config(model)
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{model} is of type {config.get('model_type')}, which has an encoder: "
            "a student must be a decoder-only model"
        )


def append_rows(model: Path, out: Path, reserved: ReservedRows) -> None:
    """Write a copy of the model to ``out`` whose vocabulary ends with the reserved rows, filled with zeros.

    Raises:
        CheckpointError: the output or input matrix is quantised or has an unknown name, or the model has
            more rows already.
    """
    vocabulary = VocabularyTensors.of(model)
    if vocabulary.rows > reserved.start:
        raise CheckpointError(f"{model} has {vocabulary.rows} rows, more than {reserved.start}")
    tensors = vocabulary.grown(model, reserved.end)
    with copied(model, out, tensors, vocab_size=reserved.end):
        pass


@contextmanager
def copied(
    model: Path,
    out: Path,
    tensors: Mapping[str, Tensor],
    *,
    vocab_size: int | None = None,
    without: Collection[str] = (),
) -> Iterator[Path]:
    """A copy of the model with other tensors; the block may add files before the copy appears at ``out``.

    Only the files with these tensors are written, and config.json if there is a ``vocab_size``. Every other
    file is a symbolic link. The copy appears at ``out`` all at once. An existing copy stays, so that several
    gateways that start at once do not take the files from each other.

    Args:
        model: directory of the model.
        out: directory of the copy.
        tensors: new values of tensors, by name.
        vocab_size: vocabulary size of the copy; None: the model's own.
        without: names of files or folders that the copy does not have.
    """
    files = {name: file for name, file in _tensors(model).items() if name in tensors}
    written = {*files.values(), *without}
    if vocab_size is not None:
        written.add(MODEL_CONFIG)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=out.name, dir=out.parent))
    try:
        for path in model.iterdir():
            if path.name not in written:
                (scratch / path.name).symlink_to(path.resolve())
        for file in sorted(set(files.values())):
            _write_tensors(model / file, scratch / file, tensors)
        if vocab_size is not None:
            config = _with_vocab_size(_config(model), vocab_size)
            (scratch / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        yield scratch
        try:
            os.replace(scratch, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An open file of tensors. Raises CheckpointError if it is missing or not in safetensors format."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{file} cannot be read as safetensors: {problem}") from error


def _write_tensors(source: Path, target: Path, changed: Mapping[str, Tensor]) -> None:
    tensors = load_file(source)
    for name in tensors.keys() & changed.keys():
        tensors[name] = changed[name]
    with opened(source) as file:
        metadata = file.metadata()
    save_file(tensors, target, metadata=metadata)


def _with_vocab_size(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A configuration with another vocabulary size.

    In models of text and images, the language model has a configuration of its own.
    """
    text = config.get("text_config")
    if isinstance(text, dict):
        config = config | {"text_config": text | {"vocab_size": rows}}
    if not isinstance(text, dict) or "vocab_size" in config:
        config = config | {"vocab_size": rows}
    return config


def _config(model: Path) -> dict[str, Any]:
    file = model / MODEL_CONFIG
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{model} has no {MODEL_CONFIG}: it is no model in Hugging Face's format"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must be a mapping of names to values")
    return config


def _is_tied(model: Path) -> bool | None:
    """Whether the configuration ties the output matrix to the input's; None if it does not tell."""
    try:
        config = _config(model)
    except CheckpointError:
        return None
    for part in (config.get("text_config") or {}, config):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return None


def _is_same(model: Path, files: Mapping[str, str], names: Collection[str]) -> bool:
    """Whether these two matrices are one tied matrix.

    The configuration tells, or else their values.
    """
    tied = _is_tied(model)
    if tied is not None:
        return tied
    matrices: list[Tensor] = []
    for name in names:
        with opened(model / files[name]) as file:
            matrices.append(file.get_tensor(name))
    left, right = matrices
    return left.shape == right.shape and bool((left == right).all())


def _first_layer(layers: Collection[str], tensors: Collection[str]) -> str | None:
    """The first of the layers that has tensors other than a bias; None if none has."""
    for layer in layers:
        if _parts(layer, tensors):
            return layer
    return None


def _parts(layer: str, tensors: Collection[str]) -> set[str]:
    """The names of the layer's tensors, without its bias."""
    return {name for name in tensors if name.startswith(f"{layer}.")} - {f"{layer}.bias"}


def _check_plain(model: Path, files: Mapping[str, str], layer: str, role: str) -> None:
    """Raises CheckpointError if other tensors of the layer, or its type, show that it is quantised."""
    name = f"{layer}.weight"
    others = _parts(layer, files) - {name}
    sign = min(others, default="")
    if not others:
        with opened(model / files[name]) as file:
            dtype = file.get_slice(name).get_dtype()
        sign = "" if dtype in PLAIN_TYPES else f"{name}: {dtype}"
    if sign:
        raise CheckpointError(f"the {role} matrix of {model} is quantised ({sign}): it cannot get more rows")


def _shape(model: Path, files: Mapping[str, str], name: str) -> list[int]:
    with opened(model / files[name]) as file:
        return list(file.get_slice(name).get_shape())


def _tensors(model: Path) -> dict[str, str]:
    """The file of every tensor, by the tensor's name."""
    index = model / "model.safetensors.index.json"
    if index.is_file():
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: {type(error).__name__} {error}") from error
    files: dict[str, str] = {}
    for file in model.glob("*.safetensors"):
        with opened(file) as source:
            files |= dict.fromkeys(source.keys(), file.name)
    return files
