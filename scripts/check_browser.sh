#!/usr/bin/env bash
# The evaluation report and the server's page in headless Chromium: hostile texts, 33,396 rows, keyboard, contrast, curl.
# Installs Debian's packages where it may.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
cd "$root"
prepare_environment
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium and chromium-driver"
        apt-get update -qq >/dev/null && apt-get install -y -qq chromium chromium-driver >/dev/null 2>&1 || true
    fi
fi
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    echo "browser checks: not run, chromium and chromedriver are not there (Debian: chromium, chromium-driver)"
    exit 0
fi
export HF_HUB_OFFLINE=1
exec python -m pytest -m browser tests "$@"
