"""studies/ on a scale of seconds, in this process: the table, drawn again from its lines, and after
an interruption; every figure; the gates' arithmetic."""

import concurrent.futures
import json
import statistics
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bandit
import enumerated
import evaluate
import ipo
import job.folder
import job.report
import job.versions
import policy as policies
from studies import (
    everything,
    figures,
    gates,
    longer,
    paper_scale,
    rungs,
    runs,
    same_tau,
    survey,
    table2,
)

VERSION = job.versions.version
ALL = runs.NAMES
FEW = {loss: ALL[loss] for loss in ("ipo", "ipo_md", "rl")}
TINY = dict(
    steps=2,
    long=4,
    seeds=2,
    prompts=6,
    test=8,
    taus=1,
    extend=0,
    stages=["--supervised-steps", "3", "--preference-steps", "3", "--batch-size", "4"],
)


class Here:
    """An executor without processes."""

    def __init__(self, *_):
        pass

    def submit(self, work, todo):
        future = concurrent.futures.Future()
        future.set_result(work(dict(todo)))
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


def test_the_table_is_drawn_again_from_its_lines(whole, capsys, tmp_path):
    """--from-results prints the same characters, twice; without lines it says which is missing."""
    for _ in range(2):
        assert run(table2, whole, "--from-results") == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]
    assert out.count("IPO over RL") == 2
    assert run(table2, tmp_path, "--from-results") == 2
    assert "are missing" in capsys.readouterr().err


def test_what_a_line_says(whole):
    """Its options, the version, every checkpoint; the start against itself would be 1/2: the first
    KL is small."""
    found = [line for line in lines(whole) if "points" in line]
    for line in found:
        assert line["version"] == "this"
        assert [point["step"] for point in line["points"]] == [1, 2]
        assert abs(line["points"][0]["kl"]) < 1
        assert line["curve"][0]["kl"] == 0
    assert {line["loss"] for line in found} == set(runs.NAMES)
    assert {line["seed"] for line in found} == {0, 1}


def test_table_entries(whole, capsys):
    """The table is antisymmetric; its entry is the mean of the lines of the four comparisons."""
    assert run(table2, whole, "--from-results") == 0
    table = capsys.readouterr().out.split("| panel |")[1].split("\n\n")[0].splitlines()[2:]
    cells = []
    for row in table:
        texts = row.strip("| ").split(" | ")[1:]
        cells.append([float(text.split()[0]) for text in texts])
    for row in range(3):
        for column in range(3):
            assert cells[row][column] + cells[column][row] == pytest.approx(1, abs=1.1e-3)
    matches = []
    for line in lines(whole):
        if line["name"].startswith("test: ipo-") and " : ipo_md-" in line["name"]:
            matches.append(line["win_rate"])
    assert len(matches) == 4
    assert cells[0][1] == pytest.approx(statistics.mean(matches), abs=5e-4)


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
    matches = {}
    for pair, numbers in values.items():
        matches[pair] = [dict(learned=number) for number in numbers]
    mean, deviation = table2.entries(matches, "learned")
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
    1e-4)/3, t = 2.776 -> .0358. The second one wins at as much below 1/2."""
    values = 0.62 + np.array([[-0.03, -0.02, -0.01], [-0.01, 0.0, 0.01], [0.01, 0.02, 0.03]])
    pair = ("ipo", "rl")
    assert table2.verdict(pair, values) == "IPO over RL: 0.620 +- 0.036 (95 %): IPO wins"
    assert table2.verdict(pair, values - 0.1).endswith("not separated")
    assert table2.verdict(pair, 1 - values) == "IPO over RL: 0.380 +- 0.036 (95 %): RL wins"


def test_the_grid_is_extended_while_the_best_is_at_its_edge(monkeypatch):
    """A rival against which the win rate is 1 - |log2(tau/0.0125)|/10: the grid grows to 0.00625
    and stops there; then beta = 0.25 at 0.0125 for the methods that sample a mixture."""
    asked = []

    def gather(study, work, todos):
        asked[:] = [todo["name"] for todo in todos]
        return [dict(todo, points=[dict(step=1)]) for todo in todos]

    def against(study, pairs):
        found = []
        for name, _ in pairs:
            tau = float(name.split("-tau")[1].split("-")[0])
            found.append(dict(win_rate=1 - abs(np.log2(tau / 0.0125)) / 10))
        return found

    monkeypatch.setattr(runs, "gather", gather)
    monkeypatch.setattr(runs, "against", against)
    grid = (0.05, 0.1, 0.025)
    for loss in FEW:
        monkeypatch.setitem(runs.GRID, loss, grid)
    study = SimpleNamespace(taus=3, extend=4, steps=8, prompts=1, stages=[], folder="", shared={})
    chosen = table2.tune(study, ["ipo", "ipo_md"], "SFT")
    assert chosen["ipo"].run["tau"] == chosen["ipo_md"].run["tau"] == 0.0125
    assert (chosen["ipo"].tried, chosen["ipo_md"].tried) == (5, 6)
    assert "ipo_md-tau0.0125-beta0.25-seed0-steps8" in asked
    assert not [name for name in asked if name.startswith("ipo-") and "beta0.25" in name]


@pytest.mark.slow
def test_every_figure(whole, capsys, monkeypatch):
    """All the others, from the runs that there are and the ones they add."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    for name in ("fig1", "fig3", "fig4", "fig5", "frontier"):
        assert run(figures, whole, name) == 0, capsys.readouterr().err
    assert run(same_tau, whole) == 0, capsys.readouterr().err
    for name in ("fig1", "fig3", "fig4", "fig5", "same_tau", "frontier"):
        assert (whole / "results" / f"{name}-smoke.png").stat().st_size > 5000
    assert "1/2 + Var/tau" in capsys.readouterr().out


@pytest.mark.slow
def test_longer_runs_and_the_papers_scale(whole, capsys, monkeypatch):
    """Both on the smallest runs, and drawn again from their lines."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    monkeypatch.setattr(longer, "CELLS", (("ipo", 0, 4), ("nash_md", 0, 4)))
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


def test_where_averaged_ipo_stops():
    """The gradient of ipo.loss itself on means is 0 there, and not beside it nor at Nash; the point
    is pi_ref exp(|y| (p/tau + c)); equal lengths L are sums at tau/L."""
    w = enumerated.world(0)
    preferences, log_ref = w.preferences[0], w.log_ref[0]
    tau, lengths = 0.3, paper_scale.LENGTHS

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
    """So do the pages of the survey, of the paper's taus and of the rungs, each line."""
    monkeypatch.setattr(runs, "NAMES", ALL)
    monkeypatch.setattr(job.versions, "version", VERSION)
    monkeypatch.setattr(runs, "plot", lambda *_: None)
    monkeypatch.setattr(job.report, "plot", lambda *_: None)
    folder = Path(__file__).resolve().parent.parent / "results"
    pages = ((survey, "survey"), (paper_scale, "paper_scale"))
    for study, page in (*pages, (rungs, "equilibrium"), (longer, "equilibrium")):
        text = (folder / f"{page}.md").read_text(encoding="utf-8")
        assert study.main(["--from-results", "--results", str(folder)]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(shown) > 7
        for line in shown:
            assert line in text, line


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
