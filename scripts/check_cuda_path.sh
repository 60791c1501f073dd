#!/usr/bin/env bash
# The CUDA path without a GPU: real steps and scoring on tensors that claim to lie on one and hold no values; see check_cuda_path.py.
# Needs g++, for a library that answers for the device; where it is missing, says so.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
prepare_environment
if ! command -v g++ >/dev/null; then
    echo "check of the CUDA path: not run, g++ is not there"
    exit 0
fi
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
torch=$(python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
g++ -std=c++20 -shared -fPIC "$root/scripts/pretend_cuda.cpp" -o "$place/pretend_cuda.so" -I"$torch/include" \
    -L"$torch/lib" -Wl,--no-as-needed -Wl,-rpath,"$torch/lib" -ltorch_cpu -lc10
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python "$root/scripts/check_cuda_path.py" "$place/pretend_cuda.so"
