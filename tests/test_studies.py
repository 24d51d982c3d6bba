"""experiments.py on a scale of seconds, in this process: the table, drawn again from its lines, and after an interruption."""

import concurrent.futures
import json
import statistics
from pathlib import Path

import pytest

import evaluate
from studies import runs as experiments
import policy as policies
import train

VERSION, ALL = train.version, experiments.NAMES
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

    def submit(self, work, job):
        future = concurrent.futures.Future()
        future.set_result(work(dict(job)))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setitem(experiments.SCALES, "smoke", TINY)
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", Here)
        measure = (
            evaluate.measure
        )  # train.py's hundred validation prompts would be most of the time
        patch.setattr(
            evaluate,
            "measure",
            lambda *given, **named: measure(*given[:5], min(given[5], 8), **named),
        )
        patch.setattr(train, "version", lambda: "this")
        patch.setattr(experiments, "NAMES", FEW)
        patch.setenv("TQDM_DISABLE", "1")
        yield patch


def run(folder, *argv):
    return experiments.main(
        [
            *argv,
            "--scale",
            "smoke",
            "--results",
            str(folder / "results"),
            "--runs",
            str(folder / "runs"),
        ]
    )


def lines(folder):
    return [
        json.loads(line) for line in (folder / "results" / "smoke.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, "table2") == 0
    return folder


def test_the_table_is_drawn_again_from_its_lines(whole, capsys, tmp_path):
    """--from-results prints the same characters, twice; without the lines it says which is missing."""
    for _ in range(2):
        assert run(whole, "table2", "--from-results") == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :] and out.count("IPO over RL") == 2
    assert (
        run(tmp_path, "table2", "--from-results") == 2 and "are missing" in capsys.readouterr().err
    )


def test_what_a_line_says(whole):
    """Its options, the version, every checkpoint; the SFT start against itself would be 1/2: the first KL is small. The table is
    antisymmetric, and its entry is the mean of the lines of the four comparisons."""
    runs = [line for line in lines(whole) if "points" in line]
    assert all(
        line["version"] == "this" and [point["step"] for point in line["points"]] == [1, 2]
        for line in runs
    )
    assert {line["loss"] for line in runs} == set(experiments.NAMES) and {
        line["seed"] for line in runs
    } == {0, 1}
    assert all(abs(line["points"][0]["kl"]) < 1 and line["curve"][0]["kl"] == 0 for line in runs)


def test_table_entries(whole, capsys):
    assert run(whole, "table2", "--from-results") == 0
    table = capsys.readouterr().out.split("| panel |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[float(cell.split()[0]) for cell in row.strip("| ").split(" | ")[1:]] for row in table]
    for i in range(3):
        for j in range(3):
            assert cells[i][j] + cells[j][i] == pytest.approx(1, abs=1.1e-3)
    matches = [
        line["win_rate"]
        for line in lines(whole)
        if line["name"].startswith("test: ipo-") and " : ipo_md-" in line["name"]
    ]
    assert len(matches) == 4 and cells[0][1] == pytest.approx(statistics.mean(matches), abs=5e-4)


def test_interrupted_and_continued(whole, tmp_path, monkeypatch, capsys, after=12):
    """Stopped at a line's writing, which leaves half of it: the same command goes on and prints the table of the uninterrupted run."""
    write, count = train.write, [0]

    def stops(file, line):
        count[0] += "version" in line
        if count[0] == after and "version" in line:
            file.write(json.dumps(line)[:40])
            file.flush()
            raise KeyboardInterrupt
        write(file, line)

    monkeypatch.setattr(train, "write", stops)
    assert run(tmp_path, "table2") == 130 and "goes on" in capsys.readouterr().err
    monkeypatch.setattr(train, "write", write)
    assert len(lines_or_half(tmp_path)) == after
    assert run(tmp_path, "table2") == 0
    table = capsys.readouterr().out
    assert run(whole, "table2", "--from-results") == 0
    assert table.endswith(capsys.readouterr().out)


def lines_or_half(folder):
    return (folder / "results" / "smoke.jsonl").read_text().splitlines()


def test_lines_of_other_versions_are_made_again(whole, tmp_path, monkeypatch, capsys):
    """A raised version: what is drawn without --from-results is new."""
    monkeypatch.setattr(train, "version", lambda: "another")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "smoke.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines(whole))
    )
    assert run(tmp_path, "fig2") == 0
    assert [line["version"] for line in lines(tmp_path)][-1] == "another" and (
        tmp_path / "results" / "fig2-smoke.png"
    ).exists()


def test_every_version_is_in_the_text(monkeypatch):
    """Raising any of the four makes other lines, and other folders, of all results."""
    for name in train.VERSIONS:
        monkeypatch.setitem(train.VERSIONS, name, 9)
        assert "9" in VERSION() and VERSION() != "1.1.1.1"
        monkeypatch.undo()


def test_verdict_by_hand():
    """3 x 3 values with row means .6, .62, .64 and column means .61, .62, .63: se^2 = (4e-4 + 1e-4)/3, t = 2.776 -> .0358."""
    values = [0.62 + 0.02 * i + 0.01 * j for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert (
        experiments.verdict(("ipo", "rl"), values, 3)
        == "IPO over RL: 0.620 +- 0.036 (95 %): IPO wins"
    )
    assert experiments.verdict(("ipo", "rl"), [value - 0.1 for value in values], 3).endswith(
        "not separated"
    )


def test_every_figure(whole, capsys, monkeypatch):
    """All the others, from the runs that there are and the ones they add."""
    monkeypatch.setattr(experiments, "NAMES", ALL)
    for name in ("fig1", "fig3", "fig4", "fig5", "same_tau", "frontier"):
        assert run(whole, name) == 0, capsys.readouterr().err
        assert (whole / "results" / f"{name}-smoke.png").stat().st_size > 5000
    assert "1/2 + Var/tau" in capsys.readouterr().out


def test_the_committed_table_is_the_documented_one(capsys, monkeypatch):
    """results/README.md holds what `python experiments.py table2 --from-results` prints, line by line."""
    monkeypatch.setattr(experiments, "NAMES", ALL)
    folder = Path(experiments.__file__).parent.parent / "results"
    assert experiments.main(["table2", "--from-results", "--results", str(folder)]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) > 35 and not [line for line in printed if line not in text]
