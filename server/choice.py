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
    """The next output for the reader of a choice, and who wrote it."""

    output: CompletionOutput
    source: Source


@dataclass
class Choice:
    """One completion of a request.

    The span loop writes it, and its reader takes steps from a queue. So a slow reader holds up neither model,
    and no reservation.
    """

    prompt: Mapping[str, Any]
    """vLLM's rendered prompt, of type "token"."""
    segment_params: SamplingParams
    """Sampling parameters that all student segments have in common."""
    request_id: str
    affinity: bytes
    """Key by which the teacher's replicas are ranked; it is the same for the same prompt."""
    options: Mapping[str, Any]
    """Further arguments of `AsyncLLM.generate`, passed on to every student segment."""
    completion: Completion
    purse: Purse
    tenant: Tenant | None
    single_tokens: bool
    """Whether the reader gets one token at a time: see `server.single_tokens`."""
    session: OpenSession | None = None
    """Session that the request names; None if it names none."""
    original: OriginalPrompt | None = None
    """The prompt before it was rendered, for teachers with another vocabulary and for budgets in words."""
    constraint: Constraint | None = None
    """Grammar of structured output at the end of the text, for both models; None without a grammar."""
    steps: asyncio.Queue[Step | None] = field(default_factory=asyncio.Queue)
    """Steps that the reader has not taken yet; None at the end."""
    thinking: Thinking | None = None
    """The rest of `thinking_token_budget` after prompt and completion; None without such a budget."""
    read_by_student: list[int] | None = None
    """Token ids of the prompt with a budget in words, if the student reads that instead."""
    cached_tokens: int | None = None
    """Tokens of the first segment's prompt that were in vLLM's prefix cache; None before it was read."""

    @property
    def params(self) -> SamplingParams:
        """The caller's sampling parameters, for this choice alone."""
        return self.completion.params

    @property
    def report(self) -> Report:
        """Report of who wrote this choice, and at what cost."""
        return self.completion.report

    @property
    def finished(self) -> bool:
        """Whether the choice has its last token."""
        return self.completion.finished

    @property
    def bucket(self) -> Bucket:
        """The rest of the request's budget."""
        return self.purse.bucket

    @property
    def length(self) -> int:
        """Number of tokens that the budget counts, including earlier completions on the same purse."""
        return self.purse.written + len(self.completion)

    @property
    def adapter(self) -> str | None:
        """Name of the LoRA adapter with which the student writes the choice; None without one."""
        request = self.options.get("lora_request")
        return None if request is None else str(request.lora_name)

    @property
    def begun(self) -> bool:
        """Whether it has tokens, or its prompt was read first; it then goes before new requests."""
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
        """Prompt and completion so far, as token ids, without escalation tokens."""
        return self.prompt_ids + self.completion.token_ids

    @property
    def student_prompt(self) -> list[int]:
        """Token ids of the prompt as the student reads it."""
        return self.prompt_ids if self.read_by_student is None else self.read_by_student

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens of the prefix, which a model reads before it continues."""
        return len(self.prompt_ids) + len(self.completion)

    @property
    def call_id(self) -> str:
        """Id of the current teacher call, for the teacher's log."""
        return f"{self.request_id}-{self.report.calls}"

    @property
    def min_tokens(self) -> int:
        """Tokens still to write before the completion may end."""
        return max(0, self.params.min_tokens - len(self.completion))

    @property
    def end_ids(self) -> list[int]:
        """The student's end token, which ends the teacher's spans too; others are in `stop_token_ids`."""
        end = self.params.eos_token_id
        return [] if end is None else [end]

    @property
    def bias_room(self) -> int:
        """Number of further tokens for which the teacher can still get biases, if there are penalties."""
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
        """Seed of the next segment. It differs at every length, so that segments draw different numbers."""
        if self.params.seed is None:
            return None
        return (self.params.seed + len(self.completion) * 0x9E3779B1) % 2**63

    def student_reads(self, cached: int | None) -> None:
        """Note that the student has read the prefix, of which its cache had ``cached`` tokens."""
        if self.cached_tokens is None:
            self.cached_tokens = cached
        self.report.sheet.student_reads(len(self.student_prompt) + len(self.completion), cached or 0)

    def extend(self, piece: Piece, source: Source) -> int:
        """Append a piece by ``source`` and hand it to the reader; returns the number of kept tokens."""
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
