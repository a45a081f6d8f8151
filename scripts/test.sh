#!/usr/bin/env bash
# Lints, checks types and runs the whole test suite, two files at a time, then what depends on transformers under its
# oldest and newest tested release. Arguments go to pytest (scripts/test.sh -k rope); with any, the releases are left out.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install_environment test
install_kvpress

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
[ "$#" -gt 0 ] || scripts/test_versions.sh
