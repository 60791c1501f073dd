#!/usr/bin/env bash
# An example for Slurm: 2 machines of 8 GPUs, four hours at a time, until the run is finished.
#   sbatch scripts/slurm_train.sh --config configs/llama7b_full_8gpu.yaml --model_name_or_path … \
#       --train_data_name_or_path … --output_dir output/llama7b_full
# srun starts the Python processes itself, without torchrun between, so that Slurm's early SIGTERM reaches them: 300 s before the
# end they write a checkpoint and exit with 143, and the job goes back into the queue. output_dir must lie on a disk that all
# machines share; the backbone and the rows are read by the first process alone.
#SBATCH --job-name=qlora_moderation
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
# a job that comes back from the queue goes on, whatever it was started with
[ -z "${SLURM_RESTART_COUNT:-}" ] || set -- "$@" --overwrite_output_dir False --resume auto
# shellcheck disable=SC2016  # the variables are those of each task
srun --kill-on-bad-exit=1 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python scripts/train.py "$@"' train "$@"
code=$?
# a job that was cancelled gets SIGTERM, too, and is no longer running
if [ "$code" = 143 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
