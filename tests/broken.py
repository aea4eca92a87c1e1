"""Releases to break: every change but one that is meant to be seen is recorded as if it had been written so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints

Change = Callable[[dict[str, Tensor]], object]


class Copy:
    """A release of our own to break."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, name: str, change: Callable[[dict[str, Any]], object]) -> Copy:
        checkpoints.edit_json(self.folder / name, change)
        return self

    def tensors(self, change: Change) -> Copy:
        """Apply `change` to the tensors of each shard, and record the new shards: what is wrong is not the hash."""
        weight_map: dict[str, str] = {}
        total = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, path.name)
            total += sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return self.record()

    def record(self) -> Copy:
        def renew(state: dict[str, Any]) -> None:
            for name, shard in state["output"]["shards"].items():
                shard["sha256"] = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()

        return self.json("fourfold.json", renew)
