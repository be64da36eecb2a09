#!/usr/bin/env bash
#SBATCH --job-name=rethinker
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --signal=B:USR1@600
set -euo pipefail

usage() {
    cat <<'END'
usage: sbatch [sbatch options] scripts/slurm.sh CONFIG [WORD ...]
       scripts/slurm.sh --dry-run CONFIG [WORD ...]

Runs `python -m rethinker_jax.main CONFIG WORD ...`, one process a node with all GPUs of it, in the .venv of the
directory that sbatch was called in. First: python -m venv .venv && .venv/bin/pip install '.[gpu]'. Partition, account,
nodes, GPUs and time are options of sbatch: sbatch -p gpu --gpus-per-node=4 --time=8:00:00 scripts/slurm.sh mine.yaml

Ten minutes before the time is up (--signal), and when the job is preempted, the run saves and stops with 75. 75 puts
the job into the queue again, and the run goes on from its checkpoint. Keep steps shorter than those ten minutes.
The nodes join one job; the directory must lie on a disk that they share. This script has not run on a cluster.
END
}

dry_run=""
case ${1:-} in
    --help | -h) usage && exit ;;
    --dry-run)
        dry_run=yes
        shift
        ;;
esac
if [ $# = 0 ] || [[ $1 == -* ]]; then
    echo "error: ${1:-nothing given}: wanted the CONFIG.yaml to run; scripts/slurm.sh --help" >&2
    exit 2
fi

# A process takes the GPU with its number on the node if jax finds the job by itself; here one process takes them all.
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))
    export JAX_LOCAL_DEVICE_IDS
fi
# One program has the GPUs: let jax take more than three quarters of their memory.
[ -n "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ] || export XLA_CLIENT_MEM_FRACTION=0.92
# NCCL finds InfiniBand and NVLink by itself. Clusters differ in what else it needs; NCCL_* of the shell that calls
# sbatch comes along: NCCL_SOCKET_IFNAME where the first interface is not the fast one, NCCL_DEBUG=INFO to see its choice.

# A process that saves may not be killed because another has saved already.
command=(srun --kill-on-bad-exit=0 --ntasks-per-node=1 .venv/bin/python -m rethinker_jax.main "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit
fi
[ -x .venv/bin/python ] || {
    echo "error: no .venv in $PWD; scripts/slurm.sh --help" >&2
    exit 2
}

# The count goes with the job: another one has another number.
.venv/bin/python -m rethinker_jax.starts "runs/slurm-$SLURM_JOB_ID.starts" "$@"

# To the processes, not to srun: on SIGTERM srun kills them. Signals other than SIGKILL pass the batch script by.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM
"${command[@]}" &
srun=$!
# A signal that is caught ends `wait`, not srun.
code=0
wait "$srun" || code=$?
while kill -0 "$srun" 2>/dev/null; do
    code=0
    wait "$srun" || code=$?
done
# srun gives the highest code: 137, 134 or 142 where a process was killed or aborted and the others left with 75.
case $code in
    75 | 134 | 137 | 142)
        echo "stopped with $code, to go on from the last checkpoint: into the queue again"
        scontrol requeue "$SLURM_JOB_ID"
        ;;
esac
exit "$code"
