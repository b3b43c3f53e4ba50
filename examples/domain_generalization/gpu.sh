#!/usr/bin/env bash
# One slice of the benchmark on one GPU: ends within ten minutes, goes on where the last one stopped, needs no network.
#
#   bash examples/domain_generalization/gpu.sh tuning|medium|full
#
# Before, where the data are:   cd examples && python -m domain_generalization pack
#                               and for `full`, with less in it: ... pack --scale full --sources synth_town --quality 85
# PYTHON, JOBS: interpreter (python) and processes (12). SECONDS_LEFT: after which a slice stops (540); at most the last
# minute of a training is lost. The exit status is 0 when all is done, 3 when there is more to do.
# OUT: a folder that takes the records and the smaller files of weights, if it is set.
set -euo pipefail
cd "$(dirname "$0")/.."

slice=${1:?expected tuning, medium or full}
jobs=${JOBS:-12}
python=${PYTHON:-python}
export PYTHONPATH=.. OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TQDM_DISABLE=1
results=domain_generalization/results
work=../runs/domain_generalization

suite() { "$python" -m domain_generalization suite "$@"; }

slices() {
  case "$slice" in
    tuning) suite tuning --jobs "$jobs" ;;
    medium)
      suite tables --jobs "$jobs"
      "$python" -m domain_generalization table
      ;;
    full)
      suite peers --scale full --sources synth_town --methods mgfc full dora_all rein --jobs 4
      suite ablations --scale full --sources synth_town --jobs 4
      "$python" -m domain_generalization table --scale full
      ;;
    *) echo "expected tuning, medium or full, found $slice" >&2; return 2 ;;
  esac
}

export -f suite slices
export slice jobs python
code=0
timeout "${SECONDS_LEFT:-540}" bash -euc slices || code=$?
if [ "$code" -eq 124 ]; then
  echo "Stopped in time; run it again to go on."
  code=3
fi

if [ -n "${OUT:-}" ]; then
  cp -r "$results" "$OUT/"
  mkdir -p "$OUT/weights"
  find "$work/weights" -name '*.safetensors' -size -8M -exec cp {} "$OUT/weights/" \; 2> /dev/null || true
fi
exit "$code"
