"""`wheels evaluate --gateway`: the gateway's results agree with those computed in process."""

import json

import pytest

from measuring.pair import Serving
from tests.helpers.commands import evaluate
from tests.helpers.paths import DEMO

BUDGETS = (0.1, 0.3)
EXAMPLES = 200


def test_a_gateway_gives_the_results_of_the_pair_in_process(
    stack: Serving, capsys: pytest.CaptureFixture[str]
):
    asked = ["--gateway", stack.gateway, "--budgets", *map(str, BUDGETS), "--spans"]
    assert evaluate([str(DEMO), *asked, "--examples", str(EXAMPLES), "--json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{EXAMPLES} test examples of the recipe demo; --recipe names another"
    report = json.loads(shown[-1])
    served = {row["budget"]: row for row in report["budgets"]["gateway"]}
    computed = {row["budget"]: row for row in report["budgets"]["learned"]}
    print(json.dumps({b: [served[b], computed[b]] for b in BUDGETS}, indent=1))
    assert served.keys() == {0.0, *BUDGETS, 1.0}
    # The greedy choice between two tokens that are nearly equal may differ between the engines.
    assert served[0.0]["quality"] == pytest.approx(report["student"], abs=0.01)
    assert served[1.0]["quality"] == pytest.approx(report["teacher"], abs=0.01)
    assert (served[0.0]["rate"], served[1.0]["rate"]) == (0.0, 1.0)
    for budget in BUDGETS:
        # The gateway's price rises as the bucket runs low.
        assert served[budget]["quality"] == pytest.approx(computed[budget]["quality"], abs=0.02)
        assert served[budget]["rate"] == pytest.approx(computed[budget]["rate"], abs=0.005)
    assert all(row["degraded"] == 0 and row["excess"] <= 1e-9 for row in served.values())


def test_a_gateway_needs_no_checkpoints(stack: Serving, capsys: pytest.CaptureFixture[str], tmp_path):
    asked = ["--recipe", "demo", "--gateway", f"{stack.gateway}/v1", "--span-tokens", "4", "--examples", "10"]
    assert evaluate([*asked, "--budgets", "0.2", "--out", str(tmp_path)]) == 0
    assert "degraded" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["curves"].keys() == {"gateway"}
    assert {"quality.png", "calibration.png", "where.png"} <= {path.name for path in tmp_path.iterdir()}
    assert evaluate([*asked, "--budgets", "0.1,0.3", "--against", f"before={tmp_path}", "--json"]) == 0
    both = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert both["budgets"]["before"] == report["budgets"]["gateway"]
    assert [row["budget"] for row in both["budgets"]["gateway"]] == [0.0, 0.1, 0.3, 1.0]


def test_a_server_that_is_not_a_gateway_is_named(stack: Serving, capsys: pytest.CaptureFixture[str]):
    assert evaluate(["--recipe", "demo", "--gateway", stack.teacher, "--examples", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"wheels evaluate: the gateway at {stack.teacher}: ")
