"""Stock vLLM servers that training asks; a teacher behind one gives log-probabilities of whole prompts."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router.errors import PeerError
from router.vocabulary import questions
from training.batches import Batch
from training.teacher_cache import TeacherCache, key_of

TRIES = 6
FIRST_PAUSE = 0.5
SHOWN_PROBLEM = 300
"""Characters of an error reply that are passed on."""
SAME_TEACHER = 0.25
"""Mean difference of log-probabilities, nats, below which a served teacher is the one that it was."""
HOPELESS = (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.DecodingError, httpx.TooManyRedirects)
"""What a second try does not change."""
Wire = TypeVar("Wire")


class ServerError(PeerError):
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


class VLLMServer:
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


class ScoredRow(NamedTuple):
    """Prompt and answer of one row of a batch."""

    ids: list[int]
    first: int
    """Place of the answer's first token."""


@dataclass(frozen=True)
class View:
    """What a teacher says of the n tokens of an answer."""

    ids: np.ndarray
    """(n, top) int64: the answer's own token, then the likeliest others."""
    log_probs: np.ndarray
    """(n, top) float32, nats."""

    def to_bytes(self) -> bytes:
        """As it is kept: ids in 32 bits."""
        return self.ids.astype(np.int32).tobytes() + self.log_probs.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes, top: int) -> "View":
        """The other way round."""
        half = len(content) // 2
        ids = np.frombuffer(content[:half], dtype=np.int32).reshape(-1, top).astype(np.int64)
        return cls(ids, np.frombuffer(content[half:], dtype=np.float32).reshape(-1, top))


class ServedTeacher:
    """A teacher behind a vLLM server.

    Args:
        server: of the teacher.
        top: likeliest tokens whose log-probabilities are asked for at every position; at most the server's
            `--max-logprobs`.
        cache: keeps what it says of demonstrations.
    """

    PATH = "/v1/completions"

    def __init__(self, server: VLLMServer, top: int, cache: TeacherCache | None = None) -> None:
        self._server, self.top, self._cache = server, top, cache
        self._is_the_kept_one = False

    def likeliest(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ids (N, top) and their log-probabilities (N, top) at the positions that predict the answers.

        Column 0 is the batch's own token, the others are the likeliest in falling order.

        Raises:
            ServerError: the server cannot be used.
        """
        rows = self._rows(batch)
        if self._cache is None or not batch.comes_again:
            views = self._asked(rows)
        else:
            views = self._kept_or_asked(self._cache, rows)
        return (
            torch.from_numpy(np.concatenate([view.ids for view in views])),
            torch.from_numpy(np.concatenate([view.log_probs for view in views])),
        )

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

    @staticmethod
    def _rows(batch: Batch) -> list[ScoredRow]:
        lengths = batch.ids.shape[1] - batch.answer.flip(1).int().argmax(1) + 1
        counts = batch.answer.sum(1).tolist()
        columns = zip(batch.ids.tolist(), lengths.tolist(), counts, strict=True)
        return [ScoredRow(row[:length], length - count) for row, length, count in columns]

    def _kept_or_asked(self, cache: TeacherCache, rows: Sequence[ScoredRow]) -> list[View]:
        keys = [key_of(self._server.url, self._server.model, self.top, *row) for row in rows]
        kept = [None if value is None else View.from_bytes(value, self.top) for value in cache.get(keys)]
        if not self._is_the_kept_one and not self._still_says(rows, kept):
            print(f"the teacher at {self._server.url} is another one than before: asked for everything again")
            cache.clear()
            kept = [None] * len(rows)
        missing = [number for number, view in enumerate(kept) if view is None]
        new = dict(zip(missing, self._asked([rows[number] for number in missing]), strict=True))
        if new:
            cache.put({keys[number]: view.to_bytes() for number, view in new.items()})
        return [new.get(number) or view for number, view in enumerate(kept)]

    def _still_says(self, rows: Sequence[ScoredRow], kept: Sequence[View | None]) -> bool:
        """Whether the server still says of one row what is kept of it: another model may have its URL now."""
        for row, view in zip(rows, kept, strict=True):
            if view is not None:
                self._is_the_kept_one = True
                (now,) = self._asked([row])
                return bool(np.abs(now.log_probs[:, 0] - view.log_probs[:, 0]).mean() < SAME_TEACHER)
        return True

    def _asked(self, rows: Sequence[ScoredRow]) -> list[View]:
        if not rows:
            return []
        views = []
        for row, scored in zip(rows, self._scored([row.ids for row in rows]), strict=True):
            known = [self._columns(scored[at], row.ids[at]) for at in range(row.first, len(row.ids))]
            ids = np.array([list(columns) for columns in known], dtype=np.int64)
            views.append(View(ids, np.array([list(columns.values()) for columns in known], dtype=np.float32)))
        return views

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
