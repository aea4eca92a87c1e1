"""What the terminal shows of plans, finished runs, evaluations, verdicts, servers. Text from files is never markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fourfold.terminal import memory_text, paragraphs, plain
from fourfold.units import clock_text

if TYPE_CHECKING:
    from fourfold.quantize.finish import Summary
    from fourfold.quantize.plan import Plan
    from fourfold.release.compare import Comparison
    from fourfold.release.convert import Converted
    from fourfold.release.inspect import Inspection
    from fourfold.release.publish import Published
    from fourfold.release.verify.check import Verdict
    from fourfold.serve.command import Command
    from fourfold.serve.probe import Probed

METRICS = {  # key of Summary.metrics: what it is called, how it is written
    "perplexity_source": ("perplexity, source", "{:.4f}"),
    "perplexity_release": ("perplexity, release", "{:.4f}"),
    "kl_mean": ("KL divergence, mean", "{:.5f} nats"),
    "kl_median": ("KL divergence, median", "{:.5f} nats"),
    "kl_p99": ("KL divergence, 99th percentile", "{:.5f} nats"),
    "top1_agreement": ("same most likely token", "{:.2%}"),
}


# --- plan and summary --------------------------------------------------------------------------------------------


def show_plan(console: Console, plan: Plan) -> None:
    """The table of tensor groups; memory, disk and time; warnings."""
    family, recipe = plan.skeleton.family, plan.recipe
    console.print(Text(f"{plain(plan.index.folder)}: {family.model_type}, {len(plan.layers)} layers", style="bold"))
    console.print(
        f"recipe {plain(recipe.name)}: {recipe.format}, groups of {recipe.scheme.group_size}, "
        f"{plan.projections:,} expert projections" + _trial(plan)
    )
    console.print(_groups_table(plan))
    console.print(_needs_table(plan))
    console.print(f"time: {plain(plan.time.basis)}", style="dim", soft_wrap=True)
    show_warnings(console, plan.warnings)


def _trial(plan: Plan) -> str:
    if not plan.partial:
        return ""
    return f"; a trial on layers {plan.solve.start}-{plan.solve.stop - 1}, its output is partial"


def _groups_table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_footer=True)
    rows = plan.groups()
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    table.add_column("tensors", footer="all")
    table.add_column("what happens")
    table.add_column("before", justify="right", footer=f"{sum(row.tensors_before for row in rows):,}")
    table.add_column("after", justify="right", footer=f"{sum(row.tensors_after for row in rows):,}")
    table.add_column("size", justify="right", footer=decimal(before))
    table.add_column("size after", justify="right", footer=decimal(after))
    for row in rows:
        tensors = f"{row.tensors_before:,}", f"{row.tensors_after:,}"
        sizes = decimal(row.bytes_before), decimal(row.bytes_after)
        table.add_row(plain(row.group), plain(row.action), *tensors, *sizes)
    return table


def _needs_table(plan: Plan) -> Table:
    memory, disk = plan.memory, plan.disk
    table = _facts()
    table.add_row("host memory", f"{decimal(memory.host_peak_bytes)} at the peak")
    devices = ", ".join(memory.devices)
    if not memory.on_cpu:
        table.add_row(f"memory of each of {devices}", f"{decimal(memory.device_peak_bytes)} at the peak")
    elif len(memory.devices) > 1:
        worker = max(stage.worker_bytes for stage in memory.stages)
        table.add_row("of it each worker's", f"{decimal(worker)} at the peak, {len(memory.devices)} workers")
    host = f", {decimal(memory.host_budget_bytes)} on the host" if memory.host_budget_bytes else ""
    table.add_row("budget", f"{decimal(memory.budget_bytes)} on {devices}{host}")
    batches = f"{memory.chunk_experts:,} experts, {memory.token_batch:,} tokens, {memory.row_batch:,} rows"
    table.add_row("batches", batches)
    free = "" if disk.free_bytes is None else f", {decimal(disk.free_bytes)} are free"
    table.add_row("disk", f"{decimal(disk.needed_bytes)}{free}")
    if disk.swept_bytes:
        swept = f"{decimal(disk.swept_bytes)} while it lasts, {decimal(disk.curvature_bytes)} until the run is finished"
        table.add_row("of it the sweep's", swept)
    table.add_row("time", f"{clock_text(plan.time.seconds)} (prediction), bound by {plan.time.bound}")
    return table


def _facts() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def show_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and what is said of it."""
    table = _facts()
    for name, said in facts:
        table.add_row(plain(name), plain(said))
    console.print(table)


def show_warnings(console: Console, warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "yellow"), paragraphs(warning)), soft_wrap=True)


def show_summary(console: Console, summary: Summary) -> None:
    """What a run came to: where it lies, sizes, held-out metrics, time and memory."""
    table = _facts()
    table.add_row("output", plain(summary.out) + (" (partial: a trial, no engine loads it)" if summary.partial else ""))
    methods = ", ".join(f"{count:,} {plain(method)}" for method, count in summary.methods.items())
    table.add_row("projections", f"{summary.projections:,}" + (f" ({methods})" if methods else ""))
    sizes = f"{decimal(summary.bytes_before)} -> {decimal(summary.bytes_after)}"
    if summary.bytes_before:
        sizes += f" ({summary.bytes_after / summary.bytes_before:.1%})"
    table.add_row("size of tensors", sizes)
    for key, (label, form) in METRICS.items():
        if key in summary.metrics:
            table.add_row(label, form.format(summary.metrics[key]))
    resumed = " since it went on" if "restore" in summary.seconds else ""
    table.add_row("time", clock_text(sum(summary.seconds.values())) + resumed)
    planned = memory_text(summary.planned_memory_bytes)
    table.add_row("peak memory", f"{memory_text(summary.peak_memory_bytes)} (planned {planned})")
    if len(summary.workers) > 1:
        busy = (f"{plain(worker['device'])} {1 - worker['waited_seconds'] / worker['of_seconds']:.0%}"
                for worker in summary.workers)  # fmt: skip
        table.add_row("busy", ", ".join(busy) + "; the rest is waiting for the other workers")
    console.print(table)
    for note in summary.notes:
        console.print(f"note: {paragraphs(note)}", soft_wrap=True)


# --- evaluation --------------------------------------------------------------------------------------------------

EVALUATED = {  # key in metrics.json's summary: what it is called, how it is written
    "perplexity_ratio": ("  over the source's", "{:.4f}"),
    "kl_mean": ("KL divergence, mean", "{:.5f}"),
    "kl_median": ("  median", "{:.5f}"),
    "kl_p90": ("  90th percentile", "{:.5f}"),
    "kl_p99": ("  99th percentile", "{:.5f}"),
    "kl_max": ("  largest", "{:.3f}"),
    "top1_agreement": ("same likeliest token", "{:.2%}"),
    "top5_agreement": ("same likeliest five", "{:.2%}"),
}


def show_evaluation(console: Console, found: Mapping[str, Any]) -> None:
    """The table of metrics.json: source, release and, where there is one, the second release."""
    releases = [found, *filter(None, [found.get("against")])]
    names = ["source", "release", *(plain(release["name"]) for release in releases[1:])]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    sure = [_with_interval(release, "perplexity_release", "{:.4f}") for release in releases]
    table.add_row("perplexity", _with_interval(found, "perplexity_source", "{:.4f}"), *sure)
    for key, (label, form) in EVALUATED.items():
        table.add_row(label, "", *(_with_interval(release, key, form) for release in releases))
    last = [release["layers"][-1] for release in releases]
    table.add_row("last hidden states, error", "", *(f"{row['hidden_error']:.4f}" for row in last))
    least = [[row["router_agreement"] for row in release["layers"] if row["router_agreement"]] for release in releases]
    table.add_row("routers agree, least", "", *(f"{min(rows):.2%}" if rows else "" for rows in least))
    if found["drafts"]:
        drafted = [found["drafts"]["source"], found["drafts"]["release"], *(r["drafts"] for r in releases[1:])]
        for rule, label in (("greedy", "drafts kept"), ("sampled", "  sampling")):
            table.add_row(label, *(_kept(one, rule) for one in drafted))
            table.add_row("  tokens a step", *(_length(one, rule) for one in drafted))
    console.print(table)
    protocol = found["protocol"]
    console.print(
        f"{plain(protocol['text'])}: {protocol['windows']} windows of {protocol['window']} tokens, no BOS; "
        "+- half of the 95 % interval over windows",
        style="dim",
        soft_wrap=True,
    )
    show_facts(console, _tasks(found))


def _with_interval(release: Mapping[str, Any], key: str, form: str) -> str:
    text, ends = form.format(release["summary"][key]), (release["intervals"] or {}).get(key)
    return f"{text} +-{form.format((ends[1] - ends[0]) / 2)}" if ends else text


def _kept(drafted: Mapping[str, Any] | None, rule: str) -> str:
    return " ".join(f"{share:.3f}" for share in drafted[rule]["by_position"]) if drafted else "no draft head"


def _length(drafted: Mapping[str, Any] | None, rule: str) -> str:
    return f"{drafted[rule]['mean_length']:.2f}" if drafted else ""


def _tasks(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for task, row in (found.get("tasks") or {}).get("tasks", {}).items():
        figures = ", ".join(f"{name} {value:.4f}" for name, value in row["figures"].items() if isinstance(value, float))
        yield task, f"{figures} ({row['samples']} samples)"


# --- verdict -----------------------------------------------------------------------------------------------------

STATUS_STYLES = {"pass": "green", "fail": "bold red", "not run": "yellow"}


def show_verdict(console: Console, verdict: Verdict) -> None:
    """A row for each check: level, name, what came of it, what was seen; then what an engine is, and the verdict."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("level", "check", "", "seen"):
        table.add_column(name, no_wrap=name != "seen")
    before = ""
    for check in verdict.checks:
        status = Text(check.status, style=STATUS_STYLES[check.status])
        level, before = check.level if check.level != before else "", check.level
        table.add_row(level, plain(check.name), status, paragraphs(check.evidence))
    console.print(table)
    if verdict.engine:
        _show_engine(console, verdict.engine)
    failed = sum(check.status == "fail" for check in verdict.checks)
    if verdict.passed:
        asked = ", ".join(verdict.asked)
        console.print(f"all checks passed: {asked} ({clock_text(sum(verdict.seconds.values()))})", style="green")
    else:
        console.print(f"{failed} of {len(verdict.checks)} checks failed", style="bold red")


def _show_engine(console: Console, engine: Mapping[str, Any]) -> None:
    speed = f"{engine['decode_tokens_per_second']:,.0f} tokens/s"
    if engine["decode_tokens_per_second_mtp"]:
        speed += f", with MTP {engine['decode_tokens_per_second_mtp']:,.0f}"
    facts = [
        ("engine", f"{engine['engine']}, torch {engine['torch']}, {engine['device']}"),
        ("kernels", "; ".join(line.removeprefix("Using ").rstrip(".") for line in engine["kernels"])),
        ("start", f"{engine['start_seconds']:.1f} s, of which weights {engine['load_seconds']:.1f} s"),
        ("KV cache", f"{engine['kv_cache_tokens']:,} tokens"),
        ("decoding", speed),
    ]
    show_facts(console, facts)


# --- checkpoints of any maker ------------------------------------------------------------------------------------


def show_inspection(console: Console, found: Inspection) -> None:
    """Groups of tensors, how int4 is stored, the draft head, engines, traps."""
    made_by = f", made by {plain(found.made_by)}" if found.made_by else ""
    title = f"{plain(found.folder)}: {plain(found.model_type)}, {found.tensors:,} tensors in {found.shards:,} shards"
    console.print(Text(title + made_by, style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_footer=True)
    table.add_column("tensors", footer="all")
    table.add_column("stored as")
    table.add_column("count", justify="right", footer=f"{found.tensors:,}")
    table.add_column("size", justify="right", footer=decimal(found.size_bytes))
    for row in found.groups:
        table.add_row(row.group, plain(" + ".join(row.stored)), f"{row.tensors:,}", decimal(row.size_bytes))
    console.print(table)
    show_facts(console, _stored_facts(found))
    for engine in found.engines:
        said, style = ("takes it", "green") if engine.takes else ("does not take it", "bold red")
        gpus = f" on {engine.gpus} or more" if engine.gpus else ""
        console.print(Text.assemble((engine.engine, "bold"), ": ", (said, style), gpus), soft_wrap=True)
        for line in filter(None, (engine.command, *engine.notes)):
            console.print(f"  {paragraphs(line)}", soft_wrap=True)
    if found.unknown:
        console.print(f"engines: not known ({paragraphs(found.unknown)})", soft_wrap=True)
    for trap in found.traps:
        console.print(Text.assemble(("trap: ", "yellow"), paragraphs(trap)), soft_wrap=True)


def _stored_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    if one := found.quantized:
        where = ", ".join(f"{count:,} in {group}" for group, count in one.by_group.items())
        yield "int4", f"{one.method}, format {one.format}: {one.projections:,} projections ({where})"
        sizes, dtypes = ", ".join(map(str, one.group_sizes)), ", ".join(one.scale_dtypes)
        seen = f"in {one.looked_at:,} projections looked at {one.negative:.0%} are negative, {one.rounded:.0%} no BF16"
        yield "scales", f"one for {sizes} inputs, {dtypes}; {seen}"
    else:
        yield "int4", "nothing that is read as such"
    yield "draft head (MTP)", f"{found.draft}, {decimal(found.draft_bytes)}" if found.draft else "none"


def show_converted(console: Console, found: Converted) -> None:
    """What a conversion came to."""
    scales = found.scales
    share = f"{scales.changed:,} of {scales.total:,} rounded to BF16 values"
    if scales.changed:
        share += f", by {scales.largest:.2%} at most" + (f"; {scales.zero:,} were zero" if scales.zero else "")
    facts = [
        ("output", f"{found.new}: {found.before} -> {found.after}, {found.projections:,} projections, same codes"),
        ("scales", share),
        ("draft experts", f"{found.split} stacks split into a tensor per expert" if found.split else "as they were"),
        ("size of tensors", f"{decimal(found.bytes_before)} -> {decimal(found.bytes_after)}"),
        ("time", clock_text(found.seconds)),
    ]
    if found.left_out:
        facts.append(("left out", f"{', '.join(found.left_out)}: true of the bytes before, or not known"))
    show_facts(console, facts)


NAMES_SHOWN = 8


def show_comparison(console: Console, found: Comparison) -> None:
    """What is the same, what is not, metrics side by side."""
    scales = found.scales
    facts = [
        ("A", f"{found.first}: {found.formats[0] or 'not int4'}"),
        ("B", f"{found.second}: {found.formats[1] or 'not int4'}"),
        ("other tensors", f"{found.equal:,} equal, {len(found.different):,} different"),
        ("int4 projections", f"{found.projections:,}, {found.projections_changed:,} with other codes"),
        ("codes changed", f"{found.codes_changed:,} of {found.codes:,}"),
        ("scales changed", f"{scales.changed:,} of {scales.total:,}, by {scales.largest:.2%} at most"),
    ]
    for label, names in (("different", found.different), ("only A", found.only_first), ("only B", found.only_second)):
        if names:
            more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
            facts.append((label, ", ".join(names[:NAMES_SHOWN]) + more))
    show_facts(console, facts)
    if found.metrics:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("measured", "A", "B"):
            table.add_column(name, justify="left" if name == "measured" else "right")
        for name, pair in found.metrics.items():
            table.add_row(plain(name), *("" if value is None else f"{value:.6g}" for value in pair))
        console.print(table)
        if found.same_protocol is False:
            console.print("measured by different protocols: these figures cannot be compared", style="yellow")
    said, style = ("every weight is the same", "green") if found.same else ("not the same", "bold")
    console.print(said, style=style)


def show_published(console: Console, found: Published, dry_run: bool) -> None:
    """Every file in a dry run; where it lies now."""
    if dry_run:
        for file in found.files:  # a line each however narrow the terminal: for grep, and beside sha256sum
            console.print(f"{file.sha256}  {file.size_bytes:>15,}  {plain(file.name)}", soft_wrap=True)
    total = sum(file.size_bytes for file in found.files)
    what = "would be sent to" if dry_run else "are at"
    where = found.url or f"{found.repo}, branch {found.branch}"
    console.print(f"{len(found.files):,} files, {decimal(total)}, {what} {plain(where)}", soft_wrap=True)
    if found.tag:
        console.print(f"tag {plain(found.tag)}", soft_wrap=True)
    for problem in found.unverified:
        console.print(Text.assemble(("not verified: ", "yellow"), plain(problem)), soft_wrap=True)


# --- serving -----------------------------------------------------------------------------------------------------

BAR_WIDTH = 40
MILLISECONDS = ("time_to_first_token", "time_per_output_token", "time_between_chunks")


def show_command(console: Console, command: Command) -> None:
    """What a server's command will come to: its cache, problems, notes."""
    console.print(Text(f"{command.engine.title} {'.'.join(map(str, command.version))}: {plain(command.name)}", "bold"))
    for line in command.forecast.lines():
        console.print(plain(line), soft_wrap=True)
    for problem in command.problems:
        console.print(Text.assemble(("problem: ", "bold red"), paragraphs(problem)), soft_wrap=True)
    for note in command.notes:
        console.print(f"note: {paragraphs(note)}", soft_wrap=True)


def show_ready(console: Console, command: Command, seconds: float, probed: Probed) -> None:
    """That a server is ready, what its probe found, its cache beside the forecast."""
    ready = f"ready after {clock_text(seconds)}: {plain(command.url)}/v1, model {plain(command.name)}"
    console.print(ready, style="green", soft_wrap=True)
    table = _facts()
    table.add_column()
    for finding in probed.findings:
        said, style = {True: ("alive", "green"), False: ("NOT ALIVE", "bold red"), None: ("not seen", "yellow")}[
            finding.alive
        ]
        table.add_row(plain(finding.what), Text(said, style), paragraphs(finding.seen))
    console.print(table)
    if probed.pool:
        told = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in probed.pool.items())
        console.print(f"KV cache: {told}; predicted: {command.forecast.brief()}", soft_wrap=True)
    console.print("Ctrl-C stops it", style="dim")


def show_bench(console: Console, found: Mapping[str, Any]) -> None:
    """A column for each concurrency, the reference's figures beside them where it is that model; then a drawing."""
    levels, card = found["levels"], found["card"] or {}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("concurrency", no_wrap=True)
    for level in levels:
        table.add_column(str(level["concurrency"]), justify="right")
    table.add_column(f"card: {plain(card['engine'])}" if card else "")
    for label, cells, beside in _bench_rows(levels, card):
        table.add_row(label, *cells, beside)
    console.print(table)
    _draw(console, [(level["concurrency"], level["output_tokens_per_second"]) for level in levels])
    facts = [("model", f"{found['model']} at {found['url']}"), ("metrics", f"{found['engine']}: {found['metrics']}")]
    if found["pool"]:
        facts.append(("KV cache", ", ".join(f"{name} {value:,}" for name, value in found["pool"].items())))
    show_facts(console, facts)
    for level in levels:
        for outcome, count in level["requests"]["failed"].items():
            said = level["requests"]["said"].get(outcome, "")
            text = f"concurrency {level['concurrency']}: {count} x {plain(outcome)} {paragraphs(said)}"
            console.print(text, style="red", soft_wrap=True)


def _bench_rows(levels: list[Any], card: Mapping[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    def between(key: str, form: str) -> str:
        return "-".join(form.format(value) for value in card[key]) if key in card else ""

    yield "requests, in full", [f"{one['requests']['ok']}/{one['requests']['asked']}" for one in levels], ""
    yield "tokens/s, all", [f"{one['output_tokens_per_second']:,.1f}" for one in levels], ""
    decode = [one["decode_tokens_per_second"] for one in levels]
    beside = between("decode_tokens_per_second", "{:.0f}")
    yield "tokens/s of a request, p50", [f"{one['p50']:,.1f}" if one else "" for one in decode], beside
    for key in MILLISECONDS:
        cells = [f"{one[key]['p50'] * 1000:,.1f} / {one[key]['p99'] * 1000:,.1f}" if one[key] else "" for one in levels]
        yield f"{key.replace('_', ' ')}, ms p50/p99", cells, ""
    accepted = [one["acceptance"] for one in levels]
    if any(accepted):
        rates = [f"{a['rate']:.1%}" if a else "" for a in accepted]
        yield "drafts accepted", rates, between("acceptance_rate", "{:.0%}")
        places = [" ".join(f"{share:.2f}" for share in a["by_position"]) if a else "" for a in accepted]
        yield "  by position", places, " ".join(f"{share:.2f}" for share in card.get("acceptance_by_position", ()))
        lengths = [f"{a['mean_length']:.2f}" if a else "" for a in accepted]
        yield "  tokens a step", lengths, between("acceptance_length", "{:.1f}")
    for key, label, form in (
        ("cache_usage_peak", "KV cache used, most", "{:.1%}"),
        ("preemptions", "preemptions", "{:,}"),
        ("prefix_hit_rate", "prefix cache hits", "{:.1%}"),
    ):
        if any(key in one["server"] for one in levels):
            yield label, [form.format(one["server"][key]) if key in one["server"] else "" for one in levels], ""


def _draw(console: Console, points: list[tuple[int, float]]) -> None:
    """Throughput against concurrency."""
    most = max((rate for _, rate in points), default=0)
    for concurrency, rate in points:
        bar = "█" * round(BAR_WIDTH * rate / most) if most else ""
        console.print(f"{concurrency:>5} {bar} {rate:,.1f} tokens/s")
