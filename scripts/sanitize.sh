#!/usr/bin/env bash
# compute-sanitizer over the Triton kernels at small shapes, on a machine with an NVIDIA GPU:
#
#   bash scripts/sanitize.sh                       all small kernel tests
#   bash scripts/sanitize.sh -k "step or cached"   arguments go to pytest
#
# TOOLS names other tools than memcheck (reads and writes out of bounds), racecheck (unordered
# accesses to shared memory) and synccheck (barriers); LIMIT the seconds that each may take.
# initcheck would find nothing: the tests fill uninitialised memory with NaN, which shows in results.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

find_sanitizer() {
    local candidate
    for candidate in "$(command -v compute-sanitizer || true)" "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer \
        "${CUDA_HOME:-/usr/local/cuda}"/compute-sanitizer/compute-sanitizer /usr/local/cuda-*/bin/compute-sanitizer; do
        if [ -n "$candidate" ] && [ -x "$candidate" ]; then
            echo "$candidate"
            return
        fi
    done
    echo "error: compute-sanitizer is missing: it comes with the CUDA toolkit (Debian and Ubuntu:" \
        "the package cuda-sanitizer-X-Y of NVIDIA's repository). Set CUDA_HOME where it is elsewhere." >&2
    return 3
}

sanitizer="$(find_sanitizer)" || exit 3
# shellcheck source=scripts/setup.sh
source "$here/setup.sh" dev,gpu
cd "$RWKVX_ROOT"
if ! "$RWKVX_BIN/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no GPU here" >&2
    exit 3
fi
# Every tensor an allocation of its own: only so are its bounds known.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
failed=()
for tool in ${TOOLS:-memcheck racecheck synccheck}; do
    echo "--- $tool"
    status=0
    timeout --kill-after=10 "${LIMIT:-600}" "$sanitizer" --tool "$tool" --error-exitcode 9 \
        --report-api-errors no "$RWKVX_BIN/python" -m pytest -q -m small tests/kernels "$@" || status=$?
    case "$status" in
    0) ;;
    9) failed+=("$tool found something") ;;
    124 | 137) failed+=("$tool did not end within ${LIMIT:-600} s") ;;
    *) failed+=("$tool: tests ended with status $status") ;;
    esac
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "compute-sanitizer: nothing found"
