#!/usr/bin/env bash
# Compile every Triton kernel in every supported configuration for GPUs that need not be there, and
# judge the machine code (tests/kernels/ahead_of_time.py):
#
#   bash scripts/compile_kernels.sh                          with the Triton that is installed
#   TRITON=3.6.0 bash scripts/compile_kernels.sh             with another one
#   bash scripts/compile_kernels.sh wkv7 --targets sm_90     arguments are passed on
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup.sh
source "$here/setup.sh" dev,gpu
cd "$RWKVX_ROOT"
if [ -n "${TRITON:-}" ]; then
    folder="$RWKVX_ROOT/build/triton-$TRITON"
    if [ ! -d "$folder" ]; then
        "$RWKVX_BIN/python" -m pip install --quiet --no-deps --target "$folder.new" "triton==$TRITON"
        mv "$folder.new" "$folder"
    fi
    export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
fi
[ "$#" -gt 0 ] || set -- wkv7 chunk_select chunk_attention time_mix token_shift channel_mix linear one_token
exec env -u TRITON_INTERPRET "$RWKVX_BIN/python" tests/kernels/ahead_of_time.py "$@"
