#!/usr/bin/env bash
# The first contact with a GPU: all tests that need one, the self-test and the benchmarks, in less
# than 12 minutes on one GPU.
#   scripts/gpu_check.sh                 with configs/tap_s_3d.yaml
#   scripts/gpu_check.sh CONFIG [OUT]    another config; OUT: folder of the results
# Every part has a time limit and the next one runs even if it fails; the exit code is 1 if any
# failed. Without a GPU the self-test reports what was not proven, and the gpu tests are skipped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config="${1:-configs/tap_s_3d.yaml}"
out="${2:-gpu_check}"
python="$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)"
mkdir -p "$out"
failed=""

part() { # NAME SECONDS COMMAND...
    local name="$1" seconds="$2" began="$SECONDS" code=0
    shift 2
    timeout --kill-after=10 "$seconds" "$@" > "$out/$name.log" 2>&1 || code=$?
    case "$code" in
        0) echo "ok    $name ($((SECONDS - began)) s)" ;;
        124 | 137) echo "fail  $name: not finished after $seconds s, see $out/$name.log" ;;
        *) echo "fail  $name: exit code $code, see $out/$name.log" ;;
    esac
    if [ "$code" != 0 ]; then failed="$failed $name"; fi
}

gpu="$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')"
selftest_s=200
if [ "$gpu" != 1 ]; then selftest_s=900; fi # two busy CPU cores take longer
part doctor 60 "$python" -m tapct doctor
part selftest "$selftest_s" "$python" -m tapct doctor "$config" --selftest --json "$out/selftest.json"
if [ "$gpu" = 1 ]; then
    part tests 180 "$python" -m pytest -q -m gpu tests
    part bench_step 90 "$python" scripts/bench_step.py "$config" train.global_batch=16 \
        --steps 10 --json "$out/bench_step.json"
    part bench_prototypes 60 "$python" scripts/bench_prototypes.py --device cuda \
        --json "$out/bench_prototypes.json"
    part bench_views 60 "$python" scripts/bench_views.py --device cuda \
        --json "$out/bench_views.json"
else
    echo "skip  tests and benchmarks: torch sees no GPU here"
fi
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
echo "all parts passed; the results are in $out"
