"""A release as a job on Hugging Face's machines, which goes on after the job's time limit.

    hf jobs uv run --flavor l40sx1 --timeout 6h --attempts 4 --secrets HF_TOKEN -v hf://buckets/ME/fourfold:/data \
        examples/hf_job.py ORG/MODEL ME/NAME

OUT is in a bucket: an attempt that was ended loses one layer at most. More words are options of `fourfold release`, as
`--also gguf,mlx` or `--dry-run`. Tested up to the dry run on a local model; no job was run.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["fourfold[report,gguf]"]
# ///

import os
import subprocess
import sys
from pathlib import Path

if len(sys.argv) < 3:
    sys.exit(__doc__)
model, repo, *more = sys.argv[1:]
out = Path(os.environ.get("OUT_FOLDER", "/data")) / repo.rpartition("/")[2]
command = [sys.executable, "-m", "fourfold", "release", model, repo, "--out", str(out), *more]
sys.exit(subprocess.run(command, check=False).returncode)
