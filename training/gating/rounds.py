"""Rounds of closed-loop rollouts, each followed by a fit of the gate on all of them.

What a round gave is written to a file: a killed run goes on after its last whole round, as if nothing had
happened.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from measuring.marking import marked
from router.gate import Gate, RandomGate
from router.gate_names import LEARNED
from training.gate_config import ConstrainedObjective, GateConfig, QualityGain
from training.gating.agreement import correlation, score_of
from training.gating.branches import Branches, both_ways
from training.gating.constrained import Choices, Critic, fit_constrained
from training.gating.duals import RECENT, ascended, asking_price, settling, wanted_rate
from training.gating.expected_gain import expected_gain
from training.gating.fitting import fit
from training.gating.forks import Worth, finished, worth_of_asking
from training.gating.head import Head
from training.gating.lessons import Lessons, Trajectories, collect, span_gain, teacher_view, token_gain
from training.gating.prompts import Prompts
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout, with_gate
from training.gating.tree import Setting, Tree
from training.loop.progress import Log, console
from training.tokenizer import decode_answer

SHOWN = 2

Judged = Callable[[Gate], float]
"""How good a gate is on validation data."""


class Played(NamedTuple):
    """What one round gave."""

    metrics: dict[str, float]
    """Scalars to log."""
    asked: list[Rollout]
    """The completions of the half that asked."""


@dataclass(frozen=True)
class BestRound:
    """The round whose gate is exported."""

    round: int
    """From 1."""
    judged: float
    """On validation data, more is better."""
    head: dict[str, Tensor]
    """State dict."""
    prices: dict[float, float]
    """By budget."""


@dataclass
class Rounds:
    """Of one pair."""

    loop: ClosedLoop
    head: Head
    config: GateConfig
    seed: int
    prices: dict[float, float]
    """Of the next rollouts, by the rate that they aim at: with a constrained objective its dual variables."""
    worth: Worth
    """Of completions of any prompts, by number over all rounds, in points of 100; for `gain: quality`."""
    judged: Judged
    """Which round of a constrained objective is the best."""
    critic: Critic = field(init=False)
    """Of a constrained objective."""
    seen: list[Lessons] = field(default_factory=list)
    """Of past rounds."""
    branches: list[Branches] = field(default_factory=list)
    """Of the same, for a constrained objective."""
    best: BestRound | None = None
    """So far, of a constrained objective: of its own rounds, and the last one of the regression."""

    def __post_init__(self) -> None:
        objective = self.config.objective
        prices = objective.prices if isinstance(objective, ConstrainedObjective) else (1.0, 2.0)
        features = len(self.head.gate.mean)
        self.critic = Critic(features, self.config.width, prices).to(self.head.taps.device)

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
        if isinstance(config.objective, ConstrainedObjective):
            self.branches.append(both_ways(loop, prompts, trajectories, completions, config.ask_tokens))
        if first:
            self.head.start_from(taught.states)
        metrics = self._fit()
        self.head.install(loop.student)
        asked = completions[half:]
        aims = prompts.rates[half:]
        seen = trajectories.positions
        metrics |= {
            "price": sum(self.prices.values()) / len(self.prices),
            "rate": wanted_rate(asked),
            "violation": wanted_rate(asked) - sum(aims) / len(aims),
            "kl": seen.kl.mean().item(),
            "entropy": seen.entropy.mean().item(),
            "gate_kl": correlation(self.head.scores(seen.states), seen.kl),
            "gate_gain": correlation(
                self.head.scores(taught.states), score_of(self.head.gate, taught.target)
            ),
        }
        return Played(metrics | self._priced(asked, aims), asked)

    @property
    def _constrained(self) -> ConstrainedObjective | None:
        """The objective of the round that is played, if it is constrained and has started."""
        objective = self.config.objective
        if isinstance(objective, ConstrainedObjective) and len(self.seen) > objective.start_rounds:
            return objective
        return None

    @property
    def _is_judged(self) -> bool:
        """Whether the round that is played is one of the policy's, or the regression that it starts from.

        So no policy is exported that is worse than its start. A trial of one round has no policy.
        """
        objective = self.config.objective
        if not isinstance(objective, ConstrainedObjective):
            return False
        return len(self.seen) >= objective.start_rounds < self.config.rounds

    def _requests(self, prompts: Prompts, alone: int) -> list[Request]:
        """The first `alone` never ask, the others at the prices of the rates that they aim at."""
        requests = []
        for number, (ids, teacher_ids) in enumerate(zip(prompts.ids, prompts.teacher_ids, strict=True)):
            if number < alone:
                requests.append(Request(ids, teacher_prompt=teacher_ids))
            else:
                price = self.prices[prompts.rates[number]]
                requests.append(Request(ids, price, FREE, teacher_ids))
        return requests

    def _fit(self) -> dict[str, float]:
        """Scalars to log."""
        config = self.config
        data = Lessons.join(self.seen)
        if objective := self._constrained:
            choices = Choices(data, Branches.join(self.branches))
            metrics = fit_constrained(self.head, self.critic, choices, config, objective, self.seed)
        else:
            mean, known = span_gain(data.target, data.row, data.asked, config.ask_tokens)
            data = replace(data, target=mean).where(known)
            if isinstance(config.gain, QualityGain):
                data = replace(data, target=expected_gain(self.head, data, self.seed))
            metrics = fit(self.head, data, config, self.seed)
        return metrics | {"positions": len(data), "variance": data.target.var().item()}

    def _lessons(
        self, prompts: Prompts, trajectories: Trajectories, completions: Sequence[Rollout]
    ) -> Lessons:
        """What asking gains at every position of the rollouts, as the recipe counts it for one token."""
        config = self.config
        seen = trajectories.positions
        source = torch.tensor(prompts.sources)[seen.row]
        if isinstance(config.gain, QualityGain):
            finish = partial(finished, self.loop, prompts.ids)
            target = worth_of_asking(trajectories, completions, finish, self._worth_in_this_round)
        else:
            target = token_gain(config.gain, seen)
        return Lessons(seen.states, target, trajectories.by_teacher, seen.row, source, teacher_view(seen))

    def _worth_in_this_round(self, rows: Sequence[int], whole: Sequence[list[int]]) -> Tensor:
        first = len(self.seen) * self.config.prompts
        return self.worth([first + row for row in rows], whole)

    def _priced(self, asked: Sequence[Rollout], aims: Sequence[float]) -> dict[str, float]:
        """Move the prices, and judge the round; scalars to log."""
        scores = self.head.scores(torch.cat([taught.states for taught in self.seen])[-RECENT:])
        objective = self.config.objective
        tokens = self.config.ask_tokens
        metrics = {}
        if not isinstance(objective, ConstrainedObjective) or len(self.seen) == 1:
            for rate in self.prices:
                self.prices[rate] = asking_price(scores, rate, tokens)
        else:
            metrics = self._ascend(asked, aims, scores)
        if self._is_judged:
            metrics["judged"] = self._judge()
        return metrics

    def _ascend(self, asked: Sequence[Rollout], aims: Sequence[float], scores: Tensor) -> dict[str, float]:
        """Move every dual variable by what its rollouts spent too much; scalars to log."""
        metrics = {}
        step = (len(self.seen) - 1) ** -0.5
        by_aim: dict[float, list[Rollout]] = defaultdict(list)
        for completion, aim in zip(asked, aims, strict=True):
            by_aim[aim].append(completion)
        for aim, completions in sorted(by_aim.items()):
            realised = wanted_rate(completions)
            metrics[f"dual/{aim:g}"] = self.prices[aim]
            metrics[f"realised/{aim:g}"] = realised
            self.prices[aim] = ascended(self.prices[aim], realised, aim, scores, step, self.config.ask_tokens)
        return metrics

    def _judge(self) -> float:
        """On validation data; keeps the round if it is the best."""
        judged = self.judged(self.head.gate)
        if self.best is None or judged > self.best.judged:
            state = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}
            self.best = BestRound(len(self.seen), judged, state, dict(self.prices))
        return judged

    def save(self, file: Path, run: dict[str, object]) -> None:
        """Atomic.

        Args:
            file: is replaced.
            run: what must be the same in a run that goes on from it.
        """
        scratch = file.with_suffix(".tmp")
        saved = {
            "run": run,
            "head": self.head.state_dict(),
            "critic": self.critic.state_dict(),
            "prices": self.prices,
            "seen": [vars(taught) for taught in self.seen],
            "branches": [vars(ways) for ways in self.branches],
            "best": None if self.best is None else vars(self.best),
        }
        torch.save(saved, scratch)
        os.replace(scratch, file)

    def restore(self, file: Path, run: dict[str, object]) -> None:
        """Changes nothing where there is no file, or one of another run."""
        if not file.exists():
            return
        saved: dict[str, Any] = torch.load(file)
        if saved["run"] != run:
            return
        self.head.load_state_dict(saved["head"])
        self.critic.load_state_dict(saved["critic"])
        self.prices = saved["prices"]
        self.seen = [Lessons(**taught) for taught in saved["seen"]]
        self.branches = [Branches(**ways) for ways in saved["branches"]]
        self.best = None if saved["best"] is None else BestRound(**saved["best"])
        self.head.install(self.loop.student)


class Trained(NamedTuple):
    """What the rounds gave."""

    head: Head
    """Its taps are in the student's reserved rows."""
    prices: dict[float, float]
    """The dual variables of a constrained objective, by budget; else empty."""
    round: int
    """That it is of, from 1."""


def train_gate(
    rounds: Rounds, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, directory: Path, origin: str
) -> Trained:
    """Play what is left of `config.rounds`.

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
    decode = partial(decode_answer, tokenizer)
    file = directory / "rounds.pt"
    rounds.restore(file, run)
    with Log(directory, len(rounds.seen)) as log:
        for number in range(len(rounds.seen), config.rounds):
            metrics, asked = rounds.play(prompts.part(number, config.prompts))
            log.write(number + 1, metrics)
            for completion in asked[:SHOWN]:
                text = marked(decode, completion.tokens, completion.stretches, colour=console.is_terminal)
                console.print(Text("  → ").append_text(text))
            rounds.save(file, run)
        head = rounds.head.requires_grad_(False).eval()
        if rounds.best is None:
            return Trained(head, {}, config.rounds)
        head.load_state_dict(rounds.best.head)
        head.install(rounds.loop.student)
        last = prompts.part(config.rounds - 1, config.prompts).ids[: config.calibration_examples]
        return Trained(head, settled(rounds, rounds.best.prices, last, log), rounds.best.round)


def settled(
    rounds: Rounds, prices: dict[float, float], prompts: list[list[int]], log: Log
) -> dict[float, float]:
    """The dual variables of the gate that is exported."""
    tree = Tree(rounds.loop, prompts, {LEARNED: rounds.head.gate})
    ask_tokens = rounds.config.ask_tokens
    tree.run([Setting(LEARNED, price, FREE, ask_tokens) for price in prices.values()])
    for number, step in enumerate(settling(tree, LEARNED, prices, ask_tokens), rounds.config.rounds + 1):
        metrics = {}
        for budget, rate in step.realised.items():
            metrics[f"dual/{budget:g}"] = prices[budget]
            metrics[f"realised/{budget:g}"] = rate
        log.write(number, metrics)
        prices = step.prices
    return prices
