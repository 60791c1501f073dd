#!/usr/bin/env bash
# Sets everything up and runs every check: ruff, mypy, pytest on two workers. Arguments go to pytest (`-n 0`: no workers).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
prepare_environment
ruff check .
ruff format --check .
mypy
export HF_HUB_OFFLINE=1
# two, whatever the machine: tests of several processes start up to four of their own
python -m pytest -n 2 --dist worksteal "$@"
