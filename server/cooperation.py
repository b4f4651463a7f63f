"""How student and teachers work together, and the budget and teachers that a request gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from router.budget import Bucket, Budget
from router.money import FREE, PriceList
from router.policy import Policy
from router.reserved import ReservedRows
from router.words import BudgetWords
from server.exchange import NO_PRICES, Exchange, Purse
from server.original_prompt import OriginalPrompt
from server.parameters import unsupported
from server.recorder import Recorder
from server.shared_budgets import SharedBudgets
from server.teacher.teachers import NamedTeacher, Teachers
from server.tenants import BudgetRefused
from server.vllm_api import SamplingParams, VLLMValidationError


@dataclass(frozen=True)
class Cooperation:
    """Everything that the engine needs to write with a teacher."""

    teachers: Teachers
    policy: Policy
    reserved: ReservedRows
    span_tokens: int
    default_budget: Budget
    shared: SharedBudgets
    on_teacher_error: Literal["degrade", "error"] = "degrade"
    ask_tokens: int | None = None
    router: str | None = None
    """Digest of the router in use; None without a router."""
    models: Mapping[str, Budget] = field(default_factory=dict)
    """Budgets by model name, for requests that set no budget themselves."""
    client_priority: bool = False
    """Whether a request may set its own priority."""
    recorder: Recorder | None = None
    """Records what both models write; None if nothing is recorded."""
    prices: PriceList | None = None
    """Prices of tokens; None if none are configured."""
    parsers: bool = False
    """Whether vLLM's HTTP layer parses reasoning or tool calls in streams."""
    words: BudgetWords | None = None
    """Budgets in words, which the student reads; None if it reads none."""

    @property
    def wants_originals(self) -> bool:
        """Whether prompts are needed as they were before rendering."""
        return self.words is not None or self.teachers.may_translate

    def budget(self, exchange: Exchange, prompt: Any, params: SamplingParams) -> Budget:
        """The budget of a request: its own, its model's or the default one.

        A parameter that rules out a teacher makes a budget of a model or a default 0.

        Raises:
            VLLMValidationError: the request's own budget is not usable, or not with its other parameters.
        """
        budget = self._allowed(exchange)
        if budget.is_zero:
            return budget
        if exchange.writes_nothing:
            return Budget(tokens=0)
        parameter = exchange.unsupported or unsupported(prompt, params)
        if parameter is None:
            original = exchange.original(prompt)
            obstacles = [teacher.obstacle(original, params) for teacher in self._allowed_by(budget)]
            parameter = obstacles[0] if all(obstacles) else None
        if parameter is None:
            return budget
        if exchange.budget is None:
            return Budget(tokens=0)
        parameter = exchange.names.get(parameter, parameter)
        raise VLLMValidationError(
            f"{parameter} cannot be used with a teacher_budget above 0: leave it out, or set the budget to 0",
            parameter=parameter,
        )

    def teachers_for(
        self, budget: Budget, original: OriginalPrompt | None, params: SamplingParams
    ) -> list[NamedTeacher]:
        """The teachers that the budget allows and that can honour all parameters."""
        allowed = self._allowed_by(budget)
        return [teacher for teacher in allowed if teacher.obstacle(original, params) is None]

    def purse(self, budget: Budget, teachers: Sequence[NamedTeacher]) -> Purse:
        """Buckets for a budget: one for all teachers, and one for each teacher with bounds of its own."""
        lengths = (self.span_tokens, self.ask_tokens)
        models = [
            teacher.prices for teacher in teachers if teacher.prices is not None and not teacher.is_tool
        ]
        dearest = models[-1] if models else FREE
        own: dict[str, Bucket] = {}
        for teacher in teachers:
            bounds = budget.own(teacher.name)
            if bounds is not None:
                own[teacher.name] = Bucket(bounds, *lengths, prices=teacher.prices or FREE)
        least = models[0] if len(models) == len(teachers) else FREE
        return Purse(Bucket(budget, *lengths, prices=dearest, least=least), own)

    def _allowed(self, exchange: Exchange) -> Budget:
        """The request's own budget, its model's or the default one, within its tenant's maximum."""
        default = self.default_budget
        asked = exchange.budget or self.models.get(exchange.model)
        name = exchange.budget_name
        if asked is not None and asked.in_money and self.prices is None:
            raise VLLMValidationError(f"{name}.cost: {NO_PRICES}", parameter=name)
        if asked is not None and (stranger := asked.unknown(self.teachers.names)) is not None:
            known = ", ".join(self.teachers.names)
            problem = f"{name}.teachers: no teacher is named {stranger!r}; there are: {known}"
            raise VLLMValidationError(problem, parameter=name)
        if exchange.tenant is None:
            return asked or default
        try:
            budget, clamped = exchange.tenant.resolve(asked, default)
        except BudgetRefused as error:
            parameter = "model" if exchange.budget is None else exchange.budget_name
            raise VLLMValidationError(str(error), parameter=parameter) from error
        for report in exchange.reports:
            report.clamped = clamped
        return budget

    def _allowed_by(self, budget: Budget) -> list[NamedTeacher]:
        """The teachers that a budget names; all teachers if it names none."""
        return [
            teacher for teacher in self.teachers if budget.teachers is None or teacher.name in budget.teachers
        ]
