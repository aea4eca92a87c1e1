"""Quantize a model's routed experts with llm-compressor's GPTQ (runner.py has the arguments that all peers take).

By default every expert is calibrated on all tokens of its layer. With --routed-only it gets those that the router sends
to it; an expert without any is written as zeros, and nothing says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from runner import Stopwatch, arguments, import_torchvision, report
from torch.utils.data import DataLoader

TARGETS = [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--routed-only", action="store_true", help="with moe_calibrate_all_experts=False")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_torchvision()
    import transformers
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe
    from llmcompressor.modifiers.gptq import GPTQModifier

    config = json.loads((Path(options.model) / "config.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    with load_quantizable_moe(architecture):
        model = architecture.from_pretrained(options.model, dtype="auto")
    scheme = preset_name_to_scheme("W4A16", TARGETS)
    scheme.weights.group_size = options.group_size
    samples = [{"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
               for ids in options.rows]  # fmt: skip
    watch = Stopwatch()
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=1),
        recipe=[GPTQModifier(config_groups={"experts": scheme}, ignore=["lm_head", "re:.*mtp.*"])],
        num_calibration_samples=len(samples),
        max_seq_length=len(options.rows[0]),
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=not options.routed_only,
    )
    spent = watch.read()
    model.save_pretrained(options.out, save_compressed=True)
    report(spent, ("llmcompressor", "compressed-tensors"))


if __name__ == "__main__":
    main()
