"""A completion in progress: what both models read of it and append to it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from router.budget import Bucket
from server.completion import Completion, Piece
from server.exchange import Purse, Report
from server.grammar.constraint import Constraint
from server.original_prompt import OriginalPrompt
from server.sessions import OpenSession
from server.sources import STUDENT, Source
from server.teacher.carried import MOST_BIASES, penalises
from server.tenants import Tenant
from server.thinking import Thinking
from server.vllm_api import CompletionOutput, RequestOutputKind, SamplingParams


class Step(NamedTuple):
    """What the reader of a choice gets next, and who wrote it."""

    output: CompletionOutput
    source: Source


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
    tenant: Tenant | None
    single_tokens: bool
    """Whether its reader gets one token at a time: see `single_tokens`."""
    session: OpenSession | None = None
    """The one that its request names."""
    original: OriginalPrompt | None = None
    """What the prompt was before it was rendered, for a teacher with another vocabulary."""
    constraint: Constraint | None = None
    """Of structured output: what may be written next, whoever writes it."""
    steps: asyncio.Queue[Step | None] = field(default_factory=asyncio.Queue)
    """What the reader has not taken yet; None at the end."""
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
