"""The pairwise preference model p(y > y' | x), and the Bradley-Terry reward beside it.

A copy of the supervised GPT-2 reads prompt and response once. A small network looks at every response token (its hidden
state, its embedding, the log-probability the model gave it, whether it occurs in the prompt and whether it is a
repetition) and its results are summed to one vector a response. A second network compares two vectors in both orders:
logit p = g(e, e') - g(e', e). So p(y > y') + p(y' > y) = 1 and p(y > y) = 1/2 by construction, and a cycle can be fitted,
which a reward cannot. The cost is linear in the number of responses; a cross-encoder would read every pair.
The reward is the same model with logit p = r(y) - r(y'), r one number a vector.
Left out: ties, rankings of more than two.
Run: python preference_model.py    (rock, paper, scissors: the pairwise model fits the cycle, the reward cannot)

Shapes: B pairs or responses, T response columns, F features a token, D width of the vectors.
"""

import copy
import json
import os

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import policy as policies


class PreferenceModel(nn.Module):
    """preference(prompt, y, y_other) -> p(y > y_other | x), [B] in [0, 1], float32 or higher. body: a GPT2LMHeadModel, copied.
    pairwise: False for the Bradley-Terry reward."""

    def __init__(self, body, pairwise=True):
        super().__init__()
        self.body, self.pairwise = copy.deepcopy(body), pairwise
        width = body.config.n_embd
        self.token = nn.Sequential(
            nn.Linear(2 * width + 3, width), nn.GELU(), nn.Linear(width, width)
        )
        outputs = 2 * width if pairwise else width
        self.compare = nn.Sequential(
            nn.Linear(outputs, 2 * width), nn.GELU(), nn.Linear(2 * width, 1)
        )

    def features(self, prompt, response):
        """What the token network sees, [B, T, F]. Arguments as policy.log_prob."""
        (prompt_ids, prompt_mask), (ids, mask) = prompt[:2], response[:2]
        everything, first = torch.cat([prompt_mask, mask], 1), prompt_ids.shape[1]
        states = self.body.transformer(
            input_ids=torch.cat([prompt_ids, ids], 1),
            attention_mask=everything.long(),
            position_ids=policies.positions(everything),
            use_cache=False,
        ).last_hidden_state
        logits = policies.raise_precision(self.body.lm_head(states[:, first - 1 : -1]))
        surprise = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(
            *ids.shape, 1
        )
        # Whether a word stands in the post is the heart of a summary; a narrow model takes hours of votes to find it out.
        in_prompt = ((ids[:, :, None] == prompt_ids[:, None]) & prompt_mask[:, None]).any(
            2, keepdim=True
        )
        repeated = ((ids[:, :, None] == ids[:, None]) & mask[:, None]).tril(-1).any(2, keepdim=True)
        tokens = self.body.transformer.wte(ids)
        return torch.cat(
            [policies.raise_precision(states[:, first:]), tokens, surprise, in_prompt, repeated], 2
        )

    def embed(self, features, mask):
        """One vector a response, [B, D], from features [B, T, F] and the response's mask [B, T]. A sum over tokens, not a mean:
        how much was said, and how many words it took, is what annotators compare."""
        return (self.token(features) * mask[..., None]).sum(1) / 2

    def logit(self, vector, vector_other):
        """log p(y > y') / p(y' > y) from two [B, D] vectors, [B]; for the reward r(y) - r(y')."""
        if self.pairwise:
            both = torch.cat([vector, vector_other], -1), torch.cat([vector_other, vector], -1)
        else:
            both = vector, vector_other
        return (self.compare(both[0]) - self.compare(both[1])).squeeze(-1)

    def gap(self, prompt, y, y_other):
        """The logit of p(y > y_other | x), [B]: the reward gap r(y) - r(y_other) where pairwise is False."""
        return self.logit(
            *(self.embed(self.features(prompt, each), each[1]) for each in (y, y_other))
        )

    def forward(self, prompt, y, y_other):
        return torch.sigmoid(self.gap(prompt, y, y_other))


def fit(model, comparisons, steps, lr, finetune, label):
    """Trains on votes by the logistic loss -log p(winner > loser). Returns the model, frozen. comparisons(step): (prompt,
    response, i, j, chance, generator): response i[k] was compared with j[k]; chance[k] is the probability of a vote for i[k], 1
    or 0 for a recorded one, and a vote is drawn from it at every visit. finetune trains the body too; without, it stays the
    supervised policy and the features of the batches are computed once."""
    heads = [*model.token.parameters(), *model.compare.parameters()]
    groups = [dict(params=heads, lr=lr)] + (
        [dict(params=model.body.parameters(), lr=lr / 30)] if finetune else []
    )
    remembered = {}

    def loss(step):
        prompt, response, i, j, chance, rng = comparisons(step)
        if finetune:
            features = model.features(prompt, response)
        else:
            if id(prompt) not in remembered:
                with torch.no_grad():
                    remembered[id(prompt)] = model.features(prompt, response)
            features = remembered[id(prompt)]
        vectors = model.embed(features, response[1])
        vote = torch.bernoulli(chance.cpu(), generator=rng).to(chance.device)
        # index_select, not vectors[i], whose gradient adds up in whatever order the threads come: other bits at every run.
        return F.binary_cross_entropy_with_logits(
            model.logit(vectors.index_select(0, i), vectors.index_select(0, j)), vote
        )

    # Not clipped: the rare votes against the majority have the large gradients, and cutting those makes p overconfident.
    policies.fit(groups, loss, steps, label, max_norm=float("inf"))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model, comparisons, batches):
    """On held-out pairs: share of signs of p - 1/2 that are right, mean |p_hat - p|, and the length baselines. Pairs with p = 1/2
    have no sign and are left out of the shares. Equal lengths count as half right for a baseline."""
    rows = []
    for step in range(batches):
        prompt, response, i, j, chance, _ = comparisons(step)
        vectors, length = (
            model.embed(model.features(prompt, response), response[1]),
            response[1].sum(1),
        )
        shorter = ((length[i] < length[j]).float() + (length[i] <= length[j]).float()) / 2
        rows.append(
            torch.stack([torch.sigmoid(model.logit(vectors[i], vectors[j])), chance, shorter])
        )
    guess, chance, shorter = torch.cat(rows, 1)
    decided = chance != 0.5
    short = torch.where(chance > 0.5, shorter, 1 - shorter)[decided].mean().item()
    right = ((guess > 0.5) == (chance > 0.5))[decided].float().mean().item()
    error = (guess - chance).abs().mean().item()
    return dict(
        accuracy=right, error=error, shorter_wins=short, longer_wins=1 - short, pairs=len(chance)
    )


def save(model, folder):
    """Writes config.json and model.safetensors to a folder."""
    os.makedirs(folder, exist_ok=True)
    weights = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name != "body.lm_head.weight"
    }
    save_file(weights, os.path.join(folder, "model.safetensors"))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(
            dict(pairwise=model.pairwise, body=model.body.config.to_dict()),
            file,
            indent=1,
            default=str,
        )


def load(folder):
    """The model that save wrote, frozen. Raises ValueError with what is wrong."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        model = PreferenceModel(GPT2LMHeadModel(GPT2Config(**config["body"])), config["pairwise"])
        missing, unexpected = model.load_state_dict(
            load_file(os.path.join(folder, "model.safetensors")), strict=False
        )
        if unexpected or missing != ["body.lm_head.weight"]:
            raise KeyError(f"unexpected weights {unexpected or missing}")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder}: not a preference model's folder: {str(error).splitlines()[0]}"
        ) from None
    model.body.tie_weights()
    return model.eval().requires_grad_(False)


def worked_example():
    """Fits rock, paper, scissors with both models and prints their p."""
    tokenizer = policies.word_tokenizer(["rock", "paper", "scissors", "?"])
    body = policies.build("tiny", tokenizer, 8, seed=0)
    prompt, response = (
        policies.pad([[4]] * 3, "left", 0),
        policies.pad([[1, 0], [2, 0], [3, 0]], "right", 0),
    )
    i, j, rng = torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = PreferenceModel(body), PreferenceModel(body, pairwise=False)
    for model, name in zip(models, ("pairwise", "Bradley-Terry"), strict=True):
        fit(
            model,
            lambda step: (prompt, response, i, j, torch.full((3,), 0.9), rng),
            600,
            3e-4,
            False,
            name,
        )
        y, other = ((response[0][k], response[1][k]) for k in (i, j))
        p = model((prompt[0], prompt[1]), y, other)
        print(
            f"{name}: p(paper > rock), p(scissors > paper), p(rock > scissors) =",
            [round(v, 3) for v in p.tolist()],
            " true 0.9 each",
        )


if __name__ == "__main__":
    worked_example()
