#!/usr/bin/env bash
# Methods x seeds x data sets, trained, merged and evaluated, into one table; see reproduce.py. Sets everything up first.
#   ./scripts/reproduce.sh --backbone huggyllama/llama-7b --output output/reproduce
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment
exec python "$root/scripts/reproduce.py" "$@"
