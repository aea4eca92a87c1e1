"""What the terminal shows, from events and a clock of our own."""

from __future__ import annotations

import io
import json
import re
import types
from typing import Any

import pytest
from msgspec import convert
from rich.console import Console

from fourfold import units
from fourfold.cli import progress
from fourfold.cli.options import EventOutput, Output
from fourfold.cli.progress import OutputMode, Pace
from fourfold.cli.tables.run import show_evaluation, show_summary, show_verdict
from fourfold.datatypes import Event
from fourfold.records.release import Worker
from fourfold.records.results import EngineFacts, Level, Metrics, Verdict
from fourfold.release.verify.check import judge, skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(*, live: bool = False, width: int = 100) -> Console:
    options: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    return Console(file=io.StringIO(), force_terminal=live, width=width, **options)


def printed(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def run_layer(tell: Any, clock: Clock, layer: int, seconds: float, *, layers: int = 10, solved: bool = True) -> None:
    tell(Event(kind="stage", stage="read", layer=layer, layers=layers))
    tell(Event(kind="stage", stage="solve" if solved else "restore", layer=layer, layers=layers))
    tell(Event(kind="stage", stage="copy"))  # the writer's, beside the layer
    tell(Event(kind="stage", stage="recorded", layer=max(layer - 1, 0), layers=layers))
    clock.now += seconds
    tell(Event(kind="stage", stage="advance", layer=layer, layers=layers))
    tell(Event(kind="layer", layer=layer, layers=layers))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (12.34, "12.3 s"), (61, "1 min 01 s"), (3599.7, "1 h 00 min"), (15_600, "4 h 20 min")],
)
def test_clock_text(seconds: float, text: str) -> None:
    assert units.clock_text(seconds) == text


def test_time_left_is_the_mean_of_the_last_solved_layers() -> None:
    clock = Clock()
    pace = Pace(clock)
    for layer in range(3):
        run_layer(pace.follow, clock, layer, 1, solved=False)
    assert (pace.layer_seconds, pace.remaining_seconds) == (1, None)
    for layer, seconds in ((3, 50), (4, 10), (5, 10), (6, 10), (7, 30)):
        run_layer(pace.follow, clock, layer, seconds)
        assert pace.layer_seconds == seconds
    assert pace.remaining_seconds == 15 * 2
    for layer in (8, 9):
        run_layer(pace.follow, clock, layer, 20)
    assert pace.remaining_seconds == 0


def test_the_sweep_before_the_loop_has_layers_of_its_own() -> None:
    """A line for each way; the loop's layers are timed as without it."""
    clock, to = Clock(), console()
    pace = Pace(clock)
    lines = progress.Display(to, pace, bars=False)
    for stage, layer in (("forward", 0), ("forward", 1), ("backward", -1), ("backward", 1), ("backward", 0)):
        event = Event(kind="stage", stage=stage, layer=layer, layers=2)
        pace.follow(event)
        lines.show(event)
        clock.now += 30
    assert printed(to).splitlines() == ["guidance, forward", "guidance, backward"]
    run_layer(pace.follow, clock, 0, 5, layers=2)
    assert (pace.layer_seconds, pace.remaining_seconds) == (5, 5)


def test_speed_is_that_of_the_stage() -> None:
    clock = Clock()
    pace = Pace(clock)
    for done, seconds in ((0, 0), (50, 2), (100, 2)):
        clock.now += seconds
        event = Event(kind="stage", stage="moments", layer=0, layers=2, done=done, total=100, unit="tokens")
        pace.follow(event)
        pace.follow(Event(kind="stage", stage="copy", done=done, total=100))
    assert pace.per_second(event) == 25


def test_lines() -> None:
    clock, to = Clock(), console()
    with progress.show_progress(to, OutputMode.LINES, clock) as tell:
        tell(Event(kind="stage", stage="calibrate", layers=2))
        tell(Event(kind="note", text="one\ntwo \x1b[31mred"))
        run_layer(tell, clock, 0, 90, layers=2)
        drift: dict[str, object] = {"hidden_error": 0.01234, "router_agreement": 0.985}
        memory = {"host": 5 * 10**9, "cuda:0": 8 * 10**9, "cuda:1": 9 * 10**9}
        data = drift | {"memory_bytes": memory}
        tell(Event(kind="layer", layer=1, layers=2, data=data, text="[b]"))
    lines = printed(to).splitlines()
    assert lines == [
        "reading calibration text",
        "note: one",
        "two \N{REPLACEMENT CHARACTER}[31mred",
        "copying other tensors",
        "layer 1/2  1 min 30 s, 1 min 30 s left",
        "layer 2/2  1 min 30 s  [b]  hidden error 0.0123  routing 98.5%  host 5.0 GB, GPU 9.0 GB",
    ]


def test_bars_move_and_layers_scroll_by() -> None:
    clock, to = Clock(), console(live=True)
    with progress.show_progress(to, OutputMode.BARS, clock) as tell:
        run_layer(tell, clock, 0, 30, layers=2)
        tell(Event(kind="stage", stage="moments", layer=1, layers=2, done=0, total=4_000, unit="tokens"))
        clock.now += 2
        tell(Event(kind="stage", stage="moments", layer=1, layers=2, done=3_000, total=4_000, unit="tokens"))
        for layer in (0, 1):  # the writer is no less behind in the layer that the loop is at
            tell(Event(kind="stage", stage="recorded", layer=layer, layers=2))
        tell(Event(kind="note", text="[red]as it is[/red]"))
    shown = printed(to)
    assert "recorded" not in shown
    assert "layer 1/2  30.0 s" in shown
    assert "note: [red]as it is[/red]" in shown
    assert "layer 2: moments" in shown
    assert " 50%" in shown
    assert " 75% 1,500 tokens/s" in "\n".join(lines_of(to))
    assert "1/2, 30.0 s left" in shown


def lines_of(to: Console) -> list[str]:
    """All that was drawn, line by line, without what steers a terminal."""
    return re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(to)))


def test_no_line_is_wider_than_80_columns() -> None:
    """Every stage of a long run with big numbers: bars as they move, layer lines, a note that is wrapped at words."""
    clock, to = Clock(), console(live=True, width=80)
    data: dict[str, object] = {"hidden_error": 0.123456, "router_agreement": 1.0,
                               "memory_bytes": {"host": 123 * 10**9, "cuda:0": 98 * 10**9}}  # fmt: skip
    note = "tensor parallel 8: " + " ".join(["words"] * 40)
    pace = Pace(clock)
    display = progress.Display(to, pace, bars=True)

    def tell(event: Event) -> None:
        pace.follow(event)
        display.show(event)
        display.bars.refresh()

    with display.bars:
        for stage in (*progress.STAGES, "solve", "attend"):
            for layer, done in ((-1, 0), (97, 0), (97, 987_654_321)):
                clock.now += 40
                sizes: dict[str, Any] = {"layer": layer, "layers": 120, "done": done, "total": 987_654_321}
                tell(Event(kind="stage", stage=stage, **sizes, unit="tokens"))
        tell(Event(kind="note", text=note))
        tell(Event(kind="layer", layer=97, layers=120, data=data))
    shown = lines_of(to)
    assert max(map(len, shown)) <= 80 and "…" not in "".join(shown)
    assert " ".join("\n".join(shown).split()).count(note) == 1  # no word is broken
    (line,) = (line.strip() for line in shown if line.startswith("layer 98/120"))
    assert "hidden error 0.1235  routing 100.0%" in line


def test_a_bar_pulses_until_something_is_done() -> None:
    to = console(live=True, width=80)
    display = progress.Display(to, Pace(), bars=True)

    def show(stage: str, done: int, total: int) -> tuple[float | None, float]:
        event = Event(kind="stage", stage=stage, layer=0, layers=2, done=done, total=total)
        display.pace.follow(event)
        display.show(event)
        task = display.bars.tasks[-1]
        return task.total, task.completed

    assert show("solve", 0, 64) == (None, 0)
    assert show("solve", 16, 64) == (64, 16)
    assert show("advance", 0, 0) == (None, 0)  # no total that was another stage's


def test_json_lines() -> None:
    to = console()
    with progress.show_progress(to, OutputMode.JSON) as tell:
        tell(Event(kind="layer", layer=0, layers=2, data={"hidden_error": 0.5}))
    (line,) = printed(to).splitlines()
    assert json.loads(line)["data"] == {"hidden_error": 0.5}


def test_quiet() -> None:
    to = console()
    with progress.show_progress(to, OutputMode.QUIET) as tell:
        tell(Event(kind="note", text="unheard"))
    assert printed(to) == ""


def test_choose_mode() -> None:
    assert progress.choose_mode(console()) is OutputMode.LINES
    assert progress.choose_mode(console(live=True)) is OutputMode.BARS


@pytest.mark.parametrize("quiet", [False, True])
def test_json_is_printed_although_quiet_is_asked_for(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    result = types.SimpleNamespace(to_json=lambda: {"a": 1})

    def work(report: Any) -> types.SimpleNamespace:
        report(Event(kind="note", text="a note"))
        return result

    EventOutput(json=True, quiet=quiet).present(work, no_table, kind="summary")
    note, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (note["text"], summary) == ("a note", {"kind": "summary", "data": {"a": 1}})
    assert Output(json=True, quiet=quiet).present(work, no_table) is result
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def no_table(to: Console, result: object) -> None:
    raise AssertionError


@pytest.mark.parametrize("workers", [1, 2])
def test_summary(workers: int) -> None:
    to = console(width=30)  # a pipe: its lines are as long as they are
    worker = Worker(device="cpu", waited_seconds=1.0, of_seconds=10.0, waited_for={"writer": 1.0})
    metrics = {"perplexity_source": 28.0, "perplexity_release": 28.56, "kl_mean": 0.0123, "top1_agreement": 0.95}
    summary = types.SimpleNamespace(
        out="release[1]",
        partial=False,
        projections=192,
        methods={"gptq": 190, "diag": 2},
        tokens_per_input={"mean": 32.0, "coldest_tenth": 0.125},
        bytes_before=22_400_000,
        bytes_after=13_000_000,
        metrics=metrics,
        seconds={"solve": 60.0, "attend": 2.0},
        peak_memory_bytes={"host": 1_800_000_000, "cuda:0": 2_000_000_000},
        planned_memory_bytes={"host": 10**6},
        workers=(worker,) * workers,
        notes=("a note",),
    )
    show_summary(to, summary, "my model")  # type: ignore[arg-type]
    busy = ["busy                 cpu 90%, cpu 90%; waited at most 1.0 s for writer"] if workers > 1 else []
    assert printed(to).splitlines() == [
        "projections          192 (190 gptq, 2 diag)",
        "tokens per expert    32 per input of gate and up (coldest tenth of experts 0.125)",
        "size of tensors      22.4 MB -> 13.0 MB (58.0%)",
        "time                 1 min 02 s",
        "peak memory          host 1.8 GB, cuda:0 2.0 GB (planned host 1.0 MB)",
        *busy,
        "perplexity, source   28.0000",
        "perplexity, release  28.5600",
        "mean KLD (nats)      0.01230",
        "top-1 agreement      95.00%",
        "output               release[1]",
        "note: a note",
        "Next: fourfold verify 'release[1]' --source 'my model'",
    ]


# ---- evaluation


def evaluated(**more: Any) -> dict[str, Any]:
    summary = {"positions": 2044, "entropy_source": 2.0, "perplexity_source": 10.0, "perplexity_release": 10.1,
               "perplexity_ratio": 1.01, "kl_mean": 0.001,
               "kl_median": 0.0005, "kl_p90": 0.002, "kl_p99": 0.01, "kl_max": 0.5, "top1_agreement": 0.98,
               "top5_agreement": 0.97}  # fmt: skip
    layer = {"layer": 0, "hidden_error": 0.03, "router_agreement": 0.99}
    last = {"layer": 1, "hidden_error": 0.0345, "router_agreement": 0.96}
    return {
        "measured_by": "evaluate",
        "protocol": {"text": "a text", "windows": 4, "window": 512},
        "summary": summary,
        "intervals": {"kl_mean": [0.0008, 0.0012], "perplexity_source": [9.0, 11.0]},
        "layers": [layer, last],
        "drafts": None,
    } | more


def test_evaluation_shows_source_and_release() -> None:
    to = console()
    show_evaluation(to, convert(evaluated(), Metrics))
    shown = printed(to)
    figures = ("10.0000 ± 1.0000", "10.1000", "0.00100 ± 0.00020", "top-1 agreement", "98.00%", "0.0345", "96.00%")
    for words in (*figures, "a text: 4 windows"):
        assert words in shown, words
    assert "draft acceptance" not in shown


def test_a_ratio_is_shown_with_its_interval_or_not_at_all() -> None:
    """Below 1 it would say that int4 is better than BF16."""
    found = evaluated()
    found["summary"]["perplexity_ratio"] = 0.9994
    show_evaluation(to := console(), convert(found, Metrics))
    assert "0.9994" not in (shown := printed(to)) and "one window gives no interval" in shown
    found["intervals"]["perplexity_ratio"] = [0.9973, 1.0015]
    show_evaluation(to := console(), convert(found, Metrics))
    assert "0.99940 ± 0.00210" in printed(to)


def test_evaluation_shows_drafts_tasks_and_a_second_release() -> None:
    rule = {"by_position": [0.75, 0.5, 0.25], "mean_length": 2.5, "interval": None}
    drafted = {"greedy": rule, "sampled": rule}
    second = evaluated(
        name="other\x1b[2J", intervals=None, layers=[{"layer": 0, "hidden_error": 0.9, "router_agreement": None}]
    )
    row = {"figures": {"exact_match,none": 0.5}, "samples": 20}
    drafts = {"protocol": {}, "source": drafted, "release": None}
    found = evaluated(against=second, drafts=drafts, tasks={"lm_eval": "0.4", "tasks": {"gsm8k": row}})
    to = console()
    show_evaluation(to, convert(found, Metrics))
    shown = printed(to)
    for words in ("0.750 0.500 0.250", "2.50", "no draft head", "0.9000", "exact_match,none        0.5000       20"):
        assert words in shown, words
    assert "\x1b" not in shown


# --- verdict -----------------------------------------------------------------------------------------------------


def test_verdict_names_level_check_status_and_evidence() -> None:
    engine = {
        "engine": "vLLM 0", "torch": "2", "device": "cpu", "kernels": ["Using 'ZEN' MoE backend."],
        "start_seconds": 4.0, "load_seconds": 1.0, "kv_cache_tokens": 74_898, "decode_tokens_per_second": 50.0,
        "decode_tokens_per_second_mtp": 75.0,
    }  # fmt: skip
    checks = (
        judge(Level.FILES, "index", [], "[bold]5 tensors"),
        skip(Level.FILES, "sidecars", "no source"),
        judge(Level.ENGINE, "starts", ["\x1b[31mcrash"], ""),
    )
    facts: dict[str, Any] = {"content": "", "bytes_read": 1, "seconds": {"files": 61.0}}
    levels = (Level.FILES, Level.ENGINE)
    to = console()
    facts_of_engine = convert(engine, EngineFacts)
    show_verdict(to, Verdict(passed=False, checks=checks, engine=facts_of_engine, levels=levels, **facts))
    lines = [" ".join(line.split()) for line in printed(to).splitlines()]
    assert "files index pass [bold]5 tensors" in lines
    assert "sidecars not run no source" in lines
    assert "engine starts fail \N{REPLACEMENT CHARACTER}[31mcrash" in lines
    assert "kernels 'ZEN' MoE backend" in lines
    assert "KV cache 74,898 tokens" in lines
    assert "decoding 50 tokens/s, with MTP 75" in lines
    assert lines[-1] == "1 of 3 checks failed"
    to = console()
    show_verdict(to, Verdict(passed=True, checks=checks[:2], engine=None, levels=levels[:1], **facts))
    assert printed(to).splitlines()[-1] == "all checks passed: files (1 min 01 s)"
