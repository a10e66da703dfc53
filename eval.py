"""Accuracy and length of one or several checkpoints against a baseline, with intervals.

1. average@k accuracy: k samples a problem, graded by verify.py; metrics.py has the measures.
2. Changes are against the first checkpoint. Several --data: one table each, then the mean over
   benchmarks, each counting alike.
3. --context NAME evaluates the prompt-only row as well: the first model reading the teacher's
   prompt. The student is pulled towards it.

    python eval.py --model tiny/rlvr runs/opsd-correct-001 runs/opsd-incorrect-001
    python eval.py --model tiny/rlvr --context solution
    python eval.py --model Qwen/Qwen3-1.7B runs/qwen --data math500.jsonl aime24.jsonl \\
        --samples 8 --temperature 0.6 --max-new-tokens 30000
"""

import os

if __name__ == "__main__":
    from launch import start  # before torch: from now on Ctrl-C is one line

from transformers import AutoConfig

import data
import ranks
import rollout
import samplers
from answers import extract
from data import CONTEXTS
from metrics import compare, compared, evaluate, table_of
from model import context_limit, load_model, load_tokenizer
from run import Parser, add_run_flags, check_out, fail, provenance, set_up, write_json
from verify import Verifier


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", nargs="+", required=True, help="checkpoints; first: baseline")
    data.add_data_flags(parser, several=True)
    samplers.add_sampling_flags(parser)
    parser.set_defaults(vllm_memory=0.7)  # nothing trains beside it
    add = parser.add_argument_group("evaluation", "what is compared, and how often").add_argument
    add("--problems", type=int, default=512, help="without --data: number of embedded ones")
    add("--samples", type=int, default=4, help="samples a problem (k of average@k)")
    add("--context", nargs="+", default=[], choices=list(CONTEXTS)[1:], help="prompt-only rows")
    rollout.add_context_flags(add)
    add = add_run_flags(parser)
    add("--out", help="JSON file (.gz: packed): the table, and every response with its verdict")
    args = parser.parse_args(argv)
    if "sibling" in args.context and args.samples == 1:
        fail("--context sibling: a response has siblings only with --samples 2 or more")
    if not args.temperature and args.samples > 1:
        fail(f"--samples {args.samples}: at --temperature 0 all are equal; give --samples 1")
    return args


def load_benchmarks(args):
    """{name: problems}: one a file or data set of `--data`, or the embedded held-out side."""
    if not args.data:
        return {"embedded": data.embedded_problems(args.problems, args.seed, held_out=True)}
    names = [os.path.splitext(os.path.basename(path))[0] for path in args.data]
    if len(set(names)) < len(names):
        fail(f"--data {' '.join(args.data)}: two benchmarks of one name")
    files = [data.load_file(args, path) for path in args.data]
    return dict(zip(names, files, strict=True))


def check_prompts(args, benchmarks):
    """Ends the program, before any model is evaluated, at a prompt that leaves no room for the
    response, and where two tokenizers cut problems differently: lengths would not compare.
    """
    problems = sum(benchmarks.values(), [])
    texts = [problem.question + problem.solution for problem in problems[:100]]
    expected = None
    for path in args.model:
        tokenizer = load_tokenizer(path)
        ids = tokenizer(texts).input_ids
        expected = expected or ids
        if ids != expected:
            others = f"{args.model[0]}'s: lengths do not compare"
            fail(f"--model {path}: another tokenizer than {others}")
        limit = context_limit(AutoConfig.from_pretrained(path))[0]
        for problem in problems if limit else ():
            count = len(data.render_prompt(tokenizer, problem, "", args.thinking == "on"))
            if count + args.max_new_tokens > limit:
                room = f"a prompt has {count} tokens and the context of {path} is {limit}"
                fail(f"--max-new-tokens {args.max_new_tokens}: {room}")


def drop_long_contexts(texts, rollouts, tokenizer, args, limit):
    """`texts`, None in place of one whose prompt leaves no room for the response."""
    kept = []
    for text, r in zip(texts, rollouts, strict=True):
        layout = args.thinking == "on", args.context_first
        prompt = data.render_prompt(tokenizer, r.problem, text or "", *layout)
        kept.append(text if not limit or len(prompt) + args.max_new_tokens <= limit else None)
    return kept


def main(argv=None):
    args = parse_args(argv)
    check_out(args, directory=False)
    device = set_up(args)
    samplers.choose_backend(args, device)
    benchmarks = load_benchmarks(args)
    for problems in benchmarks.values():
        for context in args.context:
            data.require_parts(problems, context)
    check_prompts(args, benchmarks)
    named = {benchmark: [] for benchmark in benchmarks}
    sampler = None
    with Verifier() as verifier:
        for path in args.model:
            model, tokenizer = load_model(path, device, args.dtype)
            data.require_thinking_switch(tokenizer, args.thinking == "on")
            sampler = samplers.make_sampler(model, tokenizer, args, sampler)
            for benchmark, problems in benchmarks.items():
                print(f"evaluating {path} on {benchmark}", flush=True)
                inputs = sampler, tokenizer, problems, verifier, args, args.samples
                own = evaluate(*inputs)
                named[benchmark].append((path, own))
                # Written contexts reflect on the model's own responses.
                write = rollout.make_writer(sampler, tokenizer, args, args.seed)
                for context in args.context if path == args.model[0] else []:
                    name, texts = f"{path} reading {context}", CONTEXTS[context](own, write, args)
                    texts = drop_long_contexts(texts, own, tokenizer, args, sampler.limit)
                    failed = f"{texts.count(None)} of {len(texts)} contexts failed"
                    without = "; those responses are without one" if None in texts else ""
                    print(f"evaluating {name} on {benchmark}, {failed}{without}", flush=True)
                    named[benchmark].append((name, evaluate(*inputs, texts)))
            # Or it would still be in memory while the next one is loaded.
            model = sampler.model = sampler.engine["holds"] = None
    records = report(benchmarks, named, args)
    if args.out:
        responses = {
            benchmark: {name: [response_of(r) for r in rollouts] for name, rollouts in pairs}
            for benchmark, pairs in named.items()
        }
        record = dict(args=vars(args), **provenance(), records=records, responses=responses)
        write_json(args.out, record)
        print(f"\nwritten to {args.out}")
    ranks.leave()


def report(benchmarks, named, args):
    """Prints all tables; returns the records."""
    records = []
    settings = f"temperature {args.temperature}, cap {args.max_new_tokens} tokens"
    for benchmark, problems in benchmarks.items():
        table = compare(named[benchmark], benchmark)
        counts = f"{len(problems)} problems, {args.samples} responses each"
        print(f"\n{benchmark}: {counts}, {settings}; change with 95% interval")
        print(table_of(table))
        records += table
    if len(benchmarks) > 1:
        table = compare_mean(named)
        print("\nmean over the benchmarks")
        print(table_of(table))
        records += table
    print()
    for r in records:
        if r["change"] and r["group"] == "all":
            counts = ", ".join(f"{key} {value:.1f}" for key, value in r["shift"].items())
            print(f"shift of {r['name']} on {r['benchmark']}, expected problems: {counts}")
    return records


def compare_mean(benchmarks):
    """`compare` over {benchmark: named}: means, each benchmark counting alike; sums of shifts."""
    records = []
    for named in zip(*benchmarks.values(), strict=True):  # one model on all benchmarks
        firsts = [named[0][1] for named in benchmarks.values()]
        pairs = list(zip(firsts, [rollouts for _, rollouts in named], strict=True))
        record = dict(name=named[0][0], benchmark="mean", group="all")
        records.append(dict(record, **compared(pairs, not records)))
    return records


def response_of(r):
    return dict(
        question=r.problem.question,
        difficulty=r.problem.difficulty,
        gold=r.problem.answer,
        response=r.text,
        answer=extract(r.text) if r.finished else None,
        verdict=r.reason,
        length=len(r.response_ids),
    )


if __name__ == "__main__":
    start(main)
