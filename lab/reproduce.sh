#!/usr/bin/env bash
# The tables and figures of the headline from a fresh clone: eight pipelines, each of SFT, RLVR and
# OPSD from its own seed, trained until the run on correct rollouts has settled. Interrupted, it goes
# on where it was: what exists in runs/table is skipped. Logs and evaluations of all runs are kept in
# lab/results/, compressed. Tables whose runs are not here name the commit that made them.
#     bash lab/reproduce.sh                         # two jobs of one thread each; lab/experiments.md
#                                                   # says how long it takes
#     SEEDS="1 2 3" JOBS=4 bash lab/reproduce.sh    # other seeds, more cores
#     bash lab/reproduce.sh real                    # a pretrained model instead (lab/real.md)
set -euo pipefail
cd "$(dirname "$0")/.."
export SEEDS=${SEEDS:-"201 202 203 204 205 206 207 208"} JOBS=${JOBS:-2}
export REAL_SEEDS=${REAL_SEEDS:-"1 2 3"}
FEW=$(echo $SEEDS | cut -d " " -f -3)
results=lab/results
mkdir -p $results/{metrics,evaluations,kl_by_position,gates} runs/table

# File, name in lab/results/.
keep() { gzip -9n < "$1" > "lab/results/$2.gz"; }

# Script, name, seed, flags: one training run, gone on with where it stopped; its log is kept.
run() {
    local out=runs/table/$2-$3 how=--overwrite
    if [ ! -f "$out/model.safetensors" ]; then
        echo "== $2, seed $3"
        if compgen -G "$out/state-*" > /dev/null; then how=--resume; fi
        python "$1.py" --seed "$3" --threads 1 --out "$out" $how "${@:4}" \
            > "$out.log" 2>&1 || {
            echo "failed: $2, seed $3"
            tail -n 3 "$out.log"
            exit 255
        }
    fi
    [ "$1" = sft ] || keep "$out/metrics.jsonl" "metrics/$2-$3.jsonl"
}

# Name, seed, names of models (or NAME/step-N), flags of eval.py: one evaluation, changes against the
# first model.
evaluate() {
    local out=runs/table/$1-$2 models=
    for name in $3; do
        models="$models runs/table/${name%/*}-$2"
        if [ "${name%/*}" != "$name" ]; then models="$models/${name#*/}"; fi
    done
    if [ ! -f "$out.json" ]; then
        echo "== evaluation $1, seed $2"
        local flags=("${@:4}")
        [[ "$*" = *--data* ]] || flags+=(--problems 1024)
        python eval.py --seed "$2" --threads 1 --samples 2 --out "$out.json" \
            --model $models "${flags[@]}" > "$out.txt" 2>&1 || {
            echo "failed: evaluation $1, seed $2"
            tail -n 3 "$out.txt"
            exit 255
        }
    fi
    python -m lab.keep "$out.json" "lab/results/evaluations/$1-$2.json.gz"
}

# Seed: a whole pipeline, and the OPSD branches that start from it. All take 120 steps, or 240 where
# the correct-only run says after 120 that it has not settled.
pipeline() {
    local from="--model runs/table/rlvr-$1" end="--eval-problems 0" steps=120
    local way="--eval-every 5 --eval-problems 256"
    local first="opsd settled-correct $1 $from $way --filter correct --save-every 40 --steps"
    run sft sft "$1"
    run rlvr rlvr "$1" --model "runs/table/sft-$1" $end
    run $first $steps
    if [ -d "runs/table/settled-correct-$1/step-160" ]; then
        steps=240
    elif grep -q "not settled" "runs/table/settled-correct-$1.log"; then
        steps=240
        rm "runs/table/settled-correct-$1/model.safetensors"
    fi
    run $first $steps
    local long="--save-every 40 --steps $steps" names="settled-correct/step-40 settled-correct"
    for filter in incorrect all; do
        run opsd settled-$filter "$1" $from $way $long --filter $filter
        names="$names settled-$filter/step-40 settled-$filter"
    done
    keep "runs/table/settled-all-$1/kl_by_position.jsonl" "kl_by_position/settled-all-$1.jsonl"
    evaluate settled "$1" "rlvr $names" --context solution

    names=
    for filter in correct incorrect; do
        run opsd lora-$filter "$1" $from $end $long --filter $filter --lora 16 --lr 1e-3
        names="$names lora-$filter/step-40 lora-$filter"
    done
    evaluate lora "$1" "rlvr $names"

    names=
    for branch in wrong-correct wrong-incorrect instruction-incorrect; do
        run opsd settled-$branch "$1" $from $end $long --filter ${branch#*-} \
            --context ${branch%-*}
        names="$names settled-$branch/step-40 settled-$branch"
    done
    evaluate settled-contexts "$1" "rlvr $names" --context wrong instruction

    names=
    for filter in all incorrect; do
        for context in solution other wrong instruction; do
            local what="$filter --context $context" name=${context#solution}
            name=${name:+$name-}$filter
            run opsd settled-$name "$1" $from $end $long --filter $what
            run opsd settled-agreement-$name "$1" $from $end $long --filter $what --gate agreement
            names="$names settled-$name settled-agreement-$name"
        done
    done
    evaluate settled-gate "$1" "rlvr $names"

    # Where the dip was deepest: does a smaller rate avoid it, does the gate?
    if [[ $1 =~ ^(208|204|201)$ ]]; then
        run opsd slow-correct "$1" $from --eval-every 10 --eval-problems 256 --filter correct \
            --lr 3e-5 --steps 400
        run opsd agreement-correct "$1" $from $way --filter correct --gate agreement --steps $steps
    fi

    run opsd settled-instruction-correct "$1" $from $end $long --filter correct \
        --context instruction
    names="settled-instruction-correct/step-40 settled-instruction-correct"
    evaluate settled-more "$1" \
        "rlvr $names settled-wrong-all/step-40 settled-instruction-all/step-40"
}

# Seed: several draws a problem, and tight caps; 120 steps from the RLVR model of `pipeline`.
groups() {
    local from="--model runs/table/rlvr-$1 --eval-problems 0 --steps 120 --save-every 40" names=
    for filter in correct incorrect all; do
        run opsd sibling-$filter "$1" $from --filter $filter --context sibling --group 4 --batch 24
        names="$names sibling-$filter/step-40 sibling-$filter"
    done
    evaluate sibling "$1" "rlvr $names" --context sibling solution
    for divergence in reverse_kl rft; do
        local name=${divergence/reverse_kl/}
        run opsd ${name:+rft-}shortest "$1" $from --filter shortest --group 4 --batch 92 \
            --divergence $divergence
    done
    evaluate shortest "$1" "rlvr shortest/step-40 shortest rft-shortest/step-40 rft-shortest"
    for cap in 44 70; do
        names=
        for filter in truncated correct incorrect all; do
            local flags="$from --filter $filter --max-new-tokens $cap" settled=cap$cap-$filter
            # At 70 tokens hardly a response is truncated after ten steps; ten without end a run.
            if [ $settled = cap70-truncated ]; then flags="$flags --steps 40" settled=; fi
            run opsd cap$cap-$filter "$1" $flags
            names="$names cap$cap-$filter/step-40 $settled"
        done
        evaluate cap$cap "$1" "rlvr $names"
    done
}

# Seed: the three stages with a pretrained model; longer; controls; and OPSD before RLVR.
real() {
    local task="--data runs/real/short/train-$1.jsonl --dtype bfloat16 --micro-tokens 4096"
    local sample="--max-new-tokens 200 $REAL_SAMPLER" start=runs/table/real-rlvr-$1
    local opsd="$task $sample --context-first --batch 16 --resample 3 --steps 10 --lr 1e-5"
    opsd="$opsd --state-every 0"
    local way="--eval-data runs/real/short/dev.jsonl --eval-problems 100 --eval-every 5"
    local test="--data runs/real/short/test.jsonl --dtype bfloat16 $sample"
    local contexts="solution answer instruction other"
    local short="--state-every 0 --batch 8"
    run sft real-sft "$1" --model runs/real/model $task $short --fields solution=trace --steps 20 \
        --lr 1e-4 --warmup 5
    run rlvr real-rlvr "$1" --model "runs/table/real-sft-$1" $task $sample $short --steps 8 \
        --lr 5e-6
    for filter in correct incorrect all; do
        run opsd real-$filter "$1" --model $start $opsd $way --filter $filter
    done
    keep "runs/table/real-all-$1/kl_by_position.jsonl" "kl_by_position/real-all-$1.jsonl"
    evaluate real "$1" "real-rlvr real-correct real-incorrect real-all" $test --context-first \
        --context $contexts

    for filter in correct incorrect; do
        run opsd real-long-$filter "$1" --model $start $opsd --filter $filter --steps 24
    done
    evaluate real-long "$1" "real-rlvr real-long-correct real-long-incorrect" $test

    local names=real-rlvr
    for context in instruction other; do
        for filter in correct incorrect; do
            run opsd real-$context-$filter "$1" --model $start $opsd --filter $filter \
                --context $context
            names="$names real-$context-$filter"
        done
    done
    evaluate real-contexts "$1" "$names" $test

    for filter in correct incorrect; do
        run opsd real-sft-$filter "$1" --model "runs/table/real-sft-$1" $opsd --filter $filter
    done
    evaluate real-order "$1" "real-sft real-rlvr real-sft-correct real-sft-incorrect" $test \
        --context-first --context $contexts
}

# Seed: a pretrained model that solves most of its problems before OPSD.
four() {
    local task="--data runs/real/four/train-$1.jsonl --dtype bfloat16 --micro-tokens 4096"
    local sample="--max-new-tokens 200 $REAL_SAMPLER" short="--state-every 8 --batch 8"
    run sft real-four-sft "$1" --model runs/real/model $task $short --fields solution=trace \
        --steps 20 --lr 1e-4 --warmup 5
    run rlvr real-four-rlvr "$1" --model "runs/table/real-four-sft-$1" $task $sample $short \
        --steps 32 --lr 5e-6
    for filter in correct incorrect; do
        run opsd real-four-$filter "$1" --model "runs/table/real-four-rlvr-$1" $task $sample \
            --context-first --batch 16 --resample 3 --steps 40 --lr 1e-5 --filter $filter
    done
    local context gate names=
    for context in solution other; do
        for gate in all agreement; do
            run opsd real-four-$context-$gate "$1" --model "runs/table/real-four-rlvr-$1" $task \
                $sample --context-first --batch 16 --steps 40 --lr 1e-5 --filter all \
                --context $context --gate $gate
            names+=" real-four-$context-$gate"
        done
    done
    evaluate real-four "$1" "real-four-rlvr real-four-correct real-four-incorrect" $sample \
        --data runs/real/four/test.jsonl --dtype bfloat16 --context-first --context solution
    evaluate real-four-gates "$1" "real-four-rlvr$names" $sample \
        --data runs/real/four/test.jsonl --dtype bfloat16
}
export -f keep run evaluate pipeline groups real four

files() { for seed in $SEEDS; do echo "$results/${1/SEED/$seed}"; done; }

if [ "${1:-real}" != real ]; then
    echo "lab/reproduce.sh $1: nothing, or real"
    exit 2
fi
if [ "${1:-}" = real ]; then
    python -m lab.pretrained runs/real --seeds $REAL_SEEDS
    # The CPU build of vLLM: one thread a job, and little of the memory is enough.
    export REAL_SAMPLER="--backend transformers" OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
    if python -c "import vllm" 2> /dev/null; then
        REAL_SAMPLER="--backend vllm --vllm-eager --vllm-memory 0.15"
    fi
    echo $REAL_SEEDS | xargs -P "$JOBS" -n 1 bash -c 'set -euo pipefail; real "$1"; four "$1"' _
    SEEDS=$REAL_SEEDS
    python -m lab.table --real-seeds $SEEDS --docs
    for figure in path trajectory; do
        python -m tools.plot $figure $(files metrics/real-correct-SEED.jsonl.gz) \
            $(files metrics/real-incorrect-SEED.jsonl.gz) --out $results/real-$figure
    done
    python -m tools.plot position $(files kl_by_position/real-all-SEED.jsonl.gz) \
        --out $results/real-position
    first=${SEEDS%% *}
    python -m tools.show --model "runs/table/real-rlvr-$first" --data runs/real/short/dev.jsonl \
        --problems 100 --draw 100 --contexts solution --context-first --threads 1 \
        --max-new-tokens 200 --jsonl runs/real/tokens.jsonl --out runs/real/tokens.html --overwrite
    python -m lab.top_tokens runs/real/tokens.jsonl > $results/real-tokens.md
    exit
fi

echo $SEEDS | xargs -P "$JOBS" -n 1 bash -c 'set -euo pipefail; pipeline "$1"' _
echo $FEW | xargs -P "$JOBS" -n 1 bash -c 'set -euo pipefail; groups "$1"' _

python -m lab.gates --seeds $FEW --jobs "$JOBS"
keep runs/gates/table.json gates/gates.json
cp runs/gates/figure.png $results/gates.png
cp runs/gates/figure.svg $results/gates.svg

python -m lab.table --seeds $SEEDS --real-seeds $REAL_SEEDS --docs
python -m lab.plot pairs $(files evaluations/settled-SEED.json.gz) \
    $(files evaluations/settled-contexts-SEED.json.gz) \
    $(files evaluations/settled-more-SEED.json.gz) \
    $(SEEDS=$FEW files evaluations/sibling-SEED.json.gz) \
    $(SEEDS=$FEW files evaluations/cap44-SEED.json.gz) --out $results/pairs
python -m lab.plot gate $(files evaluations/settled-gate-SEED.json.gz) --out $results/gate
python -m tools.plot path $(files metrics/settled-correct-SEED.jsonl.gz) \
    $(files metrics/settled-incorrect-SEED.jsonl.gz) --out $results/figure1
python -m tools.plot position $(files kl_by_position/settled-all-SEED.jsonl.gz) \
    --out $results/figure2
python -m tools.plot trajectory $(files metrics/settled-correct-SEED.jsonl.gz) \
    $(files metrics/settled-incorrect-SEED.jsonl.gz) --out $results/figure3
python -m lab.plot shift $(files evaluations/settled-SEED.json.gz) --out $results/figure4
