#!/usr/bin/env bash
# make_mistralrs.sh FOLDER    a virtual environment with mistral.rs for CPUs, from PyPI: 0.1 GB, some seconds
#
# A folder that this script has finished before is left as it is.
#   PYTHON=...         the Python to build it with
set -euo pipefail
folder=${1:?usage: make_mistralrs.sh FOLDER}
stamp=$(sha256sum <"${BASH_SOURCE[0]}")

if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
	echo "$folder: ready"
	exit 0
fi
rm -rf "$folder"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: 'mistralrs==0.9.5'
"$folder/bin/python" -c 'import mistralrs'
echo "$stamp" >"$folder/.stamp"
echo "$folder: built"
