"""Predicted speed of a pair on one GPU, by `roofline.py`, without an engine or a GPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.bench.cost_model import Traffic
from server.bench.gpu_evidence import core_rows, published_rows
from server.bench.plan import Plan
from server.bench.results import Row, Section, Table, Value
from server.bench.roofline import (
    FP8,
    DecoderShape,
    Load,
    Machine,
    Model,
    TooLarge,
    alone,
    best_speculation,
    cooperation,
)

H100 = Machine(
    bandwidth=0.8 * 3.35e12,
    flops=0.6 * 989e12,
    memory=0.9 * 80e9,
    step=1.2e-3,
    draft=0.6e-3,
    call=4e-3,
    block=16,
)
"""H100 SXM. Peaks are its datasheet's, for dense BF16; the rest is assumed (docs/results/gpu-model.md)."""

QWEN_06 = DecoderShape("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151_936, tied=True)
QWEN_17 = DecoderShape("Qwen3-1.7B", 28, 2048, 16, 8, 128, 6144, 151_936, tied=True)
QWEN_8 = DecoderShape("Qwen3-8B", 36, 4096, 32, 8, 128, 12_288, 151_936, tied=False)
QWEN_32 = DecoderShape("Qwen3-32B", 64, 5120, 64, 8, 128, 25_600, 151_936, tied=False)

STREAMS = (1, 4, 16, 64, 256)
RATES = (0.05, 0.1, 0.2, 0.3, 0.5)
ACCEPTANCE = 0.76
"""Probability that a drafted token is accepted. A published run of Qwen3-32B with Qwen3-1.7B wrote 2.8 tokens
a step with 3 drafts.
"""
TRAFFIC = Traffic(prompt=500, completion=500, rate=0.1, call_tokens=4)


@dataclass(frozen=True)
class ModelledSetting:
    """A pair of models, and the machine and traffic for which ways to use it are compared."""

    student: Model
    teacher: Model
    machine: Machine = H100
    traffic: Traffic = TRAFFIC
    cached: float = 0.0
    acceptance: float = ACCEPTANCE

    def load(self, streams: int) -> Load:
        """The traffic with this many requests at a time."""
        return Load(self.traffic, streams, self.cached)

    @property
    def name(self) -> str:
        """Name of the pair."""
        return f"{self.student.name} / {self.teacher.name.removeprefix('Qwen3-')}"

    def together(self, streams: int) -> float:
        """Tokens/s of cooperation."""
        return cooperation(self.machine, self.student, self.teacher, self.load(streams))

    def one_model(self, streams: int) -> float:
        """Tokens/s of the faster way with the teacher's quality: the teacher alone or speculative decoding.

        If each model has its own card, both cards do this, and each serves half of the streams.
        """
        cards = 1 if self.machine.one_card else min(2, streams)
        machine = replace(self.machine, one_card=True)
        load = self.load(-(-streams // cards))
        speculation = best_speculation(machine, self.student, self.teacher, load, self.acceptance)
        return cards * max(alone(machine, self.teacher, load), speculation.tokens_per_second)

    def gain(self, streams: int) -> float | None:
        """Tokens/s of cooperation, divided by those of `one_model`; None if there is not enough memory."""
        try:
            return self.together(streams) / self.one_model(streams)
        except TooLarge:
            return None


SMALL = ModelledSetting(QWEN_06.model(), QWEN_8.model())
LARGE = ModelledSetting(QWEN_17.model(), QWEN_32.model())
LARGE_FP8 = ModelledSetting(QWEN_17.model(), QWEN_32.model(FP8))
SETTINGS = (SMALL, LARGE, LARGE_FP8)


def _traffic(**changes: Any) -> Callable[[ModelledSetting], ModelledSetting]:
    return lambda setting: replace(setting, traffic=replace(setting.traffic, **changes))


def _machine(**changes: Any) -> Callable[[ModelledSetting], ModelledSetting]:
    return lambda setting: replace(setting, machine=replace(setting.machine, **changes))


def _small_cache(setting: ModelledSetting) -> ModelledSetting:
    student = replace(setting.student, cache=setting.student.cache / 4)
    return replace(setting, student=student, cached=8000.0)


CHANGES: Mapping[str, Callable[[ModelledSetting], ModelledSetting]] = {
    "as above": lambda setting: setting,
    "calls of 1 token": _traffic(call_tokens=1),
    "calls of 16 tokens": _traffic(call_tokens=16),
    "a call costs 1 ms instead of 4": _machine(call=1e-3),
    "no part of a block is read again": _machine(block=0),
    "acceptance 0.6": lambda setting: replace(setting, acceptance=0.6),
    "acceptance 0.85": lambda setting: replace(setting, acceptance=0.85),
    "prompt 2,000, completion 100": _traffic(prompt=2000, completion=100),
    "prompt 100, completion 1,000": _traffic(prompt=100, completion=1000),
    "8,000 tokens of cached conversation": lambda setting: replace(setting, cached=8000.0),
    "the same, student's cache a quarter as large": _small_cache,
    "two cards, one for each model": _machine(one_card=False),
}
"""Single changes of a setting that could change the answer, by name."""
CHANGE_STREAMS = (1, 16, 64)


def run(plan: Plan) -> Section:
    """All tables of predictions; the plan is not needed, since nothing is measured."""
    return Section(
        {
            "speed": Table("Tokens/s on one H100", _speed_rows(), _about()),
            "equal": Table(
                "Cooperation over speculative decoding, if both write the teacher's own text",
                _equal_rows(),
                "A perfect gate asks exactly at the tokens that a draft would get wrong, for one token: the "
                "teacher rate is 1 − acceptance.",
            ),
            "changes": Table(
                "What changes the answer",
                _change_rows(),
                "Cooperation at a rate of 0.1 over the better of teacher alone and speculative decoding.",
            ),
            "published": Table(
                "The same formulas and published measurements", published_rows(H100, QWEN_8.model())
            ),
            "core": Table("The same formulas and this project's measurements on CPU cores", core_rows()),
        },
        machine={"gpu": "H100 SXM, on paper"},
    )


def _about() -> str:
    traffic = TRAFFIC
    return (
        f"Prompts of {traffic.prompt:.0f} tokens, completions of {traffic.completion:.0f}, calls of "
        f"{traffic.call_tokens:.0f} tokens, acceptance {ACCEPTANCE}. *Running*: as many fit into memory."
    )


def _speed_rows() -> list[Row]:
    rows: list[Row] = []
    for setting in SETTINGS:
        for streams in STREAMS:
            rows.append(_speed_row(setting, streams))
    return rows


def _speed_row(setting: ModelledSetting, streams: int) -> Row:
    machine = setting.machine
    load = setting.load(streams)
    speculation = best_speculation(machine, setting.student, setting.teacher, load, setting.acceptance)
    row: dict[str, Value] = {
        "pair": setting.name,
        "streams": streams,
        "running": load.running(machine, [setting.student, setting.teacher]),
        "student alone": alone(machine, setting.student, load),
        "teacher alone": alone(machine, setting.teacher, load),
        "speculative": speculation.tokens_per_second,
        "drafts": speculation.drafts,
    }
    for rate in RATES:
        row[f"cooperation, {rate:g}"] = _traffic(rate=rate)(setting).together(streams)
    return row


def _equal_rows() -> list[Row]:
    rows: list[Row] = []
    for setting in SETTINGS:
        for acceptance in (0.6, ACCEPTANCE, 0.9):
            exact = _traffic(rate=1 - acceptance, call_tokens=1)(replace(setting, acceptance=acceptance))
            row: dict[str, Value] = {"pair": setting.name, "acceptance": acceptance, "rate": 1 - acceptance}
            for streams in STREAMS:
                row[f"{streams} streams"] = exact.gain(streams)
            rows.append(row)
    return rows


def _change_rows() -> list[Row]:
    rows: list[Row] = []
    for name, change in CHANGES.items():
        row: dict[str, Value] = {"changed": name}
        for setting in (SMALL, LARGE_FP8):
            for streams in CHANGE_STREAMS:
                row[f"{setting.name}, {streams}"] = change(setting).gain(streams)
        rows.append(row)
    return rows
