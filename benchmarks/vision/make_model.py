"""Train the small vision model of tests and of benchmarks/vision/ablation.py: 7 CPU minutes on one core.

    python benchmarks/vision/make_model.py OUT --json benchmarks/results/vision_model.json

A Qwen3.5-MoE with vision tower in the example model's words, on the texts that ship with fourfold and on scenes.py.
benchmarks/vision/model is what it wrote. The file of results has losses with the right image and with another one, and
how image tokens are routed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from scenes import conversation, scenes
from torch import Tensor
from transformers import AutoTokenizer, Qwen3_5MoeForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5_moe import Qwen3_5MoeConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen3.6-moe"
TEXTS = Path(__file__).parents[2] / "src" / "fourfold" / "text" / "calibration"
SEED, HELDOUT_SEED = 0, 1
LENGTH, ROWS = 256, 4  # of a batch, half of its rows text, half images
IMAGE, VISION_START, VISION_END = 7, 5, 6
PATCH, MERGE = 8, 2
RATE, WARM_UP = 3e-3, 50
BALANCE = 0.01
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def settings() -> Qwen3_5MoeConfig:
    raw = json.loads((EXAMPLE / "config.json").read_text())
    raw["text_config"] |= {
        "hidden_size": 128, "head_dim": 32, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64, "mtp_num_hidden_layers": 0,
        "rope_parameters": raw["text_config"]["rope_parameters"] | {"mrope_section": [2, 1, 1]},
        "router_aux_loss_coef": BALANCE,
    }  # fmt: skip
    raw["vision_config"] |= {"out_hidden_size": 128, "patch_size": PATCH, "num_position_embeddings": 144,
                             "hidden_size": 96, "num_heads": 3, "intermediate_size": 192}  # fmt: skip
    return Qwen3_5MoeConfig(**{key: value for key, value in raw.items() if key not in ("architectures", "model_type")})


class Samples:
    """Rows of tokens: text, and images with a question and an answer each."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(EXAMPLE, local_files_only=True)
        self.images = Qwen2VLImageProcessorPil(
            patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 1024, "longest_edge": 2**18},
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip

    def text(self) -> Tensor:
        """All rows of the bundled calibration texts, [R, LENGTH]."""
        parts: list[str] = []
        for path in sorted(TEXTS.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if "messages" in record:
                    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in record["messages"])
                    parts.append("".join(turns))
                else:
                    keys = [key for key in ("text", "content", "problem", "solution") if key in record]
                    parts.append("\n\n".join(str(record[key]) for key in keys) + "<|endoftext|>")
        ids = [one for start in range(0, len(parts), 256)
               for one in self.tokenizer(parts[start : start + 256])["input_ids"]]  # fmt: skip
        random.Random(SEED).shuffle(ids)
        flat_T = torch.tensor([token for one in ids for token in one])
        return flat_T[: len(flat_T) // LENGTH * LENGTH].view(-1, LENGTH)

    def sample(self, image: object, question: str, answer: str) -> tuple[list[int], Tensor, Tensor]:
        found = self.images(image, return_tensors="pt")
        grid = found["image_grid_thw"]
        said = conversation(question, answer)
        rendered = self.tokenizer.apply_chat_template(said, chat_template=TEMPLATE, tokenize=False)
        pads = "<|image_pad|>" * (int(grid.prod()) // MERGE**2)
        return self.tokenizer(rendered.replace("<|image_pad|>", pads))["input_ids"], found["pixel_values"], grid

    def rows(self, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(ids [LENGTH], pixels, grids): whole samples, and text tokens of the next to the end."""
        ids: list[int] = []
        pixels: list[Tensor] = []
        grids: list[Tensor] = []
        for image, question, answer in scenes(10**9, seed):
            tokens, pixel, grid = self.sample(image, question, answer)
            if len(ids) + len(tokens) > LENGTH:
                plain = [token for token in tokens if token not in (IMAGE, VISION_START, VISION_END)]
                ids += plain * (LENGTH // len(plain) + 1)
                yield torch.tensor(ids[:LENGTH]), torch.cat(pixels), torch.cat(grids)
                ids, pixels, grids = [], [], []
            ids += tokens
            pixels.append(pixel)
            grids.append(grid)


def batch(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row[0] for row in rows])
    labels = ids.masked_fill(ids == IMAGE, -100)
    pixels = torch.cat([row[1] for row in rows])
    grids, kinds = torch.cat([row[2] for row in rows]), (ids == IMAGE).int()
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_grid_thw": grids,
            "mm_token_type_ids": kinds}  # fmt: skip


def train(model: Qwen3_5MoeForConditionalGeneration, samples: Samples, minutes: float) -> dict[str, object]:
    text_RT, image_rows = samples.text(), samples.rows(SEED + 100)
    decayed = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    seconds, start, step, row = minutes * 60, time.process_time(), 0, 0
    log: list[dict[str, float]] = []
    half = ROWS // 2
    while (spent := time.process_time() - start) < seconds:
        rate = RATE * min((step + 1) / WARM_UP, 1.0) * max(1 - spent / seconds, 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        part = batch([next(image_rows) for _ in range(half)])
        text = text_RT[torch.arange(row, row + half) % len(text_RT)]
        row += half
        optimizer.zero_grad()
        seen = model(**part, output_router_logits=True)
        read = model(input_ids=text, labels=text, output_router_logits=True)
        (seen.loss + read.loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            losses = {"step": step, "seconds": round(spent), "image_loss": round(float(seen.loss), 4),
                      "text_loss": round(float(read.loss), 4)}  # fmt: skip
            print(json.dumps(losses), flush=True)
            log.append(losses)
    kept = log[:: max(len(log) // 16, 1)]
    return {"seed": SEED, "steps": step, "tokens": step * ROWS * LENGTH, "cpu_minutes": minutes, "losses": kept}


@torch.no_grad()
def evidence(model: Qwen3_5MoeForConditionalGeneration, samples: Samples) -> dict[str, object]:
    """Losses of answers with their own images and with those of other samples; routing of image and text tokens."""
    right, wrong = [], []
    counts = torch.zeros(model.config.text_config.num_hidden_layers, 2, model.config.text_config.num_experts)
    drawn = [samples.sample(*one) for one in scenes(96, HELDOUT_SEED)]
    for ids, pixels, grid in drawn:
        twins = [one for one in drawn if torch.equal(one[2], grid) and one[1] is not pixels]
        for losses, shown in ((right, pixels), (wrong, twins[0][1])):
            part = batch([(torch.tensor(ids), shown, grid)])
            answer = len(ids) - 1 - ids[::-1].index(1)  # <|im_start|> of the assistant
            part["labels"][:, : answer + 3] = -100
            found = model(**part, output_router_logits=True)
            losses.append(float(torch.nn.functional.cross_entropy(found.logits[0, :-1], part["labels"][0, 1:])))
            if losses is right:
                for layer, logits in enumerate(found.router_logits):
                    chosen = logits.topk(model.config.text_config.num_experts_per_tok).indices
                    for kind in (0, 1):
                        own = chosen[part["mm_token_type_ids"][0] == kind].flatten()
                        counts[layer, kind] += torch.bincount(own, minlength=counts.shape[-1])
    share = counts / counts.sum(-1, keepdim=True)
    text = samples.text()[-32:]
    return {
        "answer_loss": sum(right) / len(right), "answer_loss_with_another_image": sum(wrong) / len(wrong),
        "text_loss": float(model(input_ids=text, labels=text).loss),
        "routing_overlap": [float(torch.minimum(one[0], one[1]).sum()) for one in share],
        "experts_of_images": [int((one[1] > 4 * one[0]).sum()) for one in share],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=7, help="CPU time of training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    samples = Samples()
    model = Qwen3_5MoeForConditionalGeneration(settings()).float()
    model.set_experts_implementation("grouped_mm")
    made = train(model, samples, options.minutes)
    model = model.bfloat16().eval()
    made |= evidence(model, samples)
    model.save_pretrained(options.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(EXAMPLE / name, options.out / name)
    (options.out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    processor = json.loads((EXAMPLE / "preprocessor_config.json").read_text()) | {"patch_size": PATCH}
    (options.out / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
    text = json.dumps(made, indent=1) + "\n"
    print(text)
    if options.json:
        options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
