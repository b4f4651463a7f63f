"""Constrained path consistency for the gate: asking as a policy of its own, with a price for every token.

The problem: maximise E[sum of r - price * c] + T * entropy. A token of the student's earns r = -gain and
costs nothing. A call of n teacher tokens earns 0 and costs c = n. At the optimum, for every price
and both actions u (Nachum et al. 2017, arXiv 1702.08892; sub-paths of one decision, with a cost):

    C(u) = r(u) - price * c(u) + U(s'(u), price) - T log pi(u|s) - U(s, price) = 0
    logit pi(ask|s) = n (score(s) - price) / T

Changed here: both models are deterministic, so both actions' next states are known (`branches`), and C is
taken for both. Both are zero exactly if their difference and their mean under pi are:

    C(ask) - C(own) = gain + U(s'(ask)) - U(s'(own)) - n score(s)
    sum of pi(u|s) C(u)

The difference teaches the score, and the mean teaches the critic U. So no error of U(s) reaches the score.
With U = 0 the score is the plain regression of `fitting`, which is what this starts from. The score is an
index: the price at which both actions are worth the same (Whittle 1988). So the difference is taken at the
price that the score names. There what follows costs little where the score is low.

The critic sees the price. U is convex in it, and the value of the constraint, the teacher tokens to come, is

    V_C(s, price) = -dU / dprice
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from training.gate_config import ConstrainedObjective, GateConfig
from training.gating.branches import ENDED, Branches
from training.gating.fitting import descend
from training.gating.head import Head
from training.gating.lessons import Lessons
from training.methods.pcl import half_square


class Critic(nn.Module):
    """U over what the gate sees and the price, in nats."""

    middle: Tensor
    """Of the prices' logarithms."""
    reach: Tensor
    """From there to the ends."""
    mean: Tensor
    """Of the features."""
    scale: Tensor
    """1 / their standard deviation."""

    def __init__(self, features: int, width: int, prices: tuple[float, float]) -> None:
        super().__init__()
        low, high = map(math.log, prices)
        self.register_buffer("middle", torch.tensor((low + high) / 2))
        self.register_buffer("reach", torch.tensor((high - low) / 2))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.mlp = nn.Sequential(
            nn.Linear(features + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def standardise(self, head: Head) -> None:
        """See features as the head's gate does."""
        self.mean.copy_(head.gate.mean)
        self.scale.copy_(head.gate.scale)

    def forward(self, x: Tensor, price: Tensor) -> Tensor:
        """x: (..., F) features; price: (...) nats. Returns U (...)."""
        dear = (price.log() - self.middle) / self.reach
        seen = torch.cat(((x - self.mean) * self.scale, dear[..., None]), dim=-1)
        utility: Tensor = self.mlp(seen).squeeze(-1)
        return utility


class Ahead(NamedTuple):
    """U of the next states of N positions, nats."""

    called: Tensor
    """(N,) after a call."""
    own: Tensor
    """(N,) after the student's own token."""


class Residuals(NamedTuple):
    """Of N positions, (N,) each."""

    ask: Tensor
    """C of asking, nats."""
    own: Tensor
    """C of writing, nats."""
    share: Tensor
    """pi(ask|s)."""

    @property
    def mean(self) -> Tensor:
        """Under the policy."""
        return self.share * self.ask + (1 - self.share) * self.own


def residuals(
    score: Tensor,
    gain: Tensor,
    tokens: Tensor,
    utility: Tensor,
    ahead: Ahead,
    price: Tensor,
    temperature: float,
) -> Residuals:
    """C of both actions; all tensors (N,).

    Args:
        score: the gate's.
        gain: what the student's next token loses, nats.
        tokens: of a call.
        utility: U at the position.
        ahead: U at the next ones.
        price: of a teacher token, nats.
        temperature: T, nats.
    """
    logit = tokens * (score - price) / temperature
    ask = -price * tokens + ahead.called - temperature * logsigmoid(logit) - utility
    own = -gain + ahead.own - temperature * logsigmoid(-logit) - utility
    return Residuals(ask, own, logit.sigmoid())


def difference(score: Tensor, gain: Tensor, tokens: Tensor, ahead: Ahead) -> Tensor:
    """(N,) C(ask) - C(own), per teacher token: neither U nor the price of the position is in it."""
    return (gain + ahead.called - ahead.own) / tokens - score


class Choices(NamedTuple):
    """What a policy is fitted on: positions, and where both actions lead from there."""

    lessons: Lessons
    """Their target is the gain of one token."""
    branches: Branches
    """Of the same positions."""


class _States:
    """All states of some choices, as the gate sees them."""

    def __init__(self, head: Head, choices: Choices) -> None:
        self._head = head
        self._states = torch.cat((choices.lessons.states, choices.branches.states))
        self._confidence = head.confidence(self._states)

    def features(self, numbers: Tensor) -> Tensor:
        """(N, F) of the states of these numbers."""
        states = self._states[numbers].to(self._head.taps.device)
        return self._head.features(states, self._confidence[numbers])

    @torch.no_grad()
    def utility(self, critic: Critic, numbers: Tensor, price: Tensor) -> Tensor:
        """(N,) U of the states of these numbers, 0 after the end."""
        utility = critic(self.features(numbers.clamp(min=0)), price)
        return torch.where((numbers == ENDED).to(utility.device), 0.0, utility)


class _Terms(NamedTuple):
    """Of some positions, (N,) each."""

    difference: Tensor
    residuals: Residuals
    utility: Tensor


def fit_constrained(
    head: Head,
    critic: Critic,
    choices: Choices,
    config: GateConfig,
    objective: ConstrainedObjective,
    seed: int,
) -> dict[str, float]:
    """Train the gate and its critic.

    Returns:
        The last epoch's `loss`; then means over all positions at the prices' geometric mean: `residual`, the
        absolute one, `value` (V, nats) and `value_cost` (V_C, teacher tokens).
    """
    torch.manual_seed(seed)
    lessons, branches = choices
    states = _States(head, choices)
    critic.standardise(head)
    gain = lessons.target.to(head.taps.device)
    tokens = branches.tokens.to(head.taps.device)
    low, high = map(math.log, objective.prices)

    def ahead(part: Tensor, price: Tensor) -> Ahead:
        called = states.utility(critic, branches.after_call[part], price)
        return Ahead(called, states.utility(critic, branches.after_own[part], price))

    def terms(part: Tensor, price: Tensor) -> _Terms:
        x = states.features(part)
        score = head.gate.score(x)
        named = score.detach()
        utility = critic(x.detach(), price)
        both = residuals(
            named, gain[part], tokens[part], utility, ahead(part, price), price, objective.temperature
        )
        there = ahead(part, named.clamp(*objective.prices))
        return _Terms(difference(score, gain[part], tokens[part], there), both, utility)

    def loss(part: Tensor) -> Tensor:
        price = torch.empty(len(part)).uniform_(low, high).exp().to(gain.device)
        found = terms(part, price)
        score_loss = half_square(found.difference, objective.clip)
        critic_loss = half_square(found.residuals.mean, objective.clip)
        return (score_loss + critic_loss).mean()

    def epoch() -> Sequence[Tensor]:
        return torch.randperm(len(lessons)).split(config.batch)

    trained = [*head.parameters(), *critic.parameters()]
    last = descend(trained, -(-len(lessons) // config.batch), epoch, loss, config)
    price = torch.full_like(gain, math.exp((low + high) / 2))
    return {"loss": last} | _means(terms, price, config.batch)


def _means(terms: Callable[[Tensor, Tensor], _Terms], prices: Tensor, batch: int) -> dict[str, float]:
    """Over all positions, each at its own of the prices (N,), `batch` at a time."""
    residual = 0.0
    value = 0.0
    cost = 0.0
    for part in torch.arange(len(prices)).split(batch):
        price = prices[part].requires_grad_(True)
        found = terms(part, price)
        (slope,) = torch.autograd.grad(found.utility.sum(), price)
        residual += found.residuals.mean.abs().sum().item()
        cost -= slope.sum().item()
        value += (found.utility - price * slope).sum().item()  # U = V - price * V_C
    count = len(prices)
    return {"residual": residual / count, "value": value / count, "value_cost": cost / count}
