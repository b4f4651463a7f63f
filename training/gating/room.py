"""Selects examples that leave room for a completion in the models' contexts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from measuring.examples import Example, sources_of
from measuring.json_lines import DataError
from training.tokenizer import encode_prompts

DRAWS = 20
"""Most examples to look at for each example that is wanted."""


@dataclass(frozen=True)
class Room:
    """Selects examples whose prompts are short enough."""

    tokenizer: PreTrainedTokenizerBase
    longest: int | None
    """Longest prompt, in tokens; None: no limit."""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, models: Sequence[PretrainedConfig], max_tokens: int
    ) -> "Room":
        """The room of models that must read a prompt and a completion of `max_tokens` tokens."""
        known = []
        for model in models:
            context = getattr(model.get_text_config(), "max_position_embeddings", None)
            if context is not None:
                known.append(context)
        return cls(tokenizer, min(known) - max_tokens if known else None)

    def fitting(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that are short enough."""
        if self.longest is None or not examples:
            return list(examples)
        short = []
        prompts = encode_prompts(self.tokenizer, sources_of(examples))
        for example, prompt in zip(examples, prompts, strict=True):
            if len(prompt) <= self.longest:
                short.append(example)
        return short

    def drawn(self, stream: Iterator[Example], count: int) -> list[Example]:
        """The next `count` examples of a stream that are short enough.

        Raises:
            DataError: nearly all examples are too long.
        """
        found: list[Example] = []
        for _ in range(DRAWS):
            found += self.fitting(list(islice(stream, count)))
            if len(found) >= count:
                return found[:count]
        raise self._none_fits()

    def kept(self, examples: Sequence[Example], name: str) -> list[Example]:
        """All examples of a split that are short enough; prints the number that are left out.

        Args:
            examples: the examples of the split.
            name: name of the split, for the message.

        Raises:
            DataError: no example is short enough.
        """
        found = self.fitting(examples)
        if not found:
            raise self._none_fits()
        if len(found) < len(examples):
            left_out = len(examples) - len(found)
            print(
                f"left out {left_out} of {len(examples)} {name} examples: longer than {self.longest} tokens"
            )
        return found

    def _none_fits(self) -> DataError:
        return DataError(
            f"too few examples have a prompt of at most {self.longest} tokens, the models' context without "
            "max_tokens"
        )
