"""Score a text in mlx-lm. Runs under the interpreter of its environment.

    python mlx_engine.py REQUEST.json ANSWER.json

REQUEST: model (folder), tokens (ids), likeliest (ids whose log-probabilities are wanted, for each token but the last).
ANSWER: engine, logprobs (of these ids), best (the most likely id at each place).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy
from mlx_lm.utils import load_model


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    model, _ = load_model(Path(request["model"]))
    logits_TV = model(mx.array([request["tokens"][:-1]]))[0].astype(mx.float32)
    logprob_TV = numpy.array(logits_TV - mx.logsumexp(logits_TV, axis=-1, keepdims=True))
    answer = {
        "engine": f"mlx-lm {importlib.metadata.version('mlx-lm')}, {mx.default_device()}",
        "logprobs": numpy.take_along_axis(logprob_TV, numpy.array(request["likeliest"]), axis=-1).tolist(),
        "best": logprob_TV.argmax(axis=-1).tolist(),
    }
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
