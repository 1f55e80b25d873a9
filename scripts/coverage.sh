#!/usr/bin/env bash
# Runs the tests and prints how many lines of tapct they execute, also those that run in processes
# which the tests start. Arguments are passed to pytest, as in scripts/test.sh. Tests that look at
# the modules or files of a process may fail here, since the measurement adds some of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -f .coverage .coverage.*
# Every Python that finds this variable measures itself, and writes beside this file.
export COVERAGE_PROCESS_START="$PWD/pyproject.toml" COVERAGE_FILE="$PWD/.coverage"
scripts/test.sh "$@" || echo "Some tests failed: the lines that they did not reach are missing."
unset COVERAGE_PROCESS_START
# A killed process leaves a file without data, which is skipped with a warning.
.venv/bin/python -m coverage combine --quiet 2>/dev/null || true
exec .venv/bin/python -m coverage report --show-missing --skip-covered --sort=cover
