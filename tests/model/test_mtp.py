"""The draft head against a naive one: float64, one token at a time, written from vLLM's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
import releases
from fourfold.datatypes import FourfoldError
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.mtp import Drafts, read_draft_head

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, TOPK, EXPERTS = 4, 2, 32, 2, 4  # of checkpoints.tiny
ROTARY = 16  # of HEAD_DIM
ROWS, LENGTH = 2, 14


class Naive:
    """The head on one row of text. Keys and values of step 1 are kept by position."""

    def __init__(self, tensors: dict[str, Tensor], embedding_VD: Tensor, hidden_TD: Tensor, tokens: list[int]) -> None:
        self.weights = {name.removeprefix("mtp."): value.double() for name, value in tensors.items()}
        self.embedding_VD, self.hidden_TD, self.tokens = embedding_VD.double(), hidden_TD.double(), tokens
        self.first: list[tuple[Tensor, Tensor]] = []
        self.output: list[Tensor] = []
        for t in range(len(tokens) - 1):
            self.output.append(self.step(self.hidden_TD[t], tokens[t + 1], t, self.first))

    def draft(self, t: int, tokens: list[int]) -> list[Tensor]:
        """Outputs of the steps from position t; tokens: what steps 2, 3, ... take in."""
        seen, outputs = self.first[: t + 1], [self.output[t]]
        for place, token in enumerate(tokens):
            outputs.append(self.step(outputs[-1], token, t + 1 + place, seen))
        return outputs

    def step(self, hidden_D: Tensor, token: int, position: int, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        embedded_D = self.norm(self.embedding_VD[token], "pre_fc_norm_embedding")
        x_D = self.weights["fc.weight"] @ torch.cat([embedded_D, self.norm(hidden_D, "pre_fc_norm_hidden")])
        x_D = x_D + self.attention(self.norm(x_D, "layers.0.input_layernorm"), position, seen)
        x_D = x_D + self.experts(self.norm(x_D, "layers.0.post_attention_layernorm"))
        return self.norm(x_D, "norm")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * (1 + self.weights[f"{name}.weight"])

    def attention(self, x_D: Tensor, position: int, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        w = {name: self.weights[f"layers.0.self_attn.{name}.weight"] for name in names}
        query_gate = (w["q_proj"] @ x_D).view(HEADS, 2, HEAD_DIM)
        keys, values = (w["k_proj"] @ x_D).view(KV_HEADS, HEAD_DIM), (w["v_proj"] @ x_D).view(KV_HEADS, HEAD_DIM)
        seen.append((torch.stack([self.turn(key, position, "k_norm") for key in keys]), values))
        parts = []
        for head in range(HEADS):
            query, own = self.turn(query_gate[head, 0], position, "q_norm"), head // (HEADS // KV_HEADS)
            scores = torch.stack([query @ key[own] for key, _ in seen]) / HEAD_DIM**0.5
            mixed = sum(share * value[own] for share, (_, value) in zip(scores.softmax(dim=0), seen, strict=True))
            parts.append(mixed * query_gate[head, 1].sigmoid())
        return w["o_proj"] @ torch.cat(parts)

    def turn(self, x: Tensor, position: int, norm: str) -> Tensor:
        x = self.norm(x, f"layers.0.self_attn.{norm}").clone()
        half = ROTARY // 2
        for i in range(half):
            angle = torch.tensor(position * 1e7 ** (-2 * i / ROTARY), dtype=torch.float64)
            low, high = x[i].clone(), x[i + half].clone()
            x[i], x[i + half] = low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()
        return x

    def experts(self, x_D: Tensor) -> Tensor:
        shares = (self.weights["layers.0.mlp.gate.weight"] @ x_D).softmax(dim=0)
        best = shares.topk(TOPK)
        shared = {name: self.weights[f"layers.0.mlp.shared_expert.{name}.weight"] for name in releases.PROJECTIONS}
        gate = (self.weights["layers.0.mlp.shared_expert_gate.weight"] @ x_D).sigmoid()
        result = gate * self.mlp(x_D, *(shared[name] for name in releases.PROJECTIONS))
        for share, expert in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            stem = f"layers.0.mlp.experts.{expert}."
            own = (releases.source_weight(self.weights, f"{stem}{name}.") for name in releases.PROJECTIONS)
            result = result + share * self.mlp(x_D, *own)
        return result

    @staticmethod
    def mlp(x_D: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return down @ (torch.nn.functional.silu(gate @ x_D) * (up @ x_D))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny(tmp_path_factory.mktemp("mtp") / "model")


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


@torch.no_grad()
def run(folder: Path, position_RP: Tensor, steps: int, token_RPS: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Outputs [R, P, D] by step, and the hidden states and tokens they were made from."""
    generator = torch.Generator().manual_seed(0)
    hidden_RTD = torch.randn(ROWS, LENGTH, 128, generator=generator)
    token_RT = torch.randint(2048, (ROWS, LENGTH), generator=generator)
    drafts = Drafts(read_draft_head(opened(folder), CPU, torch.float32), hidden_RTD, token_RT)
    outputs = [drafts.first(position_RP)]
    for step in range(steps - 1):
        outputs.append(drafts.later(outputs[-1], token_RPS[:, :, step], position_RP))
    return outputs, hidden_RTD, token_RT


def test_drafts_are_those_of_a_head_that_takes_one_token_at_a_time(model: Path) -> None:
    position_RP = torch.tensor([[3, 7, 0], [9, 5, 12]])
    token_RPS = torch.randint(2048, (2, 3, 2), generator=torch.Generator().manual_seed(1))
    outputs, hidden_RTD, token_RT = run(model, position_RP, 3, token_RPS)
    tensors = releases.tensors(model)
    draft = {name: value for name, value in tensors.items() if name.startswith("mtp.")}
    for row in range(ROWS):
        embedding_VD = tensors["model.language_model.embed_tokens.weight"]
        naive = Naive(draft, embedding_VD, hidden_RTD[row], token_RT[row].tolist())
        for place, t in enumerate(position_RP[row].tolist()):
            wanted = naive.draft(t, token_RPS[row, place].tolist())
            for step in range(3):
                assert torch.allclose(outputs[step][row, place].double(), wanted[step], atol=2e-4), (row, t, step)


def test_what_comes_after_a_position_does_not_matter(model: Path) -> None:
    position_RP = torch.tensor([[4], [6]])
    token_RPS = torch.tensor([[[5, 6]], [[7, 8]]])
    whole, hidden_RTD, token_RT = run(model, position_RP, 3, token_RPS)
    hidden_RTD[0, 5:], hidden_RTD[1, 7:], token_RT[0, 6:], token_RT[1, 8:] = 9.0, 9.0, 3, 3
    with torch.no_grad():
        drafts = Drafts(read_draft_head(opened(model), CPU, torch.float32), hidden_RTD, token_RT)
        assert torch.allclose(drafts.first(position_RP), whole[0], atol=1e-5)
        assert torch.allclose(drafts.later(whole[0], token_RPS[:, :, 0], position_RP), whole[1], atol=1e-5)


def test_experts_fused_or_one_by_one_are_the_same_head(model: Path, tmp_path: Path) -> None:
    split = checkpoints.tiny(tmp_path / "split", mtp="split")
    position_RP, token_RPS = torch.tensor([[4], [6]]), torch.zeros(2, 1, 1, dtype=torch.int64)
    outputs = [run(folder, position_RP, 2, token_RPS)[0] for folder in (model, split)]
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


def test_a_checkpoint_without_a_draft_head_says_so(tmp_path: Path) -> None:
    assert not opened(checkpoints.tiny(tmp_path / "bare", mtp=None)).has_draft_head
    assert not opened(checkpoints.tiny(tmp_path / "text", family="qwen3_moe")).has_draft_head


def test_half_a_draft_head_is_an_error(tmp_path: Path) -> None:
    folder = checkpoints.tiny(tmp_path / "half")
    checkpoints.edit(folder, lambda tensors: tensors.pop("mtp.layers.0.self_attn.q_norm.weight"))
    with pytest.raises(FourfoldError, match=r"mtp\.layers\.0\.self_attn\.q_norm\.weight is missing"):
        opened(folder)
