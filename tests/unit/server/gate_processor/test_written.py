"""Tokens written before a segment count as the segment's own in vLLM's functions."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm.v1.sample import sampler as v1_sampler
from vllm.v1.worker.gpu.sample import bad_words, penalties

from server.gate_processor import GateProcessor, GateProcessorV2, gate_settings
from server.vllm_api import MoveDirectionality, SamplingParams
from server.written import WRITTEN, written_args
from tests.helpers import v2_runner
from tests.helpers.gate_steps import ROWS, engine_config

SWAP, ONE_WAY = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
PROMPT, BEFORE, HERE = [1, 2], [3, 4, 3], [4, 5]
WORDS = [[4, 3, 6], [3, 4, 5, 7], [2, 3, 4, 8]]  # bad words; the last one begins in the prompt


def segment(written: int) -> SamplingParams:
    return SamplingParams(extra_args={WRITTEN: written}) if written else SamplingParams()


# V1


def added(*rows: tuple[int, int]) -> SimpleNamespace:
    """Added rows, each with the number of written tokens at the end of its prompt."""
    requests = [(row, segment(written), PROMPT + BEFORE, []) for row, written in rows]
    return SimpleNamespace(removed=[], added=requests, moved=[])


def penalised(prompts: list[list[int]], outputs: list[list[int]], repetition: float = 1.0) -> Tensor:
    """Logits of 1 after vLLM's penalties: 0.5 for each occurrence, and 2 for any."""
    rows = len(outputs)
    logits = torch.ones(rows, ROWS)
    prompt_ids = torch.tensor(prompts)
    scale = torch.full((rows,), repetition)
    return v1_sampler.apply_all_penalties(
        logits, prompt_ids, torch.full((rows,), 2.0), torch.full((rows,), 0.5), scale, outputs
    )


def test_penalties_count_what_came_before_the_segment(processor: GateProcessor):
    processor.update_state(added((0, 3), (1, 0)))
    counted, alone = penalised([PROMPT + BEFORE] * 2, [HERE, HERE])
    assert counted[[1, 3, 4, 5, 6]].tolist() == [1.0, -2.0, -2.0, -1.5, 1.0]  # 3 twice, 4 twice, 5 once
    assert alone[[1, 3, 4, 5, 6]].tolist() == [1.0, 1.0, -1.5, -1.5, 1.0]


def test_penalties_are_those_of_one_request_to_the_last_bit(processor: GateProcessor):
    """This holds with a repetition penalty too, which scales the logits before the others are subtracted."""
    (whole,) = penalised([PROMPT + BEFORE], [BEFORE + HERE], repetition=1.3)
    processor.update_state(added((0, 3)))
    (segment,) = penalised([PROMPT + BEFORE], [HERE], repetition=1.3)
    assert torch.equal(segment, whole)


def banned(outputs: list[list[int]]) -> list[list[int]]:
    """For each row, the ids that it may not write next."""
    logits = torch.zeros(len(outputs), ROWS)
    v1_sampler.apply_bad_words(logits, dict.fromkeys(range(len(outputs)), WORDS), outputs)
    return [row.eq(-torch.inf).nonzero().flatten().tolist() for row in logits]


def test_bad_words_may_begin_before_the_segment(processor: GateProcessor):
    assert banned([[], [4, 5]]) == [[], []]
    processor.update_state(added((0, 3), (1, 2), (2, 1), (3, 0)))
    assert banned([[], [], [], []]) == [[6], [6], [], []]
    assert banned([[4, 5]] * 4) == [[7], [7], [7], []]


def test_a_bad_word_does_not_begin_in_the_prompt(processor: GateProcessor):
    update = added((0, 0))
    update.added[0] = (0, segment(2), [1, 2, 3, 4], [])
    processor.update_state(update)
    assert banned([[]]) == [[]]
    update.added[0] = (0, segment(3), [1, 2, 3, 4], [])
    processor.update_state(update)
    assert banned([[]]) == [[8]]


def test_a_row_that_moves_takes_what_it_has_written_along(processor: GateProcessor):
    def counts() -> list[bool]:
        rows = penalised([PROMPT + BEFORE] * 3, [[], [], []])
        return [bool(row[3] < 1) for row in rows]

    processor.update_state(added((0, 3), (1, 0), (2, 0)))
    assert counts() == [True, False, False]
    processor.update_state(SimpleNamespace(removed=[], added=[], moved=[(0, 2, SWAP)]))
    assert counts() == [False, False, True]
    processor.update_state(SimpleNamespace(removed=[1], added=[], moved=[(2, 1, ONE_WAY)]))
    assert counts() == [False, True, False]
    processor.update_state(SimpleNamespace(removed=[1], added=[], moved=[]))
    assert counts() == [False, False, False]
    processor.update_state(added((1, 3)))
    processor.update_state(added((1, 0)))
    assert counts() == [False, False, False]


# V2


@pytest.fixture
def v2(reserved) -> GateProcessorV2:
    states = v2_runner.request_states([5, 5], ROWS)  # prompts as vLLM knows them
    return GateProcessorV2(engine_config(gate_settings(reserved, "margin", None)), states)


def test_v2_counts_what_came_before_the_segment(v2: GateProcessorV2):
    v2.add_request(0, segment(3))
    v2.add_request(1, segment(0))
    mask, counts = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, ROWS, dtype=torch.int32)
    ids = torch.tensor([PROMPT + BEFORE] * 2)
    lengths = v2.req_states.prompt_len.gpu
    slots = torch.tensor([0, 1])
    penalties.bincount(slots, ids, lengths, torch.tensor([5, 5]), mask, counts, 5)
    assert mask.flatten().tolist() == [0b110, 0b11110]
    assert counts[0].tolist() == [0, 0, 0, 2, 1] + [0] * (ROWS - 5)
    assert counts[1].sum() == 0
    assert lengths.tolist() == [5, 5], "vLLM's own are as they were"


@pytest.mark.parametrize(("written", "expected"), [(3, [7]), (2, [7]), (1, []), (0, [])])
def test_v2_sees_bad_words_that_begin_before_the_segment(v2: GateProcessorV2, written, expected):
    v2.add_request(0, segment(written))
    logits = torch.zeros(1, ROWS)
    word = [4, 3, 4, 5, 7]
    bad_words.apply_bad_words(
        logits,
        torch.tensor([0]),
        torch.tensor([word]),
        torch.tensor([[0, len(word)]]),
        torch.tensor([1]),
        torch.tensor([PROMPT + BEFORE + HERE]),
        v2.req_states.prompt_len.gpu,
        torch.tensor([7]),
        torch.tensor([0]),
        torch.tensor([0]),
        1,
    )
    assert logits.eq(-torch.inf).nonzero()[:, 1].tolist() == expected


def test_v2_slots_are_used_again(v2: GateProcessorV2):
    lengths = torch.tensor([5, 5], dtype=torch.int32)
    v2.add_request(1, segment(3))
    assert v2.written.prompt_lengths(lengths).tolist() == [5, 2]
    v2.add_request(1, segment(0))
    assert v2.written.prompt_lengths(lengths).tolist() == [5, 5]


# The number of written tokens in a segment's arguments


@pytest.mark.parametrize(
    "counting", [{"presence_penalty": 0.5}, {"frequency_penalty": -0.5}, {"bad_words": ["damn"]}]
)
def test_only_processors_that_count_tokens_need_the_number_of_written_ones(counting):
    assert written_args(SamplingParams(**counting), 7) == {WRITTEN: 7}
    assert written_args(SamplingParams(**counting), 0) == {}
    assert written_args(SamplingParams(repetition_penalty=1.2, logit_bias={1: 2.0}), 7) == {}
