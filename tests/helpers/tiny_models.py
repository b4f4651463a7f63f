"""Random models with a vocabulary of 40 ids and its reserved rows, for tests of the closed loop."""

from transformers import PreTrainedModel

from router.reserved import ReservedRows
from training.config import Shape
from training.models import new_model

VISIBLE, END, MAX_TOKENS = 40, 1, 16
RESERVED = ReservedRows(VISIBLE)


class Words:
    """As much of a tokenizer as `new_model` needs."""

    eos_token_id = END

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VISIBLE)}


def model(seed: int, layers: int = 1) -> PreTrainedModel:
    shape = Shape(hidden=32, layers=layers, heads=1, feed_forward=32)
    made = new_model(shape, Words(), seed).eval().requires_grad_(False)
    # Larger weights: random models that do not repeat one token for ever.
    for p in made.parameters():
        p.data.mul_(4 if p.ndim == 2 else 1)
    return made
