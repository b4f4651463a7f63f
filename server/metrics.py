"""The gateway's Prometheus series. vLLM's own ``vllm:*`` series are on /metrics too."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram

from router.money import PICOS
from server.costs import Costs
from server.exchange import Report

REQUESTS = Counter(
    "wheels_requests", "Choices by how they ended: finished, degraded, aborted, error", ["outcome"]
)
COMPLETION_TOKENS = Counter(
    "wheels_completion_tokens",
    "Completion tokens by who wrote them: student, teacher (of several, its name)",
    ["source"],
)
COST = Counter(
    "wheels_cost",
    "What tokens cost, by the configured prices: of student and teacher (of several, its name), by input, "
    "cached_input, output",
    ["model", "kind"],
)
ALONE_COST = Counter(
    "wheels_teacher_alone_cost", "What the same completions would have cost, written by the teacher alone"
)
TEACHER_CALLS = Counter(
    "wheels_teacher_calls",
    "Teacher calls by outcome: ok, aborted, unreachable, timeout, saturated, status, nonsense",
    ["teacher", "replica", "outcome"],
)
TEACHER_CALL_SECONDS = Histogram(
    "wheels_teacher_call_seconds",
    "Duration of a teacher call",
    ["teacher", "replica"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
)
ESCALATIONS = Counter(
    "wheels_escalations",
    "Escalations: granted by the gate; denied by budget, context, penalty, breaker, saturated, a failed "
    "call, shared limits (tenant_tokens, tenant_fraction, tenant_cost, global_tokens, global_fraction, "
    "global_cost) or their ledger (unavailable)",
    ["decision", "reason"],
)
TEACHER_RATE = Histogram(
    "wheels_teacher_rate",
    "Teacher tokens / completion tokens of a choice with a budget above 0",
    buckets=(0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
)
PRICE = Gauge("wheels_price", "Price of a teacher token under the default budget, in the gate's units")
REALISED_RATE = Gauge(
    "wheels_realised_rate",
    "Realised teacher rate for each aimed rate, while the gateway learns its price",
    ["aim"],
)
AIMED_COMPLETION_TOKENS = Gauge(
    "wheels_aimed_completion_tokens",
    "Number of recent completion tokens that wheels_realised_rate is computed from",
    ["aim"],
)
SHARED_LIMIT = ["scope", "tenant", "limit"]
BUDGET_LIMIT = Gauge(
    "wheels_budget_limit",
    "What a shared limit allows: tokens or money in its window, or a teacher rate",
    SHARED_LIMIT,
)
BUDGET_REMAINING = Gauge(
    "wheels_budget_remaining", "Teacher tokens, or money, that a shared limit has left", SHARED_LIMIT
)
BUDGET_RATE = Gauge("wheels_budget_rate", "Realised teacher rate over a shared limit's window", SHARED_LIMIT)
BUDGET_PRICE = Gauge(
    "wheels_budget_price",
    "Price of a teacher token that a shared limit sets, in the gate's units",
    SHARED_LIMIT,
)
LEDGER_AVAILABLE = Gauge("wheels_ledger_available", "1 while the ledger of shared limits answers")
REPLICA = ["teacher", "replica"]
"""Labels of a replica. The name of an only teacher is empty, which is no label for Prometheus."""
BREAKER_OPEN = Gauge("wheels_breaker_open", "1 while the replica's last calls failed", REPLICA)
TEACHER_UP = Gauge("wheels_teacher_up", "1 while the replica answers when it is probed", REPLICA)
TEACHER_RUNNING = Gauge("wheels_teacher_running", "Calls under way", REPLICA)


@contextmanager
def counted(reports: Sequence[Report], *, budgeted: bool, refusal: type[Exception]) -> Iterator[None]:
    """Count the choices of a request once, however it ends; a request that is refused at once has none."""
    unfinished = "aborted"
    try:
        yield
    except refusal:
        if any(report.completion_tokens for report in reports):
            unfinished = "error"
        else:
            reports = ()
        raise
    except Exception:
        unfinished = "error"
        raise
    finally:
        for report in reports:
            finished = "degraded" if report.degraded else "finished"
            REQUESTS.labels(finished if report.finished else unfinished).inc()
            COMPLETION_TOKENS.labels("student").inc(report.completion_tokens - report.tokens)
            for name, part in report.parts.items():
                COMPLETION_TOKENS.labels(name).inc(part.tokens)
            if budgeted and report.completion_tokens:
                TEACHER_RATE.observe(report.tokens / report.completion_tokens)
            if report.costs is not None:
                _count_costs(report.costs)


def _count_costs(costs: Costs) -> None:
    for model, kinds in (("student", costs.student), *costs.teachers.items()):
        for kind, cost in kinds:
            COST.labels(model, kind).inc(cost / PICOS)
    ALONE_COST.inc(costs.alone / PICOS)
