"""Metrics of answers, chosen by name or given as your own `module:function`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from measuring.chats import Source, messages_of

Metric: TypeAlias = Callable[[str, str], float]
"""Computes the quality of an answer, in [0, 1], from target and answer."""
JudgeFunction: TypeAlias = Callable[[list[dict[str, str]], str], float]
"""Computes the quality of an answer, in [0, 1], from messages and answer."""


def _exact() -> Metric:
    return lambda target, answer: float(target == answer)


def _bleu() -> Metric:
    from sacrebleu import sentence_bleu

    return lambda target, answer: sentence_bleu(answer, [target]).score / 100


def _chrf() -> Metric:
    from sacrebleu import sentence_chrf

    return lambda target, answer: sentence_chrf(answer, [target]).score / 100


def _rouge_l() -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda target, answer: scorer.score(target, answer)["rougeL"].fmeasure


METRICS: dict[str, Callable[[], Metric]] = {
    "exact": _exact,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
}
"""Makers of the known metrics, by name; a metric's package is imported when it is made."""


def _corpus_bleu(targets: list[str], answers: list[str]) -> float:
    from sacrebleu import corpus_bleu

    return corpus_bleu(answers, [targets]).score / 100


def _corpus_chrf(targets: list[str], answers: list[str]) -> float:
    from sacrebleu import corpus_chrf

    return corpus_chrf(answers, [targets]).score / 100


CORPUS: dict[str, Callable[[list[str], list[str]], float]] = {"bleu": _corpus_bleu, "chrf": _corpus_chrf}
"""Metrics that are defined on a whole set, by name; the others are means over its examples."""


def metric_maker(name: str) -> Callable[[], Metric]:
    """The maker of a metric.

    Args:
        name: a name in `METRICS`, or `module:function`.

    Raises:
        ValueError: there is no such metric.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}, or module:function")
    function = imported(name, "metric")
    return lambda: lambda target, answer: in_range(function(target, answer), name)


def judge_of(name: str) -> Callable[[Source, str], float]:
    """The judge function that `module:function` names, which gets a source and an answer.

    Raises:
        ValueError: there is no such function.
    """
    function: JudgeFunction = imported(name, "judge")
    return lambda source, answer: in_range(function(messages_of(source), answer), name)


def imported(name: str, what: str) -> Callable[..., Any]:
    """The function that `module:function` names; the module may be in the working directory.

    Args:
        name: `module:function`.
        what: what the function is used as, for messages.

    Raises:
        ValueError: there is no such function.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"{what} {name!r} is not a function")
    return function


def in_range(value: Any, name: str) -> float:
    """The result of the function `name`. Raises ValueError unless it is a number from 0 to 1."""
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} returned {value!r}, expected a number from 0 to 1")
    return number
