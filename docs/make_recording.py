"""The README's picture: a run of `fourfold quantize` on the example model, as the terminal showed it.

    python docs/make_recording.py       # docs/images/quantize.svg

The run is real and takes about a minute. Rich makes the picture; its fonts are taken out, since they would be fetched.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "quantize.svg"
WIDTH = 112
MODEL = "examples/tiny-qwen3.6-moe"


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), markup=False, emoji=False, highlight=False)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": str(WIDTH)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        words = ["quantize", MODEL, "release"]
        console.print(Text.assemble(("$ ", "green"), (f"fourfold {' '.join(words)}", "bold")))
        command = [sys.executable, "-m", "fourfold", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        console.print(Text(done.stdout.rstrip()))
    picture = console.export_svg(title="fourfold", unique_id="fourfold")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
