"""The student's side of the span loop: vLLM's engine, which gets one request for every segment."""

import copy
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from router.policy import Terms
from router.reserved import ReservedRows
from server.choice import Choice
from server.completion import Piece
from server.gate_processor import terms_args
from server.grammar.constraint import Constraint
from server.vllm_api import ReasoningMarkers, RequestOutput, RequestOutputKind, SamplingParams, TokenizerLike
from server.written import written_args


def _unconstrained(*_: Any) -> None:
    """No constraint, for a student whose requests have no structured output."""


@dataclass(frozen=True)
class StudentEngine:
    """The parts of vLLM's engine that the gateway uses."""

    generate: Callable[..., AsyncGenerator[RequestOutput, None]]
    """vLLM's own `generate`, for one plain request."""
    check: Callable[..., SamplingParams]
    """vLLM's own checks of a request; returns its parameters, with the model's end tokens added."""
    tokenizer: TokenizerLike | None
    max_model_len: int
    """The student's context, in tokens."""
    reserved: ReservedRows
    markers: ReasoningMarkers | None = None
    """Markers of thinking; None if the engine knows none."""
    ranks: int = 1
    """Data-parallel copies of the student, each with a prefix cache of its own."""
    constrain: Callable[..., Constraint | None] = _unconstrained
    """Makes the constraint of a completion, as `Grammars.constrain`."""

    def rank(self, affinity: bytes) -> int | None:
        """The copy that writes all segments of a prompt, so that it finds their prefix in its cache."""
        return int.from_bytes(affinity[:8]) % self.ranks if self.ranks > 1 else None

    async def segment(self, choice: Choice, terms: Terms) -> AsyncGenerator[Piece, None]:
        """Continue a choice's prefix by one segment of the student, in pieces."""
        options = self._options(choice)
        options["priority"] -= choice.begun
        params = self._params(choice, terms)
        if choice.constraint is not None and (choice.completion or choice.report.calls):
            await choice.constraint.catch_up(choice.completion.token_ids)
        if choice.constraint is not None and choice.completion:
            continuation = choice.constraint.continuation(len(choice.student_prompt))
            params.extra_args = {**(params.extra_args or {}), **continuation.extra_args}
            options |= continuation.options
        outputs = self.generate(
            {**choice.prompt, "prompt_token_ids": choice.student_prompt + choice.completion.token_ids},
            params,
            f"{choice.request_id}-{len(choice.completion)}-{choice.report.calls}",
            **options,
        )
        read = False
        async with aclosing(outputs):
            async for output in outputs:
                if not read:
                    choice.student_reads(output.num_cached_tokens)
                    read = True
                yield self._piece(output)

    async def read_prompt(self, choice: Choice) -> Any:
        """The `prompt_logprobs` of a choice's prompt, from a separate request whose one token is dropped.

        After it, the student's cache has the prompt, whichever model writes first.
        """
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=choice.params.prompt_logprobs,
            detokenize=choice.params.detokenize,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = dict(choice.prompt)
        outputs = self.generate(prompt, params, f"{choice.request_id}-prompt", **self._options(choice))
        async with aclosing(outputs):
            async for output in outputs:
                choice.student_reads(output.num_cached_tokens)
                return output.prompt_logprobs
        raise RuntimeError("the student's engine ended a request without an output")

    def _options(self, choice: Choice) -> dict[str, Any]:
        options = dict(choice.options)
        if options.get("data_parallel_rank") is None:
            options["data_parallel_rank"] = self.rank(choice.affinity)
        return options

    def _piece(self, output: RequestOutput) -> Piece:
        (new,) = output.outputs
        if new.token_ids and new.token_ids[-1] >= self.reserved.escalation:
            level = new.token_ids[-1] - self.reserved.escalation
            return Piece(new.token_ids[:-1], new.logprobs, asks=True, level=level)
        return Piece(new.token_ids, new.logprobs, new.finish_reason, new.stop_reason)

    def _params(self, choice: Choice, terms: Terms) -> SamplingParams:
        params = copy.copy(choice.segment_params)
        params.max_tokens = choice.segment_tokens
        # vLLM masks end tokens before the gate runs, so the student may still ask.
        params.min_tokens = min(choice.min_tokens, params.max_tokens)
        params.seed = choice.seed
        if choice.params.min_tokens:
            terms = replace(terms, dearer=(), least=())  # see `Cooperator._segment_params`
        written = written_args(params, len(choice.completion))
        params.extra_args = {**(params.extra_args or {}), **terms_args(terms), **written}
        return params
