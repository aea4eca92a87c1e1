"""Pictures of one real run on the example model: the terminal, and the report in a browser.

    python docs/make_pictures.py        # docs/images/quantize.svg, report-desktop.png, report-phone.png

Runs `fourfold quantize` with the defaults, as benchmarks/example.py does, so a test holds the figures in the pictures
against benchmarks/results/example.json. Takes about two CPU minutes and needs Chromium. Rich draws the terminal; its
fonts are taken out, since they would be fetched. A PNG carries its figures as a text chunk, `Description`. Plots of
benchmarks are drawn by `make figures` (plots.py).
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import sync_playwright
from results import ROOT, headline
from rich.console import Console
from rich.text import Text

IMAGES = ROOT / "docs" / "images"
WIDTH = 112
MODEL = "examples/tiny-qwen3.6-moe"
RELEASE = "tiny-qwen3.6-moe-int4"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREENS = {  # picture: width, height, colours
    "report-desktop.png": (1280, 900, "light"),
    "report-phone.png": (390, 844, "dark"),
}


def fourfold(folder: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "fourfold", *words]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def terminal(words: list[str], shown: str) -> str:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), markup=False, emoji=False, highlight=False)
    console.print(Text.assemble(("$ ", "green"), (f"fourfold {' '.join(words)}", "bold")))
    console.print(Text(shown.rstrip()))
    picture = console.export_svg(title="fourfold", unique_id="fourfold")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def screenshots(page: Path, browser: str, description: str) -> None:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (width, height, colours) in SCREENS.items():
            size = {"width": width, "height": height}
            view = started.new_page(viewport=size, color_scheme=colours)  # type: ignore[arg-type]
            view.goto(page.as_uri(), wait_until="networkidle")
            chunk = PngInfo()
            chunk.add_text("Description", description)
            Image.open(io.BytesIO(view.screenshot())).save(IMAGES / name, pnginfo=chunk, optimize=True)
        started.close()


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"browser: got none on PATH, expected one of {', '.join(BROWSERS)}. Try: apt install chromium")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "examples").symlink_to(ROOT / "examples")
        words = ["quantize", MODEL, RELEASE]
        picture = terminal(words, fourfold(folder, *words))
        fourfold(folder, "verify", RELEASE)
        fourfold(folder, "report", RELEASE, "--repo", f"me/{RELEASE}", "--quiet")
        metrics = json.loads((folder / RELEASE / "metrics.json").read_text(encoding="utf-8"))
        screenshots(folder / RELEASE / "report.html", browser, ", ".join(headline(metrics["summary"])))
    (IMAGES / "quantize.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
