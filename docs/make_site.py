"""The documentation as a site: pages of docs/, built by Zensical.

    python docs/make_site.py            # build/site; a warning, such as a broken link, is an error
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"
BUILD = ["zensical", "build", "--clean", "--strict", "--config-file", str(ROOT / "zensical.toml")]

if __name__ == "__main__":
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    sys.exit(subprocess.run([sys.executable, "-m", *BUILD], check=False).returncode)
