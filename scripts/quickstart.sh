#!/usr/bin/env bash
# From a folder of CT scans to evaluated features: set-up, index, pack, train, eval, export, report.
#   scripts/quickstart.sh                a synthetic archive; on 2 cores at most 6 minutes
#   scripts/quickstart.sh --steps 1700   with a fixed number of training steps
#   scripts/quickstart.sh --data DIR     your own scans, with or without labels (docs/data.md)
#   scripts/quickstart.sh --help         all options; key=value arguments change the config
# If you run it again, it skips what is finished.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py "$@"
