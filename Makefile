# `make demo` and `make test` work on a bare clone with Python and nothing else installed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test check lint types notebooks peft-suite bench gpu clean

demo: $(READY)  ## fine-tune a real encoder on the standard library's docstrings, offline
	$(BIN)/petune demo

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: lint types test  ## what a change must pass

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

notebooks: $(READY)  ## run every notebook from top to bottom
	$(BIN)/python -m pytest -n 0 notebooks

peft-suite: $(READY)  ## PEFT's own tests, with our methods in the place of its LoRA
	$(BIN)/python tests/adapters/peft_suite/run.py -n 2

bench: $(READY)  ## the CPU benchmarks, on an idle machine; writes benchmarks/results/*.json
	$(BIN)/python benchmarks/lora_cpu.py
	$(BIN)/python benchmarks/demo.py

gpu:  ## the operators and the fused layer on a CUDA device, with the interpreter given as PYTHON
	PETUNE_TEST_DEVICE=cuda $(PYTHON) -m pytest tests/kernels tests/adapters/test_lora.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,notebooks,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
