#!/usr/bin/env bash
# Train a generator on two machines of eight GPUs: sbatch examples/slurm.sh
# The folders of --data and --out must be on storage that all machines share. Slurm's SIGTERM saves; submit again to go on.
#SBATCH --job-name=nextscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m nextscale train generator \
    --device cuda --precision bfloat16 --batch-size 768 \
    --data "$DATA" --tokenizer "$TOKENIZER" --out "$OUT" "$@"
