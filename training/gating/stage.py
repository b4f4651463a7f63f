"""The router over a frozen pair: on-policy rollouts, the gate, its calibration and the confidence gates'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router.checkpoint import Fingerprints, RouterCheckpoint, RouterConfig, fingerprint, tokenizer_fingerprint
from router.gate import CONFIDENCE_GATES, Gate, RandomGate
from router.reserved import ReservedRows
from training.config import GateConfig
from training.evaluation.scoring import Scorer, ends
from training.gating.branches import future_gain
from training.gating.calibration import Quality, calibrate, spare_prices, teacher_rate
from training.gating.constrained import ascended, fit_constrained
from training.gating.gates import GAINS, Head, Lessons, Trajectories, collect, fit, span_gain
from training.gating.rollout import FREE, Completion, Cooperation, Positions, Request, with_gate
from training.gating.tree import Tree
from training.models import load_model, reserved_rows
from training.parallel import device
from training.tasks import Task
from training.tokenizer import encode_prompts


def load_cooperation(
    teacher: Path,
    student: Path,
    tokenizer: PreTrainedTokenizerBase,
    spans: tuple[int, int],
    max_tokens: int,
) -> Cooperation:
    """The pair of two directories, frozen, asking at random. spans: (span_tokens, ask_tokens)."""
    models = [load_model(path).requires_grad_(False).to(device()) for path in (student, teacher)]
    reserved = reserved_rows(models[0], tokenizer)
    return Cooperation(
        student=models[0],
        teacher=models[1],
        score=RandomGate(reserved),
        visible=reserved.start,
        end=tokenizer.eos_token_id,
        span_tokens=spans[0],
        ask_tokens=spans[1],
        max_tokens=max_tokens,
    )


def train_gate(
    cooperation: Cooperation, prompts: list[list[int]], reserved: ReservedRows, config: GateConfig, seed: int
) -> Head:
    """Rounds of rollouts, each followed by a fit on all of them; the taps end in the student's reserved rows.

    prompts: `config.prompts` for each round.
    """
    torch.manual_seed(seed)
    head = Head(cooperation.student, reserved, config.width).to(cooperation.student.device)
    gate: Gate = RandomGate(reserved)
    price = 1 - config.rate
    seen: list[Lessons] = []
    for round_ in range(config.rounds):
        some = prompts[round_ * config.prompts : (round_ + 1) * config.prompts]
        explore = config.explore if round_ else 0.0
        asking = with_gate(cooperation, gate, explore)
        # Half of the rollouts never ask: most of a served completion is the student's own path.
        half = len(some) // 2
        requests = [Request(p) for p in some[:half]] + [Request(p, price, FREE) for p in some[half:]]
        trajectories, completions = collect(asking, requests)
        seen.append(lessons(cooperation, some, trajectories, completions, config))
        data = Lessons.join(seen)
        if round_ == 0:
            head.start_from(data.states)
        fitted = fit_constrained if config.objective == "constrained" else fit
        loss = fitted(head, data, config, seed)
        realised, spread = teacher_rate(completions[half:]), data.target.var().item()
        print(
            f"gate round {round_}: {len(data):,} positions, loss {loss:.4f} (variance {spread:.4f}), "
            f"price {price:.4f}, rate {realised:.3f}",
            flush=True,
        )
        install_taps(cooperation, head.taps.detach(), reserved)
        gate = head.gate.eval()
        if config.objective == "constrained":
            start = math.sqrt(math.prod(config.prices))
            price = ascended(price, realised, config.rate) if round_ else start
        else:
            price = torch.quantile(head.scores(data.states[-100_000:]), 1 - config.rate).item()
    return head.requires_grad_(False).eval()


def lessons(
    cooperation: Cooperation,
    prompts: Sequence[list[int]],
    trajectories: Trajectories,
    completions: Sequence[Completion],
    config: GateConfig,
) -> Lessons:
    """What asking gains at every position of the rollouts, as the recipe counts it."""

    def gain(positions: Positions) -> Tensor:
        return GAINS[config.gain](positions).clamp(0, config.clip)

    at, by_teacher = trajectories.positions, trajectories.by_teacher
    if config.objective == "constrained":  # its critic looks ahead
        return Lessons(at.states, gain(at), by_teacher, at.row)
    if config.horizon == "completion":
        target = future_gain(cooperation, prompts, trajectories, completions, gain)
        return Lessons(at.states, target.clamp(-config.clip, config.clip), by_teacher, at.row)
    target, known = span_gain(gain(at), trajectories, config.ask_tokens)
    return Lessons(at.states[known], target[known], by_teacher[known], at.row[known])


def install_taps(cooperation: Cooperation, taps: Tensor, reserved: ReservedRows) -> None:
    """In memory what `RouterCheckpoint.merge` does to the files."""
    cooperation.student.get_output_embeddings().weight.data[reserved.taps] = taps


Points = dict[str, list[tuple[float, float]]]


def calibrate_gates(
    tree: Tree, gates: Iterable[str], quality: Quality, config: GateConfig
) -> tuple[Points, Points]:
    """For each gate (fraction, price) and (fraction, spare price). quality: in shares of the gap."""
    prices, spares = {}, {}
    spans = (config.span_tokens, config.ask_tokens)
    for name in gates:
        prices[name] = calibrate(tree, name, config.budgets, spans, quality)
        spares[name] = spare_prices(tree, name, prices[name], spans)
        print(f"calibrated {name}: " + " ".join(f"{b:g}:{p:.4g}" for b, p in prices[name]), flush=True)
    return prices, spares


def train_router(
    teacher: Path, student: Path, out: Path, task: Task, tokenizer: PreTrainedTokenizerBase,
    config: GateConfig, max_tokens: int, seed: int,
) -> RouterCheckpoint:  # fmt: skip
    cooperation = load_cooperation(
        teacher, student, tokenizer, (config.span_tokens, config.ask_tokens), max_tokens
    )
    reserved = reserved_rows(cooperation.student, tokenizer)
    sources = [e.source for e in islice(task.router(seed), config.prompts * config.rounds)]
    head = train_gate(cooperation, encode_prompts(tokenizer, sources), reserved, config, seed)
    gates: dict[str, Gate] = {"learned": head.gate}
    gates |= {name: gate(reserved) for name, gate in CONFIDENCE_GATES.items()}
    valid = task.valid()[: config.calibration_examples]
    tree = Tree(cooperation, encode_prompts(tokenizer, [e.source for e in valid]), gates)
    scorer = Scorer(task, tokenizer, valid)
    alone, taught = tree.run(ends("learned"))
    low, high = scorer(alone)[0], scorer(taught)[0]
    print(f"on validation data: student {low:.3f}, teacher {high:.3f}", flush=True)
    gap = high - low if high > low else 1.0
    prices, spares = calibrate_gates(tree, gates, lambda run: scorer(run)[0] / gap, config)
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
            training={"gain": config.gain, "seed": seed, "task": task.name},
        ),
        taps=head.taps,
        gate=head.gate.state_dict(),
    )
    checkpoint.save(out)
    return checkpoint
