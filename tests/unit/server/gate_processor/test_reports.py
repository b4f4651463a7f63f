"""Rows without a token, and log-probabilities that vLLM reports."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.sample import logprob, prompt_logprob, sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler

from router.reserved import ReservedRows
from server.gate_processor import GateProcessor, gate_settings
from server.vllm_api import Sampler
from tests.helpers.gate_steps import CPU, V2, engine_config, margins, params, update

# Rows without a token


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
    """With `--logprobs-mode raw_logits`, vLLM picks the best tokens from the logits themselves."""
    reported = Sampler.gather_logprobs(margins(1.0, 2.0), 3, torch.tensor([3, 3]))
    assert reported.logprob_token_ids.max() < 10
    assert reported.logprobs.max() == 2.0
    assert reported.selected_token_ranks.tolist() == [1, 1]


def test_the_function_for_log_probabilities_is_wrapped_once(processor, reserved):
    once = Sampler.compute_logprobs
    GateProcessor(engine_config(gate_settings(reserved, "entropy", None)), CPU, False)
    assert Sampler.compute_logprobs is once


def test_a_second_gate_masks_its_own_rows_in_log_probabilities(processor):
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


def test_v2_reserved_rows_do_not_show_when_drafts_are_verified(reserved):
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
