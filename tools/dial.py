"""A dial of length without training: checkpoints on the line between two.

The weights are A + at * (B - A): 0 is A, 1 is B, between them a mixture, above 1 further on the way
that training went. The table and the file are eval.py's; changes are against the first of --at.

    python -m tools.dial tiny/rlvr runs/opsd-correct-001 --at 0 0.25 0.5 1 1.5
    python -m tools.plot path dial.json --out dial      # the figure, from --out dial.json
"""

import torch

import data
import eval as evaluation
import ranks
import samplers
from cli import Parser, add_run_flags, fail, set_up, start
from model import load_model
from run import check_out
from verify import Verifier


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("models", nargs=2, metavar="MODEL", help="A and B, of one shape")
    parser.add_argument("--at", nargs="+", type=float, default=[0, 0.25, 0.5, 1, 1.5])
    add = add_run_flags(parser)
    add("--out", help="JSON file for the table and every response's outcome and length")
    data.add_data_flags(parser, several=True)
    samplers.add_sampling_flags(parser)
    evaluation.add_evaluation_flags(parser)
    return parser.parse_args(argv)


def load_pair(paths, device, dtype):
    """(model A, the weights of A, those of B, tokenizer); ends the program if they do not match."""
    (model, tokenizer), (other, other_tokenizer) = (load_model(p, device, dtype) for p in paths)
    pair = " ".join(paths)
    if tokenizer.get_vocab() != other_tokenizer.get_vocab():
        fail(f"{pair}: two vocabularies; a line needs one model's checkpoints")
    first, second = (dict(m.named_parameters()) for m in (model, other))
    shapes = [{name: weight.shape for name, weight in w.items()} for w in (first, second)]
    if shapes[0] != shapes[1]:
        fail(f"{pair}: weights of other names or shapes; a line needs one model's checkpoints")
    return model, [w.detach().clone() for w in first.values()], list(second.values()), tokenizer


def turn(model, first, second, at):
    """Puts first + at * (second - first) into the model: at 0 and 1 these weights to the bit."""
    with torch.no_grad():
        for weight, a, b in zip(model.parameters(), first, second, strict=True):
            weight.copy_(torch.lerp(a, b, at))


def main(argv=None):
    args = parse_args(argv)
    check_out(args, directory=False)
    device = set_up(args)
    samplers.choose_backend(args, device)
    benchmarks = evaluation.load_benchmarks(args)
    model, first, second, tokenizer = load_pair(args.models, device, args.dtype)
    data.require_thinking_switch(tokenizer, args.thinking == "on")
    args.model = [f"{at:g} of the way" for at in args.at]  # names in the table, as eval.py's
    sampler = samplers.make_sampler(model, tokenizer, args)
    named = {benchmark: [] for benchmark in benchmarks}
    with Verifier() as verifier:
        for name, at in zip(args.model, args.at, strict=True):
            turn(model, first, second, at)
            sampler.push(model)
            for benchmark, problems in benchmarks.items():
                print(f"evaluating {name} on {benchmark}", flush=True)
                inputs = sampler, tokenizer, problems, verifier, args, args.samples
                named[benchmark].append((name, evaluation.evaluate(*inputs)))
    print(f"\nfrom {args.models[0]} (0) to {args.models[1]} (1)")
    records = evaluation.report(benchmarks, named, {}, args)
    if args.out:
        evaluation.write_evaluation(benchmarks, named, records, {}, args)
    ranks.leave()


if __name__ == "__main__":
    start(main)
