"""`wheels bench`: its arithmetic, its client and what it prints; no engine is started."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

import wheels
from server.bench import cli
from server.bench.cooperation import Ideal, Split
from server.bench.cost_model import Costs, Line, Traffic
from server.bench.cpu import TICK, Usage, usage
from server.bench.engine_metrics import EngineWork, Scrape
from server.bench.load import Answer, BenchRequest, LoadRun, drive, quantile
from server.bench.plan import synthetic
from server.bench.quality import interpolate
from server.bench.results import Section, Spread, Table, number
from server.bench.servers import Sample, in_turn

SERIES = """
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 30
vllm:generation_tokens_total{engine="1"} 12
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0"} 1.7e9
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{le="+Inf"} 7
vllm:iteration_tokens_total_count 7
vllm:iteration_tokens_total_sum 99
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 3
"""


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


# --- what engines report ---


def test_a_scrape_sums_counters_over_their_labels_and_leaves_gauges_out() -> None:
    scrape = Scrape.parse(SERIES)
    assert scrape.values == {
        "vllm:generation_tokens_total": 42.0,
        "vllm:iteration_tokens_total_count": 7.0,
        "vllm:iteration_tokens_total_sum": 99.0,
    }


def test_growth_counts_a_new_series_from_nothing() -> None:
    growth = Scrape({"a": 5.0, "b": 2.0}).since(Scrape({"a": 3.0}))
    assert (growth["a"], growth["b"], growth["never"]) == (2.0, 2.0, 0.0)


def test_positions_are_what_went_through_the_model() -> None:
    """Two prompts of 10 that were read, 7 tokens to each; 3 drafts of 4 tokens, 5 of them accepted."""
    series = {
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_prefill_kv_computed_tokens_sum": 20,
        "vllm:generation_tokens_total": 14,
    }
    assert EngineWork.from_growth(Scrape(series)).positions == 20 + 12
    series |= {"vllm:spec_decode_num_draft_tokens_total": 12, "vllm:spec_decode_num_accepted_tokens_total": 5}
    assert EngineWork.from_growth(Scrape(series)).positions == 20 + 12 + 7


def test_usage_is_of_one_process_group(tmp_path: Path) -> None:
    def process(pid: int, group: int, user: int, system: int) -> None:
        (tmp_path / str(pid)).mkdir()
        numbers = [0] * 8 + [user, system] + [0] * 8 + [3] + [0] * 10
        text = f"{pid} (a (odd) name) S 1 {group} " + " ".join(map(str, numbers))
        (tmp_path / str(pid) / "stat").write_text(text)

    process(10, 10, 3 * TICK, TICK)
    process(11, 10, 5 * TICK, 0)
    process(12, 12, 100 * TICK, 0)
    (tmp_path / "meminfo").write_text("")
    seen = usage(10, tmp_path)
    assert (seen.cpu_seconds, seen.front_cpu_seconds) == (9.0, 4.0)
    assert seen.front_memory > 0


# --- the ideal ---


def test_the_ideal_is_what_each_alone_needs() -> None:
    """8 tokens of a student with 40 tokens/s, 2 of a teacher with 5, and 5 + 8 positions at 130/s."""
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


# --- the cost model ---


def test_a_line_is_found_again() -> None:
    line = Line.fit([(1, 5.0), (4, 11.0), (16, 35.0)])
    assert (line.fixed, line.each) == (pytest.approx(3.0), pytest.approx(2.0))


def test_a_line_costs_nothing_negative() -> None:
    assert Line.fit([(1, 5.0), (4, 4.0)]).each == 0.0
    assert Line.fit([(1, 1.0), (2, 3.0)]).fixed == 0.0


def test_one_x_makes_no_line() -> None:
    with pytest.raises(ValueError, match="two different x"):
        Line.fit([(1, 5.0), (1, 4.0)])


COSTS = Costs(
    student_step=Line(4.0, 1.0),
    student_read=0.5,
    teacher_step=Line(40.0, 4.0),
    teacher_read=2.0,
    front=0.01,
    block=32,
)


def test_costs_of_a_request() -> None:
    """100 tokens, 20 of them the teacher's in 5 calls, prompt 50, batches of 4."""
    traffic = Traffic(50, 100, 0.2, 4)
    assert traffic.calls == 5
    assert COSTS.student(traffic, 4) == pytest.approx(80 * 2.0 + (50 + 20 + 5 * 16) * 0.5)
    assert COSTS.teacher(traffic, 4) == pytest.approx(20 * 14.0 + (50 + 80 + 5 * 16) * 2.0)
    assert COSTS.requests_per_second(traffic, 4) == pytest.approx(1 / 700)


def test_a_teacher_that_is_never_asked_costs_nothing() -> None:
    assert COSTS.teacher(Traffic(50, 100, 0.0), 4) == 0.0


def test_a_curve_is_anchored_at_both_models() -> None:
    assert interpolate([(0.2, 0.8)], 0.05) == pytest.approx(0.2)
    assert interpolate([(0.2, 0.8)], 0.6) == pytest.approx(0.9)


# --- the client ---


@pytest.mark.steady_time
async def test_the_client_keeps_its_streams_busy_and_reads_every_answer(unused_tcp_port: int) -> None:
    running = most = 0

    async def complete(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        body = await request.json()
        assert body["stream_options"] == {"include_usage": True}
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for event in (
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": body["messages"][0]["content"]}}]},
            {"choices": [{"delta": {"content": "!"}}], "teacher": {"tokens": 1, "calls": 1}},
            {"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 3}},
        ):
            await reply.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asyncio.sleep(0.01)
        running -= 1
        await reply.write(b"data: [DONE]\n\n")
        return reply

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    try:
        requests = [BenchRequest.chat(str(number)) for number in range(7)]
        run = await drive(f"http://127.0.0.1:{unused_tcp_port}", "m", requests, 2)
    finally:
        await runner.cleanup()
    assert [a.text for a in run.answers] == [f"{number}!" for number in range(7)]
    assert (run.tokens, run.teacher_tokens, run.calls, most) == (14, 7, 7, 2)
    assert all(len(a.arrivals) == 2 and a.start < a.arrivals[0] <= a.end for a in run.answers)


async def test_an_unreachable_server_raises_one_error(unused_tcp_port: int) -> None:
    with pytest.raises(aiohttp.ClientError, match=str(unused_tcp_port)):
        await drive(
            f"http://127.0.0.1:{unused_tcp_port}", "m", [BenchRequest.chat("a"), BenchRequest.chat("b")], 2
        )


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert (quantile([3, 1, 2], 0.5), quantile([1, 2], 0.99), quantile([], 0.5)) == (2, 2, 0.0)


def test_synthetic_prompts_share_no_prefix() -> None:
    prompts = [tuple(request.body["prompt"]) for turn in range(3) for request in synthetic(40, 24, 8, turn)]
    assert len({prompt[:8] for prompt in prompts}) == len(prompts)
    assert all(5 <= token < 405 for prompt in prompts for token in prompt)


async def test_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[int], Awaitable[int]]:
        async def load(turn: int) -> int:
            order.append(f"{name}{turn}")
            return turn

        return load

    found = await in_turn({"a": side("a"), "b": side("b")}, 3, pause=0.0)
    assert order == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert found == {"a": [0, 1, 2], "b": [0, 1, 2]}


# --- what it prints ---


def test_a_section_as_json_and_as_markdown() -> None:
    rows = [{"server": "a", "tokens/s": Spread.from_values([3.0, 1.0, 2.0]), "added ms": None}]
    section = Section({"main": Table("Title", rows, "About.")}, ["a note"], {"cpu": "c"})
    stored = json.loads(json.dumps(section.as_dict()))
    assert stored["tables"]["main"]["rows"][0]["tokens/s"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert stored["machine"] == {"cpu": "c"}
    assert "| a | 2.00 (1.00–3.00) | – |" in section.markdown("x")


def test_three_digits() -> None:
    assert [number(x) for x in (0.01234, 1.234, 12.34, 1234.5, 0.0)] == [
        "0.012",
        "1.23",
        "12.3",
        "1,234",
        "0",
    ]


def test_no_measurement_has_no_spread() -> None:
    with pytest.raises(ValueError, match="no measurement"):
        Spread.from_values([])
    assert not math.isnan(Spread.from_values([1.0]).median)


def test_a_pair_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["bench", str(tmp_path), "--quick"]) == 1
    assert str(tmp_path / "teacher") in capsys.readouterr().err


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--section", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err
