"""What `evaluate --url --suite quick` and `bench --drafts` tell of the example, in vLLM on this CPU.

    python benchmarks/servers.py --python .engines/vllm/bin/python --json benchmarks/results/servers.json

The release of the default recipe and its source are served side by side and asked the same; then the release is served
with 0 to 3 draft tokens. Answers and acceptance are what counts here: speed on a CPU says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from pathlib import Path

from msgspec import structs

from fourfold.datatypes import Event
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe
from fourfold.records.results import Metrics
from fourfold.release.suite import Servers, evaluate_servers
from fourfold.serve.bench import Load
from fourfold.serve.depths import bench_depths, serving

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny-qwen3.6-moe"
DRAFTS, CONCURRENCY, TOKENS = (0, 1, 2, 3), (1, 4, 16), 64


def tell(event: Event) -> None:
    if event.kind in ("note", "stage") and not event.done:
        print(f"{time.strftime('%T')} {event.stage or ''} {event.text or ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    words = ["--engine", "vllm", "--python", options.python, "--context", f"{options.context}"]
    last = ["--", "--max-num-seqs", f"{max(CONCURRENCY)}"]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "release"
        quantize(MODEL, out, load_recipe("best"), progress=tell)
        whole = Metrics.read(out / "metrics.json")
        begin = time.perf_counter()
        with serving(str(out), 2, [*words, *last]) as url, serving(str(MODEL), 2, [*words, *last]) as source_url:
            asked = evaluate_servers(out, Servers.of(url, source_url, "quick", ()), tell).tasks
        seconds = time.perf_counter() - begin
        load = Load(
            concurrency=CONCURRENCY, requests=None, output_tokens=TOKENS, temperature=0, prompts=None,
            request_seconds=300, level_seconds=600,
        )  # fmt: skip
        depths = bench_depths(str(out), DRAFTS, load, [*words, *last], tell)
    assert asked is not None and whole.summary is not None
    found = {
        "date": f"{datetime.date.today()}", "machine": f"{platform.machine()}", "engine": depths.engine,
        "context": options.context, "seconds": seconds, "kl_whole": whole.summary.kl_mean,
        "tasks": json.loads(json.dumps(structs.asdict(asked), default=lambda value: structs.asdict(value))),
        "levels": [json.loads(json.dumps(structs.asdict(one), default=structs.asdict)) for one in depths.levels],
        "fastest": depths.fastest_drafts,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
