"""Trains the router of a frozen pair from rollouts in process, and calibrates it and the confidence gates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from measuring.examples import Example, sources_of
from router.checkpoint import Fact, Fingerprints, Points, RouterCheckpoint, fingerprint
from router.gate import CONFIDENCE_GATES, Gate, RandomGate, TeachersGate
from router.gate_names import LEARNED
from router.reserved import ReservedRows
from training.config import RecipeError
from training.gate_config import DifferenceObjective, GateConfig, QualityGain
from training.gating.calibration import calibrate, spare_prices
from training.gating.cheaper import TEACHER, Cheaper, alone, costs_of
from training.gating.checkpoint import Calibrated, checkpoint_of
from training.gating.duals import asking_share
from training.gating.head import Head
from training.gating.judge import Judge, drawn_in_process
from training.gating.prompts import Trees, rollout_prompts
from training.gating.rollout import ClosedLoop
from training.gating.room import Room
from training.gating.rounds import Rounds, Trained, train_gate
from training.gating.tree import Alone
from training.gating.validation import Gap, GateValidation
from training.models import load_model, load_with_rows, reserved_rows
from training.parallel import device, onto_device
from training.reading import check_readout, check_steps
from training.tasks import Task
from training.tokenizer import visible_ids


@dataclass(frozen=True)
class FrozenPair:
    """The directories of student and teachers, which are not changed."""

    teacher: Path
    student: Path
    tokenizer: PreTrainedTokenizerBase
    span_tokens: int
    """Longest span, in tokens."""
    ask_tokens: int
    """Number of tokens in one call."""
    max_tokens: int
    """Longest completion, in tokens."""
    cheaper: tuple[Cheaper[Path], ...] = ()
    """The cheaper teachers, from the cheapest to the dearest."""

    def load(self) -> ClosedLoop:
        """Load all models into a closed loop with a random gate.

        Raises:
            RecipeError: a model does not exist.
            UnreadableModel: a model's states and logits cannot be read as the model computes them.
        """
        for path in self.models:
            if not (path / "config.json").exists():
                raise RecipeError(f"no model in {path}")
        student = load_with_rows(self.student, self.tokenizer).requires_grad_(False)
        onto_device(student)
        check_steps(student, "student")
        teachers = []
        for name, path in self.teachers.items():
            teacher = load_model(path).requires_grad_(False)
            onto_device(teacher)
            check_steps(teacher, name)
            teachers.append(teacher)
        check_readout(student, "student")
        return ClosedLoop(
            student=student,
            teacher=teachers[-1],
            score=RandomGate(reserved_rows(student, self.tokenizer)),
            visible=visible_ids(self.tokenizer),
            end=self.tokenizer.eos_token_id,
            span_tokens=self.span_tokens,
            ask_tokens=self.ask_tokens,
            max_tokens=self.max_tokens,
            cheaper=tuple(teachers[:-1]),
        )

    @property
    def teachers(self) -> dict[str, Path]:
        """The teachers' directories by name, from the cheapest to the dearest."""
        return {**{each.name: each.model for each in self.cheaper}, TEACHER: self.teacher}

    @property
    def models(self) -> list[Path]:
        """The directories of all models."""
        return [self.student, self.teacher, *(each.model for each in self.cheaper)]


class Fitted(NamedTuple):
    """A trained gate, and a digest of its training data."""

    trained: Trained
    data: str
    """Digest of the models, the task's examples and the prompts."""


@dataclass(frozen=True)
class RouterStage:
    """Trains the router of one pair: fits the gate, calibrates it, and exports the checkpoint."""

    pair: FrozenPair
    task: Task
    config: GateConfig
    seed: int

    def run(self, work: Path, out: Path) -> RouterCheckpoint:
        """Train the router and write it to `out`.

        Args:
            work: directory of the log and of the file that a killed run resumes from.
            out: directory of the checkpoint.

        Raises:
            DataError: the task's examples do not fit into the models' contexts.
        """
        fitted = self.fitted(work)
        calibrated = self.calibrated(fitted.trained.head.gate, list(fitted.trained.prices.values()))
        checkpoint = self.checkpoint(fitted, calibrated)
        checkpoint.save(out)
        return checkpoint

    def fitted(self, work: Path) -> Fitted:
        """Taps and gate after all rounds; the taps are in the student's reserved rows."""
        config = self.config
        tokenizer = self.pair.tokenizer
        examples = self._room.drawn(self.task.router(self.seed), config.prompts * config.rounds)
        prompts = rollout_prompts(tokenizer, sources_of(examples), config, self.seed)
        torch.manual_seed(self.seed)  # for the gate's first weights
        costs = costs_of(self.pair.cheaper)
        head = Head(self.loop.student, self._reserved, config.width, costs).to(device())
        drawn = config.gain.teacher_references if isinstance(config.gain, QualityGain) else 0
        judge = Judge(self.task, tokenizer, examples, prompts.ids, drawn, drawn_in_process(self.loop))
        # In the first round, the random gate asks with probability 1 - price.
        prices = {rate: 1 - asking_share(rate, config.ask_tokens) for rate in sorted(set(prompts.rates))}
        rounds = Rounds(self.loop, head, config, self.seed, prices, judge.worth, self._judged)
        models = [fingerprint(path, self._reserved.start) for path in self.pair.models]
        models += [f"{each.name} {each.cost}" for each in self.pair.cheaper]
        from_what = origin(models, self.task, examples, self.pair.max_tokens)
        trained = train_gate(rounds, prompts, tokenizer, work, from_what)
        return Fitted(trained, sha256(f"{from_what} {prompts.digest()}".encode()).hexdigest())

    def calibrated(self, gate: Gate, duals: Sequence[float] = ()) -> Calibrated:
        """Calibrate this gate and the confidence gates.

        Args:
            gate: the trained gate.
            duals: its dual variables, as further prices to choose from; empty: none.
        """
        config = self.config
        validation = self._validation
        gates: dict[str, Gate] = {LEARNED: gate}
        if config.template is None:  # confidence gates are for prompts without budget words
            for name, make in CONFIDENCE_GATES.items():
                gates[name] = make(self._reserved)
        for name, made in gates.items():
            validation.trees.add(name, made)
        gap = validation.gap
        print(f"on validation data: student {gap.student:.3f}, teacher {gap.teacher:.3f}", flush=True)
        calibrated = Calibrated(validation.expected_tokens)
        for name in gates:
            points = calibrate_gate(validation.trees, name, gap, config, duals if name == LEARNED else ())
            calibrated.prices[name] = points.prices
            calibrated.spares[name] = points.spares
            show_prices(name, points.prices)
        if isinstance(gate, TeachersGate):
            for number, teacher in enumerate(self.pair.teachers):
                name = alone(teacher)
                validation.trees.add(name, Alone(gate, number))
                calibrated.alone[teacher] = calibrate_gate(validation.trees, name, gap, config).prices
                show_prices(name, calibrated.alone[teacher])
        return calibrated

    def checkpoint(self, fitted: Fitted, calibrated: Calibrated) -> RouterCheckpoint:
        """The router checkpoint to export."""
        fingerprints = Fingerprints.of(self.pair.student, self._reserved, self.pair.teacher.name)
        head = fitted.trained.head
        facts = self._facts(fitted)
        return checkpoint_of(head, self.config, calibrated, self.pair.cheaper, fingerprints, facts)

    def _facts(self, fitted: Fitted) -> dict[str, Fact]:
        """Facts about the training, to keep in the checkpoint."""
        config = self.config
        objective = config.policy(fitted.trained.round) or DifferenceObjective()
        facts: dict[str, Fact] = {
            "objective": objective.type,
            "gain": config.gain.type,
            "task": self.task.name,
            "seed": self.seed,
            "rounds": config.rounds,
            "prompts": config.prompts,
            "data": fitted.data,
        }
        if fitted.trained.prices:
            facts["round"] = fitted.trained.round
            facts["duals"] = sorted(fitted.trained.prices.items())
        return facts

    def _judged(self, gate: Gate) -> float:
        return self._validation.judged(gate)  # made when the first gate is judged

    @cached_property
    def _validation(self) -> GateValidation:
        config = self.config
        examples = self._room.kept(self.task.valid()[: config.calibration_examples], "validation")
        tokenizer = self.pair.tokenizer
        return GateValidation(self.loop, self.task, tokenizer, examples, config, self._reserved)

    @cached_property
    def loop(self) -> ClosedLoop:
        """The pair, loaded once."""
        return self.pair.load()

    @cached_property
    def _reserved(self) -> ReservedRows:
        return reserved_rows(self.loop.student, self.pair.tokenizer)

    @cached_property
    def _room(self) -> Room:
        loop = self.loop
        models = [model.config for model in (loop.student, loop.teacher, *loop.cheaper)]
        return Room.of(self.pair.tokenizer, models, self.pair.max_tokens)


def show_prices(name: str, points: Sequence[tuple[float, float]]) -> None:
    """Print a gate's calibrated prices, (budget, price) for each budget."""
    shown = " ".join(f"{budget:g}:{price:.4g}" for budget, price in points)
    print(f"calibrated {name}: {shown}", flush=True)


class GatePoints(NamedTuple):
    """Prices and spare prices of one gate, as (fraction, price) pairs."""

    prices: Points
    spares: Points
    """Spare prices, see `router.policy.Policy`."""


def calibrate_gate(
    trees: Trees, name: str, gap: Gap, config: GateConfig, others: Sequence[float] = ()
) -> GatePoints:
    """Prices and spare prices of one gate for all budgets.

    Args:
        trees: the trees of the validation prompts.
        name: name of the gate in the trees.
        gap: the gap between student and teacher on these prompts.
        config: budgets and spans.
        others: further prices to compare with those that aim at a budget's rate.
    """
    spans = (config.span_tokens, config.ask_tokens)
    together: list[tuple[float, ...]] = [config.budgets]
    if config.template is not None:
        together = [(budget,) for budget in config.budgets]
    prices = []
    spares = []
    for budgets in together:
        tree = trees(budgets[0])
        found = calibrate(tree, name, budgets, spans, gap.share, gap.noise, others)
        prices += found
        spares += spare_prices(tree, name, found, spans)
    return GatePoints(falling(prices), falling(spares))


def falling(points: Points) -> Points:
    """The points with prices that do not rise with the fraction: each is at most the price before it."""
    fractions, prices = zip(*points, strict=True)
    return list(zip(fractions, accumulate(prices, min), strict=True))


def origin(models: Sequence[str], task: Task, examples: Sequence[Example], max_tokens: int) -> str:
    """Digest of all that rollouts come from except their prompts. A run resumes only if it is the same.

    Args:
        models: the fingerprints of the models.
        task: the task; its name and options count.
        examples: the examples; their references count.
        max_tokens: longest completion, in tokens.
    """
    references = [example.references.to_json() for example in examples]
    options = {name: str(value) for name, value in task.options.items()}
    return sha256(json.dumps([*models, task.name, options, max_tokens, references]).encode()).hexdigest()
