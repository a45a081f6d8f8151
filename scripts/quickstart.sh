#!/usr/bin/env bash
# Installs the project, decodes synthetic rows with the bundled checkpoint and each method, prints one table, and writes
# a report with plots. Replaces earlier runs in pred/quickstart only.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
install_environment

methods=(vanilla infinigen)
pred_dir=pred/quickstart
mkdir -p "$pred_dir"

# In parallel, each on one core: a model this small gains little from a second one.
export OMP_NUM_THREADS=1
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
processes=()
for method in "${methods[@]}"; do
    "$VENV/bin/python" longbench_pred.py --model demo --data sample --sample_rows 2 --sample_tokens 2048 \
        --method "$method" --name "$method" --pred_dir "$pred_dir" --overwrite >"$pred_dir/$method.log" 2>&1 &
    processes+=($!)
done
echo "Decoding 42 rows with each of: ${methods[*]}. This takes about a minute and a half. Progress: $pred_dir/*.log"
for index in "${!methods[@]}"; do
    wait "${processes[index]}" || { cat "$pred_dir/${methods[index]}.log" >&2; exit 1; }
done
runs=("${methods[@]/#/$pred_dir/demo/}")
"$VENV/bin/python" longbench_eval.py compare "${runs[@]}" --html "$pred_dir/report.html"
cat <<END

The installation works. The bundled checkpoint has 15 M parameters, so these scores say nothing about large models.
Next:
1. Plots and rows: open $pred_dir/report.html
2. Your own checkpoint: $VENV/bin/python longbench_pred.py --model FOLDER --method infinigen (README.md)
3. More methods, and your own: $VENV/bin/python longbench_pred.py --list_methods (docs/methods.md)
END
