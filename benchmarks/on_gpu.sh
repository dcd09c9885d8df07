#!/usr/bin/env bash
# Everything that only a GPU can prove, in nine minutes and without network: installs this checkout,
# runs the GPU benchmarks, tests/gpu, training steps of a GPT-2, the fused update, compute-sanitizer on a small case, and
# a soak for the rest.
#
#   benchmarks/on_gpu.sh [--dry-run]
#
# Needs a CUDA device, torch >= 2.11, triton >= 3.6 and the C compiler that it asks for, numpy, rich, pytest,
# pytest-timeout, hypothesis; pytest-xdist runs the tests in parallel where it is there, since they mostly compile;
# setuptools >= 77 to install, else build/stage is used as it is.
# PYTHON=python3 is the interpreter; OUT=benchmarks/results is where files go: gpu-<card>.json and logs, both brought up
# to date after each stage. COMMIT=... names the source where there is no .git. FASTGUARD_SECONDS=540 is how long all
# of it may take; FASTGUARD_SOAK_SECONDS is how long the soak goes on, else what remains, two minutes at the most.
# The exit status is 1 if a test or a benchmark failed, not if a target was missed.
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
SECONDS=0 # the shell's own clock
deadline=${FASTGUARD_SECONDS:-540}
for_training=110 for_update=20 for_sanitizer=75 for_soak=40
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 FASTGUARD_REQUIRE_GPU=1
unset TRITON_INTERPRET
json="$OUT/gpu.json"
status=0
stages=(machine install benchmarks tests training update sanitizer soak)
declare -A outcome

stage() { # name, seconds at the most, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "==> $name (at most $limit s): $*"
    if [ "$DRY_RUN" = 1 ]; then outcome[$name]="not run"; return 0; fi
    local code=0
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/gpu-$name.log" || code=${PIPESTATUS[0]}
    case $code in
        0) outcome[$name]="ok in $((SECONDS - start)) s" ;;
        124 | 137) outcome[$name]="cut off after $limit s" ;;
        *) outcome[$name]="failed after $((SECONDS - start)) s, exit status $code" ;;
    esac
    [ "$code" = 0 ] || [ "$name" = install ] || status=1 # build/stage does as well
    echo "==> $name: ${outcome[$name]}"
    collect
    return "$code"
}

left() { # seconds until the deadline, less what is kept for others; some in any case
    local seconds=$((deadline - SECONDS - ${1:-0}))
    echo $((seconds > 20 ? seconds : 20))
}

collect() { # one file says it all: the outcomes of the stages beside the numbers, named after the card
    local name lines=()
    for name in "${stages[@]}"; do lines+=("$name=${outcome[$name]:-not run}"); done
    "$PYTHON" - "$json" "$OUT" "${lines[@]}" <<'PY'
import json, pathlib, re, sys
source, out = map(pathlib.Path, sys.argv[1:3])
document = json.loads(source.read_text()) if source.exists() else {}
training = out / "gpu-training.json"
if training.exists():
    document["training"] = json.loads(training.read_text())
update = out / "gpu-update.json"
if update.exists():
    document["update"] = json.loads(update.read_text())["rows"]
document["stages"] = dict(line.split("=", 1) for line in sys.argv[3:])
log = out / "gpu-tests.log"
lines = log.read_text(errors="replace").splitlines() if log.exists() else []
counted = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error|skipped).* in ", line)]
document["tests"] = counted[-1] if counted else (lines[-1] if lines else None)
card = str(document.get("machine", {}).get("card", "unknown card"))
(out / "gpu-unknown-card.json").unlink(missing_ok=True)
final = out / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")
final.write_text(json.dumps(document, indent=1) + "\n")
print(final)
PY
}

rm -f "$json" "$OUT"/gpu-{training,update}.json "$OUT"/gpu-{machine,install,benchmarks,tests,training,update,sanitizer,soak}.log
stage machine 60 "$PYTHON" -P -c '
import os, platform, shutil, subprocess, sysconfig, numpy, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__, "numpy", numpy.__version__)
print("C compiler:", shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "none: triton cannot launch")
print("its headers of Python:", os.path.exists(sysconfig.get_path("include") + "/Python.h"))
if shutil.which("nvidia-smi"): print(subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip())
print(torch.cuda.get_device_name(), torch.cuda.device_count())'
staged=
if ! stage install 40 "$PYTHON" -m pip install -q -e . --no-deps --no-build-isolation; then
    echo "==> using build/stage, since it could not be installed"
    rm -rf build/stage && mkdir -p build/stage && cp -R fastguard build/stage/ && cp -R kernels build/stage/fastguard/kernels
    staged=$PWD/build/stage
fi
path_of() { # the folders, and what PYTHONPATH held; no empty entry, which would mean this folder
    local IFS=: folder parts=()
    for folder in "$@" "${PYTHONPATH:-}"; do [ -z "$folder" ] || parts+=("$folder"); done
    echo "${parts[*]:-}"
}
stage benchmarks 150 env PYTHONPATH="$(path_of "$staged" "$PWD")" "$PYTHON" -P -m benchmarks.gpu --out "$json"
# Without this folder: transformers would take kernels/ for a package of that name.
pytest=(env PYTHONPATH="$(path_of "$staged")" "$PYTHON" -P -m pytest tests/gpu -q -p no:cacheprovider --timeout=120)
parallel=()
if "$PYTHON" -P -c 'import xdist' 2>/dev/null; then parallel=(-n 6); fi
stage tests "$(left $((for_training + for_update + for_sanitizer + for_soak)))" "${pytest[@]}" -m "not slow" --durations=8 "${parallel[@]}"

stage training "$(left $((for_update + for_sanitizer + for_soak)))" env PYTHONPATH="$(path_of "$staged" "$PWD")" \
    "$PYTHON" -P -m benchmarks.training_step --seconds 8 --out "$OUT/gpu-training.json"
stage update "$(left $((for_sanitizer + for_soak)))" env PYTHONPATH="$(path_of "$staged" "$PWD")" \
    "$PYTHON" -P -m benchmarks.update --seconds 3 --out "$OUT/gpu-update.json"

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
if [ -n "$sanitizer" ]; then
    # Each tensor an allocation of its own: inside torch's segments no access is out of bounds. And torch asks the
    # driver for things that fail by design.
    stage sanitizer "$(left "$for_soak")" env PYTHONPATH="$(path_of "$staged" "$PWD")" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --error-exitcode 9 --report-api-errors no "$PYTHON" -P -m benchmarks.sanitize
else
    outcome[sanitizer]="compute-sanitizer is not installed"
fi

soak=$(($(left) - 25))
export FASTGUARD_SOAK_SECONDS=${FASTGUARD_SOAK_SECONDS:-$((soak > 120 ? 120 : soak < 5 ? 5 : soak))}
stage soak $((${FASTGUARD_SOAK_SECONDS%.*} + 60)) "${pytest[@]}" -m slow

for name in "${stages[@]}"; do echo "$name: ${outcome[$name]:-not run}"; done
if [ "$DRY_RUN" = 0 ]; then
    collect
    rm -f "$json" "$OUT"/gpu-{training,update}.json
fi
exit $status
