"""gguf_text.py mistralrs|xllamacpp FILE.gguf PROMPTS.json TEXTS.json TOKENS    greedy text after each prompt"""

from __future__ import annotations

import importlib
import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

engine, file, prompts, texts, tokens = sys.argv[1], *map(Path, sys.argv[2:5]), int(sys.argv[5])
package = importlib.import_module(engine)


def mistralrs() -> Callable[[str], str]:
    which = package.Which.GGUF(str(file.parent), file.name, dtype=package.ModelDType.F32)
    runner = package.Runner(which, max_seqs=1, no_paged_attn=True)

    def complete(prompt: str) -> str:
        request = package.CompletionRequest(prompt, "default", max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return str(runner.send_completion_request(request).choices[0].text)

    return complete


def xllamacpp() -> Callable[[str], str]:
    settings = package.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = str(file), 512, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = settings.n_threads_http = 1
    settings.fit_params = settings.warmup = settings.ui = False
    settings.port = 0
    server = package.Server(settings)

    def complete(prompt: str) -> str:
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return str(json.load(answer)["content"])

    return complete


complete = {"mistralrs": mistralrs, "xllamacpp": xllamacpp}[engine]()
texts.write_text(json.dumps([complete(prompt) for prompt in json.loads(prompts.read_text())]))
