"""Sampling from the policy, the reference or their per-token geometric mixture, with a key-value cache for each model.

The mixture's law (arXiv 2403.08635, section 5.1): log q(. | x, y_<n) = (1-beta) log pi(. | x, y_<n) + beta log pi_ref(. |
x, y_<n) + C, one token at a time. Temperature 1 and the full vocabulary: what the losses assume is what is drawn.
Left out: temperature, top-k, top-p, beam search; architectures other than GPT-2.
Run: python tests/enumerated.py    (this mixture's law against the sequence-level one, every response enumerated)

Shapes: B = prompts times responses, P prompt columns, T response columns, V vocabulary, L layers, H heads, D head width.
"""

import copy

import torch
from torch.nn import functional as F

import policy as policies


class Stream:
    """One model decoding some of the rows, with preallocated keys and values [L, rows, H, P + T, D] of its own. A cache shared by
    the two models would be fast and wrong."""

    def __init__(self, model, rows, weight, prompt, max_tokens):
        """Runs the prompts once and copies their keys and values to every row drawn from them. rows: indices into B."""
        self.model, self.rows, self.weight = model, rows, weight[rows, None]
        ids, mask = prompt
        count, width = ids.shape
        config = model.config
        shape = (2, config.n_layer, count, config.n_head, width, config.n_embd // config.n_head)
        cache = torch.empty(shape, device=ids.device, dtype=model.dtype)
        causal = torch.ones(width, width, dtype=torch.bool, device=ids.device).tril()
        # A pad attends to itself: a row of the softmax with nothing in it would be NaN, and reach others through its value.
        visible = causal & (mask[:, None] | torch.eye(width, dtype=torch.bool, device=ids.device))
        logits = forward(model, ids, policies.positions(mask), cache, 0, visible[:, None])
        source = rows % count
        self.logits = logits[source]
        self.cache = torch.empty(
            *shape[:2],
            len(rows),
            shape[3],
            width + max_tokens,
            shape[5],
            device=ids.device,
            dtype=model.dtype,
        )
        self.cache[..., :width, :] = cache[:, :, source]
        self.length, self.position = width, mask.sum(1)[source]
        padded = not bool(mask.all())
        room = torch.ones(len(rows), max_tokens, dtype=torch.bool, device=ids.device)
        self.visible = torch.cat([mask[source], room], 1)[:, None, None] if padded else None

    def advance(self, tokens):
        """Feeds one more token to each row of B (tokens [B]) and keeps the logits that follow it, [rows, V]."""
        visible = None if self.visible is None else self.visible[..., : self.length + 1]
        ids, position = tokens[self.rows, None], self.position[:, None]
        self.logits = forward(self.model, ids, position, self.cache, self.length, visible)
        self.length, self.position = self.length + 1, self.position + 1


def forward(model, ids, positions, cache, start, visible):
    """GPT-2 over N new tokens whose keys and values go to cache[..., start : start + N, :]. Returns the last logits [B, V]. ids,
    positions: [B, N]. visible: [B, 1, N, start + N] True where a token may look, None for everywhere."""
    body = model.transformer
    x = body.wte(ids) + body.wpe(positions)
    rows, count, width = x.shape
    for block, (keys, values) in zip(body.h, cache.unbind(1), strict=True):
        query, key, value = (
            block.attn.c_attn(block.ln_1(x))
            .view(rows, count, 3, model.config.n_head, -1)
            .permute(2, 0, 3, 1, 4)
        )
        keys[:, :, start : start + count] = key
        values[:, :, start : start + count] = value
        seen = F.scaled_dot_product_attention(
            query, keys[:, :, : start + count], values[:, :, : start + count], visible
        )
        x = x + block.attn.c_proj(seen.transpose(1, 2).reshape(rows, count, width))
        hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + block.mlp.c_proj(hidden)
    return policies.raise_precision(model.lm_head(body.ln_f(x[:, -1])))


@torch.no_grad()
def sample(policy, reference, prompt, beta, generator, max_tokens=48):
    """Responses drawn token by token from pi^(1-beta) pi_ref^beta, renormalised at every token. prompt: (ids [N, P], mask [N,
    P]), padded left. beta in [0, 1]: the weight of the reference, or one for each response wanted of a prompt, so (0, 0.125)
    draws y from the policy and y' from the mixture after one run over the prompt. generator: on the CPU, so every device draws
    the same uniforms. Returns ids [B, T], mask [B, T], finished [B], all first responses before all second ones; T <= max_tokens
    is the longest. mask holds through the end-of-text token; a response cut at max_tokens is unfinished and has none."""
    prompt_ids, device = prompt[0], prompt[0].device
    count, end = prompt_ids.shape[0], policy.config.eos_token_id
    betas = beta if isinstance(beta, tuple) else (beta,)
    weight = torch.tensor(betas, device=device, dtype=torch.float64).repeat_interleave(count)
    # Drawn up front: what a row draws depends neither on the others' lengths nor on the model that answers.
    uniforms = torch.rand(max_tokens, len(weight), generator=generator, dtype=torch.float64).to(
        device
    )
    streams = [
        Stream(lower(model), share.nonzero()[:, 0], share, prompt, max_tokens)
        for model, share in ((policy, 1 - weight), (reference, weight))
        if share.any()  # beta = 0 never runs the reference, beta = 1 never the policy
    ]
    ids = torch.full((len(weight), max_tokens), end, device=device)
    mask = torch.zeros(len(weight), max_tokens, dtype=torch.bool, device=device)
    running = torch.ones(len(weight), dtype=torch.bool, device=device)
    for step in range(max_tokens):
        token = draw(mix(streams, len(weight)), uniforms[step])
        ids[:, step] = torch.where(running, token, end)
        mask[:, step] = running
        running = running & (
            token != end
        )  # a sampled end-of-text stops the row; this is the sampler, not a mask by pad id
        # Asking makes a GPU wait for its queue, so there it is asked every 16 tokens.
        if (
            step + 1 == max_tokens
            or (step % 16 == 15 or device.type == "cpu")
            and not running.any()
        ):
            break
        for stream in streams:
            stream.advance(token)
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest], ~running


def lower(model):
    """The model in autocast's precision; outside autocast the model itself. Autocast would cast every weight and the whole cache
    again for every token; this casts once a call."""
    kind = model.device.type
    return (
        copy.deepcopy(model).to(torch.get_autocast_dtype(kind))
        if torch.is_autocast_enabled(kind)
        else model
    )


def mix(streams, rows):
    """The unnormalised log of the mixture, [rows, V]: each model's logits with its weight. Softmax needs no constants C."""
    first = streams[0].logits
    mixed = torch.zeros(rows, first.shape[1], device=first.device, dtype=first.dtype)
    for stream in streams:
        mixed.index_add_(0, stream.rows, stream.logits * stream.weight.to(first.dtype))
    return mixed


def draw(logits, uniform):
    """One token a row by inverting the distribution function: logits [B, V], uniform [B] in [0, 1). Returns [B]."""
    cumulative = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    # right=True: a token of probability 0 is never drawn, not even by uniform = 0.
    token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)
