"""bench against a server that answers well and badly: what is counted, and that nothing hangs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import invoke
from fourfold.cli.tables.server import crossover
from fourfold.datatypes import Event, FourfoldError
from fourfold.records.bench import Bench, Quantiles
from fourfold.serve import bench as benches
from fourfold.serve import depths
from fourfold.serve.bench import Load, bench, quantiles, read_prompts, summarize
from fourfold.serve.client import Reply
from standin import DONE, GOOD, StandIn, chunk, counters, event, serving, usage


def load(**fields: Any) -> Load:
    values = {
        "concurrency": (1,), "requests": 4, "output_tokens": 8, "temperature": 0.0, "prompts": None,
        "request_seconds": 5.0, "level_seconds": 10.0,
    }  # fmt: skip
    return Load(**(values | fields))


def run(stand_in: StandIn, **fields: Any) -> tuple[dict[str, Any], list[Event]]:
    events: list[Event] = []
    with serving(stand_in):
        return bench(stand_in.url, load(**fields), events.append).to_json(), events


@pytest.fixture(autouse=True)
def watchful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(benches, "WATCH_SECONDS", 0.02)
    yield


def test_figures_of_a_good_server() -> None:
    parts = (chunk(role="assistant"), 0.1, chunk(reasoning="so"), 0.05, chunk(content="yes"), usage(7, 6), DONE)
    stand_in = StandIn(parts=lambda number: parts, metrics=counters)
    found, _ = run(stand_in, concurrency=(1, 3), requests=6)
    assert found["engine"] == "vllm"
    assert found["pool"] == {"blocks": 4096, "block_tokens": 256, "tokens": 262_144}
    for level, concurrency in zip(found["levels"], (1, 3), strict=True):
        assert level["requests"] == {"asked": 6, "ok": 6, "failed": {}, "said": {}}
        assert (level["prompt_tokens"], level["output_tokens"]) == (42, 36)
        assert level["output_tokens_per_second"] == pytest.approx(36 / level["seconds"])
        # A busy machine adds to what the server waits; a chunk that is read late takes it from what follows.
        assert level["time_to_first_token"]["p50"] >= 0.1  # the chunk with the role alone is no token
        assert level["time_per_output_token"]["p50"] >= 0.005  # 0.05 s for the five that follow
        assert level["time_between_chunks"]["p50"] >= 0.025
        assert level["time_per_output_token"]["p50"] < level["time_between_chunks"]["p50"]
        assert level["seconds"] >= 6 / concurrency * 0.15
        # 6 requests of 10 drafts between the scrapes, whatever was counted before and for the warm-up
        assert level["acceptance"] == {
            "rate": 66 / 120, "mean_length": 1 + 66 / 60, "by_position": [0.6, 0.5], "drafts": 60, "draft_tokens": 120,
            "accepted_tokens": 66, "basis": "vLLM's counters before and after",
        }  # fmt: skip
        assert level["server"]["cache_usage_peak"] == 0.25
    assert stand_in.most_at_once == 3
    body = stand_in.seen[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("m", 8, True)
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("parts", "outcome", "said"),
    [
        ((*GOOD[:-1],), "cut stream", "without [DONE]"),
        ((*GOOD[:-2], DONE), "cut stream", "no usage"),
        ((chunk(content="a"), event({"error": {"message": "out of memory"}})), "cut stream", "out of memory"),
        ((chunk(content="a"), b"data: {broken\n\n"), "cut stream", "not JSON"),
        ((chunk(content="a"), 2.0, *GOOD), "timed out", "0.3 s"),
        ((2.0, *GOOD), "timed out", "0.3 s"),
    ],
)
def test_answers_that_are_not_whole(parts: tuple[Any, ...], outcome: str, said: str) -> None:
    """Every second one is bad: it is counted, and does not enter the figures."""
    stand_in = StandIn(parts=lambda number: parts if number % 2 else GOOD)
    found, _ = run(stand_in, request_seconds=0.3)
    (level,) = found["levels"]
    assert level["requests"]["failed"] == {outcome: 2}
    assert said in level["requests"]["said"][outcome]
    assert (level["requests"]["ok"], level["output_tokens"]) == (2, 10)


@pytest.mark.parametrize("status", [400, 503])
def test_a_server_that_refuses(status: int) -> None:
    found, events = run(StandIn(status=status), concurrency=(1, 4))
    (level,) = found["levels"]  # the next one is not tried
    assert level["requests"]["failed"] == {f"HTTP {status}": 4}
    assert "no room" in level["requests"]["said"][f"HTTP {status}"]
    assert level["time_to_first_token"] is None
    assert any("stopped there" in event.text for event in events)


def test_a_server_that_dies() -> None:
    stand_in = StandIn()
    with serving(stand_in):
        pass
    with pytest.raises(FourfoldError, match="expected a running server"):
        bench(stand_in.url, load(), lambda event: None)


def test_a_level_is_bounded_in_time() -> None:
    stand_in = StandIn(parts=lambda number: (0.2, *GOOD))
    found, events = run(stand_in, requests=50, level_seconds=0.5)
    (level,) = found["levels"]
    assert level["seconds"] < 9  # all 50 would take 10
    assert 0 < level["requests"]["ok"] < 5
    assert level["requests"]["ok"] + level["requests"]["failed"]["not answered in time"] == 50
    assert any("stopped after 0.5 s" in event.text for event in events)


def test_metrics_switched_off() -> None:
    found, _ = run(StandIn())
    assert "--enable-metrics" in found["metrics"]
    assert found["levels"][0]["acceptance"] is None
    assert found["levels"][0]["requests"]["ok"] == 4


def test_an_address_that_is_none() -> None:
    with pytest.raises(FourfoldError, match="address of a server"):
        bench("localhost:8000", load(), lambda event: None)


def test_the_cards_figures_for_the_reference_alone() -> None:
    found, _ = run(StandIn(model="org/Qwen3.6-35B-A3B-int4", metrics=counters))
    assert found["card"]["acceptance_by_position"] == [0.93, 0.85]
    assert run(StandIn(metrics=counters))[0]["card"] is None


def test_quantiles() -> None:
    assert quantiles([]) is None
    assert quantiles([3.0]) == Quantiles(mean=3.0, p50=3.0, p90=3.0, p99=3.0)
    assert quantiles([float(v) for v in range(1, 101)]) == Quantiles(mean=50.5, p50=50.0, p90=90.0, p99=99.0)


def test_summary_counts_what_this_process_spent() -> None:
    reply = Reply(outcome="ok", first=1.0, last=2.0, output_tokens=11)
    found = summarize(1, 1, [reply], seconds=2.0, spent=0.011)
    assert found.client_core_share_at_100_tokens_per_second == pytest.approx(0.1)
    assert found.decode_tokens_per_second is not None and found.decode_tokens_per_second.p50 == pytest.approx(10.0)


# --- prompts ------------------------------------------------------------------------------------------------------


def test_built_in_prompts_end_with_a_question() -> None:
    prompts = read_prompts(None)
    assert len(prompts) > 100
    assert {messages[-1]["role"] for messages in prompts} == {"user"}


def test_prompts_of_a_file(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": talk}) + '\n\n{"text": "hello"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [talk[:2], [{"role": "user", "content": "hello"}]]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert [messages[0]["content"] for messages in read_prompts(tmp_path / "p.txt")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{', "record 2: not a prompt"),
        ("a.jsonl", '{"prompt": "a"}', "record 1: not a prompt"),
        ("a.jsonl", '{"messages": [{"role": "assistant"}]}', "record 1: not a prompt"),
        ("a.txt", "\n", "holds no prompt"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FourfoldError, match=said):
        read_prompts(tmp_path / name)


# --- the command --------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    return invoke("bench", *arguments, columns=150)


def test_the_command_writes_and_shows(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    with serving(StandIn(metrics=counters, model="Qwen3.6-35B-A3B")) as stand_in:
        done = command(stand_in.url + "/v1", "--concurrency", "1,2", "--requests", "3", "--out", out)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert [level["concurrency"] for level in written["levels"]] == [1, 2]
    for said in ("acceptance rate", "70%-89%", "0.93 0.85", "█", "3/3", "blocks 4,096"):
        assert said in done.output, done.output


def test_the_command_fails_with_its_requests(tmp_path: Path) -> None:
    with serving(StandIn(status=400)) as stand_in:
        done = command(stand_in.url, "--concurrency", "1", "--out", tmp_path / "bench.json")
        quiet = command(stand_in.url, "--concurrency", "1", "--out", tmp_path / "quiet.json", "--quiet")
        lines = command(stand_in.url, "--concurrency", "1", "--out", tmp_path / "lines.json", "--json").stdout
    assert done.exit_code == 1
    assert 'HTTP 400 {"error": "no room [/]"}' in done.output
    assert (quiet.exit_code, quiet.output) == (1, "")
    assert json.loads(lines) == json.loads((tmp_path / "lines.json").read_text())


@pytest.mark.parametrize("levels", ["", "0", "1,", "a", "1,0"])
def test_concurrencies_that_are_none(levels: str) -> None:
    done = command("http://127.0.0.1:1", "--concurrency", levels)
    assert done.exit_code == 2
    assert "expected numbers from 1 to 9,999, as in 1,4,16" in done.output


def test_prompts_of_a_length(tmp_path: Path) -> None:
    """4,000 characters are 1,000 tokens to this server: a prompt of 50 tokens has 200 characters, each others."""
    parts = (*GOOD[:-2], usage(1000, 5), DONE)
    with serving(StandIn(parts=lambda number: parts, context=100)) as stand_in:
        found = bench(stand_in.url, load(concurrency=(1, 2), contexts=(50, 90), requests=3), lambda event: None)
        asked = len(stand_in.seen)
        with pytest.raises(FourfoldError, match=r"--context: got 93 tokens and 8 of the answer, expected at most 100"):
            bench(stand_in.url, load(contexts=(50, 93)), lambda event: None)
        assert len(stand_in.seen) == asked
    assert [level.title for level in found.levels] == ["1 x 50", "2 x 50", "1 x 90", "2 x 90"]
    prompts = [body["messages"][0]["content"] for body in stand_in.seen if body["max_tokens"] == 8]
    assert [len(prompt) for prompt in prompts] == [200] * 8 + [360] * 8 and len(set(prompts[:4])) == 4


FAKE = """#!{python}
import sys, time
sys.path.insert(0, {tests!r})
from standin import GOOD, StandIn, counters, serving
depth, port = (int(sys.argv[sys.argv.index(name) + 1]) for name in ("--mtp", "--port"))
if depth == 8:
    sys.exit("Error: 8 drafts do not fit")
with serving(StandIn(parts=lambda _: (0.3 if depth == 2 else 0.01, *GOOD), metrics=counters, port=port)):
    print("Ctrl-C stops it", file=sys.stderr, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example_model: Path) -> Path:
    """A checkpoint, and in place of `fourfold serve` a server that is slow with two drafts."""
    script = tmp_path / "python"
    script.write_text(FAKE.format(python=sys.executable, tests=str(Path(__file__).parents[1])))
    script.chmod(0o755)
    monkeypatch.setattr(depths.sys, "executable", str(script))
    return example_model


def test_drafts_are_compared(release: Path, tmp_path: Path) -> None:
    words = ("--concurrency", "1,2", "--requests", "2", "--out", tmp_path / "bench.json")
    done = command(release, "--drafts", "1,2", *words, "--", "--engine", "vllm")
    assert done.exit_code == 0, done.output
    written = Bench.read(tmp_path / "bench.json")
    assert [level.title for level in written.levels] == ["1 d1", "2 d1", "1 d2", "2 d2"]
    assert written.fastest_drafts == {1: 1, 2: 1}
    shown = " ".join(done.stdout.split())
    assert "fastest number of drafts by concurrency: 1 at 1, 1 at 2; drafts are faster at each" in shown
    failed = command(release, "--drafts", "1,8", *words)
    assert failed.exit_code == 2 and "--drafts 8: no server: 8 drafts do not fit" in failed.stderr


def test_where_drafts_do_not_pay() -> None:
    assert crossover({1: 3, 4: 1, 16: 0, 32: 0}).endswith(
        "3 at 1, 1 at 4, 0 at 16, 0 at 32; without drafts it is faster from concurrency 16 on"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--drafts", "9"), "expected numbers from 0 to 8, as in 0,1,2,3"),
        (("--context", "0"), "expected numbers from 1 to 1,048,576"),
        (("--context", "8", "--prompts", __file__), "--context and --prompts exclude each other"),
        (("--", "--engine", "vllm"), "expected them with --drafts only"),
        (("--drafts", "0,1"), "no such folder"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...], said: str) -> None:
    done = command("./no/such", *words)
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
