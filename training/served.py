"""Stock vLLM servers that training asks; a teacher behind one gives log-probabilities of whole prompts."""

import math
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import httpx
import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router.vocabulary import questions
from training.batches import Batch

TRIES = 6
FIRST_PAUSE = 0.5
SHOWN_PROBLEM = 300
"""Characters of an error reply that are passed on."""
HOPELESS = (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.DecodingError, httpx.TooManyRedirects)
"""What a second try does not change."""
Wire = TypeVar("Wire")


class ServerError(RuntimeError):
    """A server cannot be used; the message names its URL and why."""


class ServedModel(msgspec.Struct):
    id: str


class ServedModels(msgspec.Struct):
    data: list[ServedModel]


class LogProb(msgspec.Struct):
    logprob: float


class ScoredPrompt(msgspec.Struct):
    """One row of `prompt_logprobs`: for each token of the prompt, the likeliest ids and the token itself."""

    index: int
    prompt_logprobs: list[dict[str, LogProb] | None]


class ScoredPrompts(msgspec.Struct):
    choices: list[ScoredPrompt]


class Server:
    """A stock vLLM server.

    Args:
        role: what it is to us, for messages.
        url: without /v1.
        model: the name it serves; None: its only one.
        client: in place of one of its own.
        timeout: seconds for one reply.
    """

    def __init__(
        self, role: str, url: str, model: str | None, client: httpx.Client | None = None, timeout: float = 300
    ) -> None:
        self._role, self.url = role, url.rstrip("/")
        self._client = client or httpx.Client(timeout=timeout)
        self.model = model or self._only_model()

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """The object that a request is answered with; an empty reply is an empty object.

        Raises:
            ServerError: the server refuses, stays away, or answers something else.
        """
        return self._decoded(path, self._request("POST", path, body), dict[str, Any])

    def ask(self, path: str, body: dict[str, object], kind: type[Wire]) -> Wire:
        """The reply to a request, as `kind`; raises as `post` does."""
        return self._decoded(path, self._request("POST", path, body), kind)

    def error(self, path: str, problem: str) -> ServerError:
        return ServerError(f"the {self._role} at {self.url}{path}: {problem}")

    def _only_model(self) -> str:
        reply = self._decoded("/v1/models", self._request("GET", "/v1/models"), ServedModels)
        served = [model.id for model in reply.data]
        if len(served) != 1:
            raise ServerError(
                f"{self.url} serves {', '.join(served) or 'nothing'}: name the {self._role}'s model"
            )
        return served[0]

    def _decoded(self, path: str, content: bytes, kind: type[Wire]) -> Wire:
        try:
            return msgspec.json.decode(content or b"{}", type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.error(path, f"its reply cannot be read: {error}") from error

    def _request(self, method: str, path: str, body: dict[str, object] | None = None) -> bytes:
        """Tries again, with growing pauses, if the server is away or overloaded: training is long."""
        for attempt in range(TRIES):
            try:
                reply = self._client.request(method, self.url + path, json=body)
            except HOPELESS as error:
                raise self.error(path, str(error)) from error
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if reply.is_success:
                    return reply.content
                problem = f"{reply.status_code} {reply.text[:SHOWN_PROBLEM]}"
                if not reply.is_server_error and reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    break
            if attempt + 1 < TRIES:
                time.sleep(FIRST_PAUSE * 2**attempt)
        raise self.error(path, problem)


class ServedTeacher:
    """A teacher behind a vLLM server.

    Args:
        server: of the teacher.
        top: likeliest tokens whose log-probabilities are asked for at every position; at most the server's
            `--max-logprobs`.
    """

    PATH = "/v1/completions"

    def __init__(self, server: Server, top: int) -> None:
        self._server, self.top = server, top

    @property
    def identity(self) -> str:
        """What its log-probabilities depend on, as far as it is known from here."""
        return f"{self._server.url} {self._server.model}"

    def likeliest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ids (N, top) and their log-probabilities (N, top) at the positions that predict the answers.

        Column 0 is the batch's own token, the others are the likeliest in falling order.

        Raises:
            ServerError: the server cannot be used.
        """
        lengths = batch.ids.shape[1] - batch.answer.flip(1).int().argmax(1) + 1
        rows = [row[:n] for row, n in zip(batch.ids.tolist(), lengths.tolist(), strict=True)]
        ids: list[list[int]] = []
        log_probs: list[list[float]] = []
        for row, answer, scored in zip(rows, batch.answer.tolist(), self._scored(rows), strict=True):
            for position in range(len(row) - 1):
                if answer[position]:
                    known = self._columns(scored[position + 1], row[position + 1])
                    ids.append(list(known))
                    log_probs.append(list(known.values()))
        return torch.tensor(ids), torch.tensor(log_probs)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher's tokens are those of `tokenizer`, and that it splits texts alike.

        Raises:
            ServerError: it does not, or cannot be used.
        """
        for question in questions(tokenizer):
            body = {"model": self._server.model, **question.body}
            if problem := question.difference(self._server.ask(question.path, body, dict[str, object])):
                raise ServerError(
                    f"the teacher {self._server.model} at {self._server.url} has another vocabulary than "
                    f"the student's tokenizer {tokenizer.name_or_path}: {problem}"
                )

    def _scored(self, rows: Sequence[list[int]]) -> list[list[dict[str, LogProb] | None]]:
        """`prompt_logprobs` of each row, in order."""
        body = {
            "model": self._server.model,
            "prompt": rows,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.top,
        }
        choices = self._server.ask(self.PATH, body, ScoredPrompts).choices
        choices = sorted(choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(len(rows))):
            raise self._server.error(self.PATH, f"{len(choices)} choices for {len(rows)} prompts")
        for row, choice in zip(rows, choices, strict=True):
            if len(choice.prompt_logprobs) != len(row):
                raise self._server.error(
                    self.PATH, f"prompt_logprobs of {len(choice.prompt_logprobs)} tokens for {len(row)}"
                )
        return [choice.prompt_logprobs for choice in choices]

    def _columns(self, entries: dict[str, LogProb] | None, own: int) -> dict[int, float]:
        """Log-probabilities of the `top` ids of a position, its own token first."""
        try:
            known = {int(token): entry.logprob for token, entry in (entries or {}).items()}
        except ValueError as error:
            raise self._server.error(self.PATH, f"prompt_logprobs name no token ids: {error}") from error
        if own not in known or len(known) < self.top:
            raise self._server.error(
                self.PATH,
                f"prompt_logprobs have {len(known)} tokens of a position, want the {self.top} likeliest and "
                "the prompt's own",
            )
        if not all(map(math.isfinite, known.values())):
            raise self._server.error(self.PATH, "prompt_logprobs hold a value that is not finite")
        others = sorted(known.keys() - {own}, key=lambda token: (-known[token], token))
        return {token: known[token] for token in [own, *others][: self.top]}
