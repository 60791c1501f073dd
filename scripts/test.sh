#!/usr/bin/env bash
# Sets everything up and runs every check: ruff, mypy, pytest. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
prepare_environment
ruff check .
ruff format --check .
mypy
export HF_HUB_OFFLINE=1
python -m pytest "$@"
