"""Writes the games that exercises/simplex.html compares itself with, from bandit.py into the page.

Fifty random games of three actions, a line each: equilibria, the other methods' points, a duality
gap, and of every method a gradient, a natural step and the policy after thirty plain steps.
simplex.html#test computes all of them in the browser and shows how many agree.
Run: python -m exercises.teacher.embed_games    (a few seconds)
"""

import argparse
import json
from pathlib import Path

import torch

import bandit
import dpo
import ipo
import ipo_md
import nash_md
import rl
from ipo_md import mixture

PAGE = Path(__file__).resolve().parent.parent / "simplex.html"
# What stands around the games in the page.
BEGIN = '<script type="application/json" id="games">\n'
END = "\n</script>"
COUNT = 50
STEPS = 30  # of the descent: enough to leave the start, few enough for rounding not to grow


def draw_problem(generator):
    """A random game of three actions: margins, preferences, log_ref, log_data, log_pi, tau, beta.

    Some have no cycle: the page's sliders reach those, too.
    """
    margins = torch.rand(3, generator=generator, dtype=torch.float64) - 0.5
    # The page's order: 1 over 2, 2 over 3, 3 over 1.
    above = torch.zeros(3, 3, dtype=torch.float64)
    above[0, 1], above[1, 2], above[2, 0] = margins
    laws = torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    u, v = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    return dict(
        margins=margins,
        preferences=0.5 + above - above.T,
        log_ref=laws[0],
        log_data=laws[1],
        log_pi=laws[2],
        tau=0.02 * 100**u,  # uniform in the logarithm, over the page's slider
        beta=v,
    )


def methods(preferences, rewards, log_data, beta):
    """The page's six methods: name -> (module, labels, beta, mixture) for bandit.descend."""

    def data_law(log_pi, log_ref, beta):
        return log_data  # whatever the policy is: this makes IPO-MD offline IPO

    reward_gaps = rewards[:, None] - rewards[None]
    return {
        "online IPO": (ipo, preferences, 0.0, mixture),
        "IPO-MD": (ipo_md, preferences, beta, mixture),
        "Nash-MD-PG": (nash_md, preferences, beta, mixture),
        "online DPO": (dpo, preferences, 0.0, mixture),
        "offline IPO": (ipo_md, preferences, 1.0, data_law),
        "RL": (rl, reward_gaps, 0.0, mixture),
    }


def dynamics(method, labels, beta, law, problem):
    """What one method does in a game: its gradient, a natural step, thirty plain ones."""
    log_pi, log_ref, tau = problem["log_pi"], problem["log_ref"], problem["tau"]
    game = labels, log_ref, tau, beta, law
    natural = bandit.descend(method, *game, rate=1.0, steps=1, start=log_pi)
    # Not natural: what Figure 6 and the page show at first.
    plain = bandit.descend(method, *game, rate=1.0, steps=STEPS, start=log_pi, natural=False)
    return dict(
        gradient=bandit.gradient(method, log_pi, log_ref, labels, tau, beta, law),
        natural_step=natural[-1],
        descent=plain[-1],
    )


def solve(problem):
    """Everything that the page computes of a problem, by bandit.py's names."""
    preferences, log_ref, tau = problem["preferences"], problem["log_ref"], problem["tau"]
    log_pi, log_data, beta = problem["log_pi"], problem["log_data"], problem["beta"]
    # As in bandit.py's table the reward model has seen pairs of the reference.
    rewards = bandit.fit_reward(preferences, log_ref)
    solved = {}
    for name, plan in methods(preferences, rewards, log_data, beta).items():
        solved[name] = dynamics(*plan, problem)
    return dict(
        win_rate=bandit.win_rate(preferences, log_pi),
        mixture=mixture(log_pi, log_ref, beta),
        nash=bandit.fixed_point(preferences, log_ref, tau),
        shifted=bandit.fixed_point(preferences, log_ref, tau, beta),
        dpo_point=bandit.dpo_point(preferences, log_ref, tau),
        offline=bandit.respond(preferences, log_ref, tau, log_data),
        fit_reward=rewards,
        rlhf_policy=bandit.rlhf_policy(rewards, log_ref, tau),
        kl=bandit.kl(log_pi, log_ref),
        total_variation=bandit.total_variation(log_pi, log_ref),
        duality_gap=bandit.duality_gap(log_pi, preferences, log_ref, tau),
        methods=solved,
    )


def plain(value, digits):
    """Tensors as lists of numbers of so many digits; 17 hold a float64 exactly."""
    if isinstance(value, dict):
        return {name: plain(entry, digits) for name, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry, digits) for entry in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist(), digits)
    return value if value is None else float(f"{value:.{digits}g}")


def games(count=COUNT):
    """The games as the page holds them: count dictionaries of numbers and lists."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        problem = draw_problem(generator)
        # What is given exactly, so that the page starts from the same numbers; what is computed to
        # thirteen digits, one more than the page compares.
        found.append(plain(problem, 17) | plain(solve(problem), 13))
    return found


def embedded(text):
    """The games in a page's text."""
    return json.loads(text.split(BEGIN)[1].split(END)[0])


def embed(text, found):
    """The page's text with other games, a line each."""
    before, rest = text.split(BEGIN)
    after = rest.split(END, 1)[1]
    lines = ",\n".join(json.dumps(game, separators=(",", ":")) for game in found)
    return f"{before}{BEGIN}[\n{lines}\n]{END}{after}"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Writes bandit.py's games into simplex.html.")
    bandit.one_line_errors(parser, "embed_games")
    parser.add_argument("--page", type=Path, default=PAGE, help="default exercises/simplex.html")
    options = parser.parse_args(argv)
    try:
        text = embed(options.page.read_text(encoding="utf-8"), games())
        options.page.write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"--page {options.page}: {error.strerror}")
    except ValueError:
        parser.error(f"--page {options.page}: holds no block that begins with {BEGIN.strip()}")
    print(f"{COUNT} games: {options.page}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny
    raise SystemExit(main())
