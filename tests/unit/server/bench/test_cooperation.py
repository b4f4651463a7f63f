"""The ideal speed of two models that write one answer, and the losses against it."""

import pytest

from server.bench.cooperation import Ideal, Split
from server.bench.cpu import Usage
from server.bench.engine_metrics import EngineWork, Scrape
from server.bench.load import Answer, LoadRun
from server.bench.servers import Sample


def answer(seconds: float, tokens: int = 10, teacher_tokens: int = 0, prompt: int = 5) -> Answer:
    return Answer(
        start=0.0,
        arrivals=(seconds / 2, seconds),
        end=seconds,
        text="x",
        tokens=tokens,
        prompt_tokens=prompt,
        teacher_tokens=teacher_tokens,
        calls=teacher_tokens,
    )


def sample(*answers: Answer, seconds: float, series: dict[str, float] | None = None) -> Sample:
    return Sample(LoadRun(answers, seconds), Usage(0.0, 0.0, 0), Scrape(series or {}))


def test_the_ideal_is_what_each_alone_needs() -> None:
    """8 tokens by a student with 40 tokens/s, 2 by a teacher with 5, and 5 + 8 positions read at 130/s."""
    run = sample(answer(1.0, tokens=10, teacher_tokens=2), seconds=1.0)
    student = sample(answer(1.0, tokens=40), seconds=1.0)
    teacher = sample(answer(2.0, tokens=10), seconds=2.0)
    ideal = Ideal.from_samples(run, student, teacher, 130.0)
    assert ideal.one_after_the_other == pytest.approx(0.2 + 0.4)
    assert ideal.side_by_side == pytest.approx(0.4)
    assert ideal.with_reading == pytest.approx(0.2 + 0.4 + 0.1)


def test_a_request_that_never_asked_is_not_read() -> None:
    run = sample(answer(1.0, tokens=10), seconds=1.0)
    alone = sample(answer(1.0), seconds=1.0)
    assert Ideal.from_samples(run, alone, alone, 100.0).reading == 0.0


def test_the_split_adds_up_to_the_latencies() -> None:
    series = {
        "vllm:request_decode_time_seconds_sum": 1.0,
        "vllm:request_prefill_time_seconds_sum": 0.5,
        "vllm:request_queue_time_seconds_sum": 0.25,
        "wheels_teacher_call_seconds_sum": 1.5,
    }
    teacher = EngineWork.from_growth(Scrape({"vllm:request_prefill_time_seconds_sum": 1.2}))
    whole = sample(answer(2.0), answer(2.0), seconds=2.0, series=series)
    split = Split.from_sample(Sample(whole.run, whole.usage, whole.growth, teacher))
    assert sum(vars(split).values()) == pytest.approx(4.0)
    assert (split.network, split.gateway) == (pytest.approx(0.3), pytest.approx(0.75))
    busy = Split.from_sample(
        Sample(LoadRun((answer(4.0, teacher_tokens=2),), 4.0), whole.usage, whole.growth, teacher), 0.1
    )
    assert (busy.network, busy.teacher_busy) == (pytest.approx(0.2), pytest.approx(0.1))
    assert sum(split.shares.values()) == pytest.approx(1.0)
