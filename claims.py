"""The paper's claims that a finite game can decide, each on random games in float64: python bandit.py --check.

A line a claim: its name in the paper (arXiv 2403.08635; NLHF is arXiv 2312.00886), what was compared, how many times, the
worst value, its limit, the verdict. Gradients are autograd's through the losses, fixed points the solver's, closed forms
are written out here. Games have 3 to 8 actions, a cycle and a random reference, tau 0.05 to 2, beta 0.05 to 0.95, unless
a line says otherwise. Left out: tokens (tests/enumerated.py: the per-token mixture, a transformer), and experiments.
Every claim is a generator of rows; it takes games, a list of problems, and a torch generator for more random numbers.
Run: python bandit.py --check [--seed 0] [--games 50]
"""

import math
import time
from types import SimpleNamespace

import torch

import bandit
import dpo
import ipo
import ipo_md
import nash_md
from bandit import (
    duality_gap,
    fixed_point,
    gradient,
    kl,
    nash_md_path,
    respond,
    total_variation,
    win_rate,
)
from ipo_md import mixture

UNIFORM = torch.zeros(3, dtype=torch.float64).log_softmax(0)
BIASED = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()


def problem(generator, size=None):
    """A random game: p, ref, tau, beta; a policy pi and data mu that solve nothing; nash (eq 12) and shifted (eq 13)."""
    size = size or int(torch.randint(3, 9, (), generator=generator))
    p, ref = bandit.random_game(size, generator)
    u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    tau, beta = 0.05 * 40**u, 0.05 + 0.9 * v
    pi, mu = torch.randn(2, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    ends = dict(nash=fixed_point(p, ref, tau), shifted=fixed_point(p, ref, tau, beta))
    return SimpleNamespace(p=p, ref=ref, tau=tau, beta=beta, pi=pi, mu=mu, **ends)


def row(name, what, values, sense, limit):
    """A line of the table: the largest of values (sense <=), the smallest (>=) or the median (median >=): it is *not* zero."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
    return (
        name,
        what,
        len(values),
        {"<=": values.max(), ">=": values.min(), "median >=": values.median()}[sense].item(),
        sense,
        limit,
    )


def apart(value, wanted):
    """The largest difference over the largest wanted entry."""
    return (value - wanted).abs().max() / wanted.abs().max()


def exact(method, g, log_pi=None, beta=0.0, law=mixture):
    """The exact gradient of a method on the logits, at g.pi unless log_pi is given, [n]."""
    return gradient(method, g.pi if log_pi is None else log_pi, g.ref, g.p, g.tau, beta, law)


def stillness(method, g, log_pi, beta=0.0, law=mixture):
    """How far log_pi is from stationary: the largest gradient over pi, in units of preference probability."""
    unit = {ipo: g.tau / 4, ipo_md: g.tau / 4, dpo: 1 / (2 * g.tau)}.get(method, 1.0)
    return (unit * exact(method, g, log_pi, beta, law) / log_pi.exp()).abs().max()


def descent(method, g, beta=0.0, start=None):
    """Where exact gradients lead, [n]; the rate is safe for every game: none turns faster than 1/2."""
    return bandit.descend(
        method, g.p, g.ref, g.tau, beta, rate=g.tau / (g.tau**2 + 0.25), start=start
    )[-1]


def scores(log_pi):
    """grad log pi(y) on the logits, a row an action: one-hot minus pi, [n, n]."""
    return torch.eye(len(log_pi), dtype=torch.float64) - log_pi.exp()


def f(g):
    """App. D's f(y, y') = p(y > y') - 1/2 - tau h(y, y') at g.pi, [n, n]."""
    return g.p - 0.5 - g.tau * ipo.log_ratio_gap(g.pi[:, None], g.pi, g.ref[:, None], g.ref)


def pair_gradients(method, g):
    """The gradient of method.loss on the logits for each pair (y, y') by autograd, [n, n, n]."""

    def pairs(logits):
        pi = logits.log_softmax(0)
        return method.loss(
            pi[:, None], pi[None], g.ref[:, None], g.ref[None], g.p, g.tau
        ).expand_as(g.p)

    return torch.func.jacrev(pairs)(g.pi)


def online_ipo(games, generator):
    identity, self_play, expanded, each = [], [], [], []
    for g in games:
        weight, play = (g.pi[:, None] + g.pi).exp(), exact(nash_md, g)
        difference = scores(g.pi)[:, None] - scores(g.pi)
        identity.append(apart(pair_gradients(ipo, g), -2 / g.tau * f(g)[..., None] * difference))
        self_play.append(apart(exact(ipo, g), 4 / g.tau * play))
        each.append(
            apart(
                exact(ipo, g),
                2 / g.tau * ((weight * f(g)).sum(0) - (weight * f(g)).sum(1)) @ scores(g.pi),
            )
        )
        logits = g.pi.clone().requires_grad_()  # their normaliser cancels in h
        h = ipo.log_ratio_gap(logits[:, None], logits, g.ref[:, None], g.ref)
        expectation = (weight * (g.tau * h**2 - (2 * g.p - 1) * h)).sum()
        expanded.append(apart(torch.autograd.grad(expectation, logits)[0], 4 * play))
    yield row(
        "Pair identity",
        "grad of a pair's loss = -(2/tau) (p - 1/2 - tau h) (score(y) - score(y'))",
        identity,
        "<=",
        1e-11,
    )
    yield row(
        "Prop 4.1",
        "online IPO's gradient at the solved Nash point",
        [stillness(ipo, g, g.nash) for g in games],
        "<=",
        1e-10,
    )
    ends = [total_variation(descent(ipo, g, start=g.pi), g.nash) for g in games[:10]]
    yield row(
        "Prop 4.1", "descent on online IPO from a random policy: TV to Nash", ends, "<=", 1e-8
    )
    yield row(
        "Prop 4.2", "squared loss (eq 11): grad = 4/tau x self-play's", self_play, "<=", 1e-11
    )
    yield row("Prop 4.2", "per pair (App. D): grad = 2/tau x E[X1 + X2]", each, "<=", 1e-11)
    yield row(
        "Prop 4.2",
        "expanded tau h^2 - (2p - 1) h: grad = 4 x self-play's, no tau",
        expanded,
        "<=",
        1e-11,
    )


def mixtures(games, generator):
    both = [stillness(method, g, g.shifted, g.beta) for g in games for method in (ipo_md, nash_md)]
    yield row("Eq 13", "IPO-MD's and Nash-MD-PG's gradients at the solved point", both, "<=", 1e-9)
    ends = [
        total_variation(descent(method, g, g.beta), g.shifted)
        for g in games[:5]
        for method in (ipo_md, nash_md)
    ]
    yield row("Eq 13", "descent on IPO-MD and on Nash-MD-PG: TV to it", ends, "<=", 1e-8)
    angles, pair, centred, natural, field, size = [], [], [], [], [], []
    for g in games:
        m, wanted, other = (
            mixture(g.pi, g.ref, g.beta).exp(),
            exact(ipo_md, g, beta=g.beta),
            exact(nash_md, g, beta=g.beta),
        )
        angles.append(1 - torch.cosine_similarity(wanted, other, 0))
        pair.append(apart(-4 / g.tau * (m[:, None] * m * f(g)).sum(1) @ scores(g.pi), wanted))
        advantage = win_rate(g.p, m.log()) - 0.5 - g.tau * (g.pi - g.ref)
        safe = (m * (advantage - m @ advantage)) @ scores(g.pi)
        naive = (m * advantage) @ scores(g.pi)  # the mean score under m is m - pi, not 0
        centred.append(apart(-4 / g.tau * safe, wanted))
        field.append((safe - naive - g.tau * (m @ (g.pi - g.ref)) * (m - g.pi.exp())).abs().max())
        size.append((naive - safe).norm() / safe.norm())
        steps = g.tau / 4 * wanted / m, other / g.pi.exp()
        natural.append(apart(*(step - step.mean() for step in steps)))
    yield row("Prop 5.1", "same point, different gradients: 1 - cosine", angles, "median >=", 1e-4)
    yield row("Prop 5.1", "pair form: grad = -(4/tau) E_m score(y) f(y, y')", pair, "<=", 1e-11)
    yield row(
        "Prop 5.1", "one-sided form with its advantage A centred: A - E_m A", centred, "<=", 1e-11
    )
    yield row(
        "Prop 5.1",
        "care: A uncentred differs by exactly tau E_m[log pi/pi_ref] (m - pi)",
        field,
        "<=",
        1e-13,
    )
    yield row("Prop 5.1", "care: and that is, relative to the gradient", size, "median >=", 1e-4)
    yield row(
        "Prop 5.1",
        "ours: each divided by its law of y, the two are one field (up to a constant)",
        natural,
        "<=",
        1e-10,
    )
    mixed = [
        (mixture(g.shifted, g.ref, g.beta) - fixed_point(g.p, g.ref, g.tau / (1 - g.beta)))
        .abs()
        .max()
        for g in games
    ]
    yield row(
        "Prop 5.2",
        "mixture of the eq-13 point = Nash at tau/(1 - beta), in nats",
        mixed,
        "<=",
        1e-8,
    )


def offline(games, generator):
    stop = [respond(g.p, g.ref, g.tau, g.mu) for g in games]
    still = [stillness(ipo_md, g, q, law=lambda *_: g.mu) for g, q in zip(games, stop)]
    yield row(
        "Offline IPO",
        "gradient at pi_ref exp(p(. > mu)/tau), mu the data's law",
        still,
        "<=",
        1e-11,
    )
    yield row(
        "Offline IPO",
        "so it depends on mu: TV to Nash",
        [total_variation(q, g.nash) for g, q in zip(games, stop)],
        "median >=",
        1e-3,
    )
    weak, wanted = (
        bandit.cycle(1 / 18),
        torch.tensor([0.36564, 0.24783, 0.38653], dtype=torch.float64),
    )
    example = [
        respond(weak, UNIFORM, 0.1, BIASED).exp() - wanted,
        fixed_point(weak, UNIFORM, 0.1).exp() - 1 / 3,
    ]
    yield row(
        "Offline IPO",
        "cycle of 5/9, mu (.6, .3, .1): (.36564, .24783, .38653); Nash is uniform",
        [q.abs().max() for q in example],
        "<=",
        5e-6,
    )
    still = []
    for g in (
        games
    ):  # data show actions 1 and 2 only: the log-ratio of any other is free, here 0 and then 3 nats
        mu = torch.cat([g.mu[:2].log_softmax(0), torch.full((len(g.mu) - 2,), -math.inf)])
        for method, h in ((dpo, torch.logit(g.p[0, 1]) / g.tau), (ipo, (g.p[0, 1] - 0.5) / g.tau)):
            method = SimpleNamespace(PAIR=ipo_md.PAIR, loss=method.loss)  # pairs from mu
            for free in (0.0, 3.0):
                ratio = torch.tensor([h, 0.0] + [free] * (len(mu) - 2), dtype=torch.float64)
                still.append(
                    exact(method, g, (g.ref + ratio).log_softmax(0), law=lambda *_: mu).abs().max()
                )
    yield row(
        "F.9",
        "mu without mass on an action: offline DPO and IPO still at two policies",
        still,
        "<=",
        1e-11,
    )


def variance(games, generator):
    def total(weight, estimates):  # the trace of the covariance, by enumeration of the pairs
        mean = (weight[..., None] * estimates).sum((0, 1))
        return (weight[..., None] * estimates**2).sum() - mean @ mean

    def three(g):  # of (X1 + X2)/2, of X1, of Nash-MD-PG's own one-sample estimator
        weight = (g.pi[:, None] + g.pi).exp()
        one_sided = -scores(g.pi)[:, None] * f(g)[..., None]
        return [
            total(weight, q)
            for q in (g.tau / 4 * pair_gradients(ipo, g), one_sided, pair_gradients(nash_md, g))
        ]

    above = [contrastive / x1 - 1 for contrastive, x1, _ in map(three, games)]
    yield row(
        "App. D",
        "variance of (X1 + X2)/2 over X1's, less 1: never above 0 (Cauchy-Schwarz)",
        above,
        "<=",
        1e-12,
    )
    two = three(
        SimpleNamespace(
            p=bandit.cycle(0.2)[:2, :2], ref=UNIFORM[:2], pi=UNIFORM[:2].log_softmax(0), tau=1.0
        )
    )
    yield row(
        "App. D",
        "two uniform actions, p = 0.7: 0.0025",
        [(q / 2 - 0.0025).abs() for q in two[:2]],
        "<=",
        1e-15,
    )
    share, many = (
        [],
        games + [problem(generator) for _ in range(50 - len(games))],
    )  # a share needs some games
    for tau in (0.01, 0.1, 0.5, 2.0):
        both = [three(SimpleNamespace(**vars(g) | dict(tau=tau))) for g in many]
        share.append(sum(bool(contrastive > own) for contrastive, _, own in both) / len(many))
    text = (
        "care: above Nash-MD-PG's own in "
        + ", ".join(f"{part:.0%}" for part in share)
        + " at tau 0.01, 0.1, 0.5, 2"
    )
    yield row("App. D", text, [share[-1] - share[0]], ">=", 0.1)


def online_dpo(games, generator):
    def gap(p, pi):  # F.5's two sides, p(y > pi) - sum_y' pi(y') sigmoid(p(y > pi) - p(y' > pi))
        rate = win_rate(p, pi)
        return rate - bandit.bradley_terry(rate) @ pi.exp()

    formula = [
        apart(exact(dpo, g, g.nash), -2 * g.tau * g.nash.exp() * gap(g.p, g.nash)) for g in games
    ]
    yield row(
        "F.5",
        "online DPO's gradient at Nash = -2 tau pi (p(y > pi) - sum pi(y') sigmoid(...))",
        formula,
        "<=",
        1e-8,
    )
    yield row(
        "F.5",
        "so Nash is not stationary: |gradient|/(2 tau pi)",
        [stillness(dpo, g, g.nash) for g in games],
        ">=",
        1e-4,
    )
    two, even = [], []
    for g in games:
        lead = (0.05 + 0.4 * g.pi[0].exp()) * (g.p[0, 1] - 0.5).sign()
        for gap_size in (lead, 0 * lead):
            p = 0.5 + gap_size * torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
            pair = SimpleNamespace(p=p, ref=g.ref[:2].log_softmax(0), tau=g.tau)
            nash = fixed_point(pair.p, pair.ref, g.tau)
            slope = exact(dpo, pair, nash)[0].abs() / (2 * g.tau * nash.sum().exp())
            (two if gap_size else even).append(slope / gap_size.abs() if gap_size else slope)
    yield row(
        "F.6",
        "two actions: |gradient|/(2 tau pi1 pi2 |p - 1/2|) at Nash, at least 3/4",
        two,
        ">=",
        0.75,
    )
    yield row("F.6", "two actions, p = 1/2: the gradient is 0", even, "<=", 1e-12)
    still = [
        stillness(
            dpo,
            SimpleNamespace(**vars(g) | dict(p=bandit.bradley_terry(g.mu))),
            bandit.rlhf_policy(g.mu, g.ref, g.tau),
        )
        for g in games
    ]
    yield row(
        "F.7", "Bradley-Terry game: gradient of online DPO at the RLHF policy", still, "<=", 1e-11
    )
    wide = [
        SimpleNamespace(p=bandit.cycle(0.4), ref=UNIFORM, tau=0.1)
    ]  # the paper's rock-paper-scissors
    for g in games:  # Q B Q^T with Q = 1 - 1 pi_ref^T is antisymmetric and takes pi_ref to 0
        skew = (project := scores(g.ref)) @ (g.p - 0.5) @ project.T
        wide.append(SimpleNamespace(p=0.5 + skew / skew.abs().max() / 2, ref=g.ref, tau=g.tau))
    still = [stillness(dpo, g, fixed_point(g.p, g.ref, g.tau)) for g in wide]
    yield row(
        "F.8",
        "rock-paper-scissors, uniform pi_ref, and wider (ours) p(y > pi_ref) = 1/2: Nash stands",
        still,
        "<=",
        1e-9,
    )


def tabular_nash_md(games, generator):
    bound, step = [], []
    for g in games:
        distance = kl(g.nash, nash_md_path(g.p, g.ref, g.tau, 200))
        t = torch.arange(201, dtype=torch.float64)
        bound.append((distance * g.tau**2 * (t + 1) / 8)[1:].max())
        eta = 2 / (g.tau * (t[:-1] + 2))
        step.append((distance[1:] - (1 - eta * g.tau) * distance[:-1] - 2 * eta**2).max())
    yield row(
        "NLHF Thm 1",
        "KL(nash, pi_T) over its bound 8/(tau^2 (T + 1)), T = 1..200",
        bound,
        "<=",
        1.0,
    )
    yield row("NLHF Thm 1", "one step: KL_next - (1 - eta tau) KL - 2 eta^2", step, "<=", 1e-12)
    ref = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    path = nash_md_path(bandit.cycle(0.4), ref, 1.0, 2).exp()
    # By hand: p(. > ref) = (.5, .4, .6); the second opponent is ref e^(p/3)/Z, since eta tau = 2/3 leaves a third of step 1.
    wins = torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64)
    opponent = (ref + wins / 3).softmax(0)
    second = (opponent.log() + 2 / 3 * bandit.cycle(0.4) @ opponent).softmax(0)
    hand = [(path[1] - (ref + wins).softmax(0)).abs().max(), (path[2] - second).abs().max()]
    yield row(
        "NLHF Thm 1", "care: the bound passes wrong programs; two steps by hand", hand, "<=", 1e-12
    )
    path = nash_md_path(bandit.cycle(0.4), BIASED, 0.1, 3000)
    yield row(
        "NLHF Thm 1",
        "KL(nash, pi_3000) on the cycle",
        [kl(fixed_point(bandit.cycle(0.4), BIASED, 0.1), path[-1])],
        "<=",
        1e-6,
    )
    ends = []
    for g in games:
        eta = g.tau / (g.tau**2 + 0.25)
        end = nash_md_path(g.p, g.ref, g.tau, int(40 / (eta * g.tau)) + 50, eta)[-1]
        ends.append(total_variation(end, fixed_point(g.p, g.ref, g.tau, eta * g.tau)))
    yield row(
        "Nash-MD",
        "care: at a constant step eta it stops at eq 13 with beta = eta tau: TV",
        ends,
        "<=",
        1e-9,
    )


def equilibria(games, generator):
    def residual(g, tau, beta):
        pi = fixed_point(g.p, g.ref, tau, beta)
        return (pi - respond(g.p, g.ref, tau, mixture(pi, g.ref, beta))).abs().max()

    some = games[:10] + [problem(generator, size) for size in (50, 100, 200)]
    solved = [
        residual(g, tau, beta)
        for g in some
        for tau in (0.01, 0.1, 1.0, 10.0)
        for beta in (0.0, 0.5)
    ]
    yield row(
        "Eq 12, 13",
        "residual of the solver, tau 0.01 to 10, up to 200 actions, in nats",
        solved,
        "<=",
        1e-10,
    )
    two, limit, above, best = [], [], [], []
    for g in games:
        pi = fixed_point(g.p[:2, :2], g.ref[:2], g.tau / 5, g.beta)
        two.append((pi[0] - pi[1] - (g.ref[0] - g.ref[1]) - (g.p[0, 1] - 0.5) / (g.tau / 5)).abs())
        a, b, c = (0.1 + 0.4 * g.pi[:3].exp()).tolist()  # margins of 1 over 2, 2 over 3, 3 over 1
        margins = torch.tensor([[0, a, -c], [-a, 0, b], [c, -b, 0]], dtype=torch.float64)
        pi = fixed_point(0.5 + margins, g.ref[:3].log_softmax(0), 1e-5, tolerance=1e-9)
        limit.append(
            total_variation(pi, (torch.tensor([b, c, a], dtype=torch.float64) / (a + b + c)).log())
        )

        def value(log_pi, other):  # the game's payoff to log_pi
            return (
                log_pi.exp() @ g.p @ other.exp()
                - g.tau * kl(log_pi, g.ref)
                + g.tau * kl(other, g.ref)
            )

        gap = duality_gap(g.pi, g.p, g.ref, g.tau)
        best.append((2 * value(respond(g.p, g.ref, g.tau, g.pi), g.pi) - 1 - gap).abs())
        rivals = torch.randn(100, len(g.ref), generator=generator, dtype=torch.float64).log_softmax(
            1
        )
        above.extend(2 * value(rival, g.pi) - 1 - gap for rival in rivals)
    yield row(
        "Two actions",
        "care: log(pi1/pi2) = log(ref1/ref2) + (p - 1/2)/tau, whatever beta is",
        two,
        "<=",
        1e-9,
    )
    yield row(
        "tau -> 0",
        "rock-paper-scissors, margins a, b, c, tau = 1e-5: TV to (b, c, a)/(a + b + c)",
        limit,
        "<=",
        1e-3,
    )
    yield row(
        "Duality gap", "closed form - the best response's payoff, by definition", best, "<=", 1e-12
    )
    yield row("Duality gap", "no random policy gains more", above, "<=", 1e-12)
    yield row(
        "Duality gap",
        "at the solved Nash point",
        [duality_gap(g.nash, g.p, g.ref, g.tau).abs() for g in games],
        "<=",
        1e-11,
    )


def adam(games, generator):
    game = bandit.cycle(0.4), BIASED, 0.1
    nash = fixed_point(*game)
    for momentum, what, sense, limit in (
        (0.9, "orbits", ">=", 0.05),
        (0.0, "rests for a time", "<=", 1e-8),
    ):  # not for good: THEORY.md
        logits = torch.nn.Parameter(BIASED.clone())
        optimiser, tail = torch.optim.Adam([logits], lr=0.03, betas=(momentum, 0.999)), []
        for _ in range(2000):
            logits.grad = gradient(ipo, logits.log_softmax(0), BIASED, bandit.cycle(0.4), 0.1)
            optimiser.step()
            tail.append(total_variation(logits.detach().log_softmax(0), nash))
        yield row(
            "Adam",
            f"care: beta1 = {momentum:g} {what} on the cycle: TV to Nash, last 500 of 2,000 steps",
            tail[1500:],
            sense,
            limit,
        )
    end = bandit.descend(ipo, *game, rate=1.0, steps=2000, natural=False)[-1]
    yield row(
        "Adam", "plain gradient descent arrives and stays", [total_variation(end, nash)], "<=", 1e-8
    )


CLAIMS = (online_ipo, mixtures, offline, variance, online_dpo, tabular_nash_md, equilibria, adam)


def check(seed, count):
    """Prints every row over count random games. Returns 1 if a claim fails, else 0; seeds change errors, not verdicts."""
    start, generator, failed = time.perf_counter(), torch.Generator().manual_seed(seed), 0
    games = [problem(generator) for _ in range(count)]
    print(f"{'claim':<14}{'what was compared':<83}{'cases':>5}{'worst':>10}  {'limit':<18}verdict")
    for claim in CLAIMS:
        for name, what, number, value, sense, limit in claim(games, generator):
            holds = value <= limit if sense == "<=" else value >= limit  # NaN fails both
            failed += not holds
            print(
                f"{name:<14}{what:<83}{number:>5}{value:>10.1e}  {f'{sense} {limit:g}':<18}{'holds' if holds else 'FAILS'}",
                flush=True,
            )
    print(f"{failed} failed; seed {seed}, {count} games, {time.perf_counter() - start:.0f} s")
    return int(failed > 0)
