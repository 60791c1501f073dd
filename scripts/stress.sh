#!/usr/bin/env bash
# The long campaigns that test.sh has no time for; see stress.py. Sets everything up first.
#   ./scripts/stress.sh [--minutes M] [grid] [kills] [predict] [jobs] [invariance] [fuzz] [bar]
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment
export OMP_NUM_THREADS=1
exec python "$root/scripts/stress.py" "$@"
