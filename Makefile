# make demo  -- the main job on the shipped test model: optimize, measure, answer, draw, build engines
# make test  -- lint and tests

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.installed
OUT ?= out
TESTS ?= tests

export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup demo test nightly bench gpu-check clean

help:
	@echo "make setup      virtual environment in $(VENV) with the versions of constraints.txt"
	@echo "make demo       optimize the test model, print before/after, answer a question, draw kept tokens, build TensorRT-RTX engines (in $(OUT)/)"
	@echo "make test       ruff and pytest"
	@echo "make nightly    10,000 random cuts against the mask-only oracle"
	@echo "make bench      the speed table on ONNX Runtime (benchmarks/)"
	@echo "make gpu-check  one run on a machine with a CUDA torch, no internet needed: JSON and table in \$$OUT or benchmarks/results"

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[rtx,dev]"
	touch $(SETUP)

demo: setup
	$(RUN) examples/demo.py --output $(OUT)/demo

test: setup
	$(VENV)/bin/ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile $(TESTS)

# 10,000 random (layer, keep, batch, images, padding) against the mask-only oracle
nightly: setup
	OMP_NUM_THREADS=1 FOVEATE_ORACLE_CASES=1000 $(RUN) -m pytest -q -n 2 tests/passes/test_every_method.py -k oracle

bench: setup
	$(RUN) -m benchmarks.ort_vs_hf

# no setup: a GPU machine brings its own torch and transformers, and often no internet
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
