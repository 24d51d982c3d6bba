"""The lab: preference games small enough to solve, and the paper's methods run on them exactly.

Implements the regularised Nash equilibrium (Prop 4.1, eq 12), the fixed point of IPO-MD and
Nash-MD-PG (eq 13), offline IPO's and the RLHF policy, the duality gap, tabular Nash-MD (NLHF, arXiv
2312.00886, section 5) and Figure 6's pictures. Gradients go through the very losses that train.py
uses: they return one value a pair. The lab weights each by the pair's detached probability, the
trainer averages the pairs it drew.
Left out: prompts and models (enumerated.py), the paper's claims one by one (claims.py).
Run: python bandit.py                       the table of games and methods; two pictures in results/
     python bandit.py --preferences FILE    your own game: a square matrix, a .csv, .json or .npy

Names, all float64:
    preferences     [n, n], preferences[i, j] = p(i > j), so preferences + preferences^T = 1
    log_pi, log_ref [..., n], log-probabilities of the n actions, nats
    tau             above 0, the regularisation strength
    beta            in [0, 1], the reference's weight in the mixture
    method          a module such as ipo: PAIR says who draws y and y', loss what a pair costs
"""

import stopping  # noqa: F401  first of all: Ctrl-C while torch is imported is one line

# isort: split

import argparse
import inspect
import json
import math
import os
import time

import numpy
import torch

import dpo
import ipo
import ipo_md
import nash_md
import rl
import slic
from ipo_md import mixture

# Games


def cycle(margin):
    """Rock-paper-scissors: each of three actions beats the next with probability 1/2 + margin.

    margin:
        in [-1/2, 1/2]; below 0 the cycle runs the other way.

    Returns [3, 3].
    """
    next_action = torch.eye(3, dtype=torch.float64).roll(1, 1)
    # The transpose makes it antisymmetric: what one action wins, the other loses.
    return 0.5 + margin * (next_action - next_action.T)


def bradley_terry(rewards):
    """p(i > j) = sigmoid(r_i - r_j) from rewards [n] in nats. Returns [n, n]."""
    return torch.sigmoid(rewards[:, None] - rewards[None])


def random_game(count, generator):
    """Uniform preferences with some cycle a > b > c > a, and a reference that is not uniform.

    count:
        at least 1, the number of actions; below 3 there can be no cycle.
    generator:
        a torch.Generator: first the preferences are drawn, again until they cycle, then log_ref.

    Returns preferences [count, count] and log_ref [count].
    """
    while True:
        # Above the diagonal alone: the lower half follows, p(j > i) = 1 - p(i > j).
        uniform = torch.rand(count, count, generator=generator, dtype=torch.float64)
        above = (uniform - 0.5).triu(1)
        beats = (above - above.T > 0).double()
        # A closed walk of three wins. Transitive games hide which opponent a method plays.
        has_cycle = (beats @ beats @ beats).diagonal().any()
        if count < 3 or has_cycle:
            break
    log_ref = torch.randn(count, generator=generator, dtype=torch.float64).log_softmax(0)
    return 0.5 + above - above.T, log_ref


def games(seed):
    """The table's five games: name -> (preferences, log_ref)."""
    generator = torch.Generator().manual_seed(seed)
    # The order of the draws fixes the games: the rewards, five actions, its reference, a hundred.
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    intransitive = random_game(5, generator)
    _, transitive_ref = random_game(5, generator)  # its preferences come from the rewards
    large = random_game(100, generator)
    biased_ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    two_ref = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    return {
        "cyclic game, biased reference": (cycle(0.4), biased_ref),
        "random intransitive game": intransitive,
        "Bradley-Terry game": (bradley_terry(rewards), transitive_ref),
        "two-action game": (cycle(0.2)[:2, :2], two_ref),
        "large random game": large,
    }


# Equilibria


def win_rate(preferences, log_opponent):
    """p(y > opponent) = sum_y' opponent(y') p(y > y') for every action y, [..., n]."""
    return (preferences @ log_opponent.exp()[..., None])[..., 0]


def respond(preferences, log_ref, tau, log_opponent):
    """log of pi_ref(y) exp(p(y > opponent)/tau)/Z, the regularised best response, [..., n].

    log_opponent:
        [..., n]. The policy itself: eq 12; its mixture with the reference: eq 13; the law of the
        data: offline IPO's policy.
    """
    return torch.log_softmax(log_ref + win_rate(preferences, log_opponent) / tau, -1)


def newton(field, log_pi, tolerance=1e-11, steps=60):
    """A zero of a vector field by Newton's method, halving a step until it helps.

    field:
        a differentiable function of log_pi, [n] -> [n].
    log_pi:
        [n], where to start.
    tolerance:
        above 0, the largest component of the field that counts as zero.

    Returns log_pi [n], or None if it finds no zero within so many steps.
    """
    value = field(log_pi)
    for _ in range(steps):
        size = value.abs().max()
        if size < tolerance:
            return log_pi
        # solve_ex raises nothing: a singular Jacobian gives NaN, and the halving below gives up.
        direction, _ = torch.linalg.solve_ex(torch.func.jacrev(field)(log_pi), value)
        for halving in range(14):
            # Renormalised: Newton's step need not keep the probabilities' sum at 1.
            candidate = torch.log_softmax(log_pi - direction / 2**halving, -1)
            value = field(candidate)
            if value.abs().max() < size:
                break
        else:
            return None  # also where the field is NaN: no comparison holds
        log_pi = candidate
    return None


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
    """

    def residual(log_pi):
        opponent = mixture(log_pi, log_ref, beta)
        return log_pi - respond(preferences, log_ref, tau_now, opponent)

    # At tau of 1 or more the response moves little with the opponent: the reference is near enough.
    tau_now = max(tau, 1.0)
    guess = log_ref
    shrink = 0.5
    tau_solved = None
    solution = None
    while True:
        log_pi = newton(residual, guess, tolerance)
        if log_pi is not None:
            if tau_now == tau:
                return log_pi
            tau_solved = tau_now
            solution = log_pi
        else:
            # Too long a step in tau: try one of half the length (in the logarithm).
            shrink = math.sqrt(shrink)
            if solution is None or shrink > 0.995:
                raise ValueError(
                    f"tau = {tau:g}: no equilibrium found to a residual of {tolerance:g}; "
                    "use a larger tau"
                )
        tau_now = max(tau, tau_solved * shrink)
        # The payoffs p(y > pi) = tau log pi/pi_ref + const change little with tau; the log-ratios
        # are their 1/tau-fold.
        guess = torch.log_softmax(log_ref + (solution - log_ref) * tau_solved / tau_now, -1)


def kl(log_pi, log_other):
    """KL(pi, other) in nats, [...]."""
    return (log_pi.exp() * (log_pi - log_other)).sum(-1)


def total_variation(log_pi, log_other):
    """Half the L1 distance of two laws, [...], in [0, 1]."""
    return (log_pi.exp() - log_other.exp()).abs().sum(-1) / 2


def duality_gap(log_pi, preferences, log_ref, tau):
    """2 max_pi' [p(pi' > pi) - tau KL(pi', pi_ref) + tau KL(pi, pi_ref)] - 1, [...].

    At least 0, and 0 only at the Nash equilibrium.
    """
    # The maximum over pi' in closed form: it is attained at respond(preferences, ..., log_pi).
    best = tau * torch.logsumexp(log_ref + win_rate(preferences, log_pi) / tau, -1)
    return 2 * (best + tau * kl(log_pi, log_ref)) - 1


def fit_reward(preferences, log_data):
    """The Bradley-Terry reward of least cross-entropy on pairs drawn from the data: RL's model.

    Exact on a Bradley-Terry game; elsewhere the nearest transitive account of the game, which
    depends on the data.

    log_data:
        [n], the law that both responses of a pair are drawn from.

    Returns [n], nats, sum 0.
    """
    # No finite reward explains a certain preference.
    wins = preferences.clamp(1e-6, 1 - 1e-6)

    def slope(rewards):
        # Of the cross-entropy, divided by the law of y: the same zero, well scaled where y is rare.
        # Rewards are free up to a constant; the sum settles it.
        return (bradley_terry(rewards) - wins) @ log_data.exp() + rewards.sum()

    rewards = torch.zeros_like(log_data)
    for _ in range(100):
        step = torch.linalg.solve(torch.func.jacrev(slope)(rewards), slope(rewards))
        # Newton on a convex function, but at most 1 nat a step: a whole one may overshoot.
        rewards = rewards - step / step.abs().max().clamp(min=1)
    return rewards


def rlhf_policy(rewards, log_ref, tau):
    """log of pi_ref exp(r/tau)/Z, [n]: the maximiser of E r - tau KL(pi, pi_ref)."""
    return torch.log_softmax(log_ref + rewards / tau, -1)


def dpo_point(preferences, log_ref, tau):
    """Online DPO's point: sum_y' pi(y') (p(y > y') - sigmoid(tau h(y, y'))) = 0 for every y.

    By hand and not by dpo.loss. Returns [n], or None where no finite point is found.
    """

    def slope(log_pi):
        returns = tau * (log_pi - log_ref)
        pull = ((preferences - bradley_terry(returns)) * log_pi.exp()).sum(-1)
        # pi-weighted the pulls vanish for every pi, so one equation is free: it fixes the
        # normalisation, logsumexp(log_pi) = 0.
        return pull + torch.logsumexp(log_pi, -1)

    # Under Bradley-Terry the RLHF policy is the point itself (F.7), elsewhere a second try.
    near = rlhf_policy(fit_reward(preferences, log_ref), log_ref, tau)
    for start in (log_ref, near):
        point = newton(slope, start)
        if point is not None:
            return point
    return None


# Methods


def one_token(loss):
    """What a loss that asks for lengths is given in the lab: an action is a response of one token.

    Returns {"length": 1, "length_other": 1}, those of them that are keywords without a default.
    """
    lengths = {}
    for name, parameter in inspect.signature(loss).parameters.items():
        if name in ("length", "length_other") and parameter.default is parameter.empty:
            lengths[name] = torch.ones(())
    return lengths


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
    """
    laws = {"policy": log_pi, "mixture": mixture(log_pi, log_ref, beta)}
    # Detached: no gradient flows through the sampling.
    first = laws[method.PAIR[0]].detach()
    second = laws[method.PAIR[1]].detach()
    # A row for every y, a column for every y': [..., n, 1] against [..., 1, n].
    pairs = method.loss(
        log_pi[..., :, None],
        log_pi[..., None, :],
        log_ref[..., :, None],
        log_ref[..., None, :],
        preferences,
        tau,
        **one_token(method.loss),
    )
    weight = (first[..., :, None] + second[..., None, :]).exp()
    return (weight * pairs).sum((-2, -1))


def gradient(method, log_pi, *game):
    """The exact expected gradient of a method on the logits of a softmax policy.

    log_pi:
        [..., n]; policies of a stack are independent of each other.
    game:
        log_ref, preferences, tau and so on, as expected_loss takes them.

    Returns [..., n].
    """
    # Log-probabilities are logits, too. A leaf of its own: the caller's graph is left alone.
    logits = log_pi.detach().requires_grad_()
    value = expected_loss(method, torch.log_softmax(logits, -1), *game)
    # The sum over a stack: no policy's loss depends on another's logits.
    return torch.autograd.grad(value.sum(), logits)[0]


def descend(
    method,
    preferences,
    log_ref,
    tau,
    beta=0.0,
    mixture=mixture,
    rate=0.5,
    steps=20000,
    start=None,
    natural=True,
    decay=None,
):
    """Follows a method's exact gradient until a step moves no logit by 1e-12.

    No momentum: claims.py shows why.

    method, mixture:
        as for expected_loss.
    rate:
        above 0, the step in units in which every method moves a logit by the rate times its
        advantage p(y > opponent) - 1/2 - tau log pi/pi_ref.
    steps:
        at most so many.
    start:
        [..., n], the first policy; None: log_ref.
    natural:
        divides the gradient by the law of y, a mirror-descent step. Plain descent on the logits
        has the same zeros but crawls along rarely drawn actions.
    decay:
        in steps: the rate falls as 1/(1 + step/decay); None: it stays.

    Returns the path [at most steps + 1, ..., n] of log_pi.
    """
    # Rates of different losses are not comparable: Prop 4.2's constant is 4/tau for the squared
    # loss, 1 for a score function. Each method's file knows its own.
    unit = 1 / method.gradient_scale(tau)
    path = [log_ref if start is None else start]
    for step in range(steps):
        log_pi = path[-1]
        move = gradient(method, log_pi, log_ref, preferences, tau, beta, mixture) * unit * rate
        if decay is not None:
            move = move / (1 + step / decay)
        if natural:
            # Whoever draws y: its gradient is the score weighted by that law.
            law = log_pi if method.PAIR[0] == "policy" else mixture(log_pi, log_ref, beta)
            # Where the law underflows the gradient is 0, too.
            move = move / law.exp().clamp(min=1e-300)
        path.append(torch.log_softmax(log_pi - move, -1))
        # Without its mean: a constant on all logits moves no probability.
        if (move - move.mean(-1, keepdim=True)).abs().max() < 1e-12:
            break
    return torch.stack(path)


def nash_md_path(preferences, log_ref, tau, steps, eta=None):
    """Tabular Nash-MD: m = pi^(1 - eta tau) pi_ref^(eta tau), pi_next = m exp(eta p(. > m))/Z.

    NLHF, section 5. It starts at the reference.

    eta:
        the step, above 0. None: Theorem 1's 2/(tau (t + 2)), which leads to Nash. A constant leads
        to the eq-13 point of beta = eta tau, if anywhere.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    for step in range(steps):
        size = 2 / (tau * (step + 2)) if eta is None else eta
        # The mixture is both the opponent and the point that the step starts from.
        opponent = mixture(path[-1], log_ref, size * tau)
        path.append(torch.log_softmax(opponent + size * win_rate(preferences, opponent), -1))
    return torch.stack(path)


# The table


def plan_methods(preferences, log_ref, tau, beta, nash, rewards):
    """The table's descents, one a line: (name, method, beta, the predicted log_pi or None)."""
    shifted = fixed_point(preferences, log_ref, tau, beta)
    # SLiC's slope does not shrink before the kink |h| = 1/tau: two actions stop there, more may
    # circle from kink to kink.
    kink = None
    if len(log_ref) == 2:
        kink = torch.log_softmax(log_ref + (preferences[:, 1] - 0.5).sign() / tau, -1)
    return (
        ("online IPO", ipo, 0.0, nash),
        (f"IPO-MD {beta:g}", ipo_md, beta, shifted),
        (f"Nash-MD-PG {beta:g}", nash_md, beta, shifted),
        ("self-play", nash_md, 0.0, nash),
        ("online DPO", dpo, 0.0, dpo_point(preferences, log_ref, tau)),
        ("online SLiC", slic, 0.0, kink),
        ("RL", rl, 0.0, rlhf_policy(rewards, log_ref, tau)),
        # mu = pi_ref: the data come from the supervised policy, which makes offline IPO the same
        # as IPO-MD at beta = 1.
        ("offline IPO", ipo_md, 1.0, respond(preferences, log_ref, tau, log_ref)),
    )


def run_methods(preferences, log_ref, tau, beta):
    """Every method on one game, one after another.

    Yields (name, predicted log_pi or None, path of log_pi, seconds).
    """
    nash = fixed_point(preferences, log_ref, tau)
    rewards = fit_reward(preferences, log_ref)
    # How fast the field turns around Nash: the norm of the antisymmetric part, weighted by pi.
    root = (nash / 2).exp()
    turn = torch.linalg.matrix_norm(root[:, None] * (preferences - 0.5) * root, 2)
    plans = plan_methods(preferences, log_ref, tau, beta, nash, rewards)
    for name, method, weight, predicted in plans:
        start = time.perf_counter()
        labels = preferences
        if method.LABEL == "reward":
            labels = rewards[:, None] - rewards[None]
        # How fast it pulls towards the reference: DPO's is sigmoid'(0) = 1/4 of the others'.
        pull = tau / 4 if method is dpo else tau
        # Makes |1 - rate (pull + i turn)|, the error's factor a step, smallest.
        rate = pull / (pull**2 + turn**2)
        steps, decay = 20000, None
        if method is slic:
            steps, decay = 3000, 200  # past a kink only a falling rate comes to rest
        path = descend(method, labels, log_ref, tau, weight, rate=rate, steps=steps, decay=decay)
        yield name, predicted, path, time.perf_counter() - start
    start = time.perf_counter()
    path = nash_md_path(preferences, log_ref, tau, 5000)
    yield "tabular Nash-MD", nash, path, time.perf_counter() - start


def print_game(name, preferences, log_ref, tau, beta, policies=False):
    """Runs every method on one game and prints a row each.

    policies:
        whether to print what each method ended at, too.

    Returns method -> path of log_pi [steps + 1, n].
    """
    nash = fixed_point(preferences, log_ref, tau)
    print(f"\n{name} ({len(log_ref)} actions), tau = {tau:g}, beta = {beta:g}")
    print(
        f"{'method':<18}{'TV to its own':>14}{'TV to Nash':>12}"
        f"{'duality gap':>13}{'steps':>8}{'seconds':>9}"
    )
    paths = {}
    for method, predicted, path, seconds in run_methods(preferences, log_ref, tau, beta):
        end = path[-1]
        own = "-" if predicted is None else f"{total_variation(end, predicted):.1e}"
        # Rounding may leave -1e-16.
        gap = duality_gap(end, preferences, log_ref, tau).clamp(min=0)
        print(
            f"{method:<18}{own:>14}{total_variation(end, nash):>12.1e}"
            f"{gap:>13.1e}{len(path) - 1:>8}{seconds:>9.2f}",
            flush=True,
        )
        paths[method] = path
    if policies:
        print("policy")
        points = {"reference": log_ref[None], "Nash equilibrium": nash[None]}
        for method, path in (points | paths).items():
            print(f"{method:<18}", " ".join(f"{p:.6f}" for p in path[-1].exp().tolist()))
    return paths


# Pictures

# A line and a marker a method: without colour, and where paths coincide, they must stay apart.
LINES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (1, 4)),
    (0, (6, 2, 1, 2, 1, 2)),
    (0, (8, 3)),
    (0, (3, 1, 1, 1)),
    (0, (2, 1)),
)
MARKERS = "osD^vXP*d"


def plot_gaps(preferences, log_ref, tau, paths, title, folder):
    """Writes duality_gap.png: every path's duality gap over its steps, both scales logarithmic.

    paths:
        method -> log_pi [steps + 1, n], at most nine, as print_game returns them.
    """
    from matplotlib.figure import Figure  # here: the solvers need no matplotlib

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axis = figure.subplots()
    for index, (method, path) in enumerate(paths.items()):
        gap = duality_gap(path, preferences, log_ref, tau).clamp(min=1e-15)  # below is rounding
        # Evenly spaced on the logarithmic axis, and shifted for each method: lines coincide.
        marked = {min(int(1.9 ** (k + index / 9)), len(gap) - 1) for k in range(16)}
        axis.loglog(
            range(1, len(gap) + 1),
            gap,
            ls=LINES[index],
            marker=MARKERS[index],
            markevery=sorted(marked),
            markersize=6,
            label=method,
        )
    axis.set(
        xlabel="step + 1 (exact gradients)",
        ylabel="duality gap (preference probability)",
        title=f"{title}, tau = {tau:g}",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(os.path.join(folder, "duality_gap.png"), dpi=130)


def plot_paths(axis, paths, nash, point):
    """One triangle: three paths [steps + 1, 3, 3] of probabilities, Nash and the fixed point."""
    # Barycentric coordinates: a law's place is the mean of the corners that it weights.
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    axis.fill(*corners.T, fill=False, edgecolor="grey")
    for path, line in zip((paths @ corners).unbind(1), ("-", "--", ":"), strict=True):
        axis.plot(*path.T, line, linewidth=1.3)
        axis.plot(*path[0], "ko", markersize=4)
    # A hollow star, and the cross on top: where the two coincide both are seen.
    star = dict(markersize=13, markerfacecolor="none", label="Nash equilibrium")
    axis.plot(*(nash @ corners), "k*", **star)
    axis.plot(*(point @ corners), "kx", label="the method's fixed point")
    for action, corner in enumerate(corners, 1):
        side = "bottom" if action == 3 else "top"
        axis.annotate(f"action {action}", corner, ha="center", va=side, fontsize=8)
    axis.set_aspect("equal")
    axis.axis("off")


def plot_simplex(preferences, log_ref, tau, title, folder):
    """Writes fig6.png, Figure 6's form: gradient descent on the logits of a three-action game."""
    from matplotlib.figure import Figure

    data = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()

    def data_law(log_pi, log_ref, beta):
        return data  # whatever the policy is: this makes IPO-MD offline IPO

    panels = (
        ("offline IPO, data (0.6, 0.3, 0.1)", ipo_md, 1.0, data_law),
        ("online IPO", ipo, 0.0, mixture),
        ("IPO-MD, beta = 0.25", ipo_md, 0.25, mixture),
        ("IPO-MD, beta = 0.75", ipo_md, 0.75, mixture),
        ("Nash-MD-PG, beta = 0.25", nash_md, 0.25, mixture),
        ("Nash-MD-PG, beta = 0.75", nash_md, 0.75, mixture),
    )
    # Near each corner, but not on it: a probability of 0 would never move.
    starts = (0.05 + 0.85 * torch.eye(3, dtype=torch.float64)).log()
    # Not natural: the paper's figure shows plain gradient descent.
    plain = dict(rate=1.0, steps=2000, start=starts, natural=False)
    nash = fixed_point(preferences, log_ref, tau).exp()
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (name, method, beta, law) in zip(axes.flat, panels, strict=True):
        paths = descend(method, preferences, log_ref, tau, beta, law, **plain)
        point = fixed_point(preferences, log_ref, tau, beta, law)
        plot_paths(axis, paths.exp(), nash, point.exp())
        axis.set_title(name)
    figure.suptitle(
        f"{title}, tau = {tau:g}: exact gradient descent on the logits from three starts (dots)"
    )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(os.path.join(folder, "fig6.png"), dpi=130)


# Files


LARGEST = 2**28  # bytes: a game of 10,000 actions as text has more, and is for no table
MATRIX = "n rows of n probabilities p(row > column), numbers from 0 to 1"
LAW = "one probability an action, numbers above 0 that add up to 1"


def read_rows(path, kind):
    """A file's rows as its parser gives them. kind: .csv, .json or .npy."""
    if not os.path.isfile(path) and os.path.lexists(path):
        raise ValueError("it is no file")  # a pipe keeps its reader waiting, some devices never end
    if os.path.getsize(path) > LARGEST:
        raise ValueError(f"it is longer than {LARGEST} bytes")
    if kind == ".npy":
        return numpy.load(path, allow_pickle=False)  # a pickle may run code
    # utf-8-sig: spreadsheets put a byte-order mark in front.
    with open(path, encoding="utf-8-sig") as file:
        if kind == ".json":
            return json.load(file)
        return [line.split(",") for line in file if line.strip()]


def read_numbers(path, option, wanted):
    """A .csv, .json or .npy file as a float64 tensor of any shape.

    option, wanted:
        the command line's, and what it should be, for the message.

    Raises ValueError naming option, file and row.
    """
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".csv", ".json", ".npy"):
        raise ValueError(f"{option} {path}: give a .csv, .json or .npy file of {wanted}")
    where = ""
    try:
        rows = read_rows(path, kind)
        # A row at a time: only so can the message say which one is no list of numbers.
        array = []
        for number, row in enumerate(rows, 1):
            where = f"row {number}: "
            array.append(numpy.array(row, dtype=numpy.float64))
            if array[-1].shape != array[0].shape:
                raise ValueError(f"{len(row)} entries where the first row has {len(rows[0])}")
        return torch.from_numpy(numpy.array(array))
    except Exception as error:  # numpy's, json's and those of the parsers below them
        reason = str(error) or type(error).__name__  # some exceptions have no text
        reason = reason.splitlines()[0]
        raise ValueError(
            f"{option} {path}: cannot be read: {where}{reason}; give {wanted}"
        ) from None


def read_preferences(path, option="--preferences"):
    """A preference matrix [n, n] from a file, made antisymmetric to the last bit.

    Raises ValueError naming the worst entry.
    """
    p = read_numbers(path, option, MATRIX)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or len(p) < 2:
        shape = list(p.shape)
        raise ValueError(
            f"{option} {path}: shape {shape}, need a square matrix of at least 2 actions: {MATRIX}"
        )
    # A rule a line: by how much an entry breaks it, and what to say of the worst one. NaN must be
    # refused first: no later comparison would notice it.
    rules = (
        ((~p.isfinite()).double(), "is {entry:g}: every entry must be a number"),
        ((p - 0.5).abs() - 0.5, "is {entry:g}: a probability lies in [0, 1]"),
        (
            (p + p.T - 1).abs() - 1e-6,
            "is {entry:.9g} and its mirror image {mirror:.9g}: "
            "p(i > j) + p(j > i) must be 1 within 1e-6",
        ),
    )
    for excess, message in rules:
        if excess.max() > 0:
            row, column = divmod(int(excess.argmax()), len(p))
            text = message.format(entry=p[row, column].item(), mirror=p[column, row].item())
            raise ValueError(f"{option} {path}: row {row + 1}, column {column + 1} {text}")
    # Exactly antisymmetric: the mean of what the two halves say.
    return (p + 1 - p.T) / 2


def read_reference(path, count, option="--reference"):
    """log pi_ref [count] from a file of probabilities, uniform for None.

    Raises ValueError if it is no law with full support.
    """
    if path is None:
        return torch.zeros(count, dtype=torch.float64).log_softmax(0)
    q = read_numbers(path, option, LAW).flatten()
    if len(q) != count:
        raise ValueError(
            f"{option} {path}: {len(q)} probabilities for a game of {count} actions; give {LAW}"
        )
    # NaN and infinity count as the worst, too. Full support: log 0 would leave nothing to learn.
    worst = int(torch.where(q.isfinite(), q, -math.inf).argmin())
    if not 0 < q[worst] < math.inf:
        raise ValueError(
            f"{option} {path}: entry {worst + 1} is {q[worst]:g}: "
            "give every action more than 0, or leave it out"
        )
    total = q.sum().item()
    if abs(total - 1) > 1e-6:
        raise ValueError(
            f"{option} {path}: sums to {total:.9g}: divide the probabilities by their sum"
        )
    return (q / q.sum()).log()


# The command


def printable(text):
    r"""A text in one line, what a terminal would obey written out, such as \x1b."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def one_line_errors(parser, program):
    """Makes an argparse parser refuse with one line, without the usage, and exit status 2."""

    def refuse(message):
        parser.exit(2, f"{program}: error: {printable(message)}\n")

    parser.error = refuse


def parse(argv):
    """The command line: (parser, options). Exits with 2 and one line on a bad option."""
    parser = argparse.ArgumentParser(
        description="Preference games, solved and learned. Without options: the table and pictures."
    )
    one_line_errors(parser, "bandit.py")
    parser.add_argument("--seed", type=int, default=0, help="of the random games (default 0)")
    parser.add_argument(
        "--preferences",
        metavar="FILE",
        help="your game: a square .csv, .json or .npy matrix of p(row > column)",
    )
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help="its reference policy, one probability an action (default uniform)",
    )
    parser.add_argument(
        "--tau", type=float, default=0.1, help="regularisation, above 0 (default 0.1)"
    )
    parser.add_argument(
        "--beta",
        type=float,
        default=0.125,
        help="mixture weight of the reference, in [0, 1) (default 0.125)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where pictures go (default results; with --preferences results/NAME)",
    )
    options = parser.parse_args(argv)
    # Written as what is right, so that NaN, for which no comparison holds, is refused.
    # Far beyond, squares of tau overflow, and the way down to it takes a thousand solutions.
    if not 1e-12 <= options.tau <= 1e12:
        parser.error(f"--tau {options.tau}: give a number above 0, from 1e-12 to 1e12")
    if not 0 <= options.beta < 1:
        parser.error(
            f"--beta {options.beta}: give at least 0 and below 1; "
            "1 is offline IPO, which is in every table"
        )
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed {options.seed}: give 0 or more, below 2^63")
    for name in ("preferences", "reference", "out"):
        given = getattr(options, name)
        if given is not None and not given.strip():
            parser.error(f"--{name}: is empty; give a value, or leave the option out")
    if options.reference and not options.preferences:
        parser.error(
            f"--reference {options.reference}: is for a game of your own: give --preferences too"
        )
    return parser, options


def play(options, title, folder):
    """The tables of all games on the screen, the pictures in the folder."""
    if options.preferences:
        preferences = read_preferences(options.preferences)
        triangle = preferences, read_reference(options.reference, len(preferences))
        played = {title: triangle}
    else:
        # Figure 6 is drawn of the paper's own game, which is none of the table's.
        triangle = cycle(0.4), read_reference(None, 3)
        played = games(options.seed)
    os.makedirs(folder, exist_ok=True)  # after reading: bad input leaves no folder behind
    paths = {}
    for name, game in played.items():
        policies = bool(options.preferences)
        paths[name] = print_game(name, *game, options.tau, options.beta, policies)
    name, game = next(iter(played.items()))
    plot_gaps(*game, options.tau, paths[name], name, folder)
    # Only three actions fill a triangle.
    also = ""
    if len(triangle[1]) == 3:
        plot_simplex(*triangle, options.tau, title, folder)
        also = "and fig6.png"
    print(
        "\n-: SLiC's hinge pulls only beyond its kinks, so more than two actions may circle; "
        "DPO may have no finite point"
    )
    print(f"pictures: {printable(os.path.join(folder, 'duality_gap.png'))}", also)


def main(argv=None):
    """The command line. Returns the exit status; bad input exits with 2 and one line."""
    parser, options = parse(argv)
    title = "cyclic game, p = 0.9, uniform reference"
    folder = "results"
    if options.preferences:
        title = printable(os.path.basename(options.preferences))
        folder = os.path.join(folder, os.path.splitext(os.path.basename(options.preferences))[0])
    if options.out:
        folder = options.out
    try:
        play(options, title, folder)
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:
        raise  # the output's reader has left: stopping.py says so
    except OSError as error:
        # The readers turn their own into ValueError: what is left is the folder's.
        parser.error(f"--out {folder}: {error.strerror}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    raise SystemExit(main())
