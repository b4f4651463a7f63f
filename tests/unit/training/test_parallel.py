"""Parts of a batch together are the batch again: in their order, their gradient and their states."""

import pytest
import torch

from tests.helpers import numbers, parallel_worker
from training.batches import Batch, Demonstrations
from training.loop.trainer import make_optimizers, unchanged, update
from training.method_config import Schedule, SFTConfig
from training.methods import SFT
from training.models import answer_read, new_model
from training.sampling import drawn
from training.tasks import make_task

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer_of_numbers():
    return numbers.tokenizer_of_numbers()


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulating_gives_the_gradient_of_the_whole_batch(tokenizer_of_numbers, accumulate):
    def updated(parts):
        model = new_model(parallel_worker.SHAPE, tokenizer, 0)
        schedule = Schedule(steps=9, batch=8, accumulate=parts, learning_rate=1e-2, optimizer="adamw")
        optimizers = make_optimizers(model, schedule)
        metrics, positions = update(model, sft.loss, unchanged, optimizers, batch, 0, schedule, 0)
        return float(metrics["loss"]), float(metrics["grad_norm"]), positions

    tokenizer = tokenizer_of_numbers
    sft = SFT(SFTConfig(type="sft"), len(tokenizer), None)
    batch = Demonstrations(make_task("numbers"), tokenizer, 8, seed=0)[0]
    assert updated(accumulate) == pytest.approx(updated(1), rel=1e-5)


def test_parts_make_up_the_batch_again():
    batch = Batch.of([[5, 6], [7], [8], [9]], [[1, 2], [3, 4], [1], [2]], pad=0)
    assert torch.cat([part.ids for part in batch.parts(2)]).equal(batch.ids)
    assert sum(part.positions for part in batch.parts(4)) == batch.positions == 6
    with pytest.raises(ValueError, match="4 does not split into 3"):
        batch.parts(3)


def test_narrow_parts_give_the_states_of_the_whole_batch(tokenizer_of_numbers):
    prompts = [[5 + i % 7] * (1 + i % 9) for i in range(64)]
    batch = Batch.of(prompts, [[20 + i] * (1 + 5 * i % 40) for i in range(64)], pad=0)
    model = new_model(parallel_worker.SHAPE, tokenizer_of_numbers, 0)
    parts, _ = batch.narrow()
    assert sum(part.ids.numel() for part in parts) < 0.7 * batch.ids.numel()
    expected = model.get_decoder()(input_ids=batch.ids).last_hidden_state[batch.answer]
    assert torch.allclose(answer_read(model, batch, 300)[0], expected, atol=1e-5)


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    ids = drawn(torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0]]).expand(4000, -1))
    assert set(ids.tolist()) == {1, 3}
    assert (ids == 3).float().mean().item() == pytest.approx(0.8, abs=0.02)
