#!/usr/bin/env bash
# All that a GPU is needed for, in one go of about 25 minutes: set up, test the kernels at real
# sizes, run a part of the tests under compute-sanitizer, benchmark.
#
#   bash scripts/gpu.sh [FOLDER]      results go to FOLDER (default: docs/results/kernels)
#
# RWKVX_VENV names an environment that has torch already. Without a network: PIP_NO_INDEX=1
# PIP_FIND_LINKS=WHEELS, a folder of wheels (setuptools among them). Every step runs, whatever the
# one before gave; FOLDER/checks.md says how each ended, and runs/gpu has their output.
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
step tests 540 "$python" -m pytest -q -m gpu tests
LIMIT=100 step sanitize 320 bash "$here/sanitize.sh" -k "${SANITIZED:-step or cached or decoding or chunk16 or narrow}"
step benchmark 540 "$RWKVX_BIN/rwkvx" bench kernels --budget 420 --out "$out"
echo "checks: $checks   report: $out/report.md"
exit "$failed"
