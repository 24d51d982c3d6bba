"""Where prompts, demonstrations and comparisons come from: the built-in task, or records in files and on the hub.

Both sources answer the same three questions, so that train.py does not care which one it has:
  demos(step, count)                     (prompt, response): what the supervised policy imitates
  prompts(split, step, count)            prompt, for the splits align, validation and test
  comparisons(role, step, count, model)  (prompt, response, i, j, chance, generator): response i[k] was compared with j[k],
                                         chance[k] is the probability of a vote for it, 1 for a recorded winner
Every draw comes from a generator made from (seed, stage, step): there is no random state to save, and every method sees
the same prompts at the same step. Splits are by prompt: none is in two of supervised, preference, judge and test.
Left out: streaming, chat templates, several turns.
Run: python train.py --comparisons FILE
"""

import csv
import hashlib
import itertools
import json
import os

import torch

import policy as policies
import sampler
import summaries

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
LAYOUTS = {
    "demos": ("prompt", "completion"),
    "comparisons": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}


def generator(seed, stage, step):
    """A CPU generator that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class BuiltIn:
    """The summarisation task of summaries.py. Its judge is the panel itself, exact."""

    SPLITS = {
        name: index * 10**9
        for index, name in enumerate(("supervised", "preference", "align", "validation", "test"))
    }
    max_prompt, max_response = 64, summaries.MAX_RESPONSE

    def __init__(self, data_seed=0):
        self.tokenizer, self.data_seed = summaries.tokenizer(), data_seed
        self.judge = summaries.Panel(self.tokenizer)

    def posts(self, split, step, count):
        """(seed, text) of the posts of a step, new ones at every step. Validation and test are the same for every data seed."""
        first = self.SPLITS[split] + step * count
        if split not in ("validation", "test"):
            first += self.data_seed * 10**10
        return [(seed, summaries.post(seed)) for seed in range(first, first + count)]

    def prompts(self, split, step, count):
        return self.pad([text for _, text in self.posts(split, step, count)], "left")

    def demos(self, step, count):
        posts, end = self.posts("supervised", step, count), self.tokenizer.eos_token
        written = [f"{summaries.summary(text, seed)} {end}" for seed, text in posts]
        return self.pad([text for _, text in posts], "left"), self.pad(written, "right")

    def pad(self, texts, side):
        return policies.pad(
            [self.tokenizer.encode(text) for text in texts], side, self.tokenizer.eos_token_id
        )

    def comparisons(self, role, step, count, model, responses=6):
        """count responses of the supervised policy, so many to each of some fresh posts, and every pair of a post's to vote on."""
        rng = generator(self.data_seed, f"votes for {role}", step)
        count = max(1, count // responses)
        # Held-out pairs are of posts that no vote was seen on.
        posts = self.prompts("preference" if role == "preference" else "validation", step, count)
        prompt = tuple(part.to(model.device) for part in posts)
        response = sampler.sample(model, None, prompt, (0.0,) * responses, rng, self.max_response)
        prompt = tuple(part.repeat(responses, 1) for part in prompt)
        rows = [
            (a * count + row, b * count + row)
            for a, b in itertools.combinations(range(responses), 2)
            for row in range(count)
        ]
        i, j = torch.tensor(rows, device=model.device).T
        chance = self.judge(
            *(
                tuple(part[k] for part in tokens[:2])
                for tokens, k in ((prompt, i), (response, i), (response, j))
            )
        )
        return prompt, response, i, j, chance, rng


class Records:
    """Demonstrations, comparisons and prompts as lists of records. Its judge is a second preference model, trained later. A
    prompt's place is a hash of its text. A tenth are test prompts and another tenth held out of the preference data; the
    comparisons' other prompts go by halves to the preference model and the judge (by thirds without demos: the chosen responses
    of the third share are the demos), the demos' to the supervised policy."""

    judge = None

    def __init__(
        self, demos, comparisons, prompts, tokenizer, max_prompt, max_response, data_seed=0
    ):
        self.tokenizer, self.max_prompt, self.max_response, self.data_seed = (
            tokenizer,
            max_prompt,
            max_response,
            data_seed,
        )
        self.cut, self.order = set(), {}
        compared = {record["prompt"] for record in comparisons}
        places = ["preference", "judge"] if demos else ["preference", "judge", "supervised"]
        place = {prompt: self.place(prompt, places) for prompt in compared}
        self.compared = {
            name: [r for r in comparisons if place[r["prompt"]] == name]
            for name in [*places, "held out"]
        }
        chosen = [
            dict(prompt=r["prompt"], completion=r["chosen"])
            for r in self.compared.get("supervised", [])
        ]
        self.demonstrations = chosen or [
            r
            for r in demos
            if r["prompt"] not in compared and self.place(r["prompt"], ["demo"]) == "demo"
        ]
        asked = {record["prompt"] for record in prompts or demos or comparisons}
        test = sorted(prompt for prompt in asked if self.place(prompt, ["other"]) == "test")
        taken = {prompt for prompt, name in place.items() if name in ("judge", "held out")}
        align = sorted(asked - taken - set(test))
        # Validation prompts are seen while tuning, so they are not the test prompts.
        self.asked = {
            "align": align[len(align) // 10 + 1 :],
            "validation": align[: len(align) // 10 + 1],
            "test": test,
        }
        for name, rows in {
            **self.compared,
            **self.asked,
            "supervised": self.demonstrations,
        }.items():
            if not rows:
                raise ValueError(
                    f"no prompt is left for the split '{name}': give more records, at least about 100 prompts of each kind"
                )

    def place(self, prompt, places):
        """'test', 'held out' or one of places, by the prompt's text alone."""
        share = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big") / 2**48
        return (
            "test"
            if share < 0.1
            else "held out"
            if share < 0.2
            else places[int((share - 0.2) / 0.8 * len(places))]
        )

    def some(self, rows, stage, step, count):
        """count rows of a step. Epochs are shuffled, and a step of an epoch is the same whoever asks."""
        picked = []
        for index in range(step * count, (step + 1) * count):
            epoch, position = divmod(index, len(rows))
            if self.order.get(stage, (None, None))[0] != epoch:
                shuffled = torch.randperm(
                    len(rows), generator=generator(self.data_seed, f"order of {stage}", epoch)
                ).tolist()
                self.order[stage] = epoch, shuffled
            picked.append(rows[self.order[stage][1][position]])
        return picked

    def tokens(self, text):
        """A text as ids. It holds no end-of-text: one that is spelled out, or that stands for unknown characters, is left out."""
        return [
            token
            for token in self.tokenizer.encode(text, add_special_tokens=False)
            if token != self.tokenizer.eos_token_id
        ]

    def pad_prompts(self, texts):
        """Prompts as tokens, cut from the left to max_prompt tokens: the end, which asks for the summary, is kept."""
        rows = [self.tokens(text) for text in texts]
        self.cut |= {
            text for text, row in zip(texts, rows, strict=True) if len(row) > self.max_prompt
        }
        return policies.pad(
            [row[-self.max_prompt :] for row in rows], "left", self.tokenizer.eos_token_id
        )

    def pad_responses(self, texts):
        """Responses as tokens with end-of-text; one that is too long is cut and gets none."""
        rows = [[*self.tokens(text), self.tokenizer.eos_token_id] for text in texts]
        return policies.pad(
            [row[: self.max_response] for row in rows], "right", self.tokenizer.eos_token_id
        )

    def prompts(self, split, step, count):
        return self.pad_prompts(self.some(self.asked[split], split, step, count))

    def demos(self, step, count):
        rows = self.some(self.demonstrations, "demos", step, count)
        return self.pad_prompts([row["prompt"] for row in rows]), self.pad_responses(
            [row["completion"] for row in rows]
        )

    def comparisons(self, role, step, count, model, responses=2):
        """Recorded comparisons of 'preference', 'judge' or 'held out' prompts: i are the chosen, j the rejected responses."""
        rows = self.some(self.compared[role], role, step, count // 2)
        prompt = tuple(
            part.repeat(2, 1).to(model.device)
            for part in self.pad_prompts([row["prompt"] for row in rows])
        )
        response = self.pad_responses(
            [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
        )
        i = torch.arange(len(rows), device=model.device)
        chance = torch.ones(len(rows), device=model.device)
        return (
            prompt,
            tuple(part.to(model.device) for part in response),
            i,
            i + len(rows),
            chance,
            torch.Generator(),
        )


class Prompts(Records):
    """Prompts alone, in their order, as the test split: what evaluate.py compares policies on."""

    def __init__(self, records, tokenizer, max_prompt, max_response):
        self.texts = list(dict.fromkeys(record["prompt"] for record in records))
        self.tokenizer, self.max_prompt, self.max_response, self.cut = (
            tokenizer,
            max_prompt,
            max_response,
            set(),
        )

    def prompts(self, split, step, count):
        return self.pad_prompts(self.texts[step * count : (step + 1) * count])


def read(option, source):
    """The records of --option source: a local .jsonl, .json, .csv or .parquet file, or a hub name. A list of dicts. Raises
    ValueError naming option, file and line. Comparisons whose two responses are equal carry no label and are dropped."""
    fields, extension = LAYOUTS[option], os.path.splitext(source)[1]
    local = extension in FORMATS or os.path.exists(source)
    if local and not os.path.isfile(source):
        raise ValueError(
            f"--{option} {source}: no such file; give a .jsonl, .json, .csv or .parquet file or a hub name"
        )
    if local and extension not in FORMATS:
        raise ValueError(
            f"--{option} {source}: unknown kind of file '{extension}'; convert it to .jsonl, .json, .csv or .parquet"
        )
    if extension in (".jsonl", ".json", ".csv") and local:
        check_text(option, source, fields)
    import datasets  # here, not above: the built-in task needs none

    datasets.disable_progress_bars()
    try:
        if local:
            table = datasets.load_dataset(FORMATS[extension], data_files=source, split="train")
        else:
            table = datasets.load_dataset(source, split="train")
    except (
        Exception
    ) as error:  # datasets raises its own, pyarrow's, pandas' and the hub client's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "" if local else "; without network give a local file"
        raise ValueError(f"--{option} {source}: cannot be read: {reason}{hint}") from None
    missing = [field for field in fields if field not in table.column_names]
    if missing:
        raise ValueError(
            f"--{option} {source}: has no field '{missing[0]}' (it has {table.column_names}); rename its fields to {', '.join(fields)}"
        )
    records = list(table.select_columns(list(fields)))
    for number, row in enumerate(records, start=1):
        try:
            check_record(row, fields)
        except ValueError as error:
            raise ValueError(
                f"--{option} {source}: record {number}: {error}; mend or remove it"
            ) from None
    kept = [row for row in records if option != "comparisons" or row["chosen"] != row["rejected"]]
    if not kept:
        raise ValueError(
            f"--{option} {source}: holds no record{' with two different responses' if records else ''}"
        )
    if len(kept) < len(records):
        print(
            f"warning: --{option} {source}: {len(records) - len(kept)} comparisons of two equal responses are left out"
        )
    return kept


def check_text(option, source, fields):
    """Raises ValueError with the line where a text file is not UTF-8 or a .jsonl line not a record: datasets names none."""
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if source.endswith(".jsonl") and text:
                    check_record(json.loads(text), fields)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"--{option} {source}, line {number}: {error}; mend or remove that line"
                ) from None
    if source.endswith(
        ".csv"
    ):  # rows that all have more fields than the head would be read from the wrong columns
        with open(source, newline="", encoding="utf-8-sig") as file:
            csv.field_size_limit(2**31 - 1)
            table = csv.reader(file)
            width = len(next(table, []))
            for row in table:
                if row and len(row) != width:
                    raise ValueError(
                        f"--{option} {source}, line {table.line_num}: {len(row)} fields where the head has {width}; mend or remove that line"
                    )


def check_record(row, fields):
    """Raises ValueError if a record lacks one of the fields, or its text."""
    if not isinstance(row, dict):
        raise ValueError("it is not an object {...}")
    for field in fields:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(
                f"'{field}' is {repr(row[field])[:40] if field in row else 'missing'}; it must be text that is not empty"
            )
        row[field].encode()  # half a surrogate pair is not text
