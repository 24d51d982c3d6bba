"""Exercise 8: your sampler.py.

Every name of the reference's sampler.py is at hand here, beside what you import. Your own helpers
may have any name: they stay yours, and change nothing for others. The handout: sample's docstring.
Run: pytest -m ex8
"""

import torch


def mix(streams, rows):
    """The unnormalised log of the mixture: each model's logits with its weight.

    streams:
        one a model, with its logits [rows it serves, V], its rows and their weight [rows, 1].
    rows:
        the number of rows, B.

    Returns [B, V]. The constants C are left out: softmax needs none.
    """
    raise NotImplementedError("Exercise 8: mix the models' logits")


def draw(logits, uniform):
    """One token a row by inverting the distribution function: the first with a sum above uniform.

    logits:
        [B, V], the log of the law, a constant aside.
    uniform:
        [B] in [0, 1), float64.

    Returns [B] int64.
    """
    raise NotImplementedError("Exercise 8: draw one token a row")


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

    Exercise 8: the mixture's sampler. Functions: mix, draw, sample.

    Goal. Sample from pi^(1-beta) pi_ref^beta, as well as a language model can: one token at a time.
    Background. IPO-MD and Nash-MD draw answers from a mixture of the policy and the reference: the
    geometric mean of their probabilities with weights 1 - beta and beta, divided by its sum. On a
    small set of answers that is one line, exercise 3's mixture. A language model cannot sum over
    all answers, so section 5.1 mixes token by token: the logits of the next token, weighted and
    added, and softmax normalises. The product of these steps is not the geometric mixture of whole
    answers (its normalisers depend on the prefix), but it is close, and it can be sampled. Each
    model needs a key-value cache of its own: that part, the class Stream, is given. An answer ends
    with the first end-of-text token, which belongs to it: it was a decision of the policy. An
    answer that reaches max_tokens first was cut: it has no end-of-text token and must not be given
    one. The losses assume temperature 1 and the whole vocabulary, so that is what is drawn.
    Task. mix: the weighted sum of the streams' logits, each stream serving its own rows; draw: one
    token a row from logits (float32 or float64) and a uniform number in float64, also at 0 and just
    below 1; sample: the loop. ids int64; mask and finished bool, or integers 0 and 1. All
    randomness comes from the generator, never seeded anew, a number for every token and row; or
    from uniforms, where they are given. Stream(model, rows, weight, prompt, max_tokens) runs the
    prompts; stream.logits, stream.rows (which of the B rows), stream.weight [rows, 1];
    stream.advance(tokens [B]) goes on.
    Hints. draw: the first token whose cumulative probability exceeds the uniform number;
    torch.searchsorted, and mind tokens of probability 0. With beta = (0, 0.5) all first responses
    come before all second ones: row r has prompt r % N. A model of weight 0 for every row need not
    run. Keep a tensor of rows still running; record the token, then stop the row.
    Tests. mix and draw by hand, and over 50,257 tokens; the frequencies of 4,000 pairs with two
    different beta among the 85 possible answers against the exact laws (chi-square), and how often
    y = y'; two generators; given uniforms token by token; masks, finished and the order of rows.
    Questions. (1) Why is the arithmetic mean of the probabilities another law, and which answers
    does it favour?
    (2) A colleague sets the temperature to 0.7 "for better samples". Which term of the loss is now
    wrong?
    """
    raise NotImplementedError("Exercise 8: write the sampling loop")
