"""Everything there is to check and to measure on a GPU, in one command that prints one page.

  exactness  the sampler with its cache against a plain forward pass; the device against the CPU:
             the same responses from the same uniforms, log-probabilities, a step's gradient
  speed      studies/bench.py on GPT-2 124M in bfloat16: tokens/s, phases, floors
  memory     studies/memory.py's table
  training   IPO and IPO-MD, GPT-2 124M from scratch on the built-in task, one seed each
Correctness comes first: if it fails, the command ends there with status 1.
Left out: several GPUs (torchrun and train.py: job/parallel.py).
Run: python -m studies.gpu    (needs CUDA; about 20 min on one GPU)
     python -m studies.gpu exactness speed         (some of the parts)
     python -m studies.gpu --device cpu --small    (the same page on a CPU, sizes for a test: 3 min)
"""

import argparse
import sys

import job.options  # before torch: it sets how torch's threads wait

# isort: split
import torch
import transformers

import data
import policy as policies
import sampler
import train
from studies import bench, memory

PARTS = ("exactness", "speed", "memory", "training")
SMALL = ["--layers", "2", "--width", "64", "--vocabulary", "64", "--prompts", "4"]
SMALL += ["--prompt-tokens", "16", "--new-tokens", "8", "--dtype", "float32", "--repeats", "1"]
SHORT = ["--supervised-steps", "20", "--preference-steps", "20", "--steps", "4"]
SHORT += ["--eval-prompts", "20", "--batch-size", "8"]


def one_step(device, kind, dtype):
    """A step's ids, log-probabilities and gradient from fixed weights and uniforms, on the CPU.

    kind:
        "gpt2" or "llama".
    dtype:
        of the weights.
    """
    options = bench.parse([*SMALL, "--device", "cpu"])
    reference = bench.build(options, 0, kind=kind).to(dtype)
    policy = bench.build(options, 1, kind=kind).to(dtype)
    for model in (policy, reference):
        model.config.eos_token_id = 0  # responses of different lengths
    run = job.options.parse(["--loss", "ipo_md", "--device", "cpu"])
    method = job.options.find_method("ipo_md")
    run.device = device
    policy, reference = policy.to(device), reference.to(device).requires_grad_(False)
    prompt = policies.pad([[5, 6, 7], [8], [9, 10]] * 3, "left", 0, device)
    uniforms = data.uniforms(data.generator(0, "gpu", 0), 8, 2, len(prompt.ids))
    y, y_other = sampler.draw_pairs(method.PAIR, policy, reference, prompt, 0.125, uniforms)
    label = torch.linspace(0, 1, len(prompt.ids), dtype=dtype, device=device)
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    train.update(run, method, policy, reference, still, prompt, y, y_other, label)
    with torch.no_grad():
        logp = policies.log_prob(policy, prompt, y).cpu()
    gradient = torch.cat([weight.grad.flatten() for weight in policy.parameters()]).cpu()
    return [part.to("cpu").lists() for part in (y, y_other)], logp, gradient


def compare_devices(device):
    """Prints how far a step on the device is from the CPU's. Returns whether it is near enough."""
    good = True
    for kind in ("gpt2", "llama"):
        # transformers works out Llama's rotations in float32, whatever the model's precision.
        double = 1e-10 if kind == "gpt2" else 1e-6
        for dtype, limit in ((torch.float64, double), (torch.float32, 1e-3)):
            ids, logp, gradient = one_step("cpu", kind, dtype)
            its_ids, its_logp, its_gradient = one_step(device, kind, dtype)
            same = ids == its_ids
            apart = ((its_logp - logp) / logp).abs().max().item() if same else float("nan")
            turned = (its_gradient - gradient).norm() / gradient.norm()
            # A flipped token of float32 parts the two: only float64 must draw the same.
            right = apart < limit and turned < limit if same else dtype == torch.float32
            good = good and bool(right)
            print(
                f"{kind}, {str(dtype).removeprefix('torch.')}: same responses {same}, "
                f"log-probabilities apart {apart:.1e}, gradient {turned:.1e} "
                f"(limit {limit:g}){'' if right else '  WRONG'}"
            )
    return good


def cached_is_plain(device, dtype):
    """Prints the sampler's worst relative difference. Returns whether it is below 1e-5."""
    options = bench.parse(["--device", device, *([] if device == "cuda" else SMALL)])
    good = True
    for kind in ("gpt2", "llama"):
        worst = bench.exactness(options, bench.build(options, 0, kind=kind).to(dtype))
        good = good and worst < 1e-5
        print(f"{kind}: cached against plain log-probabilities, worst relative {worst:.1e}")
    return good


def train_both(device, small, folder):
    """IPO and IPO-MD through train.py itself. Returns the exit statuses."""
    argv = ["--device", device, "--stages", f"{folder}/stages", "--resume"]
    argv += SHORT if small else ["--policy", "gpt2-124m", "--dtype", "bfloat16"]
    statuses = []
    for loss in ("ipo", "ipo_md"):
        statuses.append(train.main([*argv, "--loss", loss, "--out", f"{folder}/{loss}"]))
    return statuses


def main(argv=None):
    """Prints the page; returns the exit status: 1 where the device is not exact."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="sizes for a test")
    parser.add_argument("--out", default="runs/gpu", help="of the runs (default runs/gpu)")
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        reason = f"{unknown[0]}: no part of the page; there are {', '.join(PARTS)}"
        print(f"studies.gpu: error: {reason}", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "studies.gpu: error: --device cuda: no CUDA device is available; "
            "take --device cpu --small for a look at the page",
            file=sys.stderr,
        )
        return 2
    return page(options)


def page(options):
    """Prints the parts that are asked for; returns the exit status."""
    asked = options.parts or PARTS
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    if "exactness" in asked:
        print("\n## Exactness")
        # TF32 would make float32's products exact to 1e-3 only; what is compared is the code.
        torch.backends.cuda.matmul.allow_tf32 = False
        exact = cached_is_plain(options.device, torch.float32)
        if not (compare_devices(options.device) and exact):
            return 1
    if "speed" in asked:
        print("\n## Speed")
        bench.main(["--device", options.device, *(SMALL if options.small else [])])
    if "memory" in asked:
        print("\n## Memory")
        memory.table(["default"] if options.small else list(memory.SIZES), options.device)
    if "training" in asked:
        print("\n## Training")
        return max(train_both(options.device, options.small, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
