"""Compares the speed of on-policy distillation: PCL-KD here, and TRL's `DistillationTrainer`.

Both run in this process and in turns, on the demo pair, eager, with one thread and without logging. They have
the same prompts, batch, longest completion, precision, temperature and optimizer. The learning rate is almost
nothing, so the student and its completions stay the same. A round is one run of each; the first steps of a
run are not counted. The speed counts the completions' tokens, end token included, that were written, scored
by the teacher and trained on. Without a GPU the time is this process's CPU time, so that other work on the
machine counts little.

    pip install trl==1.16.0
    python -m tests.benchmarks.bench_training
"""

import argparse
import json
import tempfile
import time
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from tests.helpers.paths import ROOT
from training.batches import Batch
from training.loop.trainer import make_optimizers, update
from training.method_config import PCLConfig, Schedule
from training.methods import PCL
from training.models import load_model
from training.tasks import make_task
from training.tokenizer import encode_prompts, load_tokenizer

PAIR = ROOT / "deploy" / "demo"
WARM_UP = 3
clock = time.perf_counter if torch.cuda.is_available() else time.process_time
LEARNING_RATE = 1e-9


def ours(sources: list[str], batch: int, longest: int) -> float:
    """Tokens/s."""
    tokenizer = load_tokenizer(PAIR / "student")
    student = load_model(PAIR / "student")
    teacher = load_model(PAIR / "teacher").requires_grad_(False)
    end = tokenizer.eos_token_id
    method = PCL(PCLConfig(type="pcl", on_policy=1.0), len(tokenizer), teacher, end, longest)
    steps = len(sources) // batch
    schedule = Schedule(
        steps=steps, batch=batch, learning_rate=LEARNING_RATE, optimizer="adamw", compile=False
    )
    optimizers = make_optimizers(student, schedule)
    student.train()
    tokens = 0
    began = 0.0
    for step in range(steps):
        if step == WARM_UP:
            tokens = 0
            began = clock()
        prompts = encode_prompts(tokenizer, sources[step * batch : (step + 1) * batch])
        answers = [[end]] * batch  # instead of references
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
    """Notes when the counted steps began and ended."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of completions since then; `Counting` adds them."""
        self.began = 0.0
        self.ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the trainer."""
        self.ended = clock()
        if state.global_step == WARM_UP:
            self.tokens = 0
            self.began = self.ended


class Counting(DistillationTrainer):
    """A trainer that counts the tokens of the completions."""

    seen: Clock

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        outputs = super()._generate_and_score_completions(inputs)
        self.seen.tokens += int(outputs["completion_mask"].sum())
        return outputs


def theirs(sources: list[str], batch: int, longest: int) -> float:
    """Tokens/s."""
    seen = Clock()
    prompts = [{"prompt": [{"role": "user", "content": source}]} for source in sources]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Counting(
            model=load_model(PAIR / "student"),
            teacher_model=load_model(PAIR / "teacher"),
            processing_class=load_tokenizer(PAIR / "student"),
            train_dataset=Dataset.from_list(prompts),
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


class Speeds(NamedTuple):
    """Tokens/s of one round."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Our speed divided by theirs."""
        return self.ours / self.theirs


def main() -> None:
    """Print every round, and the medians as JSON."""
    parser = argparse.ArgumentParser(description="Tokens/s of on-policy distillation, ours and TRL's")
    parser.add_argument("--steps", type=int, default=15, help=f"of a run, the first {WARM_UP} not counted")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--longest", type=int, default=48, help="tokens of a completion at most")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    examples = islice(make_task("numbers").train(11), args.steps * args.batch)
    sources = [example.source for example in examples]
    rounds: list[Speeds] = []
    for _ in range(args.rounds):
        speeds = Speeds(ours(sources, args.batch, args.longest), theirs(sources, args.batch, args.longest))
        print(
            f"ours {speeds.ours:,.0f} tokens/s, TRL {speeds.theirs:,.0f} tokens/s, ratio {speeds.ratio:.2f}",
            flush=True,
        )
        rounds.append(speeds)
    medians = {
        "ours": round(median(speeds.ours for speeds in rounds)),
        "trl": round(median(speeds.theirs for speeds in rounds)),
        "ratio": round(median(speeds.ratio for speeds in rounds), 2),
    }
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
