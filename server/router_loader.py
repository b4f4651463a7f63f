"""Loads a router into the running engine: vLLM's worker writes its taps, the processors take its gate."""

from pathlib import Path
from typing import Any

from router.adaptive import SeenScores
from router.checkpoint import CheckpointError, RouterCheckpoint
from router.sketch import ScoreSketch
from server.gate_processor import PROCESSORS
from server.vllm_api import UnsupportedVllm, output_matrix, pack_again, rows_of, weight_of

PENDING = "pending_router"


class RouterLoader:
    """Methods added to vLLM's worker (its ``worker_extension_cls``).

    A router is replaced in two steps, so that all processes of the engine take it, or none.
    """

    def check_router(self, hidden_size: int) -> None:
        """Raises CheckpointError if taps of this width cannot be written into the running model."""
        _check_output(_output(self, hidden_size), hidden_size)

    def prepare_router(self, directory: str) -> str:
        """Load a router checkpoint for this student, and check it; returns its digest."""
        router = RouterCheckpoint.load(Path(directory))
        width = router.taps.shape[1]
        _check_output(_output(self, width), width)
        setattr(self, PENDING, router)
        return router.digest()

    def gate_scores(self) -> SeenScores | None:
        """The gate's scores that this process has seen; None if it keeps none."""
        for processor in PROCESSORS:
            if processor.sketch is not None:
                return processor.sketch.read()
        return None

    def load_router(self, directory: str, gate_name: str) -> None:
        """Load taps and gate of the prepared router, else from the directory, between two engine steps."""
        router = vars(self).pop(PENDING, None) or RouterCheckpoint.load(Path(directory))
        gate = router.build_gate(gate_name)
        output = _output(self, router.taps.shape[1])
        if output is not None:
            write_taps(output, router)
        for processor in PROCESSORS:
            processor.take(gate)
            if processor.sketch is not None:  # the old scores are another gate's
                processor.sketch = ScoreSketch(processor.device)


def _output(worker: Any, hidden_size: int) -> Any:
    """The output matrix of a worker's model; None on a pipeline rank without one."""
    try:
        return output_matrix(worker.get_model(), hidden_size)
    except UnsupportedVllm as error:
        raise CheckpointError(str(error)) from error


def _check_output(output: Any, hidden_size: int) -> None:
    if output is None:
        return
    weight = weight_of(output)
    if weight is None:
        raise CheckpointError(
            f"the output matrix is quantised ({type(output).__name__}), so it cannot hold taps"
        )
    if weight.shape[1] != hidden_size:
        raise CheckpointError(f"the output matrix is {tuple(weight.shape)}, the taps are {hidden_size} wide")


def write_taps(output: Any, router: RouterCheckpoint) -> None:
    """Write a router's taps into the output matrix.

    ``output``: vLLM's layer. With tensor parallelism, this process has only some rows of it.
    """
    rows = rows_of(output)
    taps = router.reserved.taps
    mine = range(max(taps.start, rows.start), min(taps.stop, rows.stop))
    if mine:
        values = router.taps[mine.start - taps.start : mine.stop - taps.start]
        output.weight.data[mine.start - rows.start : mine.stop - rows.start] = values.to(output.weight)
    pack_again(output)
