"""A teacher with another vocabulary: the models exchange text, in whole characters.

A choice has two lists of ids. The student's ids are the completion. The teacher's ids are its own prompt,
rendered by its own template, and the completion's text in its own tokens. While only the teacher writes,
these are the ids that it wrote itself, so several calls continue as one call would.
"""

import copy
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from server.choice import Choice
from server.completion import Piece
from server.original_prompt import OriginalPrompt
from server.sources import TEACHER
from server.teacher.ask import Ask
from server.teacher.completion_text import BYTES_OF_A_CHARACTER, CompletionText
from server.teacher.delivery import Delivery, last_border
from server.teacher.errors import TeacherError
from server.teacher.meter import Meter
from server.teacher.pool import Slot, TeacherPool
from server.teacher.rules import allowed_ids, may_end
from server.teacher.words import UNFINISHED, StudentWords, TeacherWords, ids_of
from server.vllm_api import SamplingParams, TokenizerLike

UNSETTLED = 256
"""Most characters of the completion that are encoded again for the teacher."""

UNSUPPORTED = {
    "logprobs": None,
    "logprob_token_ids": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "thinking_token_budget": None,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
"""Parameters about single tokens, which need the student's tokens, each with its value if it is unused."""


class Translator:
    """Tokenizers and names that all choices of a pair share."""

    def __init__(
        self, student: StudentWords, teacher: TeacherWords, tokenizer: TokenizerLike, name: str = TEACHER
    ) -> None:
        """``tokenizer``: the student's tokenizer, as its engine has it; ``name``: the teacher's name."""
        self.name = name
        self.student = student
        self.teacher = teacher
        self.tokenizer = tokenizer

    def view(self, pool: TeacherPool, choice: Choice) -> "Translation":
        """A choice as the teacher sees it."""
        return Translation(self, pool, choice)


def untranslatable(original: OriginalPrompt | None, params: SamplingParams) -> str | None:
    """Name of a parameter that the teacher cannot honour in its own vocabulary, if the request has one."""
    if original is None:
        return "prompt"
    if original.obstacle is not None:
        return original.obstacle
    return of_one_vocabulary(params)


def of_one_vocabulary(params: SamplingParams) -> str | None:
    """Name of a parameter that needs the logits of the student's tokens, if the request has one."""
    used = (name for name, unused in UNSUPPORTED.items() if getattr(params, name) not in (None, [], unused))
    return next(used, None)


class Translation:
    """One choice as a teacher with another vocabulary sees it; a `server.teacher.view.TeacherView`."""

    def __init__(self, translator: Translator, pool: TeacherPool, choice: Choice) -> None:
        self._student = translator.student
        self._teacher = translator.teacher
        self.stuck = False
        """Whether the last call ended at a character that the student has no tokens for."""
        self._name = translator.name
        self._pool = pool
        self._choice = choice
        self._written = CompletionText(translator.student, translator.tokenizer, choice)
        self._settled: list[int] = []
        """The teacher's ids of the text up to `_border`; they do not change any more."""
        self._border = 0
        self._tail: list[int] = []
        """The teacher's ids of the text from `_border` on, as of the last call."""
        self._own: list[int] = []
        """Ids that the teacher wrote itself since then."""
        self._ahead = ""
        """Text that the teacher wrote beyond a grant; it comes next, unless the student writes first."""
        self._over = False
        """Whether the teacher's sequence ends after this text."""
        self._last_writer_at = -1
        """The completion's length after the teacher's last token; -1 if its ids have to be encoded again."""

    @property
    def half_written(self) -> bool:
        """Whether the student's last tokens are a part of a character."""
        return self._written.half_written

    @property
    def reads(self) -> int:
        """Number of tokens of prompt and completion: the teacher's tokens, or until known, the student's."""
        prompt = self._choice.original
        if prompt is None or self._name not in prompt.teacher_ids:
            return self._choice.prefix_tokens
        return len(self._prefix)

    async def room(self) -> int | None:
        """Tokens that the teacher's context has left after its prompt and the completion's text."""
        await self._prepare()
        context = self._pool.max_model_len
        if context is None:
            return None
        room = context - self.reads
        return max(room, 1) if self._ahead or self._over else room

    async def write(
        self, slot: Slot, tokens: int, deadline: float, meter: Meter
    ) -> AsyncGenerator[Piece, None]:
        """The teacher's text in the student's tokens, in pieces as they arrive."""
        choice = self._choice
        start = len(choice.completion)
        self.stuck = False
        self._last_writer_at = -1  # set at the end again: a call may be cut off anywhere
        delivery = Delivery(self._student, tokens, to_the_end=tokens >= choice.completion.tokens_left)
        async with aclosing(self._delivered(slot, delivery, deadline, meter)) as parts:
            async for ids in parts:
                kept = allowed_ids(choice, ids)
                if kept:
                    yield Piece(kept)
                if len(kept) < len(ids):
                    return  # the student, who knows the rules, writes the next token
        self.stuck = delivery.stuck
        if self.stuck:
            return  # the student writes the next token
        if self._over and not (delivery.rest or delivery.full):
            if may_end(choice):
                yield Piece(choice.end_ids, finish_reason="stop")
        else:
            self._ahead = delivery.rest
            self._last_writer_at = start + tokens - delivery.left

    async def _delivered(
        self, slot: Slot, delivery: Delivery, deadline: float, meter: Meter
    ) -> AsyncGenerator[list[int], None]:
        """The rest of the last call's text, and then a new call's text, as the student's ids."""
        yield delivery.add(self._ahead)
        ask = None if self._over or delivery.done else self._ask(delivery.left, meter)
        try:
            if ask is not None:
                async with aclosing(self._texts(slot, ask, deadline)) as texts:
                    async for text in texts:
                        yield delivery.add(text)
                        if delivery.done:
                            break
        except TeacherError:
            yield delivery.flush()
            raise
        yield delivery.flush()

    async def _texts(self, slot: Slot, ask: Ask, deadline: float) -> AsyncGenerator[str, None]:
        report = self._choice.report
        calling = self._pool.write(slot, ask, request_id=self._choice.call_id, deadline=deadline)
        async with aclosing(calling) as pieces:
            async for piece in pieces:
                self._own += piece.token_ids
                report.own_tokens = (report.own_tokens or 0) + len(piece.token_ids)
                self._over = piece.finish_reason == "stop"
                yield piece.text

    @property
    def _prefix(self) -> list[int]:
        prompt = self._choice.original
        if prompt is None:
            raise RuntimeError("a prompt that no teacher can read was to be written by one")
        return [*prompt.teacher_ids[self._name], *self._settled, *self._tail, *self._own]

    def _ask(self, tokens: int, meter: Meter) -> Ask | None:
        """The request for text of ``tokens`` student tokens; None if the teacher's context is full.

        The number of the teacher's own tokens for it is not known: the call ends when the grant is full.
        """
        prefix = self._prefix
        own = 2 * tokens + BYTES_OF_A_CHARACTER
        if self._pool.max_model_len is not None:
            own = min(own, self._pool.max_model_len - len(prefix))
        if not meter.admits(len(prefix), own):
            own = min(own, tokens)  # which is what was reserved
        if own < 1:
            return None
        choice = self._choice
        params = copy.copy(choice.params)
        params.stop_token_ids = None  # the student's end tokens
        return Ask(
            prefix,
            own,
            params,
            min_tokens=choice.min_tokens,
            seed=choice.seed,
            cache_salt=choice.prompt.get("cache_salt"),
            meter=meter,
            as_text=True,
            grammar={} if choice.constraint is None else choice.constraint.fields,
            adapter=choice.adapter,
        )

    async def _prepare(self) -> None:
        """Bring the teacher's ids up to the completion's text."""
        prompt = self._choice.original
        if prompt is not None and self._name not in prompt.teacher_ids:
            prompt.teacher_ids[self._name] = ids_of(await self._question("/tokenize", prompt.body))
        self._written.read()
        text = self._written.text
        if self._last_writer_at == len(self._choice.completion):
            if self._own and not self._over and not text.endswith(UNFINISHED):
                self._own = await self._teacher.whole(self._question, self._own)
            return
        self._own = []
        self._ahead = ""
        self._over = False
        border = self._border + last_border(text[self._border :])
        if border - self._border > UNSETTLED // 2:
            self._settled += await self._encode(text[self._border : border])
            self._border = border
        self._tail = await self._encode(text[self._border :])

    async def _encode(self, text: str) -> list[int]:
        return await self._teacher.encode(self._question, text) if text else []

    async def _question(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self._pool.ask(self._choice.affinity, path, body)
