# What a fresh clone needs: make, git, and Python 3.11 or newer with venv. Everything else goes into .venv.
#
#   PYTHON=/path/to/python      the Python to build .venv with (else the first that fits)
#   TORCH_INDEX=URL             one more package index for torch; https://download.pytorch.org/whl/cpu has the builds
#                               without CUDA, which are gigabytes smaller than PyPI's
#   ARGS="-k plan -x"           more arguments for pytest, or for a benchmark

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-all test-engine test-package check docs figures reference audit bench-example bench-quality bench-peers bench-ablation bench-real bench-speed clean

VENV := .venv
ENGINES := .engines
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := examples/tiny-qwen3.6-moe
RELEASE := demo/tiny-qwen3.6-moe-int4
# 0.005: GPTQModel's default
REAL := --model real-moe --windows 16 --fallback-share 0.005 --seeds 0 1 --methods rtn gptqmodel fast best guided
PEERS := gptqmodel autoround autoround-alg-ext llmcompressor llmcompressor-routed

# 3.11 first: constraints.txt was tried with it. A name may be there and still not run (pyenv's shims), so each is run.
FITS = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
FIND_PYTHON = for python in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	"$$python" -c '$(FITS)' >/dev/null 2>&1 && { echo "$$python"; break; }; done
PYTHON ?= $(shell $(FIND_PYTHON))

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## plan and quantize the example model into demo/; a second run only shows the result
	$(BIN)/fourfold plan $(MODEL) --devices cpu
	$(BIN)/fourfold quantize $(MODEL) $(RELEASE) --devices cpu

test: $(INSTALLED)  ## the tests that take a few minutes without a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu and not engine" $(ARGS)

PARALLEL := -n auto --maxprocesses 4 --dist loadfile  # a process for a core; a file of tests in one of them

test-slow: $(INSTALLED)  ## the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu and not engine" $(ARGS)

test-all: $(INSTALLED)  ## both, in one run: what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not engine" $(ARGS)

test-engine: $(INSTALLED)  ## real vLLM, llama.cpp, mistral.rs, MLX, and SGLang's loader: built once into .engines (4 GB, some minutes), then their tests
	PYTHON=$(BIN)/python TORCH_INDEX=$(TORCH_INDEX) tests/engines/make_vllm.sh $(ENGINES)/vllm
	tests/engines/make_sglang.sh $(ENGINES)/sglang $(ENGINES)/vllm
	PYTHON=$(BIN)/python tests/engines/make_llama_cpp.sh $(ENGINES)/llama.cpp
	PYTHON=$(BIN)/python tests/engines/make_mlx.sh $(ENGINES)/mlx
	PYTHON=$(BIN)/python tests/engines/make_mistralrs.sh $(ENGINES)/mistralrs
	$(BIN)/python -m pytest -m engine $(ARGS)

test-package:  ## wheel and sdist; the wheel in empty environments, with the lowest and the newest versions it allows
	PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" .ci/package

check: $(INSTALLED) docs  ## figures and reference in docs, lint, types, which package imports which, docs without a warning
	$(BIN)/python docs/figures.py --check
	$(BIN)/python docs/make_reference.py --check
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

reference: $(INSTALLED)  ## write docs/reference from the code: options, recipe keys, docstrings
	$(BIN)/python docs/make_reference.py

docs: $(INSTALLED)  ## the documentation's site, into build/site
	$(BIN)/python docs/make_site.py

audit: $(INSTALLED)  ## known weaknesses of the installed packages, asked of PyPI; one that it does not know is an error
	$(BIN)/python -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >build/audit/installed.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/audit/installed.txt

figures: $(INSTALLED)  ## predictions of the plan, then every figure and plot in README and docs, from benchmarks/results
	$(BIN)/python benchmarks/predictions.py --json benchmarks/results/predictions.json >/dev/null
	$(BIN)/python docs/figures.py

bench-example: $(INSTALLED)  ## the example model: time, memory, quality, and how close the plan came
	$(BIN)/python benchmarks/example.py --json benchmarks/results/example.json
	$(BIN)/python benchmarks/predictions.py --measure benchmarks/results/plan.json

bench-quality: $(INSTALLED)  ## quality beside GPTQModel: half an hour the first time
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python benchmarks/quality.py --json benchmarks/results/quality.json $(ARGS)

bench-peers: $(INSTALLED)  ## quality beside GPTQModel, AutoRound and llm-compressor: two hours the first time
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python benchmarks/quality.py --methods rtn $(PEERS) fast best guided --tokens 65536 \
		--text wikitext-2-test chat \
		--json benchmarks/results/quality_peers.json benchmarks/results/quality_peers_chat.json $(ARGS)

bench-ablation: $(INSTALLED)  ## quality of `best` without each of its ingredients: half an hour the first time
	$(BIN)/python benchmarks/quality.py --ablation --json benchmarks/results/quality_ablation.json $(ARGS)

bench-real: $(INSTALLED)  ## quality on a model with real activations, which is built first: many hours the first time
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python benchmarks/quality.py $(REAL) --tokens 16384 32768 65536 131072 \
		--text wikitext-2-test .cache/real-moe/code.txt chat --json benchmarks/results/quality_real.json \
		benchmarks/results/quality_real_code.json benchmarks/results/quality_real_chat.json $(ARGS)

bench-speed: $(INSTALLED)  ## a layer beside GPTQModel and beside this machine's GEMM rate: half an hour
	$(BIN)/python benchmarks/gemm_rate.py --device cpu --threads 1
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python benchmarks/speed.py --rounds 2 --json benchmarks/results/speed.json
	$(BIN)/python benchmarks/full_layer.py --json benchmarks/results/full_layer_best.json
	$(BIN)/python benchmarks/full_layer.py --recipe fast --json benchmarks/results/full_layer_fast.json

clean:  ## remove .venv, .engines, the demo's output and caches
	rm -rf $(VENV) $(ENGINES) benchmarks/peers/.venv-* .cache demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11 or newer with venv was found. Install one (Debian, Ubuntu: apt install python3 python3-venv;" >&2; \
		echo "elsewhere: https://www.python.org/downloads/) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	if ! "$$python" -c '$(FITS)'; then \
		echo "PYTHON=$$python does not run, is older than 3.11, or has no venv and ensurepip" >&2; exit 1; \
	fi; \
	[ -x $(BIN)/python ] || { echo "$$python -m venv $(VENV)"; "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --editable '.[dev]' --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@
