"""Gates that are taught the task's quality: who judges completions, and the critic without the noise."""

import json
from dataclasses import replace

import pytest
import torch

from router.gate import RandomGate
from tests.helpers.tiny_models import END, RESERVED, VISIBLE, model
from training.gating import judge
from training.gating.agreement import correlation
from training.gating.expected_gain import expected_gain
from training.gating.head import Head
from training.gating.judge import Judge, drawn_in_process
from training.gating.lessons import Lessons
from training.gating.rollout import ClosedLoop
from training.tasks import make_task

torch.set_num_threads(1)
N, PATHS = 15_000, 750


@pytest.fixture(scope="module")
def head():
    student = model(0)
    return Head(student, RESERVED, 16)


@pytest.fixture(scope="module")
def noisy(head):
    """Lessons, and the signal in their target, which is a fifteenth of its variance."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, head.taps.shape[1], generator=generator)
    view = torch.randn(N, 7, generator=generator)
    view[:, 0] = view[:, 0].clamp(min=0)  # the models agree at one position of two
    head.start_from(states)
    signal = (states[:, 0] > 0) * view[:, 4].clamp(min=0)
    target = signal + 2 * torch.randn(N, generator=generator)
    target[view[:, 0] == 0] = 0
    row = torch.arange(N) * PATHS // N
    source = row % (PATHS // 2)  # each source comes twice
    return Lessons(states, target, torch.zeros(N, dtype=torch.bool), row, source, view), signal


@pytest.fixture(scope="module")
def found(head, noisy):
    return expected_gain(head, noisy[0], seed=0)


def test_the_critic_finds_the_signal_in_the_noise(noisy, found):
    lessons, signal = noisy
    differ = lessons.view[:, 0] > 0
    assert correlation(found[differ], signal[differ]) > 2 * correlation(
        lessons.target[differ], signal[differ]
    )
    assert not found[~differ].any()


def test_a_source_is_judged_by_lessons_of_other_sources(head, noisy, found):
    """This holds even if the source comes again in a later round, with other paths."""
    lessons, _ = noisy
    changed = lessons.target.clone()
    own = lessons.source % 5 == 2
    assert len(lessons.row[own].unique()) == 2 * len(lessons.source[own].unique())
    changed[own] += 100
    again = expected_gain(head, replace(lessons, target=changed), seed=0)
    assert torch.equal(again[own], found[own])
    assert not torch.equal(again[~own], found[~own])


class Letters:
    """A tokenizer in which ids from 2 on are letters."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(95 + token) for token in row if token != END) for row in rows]


def ids(text):
    return [ord(c) - 95 for c in text] + [END]


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A judge of the references "aaaa" and "bbbb", and the prompts that its teacher completed."""
    for name in ("train", "valid", "test"):
        rows = [{"source": f"{name} {c}", "target": 4 * c} for c in "ab"]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, asked = make_task("jsonl", directory=str(tmp_path)), []

    def complete(_model, prompts, *_):
        asked.extend(prompts)
        return [ids("aacc") if prompt == [7] else ids("bbbb") for prompt in prompts]

    monkeypatch.setattr(judge, "complete", complete)
    pair = ClosedLoop(model(0), model(1), RandomGate(RESERVED), VISIBLE, END)
    draw = drawn_in_process(pair)
    return lambda drawn: Judge(task, Letters(), task.test(), [[7], [8]], drawn, draw), asked


def test_the_worth_of_a_completion_comes_from_the_reference_and_the_teacher(judged):
    """The worth is half exact match and half edit similarity, 100 points in all, computed by hand."""
    make, asked = judged
    worth = make(2).worth
    # Against "aaaa": right; against twice "aacc": wrong, two of four letters. "bbbb" is right for all.
    found = worth([0, 1, 0], [ids("aaaa"), ids("bbbb"), ids("aacc")])
    assert found.tolist() == pytest.approx([(100 + 25) / 2, 100, (25 + 100) / 2])
    assert sorted(asked) == [[7], [7], [8], [8]]
    worth([1, 0], [ids("a"), ids("b")])
    assert len(asked) == 4  # each prompt once


def test_without_the_teachers_completions_the_references_judge(judged):
    make, asked = judged
    assert make(0).worth([0, 0], [ids("aaaa"), ids("aacc")]).tolist() == [100, 25]
    assert not asked
