"""The demo's scores, in numbers that a reader can compute."""

import json
from pathlib import Path

import pytest

from measuring.examples import Example, References, load_examples
from measuring.gateway import GatewayReply
from server.local.measure import Answered, BudgetResult, gap_recovered

EXAMPLE = Example("at 3", References.from_json([[["um "], ["drei", "3"], [" Uhr"]], [["15 Uhr"]]]))


def reply(text: str = "um drei Uhr", tokens: int = 10, spans: tuple[tuple[int, int], ...] = ()) -> Answered:
    written = sum(end - start for start, end in spans)
    made = GatewayReply(text, list(range(tokens)), list(spans), 5, written, len(spans), degraded=False)
    return Answered(EXAMPLE, made)


def test_all_right_answers_are_accepted() -> None:
    assert all(map(EXAMPLE.references.accepts, ("um drei Uhr", "um 3 Uhr", "15 Uhr")))
    assert reply("um 3 Uhr").right
    assert not reply("um 3 uhr").right


def test_similarity_is_to_the_nearest_answer() -> None:
    similarity = EXAMPLE.references.similarity
    assert similarity("um drei Uhr") == 1.0
    assert similarity("um vier Uhr") == pytest.approx(1 - 3 / 11)  # d→v, r→i, ei→er: 3 of 11 edits
    assert similarity("15 Uhu") == pytest.approx(1 - 1 / 6)
    assert similarity("") == 0.0


@pytest.mark.parametrize(
    ("spans", "fraction", "span_tokens", "excess"),
    [
        ((), 0.0, 1, 0.0),
        (((0, 2),), 0.1, 2, 0.0),  # 2 <= 0.1 * 2 + 2
        (((0, 2), (2, 4)), 0.1, 2, 1.6),  # 4 - 0.1 * 4 - 2
        (((0, 2), (8, 10)), 0.1, 2, 1.0),  # 4 - 0.1 * 10 - 2
        (((0, 2), (98, 100)), 0.1, 2, 0.0),
        (((0, 2), (2, 4), (98, 100)), 0.1, 2, 1.6),  # an early excess is not forgiven later
        (((0, 10),), 1.0, 1, 0.0),
        (((0, 1),), 0.0, 0, 1.0),
    ],
)
def test_the_excess_is_the_largest_over_all_prefixes(
    spans: tuple[tuple[int, int], ...], fraction: float, span_tokens: int, excess: float
) -> None:
    assert reply(tokens=100, spans=spans).excess(fraction, span_tokens) == excess


def test_the_excess_at_the_ends_of_spans_is_the_largest() -> None:
    """The result is compared with the definition: every prefix, one by one."""
    spans = ((1, 3), (3, 4), (9, 12))
    for fraction in (0.0, 0.05, 0.3, 1.0):
        written = [sum(start <= at < end for start, end in spans) for at in range(20)]
        by_prefix = (sum(written[:n]) - fraction * n - 1 for n in range(21))
        worst = reply(tokens=20, spans=spans).excess(fraction, 1)
        assert worst == pytest.approx(max(0.0, *by_prefix), abs=1e-6)


def test_a_row_sums_up_its_replies() -> None:
    replies = [reply(tokens=30, spans=((0, 2), (5, 6))), reply("15 Uhu", tokens=10)]
    row = BudgetResult.from_answers(replies, budget=0.1, span_tokens=2, seconds=4.0)
    assert row.exact_match == 0.5
    assert row.similarity == pytest.approx((1 + 5 / 6) / 2, abs=1e-6)
    assert row.teacher_rate == 0.075  # 3 of 40 tokens, not the mean of 0.1 and 0
    assert row.calls_per_request == 1.0
    assert row.max_excess_tokens == pytest.approx(0.4)  # 3 - 0.1 * 6 - 2
    assert row.tokens_per_second == 10.0
    assert row.requests == 2


def rows(student: float, at_tenth: float, teacher: float) -> list[BudgetResult]:
    qualities = ((0.0, student), (0.1, at_tenth), (1.0, teacher))
    return [BudgetResult(budget, quality, 0.0, 0.0, 0.0, 0.0, 0.0, 1) for budget, quality in qualities]


def test_the_recovered_share_of_the_gap_is_computed_by_hand() -> None:
    assert gap_recovered(rows(0.5, 0.8, 1.0), 0.1) == pytest.approx(0.6)
    assert gap_recovered(rows(0.9, 0.9, 0.9), 0.1) is None


def test_examples_are_read_line_by_line(tmp_path: Path) -> None:
    line = json.dumps({"source": "at 3", "references": [[["um "], ["drei", "3"], [" Uhr"]], [["15 Uhr"]]]})
    (tmp_path / "examples.jsonl").write_text(f"{line}\n{line}\n")
    assert load_examples(tmp_path / "examples.jsonl") == [EXAMPLE, EXAMPLE]
