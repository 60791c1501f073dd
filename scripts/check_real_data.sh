#!/usr/bin/env bash
# The whole line on real rows: a small LLaMA built on the spot, NF4 QLoRA, evaluation, merge, evaluation of the merged model
# with the same metrics, and the flagged proportion of six models beside the human's.
#   ./scripts/check_real_data.sh DATA_DIRECTORY [OUTPUT_DIRECTORY [LANGUAGE_MODEL_STEPS]]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
data=$(cd "${1:?give the directory with beavertails_train.jsonl}" && pwd)
output=${2:-$root/output/real_rows}
cd "$root"
prepare_environment
rm -rf "$output"
train=$data/beavertails_train.jsonl validation=$data/beavertails_validation.jsonl

echo "== backbone"
python scripts/build_backbone.py --train_data_name_or_path "$train" --output_dir "$output/backbone" --steps "${3:-200}"
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
python - "$output/evaluation" <<'PYTHON'
import json, pathlib, sys

root = pathlib.Path(sys.argv[1])
rows = {}
for name in ("adapter", "merged"):
    lines = (root / name / "predictions.jsonl").read_text().splitlines()
    rows[name] = [list(json.loads(line)["probabilities"].values()) for line in lines]
far = max(abs(a - b) for one, other in zip(*rows.values(), strict=True) for a, b in zip(one, other, strict=True))
metrics = [json.loads((root / name / "metrics.json").read_text())["metrics"] for name in ("adapter", "merged")]
apart = max(abs(a - b) for a, b in zip(*(m.values() for m in metrics), strict=True) if a is not None)
print(f"adapter and merged model: probabilities differ by at most {far:.1e}, {len(metrics[0])} metrics by at most {apart:.1e}")
if far > 1e-5 or apart > 5e-3:
    sys.exit("the merged model is not the trained one")
PYTHON
echo "== tune on half of the validation rows, evaluate on the other half"
python - "$validation" "$output/tuning.jsonl" "$output/rest.jsonl" <<'PYTHON'
import json, pathlib, random, sys

rows = [json.loads(line) for line in pathlib.Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
prompts = sorted({row["prompt"] for row in rows})
random.Random(0).shuffle(prompts)
half = set(prompts[: len(prompts) // 2])
for path, kept in zip(sys.argv[2:], (True, False), strict=True):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows if (row["prompt"] in half) == kept]
    pathlib.Path(path).write_text("".join(lines), encoding="utf-8")
PYTHON
cp -r "$output/merged" "$output/tuned"
python scripts/evaluate.py --model_path "$output/merged" --eval_dataset "$output/rest.jsonl" --max_length 512 \
    --output_dir "$output/evaluation/rest_before"
python scripts/tune.py --model_path "$output/tuned" --eval_dataset "$output/tuning.jsonl" --flagged_rule calibrated
python scripts/evaluate.py --model_path "$output/tuned" --eval_dataset "$output/rest.jsonl" --max_length 512 \
    --train_data_name_or_path "$train" --compare "$output/evaluation/rest_before" --output_dir "$output/evaluation/rest"
echo "== flagged proportion of six models"
python scripts/evaluate.py --model_path "$output/tuned" --eval_dataset "$data/evaluation_do_not_answer.json" \
    --output_dir "$output/evaluation/do_not_answer"
echo "real-data check: passed; everything lies in $output"
