"""The paper's own taus: do length-averaged log-probabilities explain them?

The paper's taus (1 for IPO and IPO-MD, 5 for DPO, 10 for SLiC, 0.008 for Nash-MD-PG, 0.05 for RL)
fit no sum over a response's tokens. Here the four contrastive losses take means at these taus, the
other two sums, and every policy plays every other: does Table 2's order appear?
First, exactly: where averaged IPO stops on enumerated.py's GPT-2, whose responses are all counted.
Left out: more than one seed; a rate and a number of steps of its own for each.
Run: python -m studies.paper_scale                   (10 min on 2 cores)
     python -m studies.paper_scale enumerated        (some seconds)
     python -m studies.paper_scale --from-results    (the tables from the lines of results/ alone)
"""

import itertools
import sys

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
import numpy as np
import torch

import bandit
import enumerated
from studies import runs

# Of the paper's App. on hyper-parameters.
TAUS = {"ipo": 1.0, "ipo_md": 1.0, "dpo": 5.0, "nash_md": 0.008, "slic": 10.0, "rl": 0.05}
AVERAGED = ("ipo", "ipo_md", "dpo", "slic")
LENGTHS = torch.tensor([float(len(response)) for response in enumerated.RESPONSES]).double()


def averaged_residual(log_pi, preferences, log_ref, tau, lengths):
    """What must be 0 where the expected gradient of online IPO on length-averaged log-probabilities
    is, [n].

    The gradient on log pi(y) is pi(y)/|y| times d(y)/|y| - (p(y > pi) - 1/2)/tau less its mean over
    pi, less pi(y) times the sum of that: here divided by pi(y), and with the normalisation in it,
    which is 0 for a policy. Undivided, it is 0 at every policy of one response, too, and Newton's
    method ends there.
    """
    pi = log_pi.exp()
    away = (log_pi - log_ref) / lengths
    wanted = (bandit.win_rate(preferences, log_pi) - 0.5) / tau
    push = (away - (pi * away).sum() - wanted) / lengths
    return push - (pi * push).sum() + torch.logsumexp(log_pi, 0)


def averaged_point(preferences, log_ref, tau, lengths):
    """Where online IPO on means stops: pi_ref exp(|y| (p(y > pi)/tau + c)), c by sum pi = 1, [n].

    With sums there is no |y|, and c is -log Z: what wins by the same margin is moved in proportion
    to its length, as if each response had a tau of its own, tau/|y|. No game has this point as its
    regularised equilibrium. Raises ValueError where Newton finds none.
    """
    # Following the solution from a large tau down, as bandit.fixed_point does.
    point = log_ref
    for current in (*[tau * 2.0**power for power in range(6, 0, -1)], tau):

        def field(log_pi, current=current):
            return averaged_residual(log_pi, preferences, log_ref, current, lengths)

        point = bandit.newton(field, point)
        if point is None:
            raise ValueError(f"tau {tau:g}: Newton's method finds no point of averaged IPO")
    return point


def print_enumerated(_study):
    """Averaged IPO's point beside Nash at tau over the mean length, on the enumerated GPT-2."""
    w = enumerated.world(0)
    print("| tau of the means | mean length there | tau of sums | its length | TV of the two |")
    print("|---|---|---|---|---|")
    for tau in (0.1, 0.3, 1.0):
        rows = []
        for preferences, log_ref in zip(w.preferences, w.log_ref, strict=True):
            point = averaged_point(preferences, log_ref, tau, LENGTHS)
            length = (point.exp() * LENGTHS).sum()
            nash = bandit.fixed_point(preferences, log_ref, (tau / length).item())
            away = bandit.total_variation(point, nash)
            rows.append(torch.stack([length, tau / length, (nash.exp() * LENGTHS).sum(), away]))
        mean, sums, other, away = torch.stack(rows).mean(0).tolist()
        print(f"| {tau:g} | {mean:.3f} | {sums:.4f} | {other:.3f} | {away:.4f} |")


def cell(study, loss):
    """A run to do at the paper's tau, on means where AVERAGED says so."""
    todo = runs.cell(study, loss, TAUS[loss])
    if loss in AVERAGED:
        todo["argv"] += ["--length-average"]
    todo["name"] = f"paper scale: {loss}"
    return todo


def play(study):
    """The last policies of all methods against one another and SFT, and their lines."""
    lines = runs.gather(study, runs.run_cell, [cell(study, loss) for loss in TAUS])
    ends = {line["loss"]: runs.checkpoint(line) for line in lines}
    order = [*ends.values(), "SFT"]
    pairs = list(itertools.combinations(order, 2))
    found = runs.against(study, pairs, "test")
    wins = np.full((len(order), len(order)), 0.5)
    for (first, second), line in zip(pairs, found, strict=True):
        row, column = order.index(first), order.index(second)
        wins[row, column] = line["win_rate"]
        wins[column, row] = 1 - line["win_rate"]
    return lines, wins, max(line["win_rate_se"] for line in found)


def print_runs(study):
    """Each run's end, and the table of all against all."""
    lines, wins, se = play(study)
    print("| method | log-probabilities | tau | win rate over SFT (se) | KL | length |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        end = line["points"][-1]
        scored = "means" if line["loss"] in AVERAGED else "sums"
        rate = f"{end['win_rate']:.3f} ({end['win_rate_se']:.3f})"
        print(
            f"| {runs.NAMES[line['loss']]} | {scored} | {line['tau']:g} | {rate} "
            f"| {end['kl']:.2f} | {end['length']:.1f} |"
        )
    names = [runs.NAMES[line["loss"]] for line in lines]
    print()
    print(f"| panel | {' | '.join(names)} | SFT |")
    print("|---" * (len(names) + 2) + "|")
    for row, name in enumerate(names):
        print(f"| {name} | {' | '.join(f'{rate:.3f}' for rate in wins[row])} |")
    print(f"\nEach entry's standard error over the test prompts is at most {se:.3f}.")


PARTS = dict(enumerated=print_enumerated, runs=print_runs)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.paper_scale", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
