"""claims.py: every claim holds, a broken loss fails some, and every function is in the table."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bandit
import claims
import ipo

ROOT = Path(__file__).resolve().parent.parent


def run(capsys, *arguments):
    """claims.main in-process: (exit status, what it printed, what it complained)."""
    try:
        status = claims.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def games():
    generator = torch.Generator().manual_seed(3)
    return [claims.problem(generator) for _ in range(6)]


NAMES = (
    "Pair identity",
    "Prop 4.1",
    "Prop 4.2",
    "Prop 5.1",
    "Prop 5.2",
    "Eq 13",
    "Offline IPO",
    "App. D",
    "F.5",
    "F.6",
    "F.7",
    "F.8",
    "F.9",
    "NLHF Thm 1",
    "Duality gap",
)


def test_every_claim_holds(capsys):
    """python claims.py, on fewer games than its default and another seed."""
    status, out, _ = run(capsys, "--games", 6, "--seed", 11)
    assert status == 0 and "FAILS" not in out, out
    for name in NAMES:
        assert f"\n{name} " in out, f"no line for {name}"
    # A head, a line a claim, the count.
    assert len(out.splitlines()) == len(claims.CLAIMS) + 2


# What says that two of the paper's methods are one: the same gradient, or the same point.
SAME = (
    "squared_loss_is_self_play",
    "pair_is_two_samples",
    "expanded_loss_is_self_play",
    "nash_is_stationary",
    "descent_finds_nash",
    "shifted_point_is_stationary",
    "descents_find_shifted_point",
    "natural_fields_agree",
    "mixture_is_nash_at_another_tau",
)


@pytest.mark.equivalence
@pytest.mark.parametrize("name", SAME)
def test_methods_that_are_one(games, name):
    """Prop 4.1 and 4.2, eq 13, Prop 5.1 and 5.2 on random games, a claim a case."""
    line = getattr(claims, name)(games, None)
    assert line.holds(), f"{line.statement}: {line.worst:.1e}, limit {line.limit:g}"


@pytest.mark.slow
def test_a_broken_loss_fails_claims(capsys, monkeypatch):
    """The claims go through the losses: IPO with its target doubled turns lines to FAILS.

    And the exit status to 1.
    """
    right = ipo.loss
    monkeypatch.setattr(ipo, "loss", lambda *pair: right(*pair[:5], pair[5] / 2))
    status, out, _ = run(capsys, "--games", 2)
    failed = [line for line in out.splitlines() if "FAILS" in line]
    assert status == 1 and "Prop 4.1" in "".join(failed)


def test_no_claim_is_left_out_of_the_table():
    """Every function that is decorated with each_game or takes what a claim takes, in order."""
    body = ast.parse((ROOT / "claims.py").read_text(encoding="utf-8")).body
    written = []
    for node in body:
        if isinstance(node, ast.FunctionDef):
            takes = [argument.arg for argument in node.args.args]
            if node.decorator_list or takes == ["games", "generator"]:
                written.append(node.name)
    assert written == [claim.__name__ for claim in claims.CLAIMS]


@pytest.mark.parametrize(
    "sense, limit, worst, holds",
    [
        ("<=", 6.0, 6.0, True),
        ("<=", 5.9, 6.0, False),
        (">=", 1.0, 1.0, True),
        (">=", 1.1, 1.0, False),
        ("median >=", 2.0, 2.0, True),
        ("median >=", 2.1, 2.0, False),
    ],
)
def test_the_worst_case_decides(sense, limit, worst, holds):
    """The largest, the smallest or the median of 1, 2, 6 against its limit."""
    line = claims.row("name", "statement", sense, limit, [6.0, torch.tensor(1.0), 2.0])
    assert (line.cases, line.worst, line.holds()) == (3, worst, holds)


@pytest.mark.parametrize("sense", ["<=", ">=", "median >="])
def test_nan_fails(sense):
    """A formula that is not a number in one game has not been confirmed."""
    assert not claims.row("name", "statement", sense, 0.0, [float("nan"), 0.0]).holds()


def test_a_formula_gives_one_case_or_several_a_game():
    """each_game counts cases, not games, and takes the first so many games."""

    def formula(g):
        return [g.tau, -g.tau] if g.tau > 1 else g.tau

    games = [SimpleNamespace(tau=tau) for tau in (1.0, 2.0, 3.0)]
    every = claims.each_game("name", "statement", "<=", 0.0)(formula)(games, None)
    assert (every.cases, every.worst) == (5, 3.0)
    first = claims.each_game("name", "statement", "<=", 0.0, most=2)(formula)(games, None)
    assert (first.cases, first.worst) == (3, 2.0)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--games", "0"], "--games 0: give at least 1"),
        (["--games", "few"], "--games"),
        (["--seed", "-1"], "--seed -1: give 0 or more, below 2^63"),
        (["--seed", 2**63], "--seed"),
        (["--game5", "1"], "--game5"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, options, expected):
    """The line names the option; nothing is computed."""
    status, out, error = run(capsys, *options)
    assert status == 2 and out == ""
    assert error.count("\n") == 1 and error.startswith("claims.py: error: ") and expected in error


def test_the_lab_does_not_know_the_claims():
    """claims.py imports bandit.py; the other way round would be a circle."""
    assert not hasattr(bandit, "claims")
    for node in ast.walk(ast.parse((ROOT / "bandit.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert "claims" not in [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.module != "claims"
