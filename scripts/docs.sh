#!/usr/bin/env bash
# Builds the documentation into site/; a warning or a dead link is an error.
#   scripts/docs.sh            open site/index.html, no server is needed
#   scripts/docs.sh --serve    shows it at http://127.0.0.1:8000 and follows changes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! .venv/bin/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null; then
    scripts/setup.sh dev
fi
export NO_MKDOCS_2_WARNING=true # about a future mkdocs, which pyproject.toml excludes
if [ "${1:-}" = "--serve" ]; then
    exec .venv/bin/python -m mkdocs serve --strict
fi
exec .venv/bin/python -m mkdocs build --strict --quiet "$@"
