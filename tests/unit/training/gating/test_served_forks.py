"""The gain `quality` of served completions: a gateway finishes their forks, the teacher draws references."""

import json
import math
from dataclasses import replace
from functools import partial

import httpx
import pytest
import torch

from measuring.gateway import GatewayError
from router.gate import RandomGate
from tests.helpers.recorded_loop import Recorded, recorded
from tests.helpers.served_teacher import VLLM, client
from tests.helpers.tiny_models import END, MAX_TOKENS, RESERVED, VISIBLE, model
from training.gating.forks import finished, worth_of_asking
from training.gating.rollout import ClosedLoop, Request
from training.gating.served_forks import ServedForks, drawn_by
from training.kept_tokens import KeptTokens
from training.running_gateway import RunningGateway
from training.served import ServedTeacher, VLLMServer
from training.teacher_cache import TeacherCache

torch.set_num_threads(1)  # tiny models: threads only wait for each other


@pytest.fixture(scope="module")
def loop() -> ClosedLoop:
    return ClosedLoop(model(0), model(1), RandomGate(RESERVED), VISIBLE, END, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def written(loop) -> Recorded:
    return recorded(loop)


class WritingGateway:
    """A stand-in for a gateway whose student writes on after token ids."""

    def __init__(self, loop: ClosedLoop) -> None:
        self.loop = replace(loop, score=lambda logits: logits.new_zeros(len(logits)))
        self.asked: list[dict] = []
        self.longer = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "wheels"}]})
        assert request.url.path == "/v1/completions"
        body = json.loads(request.content)
        self.asked.append(body)
        alone = Request(body["prompt"], math.inf, 0.0, max_tokens=body["max_tokens"])
        (rest,) = self.loop.write([alone])
        tokens = rest.tokens + [2] * self.longer
        return httpx.Response(200, json={"choices": [{"token_ids": tokens}]})

    def running(self) -> RunningGateway:
        transport = partial(httpx.AsyncClient, transport=httpx.MockTransport(self))
        return RunningGateway("http://there", MAX_TOKENS, transport=transport)


class Sums:
    """A stand-in for a judge: high token ids are good, and each prompt has its own scale."""

    @staticmethod
    def worth(numbers, completions):
        return torch.tensor([float((1 + n) * sum(c)) for n, c in zip(numbers, completions, strict=True)])


def forks(gateway, prompts, file, student="a student"):
    numbers = {tuple(prompt): number for number, prompt in enumerate(prompts)}
    kept = KeptTokens(TeacherCache(file, 10**7))
    return ServedForks(gateway.running(), Sums(), numbers, kept, student, END, MAX_TOKENS)


def test_forks_finished_by_a_gateway_have_the_worth_computed_in_process(loop, written, tmp_path):
    prompts, seen, completions, served = written
    gateway = WritingGateway(loop)
    found = forks(gateway, prompts, tmp_path / "kept").worth_of_asking(served, seen)
    expected = worth_of_asking(seen, completions, partial(finished, loop, prompts), Sums.worth)
    assert torch.equal(found, expected)
    assert expected.count_nonzero() > 10
    assert len(gateway.asked) > 20
    for body in gateway.asked:
        assert (body["teacher_budget"], body["temperature"], body["return_token_ids"]) == (0, 0, True)


def test_finished_forks_are_not_asked_for_again(loop, written, tmp_path):
    prompts, seen, _, served = written
    first, again, another = WritingGateway(loop), WritingGateway(loop), WritingGateway(loop)
    found = forks(first, prompts, tmp_path / "kept").worth_of_asking(served, seen)
    assert torch.equal(forks(again, prompts, tmp_path / "kept").worth_of_asking(served, seen), found)
    assert not again.asked
    forks(another, prompts, tmp_path / "kept", "another student").worth_of_asking(served, seen)
    assert len(another.asked) == len(first.asked)


def test_a_gateway_that_writes_too_much_is_named(loop, written, tmp_path):
    prompts, seen, _, served = written
    gateway = WritingGateway(loop)
    gateway.longer = MAX_TOKENS
    with pytest.raises(GatewayError, match=r"gateway at http://there: .* not answer with one completion"):
        forks(gateway, prompts, tmp_path / "kept").worth_of_asking(served, seen)


def test_a_teachers_completions_are_drawn_once(tmp_path):
    """They come from a server or from this process. Each of the three has its own place, even if equal."""
    vllm = VLLM(None)
    served = ServedTeacher(VLLMServer("teacher", "http://there", None, client(vllm)), 2)
    for teacher in (served, model(1)):
        kept = KeptTokens(TeacherCache(tmp_path / "kept", 10**7))
        draw = drawn_by(teacher, kept, visible=257, end=256, longest=4)
        if teacher is not served:
            draw = drawn_by(teacher, kept, visible=VISIBLE, end=END, longest=4)
        once = draw([[5, 6]] * 3 + [[7]] * 3)
        assert len(once) == 6
        assert draw([[7]] * 3) == once[3:]
    requests = [body for path, body in vllm.asked if path == "/v1/completions"]
    assert len(requests) == 1
    assert requests[0]["prompt"] == [[5, 6]] * 3 + [[7]] * 3
    assert (requests[0]["temperature"], requests[0]["max_tokens"]) == (0.7, 4)
    assert "logit_bias" not in requests[0]
