"""Teachers in the configuration: one by its address, several by name."""

import json

import pytest

from server.config import load
from tests.helpers.settings import refusal


def test_a_teacher_given_again_is_a_replica(needed):
    config = load([*needed, "--teacher", "http://b:2"])
    assert [str(url) for url in config.teacher] == ["http://127.0.0.1:8001/", "http://b:2/"]
    assert list(config.teachers) == ["teacher"]


def test_teachers_have_names(needed):
    config = load([*needed[:2], "--teacher", "small=http://a:1", "--teacher", "big=http://b:1,http://b:2"])
    urls = {name: [str(url) for url in teacher.url] for name, teacher in config.teachers.items()}
    assert urls == {"small": ["http://a:1/"], "big": ["http://b:1/", "http://b:2/"]}


def test_a_teacher_without_a_name_is_called_teacher(needed):
    config = load([*needed, "--teacher", "big=http://b:1"])
    assert list(config.teachers) == ["teacher", "big"]


def test_named_teachers_can_be_in_a_file_and_in_a_variable(needed, write, environment):
    named = {
        "small": "http://a:1",
        "big": {"url": ["http://b:1"], "model": "org/Big", "vocabulary": "other", "api_key": "sk-secret"},
        "calculator": {"tool": "http://c:1/calculate", "timeout": 2},
    }
    environment.setenv("WHEELS_TEACHER", json.dumps(named))
    for flags in (write({"teacher": named}), []):
        config = load([*needed[:2], *flags])
        big, calculator = config.teachers["big"], config.teachers["calculator"]
        assert (big.model, big.vocabulary, big.timeout) == ("org/Big", "other", None)
        assert str(calculator.tool[0]) == "http://c:1/calculate"
        assert "sk-secret" not in repr(config)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({}, "teacher: Dictionary should have at least 1 item"),
        ({"student": "http://a"}, "teacher: a teacher cannot be named 'student'"),
        ({"a b": "http://a"}, "teacher.a b"),
        ({"a": "b:1"}, "teacher.a.url: 'b:1' is no URL; expected one like http://b:1"),
        ({"a": {"url": "http://a", "tool": "http://b"}}, "teacher.a: set either url or tool"),
        ({"a": {"model": "x"}}, "teacher.a: set either url or tool"),
        ({"a": {"tool": "http://a", "model": "x"}}, "teacher.a: a tool cannot have a model or a vocabulary"),
        ({"a": {"url": "http://a", "port": 1}}, "teacher.a.port: unknown field (did you mean port?)"),
        ({str(n): "http://a" for n in range(9)}, "teacher: at most 8 teachers can be models, but 9 are"),
    ],
)
def test_impossible_teachers_are_refused(needed, teacher, said):
    assert refusal([*needed[:2], "--teacher", json.dumps(teacher)]).startswith(said)


def test_a_name_stands_for_one_teacher(needed):
    words = ["--teacher", "a=http://a:1", "--teacher", "a=http://a:2"]
    assert refusal([*needed[:2], *words]) == "teacher: two teachers are named 'a'"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--teacher-model", "x"], "teacher_model: with named teachers, set model for each of them"),
        (["--teacher-api-key", "x"], "teacher_api_key: with named teachers, set api_key for each of them"),
        (
            ["--default-budget", '{"fraction": 0.1, "teachers": ["b"]}'],
            "default_budget.teachers: no teacher is named 'b'",
        ),
        (["--models", '{"m": {"teachers": {"b": 0.1}}}'], "models.m.teachers: no teacher is named 'b'"),
        (
            ["--limits", '[{"type": "tokens", "tokens": 9, "window_seconds": 9, "teacher": "b"}]'],
            "limits: no teacher is named 'b'",
        ),
        (
            ["--prices", '{"student": {"input": 1, "output": 1}, "teacher": {"input": 1, "output": 1}}'],
            "prices.teacher: with named teachers, give prices by name",
        ),
        (
            [
                "--prices",
                '{"student": {"input": 1, "output": 1}, "teacher": {"b": {"input": 1, "output": 1}}}',
            ],
            "prices.teacher: no teacher is named 'b'",
        ),
        (
            ["--prices", '{"student": {"input": 1, "output": 1}, "teacher": {"a": {"input": 1}}}'],
            "prices.teacher.a.output: Field required",
        ),
    ],
)
def test_with_names_each_teacher_has_its_own_settings(needed, flags, said):
    assert refusal([*needed[:2], "--teacher", "a=http://a:1", *flags]) == said


def test_either_every_model_has_a_price_or_none_has(needed):
    prices = {"student": {"input": 1, "output": 1}, "teacher": {"a": {"input": 1, "output": 1}}}
    words = [*needed[:2], "--teacher", "a=http://a:1", "--prices", json.dumps(prices)]
    assert load(words).prices.of_teacher("a").output == 1
    assert refusal([*words, "--teacher", "b=http://b:1"]) == "prices.teacher: no prices for b"


def test_a_tool_can_be_named_by_a_flag(needed):
    config = load([*needed, "--teacher", 'calculator={"tool": "http://c:1/add"}'])
    assert [name for name, teacher in config.teachers.items() if teacher.tool] == ["calculator"]
    assert refusal([*needed, "--teacher", "calculator={"]) == "teacher: calculator: not JSON: '{'"
