"""The main job: align a policy with preferences, online, by any of the paper's losses.

data -> supervised policy (= reference = start) -> preference model (and reward) -> online alignment -> evaluation -> run folder.
The first three stages depend neither on --loss nor on --seed; they are kept under --stages and used again.
Run: python train.py --loss ipo_md                  (the built-in task, on a CPU, without network)
     python train.py --loss ipo_md --policy gpt2 --demos trl-lib/tldr --comparisons trl-lib/tldr-preference

A killed run goes on with --resume, bit for bit.
Left out: learning-rate schedules, several epochs over one batch of samples, several processes.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time

# Before torch is loaded: threads that spin while they wait make a run ten times slower when another program has a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import data
import dpo
import evaluate
import ipo
import ipo_md
import nash_md
import policy as policies
import preference_model
import rl
import sampler
import slic

# The paper's Table 1 is in the files: CONTRASTIVE, and PAIR, who draws y and y' (policy: online; mixture: regularised sampling).
METHODS = {"ipo": ipo, "ipo_md": ipo_md, "nash_md": nash_md, "dpo": dpo, "slic": slic, "rl": rl}
TAU = {
    "ipo": 0.03,
    "ipo_md": 0.03,
    "nash_md": 0.03,
    "dpo": 0.2,
    "slic": 0.1,
    "rl": 0.2,
}  # for summed log-probabilities, by a sweep
BETA = {"ipo_md": 0.125, "nash_md": 0.125}
OFFLINE = ("ipo", "dpo", "slic")
NEUTRAL = (
    "out",
    "stages",
    "resume",
    "save_every",
    "keep",
)  # options that change nothing of a run's result
# What a kept stage, a run's folder and a line of results hold was made by these versions. Raise one by hand when a number of its
# part changes: tests/test_golden.py says when, and which.
VERSIONS = {"supervised": 1, "preference": 1, "alignment": 1, "measure": 1}
POOL = 40  # batches of comparisons that the preference model visits again and again, with new votes


def arguments(argv):
    """The options, checked. Raises ValueError naming the option and what to do."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--loss", default="ipo_md", choices=list(METHODS), help="which method (default ipo_md)")
    add(
        "--tau",
        type=float,
        help="regularisation strength, above 0; each method has its own default",
    )
    add(
        "--beta",
        type=float,
        help="weight of the reference in the mixture, 0 to 1, for ipo_md and nash_md (default 0.125)",
    )
    add("--steps", type=int, default=200, help="alignment steps (default 200)")
    add("--lr", type=float, default=5e-4, help="alignment's learning rate (default 5e-4)")
    add("--batch-size", type=int, default=32, help="prompts a step (default 32)")
    add(
        "--micro-batch-size",
        type=int,
        help="pairs a backward pass: less memory, the same result (default: the whole batch)",
    )
    add(
        "--offline",
        action="store_true",
        help="learn from the recorded comparisons (ipo, dpo, slic)",
    )
    add("--seed", type=int, default=0, help="of the alignment (default 0)")
    add("--data-seed", type=int, default=0, help="of the shared stages (default 0)")
    add(
        "--demos",
        help="records prompt, completion: a file or a hub name (default: the built-in task)",
    )
    add(
        "--comparisons",
        help="records prompt, chosen, rejected; alone, the chosen responses are the demos",
    )
    add("--prompts", help="records prompt, to align and evaluate on (default: those of the demos)")
    add(
        "--policy",
        default="tiny",
        help="tiny or gpt2-124m from scratch, or a folder or hub name such as gpt2 (default tiny)",
    )
    add(
        "--tokenizer",
        help="folder or hub name, for a policy from scratch on your own data (default: a byte-level BPE trained on it)",
    )
    add("--supervised-steps", type=int, default=900, help="(default 900)")
    add("--supervised-lr", type=float, help="(default 3e-3 for tiny, 1e-4 else)")
    add("--preference-steps", type=int, default=2000, help="(default 2000)")
    add(
        "--max-prompt-tokens",
        type=int,
        default=448,
        help="longer prompts are cut from the left (default 448)",
    )
    add(
        "--max-response-tokens",
        type=int,
        default=48,
        help="(default 48; the built-in task has its own)",
    )
    add("--eval-prompts", type=int, default=500, help="test prompts (default 500)")
    add("--out", help="run folder (default runs/LOSS-seedSEED)")
    add(
        "--stages",
        default="runs/stages",
        help="where the shared stages are kept (default runs/stages)",
    )
    add(
        "--save-every",
        type=int,
        default=50,
        help="steps from checkpoint to checkpoint (default 50)",
    )
    add("--keep", type=int, default=2, help="checkpoints to keep (default 2)")
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --out from its last checkpoint, or begin it",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16: autocast; weights and losses stay float32",
    )

    parser.error = fail  # one line without the usage, like every other error
    options = parser.parse_args(argv)
    check(options)
    return options


def fail(message):
    raise ValueError(message)


def check(options):
    """Raises ValueError for values and combinations that cannot be run; fills the defaults that depend on the method."""
    if options.beta is not None and options.loss not in BETA:
        raise ValueError(
            f"--beta {options.beta}: --loss {options.loss} samples no mixture; leave --beta out or take ipo_md or nash_md"
        )
    options.tau = TAU[options.loss] if options.tau is None else options.tau
    options.beta = BETA.get(options.loss, 0.0) if options.beta is None else options.beta
    above = (
        "tau",
        "lr",
        "batch_size",
        "micro_batch_size",
        "max_prompt_tokens",
        "max_response_tokens",
        "eval_prompts",
        "supervised_lr",
        "save_every",
        "keep",
    )
    for name in (*above, "steps", "supervised_steps", "preference_steps", "seed", "data_seed"):
        value, advice = (
            getattr(options, name),
            "give a number above 0" if name in above else "give 0 or more",
        )
        if value is not None and not (
            math.isfinite(value) and value >= 0 and (value or name not in above)
        ):
            raise ValueError(f"--{name.replace('_', '-')} {value}: {advice}")
    own = options.demos or options.comparisons
    for wrong, message in (
        (
            not 0 <= options.beta <= 1,
            f"--beta {options.beta}: give a weight from 0 (policy) to 1 (reference)",
        ),
        (
            options.offline and options.loss not in OFFLINE,
            f"--offline: --loss {options.loss} learns from its own samples; take one of {', '.join(OFFLINE)}",
        ),
        (
            not own and (options.prompts or options.tokenizer),
            "--prompts and --tokenizer go with your own data; give --comparisons too",
        ),
        (
            own and not options.comparisons,
            "--demos: needs --comparisons to learn a preference model from",
        ),
        (
            own and options.tokenizer and options.policy not in policies.SIZES,
            f"--tokenizer: the policy {options.policy} brings its own; leave --tokenizer out",
        ),
        (
            options.device == "cuda" and not torch.cuda.is_available(),
            "--device cuda: no CUDA device is available; take --device cpu",
        ),
    ):
        if wrong:
            raise ValueError(message)
    options.device = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if options.device == "auto"
        else options.device
    )
    options.out = (
        options.out
        or f"runs/{options.loss}{'-offline' if options.offline else ''}-seed{options.seed}"
    )


def open_data(options):
    """The task: the built-in one, or records. Returns (task, policy before supervision or None to build, hash of the data)."""
    if not options.comparisons:
        if options.policy not in policies.SIZES:
            raise ValueError(
                f"--policy {options.policy}: the built-in task has its own words; take tiny or gpt2-124m, or give --comparisons"
            )
        return data.BuiltIn(options.data_seed), None, "built-in"
    read = {
        name: data.read(name, getattr(options, name)) if getattr(options, name) else []
        for name in data.LAYOUTS
    }
    start = None
    if options.policy not in policies.SIZES:
        start, tokenizer = policies.load(options.policy)
    elif options.tokenizer:
        tokenizer = policies.load_tokenizer(options.tokenizer)
    else:
        tokenizer = policies.byte_tokenizer(
            [text for record in [*read["demos"], *read["comparisons"]] for text in record.values()]
        )
        print(f"no --tokenizer: trained a byte-level BPE of {len(tokenizer)} entries on the data")
    room = start.config.n_positions if start else math.inf
    if options.max_prompt_tokens + options.max_response_tokens > room:
        raise ValueError(
            f"--max-prompt-tokens and --max-response-tokens: together more than the policy's {room} positions; lower one"
        )
    task = data.Records(
        **read,
        tokenizer=tokenizer,
        max_prompt=options.max_prompt_tokens,
        max_response=options.max_response_tokens,
        data_seed=options.data_seed,
    )
    return (
        task,
        start,
        hashlib.sha256(
            json.dumps([read, tokenizer.get_vocab()], sort_keys=True).encode()
        ).hexdigest(),
    )


@contextlib.contextmanager
def locked(folder, wait=False):
    """Holds a folder, made if there is none. The lock dies with the process. Raises ValueError if another holds it, unless wait."""
    os.makedirs(folder, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"--out {folder}: another run is writing there; wait for its end or give another --out"
            ) from None
        yield
    finally:
        os.close(held)


def publish(unfinished, path):
    """Gives a folder its name once its bytes are on the disk: whoever finds the name finds all of it."""
    for name in [*os.listdir(unfinished), "."]:
        sync(os.path.join(unfinished, name))
    os.rename(unfinished, path)


def sync(path):
    """Waits until a file or folder is on the disk."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def version():
    """All of VERSIONS as one text, such as 1.1.1.1."""
    return ".".join(map(str, VERSIONS.values()))


def stage(folder, name, key, make, load):
    """What load reads from a kept stage, made first if there is none. key, which holds its version, decides which one it is."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode())
    path = os.path.join(folder, f"{name}-{digest.hexdigest()[:12]}")
    begun, found = time.time(), os.path.isdir(path)
    if not found:
        with locked(f"{path}.tmp", wait=True):  # a run beside this one may be making it
            if not os.path.isdir(path):
                for left in os.scandir(f"{path}.tmp"):  # by a run that was killed
                    os.unlink(left)
                make(f"{path}.tmp")
                publish(f"{path}.tmp", path)
    print(
        f"{name}: reused {path}"
        if found
        else f"{name}: {time.time() - begun:.0f} s, kept in {path}"
    )
    return load(path), path


def supervised(options, task, start, data_hash):
    """The policy that imitates the demos: the reference, and every method's start. Returns (model, path)."""
    names = (
        "policy",
        "supervised_steps",
        "supervised_lr",
        "max_prompt_tokens",
        "max_response_tokens",
        "data_seed",
        "dtype",
    )
    key = [VERSIONS["supervised"], data_hash, [getattr(options, name) for name in names]]
    lr = options.supervised_lr or (3e-3 if options.policy == "tiny" else 1e-4)

    def make(folder):
        context = (
            128
            if data_hash == "built-in"
            else max(128, options.max_prompt_tokens + options.max_response_tokens)
        )
        model = (
            start or policies.build(options.policy, task.tokenizer, context, options.data_seed)
        ).to(options.device)

        def loss(step):
            prompt, response = to_device(task.demos(step, 32), options.device)
            with precision(options):
                return -policies.log_prob(model, prompt, response).sum() / response[1].sum()

        policies.fit(
            [dict(params=list(model.parameters()), lr=lr)],
            loss,
            options.supervised_steps,
            "supervised policy",
        )
        model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)

    return stage(
        options.stages,
        "supervised",
        key,
        make,
        lambda folder: policies.load(folder)[0].to(options.device),
    )


def preference(options, task, reference, reference_path, role, pairwise=True):
    """A preference model (or reward) trained on the comparisons of a role, 'preference' or 'judge'. Returns (model, path)."""
    key = [
        VERSIONS["preference"],
        os.path.basename(reference_path),
        options.preference_steps,
        role,
        pairwise,
    ]
    recorded, pool = isinstance(task, data.Records), {}
    name = "judge" if role == "judge" else "preference" if pairwise else "reward"

    def comparisons(step):
        if recorded:
            return to_device(task.comparisons(role, step, 64, reference), options.device)
        if step % POOL not in pool:
            pool[step % POOL] = task.comparisons(role, step % POOL, 144, reference)
        return pool[step % POOL]

    def make(folder):
        with torch.random.fork_rng():
            torch.manual_seed(options.data_seed + (role == "judge"))
            model = preference_model.PreferenceModel(reference, pairwise).to(options.device)
        with precision(options):
            model = preference_model.fit(
                model, comparisons, options.preference_steps, 2e-3, recorded, f"{name} model"
            )
            size = min(192, 2 * len(task.compared["held out"])) if recorded else 192
            batches = min(10, 2 * len(task.compared["held out"]) // size) if recorded else 10
            held_out = lambda step: to_device(
                task.comparisons("held out", step, size, reference), options.device
            )  # noqa: E731
            numbers = preference_model.accuracy(model, held_out, batches)
        preference_model.save(model, folder)
        write_json(os.path.join(folder, "accuracy.json"), numbers)

    def load(folder):
        return preference_model.load(folder).to(options.device), read_json(
            os.path.join(folder, "accuracy.json")
        )

    (model, numbers), path = stage(options.stages, name, key, make, load)
    print(
        f"  on {numbers['pairs']} held-out pairs: right sign {numbers['accuracy']:.3f} (shorter wins {numbers['shorter_wins']:.3f}, "
        f"longer wins {numbers['longer_wins']:.3f}), mean |p_hat - p| {numbers['error']:.3f}"
    )
    return model, path


def draw(options, task, policy, reference, score, step):
    """One step's pairs: (prompt, y, y', label [B]), the label being p(y > y'), a vote, or the reward gap for rl."""
    method = METHODS[options.loss]
    if options.offline:
        prompt, response, i, j, chance, rng = to_device(
            task.comparisons("preference", step, 2 * options.batch_size, reference, 2),
            options.device,
        )
        vote = torch.bernoulli(chance.cpu(), generator=rng).to(options.device)
        prompt, y, y_other = (
            tuple(part[k] for part in tokens[:2])
            for tokens, k in ((prompt, i), (response, i), (response, j))
        )
        return prompt, y, y_other, vote
    prompt = to_device(task.prompts("align", step, options.batch_size), options.device)
    beta = tuple(options.beta if who == "mixture" else 0.0 for who in method.PAIR)
    both = sampler.sample(
        policy,
        reference,
        prompt,
        beta,
        data.generator(options.seed, "sample", step),
        task.max_response,
    )
    y, y_other = (
        tuple(part[rows] for part in both)
        for rows in (slice(options.batch_size), slice(options.batch_size, None))
    )
    with torch.no_grad():
        return prompt, y, y_other, score(prompt, y, y_other)


def update(options, policy, reference, optimizer, pairs):
    """One optimiser step on the mean loss of the pairs, in micro-batches. Returns the step's numbers, means over the pairs."""
    method, (prompt, y, y_other, label) = METHODS[options.loss], pairs
    count, size = len(label), options.micro_batch_size or len(label)
    optimizer.zero_grad()
    loss, gap = 0.0, 0.0
    for begin in range(0, count, size):
        x, a, b = (
            tuple(part[begin : begin + size] for part in tokens) for tokens in (prompt, y, y_other)
        )
        sides = (a, b)[: method.LEARNS_FROM]
        logp = [policies.log_prob(policy, x, side) for side in sides] + [None]
        with torch.no_grad():
            ref_logp = [policies.log_prob(reference, x, side) for side in sides] + [None]
        value = method.loss(
            logp[0], logp[1], ref_logp[0], ref_logp[1], label[begin : begin + size], options.tau
        )
        (
            value.sum() / count
        ).backward()  # the global count: a mean of means over uneven parts would weight them wrongly
        loss += value.detach().sum().item() / count
        gap += (logp[0] - ref_logp[0]).detach().sum().item() / count
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {loss} and the gradient's norm {norm}; lower --lr or raise --tau"
        )
    optimizer.step()
    ids, mask = y_other[:2]
    width = min(ids.shape[1], y[0].shape[1])
    same = ((y[0][:, :width] == ids[:, :width]) | ~mask[:, :width]).all(1) & (
        y[1].sum(1) == mask.sum(1)
    )
    return dict(
        loss=loss,
        grad_norm=norm,
        log_ratio=gap,
        label=label.mean().item(),
        same=same.float().mean().item(),
        length=y[1].sum(1).float().mean().item(),
    )


def align(options, task, policy, reference, score, judge, state):
    """The alignment itself: draw pairs, label them, step. Writes a line of metrics a step, about ten evaluations, and
    checkpoints. state: where to begin if there is no checkpoint. Ctrl-C and SIGTERM end it after the step they meet, with a
    checkpoint; a second one at once."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, weight_decay=0.0)
    state = restore(options, policy, optimizer, state)
    every, came = max(10, options.steps // 10), []
    with (
        open(os.path.join(options.out, "metrics.jsonl"), "a", encoding="utf-8") as log,
        signals(lambda number: stop(number) if came else came.append(number)),
    ):
        log.truncate(state["metrics"])  # lines after the checkpoint are written again
        for step in tqdm(
            range(state["step"], options.steps), desc=f"alignment, {options.loss}", mininterval=1.0
        ):
            with precision(options):
                if step % every == 0:
                    write(log, dict(step=step, **validate(policy, reference, judge, task)))
                pairs = draw(options, task, policy, reference, score, step)
                try:
                    write(
                        log, dict(step=step, **update(options, policy, reference, optimizer, pairs))
                    )
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"step {step}: {error}; {keep_pairs(options, task, step, pairs)}"
                    ) from None
            if came or (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                save(
                    options, task, policy, optimizer, dict(state, step=step + 1, metrics=log.tell())
                )
            if came:
                stop(came[0])
        write(log, dict(step=options.steps, **validate(policy, reference, judge, task)))


@contextlib.contextmanager
def signals(handle):
    """Ctrl-C and SIGTERM call handle(number) inside."""
    before = {
        number: signal.signal(number, lambda number, _: handle(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder):
    """A run's checkpoint folders, oldest first."""
    return sorted(
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.startswith("checkpoint-") and not name.endswith(".tmp")
    )


def save(options, task, policy, optimizer, state):
    """Writes OUT/checkpoint-STEP, whole or not at all, a policy folder with the optimiser and the state; then removes the oldest.
    No random state is in it: every generator is made from (seed, stage, step)."""
    path = os.path.join(options.out, f"checkpoint-{state['step']:06d}")
    sync(os.path.join(options.out, "metrics.jsonl"))
    shutil.rmtree(f"{path}.tmp", ignore_errors=True)
    os.makedirs(f"{path}.tmp")
    policy.save_pretrained(f"{path}.tmp")
    task.tokenizer.save_pretrained(f"{path}.tmp")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    with open(os.path.join(f"{path}.tmp", "optimizer.pt"), "wb") as file:
        file.write(buffer.getbuffer())
    files = {
        name: file_hash(os.path.join(f"{path}.tmp", name))
        for name in ("model.safetensors", "optimizer.pt")
    }
    write_json(os.path.join(f"{path}.tmp", "state.json"), dict(state, files=files))
    shutil.rmtree(path, ignore_errors=True)  # a damaged one of the same step
    publish(f"{path}.tmp", path)
    for old in checkpoints(options.out)[: -options.keep]:
        shutil.rmtree(old)


def restore(options, policy, optimizer, state):
    """Loads the newest checkpoint that is whole into policy and optimizer. Returns its state, or the given one if there is none.
    Raises ValueError if the checkpoint's reference or preference model is another."""
    for path in reversed(checkpoints(options.out)):
        try:
            found = read_json(os.path.join(path, "state.json"))
            if any(
                file_hash(os.path.join(path, name)) != digest
                for name, digest in found["files"].items()
            ):
                raise ValueError("a file is not as it was written")
            weights = load_file(os.path.join(path, "model.safetensors"))
            moments = torch.load(
                os.path.join(path, "optimizer.pt"), map_location=options.device, weights_only=True
            )  # nothing in it is run
        except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            print(
                f"warning: {path} is damaged ({policies.first_line(error)}); trying the checkpoint before it",
                file=sys.stderr,
            )
            continue
        for name in ("reference", "preference"):
            if found[name] != state[name]:
                raise ValueError(
                    f"--resume: {path} was made with another {name} model; give another --out"
                )
        policy.load_state_dict(weights, strict=False)  # the tied head is not in the file
        optimizer.load_state_dict(moments)
        print(f"resumed at step {found['step']} from {path}")
        return found
    return state


def keep_pairs(options, task, step, pairs):
    """Writes a step's prompts, responses and labels for a look at them. Returns where, as part of an error."""
    path = os.path.join(options.out, f"step-{step}.json")
    ids = {
        name: [row[keep].tolist() for row, keep in zip(*part[:2], strict=True)]
        for name, part in zip(("prompt", "y", "y_other"), pairs, strict=False)
    }
    write_json(
        path,
        dict(
            ids, step=step, label=pairs[3].tolist(), text=task.tokenizer.batch_decode(ids["prompt"])
        ),
    )
    return f"its prompts and responses are in {path}, the last good weights in the last checkpoint"


def validate(policy, reference, judge, task):
    """The evaluation's numbers on validation prompts, which are not the test prompts."""
    count = 100 if task.judge else min(100, len(task.asked["validation"]))
    numbers, _ = evaluate.measure(policy, reference, judge, task, "validation", count)
    return {name: numbers[name] for name in ("win_rate", "kl", "length", "unfinished", "distinct")}


def write(log, line):
    log.write(json.dumps(line) + "\n")
    log.flush()


def to_device(value, device):
    """Tensors, and tuples of them, moved to a device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(to_device(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def precision(options):
    """Autocast to bfloat16 where it was asked for."""
    return (
        torch.autocast(options.device, torch.bfloat16)
        if options.dtype == "bfloat16"
        else contextlib.nullcontext()
    )


def finished(options, data_hash):
    """(this run's config, its summary if it is already there). Raises ValueError if the folder holds another run, or part of one."""
    config = {name: value for name, value in vars(options).items() if name not in NEUTRAL} | {
        "data": data_hash,
        "version": version(),
    }
    path = os.path.join(options.out, "config.json")
    if not os.path.exists(path):
        if os.path.exists(options.out) and os.listdir(options.out):
            raise ValueError(
                f"--out {options.out}: is not a run's folder and not empty; give another"
            )
        return config, None
    other = read_json(path)
    changed = [
        f"{name} {other.get(name)} there, {value} here"
        for name, value in config.items()
        if other.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"--out {options.out}: holds a different run ({'; '.join(changed)}); give another --out"
        )
    summary = os.path.join(options.out, "summary.json")
    if os.path.exists(summary):
        return config, read_json(summary)
    if checkpoints(options.out) and not options.resume:
        raise ValueError(
            f"--out {options.out}: holds an unfinished run with checkpoints; add --resume to go on, or give another --out"
        )
    return config, None


def read_json(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path, value):
    """Writes a file whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    sync(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def run(options):
    """All stages; returns the summary."""
    begun = time.time()
    task, start, data_hash = open_data(options)
    config, summary = finished(options, data_hash)
    if summary:
        print(f"this run is finished; its result in {options.out}:")
        return summary
    method = METHODS[options.loss]
    print(
        f"{options.loss}: contrastive {'yes' if method.CONTRASTIVE else 'no'}, online {'no' if options.offline else 'yes'}, "
        f"y from the {method.PAIR[0]}, y' from the {method.PAIR[1]}; log-probabilities are sums, tau = {options.tau}, beta = {options.beta}"
    )
    with locked(options.out):
        write_json(os.path.join(options.out, "config.json"), config)
        reference, path = supervised(options, task, start, data_hash)
        reference.requires_grad_(False)
        model, preference_path = preference(
            options, task, reference, path, "preference", pairwise=options.loss != "rl"
        )
        judge = task.judge or preference(options, task, reference, path, "judge")[0]
        policy = policies.load(path)[0].to(options.device)
        weights = (
            file_hash(os.path.join(folder, "model.safetensors"))
            for folder in (path, preference_path)
        )
        state = dict(zip(("reference", "preference"), weights, strict=True), step=0, metrics=0)
        align(
            options,
            task,
            policy,
            reference,
            model.gap if options.loss == "rl" else model,
            judge,
            state,
        )
        return conclude(options, task, policy, reference, judge, begun)


def conclude(options, task, policy, reference, judge, begun):
    """Evaluates on the test prompts and writes the run's results. Returns the summary."""
    count = (
        options.eval_prompts if task.judge else min(options.eval_prompts, len(task.asked["test"]))
    )
    numbers, kept = evaluate.measure(policy, reference, judge, task, "test", count)
    with open(os.path.join(options.out, "samples.txt"), "w", encoding="utf-8") as file:
        file.write(evaluate.samples(kept, judge, task.tokenizer))
    with open(os.path.join(options.out, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    names = {
        "win_rate": "win rate against the start",
        "kl": "KL to the reference (nats)",
        "length": "length (tokens)",
        "loss": "loss",
    }
    evaluate.draw(
        os.path.join(options.out, "curves.png"),
        [
            (
                title,
                "step",
                "",
                {
                    name: list(
                        zip(
                            *(
                                (line["step"], line[name])
                                for line in lines
                                if name in line and (name == "loss" or "win_rate" in line)
                            ),
                            strict=True,
                        )
                    )
                },
            )
            for name, title in names.items()
        ],
    )
    policy.save_pretrained(os.path.join(options.out, "policy"))
    task.tokenizer.save_pretrained(os.path.join(options.out, "policy"))
    if getattr(task, "cut", None):
        print(
            f"warning: {len(task.cut)} prompts are longer than {task.max_prompt} tokens and were cut from the left"
        )
    summary = dict(
        numbers,
        loss=options.loss,
        tau=options.tau,
        beta=options.beta,
        steps=options.steps,
        seconds=time.time() - begun,
    )
    write_json(
        os.path.join(options.out, "summary.json"), summary
    )  # last: its presence says that the run is finished
    return summary


def stop(number):
    raise KeyboardInterrupt(number)


def main(argv=None):
    """Runs the job; returns the exit status: 0, 2 after an error, 130 and 143 after Ctrl-C and SIGTERM."""
    policies.quiet()
    try:
        with signals(stop):
            options = arguments(argv)
            summary = run(options)
    except KeyboardInterrupt as came:
        print(
            "train.py: stopped; nothing finished is lost: the same command with --resume goes on",
            file=sys.stderr,
        )
        return 128 + came.args[0]
    except (ValueError, FloatingPointError) as error:
        message = error
    except torch.OutOfMemoryError:
        message = "the device's memory is full; lower --micro-batch-size, --batch-size or --max-prompt-tokens, or take --dtype bfloat16, and add --resume"
    except (OSError, SafetensorError) as error:
        message = f"cannot write or read: {policies.first_line(error)}; what is finished is kept, --resume goes on"
    else:
        for name, value in summary.items():
            print(
                f"  {name:14s} {value:.4g}" if isinstance(value, float) else f"  {name:14s} {value}"
            )
        print(f"in {options.out}: policy/, samples.txt, curves.png, metrics.jsonl, summary.json")
        return 0
    print(f"train.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
