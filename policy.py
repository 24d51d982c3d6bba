"""The policy: a causal language model, built or loaded, its tokenizer and its log-probabilities.

A GPT-2 is built; what is loaded may be any architecture of transformers whose log-probabilities
depend neither on padding, nor on later tokens, nor on its cache: load tries it out.
Prompts are padded on the left and responses on the right, both as Tokens (ids and mask), so that
every response begins in one column. Masks come from positions and lengths, never from comparing ids
with the pad id: padding is with the end-of-text token.
Left out: adapters, quantisation, encoders, recurrent models.
Run: python policy.py    (a response scored token by token)

Shapes: B rows, P prompt columns, T response columns.
"""

import copy
import functools
import inspect
import logging
import math
import os
import socket
import urllib.parse
import urllib.request
import warnings
from typing import NamedTuple

import huggingface_hub
import torch
import transformers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

import files

# On H100 and H200, from torch 2.11 on, cuDNN's attention in half precision may give NaN gradients
# where a mask is passed and the length is 64 more than a multiple of 128
# (github.com/pytorch/pytorch/issues/196678); the other kernels do not.
torch.backends.cuda.enable_cudnn_sdp(False)

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


def lagging_copies(options, policy, start):
    """Who draws and who is the loss's reference, where --refresh and --renew-reference ask for
    copies that lag behind the policy.

    options:
        refresh, 1 if the policy itself draws; renew_reference, 0 if the start stays pi_ref.
    policy, start:
        the model that is trained, and the one that it began as.

    Returns (drawer, reference, copies): the policy and the start, or frozen copies of the policy;
    copies holds only those, {name: model}, which a checkpoint must keep.
    """
    copies = {}
    if options.refresh > 1:
        copies["drawer"] = copy.deepcopy(policy).requires_grad_(False)
    if options.renew_reference:
        copies["reference"] = copy.deepcopy(policy).requires_grad_(False)
    return copies.get("drawer", policy), copies.get("reference", start), copies


def renew(copies, policy, step, options):
    """Gives the copies that lag behind the policy its weights, where this step is one to do so.

    Arguments as lagging_copies takes and returns them; step is an integer from 0.
    """
    every = dict(drawer=options.refresh, reference=options.renew_reference)
    for name, model in copies.items():
        if step % every[name] == 0:
            model.load_state_dict(policy.state_dict())


def minimise(groups, loss, steps, label, max_norm=1.0, add_gradients=None, bar=tqdm):
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
    add_gradients:
        add_gradients(parameters) sums the gradients of several processes, each of which has the
        loss of its rows (job/parallel.py). None for one process.
    bar:
        what shows the steps, called as tqdm is.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    warmup = min(50, steps // 5 + 1)
    for step in bar(range(steps), desc=label, mininterval=1.0):
        rise = min(1.0, (step + 1) / warmup)
        fall = max(0.02, 1 - step / steps)  # never 0: the last steps still learn
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rise * fall
        optimizer.zero_grad()
        loss(step).backward()
        if add_gradients:
            add_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()


def load(source):
    """A policy and its tokenizer: (causal language model in eval mode and float32, tokenizer).

    source:
        a local folder or a hub name.

    Dropout is off whatever the folder asks for. Only safetensors are read: a pickle may run code
    when it is opened. Nor is code in the folder run, and nobody is asked whether it may. Raises
    ValueError with what to do, in one line: where there is no such folder, a file is missing or
    damaged, the model is not a causal one that padding leaves alone, or the tokenizer does not fit.
    """
    if looks_like_path(source) and not os.path.isdir(source):
        raise ValueError(
            f"{source}: no such folder; "
            "give a folder with config.json and model.safetensors, or a hub name"
        )
    try:
        with files.nothing_said():
            if os.path.isdir(source):
                files.check_model_folder(source)
            model = load_weights(source, load_config(source))
            tokenizer = load_tokenizer(source)
            known = known_ids(model, tokenizer)
            check_law(model, known)
    # transformers, its checks of configs and tokenizers each raise errors of their own.
    except Exception as error:
        if files.is_out_of_memory(error):
            raise
        reason = first_line(error).removeprefix(f"{source}: ")
        advice = "" if os.path.isdir(source) else "; without network give a local folder"
        raise ValueError(f"{source}: cannot load a policy: {reason}{advice}") from None
    mask_ids(model, unknown_ids(model, known))
    ends = all_ends(model, tokenizer, known)
    for config in (model.config, model.generation_config):
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
        config.pad_token_id = tokenizer.eos_token_id
    return model.eval(), tokenizer


def looks_like_path(source):
    """Whether a source means a folder here, not OWNER/NAME on the hub: its first part is one."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    return "/" in source and os.path.isdir(source.partition("/")[0])


@functools.cache
def is_reached(source):
    """Whether what a folder or hub name stands for can be asked for. Looked for once.

    The hub client tries a connection that is refused six times, in half a minute, for each of a
    model's files. Without the hub only its cache is asked, which has what was loaded before.
    """
    # Through a proxy it is another connection, which the client makes.
    if os.path.isdir(source) or urllib.request.getproxies():
        return True
    hub = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname, port), timeout=10).close()
    except OSError:  # also where the name is unknown
        return False
    return True


def load_config(source):
    """The config of a folder or hub name, without dropout. Raises ValueError for what is left out.

    source:
        a local folder or a hub name.
    """
    given = dict(trust_remote_code=False, local_files_only=not is_reached(source))
    config = AutoConfig.from_pretrained(source, **given)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method", "an unknown method")
        raise ValueError(f"the model is quantised ({method}); give its plain weights")
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder model; give a decoder alone")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise ValueError(f"its config says {layers} layers; give a model with some")
    drop_nothing(config)
    # The same function as gelu_new, in one pass over memory, not eight.
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def drop_nothing(config):
    """Sets every probability of dropout in a config to 0, whatever it calls it, in place.

    GPT-2 has resid_pdrop, OPT layerdrop, Llama attention_dropout. With any of them the step-0
    log-ratio is not 0, and the loss does not see what was sampled.
    """
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, type(value)(0))  # some configs insist on an int
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            drop_nothing(part)


def load_weights(source, config):
    """The model of a folder or hub name, every weight of it read.

    source:
        a local folder or a hub name.
    config:
        as load_config returns it.
    """
    refuse_pickles(source, config)
    if os.path.isdir(source):
        with torch.device("meta"):  # shapes alone: a size that no memory holds is seen before
            wanted = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        files.check_shapes(files.tensors_of_folder(source), wanted)
    model, found = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=not is_reached(source),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        raise ValueError(f"the weights lack {min(found['missing_keys'])}")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # written into the architecture, not its config
    files.check_finite(model)
    # Many models keep the pad's embedding from learning. End-of-text is our pad, and a token.
    model.get_input_embeddings().padding_idx = None
    return model


def refuse_pickles(source, config):
    """Raises ValueError if an index of weights names a file that is not of safetensors, or not
    beside it."""
    indices = ["model.safetensors.index.json"]
    named = getattr(config, "transformers_weights", None)  # a config may name an index of its own
    if named and named.endswith(".json"):
        indices.append(named)
    for index in indices:
        given = dict(local_files_only=not is_reached(source))
        path = cached_file(source, index, _raise_exceptions_for_missing_entries=False, **given)
        if path is None:
            continue
        named = files.read_object(path).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
            raise ValueError(f"{index} has no weight_map, from tensors to file names")
        for name in sorted(set(named.values())):
            if not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {name}, a pickle; give the weights as safetensors")
            if os.path.basename(name) != name:
                raise ValueError(f"{index} names {name}, in another folder; put it beside it")


def known_ids(model, tokenizer):
    """The ids that a tokenizer has, ascending. Raises ValueError if one is not the model's."""
    known = sorted(tokenizer.get_vocab().values())
    if len(set(known)) < len(known):
        raise ValueError("two of the tokenizer's entries have one id; give another tokenizer")
    rows = vocabulary(model)
    if known[-1] >= rows:
        raise ValueError(
            f"the tokenizer has {known[-1] + 1} entries, the model {rows}; "
            "give the tokenizer that belongs to it"
        )
    return known


def vocabulary(model):
    """How many ids a model has a logit for, the tokenizer's and any that pad its embedding."""
    return model.get_output_embeddings().weight.shape[0]


def unknown_ids(model, known):
    """The model's ids that are not among the known ones, as a list."""
    return sorted(set(range(vocabulary(model))) - set(known))


def mask_ids(model, unknown):
    """Makes ids impossible for a model, in sampling and in scoring: run_model's logits are -inf.

    model:
        changed in place.
    unknown:
        list of ids. Embeddings are often padded to a round number of rows, which the tokenizer has
        no text for; a loss that thinks them possible is not of the law that was sampled.
    """
    if unknown:
        mask = torch.zeros(vocabulary(model), dtype=torch.bool, device=model.device)
        mask[unknown] = True
        # Goes where the model goes, but into no file: it follows from the tokenizer.
        model.register_buffer("impossible", mask, persistent=False)


def all_ends(model, tokenizer, known):
    """The ids any of which ends a response, the tokenizer's own first, as a list.

    A list in generation_config names more of them, such as the end of a chat turn. A single id in
    it says nothing: transformers writes one for every architecture, whatever the tokenizer.
    """
    ends = [tokenizer.eos_token_id]
    named = model.generation_config.eos_token_id
    if isinstance(named, list):
        for token in named:
            if token in known and token not in ends:
                ends.append(token)
    return ends


def end_tokens(model):
    """The ids any of which ends a response, as a list. The first is what records end with."""
    ends = model.config.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def context(model):
    """The most tokens of prompt and response together: an int, or infinity if there is no limit."""
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings"):
        found = getattr(config, name, None)
        if found is not None:
            return found
    return math.inf


@torch.no_grad()
def check_law(model, known):
    """Raises ValueError if what a model says depends on what it must not depend on.

    model:
        tried out on a few tokens, in train mode; it ends in eval mode.
    known:
        ids of its tokenizer, ascending.

    No list of architectures: encoders look at later tokens, a recurrent model's state runs through
    the pads, some caches lose tokens, and some layers are random in training.
    """
    model.train()
    a, b, c, d, e = (known[round(part * (len(known) - 1) / 4)] for part in range(5))
    rows = pad([[a, b, c, d], [a, b, c, e], [c, d]], "left", a)
    ids, mask = rows
    place = positions(mask)
    logp = log_law(model, ids, mask, place)
    again = log_law(model, ids, mask, place)
    alone = log_law(model, ids[2:, 2:], mask[2:, 2:], place[2:, 2:])
    spread = logp[mask].std()  # of a model that says much the same always, any change is small

    def differ(one, other):
        # Not >: a NaN differs from everything.
        return not (one - other).abs().max() <= 1e-3 * spread

    if not torch.equal(logp[mask], again[mask]):
        problem = "are random in training"
    elif differ(logp[0, :3], logp[1, :3]):
        problem = "depend on later tokens: it is no causal language model"
    elif differ(logp[2:, 2:], alone):
        problem = "change with padding"
    elif differ(logp[:, 3:], through_cache(model, ids, mask, place)):
        problem = "change when its cache is used"
    else:
        model.eval()
        return
    raise ValueError(f"its log-probabilities {problem}; give another model")


def log_law(model, ids, mask, place, cache=None):
    """log pi(. | prefix) at every column, [B, N, V]. Arguments as run_model."""
    logits = run_model(model, ids, mask, place, ids.shape[1], cache)
    return torch.log_softmax(logits, -1)


def through_cache(model, ids, mask, place):
    """log_law at the last column, [B, 1, V], the others being read into a cache before."""
    cache = DynamicCache(config=model.config)
    log_law(model, ids[:, :-1], mask[:, :-1], place[:, :-1], cache)
    return log_law(model, ids[:, -1:], mask, place[:, -1:], cache)


def recompute_layers(model):
    """Makes a model in train mode compute each layer again in the backward pass, and keep less.

    model:
        changed in place. ValueError if its architecture cannot do that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 gives it another name
        model.gradient_checkpointing_enable(dict(use_reentrant=False))


def load_tokenizer(source):
    """The tokenizer of a local folder or hub name, which pads with its end-of-text token.

    source:
        a local folder or a hub name.

    Raises ValueError if it cannot be read, is empty or has no end-of-text token.
    """
    try:
        with files.nothing_said():
            if os.path.isdir(source):
                files.check_model_folder(source)
            tokenizer = read_tokenizer(source)
            opening(tokenizer)  # some are broken in a way that only their use shows
    except BaseException as error:  # a library in Rust may panic, which is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise ValueError(
            f"{source}: cannot load a tokenizer: {first_line(error)}; give a local folder"
        ) from None
    # transformers makes an empty tokenizer where there are no files.
    if tokenizer.eos_token_id is None or len(tokenizer) < 2:
        raise ValueError(
            f"{source}: the tokenizer has no end-of-text token or no vocabulary; "
            "give a folder with tokenizer.json, or vocab.json and merges.txt"
        )
    tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def read_tokenizer(source):
    """The tokenizer of a folder or hub name, as transformers reads it."""
    try:
        given = dict(trust_remote_code=False, local_files_only=not is_reached(source))
        return AutoTokenizer.from_pretrained(source, use_fast=True, **given)
    except (OSError, ValueError, KeyError):
        if not os.path.exists(os.path.join(source, "vocab.json")):
            raise
        # A folder of vocab.json and merges.txt names no class of its own.
        from transformers import GPT2TokenizerFast

        return GPT2TokenizerFast.from_pretrained(source)


def opening(tokenizer):
    """What a tokenizer puts before a text by itself, as a list: its BOS id, or nothing."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    added = tokenizer.encode("a")
    # Compared with the text behind it: an end-of-text put behind a text may have the same id.
    if added[:1] == [tokenizer.bos_token_id] and added[1 : len(plain) + 1] == plain:
        return added[:1]
    return []


def quiet():
    """Silences the libraries' loading bars and the hub client's five retries.

    The error that follows says it in one line.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def first_line(error):
    """An exception's message, cut to one line; its type's name where there is no message."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # what is wrong stands in the next
        return f"{lines[0]} {lines[1].strip()}"
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

    Returns [B, K, vocabulary], in float32 or the model's precision if that is higher; -inf for ids
    that the tokenizer lacks.
    """
    return logits_of(model, forward(model, ids, mask, positions, keep, cache), keep)


def forward(model, ids, mask, positions, keep, cache=None, states=False):
    """The output of a model's forward pass. Arguments as run_model.

    states:
        True for every layer's hidden states, too.
    """
    given = dict(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep,
    )
    taken = {}
    for name, value in given.items():
        # Not every architecture takes all: one without position ids counts by the mask itself.
        if name in arguments(getattr(type(model), "forward", model)):
            taken[name] = value
    if states:
        taken["output_hidden_states"] = True
    return model(**taken)


@functools.cache
def arguments(function):
    """The names of a function's arguments. Kept: looking takes as long as a small layer."""
    return frozenset(inspect.signature(function).parameters)


def logits_of(model, output, keep):
    """The logits that run_model returns, from forward's output. Arguments as run_model."""
    logits = output.logits
    if "logits_to_keep" not in arguments(getattr(type(model), "forward", model)):
        logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    logits = raise_precision(logits)
    impossible = getattr(model, "impossible", None)
    if impossible is not None:
        logits = logits.masked_fill(impossible, -math.inf)
    return logits


def log_prob(model, prompt, response):
    """log pi(y | x): the sum over the response's tokens, end-of-text included where it was sampled.

    model:
        the policy or the reference.
    prompt:
        Tokens [B, P], padded on the left.
    response:
        Tokens [B, T], padded on the right, as sampler.sample returns them.

    Returns [B], nats, in float32, or in the model's precision if that is higher. Not a mean over
    tokens: pi(y | x) is the probability of the whole response.
    """
    return token_log_probs(model, prompt, response).sum(1)


def mean_log_prob(model, prompt, response):
    """log pi(y | x) over the response's number of tokens, [B], nats a token.

    Arguments as log_prob. Not the theory's: the paper's taus suggest it (--length-average).
    """
    return log_prob(model, prompt, response) / response.lengths()


def scoring(options):
    """Which of log_prob and mean_log_prob the run's loss takes: log_prob, without the option."""
    return mean_log_prob if options.length_average else log_prob


def token_log_probs(model, prompt, response):
    """log pi(y_n | x, y_<n) of each response token, 0 where the response's mask is False.

    model:
        the policy or the reference.
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
