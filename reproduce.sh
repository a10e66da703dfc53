#!/usr/bin/env bash
# Every table and figure of the README from a fresh clone: three seeds of training and evaluation problems on the committed tiny/sft and
# tiny/rlvr. Interrupted, it goes on where it was: a run or an evaluation whose output exists is skipped.
#     bash reproduce.sh                 # two idle cores: see README for the time it takes
#     SEEDS="1 2 3" bash reproduce.sh   # other seeds
set -euo pipefail
cd "$(dirname "$0")"
SEEDS=${SEEDS:-"101 102 103"}
mkdir -p results/metrics

train() {       # name, seed, flags of opsd.py
    local out=runs/table/$1-$2
    if [ ! -f "$out/model.safetensors" ]; then
        echo "== $1, seed $2"
        python opsd.py --seed "$2" --eval-problems 0 --kl-by-position 8 --out "$out" --overwrite "${@:3}" > "$out.log" 2>&1 || { tail -n 3 "$out.log"; exit 1; }
    fi
    cp "$out/metrics.jsonl" "results/metrics/$1-$2.jsonl"
}

evaluate() {    # name, seed, flags of eval.py
    local out=results/$1-$2.json
    [ -f "$out" ] || { echo "== evaluation $1, seed $2"; python eval.py --seed "$2" --problems 512 --samples 2 --out "$out" "${@:3}"; }
}

mkdir -p runs/table
for seed in $SEEDS; do
    train correct "$seed" --filter correct
    train incorrect "$seed" --filter incorrect
    train all "$seed" --filter all
    train split "$seed" --filter all --divergence split
    train jsd "$seed" --filter all --divergence jsd
    train rft "$seed" --filter correct --divergence rft
    train answer-correct "$seed" --filter correct --context answer
    train answer-incorrect "$seed" --filter incorrect --context answer
    train instruction-correct "$seed" --filter correct --context instruction
    train instruction-incorrect "$seed" --filter incorrect --context instruction
    train sft-correct "$seed" --filter correct --model tiny/sft
    train sft-incorrect "$seed" --filter incorrect --model tiny/sft
    train off-correct "$seed" --filter correct --thinking off
    train off-incorrect "$seed" --filter incorrect --thinking off
    after=()
    for name in correct incorrect all split jsd rft answer-correct answer-incorrect instruction-correct instruction-incorrect; do after+=("runs/table/$name-$seed"); done
    evaluate rlvr "$seed" --model tiny/rlvr "${after[@]}" --context solution answer instruction
    evaluate sft "$seed" --model tiny/sft tiny/rlvr "runs/table/sft-correct-$seed" "runs/table/sft-incorrect-$seed" --context solution
    evaluate off "$seed" --model tiny/rlvr "runs/table/off-correct-$seed" "runs/table/off-incorrect-$seed" --context solution --thinking off
done
python table.py --seeds $SEEDS
