"""Two processes with sharded models train as one process does, even if they are killed in between."""

import json
import multiprocessing
import os
import sys

import pytest
import torch

from measuring.pair import free_port
from tests.helpers import parallel_worker
from tests.helpers.client import PATIENCE
from tests.helpers.numbers import tokenizer_of_numbers
from training.models import new_model

torch.set_num_threads(1)  # as in the two processes: sums in another order would differ


def curve(directory):
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_two_processes_follow_the_curve_of_one_in_spite_of_a_kill(tmp_path, monkeypatch):
    tokenizer = tokenizer_of_numbers()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    one = parallel_worker.run(tokenizer, tmp_path / "one")
    # One process imports everything, and the two are forks of it.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([parallel_worker.__name__])
    port, directories = free_port(), (tmp_path / "tokenizer", tmp_path / "two")
    two = [forks.Process(target=parallel_worker.as_torchrun, args=(i, port, *directories)) for i in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(PATIENCE)
    assert [process.exitcode for process in two] == [0, 0]
    expected, got = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [step for step, *_ in got] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-3)  # Muon orthogonalises in bfloat16
    weights = torch.load(tmp_path / "two" / "weights.pt")
    start = new_model(parallel_worker.SHAPE, tokenizer, 0).state_dict()
    for name, tensor in one.state_dict().items():  # AdamW blows rounding errors of tiny gradients up
        assert (weights[name] - tensor).norm() <= 0.1 * (tensor - start[name]).norm(), name
