"""The usual benchmark client for servers works with the gateway, unchanged."""

from pathlib import Path

from measuring.pair import Pair, Serving
from server.bench.overhead import vllm_bench
from server.bench.servers import GATEWAY_MODEL, MeasuredServer


def test_vllms_own_client_works_unchanged(stack: Serving, pair: Pair, tmp_path: Path) -> None:
    """`vllm bench serve` runs at a budget above 0, which it sends with `--extra-body`."""
    server = MeasuredServer(stack.gateway, GATEWAY_MODEL, stack.gateway_process, {"teacher_budget": 0.1})
    report = vllm_bench(server, pair.student, 8, tmp_path)
    assert report["failed"] == 0
    assert report["tokens/s"] > 0
