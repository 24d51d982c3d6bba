"""How much memory a step takes, by model size and by what saves memory.

Each cell is a process of its own that draws, labels and learns from one batch twice, with the
functions of train.py, and says the most that it held: policy, reference, preference model,
gradients and Adam's two moments in float32, and what the passes need. On the CPU it is the whole
process's, the libraries included; with --device cuda what PyTorch had allocated on the GPU.
Left out: the stages before the alignment, which hold less; a model split over devices.
Run: python -m studies.memory [--size NAME]     (6 min on 2 cores, 13 GB; --device cuda)
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time

import job  # before torch: it sets how torch's threads wait

# isort: split
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import data
import job.options
import policy as policies
import preference_model
import sampler
import train
from studies.bench import peak_memory

PROMPTS, PROMPT_TOKENS, NEW = 4, 128, 48
SIZES = {
    "default": dict(kind="gpt2", vocab_size=70, n_layer=2, n_embd=128, n_head=4),
    "GPT-2 124M": dict(kind="gpt2", vocab_size=50257, n_layer=12, n_embd=768, n_head=12),
    # Qwen2.5-0.5B's shape.
    "0.5B": dict(
        kind="qwen2",
        vocab_size=151936,
        num_hidden_layers=24,
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
SETTINGS = {
    "float32": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "float32, micro-batches of 1": ["--micro-batch-size", "1"],
    "float32, checkpointing": ["--gradient-checkpointing"],
    "bfloat16, both": [
        "--dtype",
        "bfloat16",
        "--micro-batch-size",
        "1",
        "--gradient-checkpointing",
    ],
}


def build(size, seed, device):
    """A model of a size with random weights, on the device."""
    shape = dict(SIZES[size])
    kinds = dict(gpt2=GPT2Config, qwen2=Qwen2Config)
    config = kinds[shape.pop("kind")](bos_token_id=0, eos_token_id=0, **shape)
    policies.drop_nothing(config)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def cell(size, setting, device):
    """Two steps. Returns (peak bytes, seconds of the second)."""
    options = job.options.parse([*SETTINGS[setting], "--loss", "ipo_md", "--device", device])
    method = job.options.find_method("ipo_md")
    policy = build(size, 0, device)
    reference = build(size, 0, device).requires_grad_(False)
    labels = preference_model.PreferenceModel(reference).to(device).requires_grad_(False)
    if options.gradient_checkpointing:
        policies.recompute_layers(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-9, weight_decay=0.0)
    prompt = policies.pad([[1] * PROMPT_TOKENS] * PROMPTS, "left", 0, device)
    spent = 0.0
    for step in range(2):
        begun = time.perf_counter()
        with job.options.precision(options):
            uniforms = data.uniforms(data.generator(0, "memory", step), NEW, 2, PROMPTS)
            pair = sampler.draw_pairs(method.PAIR, policy, reference, prompt, 0.125, uniforms)
            with torch.no_grad():
                label = labels(prompt, *pair)
            models = (options, method, policy, reference, optimizer)
            train.update(*models, prompt, *pair, label)
        spent = time.perf_counter() - begun
    return peak_memory(options), spent


def in_a_process(size, setting, device):
    """cell in a process of its own: a process's peak never falls. None if memory was too little."""
    command = [sys.executable, "-m", "studies.memory", "--cell", size, setting]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [*command, "--device", device], cwd=root, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        return None
    peak, spent = done.stdout.split()[-2:]
    return int(peak), float(spent)


def table(sizes, device):
    """Prints a row a setting, a column a size."""
    print(
        f"peak GB (seconds a step): IPO-MD, {PROMPTS} prompts of {PROMPT_TOKENS} tokens, two "
        f"responses of at most {NEW} each; {device}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    print(f"| | {' | '.join(sizes)} |")
    print("|---" * (len(sizes) + 1) + "|")
    for setting in SETTINGS:
        row = []
        for size in sizes:
            found = in_a_process(size, setting, device)
            row.append("too much" if found is None else f"{found[0] / 1e9:.2f} ({found[1]:.1f})")
        print(f"| {setting} | {' | '.join(row)} |", flush=True)


def main(argv=None):
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", action="append", choices=SIZES, help="(default: all of them)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cell", nargs=2, metavar=("SIZE", "SETTING"), help="one cell, here")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available; leave it out")
    if options.cell:
        # A full memory is an answer, too: the table says "too much".
        with contextlib.suppress(torch.OutOfMemoryError, MemoryError):
            print(*cell(*options.cell, options.device))
            return 0
        return 1
    table(options.size or list(SIZES), options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
