"""Fixtures of the tests of training."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def untrained_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `teacher` and `student`, which nobody changes."""
    from tests.helpers.numbers import save_untrained_pair, tokenizer_of_numbers

    directory = tmp_path_factory.mktemp("untrained_pair")
    save_untrained_pair(tokenizer_of_numbers(), directory)
    return directory
