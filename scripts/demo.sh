#!/usr/bin/env bash
# The main job from a fresh checkout: install, then `rwkvx demo` (arguments are passed on).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup.sh
source "$here/setup.sh" eval
exec "$RWKVX_BIN/rwkvx" demo "$@"
