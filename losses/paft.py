"""PAFT: supervised and preference training in parallel, the policies then merged (2406.17923).

    merged = base + w (A - base) + (1 - w) (B - base)
A and B are two policies trained from one base, A supervised, B on preferences; w = 1/2 is the mean
of their weights. Known from a summary only: the paper's own constants and results were not read.
The paper adds an L1 term to the supervised loss, so that A's difference is sparse and disturbs B's
little. That term is left out; --density D keeps the share D of A's difference that is largest in
magnitude, over all weights together, and drops the rest, after the training instead of in it.
At density 1 the base cancels, w A + (1 - w) B: neither training comes before the other.
There is no loss here, so no --loss: any run of train.py that starts at the base may be B,
    python train.py --policy BASE --supervised-steps 0 --loss dpo --out runs/b
and A is its supervised stage, runs/stages/supervised-..., of train.py --policy BASE --loss dpo.
Left out: merging by signs (TIES) or by dropping at random (DARE).
Run: python -m losses.paft BASE A B --out FOLDER [--weight 0.5] [--density 1]
     python -m losses.paft    (four weights merged)
"""

import argparse
import os
import sys

import torch

import policy as policies

# Names in a model's config that say where a folder came from, not what the weights mean.
ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype")


def sparsified(difference, density):
    """A difference with only its entries of largest magnitude, the others 0.

    difference:
        {name: tensor}.
    density:
        above 0, at most 1: the share that is kept, of all tensors together.

    Returns {name: tensor}. Entries of equal magnitude are kept or dropped together: of as many as
    the share allows at least.
    """
    if density == 1:
        return difference
    sizes = torch.cat([value.abs().flatten() for value in difference.values()])
    # At least one: a share of nothing would be B alone, which --weight 0 says.
    kept = max(1, round(density * len(sizes)))
    least = sizes.kthvalue(len(sizes) - kept + 1).values  # the kept-th largest
    return {name: value * (value.abs() >= least) for name, value in difference.items()}


def merge(base, first, second, weight, density=1.0):
    """base + w (first - base) + (1 - w) (second - base), with a sparsified first difference.

    base, first, second:
        {name: tensor}, equal names and shapes.
    weight:
        from 0, second, to 1, first.
    density:
        as sparsified takes it.

    Returns {name: tensor} in float32.
    """
    start = {name: value.double() for name, value in base.items()}
    # In float64: in float32 base + (first - base) is not first to the bit.
    apart = {name: first[name].double() - value for name, value in start.items()}
    apart = sparsified(apart, density)
    merged = {}
    for name, value in start.items():
        other = second[name].double() - value
        merged[name] = (value + weight * apart[name] + (1 - weight) * other).float()
    return merged


def meaning(model):
    """A model's config, without where it came from: what its weights mean."""
    config = model.config.to_dict()
    return {name: value for name, value in config.items() if name not in ORIGIN}


def check_relatives(paths, models, tokenizers):
    """Raises ValueError, naming two folders, if their policies cannot be merged.

    paths, models, tokenizers:
        of the base, A and B.
    """
    shapes = []
    for model in models:
        shapes.append({name: value.shape for name, value in model.named_parameters()})
    for path, model, tokenizer, shape in zip(paths, models, tokenizers, shapes, strict=True):
        both = f"{paths[0]} and {path}"
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise ValueError(f"{both} have different tokenizers; give policies of one base")
        # By names, too: a head of its own and one tied to the embedding are two architectures.
        if shape != shapes[0]:
            raise ValueError(f"{both} have weights of other names or shapes; give one base's")
        # Equal shapes do not say it all: the number of heads changes none.
        here, there = meaning(models[0]), meaning(model)
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"{both} differ in {name} (config.json); give policies of one base"
                )


@torch.no_grad()
def merge_folders(options):
    """Merges the three policies of a command line and writes the result. Raises ValueError."""
    if os.path.exists(options.out):
        raise ValueError(f"--out {options.out}: is there already; give another folder")
    paths = [options.base, options.a, options.b]
    loaded = [policies.load(path) for path in paths]
    models = [model for model, _ in loaded]
    tokenizers = [tokenizer for _, tokenizer in loaded]
    check_relatives(paths, models, tokenizers)
    # Parameters, not a state_dict: a tied head is the embedding, counted once.
    base, first, second = (dict(model.named_parameters()) for model in models)
    merged = merge(base, first, second, options.weight, options.density)
    for name, value in base.items():
        value.copy_(merged[name])
    models[0].save_pretrained(options.out)
    tokenizers[0].save_pretrained(options.out)


def share(text):
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from 0 to 1")
    return value


def above_0(text):
    """A number above 0, at most 1."""
    value = share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text}: give a share above 0, or --weight 0 for B alone")
    return value


def fail(message):
    raise ValueError(message)


def parse(argv):
    """The command line's options. Raises ValueError in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m losses.paft", description="Merges two policies that have one base."
    )
    parser.error = fail  # one line without the usage
    add = parser.add_argument
    add("base", help="policy folder that both were trained from")
    add("a", help="the supervised one; of a run's folder RUN give RUN/policy")
    add("b", help="the one trained on preferences")
    add("--out", required=True, help="the merged policy's folder, which is made")
    add("--weight", type=share, default=0.5, help="of A, from 0 to 1 (default 0.5)")
    add("--density", type=above_0, default=1.0, help="of A's difference, 0 to 1 (default 1)")
    return parser.parse_args(argv)


def main(argv=None):
    """The command; without arguments the worked example. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        worked_example()
        return 0
    policies.quiet()
    try:
        options = parse(argv)
        merge_folders(options)
    except (ValueError, OSError) as error:
        print(f"paft: error: {policies.first_line(error)}", file=sys.stderr)
        return 2
    print(f"merged into {options.out}; python evaluate.py {options.out} {options.base}")
    return 0


def worked_example():
    """Prints four weights of a base and its two trained copies, and what they are merged to."""
    base = {"w": torch.tensor([1.0, 2.0, -1.0, 0.0])}
    first = {"w": torch.tensor([1.5, 2.1, -1.0, 0.2])}
    second = {"w": torch.tensor([1.0, 2.0, -2.0, 0.4])}
    print("base 1, 2, -1, 0; A - base = 0.5, 0.1, 0, 0.2; B - base = 0, 0, -1, 0.4")
    for weight, density in ((0.5, 1.0), (1.0, 1.0), (0.5, 0.25)):
        merged = merge(base, first, second, weight, density)["w"]
        print(f"  w = {weight}, density {density:<4}  ", end="")
        print("".join(f" {value:+.3f}" for value in merged.tolist()))
    print("w = 1/2 is the mean of A and B; density 1/4 keeps A's 0.5 alone")


if __name__ == "__main__":
    sys.exit(main())
