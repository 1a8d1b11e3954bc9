# Every target sets up what it needs, in one environment (.venv) and one build folder (build), and skips what is up to
# date. A torch that .venv already has is never replaced; where there is none, $(TORCH) is installed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/ready.stamp
CXX_FILES = $(shell find csrc benchmarks tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build demo test bench lint cuda clean

build: $(READY)

demo: build
	$(BIN)/python -m mplug2.demo

test: build
	$(BIN)/python -m pytest -n $(WORKERS)

bench: build
	set -e; for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench; done

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

# Compiles every CUDA kernel for every architecture and shows registers, spills and instructions; needs nvcc, no GPU.
cuda: build
	$(BIN)/python build_tools/cuda_report.py

clean:
	rm -rf .venv build dist

# Without build isolation the compiler's results stay in build/ and a rebuild takes seconds. Folders of csrc/ are
# listed beside their files because a folder's time changes when a file in it is removed.
$(READY): pyproject.toml CMakeLists.txt $(shell find csrc build_tools -not -path '*/__pycache__*')
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))' \
	  || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | $(BIN)/pip install --quiet cmake ninja --requirement /dev/stdin
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,bench]'
	touch $@
