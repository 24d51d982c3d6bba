"""The only other sampler there is: slow, obvious, and sharing no code with sampler.py.

At every token both models of transformers read the whole prefix of one response, alone and
therefore without padding, and return the logits of every position. There is no cache, no mask and
no position id to get wrong.
It also holds the tiny models of the tests: random GPT-2s, and GPT-2s whose next-token law is a
known constant.
"""

import math

import torch
from transformers import GPT2Config, GPT2LMHeadModel

END = 0


def gpt2(seed, vocabulary=5, positions=24, spread=0.4, layers=2, dropout=0.0):
    """A random GPT-2 of width 16 in float64.

    spread: initializer_range, large enough that contexts and models differ.
    """
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=16,
        n_layer=layers,
        n_head=2,
        initializer_range=spread,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval().double()


@torch.no_grad()
def constant_gpt2(log_law):
    """A GPT-2 that follows one law at every position.

    The last norm ignores its input, and the head reads its bias.
    """
    model = gpt2(0, vocabulary=len(log_law))
    model.transformer.wte.weight.copy_(torch.eye(len(log_law), 16))
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.zero_()
    model.transformer.ln_f.bias[: len(log_law)] = torch.as_tensor(log_law, dtype=torch.float64)
    return model


@torch.no_grad()
def next_law(policy, reference, prefix, beta):
    """log of the mixture's law of the next token after a list of ids, [V], normalised."""
    ids = torch.tensor([prefix])
    log_pi = torch.log_softmax(policy(ids).logits[0, -1].double(), 0)
    log_ref = torch.log_softmax(reference(ids).logits[0, -1].double(), 0)
    return torch.log_softmax((1 - beta) * log_pi + beta * log_ref, 0)


def uncached_sample(policy, reference, prompts, beta, generator, max_tokens):
    """Responses to prompts (lists of ids) for each weight of beta, and the log-law at every step.

    Responses are lists of ids. Reads the same uniforms as sampler.sample: one for each token
    position and row, all first responses before all second.
    """
    betas = beta if isinstance(beta, tuple) else (beta,)
    rows = [(prompt, weight) for weight in betas for prompt in prompts]
    uniforms = torch.rand(max_tokens, len(rows), generator=generator, dtype=torch.float64)
    responses, laws = [], []
    for row, (prompt, weight) in enumerate(rows):
        response, law = [], []
        while len(response) < max_tokens and END not in response:
            law.append(next_law(policy, reference, prompt + response, weight))
            response.append(int((law[-1].exp().cumsum(0) <= uniforms[len(response), row]).sum()))
        responses.append(response)
        laws.append(law)
    return responses, laws


def every_response(policy, reference, prompt, beta, limit):
    """Response (tuple of ids) -> exact probability under the per-token mixture.

    All finished ones and all cut at limit.
    """
    table, open_ = {}, {(): 0.0}
    for step in range(limit):
        following = {}
        for prefix, log_prefix in open_.items():
            law = next_law(policy, reference, prompt + list(prefix), beta)
            for token, log_next in enumerate(law.tolist()):
                where = table if token == END or step == limit - 1 else following
                where[(*prefix, token)] = log_prefix + log_next
        open_ = following
    return {response: math.exp(value) for response, value in table.items()}
