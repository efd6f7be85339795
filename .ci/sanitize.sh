#!/usr/bin/env bash
# Sanitizers over the native core: `.ci/sanitize.sh [SECONDS]` for each run, Python from $PYTHON.
#   1. address + undefined behaviour: the fuzz at every level, and at the last one tuned for
#      either processor, then the native Python tests
#   2. threads: eight fuzzing at once, each with teams of its own
#   3. aarch64 under qemu-user, where the cross compiler is installed
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS_EACH=${1:-20}
SEED=${SEED:-1}
SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=all"

build() { # folder, flags, more arguments
  CXXFLAGS="-O1 $2" LDFLAGS="$2 ${LINK:-}" "$PYTHON" setup.py -q build_fuzz --folder "$1" "${@:3}"
}

build build/fuzz-asan "$SANITIZE"
for level in generic avx2 avx512 avx512bf16; do
  said=$(FINEGATES_MAX_ISA=$level build/fuzz-asan/native_fuzz "$SECONDS_EACH" "$SEED")
  echo "$said"
  case $said in *" on $level") ;; *) echo "sanitize.sh: $level skipped, not on this CPU" >&2 ;; esac
done

for tune in zen4 zen5; do
  FINEGATES_TUNE=$tune build/fuzz-asan/native_fuzz "$SECONDS_EACH" "$SEED"
done

build build/fuzz-tsan "-fsanitize=thread"
build/fuzz-tsan/native_fuzz "$SECONDS_EACH" "$SEED" 8

if command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64 > /dev/null; then
  CXX=aarch64-linux-gnu-g++ LINK=-static build build/fuzz-aarch64 "" --machine aarch64
  qemu-aarch64 build/fuzz-aarch64/native_fuzz "$SECONDS_EACH" "$SEED"
else
  echo "sanitize.sh: aarch64 skipped, needs aarch64-linux-gnu-g++ and qemu-aarch64" >&2
fi

# The module itself, built and tested in a copy of the tree: the one in place stays as it is.
COPY=$(mktemp -d)
trap 'rm -rf "$COPY"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -P -t "$COPY"
cd "$COPY"
CXXFLAGS="-O1 -g $SANITIZE" LDFLAGS="$SANITIZE" "$PYTHON" setup.py -q build_ext --inplace
# Python itself leaks at exit; torch must find libasan loaded first, which needs more address space
# than the tests without memory leave.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 FINEGATES_MAX_ISA=avx512bf16 \
  "$PYTHON" -m pytest -q -p no:cacheprovider \
  tests/test_cpu_*.py tests/test_packed.py tests/test_packed_embedding.py -k "not no_memory"
