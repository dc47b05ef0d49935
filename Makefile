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

.PHONY: help setup demo test bench gpu-check clean

help:
	@echo "make setup      virtual environment in $(VENV) with the versions of constraints.txt"
	@echo "make demo       optimize the test model, print before/after, answer a question, draw kept tokens, build TensorRT-RTX engines (in $(OUT)/)"
	@echo "make test       ruff and pytest"
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
	$(RUN) -m pytest -q -n 2 $(TESTS)

bench: setup
	$(RUN) -m benchmarks.ort_vs_hf

# no setup: a GPU machine brings its own torch and transformers, and often no internet
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
