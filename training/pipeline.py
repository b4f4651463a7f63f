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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import trainer
from training.batches import Demonstrations
from training.config import ModelConfig, Recipe
from training.methods import METHODS
from training.models import load_model, new_model, parameters, save_model
from training.router_stage import train_router
from training.tasks import Task, make_task
from training.tokenizer import load_tokenizer, train_tokenizer

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


STAGES = ("teacher", "student", "router")
EXPORTED_EXAMPLES = 200


def run(recipe: Recipe, stages: tuple[str, ...] = STAGES) -> None:
    torch.set_num_threads(recipe.threads)
    space = Workspace(recipe)
    task = make_task(recipe.task.name, **recipe.task.options)
    tokenizer = ensure_tokenizer(space, task)
    for role in ("teacher", "student"):
        if role in stages and not (space.exported(role) / "config.json").exists():
            train_model(space, role, task, tokenizer)
    if "router" in stages and not (space.exported("router") / "router.json").exists():
        export_examples(task, recipe.output / "examples.jsonl")
        train_router(
            space.exported("teacher"), space.exported("student"), space.exported("router"),
            task, tokenizer, recipe.router, recipe.max_tokens, recipe.seed,
        )  # fmt: skip


def ensure_tokenizer(space: Workspace, task: Task) -> PreTrainedTokenizerBase:
    if not (space.tokenizer / "tokenizer.json").exists():
        config, rng = space.recipe.tokenizer, Random(space.recipe.seed)
        examples = islice(task.train(TOKENIZER_SEED), config.examples)
        texts = (text for e in examples for text in (e.source, e.references.sample(rng)))
        context = space.recipe.teacher.shape.context
        train_tokenizer(texts, config.size, context).save_pretrained(space.tokenizer)
    return load_tokenizer(space.tokenizer)


def train_model(
    space: Workspace, role: str, task: Task, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    recipe = space.recipe
    config: ModelConfig = getattr(recipe, role)
    needs_teacher = METHODS[config.method.type].needs_teacher
    teacher = load_model(space.exported("teacher")) if needs_teacher else None
    model = new_model(config.shape, tokenizer, recipe.seed)
    print(f"{role}: {parameters(model):,} parameters")
    if config.schedule.compile:
        for one in filter(None, (model, teacher)):
            one.get_decoder().compile(dynamic=True)
    method = METHODS[config.method.type](config.method, len(tokenizer), teacher, tokenizer.eos_token_id)
    batches = Demonstrations(task, tokenizer, config.schedule.batch, recipe.seed)
    trainer.train(model, method.loss, batches, config.schedule, space.model(role))
    save_model(model, tokenizer, space.exported(role))
    return model


def export_examples(task: Task, path: Path) -> None:
    """Held-out examples with all their right answers, so that a demo can score itself without `training`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"source": e.source, "references": e.references.to_json()} for e in task.test()[:EXPORTED_EXAMPLES]
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
