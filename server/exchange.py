"""Data about one request that the HTTP layer and the engine exchange, in addition to vLLM's own types."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NotRequired

from typing_extensions import TypedDict

from router.budget import Bucket, Budget
from router.money import PICOS
from server.costs import Costs, CostSheet
from server.original_prompt import OriginalPrompt
from server.sessions import OpenSession, SessionBudget, SessionFields
from server.sources import STUDENT, Source
from server.tenants import Tenant

NO_PRICES = "this gateway has no prices; its operator can set them with --prices"


class PartFields(TypedDict):
    """Tokens, calls, spans and cost of one of several teachers."""

    tokens: int
    calls: int
    spans: list[list[int]]
    cost: NotRequired[float]


class ReportFields(TypedDict):
    """The `teacher` field of a response."""

    tokens: int
    calls: int
    rate: float
    spans: list[list[int]]
    denied: dict[str, int]
    degraded: bool
    clamped: bool
    session: NotRequired[SessionFields]
    """Budget and spending of the request's session, if it names one."""
    cost: NotRequired[float]
    """Cost of what the teacher read and wrote, if the gateway has prices."""
    saved: NotRequired[float]
    """Cost of the teacher alone, minus the cost of both models; negative if both cost more."""
    own_tokens: NotRequired[int]
    """Number of tokens that the teacher wrote in its own vocabulary, if that is not the student's."""
    teachers: NotRequired[dict[str, PartFields]]
    """Part of each teacher that was called, by name, if teachers have names."""


@dataclass
class Part:
    """Tokens, calls and spans of one teacher in a choice."""

    tokens: int = 0
    calls: int = 0
    spans: list[list[int]] = field(default_factory=list)


@dataclass
class Report:
    """Report of who wrote one choice, and at what cost: the `teacher` field of a response."""

    completion_tokens: int = 0
    tokens: int = 0
    calls: int = 0
    spans: list[list[int]] = field(default_factory=list)
    """[start, end) token offsets of the teacher's spans; adjacent calls are kept apart."""
    denied: Counter[str] = field(default_factory=Counter)
    degraded: bool = False
    clamped: bool = False
    """Whether the request's budget was lowered to the key's maximum."""
    own_tokens: int | None = None
    """Number of tokens that the teacher wrote in its own vocabulary; None if that is the student's."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Part of each teacher that was called, by its name."""
    named: bool = False
    """Whether the operator gave the teachers names; only then does the report list them."""
    source: Source = STUDENT
    """Writer of the tokens that were handed out last."""
    finished: bool = False
    sheet: CostSheet = field(default_factory=CostSheet)

    @property
    def costs(self) -> Costs | None:
        """Costs of the choice so far; None without prices."""
        return self.sheet.costs(self.completion_tokens, self.completion_tokens - self.tokens)

    def open_span(self, name: str) -> None:
        """Add an empty span at the end of the completion, for a call of this teacher."""
        span = [self.completion_tokens] * 2
        part = self.parts.setdefault(name, Part())
        part.calls += 1
        part.spans.append(span)
        self.calls += 1
        self.spans.append(span)

    def taught(self, name: str, tokens: int, end: int) -> None:
        """Add ``tokens`` tokens to the last call, whose span then ends at the offset ``end``."""
        self.tokens += tokens
        self.parts[name].tokens += tokens
        self.spans[-1][1] = end

    def as_dict(self) -> ReportFields:
        """The report as the `teacher` field of a response."""
        fields: ReportFields = {
            "tokens": self.tokens,
            "calls": self.calls,
            "rate": round(self.tokens / self.completion_tokens, 6) if self.completion_tokens else 0.0,
            "spans": _written(self.spans),
            "denied": dict(self.denied),
            "degraded": self.degraded,
            "clamped": self.clamped,
        }
        if (costs := self.costs) is not None:
            fields["cost"] = costs.teacher.total / PICOS
            fields["saved"] = costs.saved / PICOS
        if self.own_tokens is not None:
            fields["own_tokens"] = self.own_tokens
        if self.parts and self.named:
            fields["teachers"] = self._parts(costs)
        return fields

    def _parts(self, costs: Costs | None) -> dict[str, PartFields]:
        parts: dict[str, PartFields] = {}
        for name, part in self.parts.items():
            parts[name] = {"tokens": part.tokens, "calls": part.calls, "spans": _written(part.spans)}
            if costs is not None and name in costs.teachers:
                parts[name]["cost"] = costs.teachers[name].total / PICOS
        return parts


def _written(spans: list[list[int]]) -> list[list[int]]:
    """The spans that have at least one token."""
    return [span for span in spans if span[0] < span[1]]


@dataclass
class Purse:
    """The budget of a choice, and what is spent of it.

    The engine may be called several times for one request, for example for tools that the gateway runs.
    Later calls continue with the rest of the budget.
    """

    bucket: Bucket
    own: dict[str, Bucket] = field(default_factory=dict)
    """Budgets of single teachers within it, by their names."""
    written: int = 0
    """Number of tokens of the completions that have ended, by either model."""
    in_use: bool = False

    def close(self, tokens: int) -> None:
        """Note that a completion of ``tokens`` tokens has ended."""
        self.written += tokens
        self.in_use = False


@dataclass
class Exchange:
    """One HTTP request: the budget it asked for and a report for each of its choices."""

    budget: Budget | None = None
    """Budget that the request itself sets; None if it sets none."""
    unsupported: str | None = None
    """A parameter of the HTTP request that rules out a teacher and that the engine never sees."""
    writes_nothing: bool = False
    """Whether only the prompt and its log-probabilities are wanted, so that no budget is spent."""
    searches: bool = False
    """Whether the choices come from a beam search."""
    budget_name: str = "teacher_budget"
    """The field or header that the budget came in."""
    asked_session: SessionBudget | None = None
    session: OpenSession | None = None
    session_name: str = "teacher_session"
    """The field or header that the session came in."""
    model: str = ""
    """Model name that the request sent."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of parameters as the client sent them, by vLLM's names."""
    tenant: Tenant | None = None
    """Owner of the request's key; None if the gateway needs no keys, or if it is an admin's."""
    reports: list[Report] = field(default_factory=list)
    purses: dict[int, list[Purse]] = field(default_factory=dict)
    """Purses by the index of a choice; several if the engine is called for several prompts at once."""
    latest: Report = field(default_factory=Report)
    """Report of the choice that handed out tokens last."""
    failure: Exception | None = None
    """Exception in the engine that ended the request; None if there was none."""
    searched: Callable[[list[Report]], None] | None = None
    """Counts the choices of a beam search at its end, because the engine sees only its steps."""
    originals: list[tuple[Any, OriginalPrompt]] = field(default_factory=list)
    """Pairs of a rendered prompt and its original; noted only if `Cooperation.wants_originals`."""

    def original(self, prompt: Any) -> OriginalPrompt | None:
        """The original of a rendered prompt; None if it came as token ids."""
        return next((original for rendered, original in self.originals if rendered is prompt), None)

    @contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Keep the exception that ends the request: vLLM shows it to some clients only."""
        try:
            yield
        except Exception as error:
            self.failure = self.failure or error
            raise

    def end_search(self, choices: int, tokens: int) -> None:
        """Count a beam search that ended with ``choices`` choices and ``tokens`` tokens in all of them."""
        if self.searched is None or not choices:
            return
        for _ in range(choices):
            self.open().finished = True
        self.reports[0].completion_tokens = tokens
        self.searched(self.reports)

    def open(self) -> Report:
        """Add a choice's report; choices are opened in the order of their indices in the response."""
        self.reports.append(Report())
        return self.reports[-1]

    def purse(self, index: int, new: Purse) -> Purse:
        """The purse of a choice: one that an earlier call of the engine has left, or ``new``."""
        purses = self.purses.setdefault(index, [])
        purse = next((purse for purse in purses if not purse.in_use), None)
        if purse is None:
            purse = new
            purses.append(purse)
        purse.in_use = True
        return purse

    def hand_out(self, report: Report, source: Source, *, finished: bool) -> None:
        """Note who wrote the next tokens of a choice, and whether they are the last."""
        report.source = source
        report.finished = finished
        self.latest = report

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return bool(self.reports) and all(report.finished for report in self.reports)

    def total(self) -> Report:
        """The sum of all choices' reports. It has spans only for a single choice, as they are its offsets."""
        if len(self.reports) == 1:
            return self.reports[0]
        whole = Report()
        for report in self.reports:
            whole.completion_tokens += report.completion_tokens
            whole.tokens += report.tokens
            whole.calls += report.calls
            whole.denied += report.denied
            whole.degraded |= report.degraded
            whole.clamped |= report.clamped
            whole.sheet.add(report.sheet)
            whole.named |= report.named
            for name, part in report.parts.items():
                sums = whole.parts.setdefault(name, Part())
                sums.tokens += part.tokens
                sums.calls += part.calls
            if report.own_tokens is not None:
                whole.own_tokens = (whole.own_tokens or 0) + report.own_tokens
        return whole


EXCHANGE: ContextVar[Exchange] = ContextVar("exchange")
