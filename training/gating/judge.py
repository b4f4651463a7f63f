"""The value of a completion with `gain: quality`: the task's metric and similarity.

They are taken against the references, and against what the teacher itself would write.
A token of a good answer is often not in the one reference. Completions drawn from the teacher are many, and
what they agree on is what it is asked for (minimum Bayes risk: Eikema and Aziz 2020, arXiv 2005.10283).
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
"""Prompts, each once for every completion of it -> the teacher's completions, drawn at `TEMPERATURE`."""


class Judge:
    """Of completions of `examples`, whose prompts the teacher completes `count` times, once it has to."""

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
        self._examples = list(examples)  # after them, those that the teacher wrote
        self._scorer = Scorer(task, tokenizer, self._examples)
        self._drawn: dict[int, range] = {}

    def worth(self, numbers: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
        """In points of 100: (N,); the references count as much as all that was drawn.

        Args:
            numbers: of N examples.
            completions: token ids, one for each number.
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
    """By the loop's teacher."""

    def draw(prompts: list[list[int]]) -> list[list[int]]:
        return complete(loop.teacher, prompts, loop.visible, loop.end, loop.max_tokens, TEMPERATURE)

    return draw
