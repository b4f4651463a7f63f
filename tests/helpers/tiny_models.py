"""Random models: with a vocabulary of 40 ids and reserved rows, and with a tokenizer of their own."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router.reserved import ReservedRows
from tests.helpers.fluent_teacher import byte_level
from tests.helpers.paths import ROOT
from training.model_config import Shape
from training.models import new_model

VISIBLE, END, MAX_TOKENS = 40, 1, 10
RESERVED = ReservedRows(VISIBLE)


class Words:
    """The part of a tokenizer that `new_model` needs."""

    eos_token_id = END

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VISIBLE)}


def model(seed: int, layers: int = 1) -> PreTrainedModel:
    shape = Shape(hidden=32, layers=layers, heads=1, feed_forward=32)
    made = new_model(shape, Words(), seed).eval().requires_grad_(False)
    # With larger weights, random models do not repeat one token for ever.
    for p in made.parameters():
        p.data.mul_(4 if p.ndim == 2 else 1)
    return made


def save_teacher_of_other_words(directory: Path) -> Path:
    """Save a random model whose tokenizer has other merges and special tokens than the demo pair's."""
    tokenizer = byte_level([(ROOT / "LICENSE").read_text()], 600)  # a text that does not change
    made = new_model(Shape(hidden=32, layers=1, heads=1, feed_forward=32), tokenizer, seed=3)
    for name, weights in made.named_parameters():
        if weights.ndim == 2 and "embed" in name:
            weights.data.mul_(40)
            weights.data[_not_ascii(tokenizer)] = 0
            weights.data[len(tokenizer) :] = 0
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _not_ascii(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that are not ASCII, with which a random model writes no text."""
    return [token_id for token_id in range(len(tokenizer)) if not tokenizer.decode([token_id]).isascii()]
