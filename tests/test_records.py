"""What is read from files, folders and the hub: layouts, the implicit prompt, chat templates.

Every layout through reading, through data.Records, and some through five steps of training.
"""

import gzip
import json
import os
import socket

import pytest

import data
import evaluate
import policy as policies
import records
import train
from test_data import write

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role == 'assistant' %}"
    "{{ raise_exception('an answer comes first') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


pytestmark = pytest.mark.usefixtures("small_and_cached")


@pytest.fixture(scope="module")
def chat():
    """A tokenizer with a chat template whose end of a turn is its end-of-text, as SmolLM2's."""
    tokenizer = policies.byte_tokenizer(["what colour is the sky? blue."] * 3, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def user(content):
    return dict(role="user", content=content)


def assistant(content):
    return dict(role="assistant", content=content)


def system(content):
    return dict(role="system", content=content)


SKY = user("What colour?")
BLUE = assistant("Blue.")
RED = assistant("Red.")
HH = "\n\nHuman: What colour?\n\nAssistant: {}"
COMPARISON = dict(prompt="Human: What colour?\n\nAssistant:", chosen=" Blue.", rejected=" Red.")
# option, a record, what it is as texts without a template, words of the line that says so
LAYOUTS = {
    "texts": ("comparisons", COMPARISON, COMPARISON, "prompt, chosen, rejected; texts"),
    "conversations": (
        "comparisons",
        dict(prompt=[SKY], chosen=[BLUE], rejected=[RED]),
        COMPARISON,
        "prompt, chosen, rejected; conversations, written as Human: and Assistant:",
    ),
    "the prompt repeated in conversations": (
        "comparisons",
        dict(prompt=[SKY], chosen=[SKY, BLUE], rejected=[SKY, RED]),
        COMPARISON,
        "conversations",
    ),
    "a text beside whole conversations": (
        "comparisons",
        dict(prompt="a piece of it", chosen=[SKY, BLUE], rejected=[SKY, RED]),
        COMPARISON,
        "conversations",
    ),
    "a text beside answers": (
        "comparisons",
        dict(prompt="What colour?", chosen=[BLUE], rejected=[RED]),
        COMPARISON,
        "conversations",
    ),
    "conversations without prompt": (
        "comparisons",
        dict(chosen=[SKY, BLUE], rejected=[SKY, RED]),
        COMPARISON,
        "chosen, rejected (the prompt: what both begin with); conversations",
    ),
    "several turns": (
        "comparisons",
        dict(
            chosen=[system("Be brief."), SKY, RED, user("No."), BLUE],
            rejected=[system("Be brief."), SKY, RED, user("No."), RED],
        ),
        COMPARISON
        | dict(
            prompt="System: Be brief.\n\nHuman: What colour?\n\nAssistant: Red.\n\nHuman: No.\n\n"
            "Assistant:"
        ),
        "conversations",
    ),
    "texts without prompt": (
        "comparisons",
        dict(chosen="The sky is blue.", rejected="The sky is black."),
        dict(prompt="The sky is", chosen=" blue.", rejected=" black."),
        "chosen, rejected (the prompt: what both begin with); texts",
    ),
    "HH": (
        "comparisons",
        dict(chosen=HH.format("Blue."), rejected=HH.format("Red.")),
        COMPARISON,
        "Human: and Assistant: in one text",
    ),
    "a demo": (
        "demos",
        dict(prompt="p", completion=" c"),
        dict(prompt="p", completion=" c"),
        "prompt, completion; texts",
    ),
    "a demo of turns": (
        "demos",
        dict(prompt=[SKY], completion=[BLUE]),
        dict(prompt=COMPARISON["prompt"], completion=" Blue."),
        "prompt, completion; conversations",
    ),
    "messages": (
        "demos",
        dict(messages=[SKY, BLUE]),
        dict(prompt=COMPARISON["prompt"], completion=" Blue."),
        "messages; conversations",
    ),
    "messages that go on": (
        "demos",
        dict(messages=[SKY, RED, SKY, BLUE, user("Thanks.")]),
        dict(prompt=f"{COMPARISON['prompt']} Red.\n\n{COMPARISON['prompt']}", completion=" Blue."),
        "messages; conversations",
    ),
    "a prompt": ("prompts", dict(prompt="p"), dict(prompt="p"), "prompt; texts"),
    "a prompt of turns": (
        "prompts",
        dict(prompt=[SKY]),
        dict(prompt=COMPARISON["prompt"]),
        "prompt; conversations",
    ),
    "messages with an answer": (
        "prompts",
        dict(messages=[SKY, BLUE]),
        dict(prompt=COMPARISON["prompt"]),
        "messages; conversations",
    ),
    "messages that end with a question": (
        "prompts",
        dict(messages=[SKY, RED, SKY]),
        dict(prompt=f"{COMPARISON['prompt']} Red.\n\n{COMPARISON['prompt']}"),
        "messages; conversations",
    ),
    "comparisons as prompts": (
        "prompts",
        dict(chosen=HH.format("Blue."), rejected=HH.format("Red.")),
        dict(prompt=COMPARISON["prompt"]),
        "Human: and Assistant: in one text",
    ),
}


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_is_read(tmp_path, capsys, case, extension):
    """Two records each, with fields beside that nobody asked for; one line says what they were."""
    option, row, expected, words = LAYOUTS[case]
    beside = dict(id=1, source="x", score_chosen=0.5)
    source = write(tmp_path / f"x.{extension}", [beside | row, row | beside])
    assert data.read(option, source) == [expected] * 2
    said = capsys.readouterr().out
    assert said.startswith(f"--{option} {source}: 2 records of ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("extension", [".jsonl.gz", ".json.gz", ".csv.gz", ".tsv", ".tsv.gz"])
def test_compressed_files_and_tabs(tmp_path, extension):
    """They read as the plain formats do, newlines and quotes in a cell included."""
    rows = [
        dict(prompt='a "b"\nc\td,', chosen=" yes", rejected=" no"),
        dict(prompt="é", chosen=" 1", rejected=" 2"),
    ]
    plain = extension.removesuffix(".gz")
    source = tmp_path / f"x{plain}"
    if plain == ".tsv":
        lines = ["prompt\tchosen\trejected\r\n", '"a ""b""\nc\td,"\t yes\t no\r\n', "é\t 1\t 2\r\n"]
        source.write_bytes("".join(lines).encode())
    else:
        write(source, rows)
    if extension.endswith(".gz"):
        content = source.read_bytes()
        source = tmp_path / f"x{extension}"
        source.write_bytes(gzip.compress(content))
    assert data.read("comparisons", str(source)) == rows


# The implicit prompt

SHARED = {  # chosen, rejected: the prompt, and the answers
    "at a space": ("The sky is blue", "The sky is grey", ("The sky is", " blue", " grey")),
    "inside a word": ("It is blue.", "It is black.", ("It is", " blue.", " black.")),
    "inside a number": ("It is 17", "It is 18", ("It is", " 17", " 18")),
    "after a colon": ("Q? A:yes", "Q? A:no", ("Q? A:", "yes", "no")),
    "after a line": ("Q?\nyes", "Q?\nno", ("Q?\n", "yes", "no")),
    "one within the other": ("It is", "It is blue", ("It", " is", " is blue")),
    "a full stop more": ("It is blue", "It is blue.", ("It is", " blue", " blue.")),
    "blanks at the end": ("It is  ", "It is  x", ("It", " is  ", " is  x")),
    "two spaces": ("It is  a", "It is  b", ("It is ", " a", " b")),
    "a word within a word": ("an ice", "an icecap", ("an", " ice", " icecap")),
    "a word that goes on": ("It is so, no", "It is sold", ("It is", " so, no", " sold")),
    "other letters": ("Ça est né", "Ça est né là", ("Ça est", " né", " né là")),
}


@pytest.mark.parametrize("case", SHARED)
def test_the_implicit_prompt_ends_with_a_word(case):
    """Nothing is lost, no answer is blank, and the order of the two does not matter."""
    chosen, rejected, expected = SHARED[case]
    prompt, answer, other = expected
    found = records.separate_texts(chosen, rejected)
    assert (found["prompt"], found["chosen"], found["rejected"]) == expected
    assert prompt + answer == chosen
    assert prompt + other == rejected
    assert records.separate_texts(rejected, chosen)["prompt"] == prompt


@pytest.mark.parametrize(
    "pair", [("blue", "black"), ("blue", "blue sky"), ("yes", "no"), (" yes", " no"), ("a", "a b")]
)
def test_no_implicit_prompt(tmp_path, pair):
    """Nothing shared, a piece of a word, or all of one of them: the record's line is named."""
    good = dict(chosen="It is blue", rejected="It is grey")
    rows = [good, dict(chosen=pair[0], rejected=pair[1])]
    source = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(ValueError, match="x.jsonl: line 2: chosen and rejected begin with no word"):
        records.read("comparisons", source)


def test_what_teaches_nothing_is_left_out(tmp_path, capsys):
    """Equal answers, conversations that part before the last turn, empty answers: each counted."""
    rows = [
        dict(chosen=[SKY, BLUE], rejected=[SKY, RED]),
        dict(chosen=[SKY, BLUE], rejected=[SKY, BLUE]),
        dict(chosen=[SKY, BLUE], rejected=[SKY, assistant(" Blue.\n")]),
        dict(chosen=[SKY, BLUE], rejected=[SKY, RED, SKY, BLUE]),
        dict(chosen=[SKY, RED, SKY, BLUE], rejected=[SKY, BLUE, SKY, BLUE]),
        dict(chosen=[SKY, BLUE], rejected=[SKY, assistant(" ")]),
        dict(chosen=[SKY, BLUE], rejected=[SKY, SKY]),
    ]
    source = write(tmp_path / "x.jsonl", rows)
    assert data.read("comparisons", source) == [COMPARISON]
    said = capsys.readouterr().out
    assert "2 comparisons of two equal responses are left out" in said
    assert "4 records whose responses are not one turn of the assistant each" in said
    texts = []
    for row in rows[:-1]:  # the last has no answer: as a text it is refused
        text = {}
        for name, turns in row.items():
            names = {"user": "Human", "assistant": "Assistant"}
            spoken = [f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns]
            text[name] = "".join(spoken)
        texts.append(text)
    assert data.read("comparisons", write(tmp_path / "y.jsonl", texts)) == [COMPARISON]
    assert "3 records whose responses are not one turn of the assis" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no record with two different responses"):
        data.read("comparisons", write(tmp_path / "z.jsonl", rows[1:]))


# What is refused

TURNS = dict(prompt=[SKY], chosen=[BLUE], rejected=[RED])
IMAGE = [dict(type="image", url="x.png")]
CALL = [dict(role="assistant", content="", tool_calls=[dict(name="f")])]
# option, records, what the line must say
REFUSED = {
    "text alone": (
        "demos",
        [dict(text="p c")],
        "line 1: its fields are 'text'; give prompt, compl",
    ),
    "pairs of demos": (
        "demos",
        [dict(question="p", answer="c")],
        "give prompt, completion or mess",
    ),
    "ShareGPT": ("demos", [{"conversations": [{"from": "human"}]}], "or messages (texts or lists"),
    "one answer": (
        "comparisons",
        [dict(prompt="p", chosen="a")],
        "give prompt, chosen, rejected or",
    ),
    "answers as prompts": (
        "prompts",
        [dict(text="p")],
        "give prompt or messages or chosen, reject",
    ),
    "another layout later": (
        "comparisons",
        [TURNS, dict(chosen=[SKY, BLUE], rejected=[SKY, RED])],
        "line 2: it has chosen, rejected, the first record prompt, chosen, rejected",
    ),
    "text after turns": (
        "comparisons",
        [TURNS, COMPARISON],
        "line 2: 'prompt' is 'Human: What colour?",
    ),
    "turns after text": (
        "comparisons",
        [COMPARISON, TURNS],
        "line 2: 'prompt' is [{'role': 'user'",
    ),
    "text beside turns": (
        "comparisons",
        [TURNS, TURNS | dict(rejected="Red.")],
        "line 2: 'rejected' is 'Red.'; it must be a list of messages",
    ),
    "no turns": ("comparisons", [TURNS, TURNS | dict(prompt=[])], "line 2: 'prompt' is []"),
    "null": ("comparisons", [TURNS, TURNS | dict(chosen=None)], "line 2: 'chosen' is None"),
    "a word for a turn": ("prompts", [dict(prompt=[SKY, "x"])], "line 1: 'prompt' holds 'x'"),
    "no role": ("prompts", [dict(prompt=[dict(content="x")])], "has a role and a content"),
    "a tool": ("prompts", [dict(prompt=[SKY, SKY | dict(role="tool")])], "the role 'tool'"),
    "a role that is none": ("prompts", [dict(prompt=[SKY | dict(role=[])])], "the role []"),
    "an image": (
        "comparisons",
        [TURNS, TURNS | dict(prompt=[user(IMAGE)])],
        "line 2: 'prompt' has a turn whose content is [{'type': 'image'",
    ),
    "no content": ("prompts", [dict(prompt=[user(None)])], "without images or tool calls"),
    "a tool call": ("comparisons", [TURNS | dict(chosen=CALL)], "without images or tool calls"),
    "half a surrogate pair": ("prompts", [dict(prompt=[user("\ud83d")])], "line 1: 'utf-8' codec"),
    "nothing said": ("prompts", [dict(prompt=[user(" ")])], "no turn with something said"),
    "an answer last": ("prompts", [dict(prompt=[SKY, BLUE])], "ends with a turn of the assistant"),
    "no answer": ("demos", [dict(messages=[SKY])], "line 1: 'messages' has no turn of the assis"),
    "an answer alone": ("demos", [dict(messages=[BLUE])], "no turn with something said"),
    "two answers": ("demos", [dict(messages=[SKY, RED, BLUE])], "ends with a turn of the assist"),
    "no shared turn": (
        "comparisons",
        [dict(chosen=[SKY, BLUE], rejected=[user("What?"), BLUE])],
        "line 1: chosen and rejected share no first turn",
    ),
    "HH that does not begin so": (
        "comparisons",
        [dict(chosen=HH.format("a"), rejected=HH.format("b")), dict(chosen="a b", rejected="a c")],
        "line 2: 'chosen' is 'a b'; it must begin with Human:",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused(tmp_path, capsys, case):
    """One line with exit status 2 that names option, file and line; nothing is written."""
    option, rows, expected = REFUSED[case]
    source = write(tmp_path / "x.jsonl", rows)
    good = write(tmp_path / "good.jsonl", [COMPARISON])
    files = {"comparisons": good} | {option: source}
    argv = ["--stages", str(tmp_path / "stages"), "--out", str(tmp_path / "out")]
    for name, path in files.items():
        argv += [f"--{name}", path]
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: --{option} {source}: line ")
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "stages").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["demos", "comparisons", "prompts"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(tmp_path, capsys, monkeypatch, name, empty):
    """It is not taken for an option that was not given: the built-in task would be run."""
    monkeypatch.chdir(tmp_path)
    assert train.main([f"--{name}", empty]) == 2
    error = capsys.readouterr().err
    advice = "is empty; give a value, or leave the option out"
    assert error == f"train.py: error: argument --{name}: {advice}\n"
    assert list(tmp_path.iterdir()) == []


# Names are names, files are files


def test_names_are_no_patterns(tmp_path):
    """A file called x[1].jsonl or x*.jsonl is read itself, not what it would match."""
    rows = {}
    for name in ("x[1]", "x*", "x?", "x1", "x:train", "a=b"):
        rows[name] = [COMPARISON | dict(prompt=name)]
        write(tmp_path / f"{name}.jsonl", rows[name])
        write(tmp_path / f"{name}.parquet", rows[name])
    for name in rows:
        for extension in ("jsonl", "parquet"):
            assert data.read("comparisons", str(tmp_path / f"{name}.{extension}")) == rows[name]
    for name in ("x[2].jsonl", "*.jsonl", "*"):
        with pytest.raises(ValueError, match="no such file"):
            records.read("comparisons", str(tmp_path / name))


def test_a_builder_of_datasets_is_no_hub_name(tmp_path, monkeypatch):
    """To datasets, json means every such file in the current folder."""
    write(tmp_path / "x.json", [COMPARISON])
    monkeypatch.chdir(tmp_path)
    for name in ("json", "json:train", "csv"):
        with pytest.raises(ValueError, match="no such file"):
            records.read("comparisons", name)


@pytest.mark.parametrize("text", ["null", "[null]", "[null, {GOOD}]", "3", "[[{GOOD}]]", '"x"'])
def test_null_and_the_like_in_a_json(tmp_path, text):
    """They end in a line; pyarrow's reader would die of a null before the records."""
    path = tmp_path / "x.json"
    path.write_text(text.replace("{GOOD}", json.dumps(COMPARISON)))
    with pytest.raises(ValueError, match=r"x.json: (line|record) 1: it is not an object"):
        records.read("comparisons", str(path))


def test_objects_a_line_in_a_json(tmp_path):
    """As datasets reads them, too; a byte-order mark before an array is no record."""
    path = tmp_path / "x.json"
    path.write_text(f"{json.dumps(COMPARISON)}\n" * 2)
    assert data.read("comparisons", str(path)) == [COMPARISON] * 2
    path.write_text("\ufeff" + json.dumps([COMPARISON]), encoding="utf-8")
    assert data.read("comparisons", str(path)) == [COMPARISON]


def test_cells_stay_texts(tmp_path):
    """What pandas takes for a missing value, a number, a truth or a date."""
    cells = ["NA", "null", "None", "nan", "2020-01-01", "1e3", "True", "-"]
    rows = []
    for k in range(len(cells)):
        names = ("prompt", "chosen", "rejected")
        rows.append({name: cells[(k + at) % len(cells)] for at, name in enumerate(names)})
    assert data.read("comparisons", write(tmp_path / "x.csv", rows)) == rows


CELLS = {  # a .csv file, what the line must say
    "a quotation mark that stays open": ('prompt\na\n"b\nc\n', "line 4: unexpected end of data"),
    "text behind a quotation mark": ('prompt\n"a"b\n', "line 2: "),
    "two fields of one name": ("prompt,prompt\na,b\n", "line 1: two fields have one name"),
    "the head alone": ("prompt\n", "holds no record"),
    "an empty cell": ("prompt,x\n,1\n", "line 2: 'prompt' is ''"),
}


@pytest.mark.parametrize("case", CELLS)
def test_bad_cells(tmp_path, case):
    text, expected = CELLS[case]
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError) as error:
        records.read("prompts", str(tmp_path / "x.csv"))
    assert str(error.value).startswith(f"--prompts {tmp_path / 'x.csv'}: {expected}")


def test_pipes_and_devices_are_refused(tmp_path):
    """A pipe that nobody writes to would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    for name in (tmp_path / "pipe.jsonl", tmp_path / "zero.jsonl", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{name}: not a file; give a .jsonl"):
            records.read("comparisons", str(name))
    with pytest.raises(ValueError, match="gone.jsonl: not a file"):
        records.read("comparisons", str(tmp_path / "gone.jsonl"))


def test_nothing_is_read_without_bound(tmp_path, monkeypatch):
    """A compressed file may hold a line without end, or an array."""
    monkeypatch.setattr(records, "LONGEST_LINE", 1000)
    monkeypatch.setattr(records, "LONGEST_JSON", 3000)
    for name, content, expected in (
        ("x.jsonl.gz", b"\0" * 10000, "line 1: longer than 1000 bytes"),
        ("x.csv.gz", b"prompt\n" + b'"' + b"a\n" * 10000, "line 502: field larger than"),
        ("x.json.gz", b"[" + b" " * 10000 + b"]", "longer than 3000 bytes; convert it to .jsonl"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(ValueError) as error:
            records.read("prompts", str(tmp_path / name))
        assert expected in str(error.value)


def test_damaged_compressed_files(tmp_path):
    whole = gzip.compress(json.dumps(COMPARISON).encode() * 50)
    for content in (whole[:-9], b"no gzip", whole[:30] + b"\xff" * 20 + whole[50:]):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="x.jsonl.gz: "):
            records.read("comparisons", str(tmp_path / "x.jsonl.gz"))


def test_libraries_say_nothing_beside_the_one_line(tmp_path, capfd):
    """Damaged tables and folders that are none: not a word on standard output or error."""
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + b"\xff" * 50 + b"PAR1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "state.json").write_text("null")
    for name in ("x.parquet", "folder"):
        with pytest.raises(ValueError, match="cannot be read"):
            records.read("comparisons", str(tmp_path / name))
    assert capfd.readouterr() == ("", "")


# Folders and the hub


def test_a_folder_that_datasets_saved(tmp_path):
    """With one split, or several: the named one, train, or the only one. Names are no patterns."""
    import datasets

    def table(prompt):
        return datasets.Dataset.from_list([COMPARISON | dict(prompt=prompt, beside=1)])

    def read(source):
        return data.read("comparisons", str(tmp_path / source))[0]["prompt"]

    table("plain").save_to_disk(tmp_path / "one[1]")
    datasets.DatasetDict(train=table("a"), test=table("b")).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(x=table("c"), y=table("d")).save_to_disk(tmp_path / "other")
    datasets.DatasetDict(x=table("e")).save_to_disk(tmp_path / "only")
    assert read("one[1]") == "plain"
    assert [read("two"), read("two:test"), read("other:y"), read("only")] == ["a", "b", "d", "e"]
    for source, expected in (
        ("one[1]:test", "has no splits"),
        ("two:none", "has the splits train, test; name one as FOLDER:SPLIT"),
        ("other", "has the splits x, y"),
        ("nowhere:test", "no such file"),
    ):
        with pytest.raises(ValueError, match=expected):
            read(source)


def test_a_conversation_in_a_saved_folder(tmp_path):
    """Arrow gives every message the fields of all: those that are null say nothing."""
    import datasets

    turns = [user("a") | dict(name="x"), assistant("b") | dict(tool_calls=None)]
    datasets.Dataset.from_list([dict(messages=turns)]).save_to_disk(tmp_path / "x")
    expected = [dict(prompt="Human: a\n\nAssistant:", completion=" b")]
    assert data.read("demos", str(tmp_path / "x")) == expected


def test_a_hub_name_with_a_split(monkeypatch):
    """OWNER/NAME is the train split, OWNER/NAME:SPLIT another, slices of one included."""
    import datasets

    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([COMPARISON | dict(beside=1)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("a/b-c.d", "a/b:test", "a/b:test[:10]"):
        assert data.read("comparisons", source) == [COMPARISON]
    assert asked == [("a/b-c.d", "train"), ("a/b", "test"), ("a/b", "test[:10]")]


def test_a_hub_that_is_not_reached_is_not_asked(monkeypatch):
    """Nothing but a cache is looked into: one line, and no connection is tried."""
    import datasets

    tried = []

    def connect(*given, **named):
        tried.append(given)
        raise OSError("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # as it was, afterwards
    monkeypatch.setattr(policies, "is_reached", lambda name: False)
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(ValueError, match="nobody/nothing.*without network give a local file"):
        data.read("demos", "nobody/nothing")
    assert not tried


# Chat templates


def test_a_template_writes_the_prompt_and_no_end_of_the_answer(tmp_path, chat, capsys):
    """The prompt is the template's with its generation prompt, the answer stops with what was said.

    An end-of-text that is spelled out in a turn ends none.
    """
    turns = [system(""), user("a<|im_end|>b")]
    row = dict(prompt=turns, chosen=[assistant(" c<|im_end|>d ")], rejected=[BLUE])
    source = write(tmp_path / "x.jsonl", [row])
    [found] = data.read("comparisons", source, chat)
    assert "written by the tokenizer's chat template" in capsys.readouterr().out
    opening = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
    prompt = opening + "<|im_start|>assistant\n"
    assert found == dict(prompt=prompt, chosen=" cd", rejected="Blue.", template=True)


def test_what_a_template_puts_before_an_answer_belongs_to_it(tmp_path):
    """A space, or an empty thought, as the model has read it; what it puts behind does not."""
    thoughtful = policies.byte_tokenizer(["a"], 300)
    thoughtful.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} <think></think> {{ m.content | trim }} </s>{% endif %}{% endfor %}"
    )
    source = write(tmp_path / "x.jsonl", [dict(messages=[SKY, assistant("Blue. ")])])
    [found] = data.read("demos", source, thoughtful)
    assert found["prompt"] == "[INST] What colour? [/INST]"
    assert found["completion"] == " <think></think> Blue."


def test_a_template_that_writes_the_date(tmp_path):
    """It is one day for ever: the splits, the kept stages and a resumed run go by the text."""
    dated = policies.byte_tokenizer(["a"], 300)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    source = write(tmp_path / "x.jsonl", [dict(prompt=[SKY])])
    [found] = data.read("prompts", source, dated)
    assert found["prompt"] == "13 Mar 2024 What colour?"
    dated.chat_template = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}"
    )
    assert data.read("prompts", source, dated)[0]["prompt"] == "13 Mar 2024"


def test_what_a_template_refuses(tmp_path, chat):
    """Its own words, with the record's line."""
    source = write(tmp_path / "x.jsonl", [dict(messages=[SKY]), dict(messages=[RED, SKY])])
    with pytest.raises(ValueError) as error:
        data.read("prompts", source, chat)
    assert str(error.value) == (
        f"--prompts {source}: line 2: the tokenizer's chat template refuses it: "
        "an answer comes first; mend or remove it"
    )


def sky(count, first=0):
    """Conversations about as many different posts: comparisons with an implicit prompt."""
    rows = []
    for k in range(first, first + count):
        asked = [system("Be brief."), user(f"post {k}?"), RED, user("Again.")]
        chosen = [*asked, assistant(f"good {k}<|im_end|>")]
        rows.append(dict(chosen=chosen, rejected=[*asked, assistant(f"bad {k} and long")]))
    return rows


def test_ends_of_turns_stay_in_prompts_and_in_no_response(tmp_path, chat):
    """Through Records and Prompts: four ends in each prompt, one in each response, the last.

    A prompt that no template wrote keeps none, though the tokenizer has a template.
    """
    found = data.read("comparisons", write(tmp_path / "x.jsonl", sky(150)), chat)
    plain = [dict(prompt="a <|im_end|> b")]
    end = chat.eos_token_id
    task = data.Records([], found, [], chat, 512, 40)
    model = policies.build("tiny", chat, 600, 0)
    compared = task.comparisons("preference", 0, 8, model)
    demo = task.demos(0, 4)[0].lists()
    prompts = [*compared.prompt.lists(), *demo, *task.prompts("align", 0, 4).lists()]
    for row in [*prompts, *data.Prompts(found[:3], chat, 512, 40).prompts("test", 0, 3).lists()]:
        assert row.count(end) == 4
        assert chat.decode(row).endswith("<|im_end|>\n<|im_start|>assistant\n")
    for row in [*compared.response.lists(), *task.demos(0, 4)[1].lists()]:
        assert row.count(end) == 1
        assert row[-1] == end
    for rows in (
        data.Prompts([*plain, *found], chat, 512, 40),
        data.Records([], found, [*found, *plain], chat, 512, 40),
    ):
        assert rows.by_template == {row["prompt"] for row in found}
    [row] = data.Prompts(plain, chat, 512, 40).prompts("test", 0, 1).lists()
    assert end not in row


def test_a_seed_orders_recorded_pairs_anew(tmp_path, chat):
    """Of --offline: in one pass over the records every pair once, in an order of its own. Seed 0's
    is that of the preference model's pairs, as it was before there were others."""
    records = data.read("comparisons", write(tmp_path / "x.jsonl", sky(150)), chat)
    task = data.Records([], records, [], chat, 512, 40)
    model = policies.build("tiny", chat, 600, 0)
    count = len(task.compared["preference"])
    orders = []
    for seed in (0, 1, 2):
        given = task, 0, count, model, data.everything, "cpu", seed
        _, chosen, _, label = data.recorded_pairs(*given)
        assert label.tolist() == [1.0] * count
        orders.append([tuple(ids) for ids in chosen.lists()])
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3
    plain = task.comparisons("preference", 0, 2 * count, model).response.lists()[:count]
    assert orders[0] == [tuple(ids) for ids in plain]


def test_a_prompt_of_nothing_but_end_of_text(tmp_path, chat):
    """It is refused by its line; unknown words that leave nothing are read as end-of-text.

    No row of prompts is ever empty: a model cannot write before it has read something.
    """
    end = chat.eos_token
    for row in (dict(prompt=f"{end} {end}\n"), dict(prompt=[user(end)])):
        source = write(tmp_path / "x.jsonl", [row])
        with pytest.raises(ValueError, match="line 1: its prompt is nothing but .*end-of-text"):
            data.read("prompts", source, chat)
    tokenizer = policies.word_tokenizer(["a"])
    rows = data.Prompts([dict(prompt="not known"), dict(prompt="a")], tokenizer, 5, 5)
    assert rows.prompts("test", 0, 2).lists() == [[tokenizer.eos_token_id], [1]]


# Five steps


def hh(count):
    """HH texts about as many different posts."""
    rows = []
    for k in range(count):
        asked = f"\n\nHuman: post {k}?\n\nAssistant: Which?\n\nHuman: That.\n\nAssistant:"
        rows.append(dict(chosen=f"{asked} good {k}", rejected=f"{asked} bad {k} and long"))
    return rows


def implicit(count):
    """Texts about as many different posts, whose beginning is shared."""
    rows = []
    for k in range(count):
        asked = f"post {k} TL;DR:"
        rows.append(dict(chosen=f"{asked} good {k}", rejected=f"{asked} grim {k} and long"))
    return rows


@pytest.mark.parametrize(
    "make, has_template",
    [
        (sky, True),
        (hh, False),
        (implicit, False),
        pytest.param(sky, False, marks=pytest.mark.slow),
        pytest.param(hh, True, marks=pytest.mark.slow),
        pytest.param(implicit, True, marks=pytest.mark.slow),
    ],
)
def test_five_steps(tmp_path, capsys, chat, make, has_template):
    """Comparisons, demos and prompts of a layout, with a chat template and without."""
    folder = str(tmp_path / "tokenizer")
    chat.save_pretrained(folder)
    demos = [dict(messages=row["chosen"]) for row in sky(60, 1000)]
    prompts = [dict(prompt=row["chosen"][:2]) for row in sky(60, 2000)]
    argv = ["--comparisons", write(tmp_path / "c.jsonl", make(150))]
    argv += ["--demos", write(tmp_path / "d.jsonl", demos)]
    argv += ["--prompts", write(tmp_path / "p.jsonl", prompts)]
    if has_template:
        argv += ["--tokenizer", folder]
    for name in ("supervised-steps", "preference-steps", "steps", "eval-prompts"):
        argv += [f"--{name}", "5"]
    argv += ["--batch-size", "4", "--max-prompt-tokens", "200", "--max-response-tokens", "8"]
    argv += ["--stages", str(tmp_path / "stages"), "--out", str(tmp_path / "out")]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    for option in ("comparisons", "demos", "prompts"):
        assert out.count(f"--{option} {tmp_path}") == 1, "each file is said in one line"
    # Of the data: in these the lengths tell it all, which the run says of its judge.
    assert "warning: --" not in out
    assert ("by the tokenizer's chat template" in out) == has_template
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 5


def test_evaluate_asks_through_the_template(tmp_path, capsys, chat):
    """The prompts of evaluate.py are written by the policies' own template."""
    policies.build("tiny", chat, 128, 0).save_pretrained(tmp_path / "a")
    chat.save_pretrained(tmp_path / "a")
    judge = "def preference(x, y, z):\n    print('READ', repr(x[0]))\n    return [0.5] * len(x)\n"
    (tmp_path / "judge.py").write_text(judge)
    rows = [dict(prompt=[user("post 1?")]), dict(prompt=[user("post 2?")])]
    source = write(tmp_path / "p.jsonl", rows)
    argv = [str(tmp_path / "a")] * 2 + ["--prompts", source, "--judge", str(tmp_path / "judge.py")]
    evaluate.main([*argv, "--count", "2", "--max-response-tokens", "4"])
    assert "READ 'user\\npost 1?\\nassistant\\n'" in capsys.readouterr().out


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_labels_of_single_responses_are_said_to_be_ignored(tmp_path, capsys, extension):
    """KTO's records, a label a completion: as demos all are read, those marked bad are counted in a
    line; without such a mark nothing is said; as comparisons they are refused with what to do."""
    rows = []
    for k, label in enumerate((True, False, True, False, False)):
        rows.append(dict(prompt=f"p {k}", completion=f" c {k}", label=label))
    path = write(tmp_path / f"kto.{extension}", rows)
    assert len(records.read("demos", str(path)).rows) == 5
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "3 of 5 are marked bad by their 'label'" in out
    good = write(tmp_path / f"good.{extension}", rows[::2][:2])
    assert len(records.read("demos", str(good)).rows) == 2 and not capsys.readouterr().out
    with pytest.raises(ValueError, match="pair a good and a bad one of a prompt"):
        records.read("comparisons", str(path))
