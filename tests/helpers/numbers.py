"""A small version of the demo's task: its tokenizer, and an untrained pair."""

from copy import deepcopy
from functools import cache
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from training.model_config import Shape
from training.models import new_model, save_model
from training.tasks import make_task
from training.tokenizer import train_tokenizer


def tokenizer_of_numbers(context: int = 512) -> PreTrainedTokenizerBase:
    """A tokenizer with 300 ids, trained on 500 training examples."""
    return deepcopy(_trained(context))  # a test may change its copy


@cache
def _trained(context: int) -> PreTrainedTokenizerBase:
    texts: list[str] = []
    for example in islice(make_task("numbers").train(5), 500):
        texts += [example.source, example.references.first()]
    return train_tokenizer(texts, 300, context)


def save_untrained_pair(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Save `teacher` and `student` in a directory."""
    for role, hidden in (("teacher", 64), ("student", 32)):
        shape = Shape(hidden=hidden, layers=2, heads=1, feed_forward=32)
        save_model(new_model(shape, tokenizer, hidden), tokenizer, directory / role)
