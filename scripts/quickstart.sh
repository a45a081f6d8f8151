#!/usr/bin/env bash
# From a fresh clone to a comparison: installs, has the bundled checkpoint answer the bundled sample with each method,
# compares the answers in one table, and writes a report with plots. Each run is made afresh below pred/quickstart; other
# predictions stay.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install_environment

methods=(vanilla infinigen)
pred_dir=pred/quickstart
mkdir -p "$pred_dir"

# Side by side, each on one core: so small a model gains little from a second one.
export OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
processes=()
for method in "${methods[@]}"; do
    "$VENV/bin/python" longbench_pred.py --model demo --data sample --sample_rows 2 --sample_tokens 2048 \
        --method "$method" --name "$method" --pred_dir "$pred_dir" --overwrite >"$pred_dir/$method.log" 2>&1 &
    processes+=($!)
done
echo "42 rows are being predicted by ${methods[*]}; about a minute and a half; progress is in $pred_dir/*.log ..."
for index in "${!methods[@]}"; do
    wait "${processes[index]}" || { cat "$pred_dir/${methods[index]}.log" >&2; exit 1; }
done
runs=("${methods[@]/#/$pred_dir/demo/}")
"$VENV/bin/python" longbench_eval.py compare "${runs[@]}" --html "$pred_dir/report.html"
cat <<END

The bundled checkpoint (15 M parameters) is a test that needs no download. Its scores and speeds, and two rows per
dataset, show that the methods work. They say nothing about large models.
1. Plots and rows: open $pred_dir/report.html
2. Your own checkpoint: $VENV/bin/python longbench_pred.py --model FOLDER --method infinigen (README.md)
3. More methods, and your own: $VENV/bin/python longbench_pred.py --list_methods (docs/methods.md)
END
