"""Stock vLLM servers that training asks; a teacher behind one gives log-probabilities of whole prompts."""

from __future__ import annotations

import random
import time

import httpx
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.batches import Batch

TRIES = 6
FIRST_PAUSE = 0.5
PROBE_IDS = 256


class ServerError(RuntimeError):
    """A server cannot be used; the message names its URL and why."""


class Server:
    """A vLLM server. `role`: what it is to us. `model`: the name it serves; None: its only one."""

    def __init__(
        self, role: str, url: str, model: str | None, client: httpx.Client | None = None, timeout: float = 300
    ) -> None:
        self._role, self.url = role, url.rstrip("/")
        self._client = client or httpx.Client(timeout=timeout)
        self.model = model or self._only_model()

    def post(self, path: str, body: dict[str, object]) -> dict:
        """Raises ServerError where it refuses, or stays away."""
        return self._request("POST", path, body)

    def _only_model(self) -> str:
        served = [model["id"] for model in self._request("GET", "/v1/models")["data"]]
        if len(served) != 1:
            raise ServerError(
                f"{self.url} serves {', '.join(served) or 'nothing'}: name the {self._role}'s model"
            )
        return served[0]

    def _request(self, method: str, path: str, body: dict[str, object] | None = None) -> dict:
        """Tries again, with growing pauses, where the server is away or overloaded: training is long."""
        for attempt in range(TRIES):
            try:
                reply = self._client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if reply.is_success:
                    return reply.json() if reply.content else {}
                problem = f"{reply.status_code} {reply.text[:300]}"
                if reply.is_client_error and reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    break
            if attempt + 1 < TRIES:
                time.sleep(FIRST_PAUSE * 2**attempt)
        raise ServerError(f"the {self._role} at {self.url}{path}: {problem}")


class ServedTeacher:
    """`top`: likeliest tokens whose log-probabilities are asked for at every position; at most the server's
    `--max-logprobs`.
    """

    def __init__(self, server: Server, top: int) -> None:
        self._server, self.top = server, top

    def likeliest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ids (N, top) and their log-probabilities (N, top) at the positions that predict the answers.

        Column 0 is the batch's own token, the others are the likeliest in falling order.
        """
        lengths = batch.ids.shape[1] - batch.answer.flip(1).int().argmax(1) + 1
        rows = [row[:n] for row, n in zip(batch.ids.tolist(), lengths.tolist(), strict=True)]
        reply = self._server.post(
            "/v1/completions",
            {"model": self._server.model, "prompt": rows, "max_tokens": 1, "temperature": 0,
             "prompt_logprobs": self.top},
        )  # fmt: skip
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        ids, log_probs = [], []
        for row, answer, choice in zip(rows, batch.answer.tolist(), choices, strict=True):
            for at in range(len(row) - 1):
                if answer[at]:
                    own = str(row[at + 1])
                    known = {i: entry["logprob"] for i, entry in choice["prompt_logprobs"][at + 1].items()}
                    others = sorted(known.keys() - {own}, key=lambda i: (-known[i], int(i)))
                    columns = [own, *others][: self.top]
                    ids.append([int(i) for i in columns])
                    log_probs.append([known[i] for i in columns])
        return torch.tensor(ids), torch.tensor(log_probs)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ServerError where the teacher gives a text other ids than `tokenizer` does."""
        some = random.Random(0).choices(range(len(tokenizer)), k=PROBE_IDS)
        text = tokenizer.decode(some, skip_special_tokens=True)
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        asked = {"model": self._server.model, "prompt": text, "add_special_tokens": False}
        if self._server.post("/tokenize", asked)["tokens"] != ours:
            raise ServerError(
                f"the teacher {self._server.model} at {self._server.url} has another vocabulary than the "
                f"student's tokenizer {tokenizer.name_or_path}"
            )
