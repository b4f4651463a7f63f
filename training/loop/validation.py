"""Validation in the loop: scores greedy completions with the task's metric, and prints a few of them."""

from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from measuring.chats import shown
from measuring.examples import sources_of
from training import parallel
from training.loop.progress import console
from training.sampling import complete
from training.tasks import Task
from training.tokenizer import decode_answers, encode_prompts, visible_ids

SHOWN = 2


@dataclass(frozen=True)
class Validation:
    """Validation of a model on the first examples of the task's validation split."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    examples: int
    """Number of examples."""
    longest: int
    """Longest completion, in tokens."""

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Complete and score the examples, of which each process completes its share.

        Returns:
            Scalars to log: `valid_quality` and `valid_similarity`.
        """
        examples = self.task.valid()[: self.examples]
        prompts = encode_prompts(self.tokenizer, sources_of(examples))
        # Sharded models run in step: a process whose share is shorter completes its last prompt again.
        share = list(parallel.mine(prompts)) or prompts[:1]
        padding = int(parallel.largest(len(share))) - len(share)
        share += share[-1:] * padding
        visible = visible_ids(self.tokenizer)
        end = self.tokenizer.eos_token_id
        tokens = complete(model, share, visible, end, self.longest, temperature=0)
        answers = parallel.gathered(decode_answers(self.tokenizer, tokens)[: len(parallel.mine(prompts))])
        scores = self.task.score(examples, answers)
        if parallel.is_first():
            for example, answer, quality in list(zip(examples, answers, scores.quality, strict=True))[:SHOWN]:
                console.print(Text(f"  {shown(example.source)}\n  → {answer}  [{quality:.2f}]"))
        return {
            "valid_quality": self.task.quality(examples, answers, scores.quality),
            "valid_similarity": sum(scores.similarity) / len(examples),
        }
