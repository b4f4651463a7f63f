"""The student's side of the span loop: a scripted vLLM in place of the real one.

It writes the small letters of the alphabet, each at its place in the completion. A scripted teacher writes
capital letters. So a completion's text shows who wrote each token and that every prefix was right: "abCDef"
is two tokens of the student, a span of two tokens, and two tokens of the student.
"""

import asyncio
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm.tokenizers.hf import get_cached_tokenizer

from router.reserved import ReservedRows
from server.cooperation import Cooperation
from server.cooperator import Cooperator
from server.gate_processor import NOT_BEFORE, PRICE
from server.student import StudentEngine
from server.vllm_api import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)

EOS = 256  # end of sequence of the `tokenizer` fixture, whose other ids are bytes
RESERVED = ReservedRows(start=260, count=4)
VOCABULARY = 5000
PROMPT_IDS = list(b"Hi")
PROMPT = {"type": "token", "prompt": "Hi", "prompt_token_ids": PROMPT_IDS}
DELTA, CUMULATIVE, FINAL_ONLY = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)
INF = float("inf")


def letter(place: int, first: str) -> int:
    return ord(first) + place % 26


@dataclass
class Segment:
    """A request that reached the student's engine."""

    prefix: list[int]
    params: SamplingParams
    request_id: str
    options: dict[str, Any]
    closed: bool = False

    @property
    def price(self) -> float:
        return (self.params.extra_args or {}).get(PRICE, INF)

    @property
    def not_before(self) -> int:
        return (self.params.extra_args or {}).get(NOT_BEFORE, 0)


class ScriptedLLM:
    """A scripted vLLM engine. At given places it asks if its terms allow it, and at one place it ends.

    With several teachers, ``ask_at`` maps each place to the number of dearer prices that are exceeded there.
    """

    def __init__(self, tokenizer: Any, ask_at: Collection[int], ends_at: int | None) -> None:
        self.tokenizer = get_cached_tokenizer(tokenizer)
        self.ask_at, self.ends_at = ask_at, ends_at
        self.segments: list[Segment] = []

    def check(self, prompt: Any, params: SamplingParams, request_id: str, **_: Any) -> SamplingParams:
        config = SimpleNamespace(
            max_model_len=200, max_logprobs=20, is_diffusion=False, get_vocab_size=lambda: VOCABULARY
        )
        params.verify(config, None, None, self.tokenizer)
        params = params.clone()
        params.update_from_generation_config({}, EOS)
        params.update_from_tokenizer(self.tokenizer)
        return params

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        segment = Segment(list(prompt["prompt_token_ids"]), sampling_params, request_id, options)
        self.segments.append(segment)
        written: list[int] = []
        reason = None
        try:
            while reason is None:
                await asyncio.sleep(0)
                token, reason = self._next(segment, len(written))
                written.append(token)
                if sampling_params.output_kind == DELTA:
                    yield self._output(segment, [token], reason)
                elif sampling_params.output_kind == CUMULATIVE or reason is not None:
                    yield self._output(segment, list(written), reason)
        finally:
            segment.closed = True

    def _next(self, segment: Segment, written: int) -> tuple[int, str | None]:
        place = len(segment.prefix) - len(PROMPT_IDS) + written
        if place in self.ask_at and segment.price < INF and written >= segment.not_before:
            level = self.ask_at[place] if isinstance(self.ask_at, dict) else 0
            return RESERVED.escalation + level, "stop"
        if place == self.ends_at and written >= segment.params.min_tokens:
            return EOS, "stop"
        full = written + 1 == segment.params.max_tokens
        return letter(place, "a"), "length" if full else None

    @staticmethod
    def _output(segment: Segment, ids: list[int], reason: str | None) -> RequestOutput:
        wanted = segment.params.num_logprobs is not None
        completion = CompletionOutput(
            index=0,
            text="",
            token_ids=ids,
            cumulative_logprob=None,
            logprobs=[{token: Logprob(-1.0)} for token in ids] if wanted else None,
            finish_reason=reason,
        )
        return RequestOutput(
            request_id=segment.request_id,
            prompt=None,
            prompt_token_ids=segment.prefix,
            prompt_logprobs=ScriptedLLM._of_prompt(segment),
            outputs=[completion],
            finished=reason is not None,
            num_cached_tokens=0 if segment.params.skip_reading_prefix_cache else len(segment.prefix) // 2,
        )

    @staticmethod
    def _of_prompt(segment: Segment) -> Any:
        """Log-probabilities of the prompt: -1 for its second token, -2 for its third, and so on."""
        if segment.params.prompt_logprobs is None:
            return None
        others = enumerate(segment.prefix[1:], start=1)
        return [None, *({token: Logprob(-float(place))} for place, token in others)]


def cooperator(vllm: Any, cooperation: Cooperation, **student: Any) -> Cooperator:
    """The tested cooperator, over a scripted vLLM."""
    return Cooperator(
        StudentEngine(vllm.generate, vllm.check, vllm.tokenizer, 200, RESERVED, **student), cooperation
    )


class RecitingLLM(ScriptedLLM):
    """Writes the bytes of a text again and again; a begun character is completed first."""

    def __init__(self, tokenizer: Any, text: str, ask_at: Collection[int]) -> None:
        super().__init__(tokenizer, ask_at, None)
        self.characters = [character.encode() for character in text]

    def _next(self, segment: Segment, written: int) -> tuple[int, str | None]:
        token, reason = super()._next(segment, written)
        if token == RESERVED.escalation:
            return token, reason
        half: bytes = segment.options.get("half", half_character(bytes(segment.prefix)))
        character = self._character(half, len(segment.prefix) - len(PROMPT_IDS) + written - len(half))
        whole = len(half) + 1 == len(character)
        segment.options["half"] = b"" if whole else character[: len(half) + 1]
        return character[len(half)], reason

    def _character(self, half: bytes, place: int) -> bytes:
        if half:
            return next(character for character in self.characters if character.startswith(half))
        place %= sum(map(len, self.characters))
        for character in self.characters:
            place -= len(character)
            if place < 0:
                break
        return character


def half_character(text: bytes) -> bytes:
    """The bytes at the end of a text that form no whole character."""
    for length in range(1, 4):
        tail = text[-length:]
        if 0xC0 <= tail[0] < 0xF8:
            needed = 2 if tail[0] < 0xE0 else 3 if tail[0] < 0xF0 else 4
            return tail if needed > length else b""
        if not 0x80 <= tail[0] < 0xC0:
            return b""
    return b""
