#!/usr/bin/env bash
# Every table and figure of the documents from a fresh clone: three seeds of training and
# evaluation problems on the committed tiny/sft and tiny/rlvr. Interrupted, it goes on where it
# was: a run or an evaluation whose output exists in runs/table is skipped.
#     bash reproduce.sh                         # two jobs of one thread each; docs/experiments.md
#                                               # says how long it takes
#     SEEDS="1 2 3" JOBS=4 bash reproduce.sh    # other seeds, more cores
set -euo pipefail
cd "$(dirname "$0")"
export SEEDS=${SEEDS:-"101 102 103"} JOBS=${JOBS:-2}
mkdir -p results/metrics results/evaluations results/kl_by_position runs/table

# Script, name, seed, flags: one training run; its log is kept in results/metrics.
run() {
    local out=runs/table/$2-$3
    if [ ! -f "$out/model.safetensors" ]; then
        echo "== $2, seed $3"
        python "$1.py" --seed "$3" --threads 1 --out "$out" --overwrite "${@:4}" \
            > "$out.log" 2>&1 || {
            echo "failed: $2, seed $3"
            tail -n 3 "$out.log"
            exit 255
        }
    fi
    cp "$out/metrics.jsonl" "results/metrics/$2-$3.jsonl"
}

# Name, seed, flags of eval.py: one evaluation.
evaluate() {
    local out=runs/table/$1-$2
    if [ ! -f "$out.json" ]; then
        echo "== evaluation $1, seed $2"
        python eval.py --seed "$2" --threads 1 --problems 1024 --samples 2 --out "$out.json" \
            "${@:3}" > "$out.txt" 2>&1 || {
            echo "failed: evaluation $1, seed $2"
            exit 255
        }
    fi
    cp "$out.json" results/evaluations/
}
export -f run evaluate

# The filters and divergences have trajectories and figure 2's log, the others only a model.
for seed in $SEEDS; do
    logs="--kl-by-position 8 --eval-every 10 --eval-problems 256"
    cat <<END
opsd correct $seed $logs --filter correct
opsd incorrect $seed $logs --filter incorrect
opsd all $seed $logs --filter all
opsd split $seed $logs --filter all --divergence split
opsd jsd $seed $logs --filter all --divergence jsd
opsd answer-correct $seed --eval-problems 0 --filter correct --context answer
opsd answer-incorrect $seed --eval-problems 0 --filter incorrect --context answer
opsd instruction-correct $seed --eval-problems 0 --filter correct --context instruction
opsd instruction-incorrect $seed --eval-problems 0 --filter incorrect --context instruction
opsd reinject-correct $seed --eval-problems 0 --filter correct --reinject 32
opsd reinject-all $seed --eval-problems 0 --filter all --reinject 32
opsd rft-correct $seed --eval-problems 0 --filter correct --divergence rft
rlvr length-penalty $seed --eval-problems 0 --model tiny/rlvr --length-penalty 0.5 --steps 20
opsd sft-correct $seed --eval-problems 0 --filter correct --model tiny/sft
opsd sft-incorrect $seed --eval-problems 0 --filter incorrect --model tiny/sft
opsd off-correct $seed --eval-problems 0 --filter correct --thinking off
opsd off-incorrect $seed --eval-problems 0 --filter incorrect --thinking off
END
done | xargs -P "$JOBS" -L 1 bash -c 'run "$@"' _

for seed in $SEEDS; do
    models() { printf " runs/table/%s-$seed" "$@"; }
    contexts="answer-correct answer-incorrect instruction-correct instruction-incorrect"
    contexts="$contexts reinject-correct reinject-all"
    cat <<END
filters $seed --context solution --model tiny/rlvr$(models correct incorrect all split jsd)
contexts $seed --context answer instruction --model tiny/rlvr$(models $contexts)
baselines $seed --model tiny/rlvr$(models rft-correct length-penalty)
order $seed --context solution --model tiny/sft tiny/rlvr$(models sft-correct sft-incorrect)
off $seed --context solution --thinking off --model tiny/rlvr$(models off-correct off-incorrect)
END
done | xargs -P "$JOBS" -L 1 bash -c 'evaluate "$@"' _

files() { for seed in $SEEDS; do echo "${1/SEED/$seed}"; done; }
for seed in $SEEDS; do
    cp "runs/table/all-$seed/kl_by_position.jsonl" "results/kl_by_position/all-$seed.jsonl"
done
python -m tools.table --seeds $SEEDS --docs
python -m tools.plot path $(files results/metrics/correct-SEED.jsonl) \
    $(files results/metrics/incorrect-SEED.jsonl) $(files results/metrics/all-SEED.jsonl) \
    --out results/figure1
python -m tools.plot position $(files results/kl_by_position/all-SEED.jsonl) --out results/figure2
python -m tools.plot trajectory $(files results/metrics/correct-SEED.jsonl) \
    $(files results/metrics/incorrect-SEED.jsonl) --out results/figure3
python -m tools.plot shift $(files results/evaluations/filters-SEED.json) --out results/figure4
