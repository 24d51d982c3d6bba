"""What a user may hand to train.py by mistake: a row a case, in-process through main(argv).

A case that must fail ends with exit status 2 and one line on stderr that names the option and,
where there is one, the file and line; nothing is trained, written or overwritten. A case with a
documented handling must end with 0 and say what it did.
"""

import json
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import bandit
import data
import policy as policies
import train
from records import FIELDS
from test_data import records, write

FEW = [
    "--supervised-steps",
    "2",
    "--preference-steps",
    "2",
    "--steps",
    "1",
    "--batch-size",
    "4",
    "--eval-prompts",
    "4",
    "--device",
    "cpu",
    "--max-prompt-tokens",
    "24",
    "--max-response-tokens",
    "6",
]
GOOD = dict(
    demos=dict(prompt="p", completion=" c"),
    comparisons=dict(prompt="p", chosen=" a", rejected=" b"),
    prompts=dict(prompt="p"),
)


pytestmark = pytest.mark.usefixtures("small_and_cached")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good files of each layout, a policy's folder and a tokenizer's, all of one vocabulary."""
    folder = tmp_path_factory.mktemp("files")
    demos, compared = records(240)
    made = {
        name: write(folder / f"{name}.jsonl", rows)
        for name, rows in (("demos", demos), ("comparisons", compared), ("prompts", demos[::-1]))
    }
    tokenizer = policies.byte_tokenizer([row["prompt"] + row["completion"] for row in demos], 300)
    policies.build("tiny", tokenizer, 64, 0).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "tokenizer")
    return made | {"policy": folder / "policy", "tokenizer": folder / "tokenizer"}


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(folder, capsys, argv, *expected):
    """One line, exit 2, not a byte changed."""
    before = content(folder)
    capsys.readouterr()
    assert (
        train.main(
            [
                *FEW,
                "--stages",
                str(folder / "stages"),
                "--out",
                str(folder / "run"),
                *map(str, argv),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: error: "), error
    assert all(part in error for part in expected), error
    assert content(folder) == before and not (folder / "run").exists()


def lines(option, *rows):
    return "".join(json.dumps(GOOD[option] | row) + "\n" for row in rows)


# name of the file, its content by option (None: it is not made), what the message must hold
FILES = {
    "missing": ("x.jsonl", lambda option: None, "no such file"),
    "empty": ("x.jsonl", lambda option: "", "x.jsonl"),
    "empty lines": ("x.jsonl", lambda option: "\n\n", "x.jsonl"),
    "a folder": ("x.jsonl/inner", lambda option: "", "a folder that datasets saved"),
    "wrong extension": ("x.txt", lambda option: lines(option, {}), ".jsonl"),
    "no extension": ("x", lambda option: lines(option, {}), ".jsonl"),
    "invalid UTF-8": (
        "x.jsonl",
        lambda option: lines(option, {}).encode() + b'{"prompt": "\xff"}\n',
        "line 2",
    ),
    "UTF-16": ("x.jsonl", lambda option: lines(option, {}).encode("utf-16"), "line 1"),
    "broken JSON": (
        "x.jsonl",
        lambda option: lines(option, {}, {}) + '{"prompt": "p", \n',
        "line 3",
    ),
    "two objects in a line": (
        "x.jsonl",
        lambda option: lines(option, {}).strip() + lines(option, {}),
        "line 1",
    ),
    "an array instead of records": (
        "x.jsonl",
        lambda option: lines(option, {}) + '["p", "c"]\n',
        "line 2",
    ),
    "a text instead of records": ("x.jsonl", lambda option: '"p"\n', "line 1"),
    "deep nesting": ("x.jsonl", lambda option: "[" * 100000 + "\n", "line 1"),
    "a number": ("x.jsonl", lambda option: lines(option, {}, {"prompt": 3}), "line 2"),
    "a list": (
        "x.jsonl",
        lambda option: lines(option, {}, {"prompt": [{"role": "user"}]}),
        "line 2",
    ),
    "null": ("x.jsonl", lambda option: lines(option, {}, {}, {"prompt": None}), "line 3"),
    "empty prompt": ("x.jsonl", lambda option: lines(option, {}, {"prompt": " \n"}), "line 2"),
    "half a surrogate pair": (
        "x.jsonl",
        lambda option: (
            lines(option, {}) + lines(option, {"prompt": "PAIR"}).replace("PAIR", "\\ud83d")
        ),
        "line 2",
    ),
    "missing field": ("x.jsonl", lambda option: lines(option, {}) + '{"text": "p"}\n', "line 2"),
    "number in a .json": (
        "x.json",
        lambda option: json.dumps([GOOD[option], GOOD[option] | {"prompt": ""}]),
        "record 2",
    ),
    "no record in a .json": ("x.json", lambda option: "[]", "x.json"),
    "missing column in a .csv": ("x.csv", lambda option: "text,label\na,b\n", "prompt"),
    "ragged .csv": (
        "x.csv",
        lambda option: ",".join(GOOD[option]) + "\n" + "a,b,c,d,e,f\n" * 2,
        "line 2",
    ),
    "text named .parquet": ("x.parquet", lambda option: lines(option, {}), "x.parquet"),
    "too few": (
        "x.jsonl",
        lambda option: lines(option, *[{"prompt": f"p{k}"} for k in range(3)]),
        "more records",
    ),
}


@pytest.mark.parametrize("option", list(GOOD))
@pytest.mark.parametrize("case", FILES)
def test_bad_files(tmp_path, capsys, files, option, case):
    """The same mistakes in each of the three files; the other two are good ones."""
    if case == "too few" and option != "comparisons":
        pytest.skip("three demos are enough to imitate, three prompts may be enough to ask")
    name, make, expected = FILES[case]
    text = make(option)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    given = {key: files[key] for key in GOOD} | {option: tmp_path / name.split("/")[0]}
    where = ["more records"] if case == "too few" else [f"--{option}", name.split("/")[0], expected]
    fails(
        tmp_path,
        capsys,
        [part for key, path in given.items() for part in (f"--{key}", path)],
        *where,
    )


FOLDERS = {
    "policy missing": ("policy", shutil.rmtree, "no such folder"),
    "policy without weights": (
        "policy",
        lambda folder: (folder / "model.safetensors").unlink(),
        "model.safetensors",
    ),
    "policy without config": ("policy", lambda folder: (folder / "config.json").unlink(), "policy"),
    "weights cut short": (
        "policy",
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 20),
        "policy",
    ),
    "weights of another shape": ("policy", lambda folder: reshape(folder), "policy"),
    "weights of other names": (
        "policy",
        lambda folder: save_file(
            {"x": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"}
        ),
        "weights",
    ),
    "a pickle instead": (
        "policy",
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            torch.save({}, folder / "pytorch_model.bin"),
        ),
        "safetensors",
    ),
    "another architecture": (
        "policy",
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "policy",
    ),
    "policy without tokenizer": (
        "policy",
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "tokenizer",
    ),
    "context too short": ("policy", lambda folder: None, "positions"),
    "tokenizer missing": ("tokenizer", shutil.rmtree, "tokenizer"),
    "tokenizer empty": (
        "tokenizer",
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "tokenizer",
    ),
    "tokenizer broken": (
        "tokenizer",
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "tokenizer",
    ),
    "tokenizer without end-of-text": ("tokenizer", lambda folder: endless(folder), "end-of-text"),
}


def reshape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:, :8].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def endless(folder):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            kept = {
                key: value
                for key, value in json.loads((folder / name).read_text()).items()
                if key not in ("eos_token", "pad_token")
            }
            (folder / name).write_text(json.dumps(kept))


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folders(tmp_path, capsys, files, case):
    option, spoil, expected = FOLDERS[case]
    shutil.copytree(files[option], tmp_path / option)
    spoil(tmp_path / option)
    long = ["--max-prompt-tokens", "60"] if case == "context too short" else []
    fails(
        tmp_path,
        capsys,
        ["--comparisons", files["comparisons"], f"--{option}", tmp_path / option, *long],
        expected,
    )


OPTIONS = {
    "demos without comparisons": (["--demos", "{demos}"], "--comparisons"),
    "prompts without comparisons": (["--prompts", "{prompts}"], "--comparisons"),
    "tokenizer beside a policy": (
        ["--comparisons", "{comparisons}", "--policy", "{policy}", "--tokenizer", "{tokenizer}"],
        "--tokenizer",
    ),
    "policy with the built-in task": (["--policy", "{policy}"], "--policy"),
    "beta for ipo": (["--loss", "ipo", "--beta", "0.5"], "--beta"),
    "offline nash_md": (["--loss", "nash_md", "--offline"], "--offline"),
    "cuda without one": (["--device", "cuda"], "--device"),
    "save-every 0": (["--save-every", "0"], "--save-every"),
    "keep 0": (["--keep", "0"], "--keep"),
    "keep a word": (["--keep", "all"], "--keep"),
    "micro-batch-size -1": (["--micro-batch-size", "-1"], "--micro-batch-size"),
    "supervised-lr nan": (["--supervised-lr", "nan"], "--supervised-lr"),
    "seed -1": (["--seed", "-1"], "--seed"),
    "seed a fraction": (["--seed", "0.5"], "--seed"),
    "tau inf": (["--tau", "inf"], "--tau"),
    "tau 1e300": (["--tau", "1e300"], "--tau"),
    "lr 1e-300": (["--lr", "1e-300"], "--lr"),
    "ptx 1e300": (["--ptx", "1e300"], "--ptx"),
    "seed 2^64": (["--seed", str(2**64)], "--seed"),
    "data-seed 2^63": (["--data-seed", str(2**63)], "--data-seed"),
    "steps 10^30": (["--steps", str(10**30)], "--steps"),
    "a batch of 10^12 rows": (["--batch-size", str(10**12)], "--batch-size"),
    "prompts of 10^12 tokens": (["--max-prompt-tokens", str(10**12)], "--max-prompt-tokens"),
    "a control character": (["--out", "a\x1b[31m"], "--out: 'a\\x1b[31m'"),
    "half a letter": (["--out", "a\udcff"], "--out"),
    "a set constant 1e300": (["--loss", "slic", "--set", "x=1e300"], "--set"),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "a word too much": (["ipo"], "ipo"),
    "an option cut short": (["--lo", "ipo"], "--lo"),
}


TEXTS = "demos comparisons prompts preference preference-model policy tokenizer out stages"
for name in TEXTS.split():
    OPTIONS[f"{name}, an empty text"] = [f"--{name}", ""], f"--{name}: is empty"
WHOLE = "steps warm-up batch-size micro-batch-size seed data-seed eval-prompts save-every keep"
WHOLE += " refresh renew-reference epochs supervised-steps preference-steps max-response-tokens"
for name in WHOLE.split():
    OPTIONS[f"{name} 10^400"] = [f"--{name}", "1" + "0" * 400], f"--{name}: 1000"


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(tmp_path, capsys, files, monkeypatch, case):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given, expected = OPTIONS[case]
    fails(tmp_path, capsys, [part.format(**files) for part in given], expected)


def rows_with(changes):
    """The good comparisons, the first of them changed."""
    _, compared = records(240)
    return [row | changes[k] if k < len(changes) else row for k, row in enumerate(compared)]


def test_a_tokenizer_with_holes_in_its_ids(tmp_path, capsys, files):
    """A policy from scratch has a row for every id from 0 on."""
    shutil.copytree(files["tokenizer"], tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary = found["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 7
    path.write_text(json.dumps(found))
    given = ["--comparisons", files["comparisons"], "--tokenizer", tmp_path / "tokenizer"]
    fails(tmp_path, capsys, given, "--tokenizer", "have holes")


def test_no_steps_and_one_prompt(tmp_path, files, capsys):
    """--steps 0 evaluates the start, and one prompt has a win rate and no standard error."""
    argv = [*FEW, "--stages", str(tmp_path / "stages"), "--out", str(tmp_path / "run")]
    argv += ["--comparisons", str(files["comparisons"]), "--steps", "0", "--eval-prompts", "1"]
    assert train.main(argv) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["steps"] == 0 and abs(found["kl"]) < 1e-5 and found["win_rate_se"] is None
    assert re.search(r"^  win_rate_se +none$", capsys.readouterr().out, re.MULTILINE)
    start = next((tmp_path / "stages").glob("supervised-*/model.safetensors"))
    trained, before = load_file(tmp_path / "run/policy/model.safetensors"), load_file(start)
    assert all(torch.equal(trained[name], before[name]) for name in before)


HANDLED = {  # the file's bytes, made from its rows; what the screen must say
    "byte-order mark": (lambda text: b"\xef\xbb\xbf" + text.encode(), [], ""),
    "CRLF": (lambda text: text.replace("\n", "\r\n").encode(), [], ""),
    "blank lines": (lambda text: text.replace("\n", "\n\n").encode(), [], ""),
    "no newline at the end": (lambda text: text.strip().encode(), [], ""),
    "extra fields": (str.encode, [{"note": 1}, {"note": "x"}], ""),
    "duplicate prompts": (str.encode, [{"prompt": "post 5"}] * 20, ""),
    "identical chosen and rejected": (
        str.encode,
        [{"chosen": " same", "rejected": " same"}] * 3,
        "3 comparisons of two equal responses are left out",
    ),
    "a prompt longer than the context": (
        str.encode,
        [{"prompt": f"{k} " * 500} for k in range(60)],
        "were cut from the left",
    ),
    "emoji and other scripts": (
        str.encode,
        [{"prompt": "😀 你好 عربى", "chosen": " 👍🏽", "rejected": " ไม่"}] * 5,
        "",
    ),
    "end-of-text spelled out": (
        str.encode,
        [{"prompt": "a <|endoftext|> b", "chosen": " <|endoftext|> x", "rejected": "<|endoftext|>"}]
        * 5,
        "",
    ),
    "control characters": (str.encode, [{"prompt": "a\u0000b\u2028c"}], ""),
}


@pytest.mark.parametrize("case", HANDLED)
def test_what_is_handled(tmp_path, capsys, case):
    encode, changes, said = HANDLED[case]
    (tmp_path / "c.jsonl").write_bytes(
        encode("".join(json.dumps(row) + "\n" for row in rows_with(changes)))
    )
    argv = [
        *FEW,
        "--stages",
        str(tmp_path / "stages"),
        "--out",
        str(tmp_path / "run"),
        "--comparisons",
        str(tmp_path / "c.jsonl"),
        "--loss",
        "ipo",
    ]
    assert train.main(argv) == 0
    # In these records the shorter wins, and the judge says so (tests/test_judge.py).
    lines = capsys.readouterr().out.splitlines()
    out = "\n".join(line for line in lines if not line.startswith("warning: the judge is right"))
    assert (
        said in out
        and (said or "warning" not in out)
        and (tmp_path / "run" / "summary.json").exists()
    )


def test_no_end_of_text_inside_a_text():
    """Spelled out, or standing for words that a tokenizer does not know.

    The ids of a prompt hold none, those of a response one, last.
    """
    tokenizer = policies.word_tokenizer(["a", "b"])
    task = data.Records.__new__(data.Records)
    task.tokenizer, task.max_prompt, task.max_response, task.cut = tokenizer, 9, 9, set()
    task.by_template = set()
    assert task.pad_prompts(["a <|endoftext|> unheard b"])[0].tolist() == [[1, 2]]
    ids, mask = task.pad_responses(["b unheard a <|endoftext|>", "a"])
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == [[2, 1, 0], [1, 0]]


def broken(rng, text):
    """A few random edits of a file's bytes.

    Cut, doubled, replaced by another piece of it or by something that looks like syntax.
    """
    for _ in range(rng.randrange(1, 4)):
        at, length = rng.randrange(len(text) + 1), rng.randrange(12)
        piece = rng.choice(
            [
                b"",
                b"\xff",
                b"\x00",
                b'"',
                b"{",
                b"}",
                b"]",
                b",",
                b"\n",
                b"\\",
                b"nan",
                b"-1",
                b"1e999",
                text[at : at + length] * 2,
            ]
        )
        text = text[:at] + piece + text[at + length :]
    return text


@pytest.mark.slow
@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_fuzz_records(tmp_path, extension):
    """40 spoiled files a format.

    A list of good records, or a ValueError of one line that names the file.
    """
    rng, (_, compared) = random.Random(7), records(4)
    good = tmp_path / "x" / f"c.{extension}"
    good.parent.mkdir()
    write(good, compared)
    for number in range(40):
        path = tmp_path / f"{number}.{extension}"
        path.write_bytes(broken(rng, good.read_bytes()))
        try:
            found = data.read("comparisons", str(path))
            assert all(
                isinstance(row[field], str) and row[field].strip()
                for row in found
                for field in FIELDS["comparisons"]
            ), number
        except ValueError as error:
            assert str(error).startswith(f"--comparisons {path}") and "\n" not in str(error), number


@pytest.mark.parametrize("extension", ["csv", "json", "npy"])
def test_fuzz_games(tmp_path, extension):
    """300 spoiled matrices a format.

    A game with p + p^T = 1 in [0, 1], or a ValueError of one line.
    """
    import numpy

    rng, matrix = random.Random(8), bandit.cycle(0.4).numpy()
    good = tmp_path / f"good.{extension}"
    if extension == "npy":
        numpy.save(good, matrix)
    else:
        good.write_text(
            "\n".join(",".join(map(str, row)) for row in matrix)
            if extension == "csv"
            else json.dumps(matrix.tolist())
        )
    path = tmp_path / f"game.{extension}"
    for number in range(300):
        path.write_bytes(broken(rng, good.read_bytes()))
        try:
            p = bandit.read_preferences(str(path))
            assert ((p + p.T - 1).abs() < 1e-12).all() and ((p >= 0) & (p <= 1)).all(), number
        except ValueError as error:
            assert str(error).startswith(f"--preferences {path}") and "\n" not in str(error), number
