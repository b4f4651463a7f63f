"""The gateway's overhead, computed from samples."""

import pytest

from server.bench.cpu import Usage
from server.bench.engine_metrics import Scrape
from server.bench.load import LoadRun
from server.bench.overhead import _step_seconds
from server.bench.servers import Sample


def sample(decode: float, written: int, requests: int) -> Sample:
    series = {
        "vllm:request_decode_time_seconds_sum": decode,
        "vllm:generation_tokens_total": written,
        "vllm:e2e_request_latency_seconds_count": requests,
    }
    return Sample(LoadRun((), 1.0), Usage(0.0, 0.0, 0), Scrape(series))


def test_a_step_is_the_time_between_two_tokens() -> None:
    """Four requests of 11 tokens have 40 pauses, of 5, 6 and 9 ms in three rounds."""
    samples = [sample(40 * seconds, 44, 4) for seconds in (0.005, 0.009, 0.006)]
    assert _step_seconds(samples) == pytest.approx(0.006)
