#!/usr/bin/env bash
# Everything that only a GPU can prove, in nine minutes and without network: installs this checkout,
# runs tests/gpu, compute-sanitizer on a small case, and the GPU benchmarks.
#
#   benchmarks/on_gpu.sh [--dry-run]
#
# Needs a CUDA device, torch >= 2.11, triton >= 3.6, numpy, setuptools >= 77, pytest, pytest-timeout, hypothesis.
# PYTHON=python3 is the interpreter; OUT=benchmarks/results is where files go: gpu-<card>.json and logs.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
DRY_RUN=0
case "${1:-}" in
    "") ;;
    --dry-run) DRY_RUN=1 ;;
    *) echo "usage: benchmarks/on_gpu.sh [--dry-run]" >&2; exit 2 ;;
esac
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 FASTGUARD_REQUIRE_GPU=1
unset TRITON_INTERPRET
status=0
declare -A outcome

stage() { # name, seconds at the most, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "==> $name (at most $limit s): $*"
    if [ "$DRY_RUN" = 1 ]; then outcome[$name]="not run"; return 0; fi
    if timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"; then
        outcome[$name]="ok in $((SECONDS - start)) s"
    else
        outcome[$name]="failed after $((SECONDS - start)) s"
        status=1
    fi
    echo "==> $name: ${outcome[$name]}"
}

stage install 60 "$PYTHON" -m pip install -q -e . --no-deps --no-build-isolation
stage tests 270 "$PYTHON" -P -m pytest tests/gpu -q -p no:cacheprovider
json="$OUT/gpu.json"
stage benchmarks 150 "$PYTHON" -m benchmarks.gpu --out "$json"

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
if [ -n "$sanitizer" ]; then
    stage sanitizer 60 "$sanitizer" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitize
else
    outcome[sanitizer]="compute-sanitizer is not installed"
fi

for name in install tests benchmarks sanitizer; do echo "$name: ${outcome[$name]:-not run}"; done
if [ -f "$json" ] && [ "$DRY_RUN" = 0 ]; then
    # One file says it all: the outcomes of the other stages beside the numbers, named after the card.
    "$PYTHON" - "$json" "$OUT" <<PY
import json, pathlib, re, sys
path, out = map(pathlib.Path, sys.argv[1:])
document = json.loads(path.read_text())
document["stages"] = {
    "install": "${outcome[install]:-}", "tests": "${outcome[tests]:-}",
    "benchmarks": "${outcome[benchmarks]:-}", "sanitizer": "${outcome[sanitizer]:-}",
}
log = out / "tests.log"
document["tests"] = log.read_text().strip().splitlines()[-1] if log.exists() else None
slug = re.sub(r"[^a-z0-9]+", "-", str(document["machine"].get("card", "cpu")).lower()).strip("-")
path.rename(final := out / f"gpu-{slug}.json")
final.write_text(json.dumps(document, indent=1) + "\n")
print(final)
PY
fi
exit $status
