"""The figures of README.md and docs/, and the plots (plots.py), written from benchmarks/results/*.json.

    python docs/figures.py            # rewrite everything between markers
    python docs/figures.py --check    # exit code 1, and what differs, if a page is not what the results say

In a page, `<!-- figures: NAME ARGUMENTS -->...<!-- end -->` encloses what the function NAME of this file returns: a
table on lines of its own, or words within a line. After a benchmark has run again, `make figures` does the rest.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from plots import PICTURES
from results import (
    KLD,
    MEDIAN,
    METHODS,
    PEER,
    REAL,
    ROOT,
    SIZES,
    TOKENS,
    commands,
    cpu_minutes,
    curves,
    fallback,
    find,
    gigabytes,
    kld,
    label,
    mean,
    measured,
    methods,
    options,
    percent,
    predicted,
    ratio,
    result,
    sizes,
    table,
    tested_on,
)

from fourfold.model.family import FAMILIES
from fourfold.model.internals import class_names
from fourfold.serve.engines import ENGINES, KERNEL_ISSUES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"<!-- figures: (?P<call>[^>]+?) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
# README's results have columns for each of these, and a row for each method of results.py.
# Result of benchmarks/quality.py: title.
MODELS = {"quality_peers": "example model", "quality_real": "model with outliers of a real LLM"}
PEERS = {"quality_peers": "prose", "quality_peers_chat": "chat"}  # result of `make bench-peers`: text
ROUTING = (  # result with guidance.routing, result of `guided` without, title
    ("quality_routing", "quality_routing", "example, prose"),
    ("quality_routing_chat", "quality_routing_chat", "example, chat"),
    ("quality_routing_deep", "quality_routing_deep", "16 layers, prose"),
    ("quality_routing_deep_chat", "quality_routing_deep_chat", "16 layers, chat"),
    ("quality_routing_real", "quality_real", "outliers of a real LLM, prose, one seed"),
)
GPUS = {"4x3060": "RTX 3060", "h200": "H200", "8xa100": "A100"}
FIGURES: dict[str, Callable[..., str]] = {}


def figure(function: Callable[..., str]) -> Callable[..., str]:
    """Make a function callable from a marker, by its name with dashes."""
    FIGURES[function.__name__.replace("_", "-")] = function
    return function


# --- words within a line -----------------------------------------------------------------------------------------


def tokens_shown(name: str) -> int:
    """Of calibration, of all sizes that a file has."""
    return TOKENS if TOKENS in sizes(name) else sizes(name)[-1]


@figure
def about(name: str) -> str:
    """What the figures of a file hold for, the file, the machine and the day."""
    where = f"`benchmarks/results/{name}.json`, {tested_on(name)}, {result(name)['date']}"
    return "; ".join([*conditions(name), where])


def conditions(name: str) -> Iterator[str]:
    found = result(name)
    if "means" in found:
        model, tokens = found["model"], tokens_shown(name)
        row = mean(name, methods(name)[0], tokens)
        yield f"{model['layers']} layers, {model['experts']} experts"
        yield f"{tokens:,} calibration tokens, {row['positions']:,.0f} held-out predictions"
        seeds = max(len(row["seeds"]) for row in found["means"])
        yield f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    if "tools" in found:
        flags = options(name)
        yield f"width 2048 -> 512, {flags['--experts']} experts, top {flags['--topk']}"
        yield f"{int(flags['--tokens']):,} tokens, one thread, median of {flags['--rounds']} rounds"
    if "steps" in found or "products" in found:
        flags = found["options"]
        yield f"width {flags['hidden']} -> {flags['width']}, {flags['experts']} experts, top {flags['topk']}"
        yield f"{flags['tokens']:,} tokens, {flags['threads']} thread{'s' * (flags['threads'] > 1)}"


@figure
def share(method: str, other: str) -> str:
    """Mean KLD of one method over that of another; dashes in a name stand for blanks."""
    return f"{ratio('quality', method.replace('-', ' '), other, KLD):.2f}"


@figure
def prediction(machine: str, workers: str, key: str) -> str:
    """Of the plan for Qwen3.6-35B-A3B with `best`."""
    row = predicted(machine, workers)
    if key.endswith("_seconds") or key == "seconds":
        return f"{row[key] / 60:.1f} minutes"
    return gigabytes(row[key]) if key.endswith("_bytes") else str(row[key])


@figure
def example_seconds() -> str:
    return f"{result('example')['runs'][0]['seconds']:.0f} s"


@figure
def load() -> str:
    """Of benchmarks/load.py: how often verify --load was right."""
    found, rows = result("load"), []
    kinds = {"sound": "sound, with MTP and without", "faulty": "one token wrong in 1 of 50 expert passes"}
    for name, what in kinds.items():
        one = found[name]
        verdicts = f"{one['passed']} passed" if name == "sound" else f"{one['runs'] - one['passed']} failed"
        least, most = one["faults"]
        faults = "none" if not most else f"{least} to {most}"
        rows.append(
            [what, f"{one['runs']}", f"{one['tokens']:,}", faults, verdicts, f"{one['largest_regret']:.3f}",
             f"{one['mean']:.4f}, {one['most']:.3f}"]
        )  # fmt: skip
    header = ["vLLM on a CPU, example model", "runs", "tokens under load", "faults in a run", "verdict",
              "largest regret, nats", "log-probabilities from those alone: mean, most"]  # fmt: skip
    about = f"{found['at_once']} at once; `benchmarks/results/load.json`, {tested_on('load')}, {found['date']}."
    return "\n".join([table(header, rows), "", about])


FAULTS = {  # of tests/faults.py
    "kill": "`kill -9`",
    "term": "SIGTERM",
    "memory": "out of memory: the next tensor's memory is not to be had",
    "clock": "clock jumps by ten years, forwards or backwards",
    "full": "disk full (ENOSPC) at a write",
    "fail": "I/O error (EIO) at a read, write, sync or rename",
    "short": "a write is cut short, the process lives",
    "torn": "a write is cut short, then `kill -9`",
    "lost": "a file is half as long after a crash",
}
FATES = {"unharmed": "run went on", "resumed": "resumed", "refused": "refused", "failed": "not survived"}


@figure
def faults() -> str:
    """Of benchmarks/faults.py: what came of each kind, in all suites together."""
    suites, rows = result("faults")["suites"], []
    for kind, title in FAULTS.items():
        counts = [sum(one["kinds"].get(kind, {}).get(key, 0) for one in suites.values()) for key in ("tried", *FATES)]
        rows.append([title, *(f"{count}" for count in counts)])
    return table(["fault", "tried", *FATES.values()], rows)


@figure
def faults_tried() -> str:
    """How many, by suite, and how many were survived."""
    said = []
    for title, one in result("faults")["suites"].items():
        tried, failed = (sum(kind.get(key, 0) for kind in one["kinds"].values()) for key in ("tried", "failed"))
        places = f"{one['stages']} stages, {one['files']} files, every {one['every']}th fault"
        said.append(f"{title}: {tried} faults tried, {tried - failed} survived ({places})")
    return f"{'; '.join(said)}. `benchmarks/results/faults.json`, {tested_on('faults')}, {result('faults')['date']}."


@figure
def reading() -> str:
    """Of benchmarks/reading.py: how fast weights are read and hashed by threads."""
    found = result("reading")
    rows = [
        [one["kind"], f"{one['threads']}", f"{one['read']:.2f}", f"{one['hashed']:.2f}", f"{one['ratio']:.2f}"]
        for one in found["runs"]
    ]
    header = ["tensors", "threads", "read, hashed, checked: GB/s", "hashed in memory: GB/s", "ratio"]
    cores = found["machine"]["cores"]
    about = f"Files in the page cache; `benchmarks/results/reading.json`, {cores} cores, {found['date']}."
    return "\n".join([table(header, rows), "", about])


@figure
def servers() -> str:
    """Of benchmarks/servers.py: what two servers answered to the suite."""
    found, rows = result("servers"), []
    for name, task in found["tasks"]["tasks"].items():
        sides = [next(iter(task[key].values())) for key in ("figures", "source_figures")]
        usages = [task[key] for key in ("usage", "source_usage")]
        paired = next(iter(task["paired"].values()))
        each = [
            " / ".join(f"{one[key]:,.0f}" for one in usages)
            for key in ("output_tokens", "thought_tokens", "cut_offs", "loops")
        ]
        flips = f"{paired['lost']} / {paired['gained']}"
        rows.append([name, f"{task['samples']}", " / ".join(f"{side:.1%}" for side in sides), *each, flips])
    header = ["release / source", "questions", "right", "tokens of an answer", "of thought", "cut off", "loops",
              "lost / gained"]  # fmt: skip
    kl = found["tasks"]["kl"]
    about = (
        f"KL: at least {kl['kl_mean'] * 1e3:.2f} x 10^-3 nats (95 %: {kl['interval'][0] * 1e3:.2f} to "
        f"{kl['interval'][1] * 1e3:.2f}) from the {kl['k']} most likely tokens, which hold {kl['covered']:.0%} of the "
        f"probability; over the whole vocabulary `quantize` has {found['kl_whole'] * 1e3:.2f}. Top-1 agreement "
        f"{kl['top1_agreement']:.1%}. Context {found['context']:,}; `benchmarks/results/servers.json`, {found['date']}."
    )
    return "\n".join([table(header, rows), "", about])


@figure
def depths() -> str:
    """Of benchmarks/servers.py: acceptance and speed by draft tokens and concurrency."""
    found = result("servers")
    levels = {(one["drafts"], one["concurrency"]): one for one in found["levels"]}
    header = ["drafts", "accepted", "tokens a step"]
    concurrencies = sorted({concurrency for _, concurrency in levels})
    rows = []
    for drafts in sorted({drafts for drafts, _ in levels}):
        row = [levels[drafts, concurrency] for concurrency in concurrencies]
        accepted = [one["acceptance"] for one in row if one["acceptance"]]
        spans = [
            [form.format(pick([one[key] for one in accepted])) for pick in (min, max)] if accepted else ["-", "-"]
            for key, form in (("rate", "{:.0%}"), ("mean_length", "{:.2f}"))
        ]
        rows.append([
            f"{drafts}", *(" to ".join(dict.fromkeys(span)) for span in spans),
            *(f"{one['output_tokens_per_second']:,.0f}" for one in row),
        ])  # fmt: skip
    best = ", ".join(f"{drafts} at {concurrency}" for concurrency, drafts in found["fastest"].items())
    header += [f"tokens/s at {concurrency}" for concurrency in concurrencies]
    about = f"Fastest: {best}. On a busy CPU; a GPU differs. `benchmarks/results/servers.json`, {found['date']}."
    return "\n".join([table(header, rows), "", about])


@figure
def kernel_issues() -> str:
    rows = [[issue.kind, ENGINES[issue.engine].title, issue.seen, issue.fix, f"{issue.source}, {issue.date}"]
            for issue in KERNEL_ISSUES]  # fmt: skip
    return table(["GPU", "engine", "seen", "fix", "source"], rows)


# --- README.md -------------------------------------------------------------------------------------------------------


@figure
def readme() -> str:
    """Quality by model and method, and the cost of one layer; what it holds for."""
    header = [""]
    for title in MODELS.values():
        header += [f"{title}: mean KLD (x 10^-3 nats)", "top-1 agreement"]
    rows = []
    for method in METHODS:
        found, cells = [find(name, method, tokens_shown(name)) for name in MODELS], [label(method)]
        if not any(found):
            continue
        for row in found:
            cells += [kld(row["kl_mean"]), percent(row["top1_agreement"])] if row else ["", ""]
        tool = result("speed")["tools"].get(method)
        cells += [f"{tool['cpu_seconds']:.1f}", gigabytes(tool["peak_bytes"], 2)] if tool else ["", ""]
        rows.append(cells)
    shown = table([*header, "CPU seconds, one layer", "peak memory, one layer"], rows)
    notes = [f"{title[0].upper()}{title[1:]}: {about(name)}." for name, title in MODELS.items()]
    return "\n".join([shown, "", *notes, f"One layer: {about('speed')}."])


@figure
def families() -> str:
    """All of them, with what is known of each."""
    rows = []
    for family in sorted(FAMILIES.values(), key=lambda family: family.title):
        model_class = next(class_names({"model_type": family.model_type}))
        engines = ", ".join(family.proven) or "no engine"
        notes = [f"not in {engine}: {why}" for engine, why in family.refuse.items()]
        notes += ["draft acceptance is measured"] if family.mtp_prefix else []
        rows.append([family.title, f"`{family.model_type}`", f"`{model_class}`", engines, "; ".join(notes)])
    return table(["checkpoints", "`model_type`", "class in transformers", "tests ran releases in", "notes"], rows)


@figure
def count_of_families() -> str:
    return f"{len(FAMILIES)} architectures, from Qwen, DeepSeek, GLM and MiniMax to Gemma, Granite and Mistral."


@figure
def hardware() -> str:
    """Predictions for one model by machine."""
    rows = []
    for sheet, workers in (("4x3060", 1), ("4x3060", 4), ("h200", 1), ("8xa100", 8)):
        row = predicted(sheet, workers)
        cells = [f"{row['seconds'] / 60:.1f}", gigabytes(row["device_peak_bytes"]), gigabytes(row["host_peak_bytes"])]
        rows.append([f"{workers} x {GPUS[sheet]}", *cells])
    return table(["predicted, not yet run", "minutes", "memory, each GPU", "host memory"], rows)


@figure
def predictions() -> str:
    """The same with what the minutes consist of."""
    rows = []
    for row in result("predictions")["predictions"]:
        minutes = [f"{row[key] / 60:.1f}" for key in ("seconds", "exchange_seconds", "read_seconds")]
        memory = [gigabytes(row[key]) for key in ("device_peak_bytes", "host_peak_bytes")]
        rows.append([f"{row['workers']} x {GPUS[row['machine']]}", *minutes, row["bound"], *memory])
    header = ["predicted", "minutes", "of these exchange", "reading", "bound by", "memory, each GPU", "host memory"]
    return table(header, rows)


# --- docs/measured.md ------------------------------------------------------------------------------------------------


@figure
def quality() -> str:
    header = ["", "mean KLD", "of GPTQModel's", "median KLD", "of GPTQModel's", "top-1 agreement", "RTN fallback"]
    header += ["worst projection's output error, over RTN's"]
    rows = []
    for method in ("rtn", PEER, "card", "fast", "best", "guided"):
        row = mean("quality", method)
        shares = [f"{ratio('quality', method, PEER, key):.2f}" for key in (KLD, MEDIAN)]
        cells = [kld(row[KLD]), shares[0], kld(row[MEDIAN]), shares[1], percent(row["top1_agreement"]), fallback(row)]
        worst = f"{row['worst_over_rtn']:.2f}" if "worst_over_rtn" in row else ""
        rows.append([label(method), *cells, worst])
    return table(header, rows)


@figure
def peers() -> str:
    """Quality beside other tools, on each held-out text."""
    header = [""]
    for text in PEERS.values():
        header += [f"{text}: mean KLD", "of GPTQModel's", "routing forced", "median", "p99", "top-1 agreement"]
    rows = []
    for method in methods("quality_peers"):
        cells = [label(method)]
        for name in PEERS:
            row = mean(name, method)
            cells += [kld(row["kl_mean"]), f"{ratio(name, method, PEER, 'kl_mean'):.2f}", kld(row[KLD])]
            cells += [kld(row[MEDIAN]), kld(row["kl_p99"], 1), percent(row["top1_agreement"])]
        rows.append([*cells, fallback(row), "" if method == "rtn" else f"{row['cpu_seconds']:.0f}"])
    return table([*header, "RTN fallback", "CPU s"], rows)


@figure
def real() -> str:
    """Quality on the model of benchmarks/real_moe, for each text that was measured, and what the figures hold for."""
    found = [name for name in REAL if measured(name)]
    return "\n\n".join(map(real_text, found)) or "Not measured yet: `make bench-real`."


@figure
def real_tokens() -> str:
    """Mean KLD on prose by method and calibration tokens; seeds as each result has them."""
    found = curves("quality_real")
    counts = sorted({tokens for by_tokens in found.values() for tokens in by_tokens})
    rows = [
        [label(method), *(kld(by_tokens[tokens], 1) if tokens in by_tokens else "" for tokens in counts)]
        for method, by_tokens in found.items()
    ]
    return table(["prose, mean KLD with free routing", *(f"{tokens // 1024}k tokens" for tokens in counts)], rows)


def real_text(name: str) -> str:
    """RTN looks at no token: its KLD stands once for all sizes."""
    counts, rows = sizes(name), []
    last = TOKENS if TOKENS in counts else counts[-1]
    of_sizes, at = " / ".join(f"{tokens // 1024}k" for tokens in counts), f"{last // 1024}k"
    for method in methods(name):
        row = mean(name, method, last)
        values = [kld(mean(name, method, tokens)[KLD], 1) for tokens in counts]
        cells = [values[0] if method == "rtn" else " / ".join(values)]
        for key in (KLD, MEDIAN):
            cells.append(" / ".join(f"{ratio(name, method, PEER, key, tokens):.2f}" for tokens in counts))
        cells += [percent(row[key], 1) for key in ("top1_agreement", "router_agreement")]
        cells += [fallback(row), f"{row['worst_over_rtn']:.2f}" if "worst_over_rtn" in row else ""]
        rows.append([label(method), *cells, "" if method == "rtn" else f"{row['cpu_seconds']:,.0f}"])
    header = [REAL[name], f"mean KLD, {of_sizes} tokens", "of GPTQModel's", "median KLD, of GPTQModel's"]
    header += [f"top-1 agreement, {at}", f"router agreement, {at}", f"RTN fallback, {at}"]
    shown = table([*header, f"worst projection's output error, over RTN's, {at}", f"CPU s, {at}"], rows)
    return f"{shown}\n\nMeasured on {REAL[name]}: {about(name)}."


@figure
def speed() -> str:
    found = result("speed")
    rows = [
        [label(tool), f"{row['cpu_seconds']:.1f}", f"{found['times_fewer'][tool]:.1f}", gigabytes(row["peak_bytes"], 2)]
        for tool, row in found["tools"].items()
    ]
    return table(["", "CPU seconds", "times fewer", "peak memory"], rows)


@figure
def example() -> str:
    rows = []
    for row in result("example")["runs"]:
        found = row["metrics"]
        rows.append([
            f"{row['rows']} x {row['length']}", f"{row['seconds']:.0f}", gigabytes(row["peak_host_bytes"], 2),
            f"{found['perplexity_source']:.2f} -> {found['perplexity_release']:.2f}",
            f"{found['kl_mean']:.5f}", f"{found['kl_p99']:.4f}", percent(found["top1_agreement"]),
            f"{row['bytes_before'] / 1e6:.1f} -> {row['bytes_after'] / 1e6:.1f}",
        ])  # fmt: skip
    header = ["calibration samples x tokens", "seconds", "peak memory", "perplexity, BF16 -> int4"]
    header += ["mean KLD (nats)", "99th percentile", "top-1 agreement", "size (MB), BF16 -> int4"]
    return table(header, rows)


@figure
def layer() -> str:
    rows = []
    for recipe in ("best", "fast"):
        found = result(f"full_layer_{recipe}")
        cells = [f"{found['seconds']:.0f}", f"{found['floor_seconds']:.0f}", gigabytes(found["peak_bytes"]["host"])]
        rows.append([f"`{recipe}`", *cells, found["date"]])
    return table(["", "seconds", "all arithmetic at the GEMM rates (s)", "peak memory", "measured"], rows)


@figure
def widened() -> str:
    titles = {"bf16": "in BF16, as torch has them", "fp32": "in fp32, rounded to BF16"}
    rows = []
    for products, found in result("full_layer_widened")["products"].items():
        steps = [found["steps"][step]["seconds"] for step in ("attention, router", "activations for down", "advance")]
        seconds = [f"{value:.1f}" for value in (found["seconds"], *steps)]
        rows.append([titles[products], *seconds])
    header = ["products", "CPU seconds, layer", "attention, router", "activations for down", "advance"]
    return table(header, rows)


@figure
def remeasure() -> str:
    rows = []
    for name, command in commands().items():
        rows.append([f"`{name}`", f"`{command}`", cpu_minutes(name), result(name[:-5]).get("date", "")])
    return table(["in `benchmarks/results/`", "command", "CPU minutes", "measured"], rows)


@figure
def calibration_tokens() -> str:
    """Mean KLD with free routing by calibration tokens, of the example model."""
    found = curves("quality")
    counts = sorted(found["guided"])
    rows = [[f"`{method}`", *(kld(values[tokens]) if tokens in values else "" for tokens in counts)]
            for method, values in found.items() if method in ("fast", "best", "guided")]  # fmt: skip
    model = result("quality")["model"]
    per_input = [f"{tokens:,} ({tokens * 2 / model['experts'] / 256:g})" for tokens in counts]
    return table(["recipe", *per_input], rows)


@figure
def gguf() -> str:
    """Files for llama.cpp that differ in their experts alone."""
    titles = {
        "BF16": "BF16, not quantized", "best": "fourfold `best`, group size 128",
        "gguf": "fourfold `gguf`, group size 32", "Q4_0": "ggml Q4_0 (RTN)", "Q4_0 imatrix": "ggml Q4_0, imatrix",
        "IQ4_NL imatrix": "ggml IQ4_NL, imatrix", "IQ4_XS imatrix": "ggml IQ4_XS, down IQ4_NL, imatrix",
        "Q4_K imatrix": "ggml Q4_K, down Q5_0, imatrix",
    }  # fmt: skip
    rows = []
    for method, title in titles.items():
        row = mean("gguf", method)
        low, high = row["kl_interval"]
        cells = [f"{row['expert_bits_per_weight']:.2f}", f"{row['file_bytes'] / 1e6:.1f}"]
        cells += [f"{kld(row['kl_mean'])} ({kld(low)} - {kld(high)})"]
        cells += [f"{ratio('gguf', method, 'Q4_0', 'kl_mean'):.2f}", kld(row["kl_median"])]
        cells += [percent(row["top1_agreement"]), f"{row['perplexity_release']:.3f}"]
        rows.append([title, *cells])
    header = ["experts", "bits per expert weight", "file (MB)", "mean KLD (95 % interval)", "of ggml's Q4_0"]
    return table([*header, "median KLD", "top-1 agreement", "perplexity"], rows)


# --- docs/compact.md -------------------------------------------------------------------------------------------------

COMPACT = {"example": "example, 4 layers", "deep": "16 layers"}


@figure
def compact() -> str:
    """`compact` beside `best`, and what BF16 arithmetic alone does, in fp32."""
    titles = {"control": "source, BF16 arithmetic", "best": "`best`", "compact": "`compact`"}
    rows = []
    for model, found in result("compact")["models"].items():
        for name, title in titles.items():
            row = found["figures"][name]
            size = f"{found['bytes'][name] / 1e6:.1f}" if name in found["bytes"] else ""
            of_best = f"{row['kl_median'] / found['figures']['best']['kl_median']:.2f}" if size else ""
            cells = [kld(row["kl_mean"]), kld(row["kl_median"], 3), of_best, kld(row["kl_p99"], 1)]
            rows.append([COMPACT[model], title, *cells, percent(row["top1_agreement"]), size])
    header = ["model", "weights", "mean KLD", "median KLD", "of `best`", "p99 KLD", "top-1 agreement", "tensors (MB)"]
    return table(header, rows)


@figure
def compact_drafts() -> str:
    drafts = result("compact")["models"]["example"]["drafts"]
    share, ends = (drafts["difference"] / drafts["mean_length_bf16"],
                   [end / drafts["mean_length_bf16"] for end in drafts["interval"]])  # fmt: skip
    interval = f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f} %"
    lengths = f"{drafts['mean_length']:.3f} tokens per step, {drafts['mean_length_bf16']:.3f} with the BF16 draft head"
    return f"{lengths} ({100 * share:+.2f} %, 95 % interval {interval}; {drafts['prompts']} prompts)"


@figure
def compact_conditions() -> str:
    found = next(iter(result("compact")["models"].values()))
    text = f"{found['windows']} windows of {found['window']} tokens of wikitext-2, KLD in 10^-3 nats, fp32 arithmetic"
    return f"{text}; `benchmarks/results/compact.json`, {tested_on('compact')}, {result('compact')['date']}"


# --- docs/how-to/images.md -------------------------------------------------------------------------------------------


@figure
def vision_model() -> str:
    found = result("vision_model")
    overlap, other = found["routing_overlap"], found["answer_loss_with_another_image"]
    return (
        f"loss of answers {found['answer_loss']:.3f}, with another image {other:.3f}; overlap of image and "
        f"text routing {min(overlap):.2f} to {max(overlap):.2f}"
    )


@figure
def vision() -> str:
    """KLD on text and images by what was calibrated on: means of the seeds."""
    runs = result("vision")["runs"]
    named = {name: (runs, name, "") for name in dict.fromkeys(run["calibration"] for run in runs)}
    named["RTN"] = runs[:1], runs[0]["calibration"], "rtn "
    rows = []
    for title, (found, name, prefix) in named.items():
        cells = []
        for kind in ("text", "images"):
            own = [run[prefix + kind] for run in found if run["calibration"] == name]
            cells += [f"{1e3 * fmean(one[key] for one in own):.{digits}f}"
                      for key, digits in (("kl_mean", 3), ("kl_median", 5))]  # fmt: skip
            cells.append(percent(fmean(one["top1_agreement"] for one in own)))
        rows.append([title, *cells])
    words = ("mean KLD", "median", "top-1")
    header = ["calibrated on"] + [f"{kind}: {one}" for kind in ("text", "images") for one in words]
    return table(header, rows)


@figure
def vision_gain(kind: str, name: str, other: str) -> str:
    """Median KLD of one calibration over that of another, the smallest and the largest of the seeds."""
    found = result("vision")["runs"]
    runs = {(run["calibration"].replace(" ", "-"), run["seed"]): run[kind]["kl_median"] for run in found}
    ratios = sorted(value / runs[other, seed] for (own, seed), value in runs.items() if own == name)
    low, high = f"{ratios[0]:.2g}", f"{ratios[-1]:.2g}"
    return low if low == high else f"{low} to {high}"


@figure
def vision_conditions() -> str:
    found = result("vision")
    seeds, tokens = len({run["seed"] for run in found["runs"]}), found["calibration_tokens"]
    return (
        f"KLD in 10^-3 nats, mean of {seeds} seeds; {tokens:,} calibration tokens, half of them in the second row, "
        f"{found['heldout_tokens']:,} held-out tokens of each kind; `benchmarks/results/vision.json`"
    )


# --- docs/scale.md ---------------------------------------------------------------------------------------------------


@figure
def checked_predictions() -> str:
    rows = []
    for row in result("predictions")["checks"]:
        digits = 2 if row["measured"] < 10 else 0
        cells = [f"{row[key]:,.{digits}f}" for key in ("predicted", "measured")]
        rows.append([row["what"], row["unit"], *cells, f"{row['ratio']:.2f}", f"`{row['file']}`"])
    return table(["", "unit", "predicted", "measured", "ratio", "measured in"], rows)


@figure
def workers() -> str:
    found, faster = result("workers"), result("workers")["times_faster"]
    rows = [[name, f"{row['wall_seconds']:.1f}", f"{faster[name]:.2f}"] for name, row in found["runs"].items()]
    return table(["", "seconds", "times faster"], rows)


# --- docs/numerics.md ------------------------------------------------------------------------------------------------


@figure
def ingredients() -> str:
    """CPU seconds of each preset by ingredient, the dearest of the last preset first."""
    runs = result("ingredients")["runs"]
    last = runs[-1]["ingredients"]
    rows = [["all", *(f"{run['cpu_seconds']:.0f}" for run in runs)]]
    rows.append(["of these, in the kernel", *(f"{run['system_seconds']:.0f}" for run in runs)])
    for name in sorted(last, key=lambda name: -last[name]["cpu_seconds"]):
        found = [run["ingredients"].get(name) for run in runs]
        rows.append([name, *("" if spent is None else f"{spent['cpu_seconds']:.0f}" for spent in found)])
    return table(["CPU seconds", *(f"`{run['preset']}`" for run in runs)], rows)


@figure
def presets() -> str:
    titles = {
        "rtn": label("rtn"), PEER: label(PEER), "card": "`card`", "fast": "`fast`", "best": "`best`",
        "guided down only": "`guided`, down only", "guided": "`guided`",
    }  # fmt: skip
    rows = []
    for method, title in titles.items():
        row, cells = mean("quality", method), []
        for tokens in SIZES:
            value = mean("quality", method, tokens)[KLD]
            cells.append(f"{kld(value)} / {ratio('quality', method, PEER, KLD, tokens):.2f}")
        low, high = row["kl_interval"]
        cells += [f"{kld(row[MEDIAN], 3)} / {ratio('quality', method, PEER, MEDIAN):.2f}"]
        cells += [f"{kld(row['kl_mean'])} ({kld(low)} - {kld(high)})", kld(row["kl_p99"], 1)]
        cells += [percent(row["top1_agreement"]), f"{row['perplexity_release']:.3f}", fallback(row)]
        rows.append([title, *cells, "" if method == "rtn" else f"{row['cpu_seconds']:.0f}"])
    sizes = [f"KLD, {size}" for size in SIZES.values()]
    header = ["x 10^-3 nats / of GPTQModel's", *sizes, "median, 64k", "free routing, 64k (95 % interval)", "p99"]
    return table([*header, "top-1 agreement", "perplexity", "RTN fallback", "CPU s"], rows)


@figure
def ablation() -> str:
    """KLD without one ingredient, as a change from `best` of the same file."""
    name, rows = "quality_ablation", []
    for method in (method for method in methods(name) if method.startswith("best - ")):
        changes = [ratio(name, method, "best", key, tokens) - 1 for key in (KLD, MEDIAN) for tokens in SIZES]
        name_of = method.removeprefix("best - ").replace("both of these", "effective tokens and trace matching")
        rows.append([name_of, *(f"{100 * change:+.0f} %" for change in changes)])
    header = [f"{what}, {size}" for what in ("mean KLD", "median KLD") for size in SIZES.values()]
    return table(["without", *header], rows)


@figure
def ablation_version() -> str:
    """Whether the ablation is of the quantizer that the other tables are of."""
    same = result("quality_ablation")["code"]["quantize"] == result("quality")["code"]["quantize"]
    return "the same version of the quantizer" if same else "an earlier version of the quantizer"


@figure
def deep() -> str:
    name, rows = "quality_deep", []
    for method in methods(name):
        sizes = [row["tokens"] for row in result(name)["means"] if row["method"] == method]
        cells = [" / ".join(kld(mean(name, method, tokens)[KLD], 3) for tokens in sizes)]
        for key in (KLD, MEDIAN, "kl_mean"):
            cells.append(" / ".join(f"{ratio(name, method, PEER, key, tokens):.2f}" for tokens in sizes))
        rows.append([label(method), *cells, percent(mean(name, method)["top1_agreement"])])
    header = ["KLD (x 10^-3 nats), 16k / 64k tokens", "of GPTQModel's", "median, of GPTQModel's"]
    return table(["16 layers", *header, "free routing, of GPTQModel's", "top-1 agreement, 64k"], rows)


@figure
def guided() -> str:
    rows = []
    for method, title in (("guided", "both sites"), ("guided down only", "down only")):
        pairs = [("best", tokens) for tokens in SIZES] + [(PEER, TOKENS)]
        cells = [" / ".join(f"{ratio('quality', method, other, key, tokens):.2f}" for key in (KLD, MEDIAN))
                 for other, tokens in pairs]  # fmt: skip
        rows.append([title, *cells])
    sizes = [f"{size}, of `best`'s" for size in SIZES.values()]
    return table(["mean / median KLD", *sizes, "64k, of GPTQModel's"], rows)


@figure
def code_alone() -> str:
    rows = []
    for name, text in (("quality", "prose (wikitext-2)"), ("quality_chat", "conversations (GSM8K)")):
        values = [kld(mean(name, method)[KLD]) for method in ("best on code", "guided on code")]
        rows.append([text, *values, f"{ratio(name, 'guided on code', 'best on code', KLD):.2f}"])
    return table(["measured on", "`best`", "`guided`", "ratio"], rows)


@figure
def routing() -> str:
    """`guided` with routing over `guided` without, by model, text and calibration tokens."""
    rows = []
    for name, plain, title in (row for row in ROUTING if measured(row[0])):
        for tokens in sizes(name):
            one = mean(name, "guided with routing", tokens)
            runs = [run for run in result(plain)["runs"] if (run["method"], run["tokens"]) == ("guided", tokens)]
            other = {key: fmean(run[key] for run in runs if run["seed"] in one["seeds"])
                     for key in ("kl_mean", KLD, MEDIAN, "router_agreement")}  # fmt: skip
            cells = [f"{kld(other[key], 3)} -> {kld(one[key], 3)} ({one[key] / other[key] - 1:+.1%})".replace("%", " %")
                     for key in ("kl_mean", KLD, MEDIAN)]  # fmt: skip
            changed = [percent(1 - row["router_agreement"]) for row in (other, one)]
            rows.append([f"{title}, {tokens // 1024}k", *cells, " -> ".join(changed)])
    header = ["mean KLD, free routing", "mean KLD, routing forced", "median KLD, free routing"]
    return table(["x 10^-3 nats, calibration tokens", *header, "choices of experts that changed"], rows)


# --- pages -----------------------------------------------------------------------------------------------------------


def rewritten(text: str, page: str) -> str:
    """A page with what the results say between its markers. Raises SystemExit for a marker that is wrong."""

    def replace(match: re.Match[str]) -> str:
        name, *arguments = match["call"].split()
        if name not in FIGURES:
            raise SystemExit(f"{page}: figures: got {name!r}, expected one of {', '.join(FIGURES)}")
        value, block = FIGURES[name](*arguments), match["text"].startswith("\n")
        before = text[: match.start()].rpartition("\n")[2]
        if not block and not before.strip(" -*"):
            raise SystemExit(f"{page}: figures: {match['call']!r} begins a line, which makes it HTML. Move it inside")
        value = f"\n{value}\n" if block else value
        return f"<!-- figures: {match['call']} -->{value}<!-- end -->"

    found, count = MARKED.subn(replace, text)
    if not count == text.count("<!-- figures:") == text.count("<!-- end -->"):
        raise SystemExit(f"{page}: figures: got a marker without its pair; <!-- figures: NAME --> ends at <!-- end -->")
    return found


def written() -> Iterator[tuple[Path, str, str]]:
    """Pages and plots: their path, what is there, and what the results say."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield page, text, rewritten(text, str(page.relative_to(ROOT)))
    for path, draw in PICTURES.items():
        yield path, path.read_text(encoding="utf-8") if path.is_file() else "", draw()


def main() -> None:
    check, differ = "--check" in sys.argv[1:], False
    for page, text, found in written():
        name = str(page.relative_to(ROOT))
        if found != text and check:
            differ = True
            lines = (text.splitlines(), found.splitlines())
            shown = difflib.unified_diff(*lines, name, "benchmarks/results", n=0, lineterm="")
            print(f"{name}: drawn from other results" if page in PICTURES else "\n".join(shown))
        elif found != text:
            page.write_text(found, encoding="utf-8")
            print(f"{name}: written")
    if differ:
        sys.exit("figures differ from benchmarks/results. Run `make figures`")


if __name__ == "__main__":
    main()
