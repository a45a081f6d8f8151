#!/usr/bin/env bash
# Lints, checks types and runs the whole test suite, two files at a time.
# Arguments go to pytest (scripts/test.sh -k rope).
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install_environment test

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
