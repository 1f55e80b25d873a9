#!/usr/bin/env bash
# Sets everything up and runs the tests. Other arguments are passed to pytest.
#   scripts/test.sh                        the default tests
#   scripts/test.sh --slow                 the slow tests too
#   scripts/test.sh tests/config -x        the tests of one folder
# Tests on real scans read them from TAPCT_TEST_CT (default ../shared/data/ct) and are skipped if it
# does not exist.
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
# Three processes for two cores, since many tests wait for processes that they start, and one
# thread per process: small tensors gain nothing from threads.
# nproc would print OMP_NUM_THREADS instead of the number of cores.
cores="$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)"
jobs="${TAPCT_TEST_JOBS:-$(((cores * 3 + 1) / 2))}"
export OMP_NUM_THREADS=1
# Tests start many processes: with this variable, each of them would compile its modules again.
unset PYTHONDONTWRITEBYTECODE
exec .venv/bin/python -m pytest -q -n "$((jobs < 8 ? jobs : 8))" --dist worksteal \
    "${options[@]+"${options[@]}"}"
