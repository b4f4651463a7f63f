"""`wheels demo`, as a stranger runs it: the promises of the shipped pair."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from measuring.examples import load_examples
from measuring.gateway import GatewayClient
from measuring.pair import START_SECONDS, Pair, Serving, free_port, gateway_service
from measuring.processes import running
from server.local.measure import answer_all
from tests.helpers.client import COMMAND_SECONDS
from tests.helpers.paths import DEMO


def demo() -> dict[float, dict[str, Any]]:
    """Rows of `wheels demo --once --json` by budget."""
    command = [sys.executable, "-m", "wheels", "demo", "--once", "--json", "--pair", str(DEMO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, done.stderr
    return {row["budget"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}


def recovered(rows: dict[float, dict[str, Any]], budget: float) -> float:
    alone, teacher = rows[0.0]["exact_match"], rows[1.0]["exact_match"]
    return (rows[budget]["exact_match"] - alone) / (teacher - alone)


@pytest.fixture(scope="module")
def learned() -> dict[float, dict[str, Any]]:
    return demo()


def test_quality_rises_with_the_budget(learned: dict[float, dict[str, Any]]) -> None:
    matches = [learned[budget]["exact_match"] for budget in sorted(learned)]
    assert matches == sorted(matches)
    assert 0.6 <= matches[0] <= 0.8
    assert matches[-1] >= 0.97


def test_a_small_budget_recovers_most_of_the_gap(learned: dict[float, dict[str, Any]]) -> None:
    assert recovered(learned, 0.1) >= 0.6
    assert recovered(learned, 0.2) >= 0.8


def test_no_request_is_above_its_bound(learned: dict[float, dict[str, Any]]) -> None:
    assert all(row["max_excess_tokens"] == 0 for row in learned.values())
    assert all(row["teacher_rate"] <= budget + 0.02 for budget, row in learned.items())
    assert learned[0.0]["calls_per_request"] == 0


async def test_asking_by_the_router_beats_asking_at_random(
    learned: dict[float, dict[str, Any]], stack: Serving, pair: Pair, tmp_path: Path
) -> None:
    url, examples = f"http://127.0.0.1:{free_port()}", load_examples(DEMO / "examples.jsonl")
    random = {budget: learned[budget] for budget in (0.0, 1.0)}
    with running(
        [gateway_service(pair, stack.teacher, url, tmp_path, ("--gate", "random"))], timeout=START_SECONDS
    ):
        async with GatewayClient(url, concurrency=16) as client:
            for budget in (0.05, 0.1, 0.2):
                answered = await answer_all(client, examples, budget)
                random[budget] = {"exact_match": sum(one.right for one in answered) / len(answered)}
                assert recovered(learned, budget) > recovered(random, budget) + 0.2
