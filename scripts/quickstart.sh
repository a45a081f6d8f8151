#!/usr/bin/env bash
# From a fresh clone to a table of scores: installs, predicts the bundled sample with the bundled checkpoint, scores.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install_environment

"$VENV/bin/python" -m sparsecache.demo.checkpoint sparsecache/demo/checkpoint
"$VENV/bin/python" longbench_pred.py --model demo --data sample --name quickstart --overwrite
"$VENV/bin/python" longbench_eval.py --model demo --name quickstart
