"""vLLM's engine for the student, whose `generate` lets two models write one completion."""

import asyncio
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

from router.budget import Bucket, Budget
from router.money import FREE, PriceList
from router.policy import Policy
from router.reserved import ReservedRows
from router.words import BudgetWords
from server.choice import Choice, Step
from server.completion import Completion
from server.engine_limits import check_engine_limits
from server.exchange import EXCHANGE, NO_PRICES, Exchange, Purse, Report
from server.gate_processor import TERMS, visible_rows_of
from server.grammar.constraint import Grammars
from server.metrics import counted
from server.original_prompt import OriginalPrompt
from server.parameters import check_reserved_rows, unsupported
from server.recorder import Recorder
from server.shared_budgets import SharedBudgets
from server.single_tokens import SingleTokens
from server.span_loop import SpanLoop
from server.student import StudentEngine
from server.teacher.teachers import NamedTeacher, Teachers
from server.tenants import BudgetRefused, Tenant
from server.thinking import Thinking
from server.vllm_api import (
    AsyncLLM,
    CompletionOutput,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    VLLMValidationError,
    data_parallel_ranks,
    merge_async_iterators,
    reasoning_markers,
)
from server.whole_vocabulary import reports_all, tokens_only
from server.words import say_budget

PRIORITIES = 2**60
"""Client priorities are clamped to ± this, so doubling them fits an int64."""


@dataclass(frozen=True)
class Cooperation:
    """All that the engine needs to work with a teacher."""

    teachers: Teachers
    policy: Policy
    reserved: ReservedRows
    span_tokens: int
    default_budget: Budget
    shared: SharedBudgets
    on_teacher_error: Literal["degrade", "error"] = "degrade"
    ask_tokens: int | None = None
    router: str | None = None
    """Digest of the router in use; None where there is none."""
    models: Mapping[str, Budget] = field(default_factory=dict)
    """Budgets of requests that name one of these models, and no budget."""
    client_priority: bool = False
    """Whether a request may bring a priority of its own."""
    recorder: Recorder | None = None
    """Keeps what both models write."""
    prices: PriceList | None = None
    """What tokens cost; None where nobody has set it."""
    parsers: bool = False
    """Whether vLLM's HTTP layer parses reasoning or tool calls out of what is streamed."""
    words: BudgetWords | None = None
    """Budgets in words, which the student reads."""

    @property
    def wants_originals(self) -> bool:
        """Whether it matters what a prompt was before it was rendered."""
        return self.words is not None or self.teachers.may_translate


class CooperativeEngine(AsyncLLM):
    """vLLM's engine; every request that its HTTP layer makes goes through a `Cooperator`.

    Set ``cooperation`` before the first request.
    """

    _cooperator: "Cooperator | None" = None

    @property
    def cooperation(self) -> Cooperation:
        """How student and teacher write together; AttributeError before it is set."""
        if self._cooperator is None:
            raise AttributeError("cooperation is not set yet")
        return self._cooperator.cooperation

    @cooperation.setter
    def cooperation(self, cooperation: Cooperation) -> None:
        if self._cooperator is None:
            self._cooperator = Cooperator(self._student(cooperation.reserved), cooperation)
        else:
            self._cooperator.cooperation = cooperation

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; see `Cooperator.generate`."""
        if self._cooperator is None:
            raise AttributeError("cooperation is not set yet")
        return self._cooperator.generate(prompt, sampling_params, request_id, **options)

    def _student(self, reserved: ReservedRows) -> StudentEngine:
        def check(prompt: Any, params: SamplingParams, request_id: str, **options: Any) -> SamplingParams:
            request = self.input_processor.process_inputs(
                request_id,
                prompt,
                params,
                supported_tasks=("generate",),
                lora_request=options.get("lora_request"),
                data_parallel_rank=options.get("data_parallel_rank"),
            )
            if request.sampling_params is None:
                raise TypeError("not a request for a completion")
            return request.sampling_params

        plain = super().generate
        visible = visible_rows_of(self.vllm_config.additional_config)

        def generate(
            prompt: Any, params: SamplingParams, request_id: str, **options: Any
        ) -> AsyncGenerator[RequestOutput, None]:
            outputs = plain(prompt, params, request_id, **options)
            return tokens_only(outputs, visible) if reports_all(params) else outputs

        return StudentEngine(
            generate=generate,
            check=check,
            tokenizer=self.renderer.tokenizer,
            max_model_len=self.model_config.max_model_len,
            reserved=reserved,
            markers=reasoning_markers(self.vllm_config),
            ranks=data_parallel_ranks(self.vllm_config.parallel_config),
            constrain=Grammars(self.vllm_config).constrain,
        )


class Cooperator:
    """vLLM's `generate` around the span loop. With nothing to spend, a request is one plain request."""

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
        """How student and teacher write together."""
        return self._cooperation

    @cooperation.setter
    def cooperation(self, cooperation: Cooperation) -> None:
        """Another policy counts for running completions too, from their next segment on."""
        self._cooperation = cooperation
        self._loop.policy = cooperation.policy
        self._loop.span_tokens = cooperation.span_tokens

    def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`; the budget and the reports travel in the context's `Exchange`.

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
        budget = self._budget(exchange, prompt, params)
        if budget.is_zero:
            outputs = self._student.generate(prompt, params, request_id, **options)
            if self._parsed(params):
                outputs = self._split(outputs, prompt, params)
            return self._plain(outputs, params, reports, exchange)
        # Before the teacher is asked for anything; and with the ids that end the student's completions.
        params = self._student.check(prompt, params, request_id, **options)
        teachers = self._teachers(budget, exchange.original(prompt), params)
        choices = []
        for index, report in enumerate(reports):
            completion = self._completion(prompt, params, index, report)
            purse = exchange.purse(index, self._purse(budget, teachers))
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
        """One token of one beam. It is nobody's completion: what the client gets is counted at the end."""
        self._budget(exchange, prompt, params)
        exchange.searched = partial(self._count_search, exchange.tenant)
        return self._student.generate(prompt, params, request_id, **options)

    def _count_search(self, tenant: Tenant | None, reports: list[Report]) -> None:
        with counted(reports, budgeted=False, refusal=VLLMValidationError):
            tokens = sum(report.completion_tokens for report in reports)
        self._cooperation.shared.share(tenant).close(tokens)

    def _priority(self, wanted: int) -> int:
        """Priority of a new request in vLLM (a smaller one goes first); one less is left to continuations.

        So a completion that a call interrupts does not wait again for requests that have not begun.
        """
        if wanted and not self._cooperation.client_priority:
            raise VLLMValidationError(
                "a request may set priority only if the gateway runs with vLLM's "
                "--scheduling-policy priority",
                parameter="priority",
            )
        return 2 * max(-PRIORITIES, min(wanted, PRIORITIES)) + 1

    def _budget(self, exchange: Exchange, prompt: Any, params: SamplingParams) -> Budget:
        """The request's budget, or that of its model or the default one if these can hold."""
        budget = self._allowed(exchange)
        if budget.is_zero:
            return budget
        if exchange.writes_nothing:
            return Budget(tokens=0)
        parameter = exchange.unsupported or unsupported(prompt, params)
        if parameter is None:
            original = exchange.original(prompt)
            obstacles = [teacher.obstacle(original, params) for teacher in self._allowed_by(budget)]
            parameter = obstacles[0] if all(obstacles) else None
        if parameter is None:
            return budget
        if exchange.budget is None:
            return Budget(tokens=0)
        parameter = exchange.names.get(parameter, parameter)
        raise VLLMValidationError(
            f"{parameter} cannot be used with a teacher_budget above 0: leave it out, or set the budget to 0",
            parameter=parameter,
        )

    def _allowed_by(self, budget: Budget) -> list[NamedTeacher]:
        """The teachers that a budget names; all, if it names none."""
        return [
            teacher
            for teacher in self._cooperation.teachers
            if budget.teachers is None or teacher.name in budget.teachers
        ]

    def _teachers(
        self, budget: Budget, original: OriginalPrompt | None, params: SamplingParams
    ) -> list[NamedTeacher]:
        """Of those that the budget allows, the ones that can honour all parameters."""
        allowed = self._allowed_by(budget)
        return [teacher for teacher in allowed if teacher.obstacle(original, params) is None]

    def _allowed(self, exchange: Exchange) -> Budget:
        """What the request asks for, by a budget or by the name of its model, within its tenant's maximum."""
        default = self._cooperation.default_budget
        asked = exchange.budget or self._cooperation.models.get(exchange.model)
        name = exchange.budget_name
        if asked is not None and asked.in_money and self._cooperation.prices is None:
            raise VLLMValidationError(f"{name}.cost: {NO_PRICES}", parameter=name)
        if asked is not None and (stranger := asked.unknown(self._cooperation.teachers.names)) is not None:
            known = ", ".join(self._cooperation.teachers.names)
            problem = f"{name}.teachers: no teacher is named {stranger!r}; there are: {known}"
            raise VLLMValidationError(problem, parameter=name)
        if exchange.tenant is None:
            return asked or default
        try:
            budget, clamped = exchange.tenant.resolve(asked, default)
        except BudgetRefused as error:
            parameter = "model" if exchange.budget is None else exchange.budget_name
            raise VLLMValidationError(str(error), parameter=parameter) from error
        for report in exchange.reports:
            report.clamped = clamped
        return budget

    def _completion(
        self, prompt: dict[str, Any], params: SamplingParams, index: int, report: Report
    ) -> Completion:
        """An empty completion, with the parameters of this choice alone."""
        prompt_ids = prompt["prompt_token_ids"]
        params = params.clone()
        params.n = 1
        # A context that is full ends a completion as max_tokens does.
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

    def _purse(self, budget: Budget, teachers: Sequence[NamedTeacher]) -> Purse:
        """What a request may have of all its teachers, and of each."""
        lengths = (self._cooperation.span_tokens, self._cooperation.ask_tokens)
        models = [
            teacher.prices for teacher in teachers if teacher.prices is not None and not teacher.is_tool
        ]
        dearest = models[-1] if models else FREE
        own: dict[str, Bucket] = {}
        for teacher in teachers:
            bounds = budget.own(teacher.name)
            if bounds is not None:
                own[teacher.name] = Bucket(bounds, *lengths, prices=teacher.prices or FREE)
        least = models[0] if len(models) == len(teachers) else FREE
        return Purse(Bucket(budget, *lengths, prices=dearest, least=least), own)

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
        segment.prompt_logprobs = None  # they are read once, see `StudentEngine.read_prompt`
        segment.skip_reading_prefix_cache = False
        # With `min_tokens`, vLLM masks what ends a completion before the gate reads the rows after the first.
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
        """Whether a parser may read the outputs one after the other: it gets one token at a time."""
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
        """A request with nothing to spend: the student's own outputs, counted."""
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
        """Cooperative completions as vLLM's outputs, in the kind that the caller wants."""
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
        """Reads the prompt, which is that of all choices, if anybody wants its log-probabilities."""
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
        """What the span loop writes after the prompt is read, for a reader that may be slow, or leave."""
        writing = asyncio.create_task(self._write(choice, teachers, reading))
        writing.add_done_callback(lambda _: choice.steps.put_nowait(None))
        with exchange.noting_failure(), counted([choice.report], budgeted=True, refusal=VLLMValidationError):
            try:
                while (step := await choice.steps.get()) is not None:
                    yield step
                await writing
                as_is = choice.adapter is None and not _used_tool(choice, teachers)
                if self._cooperation.recorder is not None and as_is:
                    self._cooperation.recorder.note(choice)  # a router learns from both models as they are
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
    """Whether a part of a choice is a tool's."""
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
