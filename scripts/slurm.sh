#!/usr/bin/env bash
# Runs a command on a Ray cluster over all machines of a Slurm job: sbatch scripts/slurm.sh COMMAND...
#
#   sbatch --nodes=2 scripts/slurm.sh python longbench_pred.py --model llama-3.1-8b-instruct --workers 16 \
#       --ray_address auto --name vanilla
#
# The folder that sbatch is called from, this clone with its .venv, must lie on a file system that all machines share.
# Adapt the lines below to the cluster, or override them on sbatch's command line.
#SBATCH --job-name=sparsecache
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=B:INT@60
set -euo pipefail
[ $# -gt 0 ] || { echo "Give the command to run on the cluster: sbatch scripts/slurm.sh COMMAND..." >&2; exit 2; }
[ -n "${SLURM_JOB_NODELIST:-}" ] || { echo "This is a batch script of Slurm: start it with sbatch." >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
. "${VENV:-.venv}/bin/activate"

# Whoever has the token may run code on the cluster; jobs of other users on the same machines have it not.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() { exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" "${@:2}"; }
head="$(on "${machines[0]}" hostname --ip-address | awk '{ print $1 }')"
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a machine have heads of their own
export RAY_ADDRESS="$head:$port"

common=(--block "--num-cpus=${SLURM_CPUS_PER_TASK:-1}" --object-store-memory=134217728)
on "${machines[0]}" ray start --head "--node-ip-address=$head" "--port=$port" --include-dashboard=false "${common[@]}" &
steps=($!)
trap 'kill "${steps[@]}" 2>/dev/null || true' EXIT
for machine in "${machines[@]:1}"; do
    on "$machine" ray start "--address=$RAY_ADDRESS" "${common[@]}" &
    steps+=($!)
done

python scripts/await_cluster.py "${#machines[@]}" &
steps+=($!)
wait -n "${steps[@]}" || exit 1 # whichever comes first: all have joined, or one could not start
if kill -0 "${steps[-1]}" 2>/dev/null; then echo "Ray ended on a machine before all had joined." >&2; exit 1; fi

# Slurm sends SIGINT a minute before the time is up: the command ends with what it has, and the next job goes on.
set -m # else a command in the background would not hear SIGINT
"$@" &
command=$!
set +m
trap 'kill -INT "$command" 2>/dev/null || true' INT TERM
code=0
wait "$command" || code=$?
while kill -0 "$command" 2>/dev/null; do wait "$command" || code=$?; done
exit "$code"
