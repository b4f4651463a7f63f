"""Faults in data, templates and servers end `wheels train` with one line and status 2."""

import json

import pytest

from tests.helpers.commands import evaluate, train
from tests.helpers.numbers import tokenizer_of_numbers
from tests.helpers.recipes import ROUTER, SCHEDULE, write_recipe
from training.model_config import Shape
from training.models import new_model, save_model

GOOD = '{"source": "At 2:30 pm.", "target": "Um halb drei."}\n'
STUDENT = {"method": {"type": "sft"}, "schedule": SCHEDULE | {"steps": 2}}


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A directory with an untrained `teacher` and `student`, with a context of 64 tokens."""
    directory = tmp_path_factory.mktemp("ready")
    tokenizer = tokenizer_of_numbers(context=64)
    for role in ("teacher", "student"):
        shape = Shape(hidden=32, layers=1, heads=1, feed_forward=32, context=64)
        save_model(new_model(shape, tokenizer, 0), tokenizer, directory / role)
    return directory


@pytest.fixture
def recipe(ready, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid", "test"):
        (data / f"{split}.jsonl").write_text(GOOD.replace("At", split))
    return write_recipe(
        tmp_path,
        ready,
        task={"name": "jsonl", "options": {"directory": str(data)}},
        student={"pretrained": f"{ready}/student"} | STUDENT,
        router=ROUTER | {"span_tokens": 1, "prompts": 4},
    )


def refusal(capsys, *arguments, command=train):
    assert command([*arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("stage", ["student", "router"])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"source": "a", "target": null}', "'target' is null"),
        ('{"source": "a", "target": 3}', "'target' is a number"),
        ('{"source": 3, "target": "a"}', "'source' is a number"),
        ('{"source": NaN, "target": "a"}', "NaN"),
        ('{"source": "\\ud83d", "target": "a"}', "half of a surrogate pair"),
        ('{"source": "a"', "is not JSON"),
        ("", "is blank"),
    ],
)
def test_a_bad_line_is_named(recipe, tmp_path, capsys, stage, line, problem):
    file = tmp_path / "data" / "train.jsonl"
    file.write_text(f"{GOOD}{line}\n{GOOD}")
    message = refusal(capsys, recipe, "--stage", stage)
    assert f"{file}:2: " in message
    assert problem in message


TEMPLATES = [
    ("{{ messages[0].content", "TemplateSyntaxError"),
    ("{{ raise_exception('no system') }}", "no system"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{{ messages[1].content }}", "UndefinedError"),
    ("Hello", "leaves the user's message out"),
]


@pytest.mark.parametrize(("template", "problem"), TEMPLATES)
def test_a_broken_template_is_named(recipe, capsys, template, problem):
    message = refusal(capsys, recipe, f"chat.template={json.dumps(template)}", "--stage", "student")
    assert "the chat template" in message
    assert problem in message


@pytest.mark.parametrize("stage", ["student", "router"])
def test_sources_that_are_all_too_long_are_refused(recipe, tmp_path, capsys, stage):
    long = GOOD.replace("At", "At " + "x" * 200)
    (tmp_path / "data" / "train.jsonl").write_text(long)
    student = [] if stage == "student" else ["student.method=null", "student.schedule=null"]
    message = refusal(capsys, recipe, *student, "--stage", stage)
    assert "too few examples have" in message


def test_a_pair_whose_examples_are_too_long_is_not_evaluated(recipe, tmp_path, capsys):
    small = ["student.method=null", "student.schedule=null", "router.budgets=[0.5]"]
    assert train([recipe, *small]) == 0
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(GOOD.replace("At", split + "x" * 200))
    pair = str(tmp_path / "out")
    assert "too few examples have" in refusal(capsys, pair, "--recipe", recipe, *small, command=evaluate)
    (tmp_path / "out" / "teacher").unlink()
    message = refusal(capsys, pair, "--recipe", recipe, *small, command=evaluate)
    assert f"no model in {pair}/teacher" in message
