#!/usr/bin/env bash
# Runs a sweep from a small file (configs/sweeps/) and prints one table of its runs:
#   scripts/sweep.sh FILE [--model MODEL] [--dry_run] [-- arguments of every run]
set -euo pipefail
here="$PWD"
. "$(dirname "$0")/environment.sh"
install_environment

python="$(realpath --no-symlinks "$VENV/bin/python")"
script="$PWD/scripts/sweep.py"
cd "$here"
exec "$python" "$script" "$@"
