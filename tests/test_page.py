"""exercises/simplex.html, the page to play with: JavaScript that must do what bandit.py does.

The page holds fifty games of bandit.py and compares itself with them. Here: that these are
bandit.py's, that the page agrees with all (under node and in a browser, where there is one), and
that a page with a planted mistake does not.
"""

import json
import re
import shutil
import subprocess

import pytest
import torch

import bandit
import ipo
import ipo_md
from exercises.teacher import embed_games, view_page

TEXT = embed_games.PAGE.read_text(encoding="utf-8")
NODE = shutil.which("node")
BROWSER = view_page.find_browser()
needs_node = pytest.mark.skipif(NODE is None, reason="no node")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium")
GAMES, QUANTITIES = 50, 30  # of a game: twelve, and three of each of six methods


def numbers(value):
    """Every number and None of nested lists and dictionaries, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [value]
    return [number for entry in value for number in numbers(entry)]


def assert_embedded(count):
    """The page's first games are what the command writes, to rounding."""
    found, wanted = embed_games.embedded(TEXT), embed_games.games(count)
    assert len(found) == GAMES == embed_games.COUNT
    for game, other in zip(found[:count], wanted, strict=True):
        assert list(game) == list(other) and list(game["methods"]) == list(other["methods"])
        # Newton's residual is 1e-11, the rest is rounding, of another processor at worst.
        assert numbers(game) == pytest.approx(numbers(other), rel=1e-11, abs=1e-11)


def test_the_games_are_bandits():
    assert_embedded(3)


@pytest.mark.slow
def test_all_games_are_bandits():
    assert_embedded(GAMES)


def test_the_games_try_the_page():
    """Games with and without a cycle, over the sliders' range; the methods' points differ."""
    games = embed_games.embedded(TEXT)
    taus = [game["tau"] for game in games]
    assert min(taus) < 0.03 and max(taus) > 1
    cyclic = 0
    for game in games:
        p = game["preferences"]
        cyclic += (p[0][1] > 0.5) == (p[1][2] > 0.5) == (p[2][0] > 0.5)
        assert all(p[i][j] + p[j][i] == pytest.approx(1) for i in range(3) for j in range(3))
        steps = [tuple(method["gradient"]) for method in game["methods"].values()]
        assert len(set(steps)) == len(steps)
    assert 5 < cyclic < 45


def test_embedding_changes_the_games_alone():
    changed = embed_games.embed(TEXT, [{"tau": 1.0}])
    assert embed_games.embedded(changed) == [{"tau": 1.0}]
    assert embed_games.embed(changed, embed_games.embedded(TEXT)) == TEXT


def test_commands_refuse_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CHROME_BIN", str(tmp_path / "none"))
    (tmp_path / "page.html").write_text("<p>no games</p>", encoding="utf-8")
    monkeypatch.setattr(embed_games, "games", list)
    for command, argv, words in (
        (view_page.main, [], "No such file"),
        (view_page.main, ["--picture", str(tmp_path / "no" / "page.png")], "--picture"),
        (embed_games.main, ["--page", str(tmp_path / "page.html")], "holds no block"),
        (embed_games.main, ["--page", str(tmp_path / "other.html")], "No such file"),
    ):
        with pytest.raises(SystemExit) as refused:
            command(argv)
        error = capsys.readouterr().err
        assert refused.value.code == 2 and error.count("\n") == 1 and words in error


def test_the_page_needs_no_network():
    """Nothing is loaded: no address but the namespace of SVG, no link but to the page itself."""
    addresses = re.findall(r"[a-z]+://[^\s\"'`<>]+", TEXT)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"\bsrc=|\bimport\b|\bfetch\(|@import|url\(", TEXT)
    assert set(re.findall(r'href="([^"]*)"', TEXT)) == {"#test"}


def test_the_page_has_bandits_names():
    """winRate for win_rate: a reader of the one finds the other."""
    python = vars(bandit) | vars(ipo) | vars(ipo_md)
    names = re.findall(r"^function (\w+)", core_of(TEXT), re.MULTILINE)
    snake = {re.sub(r"([A-Z])", r"_\1", name).lower() for name in names}
    same = {name for name in snake if name in python}
    assert same >= {"bradley_terry", "win_rate", "respond", "mixture", "newton", "fixed_point"}
    assert same >= {"kl", "total_variation", "duality_gap", "fit_reward", "rlhf_policy"}
    assert same >= {"dpo_point", "log_ratio_gap", "gradient", "descend"}


def core_of(text):
    """The page's lab, which needs no browser."""
    return text.split('<script id="core">')[1].split("</script>")[0]


def test_the_page_is_read_without_colour_and_without_eyes():
    """Methods differ by dash and by mark; whatever is moved has a name.

    An output is labelable: a label without for= would name it and not the slider behind it.
    """
    looks = re.findall(r'colour: "(#\w+)", dash: "([\d ]*)", mark: "(\w+)"', TEXT)
    assert len(looks) == 6 and all(len(set(column)) == 6 for column in zip(*looks, strict=True))
    sliders = re.findall(r'<input type="range" id="(\w+)"', TEXT)
    assert len(sliders) == 7
    assert sliders == re.findall(r'<label for="(\w+)">', TEXT)
    assert all("aria-label=" in tag for tag in re.findall(r"<svg id[^>]*>", TEXT))


def compare(cores, games):
    """What each lab's own comparison finds, under node: counts, what is wrong."""
    program = f"""
        const games = {json.dumps(games)};
        const labs = {json.dumps(cores)}.map((core) => new Function(core + "; return compare")());
        console.log(JSON.stringify(labs.map((compare) => compare(games))));"""
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_the_page_agrees_with_bandit():
    (result,) = compare([core_of(TEXT)], embed_games.embedded(TEXT))
    assert not result["wrong"]
    assert result["gamesAgree"] == result["games"] == GAMES
    assert result["agree"] == result["quantities"] == GAMES * QUANTITIES


# Each breaks one thing: what stands in the page, what the mistake writes, the quantity it spoils.
MISTAKES = (
    ("[0.5, 0.5 + margin12, 0.5 - margin31]", "[0.5, 0.5 + margin31, 0.5 - margin12]")
    + ("preferences",),
    ("(1 - beta) * log + beta * logRef[y]", "beta * log + (1 - beta) * logRef[y]", "mixture"),
    ("const target = 1 / (2 * tau);", "const target = 1 / tau;", "online IPO: gradient"),
    ("label - 0.5 - tau * (logp - refLogp)", "label - 0.5 - tau * logp", "Nash-MD-PG: descent"),
    ("-tau * (label - sigmoid(tau * h))", "-tau * (label - sigmoid(h))", "online DPO: gradient"),
    ("[-advantage / 2, advantage / 2]", "[-advantage, advantage]", "RL: gradient"),
    ('pair: ["policy", "mixture"]', 'pair: ["policy", "policy"]', "Nash-MD-PG: gradient"),
    ("+ tau * kl(logPi, logRef)) - 1", "- tau * kl(logPi, logRef)) - 1", "duality_gap"),
    ("(logPi, game) => game.logData", "(logPi, game) => game.logRef", "offline IPO: descent"),
    ("gradientScale: (tau) => 2 * tau", "gradientScale: (tau) => tau", "online DPO: natural step"),
    ('method.pair[0] === "policy" ?', 'method.pair[1] === "policy" ?', "Nash-MD-PG: natural step"),
    ("OrNull(preferences, logRef, tau, beta)", "OrNull(preferences, logRef, tau)", "shifted"),
)


@needs_node
def test_a_page_with_a_mistake_is_noticed():
    for right, *_ in MISTAKES:
        assert TEXT.count(right) == 1, right
    cores = [core_of(TEXT.replace(right, wrong)) for right, wrong, _ in MISTAKES]
    results = compare(cores, embed_games.embedded(TEXT)[:2])
    for result, (_, wrong, spoiled) in zip(results, MISTAKES, strict=True):
        assert result["gamesAgree"] == 0, wrong
        assert any(line.split(", ")[1].startswith(spoiled) for line in result["wrong"]), wrong


@needs_browser
@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    """The same counts from the page that a browser shows; and less with a planted mistake."""
    games, quantities, _ = view_page.agreement(BROWSER)
    assert games.startswith(f"{GAMES} of {GAMES} games")
    assert quantities.startswith(f"{GAMES * QUANTITIES} of {GAMES * QUANTITIES} quantities")
    right, wrong, _ = MISTAKES[1]
    page = tmp_path / "simplex.html"
    page.write_text(TEXT.replace(right, wrong), encoding="utf-8")
    assert view_page.agreement(BROWSER, page)[0].startswith("0 of 50 games")


# Moves the reference with the keyboard, the data's law with a finger and tau with its slider, and
# writes what the page shows then.
HANDS = """
<script>
window.addEventListener("DOMContentLoaded", () => {
  const press = (key) => element("reference").dispatchEvent(new KeyboardEvent("keydown", { key }));
  for (let count = 0; count < 5; count++) press("ArrowRight");
  const client = new DOMPoint(...place(EVEN)).matrixTransform(element("simplex").getScreenCTM());
  const at = { clientX: client.x, clientY: client.y };
  element("data").dispatchEvent(new PointerEvent("pointerdown"));
  for (const kind of ["pointermove", "pointerup"]) window.dispatchEvent(new PointerEvent(kind, at));
  window.dispatchEvent(new PointerEvent("pointermove", { clientX: 0, clientY: 0 }));
  element("tau").value = 0.3;
  element("tau").dispatchEvent(new Event("input"));
  redrawNow();
  const texts = ["reference-out", "data-out", "tau-out"].map((id) => element(id).textContent);
  const row = [...element("rows").children].map((row) => row.children[2].textContent);
  const spoken = element("reference").getAttribute("aria-valuetext");
  const wide = document.documentElement.scrollWidth - innerWidth;
  const found = { texts, row, spoken, wide };
  document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify(found)}</pre>`);
});
</script></body>"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_under_hands(tmp_path, width):
    """Keys, a finger and a slider move what they should, and the page is no wider than a phone.

    By hand: an arrow is 1/100 of the triangle's side, to the right from action 1 to action 2.
    """
    page = tmp_path / "simplex.html"
    page.write_text(TEXT.replace("</body>", HANDS), encoding="utf-8")
    size = f"--window-size={width},844"
    document = view_page.open_page(BROWSER, page.as_uri(), size, "--dump-dom")
    found = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', document)[-1])
    assert found["texts"] == ["0.550 0.350 0.100", "0.333 0.333 0.333", "2.0"]
    assert found["spoken"] == "action 1 0.55, action 2 0.35, action 3 0.10"
    assert found["wide"] <= 0
    log_ref = torch.tensor([0.55, 0.35, 0.1], dtype=torch.float64).log()
    even = torch.zeros(3, dtype=torch.float64).log_softmax(0)
    game = bandit.cycle(0.4), log_ref, 10**0.3
    for row, wanted in (
        (0, bandit.fixed_point(*game)),
        (1, bandit.fixed_point(*game, 0.25)),
        (3, bandit.dpo_point(*game)),
        (4, bandit.respond(*game, even)),
    ):
        assert found["row"][row] == " ".join(f"{p:.3f}" for p in wanted.exp().tolist())


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws(tmp_path, width):
    """A picture of that width, and in the page every method's line, mark and row."""
    import matplotlib.image

    file = tmp_path / "page.png"
    view_page.main(["--picture", str(file), "--width", str(width), "--height", "844"])
    picture = matplotlib.image.imread(file)
    assert picture.shape[:2] == (844, width) and picture[..., :3].std() > 0.05
    document = view_page.open_page(BROWSER, embed_games.PAGE.as_uri(), "--dump-dom")
    rows = re.findall(r'<tr data-method="([^"]+)">', document)
    assert rows == list(embed_games.embedded(TEXT)[0]["methods"])
    assert "NaN" not in document.split('id="games"')[0].split("</style>")[1].split("<script")[0]
    # The first game's Nash point, as bandit.py has it.
    reference = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    nash = bandit.fixed_point(bandit.cycle(0.4), reference, 0.1).exp().tolist()
    assert " ".join(f"{p:.3f}" for p in nash) in document
