# Sourced by the other scripts: makes .venv from the tested versions, once, and puts it in front of the path.
# PYTHON names another interpreter (3.11 or later), VENV another place.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

prepare_environment() {
    local wanted
    wanted=$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        echo "installing the tested versions into $venv (some minutes, once)"
        if [ ! -x "$venv/bin/python" ]; then
            command -v "${PYTHON:-python3}" >/dev/null || { echo "error: PYTHON ${PYTHON:-python3}: no such command" >&2; return 2; }
            "${PYTHON:-python3}" -m venv "$venv" || return 1
        fi
        "$venv/bin/python" -m pip install -q -c "$root/scripts/constraints.txt" -e "$root[dev]" || return 1
        echo "$wanted" >"$venv/installed"
    fi
    export PATH="$venv/bin:$PATH"
}
