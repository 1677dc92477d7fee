# `make demo` and `make test` work on a bare clone with Python and nothing else installed.

PYTHON ?= python3
UNSLOTH ?=
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test aot mutations interpreted check lint types notebooks peft-suite aot-oldest bench
.PHONY: quantised gpu gpu-tests gpu-quantised gpu-linear gpu-step clean

demo: $(READY)  ## fine-tune a real encoder on the standard library's docstrings, offline
	$(BIN)/petune demo

test: $(READY)  ## all tests, with one mutation a kernel and a third of the interpreted cases
	$(BIN)/python -m pytest -n 2 --dist worksteal

aot: $(READY)  ## compile every form of the kernels for every architecture
	PETUNE_AOT=all $(BIN)/python -m pytest -n 2 tests/kernels/test_aot.py

mutations: $(READY)  ## what the tests of the kernels must notice, all of it
	PETUNE_MUTATIONS=all $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/test_mutations.py

interpreted: $(READY)  ## every case of the interpreted kernels' tests
	PETUNE_INTERPRETED=all $(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels/test_interpreter.py

check: lint types test  ## what a change must pass

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/pyright

notebooks: $(READY)  ## run every notebook from top to bottom
	$(BIN)/python -m pytest -n 2 notebooks

peft-suite: $(READY)  ## PEFT's own tests, with our methods in the place of its LoRA; EVERY=4 runs a fourth of them
	$(BIN)/python tests/adapters/peft_suite/run.py -n 2 --every $(or $(EVERY),1)

# the libraries stand aside: transformers imports those that it finds, which takes every process of the tests two seconds
quantised: $(READY)  ## the methods on bases of bitsandbytes and torchao
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --constraint constraints.txt \
		--target $(VENV)/quantised bitsandbytes torchao
	PYTHONPATH=$(VENV)/quantised $(BIN)/python -m pytest -n 2 tests/quantised

# the Triton that came with torch 2.11: what fits the registers in one release may spill in another. One architecture of
# it; `make test` compiles for another with the newest
OLDEST_TRITON := 3.6.0

aot-oldest: $(READY)  ## compile every form of the kernels with the oldest Triton that is supported, for sm_90
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) PETUNE_AOT=90 $(BIN)/python -m pytest -n 2 tests/kernels/test_aot.py

bench: $(READY)  ## the CPU benchmarks, on an idle machine; writes benchmarks/results/*.json
	$(BIN)/python benchmarks/lora_cpu.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/trainer_overhead.py

# PYTHON is one that holds a CUDA build of torch; UNSLOTH a wheel of it, to measure it too. `make -k gpu` goes on to the
# benchmarks where a test fails.
gpu: gpu-tests gpu-quantised gpu-linear gpu-step  ## tests and benchmarks on a CUDA device, in under nine minutes

gpu-tests:
	PETUNE_TEST_DEVICE=cuda $(PYTHON) -m pytest -q -n 12 --dist worksteal tests/kernels/test_cuda.py tests/kernels/triton \
		tests/adapters/test_lora*.py

gpu-quantised:  # bases of the libraries that are installed
	$(PYTHON) -m pytest -q -m gpu tests/quantised

gpu-linear:
	$(PYTHON) benchmarks/lora_linear.py --budget-s 180 $(if $(UNSLOTH),--unsloth $(UNSLOTH))

gpu-step:
	$(PYTHON) benchmarks/lora_step.py --budget-s 150 $(if $(UNSLOTH),--unsloth $(UNSLOTH))

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,notebooks,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
