#!/usr/bin/env bash
# make_mlx.sh FOLDER    a virtual environment with MLX for CPUs, mlx-lm and mlx-vlm, from PyPI (glibc 2.35 or newer)
#
# 0.5 GB, half a minute with a package cache. A folder that this script has finished before is left as it is.
#   PYTHON=...         the Python to build it with
set -euo pipefail
folder=${1:?usage: make_mlx.sh FOLDER}
stamp=$(sha256sum <"${BASH_SOURCE[0]}")

if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
	echo "$folder: ready"
	exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
install 'mlx==0.32.4' 'mlx-cpu==0.32.4' 'mlx-lm==0.32.2' 'transformers==5.23.0' 'pillow==13.0.0' 'requests==2.34.2'
# Without its servers, audio and training.
install --no-deps 'mlx-vlm==0.7.10'
"$folder/bin/python" -c 'import mlx.core, mlx_lm, mlx_vlm'
echo "$stamp" >"$folder/.stamp"
echo "$folder: built"
