"""Refusals of `wheels train` and `wheels evaluate`: one line that names the fault, exit status 2."""

import re

import pytest

from wheels import main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["train", "demo", "task.name=nosuch"],
            "task nosuch: unknown task 'nosuch'; known: dataset, jsonl, numbers",
        ),
        (["train", "demo", "task.options={depth: 3}"], "task numbers: .*takes no arguments"),
        (["train", "multi30k", "task.options.directory=/no/where"], "task jsonl: .*/no/where/train.jsonl"),
        (["train", "demo", "--dry-run", "task.name=nosuch"], "task nosuch: unknown task"),
        (["evaluate", "deploy/demo", "task.name=nosuch"], "task nosuch: unknown task"),
        (["evaluate", "deploy/demo", "--router", "seed1"], "--router 'seed1': expected NAME=DIR"),
        (["evaluate", "deploy/demo", "--router", "=x"], "--router '=x': expected NAME=DIR"),
        (["evaluate", "deploy/demo", "--router", "learned=x"], "learned is already the name of a method"),
        (
            ["evaluate", "deploy/demo", "--router", "a=x", "--router", "a=y"],
            "a is already the name of a method",
        ),
        (
            ["train", "synopses", "student.shedule.steps=1"],
            r"student.shedule: unknown field \(did you mean sch",
        ),
        (
            ["train", "hf-pair", "student.method={type: kd, temprature: 2}"],
            "overrides: student.method.temprature",
        ),
        (["train", "demo", "router.width=x"], "the overrides: router.width: Input should be a valid integer"),
        (["train", "demos"], "no recipe demos: expected a YAML file, or one of demo, hf-pair, multi30k,"),
        (
            ["evaluate", "--recipe", "demos", "deploy/demo"],
            "no recipe demos: expected a YAML file, or one of",
        ),
        (
            ["evaluate", "--gateway", "http://127.0.0.1:9"],
            "--gateway URL needs --recipe, which sets the task",
        ),
        (["evaluate", "/no/where"], "no such directory: /no/where"),
        (["evaluate", "deploy"], "no router checkpoint in deploy/router"),
        (["evaluate"], "expected one PAIR, or --gateway URL"),
        (["evaluate", "--recipe", "demo", "--gateway", ""], "the gateway at : Connection error"),
        (["evaluate", "--gateway", "http://127.0.0.1:9", "--no-curves"], "--no-curves needs a PAIR"),
        (["evaluate", "--gateway", "http://127.0.0.1:9", "--router", "a=x"], "--router needs a PAIR"),
        (["evaluate", "--gateway", "http://127.0.0.1:9", "--spans"], "--spans needs a PAIR"),
        (["evaluate", "deploy/demo", "--budgets", "0.1"], "--budgets needs --gateway URL"),
        (["evaluate", "deploy/demo", "--concurrency", "4"], "--concurrency needs --gateway URL"),
        (["evaluate", "deploy/demo", "--span-tokens", "4"], "--span-tokens needs --gateway URL"),
        (["evaluate", "deploy/demo", "--against", "a=x"], "--against needs --gateway URL"),
        (
            ["evaluate", "--recipe", "demo", "--gateway", "http://127.0.0.1:9", "--against", "a"],
            "--against 'a': expected NAME=DIR",
        ),
        (
            ["evaluate", "--recipe", "demo", "--gateway", "http://127.0.0.1:9", "--against", "gateway=x"],
            "gateway is already the name of a method",
        ),
        (
            ["evaluate", "deploy/demo", "--gateway", "http://127.0.0.1:9", "--against", "entropy=x"],
            "entropy is already the name of a method",
        ),
        (
            [
                "evaluate",
                "--recipe",
                "demo",
                "--gateway",
                "http://127.0.0.1:9",
                "--against",
                "before=/no/where",
            ],
            "/no/where/report.json: not a report of",
        ),
        (
            ["evaluate", "deploy/demo", "--spans", "2", "--no-curves"],
            "--no-curves leaves out what --spans asks",
        ),
        (["evaluate", "a", "b", "--gateway", "http://127.0.0.1:9"], "expected one PAIR"),
        (
            ["evaluate", "--recipe", "demo", "--gateway", "http://127.0.0.1:9/v1"],
            "the gateway at http://127.0.0.1:9: Connection error",
        ),
    ],
)
def test_a_fault_is_reported_in_one_line(capsys, arguments, named, tmp_path):
    if arguments[0] == "train":
        arguments = [*arguments, f"output={tmp_path / 'out'}", f"work={tmp_path / 'work'}"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(named, line)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "expected keys and values"),
        (b"- a", "expected keys and values"),
        (b"a: [", "while parsing"),
        (b"\xff\xfe", "can't decode"),
        (b"work: a", "output: Field required; .*task: Field required"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named_in_one_line(capsys, tmp_path, content, named):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"{path}: .*{named}", line)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=[", "override 'seed=\\[': while parsing"),
        ("router.gain=excess", "router: gain excess: write {type: regret}"),
        ("router.window=4", "router: window is gone"),
        ("seed.a=1", "seed is a plain value without fields"),
        ("seed", "expected key=value"),
    ],
)
def test_an_override_that_cannot_be_read_is_named_in_one_line(capsys, tmp_path, override, named):
    assert main(["train", "demo", override, f"output={tmp_path}/out", f"work={tmp_path}/work"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(named, line)
