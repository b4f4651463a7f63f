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
    """What one of several teachers did."""

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
    """What the request's session has and has spent, if it names one."""
    cost: NotRequired[float]
    """What the teacher's reading and writing cost, where the gateway has prices."""
    saved: NotRequired[float]
    """What the teacher alone would have cost, less what both models did; below 0 if that was more."""
    own_tokens: NotRequired[int]
    """What the teacher wrote in tokens of its own, where its vocabulary is not the student's."""
    teachers: NotRequired[dict[str, PartFields]]
    """Where teachers have names: what each of those did that were called."""


@dataclass
class Part:
    """What one teacher did for a choice."""

    tokens: int = 0
    calls: int = 0
    spans: list[list[int]] = field(default_factory=list)


@dataclass
class Report:
    """Who wrote one choice, and at what cost: the `teacher` field of a response."""

    completion_tokens: int = 0
    tokens: int = 0
    calls: int = 0
    spans: list[list[int]] = field(default_factory=list)
    """[start, end) token offsets of the teacher's spans; adjacent calls are kept apart."""
    denied: Counter[str] = field(default_factory=Counter)
    degraded: bool = False
    clamped: bool = False
    """The key's maximum was less than the budget asked for."""
    own_tokens: int | None = None
    """What the teacher wrote in tokens of its own; None where its vocabulary is the student's."""
    parts: dict[str, Part] = field(default_factory=dict)
    """By the name of each teacher that was called."""
    named: bool = False
    """Whether the operator gave teachers names, which the report then has."""
    source: Source = STUDENT
    """Who wrote the tokens handed out last."""
    finished: bool = False
    sheet: CostSheet = field(default_factory=CostSheet)

    @property
    def costs(self) -> Costs | None:
        """What the choice has cost so far; None without prices."""
        return self.sheet.costs(self.completion_tokens, self.completion_tokens - self.tokens)

    def open_span(self, name: str) -> None:
        """A teacher is called at the end of the completion."""
        span = [self.completion_tokens] * 2
        part = self.parts.setdefault(name, Part())
        part.calls += 1
        part.spans.append(span)
        self.calls += 1
        self.spans.append(span)

    def taught(self, name: str, tokens: int, end: int) -> None:
        """The last call brought tokens, up to this offset."""
        self.tokens += tokens
        self.parts[name].tokens += tokens
        self.spans[-1][1] = end

    def as_dict(self) -> ReportFields:
        """The report, as a response has it."""
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
    """Spans with a token."""
    return [span for span in spans if span[0] < span[1]]


@dataclass
class Purse:
    """A budget, and what is spent of it.

    The engine may be called several times for one request, as for tools that the gateway runs: what comes
    later goes on with what is left.
    """

    bucket: Bucket
    own: dict[str, Bucket] = field(default_factory=dict)
    """What single teachers may have of it, by their names."""
    written: int = 0
    """Tokens of the completions that ended, whoever wrote them."""
    in_use: bool = False

    def close(self, tokens: int) -> None:
        """A completion of this many tokens has ended."""
        self.written += tokens
        self.in_use = False


@dataclass
class Exchange:
    """One HTTP request: the budget it asked for and a report for each of its choices."""

    budget: Budget | None = None
    """None where the caller named none."""
    unsupported: str | None = None
    """A parameter of the HTTP request that rules out a teacher and that the engine never sees."""
    writes_nothing: bool = False
    """Only the prompt is asked for, with its log-probabilities: whatever the budget, nobody spends it."""
    searches: bool = False
    """The choices come of a beam search."""
    budget_name: str = "teacher_budget"
    """The field or header that the budget came in."""
    asked_session: SessionBudget | None = None
    session: OpenSession | None = None
    session_name: str = "teacher_session"
    """The field or header that the session came in."""
    model: str = ""
    """The name that the client calls the model by."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the client calls a parameter that vLLM knows by another name."""
    tenant: Tenant | None = None
    """Whose key the request came with; None where the gateway asks for none, or it was the admin's."""
    reports: list[Report] = field(default_factory=list)
    purses: dict[int, list[Purse]] = field(default_factory=dict)
    """By the index of a choice; several where the engine is called for several prompts at once."""
    latest: Report = field(default_factory=Report)
    """Of the choice that handed out tokens last."""
    failure: Exception | None = None
    """Why the request ends without its completion, as the engine saw it."""
    searched: Callable[[list[Report]], None] | None = None
    """Counts what comes of a beam search: the engine sees its steps only."""
    originals: list[tuple[Any, OriginalPrompt]] = field(default_factory=list)
    """Rendered prompts, and what each was before; noted where the teacher has another vocabulary."""

    def original(self, prompt: Any) -> OriginalPrompt | None:
        """What a rendered prompt was before; None where it came as token ids."""
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
        """A beam search came to these choices, which have ``tokens`` tokens together."""
        if self.searched is None or not choices:
            return
        for _ in range(choices):
            self.open().finished = True
        self.reports[0].completion_tokens = tokens
        self.searched(self.reports)

    def open(self) -> Report:
        """Add a choice; choices are opened in the order of their indices in the response."""
        self.reports.append(Report())
        return self.reports[-1]

    def purse(self, index: int, new: Purse) -> Purse:
        """The budget of a choice: one that an earlier call of the engine has left, or a ``new`` one."""
        purses = self.purses.setdefault(index, [])
        purse = next((purse for purse in purses if not purse.in_use), None)
        if purse is None:
            purse = new
            purses.append(purse)
        purse.in_use = True
        return purse

    def hand_out(self, report: Report, source: Source, *, finished: bool) -> None:
        """Note whose tokens of a choice go out next, and whether they are the last."""
        report.source = source
        report.finished = finished
        self.latest = report

    @property
    def finished(self) -> bool:
        """Whether all choices have ended."""
        return bool(self.reports) and all(report.finished for report in self.reports)

    def total(self) -> Report:
        """All choices as one; spans are offsets within a choice, so several have none in common."""
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
