#!/usr/bin/env bash
# Install what the tests need, then lint, check types and test, in three processes of half of the
# cores each: they often wait for processes that they start. Arguments go to pytest.
# Tests on real data need RWKVX_DATA to name the data folder; without it they are skipped.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup.sh
source "$here/setup.sh" dev,eval,train,peers,gpu
cd "$RWKVX_ROOT"
export PATH="$RWKVX_BIN:$PATH"

# Every step runs, so that one report shows all there is to mend.
failed=()
step() {
    echo "--- $1"
    shift
    "$@" || failed+=("$*")
}
step "ruff check" ruff check .
step "ruff format" ruff format --check .
# Types beside the tests, which leave a processor idle now and then.
types="$(mktemp)"
bash scripts/typecheck.sh >"$types" 2>&1 &
typing="$!"
trap 'kill "$typing" 2>/dev/null || true; rm -f "$types"' EXIT
typed() {
    local status=0
    wait "$typing" || status="$?"
    cat "$types"
    return "$status"
}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
export NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-$OMP_NUM_THREADS}"
step "pytest" python -m pytest -n 3 --dist worksteal "$@"
step "mypy" typed
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
