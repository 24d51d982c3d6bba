"""The pairwise preference model p(y > y' | x), and the Bradley-Terry reward beside it.

A copy of the supervised policy reads prompt and response once. A small network looks at every
response token (its hidden state, its embedding, the log-probability the model gave it, whether it
occurs in the prompt and whether it is a repetition) and its results are summed to one vector a
response. A second network compares two vectors in both orders: logit p = g(e, e') - g(e', e). So
p(y > y') + p(y' > y) = 1 and p(y > y) = 1/2 by construction, and a cycle can be fitted, which a
reward cannot. The cost is linear in the number of responses; a cross-encoder would read every pair.
The reward is the same model with logit p = r(y) - r(y'), r one number a vector.
Left out: ties, rankings of more than two.
Of recorded comparisons it stops where pairs kept apart are told best, and worth says what the model
is worth beside what the lengths alone tell.
Run: python preference_model.py    (rock, paper, scissors: only the pairwise model fits the cycle)
     python -m studies.preference --comparisons FILE --out FOLDER    (trains one of your own)

Shapes: B pairs or responses, T response columns, F features a token, D width of the vectors.
"""

import copy
import hashlib
import json
import os
from functools import partial

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import files
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
        # Not in autocast's precision, here and below: a sum over tokens adds its errors up, and p
        # is of a difference of two numbers that are nearly equal. The body is what costs.
        with torch.autocast(features.device.type, enabled=False):
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
        with torch.autocast(vector.device.type, enabled=False):
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


def train_on_votes(
    model, comparisons, steps, lr, finetune, label, add_gradients=None, *, weight_decay=0.0, **bar
):
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
    weight_decay:
        AdamW's, from 0, of all that is trained.
    bar:
        as policy.minimise takes it, or nothing.

    Returns the model, frozen and in eval mode.
    """
    heads = [*model.token.parameters(), *model.compare.parameters()]
    groups = [dict(params=heads, lr=lr, weight_decay=weight_decay)]
    if finetune:
        body = list(model.body.parameters())
        groups.append(dict(params=body, lr=lr / 30, weight_decay=weight_decay))
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
    policies.minimise(groups, loss, steps, label, no_limit, add_gradients, **bar)
    return model.eval().requires_grad_(False)


def train_until_best(model, comparisons, validate, every, steps, *train, **options):
    """Trains on votes, and leaves the weights with which pairs kept apart were told best.

    Recorded votes are few, and each pair comes again with the same vote: after some passes the
    model knows the pairs by heart, and what it says of others gets worse.

    model, comparisons, steps, train, options:
        as train_on_votes takes them.
    validate:
        validate(model) returns a dict with loss, nats a pair, on pairs that are not trained on; in
        every process the same number.
    every:
        from 1, steps from one look at it to the next. The first is before any step, the last after
        all of them.

    Returns the looks: a list of dicts of step and what validate returned, in order; model has the
    weights of the least loss, of equal ones the first.
    """
    looks = []
    best = {}

    def look(step):
        with torch.no_grad():
            looks.append(dict(step=step, **validate(model)))
        # NaN is less than nothing: the first look always counts, or there were no weights to keep.
        if not best or looks[-1]["loss"] < best["loss"]:
            weights = [parameter.detach().clone() for parameter in model.parameters()]
            best.update(loss=looks[-1]["loss"], weights=weights)

    def watched(step):
        # A step asks for its comparisons first: the weights are as the step before left them.
        if step % every == 0:
            look(step)
        return comparisons(step)

    train_on_votes(model, watched, steps, *train, **options)
    look(steps)
    for parameter, weight in zip(model.parameters(), best["weights"], strict=True):
        parameter.copy_(weight)
    return looks


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

    Returns [3, pairs]: p, the preference, and by how many tokens the first is the longer.
    """
    columns = []
    for step in range(batches):
        batch = comparisons(step)
        first, second = batch.first, batch.second
        vectors = model.embed(model.features(batch.prompt, batch.response), batch.response.mask)
        guess = torch.sigmoid(model.compare_vectors(vectors[first], vectors[second]))
        length = batch.response.lengths()
        longer_by = (length[first] - length[second]).to(guess.dtype)
        columns.append(torch.stack([guess, batch.preference, longer_by]))
    return torch.cat(columns, 1)


def accuracy(guess, preference, longer_by):
    """How well a model does on held-out pairs, and what their lengths alone would tell.

    guess, preference, longer_by:
        [pairs] each, as guesses returns them.

    Returns a dict of accuracy, the share of signs of p - 1/2 that are right; error, the mean of
    |p_hat - p|; shorter_wins and longer_wins, the shares that a rule by length would get right; and
    pairs, their number. Pairs with p = 1/2 have no sign and are left out of the shares. Equal
    lengths count as half right for a baseline.
    """
    decided = preference != 0.5
    right = (guess > 0.5) == (preference > 0.5)
    shorter = (1 - longer_by.sign()) / 2  # 1, 0, or 1/2 where the two are of equal length
    shorter_wins = torch.where(preference > 0.5, shorter, 1 - shorter)[decided].mean().item()
    return dict(
        accuracy=right[decided].float().mean().item(),
        error=(guess - preference).abs().mean().item(),
        shorter_wins=shorter_wins,
        longer_wins=1 - shorter_wins,
        pairs=len(preference),
    )


def worth(guess, preference, longer_by):
    """What a model's word is worth, from pairs that it has not seen.

    guess, preference, longer_by:
        [pairs] each, as guesses returns them.

    Returns a dict of accuracy's numbers and

    low, high:
        the accuracy's 95 % interval (wilson).
    loss:
        mean of -log p_hat of the votes, nats a pair; a coin has log 2 = 0.693.
    rule, rule_accuracy:
        the best of the rules that read nothing, "longer wins", "shorter wins" and "chance", on the
        same pairs, and its share.
    gain, gain_low, gain_high:
        accuracy - rule_accuracy and its 95 % interval (paired_interval).
    length_correlation:
        of p_hat - 1/2 with the difference of the lengths, each pair in both orders, in [-1, 1].

    Pairs are taken to be independent; several of one prompt are less than that, and make the
    intervals too narrow.
    """
    numbers = accuracy(guess, preference, longer_by)
    decided = preference != 0.5
    wins = preference[decided] > 0.5
    right = ((guess[decided] > 0.5) == wins).double()
    longer_right = (longer_by[decided].double().sign() * (2.0 * wins - 1) + 1) / 2
    rules = {
        "longer wins": longer_right,
        "shorter wins": 1 - longer_right,
        "chance": torch.full_like(right, 0.5),
    }
    rule = max(rules, key=lambda name: rules[name].mean().item())
    low, high = wilson(right.sum().item(), len(right))
    gain_low, gain_high = paired_interval(right - rules[rule])
    return dict(
        numbers,
        low=low,
        high=high,
        loss=votes_loss(guess, preference).item(),
        rule=rule,
        rule_accuracy=rules[rule].mean().item(),
        gain=(right - rules[rule]).mean().item(),
        gain_low=gain_low,
        gain_high=gain_high,
        length_correlation=correlation(guess.double() - 0.5, longer_by.double()),
    )


def votes_loss(guess, preference):
    """Mean of -log p_hat of votes with these probabilities, nats a pair; [pairs] each.

    A p_hat of 0 for what happened costs 100 nats, not infinitely many.
    """
    log_p = guess.double().log().clamp(min=-100)
    log_q = (1 - guess.double()).log().clamp(min=-100)
    return -(preference * log_p + (1 - preference) * log_q).mean()


def wilson(successes, count, z=1.96):
    """Wilson's interval of a probability, (low, high): z = 1.96 for 95 %.

    successes:
        of count tries, from 0 to count.

    All probabilities from which the share seen is no more than z of their own standard errors away:
    unlike share +- z se it stays in [0, 1] and has a width where all tries went one way.
    """
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    variance = share * (1 - share) / count + z**2 / (4 * count**2)
    width = z * variance**0.5 / (1 + z**2 / count)
    return max(0.0, middle - width), min(1.0, middle + width)


def paired_interval(difference, z=1.96):
    """The interval of a mean difference of two rules on the same pairs, (low, high): Agresti and
    Min's.

    difference:
        [pairs], 1 where only the one is right, -1 where only the other is, 0 where both are or
        neither.

    The two agree on most pairs, so that their difference is known better than either share. Half a
    pair is added to each of the four cases: without them the interval of ten pairs is too short.
    """
    count = len(difference) + 2
    mean = difference.sum().item() / count
    square = (difference.square().sum().item() + 1) / count
    width = z * ((square - mean**2) / count) ** 0.5
    return mean - width, mean + width


def correlation(one, other):
    """Of two numbers a pair that change sign with its order, [pairs] each: in [-1, 1], or 0 where
    one of them never differs from 0.

    Over both orders of all pairs their means are 0, so that it does not matter who stands first.
    """
    size = (one.square().sum() * other.square().sum()).sqrt()
    return ((one * other).sum() / size).item() if size > 0 else 0.0


def save(model, folder, vocabulary=None):
    """Writes config.json and model.safetensors.

    model:
        a PreferenceModel.
    folder:
        made if there is none; what it holds under the two names is replaced.
    vocabulary:
        of the tokenizer, a text that another has not (vocabulary_hash); None to leave it out.

    Raises OSError or safetensors' SafetensorError where they cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    save_file(own_weights(model), os.path.join(folder, "model.safetensors"))
    config = dict(pairwise=model.pairwise, body=model.body.config.to_dict())
    if vocabulary is not None:
        config["vocabulary"] = vocabulary
    impossible = getattr(model.body, "impossible", None)
    if impossible is not None:
        config["impossible"] = impossible.nonzero()[:, 0].tolist()
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1, default=str)


def vocabulary_hash(tokenizer):
    """SHA-256 of a tokenizer's entries and their ids, as hexadecimal digits."""
    entries = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(entries.encode()).hexdigest()


def load_for(folder, tokenizer, size):
    """The PreferenceModel of a folder, as load returns it, if it reads a policy's tokens.

    tokenizer, size:
        the policy's, and its vocab_size.

    Raises ValueError, in one line that names the folder, if it was trained with another vocabulary:
    of another size, where the folder does not say with which.
    """
    model = load(folder)
    known = files.read_object(os.path.join(folder, "config.json")).get("vocabulary")
    fits = known == vocabulary_hash(tokenizer)
    if known is None:
        fits = model.body.config.vocab_size == size
    if not fits:
        raise ValueError(
            f"{folder}: was trained with another tokenizer than the policy's; "
            "give --tokenizer or --policy as it was trained with"
        )
    return model


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
        config = files.read_object(os.path.join(folder, "config.json"))
        found = files.tensors(os.path.join(folder, "model.safetensors"))
        files.check_layers(config, len(found))
        with torch.device("meta"):  # shapes alone: a size that no memory holds is seen before
            files.check_shapes(
                found, PreferenceModel(untrained(config["body"]), config["pairwise"])
            )
        model = PreferenceModel(untrained(config["body"]), config["pairwise"])
        policies.mask_ids(model.body, config.get("impossible", []))
        weights = load_file(os.path.join(folder, "model.safetensors"))
        tied = model.state_dict().keys() - own_weights(model).keys()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) != tied:
            raise KeyError(f"unexpected weights {unexpected or missing}")
        files.check_finite(model)
    except Exception as error:  # json's, safetensors', torch's, transformers' of a damaged file
        if files.is_out_of_memory(error):
            raise
        reason = policies.first_line(error).removeprefix(f"{folder}: ")
        raise ValueError(f"{folder}: not a preference model's folder: {reason}") from None
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
