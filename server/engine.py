"""The student's engine, which asks the teacher where its gate says so."""

import copy
import logging
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from http import HTTPStatus
from typing import Any, Literal

from router.budget import Bucket, Budget, Grant
from router.ledger import Denial
from router.policy import NEVER, Policy, Terms
from router.reserved import ReservedRows
from server.completion import Completion, Piece
from server.exchange import EXCHANGE, Exchange, Report, Source
from server.gate_processor import TERMS, terms_args
from server.limits import check_reserved_rows, unsupported
from server.metrics import ESCALATIONS, counted
from server.shared import Draw, Share, SharedBudgets
from server.teacher.call import Call
from server.teacher.client import TeacherError
from server.teacher.pool import Slot, TeacherPool
from server.tenants import OverMaximum
from server.vllm_api import (
    AsyncLLM,
    CompletionOutput,
    GracefulHTTPError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    VLLMValidationError,
    merge_async_iterators,
)

logger = logging.getLogger(__name__)

LEASE_TOKENS = 64
"""Most that is reserved at a time under a shared limit, also for a request that may have all of it."""
PAUSE_TOKENS = 32
"""Where a shared limit refuses a span, the choice does not ask again for so many tokens."""
PRIORITIES = 2**60
"""Priorities beyond this are taken for it: twice as much is still an int64."""


@dataclass(frozen=True)
class Cooperation:
    """All that the engine needs to work with a teacher."""

    teacher: TeacherPool
    policy: Policy
    reserved: ReservedRows
    span_tokens: int
    default_budget: Budget
    shared: SharedBudgets
    on_teacher_error: Literal["degrade", "error"] = "degrade"
    ask_tokens: int | None = None
    write_ahead: int = 0
    """Tokens that a teacher call may write beyond what was asked for, in case the student asks on there."""
    client_priority: bool = False
    """Whether a request may bring a priority of its own."""


@dataclass(frozen=True)
class Span:
    """What was reserved for a span: in the request's own budget, in the shared ones, at the teacher."""

    grant: Grant
    draw: Draw
    room: int
    """Tokens that the completion and the teacher's context have left."""
    slot: Slot | None
    """None: the call at hand writes on."""


@dataclass
class Choice:
    """One completion being written, with what its span loop needs."""

    prompt: dict[str, Any]
    """vLLM's rendered prompt, of type "token"."""
    params: SamplingParams
    """The caller's, for this choice alone."""
    segment_params: SamplingParams
    """What every student segment has in common."""
    request_id: str
    external_id: str
    """The caller's request id, shared by all choices of a request."""
    affinity: bytes
    """What the teacher's replicas are ranked by: the same for the same prompt."""
    options: dict[str, Any]
    """Further arguments of `AsyncLLM.generate`, passed on to every student segment."""
    completion: Completion
    bucket: Bucket
    share: Share
    call: Call | None = None
    """The last teacher call; it stands right behind the completion while it has something left."""
    may_ask: bool = True
    ask_from: int = 0
    """Length of the completion from which it may ask again."""
    cached_tokens: int | None = None

    @property
    def report(self) -> Report:
        return self.completion.report

    @property
    def student_tokens(self) -> int:
        return len(self.completion) - self.report.tokens

    @property
    def prefix(self) -> list[int]:
        """Prompt and completion so far, as token ids; no trace of an escalation is in it."""
        return self.prompt["prompt_token_ids"] + self.completion.token_ids

    @property
    def seed(self) -> int | None:
        """Seed of the next segment: another at every length, or each would draw the same numbers."""
        if self.params.seed is None:
            return None
        return (self.params.seed + len(self.completion) * 0x9E3779B1) % 2**63

    @property
    def logit_bias(self) -> dict[int, float] | None:
        """The caller's, and what `frequency_penalty` takes off for the tokens that are written.

        A continuation counts its own tokens only. vLLM adds the bias and subtracts the penalty one after the
        other, so together they are what one model would subtract at the end.
        """
        if not self.params.frequency_penalty:
            return self.params.logit_bias
        bias = dict(self.params.logit_bias or {})
        for token_id, times in Counter(self.completion.token_ids).items():
            bias[token_id] = bias.get(token_id, 0.0) - self.params.frequency_penalty * times
        return bias

    @property
    def open_call(self) -> Call | None:
        """The call that can write on where the completion stands."""
        return self.call if self.call is not None and self.call.left else None

    def drop_call(self) -> None:
        """The student writes on: what the teacher wrote ahead does not fit any more."""
        if self.call is not None:
            self.call.drop()
            self.call = None

    def deny(self, reason: str, *, degraded: bool) -> None:
        """The student writes the rest alone."""
        self.may_ask = False
        self._denied(reason, degraded=degraded)

    def put_off(self, reason: str, *, degraded: bool) -> None:
        """The student writes on alone for a while: what others share may have room again."""
        self.ask_from = len(self.completion) + PAUSE_TOKENS
        self._denied(reason, degraded=degraded)

    def _denied(self, reason: str, *, degraded: bool) -> None:
        self.report.denied[reason] += 1
        self.report.degraded |= degraded
        ESCALATIONS.labels("denied", reason).inc()


class CooperativeEngine(AsyncLLM):
    """vLLM's engine for the student, whose `generate` lets two models write one completion.

    Set ``cooperation`` before the first request. With nothing to spend, a request is one plain
    request to the student.
    """

    cooperation: Cooperation

    async def _write(self, choice: Choice) -> AsyncIterator[Source]:
        """The span loop. Writes one completion to its end; yields who wrote something new."""
        completion = choice.completion
        try:
            while not completion.finished:
                terms, asked = self._terms(choice), False
                if not terms.always:
                    async with aclosing(self._student(choice, terms)) as segment:
                        async for piece in segment:
                            asked = piece.asks
                            completion.extend(piece, "student")
                            if piece.token_ids or completion.finished:
                                choice.drop_call()
                                yield "student"
                if completion.finished or not (asked or terms.always):
                    continue
                span, used = await self._reserve(choice), 0
                if span is None:
                    continue
                try:
                    async with aclosing(self._teacher(choice, span)) as pieces:
                        async for piece in pieces:
                            used += len(piece.token_ids)
                            completion.extend(piece, "teacher")
                            yield "teacher"
                            if completion.finished:  # by a stop string: the teacher would write on
                                break
                except TeacherError as error:
                    logger.warning("request %s lost the teacher: %s", choice.request_id, error)
                    self._lose_teacher(choice, error)
                finally:
                    choice.bucket.settle(span.grant, used)
                    choice.share.settle(used)
        finally:
            if choice.call is not None:
                await choice.call.close()

    def _terms(self, choice: Choice) -> Terms:
        """On which terms the student may ask in its next segment."""
        if not choice.may_ask:
            return NEVER
        completion = choice.completion
        terms = self.cooperation.policy.terms(
            choice.bucket,
            len(completion),
            completion.max_tokens,
            ceiling=choice.share.rate,
            pause=choice.ask_from - len(completion),
        )
        if not terms.never and self.cooperation.teacher.down:
            self._lose_teacher(choice, TeacherError("breaker", "it counts as down"))
            return NEVER
        return terms

    async def _student(self, choice: Choice, terms: Terms) -> AsyncIterator[Piece]:
        """One segment of the student, in pieces."""
        escalation = self.cooperation.reserved.escalation
        segment = super().generate(
            {**choice.prompt, "prompt_token_ids": choice.prefix},
            self._segment_params(choice, terms),
            f"{choice.request_id}-{len(choice.completion)}-{choice.report.calls}",
            **{**choice.options, "priority": choice.options["priority"] - (len(choice.completion) > 0)},
        )
        async with aclosing(segment) as outputs:
            async for output in outputs:
                if choice.cached_tokens is None:
                    choice.cached_tokens = output.num_cached_tokens
                (new,) = output.outputs
                if new.token_ids and new.token_ids[-1] == escalation:
                    yield Piece(new.token_ids[:-1], new.logprobs, asks=True)
                else:
                    yield Piece(new.token_ids, new.logprobs, new.finish_reason, new.stop_reason)
                if choice.completion.finished:  # by a stop string, of which the engine knows nothing
                    return

    def _segment_params(self, choice: Choice, terms: Terms) -> SamplingParams:
        params = copy.copy(choice.segment_params)
        params.max_tokens = choice.completion.tokens_left
        params.seed = choice.seed
        params.logit_bias = choice.logit_bias
        params.extra_args = {**(params.extra_args or {}), **terms_args(terms)}
        owed = choice.params.min_tokens - len(choice.completion)
        if owed > 0:
            # vLLM's own min_tokens would also hold back the escalation token.
            params.max_tokens = min(params.max_tokens, owed)
            params.logit_bias = {**(params.logit_bias or {}), **dict.fromkeys(self._ends(params), -100.0)}
        return params

    def _ends(self, params: SamplingParams) -> list[int]:
        """Token ids that end a completion."""
        eos = [] if params.ignore_eos else self._eos_token_ids
        return [*eos, *(params.stop_token_ids or ())]

    @cached_property
    def _eos_token_ids(self) -> list[int]:
        configured = self.model_config.try_get_generation_config().get("eos_token_id")
        configured = configured if isinstance(configured, list) else [configured]
        return [i for i in {self.renderer.tokenizer.eos_token_id, *configured} if i is not None]

    async def _reserve(self, choice: Choice) -> Span | None:
        """Reserve the next span in every budget, or let the choice ask later, or never again."""
        teacher, completion = self.cooperation.teacher, choice.completion
        room = completion.tokens_left
        if teacher.max_model_len is not None:
            room = min(room, teacher.max_model_len - len(choice.prompt["prompt_token_ids"]) - len(completion))
        if room < 1:
            choice.deny("context", degraded=False)
            return None
        at_most, open_call = room, choice.open_call
        if choice.share.scopes:  # what one holds, no other can have
            at_most = min(room, LEASE_TOKENS if choice.share.rate >= 1.0 else self.cooperation.span_tokens)
        if open_call is not None:
            at_most = min(at_most, open_call.left)
        grant = choice.bucket.reserve(len(completion), at_most, calls=int(open_call is None))
        if grant is None:
            choice.deny("budget", degraded=False)
            return None
        ahead = min(room, self.cooperation.span_tokens)
        draw = await choice.share.reserve(grant.tokens, choice.student_tokens, ahead=ahead)
        if isinstance(draw, Denial):
            choice.bucket.cancel(grant)
            choice.put_off(draw.label, degraded=draw.reason == "unavailable")
            return None
        slot = None
        if open_call is None:
            try:
                slot = await teacher.admit(choice.affinity)  # last: it may be a breaker's only trial
            except BaseException as error:
                choice.bucket.cancel(grant)
                choice.share.settle(0)
                if not isinstance(error, TeacherError):
                    raise
                self._lose_teacher(choice, error)
                return None
        ESCALATIONS.labels("granted", "gate").inc()
        return Span(grant, draw, room, slot)

    def _teacher(self, choice: Choice, span: Span) -> AsyncIterator[Piece]:
        """One span of the teacher, in pieces: of a new call, or of the one at hand."""
        if span.slot is not None:
            choice.report.calls += 1
            choice.report.spans.append([len(choice.completion)] * 2)  # grows as the teacher writes
            ahead = self._ahead(choice, span)
            tokens = span.draw.tokens + ahead
            params = copy.copy(choice.params)
            params.logit_bias = choice.logit_bias
            pieces = self.cooperation.teacher.write(
                span.slot,
                choice.prefix,
                tokens,
                params,
                min_tokens=max(0, choice.params.min_tokens - len(choice.completion)),
                seed=choice.seed,
                stream=ahead > 0,  # what was asked for is not to wait for what was not
                request_id=f"{choice.request_id}-{choice.report.calls}",
                deadline=span.draw.deadline,
            )
            choice.call = Call(pieces, span.slot, tokens)
        return choice.call.take(span.draw.tokens)

    def _ahead(self, choice: Choice, span: Span) -> int:
        """Tokens that the teacher may write beyond a span: where the student could ask again behind it."""
        earliest, end = choice.bucket.earliest(), len(choice.completion) + span.draw.tokens
        if earliest is None or earliest > end:
            return 0
        return min(self.cooperation.write_ahead, span.room - span.draw.tokens)

    def _lose_teacher(self, choice: Choice, error: TeacherError) -> None:
        if self.cooperation.on_teacher_error == "error":
            raise GracefulHTTPError(f"the teacher failed: {error}", HTTPStatus.BAD_GATEWAY) from error
        if error.reason == "saturated":
            choice.put_off(error.reason, degraded=True)
        else:
            choice.deny(error.reason, degraded=True)

    # From here on: vLLM's `generate` around the loop.

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; the budget and the reports travel in the context's `Exchange`.

        Raises:
            VLLMValidationError: a parameter cannot be honoured with a budget above 0, or names a
                reserved row.
        """
        check_reserved_rows(prompt, sampling_params, self.cooperation.reserved)
        if TERMS & (sampling_params.extra_args or {}).keys():
            raise VLLMValidationError("the terms of asking are the router's", parameter="vllm_xargs")
        options["priority"] = self._priority(options.get("priority", 0))
        exchange = EXCHANGE.get(None) or Exchange()
        reports = [exchange.open() for _ in range(sampling_params.n)]
        budget = self._budget(exchange, prompt, sampling_params, options)
        shared, tenant = self.cooperation.shared, exchange.tenant
        if budget.is_zero:
            outputs = super().generate(prompt, sampling_params, request_id, **options)
            return self._plain(outputs, sampling_params, reports, shared.share(tenant))
        self._verify(sampling_params)
        choices = [
            self._choice(
                i, report, budget, shared.share(tenant), prompt, sampling_params, request_id, options
            )
            for i, report in enumerate(reports)
        ]
        return self._hand_out(choices, exchange)

    def _verify(self, params: SamplingParams) -> None:
        """vLLM's own checks of what the caller asks for: of a segment they see other parameters.

        Raises:
            VLLMValidationError: as vLLM's.
        """
        config = self.vllm_config
        tokenizer = self.renderer.tokenizer
        params.verify(
            config.model_config, config.speculative_config, config.structured_outputs_config, tokenizer
        )

    def _priority(self, wanted: int) -> int:
        """vLLM's priority (a smaller one goes first) of a new request; one less is left to continuations.

        So a completion that a call interrupts does not wait again behind requests that have not begun.
        """
        if wanted and not self.cooperation.client_priority:
            raise VLLMValidationError(
                "priority is not for requests to choose, unless the gateway runs with vLLM's "
                "--scheduling-policy priority",
                parameter="priority",
            )
        return 2 * max(-PRIORITIES, min(wanted, PRIORITIES)) + 1

    def _budget(
        self, exchange: Exchange, prompt: Any, params: SamplingParams, options: dict[str, Any]
    ) -> Budget:
        """The request's budget, or the default one where it names none and can be honoured."""
        budget = exchange.budget or self.cooperation.default_budget
        if exchange.tenant is not None:
            try:
                budget, clamped = exchange.tenant.resolve(exchange.budget, self.cooperation.default_budget)
            except OverMaximum as error:
                raise VLLMValidationError(str(error), parameter="teacher_budget") from error
            for report in exchange.reports:
                report.clamped = clamped
        if budget.is_zero:
            return budget
        parameter = exchange.unsupported or unsupported(prompt, params, options)
        if parameter is None:
            return budget
        if exchange.budget is None:
            return Budget(tokens=0)
        raise VLLMValidationError(
            f"{parameter} cannot be honoured with a teacher_budget above 0", parameter=parameter
        )

    def _choice(
        self,
        index: int,
        report: Report,
        budget: Budget,
        share: Share,
        prompt: dict[str, Any],
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> Choice:
        prompt_ids, reserved = prompt["prompt_token_ids"], self.cooperation.reserved
        params = params.clone()
        params.n = 1
        # A context that is full ends a completion as max_tokens does.
        room = max(1, self.model_config.max_model_len - len(prompt_ids))
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.seed is not None:
            params.seed += index  # as vLLM seeds its choices
        segment = params.clone()
        segment.stop, segment.detokenize, segment.min_tokens, segment.skip_clone = [], False, 0, True
        segment.stop_token_ids = [*(params.stop_token_ids or ()), reserved.escalation]
        if params.allowed_token_ids is not None:
            # The gate reads the reserved rows, and masks them afterwards.
            segment.allowed_token_ids = [*params.allowed_token_ids, *range(reserved.start, reserved.end)]
        final_only = params.output_kind == RequestOutputKind.FINAL_ONLY and not params.stop
        segment.output_kind = RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.DELTA
        return Choice(
            prompt=prompt,
            params=params,
            segment_params=segment,
            request_id=f"{request_id}-{index}",
            external_id=request_id,
            affinity=blake2b(array("I", prompt_ids).tobytes(), digest_size=16).digest(),
            options=options,
            completion=Completion(self.renderer.tokenizer, prompt_ids, params, index, report),
            bucket=Bucket(budget, self.cooperation.span_tokens, self.cooperation.ask_tokens),
            share=share,
        )

    async def _plain(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        params: SamplingParams,
        reports: list[Report],
        share: Share,
    ) -> AsyncGenerator[RequestOutput, None]:
        """A request with nothing to spend: the student's own outputs, counted."""
        delta = params.output_kind == RequestOutputKind.DELTA
        try:
            with counted(reports, budgeted=False, refusal=VLLMValidationError):
                async with aclosing(outputs):
                    async for output in outputs:
                        for new in output.outputs:
                            report = reports[new.index]
                            report.completion_tokens = len(new.token_ids) + delta * report.completion_tokens
                            report.finished = new.finish_reason is not None
                        yield output
        finally:
            share.close(sum(report.completion_tokens for report in reports))

    async def _hand_out(
        self, choices: list[Choice], exchange: Exchange
    ) -> AsyncGenerator[RequestOutput, None]:
        """Cooperative completions as vLLM's outputs, in the kind that the caller wants."""
        final: list[CompletionOutput] = []
        async with aclosing(merge_async_iterators(*map(self._outputs, choices))) as steps:
            async for index, (output, source) in steps:
                choice = choices[index]
                exchange.hand_out(choice.report, source, finished=output.finish_reason is not None)
                if choice.params.output_kind == RequestOutputKind.FINAL_ONLY:
                    final.append(output)
                    if len(final) == len(choices):
                        yield self._request_output(choices, sorted(final, key=lambda output: output.index))
                else:
                    yield self._request_output(choices, [output])

    async def _outputs(self, choice: Choice) -> AsyncGenerator[tuple[CompletionOutput, Source], None]:
        final_only = choice.params.output_kind == RequestOutputKind.FINAL_ONLY
        try:
            with counted([choice.report], budgeted=True, refusal=VLLMValidationError):
                async with aclosing(self._write(choice)) as steps:
                    async for source in steps:
                        if not final_only or choice.completion.finished:
                            yield choice.completion.output(), source
        finally:
            choice.share.close(choice.student_tokens)

    @staticmethod
    def _request_output(choices: list[Choice], outputs: list[CompletionOutput]) -> RequestOutput:
        first = choices[0]
        return RequestOutput(
            request_id=first.external_id,
            prompt=first.prompt.get("prompt"),
            prompt_token_ids=first.prompt["prompt_token_ids"],
            prompt_logprobs=None,
            outputs=outputs,
            finished=all(choice.report.finished for choice in choices),
            num_cached_tokens=first.cached_tokens,
        )
