"""Clients of stock vLLM servers in training; a served teacher gives log-probabilities of whole prompts."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router.address import base_url
from router.errors import PeerError
from router.vocabulary import OTHER_SPLIT, questions
from training.batches import Batch
from training.teacher_cache import TeacherCache, key_of
from training.tokenizer import TextTokenizer

TRIES = 6
FIRST_PAUSE = 0.5
SHOWN_PROBLEM = 300
"""Number of characters of an error reply that a message shows."""
SAME_TEACHER = 0.25
"""Mean difference of log-probabilities, in nats, below which a served teacher counts as unchanged."""
HOPELESS = (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.DecodingError, httpx.TooManyRedirects)
"""Errors that a second try would meet again."""
Wire = TypeVar("Wire")


class ServerError(PeerError):
    """A server cannot be used; the message names its URL and why."""


class _ServedModel(msgspec.Struct):
    id: str


class _ServedModels(msgspec.Struct):
    data: list[_ServedModel]


class _LogProb(msgspec.Struct):
    logprob: float


_Entries = dict[str, _LogProb]
"""Log-probabilities at a position, by token id as a string: the likeliest ids and the prompt's own token."""


class _ScoredPrompt(msgspec.Struct):
    index: int
    prompt_logprobs: list[_Entries | None]
    """The entries of each token of the prompt."""


class _ScoredPrompts(msgspec.Struct):
    choices: list[_ScoredPrompt]


class VLLMServer:
    """A stock vLLM server.

    Args:
        role: what the server is used as, for messages, e.g. `teacher`.
        url: base URL, without /v1.
        model: the model's name at the server; None: the only model there.
        client: HTTP client to use instead of a new one.
        timeout: longest wait for one reply, in seconds.
    """

    def __init__(
        self, role: str, url: str, model: str | None, client: httpx.Client | None = None, timeout: float = 300
    ) -> None:
        self._role = role
        self.url = base_url(url)
        self._client = client or httpx.Client(timeout=timeout)
        self.model = model or self._only_model()

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """Send a request, and return the JSON object of the reply; an empty reply gives an empty object.

        Raises:
            ServerError: the server refuses, stays away, or its reply is not a JSON object.
        """
        return self._decoded(path, self._request("POST", path, body), dict[str, Any])

    def ask(self, path: str, body: dict[str, object], kind: type[Wire]) -> Wire:
        """Send a request, and return the reply as `kind`. Raises ServerError, as `post` does."""
        return self._decoded(path, self._request("POST", path, body), kind)

    def error(self, path: str, problem: str) -> ServerError:
        """An error that names the problem of a reply, for the caller to raise."""
        return ServerError(f"the {self._role} at {self.url}{path}: {problem}")

    def _only_model(self) -> str:
        reply = self._decoded("/v1/models", self._request("GET", "/v1/models"), _ServedModels)
        served = [model.id for model in reply.data]
        if len(served) != 1:
            raise ServerError(
                f"{self.url} serves {', '.join(served) or 'nothing'}: set the {self._role}'s model"
            )
        return served[0]

    def _decoded(self, path: str, content: bytes, kind: type[Wire]) -> Wire:
        try:
            return msgspec.json.decode(content or b"{}", type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self.error(path, f"its reply cannot be read: {error}") from error

    def _request(self, method: str, path: str, body: dict[str, object] | None = None) -> bytes:
        """The reply's content. Tries again, with growing pauses, if the server is away or overloaded."""
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
    """A teacher's log-probabilities at the n tokens of an answer."""

    ids: np.ndarray
    """(n, top) int64: the answer's own token, then the likeliest others."""
    log_probs: np.ndarray
    """(n, top) float32, nats."""

    def to_bytes(self) -> bytes:
        """The bytes to keep in a cache, with ids in 32 bits."""
        return self.ids.astype(np.int32).tobytes() + self.log_probs.tobytes()

    @classmethod
    def from_bytes(cls, content: bytes, top: int) -> "View":
        """The view in the bytes of `to_bytes`, with `top` ids at each position."""
        half = len(content) // 2
        ids = np.frombuffer(content[:half], dtype=np.int32).reshape(-1, top).astype(np.int64)
        return cls(ids, np.frombuffer(content[half:], dtype=np.float32).reshape(-1, top))


class Likeliest(NamedTuple):
    """A teacher's log-probabilities at the N positions that predict a batch's answers."""

    ids: Tensor
    """(N, top): the batch's own token, then the likeliest others in falling order."""
    log_probs: Tensor
    """(N, top), nats."""


class ServedTeacher:
    """A teacher behind a vLLM server.

    Args:
        server: the teacher's server.
        top: number of likeliest tokens to request at every position; at most the server's
            `--max-logprobs`.
        cache: keeps its answers for demonstrations; None: they are not kept.
        known_as: name of the teacher in the cache; None: the server's URL.
    """

    PATH = "/v1/completions"

    def __init__(
        self, server: VLLMServer, top: int, cache: TeacherCache | None = None, known_as: str | None = None
    ) -> None:
        self.server = server
        self.known_as = known_as or server.url
        self.top = top
        self._cache = cache
        self._is_the_kept_one = False

    @property
    def model(self) -> str:
        """The model's name at the server."""
        return self.server.model

    def likeliest(self, batch: Batch) -> Likeliest:
        """Tokens and their log-probabilities at the positions that predict the answers.

        Raises:
            ServerError: the server cannot be used.
        """
        rows = self._rows(batch)
        if self._cache is None or not batch.comes_again:
            views = self._asked(rows)
        else:
            views = self._kept_or_asked(self._cache, rows)
        ids = np.concatenate([view.ids for view in views])
        log_probs = np.concatenate([view.log_probs for view in views])
        return Likeliest(torch.from_numpy(ids), torch.from_numpy(log_probs))

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the teacher's tokens are those of `tokenizer`; print a text that it splits differently.

        Raises:
            ServerError: the teacher has another vocabulary, or its server cannot be used.
        """
        warned = False
        for question in questions(TextTokenizer(tokenizer)):
            body = {"model": self.server.model, **question.body}
            problem = question.difference(self.server.ask(question.path, body, dict[str, object]))
            if problem and not question.binding and not warned:
                print(f"{self.server.model} at {self.server.url} {OTHER_SPLIT}: {problem}")
                warned = True
            if problem and question.binding:
                raise ServerError(
                    f"the teacher {self.server.model} at {self.server.url} has a different vocabulary from "
                    f"the student's tokenizer {tokenizer.name_or_path}: {problem}"
                )

    @staticmethod
    def _rows(batch: Batch) -> list[ScoredRow]:
        lengths = batch.ids.shape[1] - batch.answer.flip(1).int().argmax(1) + 1
        counts = batch.answer.sum(1).tolist()
        rows = []
        for row, length, count in zip(batch.ids.tolist(), lengths.tolist(), counts, strict=True):
            rows.append(ScoredRow(row[:length], length - count))
        return rows

    def _kept_or_asked(self, cache: TeacherCache, rows: Sequence[ScoredRow]) -> list[View]:
        keys = [key_of(self.known_as, self.server.model, self.top, *row) for row in rows]
        views = self._kept(cache, keys)
        if not self._is_the_kept_one and not self._still_says(rows, views):
            print(f"the teacher at {self.server.url} has changed: its cached answers are asked for again")
            cache.clear()
            views = {}
        missing = [number for number in range(len(rows)) if number not in views]
        new = self._asked([rows[number] for number in missing])
        kept = {}
        for number, view in zip(missing, new, strict=True):
            views[number] = view
            kept[keys[number]] = view.to_bytes()
        if kept:
            cache.put(kept)
        return [views[number] for number in range(len(rows))]

    def _kept(self, cache: TeacherCache, keys: Sequence[bytes]) -> dict[int, View]:
        """The kept views, by the number of their key."""
        views = {}
        for number, value in enumerate(cache.get(keys)):
            if value is not None:
                views[number] = View.from_bytes(value, self.top)
        return views

    def _still_says(self, rows: Sequence[ScoredRow], kept: Mapping[int, View]) -> bool:
        """Whether the server still agrees with the kept view of one row: its URL may serve another model."""
        if not kept:
            return True
        self._is_the_kept_one = True
        number = min(kept)
        (now,) = self._asked([rows[number]])
        difference = np.abs(now.log_probs[:, 0] - kept[number].log_probs[:, 0]).mean()
        return bool(difference < SAME_TEACHER)

    def _asked(self, rows: Sequence[ScoredRow]) -> list[View]:
        if not rows:
            return []
        views = []
        for row, scored in zip(rows, self._scored([row.ids for row in rows]), strict=True):
            ids = []
            log_probs = []
            for place in range(row.first, len(row.ids)):
                known = self._columns(scored[place], row.ids[place])
                ids.append(list(known))
                log_probs.append(list(known.values()))
            views.append(View(np.array(ids, dtype=np.int64), np.array(log_probs, dtype=np.float32)))
        return views

    def _scored(self, rows: Sequence[list[int]]) -> list[list[_Entries | None]]:
        """`prompt_logprobs` of each row, in order."""
        body = {
            "model": self.server.model,
            "prompt": rows,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.top,
        }
        choices = self.server.ask(self.PATH, body, _ScoredPrompts).choices
        by_index = {choice.index: choice.prompt_logprobs for choice in choices}
        if len(choices) != len(rows) or by_index.keys() != set(range(len(rows))):
            raise self.server.error(self.PATH, f"{len(choices)} choices for {len(rows)} prompts")
        ordered = []
        for number, row in enumerate(rows):
            entries = by_index[number]
            if len(entries) != len(row):
                raise self.server.error(self.PATH, f"prompt_logprobs of {len(entries)} tokens for {len(row)}")
            ordered.append(entries)
        return ordered

    def _columns(self, entries: _Entries | None, own: int) -> dict[int, float]:
        """Log-probabilities by id at a position: `top` ids, the prompt's own token first."""
        known = self._by_id(entries or {})
        if own not in known or len(known) < self.top:
            raise self.server.error(
                self.PATH,
                f"prompt_logprobs have {len(known)} tokens for a position, expected the {self.top} likeliest "
                "and the prompt's own",
            )
        if not all(map(math.isfinite, known.values())):
            raise self.server.error(self.PATH, "prompt_logprobs hold a value that is not finite")
        others = sorted(known.keys() - {own}, key=lambda token: (-known[token], token))
        return {token: known[token] for token in [own, *others][: self.top]}

    def _by_id(self, entries: _Entries) -> dict[int, float]:
        known = {}
        try:
            for token, entry in entries.items():
                known[int(token)] = entry.logprob
        except ValueError as error:
            raise self.server.error(self.PATH, f"prompt_logprobs name no token ids: {error}") from error
        return known
