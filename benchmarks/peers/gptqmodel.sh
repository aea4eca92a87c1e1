#!/usr/bin/env bash
# benchmarks/peers/gptqmodel.sh [VENV]    GPTQModel 7.7.0 for the CPU in an environment of its own; quick when it is there
# About three minutes and 2 GB with torch's CPU build. PYTHON names the Python to build it with.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
venv=${1:-$here/.venv-gptqmodel}
done_mark=$venv/.installed
[ "$done_mark" -nt "$0" ] && exit 0

"${PYTHON:-python3}" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# First torch, in its CPU build where pip finds one: everything after it takes the torch that is there.
install torch==2.13.0 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
install transformers==5.23.0 safetensors pillow requests setuptools wheel ninja packaging accelerate datasets device-smi \
    threadpoolctl random-word tokenizers dill numpy huggingface_hub protobuf sentencepiece
# --no-deps: its metadata asks for a newer torch, with which it shares no need; PyPI's torchvision brings CUDA along.
install --no-deps logbar==0.4.15 tokenicer==0.0.14 defuser==0.0.28 pypcre torchvision==0.28.0
install --no-deps --no-build-isolation gptqmodel==7.7.0
touch "$done_mark"
