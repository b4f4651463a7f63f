"""Rounds of closed-loop rollouts, each followed by a fit of the gate on all of them.

What a round gave is written to a file: a killed run goes on behind its last whole round, as if nothing had
happened.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router.gate import Gate, RandomGate
from training.gating.calibration import teacher_rate
from training.gating.config import ConstrainedObjective, GateConfig, QualityGain
from training.gating.constrained import ascended, fit_constrained
from training.gating.expected_gain import expected_gain
from training.gating.fitting import fit
from training.gating.forks import Worth, worth_of_asking
from training.gating.head import Head
from training.gating.lessons import Lessons, Trajectories, collect, span_gain, teacher_view, token_gain
from training.gating.prompts import Prompts
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout, with_gate
from training.loop.progress import Log, console

SHOWN = 2
RECENT = 100_000
"""Positions whose scores the prices of the next rollouts are quantiles of."""


@dataclass
class Rounds:
    """Of one pair. prices: of the next rollouts, by the rate that they aim at. worth: of completions of any
    prompts, by number over all rounds, in points of 100; for `gain: quality`. seen: of past rounds.
    """

    loop: ClosedLoop
    head: Head
    config: GateConfig
    seed: int
    prices: dict[float, float]
    worth: Worth
    seen: list[Lessons] = field(default_factory=list)

    def play(self, prompts: Prompts) -> tuple[dict[str, float], list[Rollout]]:
        """One round; scalars to log, and the completions of the half that asked."""
        config, loop, first = self.config, self.loop, not self.seen
        torch.manual_seed(self.seed * 1_000_003 + len(self.seen))  # a resumed run draws the same
        gate: Gate = RandomGate(self.head.gate.reserved) if first else self.head.gate
        asking = with_gate(loop, gate, 0.0 if first else config.explore)
        # Half of the rollouts never ask: most of a served completion is the student's own path.
        half = len(prompts) // 2
        terms = [(math.inf, 0.0)] * half + [(self.prices[rate], FREE) for rate in prompts.rates[half:]]
        rows = zip(prompts.ids, terms, prompts.hidden, strict=True)
        requests = [Request(ids, *term, hidden) for ids, term, hidden in rows]
        trajectories, completions = collect(asking, requests)
        taught = self._lessons(prompts, trajectories, completions)
        self.seen.append(taught)
        data = Lessons.join(self.seen)
        if first:
            self.head.start_from(data.states)
        if isinstance(config.gain, QualityGain):
            data = replace(data, target=expected_gain(self.head, data, self.seed))
        metrics = self._fit(data)
        install_taps(loop, self.head)
        asked, aims = completions[half:], prompts.rates[half:]
        at, realised = trajectories.positions, teacher_rate(asked)
        metrics |= {
            "positions": len(data),
            "variance": data.target.var().item(),
            "price": sum(self.prices.values()) / len(self.prices),
            "rate": realised,
            "violation": realised - sum(aims) / len(aims),
            "kl": at.kl.mean().item(),
            "entropy": at.entropy.mean().item(),
            "gate_kl": correlation(self.head.scores(at.states), at.kl),
            "gate_gain": correlation(self.head.scores(taught.states), taught.target),
        }
        self.prices = self._next_prices(data, asked, aims, first)
        return metrics, asked

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
        config, at = self.config, trajectories.positions
        view, source = teacher_view(at), torch.tensor(prompts.sources)[at.row]
        known = torch.ones_like(trajectories.by_teacher)
        if isinstance(config.gain, QualityGain):
            target = worth_of_asking(
                self.loop, prompts.ids, trajectories, completions, self._worth_in_this_round
            )
        else:
            target = token_gain(config.gain, at)
            if not isinstance(config.objective, ConstrainedObjective):  # its critic looks ahead
                target, known = span_gain(target, trajectories, config.ask_tokens)
        return Lessons(at.states, target, trajectories.by_teacher, at.row, source, view).where(known)

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
        by_aim = {
            rate: [c for c, aim in zip(asked, aims, strict=True) if aim == rate] for rate in self.prices
        }
        return {
            rate: ascended(price, teacher_rate(by_aim[rate]), rate) if by_aim[rate] else price
            for rate, price in self.prices.items()
        }

    def save(self, file: Path, run: dict[str, object]) -> None:
        """Atomic. run: what must be the same in a run that goes on from it."""
        scratch = file.with_suffix(".tmp")
        seen = [vars(taught) for taught in self.seen]
        torch.save({"run": run, "head": self.head.state_dict(), "prices": self.prices, "seen": seen}, scratch)
        os.replace(scratch, file)

    def restore(self, file: Path, run: dict[str, object]) -> None:
        """Changes nothing where there is no file, or one of another run."""
        saved = torch.load(file) if file.exists() else {"run": None}
        if saved["run"] == run:
            self.head.load_state_dict(saved["head"])
            self.prices, self.seen = saved["prices"], [Lessons(**taught) for taught in saved["seen"]]
            install_taps(self.loop, self.head)


def train_gate(
    rounds: Rounds, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, directory: Path, origin: str
) -> Head:
    """Play what is left of `config.rounds`. The taps end in the student's reserved rows.

    prompts: `config.prompts` for each round. directory: of the log and of what a killed run goes on from.
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
        for at in range(len(rounds.seen), config.rounds):
            metrics, asked = rounds.play(prompts.part(at, config.prompts))
            log.write(at + 1, metrics)
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
        return len(tokenizer.decode(completion.tokens[:tokens], skip_special_tokens=True).rstrip("\ufffd"))

    whole, text, start = tokenizer.decode(completion.tokens, skip_special_tokens=True), Text(), 0
    for at, by_teacher in enumerate(completion.by_teacher, start=1):
        if at == len(completion.tokens) or completion.by_teacher[at] != by_teacher:
            piece, start = whole[start : offset(at)], offset(at)
            if not by_teacher:
                text.append(piece)
            elif piece:
                text.append(piece if colour else f"⟦{piece}⟧", style="bold black on yellow" if colour else "")
    return text
