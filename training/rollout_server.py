"""Rollouts by vLLM: a server of the student writes the on-policy completions; the trainer sends it its
weights.

The server is a stock vLLM server in its development mode (`VLLM_SERVER_DEV_MODE=1`), whose
`/collective_rpc` reloads weights from a directory that both can read; keep it in memory (`/dev/shm`) where
models are large.
"""

from __future__ import annotations

import os
from pathlib import Path

import httpx
from safetensors.torch import save_file
from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch
from training.loop.checkpoints import weights_of
from training.lora import merged
from training.sampling import until_end
from training.served import Server, ServerError

WEIGHTS = "model.safetensors"
BANNED = -100.0  # the strongest bias that OpenAI's protocol knows


class RolloutServer:
    """`directory`: of weights, read by the server. `every`: batches drawn between two transfers."""

    def __init__(
        self, url: str, directory: Path, every: int = 1, model: str | None = None,
        client: httpx.Client | None = None,
    ) -> None:  # fmt: skip
        self._server = Server("rollout server", url, model, client)
        self._directory, self._every, self._drawn = directory.resolve(), every, 0

    def sampled(self, model: PreTrainedModel, batch: Batch, visible: int, end: int) -> Batch:
        """What `training.sampling.sampled` gives, drawn by the server; it fixes no seed."""
        if self._drawn % self._every == 0:
            self.synchronise(model)
        self._drawn += 1
        prompts, longest = batch.prompts(), int(batch.answer.sum(1).max()) + 1
        answers = self.complete(prompts, range(visible, model.config.vocab_size), end, longest, temperature=1)
        return Batch.of(prompts, answers, end).to(batch.ids.device)

    def synchronise(self, model: PreTrainedModel) -> None:
        """Give the server the model's weights, adapters merged; all processes take part."""
        weights = weights_of(model)
        if parallel.is_first():
            weights = merged(weights, model)
            if model.config.tie_word_embeddings:
                weights.pop("lm_head.weight", None)
            self._directory.mkdir(parents=True, exist_ok=True)
            scratch = self._directory / (WEIGHTS + ".tmp")
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, scratch)
            os.replace(scratch, self._directory / WEIGHTS)
            self._server.post(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(self._directory)}},
            )
            if not self._server.post("/reset_prefix_cache", {})["success"]:  # its blocks are the old weights'
                raise ServerError(
                    f"the rollout server at {self._server.url} is writing for somebody else too"
                )
        parallel.barrier()

    def complete(
        self, prompts: list[list[int]], banned: range, end: int, longest: int, temperature: float
    ) -> list[list[int]]:
        """Answers of at most `longest` tokens, none of them banned, the end token with them."""
        reply = self._server.post(
            "/v1/completions",
            {"model": self._server.model, "prompt": prompts, "max_tokens": longest,
             "temperature": temperature, "top_p": 1, "top_k": 0,
             "logit_bias": {str(i): BANNED for i in banned}, "return_token_ids": True},
        )  # fmt: skip
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        return [until_end(choice["token_ids"], end) for choice in choices]
