"""What earlier stages left in a release: read and checked, nothing measured. A file that is not there is None."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fourfold.bundled import HELDOUT_TEXTS
from fourfold.datatypes import FourfoldError, ProjectionStatistics
from fourfold.model.family import kept_group
from fourfold.quantize.journal import LOG, METRICS
from fourfold.recipe import Heldout
from fourfold.records.bench import Bench
from fourfold.records.log import read_log
from fourfold.records.results import Metrics, Verdict
from fourfold.release.contents import BENCH, LICENCE, VERDICT
from fourfold.release.release import Release

EXPERTS = "routed experts"


@dataclass(frozen=True)
class Group:
    """Weights of one kind. bits: of their codes, None: kept, for `reason`; tensors: that hold them."""

    name: str
    bits: int | None
    reason: str
    weights: int
    tensors: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Records(Release):
    """A release with its results. verdict: of these very bytes, else None and `stale`."""

    projections: tuple[ProjectionStatistics, ...]
    metrics: Metrics | None
    verdict: Verdict | None
    stale: bool
    bench: Bench | None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises FourfoldError for a folder that is no finished release, and for damaged files."""
        release = Release.open(folder)
        metrics, verdict = Metrics.find(folder / METRICS), Verdict.find(folder / VERDICT)
        if metrics is not None and metrics.summary is None:
            raise FourfoldError(
                f"{folder / METRICS}: summary: got null, as of a trial, expected figures. {metrics.FIX}"
            )
        stale = verdict is not None and verdict.content != release.state.output.content
        return cls(
            **vars(release), projections=read_log(folder / LOG), metrics=metrics, verdict=None if stale else verdict,
            stale=stale, bench=Bench.find(folder / BENCH),
        )  # fmt: skip

    @property
    def licence_text(self) -> str | None:
        path = self.folder / LICENCE
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def groups(self) -> tuple[Group, ...]:
        """All weights of the release by kind and bits; the routed experts' first."""
        experts = tuple(self.experts_prefix(layer) for layer in self.routed)
        found: dict[tuple[str, int | None], list[tuple[str, int, int]]] = {(EXPERTS, 4): []}
        for name, header in self.tensors.headers.items():
            stored, (group, reason) = self.tensors.stored.get(name), kept_group(name)
            group = (
                EXPERTS if name.startswith(experts) else "output head" if stored and group == "embeddings" else group
            )
            if stored and group == "MTP" and ".experts." in name:
                group = "draft experts"
            tensors, taken = (len(stored.parts), stored.size_bytes) if stored else (1, header.size_bytes)
            found.setdefault((group, stored.bits if stored else None), []).append((reason, tensors, taken))
        rows = []
        for (group, bits), weights in sorted(found.items(), key=lambda one: one[0][1] is None):
            reasons, tensors_of, bytes_of = zip(*weights, strict=True) if weights else ((), (), ())
            why = "; ".join(sorted(set(reasons)))
            if group == "MTP" and any(name in ("MTP", "draft experts") and width for name, width in found):
                why = "the rest of the draft head stays BF16"
            rows.append(Group(group, bits, why, len(weights), sum(tensors_of), sum(bytes_of)))
        return tuple(row for row in rows if row.weights)

    def parameters(self) -> tuple[int, int]:
        """Return the source's parameters, and those that one token uses in the text model without its draft head."""
        weights, shares = self.tensors.headers, dict[str, float]()
        for layer in self.routed:
            shares[self.experts_prefix(layer)] = min(1.0, self.topk / self.experts_of(layer).count)
        apart, count, used = set(self.blueprint.drafts_among(weights)), 0, 0.0
        for name, header in weights.items():
            share = next((share for prefix, share in shares.items() if name.startswith(prefix)), None)
            if share is None:
                share = float(name not in apart and kept_group(name)[0] not in ("MTP", "vision"))
            count, used = count + math.prod(header.shape), used + share * math.prod(header.shape)
        return count, round(used)

    def shared_width(self) -> int | None:
        """Return the intermediate size of the shared experts, by the shape of their matrix down; None without any."""
        shared = (one.shape for name, one in self.tensors.headers.items() if kept_group(name)[0] == "shared experts")
        hidden = self.widest.hidden
        return min((shape[1] for shape in shared if len(shape) == 2 and shape[0] == hidden), default=None)

    def by_layer(self) -> dict[int, list[ProjectionStatistics]]:
        """Return the rows of the decoder layers, in order: those of draft experts are not among them."""
        found = defaultdict(list)
        for row in self.projections:
            if row.layer < self.layers:
                found[row.layer].append(row)
        return dict(sorted(found.items()))

    def drafts(self) -> list[ProjectionStatistics]:
        """Return the rows of draft experts: their layer is the number of decoder layers."""
        return [row for row in self.projections if row.layer >= self.layers]

    def layer_name(self, row: ProjectionStatistics) -> str:
        return f"layer {row.layer}" if row.layer < self.layers else "draft head"

    def pool_tokens(self, row: ProjectionStatistics) -> float:
        """How many tokens the layer's statistics count for in this projection's: the recipe's pool times its inputs."""
        experts = self.widest
        inputs = experts.width if row.projection == "down_proj" else experts.hidden
        return float(self.recipe.solver.pool * inputs)

    def cold(self) -> list[ProjectionStatistics]:
        """Projections whose statistics are more the layer's than their own tokens'."""
        return [row for row in self.projections if row.effective_tokens < self.pool_tokens(row)]

    def worst(self) -> list[ProjectionStatistics]:
        """The ten projections with the largest output error over that of RTN, the worst first."""
        return sorted(self.projections, key=lambda row: -row.error_over_rtn)[:10]

    @property
    def missing(self) -> Iterator[tuple[str, str]]:
        """What was not measured, and the command that measures it."""
        metrics = self.metrics
        if metrics is None or metrics.measured_by != "evaluate":
            yield "quality on more text than quantize's", "fourfold evaluate OUT --source MODEL"
        if metrics is None or metrics.protocol.text == HELDOUT_TEXTS[Heldout.builtin].title:
            command = "fourfold evaluate OUT --source MODEL --text wikitext-2-raw-test.parquet"
            yield "perplexity on wikitext-2-raw, as in published tables", command
        if metrics is None or not metrics.drafts:
            yield "acceptance rate of the draft head", "fourfold evaluate OUT --source MODEL"
        if metrics is None or not metrics.tasks:
            yield "lm-eval tasks", "fourfold evaluate OUT --source MODEL --tasks NAMES --url URL"
        levels = () if self.verdict is None else self.verdict.levels
        for level, words in (("files", ""), ("source", " --source MODEL"), ("engine", " --engine vllm")):
            if level not in levels:
                yield f"verification, level {level}", f"fourfold verify OUT{words}"
        if self.bench is None:
            yield "serving speed", "fourfold bench URL --out OUT/bench.json"
