#!/usr/bin/env bash
# Checks for the tools that pip cannot install: a C++20 compiler, CMake, GoogleTest, Boost.Context, and a Python with
# venv and headers. Root gets missing Debian packages installed, other users one line that lists them.
# Usage: build_tools/check_system.sh [python [other commands to look for, named like their packages]]
set -euo pipefail
python=${1:-python3}
others=("${@:2}")
oldest_gcc=12

has_compiler() { [ "$(g++ -dumpversion 2>/dev/null | cut -d. -f1 || true)" -ge "$oldest_gcc" ] 2>/dev/null; }
has_gtest() { echo '#include <gtest/gtest.h>' | g++ -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; }
has_boost() { echo '#include <boost/context/fiber.hpp>' | g++ -std=c++20 -fsyntax-only -x c++ - 2>/dev/null; }
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
  "$python" -c 'import os, sysconfig as s; assert os.path.exists(s.get_path("include") + "/Python.h")' 2>/dev/null
}

missing_packages() {
  has_compiler || echo g++
  command -v make >/dev/null || echo make
  command -v cmake >/dev/null || echo cmake
  has_gtest || echo libgtest-dev
  has_boost || echo libboost-context-dev
  command -v "$python" >/dev/null || echo python3
  has_venv || echo python3-venv
  has_headers || echo python3-dev
  local other
  for other in "${others[@]}"; do
    command -v "$other" >/dev/null || echo "$other"
  done
}

missing=$(missing_packages | tr '\n' ' ')
if [ -n "$missing" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing Debian packages: $missing"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null
  # shellcheck disable=SC2086  # a list of words
  apt-get install -y -qq --no-install-recommends $missing >/dev/null
  missing=$(missing_packages | tr '\n' ' ')
fi
if [ -n "$missing" ]; then
  echo "Please install (Debian's names; g++ $oldest_gcc or newer): $missing" >&2
  exit 1
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "Python 3.10 or newer is needed, $python is $("$python" --version); choose with: make PYTHON=..." >&2
  exit 1
}
