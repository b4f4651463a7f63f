"""Copies of a student whose vocabulary has more rows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from router.checkpoint import fingerprint
from router.reserved import ReservedRows
from router.rows import CheckpointError, VocabularyTensors, append_rows, vocabulary_rows

ROWS, HIDDEN = 6, 4
APPENDED = ReservedRows(ROWS, 32)


def tensors_of(tied: bool, bias: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (ROWS, HIDDEN)
    if bias:
        shapes["lm_head.bias"] = (ROWS,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(directory: Path, tensors: dict[str, Tensor], sharded: bool = False, **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"vocab_size": ROWS} | config))
    (directory / "tokenizer.json").write_text("{}")
    files = {name: f"{i}.safetensors" if sharded else "model.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    if sharded:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory


def read(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, False), (False, True)])
def test_every_tensor_of_the_vocabulary_grows_and_no_other(tmp_path, tied, bias, sharded):
    before = tensors_of(tied, bias)
    model = write(tmp_path / "model", before, sharded)
    append_rows(model, tmp_path / "new" / "copy", APPENDED)
    after = read(tmp_path / "new" / "copy")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor)
        assert after[name].shape[0] == (HIDDEN if name == "model.norm.weight" else ROWS + 32)
        assert not after[name][len(tensor) :].any()
    assert vocabulary_rows(tmp_path / "new" / "copy") == ROWS + 32
    assert torch.equal(read(model)["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_only_files_that_change_are_written(tmp_path):
    model = write(tmp_path / "model", tensors_of(tied=False), sharded=True)
    append_rows(model, tmp_path / "copy", APPENDED)
    copies = {path.name for path in (tmp_path / "copy").iterdir() if not path.is_symlink()}
    assert copies == {"config.json", "0.safetensors", "2.safetensors"}  # the norm is in a file of its own
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in model.iterdir()}
    with safe_open(tmp_path / "copy" / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model"]


def test_an_existing_copy_stays(tmp_path):
    model = write(tmp_path / "model", tensors_of(tied=True))
    append_rows(model, tmp_path / "copy", APPENDED)
    inode = (tmp_path / "copy" / "model.safetensors").stat().st_ino
    append_rows(model, tmp_path / "copy", APPENDED)
    assert (tmp_path / "copy" / "model.safetensors").stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "model"]


def test_a_model_and_its_copy_with_more_rows_have_one_identity(tmp_path):
    model = write(tmp_path / "model", tensors_of(tied=False, bias=True))
    append_rows(model, tmp_path / "copy", APPENDED)
    assert fingerprint(tmp_path / "copy", ROWS) == fingerprint(model, ROWS)
    other = tensors_of(tied=False, bias=True)
    other["lm_head.bias"][-1] += 1
    assert fingerprint(write(tmp_path / "other", other), ROWS) != fingerprint(model, ROWS)


def test_a_type_of_sixteen_bits_stays(tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in tensors_of(tied=True).items()}
    append_rows(write(tmp_path / "model", halves), tmp_path / "copy", APPENDED)
    assert {tensor.dtype for tensor in read(tmp_path / "copy").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "equal", "outputs"),
    [
        ({"tie_word_embeddings": True}, False, 2),  # vLLM reads the input matrix alone, transformers both
        ({}, True, 2),
        ({}, False, 1),
        ({"tie_word_embeddings": False}, True, 1),
    ],
)
def test_a_tied_matrix_that_is_stored_twice_is_changed_twice(tmp_path, config, equal, outputs):
    tensors = tensors_of(tied=False)
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = write(tmp_path / "model", tensors, **config)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    assert VocabularyTensors.of(model).outputs == names[:outputs]


REFUSED = {
    "output packed": (
        {"lm_head.qweight": torch.zeros(2)},
        "the output matrix of .* quantised .lm_head.qweight",
    ),
    "output in eight bits": (
        {"lm_head.weight": torch.zeros(ROWS, HIDDEN, dtype=torch.int8)},
        "the output matrix of .* quantised .lm_head.weight: I8",
    ),
    "input scaled": (
        {"lm_head.weight": torch.zeros(ROWS, HIDDEN), "model.embed_tokens.weight_scale": torch.ones(2)},
        "the input matrix of .* quantised .model.embed_tokens.weight_scale",
    ),
    "other rows": ({"lm_head.weight": torch.zeros(ROWS + 1, HIDDEN)}, "has 6 rows, lm_head.weight 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_matrix_that_cannot_grow_is_refused_by_name(tmp_path, case):
    tensors, problem = REFUSED[case]
    model = write(tmp_path / "model", tensors_of(tied=True) | tensors)
    with pytest.raises(CheckpointError, match=problem) as refusal:
        append_rows(model, tmp_path / "copy", ReservedRows(ROWS + 1, 32))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rows_that_would_overwrite_others_are_refused(tmp_path):
    model = write(tmp_path / "model", tensors_of(tied=True))
    with pytest.raises(CheckpointError, match="has 6 rows, more than 5"):
        append_rows(model, tmp_path / "copy", ReservedRows(ROWS - 1, 32))


def test_an_unknown_output_matrix_is_refused(tmp_path):
    model = write(tmp_path / "model", {"strange.weight": torch.zeros(ROWS, HIDDEN)})
    with pytest.raises(CheckpointError, match=r"none of lm_head.weight, model.embed_tokens.weight in"):
        append_rows(model, tmp_path / "copy", APPENDED)


def test_a_file_that_holds_no_tensors_is_named(tmp_path):
    """A clone without Git LFS has such a file."""
    model = write(tmp_path / "model", tensors_of(tied=True))
    (model / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    )
    for action in (lambda: append_rows(model, tmp_path / "copy", APPENDED), lambda: fingerprint(model, ROWS)):
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors cannot be read as safetensors"
        ) as refusal:
            action()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("index", ["{", "{}", "[]"])
def test_a_broken_index_is_named(tmp_path, index):
    model = write(tmp_path / "model", tensors_of(tied=True), sharded=True)
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        append_rows(model, tmp_path / "copy", APPENDED)


def test_a_missing_part_is_named(tmp_path):
    model = write(tmp_path / "model", tensors_of(tied=True), sharded=True)
    (model / "0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"0\.safetensors cannot be read as safetensors: No such file"):
        append_rows(model, tmp_path / "copy", APPENDED)
