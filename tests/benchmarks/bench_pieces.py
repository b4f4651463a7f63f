"""Measures memory and time of one step of `kd` over a real vocabulary, in pieces and whole.

Two tiny models have 151,936 ids and 512 positions. Each way runs in a process of its own, whose peak counts.

    python -m tests.benchmarks.bench_pieces
"""

import resource
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from training.batches import Batch
from training.method_config import KDConfig
from training.methods import KD
from training.pieces import PIECE

IDS = 151_936
ROWS = 8
ANSWER = 64
WAYS = {"in pieces": PIECE, "whole": IDS * ROWS * ANSWER}


def model(seed: int) -> LlamaForCausalLM:
    """A model of 32 dimensions and one layer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=IDS, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


def peak() -> float:
    """Peak memory of this process, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def step(piece: int) -> None:
    """Print what one step adds to the peak, and its CPU time."""
    torch.set_num_threads(1)
    student = model(0)
    teacher = model(1).requires_grad_(False)
    method = KD(KDConfig(type="kd"), IDS, teacher)
    method.piece = piece
    prompts = [[row + 1] * 4 for row in range(ROWS)]
    batch = Batch.of(prompts, [[7] * ANSWER] * ROWS, pad=0)
    method.loss(student, Batch.of([[1]], [[2]], pad=0)).loss.backward()
    before = peak()
    start = time.process_time()
    method.loss(student, batch).loss.backward()
    print(f"{peak() - before:.0f} MB more, {time.process_time() - start:.1f} s of CPU time")


def main() -> None:
    """Print a line for each way."""
    if len(sys.argv) > 1:
        step(int(sys.argv[1]))
        return
    for name, piece in WAYS.items():
        command = [sys.executable, "-m", "tests.benchmarks.bench_pieces", str(piece)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{name}: {done.stdout.strip()}")


if __name__ == "__main__":
    main()
