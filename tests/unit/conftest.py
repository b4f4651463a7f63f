"""Fixtures of the unit tests. They import when used: the process that hands tests out loads no torch."""

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from router.reserved import ReservedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from router.checkpoint import RouterCheckpoint

# The same examples at every run, and no deadline: machines that run tests are busy.
settings.register_profile("unit", derandomize=True, deadline=None, database=None)
settings.load_profile("unit")


@pytest.fixture(scope="session", autouse=True)
def _a_worker_has_one_core() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerFast":
    from tiny_router import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture
def reserved() -> ReservedRows:
    """Ten visible tokens, the escalation token 10, the taps 11 to 13."""
    return ReservedRows(start=10, count=4)


@pytest.fixture
def router(reserved: ReservedRows) -> "RouterCheckpoint":
    from tiny_router import tiny_router

    return tiny_router(reserved)
