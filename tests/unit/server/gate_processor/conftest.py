"""A gate in vLLM's V1 batch, and vLLM's kernels in plain torch."""

from collections.abc import Iterator

import pytest
import torch

from server.gate_processor import GateProcessor, gate_settings
from server.vllm_api import find_counts, find_reports
from tests.helpers import v2_runner
from tests.helpers.gate_steps import CPU, engine_config


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore vLLM's functions after a test: a gate changes some of them for the whole process."""
    v2_runner.use_torch_kernels(monkeypatch)
    for v2 in (False, True):
        for changed in find_reports(v2=v2) + find_counts(v2=v2):
            monkeypatch.setattr(changed.owner, changed.name, vars(changed.owner)[changed.name])
    with torch.compiler.set_stance("force_eager"):  # compiling the function that counts ranks takes seconds
        yield


@pytest.fixture
def processor(reserved) -> GateProcessor:
    processor = GateProcessor(engine_config(gate_settings(reserved, "margin", None)), CPU, False)
    processor.device_prices = processor.prices.clone()  # two tensors, as on a GPU
    return processor
