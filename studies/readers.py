"""A panel of three readers of summaries, rules on text: a preference whose truth is known.

For real posts what summaries.py's annotators are for the built-in task. Each reader compares two
summaries of a post by a number of its own, and prefers one with probability sigmoid(margin):

  informed  key words of the post that are covered, the more the better: a margin of 1.5 nats each.
            Key words are its names (capital letters inside a sentence), its numbers, and all words
            of five letters or more but for some that any text has
  busy      words, the fewer the better: 0.2 nats each
  careful   faults, the fewer the better: 1.5 nats each. Faults are a name or a number that the post
            does not have, three words in a row that were said before, no capital or figure at the
            beginning, no full stop at the end, fewer than four words in all

p(y > y' | x) is the mean of the three. Each reader is consistent, the panel is intransitive: each
margin saturates, so that a word more to read and a key word more to know outvote one another from
pair to pair. It is deterministic and cheap, and knows nothing of what a text means: a summary that
pleases it may be nonsense.
Left out: grammar, and whether what is said with the key words is true.
Run: python train.py --preference studies/readers.py --policy FOLDER --prompts FILE ...
     python studies/readers.py    (a post, its key words, three summaries that are a cycle)
"""

import re

import torch

READERS = ("informed", "busy", "careful")
KEY_WORD, WORD, FAULT = 1.5, 0.2, 1.5  # nats of margin
LONG = 5  # letters: from here on any word is a key word
STEM = 5  # letters that make two words one, as in marries, married
LEAST = 4  # words of a sentence
COMMON = set(
    "about after again because before being could doing every going having maybe other really "
    "should someone something still their there these thing things think those though through "
    "until where which while would".split()
)


def post_of(prompt):
    """The post of a prompt: the last turn of the user's where a chat template wrote turns, without
    a first paragraph, which says what to do."""
    turn = prompt.rsplit("\nuser\n", 1)[-1].rsplit("\nassistant", 1)[0]
    return turn.split("\n\n", 1)[-1].strip()


def words(text):
    """The words of a text as they are written: letters, figures and apostrophes."""
    return re.findall(r"\w+(?:'\w+)*", text)


def stem(word):
    """What is compared of a word."""
    return word.lower().removesuffix("'s")[:STEM]


def names_and_numbers(text):
    """The stems of a text's names and numbers, a set."""
    found = set()
    for sentence in re.split(r"[.!?:\n]+", text):
        for place, word in enumerate(words(sentence)):
            is_name = place > 0 and word[0].isupper() and stem(word) != "i" and word[:2] != "I'"
            if is_name or any(letter.isdigit() for letter in word):
                found.add(stem(word))
    return found


def key_words(post):
    """The stems of what a summary of a post may mention, a set."""
    found = names_and_numbers(post)
    for word in words(post):
        if len(word) >= LONG and word.lower() not in COMMON:
            found.add(stem(word))
    return found


def faults(post, summary):
    """How many faults a summary has, as the head of this file counts them."""
    said = [word.lower() for word in words(summary)]
    known = {stem(word) for word in words(post)}
    count = len(names_and_numbers(summary) - known)
    runs = [tuple(said[place : place + 3]) for place in range(len(said) - 2)]
    count += len(runs) - len(set(runs))
    text = summary.strip()
    count += not (text[:1].isupper() or text[:1].isdigit())
    count += not text.endswith((".", "!", "?", '."', '!"', '?"'))
    return count + (len(said) < LEAST)


def counts(post, summary):
    """What the readers count in a summary: (key words covered, words, faults)."""
    covered = key_words(post) & {stem(word) for word in words(summary)}
    return len(covered), len(words(summary)), faults(post, summary)


def votes(prompts, ys, ys_other):
    """Each reader's p(y > y' | x), [B, 3] in (0, 1), float64.

    prompts, ys, ys_other:
        lists of B texts.
    """
    margins = []
    for prompt, y, y_other in zip(prompts, ys, ys_other, strict=True):
        post = post_of(prompt)
        both = zip(counts(post, y), counts(post, y_other), strict=True)
        covered, longer, wrong = (one - other for one, other in both)
        margins.append([KEY_WORD * covered, -WORD * longer, -FAULT * wrong])
    return torch.sigmoid(torch.tensor(margins, dtype=torch.float64).reshape(-1, len(READERS)))


def preference(prompts, ys, ys_other):
    """The panel's p(y > y' | x), [B] in (0, 1), as --preference asks for it."""
    return votes(prompts, ys, ys_other).mean(1)


POST = (
    "My dog Rex ate my sister's shoes\n"
    "Anna is angry. She wants 200 euros for them, and I think that she left the kitchen open."
)
CYCLE = (
    "My dog Rex ate the shoes of my sister, who is angry and now wants to have 200 euros for them "
    "from me",
    "rex ate shoes, 200 euros",
    "A pet was bad, and now somebody in the family wants money.",
)


def worked_example():
    """Prints what the readers count, and three summaries each of which beats the next."""
    print(POST)
    print("key words, by their first letters:", ", ".join(sorted(key_words(POST))))
    for text in CYCLE:
        covered, length, wrong = counts(POST, text)
        print(f"  {covered} key words, {length} words, {wrong} faults: {text}")
    for place, text in enumerate(CYCLE):
        other = CYCLE[(place + 1) % 3]
        each = votes([POST], [text], [other])[0].tolist()
        said = ", ".join(f"{name} {vote:.2f}" for name, vote in zip(READERS, each, strict=True))
        print(f"p({place + 1} > {(place + 1) % 3 + 1}) = {sum(each) / 3:.3f}: {said}")


if __name__ == "__main__":
    worked_example()
