"""`wheels train --dry-run` of the router's stage: its estimates of time and memory."""

import pytest
import torch

from measuring.examples import sources_of
from router.gate import RandomGate
from router.reserved import ReservedRows
from tests.helpers.commands import train
from tests.helpers.numbers import tokenizer_of_numbers
from tests.helpers.recipes import ROUTER, SCHEDULE, write_recipe
from tests.helpers.taking_gateway import TakingGateway, stage_of
from training.gating import rollout
from training.gating.rollout import ClosedLoop, Request, cache_bytes
from training.model_config import Shape
from training.models import load_model, new_model
from training.router_dry_run import Timed, projected
from training.served_dry_run import try_served_router
from training.tasks import make_task
from training.tokenizer import encode_prompts, load_tokenizer

torch.set_num_threads(1)


@pytest.fixture
def recipe(untrained_pair, tmp_path):
    return write_recipe(
        tmp_path,
        untrained_pair,
        student={"prune": {"layers": 1}, "method": {"type": "kd"}, "schedule": SCHEDULE | {"steps": 4}},
        router=ROUTER | {"prompts": 100, "rounds": 2, "calibration_examples": 40},
    )


def test_a_dry_run_covers_the_router_before_its_student_is_there(recipe, tmp_path, capsys):
    """At most 2 rounds of 100 completions of 8 tokens keep the student's state, 64 numbers, of each token."""
    assert train([recipe, "--dry-run", "--stage", "router"]) == 0
    told = capsys.readouterr().out
    assert "router: on cpu" in told
    assert "100 at once, of at most 8 tokens" in told
    assert "1,600" in told
    assert f"{1600 * 64 * 4 / 1e6:.1f} MB" in told
    prompts = encode_prompts(tokenizer_of_numbers(), sources_of(make_task("numbers").valid()[:40]))
    kept = sum(map(len, prompts)) * (512 + 256)  # of two layers, and of the one that is left of them
    assert f"{kept / 1e6:.1f} MB during the calibration" in told
    assert "student: kd" not in told
    assert "unknown until both models are trained" in told
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_with_existing_models_the_calibration_is_measured_too(recipe, untrained_pair, capsys):
    there = f"student={{pretrained: {untrained_pair}/student}}"
    few = ["router.prompts=30", "router.calibration_examples=10", "router.budgets=[0.2]"]
    assert train([recipe, "--dry-run", "--stage", "router", there, *few]) == 0
    told = capsys.readouterr().out
    assert "total" in told
    assert "unknown until both models are trained" not in told


def test_a_dry_run_of_everything_has_a_table_for_each_stage_that_computes(recipe, capsys):
    assert train([recipe, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.index("student: kd on 1") < told.index("router: on cpu")


def test_a_router_from_served_completions_is_tried_in_pieces(recipe, capsys):
    """2 rounds have 100 completions of 8 tokens. 40 examples run at 3 budgets 9 times, twice without."""
    rollouts = "router.rollouts={type: gateway, url: 'http://127.0.0.1:9', router: there}"
    assert train([recipe, "--dry-run", "--stage", "router", rollouts, "router.budgets=[0.1, 0.2, 0.3]"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "200 in 2 rounds, at most 1,600 tokens; at most 1,160 more for the prices" in told
    assert f"states of 1,600 positions {1600 * 64 * 4 / 1e6:.1f} MB" in told
    assert "reading" in told
    assert "does not answer yet" in told
    quality = "router.gain={type: quality}"
    assert train([recipe, "--dry-run", "--stage", "router", rollouts, quality]) == 0
    assert "and 1,600 that are begun" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_gateway_that_answers_is_timed(untrained_pair, tmp_path):
    gateway = TakingGateway(load_tokenizer(untrained_pair / "student"), directory=tmp_path)
    run = try_served_router(stage_of(gateway, untrained_pair, rounds=2))
    assert len(gateway.asked) == 32, "twice as many as at once"
    assert run.completion is not None
    assert run.completion > 0
    assert (run.work.completions, run.work.asked) == (40, 2 * (2 * 9 + 2))


def test_constant_time_is_spent_once_for_each_batch():
    """8 completions take 3 s and 64 take 10 s: 1/8 s for each, and 2 s for each of 4 batches."""
    assert projected(Timed(8, 3.0), Timed(64, 10.0), count=2000, batches=4) == pytest.approx(4 * 2 + 2000 / 8)
    assert projected(Timed(8, 40.0), Timed(8, 40.0), count=2000, batches=4) == pytest.approx(10_000)


def test_completions_whose_caches_would_not_fit_are_written_in_turns(untrained_pair, monkeypatch):
    """A token takes 2 layers x 32 x 2 x 4 bytes of cache in each model, which has one head."""
    student, teacher = (load_model(untrained_pair / role) for role in ("student", "teacher"))
    assert cache_bytes(student) == cache_bytes(teacher) == 2 * 2 * 32 * 4
    loop = ClosedLoop(student, teacher, RandomGate(ReservedRows(300, 32)), 300, 1, max_tokens=4)
    assert loop.token_bytes == 2 * 512
    requests = [Request(list(range(5, 5 + length))) for length in (6, 2, 6, 2, 6)]
    whole = loop.write(requests)
    monkeypatch.setattr(rollout, "CACHE", 2 * 1024 * (6 + 4))
    assert (loop.rows_of(6), loop.rows_of(2)) == (2, 3)
    turns = []
    write = ClosedLoop._write
    monkeypatch.setattr(ClosedLoop, "_write", lambda *of: (turns.append(of[3]), write(*of))[1])
    assert [done.tokens for done in loop.write(requests)] == [done.tokens for done in whole]
    assert turns == [[1, 3], [0, 2], [4]]


def test_one_completion_is_written_whatever_memory_it_takes(monkeypatch):
    model = new_model(Shape(hidden=32, layers=1, heads=1, feed_forward=32), tokenizer_of_numbers(), 0)
    loop = ClosedLoop(model, model, RandomGate(ReservedRows(300, 32)), 300, 1)
    monkeypatch.setattr(rollout, "CACHE", 1)
    assert loop.rows_of(100) == 1
