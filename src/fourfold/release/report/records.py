"""What earlier stages left in a release: read and checked, nothing measured. A file that is not there is None."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.bundled import HELDOUT_TEXTS
from fourfold.datatypes import FourfoldError, ProjectionStatistics, TensorHeader
from fourfold.model.checkpoint import TensorIndex
from fourfold.model.family import kept_group
from fourfold.quantize.journal import LOG, METRICS
from fourfold.recipe import Heldout
from fourfold.records.log import read_log
from fourfold.records.release import State
from fourfold.records.results import Bench, Metrics, Verdict
from fourfold.release.contents import BENCH, VERDICT
from fourfold.release.verify.folder import Release, open_release
from fourfold.serve.served import sampling

EXPERTS = "routed experts"


@dataclass(frozen=True)
class Group:
    """Tensors of one kind: what was done with them and why, how many there are now and their bytes."""

    name: str
    quantized: bool
    reason: str
    tensors: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Records:
    """release: fourfold.json, config.json, recipe.toml; verdict: of these very bytes, else None and `stale`.

    missing: (what was not measured, the command that does it).
    """

    release: Release
    headers: Mapping[str, TensorHeader]
    projections: tuple[ProjectionStatistics, ...]
    metrics: Metrics | None
    verdict: Verdict | None
    stale: bool
    bench: Bench | None
    sampling: Mapping[str, Any]
    licence_text: str | None
    missing: tuple[tuple[str, str], ...]

    @property
    def state(self) -> State:
        return self.release.state

    def groups(self) -> tuple[Group, ...]:
        """All tensors of the release by kind; the routed experts' first."""
        skeleton = self.release.skeleton
        experts = tuple(skeleton.experts_prefix(layer) for layer in skeleton.routed)
        count, size, reasons = Counter[str](), Counter[str](), {EXPERTS: {""}}
        for name, header in self.headers.items():
            group, reason = EXPERTS, ""
            if not name.startswith(experts):
                group, reason = kept_group(name)
            reasons.setdefault(group, set()).add(reason)
            count[group] += 1
            size[group] += header.size_bytes
        named = (name for name in reasons if count[name])
        why = {name: "; ".join(sorted(found)) for name, found in reasons.items()}
        return tuple(Group(name, name == EXPERTS, why[name], count[name], size[name]) for name in named)

    def parameters(self) -> tuple[int, int]:
        """Return the source's parameters, and those that one token uses in the text model without its draft head."""
        skeleton, kept = self.release.skeleton, Counter[str]()
        routed = tuple(skeleton.experts_prefix(layer) for layer in skeleton.routed)
        for name, header in self.headers.items():
            if not name.startswith(routed):
                kept[kept_group(name)[0]] += math.prod(header.shape)
        count, used = kept.total(), kept.total() - kept["vision"] - kept["MTP"]
        for layer in skeleton.routed:
            experts = skeleton.blueprint.experts[layer]
            assert experts is not None
            each = sum(math.prod(experts.shape(projection)) for projection in experts.projections)
            count, used = count + each * experts.count, used + each * min(skeleton.topk, experts.count)
        return count, used

    def shared_width(self) -> int | None:
        """Return the intermediate size of the shared experts, by the shapes of their matrices; None without any."""
        shared = (one.shape for name, one in self.headers.items() if kept_group(name)[0] == "shared experts")
        hidden, sizes = self.release.skeleton.widest.hidden, {size for shape in shared for size in shape if size > 1}
        return min(sizes - {hidden}, default=hidden) if sizes else None

    def by_layer(self) -> dict[int, list[ProjectionStatistics]]:
        found = defaultdict(list)
        for row in self.projections:
            found[row.layer].append(row)
        return dict(sorted(found.items()))

    def pool_tokens(self, row: ProjectionStatistics) -> float:
        """How many tokens the layer's statistics count for in this projection's: the recipe's pool times its inputs."""
        experts = self.release.skeleton.widest
        inputs = experts.width if row.projection == "down_proj" else experts.hidden
        return float(self.release.recipe.solver.pool * inputs)

    def cold(self) -> list[ProjectionStatistics]:
        """Projections whose statistics are more the layer's than their own tokens'."""
        return [row for row in self.projections if row.effective_tokens < self.pool_tokens(row)]

    def worst(self) -> list[ProjectionStatistics]:
        """The ten projections with the largest output error over that of RTN, the worst first."""
        return sorted(self.projections, key=lambda row: -row.error_over_rtn)[:10]


def read_records(folder: Path) -> Records:
    """Raises FourfoldError for a folder that is no finished release, or a file that is not as fourfold writes it."""
    release = open_release(folder)
    metrics, verdict = Metrics.find(folder / METRICS), Verdict.find(folder / VERDICT)
    bench = Bench.find(folder / BENCH)
    if metrics is not None and metrics.summary is None:
        raise FourfoldError(f"{folder / METRICS}: summary: got null, as of a trial, expected figures. {metrics.FIX}")
    stale = verdict is not None and verdict.content != release.state.output.content
    licence = folder / "LICENSE"
    return Records(
        release=release,
        headers=TensorIndex.open(folder).headers,
        projections=read_log(folder / LOG),
        metrics=metrics,
        verdict=None if stale else verdict,
        stale=stale,
        bench=bench,
        sampling=sampling(folder),
        licence_text=licence.read_text(encoding="utf-8", errors="replace") if licence.is_file() else None,
        missing=tuple(_missing(metrics, None if stale else verdict, bench)),
    )


def _missing(metrics: Metrics | None, verdict: Verdict | None, bench: Bench | None) -> Iterator[tuple[str, str]]:
    """What was not measured, and the command that measures it."""
    if metrics is None or metrics.measured_by != "evaluate":
        yield "quality on more text than quantize's", "fourfold evaluate OUT --source MODEL"
    if metrics is None or metrics.protocol.text == HELDOUT_TEXTS[Heldout.builtin].title:
        command = "fourfold evaluate OUT --source MODEL --text wikitext-2-raw-test.parquet"
        yield "perplexity on wikitext-2-raw, as in published tables", command
    if metrics is None or not metrics.drafts:
        yield "acceptance rate of the draft head", "fourfold evaluate OUT --source MODEL"
    if metrics is None or not metrics.tasks:
        yield "lm-eval tasks", "fourfold evaluate OUT --source MODEL --tasks NAMES --url URL"
    levels = () if verdict is None else verdict.levels
    for level, words in (("files", ""), ("source", " --source MODEL"), ("engine", " --engine vllm")):
        if level not in levels:
            yield f"verification, level {level}", f"fourfold verify OUT{words}"
    if bench is None:
        yield "serving speed", "fourfold bench URL --out OUT/bench.json"
