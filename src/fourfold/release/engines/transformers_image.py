"""Greedy tokens after a prompt with an image, from each of some checkpoints, through transformers on the CPU.

    python transformers_image.py REQUEST.json ANSWER.json

REQUEST: models (folders, run one after the other), before, after (token ids around the image), tokens (to generate).
ANSWER: models, each with tokens, and margins of the best over the second best. The image is noise, already cut into
patches: it shows whether vision tower, merger and text model are loaded as in the source, not what they see.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

MERGED_SIDE = 3  # the image is so many tokens wide and high


def inputs(config: Any, before: list[int], after: list[int]) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    side = MERGED_SIDE * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    image = [config.image_token_id] * MERGED_SIDE**2
    ids = [*before, config.vision_start_token_id, *image, config.vision_end_token_id, *after]
    token_T = torch.tensor([ids])
    return {
        "input_ids": token_T,
        "attention_mask": torch.ones_like(token_T),
        "mm_token_type_ids": (token_T == config.image_token_id).int(),
        "pixel_values": torch.randn(side * side, values, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


@torch.no_grad()
def generate(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    given = inputs(model.config, request["before"], request["after"])
    done = model.generate(
        **given, do_sample=False, min_new_tokens=request["tokens"], max_new_tokens=request["tokens"],
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = [step[0].float().log_softmax(-1).topk(2).values.tolist() for step in done.logits]
    first = given["input_ids"].shape[1]
    return {"tokens": done.sequences[0, first:].tolist(), "margins": [one - other for one, other in best]}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for folder in request["models"]:
        answers.append(generate(folder, request))
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps({"models": answers}))


if __name__ == "__main__":
    main()
