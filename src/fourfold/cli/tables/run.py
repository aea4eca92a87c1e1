"""Tables of the commands that make a release and measure it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fourfold.cli.console import facts_table, grid, paragraphs, plain, say, show_facts, show_table, warn
from fourfold.cli.progress import memory_text
from fourfold.formats import gguf
from fourfold.formats.gguf_names import ARCHITECTURES
from fourfold.units import FIGURES, clock_text

if TYPE_CHECKING:
    from fourfold.quantize.plan import Plan
    from fourfold.quantize.summary import Summary
    from fourfold.records.release import Worker
    from fourfold.records.results import EngineFacts, Metrics, Rule, Verdict

SUMMARY = ("perplexity_source", "perplexity_release", "kl_mean", "kl_median", "kl_p99", "top1_agreement")


def show_plan(console: Console, plan: Plan) -> None:
    """Show model and recipe, groups of tensors, memory, disk and time, warnings."""
    show_facts(console, plan.headline)
    console.print()
    show_table(console, _groups_table(plan))
    console.print()
    show_table(console, _needs_table(plan))
    say(console, f"time: {plain(plan.time.basis)}", "dim")
    if plan.recipe.guidance.tokens:
        say(console, plan.prediction)
    for warning in plan.warnings:
        warn(console, "warning", warning)


def _groups_table(plan: Plan) -> Table:
    table, rows = grid("tensors", "what happens", "before", "after", "size", "size after", right=2), plan.groups()
    for row in rows:
        tensors = f"{row.tensors_before:,}", f"{row.tensors_after:,}"
        sizes = decimal(row.bytes_before), decimal(row.bytes_after)
        table.add_row(plain(row.group), plain(row.what), *tensors, *sizes)
    tensors = f"{sum(row.tensors_before for row in rows):,}", f"{sum(row.tensors_after for row in rows):,}"
    sizes = decimal(sum(row.bytes_before for row in rows)), decimal(sum(row.bytes_after for row in rows))
    table.add_row("all", "", *tensors, *sizes)
    return table


def _needs_table(plan: Plan) -> Table:
    from fourfold.serve.cards import SHARE, planned_fits  # here: --help must not wait for it

    memory, disk = plan.memory, plan.disk
    table = facts_table()
    table.add_row("host memory", f"{decimal(memory.host_peak_bytes)} at the peak")
    if not memory.on_cpu:
        table.add_row("memory of each GPU", f"{decimal(memory.device_peak_bytes)} at the peak")
    elif len(memory.devices) > 1:
        worker = max(stage.worker_bytes for stage in memory.stages)
        table.add_row("of it each worker's", f"{decimal(worker)} at the peak, {len(memory.devices)} workers")
    host = f", {decimal(memory.host_budget_bytes)} on the host" if memory.host_budget_bytes else ""
    table.add_row("budget", f"{decimal(memory.budget_bytes)} on {'the CPU' if memory.on_cpu else 'each GPU'}{host}")
    batches = f"{memory.chunk_experts:,} experts, {memory.token_batch:,} tokens, {memory.row_batch:,} samples"
    table.add_row("batches", batches)
    if memory.widened:
        table.add_row("products", "in fp32, rounded to BF16: this processor has no BF16 instructions")
    own = [source for source in plan.recipe.calibration.sources if not source.builtin]
    if own:
        looked = "; datasets are not read" if any(source.dataset for source in own) else ""
        table.add_row("calibration text", f"read, not tokenized{looked}: quantize counts its tokens")
    free = "" if disk.free_bytes is None else f", {decimal(disk.free_bytes)} are free"
    table.add_row("disk", f"{decimal(disk.needed_bytes)}{free}")
    if plan.recipe.scheme.group == gguf.BLOCK and plan.source.family.model_type in ARCHITECTURES:
        table.add_row("as GGUF", f"{gguf.BITS} bits per expert weight: larger groups would not make the file smaller")
    if disk.spilled_bytes:
        table.add_row("of it hidden states", f"{decimal(disk.spilled_bytes)} while the run lasts: memory is too small")
    if disk.swept_bytes:
        swept = f"{decimal(disk.swept_bytes)} while it lasts, {decimal(disk.curvature_bytes)} until the run is finished"
        table.add_row("of it the sweep's", swept)
    table.add_row("time", f"{clock_text(plan.time.seconds)} (prediction), bound by {plan.time.bound}")
    if fits := planned_fits(plan):
        table.add_row("to serve", f"{'; '.join(map(str, fits))}\nprediction: vLLM, fp8 KV cache, {SHARE} of the memory")
    return table


def show_summary(console: Console, summary: Summary, model: str) -> None:
    """Show sizes, time, memory, held-out metrics, the output folder, the verdict, the next command."""
    table = facts_table()
    methods = ", ".join(f"{count:,} {plain(method)}" for method, count in summary.methods.items())
    table.add_row("projections", f"{summary.projections:,}" + (f" ({methods})" if methods else ""))
    if tokens := summary.tokens_per_input:
        coldest = f"coldest tenth of experts {tokens['coldest_tenth']:.3g}"
        table.add_row("tokens per expert", f"{tokens['mean']:.3g} per input of gate and up ({coldest})")
    sizes = f"{decimal(summary.bytes_before)} -> {decimal(summary.bytes_after)}"
    if summary.bytes_before:
        sizes += f" ({summary.bytes_after / summary.bytes_before:.1%})"
    table.add_row("size of tensors", sizes)
    resumed = " since it was resumed" if "restore" in summary.seconds else ""
    table.add_row("time", clock_text(sum(summary.seconds.values())) + resumed)
    planned = memory_text(summary.planned_memory_bytes)
    table.add_row("peak memory", f"{memory_text(summary.peak_memory_bytes)} (planned {planned})")
    if len(summary.workers) > 1:
        table.add_row("busy", _busy(summary.workers))
    for key in SUMMARY:
        if key in summary.metrics:
            label, form = FIGURES[key]
            table.add_row(label, form.format(summary.metrics[key]))
    table.add_row("output", plain(summary.out) + (" (partial: a trial, no engine loads it)" if summary.partial else ""))
    show_table(console, table)
    for note in summary.notes:
        say(console, f"note: {paragraphs(note)}")
    if not summary.partial:
        from fourfold.quantize.journal import METRICS  # here: --help must not wait for these
        from fourfold.records.results import Metrics
        from fourfold.release.report.quality import verdict

        if metrics := Metrics.find(Path(summary.out) / METRICS):
            say(console, verdict(metrics))
        command = shlex.join(["fourfold", "verify", plain(summary.out), "--source", plain(model)])
        console.print(f"Next: {command}", soft_wrap=True)


def _busy(workers: Sequence[Worker]) -> str:
    """Busy share of each worker's time, and the longest waits."""
    busy = ", ".join(f"{plain(one.device)} {1 - one.waited_seconds / one.of_seconds:.0%}" for one in workers)
    longest: dict[str, float] = {}
    for worker in workers:
        for whom, seconds in worker.waited_for.items():
            longest[whom] = max(seconds, longest.get(whom, 0.0))
    waits = ", ".join(f"{seconds:.1f} s for {whom}" for whom, seconds in longest.items() if seconds >= 0.05)
    return busy + (f"; waited at most {waits}" if waits else "")


def show_evaluation(console: Console, found: Metrics) -> None:
    """Show metrics.json: source, release and, if there is one, the second release."""
    against = found.against
    releases = [found, *([against] if against else [])]
    names = ["source", "release", *([plain(against.name)] if against else [])]
    table = grid("", *names, right=1)
    table.columns[0].no_wrap = True
    perplexities = [release.text("perplexity_release") for release in releases]
    table.add_row("perplexity", found.text("perplexity_source"), *perplexities)
    for key, (label, _) in [*FIGURES.items()][2:]:
        table.add_row(label, "", *(release.text(key) for release in releases))
    last = [release.layers[-1] for release in releases]
    table.add_row("hidden-state error, last layer", "", *(f"{row.hidden_error:.4f}" for row in last))
    least = [[row.router_agreement for row in release.layers if row.router_agreement] for release in releases]
    table.add_row("router agreement, minimum", "", *(f"{min(rows):.2%}" if rows else "" for rows in least))
    if found.drafts:
        drafted = [found.drafts.source, found.drafts.release, *([against.drafts] if against else [])]
        for rule in ("greedy", "sampled"):
            rules: list[Rule | None] = [getattr(one, rule, None) for one in drafted]
            rates = [" ".join(f"{p:.3f}" for p in one.by_position) if one else "no draft head" for one in rules]
            table.add_row(f"draft acceptance rate, {rule}", *rates)
            table.add_row("  tokens per step", *(f"{one.mean_length:.2f}" if one else "" for one in rules))
    show_table(console, table)
    from fourfold.release.report.quality import draft_head, server_lines, task_grid  # here: --help must not wait

    if paired := draft_head(found):
        say(console, paired)
    protocol = found.protocol
    windows = f"{protocol.windows} windows of {protocol.window} tokens"
    say(console, f"{plain(protocol.text)}: {windows}, no BOS; ± half of the 95 % interval over windows", "dim")
    if cells := task_grid(found.tasks):
        tasks = grid(*cells.header, right=2)
        for row in cells.rows:
            tasks.add_row(*map(plain, row))
        show_table(console, tasks)
    for line in server_lines(found.tasks):
        say(console, paragraphs(line))


STATUS_STYLES = {"pass": "green", "fail": "bold red", "not run": "yellow"}


def show_verdict(console: Console, verdict: Verdict) -> None:
    """Show level, name, status and evidence of each check, the engine, and the verdict."""
    table = grid("level", "check", "", "seen")
    for column in table.columns[:3]:
        column.no_wrap = True
    before = ""
    for check in verdict.checks:
        status = Text(check.status, style=STATUS_STYLES[check.status])
        level, before = check.level if check.level != before else "", check.level
        table.add_row(level, plain(check.name), status, paragraphs(check.evidence))
    show_table(console, table)
    if verdict.engine:
        _show_engine(console, verdict.engine)
    if verdict.passed:
        seconds = clock_text(sum(verdict.seconds.values()))
        console.print(f"all checks passed: {', '.join(verdict.levels)} ({seconds})", style="green")
    else:
        failed = sum(check.status == "fail" for check in verdict.checks)
        console.print(f"{failed} of {len(verdict.checks)} checks failed", style="bold red")


def _show_engine(console: Console, engine: EngineFacts) -> None:
    speed = f"{engine.decode_tokens_per_second or 0:,.0f} tokens/s"
    if engine.decode_tokens_per_second_mtp:
        speed += f", with MTP {engine.decode_tokens_per_second_mtp:,.0f}"
    facts = [
        ("engine", f"{engine.engine}, torch {engine.torch}, {engine.device}"),
        ("kernels", "; ".join(line.removeprefix("Using ").rstrip(".") for line in engine.kernels)),
        ("start", f"{engine.start_seconds:.1f} s, of which weights {engine.load_seconds:.1f} s"),
        ("KV cache", f"{engine.kv_cache_tokens:,} tokens"),
        ("decoding", speed),
    ]
    show_facts(console, facts)
