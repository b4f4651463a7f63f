"""The configuration of the shipped student's engine, and one with a parser of reasoning."""

from pathlib import Path
from typing import Any

import pytest

from server.grammar.constraint import Grammars
from tests.helpers.grammars import engine_config
from tests.helpers.reciter import save_reciter

REASONED = ["<think>", "Hm", "</think>", "yes", "no"]


@pytest.fixture(scope="module")
def config() -> Any:
    return engine_config()


@pytest.fixture(scope="module")
def grammars(config: Any) -> Grammars:
    return Grammars(config)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are words; two of the words enclose reasoning."""
    directory = tmp_path_factory.mktemp("reasoner")
    save_reciter(REASONED, directory)
    return directory
