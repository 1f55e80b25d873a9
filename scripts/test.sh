#!/usr/bin/env bash
# Sets everything up and runs the tests; with --slow the slow ones too. Other arguments go to
# pytest.
#   scripts/test.sh
#   scripts/test.sh --slow
#   scripts/test.sh tests/config/test_config.py -x
# Tests on real scans read TAPCT_TEST_CT (default ../shared/data/ct); without it they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev

options=()
for option in "$@"; do
    if [ "$option" = "--slow" ]; then
        options+=(-m "not slurm and not gpu")
    else
        options+=("$option")
    fi
done
# One process per core and one thread per process: small tensors gain nothing from threads.
# (without OMP_NUM_THREADS, which nproc would print instead of the number of cores)
jobs="${TAPCT_TEST_JOBS:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)}"
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n "$((jobs < 8 ? jobs : 8))" --dist worksteal \
    "${options[@]+"${options[@]}"}"
