"""The worth of a completion with `gain: quality`: the task's metric and similarity.

The completion is compared with the example's references, and with completions drawn from the teacher. A token
of a good answer is often missing in a single reference. Many completions of the teacher show what it would
write on average (minimum Bayes risk: Eikema and Aziz 2020, arXiv 2005.10283).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from measuring.examples import Example, References
from training.gating.rollout import ClosedLoop
from training.gating.scorer import Scorer
from training.sampling import complete
from training.tasks import Task
from training.tokenizer import decode_answers

TEMPERATURE = 0.7
BATCH = 512

Draw = Callable[[list[list[int]]], list[list[int]]]
"""Draws a teacher's completion of each prompt, at `TEMPERATURE`; a prompt may come several times."""


class Judge:
    """Computes the worth of completions.

    Args:
        task: the task that scores completions.
        tokenizer: the tokenizer of the pair.
        examples: the examples that are completed.
        prompts: the prompt of each example, as token ids.
        count: number of the teacher's completions for each example, drawn when the example is first judged.
        draw: draws the teacher's completions.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[Example],
        prompts: list[list[int]],
        count: int,
        draw: Draw,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._count = count
        self._draw = draw
        self._examples = list(examples)  # later followed by the teacher's completions
        self._scorer = Scorer(task, tokenizer, self._examples)
        self._drawn: dict[int, range] = {}

    def worth(self, numbers: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
        """(N,) worth in points of 100; the references count as much as all drawn completions together.

        Args:
            numbers: the numbers of N examples.
            completions: a completion of each of these examples, as token ids.
        """
        given = self._scorer.worth(numbers, completions)
        if self._count == 0:
            return given
        self._complete(sorted(set(numbers) - self._drawn.keys()))
        references: list[int] = []
        repeated: list[list[int]] = []
        for number, completion in zip(numbers, completions, strict=True):
            references += self._drawn[number]
            repeated += [completion] * self._count
        drawn = self._scorer.worth(references, repeated) if references else given.new_zeros(0)
        return (given + drawn.view(len(given), self._count).mean(1)) / 2

    def _complete(self, new: list[int]) -> None:
        """Draw the teacher's completions of these examples."""
        order = sorted(new, key=lambda number: len(self._prompts[number]))
        written: dict[int, list[list[int]]] = defaultdict(list)
        size = max(1, BATCH // self._count)
        for first in range(0, len(order), size):
            part = [number for number in order[first : first + size] for _ in range(self._count)]
            for number, answer in zip(part, self._draw([self._prompts[n] for n in part]), strict=True):
                written[number].append(answer)
        for number in new:
            texts = decode_answers(self._tokenizer, written[number])
            self._drawn[number] = range(len(self._examples), len(self._examples) + len(texts))
            for text in texts:
                self._examples.append(Example(self._examples[number].source, References.one(text)))


def drawn_in_process(loop: ClosedLoop) -> Draw:
    """A function that draws completions from the loop's teacher."""

    def draw(prompts: list[list[int]]) -> list[list[int]]:
        return complete(loop.teacher, prompts, loop.visible, loop.end, loop.max_tokens, TEMPERATURE)

    return draw
