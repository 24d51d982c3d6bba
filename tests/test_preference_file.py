"""--preference FILE.py: a reader's own rule in place of the learned preference, in training and as
judge, and what is said of a file that does not do what it must."""

import json

import pytest
import torch

import evaluate
import policy as policies
import train
from job import judged
from job import run as runs
from job.options import parse
from test_data import records, write

FEW = "--supervised-steps 2 --preference-steps 2 --steps 5 --batch-size 4 --eval-prompts 4".split()
FEW += "--max-prompt-tokens 24 --max-response-tokens 6 --device cpu".split()
# The shorter wins; the call that fails is of line 3.
SHORTER = """\
def preference(prompts, ys, ys_other):
    lengths = [(len(y.split()), len(other.split())) for y, other in zip(ys, ys_other)]
    return [(1 + other) / (2 + one + other) for one, other in lengths]
"""
VERDICT = "def preference(prompts, ys, ys_other):\n    return "


pytestmark = pytest.mark.usefixtures("small_and_cached")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose runs share their stages, with the rule in it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "shorter.py").write_text(SHORTER)
    return folder


def run(place, name, *options):
    """train.main in-process: the exit status. The run's folder is place/name."""
    places = ["--stages", str(place / "stages"), "--out", str(place / name)]
    return train.main([*FEW, *places, *map(str, options)])


@pytest.fixture
def seen(monkeypatch):
    """The pairs of every step, as the update gets them: a list of (prompt, y, y_other, label)."""
    pairs = []
    evidence = runs.Run.evidence

    def watched(self, step, *given):
        pairs.append(given)
        return evidence(self, step, *given)

    monkeypatch.setattr(runs.Run, "evidence", watched)
    return pairs


@pytest.fixture(scope="module")
def finished(place):
    """The built-in task's run with the rule, which makes the stage that others use again."""
    assert run(place, "rule", "--preference", place / "shorter.py") == 0
    return place / "rule"


def words(tokens):
    """How many words each response has: built-in tokens are words, end-of-text is none."""
    return [sum(token != 0 for token in row) for row in tokens.lists()]


def test_five_steps_with_a_rule(place, finished, seen, capsys):
    """Labels are the rule's, no preference model is trained, the panel stays the judge of the
    built-in task, and the screen says both."""
    assert run(place, "again", "--preference", place / "shorter.py") == 0
    out = capsys.readouterr().out
    assert f"preference: {place / 'shorter.py'} is asked" in out and "own panel" in out
    assert not list((place / "stages").glob("preference-*"))
    assert len(seen) == 5
    expected = []
    for _, y, y_other, label in seen:
        lengths = zip(words(y), words(y_other), strict=True)
        expected = [(1 + other) / (2 + one + other) for one, other in lengths]
        assert label.tolist() == pytest.approx(expected, rel=1e-6) and label.dtype == torch.float32
    assert len(set(expected)) > 1, "equal lengths would show nothing"
    assert "completist" in (place / "again" / "samples.txt").read_text()
    config = json.loads((place / "again" / "config.json").read_text())
    assert config["preference_file"] == runs.file_hash(place / "shorter.py")


def test_a_changed_file_is_another_run(place, finished, monkeypatch, capsys):
    """Stopped in the fifth step: with another text under the same name it is refused in one line,
    with the file as it was it goes on, and ends as the run that was not stopped."""
    path = place / "changing.py"
    path.write_text(SHORTER)
    given = ["changed", "--preference", path, "--save-every", "2"]
    evidence = runs.Run.evidence

    def stops(self, step, *pairs):
        if step == 4:
            raise ValueError("stopped")
        return evidence(self, step, *pairs)

    monkeypatch.setattr(runs.Run, "evidence", stops)
    assert run(place, *given) == 2
    monkeypatch.undo()
    capsys.readouterr()
    path.write_text(SHORTER + "# another\n")
    assert run(place, *given, "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "different run" in error and "preference_file" in error
    path.write_text(SHORTER)
    assert run(place, *given, "--resume") == 0
    assert "resumed at step 4" in capsys.readouterr().out
    metrics = (place / "changed" / "metrics.jsonl").read_bytes()
    assert metrics == (finished / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["demos", "comparisons"])
def test_own_data(place, seen, capsys, kind):
    """The file is the judge, too; demos need no comparisons then, and comparisons alone will do."""
    demos, compared = records(240)
    path = write(place / f"{kind}.jsonl", demos if kind == "demos" else compared)
    given = ["--preference", place / "shorter.py", f"--{kind}", path, "--supervised-steps", "3"]
    before = set((place / "stages").glob("*"))
    assert run(place, kind, *given) == 0, capsys.readouterr().err
    assert "preference and judge: " in capsys.readouterr().out and len(seen) == 5
    made = [path.name.split("-")[0] for path in set((place / "stages").iterdir()) - before]
    assert made == ["supervised"]
    summary = json.loads((place / kind / "summary.json").read_text())
    assert 0 < summary["win_rate"] < 1
    # A second time: the finished run's result, without asking.
    assert run(place, kind, *given) == 0 and len(seen) == 5


def test_prompts_alone(place, seen, capsys):
    """Nothing to imitate: a policy's folder is the start as it is, the reference and the judged."""
    demos, _ = records(240)
    tokenizer = policies.byte_tokenizer([row["prompt"] for row in demos], 300)
    policies.build("tiny", tokenizer, 64, 0).save_pretrained(place / "start")
    tokenizer.save_pretrained(place / "start")
    path = write(place / "prompts.jsonl", [dict(prompt=row["prompt"]) for row in demos])
    given = ["--preference", place / "shorter.py", "--prompts", path]
    folder = ["--policy", place / "start"]
    for wrong in (given, [*given, *folder], [*given, "--supervised-steps", "0"]):
        assert run(place, "alone", *wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--supervised-steps 0" in error
    assert run(place, "alone", *given, *folder, "--supervised-steps", "0") == 0
    assert "preference and judge: " in capsys.readouterr().out and len(seen) == 5
    lines = (place / "alone" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert steps[0]["log_ratio"] == 0


def test_evaluate_with_a_file_as_judge(place, finished, capsys):
    """evaluate.py asks the file, on the built-in task and on prompts of one's own; one that judges
    in one order only is a line."""
    path = place / "asked.py"
    define, *rest = SHORTER.splitlines(keepends=True)
    noted = f"    print(len(ys), file=open({str(place / 'log')!r}, 'a'))\n"
    path.write_text("".join([define, noted, *rest]))
    prompts = write(place / "posts.jsonl", [dict(prompt=f"my car {k}") for k in range(12)])
    for more in ([], ["--prompts", prompts, "--max-response-tokens", "6"]):
        capsys.readouterr()
        argv = [
            str(finished),
            str(finished / "policy"),
            "--count",
            "12",
            "--judge",
            str(path),
            *more,
        ]
        assert evaluate.main(argv) == 0
        printed = capsys.readouterr().out
        assert "win_rate" in printed and "completist" not in printed
        # The first call asks in both orders, the last is for the three samples that are shown.
        assert (place / "log").read_text().split() == ["12", "12", "3"]
        (place / "log").unlink()
    path.write_text(VERDICT + "[0.9] * len(ys)\n")
    assert evaluate.main([str(finished), str(finished), "--judge", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--judge {path}: p(y > y') is 0.9" in error


# Files that do not do what they must


BROKEN = {  # the file's text, and what the line must hold beside option and file
    "not Python": ("def preference(:\n", ", line 1: SyntaxError"),
    "an import that fails": ("import json\nimport no_such_module\n", ", line 2: ModuleNotFound"),
    "it leaves": ("import sys\nsys.exit('bye')\n", ", line 2: SystemExit: bye"),
    "not UTF-8": (b"x = '\xff'\n", "SyntaxError"),
    "null bytes": (b"x = 1\0\n", "null bytes"),
    "no function": ("def prefer(prompts, ys, ys_other):\n    return 0\n", "no function preference"),
    "preference is a number": ("preference = 0.5\n", "no function preference"),
    "too few arguments": ("def preference(ys, ys_other):\n    return [0.5]\n", "TypeError"),
    "it raises": (VERDICT + "{}[\n        ys[0]]\n", ", line 2: KeyError"),
    "deep in a library": (
        "import json\n" + VERDICT + "json.loads(ys[0])\n",
        ", line 3: JSONDecodeError",
    ),
    "an assertion": (VERDICT.replace("return", "assert") + "0\n", ", line 2: AssertionError"),
    "one too few": (VERDICT + "[0.5] * (len(ys) - 1)\n", "shape [2] for 3 pairs"),
    "a column": (VERDICT + "[[0.5]] * len(ys)\n", "shape [3, 1] for 3 pairs"),
    "one number": (VERDICT + "0.5\n", "shape [] for 3 pairs"),
    "none": (VERDICT + "[]\n", "shape [0] for 3 pairs"),
    "nothing": (VERDICT + "None\n", "no numbers but NoneType"),
    "words": (VERDICT + "['a'] * len(ys)\n", "no numbers but list"),
    "unanswered": (VERDICT + "[None] * len(ys)\n", "no numbers but list"),
    "a generator": (VERDICT + "(0.5 for y in ys)\n", "no numbers but generator"),
    "ragged": (VERDICT + "[[0.5], [0.5, 0.5], []]\n", "no numbers but list"),
    "logits": (VERDICT + "[0.5, 2.5, 0.5]\n", "2.5 for pair 2 of 3"),
    "below 0": (VERDICT + "[0.5, 0.5, -1e-3]\n", "-0.001 for pair 3 of 3"),
    "NaN": (VERDICT + "[float('nan')] * len(ys)\n", "nan for pair 1 of 3"),
    "the first is better": (VERDICT + "[1.0, 0.5, 1.0]\n", "is 1 and p(y' > y) 1 for pair 1 of 3"),
    "a slight bias": (VERDICT + "[0.5, 0.5, 0.51]\n", "for pair 3 of 3"),
}
GOOD = {  # as the function may return them, for y = "a", "b c", "d" and y' = "a", "b", "d e"
    "list": "[0.5, 0.0, 1.0]",
    "tuple": "(0.5, 0, True)",
    "array": "__import__('numpy').array([0.5, 0, 1])[::1]",
    "tensor": "__import__('torch').tensor([0.5, 0, 1], dtype=__import__('torch').bfloat16)",
    "tensor with a gradient": "__import__('torch').tensor([0.5, 0, 1.0], requires_grad=True) * 1",
    "numbers of an array": "list(__import__('numpy').array([0.5, 0, 1]))",
}


@pytest.fixture(scope="module")
def three():
    """A tokenizer and three pairs: (tokenizer, prompt, y, y_other)."""
    tokenizer = policies.word_tokenizer(list("abcde"))
    rows = [tokenizer.encode(text) for text in ("a", "b c", "d")]
    others = [tokenizer.encode(text) for text in ("a", "b", "d e")]
    prompt = policies.pad([[1], [2], [3, 4]], "left", 0)
    y = policies.pad([[*row, 0] for row in rows], "right", 0)
    return tokenizer, prompt, y, policies.pad([[*row, 0] for row in others], "right", 0)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, three, case):
    """One line that names option and file, and the file's line where there is one."""
    text, said = BROKEN[case]
    path = tmp_path / "rule.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tokenizer, *pairs = three
    with pytest.raises(ValueError) as error:
        judged.Asked("--judge", str(path), tokenizer)(*pairs)
    message = str(error.value)
    assert message.startswith(f"--judge {path}") and said in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["rule.py"], "nor bytecode beside it"


@pytest.mark.parametrize("case", ["an import that fails", "no function", "it raises", "NaN"])
def test_broken_files_end_a_run(tmp_path, place, finished, capsys, case):
    """Exit status 2 and one line; what can be seen before anything is trained leaves no folder."""
    text, said = BROKEN[case]
    path = tmp_path / "rule.py"
    path.write_text(text)
    capsys.readouterr()
    assert run(place, f"ends {case}", "--preference", path) == 2
    error = capsys.readouterr().err.splitlines()
    told = [line for line in error if line.startswith("train.py: error: ")]
    expected = said.replace("of 3", "of 4")
    assert told == error[-1:] and f"--preference {path}" in told[0] and expected in told[0]
    seen_at_once = case in ("an import that fails", "no function")
    assert (place / f"ends {case}").exists() != seen_at_once


@pytest.mark.parametrize("case", GOOD)
def test_what_may_be_returned(tmp_path, three, case):
    """Lists, tuples, arrays, tensors: all the same [B] in float32. Asked in both orders once."""
    tokenizer, prompt, y, y_other = three
    path = tmp_path / "rule.py"
    path.write_text(
        "calls = []\n"
        "def preference(prompts, ys, ys_other):\n"
        "    calls.append((prompts, ys, ys_other))\n"
        f"    p = {GOOD[case]}\n"
        "    return p if ys[1] == 'b c' else [0.5, 1, 0]\n"
    )
    asked = judged.Asked("--preference", str(path), tokenizer)
    for _ in range(2):
        p = asked(prompt, y, y_other)
        assert p.tolist() == [0.5, 0.0, 1.0] and p.dtype == torch.float32 and not p.requires_grad
    texts = (["a", "b", "c d"], ["a", "b c", "d"], ["a", "b", "d e"])
    assert asked.function.__globals__["calls"] == [texts, (texts[0], texts[2], texts[1]), texts]


def test_every_batch_is_checked(tmp_path, three):
    """A number out of range is found whenever it comes, an order only on the first batch."""
    tokenizer, *pairs = three
    path = tmp_path / "rule.py"
    path.write_text(
        "calls = []\n"
        "def preference(prompts, ys, ys_other):\n"
        "    calls.append(0)\n"
        "    return [[0.5] * 3, [0.5] * 3, [0.9] * 3, [1.5] * 3][len(calls) - 1]\n"
    )
    asked = judged.Asked("--preference", str(path), tokenizer)
    asked(*pairs)
    asked(*pairs)
    with pytest.raises(ValueError, match="1.5 for pair 1 of 3"):
        asked(*pairs)


def test_a_model_in_the_file_keeps_its_precision(tmp_path, three):
    """--dtype bfloat16 is for the policy: a product of the file's stays in float32."""
    tokenizer, *pairs = three
    path = tmp_path / "rule.py"
    path.write_text(
        "import torch\n"
        "def preference(prompts, ys, ys_other):\n"
        "    product = torch.ones(3, 3) @ torch.ones(3, 3)\n"
        "    return [0.5] * 3 if product.dtype == torch.float32 else [0.0] * 3\n"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert judged.Asked("--preference", str(path), tokenizer)(*pairs).tolist() == [0.5] * 3


REFUSED = {
    "a reward": (["--loss", "rl"], "--loss rl learns from a reward"),
    "offline": (["--loss", "dpo", "--offline"], "--offline learns from recorded votes"),
    "prompts from scratch": (["--prompts", "p.jsonl", "--supervised-steps", "0"], "--policy"),
    "tokenizer for the built-in task": (["--tokenizer", "t"], "your own data"),
    "a tokenizer beside a policy": (
        ["--demos", "d.jsonl", "--tokenizer", "t", "--policy", "./p"],
        "brings its own",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_go_with(place, case):
    given, said = REFUSED[case]
    with pytest.raises(ValueError) as error:
        parse([*given, "--preference", str(place / "shorter.py")])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file():
    for path in ("no_such.py", "."):
        with pytest.raises(ValueError, match="no such file"):
            parse(["--preference", path])
        with pytest.raises(ValueError, match="no such file"):
            judged.Asked("--judge", path, None)
