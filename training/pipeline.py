"""Runs the stages of a recipe: tokenizer, teacher, student, router.

Each stage runs once. After an interruption, it resumes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.chats import messages_of
from router.checkpoint import CheckpointError, RouterCheckpoint, fingerprint
from training import parallel
from training.batches import Demonstrations
from training.config import Recipe, RecipeError
from training.export import export, export_examples, link_model, replacing, save
from training.gate_config import InProcessRollouts
from training.gating.cheaper import Cheaper
from training.gating.router_stage import FrozenPair, RouterStage
from training.gating.traffic_stage import TrafficStage
from training.hub import directory_of
from training.kept_completions import KeptCompletions
from training.loop import trainer
from training.loop.trackers import check_trackers
from training.loop.validation import Validation
from training.lora import LoraError
from training.method_config import JointConfig, MethodConfig, RolloutConfig, Schedule
from training.methods import METHODS, Joint, Method, SeqKD
from training.model_config import (
    ROLES,
    CheaperConfig,
    CheaperReadyConfig,
    CheaperServedConfig,
    ModelConfig,
    PretrainedConfig,
    PrunedConfig,
    Role,
    ScratchConfig,
    ServedConfig,
)
from training.models import build, check_adapters, load_model, parameters, recompute_layers
from training.pruning import check_layers, layers_of
from training.reading import check_readout, check_steps, context_of
from training.record import tokenizer_record, write_record
from training.rollout_server import RolloutServer
from training.started_servers import with_addresses
from training.tasks import Task, make_task
from training.teacher import Teacher
from training.teacher_cache import TeacherCache
from training.tokenizer import load_tokenizer, train_tokenizer, visible_ids
from training.vocabulary import check_pair, check_vocabulary, ready_tokenizer, served_teacher
from training.workspace import STAGES, Stage, Workspace

TOKENIZER_SEED = -1  # a stream of training examples that no model is trained on


def run(recipe: Recipe, stages: tuple[Stage, ...] = STAGES, restart: bool = False) -> None:
    """Run stages of a recipe. Under `torchrun`, all processes train the models, and the first one the router.

    Args:
        recipe: the recipe of the pair.
        stages: the stages to run; results of the others are only used.
        restart: whether to delete earlier results of these stages first.

    Raises:
        RecipeError: the pair cannot work, or its directories hold results of another recipe.
        Stopped: as `trainer.train` raises it.
    """
    torch.set_num_threads(recipe.threads)
    space = Workspace(recipe)
    task = task_of(recipe)
    with parallel.processes():
        check(recipe, stages)
        check_references(recipe, task, stages)
        begin(space, stages, restart)
        tokenizer = ensure_tokenizer(space, task)
        for role in ROLES:
            wanted = role in stages or recipe.model(role).is_ready  # a ready model is only exported
            if wanted and not space.is_exported(role):
                make_model(space, role, task, tokenizer)
        if parallel.is_first() and "router" in stages and not space.is_exported("router"):
            make_router(space, task, tokenizer)


def begin(space: Workspace, stages: tuple[Stage, ...], restart: bool) -> None:
    """Check that the directories hold no results of another recipe.

    Args:
        space: the directories.
        stages: the stages to run.
        restart: whether to delete earlier results of these stages first.

    Raises:
        RecipeError: another recipe has begun one of these stages, or a stage before them.
    """
    if restart and parallel.is_first():
        space.restart(stages)
    parallel.barrier()
    space.check(stages)


def make_router(space: Workspace, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train and export the router, and export the examples that a demo shows."""
    recipe = space.recipe
    export_examples(task, recipe.output / "examples.jsonl")
    if not isinstance(recipe.router.rollouts, InProcessRollouts):
        make_router_from_traffic(space, task, tokenizer)
        return
    with replacing(space.exported("router")) as scratch:
        link_cheaper(space)
        pair = frozen_pair(space, tokenizer)
        RouterStage(pair, task, recipe.router, recipe.seed).run(space.work("router"), scratch)
        write_record(space.record("router"), scratch)


def link_cheaper(space: Workspace) -> None:
    """Export the cheaper teachers in process, as links."""
    for name, config in space.recipe.cheaper:
        if isinstance(config, CheaperReadyConfig):
            link_model(config.pretrained, space.cheaper(name))


def make_router_from_traffic(space: Workspace, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train and export a router from completions that gateways wrote."""
    with replacing(space.exported("router")) as scratch, with_addresses(space) as served:
        traffic_stage(served, task, tokenizer).run(space.work("router"), scratch)
        write_record(space.record("router"), scratch)


def traffic_stage(space: Workspace, task: Task, tokenizer: PreTrainedTokenizerBase) -> TrafficStage:
    """The stage that trains a router from completions that gateways wrote."""
    recipe = space.recipe
    teacher = load_teacher(space)
    if isinstance(teacher, PreTrainedModel):
        parallel.onto_device(teacher)
    return TrafficStage(
        student=space.exported("student"),
        teacher=teacher,
        teacher_name=space.exported("teacher").name
        if isinstance(teacher, PreTrainedModel)
        else teacher.model,
        tokenizer=tokenizer,
        task=task,
        config=recipe.router,
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        cheaper=[
            Cheaper(name, config.cost, cheaper_teacher(space, config, name))
            for name, config in recipe.cheaper
        ],
    )


def cheaper_teacher(space: Workspace, config: CheaperConfig, name: str) -> Teacher:
    """A cheaper teacher that reads what a gateway wrote: behind its URL, or on this process's device."""
    if isinstance(config, CheaperServedConfig):
        return served_teacher(config, teacher_cache(space, f"teacher-{name}"), name)
    model = load_model(directory_of(config.pretrained)).requires_grad_(False)
    parallel.onto_device(model)
    return model


def frozen_pair(space: Workspace, tokenizer: PreTrainedTokenizerBase) -> FrozenPair:
    """The exported pair and the cheaper teachers in process, as input of the router's stage."""
    recipe = space.recipe
    cheaper = []
    for name, config in recipe.cheaper:
        if isinstance(config, CheaperReadyConfig):
            cheaper.append(Cheaper(name, config.cost, directory_of(config.pretrained)))
    return FrozenPair(
        teacher=space.exported("teacher"),
        student=space.exported("student"),
        tokenizer=tokenizer,
        span_tokens=recipe.router.span_tokens,
        ask_tokens=recipe.router.ask_tokens,
        max_tokens=recipe.max_tokens,
        cheaper=tuple(cheaper),
    )


def task_of(recipe: Recipe) -> Task:
    """The recipe's task. Raises RecipeError if it does not exist, or if its options or data are wrong."""
    try:
        return make_task(recipe.task.name, **recipe.task.options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        problem = error.args[0] if isinstance(error, KeyError) else error
        raise RecipeError(f"task {recipe.task.name}: {problem}") from error


def check(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Check the recipe before any compute is spent.

    Raises:
        RecipeError: the recipe cannot be trained.
        ServerError: a served teacher cannot be used.
        TrackerError: the package of a tracker is not installed.
    """
    if isinstance(recipe.teacher, ServedConfig):
        check_served(recipe, stages)
    for role in ROLES:
        check_training(recipe, role)
    check_trackers(recipe.trackers)
    name = recipe.ready_tokenizer
    if name is not None:  # with a tokenizer trained on the task, all models are new
        check_pair(recipe, ready_tokenizer(name, recipe.chat))
    check_joint(recipe)
    check_pruned(recipe)


def check_pruned(recipe: Recipe) -> None:
    """Raises RecipeError if the student is to keep more layers than its teacher has."""
    if not isinstance(recipe.student, PrunedConfig):
        return
    kept = recipe.student.prune.layers
    if isinstance(recipe.teacher, ScratchConfig):
        check_layers(recipe.teacher.shape.layers, kept)
    elif isinstance(recipe.teacher, PretrainedConfig):
        check_layers(layers_of(recipe.teacher.pretrained), kept)


def check_served(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Raises RecipeError if the recipe needs more than a teacher behind a URL can do."""
    if "router" in stages and isinstance(recipe.router.rollouts, InProcessRollouts):
        raise RecipeError(
            "router.rollouts in_process needs the teacher in process, not behind a URL: let a gateway write "
            "them, or train the student alone (--stage student)"
        )
    method = recipe.student.method
    if method is None:
        return
    if method.teacher_in_process:
        raise RecipeError(f"student.method {method.type} needs the teacher in process, not behind a URL")
    if method.type in ("kd", "gkd") and method.temperature != 1:
        raise RecipeError(
            "student.method.temperature other than 1 needs the teacher in process: a served one gives only "
            "its likeliest tokens"
        )


def check_training(recipe: Recipe, role: Role) -> None:
    """Raises RecipeError if a model's batches do not split evenly, or if its adapters cannot be merged."""
    config = recipe.model(role)
    if config.plan is not None:
        check_parts(config.plan.schedule, role)
    if isinstance(config, PretrainedConfig) and config.lora is not None:
        try:
            check_adapters(config)
        except LoraError as error:
            raise RecipeError(f"{role}.{error}") from error


def check_references(recipe: Recipe, task: Task, stages: tuple[Stage, ...]) -> None:
    """Raises RecipeError if a method trains on right answers, and examples of the task have none."""
    if task.has_references:
        return
    for role in ROLES:
        plan = recipe.model(role).plan
        if role in stages and plan is not None and plan.method.needs_references:
            raise RecipeError(
                f"{role}.method {plan.method.type}: some examples have no answer to train on; "
                "seqkd, and gkd or pcl with on_policy: 1, need none"
            )


def check_parts(schedule: Schedule, role: Role) -> None:
    """Raises RecipeError if a batch does not split evenly over the processes and their passes."""
    if schedule.batch % (schedule.accumulate * parallel.size()):
        raise RecipeError(
            f"{role}.schedule.batch {schedule.batch} does not split evenly over {parallel.size()} "
            f"processes with accumulate {schedule.accumulate}"
        )


def check_joint(recipe: Recipe) -> None:
    """Raises RecipeError unless method joint has a pretrained student, and the router trained with it."""
    for role in ROLES:
        config = recipe.model(role)
        if not isinstance(config.method, JointConfig):
            continue
        if role == "teacher" or not isinstance(config, PretrainedConfig):
            raise RecipeError(f"{role}.method joint is for a pretrained student with a router of its own")
        try:
            router = RouterCheckpoint.load(config.method.router)
            router.check_student(directory_of(config.pretrained))
        except CheckpointError as error:
            raise RecipeError(f"student.method.router: {error}") from error
        if router.outputs:
            raise RecipeError("student.method.router: method joint is for a router of one teacher")


def ensure_tokenizer(space: Workspace, task: Task) -> PreTrainedTokenizerBase:
    """The recipe's pretrained tokenizer, or one trained on the task, which is trained if it does not exist.

    Raises:
        RecipeError: an exported model has another vocabulary.
    """
    recipe = space.recipe
    if recipe.ready_tokenizer is not None:
        return ready_tokenizer(recipe.ready_tokenizer, recipe.chat)
    if parallel.is_first() and not (space.tokenizer / "tokenizer.json").exists():
        tokenizer = new_tokenizer(recipe, task)
        with replacing(space.tokenizer) as scratch:
            tokenizer.save_pretrained(scratch)
            write_record(tokenizer_record(recipe), scratch)
    parallel.barrier()
    tokenizer = load_tokenizer(space.tokenizer)
    for role in ROLES:
        if space.is_exported(role):  # someone may have put it there, with its own tokenizer
            check_vocabulary(role, str(space.exported(role)), tokenizer)
    return tokenizer


def new_tokenizer(recipe: Recipe, task: Task) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the task.

    Raises:
        RecipeError: the recipe does not train a tokenizer.
    """
    config = recipe.tokenizer
    if config is None or config.size is None or not isinstance(recipe.teacher, ScratchConfig):
        raise RecipeError("tokenizer: training one needs its size and a teacher from scratch")
    rng = Random(recipe.seed)
    texts = []
    for example in islice(task.train(TOKENIZER_SEED), config.examples):
        texts += [turn["content"] for turn in messages_of(example.source)]
        if example.references:
            texts.append(example.references.sample(rng))
    return train_tokenizer(texts, config.size, recipe.teacher.shape.context)


def make_model(space: Workspace, role: Role, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train and export a model; a ready model is exported as it is (the teacher as a link)."""
    config = space.recipe.model(role)
    if isinstance(config, ServedConfig):
        return
    if config.plan is not None:
        train_model(space, role, task, tokenizer)
    elif parallel.is_first():
        if role == "teacher" and isinstance(config, PretrainedConfig):
            link_model(config.pretrained, space.exported(role))
        else:
            model = build(config, tokenizer, space.recipe.seed, space.exported("teacher"))
            save(model, tokenizer, space.exported(role), space.record(role))
    parallel.barrier()


@dataclass(frozen=True)
class Job:
    """The parts of one model's training; the model and a local teacher are on this process's device."""

    config: ModelConfig
    schedule: Schedule
    model: PreTrainedModel
    method: Method
    batches: Demonstrations


def make_job(space: Workspace, role: Role, task: Task, tokenizer: PreTrainedTokenizerBase) -> Job:
    """Build, load and check the models of one training.

    Raises:
        RecipeError: the recipe does not train this model.
        UnreadableModel: a model's states and logits cannot be read as the model computes them.
    """
    recipe = space.recipe
    config = recipe.model(role)
    plan = config.plan
    if isinstance(config, ServedConfig) or plan is None:
        raise RecipeError(f"{role}: the recipe does not train it")
    teacher = load_teacher(space) if plan.method.needs_teacher else None
    method = make_method(space, plan.method, teacher, tokenizer)
    model = build(config, tokenizer, recipe.seed, space.exported("teacher"))
    for name, loaded in ((role, model), ("teacher", teacher)):
        if isinstance(loaded, PreTrainedModel):
            place(loaded, plan.schedule.compile)
            check_steps(loaded, name)
    if plan.schedule.gradient_checkpointing:
        recompute_layers(model)
    if role == "student":
        check_readout(model, role)
    longest = min(context_of(model), recipe.max_length or sys.maxsize)
    batches = Demonstrations(task, tokenizer, plan.schedule.batch, recipe.seed, longest)
    return Job(config, plan.schedule, model, method, batches)


def make_method(
    space: Workspace, config: MethodConfig, teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase
) -> Method:
    """The training method of this configuration, with its teacher, tokenizer and cache."""
    recipe = space.recipe
    visible = visible_ids(tokenizer)
    method = METHODS[config.type](config, visible, teacher, tokenizer.eos_token_id, recipe.max_tokens)
    if isinstance(method, Joint):
        method.tokenizer = tokenizer
    cache = teacher_cache(space)
    if isinstance(method, SeqKD) and cache is not None and not isinstance(recipe.teacher, ServedConfig):
        weights = fingerprint(space.exported("teacher"), visible)
        method.kept = KeptCompletions(cache, f"{weights} {recipe.teacher.dtype}")
    return method


def train_model(space: Workspace, role: Role, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train a model, from its last checkpoint if there is one, and export it."""
    recipe = space.recipe
    job = make_job(space, role, task, tokenizer)
    if parallel.is_first():
        trained = parameters(job.model, trained_only=True)
        whole = parameters(job.model)
        print(f"{role}: {trained:,} of {whole:,} parameters trained")
    if job.config.rollouts is not None:
        job.method.sampler = rollout_server(space, role, job, tokenizer, job.config.rollouts).sampled
    trainer.train(
        job.model,
        job.method.loss,
        job.batches,
        job.schedule,
        space.work(role),
        prepare=job.method.prepare,
        validate=Validation(task, tokenizer, job.schedule.validate_examples, recipe.max_tokens),
        seed=recipe.seed,
        record=space.record(role),
        trackers=recipe.trackers,
    )
    plain = plain_builder(space, job.config, tokenizer)
    export(job.model, plain, tokenizer, space.exported(role), space.record(role))


def plain_builder(
    space: Workspace, config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> Callable[[], PreTrainedModel]:
    """A function that builds a model of this configuration without adapters."""
    without = config.model_copy(update={"lora": None})
    return partial(build, without, tokenizer, space.recipe.seed, space.exported("teacher"))


def load_teacher(space: Workspace) -> Teacher:
    """The exported or served teacher. Raises RecipeError if it is not trained yet."""
    config = space.recipe.teacher
    if isinstance(config, ServedConfig):
        return served_teacher(config, teacher_cache(space))
    if not space.is_exported("teacher"):
        raise RecipeError(f"no teacher in {space.exported('teacher')}: train it first (--stage teacher)")
    return load_model(space.exported("teacher"), getattr(torch, config.dtype)).requires_grad_(False)


def teacher_cache(space: Workspace, name: str = "teacher") -> TeacherCache | None:
    """The cache for one teacher's answers; None if the recipe sets `teacher_cache` to 0."""
    megabytes = space.recipe.teacher_cache
    return TeacherCache(space.recipe.work / f"{name}.sqlite", megabytes * 1_000_000) if megabytes else None


def rollout_server(
    space: Workspace, role: Role, job: Job, tokenizer: PreTrainedTokenizerBase, config: RolloutConfig
) -> RolloutServer:
    """The rollout server of a model. A whole model is put into its directory, so that it can be started."""
    directory = config.directory or space.work(role) / "rollouts"
    if not (directory / "config.json").exists():
        plain = plain_builder(space, job.config, tokenizer)
        export(job.model, plain, tokenizer, directory, space.record(role))
    if parallel.is_first():
        print(f"{role}: start the rollout server at {config.url} with")
        print(f"  VLLM_SERVER_DEV_MODE=1 vllm serve {directory}")
    return RolloutServer(config.url, directory, config.every)


def place(model: PreTrainedModel, compiled: bool) -> None:
    """Move a model to this process's device, shard it over the processes, and compile it if `compiled`."""
    if compiled:  # a sharded model gathers parameters between its layers, so layers are compiled
        blocks = parallel.blocks_of(model) if parallel.size() > 1 else [model.get_decoder()]
        for block in blocks:
            block.compile(dynamic=True)
    parallel.shard(model)
