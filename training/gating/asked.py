"""Requests completions from a running gateway, at budgets drawn at random."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track
from transformers import PreTrainedTokenizerBase

from measuring.chats import Source
from measuring.gateway import GatewayReply
from measuring.json_lines import DataError
from measuring.trajectories import Trajectory, TrajectoryFile, read_trajectories
from training.loop.progress import console
from training.running_gateway import RunningGateway
from training.tokenizer import encode_prompts

UNLIMITED = 2**62


@dataclass(frozen=True)
class AskedPrompts:
    """The prompts of one round, which a gateway completes."""

    gateway: RunningGateway
    tokenizer: PreTrainedTokenizerBase
    sources: Sequence[Source]
    budgets: Sequence[float]
    """Fractions, of which each batch draws one."""
    batch: int
    """Number of prompts that are sent with one budget."""
    seed: int
    file: Path
    """File of the completions so far."""

    @property
    def is_complete(self) -> bool:
        """Whether the file has a completion of every prompt."""
        return len(self._kept()) >= len(self.sources)

    def trajectories(self) -> list[Trajectory]:
        """The completions of all prompts, in order; those in the file are not requested again.

        Raises:
            GatewayError: the gateway cannot be used.
            DataError: the gateway's prompt of a source is not the tokenizer's.
        """
        found = self._kept()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        written = TrajectoryFile(self.file, UNLIMITED)
        rng = random.Random(self.seed)
        firsts = range(0, len(self.sources), self.batch)
        for first in track(firsts, "router: the gateway writes", console=console):
            budget = rng.choice(self.budgets)
            left = self.sources[max(first, len(found)) : first + self.batch]
            for trajectory in self._asked(left, budget):
                written.add(trajectory)
                found.append(trajectory)
        return found

    def _kept(self) -> list[Trajectory]:
        if not self.file.exists():
            return []
        return list(read_trajectories(self.file.parent))[: len(self.sources)]

    def _asked(self, sources: Sequence[Source], budget: float) -> list[Trajectory]:
        if not sources:
            return []
        replies = self.gateway.replies(sources, budget)
        prompts = encode_prompts(self.tokenizer, list(sources))
        found = []
        for prompt, reply in zip(prompts, replies, strict=True):
            check_prompt(prompt, reply)
            found.append(Trajectory(prompt, reply.token_ids, reply.spans, budget))
        return found


def check_prompt(prompt: list[int], reply: GatewayReply) -> None:
    """Raises DataError if the gateway has read another number of tokens than this prompt has."""
    if reply.prompt_tokens != len(prompt):
        raise DataError(
            f"the gateway reads {reply.prompt_tokens} tokens, but the recipe's chat template makes "
            f"{len(prompt)}: does it serve the recipe's student?"
        )
