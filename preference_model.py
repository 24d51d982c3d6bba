"""The pairwise preference model p(y > y' | x), and the Bradley-Terry reward beside it.

A copy of the supervised policy reads prompt and response once. A small network looks at every
response token (its hidden state, its embedding, the log-probability the model gave it, whether it
occurs in the prompt and whether it is a repetition) and its results are summed to one vector a
response. A second network compares two vectors in both orders: logit p = g(e, e') - g(e', e). So
p(y > y') + p(y' > y) = 1 and p(y > y) = 1/2 by construction, and a cycle can be fitted, which a
reward cannot. The cost is linear in the number of responses; a cross-encoder would read every pair.
The reward is the same model with logit p = r(y) - r(y'), r one number a vector.
Left out: ties, rankings of more than two.
Run: python preference_model.py    (rock, paper, scissors: only the pairwise model fits the cycle)

Shapes: B pairs or responses, T response columns, F features a token, D width of the vectors.
"""

import copy
import json
import os
from functools import partial

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import policy as policies
import side_by_side
from data import Comparisons


class PreferenceModel(nn.Module):
    """p(y > y' | x) of two responses to a prompt: preference(prompt, y, y_other).

    body:
        a causal language model, the supervised policy. It is copied.
    pairwise:
        False for the Bradley-Terry reward.
    """

    def __init__(self, body, pairwise=True):
        super().__init__()
        self.body = copy.deepcopy(body)
        self.pairwise = pairwise
        # The head's own input says how wide the last hidden state is; some models' embeddings are
        # narrower, and no two configs call the widths the same.
        width = body.get_output_embeddings().weight.shape[1]
        embedded = body.get_input_embeddings().weight.shape[1]
        # Hidden state and embedding, and three numbers: see features.
        self.token = nn.Sequential(
            nn.Linear(width + embedded + 3, width), nn.GELU(), nn.Linear(width, width)
        )
        inputs = 2 * width if pairwise else width
        self.compare = nn.Sequential(
            nn.Linear(inputs, 2 * width), nn.GELU(), nn.Linear(2 * width, 1)
        )

    def features(self, prompt, response):
        """What the token network sees of each response token.

        prompt:
            Tokens [B, P], padded on the left.
        response:
            Tokens [B, T], padded on the right.

        Returns [B, T, F], float32 or higher. Where the response's mask is False it means nothing.
        """
        mask = torch.cat([prompt.mask, response.mask], 1)
        begin = prompt.ids.shape[1]
        columns = torch.arange(begin - 1, mask.shape[1] - 1, device=mask.device)
        output = policies.forward(
            self.body,
            torch.cat([prompt.ids, response.ids], 1),
            mask,
            policies.positions(mask),
            keep=columns,
            states=True,
        )
        # A token's own state is in its column, its probability in the column before.
        states = output.hidden_states[-1][:, begin:]
        logits = policies.logits_of(self.body, output, columns)
        surprise = F.cross_entropy(
            logits.flatten(0, 1), response.ids.flatten(), reduction="none"
        ).view(*response.ids.shape, 1)
        # A pad may be an id that is impossible: infinity times a mask's 0 is no number.
        surprise = surprise.masked_fill(~response.mask[..., None], 0.0)
        # Whether a word stands in the post is the heart of a summary; a narrow model takes hours of
        # votes to find it out. Pads are no words of the post, whatever their id: hence the masks.
        ids = response.ids[:, :, None]
        in_prompt = (ids == prompt.ids[:, None]) & prompt.mask[:, None]
        repeated = (ids == response.ids[:, None]) & response.mask[:, None]
        repeated = repeated.tril(-1)  # of an earlier token: each token equals itself
        return torch.cat(
            [
                policies.raise_precision(states),
                self.body.get_input_embeddings()(response.ids),
                surprise,
                in_prompt.any(2, keepdim=True),
                repeated.any(2, keepdim=True),
            ],
            2,
        )

    def embed(self, features, mask):
        """One vector a response.

        features:
            [B, T, F], as features returns.
        mask:
            [B, T], the response's.

        Returns [B, D]. A sum over tokens, not a mean: how much was said, and how many words it
        took, is what annotators compare.
        """
        # The network runs on real tokens only: more than half of a batch is padding.
        tokens = self.token(features[mask])
        rows = mask.nonzero()[:, 0]
        total = tokens.new_zeros(len(mask), tokens.shape[1])
        return total.index_add(0, rows, tokens) / 2

    def compare_vectors(self, vector, vector_other):
        """log p(y > y') / p(y' > y) of two responses read before; for the reward r(y) - r(y').

        vector, vector_other:
            [B, D], as embed returns.

        Returns [B]. Exchanging the two changes its sign, to the bit.
        """
        if self.pairwise:
            forth = torch.cat([vector, vector_other], -1)
            back = torch.cat([vector_other, vector], -1)
        else:
            forth = vector
            back = vector_other
        return (self.compare(forth) - self.compare(back)).squeeze(-1)

    def logit(self, prompt, y, y_other):
        """The logit of p(y > y' | x): the reward gap r(y) - r(y') where pairwise is False.

        prompt:
            Tokens [B, P], padded on the left.
        y, y_other:
            Tokens [B, T] and [B, T'], padded on the right.

        Returns [B], float32 or higher.
        """
        sides = [partial(self.read, prompt, y), partial(self.read, prompt, y_other)]
        return self.compare_vectors(*side_by_side.run(sides, prompt.ids.device))

    def reward(self, prompt, response):
        """r(y | x) where pairwise is False, [B]; a constant of the prompt means nothing in it."""
        return self.compare(self.read(prompt, response)).squeeze(-1)

    def read(self, prompt, response):
        """One vector a response, [B, D], from its tokens."""
        return self.embed(self.features(prompt, response), response.mask)

    def forward(self, prompt, y, y_other):
        """p(y > y' | x), [B] in [0, 1], float32 or higher. Arguments as logit."""
        return torch.sigmoid(self.logit(prompt, y, y_other))


def train_on_votes(model, comparisons, steps, lr, finetune, label, add_gradients=None):
    """Trains on votes by the logistic loss -log p(winner > loser).

    model:
        a PreferenceModel, changed in place.
    comparisons:
        comparisons(step) returns data.Comparisons on the model's device. A vote is drawn from
        their preference at every visit.
    steps:
        how many, from 0.
    lr:
        above 0, the peak learning rate of the two small networks.
    finetune:
        True trains the body too, at lr / 30. Without, it stays the supervised policy, and the
        features of a batch that comes again are computed once.
    label:
        text for the progress bar.
    add_gradients:
        as policy.minimise takes it, where comparisons holds one process's share.

    Returns the model, frozen and in eval mode.
    """
    heads = [*model.token.parameters(), *model.compare.parameters()]
    groups = [dict(params=heads, lr=lr)]
    if finetune:
        groups.append(dict(params=model.body.parameters(), lr=lr / 30))
    # Prompt ids -> features. A tensor is a key by its identity, and a key is kept alive: the id()
    # of one that is gone may come again, with another batch's features.
    remembered = {}

    def features_of(prompt, response):
        if finetune:
            return model.features(prompt, response)
        if prompt.ids not in remembered:
            with torch.no_grad():
                remembered[prompt.ids] = model.features(prompt, response)
        return remembered[prompt.ids]

    def loss(step):
        batch = comparisons(step)
        return vote_loss(model, batch, features_of(batch.prompt, batch.response))

    # Not clipped: the rare votes against the majority have the large gradients, and cutting those
    # makes p overconfident.
    no_limit = float("inf")
    policies.minimise(groups, loss, steps, label, no_limit, add_gradients)
    return model.eval().requires_grad_(False)


def vote_loss(model, batch, features):
    """Mean of -log p(winner > loser) over a step's pairs, with a vote drawn on each: this share's
    part of it.

    model:
        a PreferenceModel.
    batch:
        data.Comparisons of N pairs.
    features:
        [B, T, F], what the model's features returns of the batch's prompts and responses.

    Returns a scalar, nats a pair, with gradient. The batch's generator moves on.
    """
    vectors = model.embed(features, batch.response.mask)
    # index_select, not vectors[first], whose gradient adds up in whatever order the threads come:
    # other bits at every run.
    vector = vectors.index_select(0, batch.first)
    vector_other = vectors.index_select(0, batch.second)
    logit = model.compare_vectors(vector, vector_other)
    mean = F.binary_cross_entropy_with_logits(logit, batch.votes())
    return mean * (len(logit) / batch.pairs())


@torch.no_grad()
def guesses(model, comparisons, batches):
    """A model's p on held-out pairs, beside the true one and what their lengths say.

    model:
        a PreferenceModel.
    comparisons:
        comparisons(step) returns data.Comparisons on the model's device.
    batches:
        how many steps to ask for, from 0.

    Returns [3, pairs]: p, the preference, and whether the first is the shorter: 1, 0, or 1/2 where
    they are equal.
    """
    columns = []
    for step in range(batches):
        batch = comparisons(step)
        first, second = batch.first, batch.second
        vectors = model.embed(model.features(batch.prompt, batch.response), batch.response.mask)
        guess = torch.sigmoid(model.compare_vectors(vectors[first], vectors[second]))
        length = batch.response.lengths()
        shorter = (length[first] < length[second]).float()
        shorter_or_equal = (length[first] <= length[second]).float()
        is_shorter = (shorter + shorter_or_equal) / 2
        columns.append(torch.stack([guess, batch.preference, is_shorter]))
    return torch.cat(columns, 1)


def accuracy(guess, preference, shorter):
    """How well a model does on held-out pairs, and what their lengths alone would tell.

    guess, preference, shorter:
        [pairs] each, as guesses returns them.

    Returns a dict of accuracy, the share of signs of p - 1/2 that are right; error, the mean of
    |p_hat - p|; shorter_wins and longer_wins, the shares that a rule by length would get right; and
    pairs, their number. Pairs with p = 1/2 have no sign and are left out of the shares. Equal
    lengths count as half right for a baseline.
    """
    decided = preference != 0.5
    right = (guess > 0.5) == (preference > 0.5)
    shorter_wins = torch.where(preference > 0.5, shorter, 1 - shorter)[decided].mean().item()
    return dict(
        accuracy=right[decided].float().mean().item(),
        error=(guess - preference).abs().mean().item(),
        shorter_wins=shorter_wins,
        longer_wins=1 - shorter_wins,
        pairs=len(preference),
    )


def save(model, folder):
    """Writes config.json and model.safetensors.

    model:
        a PreferenceModel.
    folder:
        made if there is none; what it holds under the two names is replaced.

    Raises OSError or safetensors' SafetensorError where they cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    save_file(own_weights(model), os.path.join(folder, "model.safetensors"))
    config = dict(pairwise=model.pairwise, body=model.body.config.to_dict())
    impossible = getattr(model.body, "impossible", None)
    if impossible is not None:
        config["impossible"] = impossible.nonzero()[:, 0].tolist()
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1, default=str)


def own_weights(model):
    """The state dict without tied weights' second names: an output head that is the embedding."""
    weights = {}
    places = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in places:
            places.add(value.data_ptr())
            weights[name] = value.contiguous()
    return weights


def load(folder):
    """The PreferenceModel that save wrote, frozen and in eval mode, on the CPU.

    folder:
        holds config.json and model.safetensors.

    Raises ValueError naming the folder, in one line, where a file is missing or damaged, or the
    weights are not those of a preference model.
    """
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        model = PreferenceModel(untrained(config["body"]), config["pairwise"])
        policies.mask_ids(model.body, config.get("impossible", []))
        weights = load_file(os.path.join(folder, "model.safetensors"))
        tied = model.state_dict().keys() - own_weights(model).keys()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) != tied:
            raise KeyError(f"unexpected weights {unexpected or missing}")
    except (
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ValueError(
            f"{folder}: not a preference model's folder: {policies.first_line(error)}"
        ) from None
    return model.eval().requires_grad_(False)


def untrained(config):
    """A causal language model with random weights in float32.

    config:
        a dict as its config's to_dict returns it.
    """
    kind = type(AutoConfig.for_model(config["model_type"]))
    return AutoModelForCausalLM.from_config(
        kind.from_dict(config), dtype=torch.float32, trust_remote_code=False
    )


def worked_example():
    """Fits rock, paper, scissors with both models and prints their p."""
    tokenizer = policies.word_tokenizer(["rock", "paper", "scissors", "?"])
    body = policies.build("tiny", tokenizer, 8, seed=0)
    cycle = Comparisons(
        prompt=policies.pad([[4]] * 3, "left", 0),
        response=policies.pad([[1, 0], [2, 0], [3, 0]], "right", 0),
        first=torch.tensor([1, 2, 0]),
        second=torch.tensor([0, 1, 2]),
        preference=torch.full((3,), 0.9),
        generator=torch.Generator().manual_seed(0),
    )

    def comparisons(step):
        return cycle

    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {
            "pairwise": PreferenceModel(body),
            "Bradley-Terry": PreferenceModel(body, pairwise=False),
        }
    y = cycle.response.rows(cycle.first)
    y_other = cycle.response.rows(cycle.second)
    for name, model in models.items():
        train_on_votes(model, comparisons, steps=600, lr=3e-4, finetune=False, label=name)
        p = [round(value, 3) for value in model(cycle.prompt, y, y_other).tolist()]
        pairs = "p(paper > rock), p(scissors > paper), p(rock > scissors)"
        print(f"{name}: {pairs} = {p}  true 0.9 each")


if __name__ == "__main__":
    worked_example()
