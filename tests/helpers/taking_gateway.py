"""A stand-in for a gateway that takes new routers, and a router's stage that uses it."""

import json
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from router.checkpoint import RouterCheckpoint
from training.gate_config import Gain, GateConfig, GatewayRollouts, RegretGain
from training.gating.traffic_stage import TrafficStage
from training.models import load_model
from training.running_gateway import RunningGateway
from training.tasks import make_task
from training.tokenizer import encode_prompts


class TakingGateway:
    """A stand-in for a gateway: OpenAI's client reads its replies.

    Its completions have ten tokens with scores of .1 to 1. With a router in its directory, the teacher writes
    the tokens whose scores are above the price, except two that a bucket holds back. Without a router, the
    teacher writes one token. Begun completions are continued with one token, over and over.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, longer: int = 0, directory: Path | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.longer = longer
        self.directory = directory
        self.asked: list[tuple[str, float]] = []
        self.finished = 0
        self.taken: list[str | None] = []
        self.goes_away_after = 10**6
        self.trouble: dict[str, bool] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "wheels"}]})
        if request.url.path == "/v1/completions":
            self.finished += 1
            longest = json.loads(request.content)["max_tokens"]
            return httpx.Response(200, json={"choices": [{"token_ids": [9] * longest}]})
        router = self.router()
        if request.url.path == "/prices":
            digest = None if router is None else router.digest()
            if self.taken[-1:] != [digest]:
                self.taken.append(digest)
            return httpx.Response(200, json={"learned": router is None, "prices": [], "router": digest})
        return self.completion(json.loads(request.content), router)

    def completion(self, body: Any, router: RouterCheckpoint | None) -> httpx.Response:
        if len(self.asked) >= self.goes_away_after:
            raise KeyboardInterrupt
        source = body["messages"][0]["content"]
        budget = body["teacher_budget"]
        self.asked.append((source, budget))
        (prompt,) = encode_prompts(self.tokenizer, [source])
        teacher = 1
        if router is not None:
            price = router.calibration().price(budget)
            teacher = max(0, sum(place / 10 > price for place in range(1, 11)) - 2)
        chat = {
            "choices": [{"message": {"content": "x"}, "token_ids": list(range(9, 19))}],
            "usage": {"prompt_tokens": len(prompt) + self.longer},
            "teacher": {"spans": [[0, teacher]], "tokens": teacher, "calls": teacher, "degraded": False}
            | self.trouble,
        }
        return httpx.Response(200, json=chat)

    def router(self) -> RouterCheckpoint | None:
        if self.directory is None or not (self.directory / "router.json").exists():
            return None
        return RouterCheckpoint.load(self.directory)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self))

    def running(self, patience: float = 60.0) -> RunningGateway:
        return RunningGateway("http://there", 8, patience=patience, transport=self.client)


def stage_of(
    gateway: TakingGateway,
    pair: Path,
    rounds: int,
    seed: int = 0,
    gain: Gain = RegretGain(type="regret"),  # noqa: B008 (it is frozen)
) -> TrafficStage:
    """A router's stage with ``rounds`` rounds of 20 prompts, over the gateway."""
    config = GateConfig(
        span_tokens=1,
        ask_tokens=1,
        gain=gain,
        rollouts=GatewayRollouts(type="gateway", url="http://there", batch=10, router=gateway.directory),
        prompts=20,
        epochs=1,
        budgets=(0.1, 0.3),
    )
    few = {"rounds": rounds, "calibration_examples": 2}
    return TrafficStage(
        student=pair / "student",
        teacher=load_model(pair / "teacher"),
        teacher_name="teacher",
        tokenizer=gateway.tokenizer,
        task=make_task("numbers"),
        config=config.model_copy(update=few),
        max_tokens=12,
        seed=seed,
        transport=gateway.client,
    )
