#!/usr/bin/env bash
# The GPU part of cost.py: everything in under eight minutes, or with --short what matters most in under two and a half.
#
#     bash examples/benchmarks/gpu.sh [--short] [FOLDER]        (FOLDER, else $OUT, else ./cost-gpu)
#
# Results go to FOLDER/cost.jsonl as they come, so that a kill loses none; a second run goes on where the first one ended.
# The last thing is FOLDER/cost.md. `torch.compile` takes most of the time, so each contender is compiled in a process of its
# own, all at once; they wait for each other before any is timed, and are timed one by one. Only with --short do training
# steps, of 100 ms and more, run while others compile.
set -u
start=$SECONDS
short=
[ "${1:-}" = --short ] && { short=1; shift; }
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-${OUT:-$PWD/cost-gpu}}
mkdir -p "$out"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-2} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}  # DEVICE=cpu MODEL=T tries the script itself
model=${MODEL:-L}
total=${TOTAL:-$([ $short ] && echo 145 || echo 465)}
log=$out/gpu.log
gate=$(mktemp -d)
pids=
common="--device $device --json $out/cost.jsonl --warm-ups 4 --models $model"
if [ "$device" = cpu ]; then common="$common --warm-ups 1 --sizes 70x70 --token-sizes 70x70 140x140 210x210 280x280"; fi
bench="$root/examples/benchmarks/cost.py"
compiled=${COMPILED:-bare mgfc mgfc_fused lora dora rein adaptformer}
main="bare mgfc mgfc_fused lora lora_merged dora rein adaptformer"

left() { echo $((total - (SECONDS - start))); }
say() { echo "[$((SECONDS - start)) s] $*" | tee -a "$log"; }
# cost SECONDS-TO-KEEP GROUP...: groups of options, in one process that stops in time.
cost() {
    local keep=$1 words="" group
    shift
    local limit=$(($(left) - keep))
    [ $limit -gt 5 ] || { say "no time for: $*"; return; }
    local end=$(($(date +%s) + limit))
    for group in "$@"; do words="$words ${words:+--next} $common --deadline $end $group"; done
    # shellcheck disable=SC2086
    timeout -k 2 $((limit + 3)) "$python" "$bench" $words 2>&1 | tee -a "$log" | grep -E ' s  |time is up|Error'
}
# compile SECONDS FIGURE PRECISION BATCHES CONTENDERS: each in the background, with $waiting more members at the gate.
compile() {
    local count=0 name batch workers="" limit end
    limit=$(($(left) - 4))
    [ $limit -lt "$1" ] || limit=$1
    [ $limit -gt 25 ] || { say "no time to compile $2"; return; }
    end=$(($(date +%s) + limit))
    rm -f "$gate"/*
    for batch in $4; do for name in $5; do count=$((count + 1)); done; done
    for batch in $4; do
        for name in $5; do
            # shellcheck disable=SC2086
            timeout -k 2 $limit "$python" "$bench" $common --figures "$2" --precisions "$3" --batches "$batch" --modes compiled \
                --contenders "$name" --repetitions 30 --budget 3 --deadline $end \
                --gate "$gate" $((count + waiting)) $((end - 20)) >>"$log" 2>&1 &
            workers="$workers $!"
        done
    done
    pids=$workers
}

say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo 'no GPU')"
eager="--figures inference --precisions bf16 --batches 1 8 --repetitions 30 --budget 2 --contenders $main"
growth="--figures tokens --precisions bf16 --batches 8 --repetitions 15 --budget 1.5 --contenders mgfc mgfc_fused lora"
training="--figures training --precisions autocast --batches 8 --repetitions 10 --budget 2.5 --contenders mgfc lora rein dora full"
if [ $short ]; then
    cost 80 "$eager"
    waiting=1
    compile 600 inference bf16 "1 8" "$compiled"
    cost 35 "$training" "$growth"
    touch "$gate/training"
    say "waiting for what compiles"
    wait $pids
else
    cost 300 "$eager" "$growth" "$training vpt adaptformer mgfc_last4 mgfc_adapter"
    waiting=0
    say "compiling inference"
    compile 130 inference bf16 "1 8" "$compiled"
    wait $pids
    stages="mgfc mgfc_fused mgfc_adapter mgfc_coarse mgfc_medium mgfc_fine mgfc_last4 vpt"
    cost 110 \
        "$eager $stages" \
        "--figures depth --precisions bf16 --batches 8 --repetitions 15 --budget 1 --contenders mgfc mgfc_fused lora" \
        "--figures inference --precisions autocast --batches 8 --repetitions 15 --budget 1.5 --contenders $main" \
        "$eager --sizes 504x1022" \
        "--models S B --figures inference --precisions bf16 --batches 1 8 --repetitions 20 --budget 1 --contenders $main" \
        "--models S B $training"
    say "compiling training steps"
    compile 600 training autocast 8 "mgfc lora rein full"
    wait $pids
fi
"$python" "$bench" --json "$out/cost.jsonl" --table >"$out/cost.md" 2>>"$log"
rm -rf "$gate" "$gate.lock"
say "$(grep -c '"status": "ok"' "$out/cost.jsonl") records in $out/cost.jsonl, tables in $out/cost.md"
