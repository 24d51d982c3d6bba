"""Is a policy at the equilibrium, and how exploitable is it? equilibrium.py's numbers, printed.

  slope            of the measured p(y > pi) on tau log pi/pi_ref, within prompts
  slope_back, r2   the slope the other way, and their product
  exploitability   a lower bound of the regularised duality gap, of any law over responses

At the equilibrium of eq 12 (of eq 13, with --beta) the first three are 1, under the preference that
the policy was trained on: for a run with a learned model, --judge its folder. At eq 12 the fourth
is 0 or, for want of responses and opponents, below; the point of eq 13 has a gap of its own.
Each is told of the policy's own responses and of the reference's: a policy that has lost most of
what the reference says may pass by its own. The greater of the two bounds counts.
Left out: how exploitable a policy is by what training reaches.
Run: python -m studies.equilibrium POLICY REFERENCE --tau 0.1
     (policy or run folders; about a minute for the built-in task)
"""

import argparse
import sys

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split

import equilibrium
import evaluate
import policy as policies
from job.options import fail, positive, positive_whole, weight


def parse(argv):
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.equilibrium",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail  # one line without the usage
    add = parser.add_argument
    add("a", metavar="POLICY", help="policy folder, or a run's folder")
    add("b", metavar="REFERENCE", help="what it was regularised towards, and began as")
    add("--tau", type=positive, required=True, help="the tau of the equilibrium in question")
    add("--beta", type=weight, default=0.0, help="the mixture's, for eq 13 (default 0: eq 12)")
    add("--responses", type=positive_whole, default=32, help="of a prompt (default 32)")
    add("--opponents", type=positive_whole, default=64, help="of a set of the two (default 64)")
    evaluate.add_options(add, count=40)
    return parser.parse_args(argv)


def measure(options):
    """equilibrium.summarise's numbers of what a command line names, {whose responses: numbers}."""
    if options.responses < 2:
        raise ValueError(f"--responses {options.responses}: give at least 2")
    policy, reference, task, judge, _ = evaluate.open_both(options)
    return equilibrium.both_ways(
        policy,
        reference,
        judge,
        task,
        options.tau,
        options.beta,
        count=options.count,
        responses=options.responses,
        opponents=options.opponents,
        seed=options.seed,
    )


def main(argv=None):
    """The command; returns the exit status."""
    policies.quiet()
    try:
        numbers = measure(parse(argv))
    except (ValueError, OSError) as error:
        print(f"studies.equilibrium: error: {policies.first_line(error)}", file=sys.stderr)
        return 2
    print(f"{'responses of':14s} " + "".join(f"{whose:18s}" for whose in numbers).rstrip())
    for name in ("slope", "slope_back", "r2", "exploitability"):
        cells = [f"{own[name]:.3f} ({own[f'{name}_se']:.3f})" for own in numbers.values()]
        print(f"{name:14s} " + "".join(f"{cell:18s}" for cell in cells).rstrip())
    print(f"{'prompts':14s} {numbers['policy']['prompts']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
