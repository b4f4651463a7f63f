"""Losses over a piece of the positions at a time: the same numbers, with fewer logits at once."""

import pytest
import torch

from tests.helpers.numbers import tokenizer_of_numbers
from training.batches import Demonstrations
from training.method_config import GKDConfig, KDConfig, PCLConfig, SFTConfig
from training.methods import METHODS
from training.model_config import Shape
from training.models import new_model
from training.pieces import in_pieces
from training.reading import is_followed
from training.tasks import make_task

torch.set_num_threads(1)  # tiny models: threads only wait for each other
SHAPE = Shape(hidden=32, layers=1, heads=1, feed_forward=32)
CONFIGS = {
    "sft": SFTConfig(type="sft", label_smoothing=0.1),
    "kd": KDConfig(type="kd", temperature=2.0),
    "gkd": GKDConfig(type="gkd", beta=0.5),
    "pcl": PCLConfig(type="pcl"),
    "paths": PCLConfig(type="pcl", window=3),
}
ROWS = 3
"""Number of positions in a piece."""


def test_values_come_in_the_order_of_their_positions():
    seen = []

    def doubled(piece: slice) -> torch.Tensor:
        seen.append(piece)
        return torch.arange(7.0)[piece] * 2

    assert in_pieces(doubled, 7, width=10, piece=30).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert seen == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert in_pieces(doubled, 7, width=10, piece=70).tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert seen[3:] == [slice(0, 7)]
    assert len(in_pieces(doubled, 7, width=10, piece=1)) == 7  # a piece has at least one position


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_numbers()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return Demonstrations(make_task("numbers"), tokenizer, 4, seed=0)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_in_pieces_are_those_of_the_whole(name, tokenizer, batch):
    teacher = new_model(SHAPE, tokenizer, 1).requires_grad_(False)
    whole, gradient = backward(name, tokenizer, batch, teacher, piece=10**9)
    loss, ours = backward(name, tokenizer, batch, teacher, piece=ROWS * len(tokenizer))
    assert batch.positions > 2 * ROWS
    assert loss == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(ours, gradient, atol=1e-6, rtol=1e-4)


def backward(name, tokenizer, batch, teacher, piece):
    model = new_model(SHAPE, tokenizer, 0)
    config = CONFIGS[name]
    method = METHODS[config.type](config, len(tokenizer), teacher, tokenizer.eos_token_id)
    method.piece = piece
    loss = method.loss(model, batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_no_more_logits_than_a_piece_exist_at_a_time(tokenizer, batch):
    """This holds for student and teacher, forward and backward."""
    model, teacher = (new_model(SHAPE, tokenizer, seed) for seed in (0, 1))
    rows = []
    for each in (model, teacher):
        assert is_followed(each)  # this asks the model once
        each.get_output_embeddings().register_forward_hook(
            lambda head, given, logits: rows.append(len(logits))
        )
    method = METHODS["kd"](CONFIGS["kd"], len(tokenizer), teacher, tokenizer.eos_token_id)
    method.piece = ROWS * len(tokenizer)
    loss = method.loss(model, batch).loss
    forward = sum(rows)
    loss.backward()
    assert max(rows) == ROWS
    assert forward == 2 * batch.positions  # once for each model
    assert sum(rows) == 2 * forward  # and once again in the backward pass
