"""From a recipe to a served pair: tokenizer, teacher, student, router; each stage once, resumed where it
stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router.checkpoint import CheckpointError, RouterCheckpoint
from training import parallel
from training.batches import Demonstrations
from training.config import (
    JointConfig,
    ModelConfig,
    PretrainedConfig,
    Recipe,
    RecipeError,
    Schedule,
    SeqKDConfig,
    ServedConfig,
)
from training.gating.stage import train_router
from training.loop import trainer
from training.loop.validation import Validation
from training.lora import merged
from training.methods import METHODS, Joint, Method
from training.models import build, load_model, parameters, save_model
from training.parallel import weights_of
from training.rollout_server import RolloutServer
from training.tasks import Task, make_task
from training.teacher import Teacher
from training.tokenizer import load_tokenizer, train_tokenizer
from training.vocabulary import check_pair, ready_tokenizer, served_teacher

TOKENIZER_SEED = -1  # a stream of training examples that no model is trained on


@dataclass(frozen=True)
class Workspace:
    recipe: Recipe

    @property
    def tokenizer(self) -> Path:
        return self.recipe.work / "tokenizer"

    def model(self, role: str) -> Path:
        return self.recipe.work / role

    def exported(self, role: str) -> Path:
        return self.recipe.output / role

    def is_exported(self, role: str) -> bool:
        return (self.exported(role) / "config.json").exists()


STAGES = ("teacher", "student", "router")
EXPORTED_EXAMPLES = 200


def run(recipe: Recipe, stages: tuple[str, ...] = STAGES) -> None:
    """Under `torchrun` the models are trained by all processes, the router by the first one alone.

    Raises RecipeError for a pair that cannot work; Stopped as `trainer.train` does.
    """
    torch.set_num_threads(recipe.threads)
    space = Workspace(recipe)
    task = task_of(recipe)
    with parallel.processes():
        first = parallel.is_first()
        tokenizer = ensure_tokenizer(space, task)
        check(recipe, stages, tokenizer)
        for role in ("teacher", "student"):
            wanted = role in stages or is_ready(getattr(recipe, role))  # what needs no training is just there
            if wanted and not space.is_exported(role):
                make_model(space, role, task, tokenizer)
    if first and "router" in stages and not (space.exported("router") / "router.json").exists():
        export_examples(task, recipe.output / "examples.jsonl")
        train_router(
            space.exported("teacher"), space.exported("student"), space.exported("router"),
            task, tokenizer, recipe.router, recipe.max_tokens, recipe.seed, space.model("router"),
        )  # fmt: skip


def is_ready(config: ModelConfig | ServedConfig) -> bool:
    """Whether the recipe takes this model as it is, from a directory or hub."""
    return isinstance(config, PretrainedConfig) and config.schedule is None


def task_of(recipe: Recipe) -> Task:
    """Raises RecipeError for a task that does not exist, or whose options or data are wrong."""
    try:
        return make_task(recipe.task.name, **recipe.task.options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        problem = error.args[0] if isinstance(error, KeyError) else error
        raise RecipeError(f"task {recipe.task.name}: {problem}") from error


def check(recipe: Recipe, stages: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be refused before any compute is spent."""
    if "router" in stages and isinstance(recipe.teacher, ServedConfig):
        raise RecipeError(
            "the router's rollouts need the teacher in process, not behind a URL; with a served teacher "
            "train the student alone (--stage student)"
        )
    method = getattr(recipe.student, "method", None)
    if isinstance(recipe.teacher, ServedConfig) and isinstance(method, SeqKDConfig | JointConfig):
        raise RecipeError(f"student.method {method.type} needs the teacher in process, not behind a URL")
    for role in ("teacher", "student"):
        schedule: Schedule | None = getattr(getattr(recipe, role), "schedule", None)
        if schedule is not None and schedule.batch % (schedule.accumulate * parallel.size()):
            raise RecipeError(
                f"{role}.schedule.batch {schedule.batch} does not split evenly over {parallel.size()} "
                f"processes with accumulate {schedule.accumulate}"
            )
    check_pair(recipe, tokenizer)
    check_joint(recipe)


def check_joint(recipe: Recipe) -> None:
    """Method joint goes on from a student and the router that was trained with it."""
    for role in ("teacher", "student"):
        config = getattr(recipe, role)
        if isinstance(getattr(config, "method", None), JointConfig):
            if role == "teacher" or not isinstance(config, PretrainedConfig):
                raise RecipeError(f"{role}.method joint is for a pretrained student with a router of its own")
            try:
                RouterCheckpoint.load(config.method.router).check_student(directory_of(config.pretrained))
            except CheckpointError as error:
                raise RecipeError(f"student.method.router: {error}") from error


def ensure_tokenizer(space: Workspace, task: Task) -> PreTrainedTokenizerBase:
    if space.recipe.ready_tokenizer is not None:
        return ready_tokenizer(space.recipe)
    if parallel.is_first() and not (space.tokenizer / "tokenizer.json").exists():
        config, rng = space.recipe.tokenizer, Random(space.recipe.seed)
        examples = islice(task.train(TOKENIZER_SEED), config.examples)
        texts = (text for e in examples for text in (e.source, e.references.sample(rng)))
        context = space.recipe.teacher.shape.context
        train_tokenizer(texts, config.size, context).save_pretrained(space.tokenizer)
    parallel.barrier()
    return load_tokenizer(space.tokenizer)


def make_model(space: Workspace, role: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train and export it; a ready model that is not trained is exported as it is (the teacher as a link)."""
    config = getattr(space.recipe, role)
    if isinstance(config, ServedConfig):
        return
    if config.schedule is not None:
        train_model(space, role, task, tokenizer)
    elif parallel.is_first():
        if role == "teacher":
            space.recipe.output.mkdir(parents=True, exist_ok=True)
            space.exported(role).symlink_to(directory_of(config.pretrained))
        else:
            save_model(build(config, tokenizer, space.recipe.seed), tokenizer, space.exported(role))
    parallel.barrier()


def directory_of(name: str) -> Path:
    """Of a directory or hub name."""
    return Path(name).resolve() if Path(name).is_dir() else Path(snapshot_download(name))


@dataclass(frozen=True)
class Job:
    """All that the training of one model needs; model and local teacher are where they compute."""

    config: ModelConfig
    model: PreTrainedModel
    method: Method
    batches: Demonstrations


def job(space: Workspace, role: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> Job:
    config: ModelConfig = getattr(space.recipe, role)
    kind = METHODS[config.method.type]
    teacher = load_teacher(space) if kind.needs_teacher else None
    method = kind(
        config.method, len(tokenizer), teacher, tokenizer.eos_token_id, space.recipe.max_tokens
    )
    if isinstance(method, Joint):
        method.tokenizer = tokenizer
    model = build(config, tokenizer, space.recipe.seed)
    for one in (model, teacher):
        if isinstance(one, PreTrainedModel):
            place(one, config.schedule)
    context = model.config.max_position_embeddings
    batches = Demonstrations(task, tokenizer, config.schedule.batch, space.recipe.seed, context)
    return Job(config, model, method, batches)


def train_model(space: Workspace, role: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    recipe, this = space.recipe, job(space, role, task, tokenizer)
    schedule = this.config.schedule
    if parallel.is_first():
        counts = parameters(this.model, trained_only=True), parameters(this.model)
        print("{}: {:,} of {:,} parameters trained".format(role, *counts))
    if this.config.rollouts is not None:
        this.method.sampler = rollout_server(space, role, this.model, tokenizer).sampled
    trainer.train(
        this.model, this.method.loss, this.batches, schedule, space.model(role), prepare=this.method.prepare,
        validate=Validation(task, tokenizer, schedule.validate_examples, recipe.max_tokens), seed=recipe.seed,
    )  # fmt: skip
    export(this.model, this.config, tokenizer, recipe.seed, space.exported(role))


def load_teacher(space: Workspace) -> Teacher:
    """The exported one. Raises RecipeError where it is not there yet."""
    config = space.recipe.teacher
    if isinstance(config, ServedConfig):
        return served_teacher(config)
    if not space.is_exported("teacher"):
        raise RecipeError(f"no teacher in {space.exported('teacher')}: train it first (--stage teacher)")
    dtype = getattr(torch, getattr(config, "dtype", "float32"))
    return load_model(space.exported("teacher"), dtype).requires_grad_(False)


def rollout_server(
    space: Workspace, role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RolloutServer:
    """Its directory holds a whole model from the start, so that the server can be started on it."""
    config: ModelConfig = getattr(space.recipe, role)
    directory = config.rollouts.directory or space.model(role) / "rollouts"
    if not (directory / "config.json").exists():
        export(model, config, tokenizer, space.recipe.seed, directory)
    if parallel.is_first():
        print(f"{role}: rollouts by {config.rollouts.url}, to be started as")
        print(f"  VLLM_SERVER_DEV_MODE=1 vllm serve {directory}")
    return RolloutServer(config.rollouts.url, directory, config.rollouts.every)


def place(model: PreTrainedModel, schedule: Schedule) -> None:
    """Onto this process's device, compiled, and sharded over the processes."""
    if schedule.compile:  # a sharded model gathers parameters between its layers: compile those
        blocks = model.get_decoder().layers if parallel.size() > 1 else [model.get_decoder()]
        for block in blocks:
            block.compile(dynamic=True)
    parallel.shard(model)


def export(
    model: PreTrainedModel,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    directory: Path,
) -> None:
    """A plain Hugging Face directory, adapters merged; written by the first process."""
    weights = weights_of(model)
    if parallel.is_first():
        plain = build(config.model_copy(update={"lora": None}), tokenizer, seed)
        plain.load_state_dict(merged(weights, model))
        save_model(plain, tokenizer, directory)
    parallel.barrier()


def export_examples(task: Task, path: Path) -> None:
    """Held-out examples with all their right answers, so that a demo can score itself without `training`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"source": e.source, "references": e.references.to_json()} for e in task.test()[:EXPORTED_EXAMPLES]
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
