"""Exports models as plain Hugging Face directories, which appear all at once and are checked first."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.chats import messages_of, shown
from router.errors import RunEnded
from training import parallel
from training.hub import directory_of
from training.lora import merged
from training.models import save_model
from training.reading import differ, probe_ids
from training.record import Record, write_record
from training.sampling import evaluating
from training.tasks import Task

EXPORTED_EXAMPLES = 200


class ExportError(RunEnded):
    """The model to export does not compute what the trained model computes."""


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A scratch folder that replaces `directory` at the end of the block.

    If the process is killed, one of the two directories is left whole. If the block fails, the old one stays.
    """
    scratch = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        remove(directory)
        os.replace(scratch, directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove(directory: Path) -> None:
    """Delete a directory with its contents, or a link to one, if it exists."""
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)


def export(
    model: PreTrainedModel,
    plain: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    record: Record,
) -> None:
    """Export a trained model as a plain Hugging Face directory, with adapters merged.

    The first process writes it; all processes of a sharded model take part.

    Args:
        model: the trained model.
        plain: builds a model of the same shape without adapters.
        tokenizer: the tokenizer to export with the model.
        directory: the directory to write.
        record: the fields of the recipe that matter for the model.

    Raises:
        ExportError: the exported model's logits differ from the trained model's; nothing is written.
    """
    trained = probed(model)
    weights = parallel.weights_of(model)
    if parallel.is_first():
        exported = plain()
        exported.load_state_dict(merged(weights, model))
        if differ(probed(exported), trained, model.dtype):
            raise ExportError(f"{directory}: the exported model does not give the trained model's logits")
        save(exported, tokenizer, directory, record)
    parallel.barrier()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, record: Record) -> None:
    """Write a model, its tokenizer and its record to a directory, which appears all at once."""
    with replacing(directory) as scratch:
        save_model(model, tokenizer, scratch)
        write_record(record, scratch)


@torch.no_grad()
def probed(model: PreTrainedModel) -> Tensor:
    """The model's logits (T, V) for a few ids, on the CPU; all processes of a sharded model take part."""
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        return model(input_ids=probe_ids(model), use_cache=False).logits[0].float().cpu()


def link_model(name: str, directory: Path) -> None:
    """Export a model that is used as it is: `directory` becomes a link to the model's own directory."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove(directory)
    directory.symlink_to(directory_of(name))


def is_link_to(name: str, directory: Path) -> bool:
    """Whether an export is a link to the model of this name.

    Args:
        name: a directory, or a hub name; without a revision, any revision counts.
        directory: the export.
    """
    target = directory.resolve()
    if Path(name).is_dir():
        return target == Path(name).resolve()
    repository, _, revision = name.partition("@")
    if f"models--{repository.replace('/', '--')}" not in target.parts:
        return False
    return not revision or target == directory_of(name).resolve()


def export_examples(task: Task, path: Path) -> None:
    """Write test examples with all right answers, so that a demo can score itself without `training`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for example in task.test()[:EXPORTED_EXAMPLES]:
        row: dict[str, object] = {"source": shown(example.source), "references": example.references.to_json()}
        if not isinstance(example.source, str):
            row["messages"] = messages_of(example.source)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("".join(lines))
    os.replace(scratch, path)
