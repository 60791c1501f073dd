#!/usr/bin/env bash
# The whole line on real rows: a small LLaMA built on the spot, NF4 QLoRA, evaluation, merge, evaluation of the merged model
# with the same metrics, and the flagged proportion of six models beside the human's.
#   ./scripts/check_real_data.sh DATA_DIRECTORY [OUTPUT_DIRECTORY]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
data=$(cd "${1:?give the directory with beavertails_train.jsonl}" && pwd)
output=${2:-$root/output/real_rows}
cd "$root"
prepare_environment
rm -rf "$output"
train=$data/beavertails_train.jsonl validation=$data/beavertails_validation.jsonl

echo "== backbone"
python scripts/build_backbone.py --train_data_name_or_path "$train" --output_dir "$output/backbone"
echo "== train"
python scripts/train.py --config configs/real_rows_cpu.yaml --model_name_or_path "$output/backbone" \
    --train_data_name_or_path "$train" --output_dir "$output/run"
echo "== evaluate the adapter"
python scripts/evaluate.py --model_path "$output/run/adapter" --eval_dataset "$validation" --max_length 512 \
    --train_data_name_or_path "$train" --output_dir "$output/evaluation/adapter"
echo "== merge"
python scripts/merge_adapter.py --adapter_path "$output/run/adapter" --output_dir "$output/merged"
echo "== evaluate the merged model"
python scripts/evaluate.py --model_path "$output/merged" --eval_dataset "$validation" --max_length 512 \
    --train_data_name_or_path "$train" --output_dir "$output/evaluation/merged"
python - "$output" <<'PYTHON'
import json, sys

adapter, merged = (json.load(open(f"{sys.argv[1]}/evaluation/{name}/metrics.json"))["metrics"] for name in ("adapter", "merged"))
far = {key for key in adapter if adapter[key] != merged[key] and abs(adapter[key] - merged[key]) > 1e-5}
if far:
    sys.exit(f"adapter and merged model differ in {sorted(far)}")
print(f"adapter and merged model: all {len(adapter)} metrics agree within 1e-5")
PYTHON
echo "== flagged proportion of six models"
python scripts/evaluate.py --model_path "$output/merged" --eval_dataset "$data/evaluation_do_not_answer.json" \
    --output_dir "$output/evaluation/do_not_answer"
echo "real-data check: passed; everything lies in $output"
