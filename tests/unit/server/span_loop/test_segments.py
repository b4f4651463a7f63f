"""The span loop: requests to the student's engine."""

from dataclasses import replace

import pytest

from router.budget import Budget
from server.exchange import Exchange
from server.vllm_api import SamplingParams, VLLMValidationError
from tests.helpers.scripted_pair import collect, write
from tests.helpers.scripted_student import DELTA, PROMPT, PROMPT_IDS, RESERVED

# Requests to the student's engine


async def test_the_escalation_token_stops_a_segment_and_is_no_stop_of_the_callers(pair):
    engine, _ = pair(ask_at={2})
    params = SamplingParams(max_tokens=8, output_kind=DELTA, stop_token_ids=[5], stop=["zz"])
    outputs = engine.generate(params, Exchange())
    assert [output async for output in outputs]
    assert all(s.params.stop_token_ids == [5, RESERVED.escalation] for s in engine.segments)
    assert all(s.params.stop == [] and s.params.detokenize is False for s in engine.segments)
    assert (params.stop_token_ids, params.stop, params.extra_args) == ([5], ["zz"], None)


async def test_allowed_tokens_leave_the_gate_its_rows(pair):
    engine, _ = pair()
    await write(engine, 0.5, allowed_token_ids=[97, 98])
    assert engine.segments[0].params.allowed_token_ids == [97, 98, 260, 261, 262, 263]


async def test_ids_and_options_of_segments(pair):
    engine, teacher = pair(ask_at={2, 6})
    await write(engine, 0.5, max_tokens=10, options={"trace_headers": {}})
    ids = [segment.request_id for segment in engine.segments] + [call.request_id for call in teacher.calls]
    assert len(set(ids)) == 5
    assert all(request_id.startswith("r-") for request_id in ids)
    assert all(segment.options["trace_headers"] == {} for segment in engine.segments)


async def test_continuations_go_first(pair):
    """Smaller numbers go first: before new requests of the same priority, after requests of a better one."""
    engine, _ = pair(ask_at={2, 6})
    engine.cooperator.cooperation = replace(engine.cooperator.cooperation, client_priority=True)
    seen = []
    for priority in (-(2**63), -1, 0, 1, 2**63 - 1):
        engine.segments.clear()
        await write(engine, 0.5, max_tokens=10, options={"priority": priority})
        first, *others = [segment.options["priority"] for segment in engine.segments]
        assert others == [first - 1] * 2
        engine.segments.clear()
        await write(engine, 0, options={"priority": priority})
        assert engine.segments[0].options["priority"] == first
        seen += [first - 1, first]
    assert seen == sorted(set(seen))
    assert seen[0] >= -(2**63)
    assert seen[-1] < 2**63


async def test_clients_need_permission_to_choose_a_priority(pair):
    engine, _ = pair()
    with pytest.raises(VLLMValidationError, match="--scheduling-policy priority") as error:
        await write(engine, 0, options={"priority": -1})
    assert error.value.parameter == "priority"


async def test_max_tokens_are_what_is_left(pair):
    engine, _ = pair(ask_at={2})
    await write(engine, 0.5, max_tokens=10)
    assert [segment.params.max_tokens for segment in engine.segments] == [10, 6]


@pytest.mark.parametrize("wanted", [None, 500])
async def test_the_context_bounds_a_completion(pair, wanted):
    engine, _ = pair(ask_at={2})
    result = await write(engine, 0.5, max_tokens=wanted)
    assert len(result.ids()) == 200 - len(PROMPT_IDS)
    assert result.last.finish_reason == "length"


# Copies of the student


@pytest.mark.parametrize(("ranks", "expected"), [(1, {None}), (4, set(range(4)))])
async def test_all_segments_of_a_prompt_go_to_the_same_copy(pair, ranks, expected):
    engine, _ = pair(ask_at={2, 6}, student={"ranks": ranks})
    used = set()
    for last in range(40):
        prompt = {**PROMPT, "prompt_token_ids": [72, last]}
        engine.segments.clear()
        params = SamplingParams(max_tokens=10, output_kind=DELTA, n=2)
        await collect(engine.generate(params, Exchange(Budget(fraction=0.5)), prompt))
        (rank,) = {segment.options["data_parallel_rank"] for segment in engine.segments}
        used.add(rank)
    assert used == expected


async def test_the_copy_that_the_caller_names_is_used(pair):
    engine, _ = pair(ask_at={2}, student={"ranks": 4})
    await write(engine, 0.5, options={"data_parallel_rank": 3})
    assert [segment.options["data_parallel_rank"] for segment in engine.segments] == [3, 3]
