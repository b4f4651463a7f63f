"""The task that keeps a learned price up to date: scores from the engine, rates to metrics, state to disk."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from router.adaptive import KNOTS, AdaptiveCalibration, SeenScores
from router.budget import Bucket, Budget
from router.policy import Policy
from router.sketch import ScoreSketch
from server.price_follower import PriceFollower

CPU = torch.device("cpu")


class Engine:
    """An engine that answers like several processes: tuples arrive as lists, and not each has a gate."""

    def __init__(self, *answers: SeenScores | None, fails_first: bool = False) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.asked_again = asyncio.Event()
        """Set at the third question: by then the second answer is in use."""
        self.traffic: Callable[[], None] = lambda: None
        """Called whenever the engine is asked, to simulate traffic."""
        self._fails = fails_first

    async def call(self, method: str) -> list[Any]:
        self.asked.append(method)
        self.traffic()
        if len(self.asked) == 3:
            self.asked_again.set()
        if self._fails:
            self._fails = False
            raise RuntimeError("busy")
        return [None if answer is None else list(answer) for answer in self.answers]


def follower(calibration: AdaptiveCalibration, engine: Engine, directory: Path) -> PriceFollower:
    return PriceFollower(calibration, engine.call, directory / "prices" / "one.json")


async def test_the_engines_scores_determine_the_price(tmp_path):
    calibration = AdaptiveCalibration("entropy", 1)
    engine = Engine(None, SeenScores([step / 100 for step in range(101)], 100_000))
    await follower(calibration, engine, tmp_path).update()
    assert engine.asked == ["gate_scores"]
    assert calibration.price(0.1) == pytest.approx(0.9, abs=0.02)


async def test_an_engine_that_has_seen_nothing_changes_nothing(tmp_path):
    calibration = AdaptiveCalibration("entropy", 1)
    before = calibration.points
    await follower(calibration, Engine(SeenScores((), 0)), tmp_path).update()
    assert calibration.points == before


async def test_realised_rates_are_published(tmp_path):
    calibration = AdaptiveCalibration("entropy", 1)
    calibration.observe(0.3, 20, 100)
    await follower(calibration, Engine(None), tmp_path).update()
    assert REGISTRY.get_sample_value("wheels_realised_rate", {"aim": "0.3"}) == 0.2
    assert REGISTRY.get_sample_value("wheels_aimed_completion_tokens", {"aim": "0.3"}) == 100


async def test_the_follower_goes_on_after_a_restart(tmp_path):
    first = AdaptiveCalibration("margin", 1)
    engine = Engine(SeenScores((-9.0, -1.0, -0.5), 500))
    engine.traffic = partial(first.observe, 0.1, 10, 100)
    engine.traffic()
    task = asyncio.create_task(follower(first, engine, tmp_path).follow(0))
    await engine.asked_again.wait()
    first.observe(0.2, 90, 420)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    second = AdaptiveCalibration("margin", 1)
    follower(second, Engine(), tmp_path)
    assert second.points == first.points


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00"])
async def test_a_broken_file_is_no_obstacle(tmp_path, content, caplog):
    (tmp_path / "prices").mkdir()
    (tmp_path / "prices" / "one.json").write_text(content)
    calibration = AdaptiveCalibration("entropy", 1)
    before = calibration.points
    follower(calibration, Engine(), tmp_path)
    assert calibration.points == before
    (line,) = caplog.text.splitlines()
    assert f"the learned prices cannot be read, and are learned again: {tmp_path}/prices/one.json: " in line


async def test_an_engine_that_fails_is_asked_again(tmp_path):
    calibration = AdaptiveCalibration("entropy", 1)
    engine = Engine(SeenScores((1.0, 2.0), 9), fails_first=True)
    engine.traffic = partial(calibration.observe, 0.1, 10, 100)
    engine.traffic()
    task = asyncio.create_task(follower(calibration, engine, tmp_path).follow(0))
    await engine.asked_again.wait()
    task.cancel()
    assert calibration.state.positions == 9


async def test_an_engine_without_traffic_is_not_asked_again_after_all_is_saved(tmp_path):
    calibration = AdaptiveCalibration("entropy", 1)
    engine = Engine(SeenScores((1.0, 2.0), 9))
    task = asyncio.create_task(follower(calibration, engine, tmp_path).follow(0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.asked == []
    calibration.observe(0.1, 10, 100)
    file = tmp_path / "prices" / "one.json"
    async with asyncio.timeout(60):
        while not file.exists():  # noqa: ASYNC110 - a thread writes it
            await asyncio.sleep(0.01)
    assert engine.asked == ["gate_scores"]
    task.cancel()


def test_the_sketch_keeps_the_latest_scores():
    sketch = ScoreSketch(CPU, positions=4)
    for scores in ([1.0, 2.0, 3.0], [4.0, 5.0], [float("nan"), 6.0]):
        sketch.add(torch.tensor(scores))
    kept = sketch.read()
    assert kept.positions == 3
    assert sorted(set(kept.quantiles)) == [4.0, 5.0, 6.0]
    assert list(kept.quantiles) == sorted(kept.quantiles)


def test_a_step_larger_than_the_sketch_leaves_its_last_scores():
    sketch = ScoreSketch(CPU, positions=2)
    sketch.add(torch.arange(5.0))
    assert set(sketch.read().quantiles) == {3.0, 4.0}


def test_an_empty_sketch_has_nothing_to_say():
    assert ScoreSketch(CPU).read() == SeenScores((), 0)


@pytest.mark.parametrize(
    ("budget", "ceiling", "learns"),
    [
        (Budget(fraction=0.1), 1.0, True),
        (Budget(fraction=0.1), 0.05, False),
        (Budget(fraction=0.1, calls=3), 1.0, False),
        (Budget(tokens=5), 1.0, False),
    ],
)
def test_only_a_plain_fraction_teaches(budget, ceiling, learns):
    calibration = AdaptiveCalibration("random", 1)
    policy = Policy(calibration, expected_tokens=10)
    policy.observe(Bucket(budget, 4), 20, 100, ceiling=ceiling, running=1)
    assert (calibration.state.offsets[KNOTS.index(0.1)] != 0.0) == learns
