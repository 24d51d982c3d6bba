"""The lab: preference games small enough to solve, and every method of the paper run on them with exact expectations.

Implements the regularised Nash equilibrium (Prop 4.1, eq 12), the fixed point of IPO-MD and Nash-MD-PG (eq 13), offline
IPO's and the RLHF policy, the duality gap, tabular Nash-MD (NLHF, arXiv 2312.00886, section 5) and Figure 6's pictures.
Gradients go through the very losses that train.py uses: they return one value a pair, the lab weights each by the
pair's detached probability, the trainer averages the pairs it drew. Left out: prompts and models (tests/enumerated.py).
Run: python bandit.py                       the table of games and methods, and two pictures in results/
     python bandit.py --check               every claim of the paper that a finite game can decide (claims.py)
     python bandit.py --preferences FILE    your own game: a square matrix in a .csv, .json or .npy file
Names: preferences [n, n], preferences[i, j] = p(i > j), so preferences + preferences^T = 1; log_pi, log_ref [..., n]:
log-probabilities of the n actions, float64; tau > 0: the regularisation; beta in [0, 1]: the mixture's reference weight.
"""

import argparse
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


def cycle(margin):
    """Rock-paper-scissors: each of three actions beats the next with probability 1/2 + margin. Returns [3, 3]."""
    next_action = torch.eye(3, dtype=torch.float64).roll(1, 1)
    return 0.5 + margin * (next_action - next_action.T)


def random_game(count, generator):
    """Preferences [count, count] uniform in [0, 1] above the diagonal, some a > b > c > a, and a random log_ref [count]."""
    while True:  # until there is a cycle: transitive games hide which opponent a method plays
        above = (torch.rand(count, count, generator=generator, dtype=torch.float64) - 0.5).triu(1)
        beats = (above - above.T > 0).double()
        if count < 3 or (beats @ beats @ beats).diagonal().any():
            return 0.5 + above - above.T, torch.randn(
                count, generator=generator, dtype=torch.float64
            ).log_softmax(0)


def bradley_terry(rewards):
    """p(i > j) = sigmoid(r_i - r_j) from rewards [n] in nats. Returns [n, n]."""
    return torch.sigmoid(rewards[:, None] - rewards[None])


def games(seed):
    """The table's five games: name -> (preferences, log_ref)."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(5, generator=generator, dtype=torch.float64)
    return {
        "cyclic game, biased reference": (
            cycle(0.4),
            torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log(),
        ),
        "random intransitive game": random_game(5, generator),
        "Bradley-Terry game": (bradley_terry(rewards), random_game(5, generator)[1]),
        "two-action game": (
            cycle(0.2)[:2, :2],
            torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        ),
        "large random game": random_game(100, generator),
    }


def win_rate(preferences, log_opponent):
    """p(y > opponent) = sum_y' opponent(y') p(y > y') for every action y, [..., n]."""
    return (preferences @ log_opponent.exp()[..., None])[..., 0]


def respond(preferences, log_ref, tau, log_opponent):
    """log of pi_ref(y) exp(p(y > opponent)/tau)/Z, [..., n]: eq 12 against itself, eq 13 its mixture, offline IPO the data."""
    return torch.log_softmax(log_ref + win_rate(preferences, log_opponent) / tau, -1)


def newton(field, log_pi, tolerance=1e-11, steps=60):
    """A zero of field: [n] -> [n] near log_pi by Newton's method, halving a step until it helps. None if it finds none."""
    value = field(log_pi)
    for _ in range(steps):
        size = value.abs().max()
        if size < tolerance:
            return log_pi
        direction = torch.linalg.solve_ex(torch.func.jacrev(field)(log_pi), value)[
            0
        ]  # no exception: a singular one is NaN
        for halving in range(14):
            candidate = torch.log_softmax(log_pi - direction / 2**halving, -1)
            value = field(candidate)
            if value.abs().max() < size:
                break
        else:
            return None  # also where the field is NaN: no comparison holds
        log_pi = candidate
    return None


def fixed_point(preferences, log_ref, tau, beta=0.0, mixture=mixture, tolerance=1e-11):
    """log pi with pi = pi_ref exp(p(. > mixture of pi and pi_ref)/tau)/Z, [n] (eq 13); beta = 0: the Nash equilibrium (eq 12).
    Newton's method on log pi, following the solution from tau >= 1 down to the wanted one. Plain iteration of the equation
    diverges on cycles at small tau; here the Jacobian is never singular at a solution, because the preferences minus 1/2 are
    antisymmetric: d(mixture) . d(log pi) = 0 on its null space. mixture: (log_pi, log_ref, beta) -> the opponent's log law.
    Raises ValueError rather than return a residual max |log pi - respond| above tolerance."""

    def residual(log_pi):
        return log_pi - respond(preferences, log_ref, at, mixture(log_pi, log_ref, beta))

    guess, at, shrink, solved = log_ref, max(tau, 1.0), 0.5, None
    while True:
        log_pi = newton(residual, guess, tolerance)
        if log_pi is not None:
            solved = at, log_pi
            if at == tau:
                return log_pi
        else:  # too long a step in tau: try one of half the length (in the logarithm)
            shrink = math.sqrt(shrink)
            if solved is None or shrink > 0.995:
                raise ValueError(
                    f"tau = {tau:g}: no equilibrium found to a residual of {tolerance:g}; use a larger tau"
                )
        at = max(tau, solved[0] * shrink)
        # The payoffs p(y > pi) = tau log pi/pi_ref + const change little with tau; the log-ratios are their 1/tau-fold.
        guess = torch.log_softmax(log_ref + (solved[1] - log_ref) * solved[0] / at, -1)


def duality_gap(log_pi, preferences, log_ref, tau):
    """2 max_pi' [p(pi' > pi) - tau KL(pi', pi_ref) + tau KL(pi, pi_ref)] - 1, [...]: at least 0, and 0 only at Nash."""
    best = tau * torch.logsumexp(
        log_ref + win_rate(preferences, log_pi) / tau, -1
    )  # the maximum, in closed form
    return 2 * (best + tau * kl(log_pi, log_ref)) - 1


def kl(log_pi, log_other):
    """KL(pi, other) in nats, [...]."""
    return (log_pi.exp() * (log_pi - log_other)).sum(-1)


def total_variation(log_pi, log_other):
    """Half the L1 distance of two laws, [...], in [0, 1]."""
    return (log_pi.exp() - log_other.exp()).abs().sum(-1) / 2


def fit_reward(preferences, log_data):
    """The Bradley-Terry reward [n] of least cross-entropy on pairs drawn from log_data, sum 0: RL's reward model. Exact on a
    Bradley-Terry game; elsewhere the nearest transitive account of the game, which depends on the data."""
    wins = preferences.clamp(1e-6, 1 - 1e-6)  # no finite reward explains a certain preference

    def slope(
        rewards,
    ):  # of the cross-entropy, divided by the law of y; the sum settles the free constant
        return (bradley_terry(rewards) - wins) @ log_data.exp() + rewards.sum()

    rewards = torch.zeros_like(log_data)
    for _ in range(100):  # Newton on a convex function, with steps of at most 1 nat
        step = torch.linalg.solve(torch.func.jacrev(slope)(rewards), slope(rewards))
        rewards = rewards - step / step.abs().max().clamp(min=1)
    return rewards


def rlhf_policy(rewards, log_ref, tau):
    """log of pi_ref exp(r/tau)/Z, [n]: the maximiser of E r - tau KL(pi, pi_ref)."""
    return torch.log_softmax(log_ref + rewards / tau, -1)


def dpo_point(preferences, log_ref, tau):
    """Online DPO's point, [n] or None: sum_y' pi(y') (p(y > y') - sigmoid(tau h(y, y'))) = 0, by hand and not by dpo.loss."""

    def slope(log_pi):
        returns = tau * (log_pi - log_ref)
        # pi-weighted the sums vanish for every pi, so one equation is free: it fixes the normalisation.
        return ((preferences - bradley_terry(returns)) * log_pi.exp()).sum(-1) + torch.logsumexp(
            log_pi, -1
        )

    near = rlhf_policy(
        fit_reward(preferences, log_ref), log_ref, tau
    )  # under Bradley-Terry it is the point itself (F.7)
    return next(
        (point for start in (log_ref, near) if (point := newton(slope, start)) is not None), None
    )


def expected_loss(method, log_pi, log_ref, preferences, tau, beta=0.0, mixture=mixture):
    """The expectation over all n x n pairs of a method module's loss, [...]; differentiable in log_pi [..., n]. Its PAIR says who
    draws y and y'; mixture: (log_pi, log_ref, beta) -> [..., n], to put another law in the mixture's place. rl wants reward gaps
    r(y) - r(y') for preferences."""
    laws = {"policy": log_pi, "mixture": mixture(log_pi, log_ref, beta)}
    first, second = (
        laws[who].detach() for who in method.PAIR
    )  # detached: no gradient flows through the sampling
    y, other = (
        (log_pi[..., :, None], log_ref[..., :, None]),
        (log_pi[..., None, :], log_ref[..., None, :]),
    )
    pairs = method.loss(y[0], other[0], y[1], other[1], preferences, tau)
    return ((first[..., :, None] + second[..., None, :]).exp() * pairs).sum((-2, -1))


def gradient(method, log_pi, *game):
    """The exact expected gradient of a method on the logits of a softmax policy, [..., n]. game: as expected_loss."""
    logits = log_pi.detach().requires_grad_()
    return torch.autograd.grad(
        expected_loss(method, torch.log_softmax(logits, -1), *game).sum(), logits
    )[0]


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
    """Follows the exact gradient until a step moves no logit by 1e-12. Returns the path [steps + 1, ..., n] of log_pi. natural:
    divides the gradient by the law of y, a mirror-descent step; plain descent on the logits has the same zeros but crawls along
    rarely drawn actions. No momentum: claims.py shows why. decay: rate falls as 1/(1 + step/decay)."""
    # Rates of different losses are not comparable: Prop 4.2's constant is 4/tau for the squared loss, 1 for a score
    # function. In these units a step moves a logit by rate times its advantage p(y > opponent) - 1/2 - tau log pi/pi_ref.
    unit = {
        ipo: tau / 4,
        ipo_md: tau / 4,
        nash_md: 1.0,
        rl: 1.0,
        dpo: 1 / (2 * tau),
        slic: 1 / (2 * tau),
    }[method]
    path = [log_ref if start is None else start]
    for step in range(steps):
        move = (
            gradient(method, path[-1], log_ref, preferences, tau, beta, mixture)
            * unit
            * rate
            / (1 + step / (decay or math.inf))
        )
        if natural:
            law = path[-1] if method.PAIR[0] == "policy" else mixture(path[-1], log_ref, beta)
            move = move / law.exp().clamp(
                min=1e-300
            )  # where the law underflows the gradient is 0, too
        path.append(torch.log_softmax(path[-1] - move, -1))
        if (move - move.mean(-1, keepdim=True)).abs().max() < 1e-12:
            break
    return torch.stack(path)


def nash_md_path(preferences, log_ref, tau, steps, eta=None):
    """Tabular Nash-MD, [steps + 1, n]: m = pi^(1 - eta tau) pi_ref^(eta tau), pi_next = m exp(eta p(. > m))/Z (NLHF, sec 5). eta
    None: Theorem 1's 2/(tau (t + 2)), which leads to Nash; a constant eta to the eq-13 point of beta = eta tau, if at all."""
    path = [log_ref]
    for step in range(steps):
        size = eta or 2 / (tau * (step + 2))
        opponent = mixture(path[-1], log_ref, size * tau)
        path.append(torch.log_softmax(opponent + size * win_rate(preferences, opponent), -1))
    return torch.stack(path)


def run_methods(preferences, log_ref, tau, beta):
    """Every method on one game, one after another: yields (name, predicted log_pi or None, path of log_pi, seconds)."""
    nash, shifted = (
        fixed_point(preferences, log_ref, tau),
        fixed_point(preferences, log_ref, tau, beta),
    )
    rewards = fit_reward(preferences, log_ref)
    half = (nash / 2).exp()
    turn = torch.linalg.matrix_norm(
        half[:, None] * (preferences - 0.5) * half, 2
    )  # how fast the field turns around Nash
    # SLiC's slope does not shrink before the kink |h| = 1/tau: two actions stop there, more may circle from kink to kink.
    kink = (
        torch.log_softmax(log_ref + (preferences[:, 1] - 0.5).sign() / tau, -1)
        if len(log_ref) == 2
        else None
    )
    plans = (
        ("online IPO", ipo, 0.0, nash),
        (f"IPO-MD {beta:g}", ipo_md, beta, shifted),
        (f"Nash-MD-PG {beta:g}", nash_md, beta, shifted),
        ("self-play", nash_md, 0.0, nash),
        ("online DPO", dpo, 0.0, dpo_point(preferences, log_ref, tau)),
        ("online SLiC", slic, 0.0, kink),
        ("RL", rl, 0.0, rlhf_policy(rewards, log_ref, tau)),
        # mu = pi_ref: the data come from the supervised policy, which makes offline IPO the same as IPO-MD at beta = 1.
        ("offline IPO", ipo_md, 1.0, respond(preferences, log_ref, tau, log_ref)),
    )
    for name, method, weight, predicted in plans:
        start, labels = (
            time.perf_counter(),
            rewards[:, None] - rewards[None] if method is rl else preferences,
        )
        pull = (
            tau / 4 if method is dpo else tau
        )  # towards the reference: DPO's is sigmoid'(0) = 1/4 of the others'
        rate = pull / (
            pull**2 + turn**2
        )  # makes |1 - rate (pull + i turn)|, the error's factor a step, smallest
        steps, decay = (
            (3000, 200) if method is slic else (20000, None)
        )  # past a kink only a falling rate comes to rest
        path = descend(method, labels, log_ref, tau, weight, rate=rate, steps=steps, decay=decay)
        yield name, predicted, path, time.perf_counter() - start
    start = time.perf_counter()
    yield (
        "tabular Nash-MD",
        nash,
        nash_md_path(preferences, log_ref, tau, 5000),
        time.perf_counter() - start,
    )


def read_numbers(path, option):
    """A .csv, .json or .npy file as a float64 tensor of any shape. Raises ValueError naming option, file and row."""
    kind, where = os.path.splitext(path)[1].lower(), ""
    if kind not in (".csv", ".json", ".npy"):
        raise ValueError(f"{option} {path}: give a .csv, .json or .npy file")
    try:
        if kind == ".npy":
            rows = numpy.load(path, allow_pickle=False)  # a pickle may run code
        else:
            with open(path, encoding="utf-8-sig") as file:
                rows = (
                    json.load(file)
                    if kind == ".json"
                    else [line.split(",") for line in file if line.strip()]
                )
        array = []
        for number, row in enumerate(rows, 1):
            where = f"row {number}: "
            array.append(numpy.array(row, dtype=numpy.float64))
            if array[-1].shape != array[0].shape:
                raise ValueError(f"{len(row)} entries where the first row has {len(rows[0])}")
        return torch.from_numpy(numpy.array(array))
    except Exception as error:  # numpy's, json's and those of the parsers below them
        raise ValueError(
            f"{option} {path}: cannot be read: {where}{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None


def read_preferences(path, option="--preferences"):
    """A preference matrix [n, n], made antisymmetric to the last bit. Raises ValueError with the worst entry."""
    p = read_numbers(path, option)
    if p.ndim != 2 or p.shape[0] != p.shape[1] or len(p) < 2:
        raise ValueError(
            f"{option} {path}: shape {list(p.shape)}, need a square matrix of at least 2 actions"
        )
    for wrong, what in (
        ((~p.isfinite()).double(), "is {0:g}: every entry must be a number"),
        ((p - 0.5).abs() - 0.5, "is {0:g}: a probability lies in [0, 1]"),
        (
            (p + p.T - 1).abs() - 1e-6,
            "is {0:.9g} and its mirror image {1:.9g}: p(i > j) + p(j > i) must be 1 within 1e-6",
        ),
    ):
        if wrong.max() > 0:
            i, j = divmod(int(wrong.argmax()), len(p))
            raise ValueError(
                f"{option} {path}: row {i + 1}, column {j + 1} "
                + what.format(p[i, j].item(), p[j, i].item())
            )
    return (p + 1 - p.T) / 2


def read_reference(path, count, option="--reference"):
    """log pi_ref [count] from a file of probabilities, uniform for None. Raises ValueError if it is no law with full support."""
    if path is None:
        return torch.zeros(count, dtype=torch.float64).log_softmax(0)
    q = read_numbers(path, option).flatten()
    if len(q) != count:
        raise ValueError(f"{option} {path}: {len(q)} probabilities for a game of {count} actions")
    worst = int(torch.where(q.isfinite(), q, -math.inf).argmin())
    if not 0 < q[worst] < math.inf:
        raise ValueError(
            f"{option} {path}: entry {worst + 1} is {q[worst]:g}: give every action more than 0, or leave it out"
        )
    if abs(q.sum().item() - 1) > 1e-6:
        raise ValueError(
            f"{option} {path}: sums to {q.sum().item():.9g}: divide the probabilities by their sum"
        )
    return (q / q.sum()).log()


def print_game(name, preferences, log_ref, tau, beta, policies=False):
    """Runs every method on one game and prints a row each, and with policies what each ended at. Returns method -> path."""
    nash, paths = fixed_point(preferences, log_ref, tau), {}
    print(f"\n{name} ({len(log_ref)} actions), tau = {tau:g}, beta = {beta:g}")
    print(
        f"{'method':<18}{'TV to its own':>14}{'TV to Nash':>12}{'duality gap':>13}{'steps':>8}{'seconds':>9}"
    )
    for method, predicted, path, seconds in run_methods(preferences, log_ref, tau, beta):
        own = "-" if predicted is None else f"{total_variation(path[-1], predicted):.1e}"
        gap = duality_gap(path[-1], preferences, log_ref, tau).clamp(
            min=0
        )  # rounding may leave -1e-16
        print(
            f"{method:<18}{own:>14}{total_variation(path[-1], nash):>12.1e}{gap:>13.1e}{len(path) - 1:>8}{seconds:>9.2f}",
            flush=True,
        )
        paths[method] = path
    if policies:
        print("policy")
        for method, path in (
            {"reference": log_ref[None], "Nash equilibrium": nash[None]} | paths
        ).items():
            print(f"{method:<18}", " ".join(f"{p:.6f}" for p in path[-1].exp().tolist()))
    return paths


def draw_gaps(preferences, log_ref, tau, paths, title, folder):
    """Writes duality_gap.png: the gap of every path over its steps, both scales logarithmic."""
    from matplotlib.figure import Figure  # here: the solvers need no matplotlib

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axis = figure.subplots()
    lines = [
        "-",
        "--",
        "-.",
        ":",
        (0, (1, 4)),
        (0, (6, 2, 1, 2, 1, 2)),
        (0, (8, 3)),
        (0, (3, 1, 1, 1)),
        (0, (2, 1)),
    ]
    for index, (method, path) in enumerate(paths.items()):
        gap = duality_gap(path, preferences, log_ref, tau).clamp(min=1e-15)  # below is rounding
        marks = sorted(
            {min(int(1.9 ** (k + index / 9)), len(gap) - 1) for k in range(16)}
        )  # apart, where lines coincide
        axis.loglog(
            range(1, len(gap) + 1),
            gap,
            ls=lines[index],
            marker="osD^vXP*d"[index],
            markevery=marks,
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


def draw_simplex(preferences, log_ref, tau, title, folder):
    """Writes fig6.png, the form of the paper's Figure 6: gradient descent on the logits of a three-action game."""
    from matplotlib.figure import Figure

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    starts = (0.05 + 0.85 * torch.eye(3, dtype=torch.float64)).log()
    data = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    panels = [
        ("offline IPO, data (0.6, 0.3, 0.1)", ipo_md, 1.0, lambda *_: data),
        ("online IPO", ipo, 0.0, mixture),
    ]
    panels += [(f"IPO-MD, beta = {beta:g}", ipo_md, beta, mixture) for beta in (0.25, 0.75)]
    panels += [(f"Nash-MD-PG, beta = {beta:g}", nash_md, beta, mixture) for beta in (0.25, 0.75)]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    nash = fixed_point(preferences, log_ref, tau)
    for axis, (name, method, beta, law) in zip(axes.flat, panels, strict=True):
        path = (
            descend(
                method,
                preferences,
                log_ref,
                tau,
                beta,
                law,
                rate=1.0,
                steps=2000,
                start=starts,
                natural=False,
            ).exp()
            @ corners
        )
        axis.fill(*corners.T, fill=False, edgecolor="grey")
        for trajectory, line in zip(path.unbind(1), ("-", "--", ":"), strict=True):
            axis.plot(*trajectory.T, line, linewidth=1.3)
            axis.plot(*trajectory[0], "ko", markersize=4)
        axis.plot(
            *(nash.exp() @ corners),
            "k*",
            markersize=13,
            markerfacecolor="none",
            label="Nash equilibrium",
        )
        axis.plot(
            *(fixed_point(preferences, log_ref, tau, beta, law).exp() @ corners),
            "kx",
            label="the method's fixed point",
        )
        for action, corner in enumerate(corners, 1):
            axis.annotate(
                f"action {action}",
                corner,
                ha="center",
                va="bottom" if action == 3 else "top",
                fontsize=8,
            )
        axis.set(title=name, aspect="equal")
        axis.axis("off")
    figure.suptitle(
        f"{title}, tau = {tau:g}: exact gradient descent on the logits from three starts (dots)"
    )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(os.path.join(folder, "fig6.png"), dpi=130)


def main(argv=None):
    """The command line. Returns the exit status; bad input exits with 2 and one line."""
    parser = argparse.ArgumentParser(
        description="Preference games, solved and learned. Without options: the table and pictures."
    )
    parser.add_argument(
        "--check", action="store_true", help="check the paper's claims on random games instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random games (default 0)")
    parser.add_argument(
        "--games", type=int, default=50, help="random games for each claim of --check (default 50)"
    )
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
    parser.error = lambda message: parser.exit(
        2, f"bandit.py: error: {message}\n"
    )  # one line, without the usage
    options = parser.parse_args(argv)
    for option, wrong, advice in (
        ("--tau", not 0 < options.tau < math.inf, "give a number above 0"),
        (
            "--beta",
            not 0 <= options.beta < 1,
            "give at least 0 and below 1; 1 is offline IPO, which is in every table",
        ),
        ("--games", options.games < 1, "give at least 1"),
        ("--seed", not 0 <= options.seed < 2**63, "give 0 or more, below 2^63"),
        (
            "--reference",
            options.reference and not options.preferences,
            "is for a game of your own: give --preferences too",
        ),
    ):
        if wrong:
            parser.error(f"{option} {getattr(options, option[2:])}: {advice}")
    if options.check:
        import claims  # here: it imports this file

        return claims.check(options.seed, options.games)
    folder, title = options.out or "results", "cyclic game, p = 0.9, uniform reference"
    triangle = cycle(0.4), read_reference(None, 3)
    try:
        if options.preferences:
            title = os.path.basename(options.preferences)
            folder = options.out or os.path.join(folder, os.path.splitext(title)[0])
            preferences = read_preferences(options.preferences)
            triangle = preferences, read_reference(options.reference, len(preferences))
        os.makedirs(folder, exist_ok=True)
        named = {title: triangle} if options.preferences else games(options.seed)
        paths = [
            print_game(name, *game, options.tau, options.beta, bool(options.preferences))
            for name, game in named.items()
        ]
        name, game = next(iter(named.items()))
        draw_gaps(*game, options.tau, paths[0], name, folder)
        if len(triangle[1]) == 3:
            draw_simplex(*triangle, options.tau, title, folder)
        print(
            "\n-: SLiC's hinge pulls only beyond its kinks, so more than two actions may circle; DPO may have no finite point"
        )
        print(
            f"pictures: {os.path.join(folder, 'duality_gap.png')}",
            "and fig6.png" if len(triangle[1]) == 3 else "",
        )
    except (ValueError, OSError) as error:
        parser.error(
            str(error) if isinstance(error, ValueError) else f"--out {folder}: {error.strerror}"
        )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    raise SystemExit(main())
