#!/usr/bin/env bash
# Trains on all GPUs of this machine, or in PROCESSES processes: torchrun around scripts/train.py, flags and all.
#   ./scripts/launch.sh --config configs/llama7b_lora_8gpu.yaml --model_name_or_path … --train_data_name_or_path … --output_dir …
# Several machines: run on each, with the first one's address,
#   NODES=2 RENDEZVOUS=first-machine:29500 ./scripts/launch.sh …
# torchrun answers every stop with exit code 1; output_dir/status.json says how the run ended.
set -euo pipefail
for name in PROCESSES NODES; do
    if ! [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: $name=${!name}: give a whole number above 0" >&2
        exit 2
    fi
done
source "$(dirname "$0")/environment.sh"
prepare_environment
processes=${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
# torchrun by itself would give each of several processes one thread
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if [ "${NODES:-1}" -gt 1 ]; then
    place=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_id qlora_moderation
        --rdzv_endpoint "${RENDEZVOUS:?give the first machine as RENDEZVOUS=host:port}")
else
    place=(--standalone)
fi
exec torchrun "${place[@]}" --nproc_per_node "$processes" "$root/scripts/train.py" "$@"
