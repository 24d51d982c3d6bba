"""A language model as the preference (RLAIF): it is asked which of two responses is better, 1 or 2.

p(y > y' | x) is the probability of the word " 1" against " 2" as the model's next token, with y put
first and then with y' put first, averaged: a model likes one place better than the other, whatever
stands there, and the average cancels that. So p(y > y') + p(y' > y) = 1 by construction.
The model is a folder or a hub name in AI_FEEDBACK_MODEL. With the policy's own folder this is
self-rewarding: the policy judges itself as it was then. The built-in task's models cannot be asked,
their words have no "1".
Left out: chat templates, a reason before the answer, the model's weights following the policy's.
Run: AI_FEEDBACK_MODEL=FOLDER python train.py --preference studies/ai_feedback.py --demos FILE
"""

import os

import torch

import data
import policy as policies

MODEL = os.environ.get("AI_FEEDBACK_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
# The question stands last: of a text that is too long the beginning is cut off.
TEMPLATE = """{prompt}

Response 1: {first}

Response 2: {second}

Which response to the text above is better: accurate, to the point and short? Better is response"""
ANSWERS = (" 1", " 2")
QUESTIONS = 8  # a forward pass


def load(source):
    """The model that is asked: (model, tokenizer, the ids shared by both answers, the two ids).

    source:
        a local folder or a hub name.

    Raises ValueError if its vocabulary cannot tell the answers apart.
    """
    model, tokenizer = policies.load(source)
    one, two = (data.encode(tokenizer, answer) for answer in ANSWERS)
    # Some tokenizers write " 1" as a space and a digit: the space belongs to the question.
    shared = one[:-1]
    if one == two or len(one) != len(two) or shared != two[:-1]:
        raise ValueError(
            f"{source}: has no words for the answers 1 and 2; "
            "name another model in AI_FEEDBACK_MODEL"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer, shared, [one[-1], two[-1]]


# Here, not at the first question: a wrong name ends the run before anything is trained.
model, tokenizer, shared, answer_ids = load(MODEL)


def preference(prompts, ys, ys_other):
    """p(y > y' | x) of each pair, [B] in (0, 1), as --preference asks for it.

    prompts, ys, ys_other:
        lists of B texts.
    """
    forth = first_is_better(prompts, ys, ys_other)
    back = first_is_better(prompts, ys_other, ys)
    return (forth + 1 - back) / 2


@torch.no_grad()
def first_is_better(prompts, firsts, seconds):
    """The probability of the answer " 1" against " 2", [B].

    prompts, firsts, seconds:
        lists of B texts; firsts stand in the first place.
    """
    most = policies.context(model) - len(shared)
    rows = []
    for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
        texts = dict(prompt=prompt.strip(), first=first.strip(), second=second.strip())
        ids, _ = data.encode_prompt(tokenizer, TEMPLATE.format(**texts), most)
        rows.append(ids + shared)
    found = []
    for begin in range(0, len(rows), QUESTIONS):
        asked = policies.pad(rows[begin : begin + QUESTIONS], "left", tokenizer.eos_token_id)
        asked = asked.to(model.device)
        positions = policies.positions(asked.mask)
        logits = policies.run_model(model, asked.ids, asked.mask, positions, keep=1)[:, -1]
        # Of these two words alone: what else the model might say is no answer.
        found.append(torch.softmax(logits[:, answer_ids], 1)[:, 0])
    return torch.cat(found)
