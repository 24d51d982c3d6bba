"""Exercises 1, 3, 4 and 5: your bandit.py.

Every name of the reference's bandit.py is at hand here, beside what you import. Your own helpers
may have any name: they stay yours, and change nothing for others. The handouts: exercise 1 in
win_rate's docstring; exercise 3 in fixed_point's; exercise 4 in expected_loss's; exercise 5 in
loss's docstring of dpo.py. All tensors are float64.
Run: pytest -m ex1
"""

import torch  # noqa: F401  for your code

from ipo_md import mixture

# Exercise 1: preference matrix, win rate, antisymmetry


def cycle(margin):
    """Rock-paper-scissors: each of three actions beats the next with probability 1/2 + margin.

    margin:
        in [-1/2, 1/2]; below 0 the cycle runs the other way.

    Returns [3, 3].
    """
    raise NotImplementedError("Exercise 1: write the cycle's preference matrix")


def bradley_terry(rewards):
    """p(i > j) = sigmoid(r_i - r_j) from rewards [n] in nats. Returns [n, n]."""
    raise NotImplementedError("Exercise 1: write the Bradley-Terry preferences")


def win_rate(preferences, log_opponent):
    """p(y > opponent) = sum_y' opponent(y') p(y > y') for every action y, [..., n].

    Exercise 1: the preference matrix, the win rate, antisymmetry. Functions: cycle, bradley_terry,
    win_rate.

    Goal. Write down who beats whom, and how often one answer beats a policy: the quantity that
    every method here learns from.
    Background. A preference is a probability p(y > y') that a judge prefers answer y to answer y'.
    One of the two wins, so p(y > y') + p(y' > y) = 1, and p(y > y) = 1/2: as a matrix, preferences
    + preferences^T = 1 in every entry. Nothing asks for a ranking: in rock-paper-scissors every
    action beats one and loses to one, and no score explains it. The Bradley-Terry model is the
    special case that has scores: p(i > j) = exp(r_i)/(exp(r_i) + exp(r_j)), where r is the reward
    that RLHF learns. Online preference optimisation does without rewards and asks for p(y > pi),
    the probability that y beats an answer drawn from the policy pi: the expectation of p(y > y')
    over y' ~ pi. Policies come as log-probabilities, since that is what language models give. Here
    an answer is an action with a number, and every expectation is an exact sum.
    Task. cycle(margin): action 0 beats 1, 1 beats 2, 2 beats 0, each with probability 1/2 + margin,
    for any margin; in float64 (float32 passes). bradley_terry(rewards). win_rate(preferences,
    log_opponent), which must also work for stacks of opponents [k, n] and [a, b, n]. Make new
    tensors: an argument is the caller's, and torch's default dtype is everybody's.
    Hints. rewards[:, None] - rewards[None] holds all differences. torch.sigmoid is the
    Bradley-Terry formula. A matrix times a stack of vectors: (matrix @ vectors[..., None])[..., 0].
    Rows are the answers judged, columns the opponents.
    Tests. The two matrices by hand; the win rate against a plain loop, for one opponent, [2, n] and
    [2, 3, n]; nobody beats himself: E_{y ~ pi} p(y > pi) = 1/2 for every pi.
    Questions. (1) Why is p(pi > pi) = 1/2 for every policy and every game? Use only p(y > y') +
    p(y' > y) = 1.
    (2) Show that no rewards r explain rock-paper-scissors with margin 0.4. What would the best fit
    be, by symmetry?
    """
    raise NotImplementedError("Exercise 1: write p(y > opponent)")


# Exercise 3: regularised Nash equilibrium, duality gap (the mixture: ipo_md.py)


def kl(log_pi, log_other):
    """KL(pi, other) in nats, [...]."""
    raise NotImplementedError("Exercise 3: write KL(pi, other)")


def respond(preferences, log_ref, tau, log_opponent):
    """log of pi_ref(y) exp(p(y > opponent)/tau)/Z, the regularised best response, [..., n].

    log_opponent:
        [..., n]. The policy itself: eq 12; its mixture with the reference: eq 13; the law of the
        data: offline IPO's policy.
    """
    raise NotImplementedError("Exercise 3: write the best response")


def duality_gap(log_pi, preferences, log_ref, tau):
    """2 max_pi' [p(pi' > pi) - tau KL(pi', pi_ref) + tau KL(pi, pi_ref)] - 1, [...].

    At least 0, and 0 only at the Nash equilibrium.
    """
    raise NotImplementedError("Exercise 3: write the duality gap")


def fixed_point(preferences, log_ref, tau, beta=0.0, mixture=mixture, tolerance=1e-11):
    """log pi with pi = pi_ref exp(p(. > mixture of pi and pi_ref)/tau)/Z, [n] (eq 13).

    Newton's method on log pi, following the solution from tau >= 1 down to the wanted one. Plain
    iteration of the equation diverges on cycles at small tau. Here the Jacobian is never singular
    at a solution, because the preferences minus 1/2 are antisymmetric: d(mixture) . d(log pi) = 0
    on its null space.

    beta:
        in [0, 1]; 0 gives the Nash equilibrium (eq 12).
    mixture:
        (log_pi, log_ref, beta) -> the opponent's log law [n].
    tolerance:
        the largest residual max |log pi - respond| to accept, nats.

    Raises ValueError rather than return a larger residual.

    Exercise 3: the geometric mixture, the regularised Nash equilibrium and the duality gap.
    Functions: ipo_md.mixture; kl, respond, duality_gap, fixed_point here.

    Goal. Compute the policy at which online IPO and self-play stop (Prop 4.1), and a number that
    says how far one is from it.
    Background. Two players choose policies; the first is paid p(pi_1 > pi_2) - tau KL(pi_1, pi_ref)
    + tau KL(pi_2, pi_ref), the second 1 minus that: winning counts, and leaving the reference
    costs. The best response to a fixed opponent has a closed form, pi_ref(y) exp(p(y >
    opponent)/tau)/Z. A policy that is its own best response is the symmetric Nash equilibrium (eq
    12); it is unique. The duality gap of pi is what both players together could gain by leaving pi:
    2 max_pi' payoff(pi', pi) - 1. It is never negative, and zero only at the equilibrium, so it
    judges any method without knowing the answer. With the best response put in, the maximum is tau
    log sum_y pi_ref(y) exp(p(y > pi)/tau) plus tau KL(pi, pi_ref). Repeating "respond to yourself"
    looks like a solver, but on a cycle with small tau it jumps to and fro for ever. Eq 13 is the
    same equation with the opponent pulled towards pi_ref: the geometric mixture pi^(1-beta)
    pi_ref^beta / Z. It averages logarithms, not probabilities.
    Task. ipo_md.mixture and the other three for stacks [..., n], then fixed_point for one game: by
    any method whose answer satisfies its equation to about 1e-9 for tau >= 0.1, with whatever law
    is passed as mixture, and with ValueError where none does. All in float64.
    Hints. Work on log-probabilities: log_softmax is the division by Z. newton(field, log_pi) is at
    hand, it finds a zero of any function of log_pi; begin at tau = 1 and lower tau in steps. Or
    damp: a small step from log_pi towards log respond, many times (tau^2/(tau^2 + 1/4) of the way
    settles in any game). win_rate of exercise 1 is at hand.
    Tests. The mixture, kl and respond by hand, also for stacks [2, n] and [2, 3, n]; the gap
    against a maximum found by ascent; the equilibrium against its own equation, the closed form of
    two actions and the limit of a large tau; eq 13 for two beta, and Prop 5.2 with it; another law
    in the mixture's place, and one for which no policy solves eq 13: ValueError.
    Questions. (1) Why is the gap never negative? (2) With two actions the equilibrium is
    log(pi1/pi2) = log(ref1/ref2) + (p - 1/2)/tau. Why does the opponent not appear, and why are two
    actions therefore a poor test of your code?
    """
    raise NotImplementedError("Exercise 3: solve eq 12 and eq 13")


# Exercise 4: IPO-MD


def expected_loss(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=mixture):
    """The expectation over all n x n pairs of a method's loss, [...]; differentiable in log_pi.

    method:
        a module whose PAIR says who draws y and y', and whose loss costs a pair.
    log_pi:
        [..., n], with gradient.
    preferences:
        [n, n]; rl wants reward gaps r(y) - r(y') in their place.
    mixture:
        (log_pi, log_ref, beta) -> [..., n], to put another law in the mixture's place.

    Exercise 4: IPO-MD. Functions: ipo_md.PAIR, ipo_md.loss, and expected_loss here.

    Goal. IPO-MD, and with it the paper's table of methods: they differ in who draws the pair, and
    in the loss.
    Background. Online IPO draws both answers from the policy. IPO-MD draws both from the mixture
    pi^(1-beta) pi_ref^beta: beta = 0 is online IPO, beta = 1 is offline IPO on data from pi_ref,
    and in between it stops where Nash-MD-PG stops, at eq 13's policy. The mixture depends on the
    parameters, yet no gradient flows through it: SG[.] in the paper. Drawing is an act, not a
    function of the parameters. The gradients of IPO-MD and Nash-MD-PG differ although their fixed
    points agree (Prop 5.1): IPO-MD is off-policy. One cannot put Nash-MD's one-sided loss on
    samples of the mixture: the mean of grad log pi under the mixture is not zero, which adds a term
    and moves the fixed point; the pair form cancels it. expected_loss is the lab's way to train:
    all n x n pairs, each weighted with the probability that a method draws it, read from
    method.PAIR. In a trainer the same losses are averaged over pairs that were really drawn.
    Task. ipo_md.PAIR; ipo_md.loss: think before you write much; expected_loss for any method and
    any law called mixture, for stacks of policies [..., n], also with a game [n, n] for each of a
    stack, and for labels that are reward gaps, any numbers. All in float64.
    Hints. log_pi[..., :, None] and log_pi[..., None, :] are y and y'. The weight of a pair is the
    product of its two laws. mixture(log_pi, log_ref, beta) of exercise 3 is at hand, and ipo.loss
    of exercise 2: given [n, 1] and [1, n] instead of [B] it must broadcast.
    Tests. The gradient against a double sum by hand; beta = 0 and beta = 1; descent ends at eq 13's
    point; Nash-MD-PG's loss through the same function; another law for the mixture; reward gaps;
    stacks [2, n] and [2, 3, n] of policies, [2, n, n] of games.
    Questions. (1) Why do IPO-MD and Nash-MD-PG agree on the fixed point though not on the gradient?
    (2) Which temperature's Nash equilibrium is the mixture of eq 13's policy (Prop 5.2), and what
    happens as beta goes to 1?
    """
    raise NotImplementedError("Exercise 4: weight every pair")


# Exercise 5: online DPO is not a Nash solver


def dpo_point(preferences, log_ref, tau):
    """Online DPO's point: sum_y' pi(y') (p(y > y') - sigmoid(tau h(y, y'))) = 0 for every y.

    By hand and not by dpo.loss. Returns [n], or None where no finite point is found.
    """
    raise NotImplementedError("Exercise 5: find where online DPO stops")
