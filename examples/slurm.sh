#!/usr/bin/env bash
# Train a generator on two machines of eight GPUs: DATA=... TOKENIZER=... OUT=... sbatch examples/slurm.sh
# The folders must be on storage that all machines share; docs/several-machines.md says more. Slurm's SIGTERM, two minutes
# before the end, saves: submit again to go on.
#SBATCH --job-name=nextscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

: "${DATA:?folder or shards of images}" "${TOKENIZER:?folder of the tokenizer run}" "${OUT:?folder of this run}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # processes that are started again must not find the addresses of dead ones

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 100 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m nextscale train generator \
    --device cuda --precision bfloat16 --batch-size 768 --lr 3e-4 --workers 4 \
    --data "$DATA" --tokenizer "$TOKENIZER" --out "$OUT" "$@"
