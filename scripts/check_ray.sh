#!/usr/bin/env bash
# predict --engine ray: a local Ray of two workers, one of them killed under way, against the local engine. Installs the extra
# [ray] where it may; ends after five minutes at most.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
prepare_environment
if ! python -c 'import ray.data' >/dev/null 2>&1; then
    echo "installing ray"
    timeout 120 python -m pip install -q -c scripts/constraints.txt -e "$root[ray]" >/dev/null 2>&1 || true
fi
if ! python -c 'import ray.data' >/dev/null 2>&1; then
    echo "ray checks: not run, ray is not there (pip install -c scripts/constraints.txt -e '.[ray]')"
    exit 0
fi
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
exec timeout --kill-after 20 150 python -m pytest -m ray tests "$@"
