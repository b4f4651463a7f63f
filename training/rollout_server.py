"""Rollouts by vLLM: a vLLM server of the student writes the on-policy completions.

The server is a stock vLLM server in its development mode (`VLLM_SERVER_DEV_MODE=1`). The trainer writes the
weights to a directory that both can read, and the server's `/collective_rpc` reloads them from there. If
models are large, keep this directory in memory (`/dev/shm`).
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
from training.sampling import MAX_TOKENS, room
from training.served import ServerError, VLLMServer
from training.served_completions import completed

WEIGHTS = "model.safetensors"


class RolloutServer:
    """A vLLM server of the student.

    Args:
        url: the server's address, without /v1.
        directory: directory that passes the weights to the server.
        every: number of batches drawn between two transfers of the weights.
        model: the model's name at the server; None: the only model there.
        client: HTTP client to use instead of a new one.
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
        """The same as `training.sampling.sampled`, but the server draws the completions, without a seed."""
        if self._drawn % self._every == 0:
            self.synchronise(model)
        self._drawn += 1
        prompts = batch.prompts()
        answers = completed(
            self._server,
            prompts,
            visible=visible,
            end=end,
            longest=room(model, prompts, longest),
            temperature=1,
            banned=range(visible, model.config.get_text_config().vocab_size),
        )
        return Batch.of(prompts, answers, end).to(batch.ids.device)

    def synchronise(self, model: PreTrainedModel) -> None:
        """Send the model's weights to the server, with adapters merged; all processes take part."""
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
            if not self._server.post("/reset_prefix_cache", {}).get("success"):  # its keys are of old weights
                raise ServerError(f"the rollout server at {self._server.url} also serves other clients")
        parallel.barrier()
