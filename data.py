"""Where prompts, demonstrations and comparisons come from: the built-in task, or records.

Records are files or data sets on the hub. Both sources answer the same three questions:
  demos(step, count)                     (prompt, response): what the supervised policy imitates
  prompts(split, step, count)            prompt, for the splits align, validation and test
  comparisons(role, step, count, model)  Comparisons: pairs of responses and the odds of their votes
Every draw comes from a generator made from (seed, stage, step): there is no random state to save,
and every method sees the same prompts at the same step. Splits are by prompt: none is in two of
supervised, preference, judge and test.
Left out: streaming. What files look like, and how a conversation becomes a text, is in records.py.
Run: python train.py --comparisons FILE

Shapes: B rows, one a response; N pairs of them; P prompt columns, T response columns.
"""

import hashlib
import itertools
import json
import math
from typing import NamedTuple

import torch

import policy as policies
import records
import sampler
import summaries
from policy import Tokens

VALIDATION = 0.2  # of a role's prompts, to stop the training of its model by


def generator(seed, stage, step):
    """A CPU generator that depends on nothing but its arguments.

    seed:
        an integer, the run's or the data's.
    stage:
        a name for what is drawn: two stages share no numbers.
    step:
        an integer from 0.
    """
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniforms(rng, tokens, responses, count):
    """The randomness of several responses to each of count prompts, as sampler.sample takes it.

    rng:
        a CPU generator, such as generator returns.
    tokens:
        the most of a response.
    responses:
        to each prompt.
    count:
        of prompts, whoever answers them.

    Returns [tokens, responses, count] in [0, 1), float64, for rows to pick from.
    """
    drawn = torch.rand(tokens, responses * count, generator=rng, dtype=torch.float64)
    return drawn.view(tokens, responses, count)


def everything(count):
    """All of count rows, as a slice: the share of a process that is alone."""
    return slice(0, count)


def inside(part, count):
    """Which of count rows a slice picks, [count] of bool."""
    picked = torch.zeros(count, dtype=torch.bool)
    picked[part] = True
    return picked


class Comparisons(NamedTuple):
    """Responses and which of them were compared: all that a step asked for, or one process's share.

    prompt:
        Tokens [B, P], the prompt of each response, so equal prompts repeat.
    response:
        Tokens [B, T].
    first, second:
        [N] row numbers of the two responses of each pair. Both answer one prompt.
    preference:
        [N] probability of a vote for the first, in [0, 1]; 1 for a recorded winner.
    generator:
        on the CPU, for drawing the votes.
    all_pairs:
        [M] of bool on the CPU, which of the M pairs of all shares these N are; None if M = N.
    """

    prompt: Tokens
    response: Tokens
    first: torch.Tensor
    second: torch.Tensor
    preference: torch.Tensor
    generator: torch.Generator
    all_pairs: torch.Tensor | None = None

    def to(self, device):
        """The same on a device. The generator stays: every device draws the same votes."""
        return Comparisons(
            prompt=self.prompt.to(device),
            response=self.response.to(device),
            first=self.first.to(device),
            second=self.second.to(device),
            preference=self.preference.to(device),
            generator=self.generator,
            all_pairs=self.all_pairs,
        )

    def votes(self):
        """A vote on each pair, [N]: 1 for the first, else 0. The generator moves on."""
        # On the CPU and for the pairs of all shares: every device and every process draws the same.
        kind = self.preference.dtype
        uniform = torch.rand(self.pairs(), generator=self.generator, dtype=kind)
        if self.all_pairs is not None:
            uniform = uniform[self.all_pairs]
        return (uniform.to(self.preference.device) < self.preference).to(kind)

    def pairs(self):
        """The number of pairs of all shares."""
        return len(self.first) if self.all_pairs is None else len(self.all_pairs)


class BuiltIn:
    """The summarisation task of summaries.py. Its judge is the panel itself, exact.

    data_seed:
        an integer; other posts for every split but validation and test.
    """

    SPLITS = {  # the first seed of each split's posts
        "supervised": 0,
        "preference": 10**9,
        "align": 2 * 10**9,
        "validation": 3 * 10**9,
        "test": 4 * 10**9,
    }
    max_prompt = 64
    max_response = summaries.MAX_RESPONSE

    def __init__(self, data_seed=0):
        self.tokenizer = summaries.tokenizer()
        self.data_seed = data_seed
        self.judge = summaries.Panel(self.tokenizer)

    def posts(self, split, step, count):
        """The posts of a step, new ones at every step: a list of (seed, text).

        split:
            a key of SPLITS. Validation and test are the same for every data seed.
        step, count:
            which posts: the count that follow the first step * count.
        """
        first = self.SPLITS[split] + step * count
        if split not in ("validation", "test"):
            first += self.data_seed * 10**10
        return [(seed, summaries.post(seed)) for seed in range(first, first + count)]

    def prompts(self, split, step, count):
        """The posts of a step as Tokens [count, P]. Arguments as posts."""
        return self.pad([text for _, text in self.posts(split, step, count)], "left")

    def most(self, split):
        """How many prompts a split has: no end of them."""
        return math.inf

    def demos(self, step, count):
        """Posts of a step and a written summary of each: (Tokens [count, P], Tokens [count, T])."""
        texts = []
        written = []
        for seed, text in self.posts("supervised", step, count):
            texts.append(text)
            written.append(f"{summaries.summary(text, seed)} {self.tokenizer.eos_token}")
        return self.pad(texts, "left"), self.pad(written, "right")

    def pad(self, texts, side):
        """Texts as Tokens. side: where the padding goes, "left" or "right"."""
        rows = [self.tokenizer.encode(text) for text in texts]
        return policies.pad(rows, side, self.tokenizer.eos_token_id)

    def comparisons(self, role, step, count, model, responses=6, share=everything, seed=0):
        """Several responses to each of some fresh posts, and every pair of a post's to vote on.

        role:
            "preference" to train on; anything else is held out, of posts that no vote was seen on.
        step:
            an integer from 0; every step has its own posts and responses.
        count:
            responses in all, B: count // responses posts, but at least one.
        model:
            the supervised policy, which writes the responses.
        responses:
            to each post, two or more.
        share:
            share(posts) is a slice of them: only their responses and pairs are wanted.
        seed:
            an integer; other responses to the same posts, and other votes.

        Returns Comparisons on the model's device, with the panel's own probabilities.
        """
        rng = generator(self.data_seed, of_seed(f"votes for {role}", seed), step)
        count = max(1, count // responses)
        split = "preference" if role == "preference" else "validation"
        mine = share(count)
        posts = self.prompts(split, step, count).rows(mine).to(model.device)
        # beta = 0 for every response: the policy alone, no mixture.
        beta = (0.0,) * responses
        drawn = uniforms(rng, self.max_response, responses, count)[:, :, mine].flatten(1)
        ids, mask, _ = sampler.sample(model, None, posts, beta, None, self.max_response, drawn)
        prompt = posts.repeat(responses)
        response = Tokens(ids, mask)
        first, second = every_pair(len(posts.ids), responses, model.device)
        preference = self.judge(prompt.rows(first), response.rows(first), response.rows(second))
        # The pairs come a post after the other within two responses, as every_pair orders them.
        all_pairs = inside(mine, count).repeat(responses * (responses - 1) // 2)
        # The votes come from the generator that drew the responses, after them.
        return Comparisons(prompt, response, first, second, preference, rng, all_pairs)


def of_seed(stage, seed):
    """A stage's name for generator, of a run's seed; of seed 0 the name itself, which the stages
    that all runs share have."""
    return f"{stage}, seed {seed}" if seed else stage


def every_pair(count, responses, device):
    """Row numbers (first, second) of every pair of responses to one of count prompts.

    Response a of prompt k is row a * count + k, as sampler.sample orders them.
    """
    first = []
    second = []
    for a, b in itertools.combinations(range(responses), 2):
        for row in range(count):
            first.append(a * count + row)
            second.append(b * count + row)
    return torch.tensor(first, device=device), torch.tensor(second, device=device)


class Records:
    """Demonstrations, comparisons and prompts as lists of records, split by the prompt's text.

    demos:
        dicts of prompt and completion, or none: then chosen responses take their place. In all
        three, a prompt that a chat template wrote is marked, template=True.
    comparisons:
        dicts of prompt, chosen and rejected, or none: then no preference model can be trained.
    prompts:
        dicts of prompt, to align and evaluate on, or none: then those of the demos, or comparisons.
    tokenizer:
        as policy.load returns it.
    max_prompt, max_response:
        tokens; longer prompts are cut from the left, longer responses from the right.
    data_seed:
        an integer, of the shuffled order. The splits do not depend on it.

    A tenth of the prompts are test prompts, and another tenth held out of the preference data. The
    comparisons' other prompts go by halves to the preference model and the judge; without demos by
    thirds, and the chosen responses of the last third are the demos. The demos' other prompts go to
    the supervised policy. The judge is a second preference model, trained later: here it is None.
    Prompts alone are enough for a policy that is to imitate nothing.
    A model of preferences learns from four fifths of its prompts, and the others say when to stop:
    parts has both, and the comparisons that it has no part in (parts_of).
    Raises ValueError if no prompt is left for a split.
    """

    judge = None

    def __init__(
        self, demos, comparisons, prompts, tokenizer, max_prompt, max_response, data_seed=0
    ):
        self.tokenizer = tokenizer
        self.max_prompt = max_prompt
        self.max_response = max_response
        self.data_seed = data_seed
        self.cut = set()  # texts of the prompts that were too long
        self.orders = {}  # stage -> (epoch, its shuffled row numbers)
        self.by_template = written_by_template([*demos, *comparisons, *prompts])
        self.wants_demos = bool(demos or comparisons)
        shares = ["preference", "judge"]
        if not demos:
            shares.append("supervised")
        split = {}  # of each compared prompt
        for record in comparisons:
            split[record["prompt"]] = split_of(record["prompt"], shares)
        # role -> its comparisons; those about test prompts are in none
        self.compared = {}
        if comparisons:
            for role in [*shares, "held out"]:
                self.compared[role] = [r for r in comparisons if split[r["prompt"]] == role]
        self.parts = parts_of(comparisons, split)
        self.demonstrations = self.choose_demonstrations(demos, split)
        self.prompts_of = choose_prompts(prompts or demos or comparisons, split)
        self.check_splits()

    def choose_demonstrations(self, demos, split):
        """Demos about prompts that no comparison has; without demos, a share's chosen responses.

        None where there are neither demos nor comparisons.
        """
        chosen = []
        if demos:
            for record in demos:
                prompt = record["prompt"]
                if prompt not in split and split_of(prompt, ["demo"]) == "demo":
                    chosen.append(record)
        else:
            for record in self.compared.get("supervised", []):
                chosen.append(dict(prompt=record["prompt"], completion=record["chosen"]))
        return chosen

    def check_splits(self):
        """Raises ValueError if a split is empty."""
        splits = {**self.compared, **self.prompts_of}
        if self.wants_demos:
            splits["supervised"] = self.demonstrations
        for name, rows in splits.items():
            if not rows:
                raise ValueError(
                    f"no prompt is left for the split '{name}': "
                    "give more records, at least about 100 prompts of each kind"
                )

    def batch_of(self, rows, stage, step, count):
        """Some of the rows, by epochs that are each shuffled anew.

        rows:
            a list to take them from.
        stage:
            a name for who asks: each has an order of its own.
        step, count:
            which rows: the count that follow the first step * count, whoever asked before.

        Returns a list of count rows.
        """
        picked = []
        for index in range(step * count, (step + 1) * count):
            epoch, position = divmod(index, len(rows))
            picked.append(rows[self.order_of(stage, epoch, len(rows))[position]])
        return picked

    def order_of(self, stage, epoch, count):
        """The shuffled row numbers of a stage's epoch; the last one made is remembered."""
        if self.orders.get(stage, (None, None))[0] != epoch:
            rng = generator(self.data_seed, f"order of {stage}", epoch)
            self.orders[stage] = epoch, torch.randperm(count, generator=rng).tolist()
        return self.orders[stage][1]

    def pad_prompts(self, texts):
        """Prompts as Tokens, cut from the left to max_prompt tokens. Those cut are added to cut."""
        rows = []
        for text in texts:
            keep_ends = text in self.by_template
            row, was_cut = encode_prompt(self.tokenizer, text, self.max_prompt, keep_ends)
            if was_cut:
                self.cut.add(text)
            rows.append(row)
        return policies.pad(rows, "left", self.tokenizer.eos_token_id)

    def pad_responses(self, texts):
        """Responses as Tokens with end-of-text; one that is too long is cut and gets none."""
        end = self.tokenizer.eos_token_id
        rows = []
        for text in texts:
            row = [*encode(self.tokenizer, text), end]
            rows.append(row[: self.max_response])
        return policies.pad(rows, "right", end)

    def prompts(self, split, step, count):
        """The prompts of a step as Tokens [count, P]. split: a key of prompts_of."""
        return self.pad_prompts(self.batch_of(self.prompts_of[split], split, step, count))

    def most(self, split):
        """How many prompts a split has."""
        return len(self.prompts_of[split])

    def demos(self, step, count):
        """The demonstrations of a step: (Tokens [count, P], Tokens [count, T])."""
        rows = self.batch_of(self.demonstrations, "demos", step, count)
        prompt = self.pad_prompts([row["prompt"] for row in rows])
        return prompt, self.pad_responses([row["completion"] for row in rows])

    def comparisons(self, role, step, count, model, responses=2, share=everything, seed=0):
        """Recorded comparisons, the chosen response first.

        role:
            "preference", "judge" or "held out", or a key of parts.
        step:
            an integer from 0.
        count:
            responses in all, B: count // 2 records.
        model:
            its device is where the tensors go. Nothing is sampled.
        responses:
            to each prompt: records hold two, whatever is asked for.
        share:
            share(records) is a slice of them: only they are wanted.
        seed:
            an integer; the records in another order.

        Returns Comparisons with preference 1.
        """
        rows = self.parts[role] if role in self.parts else self.compared[role]
        rows = self.batch_of(rows, of_seed(role, seed), step, count // 2)
        mine = share(len(rows))
        all_pairs = inside(mine, len(rows))
        rows = rows[mine]
        chosen = [row["chosen"] for row in rows]
        rejected = [row["rejected"] for row in rows]
        first = torch.arange(len(rows))
        found = Comparisons(
            prompt=self.pad_prompts([row["prompt"] for row in rows]).repeat(2),
            response=self.pad_responses(chosen + rejected),
            first=first,
            second=first + len(rows),
            preference=torch.ones(len(rows)),
            generator=torch.Generator(),  # any: a vote of probability 1 is certain
            all_pairs=all_pairs,
        )
        return found.to(model.device)


def recorded_pairs(task, step, count, reference, share, device, seed=0):
    """A step's pairs from the recorded comparisons, for --offline: (prompt, y, y_other, label [B]).

    task, reference:
        where the comparisons come from, and the model that task.comparisons takes.
    count:
        pairs of all processes; share, as task.comparisons takes it, says which are this one's.
    seed:
        the run's, as task.comparisons takes it.

    The label is a vote drawn from the recorded preference: 1 where y won, else 0.
    """
    given = "preference", step, 2 * count, reference, 2, share, seed
    compared = task.comparisons(*given).to(device)
    prompt = compared.prompt.rows(compared.first)
    y, y_other = compared.response.rows(compared.first), compared.response.rows(compared.second)
    return prompt, y, y_other, compared.votes()


def parts_of(comparisons, split):
    """The comparisons as the models of preferences use them.

    comparisons:
        dicts of prompt, chosen and rejected.
    split:
        of each compared prompt.

    Returns {"ROLE training": records, "ROLE validation": ..., "ROLE unseen": ...} for the roles
    preference and judge. Unseen is what neither trains the role's model nor stops it: held out,
    test, and the other role's. What the policy imitated is in none.
    """
    parts = {}
    for role in ("preference", "judge"):
        for name in ("training", "validation", "unseen"):
            parts[f"{role} {name}"] = []
        for record in comparisons:
            place = split[record["prompt"]]
            name = "unseen"
            if place == role:
                # Other digits of the hash than split_of takes: those say the role already.
                name = "validation" if digits(record["prompt"], 6) < VALIDATION else "training"
            if place != "supervised":
                parts[f"{role} {name}"].append(record)
    return parts


def digits(prompt, begin):
    """48 bits of a hash of a prompt's text, from byte begin on: in [0, 1), exact in a float."""
    found = hashlib.sha256(prompt.encode()).digest()[begin : begin + 6]
    return int.from_bytes(found, "big") / 2**48


def split_of(prompt, shares):
    """Which split a prompt belongs to, by a hash of its text alone.

    prompt:
        its text. More records, or the same in another order, leave it where it was.
    shares:
        names that share what is left equally.

    Returns "test" for a tenth of the prompts, "held out" for another, or one of shares.
    """
    place = digits(prompt, 0)
    if place < 0.1:
        return "test"
    if place < 0.2:
        return "held out"
    return shares[int((place - 0.2) / 0.8 * len(shares))]


def choose_prompts(rows, split):
    """Split -> prompts, to align and evaluate on: align, validation, test. split: of compared ones.

    None to align on is one that the judge was trained on, or that is held out.
    """
    texts = {record["prompt"] for record in rows}
    # Sorted: a set's order differs from process to process.
    test = sorted(prompt for prompt in texts if split_of(prompt, ["other"]) == "test")
    taken = {prompt for prompt, name in split.items() if name in ("judge", "held out")}
    rest = sorted(texts - taken - set(test))
    # Validation prompts are seen while tuning, so they are not the test prompts.
    validation = len(rest) // 10 + 1
    return {"align": rest[validation:], "validation": rest[:validation], "test": test}


def encode(tokenizer, text):
    """A text as a list of ids, without end-of-text, and without what the tokenizer puts around it.

    A response is the middle of a text, so no BOS stands before it. An end-of-text that is spelled
    out, or that stands for unknown characters, is left out: end-of-text says that a response is
    finished, and text from a file must not.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [token for token in ids if token != tokenizer.eos_token_id]


def encode_prompt(tokenizer, text, most, keep_ends=False):
    """A prompt as ids, at most so many of them, and whether it had to be cut: (list, bool).

    keep_ends:
        whether an end-of-text in it stays: in a prompt that a chat template wrote it ends a turn,
        and the model has learned to read it there. From any other text it is left out.

    A tokenizer that puts a BOS before every text puts it here, once, though the text spells one
    out and though the text is cut: such models have never read anything without.
    """
    opening = policies.opening(tokenizer)
    if keep_ends:
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = encode(tokenizer, text)
    if opening and ids[:1] == opening:
        ids = ids[1:]
    if not ids and not opening:
        # Words that the tokenizer does not know may all stand for end-of-text. A model must read
        # something before it writes: what stands before a text of its own.
        ids = [tokenizer.eos_token_id]
    begin = max(0, len(ids) - (most - len(opening)))
    # From the left: the end, which asks for the summary, is kept.
    return opening + ids[begin:], begin > 0


def written_by_template(rows):
    """The prompts' texts that a chat template wrote, as records.as_texts marks them: a set."""
    return {row["prompt"] for row in rows if row.get("template")}


class Prompts:
    """Prompts alone, in their order, whatever the split: what evaluate.py compares policies on.

    rows:
        dicts of prompt; each prompt counts once.
    tokenizer, max_prompt, max_response:
        as for Records.
    """

    judge = None

    def __init__(self, rows, tokenizer, max_prompt, max_response):
        self.texts = list(dict.fromkeys(row["prompt"] for row in rows))
        self.by_template = written_by_template(rows)
        self.tokenizer = tokenizer
        self.max_prompt = max_prompt
        self.max_response = max_response

    def prompts(self, split, step, count):
        """The prompts of a step as Tokens: the count that follow the first step * count."""
        texts = self.texts[step * count : (step + 1) * count]
        rows = []
        for text in texts:
            keep_ends = text in self.by_template
            rows.append(encode_prompt(self.tokenizer, text, self.max_prompt, keep_ends)[0])
        return policies.pad(rows, "left", self.tokenizer.eos_token_id)

    def most(self, split):
        """How many prompts there are."""
        return len(self.texts)


def open_task(options):
    """The task of a run: the built-in one, or records.

    options:
        train.py's, of which demos, comparisons, prompts, policy, tokenizer, max_prompt_tokens,
        max_response_tokens and data_seed are read.

    Returns (task, policy before supervision or None to build one, hash of the data). Raises
    ValueError, naming the option, if the data, the policy or the tokenizer cannot be used.
    """
    from_scratch = options.policy in policies.SIZES
    if not (options.demos or options.comparisons or options.prompts):
        if not from_scratch:
            raise ValueError(
                f"--policy {options.policy}: the built-in task has its own words; "
                "take tiny or gpt2-124m, or give --comparisons"
            )
        return BuiltIn(options.data_seed), None, "built-in"
    found = {}
    for name in records.FIELDS:
        if getattr(options, name):
            found[name] = records.read(name, getattr(options, name))
    start = None
    if not from_scratch:
        start, tokenizer = policies.load(options.policy)
        check_room(options, policies.context(start))
    elif options.tokenizer:
        tokenizer = policies.load_tokenizer(options.tokenizer)
        if max(tokenizer.get_vocab().values()) >= len(tokenizer):
            raise ValueError(
                f"--tokenizer {options.tokenizer}: its ids have holes; give one whose ids go from "
                "0 to their number less 1"
            )
    else:
        tokenizer = train_tokenizer(found)
    rows = {name: [] for name in records.FIELDS}
    for name, read_before in found.items():
        rows[name] = written_as_texts(read_before, tokenizer)
    task = Records(
        **rows,
        tokenizer=tokenizer,
        max_prompt=options.max_prompt_tokens,
        max_response=options.max_response_tokens,
        data_seed=options.data_seed,
    )
    content = json.dumps([rows, tokenizer.get_vocab()], sort_keys=True)
    return task, start, hashlib.sha256(content.encode()).hexdigest()


def check_room(options, room):
    """Raises ValueError if prompt and response do not fit into a policy's positions."""
    if options.max_prompt_tokens + options.max_response_tokens > room:
        raise ValueError(
            "--max-prompt-tokens and --max-response-tokens: "
            f"together more than the policy's {room} positions; lower one"
        )


def train_tokenizer(found):
    """A byte-level BPE of the demos' and comparisons' own texts. found: name -> records.Found."""
    texts = []
    for name in ("demos", "comparisons"):
        if name in found:
            for row in records.as_texts(found[name], None):
                texts.extend(row.values())
    tokenizer = policies.byte_tokenizer(texts)
    print(f"no --tokenizer: trained a byte-level BPE of {len(tokenizer)} entries on the data")
    return tokenizer


def read(option, source, tokenizer=None):
    """The records of --option source as texts, in one call; arguments as records.py's."""
    return written_as_texts(records.read(option, source), tokenizer)


def written_as_texts(found, tokenizer):
    """records.as_texts, which says in a line what was read."""
    rows = records.as_texts(found, tokenizer)
    print(records.describe(found, tokenizer))
    return rows
