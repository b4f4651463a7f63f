"""vLLM's `generate` for two models that write one completion: from a request to its choices, and back."""

import asyncio
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from hashlib import blake2b
from typing import Any

from server.choice import Choice, Step
from server.completion import Completion
from server.cooperation import Cooperation
from server.engine_limits import check_engine_limits
from server.exchange import EXCHANGE, Exchange, Purse, Report
from server.gate_processor import TERMS
from server.metrics import counted
from server.parameters import check_reserved_rows
from server.single_tokens import SingleTokens
from server.span_loop import SpanLoop
from server.student import StudentEngine
from server.teacher.teachers import NamedTeacher
from server.tenants import Tenant
from server.thinking import Thinking
from server.vllm_api import (
    CompletionOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    VLLMValidationError,
    merge_async_iterators,
)
from server.words import say_budget

PRIORITIES = 2**60
"""Client priorities are clamped to ± this, so doubling them fits an int64."""


class Cooperator:
    """vLLM's `generate` around the span loop. With a budget of 0, a request is one plain request to vLLM."""

    def __init__(self, student: StudentEngine, cooperation: Cooperation) -> None:
        self._student = student
        self._cooperation = cooperation
        self._loop = SpanLoop(
            student.segment,
            cooperation.policy,
            cooperation.shared,
            cooperation.span_tokens,
            cooperation.on_teacher_error,
        )

    @property
    def cooperation(self) -> Cooperation:
        """Settings by which student and teacher write together."""
        return self._cooperation

    @cooperation.setter
    def cooperation(self, cooperation: Cooperation) -> None:
        """Change it. A new policy also applies to running completions, from their next segment on."""
        self._cooperation = cooperation
        self._loop.policy = cooperation.policy
        self._loop.span_tokens = cooperation.span_tokens

    def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; the budget and the reports are in the context's `Exchange`.

        Raises:
            VLLMValidationError: a parameter cannot be used with a budget above 0, or names a
                reserved row.
        """
        exchange = EXCHANGE.get(None) or Exchange()
        with exchange.noting_failure():
            reserved = self._cooperation.reserved
            check_reserved_rows(prompt, params, reserved, exchange.names)
            check_engine_limits(prompt, params, reserved, self._student.tokenizer, exchange.names)
            if TERMS & (params.extra_args or {}).keys():
                raise VLLMValidationError(
                    "vllm_xargs: names that begin with wheels_ are the router's own", parameter="vllm_xargs"
                )
            options["priority"] = self._priority(options.get("priority", 0))
            if exchange.searches:
                return self._search_step(exchange, prompt, params, request_id, options)
            return self._complete(exchange, prompt, params, request_id, options)

    def _complete(
        self,
        exchange: Exchange,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        reports = [self._open(exchange, prompt) for _ in range(params.n)]
        budget = self._cooperation.budget(exchange, prompt, params)
        if budget.is_zero:
            outputs = self._student.generate(prompt, params, request_id, **options)
            if self._parsed(params):
                outputs = self._split(outputs, prompt, params)
            return self._plain(outputs, params, reports, exchange)
        # vLLM's checks come before any teacher call. They add the ids that end the student's completions.
        params = self._student.check(prompt, params, request_id, **options)
        teachers = self._cooperation.teachers_for(budget, exchange.original(prompt), params)
        choices = []
        for index, report in enumerate(reports):
            completion = self._completion(prompt, params, index, report)
            purse = exchange.purse(index, self._cooperation.purse(budget, teachers))
            choices.append(self._choice(completion, purse, exchange, prompt, request_id, options))
        return self._hand_out(choices, teachers, exchange, request_id)

    def _open(self, exchange: Exchange, prompt: Any) -> Report:
        report = exchange.open()
        report.named = self._cooperation.teachers.have_names
        report.sheet.prices = self._cooperation.prices
        report.sheet.prompt_tokens = len(_ids(prompt) or ())
        return report

    def _search_step(
        self,
        exchange: Exchange,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        """One step of a beam search, for one beam. Tokens are counted only for the choices at its end."""
        self._cooperation.budget(exchange, prompt, params)
        exchange.searched = partial(self._count_search, exchange.tenant)
        return self._student.generate(prompt, params, request_id, **options)

    def _count_search(self, tenant: Tenant | None, reports: list[Report]) -> None:
        with counted(reports, budgeted=False, refusal=VLLMValidationError):
            tokens = sum(report.completion_tokens for report in reports)
        self._cooperation.shared.share(tenant).close(tokens)

    def _priority(self, wanted: int) -> int:
        """Priority of a new request in vLLM (a smaller one goes first); its continuations have one less.

        So after a teacher call, a completion does not wait again for requests that have not begun.
        """
        if wanted and not self._cooperation.client_priority:
            raise VLLMValidationError(
                "a request may set priority only if the gateway runs with vLLM's "
                "--scheduling-policy priority",
                parameter="priority",
            )
        return 2 * max(-PRIORITIES, min(wanted, PRIORITIES)) + 1

    def _completion(
        self, prompt: dict[str, Any], params: SamplingParams, index: int, report: Report
    ) -> Completion:
        """An empty completion, with the parameters of this choice alone."""
        prompt_ids = prompt["prompt_token_ids"]
        params = params.clone()
        params.n = 1
        # A full context ends a completion as max_tokens does.
        room = max(1, self._student.max_model_len - len(prompt_ids))
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.seed is not None:
            params.seed += index  # as vLLM seeds its choices
        return Completion(self._student.tokenizer, prompt_ids, params, index, report)

    def _choice(
        self,
        completion: Completion,
        purse: Purse,
        exchange: Exchange,
        prompt: dict[str, Any],
        request_id: str,
        options: dict[str, Any],
    ) -> Choice:
        digest = blake2b(array("I", prompt["prompt_token_ids"]).tobytes(), digest_size=16)
        choice_id = f"{request_id}-{completion.index}"
        return Choice(
            prompt=prompt,
            segment_params=self._segment_params(completion.params),
            request_id=choice_id,
            affinity=digest.digest(),
            options=options,
            completion=completion,
            purse=purse,
            tenant=exchange.tenant,
            session=exchange.session,
            single_tokens=self._parsed(completion.params),
            thinking=self._thinking(completion.params, prompt["prompt_token_ids"]),
            original=exchange.original(prompt),
            constraint=self._student.constrain(
                choice_id, prompt["prompt_token_ids"], completion.params, options
            ),
        )

    def _thinking(self, params: SamplingParams, prompt_ids: list[int]) -> Thinking | None:
        budget = params.thinking_token_budget
        if budget is None or self._student.markers is None:
            return None
        return Thinking(self._student.markers, budget).after(prompt_ids)

    def _segment_params(self, params: SamplingParams) -> SamplingParams:
        reserved = self._cooperation.reserved
        segment = params.clone()
        segment.stop = []
        segment.detokenize = False
        segment.skip_clone = True
        segment.prompt_logprobs = None  # the prompt is read once, see `StudentEngine.read_prompt`
        segment.skip_reading_prefix_cache = False
        # With `min_tokens`, vLLM masks stop tokens before the gate reads the logits. The rows after the first
        # are also taps, which the gate has to read.
        levels = 1 if params.min_tokens else max(1, len(self._cooperation.teachers.models))
        asks = range(reserved.escalation, reserved.escalation + levels)
        segment.stop_token_ids = [*(params.stop_token_ids or ()), *asks]
        if params.allowed_token_ids is not None:
            # The gate reads the reserved rows, and masks them afterwards.
            segment.allowed_token_ids = [*params.allowed_token_ids, *range(reserved.start, reserved.end)]
        final_only = params.output_kind == RequestOutputKind.FINAL_ONLY and not params.stop
        segment.output_kind = RequestOutputKind.FINAL_ONLY if final_only else RequestOutputKind.DELTA
        return segment

    def _parsed(self, params: SamplingParams) -> bool:
        """Whether a parser may read the stream of outputs, which then have one token each."""
        return self._cooperation.parsers and params.output_kind == RequestOutputKind.DELTA

    async def _split(
        self, outputs: AsyncGenerator[RequestOutput, None], prompt: Any, params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        single_tokens = SingleTokens(self._student.tokenizer, _ids(prompt), params)
        async with aclosing(outputs):
            async for output in outputs:
                for single in single_tokens.split(output):
                    yield single

    async def _plain(
        self,
        outputs: AsyncGenerator[RequestOutput, None],
        params: SamplingParams,
        reports: list[Report],
        exchange: Exchange,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The student's own outputs for a request with a budget of 0; counts their tokens."""
        delta = params.output_kind == RequestOutputKind.DELTA
        share = self._cooperation.shared.share(exchange.tenant)
        try:
            with exchange.noting_failure(), counted(reports, budgeted=False, refusal=VLLMValidationError):
                async with aclosing(outputs):
                    async for output in outputs:
                        for new in output.outputs:
                            report = reports[new.index]
                            if report.sheet.prompt_cached is None:
                                report.sheet.student_reads(
                                    report.sheet.prompt_tokens, output.num_cached_tokens or 0
                                )
                            report.completion_tokens = len(new.token_ids) + delta * report.completion_tokens
                            report.finished = new.finish_reason is not None
                        yield output
        finally:
            share.close(sum(report.completion_tokens for report in reports))

    async def _hand_out(
        self,
        choices: list[Choice],
        teachers: Sequence[NamedTeacher],
        exchange: Exchange,
        request_id: str,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The completions of two models as vLLM's outputs, in the kind that the caller wants."""
        final: list[CompletionOutput] = []
        reading = self._reading(choices[0])
        written = [self._written(choice, teachers, exchange, reading) for choice in choices]
        unread = {choice.completion.index for choice in choices}
        async with aclosing(merge_async_iterators(*written)) as steps:
            async for index, (output, source) in steps:
                choice = choices[index]
                exchange.hand_out(choice.report, source, finished=output.finish_reason is not None)
                outputs = [output]
                if choice.params.output_kind == RequestOutputKind.FINAL_ONLY:
                    final.append(output)
                    outputs = sorted(final, key=lambda output: output.index)
                    if len(final) < len(choices):
                        continue
                request_output = _request_output(choices, outputs, request_id)
                first = index in unread or choice.params.output_kind != RequestOutputKind.DELTA
                if reading is not None and first:
                    request_output.prompt_logprobs = reading.result()
                unread.discard(index)
                yield request_output

    def _reading(self, choice: Choice) -> asyncio.Task[Any] | None:
        """A task that reads the choices' common prompt, if its log-probabilities are wanted; else None."""
        if choice.params.prompt_logprobs is None:
            return None
        return asyncio.create_task(self._student.read_prompt(choice))

    async def _written(
        self,
        choice: Choice,
        teachers: Sequence[NamedTeacher],
        exchange: Exchange,
        reading: asyncio.Task[Any] | None,
    ) -> AsyncGenerator[Step, None]:
        """The steps that the span loop writes after the prompt is read; the reader may be slow, or leave."""
        writing = asyncio.create_task(self._write(choice, teachers, reading))
        writing.add_done_callback(lambda _: choice.steps.put_nowait(None))
        with exchange.noting_failure(), counted([choice.report], budgeted=True, refusal=VLLMValidationError):
            try:
                while (step := await choice.steps.get()) is not None:
                    yield step
                await writing
                as_is = choice.adapter is None and not _used_tool(choice, teachers)
                if self._cooperation.recorder is not None and as_is:
                    self._cooperation.recorder.note(choice)  # a router learns from the two models alone
            finally:  # and counted only after the last token is written
                writing.cancel()
                await asyncio.wait([writing])
                choice.purse.close(len(choice.completion))

    async def _write(
        self, choice: Choice, teachers: Sequence[NamedTeacher], reading: asyncio.Task[Any] | None
    ) -> None:
        if reading is not None:
            await reading
        if (words := self._cooperation.words) is not None:
            await say_budget(choice, words, self._cooperation.policy, self._student.max_model_len)
        await self._loop.write(choice, teachers)


def _ids(prompt: Any) -> list[int] | None:
    """Token ids of a prompt that vLLM has rendered; None if it has none."""
    return prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None


def _used_tool(choice: Choice, teachers: Sequence[NamedTeacher]) -> bool:
    """Whether a tool wrote a part of a choice."""
    return any(teacher.is_tool and teacher.name in choice.report.parts for teacher in teachers)


def _request_output(choices: list[Choice], outputs: list[CompletionOutput], request_id: str) -> RequestOutput:
    first = choices[0]
    return RequestOutput(
        request_id=request_id,
        prompt=first.prompt.get("prompt"),
        prompt_token_ids=first.prompt_ids,
        prompt_logprobs=None,
        outputs=outputs,
        finished=all(choice.report.finished for choice in choices),
        num_cached_tokens=first.cached_tokens,
    )
