#!/usr/bin/env bash
# Checks and measures the CUDA path on one GPU with the packages that are installed there; see bench_gpu.py.
#   ./scripts/bench_gpu.sh        (PYTHON names another interpreter)
#   ./scripts/bench_gpu.sh --shape small --use_cpu    tries the script itself
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/bench_gpu.py" "$@"
