#!/usr/bin/env bash
# From a folder of labelled scans to a table: pretrain without labels, evaluate the frozen features.
#   scripts/benchmark_hn.sh --data DIR             72 people of head and neck, or any nnU-Net folder
#   scripts/benchmark_hn.sh --data DIR --folds 5   every person is a test person once
#   scripts/benchmark_hn.sh --data DIR --validation  for choosing a recipe: without the test people
#   scripts/benchmark_hn.sh --phantom              the same on a synthetic archive
#   scripts/benchmark_hn.sh --help                 all options; key=value arguments change the config
# If you run it again, it skips what is finished. docs/benchmarks.md shows the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh dev
exec .venv/bin/python scripts/benchmark_hn.py "$@"
