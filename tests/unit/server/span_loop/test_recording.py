"""`--record`: completions of both models are kept, and recording disturbs no request."""

import logging
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from measuring.json_lines import DataError
from measuring.trajectories import Trajectory, read_trajectories
from server.recorder import Recorder
from tests.helpers.scripted_pair import write
from tests.helpers.scripted_student import FINAL_ONLY, PROMPT_IDS


def record(engine, directory: Path, share: float = 1.0, max_bytes: int = 10_000) -> None:
    recorder = Recorder(directory, share, max_bytes, random.Random(0))
    engine.cooperator.cooperation = replace(engine.cooperator.cooperation, recorder=recorder)


async def test_a_completion_is_kept_with_its_spans(pair, tmp_path: Path) -> None:
    engine, _ = pair(ask_at={2, 6})
    record(engine, tmp_path / "new" / "record")
    await write(engine, 0.5, max_tokens=10)
    (kept,) = read_trajectories(tmp_path / "new" / "record")
    assert kept == Trajectory(list(PROMPT_IDS), list(b"abCDefGHij"), [(2, 4), (6, 8)], 0.5)


async def test_every_choice_is_kept_and_other_budgets_have_no_fraction(pair, tmp_path: Path) -> None:
    engine, _ = pair(ask_at={2})
    record(engine, tmp_path)
    await write(engine, {"fraction": 0.5, "calls": 1}, max_tokens=4, n=2, output_kind=FINAL_ONLY)
    assert [kept.budget for kept in read_trajectories(tmp_path)] == [None, None]


async def test_a_request_without_a_budget_is_not_kept(pair, tmp_path: Path) -> None:
    engine, _ = pair()
    record(engine, tmp_path)
    await write(engine, 0)
    with pytest.raises(DataError, match="holds no file"):
        list(read_trajectories(tmp_path))


async def test_a_completion_with_an_adapter_is_not_kept(pair, tmp_path: Path) -> None:
    """A router reads the student without adapters: trajectories of another model would teach it nothing."""
    engine, _ = pair(ask_at={2})
    record(engine, tmp_path)
    await write(engine, 0.5, options={"lora_request": SimpleNamespace(lora_name="tuned")})
    with pytest.raises(DataError, match="holds no file"):
        list(read_trajectories(tmp_path))


async def test_about_a_share_of_the_completions_is_kept(pair, tmp_path: Path) -> None:
    engine, _ = pair()
    record(engine, tmp_path, share=0.25)
    for _ in range(80):
        await write(engine, 0.5, max_tokens=2)
    assert 4 < len(list(read_trajectories(tmp_path))) < 40  # a quarter of 80


async def test_a_full_file_is_reported_once_and_harms_nobody(
    pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = pair()
    record(engine, tmp_path, max_bytes=200)
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            assert (await write(engine, 0.5, max_tokens=10)).text() == "abcdefghij"
    assert len([text for text in caplog.messages if "it is full" in text]) == 1
    assert 0 < len(list(read_trajectories(tmp_path))) < 9


async def test_a_disk_that_fails_harms_nobody(pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = pair()
    record(engine, tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (await write(engine, 0.5, max_tokens=3)).text() == "abc"
    assert len([text for text in caplog.messages if "No such file" in text]) == 1
