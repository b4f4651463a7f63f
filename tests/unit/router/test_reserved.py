import pytest

from router.reserved import RESERVED_ROWS, ReservedRows, visible_rows


def test_the_rows_are_the_last_of_the_vocabulary():
    reserved = ReservedRows(start=100, count=4)
    assert reserved.escalation == 100
    assert list(range(104))[reserved.taps] == [101, 102, 103]
    assert reserved.end == 104


def test_a_single_row_is_an_escalation_token_without_taps():
    reserved = ReservedRows(start=100, count=1)
    assert (reserved.escalation, reserved.end) == (100, 101)
    assert list(range(101))[reserved.taps] == []


@pytest.mark.parametrize(("start", "count"), [(1, 4), (0, 4), (-5, 4), (100, 0), (100, -1)])
def test_rows_that_leave_no_vocabulary_or_no_escalation_token_are_refused(start, count):
    with pytest.raises(ValueError, match="start >= 2 and count >= 1"):
        ReservedRows(start, count)


@pytest.mark.parametrize(
    ("vocabulary", "tokenizer", "expected"),
    [
        (1024, 900, ReservedRows(992, RESERVED_ROWS)),  # 124 free: the last 32
        (1024, 992, ReservedRows(992, 32)),  # exactly 32 free
        (1024, 1021, ReservedRows(1021, 3)),  # fewer free: all of them
        (1024, 1023, ReservedRows(1023, 1)),
    ],
)
def test_rows_are_taken_from_what_the_tokenizer_leaves_free(vocabulary, tokenizer, expected):
    assert ReservedRows.at_end(vocabulary, tokenizer) == expected


def test_two_visible_tokens_are_enough():
    assert ReservedRows(start=2, count=1).end == 3


def test_fewer_rows_can_be_asked_for():
    assert ReservedRows.at_end(1024, 900, count=8) == ReservedRows(1016, 8)


@pytest.mark.parametrize("tokenizer", [1024, 1030])
def test_a_full_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"no spare row .* 1024 rows in the model, {tokenizer}"):
        ReservedRows.at_end(1024, tokenizer)


@pytest.mark.parametrize(
    ("vocabulary", "tokenizer", "expected"),
    [
        (1024, 900, ReservedRows(992, 32)),
        (1024, 1023, ReservedRows(1023, 1)),
        (1024, 1024, ReservedRows(1024, 32)),
        (1024, 1030, ReservedRows(1030, 32)),  # six ids that the model has no row for
    ],
)
def test_a_full_vocabulary_is_followed_by_rows_of_its_own(vocabulary, tokenizer, expected):
    assert ReservedRows.for_model(vocabulary, tokenizer) == expected


def test_rows_beyond_the_highest_id_are_not_visible():
    assert visible_rows([3, 0, 7]) == 8
    assert visible_rows([]) == 0
