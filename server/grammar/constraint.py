"""The grammar of one choice, in the gateway: what both models may write next."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from server.grammar.manager import GrammarManager
from server.vllm_api import (
    EngineRequest,
    SamplingParams,
    grammar_fields,
    grammar_start,
    is_constrained,
)
from server.written import GRAMMAR_FROM


class Continuation(NamedTuple):
    """Arguments with which the student's engine continues with a grammar."""

    extra_args: dict[str, int]
    options: dict[str, Any]
    """Options of `AsyncLLM.generate`."""


class Constraint:
    """One of vLLM's grammar matchers, at the end of the text so far.

    The grammar starts where vLLM starts it: after the reasoning, if there is a parser that knows its end.
    """

    def __init__(self, manager: GrammarManager, new_request: Callable[[], Any]) -> None:
        self._manager = manager
        self._new_request = new_request
        self._request = new_request()
        self._compiling = asyncio.wrap_future(manager.executor.submit(manager.compile, self._request))
        self._compiling.add_done_callback(_retrieve)
        self._grammar: Any = None
        self._usable = False
        self._fed = 0
        self._start: int | None = None
        """The place in the completion at which the grammar starts; None while there is reasoning."""
        words = -(-manager.vllm_config.model_config.get_vocab_size() // 32)
        self._mask = torch.full((1, words), -1, dtype=torch.int32)

    @property
    def fields(self) -> dict[str, Any]:
        """The grammar as a field of a request to a stock server; empty once it has taken a token."""
        if self._start not in (None, self._fed) or not self.unfinished:
            return {}
        fields = grammar_fields(self._request.sampling_params)
        return {"structured_outputs": fields | self._manager.repaired(self._request.sampling_params)}

    @property
    def unfinished(self) -> bool:
        """Whether the grammar has begun and has not ended."""
        return is_constrained(self._manager, self._request) and not self._grammar.is_terminated()

    async def catch_up(self, token_ids: Sequence[int]) -> bool:
        """Take the tokens written since the last call; returns whether the teacher's tokens can be checked.

        Args:
            token_ids: all ids of the completion.
        """
        if self._grammar is None:
            await self._compiled()
        if len(token_ids) < self._fed:  # some of a teacher's tokens did not stay
            self._begin_again()
        while self._start is None and self._fed < len(token_ids):  # one by one, as the engine does
            self._feed(token_ids[self._fed : self._fed + 1])
        if self._fed < len(token_ids):
            self._feed(token_ids[self._fed :])
        return self._usable

    async def _compiled(self) -> None:
        await asyncio.wait([self._compiling])
        if self._compiling.exception() is None:  # else the student's engine will report it
            self._grammar = self._compiling.result()
            self._request.structured_output_request.grammar = self._grammar
            self._usable = True

    def _begin_again(self) -> None:
        self._request = self._new_request()
        self._fed = 0
        self._start = None
        if self._grammar is not None:
            self._grammar.reset()
            self._request.structured_output_request.grammar = self._grammar
            self._usable = True

    def take(self, token_ids: Sequence[int]) -> int:
        """Advance by the longest prefix that may be written next; returns its length."""
        taken = 0
        while taken < len(token_ids):
            until = len(token_ids) if self._start is not None else taken + 1
            valid = self._manager.validate_tokens(self._request, list(token_ids[taken:until]))
            if not valid and self.allows(
                token_ids[taken]
            ):  # backends do not validate an end, or what follows
                valid = [token_ids[taken]]
            if not valid:
                break
            self._feed(valid)
            taken += len(valid)
        return taken

    def allows(self, token_id: int) -> bool:
        """Whether this token may be the next one."""
        if not self.unfinished:
            return True
        self._fill()
        return bool(int(self._mask[0, token_id // 32]) >> token_id % 32 & 1)

    def allowed(self, at_most: int) -> list[int] | None:
        """The ids that may come next; None if there are more than ``at_most``."""
        if not self.unfinished:
            return None
        self._fill()
        words = self._mask.numpy()
        if int(np.bitwise_count(words.view(np.uint32)).sum()) > at_most:
            return None
        ids: list[int] = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        return ids

    def continuation(self, prompt_tokens: int) -> Continuation:
        """Arguments for the student's next segment, after `catch_up`; ``prompt_tokens``: prompt length."""
        if self._start is None:
            return Continuation({}, {"reasoning_ended": False})
        return Continuation({GRAMMAR_FROM: prompt_tokens + self._start}, {"reasoning_ended": True})

    def _fill(self) -> None:
        self._grammar.fill_bitmask(self._mask, 0)

    def _feed(self, token_ids: Sequence[int]) -> None:
        request = self._request
        request.append_output_token_ids(list(token_ids))
        first = grammar_start(self._manager, request, token_ids)
        if first <= len(token_ids):
            if self._start is None:
                self._start = self._fed + first
                request.structured_output_request.reasoning_ended = True
            if self._usable:
                self._usable = self._grammar.accept_tokens(request.request_id, list(token_ids[first:]))
        self._fed += len(token_ids)


def _retrieve(compiling: "asyncio.Future[Any]") -> None:
    """Read the exception, which is logged already; otherwise asyncio would log it again."""
    if not compiling.cancelled():
        compiling.exception()


class Grammars:
    """Makes constraints, which share compiled grammars."""

    def __init__(self, vllm_config: Any) -> None:
        self._manager = GrammarManager(vllm_config)

    def constrain(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams, options: Mapping[str, Any]
    ) -> Constraint | None:
        """The constraint of a new completion; None if its parameters have no grammar.

        Args:
            request_id: id of the request, for the log.
            prompt_ids: token ids of the prompt.
            params: parameters that vLLM has checked.
            options: options of `AsyncLLM.generate`.
        """
        if params.structured_outputs is None or params.structured_outputs.all_constraints_none():
            return None
        new_request = partial(
            EngineRequest,
            request_id=request_id,
            prompt_token_ids=prompt_ids,
            sampling_params=params,
            pooling_params=None,
            reasoning_ended=options.get("reasoning_ended"),
            reasoning_parser_kwargs=options.get("reasoning_parser_kwargs"),
        )
        return Constraint(self._manager, new_request)
