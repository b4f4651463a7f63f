"""Exports: plain Hugging Face directories that appear all at once, and hold the model that was trained."""

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
    """What would be exported is not the model that was trained."""


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A folder to write to, which then takes the directory's place; a kill leaves one of the two."""
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
    """A directory with all in it, or a link to one; nothing if there is none."""
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
    """A plain Hugging Face directory, adapters merged; written by the first process.

    Args:
        model: the trained one.
        plain: builds another like it, without adapters.
        tokenizer: exported with it.
        directory: of the export.
        record: what the recipe says of it.

    Raises:
        ExportError: its logits would not be those of the trained model; nothing is written.
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
    """All at once, with what the recipe says of it."""
    with replacing(directory) as scratch:
        save_model(model, tokenizer, scratch)
        write_record(record, scratch)


@torch.no_grad()
def probed(model: PreTrainedModel) -> Tensor:
    """Logits (T, V) of a few ids, on the CPU; all processes of a sharded model take part."""
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        return model(input_ids=probe_ids(model), use_cache=False).logits[0].float().cpu()


def link_model(name: str, directory: Path) -> None:
    """The export of a model that is taken as it is."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove(directory)
    directory.symlink_to(directory_of(name))


def is_link_to(name: str, directory: Path) -> bool:
    """Whether this export is the model of that directory or hub name; without a revision, any of them."""
    target = directory.resolve()
    if Path(name).is_dir():
        return target == Path(name).resolve()
    repository, _, revision = name.partition("@")
    if f"models--{repository.replace('/', '--')}" not in target.parts:
        return False
    return not revision or target == directory_of(name).resolve()


def export_examples(task: Task, path: Path) -> None:
    """Held-out examples with all their right answers, so that a demo can score itself without `training`."""
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
