"""What a completion is worth with `gain: quality`: the task's metric and similarity, against its references
and against what the teacher itself would write.

A token of a good answer is often not in the one reference. Completions drawn from the teacher are many, and
what they agree on is what it is asked for (minimum Bayes risk: Eikema and Aziz 2020, arXiv 2005.10283).
"""

from collections.abc import Sequence

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


class Judge:
    """Of completions of `examples`, whose prompts the teacher completes `drawn` times, once it has to."""

    def __init__(
        self,
        loop: ClosedLoop,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        examples: list[Example],
        prompts: list[list[int]],
        drawn: int,
    ) -> None:
        self._loop, self._tokenizer = loop, tokenizer
        self._prompts, self._count = prompts, drawn
        self._examples = list(examples)  # behind them those that the teacher wrote
        self._scorer = Scorer(task, tokenizer, self._examples)
        self._drawn: dict[int, range] = {}

    def worth(self, numbers: Sequence[int], completions: Sequence[list[int]]) -> Tensor:
        """In points of 100: (N,); the references count as much as all that was drawn. numbers: of N
        examples; completions: of theirs, token ids.
        """
        given = self._scorer.worth(numbers, completions)
        if self._count == 0:
            return given
        self._draw(sorted(set(numbers) - self._drawn.keys()))
        pairs = []
        for number, completion in zip(numbers, completions, strict=True):
            pairs += [(reference, completion) for reference in self._drawn[number]]
        drawn = self._scorer.worth(*zip(*pairs, strict=True)) if pairs else given.new_zeros(0)
        return (given + drawn.view(len(given), self._count).mean(1)) / 2

    def _draw(self, new: list[int]) -> None:
        loop = self._loop
        order = sorted((i for i in new for _ in range(self._count)), key=lambda i: len(self._prompts[i]))
        written: dict[int, list[list[int]]] = {i: [] for i in new}
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            prompts = [self._prompts[i] for i in rows]
            answers = complete(loop.teacher, prompts, loop.visible, loop.end, loop.max_tokens, TEMPERATURE)
            for i, answer in zip(rows, answers, strict=True):
                written[i].append(answer)
        for i in new:
            texts = decode_answers(self._tokenizer, written[i])
            self._drawn[i] = range(len(self._examples), len(self._examples) + len(texts))
            self._examples += [Example(self._examples[i].source, References.one(text)) for text in texts]
