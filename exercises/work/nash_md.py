"""Exercise 7: your nash_md.py.

Every name of the reference's nash_md.py is at hand here, beside what you import. Your own helpers
may have any name: they stay yours, and change nothing for others. The handout: loss's docstring.
Run: pytest -m ex7
"""

import torch  # noqa: F401  for your code

PAIR = None  # Exercise 7: who draws y and y', each "policy" or "mixture"


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    """Score-function loss -SG[p - 1/2 - tau log pi(y)/pi_ref(y)] log pi(y), one value a pair.

    logp:
        [B] log pi(y | x), nats, with gradient.
    logp_other, ref_logp_other:
        not used, may be None.
    ref_logp:
        [B] log pi_ref(y | x), nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1].
    tau:
        above 0, the regularisation strength.

    Returns [B], unreduced: its value means nothing, its gradient is minus the Nash-MD-PG direction.

    Exercise 7: Nash-MD-PG and the KL of whole responses. Functions: policy.token_log_probs,
    policy.log_prob; PAIR and loss here.

    Goal. The policy gradient of Nash-MD with its KL term right, from the log-probability of a whole
    response upwards.
    Background. Nash-MD-PG draws y from the policy and an opponent y' from the mixture of exercise
    3, and climbs grad log pi(y) (p(y > y') - 1/2 - tau log pi(y)/pi_ref(y)). The bracket is a
    number, not a function: it is the return of a sample, and differentiating through it adds a term
    that does not belong. The 1/2 makes a draw worth nothing; it does not change the expectation,
    since E grad log pi = 0. log pi(y | x) is the sum over the tokens of the response, the
    end-of-text token included and the prompt left out. The KL of two laws on responses is the
    expectation of the whole log-ratio; weighting each token's score with its own log-ratio alone
    looks alike and is another gradient, which stops at another policy. A mean over tokens for the
    sum changes the equilibrium wherever lengths differ. Prompts are padded on the left and
    responses on the right, and GPT-2 pads with its end-of-text token, so only masks tell what is
    real.
    Task. token_log_probs: 0 where the response's mask (bool) is False. log_prob: their sum. In the
    model's precision, float64 in the tests; but of a bfloat16 model's logits take the softmax in
    float32. nash_md.PAIR: who draws y and y', each "policy" or "mixture". loss: one value a pair,
    whose gradient is *minus* the direction above.
    Hints. One run of the model over prompt and response; the logits at a place predict the next
    token. positions(mask) counts each row's positions from its first real token: pass it as
    position_ids, with the joint attention mask.
    Tests. Scores of padded rows against each row alone; a bfloat16 model; the 85 responses'
    probabilities sum to 1; the gradient of single samples; and over all 85, in the model's
    parameters, against autograd of p(pi > mixture) - tau KL(pi, pi_ref).
    Questions. (1) Why does the 1/2 matter for a single sample although it does not for the
    expectation?
    (2) Two tokens: write the gradient of KL(pi, pi_ref) and mark the term that the per-token
    version loses.
    """
    raise NotImplementedError("Exercise 7: write the Nash-MD-PG loss")
