"""The built-in task: short posts, summaries of varying quality, and a panel of annotators whose votes are known exactly.

A post holds six facts (each a thing, in a short sentence), filler and a question. A summary mentions some of the things,
tersely or in whole sentences, and some of its mentions are faults: of something not in the post, or a repetition.
Three annotators compare two summaries of a post. All are busy: the shorter wins if it is so by ten words or more. Else
  completist    more facts covered wins
  fact checker  more facts covered, less the number of faults, wins
  minimalist    more facts covered wins, and of two that cover as many the shorter
each choosing so with probability 0.95. p(y > y' | x), the mean of the three, is intransitive. Of a post about a car, a
door, a dog, a key, a hat and a boat:
  A = "car"                                         1 fact,             1 word
  B = "car , door"                                  2 facts,            3 words
  C = "my car broke , door , dog , key , hat"       5 facts,           11 words
B beats A and C beats B for their facts, and A beats C for its ten words less, each with probability 0.95.
Nothing here is learned, and training sees single votes only. Left out: grammar, and anything a real reader would want.
Run: python summaries.py    (a post, its summaries and the cycle above)
"""

import random

import torch

from policy import word_tokenizer

NOUNS = "car door dog key hat boat lamp phone bike table horse shirt clock piano letter ring cake coat drum tent sofa rope kite vase".split()
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
MAX_RESPONSE = (
    32  # tokens: room for the longest summary that the generator writes, with its end-of-text
)
LAPSE = 0.05  # an annotator's probability of voting against its own rule
ANNOTATORS = ("completist", "fact checker", "minimalist")


def tokenizer():
    """The task's tokenizer: one token a word."""
    phrases = [*NOUNS, *SENTENCES, *FILLER, QUESTION, ". ,"]
    return word_tokenizer(
        sorted({word for phrase in phrases for word in phrase.split() if word != "*"})
    )


def post(seed):
    """The post of an integer seed, as text. Every seed has its own random stream, so splits are ranges of seeds."""
    rng = random.Random(f"post {seed}")
    facts = zip(rng.sample(NOUNS, FACTS), rng.sample(SENTENCES, FACTS), strict=True)
    told = [sentence.replace("*", noun) for noun, sentence in facts]
    for line in rng.sample(FILLER, 1):
        told.insert(rng.randrange(len(told) + 1), line)
    return " . ".join(told) + " . " + QUESTION


def mentions(text):
    """The nouns of a text in order, repetitions included: a post's facts, or what a summary says of them."""
    return [word for word in text.split() if word in NOUNS]


def summary(text, seed):
    """A summary of a post by a writer of mixed quality: too short or long, wordy, sometimes wrong."""
    rng = random.Random(
        f"summary {seed} of {text}"
    )  # not seed alone: a stream shared with the post's would leak into it
    told = [sentence for sentence in text.split(" . ")[:-1] if mentions(sentence)]
    kept = sorted(rng.sample(range(FACTS), rng.randint(1, FACTS)))
    strangers = rng.sample([noun for noun in NOUNS if noun not in mentions(text)], FACTS)
    wordiness = rng.choice([0.1, 0.5, 0.9])
    written = []
    for index in kept:
        noun, sentence = mentions(told[index])[0], told[index]
        if rng.random() < 0.12:  # wrong: of something that the post does not mention
            sentence, noun = sentence.replace(noun, strangers[index]), strangers[index]
        written.append(sentence if rng.random() < wordiness else noun)
    if rng.random() < 0.33:
        written.insert(0, rng.choice(FILLER))
    return " , ".join(written)


def qualities(text, response):
    """What the annotators look at: facts covered, faults, words, and whether the summary is real at all. Not real: nothing
    mentioned, or at least half of the mentions repetitions."""
    said = mentions(response)
    covered = len(set(mentions(text)) & set(said))
    return dict(
        covered=covered,
        faults=len(said) - covered,
        words=len(response.split()),
        real=2 * len(set(said)) > len(said),
    )


def votes(text, response, other):
    """Each annotator's probability of preferring response to other, in the order of ANNOTATORS. Antisymmetric. A summary that is
    not real loses each vote to one that is, with probability 0.95."""
    a, b = qualities(text, response), qualities(text, other)
    more, right, shorter = (
        a["covered"] - b["covered"],
        b["faults"] - a["faults"],
        b["words"] - a["words"],
    )
    if not (a["real"] and b["real"]):
        verdicts = [a["real"] - b["real"]] * 3
    elif abs(shorter) >= 10:
        verdicts = [shorter] * 3
    else:
        verdicts = [more, more + right, more or shorter]
    return [0.5 + (0.5 - LAPSE) * ((verdict > 0) - (verdict < 0)) for verdict in verdicts]


class Panel:
    """The annotators as a preference: panel(prompt, y, y_other) -> p(y > y_other | x), [B] in [0, 1], exact."""

    ANNOTATORS = ANNOTATORS

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def votes(self, prompt, y, y_other):
        """Every annotator's probability, [B, 3]. Arguments: (ids, mask, ...) each, as in policy.log_prob."""
        texts = [self.read(tokens) for tokens in (prompt, y, y_other)]
        return torch.tensor(
            [votes(*row) for row in zip(*texts, strict=True)], device=prompt[0].device
        )

    def read(self, tokens):
        """The words of each row. End-of-text is not one of them."""
        return [
            self.tokenizer.decode(row[keep], skip_special_tokens=True)
            for row, keep in zip(tokens[0], tokens[1], strict=True)
        ]

    def __call__(self, prompt, y, y_other):
        return self.votes(prompt, y, y_other).mean(1)


def worked_example():
    """Prints a post, three summaries and the cycle of the file's head."""
    text = post(0)
    print("post:", text)
    for seed in range(3):
        written = summary(text, seed)
        print("summary:", written, "  ", qualities(text, written))
    text = (
        "my car broke . lost our door . sold the dog . found a key . her hat smells . need one boat . "
        + QUESTION
    )
    cycle = {"A": "car", "B": "car , door", "C": "my car broke , door , dog , key , hat"}
    for a, b in ("BA", "AC", "CB"):
        each = votes(text, cycle[a], cycle[b])
        print(
            f"p({a} > {b}) = {sum(each) / 3:.2f}   "
            + "   ".join(f"{n} {v:.2f}" for n, v in zip(ANNOTATORS, each, strict=True))
        )


if __name__ == "__main__":
    worked_example()
