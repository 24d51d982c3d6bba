"""studies/ on a scale of seconds, in this process: the table, drawn again from its lines, and after
an interruption; every figure; the gates' arithmetic."""

import concurrent.futures
import glob
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bandit
import data
import enumerated
import equilibrium
import evaluate
import ipo
import job.folder
import job.report
import job.versions
import policy as policies
import preference_model
import sampler
from studies import (
    arrival,
    capacity,
    cells,
    everything,
    exploitability,
    figures,
    gates,
    lengthening,
    lengths,
    likes_length,
    longer,
    middle,
    panel_of_texts,
    paper_scale,
    responder,
    rungs,
    runs,
    same_tau,
    survey,
    table2,
    tournament,
)

VERSION = job.versions.version
ALL = runs.NAMES
FEW = {loss: ALL[loss] for loss in ("ipo", "ipo_md", "rl")}
TINY = dict(
    steps=2,
    seeds=3,
    prompts=6,
    test=8,
    taus=1,
    stages=["--supervised-steps", "3", "--preference-steps", "3", "--batch-size", "4"],
)


class Here:
    """An executor without processes."""

    def __init__(self, *_):
        pass

    def submit(self, work, todo, *given):
        future = concurrent.futures.Future()
        future.set_result(work(dict(todo), *given))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture(scope="module", autouse=True)
def small():
    measure = evaluate.measure

    def measure_few(policy, other, judge, task, split, count, **named):
        """train.py's hundred validation prompts would be most of the time."""
        return measure(policy, other, judge, task, split, min(count, 8), **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setitem(runs.SCALES, "smoke", TINY)
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", Here)
        patch.setattr(evaluate, "measure", measure_few)
        patch.setattr(job.versions, "version", lambda: "this")
        patch.setattr(runs, "NAMES", FEW)
        patch.setenv("TQDM_DISABLE", "1")
        yield patch


def run(study, folder, *argv):
    """The exit status of a study's command in a folder."""
    folders = ["--results", str(folder / "results"), "--runs", str(folder / "runs")]
    return study.main([*argv, "--scale", "smoke", *folders])


def raw_lines(folder):
    return (folder / "results" / "smoke.jsonl").read_text().splitlines()


def lines(folder):
    return [json.loads(line) for line in raw_lines(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(table2, folder) == 0
    return folder


@pytest.mark.slow
def test_the_table_is_drawn_again_from_its_lines(whole, capsys, tmp_path):
    """--from-results prints the same characters, twice; without lines it says which is missing."""
    for _ in range(2):
        assert run(table2, whole, "--from-results") == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]
    assert out.count("IPO over RL") == 2
    assert run(table2, tmp_path, "--from-results") == 2
    assert "are missing" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_line_says(whole):
    """Its options, the version, every checkpoint; the start against itself would be 1/2: the first
    KL is small."""
    found = [line for line in lines(whole) if "points" in line]
    for line in found:
        assert line["version"] == "this"
        assert [point["step"] for point in line["points"]] == [2]
        assert abs(line["points"][0]["kl"]) < 1 and line["seconds"] > 0
        assert line["curve"][0]["kl"] == 0
    assert {line["loss"] for line in found} == set(runs.NAMES)
    assert {line["seed"] for line in found} == {0, 1, 2}


@pytest.mark.slow
def test_table_entries(whole, capsys):
    """The table is antisymmetric; its entry is the mean of nine comparisons of the tournament."""
    assert run(table2, whole, "--from-results") == 0
    table = capsys.readouterr().out.split("| panel |")[1].split("\n\n")[0].splitlines()[2:]
    cells = []
    for row in table:
        texts = row.strip("| ").split(" | ")[1:]
        cells.append([float(text.split()[0]) for text in texts])
    for row in range(3):
        for column in range(3):
            assert cells[row][column] + cells[column][row] == pytest.approx(1, abs=1.1e-3)
    (line,) = [line for line in lines(whole) if line["name"].startswith("tournament")]
    names = line["players"]
    wins = []
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            if first.startswith("ipo-") and second.startswith("ipo_md-"):
                wins.append(line["win_rate"][row][column])
    assert len(wins) == 9 and names[-1] == "SFT"
    assert cells[0][1] == pytest.approx(statistics.mean(wins), abs=5e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_tournament_is_one_sample_of_each_player(whole):
    """Every pair by itself, from the responses that the players' own streams give; a policy against
    its twin is no draw for free."""
    (run_line,) = [
        line for line in lines(whole) if line["name"].startswith("ipo-tau0.05-beta0-seed1")
    ]
    folder = str(whole / "runs" / "smoke-this")
    shared = dict(SFT=glob.glob(f"{folder}/stages/supervised-*")[0])
    shared["learned"] = glob.glob(f"{folder}/stages/preference-*")[0]
    there = dict(folder=folder, shared=shared, prompts=130)
    names = [runs.checkpoint(run_line), "SFT", "SFT"]
    todo = dict(name="t", players=names, split="validation", kl=True, where=there)
    line = tournament.play(todo)
    task, learned = data.BuiltIn(), preference_model.load(shared["learned"])
    models = [runs.load_policy(there, name) for name in names]
    found = dict(win_rate=torch.zeros(3, 3), learned=torch.zeros(3, 3), kl=torch.zeros(3, 3))
    for step, count in ((0, 100), (1, 30)):
        prompt = task.prompts("validation", step, 100).rows(slice(0, count))
        drawn = []
        for player, model in enumerate(models):
            uniforms = data.uniforms(
                data.generator(0, f"validation player {player}", step), 32, 1, count
            )
            ids, mask, _ = sampler.sample(model, None, prompt, 0.0, None, 32, uniforms[:, 0])
            drawn.append(policies.Tokens(ids, mask))
        for a, b in itertools.product(range(3), repeat=2):
            asked = prompt, drawn[a], drawn[b]
            found["win_rate"][a, b] += task.judge(*asked).sum() / 130
            found["learned"][a, b] += learned(*asked).sum() / 130
            log_ratio = evaluate.log_ratio(models[a], models[b], prompt, drawn[a])
            found["kl"][a, b] += log_ratio.sum() / 130
    for name, expected in found.items():
        got = torch.tensor(line[name])
        if name != "kl":
            expected.fill_diagonal_(0.5)
        assert (got - expected).abs().max() < 1e-5, name
    assert abs(line["win_rate"][1][2] - 0.5) > 1e-3 and line["kl"][1][2] == 0


def test_entries_by_hand():
    """Rows against columns, both ways around, and deviations; SFT last; 1/2 on the diagonal."""
    values = {
        ("ipo", "ipo_md"): [0.5, 0.7],
        ("ipo", "rl"): [0.6, 0.6],
        ("ipo_md", "rl"): [0.4, 0.6],
        ("ipo", "SFT"): [0.8, 0.9],
        ("ipo_md", "SFT"): [0.7, 0.7],
        ("rl", "SFT"): [0.9, 0.9],
    }
    matches = {pair: np.array(numbers) for pair, numbers in values.items()}
    mean, deviation = table2.entries(matches)
    expected = [[0.5, 0.6, 0.6, 0.85], [0.4, 0.5, 0.5, 0.7], [0.4, 0.5, 0.5, 0.9]]
    assert mean == pytest.approx(np.array(expected))
    a, b = 0.2 / 2**0.5, 0.1 / 2**0.5
    expected = [[0, a, 0, b], [a, 0, a, 0], [0, a, 0, 0]]
    assert deviation == pytest.approx(np.array(expected))


@pytest.mark.slow
def test_interrupted_and_continued(whole, tmp_path, monkeypatch, capsys, after=12):
    """Stopped at a line's writing, which leaves half of it: the same command goes on and prints the
    table of the uninterrupted run."""
    append_line = job.folder.append_line
    count = 0

    def stops(file, line):
        nonlocal count
        ours = "version" in line  # train.py appends its metrics with the same function
        count += ours
        if ours and count == after:
            file.write(json.dumps(line)[:40])
            file.flush()
            raise KeyboardInterrupt
        append_line(file, line)

    monkeypatch.setattr(job.folder, "append_line", stops)
    assert run(table2, tmp_path) == 130
    assert "goes on" in capsys.readouterr().err
    monkeypatch.setattr(job.folder, "append_line", append_line)
    assert len(raw_lines(tmp_path)) == after
    assert run(table2, tmp_path) == 0
    table = capsys.readouterr().out
    assert run(table2, whole, "--from-results") == 0
    assert table.endswith(capsys.readouterr().out)


@pytest.mark.slow
def test_policies_are_made_again_from_their_lines(whole, tmp_path, capsys):
    """On a machine that has results/ but no runs, what compares policies makes those it needs, and
    ends in the same table; what has all its lines makes none."""
    (tmp_path / "results").mkdir()
    kept = [row for row in raw_lines(whole) if '"tournament' not in row]
    assert len(kept) == len(raw_lines(whole)) - 1
    (tmp_path / "results" / "smoke.jsonl").write_text("".join(f"{row}\n" for row in kept))
    assert run(table2, tmp_path) == 0
    table = capsys.readouterr().out
    assert run(table2, whole, "--from-results") == 0
    assert table.endswith(capsys.readouterr().out)
    made = {path.name for path in (tmp_path / "runs" / "smoke-this").iterdir()}
    assert len(made) == 1 + 3 * 3  # stages, and three seeds of three methods
    shutil.rmtree(tmp_path / "runs" / "smoke-this" / "ipo-tau0.05-beta0-seed1-steps2")
    assert run(table2, tmp_path) == 0
    assert not (tmp_path / "runs" / "smoke-this" / "ipo-tau0.05-beta0-seed1-steps2").exists()


@pytest.mark.slow
def test_lines_of_other_versions_are_made_again(whole, tmp_path, monkeypatch):
    """A raised version: what is drawn without --from-results is new."""
    monkeypatch.setattr(job.versions, "version", lambda: "another")
    (tmp_path / "results").mkdir()
    copied = "".join(f"{line}\n" for line in raw_lines(whole))
    (tmp_path / "results" / "smoke.jsonl").write_text(copied)
    assert run(figures, tmp_path, "fig2") == 0
    assert lines(tmp_path)[-1]["version"] == "another"
    assert (tmp_path / "results" / "fig2-smoke.png").exists()


def test_every_version_is_in_the_text(monkeypatch):
    """Raising any of the four makes other lines, and other folders, of all results."""
    for name in job.versions.VERSIONS:
        monkeypatch.setitem(job.versions.VERSIONS, name, 9)
        assert "9" in VERSION() and VERSION() != "1.1.1.1"
        monkeypatch.undo()


def test_verdict_by_hand():
    """3 x 3 values with row means .6, .62, .64 and column means .61, .62, .63: se^2 = (4e-4 +
    1e-4)/3; 2 (5e-4)^2/(16e-8 + 1e-8) = 2.9 degrees of freedom, t = 4.303 -> .0556. The second one
    wins at as much below 1/2."""
    values = 0.62 + np.array([[-0.03, -0.02, -0.01], [-0.01, 0.0, 0.01], [0.01, 0.02, 0.03]])
    pair = ("ipo", "rl")
    assert table2.verdict(pair, values) == "IPO over RL: 0.620 +- 0.056 (95 %): IPO wins"
    assert table2.verdict(pair, values - 0.1).endswith("not separated")
    assert table2.verdict(pair, 1 - values) == "IPO over RL: 0.380 +- 0.056 (95 %): RL wins"


@pytest.mark.parametrize("spread", [(1, 1, 0), (1, 0, 0), (1, 0.3, 0.3), (1, 1, 1), (0, 0, 1)])
def test_the_crossed_interval_covers(spread):
    """Seeds of one method, of the other, and their pairs vary, each as normal numbers: of 2,000
    tables of 4 x 4 the interval holds the truth in 95 % or more (4 standard errors: 93.1)."""
    rng = np.random.default_rng(0)
    first, second, pair = spread
    hits = 0
    for _ in range(2000):
        values = first * rng.normal(size=(4, 1)) + second * rng.normal(size=(1, 4))
        mean, half = runs.crossed_interval(values + pair * rng.normal(size=(4, 4)))
        hits += abs(mean) <= half
    assert hits / 2000 > 0.931


def test_every_method_has_one_budget(monkeypatch):
    """A rival against which the win rate is 1 - |log2(tau/0.05)|/10, less where beta is 0.25: tau
    0.05 is chosen, and the methods that sample a mixture spend their sixth run on another beta."""
    asked = []

    def gather(study, work, todos):
        asked[:] = [todo["name"] for todo in todos]
        return [dict(todo, points=[dict(step=1)]) for todo in todos]

    def against(study, pairs, lines):
        found = []
        for name, _ in pairs:
            tau = float(name.split("-tau")[1].split("-")[0])
            rate = 1 - abs(np.log2(tau / 0.05)) / 10 - ("beta0.25" in name) / 100
            found.append(dict(win_rate=rate))
        return found

    monkeypatch.setattr(runs, "gather", gather)
    monkeypatch.setattr(runs, "against", against)
    study = SimpleNamespace(taus=6, steps=8, prompts=1, stages=[], folder="", shared={})
    chosen = table2.tune(study, list(ALL), "SFT")
    assert {choice.tried for choice in chosen.values()} == {6}
    assert {choice.run["tau"] for choice in chosen.values()} == {0.05}
    assert not any(choice.at_edge for choice in chosen.values())
    assert "ipo_md-tau0.05-beta0.25-seed0-steps8" in asked
    assert not [name for name in asked if name.startswith("ipo-") and "beta0.25" in name]
    study.taus = 1
    assert table2.tune(study, ["ipo"], "SFT")["ipo"].at_edge


@pytest.mark.slow
def test_every_figure(whole, capsys, monkeypatch):
    """All the others, from the runs that there are and the ones they add."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    for name in ("fig1", "fig3", "fig4", "fig5", "frontier"):
        assert run(figures, whole, name) == 0, capsys.readouterr().err
    for name in ("fig1", "fig3", "fig4", "fig5", "frontier"):
        assert (whole / "results" / f"{name}-smoke.png").stat().st_size > 5000
    assert "1/2 + Var/tau" in capsys.readouterr().out


@pytest.mark.slow
def test_longer_runs_and_the_papers_scale(whole, capsys, monkeypatch):
    """Both on the smallest runs, and drawn again from their lines."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    monkeypatch.setattr(longer, "CELLS", (("ipo", 0, 4, None), ("nash_md", 0, 4, 1e-4)))
    for study, rows in ((longer, 2), (paper_scale, 6)):
        assert run(study, whole) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        first = out[out.index("| method" if study is longer else "| tau") :]
        assert run(study, whole, "--from-results") == 0
        assert capsys.readouterr().out == first
        assert sum(f"| {name} |" in first for name in ALL.values()) >= rows
    (line,) = [line for line in lines(whole) if line["name"] == "paper scale: dpo"]
    assert "--length-average" in line["argv"] and line["tau"] == 5
    (line,) = [line for line in lines(whole) if line["name"].startswith("rung: ipo")]
    assert {"slope", "slope_back", "r2", "exploitability", "kl"} <= line["points"][-1].keys()
    assert (whole / "results" / "longer-smoke.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_rungs_between(whole, capsys, monkeypatch):
    """Lengths, middle, capacity, responder, exploitability, the survey, lengthening, arrival and
    same_tau on the smallest runs, and drawn again from their lines."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    monkeypatch.setattr(middle, "CELLS", ((middle.SMALL, "ipo", 0.0, 5e-4, 2),))
    monkeypatch.setattr(middle, "DRAWS", 50)
    monkeypatch.setattr(middle, "SHARE", 0.0)
    monkeypatch.setattr(middle, "DEMOS", 200)
    monkeypatch.setattr(capacity, "CELLS", ((8, 2), (None, 2)))
    monkeypatch.setattr(capacity, "RESPONSES", 4)
    monkeypatch.setattr(longer, "CELLS", (("ipo", 0, 4, None),))
    monkeypatch.setitem(rungs.SCALES, "smoke", ((4, 21, False), (4, 21, True)))
    monkeypatch.setattr(same_tau, "TAUS", (middle.TAU,))
    monkeypatch.setattr(middle, "SOLVED", 2)
    monkeypatch.setattr(survey, "kinds", lambda: [("dpo", False), ("dpo", True)])
    monkeypatch.setattr(lengthening, "losses", lambda: ["ipo"])
    monkeypatch.setattr(
        equilibrium, "measure", partial(equilibrium.measure, responses=3, opponents=4)
    )
    counted = (lengths, 6), (middle, 2), (capacity, 2), (responder, 3), (exploitability, 12)
    counted += (survey, 5), (lengthening, 1)
    for study, rows in (*counted, (arrival, 4), (same_tau, 6)):
        assert run(study, whole) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert run(study, whole, "--from-results") == 0
        shown = capsys.readouterr().out
        table = [line for line in shown.splitlines() if line.startswith("| ")]
        assert len(table) >= rows + 1 and "nan" not in shown, shown
    for picture in ("survey", "arrival"):
        assert (whole / "results" / f"{picture}-smoke.png").stat().st_size > 5000
    (met,) = [line for line in lines(whole) if line["name"] == "met: survey-dpo/policy"]
    # Of the six one is an IPO run of the same seed; over the start it is as the run's own line has.
    assert len(met["win_rate"]) == 7 and len(met["rivals"]) == 6 and met["length"] > 0
    for met in [line for line in lines(whole) if line["name"].startswith("small posts")]:
        kl, wins = np.array(met["kl"]), np.array(met["win_rate"])
        assert np.abs(np.diag(kl)).max() < 1e-12 and kl.min() >= 0 and kl.max() > 1e-6
        assert np.abs(wins + wins.T - 1).max() < 1e-12
    assert "equal" in shown or "undecided" in shown or "different" in shown


def test_what_is_planned_and_what_was_run(tmp_path, capsys, monkeypatch):
    """Without a line all is left; a line with its seconds counts as run, and sets the estimate."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    study = SimpleNamespace(**runs.SCALES["full"], scale="full", shared={}, folder="")
    first = lengths.cells(study)[0]
    line = dict(name=first["name"], seconds=50.0, version=job.versions.version())
    old = dict(line, name=lengths.cells(study)[1]["name"], version="before")
    (tmp_path / "full.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(old) + "\n")
    assert cells.main(["--results", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    (row,) = [row for row in rows if row.startswith("| lengths")]
    # 6 runs of 100 steps, of 200 and of 400, one of 100 done in 50 s.
    assert row == "| lengths | 18 | 1 | 50 | 2050 |"
    assert rows[-1].startswith("| all | ")


def test_the_panel_that_likes_length_by_hand():
    """Five words more: a quarter of sigmoid(5/2) beside three quarters of the panel's p, and both
    orders sum to 1."""
    post, short, long = "a post about tea .", "tea", "tea and more of the tea"
    (panel,) = panel_of_texts.preference([post], [long], [short])
    (p,) = likes_length.preference([post], [long], [short])
    (back,) = likes_length.preference([post], [short], [long])
    assert p == pytest.approx(0.75 * panel + 0.25 / (1 + np.exp(-2.5)), rel=1e-12)
    assert p + back == pytest.approx(1, rel=1e-12)


def test_exact_gaps_by_hand():
    """The first of two actions wins with p = 0.7, reference even, tau = 1. It is ahead by 0.2
    whoever plays against it: at Nash, and at the points of eq 12 and 13, its log-ratio is 0.2. The
    reward's is log 7/3, which RL and DPO take. Their gap by its definition, against the best
    response, 0.2 again."""
    preferences = torch.tensor([[0.5, 0.7], [0.3, 0.5]], dtype=torch.float64)
    log_ref = torch.tensor([0.5, 0.5], dtype=torch.float64).log()

    def gap(ratio):
        first, best = 1 / (1 + np.exp(-ratio)), 1 / (1 + np.exp(-0.2))
        kl = [x * np.log(2 * x) + (1 - x) * np.log(2 * (1 - x)) for x in (first, best)]
        payoff = 0.5 + 0.2 * (best - first) - kl[1] + kl[0]
        return 2 * payoff - 1

    gaps = exploitability.exact_gaps([(preferences, log_ref)], 1.0)
    assert set(gaps) == {"ipo", "ipo_md", "nash_md", "dpo", "rl"}
    assert gaps["ipo"] == pytest.approx(0, abs=1e-12)
    assert gaps["nash_md"] == pytest.approx(0, abs=1e-12)
    assert gaps["ipo_md"] == pytest.approx(0, abs=1e-12)
    assert gaps["rl"] == pytest.approx(gap(np.log(7 / 3)), abs=1e-9)
    assert gaps["dpo"] == pytest.approx(gap(np.log(7 / 3)), abs=1e-9)


def test_between_less_within_by_hand():
    """Policies at 0, 2 and at 3, 5 on a line, distance the difference: between (3 + 5 + 1 + 3)/4,
    within (2 + 2)/2."""
    places = np.array([0.0, 2.0, 3.0, 5.0])
    distances = abs(places[:, None] - places)
    found = same_tau.between_less_within(distances, [0, 1], [2, 3])
    assert found == (1.0, 3.0, 2.0)


@pytest.mark.parametrize("size, shift", [(3, 0.0), (30, 0.0), (30, 1.0)])
def test_the_jackknife_covers(size, shift):
    """Ends as normal vectors, four of each method, squared distances: the upper limit is below
    the truth, shift^2, in at most 5 % of 1,000 (nominally 2.5), the lower one above it in at most
    2.5. So with many directions; in one the upper limit is short in up to 14 %."""
    rng = np.random.default_rng(0)
    below, above = 0, 0
    rows, others = [0, 1, 2, 3], [4, 5, 6, 7]
    for _ in range(1000):
        ends = rng.normal(size=(8, size))
        ends[4:, 0] += shift
        distances = ((ends[:, None] - ends) ** 2).sum(-1)
        statistic, _, _ = same_tau.between_less_within(distances, rows, others)
        half = same_tau.jackknife(distances, rows, others)
        below += statistic + half < shift**2
        above += statistic - half > shift**2
    assert below < 50 and above < 25


def test_the_verdict_on_two_methods():
    """By the head's rule: equal needs all three; different the statistic alone."""
    near = [0.95, 1.05]
    assert same_tau.verdict(0.01, 0.03, 0.1, near, 0.51, 0.02) == "equal"
    assert same_tau.verdict(0.01, 0.05, 0.1, near, 0.51, 0.02) == "undecided"  # too wide
    assert same_tau.verdict(0.01, 0.03, 0.1, [1.0, 0.8], 0.51, 0.02) == "undecided"  # not arrived
    assert same_tau.verdict(0.01, 0.03, 0.1, near, 0.54, 0.02) == "undecided"  # one wins
    assert same_tau.verdict(0.04, 0.03, 0.1, near, 0.5, 0.02) == "different"


def test_a_flat_curve():
    """Twice the standard error of a difference of two: 2 sqrt(2) 0.01."""
    short, long = dict(win_rate=0.8, win_rate_se=0.01), dict(win_rate=0.828, win_rate_se=0.01)
    assert lengths.is_flat(short, long)
    assert not lengths.is_flat(short, dict(long, win_rate=0.829))


@pytest.mark.parametrize("tau, which", [(0.3, 0), (0.1, 0), (0.1, 1)])
def test_where_averaged_ipo_stops(tau, which):
    """The gradient of ipo.loss itself on means is 0 there, and not beside it nor at Nash; the point
    is pi_ref exp(|y| (p/tau + c)), and no policy of one response, where every gradient is 0; equal
    lengths L are sums at tau/L."""
    w = enumerated.world(0)
    preferences, log_ref = w.preferences[which], w.log_ref[which]
    lengths = paper_scale.LENGTHS

    def averaged(logp, logp_other, ref_logp, ref_logp_other, p, tau):
        sides = logp / lengths[:, None], logp_other / lengths[None]
        sides += ref_logp / lengths[:, None], ref_logp_other / lengths[None]
        return ipo.loss(*sides, p, tau)

    def size(point):
        method = SimpleNamespace(PAIR=ipo.PAIR, loss=averaged)
        return bandit.gradient(method, point, log_ref, preferences, tau).abs().max()

    point = paper_scale.averaged_point(preferences, log_ref, tau, lengths)
    assert size(point) < 1e-9
    nash = bandit.fixed_point(preferences, log_ref, tau / lengths.mean().item())
    assert size(nash) > 1e-3 and size(log_ref) > 1e-3
    level = (point - log_ref) / lengths - bandit.win_rate(preferences, point) / tau
    assert (level - level[0]).abs().max() < 1e-9 and abs(point.exp().sum() - 1) < 1e-12
    even = paper_scale.averaged_point(preferences, log_ref, tau, torch.full_like(lengths, 3.0))
    wanted = bandit.fixed_point(preferences, log_ref, tau / 3)
    assert (even.exp() - wanted.exp()).abs().max() < 1e-10


def noted(called, name, study):
    called.append(name)


def test_everything_is_all_of_it(tmp_path, monkeypatch, capsys):
    """Table 2, the figures, Figure 6 and same_tau, each once, or those that are named; a name that
    is none of them is an error."""
    called = []
    for name in everything.PARTS:
        monkeypatch.setitem(everything.PARTS, name, partial(noted, called, name))
    assert run(everything, tmp_path, "--from-results", "fig6", "fig2") == 0
    assert called == ["fig6", "fig2"]
    called.clear()
    assert run(everything, tmp_path, "--from-results") == 0
    expected = ["table2", "fig1", "fig2", "fig3", "fig4", "fig5", "frontier", "fig6", "same_tau"]
    assert called == expected
    with pytest.raises(SystemExit):
        run(figures, tmp_path, "fig7")
    assert "fig7" in capsys.readouterr().err


def test_the_committed_table_is_the_documented_one(capsys, monkeypatch):
    """results/README.md holds what `python -m studies.table2 --from-results` prints, each line."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    folder = Path(runs.__file__).parent.parent / "results"
    assert table2.main(["--from-results", "--results", str(folder)]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) > 35
    assert not [line for line in printed if line not in text]


def test_the_committed_pages_are_the_documented_ones(capsys, monkeypatch):
    """So do the pages of the survey, of the paper's taus, of the rungs, of who can be exploited and
    of what is planned, each line."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    monkeypatch.setattr(job.versions, "version", VERSION)
    monkeypatch.setattr(runs, "plot", lambda *_: None)
    monkeypatch.setattr(job.report, "plot", lambda *_: None)
    monkeypatch.setattr(survey, "plot", lambda *_: None)
    folder = Path(__file__).resolve().parent.parent / "results"
    pages = (
        (survey, "survey"),
        (lengthening, "survey"),
        (paper_scale, "paper_scale"),
        (rungs, "equilibrium"),
    )
    pages += ((middle, "equilibrium"), (longer, "equilibrium"), (arrival, "equilibrium"))
    pages += ((same_tau, "README"), (exploitability, "README"), (responder, "README"))
    for study, page in (*pages, (lengths, "README"), (cells, "README")):
        text = (folder / f"{page}.md").read_text(encoding="utf-8")
        given = [] if study is cells else ["--from-results"]  # cells runs nothing
        assert study.main([*given, "--results", str(folder)]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(shown) > 4
        for line in shown:
            assert line in text, line


@pytest.mark.parametrize(
    "words, said",
    [
        (["--jobs", "0"], "--jobs: 0: give a whole number above 0"),
        (["--results", __file__], f"--results {__file__}: is no folder"),
        (["--runs", __file__], f"--runs {__file__}: is no folder"),
        (["nosuch"], "nosuch: no such part; take one of once, best"),
    ],
)
def test_what_a_study_refuses(words, said, tmp_path, capsys):
    """Before anything is run or written."""
    with pytest.raises(SystemExit) as ended:
        survey.main(words if "--results" in words else [*words, "--results", str(tmp_path)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_gates_are_counted(capsys):
    """A gate is missed below its least or above its most, and not at either."""
    rows = [("a", 0.5, 0.5, None), ("b", 0.4, 0.5, None), ("c", 2.0, None, 2), ("d", 3, None, 2)]
    assert gates.show([*rows, ("e", 9.0, None, None)]) == 2
    missed = [line[0] for line in capsys.readouterr().out.splitlines() if "MISSED" in line]
    assert missed == ["b", "d"]


def test_gates_of_all_runs_by_hand():
    """Means of 0.81 and 0.80, the worst 0.04 and 0.06 below.

    The first passes both, the second none.
    """
    assert gates.show(gates.all_runs_gates([0.83, 0.84, 0.77])) == 0
    assert gates.show(gates.all_runs_gates([0.83, 0.84, 0.74])) == 2


def test_task_gates_by_hand():
    """One post whose three summaries are a cycle, of 1, 3 and 11 words (summaries.py's head)."""
    post = "my car broke . lost our door . sold the dog . found a key . her hat smells . one boat"
    cycle = ["car", "car , door", "my car broke , door , dog , key , hat"]
    rows = {name: value for name, value, *_ in gates.task_gates([(post, cycle)])}
    assert rows["cyclic triples, margins above 0.1"] == 1
    assert rows["least p(real > empty or repetitive)"] == pytest.approx(0.95)
    assert rows["pairs in which the shorter is preferred"] == pytest.approx(1 / 3)
    assert rows["pairs in which the longer is preferred"] == pytest.approx(2 / 3)
    level = [(post, ["car , door", "car , dog", "car , key"])]
    assert gates.cyclic_share(level) == 0


@pytest.mark.slow
def test_a_killed_study_leaves_no_process(tmp_path):
    """The pool's process writes its number and would sleep ten minutes; the study is killed, and
    it is gone within a minute."""
    script = tmp_path / "study.py"
    script.write_text(
        "import os, sys, time\n"
        "from studies import runs\n"
        "def work(path):\n"
        "    open(path, 'w').write(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__ma"
        "in__':\n"  # in two: this file is no command
        "    pool = runs.pool(1)\n"
        "    pool.submit(work, sys.argv[1] + '.part').result()\n"
    )
    number = tmp_path / "number.part"
    root = str(Path(__file__).resolve().parent.parent)
    environment = dict(os.environ, PYTHONPATH=root)
    study = subprocess.Popen([sys.executable, script, tmp_path / "number"], env=environment)
    deadline = time.monotonic() + 120
    while not (number.exists() and number.read_text()):
        assert time.monotonic() < deadline and study.poll() is None
        time.sleep(0.1)
    study.kill()
    study.wait()
    child = int(number.read_text())
    deadline = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < deadline, "the pool's process outlived its study"
        time.sleep(0.1)


def alive(process):
    """Whether a process is there and no zombie."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True
    )
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")
