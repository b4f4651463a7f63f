"""The counts of `wheels evaluate`, by hand, and the spare price in the closed loop."""

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from measuring.gateway import GatewayReply
from measuring.json_lines import DataError
from measuring.scores import excess
from router.budget import Bucket, Budget
from router.gate import EntropyGate
from tests.helpers.tiny_models import END, MAX_TOKENS, RESERVED, VISIBLE, model
from training.evaluation.baselines import hesitation, query_level
from training.evaluation.gateway import measure
from training.evaluation.in_process import evaluate_pair
from training.evaluation.plots import plot
from training.evaluation.report import (
    BUDGETS,
    QualityReport,
    area,
    at_rate,
    gateway_report,
    joined,
    table,
)
from training.evaluation.scoring import error_of_share, teacher_positions
from training.gating.calibration import spare_prices, teacher_rate
from training.gating.rollout import ClosedLoop, Rollout
from training.gating.tree import PERIODIC, Setting, Tree
from training.tasks import make_task


@pytest.fixture(scope="module")
def tree() -> Tree:
    pair = ClosedLoop(
        student=model(0),
        teacher=model(1),
        score=EntropyGate(RESERVED),
        visible=VISIBLE,
        end=END,
        max_tokens=MAX_TOKENS,
    )
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, VISIBLE, (3 + i % 5,), generator=generator).tolist() for i in range(30)]
    return Tree(pair, prompts, {"entropy": EntropyGate(RESERVED)})


def written(*by_teacher: int) -> Rollout:
    return Rollout(tokens=[7] * len(by_teacher), by_teacher=[bool(flag) for flag in by_teacher])


def test_calls_and_positions_are_counted_as_by_hand():
    found = [written(*flags).stretches for flags in ((0, 0), (1, 1, 0), (0, 1, 0, 1, 1), (1,))]
    assert found == [[], [(0, 2)], [(1, 2), (3, 5)], [(0, 1)]]
    # The teacher reads the prompt and all tokens before its last one.
    assert [teacher_positions(written(*flags), 10) for flags in ((0, 0), (1, 0, 0), (0, 1, 0, 1))] == [
        0,
        10,
        13,
    ]


def test_the_excess_is_that_of_the_worst_prefix():
    assert excess([False, True, True, False, False], 0.5) == pytest.approx(2 - 1.5)
    assert excess([False, False], 0.5) < 0


EXAMPLES = list(islice(make_task("numbers").train(0), 3))


class ScriptedGateway:
    """A gateway whose answers are right where the teacher wrote. The teacher writes half of an answer from
    budget 0.2 on, and all of it at 1. It is lost to the last request below 1.
    """

    def replies(self, sources: list[str], budget: float) -> list[GatewayReply]:
        rows = []
        for at, example in enumerate(EXAMPLES):
            lost = at == 2 and 0.2 <= budget < 1
            if budget >= 0.2 and not lost:
                text, length = example.references.first(), 4
                spans = [(0, 4 if budget == 1 else 2)]
            else:
                text, length, spans = "?", 2, []
            taught = sum(end - start for start, end in spans)
            rows.append(GatewayReply(text, [7] * length, spans, 5, taught, len(spans), lost))
        return rows


def test_the_rows_of_a_gateway_are_computed_as_by_hand():
    of = gateway_report(measure(ScriptedGateway(), make_task("numbers"), EXAMPLES, (0.1, 0.2), 1))
    assert (of.student, of.teacher) == (0.0, 1.0)
    nothing, little, some, everything = of.budgets["gateway"]
    assert (nothing["rate"], nothing["excess"]) == (0.0, 0.0)
    assert (little["quality"], little["pgr"], little["degraded"]) == (0.0, 0.0, 0)
    assert (some["quality"], some["rate"], some["degraded"]) == pytest.approx((2 / 3, 4 / 10, 1))
    assert some["settled_rate"] == pytest.approx(2 / 6)  # without the first of three spans
    assert (some["calls"], some["runs"], some["positions"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3 * 6))
    assert some["excess"] == pytest.approx(2 - 0.4 - 1)
    assert (everything["pgr"], everything["excess"]) == (1.0, 0.0)
    # Of three gains of 1, 1 and 0 where 1 was possible, the standard deviation is 1 / sqrt(3).
    assert [row["pgr_error"] for row in of.budgets["gateway"]] == pytest.approx([0, 0, 1 / 3, 0])
    assert of.area["gateway"] == pytest.approx(0.4 * (2 / 3) / 2 + 0.6 * (2 / 3 + 1) / 2)
    assert of.calibration_mae == pytest.approx((0.1 + 0.2) / 2)
    assert "0.6667" in table(of)


def test_the_error_of_a_share_is_that_of_resampled_examples():
    """The spread of the share over bootstrap samples of the same 400 examples."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, mixed = torch.rand(3, 400, generator=generator)
    teacher += 1
    mixed = 0.5 * mixed + 0.3 * student + 0.2 * teacher
    samples = torch.randint(400, (4000, 400), generator=generator)
    s, t, q = (quality[samples].mean(1) for quality in (student, teacher, mixed))
    spread = ((q - s) / (t - s)).std().item()
    assert error_of_share(mixed, student, teacher) == pytest.approx(spread, rel=0.05)
    assert error_of_share(teacher, student, teacher) == error_of_share(student, student, teacher) == 0
    assert math.isnan(error_of_share(mixed, student, student))


def test_rows_of_a_gateway_are_shown_next_to_those_computed_in_process():
    rows = [
        {"budget": b, "rate": b, "pgr": 2 * b, "calls": 1, "runs": 1, "positions": 1} for b in (0.05, 0.5)
    ]
    pair = QualityReport(0.1, 0.9, {"learned": rows}, {"learned": 0.7}, 0.0, {"learned": rows}, [0.1] * 10)
    gateway = gateway_report(measure(ScriptedGateway(), make_task("numbers"), EXAMPLES, (0.2,), 1))
    both = joined(pair, gateway)
    assert (both.student, both.curves.keys()) == (0.1, {"learned", "gateway"})
    (row,) = (line for line in table(both).splitlines() if line.startswith("gateway") and "(" in line)
    assert row.split() == ["gateway", "0.67", "(0.400)"]  # it has one of the budgets in the table's head
    (errors,) = (line for line in table(both).splitlines() if line.startswith("±"))
    assert errors.split()[2:] == ["nan", "nan"]  # an older report has none


def test_a_gateway_is_compared_with_an_earlier_measurement(tmp_path):
    earlier = gateway_report(measure(ScriptedGateway(), make_task("numbers"), EXAMPLES, (0.1,), 1))
    (tmp_path / "report.json").write_text(earlier.to_json())
    now = gateway_report(measure(ScriptedGateway(), make_task("numbers"), EXAMPLES, (0.2,), 1))
    both = joined(now, QualityReport.read(tmp_path), "entropy")
    assert both.budgets == {"gateway": now.budgets["gateway"], "entropy": earlier.budgets["gateway"]}
    assert both.area == {"gateway": now.area["gateway"], "entropy": earlier.area["gateway"]}
    text = table(both)
    assert f"area below the PGR at each rate: {now.area['gateway']:.3f}\n\nentropy; calls" in text
    plot(both, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


@pytest.mark.parametrize("text", [None, "{", '{"student": 1}', "[]"])
def test_only_a_report_can_be_compared(tmp_path, text):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=r"report\.json: not a report of `wheels evaluate --out`"):
        QualityReport.read(tmp_path)


def test_only_a_report_of_a_gateway_can_be_compared(tmp_path):
    report = gateway_report(measure(ScriptedGateway(), make_task("numbers"), EXAMPLES, (0.2,), 1))
    (tmp_path / "report.json").write_text(replace(report, budgets={}).to_json())
    with pytest.raises(DataError, match=r"report\.json: not of a gateway"):
        QualityReport.read(tmp_path)


def test_a_further_router_has_rows_under_the_bucket_at_its_own_prices():
    demo = Path("deploy/demo")
    report = evaluate_pair(demo, make_task("numbers"), EXAMPLES, [1], 12, {"again": demo / "router"})
    rows = report.budgets["again"]
    assert [row["budget"] for row in rows] == list(BUDGETS)
    assert rows == report.budgets["learned"]
    (errors,) = (line for line in table(report).splitlines() if line.startswith("± (learned)"))
    assert errors.split()[2:] == [f"{row['pgr_error']:.2f}" for row in rows]


def test_the_budgets_alone_are_measured_and_drawn(tmp_path):
    report = evaluate_pair(Path("deploy/demo"), make_task("numbers"), EXAMPLES, None, 12)
    whole = evaluate_pair(Path("deploy/demo"), make_task("numbers"), EXAMPLES, [], 12)
    assert (report.curves, report.area) == ({}, {})
    for gate in ("learned", "entropy", "margin"):
        assert report.budgets[gate] == whole.budgets[gate]
    assert "no bucket" not in table(report)
    assert "under the bucket" in table(report)
    plot(report, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000


def test_the_area_and_the_curve_between_its_points():
    rows = [{"rate": 0.2, "pgr": 0.8}, {"rate": 0.6, "pgr": 1.0}]
    assert area([(row["rate"], row["pgr"]) for row in rows]) == pytest.approx(0.08 + 0.36 + 0.4)
    assert [at_rate(rows, rate) for rate in (0.1, 0.2, 0.4)] == pytest.approx([0.4, 0.8, 0.9])


def test_the_periodic_baseline_asks_at_even_distances(tree):
    (completions,) = tree.run([Setting(PERIODIC, 0.75, 1 - 1e-9, 1)])
    for completion in completions:
        assert completion.starts == list(range(3, len(completion.tokens), 4))


def test_whole_requests_go_to_the_teacher_by_their_worth():
    alone, taught = [written(0)] * 3, [written(1)] * 3
    (third, all_) = query_level(alone, taught, torch.tensor([0.0, 2.0, 1.0]), [1 / 3, 1.0])
    assert [c.teacher_tokens for c in third] == [0, 1, 0]
    assert [c.teacher_tokens for c in all_] == [1, 1, 1]


def test_hesitation_is_the_mean_entropy_of_the_students_own_path(tree):
    (alone,) = tree.run([Setting("entropy", math.inf, 0.0, 1)])
    path = tree.path(3, alone[3].tokens)
    assert len(path) == len(alone[3].tokens)
    assert hesitation(tree, alone)[3] == pytest.approx(tree.scores("entropy")[path].mean().item())


def test_a_call_is_spare_while_it_fits_into_the_fraction_itself():
    """A call is spare while spent + ask <= fraction * (length + ask)."""
    bucket = Bucket(Budget(fraction=0.25), span_tokens=4, ask_tokens=1)
    assert bucket.spare_from() == 3
    bucket.reserve(3, at_most=10)
    assert bucket.spare_from() == 7
    bucket.reserve(7, at_most=10)
    bucket.reserve(8, at_most=10)  # in the span on top
    assert bucket.spare_from() == 15
    assert bucket.earliest() == 0
    for budget in (Budget(fraction=1), Budget(fraction=0), Budget(tokens=3)):
        assert Bucket(budget, span_tokens=4).spare_from() is None


def test_the_spare_price_makes_the_fraction_the_rate(tree):
    fractions, spans = (0.1, 0.3), (4, 1)
    dear = torch.quantile(tree.scores("entropy"), 0.98).item()
    points = [(fraction, dear) for fraction in fractions]
    plain = tree.run([Setting("entropy", price, fraction, *spans) for fraction, price in points])
    spares = spare_prices(tree, "entropy", points, spans)
    spent = tree.run(
        [
            Setting("entropy", price, fraction, *spans, spare=spare)
            for (fraction, price), (_, spare) in zip(points, spares, strict=True)
        ]
    )
    for fraction, before, after in zip(fractions, plain, spent, strict=True):
        assert teacher_rate(before) < 0.6 * fraction
        assert fraction - 0.04 < teacher_rate(after) <= fraction
        for completion in after:  # the hard bound is unchanged
            so_far = 0
            for length, foreign in enumerate(completion.by_teacher, 1):
                so_far += foreign
                assert so_far <= fraction * length + spans[0] + 1e-9
