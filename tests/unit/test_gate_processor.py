import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import v2_runner
from torch import Tensor
from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from router.checkpoint import RouterCheckpoint
from router.gate import MarginGate
from router.policy import NEVER, Terms
from router.reserved import ReservedRows
from server import gate_processor
from server.gate_processor import (
    PRICE,
    GateProcessor,
    GateProcessorV2,
    decide,
    gate_settings,
    mask_reserved,
    terms_args,
)
from server.vllm_api import MoveDirectionality, Sampler, SamplingParams, find_reports

CPU = torch.device("cpu")
ROWS, ESCALATION, BATCH = 14, 10, 6  # of the `reserved` fixture; the size of the largest batch
SWAP, ONE_WAY = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate changes vLLM's reports for the whole process: a test gives them back."""
    v2_runner.use_torch_kernels(monkeypatch)
    for v2 in (False, True):
        for report in find_reports(v2=v2):
            monkeypatch.setattr(report.owner, report.name, vars(report.owner)[report.name])


def engine_config(settings: dict) -> SimpleNamespace:
    return SimpleNamespace(additional_config=settings, scheduler_config=SimpleNamespace(max_num_seqs=BATCH))


@pytest.fixture
def processor(reserved) -> GateProcessor:
    processor = GateProcessor(engine_config(gate_settings(reserved, "margin", None)), CPU, False)
    processor.device_prices = processor.prices.clone()  # two tensors, as on a GPU
    return processor


def margins(*gaps: float) -> Tensor:
    """(B, V) logits whose margin score is minus the gap; the taps are the largest of all."""
    logits = torch.zeros(len(gaps), ROWS)
    logits[:, 3] = torch.tensor(gaps)
    logits[:, 10:] = 77.0
    return logits


def asks(logits: Tensor) -> list[bool]:
    """Which rows were left nothing but the escalation token; the others must have lost it."""
    assert (logits[:, ESCALATION + 1 :] == -math.inf).all()
    alone = (logits == -math.inf).sum(-1) == ROWS - 1
    assert (alone == (logits[:, ESCALATION] == 0.0)).all()
    return alone.tolist()


def params(price: float | None = None, not_before: int = 0) -> SamplingParams:
    return SamplingParams(extra_args=None if price is None else terms_args(Terms(price, not_before)))


def update(
    removed: list[int] = [],  # noqa: B006
    added: list[tuple[int, SamplingParams, list[int]]] = [],  # noqa: B006
    moved: list[tuple[int, int, MoveDirectionality]] = [],  # noqa: B006
) -> SimpleNamespace:
    """vLLM's BatchUpdate; an added request is (row, params, its growing output ids)."""
    return SimpleNamespace(
        removed=removed, added=[(row, p, [1], output) for row, p, output in added], moved=moved
    )


# The decision


def test_the_escalation_token_is_forced_exactly_where_the_score_exceeds_the_price(reserved):
    logits = margins(2.0, 2.0, 2.0, 2.0, 0.0)
    untouched = logits.clone()
    price = torch.tensor([-3.0, -2.0, -1.0, math.inf, -math.inf])
    decide(MarginGate(reserved), logits, price)
    assert asks(logits) == [True, False, False, False, True]
    assert torch.equal(logits[1:4, :10], untouched[1:4, :10])


def test_the_gate_reads_the_reserved_rows_before_they_are_masked(router):
    logits = margins(0.0, 0.0)
    logits[:, 11] = torch.tensor([1.5, 0.5])  # the fixture's gate scores by its first tap
    decide(router.build_gate(), logits, torch.tensor([1.0, 1.0]))
    assert asks(logits) == [True, False]


def test_a_score_that_is_no_number_does_not_ask(reserved):
    logits = torch.full((1, ROWS), -math.inf)
    decide(MarginGate(reserved), logits, torch.tensor([-math.inf]))
    assert (logits == -math.inf).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_masking_covers_the_reserved_rows_and_no_other(reserved, shape):
    logits = torch.zeros(*shape, ROWS)
    mask_reserved(logits, reserved)
    assert (logits[..., 10:] == -math.inf).all()
    assert (logits[..., :10] == 0).all()


def test_terms_travel_in_extra_args():
    assert terms_args(Terms(1.5, 7)) == {"wheels_price": 1.5, "wheels_not_before": 7}
    assert terms_args(NEVER) == {"wheels_price": math.inf, "wheels_not_before": 0}


# V1: rows of a persistent batch


def step(processor: GateProcessor, batch: int, change: SimpleNamespace | None = None) -> list[bool]:
    """One decoding step at a margin of 2: a request asks where its price is below -2."""
    processor.update_state(change)
    return asks(processor.apply(margins(*[2.0] * batch)))


def test_an_empty_processor_masks_and_never_asks(processor):
    assert step(processor, 3) == [False] * 3


def test_the_logits_are_changed_in_place(processor):
    processor.update_state(update(added=[(0, params(-3.0), [])]))
    logits = margins(2.0)
    assert processor.apply(logits) is logits


def test_it_changes_greedy_choices_too(processor):
    assert processor.is_argmax_invariant() is False


def test_requests_ask_at_their_own_price(processor):
    added = [(0, params(-3.0), []), (1, params(-1.0), []), (2, params(), []), (3, params(-9.0), [])]
    assert step(processor, 4, update(added=added)) == [True, False, False, True]
    assert step(processor, 4) == [True, False, False, True]  # and go on so without an update


def test_a_request_with_other_extra_args_never_asks(processor):
    added = [(0, SamplingParams(extra_args={"kv_transfer": 1}), [])]
    assert step(processor, 1, update(added=added)) == [False]


def test_a_price_alone_is_enough(processor):
    assert step(processor, 1, update(added=[(0, SamplingParams(extra_args={PRICE: -3.0}), [])])) == [True]


def test_prices_go_to_the_device_only_when_they_change(processor):
    step(processor, 1, update(added=[(0, params(-3.0), [])]))
    processor.device_prices.fill_(math.inf)  # what a needless copy would undo
    assert step(processor, 2) == [False, False]
    assert step(processor, 2, update(added=[(1, params(-3.0), [])])) == [True, True]


def test_a_removed_request_leaves_no_price_behind(processor):
    step(processor, 2, update(added=[(0, params(-3.0), []), (1, params(-3.0), [])]))
    assert step(processor, 2, update(removed=[1])) == [True, False]


def test_a_row_is_used_again(processor):
    step(processor, 1, update(added=[(0, params(-3.0), [])]))
    assert step(processor, 1, update(added=[(0, params(), [])])) == [False]
    assert step(processor, 1, update(added=[(0, params(-4.0), [])])) == [True]
    assert step(processor, 1, update(removed=[0], added=[(0, params(-1.0), [])])) == [False]


def test_a_moved_request_takes_its_price_along(processor):
    step(processor, 3, update(added=[(0, params(), []), (2, params(-3.0), [])]))
    assert step(processor, 3, update(removed=[1], moved=[(2, 0, ONE_WAY)])) == [True, False, False]


def test_swapped_requests_swap_prices(processor):
    step(processor, 3, update(added=[(0, params(-3.0), []), (2, params(-1.0), [])]))
    assert step(processor, 3, update(moved=[(0, 2, SWAP)])) == [False, False, True]
    assert step(processor, 3, update(moved=[(0, 2, SWAP)])) == [True, False, False]


def test_an_update_is_read_in_vllms_order(processor):
    """Removed, added, moved: the request that is added to row 1 moves on to row 0."""
    step(processor, 2, update(added=[(0, params(), []), (1, params(-3.0), [])]))
    change = update(removed=[1], added=[(1, params(-4.0), [])], moved=[(1, 0, ONE_WAY)])
    assert step(processor, 2, change) == [True, False]


def test_a_request_does_not_ask_before_its_time(processor):
    output: list[int] = []
    assert step(processor, 1, update(added=[(0, params(-3.0, not_before=2), output)])) == [False]
    output.append(5)
    assert step(processor, 1) == [False]
    output.append(5)
    assert step(processor, 1) == [True]
    output.append(5)
    assert step(processor, 1) == [True]


def test_a_request_that_comes_back_has_waited_already(processor):
    """After a preemption it is added anew, with the tokens that it had written."""
    assert step(processor, 1, update(added=[(0, params(-3.0, not_before=2), [5, 5])])) == [True]


def spare(price: float, not_before: int, spare_price: float, spare_from: int) -> SamplingParams:
    return SamplingParams(extra_args=terms_args(Terms(price, not_before, spare_price, spare_from)))


def test_the_spare_price_comes_at_its_time(processor):
    """The margin gate scores -2 here: above -3, below -1."""
    output: list[int] = []
    assert step(processor, 1, update(added=[(0, spare(-1.0, 1, -3.0, 3), output)])) == [False]
    for asked in (False, False, True, True):
        output.append(5)
        assert step(processor, 1) == [asked]


def test_a_spare_price_moves_with_its_request(processor):
    output: list[int] = []
    step(processor, 3, update(added=[(0, spare(-1.0, 0, -3.0, 2), output), (1, params(), [])]))
    assert step(processor, 3, update(moved=[(0, 2, ONE_WAY)])) == [False] * 3
    output += [5, 5]
    assert step(processor, 3) == [False, False, True]


@pytest.mark.parametrize(("direction", "row"), [(ONE_WAY, 2), (SWAP, 2)])
def test_a_waiting_request_can_be_moved(processor, direction, row):
    output: list[int] = []
    step(processor, 3, update(added=[(0, params(-3.0, not_before=1), output)]))
    assert step(processor, 3, update(moved=[(0, row, direction)])) == [False] * 3
    output.append(5)
    assert step(processor, 3) == [False, False, True]


def test_waiting_requests_can_be_swapped(processor):
    first, second = [], []
    added = [(0, params(-3.0, not_before=1), first), (1, params(-3.0, not_before=1), second)]
    step(processor, 2, update(added=added))
    step(processor, 2, update(moved=[(0, 1, SWAP)]))
    first.append(5)
    assert step(processor, 2) == [False, True]
    second.append(5)
    assert step(processor, 2) == [True, True]


def test_a_request_that_left_while_waiting_wakes_nobody(processor):
    output: list[int] = []
    step(processor, 1, update(added=[(0, params(-3.0, not_before=1), output)]))
    step(processor, 1, update(removed=[0], added=[(0, params(), [])]))
    output.append(5)
    assert step(processor, 1) == [False]


def test_rows_beyond_the_batch_do_not_matter(processor):
    step(processor, 5, update(added=[(4, params(-3.0), []), (0, params(-3.0), [])]))
    assert step(processor, 2) == [True, False]


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_updates_keeps_prices_with_their_requests(processor, seed):
    """Against a plain list of requests that is changed as vLLM changes its batch."""
    draw = random.Random(seed)
    batch: list[tuple[float, int, list[int]]] = []  # (price, not_before, output ids) by row

    def request() -> tuple[float, int, list[int]]:
        return draw.choice([-3.0, -1.0, math.inf]), draw.choice([0, 0, 1, 3]), []

    for _ in range(300):
        removed = [row for row in range(len(batch)) if draw.random() < 0.15]
        added, moved, free = [], [], sorted(removed)
        while len(batch) - len(free) < BATCH and draw.random() < 0.4:
            row = free.pop(0) if free else len(batch)
            new = request()
            batch[row : row + 1] = [new]
            added.append((row, params(new[0], new[1]), new[2]))
        reused = {row for row, _, _ in added}
        still_removed = [row for row in removed if row not in reused]
        for hole in list(free):  # condense: the last request fills the lowest hole
            while batch and len(batch) - 1 in free:
                free.remove(len(batch) - 1)
                batch.pop()
            if hole not in free:
                continue
            moved.append((len(batch) - 1, hole, ONE_WAY))
            batch[hole] = batch.pop()
            free.remove(hole)
        if len(batch) > 1 and draw.random() < 0.3:
            first, second = draw.sample(range(len(batch)), 2)
            moved.append((first, second, SWAP))
            batch[first], batch[second] = batch[second], batch[first]

        changed = bool(removed or added or moved)
        expected = [price < -2 and len(output) >= wait for price, wait, output in batch]
        change = update(still_removed, added, moved) if changed else None
        assert step(processor, len(batch), change) == expected
        for _, _, output in batch:
            output.append(5)


# V2: slots, mapped to rows at every step


class CountingGate(MarginGate):
    """Counts the rows that it is shown."""

    seen = 0

    def forward(self, logits: Tensor) -> Tensor:
        self.seen += len(logits)
        return super().forward(logits)


class V2:
    """A processor in vLLM's V2 sampler with four slots, whose prompts have 3, 5, 7 and 9 tokens."""

    def __init__(self, reserved: ReservedRows, visible: int | None = None) -> None:
        states = v2_runner.request_states([3, 5, 7, 9], ROWS)
        settings = gate_settings(reserved, "margin", None, visible)
        self.processor = GateProcessorV2(engine_config(settings), states)
        self.processor.device_terms = self.processor.terms.clone()  # two tensors, as on a GPU
        self.processor.gate = CountingGate(reserved)
        self.sampler = v2_runner.sampler_with(self.processor, 4)

    def add(self, slot: int, sampling_params: SamplingParams) -> None:
        self.sampler.needs_logits_processing[slot] = self.processor.add_request(slot, sampling_params)

    def logits(self, slots: list[int], pos: list[int]) -> Tensor:
        """What vLLM samples from, at a margin of 2."""
        self.processor.apply_staged_writes()
        step = v2_runner.context(slots, pos)
        return self.sampler.apply_sampling_params(
            margins(*[2.0] * len(slots)),
            step.expanded_idx_mapping,
            step.idx_mapping,
            step.idx_mapping_np,
            step.pos,
            step.input_ids,
            step.expanded_local_pos,
            step.seq_lens_upper_bound_np,
        )

    def step(self, slots: list[int], pos: list[int]) -> list[bool]:
        return asks(self.logits(slots, pos))


def test_v2_maps_rows_to_slots(reserved):
    v2 = V2(reserved)
    for slot, price in enumerate([-3.0, -1.0, None, -9.0]):
        v2.add(slot, params(price))
    assert v2.step([3, 1, 0, 2], [20, 20, 20, 20]) == [True, False, True, False]
    assert v2.step([0], [20]) == [True]


def test_v2_counts_the_tokens_written_by_position(reserved):
    v2 = V2(reserved)
    v2.add(1, params(-3.0, not_before=2))  # 5 prompt tokens: positions 0 to 4
    asked = [v2.step([1], [pos]) for pos in (4, 5, 6, 7)]  # 0, 1, 2, 3 tokens written
    assert asked == [[False], [False], [True], [True]]


def test_v2_a_slot_is_used_again(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0, not_before=1))
    assert v2.step([0], [9]) == [True]
    v2.add(0, params())
    assert v2.step([0], [9]) == [False]
    v2.add(0, params(-3.0))
    assert v2.step([0], [2]) == [True]


def test_v2_a_price_alone_is_enough(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0, not_before=5))
    v2.add(0, SamplingParams(extra_args={PRICE: -3.0}))
    assert v2.step([0], [2]) == [True]


def test_v2_terms_go_to_the_device_only_when_they_change(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0))
    assert v2.step([0], [9]) == [True]
    v2.processor.device_terms.fill_(math.inf)  # what a needless copy would undo
    assert v2.step([0], [9]) == [False]
    v2.add(1, params(-3.0))
    assert v2.step([0, 1], [9, 9]) == [True, True]


def test_v2_draft_tokens_are_rows_of_their_request(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0, not_before=2))
    v2.add(1, params(-1.0))
    assert v2.step([0, 0, 0, 1], [3, 4, 5, 9]) == [False, True, True, False]


# Building the gate


def test_the_engine_builds_the_learned_gate_from_the_router(router, reserved, tmp_path):
    router.save(tmp_path)
    processor = GateProcessor(engine_config(gate_settings(reserved, "learned", tmp_path)), CPU, False)
    processor.update_state(update(added=[(0, params(1.0), []), (1, params(2.0), [])]))
    logits = margins(9.0, 9.0)
    logits[:, 11] = 1.5
    assert asks(processor.apply(logits)) == [True, False]


def test_another_router_makes_other_decisions(router, reserved, tmp_path):
    opposite = {**router.gate, "mlp.4.weight": -router.gate["mlp.4.weight"]}
    decisions = []
    for name, gate in (("trained", router.gate), ("opposite", opposite)):
        RouterCheckpoint(router.config, router.taps, gate).save(tmp_path / name)
        settings = gate_settings(reserved, "learned", tmp_path / name)
        processor = GateProcessor(engine_config(settings), CPU, False)
        processor.update_state(update(added=[(row, params(1.0), []) for row in range(3)]))
        logits = margins(0.0, 0.0, 0.0)
        logits[:, 11] = torch.tensor([2.0, -2.0, 0.0])
        decisions.append(asks(processor.apply(logits)))
    assert decisions == [[True, False, False], [False, True, False]]


def test_the_settings_are_plain_json(reserved, tmp_path):
    assert gate_settings(reserved, "margin", None) == {
        "wheels": {"reserved": [10, 4], "gate": "margin", "router": None}
    }
    assert gate_settings(reserved, "learned", tmp_path)["wheels"]["router"] == str(tmp_path)


# What it costs


def test_v2_nobody_is_scored_who_may_not_ask(reserved):
    v2 = V2(reserved)
    for slot in range(4):
        v2.add(slot, params())
    assert v2.step([0, 1, 2, 3], [20] * 4) == [False] * 4
    assert v2.processor.gate.seen == 0


def test_v2_only_rows_that_may_ask_are_scored(reserved):
    v2 = V2(reserved)
    for slot, price in enumerate([None, -3.0, None, None]):
        v2.add(slot, params(price))
    assert v2.step([2, 1, 0, 3], [20] * 4) == [False, True, False, False]
    assert v2.processor.gate.seen == 1
    assert v2.step([2, 0], [21, 21]) == [False, False], "the one that may ask is not in this step"
    assert v2.processor.gate.seen == 1


def test_v2_nobody_is_scored_before_its_time(reserved):
    v2 = V2(reserved)
    v2.add(1, params(-3.0, not_before=3))  # 5 prompt tokens
    assert [v2.step([1], [pos]) for pos in (4, 5, 6)] == [[False]] * 3
    assert v2.processor.gate.seen == 0
    assert v2.step([1], [7]) == [True]
    assert v2.processor.gate.seen == 1


def test_v2_a_request_that_left_its_slot_is_not_scored(reserved):
    v2 = V2(reserved)
    v2.add(0, params(-3.0))
    v2.add(0, params())
    v2.step([0], [9])
    assert v2.processor.gate.seen == 0


def test_only_rows_that_may_ask_are_scored(processor, reserved):
    processor.gate = CountingGate(reserved)
    added = [(row, params(-3.0 if row == 4 else None), []) for row in range(5)]
    assert step(processor, 5, update(added=added)) == [False] * 4 + [True]
    assert processor.gate.seen == 1
    assert step(processor, 5) == [False] * 4 + [True]
    assert step(processor, 4) == [False] * 4, "without that row"
    assert processor.gate.seen == 2
    more = [(row, params(-3.0), []) for row in range(4)]
    assert step(processor, 5, update(added=more)) == [True] * 5
    assert processor.gate.seen == 2 + 5


@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_pieces_change_no_decision(reserved, monkeypatch, rows):
    price = torch.tensor([-3.0, -3.0, -1.0, -3.0])
    chosen = None if rows is None else torch.tensor(rows)
    whole, pieces = margins(2.0, 2.0, 2.0, 2.0), margins(2.0, 2.0, 2.0, 2.0)
    decide(MarginGate(reserved), whole, price, chosen)
    monkeypatch.setattr(gate_processor, "PIECE_ON_CPU", 1)
    gate = CountingGate(reserved)
    decide(gate, pieces, price, chosen)
    assert torch.equal(whole, pieces)
    assert gate.seen == (4 if rows is None else 3)


# Rows that no token has


def test_rows_without_a_token_are_masked_too(reserved):
    settings = gate_settings(reserved, "margin", None, 8)
    processor = GateProcessor(engine_config(settings), CPU, False)
    for added in ([], [(0, params(-1.0), [])]):
        processor.update_state(update(added=added))
        logits = processor.apply(margins(2.0))
        assert (logits[:, 8:] == -math.inf).all()
        assert (logits[:, :8] > -math.inf).all()
    reported = Sampler.compute_logprobs(margins(0.0))
    assert torch.allclose(reported[:, :8], torch.full((1, 8), -math.log(8)))


def test_v2_rows_without_a_token_are_masked_too(reserved):
    v2 = V2(reserved, visible=8)
    v2.add(0, params())
    assert (v2.logits([0], [9])[:, 8:] == -math.inf).all()
    v2.add(0, params(-1.0))
    assert (v2.logits([0], [9])[:, 8:] == -math.inf).all()


# Reported log-probabilities

FLAT = torch.full((2, 10), -math.log(10))


def test_reserved_rows_do_not_show_in_log_probabilities(processor):
    logits = margins(0.0, 0.0)
    before = logits.clone()
    logprobs = Sampler.compute_logprobs(logits)
    assert torch.equal(logits, before)
    assert (logprobs[:, 10:] == -math.inf).all()
    assert torch.allclose(logprobs[:, :10], FLAT)


def test_reserved_rows_do_not_show_in_reported_logits(processor):
    """`--logprobs-mode raw_logits`: the best ones are picked from the logits themselves."""
    reported = Sampler.gather_logprobs(margins(1.0, 2.0), 3, torch.tensor([3, 3]))
    assert reported.logprob_token_ids.max() < 10
    assert reported.logprobs.max() == 2.0
    assert reported.selected_token_ranks.tolist() == [1, 1]


def test_log_probabilities_are_covered_once(processor, reserved):
    once = Sampler.compute_logprobs
    GateProcessor(engine_config(gate_settings(reserved, "entropy", None)), CPU, False)
    assert Sampler.compute_logprobs is once


def test_other_rows_are_covered_instead(processor):
    GateProcessor(engine_config(gate_settings(ReservedRows(12, 2), "entropy", None)), CPU, False)
    assert torch.isfinite(Sampler.compute_logprobs(margins(0.0))[:, :12]).all()


@pytest.mark.parametrize("module", [logprob, sampler, prompt_logprob, rejection_sampler])
def test_v2_reserved_rows_do_not_show_in_log_probabilities(reserved, module):
    V2(reserved)
    logits = margins(0.0, 0.0)
    before = logits.clone()
    reported = module.compute_topk_scores(logits, 4, torch.tensor([3, 3]))
    assert torch.equal(logits, before)
    assert reported.logprob_token_ids.max() < 10
    assert torch.allclose(reported.logprobs, FLAT[:, :5])
    assert reported.selected_token_ranks.tolist() == [10, 10]


@pytest.mark.parametrize("module", [logprob, prompt_logprob])
def test_v2_reserved_rows_do_not_show_in_scores_of_tokens(reserved, module):
    V2(reserved)
    assert torch.allclose(module.compute_token_logprobs(margins(0.0), torch.tensor([[1, 2]])), FLAT[:1, :2])


def test_v2_reserved_rows_do_not_show_in_reported_logits(reserved):
    V2(reserved)
    reported = logprob.compute_topk_scores(margins(2.0), 3, torch.tensor([3]), logits_mode=True)
    assert reported.logprobs.max() == 2.0


def test_v2_reserved_rows_do_not_show_in_prompts(reserved):
    V2(reserved)
    ids, scores, _ = prompt_logprob.compute_prompt_logprobs_with_chunking(
        torch.tensor([1, 2]), torch.zeros(2, 4), lambda states: margins(*[0.0] * len(states)), 3
    )
    assert ids.max() < 10
    assert torch.allclose(scores, FLAT[:, :4])


def test_v2_reserved_rows_do_not_show_where_drafts_are_verified(reserved):
    V2(reserved)
    verifier = object.__new__(rejection_sampler.RejectionSampler)
    verifier.sampler = SimpleNamespace(logprobs_mode="raw_logprobs")
    verifier.enable_adaptive_verification = False
    drafts = torch.tensor([[1, 2]])
    ends = np.array([0, 2])
    reported = verifier._get_logprobs_tensors(
        drafts, torch.tensor([2]), margins(0.0, 0.0), torch.from_numpy(ends), ends, 3
    )
    assert reported.logprob_token_ids.max() < 10
    assert torch.allclose(reported.logprobs, FLAT[:, :4])


def test_v2_knows_the_spare_price(reserved):
    v2 = V2(reserved)
    v2.add(1, spare(-1.0, 1, -3.0, 3))  # 5 prompt tokens
    assert [v2.step([1], [pos]) for pos in (4, 5, 6, 7, 8)] == [[False]] * 3 + [[True]] * 2
