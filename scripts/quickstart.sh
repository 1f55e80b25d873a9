#!/usr/bin/env bash
# From a folder of CT scans to evaluated features: set-up, index, pack, train, eval, export, report.
#   scripts/quickstart.sh                a synthetic archive; about 6 minutes on 2 cores
#   scripts/quickstart.sh --data DIR     your own scans (NIfTI, NRRD, MHA, DICOM), labels optional
#   scripts/quickstart.sh --help         all options; key=value arguments change the config
# A second call reuses finished steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
exec .venv/bin/python scripts/quickstart.py "$@"
