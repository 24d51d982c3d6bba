"""What a step costs: sampling beside other ways to sample, and each phase beside the least that this machine allows.

  exactness  the cached sampler's log-probabilities against a plain forward pass, with left padding and rows of unequal length
  sampling   policy and mixture against transformers' generate() with its cache, and against no cache: both models, whole prefix
  phases     prefill, decode, preference, forward, backward, optimiser of train.py's own step, each beside its floor
  memory     forward and backward of 64 responses of 64 tokens after 448-token prompts, vocabulary 50,257
Every time is a median of --repeats after a warm-up. Random weights: the time does not depend on them.
Run: python bench.py [--loss nash_md] [--json FILE]    (2 min 40 s on 2 cores)
     python bench.py --device cuda    (GPT-2 124M, bfloat16, 64 prompts of 512 tokens)

Left out: other libraries, which this one does not install; several GPUs.
"""

import argparse
import json
import statistics
import sys
import time
from types import SimpleNamespace

import train  # first: it sets how torch's threads wait

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import policy as policies
import preference_model
import sampler

NEW = (16, 48, 128)  # new tokens of the sampling table
STRIDE = 16  # the uncached yardstick times one prefix in so many


def model(options, seed, vocabulary=None):
    """A GPT-2 of the options' size with random weights, which never ends a response: all paths do equal work."""
    context = max(512, options.prompt_tokens + max(NEW))
    config = GPT2Config(vocab_size=vocabulary or options.vocabulary, n_positions=context, n_layer=options.layers, n_embd=options.width,
                        n_head=options.width // 64, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = GPT2LMHeadModel(config).eval().to(options.device)
    made.config.eos_token_id = -1  # no token
    return made


def seconds(options, *works):
    """Median seconds of each work() over the repeats, one after the other within a repeat, after one warm-up."""
    times = [[] for _ in works]
    for _ in range(options.repeats + 1):
        for work, taken in zip(works, times, strict=True):
            begun = clock(options)
            work()
            taken.append(clock(options) - begun)
    return [statistics.median(taken[1:]) for taken in times]


def clock(options):
    """Seconds; a GPU's queue is waited for."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(options):
    """What this machine does at its best: (bytes a second of a copy, operations a second of a matrix product)."""
    words, room = torch.ones(2, 2**26, device=options.device)
    square = torch.ones(2048, 2048, device=options.device, dtype=torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)
    copied, multiplied = seconds(options, lambda: room.copy_(words), lambda: square @ square)
    return 2 * words.nbytes / copied, 2 * 2048**3 / multiplied


@torch.no_grad()
def exactness(options, policy):
    """Worst relative difference of cached and plain token log-probabilities; left padding, responses of unequal length."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        prompt = policies.pad([torch.randint(1, options.vocabulary, (n,)).tolist() for n in (3, 17, 40, 40)], "left", 0, options.device)
        response = policies.pad([torch.randint(1, options.vocabulary, (n,)).tolist() for n in (24, 5, 1, 13)], "right", 0, options.device)
    plain = policies.token_log_probs(policy, prompt, response)
    stream = sampler.Stream(policy, torch.arange(4, device=options.device), torch.ones(4, device=options.device), prompt, 24)
    cached = torch.zeros_like(plain)
    for step in range(24):
        cached[:, step] = torch.log_softmax(stream.logits, -1).gather(1, response[0][:, step, None])[:, 0]
        stream.advance(response[0][:, step])
    return ((cached - plain) / plain)[response[1]].abs().max().item()


@torch.no_grad()
def uncached(options, policy, reference, prompt):
    """Seconds of the mixture without a cache for each of NEW: both models read the whole prefix for every token.

    The time of a token depends on its prefix's length alone, so one length in STRIDE is timed and stands for STRIDE tokens.
    """
    def token(ids):
        with train.precision(options):
            log_pi, log_ref = (torch.log_softmax(policies.raise_precision(one(ids).logits), -1)[:, -1] for one in (policy, reference))
        return torch.multinomial(torch.softmax(log_pi * 0.875 + log_ref * 0.125, -1), 1)

    def prefix(new):
        return torch.cat([prompt[0], prompt[0][:, :1].expand(-1, new)], 1)

    each = [STRIDE * seconds(options, lambda new=new: token(prefix(new)))[0] for new in range(STRIDE // 2, max(NEW), STRIDE)]
    return {new: sum(each[: new // STRIDE]) for new in NEW}


def sampling(options, policy, reference, prompt, rates):
    """The sampling table's rows, and the share of the mixture's time that its floor is."""
    slow = uncached(options, policy, reference, prompt)
    for new in NEW:
        def draw(beta):
            with train.precision(options):
                sampler.sample(policy, reference, prompt, beta, torch.Generator().manual_seed(0), new)

        def generate():
            with torch.no_grad(), train.precision(options):
                policy.generate(prompt[0], attention_mask=prompt[1].long(), max_new_tokens=new, min_new_tokens=new, do_sample=True,
                                top_k=0, eos_token_id=None, pad_token_id=0)

        plain, own, mixed = seconds(options, generate, lambda: draw(0.0), lambda: draw(0.125))
        least = 2 * (floor(options, policy, rates, options.prompt_tokens, 1) + floor(options, policy, rates, 1, 1, new - 1))
        yield dict(new=new, generate=plain, policy=own, mixture=mixed, uncached=slow[new], ratio=mixed / plain, speedup=slow[new] / mixed,
                   tokens_per_second=options.prompts * new / mixed, floor_share=least / mixed)


def floor(options, one, rates, tokens, heads, rounds=1, passes=1, rows=None):
    """Least seconds of rounds forward passes over rows of tokens each, heads of them through the output head.

    Operations: 2 a weight and token, 4 x width a layer and pair of positions. Bytes: the weights and the caches, once a round.
    A decode round (tokens = 1) attends to the prompt and half of the rounds. The larger of the two times; passes = 3: with backward.
    """
    size, layers, rows = one.config.n_embd, options.layers, rows or options.prompts
    body, head = 12 * layers * size**2, one.config.vocab_size * size
    context = options.prompt_tokens + rounds / 2 if tokens == 1 else tokens / 2
    operations = rows * (2 * body * tokens + 2 * head * heads + 4 * size * layers * tokens * context)
    width = 2 if options.dtype == "bfloat16" else 4
    moved = width * (body + head + (2 * size * layers * rows * context if tokens == 1 else 0))
    return rounds * passes * max(operations / rates[1], moved / rates[0])


def phases(options, loss, policy, reference, rates):
    """One step of train.py with a loss, by phase: [(name, seconds, floor's seconds)], the whole step last."""
    chosen = SimpleNamespace(loss=loss, offline=False, batch_size=options.prompts, device=options.device, beta=0.125 if loss in train.BETA else 0.0,
                             seed=0, tau=train.TAU[loss], micro_batch_size=options.micro_batch_size, dtype=options.dtype)
    prompt = policies.pad(torch.ones(options.prompts, options.prompt_tokens, dtype=torch.long).tolist(), "left", 0)
    task = SimpleNamespace(prompts=lambda split, step, size: prompt, max_response=options.new_tokens)
    judge = preference_model.PreferenceModel(model(options, 2), pairwise=loss != "rl").to(options.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-9)
    method, spent, held = train.METHODS[loss], {}, []

    def score(x, y, y_other):
        return judge.gap(x, y, y_other) if loss == "rl" else judge(x, y, y_other)

    def timed(name, work):
        def whole():
            with train.precision(options):
                held[:] = [work()]
        spent[name] = seconds(options, whole)[0]
        return held[0]

    def forward():
        logp = [policies.log_prob(policy, pairs[0], side) for side in pairs[1:3][: method.LEARNS_FROM]] + [None]
        with torch.no_grad():
            ref_logp = [policies.log_prob(reference, pairs[0], side) for side in pairs[1:3][: method.LEARNS_FROM]] + [None]
        return method.loss(logp[0], logp[1], ref_logp[0], ref_logp[1], pairs[3], chosen.tau)

    betas = tuple(chosen.beta if who == "mixture" else 0.0 for who in method.PAIR)
    pairs = timed("draw", lambda: train.draw(chosen, task, policy, reference, score, 0))
    timed("prefill", lambda: sampler.sample(policy, reference, train.to_device(prompt, options.device), betas, torch.Generator(), 1))
    timed("preference", lambda: score(*pairs[:3]))
    timed("forward", forward)
    timed("update", lambda: train.update(chosen, policy, reference, optimizer, pairs))
    timed("optimiser", optimizer.step)
    used = 1 + any(betas)  # models that the sampler runs
    streams, whole = 2 * used - betas.count(0.0) * (used - 1), options.prompt_tokens + options.new_tokens
    scored = method.LEARNS_FROM * options.prompts
    one = floor(options, policy, rates, whole, options.new_tokens, rows=scored)
    size = sum(parameter.numel() for parameter in policy.parameters())
    return [
        ("prefill", spent["prefill"], used * floor(options, policy, rates, options.prompt_tokens, 1)),
        ("decode", spent["draw"] - spent["prefill"] - spent["preference"], streams * floor(options, policy, rates, 1, 1, options.new_tokens - 1)),
        ("preference", spent["preference"], floor(options, policy, rates, whole, options.new_tokens, rows=2 * options.prompts)),
        ("forward", spent["forward"], 2 * one),
        ("backward", spent["update"] - spent["forward"] - spent["optimiser"], 2 * one),
        ("optimiser", spent["optimiser"], 7 * 4 * size / rates[0]),  # reads weight, gradient and two moments, writes three
        ("step", spent["draw"] + spent["update"], None),
    ]


def memory(options):
    """Peak bytes beyond the weights of forward and backward of 64 responses of 64 tokens after 448-token prompts, vocabulary 50,257."""
    policy = model(options, 0, vocabulary=50257)
    prompt = policies.pad([[1] * 448] * 64, "left", 0, options.device)
    response = policies.pad([[1] * 64] * 64, "right", 0, options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # Linux starts the peak of the resident memory anew
        before = resident("VmRSS")
    with train.precision(options):
        policies.log_prob(policy, prompt, response).sum().backward()
    return (torch.cuda.max_memory_allocated() if options.device == "cuda" else resident("VmHWM")) - before


def resident(name):
    """A line of Linux's /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def main(argv=None):
    """Prints the tables; returns the exit status: 1 if the cached path is not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--loss", action="append", choices=list(train.METHODS), help="whose step to time; may be repeated (default nash_md and ipo)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--repeats", type=int, default=5, help="(default 5)")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--micro-batch-size", type=int)
    gpu = {"layers": 12, "width": 768, "vocabulary": 50257, "prompts": 64, "prompt_tokens": 512, "new_tokens": 64, "dtype": "bfloat16"}
    cpu = {"layers": 4, "width": 256, "vocabulary": 2048, "prompts": 32, "prompt_tokens": 64, "new_tokens": 48, "dtype": "float32"}
    for name, value in cpu.items():
        add(f"--{name.replace('_', '-')}", type=type(value), help=f"(default {value}; with --device cuda {gpu[name]})")
    options = parser.parse_args(argv)
    for name, value in (gpu if options.device == "cuda" else cpu).items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.py: error: --device cuda: no CUDA device is available; leave it out", file=sys.stderr)
        return 2
    return report(options)


def report(options):
    """Measures and prints; returns the exit status."""
    begun = time.time()
    policy, reference = model(options, 0), model(options, 1).requires_grad_(False)
    error = exactness(options, policy)
    rates = machine(options)
    prompt = policies.pad([[1] * options.prompt_tokens] * options.prompts, "left", 0, options.device)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {options.dtype}: {rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e12:.2f} TFLOP/s. GPT-2 with {options.layers} "
          f"layers, width {options.width}, vocabulary {options.vocabulary}; {options.prompts} prompts of {options.prompt_tokens} tokens")
    print(f"exactness: cached against plain log-probabilities, worst relative difference {error:.1e} (limit 1e-5)\n")
    print("new tokens  generate()    policy   mixture  uncached  mixture/generate()  uncached/mixture  mixture, tokens/s  of its floor")
    table = list(sampling(options, policy, reference, prompt, rates))
    for row in table:
        print("{new:10d} {generate:10.3f}s {policy:8.3f}s {mixture:8.3f}s {uncached:8.2f}s {ratio:18.2f}x {speedup:16.1f}x {tokens_per_second:18.0f} "
              "{floor_share:13.2f}".format(**row))
    print(f"the mixture's time grows {table[-1]['mixture'] / table[0]['mixture']:.1f}-fold from {NEW[0]} to {NEW[-1]} tokens\n")
    steps = {}
    for loss in options.loss or ("nash_md", "ipo"):
        steps[loss] = phases(options, loss, policy, reference, rates)
        print(f"{loss}, {options.new_tokens} new tokens: phase, seconds, floor, floor's share")
        for name, spent, least in steps[loss]:
            print(f"  {name:10s} {spent:8.3f}" + (f" {least:8.3f} {least / spent:6.2f}" if least else ""))
    peak = memory(options)
    print(f"memory: log_prob of 64 x (448 + 64) tokens, vocabulary 50,257, forward and backward: {peak / 1e9:.2f} GB beyond the weights")
    print(f"{time.time() - begun:.0f} s in all")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(dict(where=where, rates=rates, exactness=error, sampling=table, steps=steps, memory=peak), file, indent=1)
    return int(error > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
