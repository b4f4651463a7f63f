"""Rounds of closed-loop rollouts, each followed by a fit of the gate on all of them.

What a round gave is written to a file: a killed run goes on behind its last whole round, as if nothing had
happened.
"""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router.gate import Gate, RandomGate
from training.gate_config import ConstrainedObjective, GateConfig, QualityGain
from training.gating.calibration import teacher_rate
from training.gating.constrained import ascended, fit_constrained
from training.gating.expected_gain import expected_gain
from training.gating.fitting import fit
from training.gating.forks import Worth, worth_of_asking
from training.gating.head import Head
from training.gating.lessons import Lessons, Trajectories, collect, span_gain, teacher_view, token_gain
from training.gating.prompts import Prompts
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout, with_gate
from training.loop.progress import Log, console
from training.tokenizer import decode_answer

SHOWN = 2
RECENT = 100_000
"""Positions whose scores the prices of the next rollouts are quantiles of."""


class Played(NamedTuple):
    """What one round gave."""

    metrics: dict[str, float]
    """Scalars to log."""
    asked: list[Rollout]
    """The completions of the half that asked."""


@dataclass
class Rounds:
    """Of one pair."""

    loop: ClosedLoop
    head: Head
    config: GateConfig
    seed: int
    prices: dict[float, float]
    """Of the next rollouts, by the rate that they aim at."""
    worth: Worth
    """Of completions of any prompts, by number over all rounds, in points of 100; for `gain: quality`."""
    seen: list[Lessons] = field(default_factory=list)
    """Of past rounds."""

    def play(self, prompts: Prompts) -> Played:
        """One round of rollouts, and a fit of the gate on this one and all before."""
        config = self.config
        loop = self.loop
        first = not self.seen
        torch.manual_seed(self.seed * 1_000_003 + len(self.seen))  # a resumed run draws the same
        gate: Gate = RandomGate(self.head.gate.reserved) if first else self.head.gate
        asking = with_gate(loop, gate, 0.0 if first else config.explore)
        # Half of the rollouts never ask: most of a served completion is the student's own path.
        half = len(prompts) // 2
        trajectories, completions = collect(asking, self._requests(prompts, half))
        taught = self._lessons(prompts, trajectories, completions)
        self.seen.append(taught)
        data = Lessons.join(self.seen)
        if first:
            self.head.start_from(data.states)
        if isinstance(config.gain, QualityGain):
            data = replace(data, target=expected_gain(self.head, data, self.seed))
        metrics = self._fit(data)
        install_taps(loop, self.head)
        asked = completions[half:]
        aims = prompts.rates[half:]
        seen = trajectories.positions
        realised = teacher_rate(asked)
        metrics |= {
            "positions": len(data),
            "variance": data.target.var().item(),
            "price": sum(self.prices.values()) / len(self.prices),
            "rate": realised,
            "violation": realised - sum(aims) / len(aims),
            "kl": seen.kl.mean().item(),
            "entropy": seen.entropy.mean().item(),
            "gate_kl": correlation(self.head.scores(seen.states), seen.kl),
            "gate_gain": correlation(self.head.scores(taught.states), taught.target),
        }
        self.prices = self._next_prices(data, asked, aims, first)
        return Played(metrics, asked)

    def _requests(self, prompts: Prompts, alone: int) -> list[Request]:
        """The first `alone` never ask, the others at the prices of the rates that they aim at."""
        requests = []
        for number, (ids, hidden) in enumerate(zip(prompts.ids, prompts.hidden, strict=True)):
            if number < alone:
                requests.append(Request(ids, hidden=hidden))
            else:
                price = self.prices[prompts.rates[number]]
                requests.append(Request(ids, price, FREE, hidden))
        return requests

    def _fit(self, data: Lessons) -> dict[str, float]:
        """Scalars to log."""
        objective = self.config.objective
        if isinstance(objective, ConstrainedObjective):
            return fit_constrained(self.head, data, self.config, objective, self.seed)
        return fit(self.head, data, self.config, self.seed)

    def _lessons(
        self, prompts: Prompts, trajectories: Trajectories, completions: Sequence[Rollout]
    ) -> Lessons:
        """What asking gains at every position of the rollouts, as the recipe counts it."""
        config = self.config
        seen = trajectories.positions
        view = teacher_view(seen)
        source = torch.tensor(prompts.sources)[seen.row]
        known = torch.ones_like(trajectories.by_teacher)
        if isinstance(config.gain, QualityGain):
            target = worth_of_asking(
                self.loop, prompts.ids, trajectories, completions, self._worth_in_this_round
            )
        else:
            target = token_gain(config.gain, seen)
            if not isinstance(config.objective, ConstrainedObjective):  # its critic looks ahead
                target, known = span_gain(target, trajectories, config.ask_tokens)
        return Lessons(seen.states, target, trajectories.by_teacher, seen.row, source, view).where(known)

    def _worth_in_this_round(self, rows: Sequence[int], whole: Sequence[list[int]]) -> Tensor:
        first = len(self.seen) * self.config.prompts
        return self.worth([first + row for row in rows], whole)

    def _next_prices(
        self, data: Lessons, asked: Sequence[Rollout], aims: Sequence[float], first: bool
    ) -> dict[float, float]:
        objective = self.config.objective
        if not isinstance(objective, ConstrainedObjective):
            scores = self.head.scores(data.states[-RECENT:])
            return {rate: torch.quantile(scores, 1 - rate).item() for rate in self.prices}
        if first:
            return dict.fromkeys(self.prices, math.sqrt(math.prod(objective.prices)))
        by_aim: dict[float, list[Rollout]] = defaultdict(list)
        for completion, aim in zip(asked, aims, strict=True):
            by_aim[aim].append(completion)
        prices = dict(self.prices)
        for aim, completions in by_aim.items():
            prices[aim] = ascended(self.prices[aim], teacher_rate(completions), aim)
        return prices

    def save(self, file: Path, run: dict[str, object]) -> None:
        """Atomic.

        Args:
            file: is replaced.
            run: what must be the same in a run that goes on from it.
        """
        scratch = file.with_suffix(".tmp")
        seen = [vars(taught) for taught in self.seen]
        torch.save({"run": run, "head": self.head.state_dict(), "prices": self.prices, "seen": seen}, scratch)
        os.replace(scratch, file)

    def restore(self, file: Path, run: dict[str, object]) -> None:
        """Changes nothing where there is no file, or one of another run."""
        if not file.exists():
            return
        saved = torch.load(file)
        if saved["run"] != run:
            return
        self.head.load_state_dict(saved["head"])
        self.prices = saved["prices"]
        self.seen = [Lessons(**taught) for taught in saved["seen"]]
        install_taps(self.loop, self.head)


def train_gate(
    rounds: Rounds, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, directory: Path, origin: str
) -> Head:
    """Play what is left of `config.rounds`. The taps end in the student's reserved rows.

    Args:
        rounds: what was played so far.
        prompts: `config.prompts` for each round.
        tokenizer: of the pair.
        directory: of the log and of what a killed run goes on from.
        origin: what identifies models and task.
    """
    config = rounds.config
    run = {
        "origin": origin,
        "config": config.model_dump(mode="json"),
        "seed": rounds.seed,
        "prompts": prompts.digest(),
    }
    file = directory / "rounds.pt"
    rounds.restore(file, run)
    with Log(directory, len(rounds.seen)) as log:
        for number in range(len(rounds.seen), config.rounds):
            metrics, asked = rounds.play(prompts.part(number, config.prompts))
            log.write(number + 1, metrics)
            for completion in asked[:SHOWN]:
                console.print(
                    Text("  → ").append_text(marked(tokenizer, completion, colour=console.is_terminal))
                )
            rounds.save(file, run)
    return rounds.head.requires_grad_(False).eval()


def install_taps(loop: ClosedLoop, head: Head) -> None:
    """In memory what `RouterCheckpoint.merge` does to the files."""
    loop.student.get_output_embeddings().weight.data[head.gate.reserved.taps] = head.taps.detach()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two (N,); 0 where one of them does not vary."""
    value = torch.corrcoef(torch.stack((a, b.to(a.dtype))))[0, 1]
    return 0.0 if value.isnan() else value.item()


def marked(tokenizer: PreTrainedTokenizerBase, completion: Rollout, colour: bool) -> Text:
    """The completion's text, the teacher's part of it coloured, or in brackets."""

    def offset(tokens: int) -> int:  # a prefix may end inside a character, which then reads U+FFFD
        return len(decode_answer(tokenizer, completion.tokens[:tokens]).rstrip("\ufffd"))

    whole = decode_answer(tokenizer, completion.tokens)
    text = Text()
    start = 0
    written = 0
    for by_teacher, stretch in groupby(completion.by_teacher):
        written += len(list(stretch))
        end = offset(written)
        append_piece(text, whole[start:end], by_teacher, colour)
        start = end
    return text


def append_piece(text: Text, piece: str, by_teacher: bool, colour: bool) -> None:
    """Add what one of the models wrote in one stretch."""
    if not by_teacher or not piece:
        text.append(piece)
    elif colour:
        text.append(piece, style="bold black on yellow")
    else:
        text.append(f"⟦{piece}⟧")
