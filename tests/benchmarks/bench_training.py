"""Speed of on-policy distillation: PCL-KD here beside TRL's `DistillationTrainer`.

Both in this process and in turns, on the demo pair: the same prompts, batch, longest completion, precision,
temperature and optimizer, eager, one thread, logging off; a learning rate of almost nothing, so that the
student and its completions stay the same. A round is one run of each; the first steps of a run are not
counted. Counted are the completions' tokens, end token included, that were written, scored by the teacher
and trained on. Without a GPU the time is this process's CPU time, so that other work on the machine counts
little.

    pip install trl==1.16.0
    python -m tests.benchmarks.bench_training
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from training.batches import Batch
from training.config import PCLConfig, Schedule
from training.loop.trainer import make_optimizers, update
from training.methods import PCL
from training.models import load_model
from training.tasks import make_task
from training.tokenizer import encode_prompts, load_tokenizer

PAIR = Path(__file__).parents[2] / "deploy" / "demo"
WARM_UP = 3
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
LEARNING_RATE = 1e-9


def ours(sources: list[str], batch: int, longest: int) -> float:
    """Tokens/s."""
    tokenizer = load_tokenizer(PAIR / "student")
    student, teacher = load_model(PAIR / "student"), load_model(PAIR / "teacher").requires_grad_(False)
    end = tokenizer.eos_token_id
    method = PCL(PCLConfig(type="pcl", on_policy=1.0), len(tokenizer), teacher, end)
    steps = len(sources) // batch
    schedule = Schedule(
        steps=steps, batch=batch, learning_rate=LEARNING_RATE, optimizer="adamw", compile=False
    )
    optimizers = make_optimizers(student, schedule)
    student.train()
    tokens, began = 0, 0.0
    for step in range(steps):
        if step == WARM_UP:
            tokens, began = 0, clock()
        prompts = encode_prompts(tokenizer, sources[step * batch : (step + 1) * batch])
        answers = [[end] * (longest - 1)] * batch  # stand for references: they bound the completions' length
        _, count = update(
            student,
            method.loss,
            method.prepare,
            optimizers,
            Batch.of(prompts, answers, end),
            step,
            schedule,
            0,
        )
        tokens += count
    return tokens / (clock() - began)


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.tokens, self.began, self.ended = 0, 0.0, 0.0

    def on_step_end(self, args, state, control, **others) -> None:
        self.ended = clock()
        if state.global_step == WARM_UP:
            self.tokens, self.began = 0, self.ended


class Counting(DistillationTrainer):
    """Counts the tokens of the completions."""

    seen: Clock

    def _generate_and_score_completions(self, inputs):
        outputs = super()._generate_and_score_completions(inputs)
        self.seen.tokens += int(outputs["completion_mask"].sum())
        return outputs


def theirs(sources: list[str], batch: int, longest: int) -> float:
    """Tokens/s."""
    seen = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Counting(
            model=load_model(PAIR / "student"),
            teacher_model=load_model(PAIR / "teacher"),
            processing_class=load_tokenizer(PAIR / "student"),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": s}]} for s in sources]),
            args=DistillationConfig(
                output_dir=scratch,
                max_steps=len(sources) // batch,
                per_device_train_batch_size=batch,
                max_completion_length=longest,
                temperature=1.0,
                beta=1.0,
                learning_rate=LEARNING_RATE,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[seen],
        )
        trainer.seen = seen
        trainer.train()
    return seen.tokens / (seen.ended - seen.began)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens/s of on-policy distillation, ours and TRL's")
    parser.add_argument("--steps", type=int, default=15, help=f"of a run, the first {WARM_UP} not counted")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--longest", type=int, default=48, help="tokens of a completion at most")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sources = [e.source for e in islice(make_task("numbers").train(11), args.steps * args.batch)]
    rounds = []
    for _ in range(args.rounds):
        pair = ours(sources, args.batch, args.longest), theirs(sources, args.batch, args.longest)
        print(
            f"ours {pair[0]:,.0f} tokens/s, TRL {pair[1]:,.0f} tokens/s, ratio {pair[0] / pair[1]:.2f}",
            flush=True,
        )
        rounds.append(pair)
    columns = [median(column) for column in zip(*rounds, strict=True)]
    ratio = median(a / b for a, b in rounds)
    print(json.dumps({"ours": round(columns[0]), "trl": round(columns[1]), "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
