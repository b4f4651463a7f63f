"""The router part of a recipe: the gate's target, how it sees budgets, and its calibration."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from training.settings import BudgetPrompt, Frozen, Rate


class RegretGain(Frozen):
    """How much less likely the student's token is to the teacher than the teacher's best token, in nats."""

    type: Literal["regret"]
    clip: PositiveFloat = 8.0
    """Largest regret of one token, in nats."""


class RatioGain(Frozen):
    """1 - p_T(own) / p_T(best): the same loss as `regret`, as a share of the teacher's probability."""

    type: Literal["ratio"]


class QualityGain(Frozen):
    """How much one teacher token changes the quality of the whole completion, in points of 100.

    Quality is the mean of the task's quality and similarity, see `training.gating.judge`.
    """

    type: Literal["quality"]
    teacher_references: NonNegativeInt = 4
    """Number of completions drawn from the teacher for each prompt, as references like the task's own."""


class DifferenceObjective(Frozen):
    """The score predicts the gain of asking, by regression."""

    type: Literal["difference"] = "difference"


class ConstrainedObjective(Frozen):
    """The score is a policy of asking, with a price for each budget.

    See `training.gating.constrained`, and for the gain `quality` `training.gating.advantages`. That gain uses
    neither `prices` nor `temperature` nor `clip`.
    """

    type: Literal["constrained"]
    start_rounds: PositiveInt = 1
    """Number of first rounds in which the score is the plain regression on the gain. The policy starts from
    this score.
    """
    prices: tuple[PositiveFloat, PositiveFloat] = (0.02, 8.0)
    """Range of prices that the critic sees, in nats."""
    temperature: PositiveFloat = 0.02
    """Temperature of the policy, in nats; low, because a served gate decides by the price alone."""
    clip: PositiveFloat = 8.0
    """Size of a residual, in nats, beyond which the loss grows linearly."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if not self.prices[0] < self.prices[1]:
            raise ValueError("prices: expected a range, the lower price first")
        return self


class PriceConditioning(Frozen):
    """The gate sees a budget only as a price."""

    type: Literal["price"] = "price"
    rate: Rate = 0.15
    """Teacher rate that the on-policy rollouts aim at."""


class PromptConditioning(Frozen):
    """Student and gate also read the budget in words in the prompt. Each rollout draws its own budget."""

    type: Literal["prompt"]
    words: BudgetPrompt = "Use the teacher for at most {percent} % of the answer. "
    """Words at the beginning of the last user message. The teacher does not read them."""


class InProcessRollouts(Frozen):
    """Student and teacher write completions in the training process, in lockstep."""

    type: Literal["in_process"] = "in_process"

    @property
    def idle(self) -> tuple[str, ...]:
        """Fields of the router part that have no effect with these rollouts."""
        return ()


class RecordedRollouts(Frozen):
    """Completions that gateways recorded (`wheels serve --record`)."""

    type: Literal["recorded"]
    directory: Path
    """Directory of the recordings; all files in it are read."""

    @property
    def idle(self) -> tuple[str, ...]:
        """Fields of the router part that have no effect: nothing is requested, and no price is measured."""
        return ("prompts", "rounds", "explore", "budgets", "calibration_examples")


class GatewayRollouts(Frozen):
    """Completions that a gateway writes for training: a running one, or one that the stage starts."""

    type: Literal["gateway"]
    url: str | None = None
    """Address of a running gateway, with or without /v1. None: the stage starts a gateway on this machine,
    and also the teacher's server unless the teacher is behind a URL.
    """
    concurrency: PositiveInt = 16
    """Number of concurrent requests."""
    router: Path | None = None
    """Router directory of the gateway behind `url` (its `--router`). Each new router is written there, and
    the gateway loads it. None: the gateway keeps its gate, so there is one round and no calibration. A
    gateway that the stage starts always has such a directory.
    """
    batch: PositiveInt = 50
    """Number of prompts sent with one budget, which is drawn from `budgets`. A stopped run resumes after the
    last batch.
    """
    teacher_flags: tuple[str, ...] = ()
    """More vLLM flags for the teacher's server, if the stage starts it."""
    student_flags: tuple[str, ...] = ()
    """More vLLM flags for the student, if the stage starts the gateway."""

    @property
    def is_started(self) -> bool:
        """Whether the stage starts the gateway."""
        return self.url is None

    @property
    def takes_routers(self) -> bool:
        """Whether the gateway takes new routers while it serves."""
        return self.is_started or self.router is not None

    @property
    def idle(self) -> tuple[str, ...]:
        """Fields of the router part that have no effect: a gateway decides by its gate alone."""
        return ("explore",) if self.takes_routers else ("rounds", "explore", "calibration_examples")

    @model_validator(mode="after")
    def _one_gateway(self) -> Self:
        if self.is_started and self.router is not None:
            raise ValueError("router needs url: a gateway that this stage starts has its own directory")
        for name in ("teacher_flags", "student_flags"):
            if not self.is_started and getattr(self, name):
                raise ValueError(f"{name}: no effect with url, because nothing is started then")
        return self


WHERE: dict[str, Any] = {"rollouts": {"url", "concurrency", "router", "teacher_flags", "student_flags"}}
"""Fields of the router part that do not matter for the result, in the form of pydantic's `exclude`."""

Gain = Annotated[RegretGain | RatioGain | QualityGain, Field(discriminator="type")]
Objective = Annotated[DifferenceObjective | ConstrainedObjective, Field(discriminator="type")]
Conditioning = Annotated[PriceConditioning | PromptConditioning, Field(discriminator="type")]

Rollouts = Annotated[InProcessRollouts | RecordedRollouts | GatewayRollouts, Field(discriminator="type")]

MOVED = {
    "teacher_references": "is part of gain: {type: quality}",
    "horizon": "is gone: gain {type: quality} looks to the end of the completion, the others at one call",
    "prices": "is part of objective: {type: constrained}",
    "temperature": "is part of objective: {type: constrained}",
    "window": "is gone: sub-paths have one decision",
    "clip": "is part of gain: {type: regret} and of objective: {type: constrained}",
    "rate": "is part of conditioning: {type: price}",
    "budget_prompt": "is conditioning: {type: prompt, words: …}",
}
"""Keys of older recipes, and what replaced them."""
OLD_GAINS = {
    "excess": "write {type: regret}, as it is called now",
    "kl": "is gone: write {type: regret}",
    "differs": "is gone: write {type: regret}",
}


class GateConfig(Frozen):
    """The gate for the frozen pair, and its calibration."""

    span_tokens: PositiveInt
    """Initial credit of a fraction, in tokens."""
    ask_tokens: PositiveInt
    """Number of tokens in one teacher call; at most `span_tokens`."""
    width: PositiveInt = 64
    """Width of the gate's hidden layers."""
    gain: Gain
    """The gain of asking, which the score learns to predict."""
    objective: Objective = DifferenceObjective()
    """How the score learns the gain."""
    conditioning: Conditioning = PriceConditioning()
    """How a budget reaches student and gate."""
    rollouts: Rollouts = InProcessRollouts()
    """What writes the completions that the gate learns from."""
    prompts: PositiveInt = 4000
    """Number of training prompts in each round of rollouts."""
    rounds: PositiveInt = 2
    """Number of rounds of rollouts. In the first, asking is random; in later rounds, the gate decides."""
    explore: float = Field(default=0.1, ge=0, lt=1)
    """Share of decisions in later rounds that are reversed."""
    epochs: PositiveInt = 8
    """Number of passes over the positions of the rollouts in each fit."""
    batch: PositiveInt = 2048
    """Number of positions in one optimizer step."""
    learning_rate: PositiveFloat = 3e-3
    """Peak learning rate of the gate's fit."""
    weight_decay: float = 1e-4
    """Weight decay of the gate's fit."""
    budgets: tuple[Rate, ...] = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.9)
    """Fractions to calibrate prices for, in increasing order."""
    calibration_examples: PositiveInt = 500
    """Number of validation examples for measuring prices."""

    @property
    def template(self) -> str | None:
        """The template of the budget in words; None unless `conditioning` is `prompt`."""
        return self.conditioning.words if isinstance(self.conditioning, PromptConditioning) else None

    def policy(self, number: int) -> ConstrainedObjective | None:
        """The constrained objective if this round, from 1, is one of its own; None if it is a regression."""
        if isinstance(self.objective, ConstrainedObjective) and number > self.objective.start_rounds:
            return self.objective
        return None

    @model_validator(mode="before")
    @classmethod
    def _older_recipe(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in MOVED.keys() & data.keys():
            raise ValueError(f"{name} {MOVED[name]}")
        for name in ("gain", "objective", "conditioning"):
            value = data.get(name)
            if isinstance(value, str):
                now = OLD_GAINS.get(value) if name == "gain" else None
                raise ValueError(f"{name} {value}: {now or f'write {{type: {value}}}'}")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ask_tokens > self.span_tokens:
            raise ValueError(f"ask_tokens {self.ask_tokens} is more than span_tokens {self.span_tokens}")
        looks_ahead = isinstance(self.gain, QualityGain)
        if looks_ahead and not isinstance(self.conditioning, PriceConditioning):
            raise ValueError("gain quality needs conditioning price")
        if looks_ahead and self.ask_tokens != 1:
            raise ValueError("gain quality needs ask_tokens 1")
        if not isinstance(self.rollouts, InProcessRollouts):
            self._check_served()
        if isinstance(self.objective, ConstrainedObjective):
            self._check_policy(self.objective)
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError("budgets: expected at least one, in increasing order")
        return self

    def _check_served(self) -> None:
        """Refuse settings that completions of a gateway cannot support or do not use."""
        rollouts = self.rollouts.type
        if isinstance(self.gain, QualityGain) and isinstance(self.rollouts, RecordedRollouts):
            raise ValueError(f"gain quality needs rollouts in_process or gateway, not {rollouts}")
        policy = isinstance(self.objective, ConstrainedObjective)
        if policy and self.ask_tokens != 1:
            raise ValueError(f"objective constrained needs ask_tokens 1 with rollouts {rollouts}")
        if not isinstance(self.conditioning, PriceConditioning):
            raise ValueError(f"conditioning prompt needs rollouts in_process, not {rollouts}")
        idle = [name for name in self.rollouts.idle if name in self.model_fields_set]
        if "rate" in self.conditioning.model_fields_set:
            idle.append("conditioning.rate")
        if "start_rounds" in self.objective.model_fields_set:
            idle.append("objective.start_rounds")
        if idle:
            raise ValueError(
                f"rollouts {rollouts} do not use {', '.join(idle)}: leave them out, or set them to null"
            )

    def _check_policy(self, objective: ConstrainedObjective) -> None:
        in_process = isinstance(self.rollouts, InProcessRollouts)
        if in_process and self.rounds <= objective.start_rounds:
            raise ValueError(
                f"objective constrained: rounds {self.rounds} must be more than its start_rounds "
                f"{objective.start_rounds}"
            )
        if isinstance(self.gain, QualityGain):
            if not in_process:
                raise ValueError("objective constrained with gain quality needs rollouts in_process")
            idle = [
                f"objective.{name}"
                for name in ("prices", "temperature", "clip")
                if name in objective.model_fields_set
            ]
            if objective.start_rounds == 1 and "explore" in self.model_fields_set:
                # The first round asks at random, and the policy's rounds do not explore.
                idle.append("explore")
            if idle:
                raise ValueError(f"gain quality does not use {idle[0]}: leave it out")
        if not isinstance(self.conditioning, PriceConditioning):
            raise ValueError("objective constrained needs conditioning price")
        if "rate" in self.conditioning.model_fields_set:
            raise ValueError("conditioning.rate needs objective difference: constrained aims at every budget")
