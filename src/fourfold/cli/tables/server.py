"""Tables of the commands that work with a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fourfold.cli.console import facts_table, grid, paragraphs, plain, say, show_facts, show_table, warn
from fourfold.units import READY, clock_text

if TYPE_CHECKING:
    from fourfold.records.bench import Bench, BenchLevel
    from fourfold.serve.command import Command
    from fourfold.serve.probe import Probed


ALIVE = {True: ("alive", "green"), False: ("NOT ALIVE", "bold red"), None: ("not seen", "yellow")}
BAR_WIDTH = 40
MILLISECONDS = ("time_to_first_token", "time_per_output_token", "time_between_chunks")


def show_command(console: Console, command: Command) -> None:
    """Show the predicted KV cache of a server, problems and notes."""
    console.print(Text(f"{command.engine.title} {'.'.join(map(str, command.version))}: {plain(command.name)}", "bold"))
    for line in command.forecast.lines():
        say(console, plain(line))
    for problem in command.problems:
        warn(console, "problem", problem, "bold red")
    for note in command.notes:
        say(console, f"note: {paragraphs(note)}")


def show_ready(console: Console, command: Command, seconds: float, probed: Probed) -> None:
    """Show the results of the probe, and the KV cache beside its prediction."""
    ready = f"ready after {clock_text(seconds)}: {plain(command.url)}/v1, model {plain(command.name)}"
    say(console, ready, "green")
    table = facts_table(3)
    for finding in probed.findings:
        table.add_row(plain(finding.what), Text(*ALIVE[finding.alive]), paragraphs(finding.seen))
    show_table(console, table)
    if probed.pool:
        pool = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in probed.pool.items())
        say(console, f"KV cache: {pool}; predicted: {command.forecast.brief()}")
    console.print(READY, style="dim")


def show_bench(console: Console, found: Bench) -> None:
    """Show a column per concurrency, beside the reference card's figures for that model; then bars of throughput."""
    levels, card = found.levels, found.card or {}
    table = grid(_axes(levels), *(level.title for level in levels), right=1)
    table.columns[0].no_wrap = True
    table.add_column(f"card: {plain(card['engine'])}" if card else "")
    for label, cells, beside in _bench_rows(levels, card):
        table.add_row(label, *cells, beside)
    show_table(console, table)
    _draw(console, [(level.title, level.output_tokens_per_second) for level in levels])
    if fastest := found.fastest_drafts:
        say(console, crossover(fastest))
    facts = [("model", f"{found.model} at {found.url}"), ("metrics", f"{found.engine}: {found.metrics}")]
    if found.pool:
        facts.append(("KV cache", ", ".join(f"{name} {value:,}" for name, value in found.pool.items())))
    show_facts(console, facts)
    for level in levels:
        for outcome, count in level.requests.failed.items():
            failure = f"{count} x {plain(outcome)} {paragraphs(level.requests.said.get(outcome, ''))}"
            say(console, f"concurrency {level.title}: {failure}", "red")


def _axes(levels: list[BenchLevel]) -> str:
    """What a column's title counts."""
    context, drafts = (any(getattr(one, key) is not None for one in levels) for key in ("context", "drafts"))
    return "concurrency" + (" x context" if context else "") + (" d drafts" if drafts else "")


def crossover(fastest: Mapping[int, int]) -> str:
    """From which concurrency on drafts do not pay."""
    best = ", ".join(f"{drafts} at {concurrency}" for concurrency, drafts in fastest.items())
    first = next((concurrency for concurrency, drafts in fastest.items() if not drafts), None)
    paid = "drafts are faster at each" if first is None else f"without drafts it is faster from concurrency {first} on"
    return f"fastest number of drafts by concurrency: {best}; {paid}"


def _bench_rows(levels: list[BenchLevel], card: Mapping[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    def between(key: str, form: str) -> str:
        return "-".join(form.format(value) for value in card[key]) if key in card else ""

    yield "requests, in full", [f"{one.requests.ok}/{one.requests.asked}" for one in levels], ""
    yield "tokens/s, all", [f"{one.output_tokens_per_second:,.1f}" for one in levels], ""
    decode = [one.decode_tokens_per_second for one in levels]
    beside = between("decode_tokens_per_second", "{:.0f}")
    yield "tokens/s of a request, p50", [f"{one.p50:,.1f}" if one else "" for one in decode], beside
    for key in MILLISECONDS:
        found = [getattr(one, key) for one in levels]
        cells = [f"{one.p50 * 1000:,.1f} / {one.p99 * 1000:,.1f}" if one else "" for one in found]
        yield f"{key.replace('_', ' ')}, ms p50/p99", cells, ""
    accepted = [one.acceptance for one in levels]
    if any(accepted):
        rates = [f"{a.rate:.1%}" if a else "" for a in accepted]
        yield "acceptance rate", rates, between("acceptance_rate", "{:.0%}")
        places = [" ".join(f"{share:.2f}" for share in a.by_position or ()) if a else "" for a in accepted]
        yield "  by position", places, " ".join(f"{share:.2f}" for share in card.get("acceptance_by_position", ()))
        lengths = [f"{a.mean_length:.2f}" if a else "" for a in accepted]
        yield "  tokens a step", lengths, between("acceptance_length", "{:.1f}")
    for key, label, form in (
        ("cache_usage_peak", "KV cache used, most", "{:.1%}"),
        ("preemptions", "preemptions", "{:,}"),
        ("prefix_hit_rate", "prefix cache hits", "{:.1%}"),
    ):
        if any(key in one.server for one in levels):
            yield label, [form.format(one.server[key]) if key in one.server else "" for one in levels], ""


def _draw(console: Console, points: list[tuple[str, float]]) -> None:
    """Throughput against concurrency."""
    most = max((rate for _, rate in points), default=0)
    for concurrency, rate in points:
        bar = "█" * round(BAR_WIDTH * rate / most) if most else ""
        console.print(f"{concurrency:>5} {bar} {rate:,.1f} tokens/s")
