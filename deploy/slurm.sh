#!/bin/bash
# The whole pipeline as one Slurm job, training on all of its nodes. From a clone on a file system that the nodes share:
#
#   make .venv/installed && mkdir -p scratch
#   sbatch --nodes=4 --gpus-per-node=8 deploy/slurm.sh
#
# Before preemption or the time limit Slurm sends SIGTERM to the training, which saves its state and ends with code 75;
# the job is then queued again under its number and goes on. torchrun's variables are taken over: to train on with the
# nodes that are left when one is lost, PET_NNODES=1:4 sbatch --no-kill ...
#SBATCH --job-name=detr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=scratch/slurm-%j.log
set -euo pipefail

if [[ ! -f dvc.yaml ]]; then
    echo "error: no dvc.yaml in $PWD; submit from the root of the project: sbatch deploy/slurm.sh" >&2
    exit 1
fi
export PATH="$PWD/.venv/bin:$PATH"
trap : TERM # Slurm's signal is for the training; this script waits for its end

stage() { python -m dvc --wait-for-lock repro --single-item "$1"; }

train() {
    local code=0 hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export PET_NNODES="${PET_NNODES:-$SLURM_NNODES}"
    export PET_RDZV_ENDPOINT="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))"
    export PET_RDZV_ID="$SLURM_JOB_ID"
    # One torchrun agent per node. After the first has ended the others have ten minutes: more than a state takes.
    srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
        --kill-on-bad-exit=0 --wait=600 python -m pipelines.train || code=$?
    if ((code == 75)); then
        scontrol requeue "$SLURM_JOB_ID" || echo "error: Slurm does not requeue; submit again, it goes on" >&2
    fi
    if ((code)); then
        exit "$code"
    fi
    python -m dvc --wait-for-lock commit --force train # dvc.lock learns what the nodes wrote
}

stage download
stage validate
python -m dvc --wait-for-lock status --quiet train || train
stage evaluate
stage register
echo "dvc.lock has the results: git commit dvc.lock params.yaml"
