"""How exploitable is a policy by what training reaches? A responder is trained against it.

The policy stays as it is. A responder maximises p(y > policy | x) - tau KL to pi_ref under the
learned preference model, by the trainer itself (train.align) with RL's loss: the reward of y is its
preference over a fresh sample of the policy. It has the default's steps, and starts once from the
start and once from the policy. Its gain is the regularised payoff above the policy's own, half of
what it adds to the duality gap: 0 if no better response was found, which proves nothing.
Beside it, for the same policies, the bounds of any law over responses (equilibrium.py).
Run: python -m studies.responder                   (15 min on 2 cores)
     python -m studies.responder --from-results    (the table from the lines of results/ alone)
"""

import contextlib
import itertools
import sys
import time
from types import SimpleNamespace

import job  # before torch: it sets how torch's threads wait

# isort: split

import data
import evaluate
import job.options
import policy as policies
import preference_model
import rl
import sampler
import train
from studies import runs, same_tau

TAU = 0.1
LOSSES = ("ipo", "ipo_md", "rl")  # whose policies are played against


def against(policy, preference, most):
    """What RL's loss takes as its label: how much more often y beats the policy than y' does.

    policy:
        the fixed opponent.
    preference:
        p(y > y' | x), the learned model.
    most:
        tokens of a response.

    Returns label(prompt, y, y_other) -> p(y > z | x) - p(y' > z | x), z a new sample of the policy
    to each prompt, [B].
    """
    calls = itertools.count()

    def label(prompt, y, y_other):
        rng = data.generator(0, "opponent", next(calls))
        ids, mask, _ = sampler.sample(policy, None, prompt, 0.0, rng, most)
        rival = policies.Tokens(ids, mask)
        return preference(prompt, y, rival) - preference(prompt, y_other, rival)

    return label


def respond(todo):
    """Trains a responder. Returns its line: win rate over the policy, KLs, gain."""
    there, begun = todo["where"], time.process_time()
    learned = preference_model.load(there["shared"]["learned"])
    policy, start = runs.load_policy(there, todo["policy"]), runs.load_policy(there, "SFT")
    responder = runs.load_policy(there, todo["begins"])
    task = data.BuiltIn()
    options = job.options.parse([*todo["argv"], "--device", "cpu"])
    # align's clock, without files: a responder that is stopped begins anew.
    clock = SimpleNamespace(
        steps=lambda *_: range(options.steps),
        log=lambda *_: None,
        evidence=lambda *_: contextlib.nullcontext(),
    )
    label = against(policy, learned, task.max_response)
    train.align(clock, options, rl, task, responder, start, label, task.judge)
    given = learned, task, "validation", there["prompts"]
    versus, _ = evaluate.measure(responder, policy, *given)
    kl = evaluate.measure(responder, start, *given)[0]["kl"]
    policy_kl = evaluate.measure(policy, start, *given)[0]["kl"]
    win_rate, se = versus["win_rate"], versus["win_rate_se"]
    # Against itself a policy wins half, whatever the sample says.
    gain = win_rate - 0.5 - TAU * (kl - policy_kl)
    line = runs.line_of(todo)
    line |= dict(win_rate=win_rate, win_rate_se=se, kl=kl, policy_kl=policy_kl, gain=gain)
    return line | dict(tau=TAU, seconds=time.process_time() - begun)


def trained_cells(study):
    """The policies that are played against."""
    return [runs.cell(study, loss, TAU) for loss in LOSSES]


def cells(study):
    """What is to do: two responders to each policy, from the start and from the policy."""
    found = []
    for trained in trained_cells(study):
        policy = f"{trained['name']}/checkpoint-{trained['steps']:06d}"
        for begins in ("SFT", policy):
            argv = ["--loss", "rl", "--tau", str(TAU), "--steps", str(study.steps), *study.stages]
            name = f"responder to {policy} from {begins}"
            said = dict(policy=policy, begins=begins, steps=study.steps, argv=argv)
            found.append(dict(name=name, **said, where=runs.where(study, study.prompts)))
    return found


def responder(study):
    """The table: each policy, its bound of any law, and both responders' gains."""
    lines = runs.gather(study, runs.run_cell, trained_cells(study))
    laws = ("policy", "reference")  # whose responses the bound is over
    residuals = []
    for line in lines:
        given = study, runs.checkpoint(line), TAU, 0.0, "learned"
        residuals += [same_tau.residual_of(*given, law) for law in laws]
    runs.run_again(study, [*residuals, *cells(study)], lines)
    bounds = runs.gather(study, same_tau.residual, residuals)
    found = runs.gather(study, respond, cells(study))
    print("| policy, tau 0.1 | its KL | a law over its own responses gains at least ", end="")
    print(
        "(half the gap's bound) | over the start's | trained from the start: gain, win rate, KL ",
        end="",
    )
    print("| from the policy: gain, win rate, KL |")
    print("|---" * 6 + "|")
    for number, line in enumerate(lines):
        own = slice(2 * number, 2 * number + 2)
        print(f"| {runs.NAMES[line['loss']]} | {found[own][0]['policy_kl']:.2f} ", end="")
        for bound in bounds[own]:
            half, error = bound["exploitability"] / 2, bound["exploitability_se"] / 2
            print(f"| {half:.3f} ({error:.3f}) ", end="")
        for one in found[own]:
            print(f"| {one['gain']:+.3f}, {one['win_rate']:.3f}, {one['kl']:.2f} ", end="")
        print("|")


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.responder", __doc__, dict(responder=responder), argv)


if __name__ == "__main__":
    sys.exit(main())
