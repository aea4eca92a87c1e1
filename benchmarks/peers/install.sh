#!/usr/bin/env bash
# benchmarks/peers/install.sh PEER    gptqmodel, autoround or llmcompressor for the CPU, in .venv-PEER; quick when it is there
# Three minutes and 2 GB each with torch's CPU build. PYTHON names the Python, TORCH_INDEX a package index for torch.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
requirements=$here/requirements/${1:?usage: install.sh PEER}.txt bare=$here/requirements/$1-bare.txt venv=$here/.venv-$1
stamp=$(cat "$0" "$requirements" "$bare" | sha256sum)
[ "$(cat "$venv/.installed" 2>/dev/null)" = "$stamp" ] && exit 0

rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# First torch, in its CPU build where pip finds one: everything after it takes the torch that is there.
install torch==2.13.0 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
install --requirement "$requirements"
# Without dependencies, one after another: PyPI's torchvision would bring CUDA along, and GPTQModel's metadata asks for a
# newer torch, with which it shares no need.
while read -r requirement; do
	install --no-deps --no-build-isolation "$requirement"
done <"$bare"
echo "$stamp" >"$venv/.installed"
