"""The built-in task: short posts, summaries of varying quality, a panel of exactly known votes.

A post holds six facts (each a thing, in a short sentence), filler and a question. A summary
mentions some of the things, tersely or in whole sentences, and some of its mentions are faults: of
something not in the post, or a repetition.
Three annotators compare two summaries of a post. All are busy: the shorter wins if it is so by ten
words or more. Else
  completist    more facts covered wins
  fact checker  more facts covered, less the number of faults, wins
  minimalist    more facts covered wins, and of two that cover as many the shorter
each choosing so with probability 0.95. p(y > y' | x), the mean of the three, is intransitive. Of a
post about a car, a door, a dog, a key, a hat and a boat:
  A = "car"                                         1 fact,             1 word
  B = "car , door"                                  2 facts,            3 words
  C = "my car broke , door , dog , key , hat"       5 facts,           11 words
B beats A and C beats B for their facts, and A beats C for its ten words less, each with probability
0.95.
Nothing here is learned, and training sees single votes only.
Left out: grammar, and anything a real reader would want.
Run: python summaries.py    (a post, its summaries and the cycle above)
"""

import random

import torch

from policy import word_tokenizer

NOUNS = (
    "car door dog key hat boat lamp phone bike table horse shirt "
    "clock piano letter ring cake coat drum tent sofa rope kite vase"
).split()
SENTENCES = [  # the thing replaces *
    "my * broke",
    "lost our *",
    "sold the *",
    "found a *",
    "her * smells",
    "need one *",
    "saw his *",
    "dropped their *",
    "painted every *",
    "that * hurts",
    "nobody likes *",
    "* again",
]
FILLER = [
    "it rained all day",
    "sorry for this",
    "i am so tired",
    "true story",
    "thanks for reading",
    "anyway",
]
QUESTION = "what now ? tl;dr"
FACTS = 6
# Tokens: room for the longest summary that the generator writes, with its end-of-text.
MAX_RESPONSE = 32
LAPSE = 0.05  # an annotator's probability of voting against its own rule
ANNOTATORS = ("completist", "fact checker", "minimalist")


def tokenizer():
    """The task's tokenizer: one token a word."""
    words = set()
    for phrase in [*NOUNS, *SENTENCES, *FILLER, QUESTION, ". ,"]:
        words.update(phrase.split())
    words.remove("*")
    return word_tokenizer(sorted(words))  # sorted: an id must not depend on a set's order


def post(seed, facts=FACTS):
    """The post of an integer seed, as text.

    facts:
        how many things it tells of, 1 to 12; the task's posts have FACTS.

    Every seed has its own random stream, so splits are ranges of seeds.
    """
    rng = random.Random(f"post {seed}")
    # The order of the draws is part of the task: another order is other posts.
    nouns = rng.sample(NOUNS, facts)
    sentences = rng.sample(SENTENCES, facts)
    told = []
    for noun, sentence in zip(nouns, sentences, strict=True):
        told.append(sentence.replace("*", noun))
    line = rng.sample(FILLER, 1)[0]
    told.insert(rng.randrange(len(told) + 1), line)
    told.append(QUESTION)
    return " . ".join(told)


def mentions(text):
    """The nouns of a text in order, repetitions included.

    Of a post these are its facts, of a summary what it says of them.
    """
    return [word for word in text.split() if word in NOUNS]


def summary(text, seed):
    """A summary of a post by a writer of mixed quality: too short or long, wordy, sometimes wrong.

    text:
        a post, as post() writes it.
    seed:
        an integer, the writer.

    Returns text, at most MAX_RESPONSE - 1 words.
    """
    # Not the seed alone: a stream shared with the post's would leak into it.
    rng = random.Random(f"summary {seed} of {text}")
    sentences = text.split(" . ")[:-1]  # the last is the question
    told = [sentence for sentence in sentences if mentions(sentence)]
    facts = mentions(text)
    kept = sorted(rng.sample(range(len(facts)), rng.randint(1, len(facts))))
    strangers = rng.sample([noun for noun in NOUNS if noun not in facts], len(facts))
    wordiness = rng.choice([0.1, 0.5, 0.9])
    written = []
    for index in kept:
        sentence = told[index]
        noun = facts[index]
        if rng.random() < 0.12:  # wrong: of something that the post does not mention
            sentence = sentence.replace(noun, strangers[index])
            noun = strangers[index]
        if rng.random() < wordiness:
            written.append(sentence)
        else:
            written.append(noun)
    if rng.random() < 0.33:
        written.insert(0, rng.choice(FILLER))
    return " , ".join(written)


def qualities(text, response):
    """What the annotators look at: facts covered, faults, words, whether a summary is real at all.

    text, response:
        a post and a summary of it.

    Returns a dict. Not real: nothing mentioned, or at least half of the mentions repetitions.
    """
    said = mentions(response)
    distinct = set(said)
    covered = len(distinct & set(mentions(text)))
    return dict(
        covered=covered,
        faults=len(said) - covered,
        words=len(response.split()),
        real=2 * len(distinct) > len(said),
    )


def votes(text, response, other):
    """Each annotator's probability of preferring response to other, in the order of ANNOTATORS.

    text, response, other:
        a post and two summaries of it.

    Returns three numbers in [LAPSE, 1 - LAPSE], antisymmetric: with the summaries swapped, one
    minus them. A summary that is not real loses each vote to one that is, with probability 0.95.
    """
    first = qualities(text, response)
    second = qualities(text, other)
    # All differences are in favour of response: above 0 it is the better one.
    more = first["covered"] - second["covered"]
    right = second["faults"] - first["faults"]
    shorter = second["words"] - first["words"]
    if not (first["real"] and second["real"]):
        verdicts = [first["real"] - second["real"]] * 3
    elif abs(shorter) >= 10:
        verdicts = [shorter] * 3
    elif more == 0:  # as many facts: the minimalist looks at the words
        verdicts = [more, more + right, shorter]
    else:
        verdicts = [more, more + right, more]
    probabilities = []
    for verdict in verdicts:
        sign = (verdict > 0) - (verdict < 0)  # 0: a draw, decided by chance
        probabilities.append(0.5 + (0.5 - LAPSE) * sign)
    return probabilities


class Panel:
    """The annotators as a preference: panel(prompt, y, y_other) -> p(y > y_other | x), exact."""

    ANNOTATORS = ANNOTATORS

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def votes(self, prompt, y, y_other):
        """Every annotator's probability of preferring y.

        prompt, y, y_other:
            policy.Tokens of B rows each.

        Returns [B, 3] in [0, 1].
        """
        texts = zip(self.read(prompt), self.read(y), self.read(y_other), strict=True)
        return torch.tensor([votes(*row) for row in texts], device=prompt.ids.device)

    def read(self, tokens):
        """The words of each row of policy.Tokens, a string each. End-of-text is not one of them."""
        texts = []
        for ids in tokens.lists():
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return texts

    def __call__(self, prompt, y, y_other):
        """p(y > y_other | x), [B]: the mean of the annotators. Arguments: as in votes."""
        return self.votes(prompt, y, y_other).mean(1)


def worked_example():
    """Prints a post, three summaries and the cycle of the file's head."""
    text = post(0)
    print("post:", text)
    for seed in range(3):
        written = summary(text, seed)
        print("summary:", written, "  ", qualities(text, written))
    text = (
        "my car broke . lost our door . sold the dog . found a key . her hat smells . "
        "need one boat . " + QUESTION
    )
    cycle = {"A": "car", "B": "car , door", "C": "my car broke , door , dog , key , hat"}
    for better, worse in ("BA", "AC", "CB"):
        each = votes(text, cycle[better], cycle[worse])
        print(f"p({better} > {worse}) = {sum(each) / 3:.2f}", end="")
        for name, vote in zip(ANNOTATORS, each, strict=True):
            print(f"   {name} {vote:.2f}", end="")
        print()


if __name__ == "__main__":
    worked_example()
