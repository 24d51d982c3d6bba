"""Where prompts and comparisons come from: generators, disjoint splits, cuts that are counted, files in four formats."""

import csv
import json
import re

import pytest
import torch

import data
import policy as policies


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """datasets keeps its tables in a folder of the tests, not in the home folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def texts(tokenizer, tokens):
    return [tokenizer.decode(row[keep]) for row, keep in zip(tokens[0], tokens[1], strict=True)]


def records(count, first=0):
    """Comparisons and demos about the same kind of posts, with different prompts."""
    compared = [
        dict(prompt=f"post {k} asks\nTL;DR:", chosen=f" good {k}", rejected=f" bad {k} and long")
        for k in range(first, first + count)
    ]
    demos = [
        dict(prompt=f"story {k}\nTL;DR:", completion=f" told {k}")
        for k in range(first, first + count)
    ]
    return demos, compared


def test_generator_depends_on_its_three_arguments_alone():
    """Equal arguments give equal draws whatever the global state; any changed argument gives others, and the global state stays."""
    draws = {}
    for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 10)):
        torch.manual_seed(3)
        state = torch.random.get_rng_state()
        draws[key] = torch.rand(4, generator=data.generator(*key)).tolist()
        assert torch.equal(state, torch.random.get_rng_state())
        torch.manual_seed(4)
        assert draws[key] == torch.rand(4, generator=data.generator(*key)).tolist()
    assert len(set(map(tuple, draws.values()))) == 5


# The built-in task


def test_built_in_splits_are_disjoint_by_prompt():
    """500 posts of each split, for two data seeds: no text in two splits. Validation and test do not move with the data seed, the
    others do."""
    seen = {}
    for data_seed in (0, 1):
        task = data.BuiltIn(data_seed)
        for split in task.SPLITS:
            seen[split, data_seed] = {
                text for step in range(5) for _, text in task.posts(split, step, 100)
            }
    for one, two in ((a, b) for a in seen for b in seen if a < b):
        shared = seen[one] & seen[two]
        assert (len(shared) == 500) == (
            one[0] == two[0] and one[0] in ("validation", "test")
        ) and len(shared) in (0, 500), (one, two)


def test_built_in_prompts_are_new_at_every_step_and_the_same_for_all():
    """Two task objects agree on a step's prompts, whatever was asked before; two steps share none."""
    one, two = data.BuiltIn(0), data.BuiltIn(0)
    two.prompts("align", 3, 8), two.demos(0, 4)
    first, again, later = (
        one.prompts("align", 7, 8),
        two.prompts("align", 7, 8),
        one.prompts("align", 8, 8),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not set(texts(one.tokenizer, first)) & set(texts(one.tokenizer, later))


def test_built_in_demos_end_with_the_end():
    """Each demo is a written summary of its own post with end-of-text as its last token, within the limit."""
    task = data.BuiltIn(0)
    prompt, response = task.demos(0, 16)
    posts = task.posts("supervised", 0, 16)
    assert texts(task.tokenizer, prompt) == [text for _, text in posts]
    for (seed, text), row, keep in zip(posts, *response, strict=True):
        written = row[keep].tolist()
        assert (
            written[-1] == task.tokenizer.eos_token_id
            and task.tokenizer.eos_token_id not in written[:-1]
        )
        assert (
            task.tokenizer.decode(written[:-1]) == data.summaries.summary(text, seed)
            and len(written) <= task.max_response
        )


def test_built_in_comparisons_are_fresh_votes():
    """Every pair of six responses to each prompt, with the panel's own probability; the same for the same step, other prompts at
    the next step and for held-out pairs."""
    task = data.BuiltIn(0)
    model = policies.build("tiny", task.tokenizer, 128, 0)
    prompt, response, i, j, chance, rng = task.comparisons("preference", 0, 12, model)
    assert (
        prompt[0].shape[0] == response[0].shape[0] == 12
        and len(i) == len(j) == len(chance) == 2 * 15
    )
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == 30 and (i != j).all()
    asked = texts(task.tokenizer, prompt)
    assert all(asked[a] == asked[b] for a, b in zip(i.tolist(), j.tolist(), strict=True)), (
        "a pair answers one prompt"
    )
    pick = tuple(
        tuple(part[k] for part in tokens[:2])
        for tokens, k in ((prompt, i), (response, i), (response, j))
    )
    torch.testing.assert_close(chance, task.judge(*pick), rtol=0, atol=0)
    again = task.comparisons("preference", 0, 12, model)
    assert torch.equal(again[1][0], response[0]) and torch.equal(again[4], chance)
    others = {
        role: set(texts(task.tokenizer, task.comparisons(role, step, 12, model)[0]))
        for role, step in (("preference", 1), ("held out", 0))
    }
    assert not set(asked) & others["preference"] and not set(asked) & others["held out"]


# Records


def task_of(
    demos, compared, prompts=(), tokenizer=None, max_prompt=64, max_response=16, data_seed=0
):
    tokenizer = tokenizer or policies.byte_tokenizer(
        [text for record in [*demos, *compared, *prompts] for text in record.values()]
    )
    return data.Records(
        demos, compared, list(prompts), tokenizer, max_prompt, max_response, data_seed
    )


def held(task):
    """Split -> its prompts' texts."""
    seen = {name: {r["prompt"] for r in rows} for name, rows in task.compared.items()}
    asked = {f"asked {name}": set(rows) for name, rows in task.asked.items()}
    return seen | asked | {"supervised": {r["prompt"] for r in task.demonstrations}}


@pytest.mark.parametrize(
    "layout",
    [
        "demos and comparisons",
        "comparisons alone",
        "the same prompts in both",
        "prompts of their own",
    ],
)
def test_record_splits_are_disjoint_by_prompt(layout):
    """No prompt is in two of supervised, preference, judge, held out and test, whichever files are given; the prompts to align on
    are never judged, held-out or test ones."""
    demos, compared = records(300)
    if layout == "comparisons alone":
        demos = []
    elif layout == "the same prompts in both":
        demos += [dict(prompt=r["prompt"], completion=r["chosen"]) for r in compared]
    prompts = (
        [dict(prompt=f"asked {k}") for k in range(200)] if layout == "prompts of their own" else []
    )
    task = task_of(demos, compared, prompts)
    splits = held(task)
    fixed = ["supervised", "preference", "judge", "held out", "asked test"]
    for one, two in ((a, b) for a in fixed for b in fixed if a < b):
        assert splits[one] and not splits[one] & splits[two], (one, two)
    for name in ("asked align", "asked validation"):
        assert splits[name] and not splits[name] & (
            splits["judge"] | splits["held out"] | splits["asked test"]
        )
    assert not splits["asked align"] & splits["asked validation"]
    unused = {r["prompt"] for r in compared} - set.union(*(splits[name] for name in task.compared))
    assert unused and not unused & (
        splits["asked align"] | splits["asked validation"] | splits["supervised"]
    ), "test prompts are for the test"
    if layout == "comparisons alone":
        chosen = {r["prompt"]: r["chosen"] for r in compared}
        assert all(chosen[r["prompt"]] == r["completion"] for r in task.demonstrations)


def test_a_split_is_a_matter_of_the_text():
    """Shuffled files, or twice as many records, leave every prompt in its split."""
    demos, compared = records(200)
    more = records(400)
    first, shuffled, longer = (
        task_of(*files) for files in ((demos, compared), (demos[::-1], compared[::-1]), more)
    )
    for name in ("preference", "judge", "held out"):
        assert (
            held(first)[name]
            == held(shuffled)[name]
            == {p for p in held(longer)[name] if int(p.split()[1]) < 200}
        ), name


def test_too_few_records_are_refused():
    with pytest.raises(ValueError, match="give more records"):
        task_of(*records(3))


def test_epochs_are_shuffled_and_complete():
    """Every row once an epoch, in another order the next; a step's rows do not depend on what was asked before."""
    task = task_of(*records(200))
    rows = task.asked["test"]
    epochs = [
        [task.some(rows, "x", epoch * len(rows) + k, 1)[0] for k in range(len(rows))]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows) and epochs[0] != epochs[1]
    assert task.some(rows, "x", 0, len(rows)) == epochs[0], "a step of many is many steps of one"


def test_long_prompts_are_cut_from_the_left_and_counted():
    """The last 8 tokens of a prompt of 40 are kept, a short one is whole, and only prompts that were cut are counted, once each
    however often they are drawn."""
    demos, compared = records(200)
    task = task_of(demos, compared, max_prompt=8)
    long, short = "word " * 40 + "end", "end"
    whole = task.tokenizer.encode(long)
    for _ in range(2):
        ids, mask = task.pad_prompts([long, short])
    assert ids[0][mask[0]].tolist() == whole[-8:] and ids[1][
        mask[1]
    ].tolist() == task.tokenizer.encode(short)
    assert len(whole) > 8 and len(task.cut) == 1


def test_responses_get_their_end_only_if_it_fits():
    """A completion is followed by end-of-text; one that is too long is cut at the limit and gets none."""
    task = task_of(*records(200), max_response=5)
    end = task.tokenizer.eos_token_id
    ids, mask = task.pad_responses([" a", " a b c d e f g h i j"])
    assert ids[0][mask[0]].tolist() == [*task.tokenizer.encode(" a"), end]
    cut = ids[1][mask[1]].tolist()
    assert cut == task.tokenizer.encode(" a b c d e f g h i j")[:5] and end not in cut


def test_recorded_comparisons_put_the_chosen_first():
    """i are the chosen and j the rejected responses of the same prompt, certain (chance 1), and of the asked role only."""
    task = task_of(*records(300))
    model = policies.build("tiny", task.tokenizer, 128, 0)
    for role in ("preference", "judge", "held out"):
        prompt, response, i, j, chance, _ = task.comparisons(role, 0, 16, model)
        asked, said = (
            texts(task.tokenizer, prompt),
            [text.replace("<|endoftext|>", "") for text in texts(task.tokenizer, response)],
        )
        assert len(i) == 8 and (chance == 1).all()
        for a, b in zip(i.tolist(), j.tolist(), strict=True):
            number = re.search(r"\d+", asked[a]).group()
            assert (
                asked[a] == asked[b]
                and said[a] == f" good {number}"
                and said[b] == f" bad {number} and long"
            )
            assert asked[a] in {r["prompt"] for r in task.compared[role]}


# Files


def write(path, rows):
    """rows to a file in the format of its extension."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_four_formats_are_read_alike(tmp_path, extension):
    """Newlines, quotes, commas, leading spaces and non-ASCII text come back as they were, in every format and layout; fields that
    are not asked for are left out; comparisons of two equal responses are dropped."""
    compared = [
        dict(prompt='été, "quoted"\nTL;DR:', chosen=" yes, well", rejected=" no", note="x"),
        dict(prompt="b", chosen=" c", rejected=" c", note="y"),
    ]
    demos = [dict(prompt="a\nb", completion=" 你好"), dict(prompt="b", completion=" '1'")]
    kept = {name: compared[0][name] for name in ("prompt", "chosen", "rejected")}
    assert data.read("comparisons", write(tmp_path / f"c.{extension}", compared)) == [kept]
    assert data.read("demos", write(tmp_path / f"d.{extension}", demos)) == demos
    assert data.read("prompts", write(tmp_path / f"p.{extension}", demos)) == [
        dict(prompt=row["prompt"]) for row in demos
    ]


GOOD_LINE = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
BAD_FILES = {
    "broken json": ("c.jsonl", GOOD_LINE + '{"prompt": "p", "chosen": \n', "line 2"),
    "not an object": ("c.jsonl", GOOD_LINE * 2 + "[1]\n", "line 3"),
    "not utf-8": ("c.jsonl", GOOD_LINE.encode() + b'{"prompt": "\xff"}\n', "line 2"),
    "field missing": ("c.jsonl", '{"prompt": "p", "chosen": "a"}\n', "rejected"),
    "empty text": (
        "c.jsonl",
        GOOD_LINE + '{"prompt": " ", "chosen": "a", "rejected": "b"}\n',
        "line 2",
    ),
    "null": ("c.jsonl", GOOD_LINE + '{"prompt": null, "chosen": "a", "rejected": "b"}\n', "line 2"),
    "a number": ("c.jsonl", '{"prompt": 3, "chosen": "a", "rejected": "b"}\n', "line 1"),
    "empty file": ("c.jsonl", "", "c.jsonl"),
    "all pairs equal": (
        "c.jsonl",
        '{"prompt": "p", "chosen": "a", "rejected": "a"}\n',
        "no record",
    ),
    "broken json array": ("c.json", '[{"prompt": "p"', "c.json"),
    "not a parquet": ("c.parquet", "hello", "c.parquet"),
    "extension": ("c.txt", GOOD_LINE, ".txt"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named(tmp_path, case):
    """One line: the option, the file, and where there is one the line or record or field."""
    name, content, expected = BAD_FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        data.read("comparisons", str(tmp_path / name))
    message = str(error.value)
    assert (
        message.startswith(f"--comparisons {tmp_path / name}")
        and expected in message
        and "\n" not in message
    )
