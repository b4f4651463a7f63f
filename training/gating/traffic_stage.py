"""The router from completions that were served: recorded by gateways, or asked of one for this purpose.

No model writes here. Both read what was written, once, and the gate is fitted to that. So the teacher may be
a server, and prompts need no right answers. Such a router has no calibration: its price is found while it
serves, or by `wheels calibrate`.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.examples import sources_of
from measuring.gateway import GatewayClient
from measuring.json_lines import DataError
from measuring.trajectories import SUFFIX, Trajectory, TrajectoryFile, read_trajectories
from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig
from training.gate_config import GateConfig, GatewayRollouts, QualityGain, RecordedRollouts
from training.gating.fitting import fit
from training.gating.head import Head
from training.gating.lessons import Lessons, Trajectories, span_gain, teacher_view, token_gain
from training.gating.opinions import Observer
from training.gating.rounds import correlation
from training.loop.progress import console
from training.models import load_with_rows, reserved_rows
from training.parallel import device, onto_device
from training.reading import check_readout, context_of
from training.tasks import Task
from training.teacher import Teacher
from training.tokenizer import encode_prompts, visible_ids

HELD_OUT = 10
"""One prompt of this many tells how good the gate is, and is not learned from in that trial."""
UNLIMITED = 2**62
POSITIONS = 250_000
"""Most that the gate is fitted on: memory does not grow with the traffic."""
ROWS = 16
"""Completions that are read together."""


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
    """Longest completion that a gateway is asked for."""
    seed: int

    def run(self, work: Path, out: Path) -> RouterCheckpoint:
        """Write the router to `out`.

        Args:
            work: directory of what a gateway was asked for.
            out: of the checkpoint.

        Raises:
            DataError: there are no completions, or they are not this student's.
            GatewayError: the gateway cannot be used.
            ServerError: the teacher's server cannot be used.
        """
        model = load_with_rows(self.student, self.tokenizer).requires_grad_(False)
        onto_device(model)
        check_readout(model, "student")
        trajectories = self.readable(self.trajectories(work), model)
        lessons = self.lessons(model, trajectories)
        self.report(model, lessons)
        head = self.fitted(model, lessons)
        expected = sum(len(trajectory.tokens) for trajectory in trajectories) / len(trajectories)
        checkpoint = self.checkpoint(head, expected, len(trajectories))
        checkpoint.save(out)
        return checkpoint

    def trajectories(self, work: Path) -> list[Trajectory]:
        """Recorded ones, or those that the gateway writes now."""
        rollouts = self.config.rollouts
        if isinstance(rollouts, RecordedRollouts):
            return list(read_trajectories(rollouts.directory))
        if isinstance(rollouts, GatewayRollouts):
            asked = Asked(rollouts, self.tokenizer, self.task, self.config, self.max_tokens, self.seed)
            return asked.trajectories(work / "trajectories")
        raise ValueError(f"rollouts {rollouts.type} are not written by a gateway")

    def readable(self, trajectories: Sequence[Trajectory], model: PreTrainedModel) -> list[Trajectory]:
        """Those that fit into the student's context.

        Raises:
            DataError: there are none, or they have ids that the tokenizer does not.
        """
        longest = context_of(model)
        visible = visible_ids(self.tokenizer)
        kept = []
        for trajectory in trajectories:
            if max(*trajectory.prompt, *trajectory.tokens) >= visible:
                raise DataError(
                    f"the completions have token ids that the tokenizer does not: not of {self.student}?"
                )
            if len(trajectory.prompt) + len(trajectory.tokens) <= longest:
                kept.append(trajectory)
        if len(kept) < HELD_OUT:
            raise DataError(f"{len(kept)} completions to learn from, want at least {HELD_OUT}")
        return kept

    def lessons(self, model: PreTrainedModel, trajectories: Sequence[Trajectory]) -> Lessons:
        """What asking gains at every position, or at `POSITIONS` of them drawn at random."""
        visible = visible_ids(self.tokenizer)
        observer = Observer(model, self.teacher, visible, self.tokenizer.eos_token_id)
        total = sum(len(trajectory.tokens) for trajectory in trajectories)
        generator = torch.Generator().manual_seed(self.seed)
        numbers: dict[tuple[int, ...], int] = {}
        parts = []
        order = sorted(trajectories, key=lambda trajectory: len(trajectory.prompt) + len(trajectory.tokens))
        for first in track(range(0, len(order), ROWS), "router: both models read", console=console):
            rows = order[first : first + ROWS]
            sources = [numbers.setdefault(tuple(row.prompt), len(numbers)) for row in rows]
            part = self.lessons_of(observer.seen(rows), torch.tensor(sources))
            drawn = torch.rand(len(part), generator=generator) < POSITIONS / total
            parts.append(part.where(drawn))
        return Lessons.join([part for part in parts if len(part)])

    def lessons_of(self, seen: Trajectories, sources: Tensor) -> Lessons:
        """Of completions whose rows come of these sources."""
        gain = self.config.gain
        if isinstance(gain, QualityGain):
            raise ValueError("gain quality needs rollouts in process")
        positions = seen.positions
        target, known = span_gain(
            token_gain(gain, positions), positions.row, seen.by_teacher, self.config.ask_tokens
        )
        view = teacher_view(positions)
        lessons = Lessons(
            positions.states, target, seen.by_teacher, positions.row, sources[positions.row], view
        )
        return lessons.where(known)

    def report(self, model: PreTrainedModel, lessons: Lessons) -> None:
        """Print how well a gate that has not seen a tenth of the prompts tells what asking gains there."""
        held_out = lessons.source % HELD_OUT == 0
        if not held_out.any() or held_out.all():
            return
        unseen = lessons.where(held_out)
        head = self.fitted(model, lessons.where(~held_out))
        found = correlation(head.scores(unseen.states), unseen.target)
        console.print(
            f"router: {len(lessons):,} positions of {int(lessons.source.max()) + 1:,} prompts; on those held "
            f"out, score and gain correlate by {found:.3f}"
        )

    def fitted(self, model: PreTrainedModel, lessons: Lessons) -> Head:
        """Taps and gate."""
        torch.manual_seed(self.seed)
        head = Head(model, reserved_rows(model, self.tokenizer), self.config.width).to(device())
        head.start_from(lessons.states)
        fit(head, lessons, self.config, self.seed)
        return head.requires_grad_(False).eval()

    def checkpoint(self, head: Head, expected_tokens: float, completions: int) -> RouterCheckpoint:
        """All of it, as it is exported."""
        config = self.config
        reserved = head.gate.reserved
        return RouterCheckpoint(
            config=RouterConfig(
                reserved_start=reserved.start,
                reserved_count=reserved.count,
                gate_width=config.width,
                span_tokens=config.span_tokens,
                ask_tokens=config.ask_tokens,
                expected_tokens=expected_tokens,
                calibration={},
                fingerprints=Fingerprints.of(self.student, reserved, self.teacher_name),
                training={
                    "gain": config.gain.type,
                    "objective": config.objective.type,
                    "rollouts": config.rollouts.type,
                    "completions": completions,
                    "seed": self.seed,
                    "task": self.task.name,
                },
            ),
            taps=head.taps,
            gate=head.gate.state_dict(),
        )


@dataclass(frozen=True)
class Asked:
    """Completions that a gateway is asked for, at budgets drawn at random."""

    gateway: GatewayRollouts
    tokenizer: PreTrainedTokenizerBase
    task: Task
    config: GateConfig
    max_tokens: int
    seed: int
    transport: httpx.AsyncClient | None = None
    """In place of one of its own."""

    def trajectories(self, directory: Path) -> list[Trajectory]:
        """All of them; those that `directory` holds are not asked for again.

        Raises:
            GatewayError: the gateway cannot be used.
            DataError: it makes other prompts of the sources than the tokenizer does.
        """
        directory.mkdir(parents=True, exist_ok=True)
        done = list(read_trajectories(directory)) if any(directory.glob(f"*{SUFFIX}")) else []
        file = directory / f"{len(done)}{SUFFIX}"
        return done + asyncio.run(self._rest(file, len(done), self.config.prompts))

    async def _rest(self, file: Path, done: int, wanted: int) -> list[Trajectory]:
        stream = self.task.router(self.seed)
        rng = random.Random(self.seed)
        written = TrajectoryFile(file, UNLIMITED)
        found = []
        client = GatewayClient(
            self.gateway.url,
            concurrency=self.gateway.concurrency,
            max_tokens=self.max_tokens,
            retries=2,
            transport=self.transport,
        )
        async with client:
            for number in range(wanted // self.gateway.batch + 1):
                examples = [next(stream) for _ in range(self.gateway.batch)]
                budget = rng.choice(self.config.budgets)
                first = number * self.gateway.batch
                if first < done or first >= wanted:
                    continue
                sources = sources_of(examples)
                replies = await client.ask_all(sources, budget)
                prompts = encode_prompts(self.tokenizer, sources)
                for prompt, reply in zip(prompts, replies, strict=True):
                    if reply.prompt_tokens != len(prompt):
                        raise DataError(
                            f"the gateway reads {reply.prompt_tokens} tokens where the recipe's chat "
                            f"template makes {len(prompt)}: does it serve the recipe's student?"
                        )
                    trajectory = Trajectory(prompt, reply.token_ids, reply.spans, budget)
                    written.add(trajectory)
                    found.append(trajectory)
        return found
