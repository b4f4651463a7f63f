"""Work of an engine between two moments, by differences of its Prometheus series."""

import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """Counters by their full sample name (`…_total`, `…_sum`, `…_count`), summed over all labels."""

    values: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> "Scrape":
        """A scrape from Prometheus's text format."""
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            if family.type not in ("counter", "histogram"):
                continue
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return cls(values)

    @classmethod
    def fetch(cls, url: str) -> "Scrape":
        """A scrape of the server at a base URL.

        Raises:
            OSError: the server does not answer.
        """
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
            return cls.parse(reply.read().decode())

    def since(self, before: "Scrape") -> "Scrape":
        """Growth since ``before``; a series that was not there began at 0."""
        growth: dict[str, float] = {}
        for name, value in self.values.items():
            growth[name] = value - before[name]
        return Scrape(growth)

    def __getitem__(self, name: str) -> float:
        """Value of a series; 0 if it does not exist yet, because clients make series at their first use."""
        return self.values.get(name, 0.0)


@dataclass(frozen=True)
class EngineWork:
    """Work of one vLLM engine, by its own account. Seconds are sums over requests, not wall clock."""

    requests: int
    steps: int
    """Forward passes of the model."""
    read: int
    """Prompt tokens that were computed, not found in the prefix cache."""
    written: int
    """Tokens that the engine wrote."""
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    """Seconds from arrival to the last token, as the front end sees them."""
    drafts: int
    """Steps that verified what a draft model had written; 0 without speculative decoding."""
    drafted: int
    """Tokens that a draft model wrote."""
    accepted: int
    """Drafted tokens that the model agreed with."""

    @property
    def positions(self) -> int:
        """Tokens that went through the model.

        The step that reads a prompt's last token also writes the first one, so each request has one position
        less. A refused draft went through the model as well.
        """
        return self.read + self.written - self.requests + self.drafted - self.accepted

    @classmethod
    def from_growth(cls, growth: Scrape) -> "EngineWork":
        """The work by the growth of the engine's series."""
        return cls(
            requests=int(growth["vllm:e2e_request_latency_seconds_count"]),
            steps=int(growth["vllm:iteration_tokens_total_count"]),
            read=int(growth["vllm:request_prefill_kv_computed_tokens_sum"]),
            written=int(growth["vllm:generation_tokens_total"]),
            queue_seconds=growth["vllm:request_queue_time_seconds_sum"],
            prefill_seconds=growth["vllm:request_prefill_time_seconds_sum"],
            decode_seconds=growth["vllm:request_decode_time_seconds_sum"],
            total_seconds=growth["vllm:e2e_request_latency_seconds_sum"],
            drafts=int(growth["vllm:spec_decode_num_drafts_total"]),
            drafted=int(growth["vllm:spec_decode_num_draft_tokens_total"]),
            accepted=int(growth["vllm:spec_decode_num_accepted_tokens_total"]),
        )
