"""docs/map.md: every row names code, a proof and a section that exist, and the paper is all there.

Its own numbers are the code's: our hyper-parameters, the lines of the algorithms, Table 1, and what
claims.py measures.
"""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import claims
import enumerated
import train
from job.options import parse
from studies import runs
from test_design import PROCEDURES

ROOT = Path(__file__).resolve().parent.parent
MAP = ROOT / "docs" / "map.md"
TEXT = MAP.read_text(encoding="utf-8")
THEORY = (ROOT / "THEORY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`((?:\w+/)*\w+\.py)(::?)(\w+)`")


def tables(text):
    """The tables of a page: lists of rows, each {column: cell}, in their order."""
    found, head = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            head = None
            continue
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if head is None:
            head = cells
            found.append([])
        elif set(line) - set("|- "):
            assert len(cells) == len(head), line
            found[-1].append(dict(zip(head, cells, strict=True)))
    return found


TABLES = tables(TEXT)
ROWS = [row for table in TABLES for row in table]
OF_PAPER = [row for row in ROWS if {"paper", "code", "THEORY"} <= set(row)]


def source(path):
    return (ROOT / path).read_text(encoding="utf-8")


def defined(path):
    """Name -> node of what a file defines, sets or imports at its top level."""
    found = {}
    for node in ast.parse(source(path)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            names = [name for target in node.targets for name in ast.walk(target)]
            found |= {name.id: node for name in names if isinstance(name, ast.Name)}
    return found


def anchors(text):
    """The anchors of a page's headings, as they are made where it is shown."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# What it names


def test_every_name_exists_and_is_a_link_to_its_file():
    named = NAMED.findall(TEXT)
    assert len(named) > 200, "the pattern must find the references, or the test is empty"
    missing = []
    for path, colons, name in named:
        is_test = Path(path).name.startswith("test_")
        known = (ROOT / path).is_file() and name in defined(path)
        if not known or (colons == "::") != is_test:
            missing.append(f"{path}:{name}")
    assert not missing
    linked = re.findall(r"\[`((?:\w+/)*\w+\.py)::?\w+`\]\(\.\./([\w/.]+)\)", TEXT)
    assert len(linked) == len(named) and all(path == target for path, target in linked)


def test_every_link_leads_somewhere():
    """To a file, and to a heading of it."""
    links = re.findall(r"\]\(([^)]+)\)", TEXT) + re.findall(r"^\[\d+\]: (.+)$", TEXT, re.MULTILINE)
    for link in links:
        path, _, anchor = link.partition("#")
        page = (MAP.parent / path).resolve() if path else MAP
        assert page.exists(), link
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), link


def test_every_section_has_its_own_anchor():
    """[7] is section 7 of THEORY.md, and no number is used without its line at the end."""
    lines = dict(re.findall(r"^\[(\d+)\]: \.\./THEORY\.md#(.+)$", TEXT, re.MULTILINE))
    used = set(re.findall(r"(?<!\))\[(\d+)\](?![:(])", TEXT))
    assert used == set(lines) and len(used) > 20
    for number, anchor in lines.items():
        assert anchor.startswith(f"{number}-"), anchor


def test_commands_exist():
    """`python -m studies.NAME PART`, `python FILE.py`, and train.py's options."""
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for path in re.findall(r"python ([\w/]+\.py)", TEXT):
        assert (ROOT / path).is_file(), path
    for argv in re.findall(r"`python train\.py ([^`]+)`", TEXT):
        parse(argv.split())


# What is in it


def test_every_row_has_code_proof_and_figure():
    for row in OF_PAPER:
        first = row["paper"]
        assert ".py:" in row["code"] or "](#" in row["code"] or "Figure" in row["code"], first
        assert ".py:" in row["proved by"] or row["proved by"] == "below", first


def equations(cell):
    """The equations that a cell names: "eq 1 to 3" is three of them."""
    found = set()
    for first, last in re.findall(r"\beq (\d+)(?: to (\d+))?", cell):
        found.update(range(int(first), int(last or first) + 1))
    return found


PARTS = ("Prop 4.1", "Prop 4.2", "Prop 5.1", "Prop 5.2", "Table 1", "Table 2")
PARTS += tuple(f"Figure {number}" for number in range(1, 7))
PARTS += tuple(f"App. {letter}" for letter in "ABCDEF") + ("F.5", "F.6", "F.7", "F.8", "F.9")
PARTS += ("sec 5.1", "NLHF Thm 1", "NLHF sec 7", "SLiC", "self-play", "offline sampling")


def test_all_of_the_paper_is_there():
    first = [row["paper"] for row in OF_PAPER]
    assert set().union(*map(equations, first)) == {*range(1, 14), 15}
    for part in PARTS:
        assert any(cell.startswith(part) or f"{part}:" in cell for cell in first), part
    for number in (1, 2, 3):
        assert f"**Algorithm {number}: " in TEXT


def test_it_is_in_the_papers_order():
    begins = [min(equations(row["paper"])) for row in OF_PAPER if equations(row["paper"])]
    assert begins == sorted(begins)
    titles = re.findall(r"^## (?:Sections? (\d)|Appendices|Algorithms)", TEXT, re.MULTILINE)
    assert titles == ["2", "3", "5", "6", "", ""]


def test_every_claim_has_a_row():
    """As a proof, under the name that claims.py has in its table."""
    proofs = "".join(row["proved by"] for row in OF_PAPER)
    for claim in claims.CLAIMS:
        assert f"`claims.py:{claim.__name__}`" in proofs, claim.__name__


def test_every_loss_has_a_row():
    """Its file's head names the same source."""
    losses = {path.stem for path in (ROOT / "losses").glob("*.py")}
    losses = {
        name for name in losses if name in PROCEDURES or "\nTAU = " in source(f"losses/{name}.py")
    }
    rows = [row for row in ROWS if set(row) == {"method", "code", "source", "proved by"}]
    found = set()
    for row in rows:
        path, _, _ = NAMED.search(row["code"]).groups()
        found.add(Path(path).stem)
        numbers = re.findall(r"\d{4}\.\d{5}", row["source"])
        assert numbers, row
        if path != "losses/ipo_group.py":  # the paper's own, whose number is in ipo.py's head
            assert all(number in source(path).split('"""')[1] for number in numbers), row
        assert NAMED.search(row["proved by"]), row
    assert found == losses and len(rows) == len(losses)


def test_the_lines_of_the_algorithms_are_the_codes():
    """Each stands in the function that is named beside it; a constant's in its file."""
    rows = [row for row in ROWS if set(row) == {"step", "where", "line"}]
    assert len(rows) > 20
    for row in rows:
        path, _, name = NAMED.search(row["where"]).groups()
        text, node = source(path), defined(path)[name]
        if isinstance(node, ast.FunctionDef):
            begin = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
            text = "\n".join(text.splitlines()[begin : node.end_lineno])
        assert row["line"].strip("`") in text, row


# Its numbers


def value_of(row):
    """What the code has for a row of the hyper-parameters, as its cell says it, or None."""
    option = re.fullmatch(r"`--([\w-]+)`", row["code"])
    if option:
        return getattr(parse([]), option[1].replace("-", "_"))
    path, _, name = NAMED.search(row["code"]).groups()
    value = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    if name == "GRID":
        losses = {name: loss for loss, name in runs.NAMES.items()}
        return sorted(value[losses[row["what"].split(", ")[1]]])
    if name == "SCALES":
        return value["full"]["test" if "test" in row["what"] else "seeds"]
    return value if name in ("TAU", "BETA", "RATE") else None


def test_our_hyper_parameters_are_the_codes():
    """Defaults of methods, options and Table 2's protocol."""
    rows = [row for row in ROWS if "paper" in row and "here" in row]
    compared = 0
    for row in rows:
        value = value_of(row)
        if value is None:  # said in words
            continue
        written = row["here"]
        if isinstance(value, list):
            assert [float(part) for part in written.split(", ")] == value, row
        elif isinstance(value, (str, bool)):
            assert written == str(value), row
        else:
            assert float(written) == value, row
        compared += 1
    assert compared >= 25 and len(rows) - compared == 3
    assert "AdamW" in source("train.py") and "weight_decay=0.0" in source("train.py")


# The paper's Table 1: contrastive, online, regularised sampling.
TABLE_1 = {
    "ipo offline": ("yes", "no", "no"),
    "nash_md": ("no", "yes", "yes"),
    "ipo": ("yes", "yes", "no"),
    "ipo_md": ("yes", "yes", "yes"),
}


def test_table1_is_the_papers(capsys):
    """python train.py --table1: the paper's four rows, and its other methods', nothing run."""
    assert train.main(["--table1", "--out", "nowhere"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "method" and not (ROOT / "nowhere").exists()
    found = {}
    for line in lines:
        name, contrastive, online, regularised, drawers = re.split(r" {2,}", line)
        found[name] = contrastive, online, regularised
        assert (drawers == "records") == (online == "no")
        assert ("mixture" in drawers) == (regularised == "yes")
    assert {name: found[name] for name in TABLE_1} == TABLE_1
    ours = {f"{loss}{mode}" for loss in ("ipo", "dpo", "slic") for mode in ("", " offline")}
    assert set(found) == ours | {"ipo_md", "nash_md", "rl"}
    assert found["rl"] == ("no", "yes", "no") and found["dpo"] == found["slic"] == found["ipo"]


def test_a_runs_first_line_is_its_row_of_table_1(capsys):
    """The two are one function's: what a run says is what the table says."""
    from job import report

    options = parse(["--loss", "dpo", "--offline"])
    report.print_method(options, train.find_method("dpo"))
    assert capsys.readouterr().out.startswith("dpo: contrastive yes, online no, y from the records")


def numbers(cell):
    return [float(number) for number in re.findall(r"-?\d\.\de-\d+", cell)]


@pytest.mark.slow
def test_measured_figures_are_what_claims_measures():
    """All claims at their default seed and number of games: above 1e-9 to a tenth; below, where
    rounding decides, to a factor of 100."""
    generator = torch.Generator().manual_seed(0)
    games = [claims.problem(generator) for _ in range(50)]
    worst = {claim.__name__: claim(games, generator).worst for claim in claims.CLAIMS}
    compared = set()
    for row in OF_PAPER:
        named = re.findall(r"`claims\.py:(\w+)`", row["proved by"])
        named = [name for name in named if name in worst]
        written = numbers(row["measured"])
        if named and row["measured"]:
            assert len(written) >= len(named), row
        for name, figure in zip(named, written, strict=False):
            found = worst[name]
            compared.add(name)
            if abs(figure) > 1e-9:
                assert found == pytest.approx(figure, rel=0.1), (name, figure)
            else:
                assert abs(found) <= max(100 * abs(figure), 1e-15), (name, figure)
                assert abs(figure) <= 100 * max(abs(found), 1e-16), (name, figure)
    assert compared == set(worst)


def test_the_per_token_figures_are_enumerated_pys():
    """What the map and THEORY.md say of the per-token mixture, at tau 0.1, to a tenth."""
    table = list(enumerated.mixture_table(enumerated.world(0), (0.1,), (0.125, 0.5)))
    row = next(row for row in OF_PAPER if "mixture_table" in row["code"])
    assert numbers(row["measured"]) == [pytest.approx(table[0][3], rel=0.1)]
    sentence = next(line for line in THEORY.splitlines() if "`python enumerated.py` prints" in line)
    wanted = [table[0][3], table[1][3], table[0][4], table[1][4]]
    assert numbers(sentence) == [pytest.approx(number, rel=0.1) for number in wanted]
