"""Solvers of preference games that came after the paper, each in a few lines, on one cyclic game.

INPO, COMAL, MPO, EGPO, Nash-Prox, ONPO, SPO (and SPPO), MNPO and Nash-RS, tabular: exact win rates,
no sampling, no network. Tabular Nash-MD (NLHF, arXiv 2312.00886, section 5; bandit.py) stands
beside them. Every one of them is the same move,

    pi_next = pi_ref^(size tau) base^(1 - size tau) exp(size p(. > opponent)) / Z,

and they differ in who is the base and who the opponent:

    solver     base                       opponent                      size             arXiv
    Nash-MD    pi                         mixture of pi and pi_ref      2/(tau (t + 2))  2312.00886
    INPO       pi                         pi                            1/eta            2407.00617
    COMAL      pi                         pi                            1/eta            2410.23223
    MPO        pi                         pi                            eta/(1+tau eta)  2410.16714
    EGPO       pi                         one such move from pi         eta              2503.08942
    Nash-Prox  pi                         one such move from pi         1/(tau+tau/eta)  2505.19731
    ONPO       a second, lagging policy   pi                            eta, tau = 0     2502.16852
    SPO, SPPO  pi                         pi                            eta, tau = 0     2401.04056
    MNPO       mean of the last policies  pi                            1/eta            2509.23102
    Nash-RS    pi                         pi_ref exp(p(. > pi)/tau)/Z   eta              2503.10990

COMAL moves pi_ref to pi after many steps, MPO its magnet, which stands in pi_ref's place. So in
exact arithmetic MPO is INPO with eta_INPO = tau + 1/eta, its moving magnet is COMAL, and
Nash-Prox is EGPO with eta_EGPO = 1/(tau + tau/eta). Each name keeps its own paper's eta: for INPO,
COMAL and MNPO a *larger* eta is a smaller step, for the others a larger step.

How sure the steps are is in each docstring and in the table's last column: the authors' code was
read (INPO, COMAL, EGPO, SPPO, MNPO), the paper's text (ONPO, Nash-RS), or only a summary
(Nash-Prox; MPO's step is likely, not certain); SPO's is the textbook's multiplicative weights.
Their limits were then found by running them. MNPO's and Nash-RS's tabular steps are derived here.
Papers are cited by number; equation numbers were not checked and are left out.

INPO with one step a batch is online IPO. At pi = pi_t, where every batch begins, the gradient of
INPO's loss is exactly tau/eta times online IPO's, for the same pairs and soft labels: there the
last policy's log-ratio takes all but tau/eta of the policy's, and what is left in the square is
(tau/eta) (h - (p - 1/2)/tau). This holds pair by pair, hence in expectation and for every parameter
of a network. Plain gradient descent with INPO's loss and one step a batch is therefore online IPO
with the learning rate times tau/eta, and Adam, which divides the scale out again, takes the same
step but for its epsilon. What INPO adds begins with the second step on the same pairs, or with a
copy of the policy that lags; its move below is what such steps on the pairs of one pi_t lead to.

Left out: sampling noise, and the training of these on a language model.
Run: python -m studies.solvers     (about 10 s; the table, and results/solvers.png)

Names are bandit.py's: preferences [n, n], log_pi and log_ref [n] in nats, tau. A path is
[steps + 1, n], log-policies from the reference on.
"""

import argparse
import os
from typing import NamedTuple

import torch

import bandit
from bandit import duality_gap, fixed_point, nash_md_path, respond, total_variation, win_rate

TAU = 0.1
STEPS = 2000
CLOSE = 1e-6  # the table counts the steps to this distance

# The game: three actions that beat each other in a cycle with 0.9, all of them beat the fourth.
PREFERENCES = torch.tensor(
    [[0.5, 0.9, 0.1, 0.7], [0.1, 0.5, 0.9, 0.7], [0.9, 0.1, 0.5, 0.7], [0.3, 0.3, 0.3, 0.5]],
    dtype=torch.float64,
)
LOG_REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()


# The loss that INPO trains a policy with


def inpo_loss(
    logp,
    logp_other,
    ref_logp,
    ref_logp_other,
    last_logp,
    last_logp_other,
    label,
    tau,
    eta,
):
    """INPO's loss with soft labels, one value a pair (2407.00617): p (d - t)^2 + (1 - p) (d + t)^2.

    d = D_pi - (tau/eta) D_ref - (1 - tau/eta) D_last, where D_q = log q(y) - log q(y'), and
    t = 1/(2 eta). Read in three programs with hard labels; the soft label is ipo.py's weighting of
    the two orders. ONPO's loss is this at tau = 0, MNPO's has a weighted mean of past policies'
    log-probabilities as last_logp.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient. Sums over tokens.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    last_logp, last_logp_other:
        [B] log pi_t, of the policy that drew the pair, nats, without gradient.
    label:
        [B] p(y > y' | x) in [0, 1].
    tau:
        at least 0, the regularisation strength.
    eta:
        above tau, the inverse step.

    Returns [B], unreduced.
    """
    anchor = tau / eta
    # No detach here: that last_logp carries no gradient is the caller's part, as for ref_logp.
    base = anchor * (ref_logp - ref_logp_other) + (1 - anchor) * (last_logp - last_logp_other)
    difference = logp - logp_other - base
    target = 1 / (2 * eta)  # a certain preference, (p - 1/2)/eta at p = 1
    return label * (difference - target) ** 2 + (1 - label) * (difference + target) ** 2


# The move that all share


def move(preferences, log_ref, tau, size, log_base, log_opponent):
    """log of pi_ref^(size tau) base^(1 - size tau) exp(size p(. > opponent))/Z, [n].

    It is the policy that maximises
    p(pi > opponent) - tau KL(pi, pi_ref) - (1/size - tau) KL(pi, base),
    and the minimiser of inpo_loss at eta = 1/size over pairs of which *both* responses are drawn
    from the opponent: that is how the opponent's win rates enter.

    log_ref:
        [n], the reference, or the magnet in its place.
    tau:
        at least 0; 0 is the game without regularisation.
    size:
        above 0 and at most 1/tau, where the base has no weight left.
    log_base, log_opponent:
        [n].

    Raises ValueError for a size out of its range.
    """
    # Written as what is right: NaN is refused. The slack is for eta = tau, where 1/eta is rounded.
    if not (size > 0 and 0 <= tau * size <= 1 + 1e-12):
        raise ValueError(f"a step of {size:g} at tau = {tau:g}: give one above 0, at most 1/tau")
    anchor = size * tau
    anchored = anchor * log_ref + (1 - anchor) * log_base
    return torch.log_softmax(anchored + size * win_rate(preferences, log_opponent), -1)


# Solvers of the regularised game


def inpo_path(preferences, log_ref, tau, steps, eta):
    """INPO (2407.00617): the policy plays itself, held to the reference and to its last iterate.

    Reaches the Nash equilibrium at tau where eta is above inpo_limit, and circles below. The step
    was read in three programs; the limit is derived here. The policy's loss: inpo_loss, minimised
    over pairs from pi_t.

    eta:
        above tau, the inverse step.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    for _ in range(steps):
        path.append(move(preferences, log_ref, tau, 1 / eta, path[-1], path[-1]))
    return torch.stack(path)


def mpo_path(preferences, log_ref, tau, steps, eta, every=None):
    """MPO (2410.16714): mirror descent with a magnet m, pi_ref at first.

    pi_next = [pi m^(tau eta) exp(eta p(. > pi))]^(1/(1 + tau eta))/Z. Reaches the Nash equilibrium
    at tau with a magnet that stays, the unregularised one with a magnet that moves. The step is
    likely, not certain (not read in the authors' code).

    eta:
        above 0, the step.
    every:
        steps between the magnet's moves to the current policy; None: it stays.

    Returns [steps + 1, n].
    """
    size = eta / (1 + tau * eta)  # the exponent 1/(1 + tau eta) applies to all three factors
    path = [log_ref]
    magnet = log_ref
    for step in range(steps):
        if every is not None and step % every == 0:
            magnet = path[-1]
        path.append(move(preferences, magnet, tau, size, path[-1], path[-1]))
    return torch.stack(path)


def egpo_path(preferences, log_ref, tau, steps, eta):
    """EGPO (2503.08942): extragradient. Half a step shows the opponent, the step starts anew.

    Reaches the Nash equilibrium at tau. Read in the authors' code. The policy's loss, twice: one
    gradient step on (D_pi - D_ref - (p(y > y'') - p(y' > y''))/tau)^2, pairs uniform, y'' drawn
    from pi and then from the half-way policy.

    eta:
        above 0 and at most 1/tau, the step.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    for _ in range(steps):
        half = move(preferences, log_ref, tau, eta, path[-1], path[-1])
        # From path[-1] again, not from half: only the opponent has looked ahead.
        path.append(move(preferences, log_ref, tau, eta, path[-1], half))
    return torch.stack(path)


def nash_prox_path(preferences, log_ref, tau, steps, eta, inner=2):
    """Nash-Prox (2505.19731, a co-author of the paper's): solves a proximal game step by step.

    log pi = (log pi_ref + log pi_k/eta + p(. > q)/tau)/(1 + 1/eta) for q = pi_k, then for the
    result. Reaches the Nash equilibrium at tau. From a summary, not read in text or code. The
    policy's loss: a self-play policy gradient, with a KL to a copy that moves slowly.

    eta:
        above 0, the step.
    inner:
        at least 1, how often the opponent is renewed within a step; 1 is INPO's step, 2 EGPO's.

    Returns [steps + 1, n].
    """
    size = 1 / (tau * (1 + 1 / eta))
    path = [log_ref]
    for _ in range(steps):
        opponent = path[-1]
        for _ in range(inner):
            # The base stays at pi_k: the proximal point, whatever the opponent is by now.
            opponent = move(preferences, log_ref, tau, size, path[-1], opponent)
        path.append(opponent)
    return torch.stack(path)


def mnpo_path(preferences, log_ref, tau, steps, eta, weights=(0.5, 0.5)):
    """MNPO (2509.23102): INPO with a geometric mean of the last policies in its last one's place.

    The loss was read in the authors' code, (D_pi - r D_ref - (1 - r) sum_j w_j D_(t-j) - 1/(2 eta)
    )^2; the step is derived here: it is inpo_loss with last_logp = sum_j w_j log pi_(t-j), whose
    minimiser over pairs from pi_t is the move below. Their ratio r is a constant of its own; here
    r = tau/eta as in INPO, because the point reached is the Nash equilibrium at tau = r eta.
    Reaches it on this game. Two past policies reach it at eta = .3, where INPO circles: holding on
    to the policy before last damps the turn. It is not free: at eta = 1 it is slower than INPO. Nor
    does more of it help further: at eta = .2 two reach it, five circle.

    eta:
        above tau, the inverse step.
    weights:
        of the last policies, newest first, sum 1. Fewer than these at the start: the code's rule,
        divide by the sum of those that there are.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    for _ in range(steps):
        recent = torch.stack(path[: -len(weights) - 1 : -1])  # newest first
        share = torch.tensor(weights, dtype=log_ref.dtype)[: len(recent)]
        # Not normalised: move normalises once, and a constant cancels there.
        log_base = (share / share.sum()) @ recent
        path.append(move(preferences, log_ref, tau, 1 / eta, log_base, path[-1]))
    return torch.stack(path)


def nash_rs_path(preferences, log_ref, tau, steps, eta):
    """Nash-RS (2503.10990): policy gradient against the opponent's own best reply.

    The paper's text draws y' from pi_ref and accepts it with probability exp(-p(pi > y')/tau). (Its
    code differs.) Accepted responses have the law pi_ref exp(-p(pi > y')/tau)/Z, which is the reply
    that minimises p(pi > pi') + tau KL(pi', pi_ref). So the policy ascends what it is left with
    against the worst opponent, a concave function, without any turning; the step is a natural
    gradient's, derived here. Reaches the Nash equilibrium at tau for eta below nash_rs_limit. What
    it costs is rejections (acceptance, below), which tau makes many.

    eta:
        above 0 and at most 1/tau, the step.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    for _ in range(steps):
        # p(pi > y') = 1 - p(y' > pi), and the 1 falls out in Z: the regularised best response.
        opponent = respond(preferences, log_ref, tau, path[-1])
        path.append(move(preferences, log_ref, tau, eta, path[-1], opponent))
    return torch.stack(path)


def acceptance(preferences, log_ref, tau, log_pi):
    """The share of Nash-RS's draws from pi_ref that are accepted: E exp(-p(pi > y')/tau).

    At the equilibrium it is exp(-1/(2 tau) - KL(pi, pi_ref)): one draw in 163 here at tau = 0.1,
    one in 2e7 at 0.03.
    """
    losses = 1 - win_rate(preferences, log_pi)  # p(pi > y') for every y'
    return torch.logsumexp(log_ref - losses / tau, -1).exp()


# Solvers of the game without regularisation


def comal_path(preferences, log_ref, tau, steps, eta, every):
    """COMAL (2410.23223): INPO to its equilibrium, which becomes the reference of the next round.

    The last iterate reaches the unregularised Nash equilibrium: KL to the reference then costs
    nothing. Read in the authors' code.

    eta:
        above tau, the inverse step of INPO.
    every:
        INPO's steps a round.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    while len(path) <= steps:
        path.extend(inpo_path(preferences, path[-1], tau, every, eta)[1:])
    return torch.stack(path[: steps + 1])


def onpo_path(preferences, log_ref, steps, eta):
    """ONPO (2502.16852): optimistic mirror descent. The last win rates are taken as a forecast.

    lagging_next = lagging exp(eta p(. > pi))/Z, then pi_next = lagging_next exp(eta p(. > pi))/Z
    with the same win rates. The last iterate reaches the unregularised Nash equilibrium, slowly.
    By the paper's text. The policy's loss: (D_pi - D_lagging - eta/2)^2, which is inpo_loss at
    tau = 0.

    eta:
        above 0, the step.

    Returns [steps + 1, n], the policies that play.
    """
    path = [log_ref]
    lagging = log_ref
    for _ in range(steps):
        lagging = move(preferences, log_ref, 0.0, eta, lagging, path[-1])
        path.append(move(preferences, log_ref, 0.0, eta, lagging, path[-1]))
    return torch.stack(path)


def spo_path(preferences, log_ref, steps, eta):
    """SPO (2401.04056) and SPPO (2405.00675): multiplicative weights against itself.

    Only the *average* of the policies reaches the unregularised Nash equilibrium, with this
    constant step as 1/sqrt(steps); the last one spirals out to the border. SPO trains with reward
    p(y > other samples), whose trust-region step this is. SPPO's loss (read in the authors' code)
    has 1/2 for log Z/eta, so its minimiser is this step up to terms of the third order in eta.

    eta:
        above 0, the step.

    Returns [steps + 1, n].
    """
    path = [log_ref]
    for _ in range(steps):
        path.append(move(preferences, log_ref, 0.0, eta, path[-1], path[-1]))
    return torch.stack(path)


def average(path):
    """log of the running mean of a path's laws, [steps + 1, n]: of laws, not of logarithms."""
    count = torch.arange(1, len(path) + 1, dtype=path.dtype)
    return (path.exp().cumsum(0) / count[:, None]).log()


# Where they come to rest


def unregularised_gap(log_pi, preferences):
    """2 max_y p(y > pi) - 1, [...]: the duality gap at tau = 0, 0 at its Nash equilibria only."""
    return 2 * win_rate(preferences, log_pi).amax(-1) - 1


def turning(preferences, log_pi):
    """How fast the game turns around a policy: w, the largest frequency of its linear part.

    Let z be sqrt(pi) times a small change of log pi. It changes sqrt(pi) p(. > pi) by A z, up to a
    constant of the win rates, with A = sqrt(pi) (p - 1/2) sqrt(pi). A is antisymmetric: its
    eigenvalues are +-i w.

    log_pi:
        [n], an equilibrium.

    Returns a scalar, at least 0 and at most 1/2.
    """
    root = (log_pi / 2).exp()
    antisymmetric = root[:, None] * (preferences - 0.5) * root
    # Without the direction of sqrt(pi): along it the probabilities' sum would change.
    tangent = torch.eye(len(root), dtype=root.dtype) - torch.outer(root, root)
    return torch.linalg.matrix_norm(tangent @ antisymmetric @ tangent, 2)


def inpo_limit(preferences, log_ref, tau):
    """The eta that INPO needs: (tau^2 + w^2)/(2 tau).

    A step multiplies an error by 1 - tau/eta + i w/eta, which is shorter than 1 above that eta.
    Where w < tau that is below tau: then every eta in its range will do.
    """
    w = turning(preferences, fixed_point(preferences, log_ref, tau))
    return (tau**2 + w**2) / (2 * tau)


def nash_rs_limit(preferences, log_ref, tau):
    """The eta that Nash-RS must stay below: 2/(tau + w^2/tau).

    A step multiplies an error by 1 - eta (tau + w^2/tau): the opponent's reply turns once more,
    i w (i w/tau), and two quarter turns are a pull back. Where w < tau that is above 1/tau: then
    every eta in its range will do.
    """
    w = turning(preferences, fixed_point(preferences, log_ref, tau))
    return 2 / (tau + w**2 / tau)


def steps_to(distances, close=CLOSE):
    """The first step from which a path's distances [steps + 1] stay below close, or None."""
    far = torch.nonzero(~(distances < close))
    first = 0
    if len(far):
        first = int(far[-1]) + 1
    if first == len(distances):
        return None
    return first


# The table


class Solver(NamedTuple):
    """A row of the table: a solver with its constants, run."""

    name: str
    reaches: str
    path: torch.Tensor
    regularised: bool
    source: str


def regularised_solvers(preferences, log_ref, tau, steps):
    """The solvers that aim at the Nash equilibrium at tau, run, a list of Solver."""
    game = preferences, log_ref, tau, steps
    nash = "Nash at tau"
    rows = (
        ("Nash-MD", nash + ", as 1/steps", nash_md_path(*game), "text"),
        ("INPO eta 1", nash, inpo_path(*game, 1.0), "code"),
        ("INPO eta .3", "circles", inpo_path(*game, 0.3), "code"),
        ("MPO eta 2", nash, mpo_path(*game, 2.0), "likely"),
        ("EGPO eta 1", nash, egpo_path(*game, 1.0), "code"),
        ("Nash-Prox eta .2", nash, nash_prox_path(*game, 0.2), "summary"),
        ("MNPO eta 1", nash, mnpo_path(*game, 1.0), "derived here"),
        ("MNPO eta .3", nash, mnpo_path(*game, 0.3), "derived here"),
        ("Nash-RS eta 1", nash, nash_rs_path(*game, 1.0), "derived here"),
    )
    solvers = []
    for name, reaches, path, source in rows:
        solvers.append(Solver(name, reaches, path, True, source))
    return solvers


def unregularised_solvers(preferences, log_ref, tau, steps):
    """The solvers that aim at the Nash equilibrium of the game itself, run, a list of Solver."""
    game = preferences, log_ref, tau, steps
    onpo = onpo_path(preferences, log_ref, steps, 0.5)
    spo = spo_path(preferences, log_ref, steps, 1.0)
    nash = "unregularised Nash"
    rows = (
        ("COMAL eta .5", nash, comal_path(*game, 0.5, 100), "code"),
        ("MPO eta 2, moving", nash, mpo_path(*game, 2.0, 20), "likely"),
        ("ONPO eta .5", nash, onpo, "text"),
        ("SPO eta 1, last", "does not converge", spo, "textbook"),
        ("SPO eta 1, average", nash + ", as 1/sqrt(steps)", average(spo), "textbook"),
    )
    solvers = []
    for name, reaches, path, source in rows:
        solvers.append(Solver(name, reaches, path, False, source))
    return solvers


def print_table(solvers, preferences, nash, steps):
    """A row a solver: what it should reach, how far it is, and the steps to 1e-6.

    nash:
        [n], log of the regularised equilibrium.
    """
    print(f"{'solver':<20}{'should reach':<36}{'distance':>10}{'at the end':>12}", end="")
    print(f"{'steps to 1e-6':>15}  step known from")
    for solver in solvers:
        if solver.regularised:
            kind = "TV"
            distances = total_variation(solver.path, nash)
        else:
            kind = "gap"
            # Rounding may leave -1e-16.
            distances = unregularised_gap(solver.path, preferences).clamp(min=0)
        needed = steps_to(distances)
        needed = "-" if needed is None else needed
        print(f"{solver.name:<20}{solver.reaches:<36}{kind:>10}{distances[-1]:>12.1e}", end="")
        print(f"{needed:>15}  {solver.source}")
    print("TV: to the regularised equilibrium. gap: of the game without regularisation. ", end="")
    print(f"{steps} steps from the reference.")


def plot_gaps(solvers, preferences, log_ref, tau, folder):
    """Writes solvers.png: a panel for those that aim at Nash at tau, one for the others."""
    from matplotlib.figure import Figure  # here: the solvers need no matplotlib

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = (
        (True, f"regularised duality gap, tau = {tau:g}"),
        (False, "duality gap of the game without regularisation"),
    )
    for axis, (regularised, title) in zip(figure.subplots(1, 2), panels, strict=True):
        shown = [solver for solver in solvers if solver.regularised == regularised]
        for index, solver in enumerate(shown):
            gap = unregularised_gap(solver.path, preferences)
            if regularised:
                gap = duality_gap(solver.path, preferences, log_ref, tau)
            # Evenly spaced on the logarithmic axis, and shifted: lines coincide.
            marked = {min(int(1.9 ** (k + index / 9)), len(gap) - 1) for k in range(12)}
            axis.loglog(
                range(1, len(gap) + 1),
                gap.clamp(min=1e-15),  # below is rounding
                ls=bandit.LINES[index],
                marker=bandit.MARKERS[index],
                markevery=sorted(marked),
                markersize=5,
                label=solver.name,
            )
        axis.set(xlabel="step + 1", ylabel="gap (preference probability)", title=title)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(os.path.join(folder, "solvers.png"), dpi=110)


def main(argv=None):
    """The command. Returns the exit status; bad input exits with 2 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.solvers",
        description="Later Nash solvers on one cyclic game: a table and a picture.",
    )
    bandit.one_line_errors(parser, "studies.solvers")
    parser.add_argument(
        "--out", default="results", metavar="DIR", help="where solvers.png goes (default results)"
    )
    folder = parser.parse_args(argv).out
    nash = fixed_point(PREFERENCES, LOG_REF, TAU)
    game = PREFERENCES, LOG_REF, TAU
    solvers = regularised_solvers(*game, STEPS) + unregularised_solvers(*game, STEPS)
    policy = ", ".join(f"{p:.6f}" for p in nash.exp().tolist())
    print(f"The game: rock-paper-scissors at 0.9 and a fourth action; tau = {TAU:g}.")
    print(f"Nash at tau ({policy}), without regularisation (1/3, 1/3, 1/3, 0).\n")
    print_table(solvers, PREFERENCES, nash, STEPS)
    tail = total_variation(inpo_path(*game, STEPS, 0.3)[-200:], nash)
    print(f"\nINPO converges above eta = {inpo_limit(*game):.3f}; ", end="")
    print(f"at .3 its last 200 steps lie {tail.min():.3f} to {tail.max():.3f} from Nash.")
    print(f"Nash-RS converges below eta = {nash_rs_limit(*game):.2f}; ", end="")
    print(f"at the end it accepts one draw in {1 / acceptance(*game, nash):.0f}.")
    try:
        os.makedirs(folder, exist_ok=True)
        plot_gaps(solvers, *game, folder)
    except OSError as error:
        parser.error(f"--out {folder}: {error.strerror}")
    print(f"picture: {os.path.join(folder, 'solvers.png')}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    raise SystemExit(main())
