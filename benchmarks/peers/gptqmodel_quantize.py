"""Quantize a model's routed experts with GPTQModel (runner.py has the arguments that all peers take)."""

from __future__ import annotations

import os

import torch
from runner import BATCH_ROWS, Stopwatch, arguments, import_torchvision, report

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with two cores it makes a pool of no workers, and dies
EXPERTS_ONLY = {
    "-:.*attn.*": {},
    "-:.*shared_expert.*": {},
    "-:.*mtp.*": {},
    "-:.*visual.*": {},
    "-:^(?!.*\\.experts\\.).*mlp\\.(gate|up|down)_proj$": {},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--fallback-share", type=float, help="of all tokens: experts with fewer are rounded")
    options = parser.parse_args()
    torch.set_num_threads(1)  # its quickest here; two threads stall
    import_torchvision()
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    fallback = {"strategy": "rtn", "threshold": f"{100 * options.fallback_share:.6g}%"}
    size = options.group_size
    config = GPTQConfig(bits=4, group_size=size, sym=True, dynamic=EXPERTS_ONLY, fallback=fallback)
    loaded = GPTQModel.load(options.model, config)
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in options.rows]
    watch = Stopwatch()
    log = loaded.quantize(calibration, batch_size=BATCH_ROWS)
    spent = watch.read()
    loaded.save(options.out)
    losses = [row["loss"] for rows in log.values() for row in rows]
    rounded = sum("fallback" in str(loss) for loss in losses)
    report(spent, ("gptqmodel",), projections=len(losses), rounded=rounded)


if __name__ == "__main__":
    main()
