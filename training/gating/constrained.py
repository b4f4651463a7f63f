"""Constrained path consistency for the gate: asking is a policy of its own, with a price for every token.

The problem is to maximise E[sum of r - price * c] + T * entropy. A token of the student earns r = -gain and
costs nothing. A call of n teacher tokens earns 0 and costs c = n. At the optimum, this holds for every price
and both actions u (Nachum et al. 2017, arXiv 1702.08892; sub-paths of one decision, with a cost):

    C(u) = r(u) - price * c(u) + U(s'(u), price) - T log pi(u|s) - U(s, price) = 0
    logit pi(ask|s) = n (score(s) - price) / T

Changed here: both models are deterministic, so the next states of both actions are known (`branches`), and C
is computed for both. Both are zero if and only if their difference and their mean under pi are zero:

    C(ask) - C(own) = gain + U(s'(ask)) - U(s'(own)) - n score(s)
    sum of pi(u|s) C(u)

The difference trains the score, and the mean trains the critic U. So no error of U(s) reaches the score.
With U = 0 the score is the plain regression of `fitting`, from which this training starts. The score is an
index: the price at which both actions are worth the same (Whittle 1988). So the difference is computed at the
price that equals the score. If the score is low, later calls are cheap at that price.

The critic sees the price, and U is convex in it. The value of the constraint, the expected teacher tokens
from here on, is

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
    """U in nats, as a function of the gate's features and the price."""

    middle: Tensor
    """Middle of the range of log prices."""
    reach: Tensor
    """Distance from the middle to the ends of this range."""
    mean: Tensor
    """(F,) mean of the features."""
    scale: Tensor
    """(F,) 1 / the standard deviation of the features."""

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
        """Take the mean and scale of the features from the head's gate."""
        self.mean.copy_(head.gate.mean)
        self.scale.copy_(head.gate.scale)

    def forward(self, x: Tensor, price: Tensor) -> Tensor:
        """U (...) of features x (..., F) at prices (...) in nats."""
        dear = (price.log() - self.middle) / self.reach
        seen = torch.cat(((x - self.mean) * self.scale, dear[..., None]), dim=-1)
        utility: Tensor = self.mlp(seen).squeeze(-1)
        return utility


class Ahead(NamedTuple):
    """U of the next states of N positions, in nats."""

    called: Tensor
    """(N,) U after a call."""
    own: Tensor
    """(N,) U after the student's own token."""


class Residuals(NamedTuple):
    """Residuals C of both actions at N positions, and the policy there."""

    ask: Tensor
    """(N,) C of asking, in nats."""
    own: Tensor
    """(N,) C of writing, in nats."""
    share: Tensor
    """(N,) pi(ask|s), the probability of asking."""

    @property
    def mean(self) -> Tensor:
        """(N,) mean of C under the policy, in nats."""
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
    """The residuals C of both actions; all tensors are (N,).

    Args:
        score: the gate's scores, in nats.
        gain: the loss of the student's next token, in nats.
        tokens: number of tokens in a call.
        utility: U at the positions, in nats.
        ahead: U at the next states.
        price: price of a teacher token, in nats.
        temperature: T, in nats.
    """
    logit = tokens * (score - price) / temperature
    ask = -price * tokens + ahead.called - temperature * logsigmoid(logit) - utility
    own = -gain + ahead.own - temperature * logsigmoid(-logit) - utility
    return Residuals(ask, own, logit.sigmoid())


def difference(score: Tensor, gain: Tensor, tokens: Tensor, ahead: Ahead) -> Tensor:
    """(N,) C(ask) - C(own) per teacher token, which depends neither on U(s) nor on the price there."""
    return (gain + ahead.called - ahead.own) / tokens - score


class Choices(NamedTuple):
    """The data that a policy is fitted on: positions, and the next states of both actions."""

    lessons: Lessons
    """The positions; their target is the gain of one token."""
    branches: Branches
    """The next states of the same positions."""


class _States:
    """Features of all states of some choices, by the states' numbers in `Branches`."""

    def __init__(self, head: Head, choices: Choices) -> None:
        self._head = head
        self._states = torch.cat((choices.lessons.states, choices.branches.states))
        self._confidence = head.confidence(self._states)

    def features(self, numbers: Tensor) -> Tensor:
        """(N, F) features of the states with these numbers."""
        states = self._states[numbers].to(self._head.taps.device)
        return self._head.features(states, self._confidence[numbers])

    @torch.no_grad()
    def utility(self, critic: Critic, numbers: Tensor, price: Tensor) -> Tensor:
        """(N,) U of the states with these numbers; 0 after the end of a completion."""
        utility = critic(self.features(numbers.clamp(min=0)), price)
        return torch.where((numbers == ENDED).to(utility.device), 0.0, utility)


class _Terms(NamedTuple):
    """The terms of the losses at N positions."""

    difference: Tensor
    """(N,) C(ask) - C(own), per teacher token."""
    residuals: Residuals
    utility: Tensor
    """(N,) U."""


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
        Scalars to log: the last epoch's `loss`, and means over all positions at the geometric mean of the
        range of prices. They are `residual` (absolute), `value` (V, nats) and `value_cost` (V_C, teacher
        tokens).
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
    """Means of residual, V and V_C over N positions, each at its own price of `prices` (N,)."""
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
