"""A teacher and a rollout server at URLs: requests, the use of replies, and refusals."""

import json

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.helpers.served_teacher import BATCH, VISIBLE, VLLM, client
from training import served
from training.lora import add_lora
from training.method_config import GKDConfig, KDConfig, PCLConfig
from training.methods import GKD, KD, PCL
from training.model_config import LoraConfig, Shape
from training.models import answer_read, new_model
from training.rollout_server import RolloutServer
from training.served import ServedTeacher, ServerError, VLLMServer
from training.teacher import lump, remainder

SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=32)


@pytest.fixture
def vllm(tokenizer):
    return VLLM(new_model(SHAPE, tokenizer, 1))


def served_teacher(handler, top):
    return ServedTeacher(VLLMServer("teacher", "http://there", None, client(handler)), top)


def test_a_served_teacher_gives_the_likeliest_tokens_and_the_rest(vllm):
    ids, log_p = served_teacher(vllm, 5).likeliest(BATCH)
    whole = answer_read(vllm.model, BATCH, VISIBLE).logits.log_softmax(-1)
    assert ids.shape == (4, 5)
    assert ids[:, 0].tolist() == [1, 2, 3, 256]
    assert torch.allclose(log_p, whole.gather(1, ids), atol=1e-5)
    expected = lump(whole, ids)
    assert torch.allclose(expected.exp().sum(-1), torch.ones(4))
    assert torch.allclose(remainder(log_p), expected, atol=1e-4)
    assert vllm.asked[-1][1]["prompt"] == [[5, 6, 1, 2], [7, 3, 256]]


METHODS = [
    (KD, KDConfig(type="kd")),
    (GKD, GKDConfig(type="gkd", beta=0.5)),
    (PCL, PCLConfig(type="pcl", window=0)),
    (PCL, PCLConfig(type="pcl", window=2)),
]


@pytest.mark.parametrize(("method", "config"), METHODS)
def test_with_all_tokens_a_served_teacher_equals_the_one_in_process(vllm, tokenizer, method, config):
    def gradient(teacher):
        student = new_model(SHAPE, tokenizer, 0)
        method(config, VISIBLE, teacher, 256).loss(student, BATCH)[0].backward()
        return student.get_output_embeddings().weight.grad

    expected = gradient(vllm.model)
    assert torch.allclose(gradient(served_teacher(vllm, VISIBLE)), expected, atol=1e-4 * expected.abs().max())


def test_a_teacher_of_another_vocabulary_is_refused(tokenizer):
    def answer(request):
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": [1, 2, 3]})
        return httpx.Response(200, json={"data": [{"id": "big"}]})

    with pytest.raises(ServerError, match=r"big at http://there has a different vocabulary"):
        served_teacher(answer, 5).check_vocabulary(tokenizer)


def test_a_server_that_comes_back_is_asked_again(monkeypatch):
    monkeypatch.setattr(served, "FIRST_PAUSE", 0.001)
    replies = [
        httpx.ConnectError("refused"),
        httpx.Response(503),
        httpx.Response(200, json={"data": [{"id": "x"}]}),
    ]

    def answer(request):
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    assert VLLMServer("teacher", "http://there", None, client(answer)).model == "x"


def test_a_refusal_is_passed_on_at_once():
    def answer(request):
        asked.append(request)
        return httpx.Response(400, json={"error": {"message": "at most 20 logprobs"}})

    asked = []
    with pytest.raises(ServerError, match=r"teacher at http://there/v1/models: 400 .*at most 20"):
        VLLMServer("teacher", "http://there", None, client(answer))
    assert len(asked) == 1


def test_rollouts_are_drawn_with_the_weights_of_the_moment(vllm, tokenizer, tmp_path):
    model = new_model(SHAPE, tokenizer, 0)
    add_lora(model, LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rollouts = RolloutServer("http://there", tmp_path, every=2, client=client(vllm))
    drawn = rollouts.sampled(model, BATCH, VISIBLE, 256)
    assert drawn.prompts() == BATCH.prompts()
    assert drawn.targets.tolist() == [65, 66, 256] * 2
    request = vllm.asked[-1][1]
    assert request["prompt"] == [[5, 6], [7]]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (1, 1, 64)
    assert request["logit_bias"] == {str(i): -100.0 for i in range(VISIBLE, VISIBLE + 32)}

    plain = new_model(SHAPE, tokenizer, 2)
    missing, unexpected = plain.load_state_dict(vllm.weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    ours, theirs = (answer_read(one, BATCH, VISIBLE).logits for one in (model, plain))
    assert torch.allclose(ours, theirs, atol=1e-5)

    rollouts.sampled(model, BATCH, VISIBLE, 256)
    rollouts.sampled(model, BATCH, VISIBLE, 256)
    assert [path for path, _ in vllm.asked].count("/collective_rpc") == 2


HTML = httpx.Response(200, text="<html>busy</html>", headers={"content-type": "text/html"})


def scored(*rows):
    """A reply with these rows of `prompt_logprobs`."""
    choices = [{"index": index, "prompt_logprobs": row} for index, row in enumerate(rows)]
    return {"choices": choices}


FIRST = [None, *({str(token): {"logprob": -1.0}, "9": {"logprob": -2.0}} for token in (6, 1, 2))]
SECOND = [None, *({str(token): {"logprob": -1.0}, "9": {"logprob": -2.0}} for token in (3, 256))]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (HTML, "cannot be read"),
        (httpx.Response(200, content=b"\xff"), "cannot be read"),
        (None, "cannot be read"),
        ([], "cannot be read"),
        ({}, "choices"),
        ({"choices": None}, "choices"),
        (scored(FIRST), "1 choices for 2 prompts"),
        (scored(None, SECOND), "prompt_logprobs"),
        (scored(FIRST[:-1], SECOND), "of 3 tokens for 4"),
        (scored([None] * 4, SECOND), "have 0 tokens for a position"),
        (scored([*FIRST[:3], {"9": {"logprob": -1.0}, "8": {"logprob": -1.0}}], SECOND), "the prompt's own"),
        (scored([*FIRST[:3], {"2": {"logprob": -1.0}}], SECOND), "have 1 tokens for a position, expected"),
        (scored([*FIRST[:3], {"2": {"logprob": None}}], SECOND), "logprob"),
        (scored([*FIRST[:3], {"two": {"logprob": -1.0}}], SECOND), "no token ids"),
    ],
)
def test_an_unusable_answer_of_a_teacher_is_reported_in_one_line(reply, problem):
    def answer(request):
        body = {"data": [{"id": "big"}]} if request.url.path.endswith("models") else reply
        return body if isinstance(body, httpx.Response) else httpx.Response(200, json=body)

    with pytest.raises(ServerError, match=rf"^the teacher at http://there/v1/completions: .*{problem}"):
        served_teacher(answer, 2).likeliest(BATCH)
    assert served_teacher(lambda request: right(request), 2).likeliest(BATCH)[0].tolist() == [
        [1, 9],
        [2, 9],
        [3, 9],
        [256, 9],
    ]


@pytest.mark.parametrize("values", [(0.5, -3.0), (-0.1, -0.2), (200.0, -1.0)])
def test_probabilities_above_one_are_not_trained_on(tokenizer, values):
    """Such replies have a log-probability above 0, or two tokens that are both nearly certain."""
    top, other = values
    last = [*FIRST[:3], {"2": {"logprob": top}, "9": {"logprob": other}}]

    def answer(request):
        is_list = request.url.path.endswith("models")
        return httpx.Response(200, json={"data": [{"id": "big"}]} if is_list else scored(last, SECOND))

    method = KD(KDConfig(type="kd"), VISIBLE, served_teacher(answer, 2))
    with pytest.raises(ServerError, match="add up to a probability of"):
        method.loss(new_model(SHAPE, tokenizer, 0), BATCH)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ({}, "did not reply with 2 completions"),
        ({"choices": [{"index": 0, "token_ids": [65]}]}, "did not reply with 2 completions"),
        ({"choices": [{"index": 0, "token_ids": [65]}, {"index": 1}]}, "without an index and token_ids"),
        (
            {"choices": [{"index": 0, "token_ids": [65]}, {"index": 1, "token_ids": []}]},
            "of 0 tokens, not of 1 to 4",
        ),
        ({"choices": [{"index": 0, "token_ids": [65] * 5}] * 2}, "of 5 tokens, not of 1 to 4"),
        ({"choices": [{"index": 0, "token_ids": [VISIBLE]}] * 2}, "ids outside 0 to 256"),
        ({"choices": [{"index": 0, "token_ids": ["a"]}] * 2}, "without an index and token_ids"),
        ({"choices": [{"index": 0, "token_ids": [65]}] * 2}, "not numbered 0 to 1"),
    ],
)
def test_completions_that_nobody_asked_for_are_refused(tokenizer, tmp_path, reply, problem):
    def answer(request):
        listing = {"data": [{"id": "s"}], "success": True}
        return httpx.Response(200, json=reply if request.url.path == "/v1/completions" else listing)

    rollouts = RolloutServer("http://there", tmp_path, client=client(answer))
    with pytest.raises(ServerError, match=f"^the rollout server at http://there/v1/completions: .*{problem}"):
        rollouts.sampled(new_model(SHAPE, tokenizer, 0), BATCH, VISIBLE, 256, longest=4)


def right(request):
    is_list = request.url.path.endswith("models")
    return httpx.Response(200, json={"data": [{"id": "big"}]} if is_list else scored(FIRST, SECOND))


@pytest.mark.parametrize("reply", [HTML, None, {}, {"data": None}, {"data": [{}]}, {"data": []}])
def test_a_server_without_a_model_is_named(reply):
    def answer(request):
        return reply if isinstance(reply, httpx.Response) else httpx.Response(200, json=reply)

    with pytest.raises(ServerError, match="http://there"):
        VLLMServer("teacher", "http://there", None, client(answer))


@pytest.mark.parametrize("url", ["there", "http://[", "ftp://there"])
def test_a_wrong_url_is_named(url, monkeypatch):
    monkeypatch.setattr(served, "TRIES", 1)
    with pytest.raises(ServerError, match="the teacher at "):
        VLLMServer("teacher", url, None)


def tokenizer_server(tokenizer):
    """A stand-in for a vLLM server's tokenizer endpoints, with a tokenizer of its own."""

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "big"}]})
        asked = json.loads(request.content)
        if request.url.path == "/detokenize":
            return httpx.Response(200, json={"prompt": tokenizer.decode(asked["tokens"])})
        ids = tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
        return httpx.Response(200, json={"tokens": ids})

    return answer


def test_two_swapped_ids_of_a_served_teacher_are_named(tokenizer):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    one, other = "a", "b"
    first = min(vocabulary[one], vocabulary[other])
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    swapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    served_teacher(tokenizer_server(tokenizer), 5).check_vocabulary(tokenizer)
    with pytest.raises(ServerError, match=f"the token {first} is .* there and .* here"):
        served_teacher(tokenizer_server(swapped), 5).check_vocabulary(tokenizer)
