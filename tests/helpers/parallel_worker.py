"""The two processes of test_parallel.py: each trains its share, is killed, and resumes."""

import os

import torch

from tests.helpers.killing import Killed, killing
from training import parallel
from training.batches import Demonstrations
from training.loop.trainer import train
from training.method_config import PCLConfig, Schedule
from training.methods import PCL
from training.model_config import Shape
from training.models import new_model
from training.parallel import weights_of
from training.tasks import make_task
from training.tokenizer import load_tokenizer

SHAPE = Shape(hidden=32, layers=2, heads=1, feed_forward=32)
KILL_AT = 11  # call of the loss, which has two a step: in step 6, after the checkpoint of step 4


def run(tokenizer, directory, *, kill_at=None):
    """Six steps of PCL-KD, about half of them on the student's own completions."""
    teacher, model = (new_model(SHAPE, tokenizer, seed) for seed in (1, 0))
    for one in (teacher.requires_grad_(False), model):
        parallel.shard(one)
    config = PCLConfig(type="pcl", on_policy=0.5)
    method = PCL(config, len(tokenizer), teacher, tokenizer.eos_token_id)
    schedule = Schedule(
        steps=6, batch=8, accumulate=2, learning_rate=3e-3, warmup=2, checkpoint_every=2, log_every=1
    )
    batches = Demonstrations(make_task("numbers"), tokenizer, schedule.batch, seed=0)
    train(model, killing(method.loss, kill_at), batches, schedule, directory, prepare=method.prepare, seed=0)
    return model


def main(tokenizer_directory, directory):
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(tokenizer_directory)
    with parallel.processes():
        try:
            run(tokenizer, directory, kill_at=KILL_AT)
        except Killed:
            model = run(tokenizer, directory)
            weights = weights_of(model)
            if parallel.is_first():
                torch.save(weights, directory / "weights.pt")


def as_torchrun(rank, port, tokenizer_directory, directory):
    """Call `main` with the variables that `torchrun` sets for each of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(tokenizer_directory, directory)
