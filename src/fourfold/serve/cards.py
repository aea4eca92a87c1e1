"""The smallest machine that a release fits, by vLLM's forecast; nothing needs to be here yet."""

from __future__ import annotations

from typing import NamedTuple

from fourfold.quantize.plan import Plan
from fourfold.serve.engines import DRAFTS, ENGINES, VLLM
from fourfold.serve.forecast import Cache, Split, forecast
from fourfold.serve.machine import MACHINES, Machine
from fourfold.serve.served import Served, UnknownCache, planned_served

COMMON = tuple((gpus, gib) for gpus, gib in MACHINES if gpus == 1 or gib == 80)  # one card, or several of 80 GiB
SHARE = 0.95  # of a GPU's memory, where nothing else uses it
USEFUL_TOKENS = 32_768  # a shorter context does not count as a fit


class Fit(NamedTuple):
    """gpus, gib: the smallest machine, 0 where none suffices; context: of the longest request there, in tokens."""

    drafts: int
    gpus: int
    gib: int
    context: int

    def __str__(self) -> str:
        how = f"with {self.drafts} drafts" if self.drafts else "without drafts"
        if not self.gpus:
            return f"no machine up to {COMMON[-1][0]} x {COMMON[-1][1]} GiB {how}"
        return f"{self.gpus} x {self.gib} GiB {how} (context {self.context:,})"


def planned_fits(plan: Plan) -> list[Fit]:
    """Return the smallest machines for a plan's release, with and without drafts; none for an unknown kind of cache."""
    try:
        served = planned_served(plan)
    except UnknownCache:
        return []
    return [smallest(served, drafts) for drafts in ((DRAFTS[VLLM], 0) if served.has_draft else (0,))]


def smallest(served: Served, drafts: int) -> Fit:
    """Return the first of COMMON that fits, in the newest vLLM known and with an fp8 cache."""
    cache = Cache(
        engine=VLLM, version=ENGINES[VLLM].known[-1], share=SHARE, elements="fp8", drafts=drafts, context=None,
        prefix_caching=True, requests=0, cpu_gib=0,
    )  # fmt: skip
    for gpus, gib in COMMON:
        split = Split.choose(served, Machine.of(gpus, gib, (9, 0)), gpus, experts_apart=False)
        found = forecast(served, split, cache)
        context = min(found.longest, served.context)
        if not split.problems and not found.problems and context >= min(USEFUL_TOKENS, served.context):
            return Fit(drafts, gpus, gib, context)
    return Fit(drafts, 0, 0, 0)
