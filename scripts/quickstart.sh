#!/usr/bin/env bash
# Sets everything up and runs the main job: train, merge, evaluate, judge. Without flags on the embedded backbone and sample,
# with --model_name_or_path and --train_data_name_or_path on real ones.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment
exec python "$root/scripts/quickstart.py" "$@"
