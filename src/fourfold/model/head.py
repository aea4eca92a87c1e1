"""What stands around the decoder layers: the start of the stream, the layers' calls, the last norm and output head.

All of it is the model's own forward with stubs in place of its layers (calls.py), on a copy of the modules around them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.core.metrics import VOCABULARY_CHUNK
from fourfold.datatypes import FourfoldError
from fourfold.model import calls, loader
from fourfold.model.blueprint import Blueprint
from fourfold.model.calls import Calls

Read = Callable[[str], Tensor]  # a tensor by its name on disk, on the host
Ends = Mapping[str, Tensor]  # by name in memory
LOGITS_KEPT = 3  # chunks of the vocabulary: half of what the comparison of two models takes (quantize/footprint.LOGITS)
PROBE = 3  # tokens, and columns of logits, that show whether logits are changed behind the output head


def input_name(blueprint: Blueprint) -> str:
    """The embedding matrix's name in memory."""
    return _weight_name(blueprint.model, blueprint.model.get_input_embeddings())


def output_name(blueprint: Blueprint) -> str:
    """The name in memory of the output head's matrix, or of the embeddings that it is tied to."""
    name = _weight_name(blueprint.model, blueprint.model.get_output_embeddings())
    return name if name in blueprint.sources else str(blueprint.model.all_tied_weights_keys.get(name, name))


def _weight_name(model: nn.Module, module: nn.Module) -> str:
    return f"{next(name for name, other in model.named_modules() if other is module)}.weight"


def read_matrix(blueprint: Blueprint, read: Read, name: str) -> Tensor:
    """The embeddings or the output head [V, D] by the name in memory."""
    (on_disk,) = blueprint.sources[name].all_names
    return read(on_disk)


def read_ends(blueprint: Blueprint, read: Read) -> dict[str, Tensor]:
    """What stands around the layers, but for the embeddings and the output head's matrix: norms, mostly."""
    large = {input_name(blueprint), output_name(blueprint)}
    return loader.load_around(blueprint, lambda name, _: read(name), large)


def read_buffers(blueprint: Blueprint, read: Read) -> dict[str, Tensor]:
    """Of read_ends what no gradient changes, as of rotary embeddings: calls depend on it."""
    return loader.load_around(blueprint, lambda name, _: read(name), set(dict(blueprint.model.named_parameters())))


def blank_ends(blueprint: Blueprint) -> dict[str, Tensor]:
    """Zeros in place of read_ends: calls do not depend on them, but for read_buffers."""
    path = blueprint.layers_path.rpartition("layers")[0]
    large = {input_name(blueprint), output_name(blueprint)}
    parameters = {**dict(blueprint.model.named_parameters()), **dict(blueprint.model.named_buffers())}
    stored = blueprint.model.state_dict()
    return {
        name: torch.zeros(value.shape, dtype=value.dtype)
        for name, value in parameters.items()
        if name.startswith(path) and not name.startswith(f"{blueprint.layers_path}.")
        and name not in large and name in stored
    }  # fmt: skip


@dataclass
class _Matrix:
    """In place of the output head: keeps what it is given, and answers with `logits`."""

    given: Tensor | None = None
    logits: Tensor | None = None

    def __call__(self, hidden_RTD: Tensor) -> Tensor:
        self.given = hidden_RTD
        return hidden_RTD.new_zeros(*hidden_RTD.shape[:-1], 1) if self.logits is None else self.logits


class Around:
    """A copy of the modules around the layers, on one device, its layers and output head stubs.

    Without an embedding matrix every token's embedding is zero: calls do not depend on it. Workers may share one: a
    forward replaces those of modules, so that one runs at a time.
    """

    def __init__(
        self, blueprint: Blueprint, ends: Ends, device: torch.device, dtype: torch.dtype = torch.bfloat16,
        embedding_VD: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.device = device
        self._lock = threading.RLock()  # `after` looks at a call itself
        self._matrix = _Matrix()
        self._blueprint = loader.around(blueprint, ends, device, dtype)
        model = self._blueprint.model
        model.get_output_embeddings().__dict__["forward"] = self._matrix
        embeddings = model.get_input_embeddings()
        if embedding_VD is None:
            width = embeddings.weight.shape[1]
            embeddings.__dict__["forward"] = lambda token_RT: torch.zeros(
                *token_RT.shape, width, dtype=dtype, device=device
            )
        else:
            embeddings.weight = nn.Parameter(embedding_VD.to(device, dtype), requires_grad=False)
        self._answers = 0

    def calls(self, token_RT: Tensor, images: Mapping[str, Tensor] | None = None) -> Calls:
        """The layers' calls for a batch of ids, and its state before the first layer. images: see calls.record."""
        given = {name: value.to(self.device) for name, value in (images or {}).items()}
        with self._lock:
            return calls.record(self._blueprint, token_RT.to(self.device), given)

    def require_plain(self, token_RT: Tensor) -> None:
        """Raise FourfoldError if a layer's call depends on another layer's state, or on the tokens."""
        token_RT = token_RT.to(self.device)
        with self._lock:
            calls.require_independent(self._blueprint, token_RT)
            varies = calls.varies(self._blueprint, token_RT)
        if varies:
            raise FourfoldError(
                f"{self._blueprint.path}: layers of {type(self._blueprint.model).__name__} are given something of the "
                "token ids beside their input, expected calls that are the same for all text. This family needs code "
                "of its own, which fourfold does not have"
            )

    def norm(self, state_NX: Tensor) -> Tensor:
        """What the output head's matrix is multiplied by, [N, D], from states behind the last layer [N, ...]."""
        with self._lock:
            self._finish(state_NX[None])
            given_1ND, self._matrix.given = self._matrix.given, None
        assert given_1ND is not None
        return given_1ND[0]

    def after(self, logits_NC: Tensor) -> Tensor:
        """The model's own scale or cap of some columns of its logits."""
        with self._lock:
            self._matrix.logits = logits_NC[None]
            try:
                state_1NX = self._zeros(len(logits_NC))
                found: Tensor = self._finish(state_1NX)
            finally:
                self._matrix.logits = None
        return found[0]

    def scales(self) -> bool:
        """Whether `after` changes anything."""
        probe_NC = torch.randn(PROBE, PROBE, generator=torch.Generator().manual_seed(0)).to(self.device) * 100
        return not torch.equal(self.after(probe_NC), probe_NC)

    def _zeros(self, tokens: int) -> Tensor:
        token_1T = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        return torch.zeros_like(self.calls(token_1T).state)

    def _finish(self, state_1NX: Tensor) -> Any:
        token_1N = torch.zeros(1, state_1NX.shape[1], dtype=torch.int64, device=self.device)
        if not self._answers:
            self._answers = self.calls(token_1N[:, :1]).answers
        return calls.run_out(self._blueprint, token_1N, self._answers, state_1NX)


@dataclass(frozen=True)
class Head:
    """On one device, in the compute dtype: logits are around.after(around.norm(state) @ weight_VD.T + bias_V), in fp32
    where they are compared. scaled: whether `after` changes anything.
    """

    around: Around
    weight_VD: Tensor
    bias_V: Tensor | None
    scaled: bool

    def norm(self, state_NX: Tensor) -> Tensor:
        """See Around.norm; of rows [R, N, ...] too."""
        return self.around.norm(state_NX)

    @property
    def changes(self) -> bool:
        """Whether logits are more than the product with the matrix."""
        return self.scaled or self.bias_V is not None

    def columns(self, hidden_ND: Tensor, place: slice) -> Tensor:
        """fp32 logits [N, C] of some of the vocabulary. hidden_ND: behind the norm, fp32."""
        return self.finish(hidden_ND @ self.weight_VD[place].float().T, place)

    def finish(self, logits_NC: Tensor, place: slice) -> Tensor:
        """The product with some of the matrix's rows as the model gives it, with its bias and its own scale or cap."""
        if self.bias_V is not None:
            logits_NC = logits_NC + self.bias_V[place].float()
        return self.around.after(logits_NC) if self.scaled else logits_NC


def build_head(
    blueprint: Blueprint, ends: Ends, weight_VD: Tensor, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Head:
    """The head with these weights, cast to `dtype` as transformers does."""
    around = Around(blueprint, ends, device, dtype)
    bias_V = ends.get(_bias_name(blueprint))
    return Head(
        around=around,
        weight_VD=weight_VD.to(device, dtype),
        bias_V=None if bias_V is None else bias_V.to(device),
        scaled=around.scales(),
    )


def changes_logits(blueprint: Blueprint) -> bool:
    """Whether logits are more than a product with the output head's matrix, as `Head.changes` says of a loaded one."""
    around = Around(blueprint, blank_ends(blueprint), torch.device("cpu"))
    return _bias_name(blueprint) in blueprint.sources or around.scales()


def _bias_name(blueprint: Blueprint) -> str:
    return output_name(blueprint).removesuffix("weight") + "bias"


def logits(head: Head, hidden_ND: Tensor) -> Tensor:
    """fp32 logits [N, V] of states that the norm is behind already; the head is widened in chunks of the vocabulary."""
    hidden_ND = hidden_ND.float()
    logits_NV = torch.empty(len(hidden_ND), len(head.weight_VD), device=hidden_ND.device)
    for place in chunks(head):
        logits_NV[:, place] = head.columns(hidden_ND, place)
    return logits_NV


def chunks(head: Head) -> Iterator[slice]:
    """The vocabulary, a chunk at a time."""
    for first in range(0, len(head.weight_VD), VOCABULARY_CHUNK):
        yield slice(first, first + VOCABULARY_CHUNK)


def sampled_gradient(head: Head, state_NX: Tensor, uniform_N: Tensor) -> Tensor:
    """dL/d state of L = -sum log p(label), each position's label drawn from the head's own softmax. [N, D].

    state_NX: behind the last layer; uniform_N: float64 in [0, 1), where each position's label lies among the tokens in
    order. So many positions at a time that all their logits take the memory of LOGITS_KEPT chunks of the vocabulary. Of
    a head that neither scales its logits nor has a bias.
    """
    assert not head.changes, "the plan let through a head whose gradient is not known"
    with torch.enable_grad():
        state_NX = state_NX.detach().requires_grad_()
        normed_ND = head.norm(state_NX)
    hidden_ND = normed_ND.detach().float()
    gradient_ND = torch.zeros_like(hidden_ND)
    few = max(LOGITS_KEPT * VOCABULARY_CHUNK * len(hidden_ND) // len(head.weight_VD), 1)
    logits_PV = hidden_ND.new_empty(min(few, len(hidden_ND)), len(head.weight_VD))
    for part in (slice(first, first + few) for first in range(0, len(hidden_ND), few)):
        _add_gradient_(head, hidden_ND[part], uniform_N[part], logits_PV[: len(hidden_ND[part])], gradient_ND[part])
    (pushed_NX,) = torch.autograd.grad(normed_ND, state_NX, gradient_ND.to(normed_ND.dtype))
    return pushed_NX


def _add_gradient_(head: Head, hidden_PD: Tensor, uniform_P: Tensor, logits_PV: Tensor, gradient_PD: Tensor) -> None:
    """Add (p - label) W of some positions, in place; logits_PV: memory for their logits, and then for p."""
    sums = []
    for place in chunks(head):
        torch.mm(hidden_PD, head.weight_VD[place].float().T, out=logits_PV[:, place])
        sums.append(logits_PV[:, place].logsumexp(dim=1))
    logits_PV.sub_(torch.stack(sums).logsumexp(dim=0)[:, None]).exp_()
    label_P, below_P = torch.zeros_like(uniform_P, dtype=torch.int64), torch.zeros_like(uniform_P)
    for place in chunks(head):
        share_PC = logits_PV[:, place]
        gradient_PD.addmm_(share_PC, head.weight_VD[place].float())
        # Only where a label is in this chunk its tokens are counted, else all or none of them are below it.
        first_P, below_P = below_P, below_P + share_PC.sum(dim=1, dtype=torch.float64)
        label_P += (below_P <= uniform_P) * share_PC.shape[1]
        here_S = ((first_P <= uniform_P) & (uniform_P < below_P)).nonzero().flatten()
        below_SC = share_PC[here_S].double().cumsum_(dim=1).add_(first_P[here_S, None])
        label_P[here_S] = place.start + (below_SC <= uniform_P[here_S, None]).sum(dim=1)
    label_P.clamp_(max=len(head.weight_VD) - 1)  # shares add up to 1 but for rounding
    gradient_PD -= head.weight_VD[label_P].float()
