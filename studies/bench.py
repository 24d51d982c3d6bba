"""What a step costs: sampling beside other ways to sample, and each phase beside the least that this machine allows.

  memory     forward and backward of 64 responses of 64 tokens after 448-token prompts, vocabulary 50,257
  exactness  the cached sampler's log-probabilities against a plain forward pass, with left padding and rows of unequal length
  sampling   policy and mixture against transformers' generate() with its cache, and against no cache: both models, whole prefix
  phases     prefill, decode, preference, forward, backward and optimiser of train.py's own step, each beside its floor
Times are medians of --repeats after a warm-up, with random weights. Left out: libraries that this one does not install; several GPUs.
Run: python -m studies.bench [--loss nash_md] [--json FILE]    (2 min 30 s on 2 cores)
     python -m studies.bench --device cuda    (GPT-2 124M, bfloat16, 64 prompts of 512 tokens)
"""

import argparse
import resource
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import policy as policies
import preference_model
import sampler
import train  # first: it sets how torch's threads wait

NEW = (16, 48, 128)  # new tokens of the sampling table
STRIDE = 16  # the uncached yardstick times one prefix in so many
CPU = dict(
    layers=4,
    width=256,
    vocabulary=2048,
    prompts=32,
    prompt_tokens=64,
    new_tokens=48,
    dtype="float32",
)
CUDA = dict(
    layers=12,
    width=768,
    vocabulary=50257,
    prompts=64,
    prompt_tokens=512,
    new_tokens=64,
    dtype="bfloat16",
)


def model(options, seed, vocabulary=None):
    """A GPT-2 of the options' size with random weights, which never ends a response: all paths do equal work."""
    config = GPT2Config(
        vocab_size=vocabulary or options.vocabulary,
        n_positions=max(512, options.prompt_tokens + max(NEW)),
        n_layer=options.layers,
        n_embd=options.width,
        n_head=options.width // 64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
    )
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
            torch.cuda.synchronize() if options.device == "cuda" else None  # the queue is waited for
            begun = time.perf_counter()
            with train.precision(options):
                work()
            torch.cuda.synchronize() if options.device == "cuda" else None
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken[1:]) for taken in times]


def machine(options):
    """What this machine does at its best: (bytes a second of a copy, operations a second of a matrix product)."""
    words, room = torch.ones(2, 2**26, device=options.device)
    square = torch.ones(2048, 2048, device=options.device)
    copied, multiplied = seconds(options, lambda: room.copy_(words), lambda: square @ square)
    return 2 * words.nbytes / copied, 2 * 2048**3 / multiplied


def floor(options, one, rates, tokens, heads, rounds=1, rows=None):
    """Least seconds of rounds forward passes over rows of tokens each, heads of them through the output head. Operations: 2 a
    weight and token, 4 x width a layer and pair of positions. Bytes: the weights and, decoding (tokens = 1), the caches of the
    prompt and half of the rounds. The larger of the two times."""
    size, layers, rows = one.config.n_embd, options.layers, rows or options.prompts
    body, head, context = (
        12 * layers * size**2,
        one.config.vocab_size * size,
        options.prompt_tokens + rounds / 2 if tokens == 1 else tokens / 2,
    )
    operations = rows * (
        2 * body * tokens + 2 * head * heads + 4 * size * layers * tokens * context
    )
    moved = (2 if options.dtype == "bfloat16" else 4) * (
        body + head + (2 * size * layers * rows * context if tokens == 1 else 0)
    )
    return rounds * max(operations / rates[1], moved / rates[0])


def memory(options):
    """Peak bytes of forward and backward beyond the weights. On the CPU it must be the process's highest peak so far."""
    policy = model(options, 0, vocabulary=50257)
    tokens = [
        policies.pad([[1] * length] * 64, side, 0, options.device)
        for length, side in ((448, "left"), (64, "right"))
    ]
    cuda = options.device == "cuda"
    before = (
        torch.cuda.memory_allocated()
        if cuda
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    with train.precision(options):
        policies.log_prob(policy, *tokens).sum().backward()
    return (
        torch.cuda.max_memory_allocated()
        if cuda
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ) - before


@torch.no_grad()
def exactness(options, policy):
    """Worst relative difference of cached and plain token log-probabilities in float32; left padding, responses of unequal length."""
    rng = torch.Generator().manual_seed(2)
    prompt, response = (
        policies.pad(
            [torch.randint(1, options.vocabulary, (n,), generator=rng).tolist() for n in lengths],
            side,
            0,
            options.device,
        )
        for lengths, side in (((3, 17, 40, 40), "left"), ((24, 5, 1, 13), "right"))
    )
    plain = policies.token_log_probs(policy, prompt, response)
    stream = sampler.Stream(
        policy,
        torch.arange(4, device=options.device),
        torch.ones(4, device=options.device),
        prompt,
        24,
    )
    cached = torch.zeros_like(plain)
    for step, token in enumerate(response[0].T):
        cached[:, step] = torch.log_softmax(stream.logits, -1).gather(1, token[:, None])[:, 0]
        stream.advance(token)
    return ((cached - plain) / plain)[response[1]].abs().max().item()


@torch.no_grad()
def sampling(options, policy, reference, prompt, rates):
    """The sampling table's rows, medians in seconds, with the share of the mixture's time that its floor is."""

    def uncached(
        length,
    ):  # one token without a cache; its time depends on the prefix's length alone, so STRIDE tokens take STRIDE times that
        ids = prompt[0][:, :1].expand(-1, options.prompt_tokens + length)
        log_pi, log_ref = (
            torch.log_softmax(policies.raise_precision(one(ids).logits), -1)[:, -1]
            for one in (policy, reference)
        )
        return torch.multinomial(torch.softmax(log_pi * 0.875 + log_ref * 0.125, -1), 1)

    slow = [
        STRIDE * seconds(options, lambda length=length: uncached(length))[0]
        for length in range(STRIDE // 2, max(NEW), STRIDE)
    ]
    for new in NEW:
        given = dict(
            attention_mask=prompt[1].long(),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        plain, own, mixed = seconds(
            options,
            lambda given=given: policy.generate(prompt[0], **given),
            *(
                lambda beta=beta, new=new: sampler.sample(
                    policy, reference, prompt, beta, torch.Generator().manual_seed(0), new
                )
                for beta in (0.0, 0.125)
            ),
        )
        least = 2 * (
            floor(options, policy, rates, options.prompt_tokens, 1)
            + floor(options, policy, rates, 1, 1, new - 1)
        )
        yield dict(
            new=new,
            generate=plain,
            policy=own,
            mixture=mixed,
            uncached=sum(slow[: new // STRIDE]),
            floor=least,
        )


def phases(options, loss, policy, reference, rates):
    """One step of train.py with a loss, by phase: [(name, seconds, floor's seconds)], the whole step last."""
    method, beta = train.METHODS[loss], train.BETA.get(loss, 0.0)
    chosen = SimpleNamespace(
        **vars(options)
        | dict(
            loss=loss,
            offline=False,
            batch_size=options.prompts,
            beta=beta,
            seed=0,
            tau=train.TAU[loss],
        )
    )
    prompt = policies.pad(
        [[1] * options.prompt_tokens] * options.prompts, "left", 0, options.device
    )
    task = SimpleNamespace(
        prompts=lambda split, step, size: prompt, max_response=options.new_tokens
    )
    judge = preference_model.PreferenceModel(model(options, 2), pairwise=loss != "rl").to(
        options.device
    )
    score, optimizer = (
        judge.gap if loss == "rl" else judge,
        torch.optim.AdamW(policy.parameters(), lr=1e-9),
    )
    with train.precision(options):
        pairs = train.draw(chosen, task, policy, reference, score, 0)

    def forward():
        logp = [
            policies.log_prob(policy, pairs[0], side) for side in pairs[1:3][: method.LEARNS_FROM]
        ] + [None]
        with torch.no_grad():
            ref_logp = [
                policies.log_prob(reference, pairs[0], side)
                for side in pairs[1:3][: method.LEARNS_FROM]
            ] + [None]
        return method.loss(logp[0], logp[1], ref_logp[0], ref_logp[1], pairs[3], chosen.tau)

    betas = tuple(beta if who == "mixture" else 0.0 for who in method.PAIR)
    draw, prefill, preference, losses, update, step = seconds(
        options,
        lambda: train.draw(chosen, task, policy, reference, score, 0),
        lambda: sampler.sample(policy, reference, prompt, betas, torch.Generator(), 1),
        torch.no_grad()(lambda: score(*pairs[:3])),
        forward,
        lambda: train.update(chosen, policy, reference, optimizer, pairs),
        optimizer.step,
    )
    models, streams, whole = (
        1 + any(betas),
        2 + sum(beta > 0 for beta in betas),
        options.prompt_tokens + options.new_tokens,
    )
    one = floor(
        options, policy, rates, whole, options.new_tokens, rows=method.LEARNS_FROM * options.prompts
    )
    return [
        ("prefill", prefill, models * floor(options, policy, rates, options.prompt_tokens, 1)),
        (
            "decode",
            draw - prefill - preference,
            streams * floor(options, policy, rates, 1, 1, options.new_tokens - 1),
        ),
        (
            "preference",
            preference,
            floor(options, policy, rates, whole, options.new_tokens, rows=2 * options.prompts),
        ),
        ("forward", losses, 2 * one),
        ("backward", update - losses - step, 2 * one),
        (
            "optimiser",
            step,
            7 * 4 * policy.num_parameters() / rates[0],
        ),  # reads weight, gradient and two moments, writes three
        ("step", draw + update, None),
    ]


def report(options):
    """Measures and prints. Returns the figures."""
    peak = memory(options)
    policy, reference, rates = (
        model(options, 0),
        model(options, 1).requires_grad_(False),
        machine(options),
    )
    prompt = policies.pad(
        [[1] * options.prompt_tokens] * options.prompts, "left", 0, options.device
    )
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    found = dict(
        where=where,
        torch=torch.__version__,
        rates=rates,
        memory=peak,
        exactness=exactness(options, policy),
    )
    print(
        f"{where}, torch {torch.__version__}, {options.dtype}: {rates[0] / 1e9:.0f} GB/s, {rates[1] / 1e12:.2f} TFLOP/s. GPT-2 with {options.layers} layers, "
        f"width {options.width}, vocabulary {options.vocabulary}; {options.prompts} prompts of {options.prompt_tokens} tokens"
    )
    print(
        f"memory: 64 responses of 64 tokens after 448, vocabulary 50,257, forward and backward: {peak / 1e9:.2f} GB beyond the weights"
    )
    print(
        f"exactness: cached against plain log-probabilities, worst relative difference {found['exactness']:.1e} (limit 1e-5)\n"
    )
    print(
        "new tokens  generate()   policy  mixture  uncached  mixture/generate()  uncached/mixture  mixture, tokens/s  floor/mixture"
    )
    found["sampling"] = list(sampling(options, policy, reference, prompt, rates))
    for row in found["sampling"]:
        new, plain, own, mixed, slow, least = row.values()
        print(
            f"{new:10d} {plain:10.3f}s {own:7.3f}s {mixed:7.3f}s {slow:8.2f}s {mixed / plain:18.2f}x {slow / mixed:16.1f}x "
            f"{options.prompts * new / mixed:18.0f} {least / mixed:14.2f}"
        )
    print(
        f"the mixture's time grows {mixed / found['sampling'][0]['mixture']:.1f}-fold from {NEW[0]} to {NEW[-1]} tokens"
    )
    found["steps"] = {
        loss: phases(options, loss, policy, reference, rates)
        for loss in options.loss or ("nash_md", "ipo")
    }
    for loss, rows in found["steps"].items():
        print(f"\n{loss}, {options.new_tokens} new tokens: seconds, floor, floor's share")
        for name, spent, least in rows:
            print(
                f"  {name:10s} {spent:8.3f}"
                + (f" {least:8.3f} {least / spent:6.2f}" if least else "")
            )
    return found


def main(argv=None):
    """Prints the tables; returns the exit status: 1 if the cached path is not exact."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--loss",
        action="append",
        choices=list(train.METHODS),
        help="whose step; may be repeated (default nash_md and ipo)",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5, help="(default 5)")
    parser.add_argument("--micro-batch-size", type=int, help="as train.py's")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    for name, value in CPU.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            help=f"(default {value}; with --device cuda {CUDA[name]})",
        )
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench.py: error: --device cuda: no CUDA device is available; leave it out",
            file=sys.stderr,
        )
        return 2
    for name, value in (CUDA if options.device == "cuda" else CPU).items():
        setattr(options, name, getattr(options, name) or value)
    found = report(options)
    if options.json:
        train.write_json(options.json, found)
    return int(found["exactness"] > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
