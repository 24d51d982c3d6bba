"""The paper's Figures 1 to 5 in form, on the built-in task, and the frontier of win rate over KL.

Sweeps of tau, steps and beta; a picture and its numbers for each. Every run has seed 0. Figure 6,
which needs no run, is bandit.py's.
Run: python -m studies.figures --scale smoke               (all of them)
     python -m studies.figures fig1 fig2 --from-results    (two, from the lines of results/ alone)
"""

import sys

import job  # before torch: it sets how torch's threads wait

# isort: split
import numpy as np
import torch

import data
import job.options
import policy as policies
import sampler
from studies import runs, table2

BETAS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # of fig5


@torch.no_grad()
def preference_variance(todo):
    """The line of Var p(y > SFT) over SFT's responses y, mean over prompts."""
    there = todo["where"]
    count = there["prompts"]
    task = data.BuiltIn()
    prompt = task.prompts("validation", 0, count)
    ids, mask, _ = sampler.sample(
        runs.load_policy(there, "SFT"),
        None,
        prompt,
        (0.0,) * 16,
        data.generator(0, "variance", 0),
        task.max_response,
    )
    drawn = policies.Tokens(ids, mask)
    responses = []
    for begin in range(0, 16 * count, count):  # all first responses, then all second ones
        responses.append(drawn.rows(slice(begin, begin + count)))
    p = torch.empty(8, 8, count)  # the first eight against the last eight
    for row, y in enumerate(responses[:8]):
        for column, y_other in enumerate(responses[8:]):
            p[row, column] = task.judge(prompt, y, y_other)
    # A mean over few opponents is noisy, and its variance too large by that noise. Two sets of
    # opponents have independent noise: the covariance of their means, [8, count] each, has none.
    one = p[:, :4].mean(1)
    two = p[:, 4:].mean(1)
    products = (one - one.mean(0)) * (two - two.mean(0))
    # 7, not 8: their means are estimated, too.
    return dict(name=todo["name"], variance=products.sum(0).mean().item() / 7)


def fig1(study):
    """Figure 1: online IPO's win rate against RL falls faster with tau than DPO's.

    Beside them the limit of large tau. The equilibrium is pi_ref exp(p(y > pi)/tau)/Z, so that to
    first order in 1/tau it beats the reference with probability 1/2 + Var p(y > SFT)/tau.
    """
    _, rival = table2.choose(study)
    series = {}
    for loss, lines in runs.sweep(study, ("ipo", "dpo")).items():
        series[runs.NAMES[loss]] = (
            runs.column(lines, "tau"),
            runs.win_rates(study, lines, rival),
        )
    name = f"variance on {study.prompts} prompts"
    todo = dict(name=name, where=runs.where(study, study.prompts))
    variance = runs.gather(study, preference_variance, [todo])[0]["variance"]
    taus, _ = series["IPO"]
    series["1/2 + Var/tau (over SFT)"] = taus, np.minimum(1.0, 0.5 + variance / taus)
    runs.plot(study, "fig1", [("win rate against RL", "tau", "p (panel)", series)])


def fig2(study):
    """Figure 2: online IPO's win rate over its steps; stronger regularisation ends lower."""
    series = {}
    for line in runs.sweep(study, ["ipo"])["ipo"]:
        steps = runs.column(line["curve"], "step")
        wins = runs.column(line["curve"], "win_rate")
        series[f"tau = {line['tau']:g}"] = steps, wins
    title = "online IPO against SFT, 100 prompts"
    runs.plot(study, "fig2", [(title, "step", "p (panel)", series)])


def fig3(study):
    """Figure 3: online learning is above offline learning at every tau, against RL."""
    _, rival = table2.choose(study)
    online_and_offline(study, "fig3", "RL", rival)


def fig4(study):
    """Figure 4: as Figure 3, against SFT."""
    online_and_offline(study, "fig4", "SFT", "SFT")


def online_and_offline(study, name, rival_name, rival):
    """Win rates over tau of the methods that may learn from recorded pairs, online and offline."""
    series = {}
    for offline in (False, True):
        mode = "offline" if offline else "online"
        for loss, lines in runs.sweep(study, offline_losses(), offline).items():
            series[f"{runs.NAMES[loss]} {mode}"] = (
                runs.column(lines, "tau"),
                runs.win_rates(study, lines, rival),
            )
    title = f"win rate against {rival_name}"
    runs.plot(study, name, [(title, "tau", "p (panel)", series)])


def offline_losses():
    """The methods of the paper that may learn from recorded pairs."""
    return [loss for loss in runs.NAMES if job.options.find_method(loss).OFFLINE]


def beta_cells(study, tau):
    """Figure 5's runs."""
    return [runs.cell(study, "ipo_md", tau, beta) for beta in BETAS]


def fig5(study):
    """Figure 5: IPO-MD's win rate against RL over beta.

    beta = 0 is online IPO; at beta = 1 both responses are the reference's, which is offline IPO.
    """
    chosen, rival = table2.choose(study)
    tau = chosen["ipo_md"].run["tau"]
    lines = runs.gather(study, runs.run_cell, beta_cells(study, tau))
    wins = runs.win_rates(study, lines, rival)
    series = {"IPO-MD": (runs.column(lines, "beta"), wins)}
    title = f"IPO-MD against RL, tau = {tau:g}"
    runs.plot(study, "fig5", [(title, "beta", "p (panel)", series)])


def frontier(study):
    """Not in the paper: win rate against SFT over KL to it, the ends of the online sweeps' runs.

    A method that buys more win rate for its KL lies above the others, under both judges.
    """
    points = {}
    for loss, lines in runs.sweep(study, list(runs.NAMES)).items():
        points[loss] = [line["points"][-1] for line in lines]
    panels = []
    for judge, title in (("win_rate", "panel"), ("learned", "learned model")):
        series = {}
        for loss, lines in points.items():
            kl = runs.column(lines, "kl")
            series[runs.NAMES[loss]] = kl, runs.column(lines, judge)
        panels.append((f"win rate against SFT, {title}", "KL to SFT (nats)", "p", series))
    runs.plot(study, "frontier", panels)


PARTS = dict(fig1=fig1, fig2=fig2, fig3=fig3, fig4=fig4, fig5=fig5, frontier=frontier)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.figures", __doc__, PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
