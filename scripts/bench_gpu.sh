#!/usr/bin/env bash
# Checks and measures the CUDA path on one GPU, with .venv where it is there, else with the packages of python3; see bench_gpu.py.
#   ./scripts/bench_gpu.sh        (PYTHON names another interpreter)
#   ./scripts/bench_gpu.sh --shape small --use_cpu    tries the script itself
set -euo pipefail
own=${VENV:-$(dirname "$0")/../.venv}/bin/python
[ -x "$own" ] || own=python3
exec "${PYTHON:-$own}" "$(dirname "$0")/bench_gpu.py" "$@"
