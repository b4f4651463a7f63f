"""The ways to use a pair that are compared."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measuring.pair import Pair
from server.bench.plan import Plan
from server.bench.servers import MeasuredServer, PairServers
from server.bench.together import APART, SHARING, STUDENT, TEACHER, SideServers, Together, _sides

NO_PROCESS: Any = None


def server(name: str) -> MeasuredServer:
    return MeasuredServer(f"http://{name}", name, NO_PROCESS)


def sides(*, quick: bool) -> list[str]:
    pair = PairServers(server("teacher"), server("gateway"))
    together = {APART: pair}
    if not quick:
        together[SHARING] = PairServers(server("teacher-2"), server("gateway-2"))
    servers = SideServers(pair, {STUDENT: pair.gateway, TEACHER: pair.teacher}, together)
    checkpoints = Pair(Path("teacher"), Path("student"), None)
    plan = Plan(checkpoints, Path("examples.jsonl"), 1, quick, Path("work"), ExitStack())
    return list(_sides(servers, plan, 1, 1))


def test_the_teacher_has_a_core_of_its_own_or_both() -> None:
    found = sides(quick=False)
    budgets = ("0.05", "0.1", "0.2", "0.5")
    assert [side for side in found if side.startswith("cooperation, ")] == [
        f"cooperation, {budget}" for budget in budgets
    ]
    assert [side for side in found if side.startswith("cooperation on")] == [
        f"cooperation on both cores, {budget}" for budget in budgets
    ]


def test_the_ideal_is_of_a_core_each() -> None:
    """The time that each model needs alone is measured on one core."""
    whole = Together({1: {side: [] for side in sides(quick=False)}})
    quick = Together({1: {side: [] for side in sides(quick=True)}})
    assert whole.cooperative == [f"cooperation, {budget}" for budget in ("0.05", "0.1", "0.2", "0.5")]
    assert quick.cooperative == ["cooperation, 0.1"]
