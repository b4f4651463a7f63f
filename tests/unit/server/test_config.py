import json
from pathlib import Path
from typing import get_args

import pytest

from router.budget import Budget
from router.gate import GATES
from server.config import ServeConfig, load
from server.vllm_flags import Repeated
from tests.helpers.settings import refusal

# Flags, variables and files


def test_the_needed_settings_are_enough(needed, tmp_path):
    config = load(needed)
    assert config.student == tmp_path / "student"
    assert [str(url) for url in config.teacher] == ["http://127.0.0.1:8001/"]
    assert config.router is None
    assert (config.host, config.port) == ("127.0.0.1", 8000)
    assert config.default_budget == Budget(fraction=0.1)
    assert (config.gate, config.on_teacher_error) == (None, "degrade")
    assert config.vllm == {}
    assert config.models == {}


def test_every_setting_can_be_in_a_file(needed, write, tmp_path):
    settings = {
        "student": needed[1],
        "teacher": "http://10.0.0.2:8001",
        "router": str(tmp_path),
        "port": 9000,
        "default_budget": {"fraction": 0.2, "calls": 5},
        "gate": "margin",
        "price": -2.5,
        "teacher_timeout": 3,
        "vllm": {"max_model_len": 256},
    }
    config = load(write(settings))
    assert config.router == tmp_path
    assert config.port == 9000
    assert config.default_budget == Budget(fraction=0.2, calls=5)
    assert (config.gate, config.price, config.teacher_timeout) == ("margin", -2.5, 3.0)
    assert config.vllm == {"max_model_len": 256}


def test_every_setting_can_be_in_the_environment(needed, environment):
    for name, value in {
        "STUDENT": needed[1],
        "TEACHER": needed[3],
        "PORT": "9000",
        "DEFAULT_BUDGET": '{"tokens": 7}',
        "ON_TEACHER_ERROR": "error",
    }.items():
        environment.setenv(f"WHEELS_{name}", value)
    config = load([])
    assert (config.port, config.on_teacher_error) == (9000, "error")
    assert config.default_budget == Budget(tokens=7)


def test_flags_win_over_variables_and_variables_over_the_file(needed, write, environment):
    file = write({"port": 1001, "host": "10.0.0.1", "gate": "random"})
    environment.setenv("WHEELS_PORT", "1002")
    environment.setenv("WHEELS_HOST", "10.0.0.2")
    config = load([*needed, *file, "--port", "1003"])
    assert (config.port, config.host, config.gate) == (1003, "10.0.0.2", "random")


def test_variables_of_others_are_ignored(needed, environment):
    environment.setenv("NOT_WHEELS_PORT", "1")
    environment.setenv("PORT", "2")
    assert load(needed).port == 8000


@pytest.mark.parametrize("content", ["", "# nothing yet\n"])
def test_an_empty_file_sets_nothing(needed, write, content):
    assert load([*needed, *write(content)]).port == 8000


def test_a_configuration_cannot_be_changed(needed):
    with pytest.raises(ValueError, match="frozen"):
        load(needed).port = 1


def test_the_key_is_not_shown(needed):
    config = load([*needed, "--teacher-api-key", "sk-secret"])
    assert "sk-secret" not in repr(config)
    assert config.teacher_api_key.get_secret_value() == "sk-secret"


# Budgets as text


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0", Budget(fraction=0)),
        ("1", Budget(fraction=1)),
        ("0.25", Budget(fraction=0.25)),
        ("5e-2", Budget(fraction=0.05)),
        ('{"tokens": 3}', Budget(tokens=3)),
        ('{"fraction": 0.5, "tokens": 3, "calls": 2}', Budget(fraction=0.5, tokens=3, calls=2)),
    ],
)
def test_a_budget_can_be_text(needed, environment, text, budget):
    assert load([*needed, "--default-budget", text]).default_budget == budget
    environment.setenv("WHEELS_DEFAULT_BUDGET", text)
    assert load(needed).default_budget == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.5", "default_budget.fraction: Input should be less than or equal to 1"),
        ("NaN", "default_budget.fraction: Input should be a finite number"),
        ("a lot", "default_budget: neither a fraction nor JSON: 'a lot'"),
        ('{"tokens": ', "default_budget: neither a fraction nor JSON"),
        ('{"tokens": 1.5}', "default_budget.tokens: Input should be a valid integer"),
        ('{"dollars": 3}', "default_budget.dollars: unknown field"),
        ("{}", "default_budget: set at least one of fraction, tokens, calls"),
        ("null", "default_budget: Input should be a valid dictionary"),
        ("true", "default_budget: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_budget_is_refused(needed, text, said):
    assert said in refusal([*needed, "--default-budget", text])


# Names of models


@pytest.mark.parametrize("how", ["flag", "variable", "file"])
def test_names_of_models_have_budgets(needed, environment, write, how):
    models = {"wheels-fast": 0, "org/wheels: best": 0.5, "wheels-careful": {"fraction": 0.2, "calls": 5}}
    argv = list(needed)
    if how == "flag":
        argv += ["--models", json.dumps(models)]
    elif how == "variable":
        environment.setenv("WHEELS_MODELS", json.dumps(models))
    else:
        argv += write({"models": models})
    assert load(argv).models == {
        "wheels-fast": Budget(fraction=0),
        "org/wheels: best": Budget(fraction=0.5),
        "wheels-careful": Budget(fraction=0.2, calls=5),
    }


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ('{"": 0}', "models: a model name must not be empty, start with a dash or have outer spaces: ''"),
        ('{" x": 0}', "must not be empty, start with a dash or have outer spaces: ' x'"),
        ('{"--port": 0}', "must not be empty, start with a dash or have outer spaces: '--port'"),
        ('{"mine": 0}', "models: 'mine' is the served_model_name: set default_budget for it"),
        ('{"a": 0, "b": 0, "a": 0.5}', "models: two entries named 'a'"),
        ('{"a": 2}', "models.a.fraction: Input should be less than or equal to 1"),
        ('{"a": null}', "models.a: Input should be a valid dictionary"),
        ('{"a": {"dollars": 1}}', "models.a.dollars: unknown field"),
        ('["a"]', "models: Input should be a valid dictionary"),
        ("a", "models: not JSON: 'a'"),
    ],
)
def test_wrong_names_of_models_stop_the_start(needed, models, said):
    assert said in refusal([*needed, "--served-model-name", "mine", "--models", models])


@pytest.mark.parametrize("text", ["models: {a: 0, b: 1, a: 0.5}", "models: {a: 0}\nport: 1\nmodels: {b: 0}"])
def test_a_name_that_is_in_the_file_twice_stops_the_start(needed, write, text):
    said = refusal([*needed, *write(text)])
    assert "two entries named 'a'" in said or "two entries named 'models'" in said
    assert "line" in said


def test_a_mapping_that_another_one_extends_is_no_duplicate(needed, write):
    """When the inner of two mappings is read, the outer one already has its entries."""
    text = "vllm: {hf-overrides: {x: {y: {z: &b {<<: &a {k: 1}, k: 2}}}, c: {<<: *b}}}"
    overrides = load([*needed, *write(text)]).vllm["hf-overrides"]
    assert overrides == {"x": {"y": {"z": {"k": 2}}}, "c": {"k": 2}}


# Wrong settings, which stop the start


def test_an_unknown_key_in_the_file_is_named(needed, write):
    assert refusal([*needed, *write({"prot": 9000})]) == "prot: unknown field (did you mean port?)"


def test_an_unknown_variable_is_named(needed, environment):
    environment.setenv("WHEELS_PROT", "9000")
    assert refusal(needed) == "prot: unknown field (did you mean port?)"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prot", "9000"], "--prot (did you mean --port?);"),
        (["--por", "9000"], "--por (did you mean --port?);"),
        (["--vllm", "9000"], "--vllm; the models are"),
        (["org/Small"], "org/Small; the models are --student and --teacher,"),
        (
            ["--max-model-len", "9000"],
            "--max-model-len; the models are --student and --teacher, and flags of vLLM",
        ),
    ],
)
def test_an_unknown_word_is_named(needed, words, named):
    told = refusal([*needed, *words])
    assert told.startswith(f"unknown argument {named}")
    assert told.endswith("flags of vLLM's own server come after --")


def test_every_problem_is_named_at_once(needed):
    message = refusal(["--student", needed[1], "--port", "0", "--gate", "oracle"])
    assert {problem.split()[0] for problem in message.split("; ")} == {"teacher", "port:", "gate:"}


@pytest.mark.parametrize("teacher", ["http://a:1,http://b:2", ["http://a:1", "http://b:2"]])
def test_a_teacher_may_have_replicas(needed, tmp_path, teacher):
    file = tmp_path / "wheels.yaml"
    file.write_text(json.dumps({"teacher": teacher}))
    config = load([*needed[:2], "--config", str(file)])
    assert [str(url) for url in config.teacher] == ["http://a:1/", "http://b:2/"]


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_needed_setting_is_asked_for_by_its_flag(needed, name):
    at = needed.index(f"--{name}")
    assert refusal(needed[:at] + needed[at + 2 :]) == f"{name} is required (--{name})"


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("port", "0", "greater than or equal to 1"),
        ("port", "65536", "less than or equal to 65535"),
        ("port", "http", "valid integer"),
        ("student", "/no/where", "no such directory: /no/where"),
        ("router", "/no/where", "no such directory: /no/where"),
        ("teacher", "127.0.0.1:8001", "URL"),
        ("teacher", "http://a,http://b,http://a", "given twice"),
        ("span_timeout", "0", "greater than 0"),
        ("teacher_concurrency", "0", "greater than 0"),
        ("teacher_queue", "-0.1", "greater than or equal to 0"),
        ("teacher", "ftp://127.0.0.1", "URL scheme should be 'http' or 'https'"),
        ("gate", "oracle", "'learned', 'random', 'entropy', 'margin' or 'max_probability'"),
        ("price", "nan", "finite"),
        ("price", "inf", "finite"),
        ("span_tokens", "0", "greater than 0"),
        ("on_teacher_error", "retry", "'degrade' or 'error'"),
        ("teacher_timeout", "0", "greater than 0"),
        ("teacher_wait", "-1", "greater than or equal to 0"),
        ("breaker_failures", "0", "greater than 0"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(needed, setting, value, said):
    message = refusal([*needed, f"--{setting.replace('_', '-')}", value])
    assert message.startswith((f"{setting}: ", f"{setting}.1: "))  # the second address
    assert said in message


def test_every_gate_can_be_chosen():
    choices, nothing = get_args(ServeConfig.model_fields["gate"].annotation)
    assert (get_args(choices), nothing) == (tuple(GATES), type(None))


def test_a_file_in_place_of_a_directory_is_refused(needed, tmp_path):
    (tmp_path / "router").write_text("")
    assert "no such directory" in refusal([*needed, "--router", str(tmp_path / "router")])


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "a_b/c.d@main", "a/b@refs/pr/1", "a/b@0123abc"])
def test_a_checkpoint_may_be_a_name_on_the_hub(needed, name):
    assert str(load(["--student", name, *needed[2:]]).student) == name


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "./a/b", "../b", "a/", "/a", "a/b@", "a/.b", "a b/c"])
def test_a_path_that_is_no_name_on_the_hub_is_a_directory(needed, name):
    assert refusal(["--student", name, *needed[2:]]) == f"student: no such directory: {name}"


@pytest.mark.parametrize("value", [None, 17, ["a", "b"]])
def test_a_directory_is_a_path(needed, write, value):
    assert refusal([*needed[2:], *write({"student": value})]).startswith("student: no such directory")


@pytest.mark.parametrize("value", ["/no/where.jsonl", "/", 17])
def test_a_setting_for_a_file_must_name_an_existing_file(needed, write, value):
    assert refusal([*needed, *write({"examples": value})]) == f"examples: no such file: {value}"


def test_an_existing_file_is_accepted(needed, tmp_path):
    (tmp_path / "examples.jsonl").write_text("")
    config = load([*needed, "--examples", str(tmp_path / "examples.jsonl")])
    assert config.examples == tmp_path / "examples.jsonl"


def test_a_missing_file_is_named(needed):
    assert "/no/where.yaml" in refusal([*needed, "--config", "/no/where.yaml"])


@pytest.mark.parametrize("content", ["port: [", "- port\n- host", "just text", "17"])
def test_a_file_without_settings_is_named(needed, write, tmp_path, content):
    assert str(tmp_path / "wheels.yaml") in refusal([*needed, *write(content)])


def test_a_binary_file_is_named(needed, tmp_path):
    (tmp_path / "wheels.yaml").write_bytes(b"\xff\x00\xff")
    assert "wheels.yaml" in refusal([*needed, "--config", str(tmp_path / "wheels.yaml")])


# Flags of vLLM


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ([], {}),
        (["--max-model-len", "256"], {"max-model-len": "256"}),
        (["--max-model-len=256"], {"max-model-len": "256"}),
        (["--enforce-eager"], {"enforce-eager": True}),
        (["--enforce-eager", "--seed", "-1"], {"enforce-eager": True, "seed": "-1"}),
        (["--api-key", "OLD", "NEW"], {"api-key": ["OLD", "NEW"]}),
        (["--api-key=OLD", "NEW", "--seed", "1"], {"api-key": ["OLD", "NEW"], "seed": "1"}),
        (["--api-key", "OLD", "--api-key", "NEW"], {"api-key": Repeated(["OLD", "NEW"])}),
        (["--chat-template="], {"chat-template": ""}),
        (["--hf_overrides.a_b", "1"], {"hf-overrides.a_b": "1"}),
        (["-tp", "2", "-O3"], {"-tp": "2", "-O3": True}),
    ],
)
def test_vllms_flags_follow_two_dashes(needed, flags, settings):
    assert load([*needed, "--", *flags]).vllm == settings


def test_vllms_flags_win_over_the_file(needed, write):
    file = write({"vllm": {"seed": 1, "max-model-len": 256}})
    assert load([*needed, *file, "--", "--seed", "2"]).vllm == {"seed": "2", "max-model-len": 256}


def test_a_flag_replaces_the_files_setting_in_any_spelling(needed, write):
    file = write({"vllm": {"max_model_len": 256, "served": 1}})
    assert load([*needed, *file, "--", "--max-model-len", "8"]).vllm == {"served": 1, "max-model-len": "8"}


def test_settings_of_vllm_can_be_in_the_environment(needed, environment):
    environment.setenv("WHEELS_VLLM", '{"max-model-len": 256}')
    assert load(needed).vllm == {"max-model-len": 256}
    assert load([*needed, "--", "--seed", "1"]).vllm == {"max-model-len": 256, "seed": "1"}


@pytest.mark.parametrize("flags", [[], ["--", "--seed", "1"]])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--seed"], "vllm: expected a mapping from flags of vLLM's server to values"),
        ({"max_model_len": 1, "max-model-len": 2}, "vllm: a setting is given twice, in two spellings"),
    ],
)
def test_wrong_settings_of_vllm_are_refused(needed, write, settings, said, flags):
    assert refusal([*needed, *write({"vllm": settings}), *flags]) == said


def test_a_word_that_is_no_flag_of_vllm_is_refused(needed):
    assert refusal([*needed, "--", "256"]) == "expected a flag of vLLM after --, got '256'"


# Help


def test_help_names_every_setting(needed, capsys):
    with pytest.raises(SystemExit) as end:
        load(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ServeConfig.model_fields.keys() - {"vllm"}:
        assert f"--{name.replace('_', '-')} " in text
    assert "port to listen on (default: 8000)" in text
    assert text.count("(default: None)") == 0


def test_settings_are_plain_data(needed):
    assert Path(json.loads(load(needed).model_dump_json())["student"]) == Path(needed[1])


# Money

PRICES = {"student": {"input": 0.1, "output": 0.4}, "teacher": {"input": 2, "cached_input": 1, "output": 8}}


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("default_budget", {"cost": 0.01}, "default_budget"),
        ("models", {"wheels-best": {"cost": 0.01, "fraction": 0.5}}, "models.wheels-best"),
    ],
)
def test_money_needs_prices(needed, write, setting, value, name):
    assert refusal([*needed, *write({setting: value})]) == f"{name}.cost needs prices (--prices)"
    assert load([*needed, *write({setting: value, "prices": PRICES})]).prices is not None


def test_prices_on_the_command_line_are_json(needed):
    assert load([*needed, "--prices", json.dumps(PRICES)]).prices.teacher.cached_input == 1
    wrong = json.dumps(PRICES | {"teacher": {"input": 1, "output": 2, "cached_input": 3}})
    assert refusal([*needed, "--prices", wrong]) == "prices.teacher: cached_input is more than input"
