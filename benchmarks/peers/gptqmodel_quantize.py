"""Quantize a model's routed experts with GPTQModel: runs under the interpreter that gptqmodel.sh made.

    .venv-gptqmodel/bin/python gptqmodel_quantize.py MODEL ROWS.json OUT SHARE [GROUP_SIZE]

ROWS.json: lists of token ids, of one length. SHARE: of all calibration tokens; experts with fewer are rounded.
GROUP_SIZE: input features that share a scale, 128 by default.
The last line of stdout is JSON: seconds, cpu_seconds (of quantize() alone), peak_bytes, projections, rounded, versions.
Start it in a folder of its own: it leaves logs/ there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with two cores it makes a pool of no workers, and dies
BATCH_ROWS = 8
EXPERTS_ONLY = {
    "-:.*attn.*": {},
    "-:.*shared_expert.*": {},
    "-:.*mtp.*": {},
    "-:.*visual.*": {},
    "-:^(?!.*\\.experts\\.).*mlp\\.(gate|up|down)_proj$": {},
}


def import_torchvision() -> None:
    """transformers' image processors import it. PyPI's wheel is linked to CUDA: beside a CPU build of torch its library
    does not load, its operators have no schema, and the import fails where it registers their fakes. None is called.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        schema = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            schema.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
        import_torchvision.schema = schema  # a library's definitions end with it


def main(model: str, rows: str, out: str, share: str, group_size: str = "128") -> None:
    import torch

    torch.set_num_threads(1)  # its quickest here; two threads stall
    import_torchvision()
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    fallback = {"strategy": "rtn", "threshold": f"{100 * float(share):.6g}%"}
    config = GPTQConfig(bits=4, group_size=int(group_size), sym=True, dynamic=EXPERTS_ONLY, fallback=fallback)
    loaded = GPTQModel.load(model, config)
    with open(rows) as file:
        calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.load(file)]
    wall, cpu = time.perf_counter(), time.process_time()
    log = loaded.quantize(calibration, batch_size=BATCH_ROWS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loaded.save(out)
    status = Path("/proc/self/status").read_text().split()
    losses = [row["loss"] for rows in log.values() for row in rows]
    print(
        "\n"
        + json.dumps(
            {
                "seconds": wall,
                "cpu_seconds": cpu,
                "peak_bytes": int(status[status.index("VmHWM:") + 1]) * 1024,
                "projections": len(losses),
                "rounded": sum("fallback" in str(loss) for loss in losses),
                "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
