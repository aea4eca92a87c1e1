"""Quantize a model's routed experts with AutoRound (runner.py has the arguments that all peers take).

200 iterations with batches of 8, its defaults. An expert that no token reaches stays rounded to nearest, and nothing
says so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from runner import BATCH_ROWS, Stopwatch, arguments, import_torchvision, report

ITERATIONS = 200
KEPT = "self_attn,linear_attn,shared_expert,mlp.gate,visual,mtp,lm_head"


def batches(row_RT: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    parts = row_RT.split(BATCH_ROWS)
    return [{"input_ids": part_RT, "attention_mask": torch.ones_like(part_RT)} for part_RT in parts]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of batches")
    parser.add_argument("--alg-ext", action="store_true", help="with enable_alg_ext")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_torchvision()
    from auto_round import AutoRound

    row_RT = torch.tensor(options.rows)
    rows, length = row_RT.shape
    extended = {"enable_alg_ext": True} if options.alg_ext else {}
    tool = AutoRound(
        options.model,
        scheme="W4A16",
        group_size=options.group_size,
        ignore_layers=KEPT,
        dataset=batches(row_RT),
        nsamples=rows,
        seqlen=length,
        batch_size=BATCH_ROWS,
        iters=ITERATIONS,
        seed=options.seed,
        device_map="cpu",
        **extended,
    )
    watch = Stopwatch()
    tool.quantize_and_save(output_dir=options.out, format="auto_gptq")
    spent = watch.read()
    folder = next(Path(options.out).rglob("config.json")).parent  # it adds one, of the model's name and the scheme
    for path in folder.iterdir():
        path.rename(Path(options.out) / path.name)
    report(spent, ("auto-round",))


if __name__ == "__main__":
    main()
