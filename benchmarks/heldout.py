"""How far a release is from its source on held-out text, whoever made it: free and forced routing, one way for all.

The source is transformers' own model in BF16; a release is the same model with its routed experts replaced by codes
times scales, rounded to BF16, as an engine multiplies by them. Everything else of the release counts as kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.core import grid, metrics
from fourfold.formats import FORMATS
from fourfold.formats.format import Format
from fourfold.model.family import DOWN, GATE, UP

WINDOWS_PER_BATCH = 8
RESAMPLES = 2000


class Judge:
    """The source's model, its answers on the held-out windows, and room for one release's experts at a time."""

    def __init__(self, model: Path, token_RT: Tensor) -> None:
        """token_RT: int64 windows of held-out tokens, all but the first of each are predicted."""
        transformers.utils.logging.disable_progress_bar()
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        architecture: type[PreTrainedModel] = getattr(transformers, config["architectures"][0])
        self.model = architecture.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.token_RT = token_RT
        self.experts = {name: part for name, part in self.model.named_modules() if name.endswith(".mlp.experts")}
        self.routers = [self.model.get_submodule(name.removesuffix("experts") + "gate") for name in self.experts]
        self.source_TD, self.choices = self._run()

    def judge(self, release: Path) -> dict[str, object]:
        """The figures of one release: free routing, then its own gate weights on the source's choice of experts.

        kl_by_window: mean KL of each window, for a bootstrap over windows, whose tokens are not independent.
        """
        for name, experts in self.experts.items():
            gate_up_ENK, down_ENK = read_experts(release, name, len(experts.gate_up_proj))
            experts.gate_up_proj.data = gate_up_ENK
            experts.down_proj.data = down_ENK
        free_TD, choices = self._run()
        forced_TD, _ = self._run(self.choices)
        free, forced = self._compare(free_TD), self._compare(forced_TD)
        agreement = [metrics.router_agreement(*pair) for pair in zip(self.choices, choices, strict=True)]
        return {
            **metrics.summarize(free),
            "forced_kl_mean": forced.kl_T.mean().item(),
            "forced_kl_median": forced.kl_T.median().item(),
            "router_agreement": sum(agreement) / len(agreement),
            "kl_by_window": free.kl_T.view(len(self.token_RT), -1).mean(dim=1).tolist(),
        }

    @torch.no_grad()
    def _run(self, forced: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [T, D] after the last norm where a token is predicted, and each router's choices [T, A]."""
        watches = [ProgressReporter(None if forced is None else forced[place]) for place in range(len(self.routers))]
        hooks = [gate.register_forward_hook(watch) for gate, watch in zip(self.routers, watches, strict=True)]
        seen: list[Tensor] = []
        for batch_RT in self.token_RT.split(WINDOWS_PER_BATCH):
            hidden_RTD = self.model.base_model(input_ids=batch_RT, use_cache=False).last_hidden_state
            seen.append(hidden_RTD[:, :-1].flatten(0, 1))
        for hook in hooks:
            hook.remove()
        return torch.cat(seen), [torch.cat(watch.chosen) for watch in watches]

    def _compare(self, release_TD: Tensor) -> metrics.Statistics:
        head_VD = self.model.get_output_embeddings().weight.detach()
        return metrics.token_statistics(self.source_TD, release_TD, head_VD, self.token_RT[:, 1:].flatten())


class ProgressReporter:
    """A router's forward hook: keeps what it chose, or has it choose what it is told, weighed by its own logits."""

    def __init__(self, forced_TA: Tensor | None) -> None:
        self.forced_TA = forced_TA
        self.chosen: list[Tensor] = []
        self.tokens = 0

    def __call__(self, gate: nn.Module, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> object:
        logits_TE, weight_TA, index_TA = output
        if self.forced_TA is not None:
            index_TA = self.forced_TA[self.tokens : self.tokens + len(index_TA)]
            probability_TA = logits_TE.softmax(dim=-1, dtype=torch.float32).gather(1, index_TA)
            if getattr(gate, "norm_topk_prob", True):
                probability_TA = probability_TA / probability_TA.sum(dim=-1, keepdim=True)
            weight_TA = probability_TA.to(weight_TA.dtype)
        self.tokens += len(index_TA)
        self.chosen.append(index_TA)
        return logits_TE, weight_TA, index_TA


def read_experts(release: Path, prefix: str, experts: int) -> tuple[Tensor, Tensor]:
    """gate_up and down [E, N, K] in BF16 of one layer. prefix: the module's name, `...mlp.experts`."""
    found = _tensors(release, f"{prefix}.")
    settings = json.loads((release / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    format = next(one for one in FORMATS if one.named_by(settings))

    def stack(projection: str) -> Tensor:
        weights = []
        for expert in range(experts):
            own = f"{prefix}.{expert}.{projection}."
            stored = {name.removeprefix(own): value for name, value in found.items() if name.startswith(own)}
            _require_plain(own, stored, format)
            group = format.unpack({suffix: value[None] for suffix, value in stored.items()})
            weights.append(grid.dequantize(group.codes_ENK, group.scale_ENG)[0].bfloat16())
        return torch.stack(weights)

    return torch.cat([stack(GATE), stack(UP)], dim=1), stack(DOWN)


def _tensors(release: Path, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(release.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
    return found


def _require_plain(name: str, stored: dict[str, Tensor], format: Format) -> None:
    """What `Format.unpack` takes for granted: the zero point 8, and groups of neighbours."""
    words, groups = (stored[suffix].shape[format.inputs_axis] for suffix in (format.codes, format.scales))
    for problem in format.companion_problems(stored, 8 * words // groups):
        raise ValueError(f"{name}: {problem}")


def bootstrap(means: list[float]) -> tuple[float, float]:
    """95 % interval of a mean over windows, by resampling windows; the same draws every time."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(means), (RESAMPLES, len(means)), generator=generator)
    resampled = torch.tensor(means, dtype=torch.float64)[draw].mean(dim=1)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
