"""The policy: a GPT-2 of transformers, built or loaded, its tokenizer and its log-probabilities.

Prompts are padded on the left and responses on the right, both as Tokens (ids and mask), so that
every response begins in one column. Masks come from positions and lengths, never from comparing ids
with the pad id: GPT-2 pads with its end-of-text token.
Left out: other architectures (sampler.py runs GPT-2's layers itself), adapters, quantisation.
Run: python policy.py    (a response scored token by token)

Shapes: B rows, P prompt columns, T response columns.
"""

import functools
import inspect
import logging
import math
import os
from typing import NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

SIZES = {
    "tiny": dict(n_layer=2, n_head=4, n_embd=128),
    "gpt2-124m": dict(n_layer=12, n_head=12, n_embd=768),
}


def build(size, tokenizer, context, seed):
    """A GPT-2 with random weights, in eval mode.

    size:
        a key of SIZES.
    tokenizer:
        the vocabulary's size and the end-of-text id are read from it.
    context:
        the number of positions, at least the longest prompt and response together.
    seed:
        the weights depend on it alone. The global random state stays as it was.
    """
    shape = SIZES[size]
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        # Dropout would make the step-0 log-ratio differ from 0, and training and sampling disagree.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # The same function as GPT-2's gelu_new, in one pass over memory, not eight.
        activation_function="gelu_pytorch_tanh",
        # GPT-2's 0.02 is 1/sqrt(width) for its own widths; with it, a narrow model never learns to
        # copy from the prompt.
        initializer_range=shape["n_embd"] ** -0.5,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    return start_as_copier(model)


@torch.no_grad()
def start_as_copier(model):
    """Makes attention look for equal tokens and write what it reads, and positions sinusoids.

    model:
        a fresh GPT2LMHeadModel, changed in place.

    Returns the model. After "mimetic initialization" (arXiv 2305.09828). Only the starting point
    differs from GPT-2's: a summariser must copy from its prompt, which a small model otherwise
    learns after many times the default run's supervised steps.
    """
    width = model.config.n_embd
    std = model.config.initializer_range
    for block in model.transformer.h:
        query, key, value = block.attn.c_attn.weight.split(width, dim=1)
        key.copy_(query)  # a token's query matches the key of an equal token
        block.attn.c_proj.weight.copy_(value.T)  # what a head reads comes out as it went in
    position = torch.arange(model.config.n_positions)[:, None]
    half = width // 2
    angle = position * 1000.0 ** (-torch.arange(half) / half)
    model.transformer.wpe.weight.copy_(torch.cat([angle.sin(), angle.cos()], 1) * std)
    return model


def rate_at(step, options):
    """The alignment's learning rate: a line up in --warm-up steps, times the fall of --decay.

    step:
        from 0 to options.steps - 1.
    options:
        lr, the highest rate; steps, warm_up and decay, "none", "linear" or "cosine".
    """
    rise = 1.0
    if step < options.warm_up:
        rise = (step + 1) / options.warm_up
    done = step / options.steps
    fall = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return options.lr * rise * fall[options.decay]


def minimise(groups, loss, steps, label, max_norm=1.0):
    """AdamW with a short warm-up and then a linear decay of every learning rate.

    groups:
        parameter groups, dicts with params and the peak lr; the parameters change in place.
    loss:
        loss(step) returns a scalar with gradient.
    steps:
        how many, from 0.
    label:
        text for the progress bar.
    max_norm:
        the gradient's norm is cut to it; infinity cuts nothing.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    warmup = min(50, steps // 5 + 1)
    for step in tqdm(range(steps), desc=label, mininterval=1.0):
        rise = min(1.0, (step + 1) / warmup)
        fall = max(0.02, 1 - step / steps)  # never 0: the last steps still learn
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rise * fall
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()


def load(source):
    """A policy and its tokenizer: (GPT2LMHeadModel in eval mode and float32, tokenizer).

    source:
        a local folder or a hub name.

    Dropout is off whatever the folder asks for. Only safetensors are read: a pickle may run code
    when it is opened. Raises ValueError with what to do, in one line: where there is no such
    folder, a file is missing or damaged, the architecture is another, or the tokenizer does not
    fit.
    """
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path and not os.path.isdir(source):
        raise ValueError(
            f"{source}: no such folder; "
            "give a folder with config.json and model.safetensors, or a hub name"
        )
    try:
        model = load_weights(source)
        tokenizer = load_tokenizer(source)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}"
            )
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{source}: cannot load a policy: {first_line(error)}; "
            "without network give a local folder"
        ) from None
    if not isinstance(model, GPT2LMHeadModel):
        raise ValueError(
            f"{source}: is a {type(model).__name__}; only GPT-2 policies are supported"
        )
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


def load_weights(source):
    """The model of a folder or hub name, every weight of it read."""
    model, found = AutoModelForCausalLM.from_pretrained(
        source,
        use_safetensors=True,
        dtype=torch.float32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",
        output_loading_info=True,
    )
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        raise ValueError(f"the weights lack {min(found['missing_keys'])}")
    return model


def load_tokenizer(source):
    """The tokenizer of a local folder or hub name, which pads with its end-of-text token.

    source:
        a local folder or a hub name.

    Raises ValueError if it cannot be read, is empty or has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        vocabulary = os.path.join(source, "vocab.json")
        if not (os.path.isdir(source) and os.path.exists(vocabulary)):
            raise ValueError(
                f"{source}: cannot load a tokenizer: {first_line(error)}; give a local folder"
            ) from None
        # A folder of vocab.json and merges.txt names no class of its own.
        from transformers import GPT2TokenizerFast

        tokenizer = GPT2TokenizerFast.from_pretrained(source)
    # transformers makes an empty tokenizer where there are no files.
    if tokenizer.eos_token_id is None or len(tokenizer) < 2:
        raise ValueError(
            f"{source}: the tokenizer has no end-of-text token or no vocabulary; "
            "give a folder with tokenizer.json, or vocab.json and merges.txt"
        )
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def quiet():
    """Silences the libraries' loading bars and the hub client's five retries.

    The error that follows says it in one line.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def first_line(error):
    """An exception's message, cut to one line; its type's name where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def word_tokenizer(words):
    """A tokenizer with one token a word, split at spaces, for the built-in task.

    words:
        unique strings. The first has id 1: id 0 is end-of-text, which stands for unknown words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(["<|endoftext|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def byte_tokenizer(texts, size=2048):
    """A byte-level BPE trained on the data itself: for real data without --tokenizer.

    texts:
        strings to train on.
    size:
        the most entries it may have; 257 of them are the bytes and end-of-text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: no text is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


class Tokens(NamedTuple):
    """A batch of B rows of tokens, each with its padding.

    ids:
        [B, length], int64.
    mask:
        [B, length], True where a token is one and False where it is padding.

    Prompts are padded on the left and responses on the right.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    def rows(self, index):
        """Some of the rows, as Tokens. index: a slice, or a tensor of row numbers [N]."""
        return Tokens(self.ids[index], self.mask[index])

    def to(self, device):
        """The same rows on a device."""
        return Tokens(self.ids.to(device), self.mask.to(device))

    def repeat(self, times):
        """All rows, then all rows again, times times: row r of the result is row r % B.

        So responses come first, second, ..., each for all prompts, as sampler.sample orders them.
        """
        return Tokens(self.ids.repeat(times, 1), self.mask.repeat(times, 1))

    def lengths(self):
        """Number of tokens of each row, end-of-text included, [B]."""
        return self.mask.sum(1)

    def lists(self):
        """The rows as lists of ids, without their padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]


def same_rows(one, other):
    """Where two batches of right-padded Tokens have equal rows, [B] of bool."""
    width = min(one.ids.shape[1], other.ids.shape[1])
    # Only the other's tokens count: its padding may hold anything.
    equal = (one.ids[:, :width] == other.ids[:, :width]) | ~other.mask[:, :width]
    return equal.all(1) & (one.lengths() == other.lengths())


def pad(rows, side, fill, device="cpu"):
    """Lists of token ids as Tokens.

    rows:
        lists of ids, which may be empty.
    side:
        where the padding goes: "left" for prompts, "right" for responses.
    fill:
        the id of the padding. Nothing ever compares ids with it.

    Returns Tokens [B, longest], with at least one column.
    """
    longest = max(1, max(map(len, rows)))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        start = longest - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, start : start + len(tokens)] = True
    return Tokens(ids, mask).to(device)


def positions(mask):
    """Position ids [B, length] that count from each row's first real token.

    Left padding is wrong by tens of nats without: GPT-2 would count the pads as words.
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def raise_precision(x):
    """Half precision becomes float32; float32 and float64 stay.

    For logits, before any softmax: bfloat16 has 8 bits, and a sum over tokens adds its errors up.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@functools.cache
def arguments(kind):
    """The names that the forward pass of a class of models takes."""
    return frozenset(inspect.signature(kind.forward).parameters)


def run_model(model, ids, mask, positions, keep, cache=None):
    """Logits of the model's own forward pass: one path for sampling and for scoring.

    model:
        a causal language model of transformers.
    ids:
        [B, N] int64, the tokens to read.
    mask:
        [B, M + N] of bool, False where a column is padding; M columns are in the cache.
    positions:
        [B, N] int64, each token's place in its text.
    keep:
        the columns of ids whose logits are wanted: their numbers [K] int64, or K, the last so many.
        The output head runs at these only: [B, N, vocabulary] would not fit in memory.
    cache:
        what the model keeps of earlier columns; it grows by N. None for none.

    Returns [B, K, vocabulary], in float32 or the model's precision if that is higher.
    """
    given = dict(input_ids=ids, attention_mask=mask.long(), use_cache=cache is not None)
    takes = arguments(type(model))
    if "position_ids" in takes:
        given["position_ids"] = positions
    if cache is not None:
        given["past_key_values"] = cache
    if "logits_to_keep" in takes:
        return raise_precision(model(**given, logits_to_keep=keep).logits)
    logits = model(**given).logits
    logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    return raise_precision(logits)


def log_prob(model, prompt, response):
    """log pi(y | x): the sum over the response's tokens, end-of-text included where it was sampled.

    model:
        a GPT-2, the policy or the reference.
    prompt:
        Tokens [B, P], padded on the left.
    response:
        Tokens [B, T], padded on the right, as sampler.sample returns them.

    Returns [B], nats, in float32, or in the model's precision if that is higher. Not a mean over
    tokens: pi(y | x) is the probability of the whole response.
    """
    return token_log_probs(model, prompt, response).sum(1)


def token_log_probs(model, prompt, response):
    """log pi(y_n | x, y_<n) of each response token, 0 where the response's mask is False.

    model:
        a GPT-2, the policy or the reference.
    prompt:
        Tokens [B, P], padded on the left.
    response:
        Tokens [B, T], padded on the right, as sampler.sample returns them.

    Returns [B, T], nats.
    """
    mask = torch.cat([prompt.mask, response.mask], 1)
    # A position's logits are of the token after it: the last prompt column predicts the response's
    # first token. A shift by one would score every token under its neighbour's law.
    begin = prompt.ids.shape[1] - 1
    end = begin + response.ids.shape[1]
    ids, keep = torch.cat([prompt.ids, response.ids], 1), torch.arange(begin, end)
    logits = run_model(model, ids, mask, positions(mask), keep.to(mask.device)).flatten(0, 1)
    logp = -F.cross_entropy(logits, response.ids.flatten(), reduction="none")
    # By position: a pad is never told from an end-of-text by its id.
    return logp.view_as(response.ids).masked_fill(~response.mask, 0.0)


def worked_example():
    """Prints one response's token log-probabilities, alone and in a left-padded batch."""
    tokenizer = word_tokenizer(["a", "b", "c"])
    model = build("tiny", tokenizer, 16, seed=0).double()
    prompts = [[1, 2, 3], [2]]
    responses = [[1, 0], [3, 1, 2]]
    prompt = pad(prompts, "left", 0)
    response = pad(responses, "right", 0)
    with torch.no_grad():
        each = token_log_probs(model, prompt, response)
        total = log_prob(model, prompt, response)
        alone = log_prob(model, pad(prompts[1:], "left", 0), pad(responses[1:], "right", 0))
    rows = []
    for row in each.tolist():
        rows.append([round(value, 4) for value in row])
    print("prompts a b c / b, responses 'a <end>' / 'c a b' (cut at the limit: no end-of-text)")
    print("token log-probabilities:", rows)
    print("log_prob:", [round(value, 4) for value in total.tolist()])
    print(f"second row alone, without padding: {alone.item():.4f}")


if __name__ == "__main__":
    worked_example()
