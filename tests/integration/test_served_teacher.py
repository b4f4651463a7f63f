"""A real vLLM server as teacher and as writer of rollouts, against the same model in process."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from measuring.pair import HOST, START_SECONDS, Pair, free_port, teacher_service
from measuring.processes import running
from tests.helpers.client import PATIENCE
from training.batches import Batch
from training.models import answer_read, load_model
from training.rollout_server import RolloutServer
from training.sampling import complete
from training.served import ServedTeacher, VLLMServer
from training.served_completions import completed
from training.teacher import lump, remainder
from training.tokenizer import encode_prompts, load_tokenizer


@pytest.fixture(scope="module")
def directory(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the teacher's directory, in which weights are handed over."""
    return shutil.copytree(pair.teacher, tmp_path_factory.mktemp("rollouts") / "model")


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def url(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = f"http://{HOST}:{free_port()}"
    service = teacher_service(directory, url, tmp_path_factory.mktemp("logs"))
    service = replace(service, environment={**service.environment, "VLLM_SERVER_DEV_MODE": "1"})
    with running([service], timeout=START_SECONDS):
        yield url


def test_a_served_teacher_sees_what_one_in_process_sees(
    url: str, client: httpx.Client, pair: Pair, sources: list[str]
) -> None:
    tokenizer, model = load_tokenizer(pair.teacher), load_model(pair.teacher)
    served = ServedTeacher(VLLMServer("teacher", url, None, client), top=20)
    served.check_vocabulary(tokenizer)
    prompts = encode_prompts(tokenizer, sources[:8])
    answers = complete(model, prompts, len(tokenizer), tokenizer.eos_token_id, 30, temperature=1)
    batch = Batch.of(prompts, answers, tokenizer.eos_token_id)
    ids, log_p = served.likeliest(batch)
    with torch.no_grad():
        expected = lump(answer_read(model, batch, model.config.vocab_size).logits.log_softmax(-1), ids)
    assert torch.equal(ids[:, 0], batch.targets)
    assert (log_p - expected[:, :-1]).abs().max() < 1e-3
    assert (remainder(log_p).exp() - expected.exp()).abs().max() < 1e-4


def test_rollouts_follow_the_weights(
    url: str, client: httpx.Client, directory: Path, pair: Pair, sources: list[str]
) -> None:
    tokenizer, model = load_tokenizer(pair.teacher), load_model(pair.teacher)
    prompts = encode_prompts(tokenizer, sources[:8])
    visible, end = len(tokenizer), tokenizer.eos_token_id
    rollouts = RolloutServer(url, directory, client=client)
    server = VLLMServer("rollout server", url, None, client)

    def agree() -> float:
        ours = complete(model, prompts, visible, end, 30, temperature=0)
        banned = range(visible, model.config.vocab_size)
        theirs = completed(
            server, prompts, visible=visible, end=end, longest=30, temperature=0, banned=banned
        )
        return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)

    rollouts.synchronise(model)
    assert agree() >= 7 / 8  # a tie may fall either way
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.mlp.down_proj.weight.add_(0.1 * torch.randn_like(layer.mlp.down_proj.weight))
    assert agree() <= 1 / 8
    rollouts.synchronise(model)
    assert agree() >= 7 / 8
