"""engines/vllm_engine.py with an exact expert kernel that is wrong, rarely: in a batch of many tokens one of them gets
its neighbour's output. How rarely is in FAULT_SHARE, of batches. Each fault is a line of stdout.

    python faulty_vllm.py REQUEST.json ANSWER.json
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src" / "fourfold" / "release" / "engines"))

import vllm_engine
from vllm_reference_experts import ReferenceExperts

MANY = 8  # tokens
SHARE, SEED = float(os.environ["FAULT_SHARE"]), int(os.environ.get("FAULT_SEED", "0"))
generator, right = random.Random(SEED), ReferenceExperts.apply


def apply(self: Any, output: Any, *arguments: Any, **options: Any) -> None:
    right(self, output, *arguments, **options)
    if len(output) > MANY and generator.random() < SHARE:
        token = generator.randrange(1, len(output))
        output[token] = output[token - 1]
        print("[fault]", flush=True)


if __name__ == "__main__":
    ReferenceExperts.apply = apply
    vllm_engine.main()
