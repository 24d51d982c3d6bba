"""Sampling from the policy, the reference or their per-token geometric mixture, each with a cache.

The mixture's law (arXiv 2403.08635, section 5.1), one token at a time, C a constant of the prefix:
    log q(. | x, y_<n) = (1-beta) log pi(. | x, y_<n) + beta log pi_ref(. | x, y_<n) + C.
Temperature 1 and the full vocabulary: what the losses assume is what is drawn. How far this law is
from the theory's mixture of whole responses: `python enumerated.py`, every response counted.
A model runs its own forward pass, so any decoder of transformers will do whose cache holds keys and
values. On a CPU the two models run side by side.
Left out: temperature, top-k, top-p, beam search; recurrent models, whose state a pad would change.
Run: python sampler.py    (two laws, their mixtures, and draws from them to check by hand)

Shapes: N prompts, B = N times the responses of each, R of the B rows, P prompt columns, T response
columns, V vocabulary, H heads, D head width.
"""

import copy
from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import policy as policies
import side_by_side


class Stream:
    """One model decoding some of the B rows, with keys and values of its own.

    A cache that the two models share would be fast and wrong: each model reads the other's keys.
    """

    def __init__(self, model, rows, weight, prompt, max_tokens):
        """Runs each prompt once; its keys and values are copied to every row drawn from it.

        model:
            a causal language model of transformers. ValueError if new_cache refuses it.
        rows:
            [R] int64, which of the B rows it serves; row r has prompt r % N.
        weight:
            [B] in [0, 1], the model's share in the mixture of every row.
        prompt:
            policy.Tokens of N prompts, [N, P], padded left.
        max_tokens:
            the most tokens that will be fed.
        """
        self.model = model
        self.rows = rows
        self.weight = weight[rows, None]
        ids, mask = prompt
        count, width = ids.shape
        cache = new_cache(model)
        # The last column only: with left padding it is every row's last token.
        logits = policies.run_model(model, ids, mask, policies.positions(mask), 1, cache)

        source = rows % count  # all first responses come before all second ones
        self.logits = logits[source, -1]
        self.cache = spread(cache, source, max_tokens)
        # Two clocks: the columns of the cache count pads, the positions of the text do not.
        self.length = width
        self.position = mask.sum(1)[source]
        # Made once, and cut at every token to the columns that there are: a pad of the prompt stays
        # out of sight, and every token that is fed is seen by those after it.
        room = torch.ones(len(rows), max_tokens, dtype=torch.bool, device=ids.device)
        self.mask = torch.cat([mask[source], room], 1)

    def advance(self, tokens):
        """Feeds one more token to each row, tokens [B]; self.logits [R, V] then follow it."""
        ids = tokens[self.rows, None]
        mask = self.mask[:, : self.length + 1]  # the new token sees itself, too
        position = self.position[:, None]
        logits = policies.run_model(self.model, ids, mask, position, 1, self.cache)
        self.logits = logits[:, -1]
        self.length += 1
        self.position = self.position + 1


def new_cache(model):
    """An empty cache for a model, one layer for each of its own that attends.

    Raises ValueError, in one line, for a model that keeps anything but keys and values: a recurrent
    state has read the padding, and no mask takes it out again.
    """
    name = type(model).__name__
    if "past_key_values" not in policies.arguments(type(model).forward):
        raise ValueError(f"{name}: cannot be sampled: it keeps no keys and values (recurrent?)")
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        # The exact types: a subclass may keep a recurrent state besides.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kind = type(layer).__name__
            raise ValueError(
                f"{name}: cannot be sampled: it keeps more than keys and values: {kind}"
            )
    return cache


def spread(cache, source, more):
    """A cache of N prompts as one of R rows, with room for more columns; returned, and changed.

    cache:
        a DynamicCache that holds the prompts' P columns.
    source:
        [R] int64, which prompt each row goes on from.
    more:
        the number of columns to come.
    """
    for index, layer in enumerate(cache.layers):
        layer.reorder_cache(source)
        # A sliding window keeps few columns and forgets; only what keeps all of them needs room.
        if type(layer) is DynamicLayer:
            cache.layers[index] = LayerWithRoom(layer, more)
    return cache


class LayerWithRoom(DynamicLayer):
    """A layer's keys and values [R, H, columns, D] with room: new columns are written in place.

    The library's own layer copies all that it holds for every token, to make it one column longer.
    """

    def __init__(self, layer, more):
        """layer: a DynamicLayer that holds the prompts. more: the number of columns to come."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.all_keys = with_room(layer.keys, more)
        self.all_values = with_room(layer.values, more)
        self.show(layer.keys.shape[2])

    def show(self, length):
        """Makes the first columns what the layer holds; those after them are not written yet."""
        self.keys = self.all_keys[:, :, :length]
        self.values = self.all_values[:, :, :length]

    def update(self, keys, values, *args, **kwargs):
        """Appends columns, [R, H, new, D] each. Returns all keys and all values so far."""
        start = self.get_seq_length()
        stop = start + keys.shape[2]
        self.all_keys[:, :, start:stop] = keys
        self.all_values[:, :, start:stop] = values
        self.show(stop)
        return self.keys, self.values


def with_room(columns, more):
    """A copy of [R, H, columns, D] with more columns after them, which hold anything."""
    rows, heads, length, size = columns.shape
    room = columns.new_empty(rows, heads, length + more, size)
    room[:, :, :length] = columns
    return room


@torch.no_grad()
def sample(policy, reference, prompt, beta, generator, max_tokens=48, uniforms=None):
    """Responses drawn token by token from pi^(1-beta) pi_ref^beta, renormalised at every token.

    policy, reference:
        causal language models of one vocabulary; a reference of weight 0 may be None.
    prompt:
        policy.Tokens of N prompts, [N, P], padded left.
    beta:
        in [0, 1], the weight of the reference; or a tuple, one for each response wanted of a
        prompt: (0, 0.125) draws y from the policy and y' from the mixture.
    generator:
        on the CPU, so that every device draws the same uniforms; None if they are given.
    max_tokens:
        where a response is cut.
    uniforms:
        [max_tokens, B] in [0, 1), float64: the randomness, a number a token and row. With it
        the result is a function of the arguments, and rows may be shared out over several calls.

    Returns ids [B, T], mask [B, T], finished [B], all first responses before all second ones; T <=
    max_tokens is the longest. mask holds through the end-of-text token; a response cut at
    max_tokens is unfinished and has none.
    """
    prompt_ids, _ = prompt
    device = prompt_ids.device
    ends = torch.tensor(policies.end_tokens(policy), device=device)  # any of them ends a response
    betas = beta if isinstance(beta, tuple) else (beta,)
    weight = torch.tensor(betas, device=device, dtype=torch.float64)
    # All first responses before all second ones, so that row r has prompt r % N.
    weight = weight.repeat_interleave(len(prompt_ids))
    rows = len(weight)
    if uniforms is None:
        # Up front: a row's draws depend neither on others' lengths nor on the model that answers.
        uniforms = torch.rand(max_tokens, rows, generator=generator, dtype=torch.float64)
    if uniforms.shape != (max_tokens, rows):  # one column would be broadcast to every row
        raise ValueError(f"uniforms: {list(uniforms.shape)}, expected {[max_tokens, rows]}")
    uniforms = uniforms.to(device)
    starts = []
    for model, share in ((policy, 1 - weight), (reference, weight)):
        if share.any():  # beta = 0 never runs the reference, beta = 1 never the policy
            served = share.nonzero()[:, 0]
            starts.append(partial(Stream, lower(model), served, share, prompt, max_tokens))
    streams = side_by_side.run(starts, device)
    ids = ends[:1].expand(rows, max_tokens).clone()
    mask = torch.zeros(rows, max_tokens, dtype=torch.bool, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(max_tokens):
        token = draw(mix(streams, rows), uniforms[step])
        ids[:, step] = torch.where(running, token, ends[0])
        mask[:, step] = running
        # A sampled end-of-text stops the row; this is the sampler, not a mask by pad id.
        running = running & ~torch.isin(token, ends)
        # Asking makes a GPU wait for its queue, so there it is asked every 16 tokens.
        asked = device.type == "cpu" or step % 16 == 15
        if step + 1 == max_tokens or (asked and not running.any()):
            break
        # The models meet at every token only, in mix: until then neither waits for the other.
        side_by_side.run([partial(stream.advance, token) for stream in streams], device)
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest], ~running


def lower(model):
    """The model in autocast's precision; outside autocast the model itself.

    Autocast would cast every weight and the whole cache again for every token; this casts once a
    call.
    """
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        # A copy: the model that trains keeps its float32 weights.
        return copy.deepcopy(model).to(torch.get_autocast_dtype(kind))
    return model


def mix(streams, rows):
    """The unnormalised log of the mixture: each model's logits with its weight.

    streams:
        one a model, with its logits [rows it serves, V], its rows and their weight [rows, 1].
    rows:
        the number of rows, B.

    Returns [B, V]. The constants C are left out: softmax needs none.
    """
    first = streams[0].logits
    # A row that a stream does not serve has weight 0 in it: nothing is added.
    mixed = torch.zeros(rows, first.shape[1], device=first.device, dtype=first.dtype)
    for stream in streams:
        share = stream.weight.to(first.dtype)
        mixed.index_add_(0, stream.rows, share * stream.logits)
    return mixed


def draw(logits, uniform):
    """One token a row by inverting the distribution function: the first with a sum above uniform.

    logits:
        [B, V], the log of the law, a constant aside.
    uniform:
        [B] in [0, 1), float64.

    Returns [B] int64.
    """
    # Summed in float64: float32's rounding over a large vocabulary would move the law.
    cumulative = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    # Times the total, which is 1 but for rounding.
    level = uniform * cumulative[:, -1]
    # right=True: a token of probability 0 is never drawn, not even by uniform = 0.
    token = torch.searchsorted(cumulative, level[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[1] - 1)


def draw_pairs(pair, policy, reference, prompt, beta, uniforms, preference=None):
    """The responses to every prompt, each from the law that the method's PAIR names: Table 1's
    sampling column.

    pair:
        who draws y and who draws y', "policy", "mixture" or "reference"; of groups, K such names.
    prompt:
        Tokens [B, P].
    beta:
        in [0, 1], the weight of the reference in the mixture.
    uniforms:
        [T, K, B] as data.uniforms draws them, K = 2 for pairs; a response is cut at T tokens.
    preference:
        not asked here, but by a procedure that brings its own draw_pairs (losses/rso.py).

    Returns y, y_other: K Tokens with a row a prompt.
    """
    # One run of the sampler for all: the mixture with weight 0 is the policy, with 1 the reference,
    # and prompts are read once.
    share = {"policy": 0.0, "mixture": beta, "reference": 1.0}
    weights = tuple(share[law] for law in pair)
    drawn, most, count = uniforms.flatten(1), len(uniforms), len(prompt.ids)
    ids, mask, _ = sample(policy, reference, prompt, weights, None, most, drawn)
    # All first responses, y, come before all second ones, y'.
    return [
        policies.Tokens(*rows) for rows in zip(ids.split(count), mask.split(count), strict=True)
    ]


@torch.no_grad()
def constant(tokenizer, law):
    """A GPT-2 whose next token follows one law after every prefix, for the worked example."""
    model = policies.build("tiny", tokenizer, context=8, seed=0).double()
    body = model.transformer
    # The last norm forgets its input and says the logits; the head, tied to wte, reads them off.
    body.ln_f.weight.zero_()
    body.ln_f.bias[: len(law)] = torch.tensor(law, dtype=torch.float64).log()
    body.wte.weight.copy_(torch.eye(len(law), body.wte.weight.shape[1]))
    return model


def rounded(law):
    """Probabilities [V] as a list with four digits."""
    return law.round(decimals=4).tolist()


def worked_example():
    """Prints two laws, their mixtures, a token drawn by hand and responses from one randomness."""
    words = ["<end>", "a", "b", "c"]
    tokenizer = policies.word_tokenizer(words[1:])
    policy = constant(tokenizer, (0.1, 0.4, 0.4, 0.1))
    reference = constant(tokenizer, (0.4, 0.1, 0.4, 0.1))
    prompt = policies.pad([[1, 2]], "left", 0)
    betas = (0.0, 0.125, 0.5, 1.0)
    # A row for each beta, and both models on every row: each runs the prompt once.
    rows = torch.arange(len(betas))
    weight = torch.tensor(betas, dtype=torch.float64)
    with torch.no_grad():
        of_policy = Stream(policy, rows, 1 - weight, prompt, max_tokens=1)
        of_reference = Stream(reference, rows, weight, prompt, max_tokens=1)
    laws = torch.softmax(mix([of_policy, of_reference], len(betas)), -1)
    print("The law of the next token, <end>, a, b or c, after the prompt a b:")
    print("  pi                     ", rounded(torch.softmax(of_policy.logits[0], -1)))
    print("  pi_ref                 ", rounded(torch.softmax(of_reference.logits[0], -1)))
    for beta, law in zip(betas, laws, strict=True):
        print(f"  mixture, beta = {beta:<7}", rounded(law))
    print("beta = 0.5 by hand: the square roots of 0.1*0.4, 0.4*0.1, 0.4*0.4 and 0.1*0.1")
    print("are 0.2, 0.2, 0.4 and 0.1; divide by their sum, 0.9.")

    # The law of beta = 0.5, and a number that falls to its second token.
    uniform = torch.tensor([0.3], dtype=torch.float64)
    token = draw(laws[2:3].log(), uniform).item()
    print("A token by hand, beta = 0.5: the sums are", rounded(laws[2].cumsum(0)), end=",\n")
    print(f"and the first above the uniform number 0.3 is that of {words[token]}.")

    # The same for every beta: where two responses differ, the laws do.
    uniforms = torch.tensor([[0.6], [0.3], [0.15], [0.95]], dtype=torch.float64)
    print("Responses from 0.6, 0.3, 0.15, 0.95, a number a token, cut at four tokens:")
    for beta in (0.0, 0.5, 1.0):
        ids, _, finished = sample(policy, reference, prompt, beta, None, 4, uniforms)
        response = " ".join(words[token] for token in ids[0])
        print(f"  beta = {beta}   {response:<12} finished: {finished.item()}")


if __name__ == "__main__":
    worked_example()
