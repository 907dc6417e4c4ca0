#!/usr/bin/env bash
# Make a virtual environment and install this checkout into it.
#
#   bash scripts/setup.sh [EXTRAS]      EXTRAS: comma-separated, of eval,train,dev,peers,flash,gpu
#                                       (default: eval)
#
# Needs Python 3.11 or newer with its venv module, nothing else. The environment is the one that
# RWKVX_VENV names, else the active one (VIRTUAL_ENV), else .venv in this checkout. Run again, it
# does nothing unless setup.cfg has changed or an extra is missing. Other scripts source this
# file and then use "$RWKVX_BIN", the environment's bin folder.
set -euo pipefail

RWKVX_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH="torch==2.13.0"
CPU_INDEX="https://download.pytorch.org/whl/cpu" # PyTorch's own index of builds without CUDA

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed: sudo apt-get install python3 python3-venv" >&2
    return 1
}

# pip with its chatter kept in a file, which is shown when pip fails.
quiet_pip() {
    local venv="$1" log
    shift
    log="$(mktemp)"
    if ! "$venv/bin/python" -m pip "$@" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

make_venv() {
    local venv="$1" python
    if [ -x "$venv/bin/python" ] && [ ! -e "$venv/.rwkvx-unfinished" ]; then
        # Some tools make environments without pip.
        "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >&2
        return
    fi
    python="$(find_python)" || return 1
    # Debian ships venv without ensurepip unless the package below is installed.
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        local version
        version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
        echo "error: Python's venv module is missing: sudo apt-get install python3-venv" \
            "(or python$version-venv)" >&2
        return 1
    fi
    echo "Making a virtual environment in $venv" >&2
    mkdir -p "$venv"
    touch "$venv/.rwkvx-unfinished"
    "$python" -m venv "$venv"
    # Older versions of pip download whole packages only to read their metadata.
    quiet_pip "$venv" install --upgrade pip || return 1
    rm "$venv/.rwkvx-unfinished"
}

# torch comes first: plain `pip install torch` on Linux may bring several GB of CUDA packages.
install_torch() {
    local venv="$1" plan brings_cuda=yes
    if "$venv/bin/python" -c 'from importlib.metadata import version as v
import sys; sys.exit(tuple(map(int, v("torch").split(".")[:2])) < (2, 10))' 2>/dev/null; then
        return
    fi
    echo "Installing $TORCH" >&2
    if ! nvidia-smi -L >/dev/null 2>&1; then
        plan="$(mktemp)"
        if quiet_pip "$venv" install --dry-run --report "$plan" "$TORCH" &&
            ! grep -qE '"name": "(nvidia|cuda)-' "$plan"; then
            brings_cuda=no
        fi
        rm -f "$plan"
        if [ "$brings_cuda" = yes ]; then
            "$venv/bin/python" -m pip install --quiet --timeout 15 --retries 1 \
                --index-url "$CPU_INDEX" "$TORCH" 2>/dev/null && return
            echo "No CPU build within reach: installing the one with CUDA" >&2
        fi
    fi
    quiet_pip "$venv" install "$TORCH"
}

setup() {
    local venv="$1" extras="$2" stamp="$1/.rwkvx-setup" hash known="" missing="" extra
    hash="$(cat "$RWKVX_ROOT/setup.cfg" "$RWKVX_ROOT/pyproject.toml" | sha256sum | cut -c1-64)"
    hash="$hash $RWKVX_ROOT"
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$hash" ]; then
        known="$(tail -n 1 "$stamp")"
    fi
    for extra in ${extras//,/ }; do
        [[ ",$known," == *",$extra,"* ]] || missing="$missing,$extra"
    done
    if [ -z "$missing" ] && [ -n "$known" ] && [ -x "$venv/bin/rwkvx" ]; then
        return
    fi
    make_venv "$venv" || return 1
    install_torch "$venv" || return 1
    extras="$known$missing"
    extras="${extras#,}"
    echo "Installing rwkvx[$extras] (the first time takes minutes)" >&2
    quiet_pip "$venv" install --editable "$RWKVX_ROOT[$extras]" || return 1
    printf '%s\n%s\n' "$hash" "$extras" >"$stamp.new"
    mv "$stamp.new" "$stamp"
}

RWKVX_BIN="${RWKVX_VENV:-${VIRTUAL_ENV:-$RWKVX_ROOT/.venv}}/bin"
[ "${RWKVX_BIN:0:1}" = / ] || RWKVX_BIN="$PWD/$RWKVX_BIN"
setup "${RWKVX_BIN%/bin}" "${1:-eval}"
