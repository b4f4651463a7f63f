"""Rounds of closed-loop rollouts, each followed by a fit of the gate on the rollouts of all rounds so far.

Results are written to a file after each round. A killed run resumes after its last whole round, and ends as
if it had not been killed.
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
from training.gating.advantages import advantages
from training.gating.agreement import correlation, score_of
from training.gating.branches import Branches, both_ways
from training.gating.calibration import price_at_rate
from training.gating.constrained import Choices, Critic, fit_constrained
from training.gating.duals import RECENT, ascended, asking_price, settling, wanted_rate
from training.gating.expected_gain import expected_gain
from training.gating.fitting import fit
from training.gating.forks import Worth, finished, worth_of_asking
from training.gating.head import Head
from training.gating.lessons import (
    ENTROPY,
    KL,
    Lessons,
    Trajectories,
    collect,
    span_gain,
    teacher_view,
    token_gain,
)
from training.gating.prompts import Prompts
from training.gating.rollout import FREE, ClosedLoop, Request, Rollout, with_gate
from training.gating.tree import ScoreGate, Setting, Tree, WalkPlan
from training.loop.progress import Log, console
from training.tokenizer import decode_answer

SHOWN = 2

Judged = Callable[[Gate], float]
"""Computes how good a gate is on validation data; more is better."""


class Played(NamedTuple):
    """The results of one round."""

    metrics: dict[str, float]
    """Scalars to log."""
    asked: list[Rollout]
    """The completions whose gate may ask."""


class RoundRollouts(NamedTuple):
    """The rollouts of one round."""

    taught: Lessons
    """Their positions, with the gain of asking."""
    asked: list[Rollout]
    """The completions whose gate may ask."""
    aims: Sequence[float]
    """The teacher rate that each of these completions aims at."""


@dataclass(frozen=True)
class BestRound:
    """The round whose gate is exported."""

    round: int
    """Number of the round, from 1."""
    judged: float
    """Quality of the gate on validation data, see `Judged`."""
    head: dict[str, Tensor]
    """State dict of taps and gate."""
    prices: dict[float, float]
    """Prices by budget."""


@dataclass
class Rounds:
    """The rounds of one pair."""

    loop: ClosedLoop
    head: Head
    config: GateConfig
    seed: int
    prices: dict[float, float]
    """Prices of the next rollouts, by the rate that they aim at; dual variables if the objective is
    constrained.
    """
    worth: Worth
    """Computes the worth of completions in points of 100, for `gain: quality`; rows count over all rounds."""
    judged: Judged
    """Judges the gates of a constrained objective's rounds, to find the best one."""
    critic: Critic = field(init=False)
    """Critic of a constrained objective whose gain is in nats."""
    seen: list[Lessons] = field(default_factory=list)
    """The lessons of each past round."""
    branches: list[Branches] = field(default_factory=list)
    """The branches of each past round, for a constrained objective whose gain is in nats."""
    best: BestRound | None = None
    """Best round of a constrained objective so far: one of its own rounds, or the last regression's."""

    def __post_init__(self) -> None:
        objective = self.config.objective
        prices = objective.prices if isinstance(objective, ConstrainedObjective) else (1.0, 2.0)
        features = len(self.head.gate.mean)
        self.critic = Critic(features, self.config.width, prices).to(self.head.taps.device)

    def play(self, prompts: Prompts) -> Played:
        """Play one round of rollouts, and fit the gate on this round and all before it."""
        first = not self.seen
        torch.manual_seed(self.seed * 1_000_003 + len(self.seen))  # so a resumed run draws the same
        looks_ahead = self._judges_wholes and self.config.policy(len(self.seen) + 1) is not None
        written = self._by_policy(prompts) if looks_ahead else self._by_gate(prompts)
        taught, asked, aims = written
        self.seen.append(taught)
        if first:
            self.head.start_from(taught.states)
        metrics = self._fit()
        self.head.install(self.loop.student)
        kl, entropy = taught.view[:, KL], taught.view[:, ENTROPY]
        rate = wanted_rate(asked)
        scores = self.head.scores(taught.states)
        metrics |= {
            "price": sum(self.prices.values()) / len(self.prices),
            "rate": rate,
            "violation": rate - sum(aims) / len(aims),
            "kl": kl.mean().item(),
            "entropy": entropy.mean().item(),
            "gate_kl": correlation(scores, kl),
            "gate_gain": correlation(scores, score_of(self.head.gate, taught.target)),
        }
        return Played(metrics | self._priced(written), asked)

    def _by_gate(self, prompts: Prompts) -> RoundRollouts:
        """Rollouts of one round, with the gain of asking for one token at each position."""
        config = self.config
        loop = self.loop
        first = not self.seen
        gate: Gate = RandomGate(self.head.gate.reserved) if first else self.head.gate
        asking = with_gate(loop, gate, 0.0 if first else config.explore)
        # Half of the rollouts never ask: most of a served completion is the student's own path.
        half = len(prompts) // 2
        trajectories, completions = collect(asking, self._requests(prompts, half))
        taught = self._lessons(prompts, trajectories, completions)
        if self._branches_out:
            self.branches.append(both_ways(loop, prompts, trajectories, completions, config.ask_tokens))
        return RoundRollouts(taught, completions[half:], prompts.rates[half:])

    def _by_policy(self, prompts: Prompts) -> RoundRollouts:
        """Completions by the policy inside its buckets, with the advantage of asking at each position.

        Before that, the dual variables are set to the prices at which the policy spends each budget.
        """
        config = self.config
        spans = (config.span_tokens, config.ask_tokens)
        gates: dict[str, ScoreGate] = {LEARNED: self.head.gate}
        places: dict[tuple[int, ...], int] = {}  # a prompt that comes again shares its tree
        for ids in prompts.ids:
            places.setdefault(tuple(ids), len(places))
        unique = list(map(list, places))
        rates = list(self.prices)
        sample = Tree(self.loop, unique[: config.calibration_examples], gates)
        self.prices = dict(zip(rates, price_at_rate(sample, LEARNED, rates, spans), strict=True))
        plans = []
        for ids, rate in zip(prompts.ids, prompts.rates, strict=True):
            plans.append(WalkPlan(places[tuple(ids)], Setting(LEARNED, self.prices[rate], rate, *spans)))
        found = advantages(Tree(self.loop, unique, gates), plans, self._worth_in_this_round)
        taught = self._taught(prompts, found.trajectories, found.advantage).where(found.known)
        return RoundRollouts(taught, found.completions, prompts.rates)

    @property
    def _branches_out(self) -> bool:
        """Whether a critic of both actions' next states is trained."""
        return isinstance(self.config.objective, ConstrainedObjective) and not self._judges_wholes

    @property
    def _judges_wholes(self) -> bool:
        """Whether the gain is that of whole completions."""
        return isinstance(self.config.gain, QualityGain)

    @property
    def _is_judged(self) -> bool:
        """Whether the present round is one of the policy's rounds, or the regression that it starts from.

        So an exported policy is never worse than its start. A trial of one round has no policy.
        """
        objective = self.config.objective
        if not isinstance(objective, ConstrainedObjective):
            return False
        return len(self.seen) >= objective.start_rounds < self.config.rounds

    def _requests(self, prompts: Prompts, alone: int) -> list[Request]:
        """Requests of all prompts: the first `alone` never ask, the others have the prices of their rates."""
        requests = []
        for number, (ids, teacher_ids) in enumerate(zip(prompts.ids, prompts.teacher_ids, strict=True)):
            if number < alone:
                requests.append(Request(ids, teacher_prompt=teacher_ids))
            else:
                price = self.prices[prompts.rates[number]]
                requests.append(Request(ids, price, FREE, teacher_ids))
        return requests

    def _fit(self) -> dict[str, float]:
        """Fit the gate to all rounds so far, and return scalars to log."""
        config = self.config
        objective = config.policy(len(self.seen))
        if objective and self._branches_out:
            data = Lessons.join(self.seen)
            choices = Choices(data, Branches.join(self.branches))
            metrics = fit_constrained(self.head, self.critic, choices, config, objective, self.seed)
        else:
            data = Lessons.join(self.seen[objective.start_rounds :] if objective else self.seen)
            mean, known = span_gain(data.target, data.row, data.asked, config.ask_tokens)
            data = replace(data, target=mean).where(known)
            if self._judges_wholes:
                data = replace(data, target=expected_gain(self.head, data, self.seed))
            metrics = fit(self.head, data, config, self.seed)
        return metrics | {"positions": len(data), "variance": data.target.var().item()}

    def _lessons(
        self, prompts: Prompts, trajectories: Trajectories, completions: Sequence[Rollout]
    ) -> Lessons:
        """The positions of the rollouts, with the recipe's gain of asking for one token at each."""
        gain = self.config.gain
        if isinstance(gain, QualityGain):
            finish = partial(finished, self.loop, prompts.ids)
            target = worth_of_asking(trajectories, completions, finish, self._worth_in_this_round)
        else:
            target = token_gain(gain, trajectories.positions)
        return self._taught(prompts, trajectories, target)

    @staticmethod
    def _taught(prompts: Prompts, trajectories: Trajectories, target: Tensor) -> Lessons:
        """The positions of some prompts' completions, with a target (N,) or (N, K)."""
        seen = trajectories.positions
        source = torch.tensor(prompts.sources)[seen.row]
        return Lessons(seen.states, target, trajectories.by_teacher, seen.row, source, teacher_view(seen))

    def _worth_in_this_round(self, rows: Sequence[int], whole: Sequence[list[int]]) -> Tensor:
        first = len(self.seen) * self.config.prompts
        return self.worth([first + row for row in rows], whole)

    def _priced(self, written: RoundRollouts) -> dict[str, float]:
        """Move the prices, judge the round, and return scalars to log."""
        scores = self.head.scores(torch.cat([taught.states for taught in self.seen])[-RECENT:])
        objective = self.config.objective
        tokens = self.config.ask_tokens
        metrics = {}
        if not isinstance(objective, ConstrainedObjective) or len(self.seen) == 1:
            for rate in self.prices:
                self.prices[rate] = asking_price(scores, rate, tokens)
        else:
            metrics = self._ascend(written, scores)
        if self._is_judged:
            metrics["judged"] = self._judge()
        return metrics

    def _ascend(self, written: RoundRollouts, scores: Tensor) -> dict[str, float]:
        """Move every dual variable by the excess of its rollouts' rate, and return scalars to log."""
        metrics = {}
        step = (len(self.seen) - 1) ** -0.5
        by_aim: dict[float, list[Rollout]] = defaultdict(list)
        for completion, aim in zip(written.asked, written.aims, strict=True):
            by_aim[aim].append(completion)
        for aim, completions in sorted(by_aim.items()):
            realised = wanted_rate(completions)
            metrics[f"dual/{aim:g}"] = self.prices[aim]
            metrics[f"realised/{aim:g}"] = realised
            self.prices[aim] = ascended(self.prices[aim], realised, aim, scores, step, self.config.ask_tokens)
        return metrics

    def _judge(self) -> float:
        """Judge the gate on validation data, and keep the round if it is the best so far."""
        judged = self.judged(self.head.gate)
        if self.best is None or judged > self.best.judged:
            state = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}
            self.best = BestRound(len(self.seen), judged, state, dict(self.prices))
        return judged

    def save(self, file: Path, run: dict[str, object]) -> None:
        """Write the state of all rounds to a file, atomically.

        Args:
            file: the file to replace.
            run: values that must be the same in a run that resumes from the file.
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
        """Restore the state of all rounds from a file, unless there is none or it is of another run."""
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
    """The gate that the rounds have trained."""

    head: Head
    """Taps and gate; the taps are also in the student's reserved rows."""
    prices: dict[float, float]
    """The dual variables of a constrained objective, by budget; empty for other objectives."""
    round: int
    """Number of the round that the gate comes from, from 1."""


def train_gate(
    rounds: Rounds, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, directory: Path, origin: str
) -> Trained:
    """Play the remaining rounds of `config.rounds`.

    Args:
        rounds: the rounds of the pair; the file of a killed run is restored into them.
        prompts: the prompts of all rounds, `config.prompts` for each.
        tokenizer: the tokenizer of the pair.
        directory: directory of the log and of the file that a killed run resumes from.
        origin: a digest that identifies models and task.
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
    """The dual variables of the exported gate, after more steps of dual ascent.

    Args:
        rounds: the rounds, whose head is the exported one.
        prices: the dual variables to start from, by budget.
        prompts: the prompts to measure on, as token ids.
        log: where the steps are logged.
    """
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
