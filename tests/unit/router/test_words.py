import pytest

from router.words import BudgetWords, turn_of_words

WORDS = BudgetWords("At most {percent} %. ", (0.05, 0.075, 0.2))


@pytest.mark.parametrize(
    ("rate", "percent"), [(0.001, "5"), (0.06, "5"), (0.07, "7.5"), (0.13, "7.5"), (0.14, "20"), (0.9, "20")]
)
def test_the_words_name_the_nearest_fraction_that_was_trained(rate, percent):
    assert WORDS.text(rate) == f"At most {percent} %. "


@pytest.mark.parametrize("rate", [0, 1, 1.5])
def test_there_are_no_words_for_0_and_1(rate):
    assert WORDS.text(rate) is None


def test_words_without_a_fraction_are_refused():
    with pytest.raises(ValueError, match="no fraction"):
        BudgetWords("At most {percent} %. ", ())


@pytest.mark.parametrize(
    ("roles", "turn"),
    [
        (["user"], 0),
        (["system", "user", "assistant", "user", "assistant", "tool"], 3),
        (["system", "assistant"], 0),
        (["assistant"], None),
    ],
)
def test_words_begin_the_users_last_turn(roles, turn):
    assert turn_of_words(roles) == turn
