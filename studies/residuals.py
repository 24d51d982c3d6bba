"""What longer, middle and arrival share: how far a checkpoint is from the equilibrium, two ways.

equilibrium.py's numbers among the policy's own responses and among the start's. A policy that has
lost most of what the start says obeys eq 12 among what it has left; only the second shows it. Among
the start's responses the slope of p on tau d is left out of the tables: d of what a policy hardly
says any more is nothing that training sees again, and its spread pulls that slope towards 0.
No command of its own.
"""

import equilibrium

HEAD = "own responses: p on tau d | tau d on p | R2 | start's: tau d on p | R2 "
HEAD += "| exploitable by at least, own | start's"
COLUMNS = HEAD.count("|") + 1


def measure(*given, **size):
    """equilibrium.summarise's numbers of the policy's own responses and, under "reference", of the
    start's. None for what is not defined: of a policy that has one answer left there is no slope.

    given, size:
        as equilibrium.measure takes them.
    """
    found = equilibrium.both_ways(*given, **size)
    own, of_start = (equilibrium.or_none(found[whose]) for whose in ("policy", "reference"))
    return own | dict(reference=of_start)


def number(point, name):
    """A number, with its standard error where it has one, as text; a stroke where there is none."""
    if point.get(name) is None:
        return "-"
    error = point.get(f"{name}_se")
    return f"{point[name]:.2f}" if error is None else f"{point[name]:.2f} ({error:.2f})"


def cells(point):
    """A point's cells under HEAD, joined."""
    of_start = point.get("reference", {})  # the first lines have it not
    found = [number(point, name) for name in ("slope", "slope_back", "r2")]
    found += [number(of_start, name) for name in ("slope_back", "r2")]
    found += [number(one, "exploitability") for one in (point, of_start)]
    return " | ".join(found)
