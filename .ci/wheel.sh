#!/usr/bin/env bash
# Builds dist/: an sdist, and from it a wheel with an honest manylinux tag; then tests that wheel in
# an empty environment. Python (with the dev extra) from $PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

rm -rf dist
"$PYTHON" setup.py -q sdist --dist-dir dist
"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WORK/built" dist/*.tar.gz
# libgomp stays out: with torch's own there is one thread pool, with a grafted copy there are two.
PATH="$(dirname "$PYTHON"):$PATH" "$PYTHON" -m auditwheel repair \
  --exclude libgomp.so.1 --wheel-dir dist "$WORK"/built/*.whl
WHEEL=$(ls dist/*.whl)

SIZE=$(stat -c %s "$WHEEL")
echo "$WHEEL: $SIZE bytes"
test "$SIZE" -lt 2097152 || { echo "wheel.sh: above 2 MB" >&2; exit 1; }

"$PYTHON" -m venv "$WORK/venv"
"$WORK/venv/bin/python" -m pip install --quiet --constraint constraints.txt \
  "$WHEEL" torch pytest pytest-timeout hypothesis numpy
MODULE=$(cd "$WORK" && venv/bin/python -c "import finegates._native as n; print(n._C.__file__)")
SYMBOLS=$(nm -D --defined-only "$MODULE" | awk '{print $3}')
test "$SYMBOLS" = PyInit__C || { echo "wheel.sh: exports $SYMBOLS" >&2; exit 1; }
case "$MODULE" in "$WORK"/venv/*) ;; *) echo "wheel.sh: tested $MODULE" >&2; exit 1 ;; esac

mkdir "$WORK/tests"
cp tests/{conftest,levels,numerics,cpu_layer,test_cpu_*,test_packed}.py "$WORK/tests"
cp pyproject.toml "$WORK"
cd "$WORK"
"$WORK/venv/bin/python" -m pytest -q tests
