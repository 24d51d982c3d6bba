"""A GPT-2 small enough to enumerate every response: claims about language models, checked exactly.

Four words and end-of-text, at most three tokens: 1 + 4 + 16 finished responses and 64 that were cut
at the limit and have no end-of-text, 85 in all. Two prompts of different length, so that one is
padded; a random intransitive preference over the responses for each. Everything runs in float64,
through the real log_prob, sampler and losses.
A planted bug is another loss: train takes any object with PAIR and loss, for instance
SimpleNamespace(PAIR=ipo.PAIR, loss=my_wrong_loss).
Left out: more prompts, longer responses; 85 grows as 4 to the power of the limit.
Run: python enumerated.py    (the mixture of language models against the theory's)

Shapes: 2 prompts, 85 responses, 106 prefixes of responses, 21 of them inner ones.
"""

import copy
import inspect
import itertools
from functools import partial
from types import SimpleNamespace

import torch
from transformers import GPT2LMHeadModel

import bandit
import policy as policies
import sampler
from ipo_md import mixture
from policy import Tokens

LIMIT, END = 3, 0
WORDS = range(1, 5)
PROMPTS = [[1, 2], [3]]
policies.SIZES["enumerable"] = dict(n_layer=2, n_head=2, n_embd=32)


def every_response():
    """All 85 responses as lists of ids.

    The finished ones by length, then those cut at the limit.
    """
    responses = []
    for length in range(LIMIT):
        for words in itertools.product(WORDS, repeat=length):
            responses.append([*words, END])
    for words in itertools.product(WORDS, repeat=LIMIT):
        responses.append(list(words))
    return responses


RESPONSES = every_response()


def world(seed):
    """A reference model and a game over its responses.

    seed:
        of the model's weights and of the preferences.

    Returns a namespace: reference, the model; batch, (prompt, response) Tokens with a row for each
    prompt and response; log_ref [2, 85], nats; preferences [2, 85, 85] in [0, 1].
    """
    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    config = policies.build("enumerable", tokenizer, 8, seed).config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Plain GPT-2 weights: the start that copies would make some responses too rare to be
        # trained in a test's time.
        reference = GPT2LMHeadModel(config).eval().double().requires_grad_(False)
    prompts = [prompt for prompt in PROMPTS for _ in RESPONSES]
    prompt = policies.pad(prompts, "left", END)
    response = policies.pad(RESPONSES * len(PROMPTS), "right", END)
    generator = torch.Generator().manual_seed(seed)
    games = [bandit.random_game(len(RESPONSES), generator) for _ in PROMPTS]
    preferences = torch.stack([preferences for preferences, _ in games])
    w = SimpleNamespace(reference=reference, batch=(prompt, response), preferences=preferences)
    w.log_ref = log_policy(reference, w)
    return w


def log_policy(model, w):
    """log pi(y | x) of every response to both prompts through log_prob, [2, 85], nats."""
    return policies.log_prob(model, *w.batch).view(len(PROMPTS), -1)


def solve(w, tau, beta=0.0, law=mixture):
    """The solved fixed point for each prompt, [2, 85]. Arguments as bandit.fixed_point."""
    points = []
    for preferences, log_ref in zip(w.preferences, w.log_ref, strict=True):
        points.append(bandit.fixed_point(preferences, log_ref, tau, beta, law))
    return torch.stack(points)


def requested(method, model, w, prompt, response):
    """What a loss asks for of each response (losses/README.md): {"length": [N], "extra": [N]}.

    Empty for most methods. extra is the method's own and has its gradient.
    """
    names, found = inspect.signature(method.loss).parameters, {}
    if "length" in names:
        found["length"] = response.lengths()
    if "extra" in names:
        found["extra"] = method.extra(model, w.reference, prompt, response)
    return found


def exact_loss(model, w, method, tau, beta=0.0, law=mixture):
    """The expected loss over all pairs, mean over the prompts; differentiable in the weights."""
    log_pi = log_policy(model, w)
    asked = {}
    for name, value in requested(method, model, w, *w.batch).items():
        value = value.view(len(PROMPTS), -1)
        # A row for every y, a column for every y', as bandit.expected_loss lays them out.
        asked[name], asked[f"{name}_other"] = value[:, :, None], value[:, None, :]
    if asked:
        method = SimpleNamespace(PAIR=method.PAIR, loss=partial(method.loss, **asked))
    loss = bandit.expected_loss(method, log_pi, w.log_ref, w.preferences, tau, beta, law)
    return loss.mean()


def sampled_loss(model, w, method, tau, beta, count, generator, crossed=False):
    """The loss of pairs from the real sampler, averaged as the trainer does.

    count:
        pairs a prompt.
    generator:
        of the sampler's uniforms.
    crossed:
        each y of a prompt is compared with all its y', count^2 pairs of the same samples. The same
        expectation with less noise: the part that is of a pair, and of neither response alone,
        falls with the number of pairs.
    """
    prompt = policies.pad(PROMPTS * count, "left", END)
    weights = tuple(beta if drawn_by == "mixture" else 0.0 for drawn_by in method.PAIR)
    ids, mask, _ = sampler.sample(model, w.reference, prompt, weights, generator, LIMIT)
    response = Tokens(ids, mask)
    logp = policies.log_prob(model, prompt.repeat(2), response)
    index = torch.tensor([RESPONSES.index(row) for row in response.lists()])
    x = torch.arange(len(index)) % len(PROMPTS)
    asked = requested(method, model, w, prompt.repeat(2), response)
    # The rows of the samples that are a pair's y, those of its y' stand behind all y.
    first = second = torch.arange(len(prompt.ids)).view(count, len(PROMPTS))
    if crossed:
        first, second = first.repeat_interleave(count, 0), second.repeat(count, 1)
    first, second = first.flatten(), second.flatten() + len(prompt.ids)
    ref_logp = w.log_ref[x, index]
    preference = w.preferences[x[first], index[first], index[second]]
    pair = logp[first], logp[second], ref_logp[first], ref_logp[second]
    sides = {}
    for name, value in asked.items():
        sides[name], sides[f"{name}_other"] = value[first], value[second]
    return method.loss(*pair, preference, tau, **sides).mean()


def train(
    w,
    method,
    tau,
    beta=0.0,
    law=mixture,
    steps=600,
    rate=5e-3,
    pairs=None,
    seed=0,
    crossed=False,
):
    """Trains a copy of the reference; yields log pi [2, 85] every 20 steps and at the end.

    Adam without momentum (with it, cyclic games orbit), its rate falling as (1 - step/steps)^3.

    w:
        a world.
    method:
        PAIR and loss.
    tau, beta, law:
        as in bandit.expected_loss; law is the theory's or the per-token mixture, for exact
        training.
    steps, rate:
        optimiser steps and the first of their rates.
    pairs:
        drawn for each prompt and step; None for exact expectations.
    seed:
        of the draws.
    crossed:
        as sampled_loss takes it.
    """
    model = copy.deepcopy(w.reference).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    memory = 0.9 if pairs is None else 0.99  # a noisy gradient's square needs a longer mean
    optimiser = torch.optim.Adam(
        model.parameters(), lr=rate, betas=(0.0, memory), eps=1e-12, fused=True
    )
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps) ** 3
        if pairs is None:
            loss = exact_loss(model, w, method, tau, beta, law)
        else:
            given = method, tau, beta, pairs, generator, crossed
            loss = sampled_loss(model, w, *given)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 19 or step == steps - 1:
            with torch.no_grad():
                yield log_policy(model, w)


def every_prefix():
    """The beginnings of all responses, the empty one and the responses themselves among them."""
    prefixes = set()
    for response in RESPONSES:
        for length in range(len(response) + 1):
            prefixes.add(tuple(response[:length]))
    return sorted(prefixes, key=lambda prefix: (len(prefix), prefix))


def follows(longer, prefix):
    """Whether a prefix is another one and a token more."""
    return len(longer) == len(prefix) + 1 and longer[:-1] == prefix


PREFIXES = every_prefix()
# Inner prefixes are those that go on: a token is drawn after them.
INNER = sorted({prefix[:-1] for prefix in PREFIXES if prefix}, key=PREFIXES.index)


def prefix_tables():
    """Whether a response begins with a prefix [106, 85].

    Whether a prefix follows an inner one [21, 106].
    """
    begins = torch.zeros(len(PREFIXES), len(RESPONSES), dtype=torch.bool)
    for row, prefix in enumerate(PREFIXES):
        for column, response in enumerate(RESPONSES):
            begins[row, column] = tuple(response[: len(prefix)]) == prefix
    child = torch.zeros(len(INNER), len(PREFIXES), dtype=torch.bool)
    for row, prefix in enumerate(INNER):
        for column, longer in enumerate(PREFIXES):
            child[row, column] = follows(longer, prefix)
    return begins, child


BEGINS, CHILD = prefix_tables()
# The place of each prefix's parent among PREFIXES and among INNER; the empty prefix, the first, has
# none.
PARENT = torch.tensor([PREFIXES.index(prefix[:-1]) for prefix in PREFIXES[1:]])
INNER_PARENT = torch.tensor([INNER.index(prefix[:-1]) for prefix in PREFIXES[1:]])


def token_log_law(log_law):
    """log-probability of each prefix's last token given the tokens before, [..., 106]; the empty
    one's is 0.

    log_law:
        [..., 85], a law of whole responses, normalised.
    """
    begins = torch.logsumexp(log_law[..., None, :].masked_fill(~BEGINS, -torch.inf), -1)
    return begins - torch.cat([begins[..., :1], begins[..., PARENT]], -1)


def per_token_mixture(log_pi, log_ref, beta):
    """log of the law that a language model samples: the geometric mixture normalised at every
    token.

    Its normalisers depend on the prefix, so their product is not the sequence-level mixture's
    constant.

    log_pi, log_ref:
        [..., 85], nats.
    beta:
        in [0, 1], the weight of the reference.

    Returns [..., 85].
    """
    mixed = (1 - beta) * token_log_law(log_pi) + beta * token_log_law(log_ref)
    # One normaliser for every inner prefix: the sum over the tokens that may follow it.
    normaliser = torch.logsumexp(mixed[..., None, :].masked_fill(~CHILD, -torch.inf), -1)
    empty = torch.zeros_like(mixed[..., :1])
    mixed = mixed - torch.cat([empty, normaliser[..., INNER_PARENT]], -1)
    return mixed @ BEGINS.double()  # a response's tokens are the last ones of all that begin it


def mixture_table(w, taus=(0.05, 0.1, 0.5), betas=(0.125, 0.25, 0.5, 0.75)):
    """Total variations, prompts averaged.

    Yields rows (tau, beta, laws, points, Nash), see below.
    """
    for tau in taus:
        for beta in betas:
            theory, nash = solve(w, tau, beta), solve(w, tau)
            tokens = solve(w, tau, beta, per_token_mixture)
            sequences = mixture(theory, w.log_ref, beta)
            laws = bandit.total_variation(sequences, per_token_mixture(theory, w.log_ref, beta))
            points = bandit.total_variation(theory, tokens)
            away = bandit.total_variation(theory, nash)
            yield tau, beta, laws.mean().item(), points.mean().item(), away.mean().item()


def worked_example():
    """Prints the table of the two mixtures."""
    print("Total variations, mean over two prompts, 85 responses:")
    print("  laws    per-token mixture against the sequence-level one, of the eq-13 policy")
    print(
        "  points  fixed point shared by IPO-MD and Nash-MD-PG with the per-token mixture, "
        "against eq 13's"
    )
    print("  Nash    eq 13's point against the Nash equilibrium, for scale")
    print("  tau   beta      laws    points      Nash")
    for tau, beta, laws, points, nash in mixture_table(world(0)):
        print(f"{tau:5g}{beta:7g}{laws:10.1e}{points:10.1e}{nash:10.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    worked_example()
