"""A student of any family, without a row to spare, under the gateway's gate."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.families import IN_VLLM
from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """By family; all of them in one process, as vLLM's import takes longer than an engine of this size."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.family_worker", *IN_VLLM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result["family"]: result for result in lines}


@pytest.mark.parametrize("family", IN_VLLM)
def test_a_student_with_appended_rows_writes_what_stock_vllm_writes_with_the_original(results, family):
    result = results[family]
    assert "failed" not in result, result["failed"]
    assert result["ours"] == result["stock"]


@pytest.mark.parametrize("family", IN_VLLM)
def test_the_gate_reads_the_logits_and_taps_that_training_reads(results, family):
    """Scaled, capped and with a bias, as transformers computes them from the same files."""
    assert results[family]["error"] < 1e-3
