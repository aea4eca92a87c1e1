"""What two scrapes of a server's metrics come to."""

from __future__ import annotations

import pytest

from fourfold.serve.metrics import Scrape, acceptance, changes
from standin import counters

SGLANG = """# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{{model_name="m"}} {length}
# TYPE sglang:spec_accept_rate gauge
sglang:spec_accept_rate{{model_name="m"}} 0.61
# TYPE sglang:token_usage gauge
sglang:token_usage{{model_name="m"}} 0.5
# TYPE sglang:max_total_num_tokens gauge
sglang:max_total_num_tokens{{model_name="m"}} 415184
# TYPE sglang:num_retracted_requests counter
sglang:num_retracted_requests_total{{model_name="m"}} {retracted}
# TYPE sglang:cache_hit_rate gauge
sglang:cache_hit_rate{{model_name="m"}} 0.125
"""
PREFIX = """# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{{engine="0"}} {queries}
vllm:prefix_cache_queries_total{{engine="1"}} 100
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{{engine="0"}} {hits}
vllm:prefix_cache_hits_total{{engine="1"}} 50
"""


def test_vllm_counts_between_scrapes() -> None:
    found = acceptance(Scrape.parse(counters(0)), Scrape.parse(counters(3)))
    assert found is not None
    assert found.rate == pytest.approx(33 / 60)
    assert found.mean_length == pytest.approx(1 + 33 / 30)
    assert found.by_position == pytest.approx([0.6, 0.5])


def test_no_drafts_between_scrapes_is_no_rate() -> None:
    assert acceptance(Scrape.parse(counters(3)), Scrape.parse(counters(3))) is None
    other = Scrape.parse('# TYPE vllm:x gauge\nvllm:x{a="b"} 1\n')
    assert acceptance(other, other) is None


def test_engines_behind_one_server_are_added() -> None:
    before, after = (Scrape.parse(PREFIX.format(queries=q, hits=h)) for q, h in ((10, 5), (110, 30)))
    assert before.value("prefix_queries") == 110
    assert changes(before, after) == {"prefix_hit_rate": 0.25}


def test_sglang_tells_gauges_without_positions() -> None:
    before, after = (Scrape.parse(SGLANG.format(length=2.4, retracted=r)) for r in (1, 4))
    found = acceptance(before, after)
    assert found is not None
    assert (found.rate, found.mean_length, found.by_position) == (0.61, 2.4, [])
    assert changes(before, after) == {"preemptions": 3, "prefix_hit_rate": 0.125}
    assert after.pool() == {"tokens": 415_184}
    assert after.value("cache_usage") == 0.5
    silent = Scrape.parse(SGLANG.format(length=0.0, retracted=0))
    assert acceptance(silent, silent) is None


def test_metrics_of_something_else() -> None:
    other = Scrape.parse("# TYPE process_cpu counter\nprocess_cpu_total 3\n")
    assert (other.engine, other.pool(), other.value("drafts")) == ("", {}, 0)
