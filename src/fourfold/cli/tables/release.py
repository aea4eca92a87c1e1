"""Tables of the commands that work with finished releases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from fourfold.cli.console import grid, paragraphs, plain, say, show_facts, show_table, warn
from fourfold.formats import EXPORTS
from fourfold.units import FIGURES, clock_text, figure_text, projections_text

if TYPE_CHECKING:
    from fourfold.records.release import Export
    from fourfold.release.compare import Comparison
    from fourfold.release.convert import Converted
    from fourfold.release.export import Exported
    from fourfold.release.inspect import Inspection
    from fourfold.release.publish import Published


def show_inspection(console: Console, found: Inspection) -> None:
    """Groups of tensors, format of int4, draft head, engines, known issues."""
    made_by = f", made by {plain(found.made_by)}" if found.made_by else ""
    title = f"{plain(found.folder)}: {plain(found.model_type)}, {found.tensors:,} tensors in {found.shards:,} shards"
    say(console, Text(title + made_by, style="bold"))
    table = grid("tensors", "format", "count", "size", right=2)
    for row in found.groups:
        table.add_row(row.group, plain(" + ".join(row.stored)), f"{row.tensors:,}", decimal(row.size_bytes))
    table.add_row("all", "", f"{found.tensors:,}", decimal(found.size_bytes))
    show_table(console, table)
    show_facts(console, _stored_facts(found))
    for engine in found.engines:
        said, style = ("loads it", "green") if engine.takes else ("does not load it", "bold red")
        gpus = f" on {engine.gpus} or more" if engine.gpus else ""
        say(console, Text.assemble((engine.engine, "bold"), ": ", (said, style), gpus))
        if engine.command:  # a line however long, to be copied
            console.print(f"  {paragraphs(engine.command)}", soft_wrap=True)
        for note in engine.notes:
            say(console, f"  {paragraphs(note)}")
    if found.unknown:
        say(console, f"engines: not known ({paragraphs(found.unknown)})")
    for trap in found.traps:
        warn(console, "known issue", trap)


def _stored_facts(found: Inspection) -> Iterator[tuple[str, str]]:
    if one := found.quantized:
        for width, by_group in one.by_width.items():
            where = ", ".join(f"{count:,} in {group}" for group, count in by_group.items())
            yield width, f"{one.method}, format {one.format}: {sum(by_group.values()):,} projections ({where})"
        sizes, dtypes = ", ".join(map(str, one.group_sizes)), ", ".join(one.scale_dtypes)
        seen = f"in {one.looked_at:,} projections looked at {one.negative:.0%} are negative, {one.rounded:.0%} no BF16"
        yield "scales", f"one for {sizes} inputs, {dtypes}; {seen}"
    else:
        yield "int4, int8", "nothing that is read as such"
    yield "draft head (MTP)", f"{found.draft}, {decimal(found.draft_bytes)}" if found.draft else "none"


def show_converted(console: Console, found: Converted) -> None:
    """Show the result of a conversion between formats of engines on GPUs."""
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


def show_exported(console: Console, found: Exported) -> None:
    """Show the result of an export to GGUF or MLX, its notes, and the next command."""
    facts = [
        ("output", f"{found.new}: {found.before} -> {found.after}, {projections_text(found.projections, found.int8)}"),
        ("exact", f"codes and scales{', and every other tensor' if found.is_exact else ''}"),
        ("size", f"{decimal(found.bytes_before)} of tensors -> {decimal(found.bytes_after)} of files"),
        ("time", clock_text(found.seconds)),
        *(("note", note) for note in found.notes),
        ("next", f"fourfold verify {found.new} --source {found.out} --engine {EXPORTS[found.after]}"),
    ]
    show_facts(console, facts)


def show_export(console: Console, folder: str, record: Export) -> None:
    """Show a GGUF or MLX folder. record: its conversion.json."""
    engine, files = EXPORTS[record.after], record.files
    scales = f"one scale for {record.group_size} inputs, as in the release"
    facts = [
        (plain(folder), f"{record.after}, from {record.before}; made by fourfold {record.fourfold}"),
        ("quantized", f"{projections_text(record.projections, record.int8)}, {scales}"),
        ("size", f"{decimal(record.bytes_after)} in {len(files):,} files"),
    ]
    if record.settings:
        exact = "as they are" if record.rest == "bf16" else f"rounded to {record.rest}: not exact"
        facts.append(("other matrices", exact))
        facts.append(("draft head (MTP)", "the block after the last" if record.has_drafts else "none"))
    facts.append((engine, f"loads it: fourfold serve {plain(folder)} --print"))
    facts.append(("others", "do not load it: vLLM, SGLang and transformers load the release"))
    show_facts(console, facts)


NAMES_SHOWN = 8


def show_comparison(console: Console, found: Comparison) -> None:
    """Show equal and different tensors, codes and scales; metrics side by side."""
    scales, errors = found.scales, found.errors
    facts = [
        ("A", f"{found.first}: {found.formats[0] or 'not quantized'}"),
        ("B", f"{found.second}: {found.formats[1] or 'not quantized'}"),
        ("other tensors", f"{found.equal:,} equal, {len(found.different):,} different"),
    ]
    if found.projections:
        facts += [
            (
                "quantized in both",
                f"{projections_text(found.projections, found.int8)}, {found.projections_changed:,} with other codes",
            ),
            ("codes changed" if scales.total else "weights changed", f"{found.codes_changed:,} of {found.codes:,}"),
        ]
    if scales.total:  # of GGUF and MLX dequantized weights are compared, codes and scales together
        changed = f"{scales.changed:,} of {scales.total:,}, by {scales.largest:.2%} at most"
        facts.append(("scales changed", changed))
    if errors.projections:
        facts += [
            ("quantized in one", f"{errors.projections:,} projections"),
            ("weight error", f"mean {errors.mean:.4f}, median {errors.median:.4f}, |W - Wq| / |W|"),
            ("largest", f"{errors.worst:.4f}, {errors.worst_name}"),
        ]
    for label, names in (("different", found.different), ("only A", found.only_first), ("only B", found.only_second)):
        if names:
            more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
            facts.append((label, ", ".join(names[:NAMES_SHOWN]) + more))
    show_facts(console, facts)
    if found.metrics:
        table = grid("measured", "A", "B", right=1)
        for name in filter(found.metrics.__contains__, FIGURES):
            table.add_row(FIGURES[name][0], *map(partial(_figure, name), found.metrics[name], found.intervals[name]))
        show_table(console, table)
        if found.same_protocol is False:
            console.print("measured by different protocols: these figures cannot be compared", style="yellow")
    for fault in found.faults:
        warn(console, "known issue", fault)
    said, style = ("every weight is the same", "green") if found.same else ("not the same", "bold")
    console.print(said, style=style)


def _figure(name: str, value: float | None, ends: Sequence[float] | None) -> str:
    return "" if value is None else figure_text(name, value, ends)


def show_published(console: Console, found: Published, dry_run: bool) -> None:
    """Show where the release is; in a dry run every file."""
    if dry_run:
        for file in found.files:  # a line each however narrow the terminal: for grep, and beside sha256sum
            console.print(f"{file.sha256}  {file.size_bytes:>15,}  {plain(file.name)}", soft_wrap=True)
    total = sum(file.size_bytes for file in found.files)
    what = "would be sent to" if dry_run else "are at"
    where = found.url or f"{found.repo}, branch {found.branch}"
    say(console, f"{len(found.files):,} files, {decimal(total)}, {what} {plain(where)}")
    if found.skipped:
        names = ", ".join(map(plain, found.skipped))
        say(console, f"not sent, as fourfold did not write it: {names} (--include FILE sends one)")
    if found.tag:
        say(console, f"tag {plain(found.tag)}")
    if found.sign:
        say(console, f"signature: model.sig, {'to be made' if dry_run else 'made'} with {plain(found.sign)}")
    for problem in found.unverified:
        warn(console, "not verified", problem)
