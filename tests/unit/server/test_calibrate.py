"""`wheels calibrate`: its arguments and output, and an interrupt."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import wheels
from measuring.processes import ServiceError
from server.calibrate import _own_gateway, _parser, _served
from server.config import CommandLine
from tests.helpers.commands import INTERRUPTED
from tests.helpers.learning_gateway import LearningGateway


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"number {number}"}) for number in range(30)]
    file.write_text("\n".join(lines))
    return str(file)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The few settings that `wheels serve` needs."""
    for name in [name for name in os.environ if name.startswith("WHEELS_")]:
        monkeypatch.delenv(name)
    return ["--student", str(tmp_path), "--teacher", "http://127.0.0.1:9", "--cache", str(tmp_path / "cache")]


def test_the_rates_of_a_running_gateway_are_found_and_shown(
    prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = LearningGateway()
    with gateway.served() as url:
        assert wheels.main(["calibrate", "--gateway", url, "--rates", "0.2,0.05", prompts]) == 0
    shown = capsys.readouterr().out
    assert "Teacher rates and their prices" in shown
    for rate in ("0.05", "0.2"):
        (row,) = [line.split() for line in shown.splitlines() if line.split()[:1] == [rate]]
        assert float(row[1]) == pytest.approx(float(rate), abs=0.02)
        assert float(row[2]) == pytest.approx(gateway.traffic.calibration.price(float(rate)), rel=1e-3)
    assert "fewer than 2,000 completion tokens: its rate is rough" in shown
    assert "Prices saved in the cache of the gateway" in shown


def test_with_json_the_rows_are_alone_on_stdout(prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    gateway = LearningGateway()
    with gateway.served() as url:
        options = ["--rates", "0.1", "--tolerance", "1", "--json"]
        assert wheels.main(["calibrate", "--gateway", url, *options, prompts]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["asked"] == 0.1
    assert row["price"] == gateway.traffic.calibration.price(0.1)
    assert row["completion_tokens"] > 0
    assert row["passes"] == 2
    assert row["is_near"] is True


def test_ctrl_c_shows_the_known_prices_and_leaves_the_gateway_running(
    prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = LearningGateway()

    def stop_in_the_second_pass() -> None:
        if len(gateway.budgets) == 45:
            os.kill(os.getpid(), signal.SIGINT)

    gateway.watch = stop_in_the_second_pass
    with gateway.served() as url:
        status = wheels.main(["calibrate", "--gateway", url, "--rates", "0.1", prompts])
    assert status == INTERRUPTED
    assert len(gateway.budgets) < 60
    shown = capsys.readouterr().out
    assert "The prices learned so far are kept" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.split()[:1] == ["0.1"]]
    assert row[-1] == "1"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gateway", "http://127.0.0.1:9", "--gate", "margin"], "leave out --gate: the gateway at"),
        (["--gateway", "http://127.0.0.1:9", "--timeout", "60"], "leave out --timeout: the gateway at"),
        (["--gateway", "http://127.0.0.1:9", "--", "--dtype", "half"], "leave out what follows --: the"),
        (["--gateway", "http://127.0.0.1:9"], "the gateway at http://127.0.0.1:9: Connection error"),
        ([], "student is required (--student)"),
        (["SETTINGS", "--price", "2"], "the price is fixed by --price: there is nothing to find"),
        (["SETTINGS", "--gate", "random"], "the random gate needs no price: there is nothing to find"),
        (
            ["SETTINGS", "--router", "deploy/demo/router"],
            "the prices of deploy/demo/router were measured in training: there is nothing to find",
        ),
        (["SETTINGS", "--", "--api-key", "k"], "leave out --api-key: only `wheels calibrate` calls"),
    ],
)
def test_an_impossible_calibration_is_reported_in_one_line(
    arguments: list[str], problem: str, prompts: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings + arguments[1:] if arguments[:1] == ["SETTINGS"] else arguments
    assert wheels.main(["calibrate", prompts, *given]) == 1
    told = capsys.readouterr().err
    assert problem in told
    assert len(told.splitlines()) == 1


def test_an_unknown_argument_is_a_usage_error(prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["calibrate", prompts, "--max-model-len", "9"]) == 2
    assert "wheels calibrate: unknown argument --max-model-len;" in capsys.readouterr().err


def test_a_timeout_of_zero_waits_no_time(
    prompts: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert wheels.main(["calibrate", prompts, *settings, "--timeout", "0"]) == 1
    assert "the gateway was not ready after 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("--rates", "0.1,1", "a rate is between 0 and 1"),
        ("--rates", "some", "invalid _rates value"),
        ("--passes", "1", "must be more than 1"),
    ],
)
def test_a_wrong_value_is_a_usage_error(
    flag: str, value: str, problem: str, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        wheels.main(["calibrate", "--gateway", "http://127.0.0.1:9", flag, value, prompts])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


def test_a_gateway_started_for_calibration_has_all_settings_but_those_for_users(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHEELS_SPAN_TOKENS", "8")
    monkeypatch.setenv("WHEELS_PORT", "7000")
    file = tmp_path / "wheels.yaml"
    vllm = {"api_key": "secret", "dtype": "float32", "max-model-len": 99}
    limits = [{"type": "fraction", "fraction": 0.1, "window_seconds": 60}]
    contents = {"gate": "entropy", "tenants": "tenants.yaml", "limits": limits, "vllm": vllm}
    file.write_text(yaml.safe_dump(contents))
    words, vllm_flags = CommandLine.of(
        ["prompts", *settings, "--config", str(file), "--gate", "margin", "--", "--max-model-len", "64"]
    )
    own = _own_gateway(_parser().parse_args(words), vllm_flags)
    assert own is not None
    assert own.settings == {
        "student": str(tmp_path),
        "teacher": ["http://127.0.0.1:9"],
        "cache": str(tmp_path / "cache"),
        "gate": "margin",
        "span_tokens": "8",
        "vllm": {"dtype": "float32", "max-model-len": 99},
    }
    assert own.vllm_flags == ["--max-model-len", "64"]
    assert own.directory == tmp_path / "cache" / "prices"


def test_a_gateway_that_does_not_start_is_explained_by_its_own_words(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _own_gateway(_parser().parse_args(["prompts", *settings]), [])
    assert own is not None
    wrong = own._replace(settings=own.settings | {"span_tokens": "many"})
    monkeypatch.setenv("WHEELS_NONSENSE", "1")  # not a setting: a gateway that got it would report it
    with (
        pytest.raises(ServiceError, match="wheels serve: span_tokens: ") as told,
        _served(wrong, Console()),
    ):
        raise AssertionError("it started")
    assert "nonsense" not in str(told.value)
