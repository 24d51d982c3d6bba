"""What a step costs: sampling beside other ways to sample, and each phase beside its floor.

  memory     forward and backward of 64 responses of 64 tokens, prompts of 448, vocabulary 50,257
  exactness  the cached sampler's log-probabilities against a plain forward pass, with left padding
             and rows of unequal length
  sampling   policy and mixture against transformers' generate() with its cache, GPT-2 and Llama of
             one size, ragged prompts; and against no cache: both models, whole prefix
  operations what the sampler of one model spends its time on
  phases     prefill, decode, preference, forward, backward and optimiser of train.py's own step,
             each beside the least that this machine allows
Times are medians of --repeats after a warm-up, with random weights.
Left out: libraries that this one does not install; several GPUs.
Run: python -m studies.bench [--loss nash_md] [--json FILE]    (3 min 30 s on 2 cores)
     python -m studies.bench --device cuda    (GPT-2 124M, bfloat16, 64 prompts of 512 tokens)
"""

import argparse
import contextlib
import statistics
import sys
import time
from functools import partial
from types import SimpleNamespace

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import data
import job.folder
import job.options
import policy as policies
import preference_model
import sampler
import train

NEW = (16, 48, 128)  # new tokens of the sampling table
BETA = 0.125  # of the sampling table's mixture
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


def build(options, seed, vocabulary=None, kind="gpt2"):
    """A model of the options' size with random weights, which never ends a response.

    vocabulary:
        None for the options'.
    kind:
        "gpt2" or "llama", whose layers have as many weights but for a few.
    """
    size = vocabulary or options.vocabulary
    context = max(512, options.prompt_tokens + max(NEW))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model = LlamaForCausalLM(llama_config(options, size, context))
        else:
            model = GPT2LMHeadModel(gpt2_config(options, size, context))
    model.config.eos_token_id = -1  # no token: all ways to sample do equal work
    return model.eval().to(options.device)


def gpt2_config(options, size, context):
    return GPT2Config(
        vocab_size=size,
        n_positions=context,
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


def llama_config(options, size, context):
    return LlamaConfig(
        vocab_size=size,
        max_position_embeddings=context,
        num_hidden_layers=options.layers,
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3,  # three matrices of it weigh what GPT-2's two do
        num_attention_heads=options.width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )


def prompts(options):
    """A step's prompts, from half of --prompt-tokens to all of them, the longest last.

    Of one token: no time depends on which it is. Ragged: without pads attention takes a faster path
    that no real batch takes.
    """
    most = options.prompt_tokens
    rows = []
    for row in range(options.prompts):
        rows.append([1] * (most - (options.prompts - 1 - row) % (most // 2 + 1)))
    return policies.pad(rows, "left", 0, options.device)


# ---- the clock, and the least that a machine allows ----


def wait(options):
    """Waits until the device has done what it was given: CUDA's calls return before."""
    if options.device == "cuda":
        torch.cuda.synchronize()


def seconds(options, *works):
    """Median seconds of each work() over the repeats, after one warm-up.

    The works take turns within a repeat, so that a slow spell of the machine meets all of them.
    """
    times = [[] for _ in works]
    for _ in range(options.repeats + 1):
        for work, taken in zip(works, times, strict=True):
            wait(options)
            begun = time.perf_counter()
            with job.options.precision(options):
                work()
            wait(options)
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken[1:]) for taken in times]


def machine(options):
    """What this machine does at its best: (bytes/s of a copy, operations/s of a matrix product)."""
    # A GPU needs a larger product to show its rate, and the precision in which the models run:
    # autocast would cast float32 matrices anew for every product.
    size = 8192 if options.device == "cuda" else 2048
    kind = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    words, room = torch.ones(2, 2**26, device=options.device)
    # Of random numbers: a GPU that multiplies ones draws less power, and clocks higher.
    square = torch.rand(size, size, device=options.device).to(kind)
    copy = partial(room.copy_, words)
    multiply = partial(torch.matmul, square, square)
    copied, multiplied = seconds(options, copy, multiply)
    return 2 * words.nbytes / copied, 2 * size**3 / multiplied  # a copy reads and writes


def floor(options, model, rates, tokens, heads, rounds=1, rows=None):
    """Least seconds of forward passes on this machine: the larger of two times.

    Operations: 2 a weight and token, 4 x width a layer and pair of positions. Bytes: the weights
    and, decoding, the caches of the prompt and half of the rounds.

    rates:
        bytes and operations a second, as machine measures them.
    tokens:
        of a row, in one pass; 1 is decoding.
    heads:
        how many of them go through the output head.
    rounds:
        passes, one after the other.
    rows:
        None for one a prompt.
    """
    width = options.width
    layers = options.layers
    if rows is None:
        rows = options.prompts
    decoding = tokens == 1
    body = 12 * layers * width**2
    head = model.config.vocab_size * width
    # The positions that a token looks back to, on average.
    context = options.prompt_tokens + rounds / 2 if decoding else tokens / 2
    products = 2 * body * tokens + 2 * head * heads
    attention = 4 * width * layers * tokens * context
    numbers = body + head
    if decoding:
        numbers += 2 * width * layers * rows * context  # keys and values
    size = 2 if options.dtype == "bfloat16" else 4
    bytes_rate, operations_rate = rates
    compute = rows * (products + attention) / operations_rate
    move = size * numbers / bytes_rate
    return rounds * max(compute, move)


# ---- memory and exactness ----


def peak_memory(options):
    """The most bytes that were held so far, on the device or by the process; None if unknown."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux says it of this program alone; getrusage takes over the peak of whoever started it.
    with contextlib.suppress(OSError):
        with open("/proc/self/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
    try:
        import resource  # here: Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, but bytes on macOS


def memory(options):
    """Peak bytes of forward and backward beyond the weights; None if the system does not say.

    On the CPU it must be the process's highest peak so far.
    """
    policy = build(options, 0, vocabulary=50257)
    prompt = policies.pad([[1] * 448] * 64, "left", 0, options.device)
    response = policies.pad([[1] * 64] * 64, "right", 0, options.device)
    before = peak_memory(options)
    if before is None:
        return None
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()  # the device says what is held now, too
    with job.options.precision(options):
        policies.log_prob(policy, prompt, response).sum().backward()
    return peak_memory(options) - before


@torch.no_grad()
def exactness(options, policy):
    """Worst relative difference of cached and plain token log-probabilities in float32.

    Prompts padded on the left, responses of unequal length.
    """
    generator = torch.Generator().manual_seed(2)

    def rows(lengths):
        """Random token ids, a list for each length."""
        found = []
        for n in lengths:
            ids = torch.randint(1, options.vocabulary, (n,), generator=generator)
            found.append(ids.tolist())
        return found

    prompt = policies.pad(rows((3, 17, 40, 40)), "left", 0, options.device)
    response = policies.pad(rows((24, 5, 1, 13)), "right", 0, options.device)
    plain = policies.token_log_probs(policy, prompt, response)
    everyone = torch.arange(4, device=options.device)
    weight = torch.ones(4, device=options.device)
    stream = sampler.Stream(policy, everyone, weight, prompt, 24)
    cached = torch.zeros_like(plain)
    for step, token in enumerate(response.ids.T):
        log_pi = torch.log_softmax(stream.logits, -1)
        cached[:, step] = log_pi.gather(1, token[:, None])[:, 0]
        stream.advance(token)
    return ((cached - plain) / plain)[response.mask].abs().max().item()


# ---- sampling: four ways to the same number of tokens ----


def generate(policy, prompt, new):
    """transformers' generate() with its cache, one model."""
    policy.generate(
        prompt.ids,
        attention_mask=prompt.mask.long(),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
        pad_token_id=0,
    )


def sample(policy, reference, prompt, beta, new):
    """sampler.py's own: beta = 0 runs one model, beta above 0 two."""
    sampler.sample(policy, reference, prompt, beta, torch.Generator().manual_seed(0), new)


def uncached_token(policy, reference, ids):
    """One token of the mixture without a cache: both models read the whole prefix [B, length]."""
    log_pi = torch.log_softmax(policies.raise_precision(policy(ids).logits), -1)[:, -1]
    log_ref = torch.log_softmax(policies.raise_precision(reference(ids).logits), -1)[:, -1]
    mixed = torch.softmax(log_pi * (1 - BETA) + log_ref * BETA, -1)
    return torch.multinomial(mixed, 1)


def uncached_seconds(options, policy, reference, prompt):
    """Seconds of STRIDE uncached tokens each, by rising prefix, [longest of NEW / STRIDE].

    A token's time depends on its prefix's length alone: STRIDE tokens take STRIDE times that of the
    one in their middle.
    """
    found = []
    for length in range(STRIDE // 2, max(NEW), STRIDE):
        ids = prompt.ids[:, :1].expand(-1, options.prompt_tokens + length)
        (spent,) = seconds(options, partial(uncached_token, policy, reference, ids))
        found.append(STRIDE * spent)
    return found


@torch.no_grad()
def sampling(options, policy, reference, prompt, rates, uncached=True):
    """The sampling table's rows: medians in seconds, and the floor of the mixture's time.

    uncached:
        False leaves out the slow yardstick.
    """
    slow = uncached_seconds(options, policy, reference, prompt) if uncached else []
    prefill_floor = floor(options, policy, rates, options.prompt_tokens, 1)
    rows = []
    for new in NEW:
        plain, own, mixed = seconds(
            options,
            partial(generate, policy, prompt, new),
            partial(sample, policy, reference, prompt, 0.0, new),
            partial(sample, policy, reference, prompt, BETA, new),
        )
        decode_floor = floor(options, policy, rates, 1, 1, new - 1)
        rows.append(
            dict(
                new=new,
                generate=plain,
                policy=own,
                mixture=mixed,
                uncached=sum(slow[: new // STRIDE]) if uncached else None,
                floor=2 * (prefill_floor + decode_floor),  # two models
            )
        )
    return rows


def operations(options, policy, prompt):
    """Shares of the time that the sampler of one model spends in itself, [(operation, share)].

    One thread, so that no thread's waiting is counted as work. The largest six.
    """
    threads = torch.get_num_threads()
    cuda = options.device == "cuda"
    torch.set_num_threads(1)
    try:
        kinds = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
        with profile(activities=kinds) as seen, job.options.precision(options):
            sample(policy, None, prompt, 0.0, options.new_tokens)
    finally:
        torch.set_num_threads(threads)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, name) for event in seen.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:6]
    return [(key, times[key] / total) for key in largest]


# ---- phases of a step: each does its part on a step's models and pairs ----


def prepare_step(options, loss, policy, reference):
    """What the phases work on: models, prompts, and the pairs that were drawn and labelled."""
    method = job.options.find_method(loss)
    reward = method.LABEL == "reward"
    model = preference_model.PreferenceModel(build(options, 2), pairwise=not reward)
    model = model.to(options.device)
    step = SimpleNamespace(
        options=SimpleNamespace(
            **vars(options),
            tau=method.TAU,
            set={},
            gradient_checkpointing=False,
            length_average=False,
        ),
        method=method,
        beta=getattr(method, "BETA", 0.0),
        policy=policy,
        reference=reference,
        prompt=prompts(options),
        preference=model.logit if reward else model,  # train.py's label
        optimizer=torch.optim.AdamW(policy.parameters(), lr=1e-9),  # 1e-9: the weights stay
    )
    with job.options.precision(options):
        step.y, step.y_other = draw(step, options.new_tokens)
        step.label = preference(step)
    return step


def draw(step, new):
    """A step's pairs, of new tokens each."""
    uniforms = data.uniforms(data.generator(0, "sample", 0), new, 2, len(step.prompt.ids))
    return sampler.draw_pairs(
        step.method.PAIR, step.policy, step.reference, step.prompt, step.beta, uniforms
    )


def prefill(step):
    """The prompts once through the models, and the first token, which needs no further pass."""
    draw(step, 1)


def decode(step):
    """Prefill and all tokens after the first; the prefill's time is taken off afterwards."""
    draw(step, step.options.new_tokens)


@torch.no_grad()
def preference(step):
    """The label of every pair."""
    return step.preference(step.prompt, step.y, step.y_other)


def forward(step):
    """train.py's losses of every pair, with gradient for the policy, without for the reference."""
    models = (step.options, step.method, step.policy, step.reference)
    pairs = step.prompt, step.y, step.y_other
    asked = job.options.requested(*models[1:], *pairs) | whole(step)
    return train.pair_losses(*models, *pairs, step.label, **asked)


def whole(step):
    """The numbers of the whole batch that the method asks for; the policy itself drew it."""
    models = step.policy, step.policy, step.reference
    batch = step.prompt, step.y, step.y_other, step.label
    return job.options.of_batch(step.options, step.method, *models, *batch)


def backward(step):
    """train.py's update: forward, backward, optimiser; the other two are taken off afterwards."""
    train.update(
        step.options,
        step.method,
        step.policy,
        step.reference,
        step.optimizer,
        step.prompt,
        step.y,
        step.y_other,
        step.label,
        **whole(step),
    )


def optimiser(step):
    """AdamW's step, with the gradients of the last backward pass."""
    step.optimizer.step()


def phases(options, loss, policy, reference, rates):
    """One step of train.py with a loss, by phase: [(name, seconds, floor's seconds)].

    The whole step comes last and has no floor. Decode and backward are differences: neither can run
    without the phases before it.
    """
    step = prepare_step(options, loss, policy, reference)
    works = (prefill, decode, preference, forward, backward, optimiser)
    medians = seconds(options, *[partial(work, step) for work in works])
    spent = dict(zip(works, medians, strict=True))
    least = floors(options, step, rates)
    rows = [
        ("prefill", spent[prefill]),
        ("decode", spent[decode] - spent[prefill]),
        ("preference", spent[preference]),
        ("forward", spent[forward]),
        ("backward", spent[backward] - spent[forward] - spent[optimiser]),
        ("optimiser", spent[optimiser]),
    ]
    whole = spent[decode] + spent[preference] + spent[backward]
    return [(name, time, least[name]) for name, time in rows] + [("step", whole, None)]


def floors(options, step, rates):
    """Least seconds of every phase, {name: seconds}."""
    mixtures = step.method.PAIR.count("mixture") if step.beta > 0 else 0
    models = 2 if mixtures else 1  # that run the prompts
    streams = 2 + mixtures  # that decode: one a response, and the reference beside each mixture
    whole = options.prompt_tokens + options.new_tokens
    least = partial(floor, options, step.policy, rates)
    learned = step.method.LEARNS_FROM * options.prompts
    one_model = least(whole, options.new_tokens, rows=learned)
    bytes_rate, _ = rates
    return dict(
        prefill=models * least(options.prompt_tokens, 1),
        decode=streams * least(1, 1, options.new_tokens - 1),
        preference=least(whole, options.new_tokens, rows=2 * options.prompts),
        forward=2 * one_model,  # policy and reference
        backward=2 * one_model,  # twice the policy's forward pass
        # It reads weight, gradient and two moments and writes three of them, four bytes each.
        optimiser=7 * 4 * step.policy.num_parameters() / bytes_rate,
    )


# ---- the report ----


def print_head(options, found):
    """The machine, memory and exactness."""
    bytes_rate, operations_rate = found["rates"]
    print(
        f"{found['where']}, torch {found['torch']}, {options.dtype}: {bytes_rate / 1e9:.0f} GB/s, "
        f"{operations_rate / 1e12:.2f} TFLOP/s. GPT-2 with {options.layers} layers, "
        f"width {options.width}, vocabulary {options.vocabulary}; "
        f"{options.prompts} prompts of {options.prompt_tokens} tokens"
    )
    if found["memory"] is None:
        print("memory: not measured; on a CPU only Unix says what a process has held")
    else:
        print(
            "memory: 64 responses of 64 tokens after 448, vocabulary 50,257, forward and backward: "
            f"{found['memory'] / 1e9:.2f} GB beyond the weights"
        )
    print(
        "exactness: cached against plain log-probabilities, worst relative difference "
        f"{found['exactness']:.1e} (limit 1e-5)\n"
    )


def print_sampling(options, kind, rows):
    """The sampling table of a kind of model."""
    print(
        f"{kind:5s} new tokens  generate()   policy  mixture  uncached  mixture/generate()  "
        "uncached/mixture  mixture, tokens/s  floor/mixture"
    )
    for row in rows:
        new, plain, own, mixed, slow, least = row.values()
        seconds_uncached, times_uncached = "-", "-"
        if slow is not None:
            seconds_uncached, times_uncached = f"{slow:.2f}s", f"{slow / mixed:.1f}x"
        print(
            f"{new:16d} {plain:10.3f}s {own:7.3f}s {mixed:7.3f}s {seconds_uncached:>9s} "
            f"{mixed / plain:18.2f}x {times_uncached:>17s} "
            f"{options.prompts * new / mixed:18.0f} {least / mixed:14.2f}"
        )
    growth = rows[-1]["mixture"] / rows[0]["mixture"]
    print(f"the mixture's time grows {growth:.1f}-fold from {NEW[0]} to {NEW[-1]} tokens\n")


def print_operations(options, rows):
    """Where the sampler's time goes, in a line."""
    # A GPU's kernels have their template's arguments in their names.
    shares = ", ".join(f"{name.partition('<')[0][:60]} {share:.0%}" for name, share in rows)
    print(f"one model, {options.new_tokens} new tokens, one thread: {shares}")


def print_phases(options, loss, rows):
    """A step of a loss, a phase a line."""
    print(f"\n{loss}, {options.new_tokens} new tokens: seconds, floor, floor's share")
    for name, spent, least in rows:
        share = "" if least is None else f" {least:8.3f} {least / spent:6.2f}"
        print(f"  {name:10s} {spent:8.3f}{share}")


def report(options):
    """Measures and prints. Returns the figures."""
    peak = memory(options)  # first: on the CPU nothing may have held more before
    policy = build(options, 0)
    reference = build(options, 1).requires_grad_(False)
    where = f"CPU, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name()
    rates = machine(options)
    found = dict(where=where, torch=torch.__version__, rates=rates, memory=peak)
    found["exactness"] = exactness(options, policy)
    print_head(options, found)
    prompt = prompts(options)
    found["sampling"] = dict(gpt2=sampling(options, policy, reference, prompt, rates))
    print_sampling(options, "GPT-2", found["sampling"]["gpt2"])
    llamas = [build(options, seed, kind="llama") for seed in (0, 1)]
    found["sampling"]["llama"] = sampling(options, *llamas, prompt, rates, uncached=False)
    print_sampling(options, "Llama", found["sampling"]["llama"])
    found["operations"] = operations(options, policy, prompt)
    print_operations(options, found["operations"])
    found["steps"] = {}
    for loss in options.loss or ("nash_md", "ipo"):
        found["steps"][loss] = phases(options, loss, policy, reference, rates)
    for loss, rows in found["steps"].items():
        print_phases(options, loss, rows)
    return found


def parse(argv):
    """The options; what depends on the device is filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    pairs = []
    for name in job.options.method_names():
        if not job.options.is_group(job.options.find_method(name)):
            pairs.append(name)
    add(
        "--loss",
        action="append",
        choices=pairs,
        help="whose step; may be repeated (default nash_md and ipo)",
    )
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--repeats", type=int, default=5, help="(default 5)")
    add("--micro-batch-size", type=int, help="as train.py's")
    add("--json", metavar="FILE", help="write the figures there too")
    for name, value in CPU.items():
        option = f"--{name.replace('_', '-')}"
        text = f"(default {value}; with --device cuda {CUDA[name]})"
        add(option, type=type(value), help=text)
    options = parser.parse_args(argv)
    for name, value in (CUDA if options.device == "cuda" else CPU).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(argv=None):
    """Prints the tables; returns the exit status: 1 if the cached path is not exact."""
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "studies.bench: error: --device cuda: no CUDA device is available; leave it out",
            file=sys.stderr,
        )
        return 2
    found = report(options)
    if options.json:
        job.folder.write_json(options.json, found)
    return int(found["exactness"] > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
