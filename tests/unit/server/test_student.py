"""Requests to the student's engine, with vLLM's own classes: its checks, masks and stops."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm.renderers import renderer_from_config
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
from vllm.v1.worker.gpu.sample import sampler as v2_sampler

from router.budget import Bucket, Budget
from router.gate import MarginGate
from router.policy import Terms
from server.choice import Choice
from server.completion import Completion
from server.engine import CooperativeEngine
from server.exchange import Purse, Report
from server.gate_processor import decide, gate_settings
from server.student import StudentEngine
from server.vllm_api import AsyncEngineArgs, SamplingParams, VLLMValidationError
from tests.helpers.paths import ROOT
from tests.helpers.scripted_student import DELTA, RESERVED

STUDENT = ROOT / "deploy" / "demo" / "student"
EOS, STOP = 256, 7
PRICED = Terms(price=-math.inf, not_before=1)


@pytest.fixture(scope="module")
def student() -> StudentEngine:
    """The shipped student's side as a gateway builds it, without an engine."""
    settings = gate_settings(RESERVED, "margin", None)
    config = AsyncEngineArgs(model=str(STUDENT), additional_config=settings).create_engine_config()
    engine = CooperativeEngine.__new__(CooperativeEngine)
    engine.vllm_config, engine.model_config = config, config.model_config
    engine.renderer = renderer_from_config(config)
    engine.input_processor = InputProcessor(config, engine.renderer)
    return engine._student(RESERVED)


@pytest.mark.parametrize("ids", [[], [999_999], [1] * 5000], ids=["empty", "unknown id", "too long"])
def test_a_prompt_that_vllm_refuses_is_refused_before_anybody_writes(student, ids):
    with pytest.raises(VLLMValidationError):
        student.check({"type": "token", "prompt_token_ids": ids}, SamplingParams(), "r")


def test_checked_parameters_know_what_ends_the_students_completions(student):
    prompt = {"type": "token", "prompt_token_ids": [1, 2]}
    params = student.check(prompt, SamplingParams(stop_token_ids=[5]), "r", priority=1)
    assert params.eos_token_id == student.tokenizer.eos_token_id
    assert 5 in params.stop_token_ids
    assert student.check(prompt, SamplingParams(ignore_eos=True), "r").eos_token_id is None


def segment_params(tokenizer: object, **params: object) -> SamplingParams:
    """Parameters of a segment after two of twenty tokens, as vLLM's engine gets them."""
    asked = SamplingParams(**{"max_tokens": 20, "output_kind": DELTA, "stop_token_ids": [STOP]} | params)
    asked.update_from_generation_config({}, EOS)
    segment = asked.clone()
    segment.stop_token_ids = [STOP, RESERVED.escalation]
    completion = Completion(tokenizer, [1], asked, 0, Report())
    purse = Purse(Bucket(Budget(fraction=0.5), 4))
    prompt = {"type": "token", "prompt_token_ids": [1]}
    choice = Choice(prompt, segment, "r", b"", {"priority": 1}, completion, purse, None, False)
    choice.completion._detokenizer.update([65, 66], False)
    engine = StudentEngine(None, None, tokenizer, 200, RESERVED)
    made = engine._params(choice, PRICED)
    made.update_from_generation_config({}, EOS)  # as vLLM does with every request
    return made


def test_min_tokens_mask_what_ends_a_completion_and_not_the_question(tokenizer):
    """vLLM's V1 processors run in their order. The gate is last, and forces a token that others masked."""
    params = segment_params(tokenizer, min_tokens=5)
    assert params.min_tokens == 3
    config = SimpleNamespace()
    processor = MinTokensLogitsProcessor(config, torch.device("cpu"), False)
    output: list[int] = []
    processor.update_state(SimpleNamespace(removed=[], added=[(0, params, [1], output)], moved=[]))
    logits = processor.apply(torch.zeros(1, RESERVED.end))
    assert (logits[0, [EOS, STOP]] == -math.inf).all()
    decide(MarginGate(RESERVED), logits, torch.tensor([-math.inf]))
    assert logits[0].argmax() == RESERVED.escalation
    output += [65, 66, 67]
    processor.update_state(None)
    assert (processor.apply(torch.zeros(1, RESERVED.end)) == 0).all()
    assert MinTokensLogitsProcessor in BUILTIN_LOGITS_PROCESSORS


def test_vllms_v2_sampler_runs_the_gate_last(monkeypatch):
    """The sampler's logit biases apply `min_tokens`, so the gate forces a token that they masked."""
    stages = ("SamplingStates", "PenaltiesState", "LogitBiasState", "BadWordsState", "LogprobTokenIdsState")
    for name in (*stages, "ThinkingBudgetState"):
        monkeypatch.setattr(v2_sampler, name, lambda *_, name=name: name)
    monkeypatch.setattr(v2_sampler.LogitsProcRequestState, "from_request_state", lambda _: None)
    config = SimpleNamespace(reasoning_config=None)
    sampler = v2_sampler.Sampler(config, 4, 8, torch.device("cpu"), None, custom_logits_processors=["gate"])
    assert sampler.logits_processors[0] == "LogitBiasState"
    assert sampler.logits_processors[-1] == "gate"


@pytest.mark.parametrize("token", [RESERVED.escalation, 65])
def test_the_escalation_token_stops_a_segment_that_owes_tokens(tokenizer, token):
    params = segment_params(tokenizer, min_tokens=5)
    request = Request("r", [1, 65, 66], params, None)
    request.append_output_token_ids(token)
    assert check_stop(request, 200) is (token == RESERVED.escalation)
    if token == RESERVED.escalation:
        assert (request.status, request.stop_reason) == (RequestStatus.FINISHED_STOPPED, token)


def test_a_segment_owes_no_more_than_it_may_write(tokenizer):
    params = segment_params(tokenizer, min_tokens=20)
    assert (params.min_tokens, params.max_tokens) == (18, 18)
