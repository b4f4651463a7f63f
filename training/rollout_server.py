"""Rollouts by vLLM: a server of the student writes the on-policy completions.

The trainer sends it the weights.
The server is a stock vLLM server in its development mode (`VLLM_SERVER_DEV_MODE=1`), whose
`/collective_rpc` reloads weights from a directory that both can read; keep it in memory (`/dev/shm`) where
models are large.
"""

import os
from pathlib import Path

import httpx
from safetensors.torch import save_file
from transformers import PreTrainedModel

from training import parallel
from training.batches import Batch
from training.lora import merged
from training.parallel import weights_of
from training.sampling import MAX_TOKENS, room, until_end
from training.served import ServerError, VLLMServer

WEIGHTS = "model.safetensors"
BANNED = -100.0  # the strongest bias that OpenAI's protocol knows


class RolloutServer:
    """A vLLM server of the student.

    Args:
        directory: of weights, read by the server.
        every: batches drawn between two transfers.
    """

    def __init__(
        self,
        url: str,
        directory: Path,
        every: int = 1,
        model: str | None = None,
        client: httpx.Client | None = None,
    ) -> None:
        self._server = VLLMServer("rollout server", url, model, client)
        self._directory = directory.resolve()
        self._every = every
        self._drawn = 0

    def sampled(
        self, model: PreTrainedModel, batch: Batch, visible: int, end: int, longest: int = MAX_TOKENS
    ) -> Batch:
        """What `training.sampling.sampled` gives, drawn by the server; it fixes no seed."""
        if self._drawn % self._every == 0:
            self.synchronise(model)
        self._drawn += 1
        prompts = batch.prompts()
        banned = range(visible, model.config.get_text_config().vocab_size)
        longest = room(model, prompts, longest)
        answers = self.complete(prompts, banned, end, longest, temperature=1)
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
            whole = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(whole, scratch)
            os.replace(scratch, self._directory / WEIGHTS)
            self._server.post(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(self._directory)}},
            )
            if not self._server.post("/reset_prefix_cache", {}).get("success"):  # it holds the old weights'
                raise ServerError(f"the rollout server at {self._server.url} also serves other clients")
        parallel.barrier()

    def complete(
        self, prompts: list[list[int]], banned: range, end: int, longest: int, temperature: float
    ) -> list[list[int]]:
        """Answers of at most `longest` tokens, none of them banned, the end token with them."""
        reply = self._server.post(
            "/v1/completions",
            {
                "model": self._server.model,
                "prompt": prompts,
                "max_tokens": longest,
                "temperature": temperature,
                "top_p": 1,
                "top_k": 0,
                "logit_bias": dict.fromkeys(map(str, banned), BANNED),
                "return_token_ids": True,
            },
        )
        return [until_end(ids, end) for ids in self._answers(reply, len(prompts), longest, banned)]

    def _answers(self, reply: object, count: int, longest: int, banned: range) -> list[list[int]]:
        """Token ids of each choice, in order. Raises ServerError if the reply is not what was asked for."""
        where = f"the rollout server at {self._server.url}"
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or len(choices) != count:
            raise ServerError(f"{where} did not reply with {count} completions")
        answers: dict[object, list[int]] = {}
        for choice in choices:
            ids = choice.get("token_ids") if isinstance(choice, dict) else None
            if not isinstance(ids, list) or not 0 < len(ids) <= longest:
                raise ServerError(f"{where} gave a completion without 1 to {longest} token_ids")
            if not all(type(i) is int and 0 <= i < banned.start for i in ids):
                raise ServerError(f"{where} gave a completion with ids outside 0 to {banned.start - 1}")
            answers[choice.get("index")] = ids
        if answers.keys() != set(range(count)):
            raise ServerError(f"{where} gave completions that are not numbered 0 to {count - 1}")
        return [answers[number] for number in range(count)]
