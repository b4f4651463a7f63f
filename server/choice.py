"""One completion being written, with what the span loop needs to know of it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from router.budget import Bucket
from router.money import TokenUsage
from router.policy import Terms
from server.completion import Completion, Piece
from server.exchange import Purse, Report
from server.grammar.constraint import Constraint
from server.metrics import ESCALATIONS
from server.original_prompt import OriginalPrompt
from server.sessions import OpenSession
from server.shared_budgets import Share
from server.sources import STUDENT, Source
from server.standing import PAUSE_TOKENS, Refusal, Standing
from server.teacher.carried import MOST_BIASES, penalises
from server.teacher.teachers import NamedTeacher
from server.tenants import Tenant
from server.thinking import Thinking
from server.vllm_api import CompletionOutput, RequestOutputKind, SamplingParams


class Step(NamedTuple):
    """What the reader of a choice gets next, and who wrote it."""

    output: CompletionOutput
    source: Source


class Written(NamedTuple):
    """Tokens of a completion, or of a stretch of it."""

    teacher_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Choice:
    """One completion of a request.

    The span loop writes it, and whoever reads it takes steps from a queue. So a slow reader holds up
    neither model, and no reservation.
    """

    prompt: Mapping[str, Any]
    """vLLM's rendered prompt, of type "token"."""
    segment_params: SamplingParams
    """What every student segment has in common."""
    request_id: str
    affinity: bytes
    """Ranks the teacher's replicas: the same for the same prompt."""
    options: Mapping[str, Any]
    """Further arguments of `AsyncLLM.generate`, passed on to every student segment."""
    completion: Completion
    purse: Purse
    teachers: Sequence[NamedTeacher]
    """Those that its request may ask."""
    tenant: Tenant | None
    single_tokens: bool
    """Whether its reader gets one token at a time: see `single_tokens`."""
    session: OpenSession | None = None
    """The one that its request names."""
    original: OriginalPrompt | None = None
    """What the prompt was before it was rendered, for a teacher with another vocabulary."""
    constraint: Constraint | None = None
    """Of structured output: what may be written next, whoever writes it."""
    share: Share = field(init=False)
    """Its part in the budgets that requests share; set by the span loop."""
    standings: list[Standing] = field(default_factory=list)
    """With its teachers: tools, then from the cheapest to the dearest; set by the span loop."""
    ranked: list[Standing] = field(default_factory=list)
    """Those that the terms of the last segment were made for, by price."""
    steps: asyncio.Queue[Step | None] = field(default_factory=asyncio.Queue)
    """What the reader has not taken yet; None at the end."""
    told: Written = field(default_factory=Written)
    """What `news` has told so far."""
    thinking: Thinking | None = None
    """What is left of `thinking_token_budget` after prompt and completion."""
    read_by_student: list[int] | None = None
    """The prompt with a budget in words, which the student reads in its place, if it does."""
    cached_tokens: int | None = None
    """Of the first segment's prompt, those that vLLM had in its prefix cache."""

    @property
    def params(self) -> SamplingParams:
        """The caller's, for this choice alone."""
        return self.completion.params

    @property
    def report(self) -> Report:
        """Who wrote this choice, and at what cost."""
        return self.completion.report

    @property
    def finished(self) -> bool:
        """Whether the choice has its last token."""
        return self.completion.finished

    @property
    def bucket(self) -> Bucket:
        """What is left of the request's budget."""
        return self.purse.bucket

    @property
    def length(self) -> int:
        """Tokens that the request's budget is a fraction of."""
        return self.purse.written + len(self.completion)

    @property
    def adapter(self) -> str | None:
        """Name of the LoRA adapter that the student writes it with; None without one."""
        request = self.options.get("lora_request")
        return None if request is None else str(request.lora_name)

    @property
    def begun(self) -> bool:
        """Whether something of it is written, or its prompt is read: it goes before new requests."""
        return len(self.completion) > 0 or self.params.prompt_logprobs is not None

    @property
    def student_tokens(self) -> int:
        """Tokens that the student wrote."""
        return len(self.completion) - self.report.tokens

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        ids: list[int] = self.prompt["prompt_token_ids"]
        return ids

    @property
    def prefix(self) -> list[int]:
        """Prompt and completion so far, as token ids; no trace of an escalation is in it."""
        return self.prompt_ids + self.completion.token_ids

    @property
    def student_prompt(self) -> list[int]:
        """Token ids of the prompt as the student reads it."""
        return self.prompt_ids if self.read_by_student is None else self.read_by_student

    @property
    def prefix_tokens(self) -> int:
        """Length of the prefix: what a model reads before it writes on."""
        return len(self.prompt_ids) + len(self.completion)

    @property
    def call_id(self) -> str:
        """Names the teacher call at hand, for the teacher's log."""
        return f"{self.request_id}-{self.report.calls}"

    @property
    def may_ask(self) -> bool:
        """Whether there is a teacher that it may ask, now or later."""
        return any(standing.may_ask for standing in self.standings)

    @property
    def pause(self) -> int:
        """Tokens to write before it may ask again."""
        ask_from = [standing.ask_from for standing in self.standings if standing.may_ask]
        return max(0, min(ask_from, default=0) - len(self.completion))

    @property
    def models(self) -> list[Standing]:
        """The teachers that are models; the tools, if there are no models."""
        models = [standing for standing in self.standings if not standing.teacher.is_tool]
        return models or self.standings

    @property
    def losses(self) -> int:
        """How often all its teachers were lost since one last wrote something."""
        return min((standing.losses for standing in self.models), default=0)

    @property
    def used_tool(self) -> bool:
        """Whether a part of it is a tool's."""
        tools = {teacher.name for teacher in self.teachers if teacher.is_tool}
        return not tools.isdisjoint(self.report.parts)

    @property
    def lost(self) -> bool:
        """Whether all that it may ask are down."""
        return all(standing.teacher.pool.down for standing in self.standings if standing.may_ask)

    def order(self, level: int, terms: Terms) -> list[Standing]:
        """Whom to ask, one after the other.

        Tools come first. Of the models that the terms were made for, the first is the one that the ``level``
        of the row means, or the dearest if they are to ask always. Then come dearer ones, then cheaper ones.
        """
        tools = [standing for standing in self.standings if standing.teacher.is_tool]
        place = self._place(level, terms)
        ranked = self.ranked[place:] + self.ranked[:place][::-1]
        others = [standing for standing in self.standings if standing not in (*tools, *ranked)]
        length = len(self.completion)
        order = [*tools, *(standing for standing in ranked if standing not in tools), *others]
        return [standing for standing in order if standing.may_ask and standing.ask_from <= length]

    def _place(self, level: int, terms: Terms) -> int:
        """The place in `ranked` of who is meant."""
        last = max(0, len(self.ranked) - 1)
        if terms.always:
            return last
        if not terms.least:
            return min(last, level)
        names = [standing.name for standing in self.ranked]
        name = terms.least[min(level, len(terms.least) - 1)].teacher  # of another router, just before
        return names.index(name) if name in names else 0

    @property
    def reads(self) -> int:
        """The most tokens that a teacher would read now."""
        return max((standing.view.reads for standing in self.standings), default=0)

    @property
    def min_tokens(self) -> int:
        """Tokens still to write before the completion may end."""
        return max(0, self.params.min_tokens - len(self.completion))

    @property
    def end_ids(self) -> list[int]:
        """The student's end token, which ends the teacher's spans too; others are among the stop ids."""
        end = self.params.eos_token_id
        return [] if end is None else [end]

    @property
    def bias_room(self) -> int:
        """Different tokens that may be written until the teacher would get too many biases for them."""
        if not penalises(self.params):
            return self.completion.max_tokens + 1
        return MOST_BIASES - len({*(self.params.logit_bias or ()), *self.completion.token_ids})

    @property
    def thinking_ends(self) -> bool:
        """Whether vLLM writes the end of the thinking next, which it does in the student's segments."""
        return self.thinking is not None and self.thinking.ends

    @property
    def segment_tokens(self) -> int:
        """The most tokens of the student's next segment."""
        left = self.completion.tokens_left
        short = None if self.thinking is None else self.thinking.segment
        return left if short is None else min(left, short)

    @property
    def seed(self) -> int | None:
        """Seed of the next segment: another at every length, or each would draw the same numbers."""
        if self.params.seed is None:
            return None
        return (self.params.seed + len(self.completion) * 0x9E3779B1) % 2**63

    def student_reads(self, cached: int | None) -> None:
        """The student has read the prefix, of which its cache had this many tokens."""
        if self.cached_tokens is None:
            self.cached_tokens = cached
        self.report.sheet.student_reads(len(self.student_prompt) + len(self.completion), cached or 0)

    def news(self) -> Written:
        """What was written since the last call."""
        before = self.told
        self.told = Written(self.report.tokens, len(self.completion))
        return Written(
            self.told.teacher_tokens - before.teacher_tokens,
            self.told.completion_tokens - before.completion_tokens,
        )

    def extend(self, piece: Piece, source: Source) -> int:
        """Append what ``source`` wrote and hand it to the reader; returns how many tokens are kept."""
        if source != STUDENT and self.thinking is not None:
            piece = piece.up_to(self.thinking.room(piece.token_ids))
        start = len(self.completion)
        kept = 0
        for part in piece.singles() if self.single_tokens else (piece,):
            kept += self.completion.extend(part, source)
            streams = self.params.output_kind != RequestOutputKind.FINAL_ONLY
            if self.finished or (streams and part.token_ids):
                self.steps.put_nowait(Step(self.completion.output(), source))
            if self.finished:
                break
        if self.thinking is not None:
            self.thinking = self.thinking.after(self.completion.token_ids[start:])
        return kept

    def open_span(self, name: str, usage: TokenUsage) -> None:
        """A teacher is called now; the span, and what the teacher uses, grow as it writes."""
        self.report.open_span(name)
        self.report.sheet.teacher_called(name, usage)
        ESCALATIONS.labels("granted", "gate").inc()

    def wait(self, tokens: int) -> None:
        """The student writes this many tokens before it may ask again."""
        for standing in self.standings:
            standing.wait(len(self.completion) + tokens)

    def put_off(self, reason: str, *, degraded: bool, tokens: int = PAUSE_TOKENS) -> None:
        """The student writes on alone for a while: what others share may have room again."""
        self.wait(tokens)
        self.denied([Refusal(reason, degraded)])

    def deny(self, reason: str, *, degraded: bool) -> None:
        """The student writes the rest alone."""
        for standing in self.standings:
            standing.may_ask = False
        self.denied([Refusal(reason, degraded)])

    def denied(self, refusals: Sequence[Refusal]) -> None:
        """The student goes on alone, for these reasons."""
        for reason in dict.fromkeys(refusal.reason for refusal in refusals if refusal.reason):
            self.report.denied[reason] += 1
            ESCALATIONS.labels("denied", reason).inc()
        self.report.degraded |= any(refusal.degraded for refusal in refusals)
