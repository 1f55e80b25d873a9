#!/usr/bin/env bash
# Sets everything up and runs the tests: the default tier, or with --slow the slow ones too. More words go to pytest.
#   scripts/test.sh                     scripts/test.sh --slow                scripts/test.sh tests/test_config.py -x
# Real scans are taken from TAPCT_TEST_CT (default ../shared/data/ct); without them their tests are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev

words=()
for word in "$@"; do
    if [ "$word" = "--slow" ]; then words+=(-m "not slurm and not gpu"); else words+=("$word"); fi
done
# One process per core and one thread per process: small tensors gain nothing from threads.
jobs="${TAPCT_TEST_JOBS:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)}" # nproc takes that variable's word
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -n "$((jobs < 8 ? jobs : 8))" --dist worksteal "${words[@]+"${words[@]}"}"
