"""The router over a frozen pair: on-policy rollouts, the gate, its calibration and the confidence gates'."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig, fingerprint, tokenizer_fingerprint
from router.gate import CONFIDENCE_GATES, Gate, RandomGate
from training.config import RecipeError
from training.evaluation.scoring import Scorer, ends
from training.gating.calibration import Noise, Quality, Run, calibrate, spare_prices
from training.gating.config import GateConfig, QualityGain
from training.gating.gates import Head
from training.gating.judge import Judge
from training.gating.prompts import Trees, rollout_prompts
from training.gating.rollout import Cooperation
from training.gating.room import Room
from training.gating.rounds import Rounds, train_gate
from training.models import load_model, reserved_rows
from training.parallel import device
from training.reading import check_readout, check_steps
from training.tasks import Example, Task
from training.tokenizer import visible_ids

Points = dict[str, list[tuple[float, float]]]


def load_cooperation(
    teacher: Path,
    student: Path,
    tokenizer: PreTrainedTokenizerBase,
    spans: tuple[int, int],
    max_tokens: int,
) -> Cooperation:
    """The pair of two directories, frozen, asking at random. spans: (span_tokens, ask_tokens)."""
    for path in (student, teacher):
        if not (path / "config.json").exists():
            raise RecipeError(f"no model in {path}")
    models = [load_model(path).requires_grad_(False).to(device()) for path in (student, teacher)]
    check_steps(models[0], "student")
    check_steps(models[1], "teacher")
    check_readout(models[0], "student")
    reserved = reserved_rows(models[0], tokenizer)
    return Cooperation(
        student=models[0],
        teacher=models[1],
        score=RandomGate(reserved),
        visible=visible_ids(tokenizer),
        end=tokenizer.eos_token_id,
        span_tokens=spans[0],
        ask_tokens=spans[1],
        max_tokens=max_tokens,
    )


def calibrate_gates(
    trees: Trees, gates: Iterable[str], quality: Quality, noise: Noise, config: GateConfig
) -> tuple[Points, Points]:
    """For each gate (fraction, price) and (fraction, spare price). quality, noise: in shares of the gap."""
    prices, spares = {}, {}
    spans = (config.span_tokens, config.ask_tokens)
    together = [config.budgets] if config.template is None else [(budget,) for budget in config.budgets]
    for name in gates:
        points, spare = [], []
        for budgets in together:
            tree = trees(budgets[0])
            found = calibrate(tree, name, budgets, spans, quality, noise)
            points += found
            spare += spare_prices(tree, name, found, spans)
        prices[name], spares[name] = falling(points), falling(spare)
        print(f"calibrated {name}: " + " ".join(f"{b:g}:{p:.4g}" for b, p in prices[name]), flush=True)
    return prices, spares


def falling(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """With prices that do not rise with the fraction, as a calibration must be: lowered where they do."""
    fractions, prices = zip(*points, strict=True)
    return list(zip(fractions, accumulate(prices, min), strict=True))


def origin(pair: Sequence[str], task: Task, examples: Sequence[Example], max_tokens: int) -> str:
    """Digest of what rollouts come from, beside their prompts: only such rounds are gone on with. pair: the
    models' fingerprints.
    """
    references = [example.references.to_json() for example in examples]
    options = {name: str(value) for name, value in task.options.items()}
    return sha256(json.dumps([*pair, task.name, options, max_tokens, references]).encode()).hexdigest()


def train_router(
    teacher: Path, student: Path, out: Path, task: Task, tokenizer: PreTrainedTokenizerBase,
    config: GateConfig, max_tokens: int, seed: int, work: Path,
) -> RouterCheckpoint:  # fmt: skip
    """work: directory of the log and of what a killed run goes on from."""
    spans = (config.span_tokens, config.ask_tokens)
    cooperation = load_cooperation(teacher, student, tokenizer, spans, max_tokens)
    reserved = reserved_rows(cooperation.student, tokenizer)
    room = Room.of(tokenizer, [cooperation.student.config, cooperation.teacher.config], max_tokens)
    examples = room.drawn(task.router(seed), config.prompts * config.rounds)
    prompts = rollout_prompts(tokenizer, [e.source for e in examples], config, seed)
    # Random asking in the first round: with probability 1 - price.
    prices = {rate: 1 - rate for rate in sorted(set(prompts.rates))}
    torch.manual_seed(seed)  # of the first weights
    head = Head(cooperation.student, reserved, config.width).to(device())
    pair = [fingerprint(model, reserved.start) for model in (student, teacher)]
    of = origin(pair, task, examples, max_tokens)
    drawn = config.gain.teacher_references if isinstance(config.gain, QualityGain) else 0
    judge = Judge(cooperation, task, tokenizer, examples, prompts.ids, drawn)
    rounds = Rounds(cooperation, head, config, seed, prices, judge.worth)
    head = train_gate(rounds, prompts, tokenizer, work, of)
    gates: dict[str, Gate] = {"learned": head.gate}
    if config.template is None:  # the others are calibrated for prompts as they are
        gates |= {name: gate(reserved) for name, gate in CONFIDENCE_GATES.items()}
    valid = room.kept(task.valid()[: config.calibration_examples], "validation")
    trees = Trees(cooperation, tokenizer, [e.source for e in valid], gates, config.template)
    scorer = Scorer(task, tokenizer, valid)
    alone, taught = trees(0.0).run(ends("learned"))
    low, high = scorer(alone)[0], scorer(taught)[0]
    print(f"on validation data: student {low:.3f}, teacher {high:.3f}", flush=True)
    gap = high - low if high > low else 1.0

    def quality(run: Run) -> float:
        return scorer(run)[0] / gap

    def noise(one: Run, other: Run) -> float:
        """By the examples' own qualities, also where the task's is not their mean."""
        if len(valid) < 2:
            return math.inf  # one example tells nothing about others
        return (scorer.each(one) - scorer.each(other)).std().item() / math.sqrt(len(valid)) / gap

    prices, spares = calibrate_gates(trees, gates, quality, noise, config)
    checkpoint = RouterCheckpoint(
        config=RouterConfig(
            reserved_start=reserved.start,
            reserved_count=reserved.count,
            gate_width=config.width,
            span_tokens=config.span_tokens,
            ask_tokens=config.ask_tokens,
            expected_tokens=sum(len(c.tokens) for c in alone) / len(alone),
            calibration=prices,
            spare=spares,
            fingerprints=Fingerprints(
                student=fingerprint(student, reserved.start),
                tokenizer=tokenizer_fingerprint(student),
                teacher=teacher.name,
            ),
            budget_prompt=config.template,
            training={
                "gain": config.gain.type,
                "objective": config.objective.type,
                "seed": seed,
                "task": task.name,
            },
        ),
        taps=head.taps,
        gate=head.gate.state_dict(),
    )
    checkpoint.save(out)
    return checkpoint
