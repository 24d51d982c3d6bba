"""Where prompts and comparisons come from: generators, splits, cuts that are counted, files."""

import csv
import itertools
import json
import re
from types import SimpleNamespace

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
    return [tokenizer.decode(row) for row in tokens.lists()]


def records(count, first=0):
    """Comparisons and demos about the same kind of posts, with different prompts."""
    demos = []
    compared = []
    for k in range(first, first + count):
        demos.append(dict(prompt=f"story {k}\nTL;DR:", completion=f" told {k}"))
        prompt = f"post {k} asks\nTL;DR:"
        compared.append(dict(prompt=prompt, chosen=f" good {k}", rejected=f" bad {k} and long"))
    return demos, compared


def test_generator_depends_on_its_three_arguments_alone():
    """Equal arguments give equal draws whatever the global state; a changed one gives others.

    The global state stays.
    """
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
    """500 posts of each split, for two data seeds: no text in two splits.

    Validation and test do not move with the data seed, the others do.
    """
    seen = {}
    for data_seed in (0, 1):
        task = data.BuiltIn(data_seed)
        for split in task.SPLITS:
            seen[split, data_seed] = set()
            for step in range(5):
                seen[split, data_seed].update(text for _, text in task.posts(split, step, 100))
    for one, two in itertools.combinations(seen, 2):
        same = one[0] == two[0] and one[0] in ("validation", "test")
        assert len(seen[one] & seen[two]) == (500 if same else 0), (one, two)


def test_built_in_prompts_are_new_at_every_step_and_the_same_for_all():
    """Two task objects agree on a step's prompts, whatever was asked before.

    Two steps share none.
    """
    one = data.BuiltIn(0)
    two = data.BuiltIn(0)
    two.prompts("align", 3, 8)
    two.demos(0, 4)
    prompt = one.prompts("align", 7, 8)
    again = two.prompts("align", 7, 8)
    later = one.prompts("align", 8, 8)
    assert torch.equal(prompt.ids, again.ids)
    assert torch.equal(prompt.mask, again.mask)
    assert not set(texts(one.tokenizer, prompt)) & set(texts(one.tokenizer, later))


def test_built_in_demos_end_with_the_end():
    """Each demo is a written summary of its own post, within the limit.

    Its last token is end-of-text.
    """
    task = data.BuiltIn(0)
    prompt, response = task.demos(0, 16)
    posts = task.posts("supervised", 0, 16)
    assert texts(task.tokenizer, prompt) == [text for _, text in posts]
    end = task.tokenizer.eos_token_id
    for (seed, text), written in zip(posts, response.lists(), strict=True):
        assert written[-1] == end
        assert end not in written[:-1]
        assert task.tokenizer.decode(written[:-1]) == data.summaries.summary(text, seed)
        assert len(written) <= task.max_response


def test_built_in_comparisons_are_fresh_votes():
    """Every pair of six responses to each prompt, with the panel's own probability.

    The same for the same step, other prompts at the next step and for held-out pairs.
    """
    task = data.BuiltIn(0)
    model = policies.build("tiny", task.tokenizer, 128, 0)
    found = task.comparisons("preference", 0, 12, model)
    assert len(found.prompt.ids) == len(found.response.ids) == 12
    assert len(found.first) == len(found.second) == len(found.preference) == 2 * 15
    pairs = pairs_of(found)
    assert len(set(pairs)) == 30
    assert (found.first != found.second).all()
    prompts = texts(task.tokenizer, found.prompt)
    for first, second in pairs:
        assert prompts[first] == prompts[second], "a pair answers one prompt"
    x = found.prompt.rows(found.first)
    y = found.response.rows(found.first)
    y_other = found.response.rows(found.second)
    torch.testing.assert_close(found.preference, task.judge(x, y, y_other), rtol=0, atol=0)
    again = task.comparisons("preference", 0, 12, model)
    assert torch.equal(again.response.ids, found.response.ids)
    assert torch.equal(again.preference, found.preference)
    for role, step in (("preference", 1), ("held out", 0)):
        other = task.comparisons(role, step, 12, model)
        assert not set(prompts) & set(texts(task.tokenizer, other.prompt)), role


def test_votes_are_single_votes():
    """Of a pair with probability p each visit draws one vote, 0 or 1, and the other pairs others.

    1,000 visits of six pairs: each pair's share is p, and two pairs agree as often as independent
    votes do, and so do a pair's votes in two visits that follow each other, all within 5 standard
    errors (false alarm below 1e-5 in all). Certain votes are certain.
    """
    p = torch.tensor([0.5, 0.5, 0.1, 0.7, 0.0, 1.0])
    rows = policies.pad([[1]] * 7, "left", 0)
    pairs = torch.arange(6), torch.arange(1, 7), p
    found = data.Comparisons(rows, rows, *pairs, torch.Generator().manual_seed(5))
    votes = torch.stack([found.votes() for _ in range(1000)])
    assert set(votes.unique().tolist()) == {0.0, 1.0}
    assert votes[:, 4].max() == 0 and votes[:, 5].min() == 1
    assert ((votes.mean(0) - p).abs() <= 5 * (p * (1 - p) / 1000).sqrt()).all()
    one, two, others = votes[:, 0], votes[:, 1], votes[:, 3]
    expected = {"two pairs": (one, two, 0.5), "other odds": (one, others, 0.5)}
    expected["two visits"] = one[:-1], one[1:], 0.5
    expected["two visits, other odds"] = others[:-1], others[1:], 0.7**2 + 0.3**2
    for name, (left, right, agree) in expected.items():
        share = (left == right).float().mean().item()
        assert abs(share - agree) < 5 * (agree * (1 - agree) / len(left)) ** 0.5, name


def test_offline_labels_are_single_votes():
    """Of the built-in task, whose panel is rarely sure: a label is 0 or 1, the first of a pair wins
    and loses, and the next step's votes are drawn anew."""
    task = data.BuiltIn(0)
    model = policies.build("tiny", task.tokenizer, 128, 0)
    found = []
    for step in (0, 1, 0):
        *_, label = data.recorded_pairs(task, step, 30, model, data.everything, "cpu")
        found.append(label)
    assert set(torch.cat(found).tolist()) == {0.0, 1.0}
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_a_seed_records_other_responses_to_the_same_posts():
    """--offline --seed 1 is another run, as it is online: the same prompts, other draws."""
    task = data.BuiltIn(0)
    model = policies.build("tiny", task.tokenizer, 128, 0)
    given = task, 0, 30, model, data.everything, "cpu"
    prompt, y, y_other, label = data.recorded_pairs(*given)
    for seed in (1, 2):
        found = data.recorded_pairs(*given, seed)
        assert torch.equal(found[0].ids, prompt.ids)
        for now, before in zip(found[1:3], (y, y_other), strict=True):
            alike = [a == b for a, b in zip(now.lists(), before.lists(), strict=True)]
            assert sum(alike) < 5, seed
        assert not torch.equal(found[3], label)
    assert not torch.equal(found[1].ids, data.recorded_pairs(*given, 1)[1].ids)


def pairs_of(comparisons):
    """The pairs of row numbers that are compared, as tuples."""
    return list(zip(comparisons.first.tolist(), comparisons.second.tolist(), strict=True))


def test_comparisons_move_together():
    """Every tensor goes where it is sent, the generator stays; meta is a device of any machine."""
    found = data.Comparisons(
        prompt=policies.pad([[1, 2], [1, 2]], "left", 0),
        response=policies.pad([[3], [4, 0]], "right", 0),
        first=torch.tensor([0]),
        second=torch.tensor([1]),
        preference=torch.tensor([0.9]),
        generator=torch.Generator(),
    )
    moved = found.to("meta")
    assert isinstance(moved, data.Comparisons)
    for part in ("prompt", "response"):
        assert isinstance(getattr(moved, part), policies.Tokens)
        assert getattr(moved, part).ids.device.type == "meta", part
        assert getattr(moved, part).mask.device.type == "meta", part
    for part in ("first", "second", "preference"):
        assert getattr(moved, part).device.type == "meta", part
    assert moved.generator is found.generator


# Records


def task_of(
    demos, compared, prompts=(), tokenizer=None, max_prompt=64, max_response=16, data_seed=0
):
    if tokenizer is None:
        spoken = []
        for record in [*demos, *compared, *prompts]:
            spoken.extend(record.values())
        tokenizer = policies.byte_tokenizer(spoken)
    return data.Records(
        demos, compared, list(prompts), tokenizer, max_prompt, max_response, data_seed
    )


def held(task):
    """Split -> its prompts' texts."""
    splits = {}
    for name, rows in {**task.compared, "supervised": task.demonstrations}.items():
        splits[name] = set()
        for row in rows:
            splits[name].add(row["prompt"])
    for name, prompts in task.prompts_of.items():
        splits[f"asked {name}"] = set(prompts)
    return splits


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
    """No prompt is in two of supervised, preference, judge, held out and test, whatever is given.

    The prompts to align on are never judged, held-out or test ones.
    """
    demos, compared = records(300)
    if layout == "comparisons alone":
        demos = []
    elif layout == "the same prompts in both":
        demos += [dict(prompt=r["prompt"], completion=r["chosen"]) for r in compared]
    prompts = []
    if layout == "prompts of their own":
        prompts = [dict(prompt=f"asked {k}") for k in range(200)]
    task = task_of(demos, compared, prompts)
    splits = held(task)
    fixed = ["supervised", "preference", "judge", "held out", "asked test"]
    for one, two in itertools.combinations(fixed, 2):
        assert splits[one] and splits[two], (one, two)
        assert not splits[one] & splits[two], (one, two)
    kept_apart = splits["judge"] | splits["held out"] | splits["asked test"]
    for name in ("asked align", "asked validation"):
        assert splits[name], name
        assert not splits[name] & kept_apart, name
    assert not splits["asked align"] & splits["asked validation"]
    unused = {r["prompt"] for r in compared}
    for name in task.compared:
        unused -= splits[name]
    seen = splits["asked align"] | splits["asked validation"] | splits["supervised"]
    assert unused, "no comparison is about a test prompt"
    assert not unused & seen, "test prompts are for the test"
    if layout == "comparisons alone":
        chosen = {r["prompt"]: r["chosen"] for r in compared}
        assert all(chosen[r["prompt"]] == r["completion"] for r in task.demonstrations)


def test_a_split_is_a_matter_of_the_text():
    """Shuffled files, or twice as many records, leave every prompt in its split."""
    demos, compared = records(200)
    plain = held(task_of(demos, compared))
    shuffled = held(task_of(demos[::-1], compared[::-1]))
    longer = held(task_of(*records(400)))
    for name in ("preference", "judge", "held out"):
        of_both = {prompt for prompt in longer[name] if int(prompt.split()[1]) < 200}
        assert plain[name] == shuffled[name] == of_both, name


def test_too_few_records_are_refused():
    with pytest.raises(ValueError, match="give more records"):
        task_of(*records(3))


def test_epochs_are_shuffled_and_complete():
    """Every row once an epoch, in another order the next.

    A step's rows do not depend on what was asked before.
    """
    task = task_of(*records(200))
    rows = task.prompts_of["test"]
    count = len(rows)
    one_by_one = [task.batch_of(rows, "x", step, 1)[0] for step in range(2 * count)]
    epochs = one_by_one[:count], one_by_one[count:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows)
    assert epochs[0] != epochs[1]
    whole = task.batch_of(rows, "x", 0, count)
    assert whole == epochs[0], "a step of many is many steps of one"


def test_long_prompts_are_cut_from_the_left_and_counted():
    """The last 8 tokens of a prompt of 40 are kept, a short one is whole.

    Only prompts that were cut are counted, once each however often they are drawn.
    """
    demos, compared = records(200)
    task = task_of(demos, compared, max_prompt=8)
    long = "word " * 40 + "end"
    whole = task.tokenizer.encode(long)
    for _ in range(2):
        prompt = task.pad_prompts([long, "end"])
    assert prompt.lists() == [whole[-8:], task.tokenizer.encode("end")]
    assert len(whole) > 8
    assert task.cut == {long}


def test_responses_get_their_end_only_if_it_fits():
    """A completion is followed by end-of-text; one that is too long is cut and gets none."""
    task = task_of(*records(200), max_response=5)
    end = task.tokenizer.eos_token_id
    short, cut = task.pad_responses([" a", " a b c d e f g h i j"]).lists()
    assert short == [*task.tokenizer.encode(" a"), end]
    assert cut == task.tokenizer.encode(" a b c d e f g h i j")[:5]
    assert end not in cut


def test_recorded_comparisons_put_the_chosen_first():
    """First are the chosen and second the rejected responses of the same prompt, with certainty.

    They are of the asked role only.
    """
    task = task_of(*records(300))
    model = policies.build("tiny", task.tokenizer, 128, 0)
    for role in ("preference", "judge", "held out"):
        found = task.comparisons(role, 0, 16, model)
        prompts = texts(task.tokenizer, found.prompt)
        said = []
        for text in texts(task.tokenizer, found.response):
            said.append(text.replace("<|endoftext|>", ""))
        assert len(found.first) == 8
        assert (found.preference == 1).all()
        of_role = {row["prompt"] for row in task.compared[role]}
        for first, second in pairs_of(found):
            number = re.search(r"\d+", prompts[first]).group()
            assert prompts[first] == prompts[second]
            assert said[first] == f" good {number}"
            assert said[second] == f" bad {number} and long"
            assert prompts[first] in of_role


def test_prompts_alone():
    """Each prompt once, in the file's order, cut from the left, for evaluate.py.

    The split says nothing.
    """
    tokenizer = policies.word_tokenizer(list("abcd"))
    rows = [dict(prompt=text) for text in ("a b c", "d", "a b c", "b <|endoftext|> a")]
    task = data.Prompts(rows, tokenizer, 2, 4)
    assert task.texts == ["a b c", "d", "b <|endoftext|> a"]
    assert task.prompts("test", 0, 2).lists() == [[2, 3], [4]]
    assert task.prompts("any", 1, 2).lists() == [[2, 1]]
    assert task.judge is None


# The task of a run


def options(**given):
    """train.py's options, as far as open_task reads them."""
    default = dict(
        demos=None,
        comparisons=None,
        prompts=None,
        policy="tiny",
        tokenizer=None,
        max_prompt_tokens=64,
        max_response_tokens=16,
        data_seed=0,
    )
    return SimpleNamespace(**default | given)


def test_open_the_built_in_task():
    """Without comparisons: the built-in one, of the data seed, with a policy from scratch only."""
    task, start, data_hash = data.open_task(options(data_seed=3))
    assert isinstance(task, data.BuiltIn)
    assert task.data_seed == 3
    assert start is None
    assert data_hash == "built-in"
    with pytest.raises(ValueError, match="--policy gpt2: the built-in task has its own words"):
        data.open_task(options(policy="gpt2"))


def test_open_records(tmp_path, capsys):
    """The hash is of the records and the vocabulary: the same twice, another if either changes.

    A tokenizer is trained where none is given, and what is asked for stands in the task.
    """
    demos, compared = records(200)
    source = write(tmp_path / "c.jsonl", compared)
    folder = str(tmp_path / "tokenizer")
    policies.byte_tokenizer(["post asks"], 300).save_pretrained(folder)
    task, start, data_hash = data.open_task(options(comparisons=source, tokenizer=folder))
    assert isinstance(task, data.Records)
    assert (task.max_prompt, task.max_response, start) == (64, 16, None)
    assert data.open_task(options(comparisons=source, tokenizer=folder))[2] == data_hash
    assert "trained" not in capsys.readouterr().out
    assert data.open_task(options(comparisons=source))[2] != data_hash
    assert "trained a byte-level BPE of" in capsys.readouterr().out
    more = write(tmp_path / "d.jsonl", demos)
    given = options(comparisons=source, tokenizer=folder, demos=more)
    task, _, other_hash = data.open_task(given)
    assert other_hash != data_hash
    assert task.demonstrations[0]["completion"].startswith(" told")


def test_open_records_with_a_policy(tmp_path):
    """The policy's own tokenizer; prompt and response together must fit into its positions."""
    source = write(tmp_path / "c.jsonl", records(200)[1])
    tokenizer = policies.byte_tokenizer(["post asks"], 300)
    folder = str(tmp_path / "policy")
    policies.build("tiny", tokenizer, 80, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task, start, _ = data.open_task(options(comparisons=source, policy=folder))
    assert task.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert start.config.n_positions == 80
    with pytest.raises(ValueError, match="together more than the policy's 80 positions"):
        data.open_task(options(comparisons=source, policy=folder, max_response_tokens=17))


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
    """Newlines, quotes, commas, leading spaces and non-ASCII text come back as they were.

    So in every format and layout; fields that are not asked for are left out; comparisons of two
    equal responses are dropped.
    """
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
    assert message.startswith(f"--comparisons {tmp_path / name}")
    assert expected in message
    assert "\n" not in message
