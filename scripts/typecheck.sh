#!/usr/bin/env bash
# mypy over the packages. Type checkers know neither package_dir of setup.cfg nor the finder of an
# editable install, so the folders are shown under their import names through links.
# Uses the mypy on PATH; arguments are passed on.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
links="$root/build/types"
mkdir -p "$links"
ln -sfn "$root/rwkvx" "$links/rwkvx"
ln -sfn "$root/kernels" "$links/rwkvx_kernels"
ln -sfn "$root/evals" "$links/rwkvx_evals"
ln -sfn "$root/configs" "$links/rwkvx_configs"
cd "$links"
MYPYPATH="$links" exec mypy --config-file "$root/setup.cfg" --cache-dir "$root/.mypy_cache" \
    -p rwkvx -p rwkvx_kernels -p rwkvx_evals -p rwkvx_configs "$@"
