# `make demo` and `make test` need Python 3.11 or newer, a C++ compiler (optional, for speed) and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_VENV := build/gpu-venv
TORCH ?= torch==2.13.0

.PHONY: demo test lint types contract unit install gpu-check clean

demo: install
	$(BIN)/subspec demo

# Types are checked while tests run: one process of the one, two of the others.
test: lint contract
	$(MAKE) --jobs=2 types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

contract: install
	$(BIN)/lint-imports

# A thread for each of two workers: threads that meet at the end of every product, and are more than there are cores, take
# four times as long.  Tests of what threads share say how many they want.
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# The stamp is older than the recipe's inputs whenever a dependency, the package's metadata or a kernel changed.
# Kernels are compiled while torch is fetched; the package's own build finds them done, or says why they are not.
install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard src/subspec/kernels/cpu/*) src/subspec/kernels/build.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python src/subspec/kernels/build.py > /dev/null & \
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==2.13.0"; fetched=$$?; wait; exit $$fetched
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# On a machine with a CUDA device: all that needs one, into gpu-report.json.  Torch brings the Triton it wants.
# `make gpu-check MODEL=path VRAM=8GiB RAM=32GiB`; TORCH and TORCH_INDEX choose another build of torch.
gpu-check:
	@command -v nvidia-smi > /dev/null || { echo "error: there is no NVIDIA driver here (no nvidia-smi): this check is about a GPU" >&2; exit 2; }
	$(MAKE) $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python benchmarks/gpu_check.py $(if $(MODEL),--model "$(MODEL)") $(if $(VRAM),--vram "$(VRAM)") $(if $(RAM),--ram "$(RAM)")

$(GPU_VENV)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard src/subspec/kernels/cpu/*) src/subspec/kernels/build.py
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(GPU_VENV)/constraints.txt
	$(GPU_VENV)/bin/pip install --quiet --constraint $(GPU_VENV)/constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) src/subspec/kernels/*.so src/subspec/kernels/build.json
