"""What is on the disk, or on the hub: records of demonstrations, comparisons and prompts as texts.

A file's layout is detected from its first record, every other record must have the same. Taken are
the layouts of TRL, each in texts or in conversations (lists of {"role": ..., "content": ...}):

  --comparisons  prompt, chosen, rejected  | chosen, rejected: the prompt is what both begin with
  --demos        prompt, completion        | messages: the last turn of the assistant is imitated
  --prompts      prompt                    | messages | chosen, rejected

and "Human: ... Assistant: ..." in one text, as the HH data have it. Other fields are ignored.
A conversation becomes a text by the tokenizer's chat template, or plainly where it has none.
Names are names, not patterns; a cell of a table that spells NA or a date is a text.
Left out: streaming, images, tool calls, labels of single responses (a warning says so).
"""

import csv
import gzip
import json
import logging
import os
import re
import zlib
from typing import NamedTuple

import policy as policies

# What a record holds once it was read.
FIELDS = {
    "demos": ("prompt", "completion"),
    "comparisons": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}
# What it may hold in the file: the first line whose fields are all there is the layout.
LAYOUTS = {
    "demos": (("prompt", "completion"), ("messages",)),
    "comparisons": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "prompts": (("prompt",), ("messages",), ("chosen", "rejected")),
}
COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "label")
# What KTO's records say of a bad completion, in a .json file and in a table's cell.
BAD = (False, "false", "0")
EXTENSIONS = (
    *(".jsonl", ".json", ".csv", ".tsv", ".parquet"),
    *(".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz"),
)
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
# OWNER/NAME: to datasets a word alone, such as json, means all such files in the current folder.
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Where a turn of the HH texts begins.
TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
# Some chat templates write today's date, and the same records would be others tomorrow.
FIXED_DAY = "{% macro strftime_now(form) %}13 Mar 2024{% endmacro %}"
LONGEST_LINE = 2**26  # bytes: a compressed file may hold a line without end
LONGEST_JSON = 2**30  # bytes of a .json, which is read as a whole


class Layout(NamedTuple):
    """How the records of a file are laid out.

    fields:
        the names that are read, one of LAYOUTS' lines.
    kinds:
        of each field's value: "text" or "messages"; "turns" for a text with Human: and Assistant:.
    """

    fields: tuple
    kinds: tuple

    def is_conversation(self):
        """Whether records become lists of messages."""
        return self.kinds != ("text",) * len(self.kinds)


class Found(NamedTuple):
    """Records as they were read: checked, with a prompt each, conversations not yet texts.

    name:
        "--comparisons FILE", for messages.
    layout:
        a Layout.
    rows:
        dicts of the option's FIELDS; a value is a text, or a list of messages.
    places:
        where each stood, such as "line 2".
    """

    name: str
    layout: Layout
    rows: list
    places: list


def read(option, source):
    """The records of --option source, as Found.

    option:
        a key of LAYOUTS.
    source:
        a local file, a folder saved by datasets, or a hub name OWNER/NAME; of the last two also
        NAME:SPLIT.

    Comparisons that carry no label, or not of two answers to one prompt, are left out with a
    warning. Raises ValueError, in one line, with option, source and the line or record.
    """
    name = f"--{option} {source}"
    found = Found(name, None, [], [])
    left_out = dict.fromkeys(REASONS, 0)
    bad = 0
    try:
        for place, row in rows_of(source):
            try:
                layout = layout_of(option, row)
                if found.layout is None:
                    found = found._replace(layout=layout)
                record = separate(option, found.layout, check(row, layout, found.layout))
                reason = why_left_out(record)
                if not reason:
                    check_prompt(record["prompt"])
            except ValueError as error:
                raise ValueError(f"{place}: {error}; mend or remove it") from None
            if reason:
                left_out[reason] += 1
            else:
                found.rows.append({field: record[field] for field in FIELDS[option]})
                found.places.append(place)
                bad += option == "demos" and is_marked_bad(row)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not found.rows:
        wanted = "record with two different responses" if sum(left_out.values()) else "record"
        raise ValueError(f"{name}: holds no {wanted}")
    for reason, count in left_out.items():
        if count:
            print(f"warning: {name}: {count} {reason} are left out")
    if bad:
        print(
            f"warning: {name}: {bad} of {len(found.rows)} are marked bad by their 'label' and are "
            "imitated like the others; remove them, or make comparisons of a good and a bad one"
        )
    return found


def is_marked_bad(row):
    """Whether a record's label says that its completion is bad, as KTO's records have it."""
    label = row.get("label")
    return (label.lower() if isinstance(label, str) else label) in BAD


# The layout of a record


def layout_of(option, row):
    """The Layout of a record. Raises ValueError, naming those that there are, if it has none."""
    if not isinstance(row, dict):
        raise ValueError("it is not an object {...}")
    for fields in LAYOUTS[option]:
        if all(field in row for field in fields):
            return Layout(fields, kinds_of(fields, row))
    wanted = " or ".join(", ".join(fields) for fields in LAYOUTS[option])
    has = ", ".join(map(repr, row))[:200] or "none"
    pair_them = ""
    if option == "comparisons" and "label" in row:
        pair_them = "; of completions with a label each, pair a good and a bad one of a prompt"
    raise ValueError(f"its fields are {has}; give {wanted} (texts or lists of messages){pair_them}")


def kinds_of(fields, row):
    """The kinds of a record's values, as Layout has them. What is no list should be a text."""
    kinds = ["messages" if isinstance(row[field], list) else "text" for field in fields]
    if fields == ("chosen", "rejected") and kinds == ["text", "text"]:
        # Of a text alone, only one that opens as HH's do is taken for a conversation.
        opens = [isinstance(row[field], str) and turns_begin(row[field]) for field in fields]
        if all(opens):
            return ("turns", "turns")
    return tuple(kinds)


def turns_begin(text):
    """Whether a text begins with Human: and has an answer of the Assistant: behind it."""
    return bool(re.match(r"\s*Human:", text)) and "\n\nAssistant:" in text


def check(row, layout, first):
    """The values of a record that are read: {field: text or list of messages}.

    row, layout:
        the record and its own layout.
    first:
        the layout of the first record, which this one's must be.

    Raises ValueError for another layout, an empty text, or a message that is not one.
    """
    if layout.fields != first.fields:
        raise ValueError(
            f"it has {', '.join(layout.fields)}, the first record {', '.join(first.fields)}"
        )
    values = {}
    for field, kind in zip(first.fields, first.kinds, strict=True):
        value = row[field]
        if kind == "messages":
            values[field] = check_messages(field, value)
        else:
            check_text(field, value)
            values[field] = turns_of(field, value) if kind == "turns" else value
    return values


def check_text(field, value):
    """Raises ValueError if a value is not a text, or an empty one."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{field}' is {repr(value)[:40]}; it must be text that is not empty")
    value.encode()  # half a surrogate pair is not text


def check_messages(field, value):
    """A list of messages with nothing in it but role and content. Raises ValueError if it is none.

    An empty content passes here: a system's turn often has nothing to say.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{field}' is {repr(value)[:40]}; it must be a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(
                f"'{field}' holds {repr(message)[:40]}; a message has a role and a content"
            )
        role = message["role"]
        content = message["content"]
        if not isinstance(role, str) or role not in SPEAKERS:
            raise ValueError(
                f"'{field}' has a turn of the role {repr(role)[:40]}; "
                f"roles are {', '.join(SPEAKERS)}"
            )
        if not isinstance(content, str) or message.get("tool_calls"):
            raise ValueError(
                f"'{field}' has a turn whose content is {repr(content)[:40]}; "
                "it must be text, without images or tool calls"
            )
        content.encode()
        messages.append(dict(role=role, content=content))
    return messages


def turns_of(field, text):
    """The messages of a text with Human: and Assistant:, as the HH data have it."""
    if not turns_begin(text):
        raise ValueError(
            f"'{field}' is {repr(text)[:40]}; "
            "it must begin with Human: and hold Assistant:, as the first record does"
        )
    pieces = TURN.split(text)[1:]
    roles = {name: role for role, name in SPEAKERS.items()}
    messages = []
    for name, content in zip(pieces[::2], pieces[1::2], strict=True):
        messages.append(dict(role=roles[name], content=content.strip()))
    return messages


# Which part of a record is the prompt


def separate(option, layout, values):
    """A record with a prompt of its own, and its answers without it.

    option, layout, values:
        as layout_of takes and check takes and returns them.

    Returns a dict of prompt and completion, or of prompt, chosen and rejected, or of prompt alone:
    texts, or lists of messages. Raises ValueError where there is no prompt, or nothing to imitate.
    """
    if "messages" in values:
        return last_answer(option, values["messages"])
    if layout.is_conversation():
        answers = {name: values[name] for name in values if name != "prompt"}
        return separate_turns(values.get("prompt"), answers)
    if "prompt" not in values:
        return separate_texts(values["chosen"], values["rejected"])
    return values


def last_answer(option, messages):
    """The assistant's last turn is the completion, what stands before it the prompt.

    For prompts only an answer at the very end is left out: one before the last question belongs to
    the prompt.
    """
    cut = len(messages)
    while cut > 0 and messages[cut - 1]["role"] != "assistant":
        cut -= 1
    if option == "demos" and cut == 0:
        raise ValueError("'messages' has no turn of the assistant, to be imitated")
    if option == "prompts" and cut < len(messages):
        return dict(prompt=messages)
    return dict(prompt=messages[: cut - 1], completion=messages[cut - 1 : cut])


def separate_turns(prompt, answers):
    """The prompt of conversations, and what each of the answers adds to it.

    prompt:
        a list of messages; a text, which is a user's turn; or None: the turns all answers share.
    answers:
        name -> list of messages, with the prompt's before them or without.
    """
    conversations = list(answers.values())
    if isinstance(prompt, str):
        if len(conversations) == 2 and conversations[0][0] == conversations[1][0]:
            # The answers tell the whole conversation, and the text repeats a part of it.
            prompt = None
        else:
            prompt = [dict(role="user", content=prompt)]
    if prompt is None:
        prompt = shared_turns(*conversations)
        if not prompt:
            raise ValueError("chosen and rejected share no first turn, which would be the prompt")
    record = dict(prompt=prompt)
    for name, messages in answers.items():
        repeats = messages[: len(prompt)] == prompt
        record[name] = messages[len(prompt) :] if repeats else messages
    return record


def shared_turns(chosen, rejected):
    """The messages that two conversations begin with; a message at least is left of each."""
    count = 0
    most = min(len(chosen), len(rejected)) - 1
    while count < most and chosen[count] == rejected[count]:
        count += 1
    return chosen[:count]


def separate_texts(chosen, rejected):
    """The prompt is what both texts begin with, up to the last end of a word, without its space.

    TRL cuts at the first letter that differs: "blue" and "black" would be answered "ue" and "ack",
    which no tokenizer would write.
    """
    if chosen == rejected:  # left out later
        return dict(prompt=chosen, chosen=chosen, rejected=rejected)
    cut = len(os.path.commonprefix([chosen, rejected]))
    # Something must be left of each, though one begins with all of the other.
    cut = min(cut, len(chosen.rstrip()) - 1, len(rejected.rstrip()) - 1)
    while cut > 0 and (inside_word(chosen, cut) or inside_word(rejected, cut)):
        cut -= 1
    # The space belongs to the answer: " blue" is a token, and a prompt that ends with a space not.
    if cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    if not chosen[:cut].strip():
        raise ValueError(
            "chosen and rejected begin with no word that they share, which would be the prompt"
        )
    return dict(prompt=chosen[:cut], chosen=chosen[cut:], rejected=rejected[cut:])


def inside_word(text, cut):
    """Whether letters or digits stand on both sides of a place in a text."""
    return text[cut - 1].isalnum() and text[cut].isalnum()


EQUAL = "comparisons of two equal responses"
NOT_ONE_TURN = "records whose responses are not one turn of the assistant each, with something said"
REASONS = (EQUAL, NOT_ONE_TURN)


def why_left_out(record):
    """One of REASONS to leave a record out, or None. It may be well made, but teaches nothing."""
    for field in ("completion", "chosen", "rejected"):
        answer = record.get(field)
        if isinstance(answer, list) and not is_answer(answer):
            return NOT_ONE_TURN
    if "chosen" in record and said_in(record["chosen"]) == said_in(record["rejected"]):
        return EQUAL
    return None


def said_in(answer):
    """What is compared of two answers: a text, or a turn's without the blanks around it."""
    return answer if isinstance(answer, str) else answer[0]["content"].strip()


def is_answer(messages):
    """Whether messages are one turn of the assistant, with something said."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        return False
    return bool(messages[0]["content"].strip())


def check_prompt(prompt):
    """Raises ValueError if a prompt says nothing, or ends with a turn of the assistant."""
    if isinstance(prompt, str):
        return  # check_text read it, or separate_texts made it
    if not any(message["content"].strip() for message in prompt):
        raise ValueError("its prompt has no turn with something said")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "its prompt ends with a turn of the assistant, which leaves none to answer"
        )


# From messages to texts


def as_texts(found, tokenizer):
    """The records as texts for a tokenizer: dicts of an option's FIELDS.

    found:
        as read returns it.
    tokenizer:
        of the policy; None or one without a chat template gives plain turns.

    A prompt that a template wrote is marked, template=True: special tokens in it were put there by
    the template, and are kept (data.encode_prompt). Raises ValueError for a record that the
    template refuses, or whose prompt is nothing but end-of-text, which is left out of a text.
    """
    template = getattr(tokenizer, "chat_template", None)
    end = getattr(tokenizer, "eos_token", None)
    rows = []
    for row, place in zip(found.rows, found.places, strict=True):
        try:
            if end:
                check_said(row["prompt"], end)
            if not found.layout.is_conversation():
                texts = row
            elif template:
                texts = by_template(row, tokenizer)
            else:
                texts = plainly(row)
        except ValueError as error:
            raise ValueError(f"{found.name}: {place}: {error}; mend or remove it") from None
        rows.append(texts)
    return rows


def check_said(prompt, end):
    """Raises ValueError if nothing is left of a prompt without end-of-text. end: its spelling."""
    said = prompt
    if not isinstance(prompt, str):
        said = "".join(turn["content"] for turn in prompt)
    if not said.replace(end, "").strip():
        raise ValueError(f"its prompt is nothing but {end}, the tokenizer's end-of-text")


def describe(found, tokenizer):
    """What was read in a line: how many records, their layout, who writes them as texts."""
    layout = found.layout
    words = f"{found.name}: {len(found.rows)} records of {', '.join(layout.fields)}"
    if layout.fields == ("chosen", "rejected"):
        words += " (the prompt: what both begin with)"
    if not layout.is_conversation():
        return f"{words}; texts"
    kind = "Human: and Assistant: in one text" if "turns" in layout.kinds else "conversations"
    if getattr(tokenizer, "chat_template", None):
        return f"{words}; {kind}, written by the tokenizer's chat template"
    return f"{words}; {kind}, written as Human: and Assistant: (the tokenizer has no chat template)"


def plainly(row):
    """A record's conversations as texts, without a template.

    "Human: What colour?\n\nAssistant:" is answered " Blue."
    """
    lines = [f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in row["prompt"]]
    texts = dict(prompt="\n\n".join([*lines, "Assistant:"]))
    for name, answer in row.items():
        if name != "prompt":
            texts[name] = " " + answer[0]["content"].strip()
    return texts


def by_template(row, tokenizer):
    """A record's conversations as texts, by the tokenizer's chat template; marked template=True.

    An answer is what the template writes behind the prompt, up to the end of what was said. The
    token that ends the turn is not part of it: an answer gets its end-of-text later, as any does,
    and that is often the same token.
    """
    turns = [without_end(turn, tokenizer) for turn in row["prompt"]]
    prompt = apply(tokenizer, turns, True)
    texts = dict(prompt=prompt, template=True)
    for name, answer in row.items():
        if name == "prompt":
            continue
        answer = without_end(answer[0], tokenizer)
        said = answer["content"].strip()
        whole = apply(tokenizer, [*turns, answer], False)
        # Some templates put a space, or an empty thought, between the prompt and what is said.
        begin = whole.find(said, len(prompt)) if whole.startswith(prompt) else -1
        texts[name] = whole[len(prompt) : begin + len(said)] if begin >= 0 else said
    return texts


def without_end(turn, tokenizer):
    """A message without an end-of-text that is spelled out in it: only the template may end one."""
    return dict(role=turn["role"], content=turn["content"].replace(tokenizer.eos_token, ""))


def apply(tokenizer, turns, opens_answer):
    """The text that a chat template makes of messages. Raises ValueError if it refuses them.

    opens_answer:
        whether the beginning of the assistant's next turn is written, too.
    """
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = FIXED_DAY + template
        return tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=opens_answer, tokenize=False
        )
    # A template is a program, and may fail in any way on turns that it does not know.
    except Exception as error:
        raise ValueError(
            f"the tokenizer's chat template refuses it: {policies.first_line(error)}"
        ) from None


# Files, folders and hub names


def rows_of(source):
    """The records of a source one by one: (place, row), place such as "line 2", row anything.

    source:
        as read takes it.

    Only COLUMNS are kept of tables. Raises ValueError with the line, if it is one's fault.
    """
    path, split = source, ""
    if not os.path.lexists(source):
        path, _, split = source.partition(":")
    extension = extension_of(path)
    if os.path.isdir(path):
        table = of_folder(path, split)
    elif not os.path.lexists(path) and not extension and HUB_NAME.fullmatch(path):
        table = of_hub(path, split or "train")
    else:
        yield from of_file(path, split, extension)
        return
    kept = [name for name in COLUMNS if name in table.column_names]
    yield from by_number(table.select_columns(kept) if kept else [{}])


def by_number(rows):
    """Rows with their places: record 1, record 2, ..."""
    for number, row in enumerate(rows, start=1):
        yield f"record {number}", row


def extension_of(path):
    """The one of EXTENSIONS that a path ends with, in small letters, or None."""
    for extension in EXTENSIONS:
        if path.lower().endswith(extension):
            return extension
    return None


def of_file(path, split, extension):
    """The records of a local file: (place, row). Raises ValueError if it is none that is read."""
    wanted = ", ".join(EXTENSIONS[:5])
    if split or not os.path.isfile(path):
        # A pipe or a device would keep us waiting, or never end.
        problem = "not a file" if os.path.lexists(path) and not split else "no such file"
        raise ValueError(
            f"{problem}; give a {wanted} file, a folder saved by datasets, or a hub name OWNER/NAME"
        )
    if not extension:
        ending = os.path.splitext(path)[1]
        raise ValueError(f"unknown kind of file '{ending}'; convert it to one of {wanted}")
    try:
        if extension == ".parquet":
            yield from by_number(of_parquet(path))
        elif extension.startswith(".json"):
            yield from of_json(path, extension)
        else:
            yield from of_cells(path, "\t" if ".tsv" in extension else ",")
    # A folder on the way that may not be entered, a compressed file that is damaged or cut.
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot be read: {policies.first_line(error)}") from None


def opened(path):
    """A file's bytes, decompressed where its name ends with .gz."""
    return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")


def lines_of(path):
    """The lines of a text file, compressed or not: (number, text), the line's end included."""
    with opened(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {number}: longer than {LONGEST_LINE} bytes; is it text?")
            # A byte-order mark may stand at the beginning, as Excel writes it.
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: {error}; mend or remove that line") from None


def of_json(path, extension):
    """The records of a .jsonl file, or of a .json one: an array, or also an object a line."""
    if extension in (".json", ".json.gz"):
        with opened(path) as file:
            # A file that is only a very long line must not be read as one.
            begin = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if begin.startswith(b"["):
            yield from by_number(of_array(path))
            return
    for number, line in lines_of(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}; mend or remove that line") from None
            yield f"line {number}", row


def of_array(path):
    """The records of a .json file that is one array."""
    with opened(path) as file:
        content = file.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ValueError(f"longer than {LONGEST_JSON} bytes; convert it to .jsonl")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}; mend it") from None


def of_cells(path, separator):
    """The records of a .csv or .tsv file, whose first line names the fields: (place, row)."""
    csv.field_size_limit(LONGEST_LINE)  # a post may be longer than csv's limit of 131,072
    # Strict: a quotation mark that is never closed would swallow the rows behind it.
    table = csv.reader((text for _, text in lines_of(path)), delimiter=separator, strict=True)
    try:
        head = next(table, [])
        if len(set(head)) < len(head):
            raise ValueError("line 1: two fields have one name; rename one")
        for cells in table:
            # Rows that all have more cells than the head would be read from the wrong columns.
            if cells and len(cells) != len(head):
                raise ValueError(
                    f"line {table.line_num}: {len(cells)} fields "
                    f"where the head has {len(head)}; mend or remove that line"
                )
            if cells:
                row = dict(zip(head, cells, strict=True))
                yield f"line {table.line_num}", row
    except csv.Error as error:
        raise ValueError(f"line {table.line_num}: {error}; mend or remove that line") from None


def of_parquet(path):
    """The records of a .parquet file, as a list of dicts."""
    import pyarrow.parquet  # here, not above: no other file needs it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            kept = [name for name in COLUMNS if name in file.schema_arrow.names]
            return file.read(columns=kept).to_pylist() if kept else [{}]
    # Whatever pyarrow raises on a file that is damaged.
    except Exception as error:
        raise ValueError(f"cannot be read: {policies.first_line(error)}") from None


def of_folder(path, split):
    """The table of a folder that datasets saved; of several splits the named one, or train."""
    datasets = quiet_datasets()
    try:
        found = datasets.load_from_disk(path)
    # datasets raises its own and pyarrow's errors.
    except Exception as error:
        raise ValueError(
            f"cannot be read: {policies.first_line(error)}; "
            "give a folder that datasets saved (save_to_disk), or a file in it"
        ) from None
    if isinstance(found, datasets.Dataset):
        if split:
            raise ValueError(f"has no splits, and none is called '{split}'; leave it out")
        return found
    if not split and len(found) == 1:
        return next(iter(found.values()))
    if (split or "train") not in found:
        raise ValueError(f"has the splits {', '.join(found)}; name one as FOLDER:SPLIT")
    return found[split or "train"]


def of_hub(name, split):
    """The table of a data set on the hub."""
    datasets = quiet_datasets()
    if not policies.is_reached(name):
        # Only the cache is asked, which has what was loaded before; asking the hub takes half a
        # minute to fail.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, split=split)
    # datasets raises its own, pyarrow's and the hub client's errors.
    except Exception as error:
        raise ValueError(
            f"cannot be read: {policies.first_line(error)}; without network give a local file"
        ) from None


def quiet_datasets():
    """The module datasets, which says nothing: our one line says the same."""
    import datasets  # here, not above: the built-in task needs none

    policies.quiet()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets
