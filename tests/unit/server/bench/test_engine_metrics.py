"""The work that engines report, and the resources that processes use."""

from pathlib import Path

from server.bench.cpu import TICK, usage
from server.bench.engine_metrics import EngineWork, Scrape

SERIES = """
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0"} 30
vllm:generation_tokens_total{engine="1"} 12
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0"} 1.7e9
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{le="+Inf"} 7
vllm:iteration_tokens_total_count 7
vllm:iteration_tokens_total_sum 99
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running 3
"""


def test_a_scrape_sums_counters_over_their_labels_and_leaves_gauges_out() -> None:
    scrape = Scrape.parse(SERIES)
    assert scrape.values == {
        "vllm:generation_tokens_total": 42.0,
        "vllm:iteration_tokens_total_count": 7.0,
        "vllm:iteration_tokens_total_sum": 99.0,
    }


def test_growth_counts_a_new_series_from_nothing() -> None:
    growth = Scrape({"a": 5.0, "b": 2.0}).since(Scrape({"a": 3.0}))
    assert (growth["a"], growth["b"], growth["never"]) == (2.0, 2.0, 0.0)


def test_positions_are_what_went_through_the_model() -> None:
    """Two prompts of 10 are read, and 7 tokens written after each. 5 of 3 · 4 drafts are accepted."""
    series = {
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_prefill_kv_computed_tokens_sum": 20,
        "vllm:generation_tokens_total": 14,
    }
    assert EngineWork.from_growth(Scrape(series)).positions == 20 + 12
    series |= {"vllm:spec_decode_num_draft_tokens_total": 12, "vllm:spec_decode_num_accepted_tokens_total": 5}
    assert EngineWork.from_growth(Scrape(series)).positions == 20 + 12 + 7


def test_usage_is_of_one_process_group(tmp_path: Path) -> None:
    def process(pid: int, group: int, user: int, system: int) -> None:
        (tmp_path / str(pid)).mkdir()
        numbers = [0] * 8 + [user, system] + [0] * 8 + [3] + [0] * 10
        text = f"{pid} (a (odd) name) S 1 {group} " + " ".join(map(str, numbers))
        (tmp_path / str(pid) / "stat").write_text(text)

    process(10, 10, 3 * TICK, TICK)
    process(11, 10, 5 * TICK, 0)
    process(12, 12, 100 * TICK, 0)
    (tmp_path / "meminfo").write_text("")
    seen = usage(10, tmp_path)
    assert (seen.cpu_seconds, seen.front_cpu_seconds) == (9.0, 4.0)
    assert seen.front_memory > 0
