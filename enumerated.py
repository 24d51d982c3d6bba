"""A GPT-2 small enough to enumerate every response, so that the claims about language models can be checked exactly.

Four words and end-of-text, at most three tokens: 1 + 4 + 16 finished responses and 64 that were cut at the limit and have
no end-of-text, 85 in all. Two prompts of different length, so that one is padded; a random intransitive preference over
the responses for each. Everything runs in float64, through the real log_prob, sampler and losses.
A planted bug is another loss: train takes any object with PAIR and loss, for instance
SimpleNamespace(PAIR=ipo.PAIR, loss=my_wrong_loss).
Run: python enumerated.py    (the per-token mixture of language models against the sequence-level one of the theory)
"""

import copy
import itertools
from types import SimpleNamespace

import torch
from transformers import GPT2LMHeadModel

import bandit
import policy as policies
import sampler
from ipo_md import mixture

LIMIT, END = 3, 0
RESPONSES = [
    list(words) + [END]
    for length in range(LIMIT)
    for words in itertools.product(range(1, 5), repeat=length)
]
RESPONSES += [list(words) for words in itertools.product(range(1, 5), repeat=LIMIT)]
PROMPTS = [[1, 2], [3]]
policies.SIZES["enumerable"] = dict(n_layer=2, n_head=2, n_embd=32)


def world(seed):
    """A reference model, the batch of all prompts and responses, log_ref [2, 85] and preferences [2, 85, 85]."""
    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    config = policies.build("enumerable", tokenizer, 8, seed).config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Plain GPT-2 weights: the start that copies would make some responses too rare to be trained in a test's time.
        reference = GPT2LMHeadModel(config).eval().double().requires_grad_(False)
    prompts = [prompt for prompt in PROMPTS for _ in RESPONSES]
    batch = policies.pad(prompts, "left", END), policies.pad(RESPONSES * len(PROMPTS), "right", END)
    generator = torch.Generator().manual_seed(seed)
    preferences = torch.stack([bandit.random_game(len(RESPONSES), generator)[0] for _ in PROMPTS])
    w = SimpleNamespace(reference=reference, batch=batch, preferences=preferences)
    w.log_ref = log_policy(reference, w)
    return w


def log_policy(model, w):
    """log pi(y | x) of every response to both prompts through log_prob, [2, 85]."""
    return policies.log_prob(model, *w.batch).view(len(PROMPTS), -1)


def solve(w, tau, beta=0.0, law=mixture):
    """The solved fixed point for each prompt, [2, 85]."""
    games = zip(w.preferences, w.log_ref, strict=True)
    return torch.stack(
        [bandit.fixed_point(preferences, log_ref, tau, beta, law) for preferences, log_ref in games]
    )


def exact_loss(model, w, method, tau, beta=0.0, law=mixture):
    """The expected loss over all pairs, averaged over the prompts; differentiable in the model's parameters."""
    return bandit.expected_loss(
        method, log_policy(model, w), w.log_ref, w.preferences, tau, beta, law
    ).mean()


def sampled_loss(model, w, method, tau, beta, count, generator):
    """The loss of count pairs a prompt from the real sampler, averaged as the trainer does."""
    ids, mask = policies.pad(PROMPTS * count, "left", END)
    weights = tuple({"policy": 0.0, "mixture": beta}[who] for who in method.PAIR)
    tokens, present, _ = sampler.sample(
        model, w.reference, (ids, mask), weights, generator, max_tokens=LIMIT
    )
    logp = policies.log_prob(model, (ids.repeat(2, 1), mask.repeat(2, 1)), (tokens, present))
    index = torch.tensor(
        [RESPONSES.index(row[keep].tolist()) for row, keep in zip(tokens, present, strict=True)]
    )
    prompt = torch.arange(len(ids)) % len(PROMPTS)
    y, other = index.chunk(2)
    preference = w.preferences[prompt, y, other]
    return method.loss(
        *logp.chunk(2), w.log_ref[prompt, y], w.log_ref[prompt, other], preference, tau
    ).mean()


def train(w, method, tau, beta=0.0, law=mixture, steps=600, rate=5e-3, pairs=None, seed=0):
    """Trains a copy of the reference; yields log pi [2, 85] every 20 steps and at the end. pairs a prompt, or exact.

    Adam without momentum (with it, cyclic games orbit), its rate falling as (1 - step/steps)^3.
    """
    model, generator = (
        copy.deepcopy(w.reference).requires_grad_(True),
        torch.Generator().manual_seed(seed),
    )
    optimiser = torch.optim.Adam(
        model.parameters(),
        lr=rate,
        betas=(0.0, 0.9 if pairs is None else 0.99),
        eps=1e-12,
        fused=True,
    )
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps) ** 3
        if pairs is None:
            loss = exact_loss(model, w, method, tau, beta, law)
        else:
            loss = sampled_loss(model, w, method, tau, beta, pairs, generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 19 or step == steps - 1:
            with torch.no_grad():
                yield log_policy(model, w)


PREFIXES = sorted(
    {tuple(response[:length]) for response in RESPONSES for length in range(len(response) + 1)},
    key=lambda p: (len(p), p),
)
INNER = [
    prefix
    for prefix in PREFIXES
    if any(len(longer) > len(prefix) and longer[: len(prefix)] == prefix for longer in PREFIXES)
]
BEGINS = torch.tensor(
    [[tuple(response[: len(prefix)]) == prefix for response in RESPONSES] for prefix in PREFIXES]
)
CHILD = torch.tensor(
    [
        [len(longer) == len(prefix) + 1 and longer[:-1] == prefix for longer in PREFIXES]
        for prefix in INNER
    ]
)


def per_token_mixture(log_pi, log_ref, beta):
    """log of the law that a language model samples, [..., 85]: the geometric mixture normalised at every token.

    Its normalisers depend on the prefix, so their product is not the sequence-level mixture's constant.
    """

    def steps(
        log_law,
    ):  # log-probability of each prefix's last token given the prefix before it; 0 for the empty prefix
        begins = torch.logsumexp(log_law[..., None, :].masked_fill(~BEGINS, -torch.inf), -1)
        return begins - torch.cat([begins[..., :1], begins[..., PARENT]], -1)

    mixed = (1 - beta) * steps(log_pi) + beta * steps(log_ref)
    normaliser = torch.logsumexp(mixed[..., None, :].masked_fill(~CHILD, -torch.inf), -1)
    mixed = mixed - torch.cat([torch.zeros_like(mixed[..., :1]), normaliser[..., INNER_PARENT]], -1)
    return mixed @ BEGINS.double()


PARENT = torch.tensor([PREFIXES.index(prefix[:-1]) for prefix in PREFIXES[1:]])
INNER_PARENT = torch.tensor([INNER.index(prefix[:-1]) for prefix in PREFIXES[1:]])


def mixture_table(w, taus=(0.05, 0.1, 0.5), betas=(0.125, 0.25, 0.5, 0.75)):
    """Total variations over tau and beta, prompts averaged: rows (tau, beta, laws, points, Nash), see below."""
    for tau in taus:
        for beta in betas:
            theory, tokens = solve(w, tau, beta), solve(w, tau, beta, per_token_mixture)
            laws = bandit.total_variation(
                mixture(theory, w.log_ref, beta), per_token_mixture(theory, w.log_ref, beta)
            )
            nash = bandit.total_variation(theory, solve(w, tau))
            yield (
                tau,
                beta,
                laws.mean().item(),
                bandit.total_variation(theory, tokens).mean().item(),
                nash.mean().item(),
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("Total variations, mean over two prompts, 85 responses:")
    print("  laws    per-token mixture against the sequence-level one, of the eq-13 policy")
    print(
        "  points  fixed point shared by IPO-MD and Nash-MD-PG with the per-token mixture, against eq 13's"
    )
    print("  Nash    eq 13's point against the Nash equilibrium, for scale")
    print("  tau   beta      laws    points      Nash")
    for tau, beta, laws, points, nash in mixture_table(world(0)):
        print(f"{tau:5g}{beta:7g}{laws:10.1e}{points:10.1e}{nash:10.1e}")
