#!/usr/bin/env bash
# All that a GPU is needed for, in one go of at most 8 minutes, what matters most first: the small
# tests in parallel, the key timings of ours, the tests at real sizes one by one, peers.
#
#   bash scripts/gpu.sh [FOLDER]      results go to FOLDER (default: docs/results/kernels)
#
# RWKVX_VENV names an environment that has torch already. Without a network: PIP_NO_INDEX=1
# PIP_FIND_LINKS=WHEELS, a folder of wheels (setuptools among them). Every step runs, whatever the
# one before gave; FOLDER/checks.md says how each ended, and runs/gpu has their output. Besides, where
# there is time: scripts/sanitize.sh (reads and writes out of bounds), and launch options beside each
# other (rwkvx bench kernels --stage chunk_select --variants).
set -euo pipefail
out="$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../docs/results/kernels}")"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup.sh
source "$here/setup.sh" dev,eval,gpu
cd "$RWKVX_ROOT"
python="$RWKVX_BIN/python"
"$python" -m pip install --quiet --editable ".[fla]" ||
    echo "fla-core cannot be installed: the benchmark goes without" >&2
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no GPU here" >&2
    exit 3
fi
logs="$RWKVX_ROOT/runs/gpu"
mkdir -p "$out" "$logs"
checks="$out/checks.md"
gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name())')"
printf '# Checks on a GPU\n\n%s, commit %s, %s. Made by `scripts/gpu.sh`.\n\n' "$gpu" \
    "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" "$(date -u +%F)" >"$checks"
printf '| step | status | seconds | last line |\n|---|---|---|---|\n' >>"$checks"

failed=0
# step NAME LIMIT COMMAND...: its output on the terminal and in a file, its end in checks.md.
step() {
    local name="$1" limit="$2" began="$SECONDS" status=0 last
    shift 2
    echo "--- $name"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/$name.txt" || status="${PIPESTATUS[0]}"
    last="$(awk 'NF { x = $0 } END { print x }' "$logs/$name.txt" | tr '|' '/' | sed "s#$RWKVX_ROOT/##g")"
    printf '| %s | %s | %s | %s |\n' "$name" "$status" "$((SECONDS - began))" "$last" >>"$checks"
    [ "$status" = 0 ] || failed=1
}
# Small tests: a file to a process, as many at a time as there are processors, at most 14
# (on 16 processors 100 seconds).
small() {
    local jobs
    jobs="$(nproc)"
    grep -l '^DEVICE = ' tests/*/test_*.py |
        xargs -n 1 -P "$((jobs < 14 ? jobs : 14))" "$python" -m pytest -q -m small
}
export -f small
export python
step small 130 bash -c small
step timings 105 "$RWKVX_BIN/rwkvx" bench kernels --no-peers --budget 80 --out "$out/ours"
step real 140 "$python" -m pytest -q -m "gpu and not small" tests
step peers 90 "$RWKVX_BIN/rwkvx" bench kernels --family chunk_attention --family wkv7 --budget 60 \
    --out "$out"
echo "checks: $checks   report: $out/report.md"
exit "$failed"
