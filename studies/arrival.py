"""Where does sampled training arrive at the equilibrium? One table and picture of all rungs.

From the GPT-2 whose every response is counted (rungs.py) over posts of one, two and six facts with
their exact panel (middle.py) to the built-in task under its preference model (longer.py): online
IPO at tau 0.1, the longest runs of each rung, slopes and R2 of eq 12's regression over the steps.
At the equilibrium all are 1, among the policy's own responses and among the start's. Rates fall to
0 over each run, so its last point is its end, and those before it are of no shorter run.
A rung counts as arrived where the end's slopes, both of its own responses and the one of the
start's, are within two standard errors or a tenth of 1 and R2 of its own is at least 0.9; on the
first rung, which is exact, its own. Where the point is known the total variation from it (of 0.2 to
0.7 at the start) tells whether that is right.
A rung's label says the first's pairs a prompt and step, the last's rates.
Left out: other methods, which the three studies' own tables have.
Run: python -m studies.arrival                   (and the runs that those studies lack)
     python -m studies.arrival --from-results    (results/arrival.png, from the lines alone)
"""

import sys
from types import SimpleNamespace

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
from studies import longer, middle, residuals, rungs, runs

NEAR, ENOUGH = 0.1, 0.9  # of a slope to 1, of R2
PANELS = (
    ("R2, own responses", lambda point: point["r2"]),
    ("tau d on p, own responses", lambda point: point["slope_back"]),
    ("tau d on p, the start's responses", lambda point: of_start(point).get("slope_back")),
)


def of_start(point):
    """A point's numbers among the start's responses; {} on the first rung."""
    return point.get("reference", {})


def of_enumerated(study):
    """The first rung's lines, by label."""
    own = SimpleNamespace(**vars(study))
    own.version = rungs.VERSION
    own.path = rungs.lines_path(study)
    own.lines = runs.read_lines(own)
    todos = rungs.cells(study.scale, 1)
    steps = max(todo["steps"] for todo in todos)
    found = {}
    wanted = [todo for todo in todos if (todo["method"], todo["steps"]) == ("ipo", steps)]
    for line in runs.gather(own, rungs.run_cell, wanted):
        found[f"85 responses, {rungs.compared(line)} pairs"] = line
    return found


def longest(todos):
    """Those of IPO with the most steps."""
    own = [todo for todo in todos if todo["loss"] == "ipo"]
    steps = max(todo["steps"] for todo in own)
    return [todo for todo in own if todo["steps"] == steps]


def of_middle(study):
    """The rungs between, by label."""
    found = {}
    for line in runs.gather(study, middle.run_to_residuals, longest(middle.cells(study))):
        facts = line["facts"]
        found["1 fact" if facts == 1 else f"{facts} facts"] = line
    return found


def of_built_in(study):
    """The last rung, by label."""
    found = {}
    for line in runs.gather(study, longer.run_to_residuals, longest(longer.cells(study))):
        found[f"built-in, rate {longer.rate_of(line):g}"] = line
    return found


def has_arrived(end):
    """Whether a run's last point counts as the equilibrium, by the rule of this file's head."""
    wanted = [(end, "slope"), (end, "slope_back")]
    if of_start(end):
        wanted.append((of_start(end), "slope_back"))
    for numbers, name in wanted:
        if numbers[name] is None:  # one answer is left
            return False
        if abs(numbers[name] - 1) > max(NEAR, 2 * numbers.get(f"{name}_se", 0.0)):
            return False
    return end["r2"] >= ENOUGH


def distance(line):
    """The total variation from the solved point, as text; a stroke where that is not known."""
    end = line["points"][-1]
    away = end.get("total_variation", line.get("away"))
    return "-" if away is None else f"{away:.3f}"


def arrival(study):
    """The table of ends, and the picture over the steps."""
    lines = of_enumerated(study) | of_middle(study) | of_built_in(study)
    print(f"| rung, IPO at tau {longer.TAU:g} | steps | {residuals.HEAD} | TV | arrived |")
    print("|---" * (4 + residuals.COLUMNS) + "|")
    for label, line in lines.items():
        end = line["points"][-1]
        print(f"| {label} | {end['step']} | {residuals.cells(end)} | {distance(line)} ", end="")
        print(f"| {'yes' if has_arrived(end) else 'no'} |")
    panels = []
    for title, number_of in PANELS:
        series = {}
        for label, line in lines.items():
            # A rung without points stays in the series: its colour is its own in every panel.
            known = [point for point in line["points"] if number_of(point) is not None]
            steps = [point["step"] for point in known]
            series[label] = steps, [number_of(point) for point in known]
        panels.append((title, "step", "", series))
    runs.plot(study, "arrival", panels)


def main(argv=None):
    """The command; returns the exit status."""
    return runs.main("studies.arrival", __doc__, dict(arrival=arrival), argv)


if __name__ == "__main__":
    sys.exit(main())
