"""A student of any family, without a spare row, under the gateway's gate."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.client import COMMAND_SECONDS
from tests.helpers.families import APPENDED, IN_VLLM, LOGITS, MERGED, load
from tests.helpers.paths import ROOT

WORKERS = 2
Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Results by family. One process runs many of them, as importing vLLM takes longer than an engine."""
    started = []
    for number in range(WORKERS):
        directory = tmp_path_factory.mktemp("families")
        command = [sys.executable, "-m", "tests.helpers.family_worker", str(directory)]
        command += IN_VLLM[number::WORKERS]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    found: dict[str, Result] = {}
    try:
        for process in started:
            output, _ = process.communicate(timeout=COMMAND_SECONDS)
            for line in output.splitlines():
                if line.startswith("{"):
                    result = json.loads(line)
                    found[result["family"]] = result
    finally:
        for process in started:
            process.kill()
    return found


@pytest.fixture(params=IN_VLLM)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def result(family: str, results: dict[str, Result]) -> Result:
    assert family in results, "its process ended before it"
    found = results[family]
    assert "failed" not in found, found["failed"]
    return found


def test_a_student_with_appended_rows_writes_what_stock_vllm_writes_with_the_original(result: Result) -> None:
    assert result["alone"] == result["stock"]


def test_with_turns_between_student_and_teacher_the_completion_is_the_same(result: Result) -> None:
    """The teacher is the original model. Its spans of two tokens alternate with those of the student."""
    tokens = sum(map(len, result["stock"]))
    assert result["mixed"]["completions"] == result["stock"]
    assert 0 < result["mixed"]["teacher_tokens"] < tokens


def test_at_budget_one_the_teacher_writes_all_of_it(result: Result) -> None:
    assert result["whole"]["completions"] == result["stock"]
    assert result["whole"]["teacher_tokens"] == sum(map(len, result["stock"]))


def test_the_gate_reads_what_training_reads(family: str, result: Result) -> None:
    """Logits and taps, scaled, capped and with a bias, are those of transformers from the same files.

    So the gate's features agree too: taps, log-probabilities in nats, entropy and margin.
    """
    import torch
    from safetensors.torch import load_file

    from router.features import features

    place = Path(result["place"])
    seen = load_file(place / LOGITS)["seen"]
    reference = load(family, place / MERGED)
    expected = []
    for prompt, completion in zip(result["prompts"], result["alone"], strict=True):
        logits = reference(torch.tensor([prompt + completion])).logits[0]
        expected.append(logits[len(prompt) - 1 : -1])
    wanted = torch.stack(expected)
    assert (seen - wanted).abs().amax() / wanted.abs().amax() < 1e-3
    scale = wanted[..., APPENDED.taps].abs().amax()
    error = (features(seen, APPENDED) - features(wanted, APPENDED)).abs().amax()
    assert error < 1e-3 * max(scale, 1.0)
