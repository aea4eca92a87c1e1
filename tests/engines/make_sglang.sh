#!/usr/bin/env bash
# make_sglang.sh FOLDER VLLM    SGLang's Python sources over the packages of the environment that make_vllm.sh made
#
# Without SGLang's CUDA packages: enough to build its models and load weights, not to run them. FOLDER/bin/python sees
# both. A folder that this script has finished before is left as it is.
set -euo pipefail
folder=${1:?usage: make_sglang.sh FOLDER VLLM}
vllm=$(cd "${2:?usage: make_sglang.sh FOLDER VLLM}" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$(cat "$here/make_sglang.sh" "$vllm/.stamp" | sha256sum)

if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
	echo "$folder: ready"
	exit 0
fi
rm -rf "$folder"
"$vllm/bin/python" -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
others=$("$vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
pip() { "$vllm/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
# Installed into this folder's own packages, which come first: SGLang wants another tvm-ffi than vLLM's xgrammar has.
pip install --no-deps --target "$site" \
	'sglang==0.5.23' 'apache-tvm-ffi==0.1.11' 'orjson==3.13.0' 'uvloop==0.23.0' 'gguf==0.19.0'
echo "$others" >"$site/packages-of-vllm.pth"
"$folder/bin/python" -c 'import importlib.util as u; assert u.find_spec("sglang") and u.find_spec("torch")'
echo "$stamp" >"$folder/.stamp"
echo "$folder: built"
