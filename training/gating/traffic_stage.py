"""Trains the router from served completions, which gateways have recorded or write on request.

No model writes in this process. Both models read the completions once, and the gate is fitted to what they
compute. So the teacher may be a server, and prompts need no right answers.

If the gateway takes routers, it writes each later round with the gate of the rounds before, and the prices of
the budgets are found with it. If not, the router has no calibration: its price is found while it serves, or
by `wheels calibrate`.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from openai import DefaultAsyncHttpxClient
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.chats import Source
from measuring.examples import Example, sources_of
from measuring.trajectories import SUFFIX, Trajectory, read_trajectories
from router.checkpoint import Fact, Fingerprints, Points, RouterCheckpoint, fingerprint
from router.gate_names import LEARNED
from training.gate_config import (
    WHERE,
    ConstrainedObjective,
    GateConfig,
    GatewayRollouts,
    QualityGain,
    RecordedRollouts,
)
from training.gating.agreement import correlation, score_of
from training.gating.asked import AskedPrompts
from training.gating.cheaper import Cheaper, costs_of
from training.gating.checkpoint import Calibrated, checkpoint_of
from training.gating.constrained import Choices, Critic, fit_constrained
from training.gating.duals import RECENT, asking_price
from training.gating.expected_gain import expected_gain
from training.gating.fitting import fit
from training.gating.head import Head
from training.gating.judge import Judge
from training.gating.lessons import Lessons
from training.gating.room import Room
from training.gating.served_calibration import Found, ServedCalibration
from training.gating.served_forks import ServedForks, drawn_by
from training.gating.traffic import HELD_OUT, Taught, TrafficReader
from training.kept_tokens import KeptTokens
from training.loop.progress import console
from training.models import load_with_rows, reserved_rows
from training.parallel import device, onto_device
from training.reading import check_readout
from training.running_gateway import RunningGateway
from training.tasks import Task
from training.teacher import Teacher
from training.teacher_cache import TeacherCache
from training.tokenizer import encode_prompts, visible_ids

POSITIONS = 250_000
"""Most positions that the gate is fitted on, so that memory does not grow with the traffic."""
FORKS_BYTES = 1_000_000_000
"""Largest file of finished completions, in bytes; beyond it, the least recently used ones are dropped."""


@dataclass(frozen=True)
class TrafficStage:
    """Trains the router of one pair from completions that both models wrote."""

    student: Path
    teacher: Teacher
    teacher_name: str
    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: GateConfig
    max_tokens: int
    """Longest completion to request from a gateway, in tokens."""
    seed: int
    transport: Callable[[], DefaultAsyncHttpxClient] | None = None
    """Makes the HTTP client for the gateway; None: the default one."""
    cheaper: Sequence[Cheaper[Teacher]] = ()
    """The cheaper teachers, from the cheapest to the dearest."""

    def run(self, work: Path, out: Path) -> RouterCheckpoint:
        """Train the router and write it to `out`.

        Args:
            work: directory of the gateway's replies, from which a stopped run resumes.
            out: directory of the checkpoint.

        Raises:
            DataError: there are too few completions, or they are not this student's.
            GatewayError: the gateway cannot be used.
            ServerError: the teacher's server cannot be used.
        """
        rollouts = self.config.rollouts
        if isinstance(rollouts, RecordedRollouts):
            checkpoint = self.of_recorded(rollouts)
        elif isinstance(rollouts, GatewayRollouts):
            checkpoint = self.of_gateway(rollouts, work)
        else:
            raise ValueError(f"rollouts {rollouts.type} are not written by a gateway")
        checkpoint.save(out)
        return checkpoint

    def of_recorded(self, rollouts: RecordedRollouts) -> RouterCheckpoint:
        """The router trained from completions that gateways recorded."""
        reader = self.reader
        trajectories = reader.readable(list(read_trajectories(rollouts.directory)))
        taught = reader.taught(trajectories, POSITIONS)
        head = self.fitted(taught)
        self.report(taught)
        return self.checkpoint(head, trajectories)

    def of_gateway(self, rollouts: GatewayRollouts, work: Path) -> RouterCheckpoint:
        """The router trained from completions that a gateway writes, round by round.

        If the gateway takes routers, it serves with the result afterwards.
        """
        gateway = self.gateway(rollouts)
        examples = self.examples(rollouts)
        rounds = self.sources(examples)
        self._forget_another_run(work, rounds)
        reader = self.reader
        if isinstance(self.config.gain, QualityGain):
            reader = replace(reader, forks=self.forks(self.config.gain, examples, gateway, work))
        router: RouterCheckpoint | None = None
        taught: list[Taught] = []
        trajectories: list[Trajectory] = []
        for number, sources in enumerate(rounds):
            file = work / "trajectories" / str(number) / f"asked{SUFFIX}"
            seed = self.seed + number
            asked = AskedPrompts(
                gateway, self.tokenizer, sources, self.config.budgets, rollouts.batch, seed, file
            )
            if router is not None and rollouts.router is not None and not asked.is_complete:
                gateway.take(router, rollouts.router)
            new = reader.readable(asked.trajectories())
            trajectories += new
            taught.append(reader.taught(new, POSITIONS // len(rounds)))
            head = self.fitted(Taught.join(taught))
            scores = head.scores(taught[-1].lessons.states[-RECENT:], taught[-1].confidence[-RECENT:])
            first = self._first_prices(scores)
            router = with_prices(self.checkpoint(head, trajectories), first, first)
        self.report(Taught.join(taught))
        assert router is not None  # there is at least one round
        if rollouts.router is None:
            return with_prices(router, [], [])
        return self.calibrated(gateway, router, rollouts.router, scores, work)

    def gateway(self, rollouts: GatewayRollouts) -> RunningGateway:
        """The gateway that writes the completions."""
        assert rollouts.url is not None  # a started gateway has one, see `with_addresses`
        return RunningGateway(rollouts.url, self.max_tokens, rollouts.concurrency, transport=self.transport)

    def calibrated(
        self, gateway: RunningGateway, router: RouterCheckpoint, directory: Path, scores: Tensor, work: Path
    ) -> RouterCheckpoint:
        """The router with prices of all budgets, found with the gateway on validation prompts.

        Args:
            gateway: a gateway that serves with the router in `directory`.
            router: the router to calibrate.
            directory: the directory from which the gateway loads routers.
            scores: (N,), scores of the router's gate.
            work: directory in which the gateway's replies are kept.
        """
        examples = self._room.kept(self.task.valid()[: self.config.calibration_examples], "validation")

        def put(found: Found) -> None:
            gateway.take(with_prices(router, *found), directory)

        def qualities(first: int, answers: list[str]) -> list[float]:
            return self.task.score(examples[first : first + len(answers)], answers).quality

        scored = self.task.has_references or "judge" in self.task.options
        found = ServedCalibration(
            gateway,
            sources_of(examples),
            self.config.budgets,
            self.config.ask_tokens,
            scores,
            put,
            work / "calibration" / f"{with_prices(router, [], []).digest()[:16]}-{len(examples)}.json",
            qualities if scored else None,
        ).found()
        return with_prices(router, *found)

    def sources(self, examples: list[Example]) -> list[list[Source]]:
        """The sources of each round."""
        count = self.config.prompts
        drawn = sources_of(examples)
        return [drawn[first : first + count] for first in range(0, len(drawn), count)]

    def examples(self, rollouts: GatewayRollouts) -> list[Example]:
        """The examples of all rounds; there is one round if the gateway keeps its gate."""
        rounds = self.config.rounds if rollouts.router is not None else 1
        return self._room.drawn(self.task.router(self.seed), self.config.prompts * rounds)

    def forks(
        self, gain: QualityGain, examples: list[Example], gateway: RunningGateway, work: Path
    ) -> ServedForks:
        """The object that computes the gain `quality` of the gateway's completions.

        Args:
            gain: the recipe's gain.
            examples: the examples of all rounds.
            gateway: the gateway that writes the completions, and finishes their forks.
            work: directory of the file of finished completions.
        """
        kept = KeptTokens(TeacherCache(work / "forks.sqlite", FORKS_BYTES))
        end = self.tokenizer.eos_token_id
        visible = visible_ids(self.tokenizer)
        draw = drawn_by(self.teacher, kept, visible=visible, end=end, longest=self.max_tokens)
        prompts = encode_prompts(self.tokenizer, sources_of(examples))
        numbers: dict[tuple[int, ...], int] = {}
        for number, prompt in enumerate(prompts):
            numbers.setdefault(tuple(prompt), number)
        return ServedForks(
            gateway=gateway,
            judge=Judge(self.task, self.tokenizer, examples, prompts, gain.teacher_references, draw),
            numbers=numbers,
            kept=kept,
            student=fingerprint(self.student, reserved_rows(self.model, self.tokenizer).start),
            end=end,
            max_tokens=self.max_tokens,
        )

    def report(self, taught: Taught) -> None:
        """Print the correlation of score and gain on a tenth of the prompts, for a gate fitted to others."""
        lessons = taught.lessons
        held_out = lessons.source % HELD_OUT == 0
        if not held_out.any() or held_out.all():
            return
        unseen = lessons.where(held_out)
        head = self.regressed(lessons.where(~held_out), taught.confidence[~held_out])
        scores = head.scores(unseen.states, taught.confidence[held_out])
        found = correlation(scores, score_of(head.gate, unseen.target))
        console.print(
            f"router: {len(lessons):,} positions of {int(lessons.source.max()) + 1:,} prompts; on those held "
            f"out, score and gain correlate by {found:.3f}"
        )

    def fitted(self, taught: Taught) -> Head:
        """Fit taps and gate: by regression, or as a policy that starts from the regression."""
        head = self.regressed(taught.lessons, taught.confidence)
        objective = self.config.objective
        if isinstance(objective, ConstrainedObjective) and taught.branches is not None:
            critic = Critic(len(head.gate.mean), self.config.width, objective.prices).to(head.taps.device)
            head.requires_grad_(True).train()
            choices = Choices(taught.lessons, taught.branches)
            fit_constrained(head, critic, choices, self.config, objective, self.seed)
        return head.requires_grad_(False).eval()

    def regressed(self, lessons: Lessons, confidence: Tensor) -> Head:
        """Fit taps and gate by regression of the score on the gain.

        Args:
            lessons: N positions.
            confidence: (N, 10), the confidence features of the same positions.
        """
        torch.manual_seed(self.seed)
        reserved = reserved_rows(self.model, self.tokenizer)
        head = Head(self.model, reserved, self.config.width, costs_of(self.cheaper)).to(device())
        head.start_from(lessons.states, confidence)
        if isinstance(self.config.gain, QualityGain):
            lessons = replace(lessons, target=expected_gain(head, lessons, self.seed, confidence))
        fit(head, lessons, self.config, self.seed, confidence)
        return head.requires_grad_(False).eval()

    def checkpoint(self, head: Head, trajectories: Sequence[Trajectory]) -> RouterCheckpoint:
        """The router checkpoint without prices."""
        config = self.config
        facts: dict[str, Fact] = {
            "gain": config.gain.type,
            "objective": config.objective.type,
            "rollouts": config.rollouts.type,
            "completions": len(trajectories),
            "seed": self.seed,
            "task": self.task.name,
        }
        tokens = sum(len(trajectory.tokens) for trajectory in trajectories)
        length = Calibrated(expected_tokens=tokens / len(trajectories))
        fingerprints = Fingerprints.of(self.student, head.gate.reserved, self.teacher_name)
        return checkpoint_of(head, config, length, self.cheaper, fingerprints, facts)

    def _first_prices(self, scores: Tensor) -> Points:
        """The price of each budget, as a quantile of the gate's scores (N,)."""
        points = []
        for budget in self.config.budgets:
            points.append((budget, asking_price(scores.double(), budget, self.config.ask_tokens)))
        return points

    def _forget_another_run(self, work: Path, rounds: Sequence[Sequence[Source]]) -> None:
        """Delete replies in `work` that are of another pair, other prompts or other settings."""
        settings = self.config.model_dump(mode="json", exclude=WHERE)
        reserved = reserved_rows(self.model, self.tokenizer)
        of: dict[str, Any] = {
            "pair": Fingerprints.of(self.student, reserved, self.teacher_name).model_dump(),
            "router": settings,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "sources": sha256(json.dumps(rounds).encode()).hexdigest(),
        }
        if self.cheaper:
            of["cheaper_teachers"] = [(each.name, each.cost) for each in self.cheaper]
        run = json.dumps(of)
        file = work / "run.json"
        if not file.exists() or file.read_text() != run:
            for name in ("trajectories", "calibration"):
                shutil.rmtree(work / name, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
            file.write_text(run)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The student, loaded once."""
        model = load_with_rows(self.student, self.tokenizer).requires_grad_(False)
        onto_device(model)
        check_readout(model, "student")
        return model

    @cached_property
    def reader(self) -> TrafficReader:
        """The reader of all rounds."""
        cheaper = [each.model for each in self.cheaper]
        return TrafficReader(self.model, self.teacher, self.tokenizer, self.config, self.seed, cheaper)

    @cached_property
    def _room(self) -> Room:
        models = [self.model.config]
        for teacher in (self.teacher, *(each.model for each in self.cheaper)):
            if isinstance(teacher, PreTrainedModel):
                models.append(teacher.config)
        return Room.of(self.tokenizer, models, self.max_tokens)


def with_prices(router: RouterCheckpoint, prices: Points, spares: Points) -> RouterCheckpoint:
    """The router with these prices and spare prices of the learned gate; empty: no calibration."""
    calibration = {LEARNED: prices} if prices else {}
    spare = {LEARNED: spares} if spares else {}
    return replace(
        router, config=router.config.model_copy(update={"calibration": calibration, "spare": spare})
    )
