"""A server's own counters, by what they mean: vLLM's and SGLang's names in one table, differences of two scrapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from fourfold.records.bench import Acceptance

# What it is: its name in vLLM (0.32, v1/metrics/loggers.py) and SGLang (0.5.23, observability/metrics_collector.py);
# "" where the engine has none. Acceptance in SGLang is a gauge of its latest batches, without positions.
NAMES = {
    "drafts": ("vllm:spec_decode_num_drafts_total", ""),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens_total", ""),
    "accepted_tokens": ("vllm:spec_decode_num_accepted_tokens_total", ""),
    "accepted_by_position": ("vllm:spec_decode_num_accepted_tokens_per_pos_total", ""),
    "accept_rate": ("", "sglang:spec_accept_rate"),
    "accept_length": ("", "sglang:spec_accept_length"),
    "cache_usage": ("vllm:kv_cache_usage_perc", "sglang:token_usage"),
    "preemptions": ("vllm:num_preemptions_total", "sglang:num_retracted_requests_total"),
    "prefix_queries": ("vllm:prefix_cache_queries_total", ""),
    "prefix_hits": ("vllm:prefix_cache_hits_total", ""),
    "prefix_hit_rate": ("", "sglang:cache_hit_rate"),
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total"),
    "generated_tokens": ("vllm:generation_tokens_total", "sglang:generation_tokens_total"),
    "pool_tokens": ("", "sglang:max_total_num_tokens"),
}
POOL = "vllm:cache_config_info"  # its labels are the pool
PREFIXES = {"vllm:": 0, "sglang:": 1}
OFF = "no metrics: SGLang has them with --enable-metrics, vLLM unless --disable-log-stats"


@dataclass(frozen=True)
class Scrape:
    """One reading of /metrics. samples: metric name -> [(labels, value)], of all engines behind the server."""

    samples: Mapping[str, list[tuple[Mapping[str, str], float]]]

    @classmethod
    def parse(cls, text: str) -> Scrape:
        """Raises ValueError for text that is not in Prometheus' format."""
        samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name].append((sample.labels, sample.value))
        return cls(samples)

    @property
    def engine(self) -> str:
        """vllm, sglang or "": whose counters these are."""
        return next((prefix[:-1] for prefix in PREFIXES if any(n.startswith(prefix) for n in self.samples)), "")

    def _name(self, what: str) -> str:
        return NAMES[what][PREFIXES[f"{self.engine}:"]] if self.engine else ""

    def has(self, what: str) -> bool:
        return self._name(what) in self.samples

    def value(self, what: str) -> float:
        """The sum over a server's engines and models; 0 if there is none."""
        return sum(value for _, value in self.samples.get(self._name(what), ()))

    def by_label(self, what: str, label: str) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for labels, value in self.samples.get(self._name(what), ()):
            found[labels.get(label, "")] += value
        return dict(found)

    def pool(self) -> dict[str, int]:
        """The KV cache by the engine's metrics: blocks, block_tokens, tokens, as far as they say."""
        if self.engine == "sglang":
            return {"tokens": int(self.value("pool_tokens"))} if self.has("pool_tokens") else {}
        labels = next((labels for labels, _ in self.samples.get(POOL, ())), {})
        names = {"blocks": "num_gpu_blocks", "block_tokens": "block_size", "tokens": "kv_cache_size_tokens"}
        return {what: int(labels[name]) for what, name in names.items() if labels.get(name, "").isdecimal()}


def acceptance(before: Scrape, after: Scrape) -> Acceptance | None:
    """Return the acceptance rate of drafts between two scrapes; None without drafts or counters of them."""
    if after.engine == "sglang":
        if not after.value("accept_length"):
            return None
        rate, length = after.value("accept_rate"), after.value("accept_length")
        return Acceptance(rate, length, [], "SGLang's gauges of its latest batches")
    counted = {what: after.value(what) - before.value(what) for what in ("drafts", "draft_tokens", "accepted_tokens")}
    if counted["drafts"] <= 0 or counted["draft_tokens"] <= 0:
        return None
    was, found = (scrape.by_label("accepted_by_position", "position") for scrape in (before, after))
    places = sorted(found, key=int)
    return Acceptance(
        rate=counted["accepted_tokens"] / counted["draft_tokens"],
        mean_length=1 + counted["accepted_tokens"] / counted["drafts"],
        by_position=[(found[place] - was.get(place, 0)) / counted["drafts"] for place in places],
        basis="vLLM's counters before and after",
        **{what: int(value) for what, value in counted.items()},
    )


def changes(before: Scrape, after: Scrape) -> dict[str, int | float]:
    """What else the server counted between two scrapes."""
    found: dict[str, int | float] = {
        what: int(after.value(what) - before.value(what))
        for what in ("preemptions", "prompt_tokens", "generated_tokens")
        if after.has(what)
    }
    queries = after.value("prefix_queries") - before.value("prefix_queries")
    if queries > 0:
        found["prefix_hit_rate"] = (after.value("prefix_hits") - before.value("prefix_hits")) / queries
    elif after.has("prefix_hit_rate"):
        found["prefix_hit_rate"] = after.value("prefix_hit_rate")
    return found
