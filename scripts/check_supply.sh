#!/usr/bin/env bash
# What the pinned packages are: their licences, and the security advisories against their versions.
# pip-audit gets an environment of its own and asks PyPI and OSV, so this needs a network; exit code 1: something was found,
# 3: the licences are fine and the advisories could not be asked for.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment
python "$root/scripts/licences.py"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/audit"
"$place/audit/bin/python" -m pip install -q pip-audit
# local builds of torch carry a suffix that no index knows; every version here is pinned, so nothing is resolved
report=$place/report.json
"$place/audit/bin/pip-audit" -r "$root/scripts/constraints.txt" --no-deps --disable-pip --format json >"$report" || true
python - "$report" <<'END'
import json
import sys

try:
    packages = json.load(open(sys.argv[1], encoding="utf-8"))["dependencies"]
except (OSError, ValueError):
    packages = []
asked = [each for each in packages if "skip_reason" not in each]
hit = [each for each in asked if each["vulns"]]
for each in hit:
    print(f"{each['name']} {each['version']}: {', '.join(vuln['id'] for vuln in each['vulns'])}")
print(f"advisories: {len(hit)} of {len(asked)} packages that the index knows are affected; {len(packages) - len(asked)} unknown to it")
sys.exit(1 if hit else 0 if asked else 3)
END
