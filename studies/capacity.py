"""Can the built-in task's network represent an equilibrium at all, if it is told where that is?

Of each prompt 32 responses of the start are a game of their own, with the learned preference model
as matrix and the draws as pi_ref; bandit.fixed_point solves it, and log pi*/pi_ref is regressed by
the policy's own log pi/pi_ref, within prompts, without any sampling noise. R2 is the share of the
targets' variance that is explained, before and after training:
  few      on a few prompts that are seen again and again: what the network can hold
  fresh    on prompts that are new in every step, told on others: what it can learn of the rule
What online training must find by its own noisy samples is given here; what this cannot reach, no
such training will at these steps.
Left out: responses that the start does not write; more than one seed, rate and tau.
Run: python -m studies.capacity                   (12 min on 2 cores)
     python -m studies.capacity --from-results    (the table from the lines of results/ alone)
"""

import sys
import time
from types import SimpleNamespace

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
import torch

import bandit
import data
import policy as policies
import preference_model
import sampler
from studies import runs

TAU = 0.1
RESPONSES = 32  # of a prompt
PROMPTS = 8  # a step
TOLD = 40  # prompts that R2 is taken on
RATE = 2e-3  # falling as train.py's default
# How many prompts are trained on, None for new ones in every step; and steps.
CELLS = ((8, 300), (64, 300), (None, 300))


@torch.no_grad()
def targets(preference, prompt, response, tau):
    """log pi*/pi_ref of each prompt's responses, in the game that has no others, [N, B] nats.

    preference:
        a PreferenceModel.
    prompt, response:
        Tokens of B rows, and of N * B rows: all first responses, then all second ones.
    """
    count, rows = len(prompt.ids), len(response.ids)
    vectors = preference.read(prompt.repeat(rows // count), response)
    vectors = vectors.view(rows // count, count, -1)
    found = []
    for row in range(count):
        own = vectors[:, row]
        first, second = own.repeat_interleave(len(own), 0), own.repeat(len(own), 1)
        p = torch.sigmoid(preference.compare_vectors(first, second)).double()
        p = p.view(len(own), len(own))
        # A draw of pi_ref counts 1/N, so one that came twice counts twice, as it should.
        uniform = torch.full([len(own)], 1 / len(own)).double().log()
        found.append(bandit.fixed_point(p, uniform, tau) - uniform)
    return torch.stack(found, 1)


def draw(start, task, split, step, count):
    """Prompts of a split, and RESPONSES of the start to each: (prompt, response)."""
    prompt = task.prompts(split, step, count)
    uniforms = data.uniforms(
        data.generator(0, f"{split} capacity", step), task.max_response, RESPONSES, count
    )
    weights = (0.0,) * RESPONSES
    given = weights, None, task.max_response, uniforms.flatten(1)
    ids, mask, _ = sampler.sample(start, None, prompt, *given)
    return prompt, policies.Tokens(ids, mask)


def residual(policy, start, prompt, response, wanted):
    """log pi/pi_ref less what is wanted, both less their mean within a prompt, [N, B]."""
    asked = prompt.repeat(len(wanted))
    with torch.no_grad():
        ref_logp = policies.log_prob(start, asked, response)
    ratio = (policies.log_prob(policy, asked, response) - ref_logp).view(len(wanted), -1)
    return ratio - ratio.mean(0) - (wanted - wanted.mean(0))


@torch.no_grad()
def explained(policy, start, games):
    """R2 over the games, each (prompt, response, wanted): below 0 where it does harm."""
    left, whole = 0.0, 0.0
    for prompt, response, wanted in games:
        left += residual(policy, start, prompt, response, wanted).square().sum().item()
        whole += (wanted - wanted.mean(0)).square().sum().item()
    return 1 - left / whole


def run_cell(todo):
    """Regresses a cell. Returns its line: R2 over the steps on the prompts trained on (of fresh
    ones on new ones), and on TOLD others."""
    there, begun = todo["where"], time.process_time()
    start, task = runs.load_policy(there, "SFT"), data.BuiltIn()
    learned = preference_model.load(there["shared"]["learned"])
    policy = runs.load_policy(there, "SFT")

    def game(split, step):
        prompt, response = draw(start, task, split, step, PROMPTS)
        return prompt, response, targets(learned, prompt, response, TAU)

    told = [game("validation", step) for step in range(TOLD // PROMPTS)]
    few = [game("align", step) for step in range((todo["prompts"] or 0) // PROMPTS)]
    steps = todo["steps"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    rate = SimpleNamespace(lr=RATE, steps=steps, warm_up=10, decay="linear")
    points = []
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0:
            point = dict(step=step, others=explained(policy, start, told))
            points.append(point | dict(own=explained(policy, start, few) if few else None))
        if step == steps:
            break
        batch = few[step % len(few)] if few else game("align", step)
        optimizer.param_groups[0]["lr"] = policies.rate_at(step, rate)
        optimizer.zero_grad()
        residual(policy, start, *batch).square().mean().backward()
        optimizer.step()
    line = runs.line_of(todo)
    return line | dict(tau=TAU, seconds=time.process_time() - begun, points=points)


def cells(study):
    """What is to do."""
    found = []
    for prompts, steps in CELLS:
        steps = steps if study.scale == "full" else study.steps
        name = f"capacity: {prompts or 'fresh'} prompts {steps} steps"
        said = dict(prompts=prompts, steps=steps, where=runs.where(study, TOLD))
        found.append(dict(name=name, **said))
    return found


def capacity(study):
    """The table of all cells."""
    print("| prompts | steps | R2 on them | R2 on others | seconds |")
    print("|---|---|---|---|---|")
    for line in runs.gather(study, run_cell, cells(study)):
        end = line["points"][-1]
        own = "-" if end["own"] is None else f"{end['own']:.3f}"
        print(f"| {line['prompts'] or 'new ones in every step'} | {line['steps']} ", end="")
        print(f"| {own} | {end['others']:.3f} | {line['seconds']:.0f} |")


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.capacity", __doc__, dict(capacity=capacity), argv)


if __name__ == "__main__":
    sys.exit(main())
