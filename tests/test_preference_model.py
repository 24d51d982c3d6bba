"""The pairwise preference model and the Bradley-Terry reward.

Antisymmetry, cycles, and what must not move a preference.
"""

import pytest
import torch

import job.options
import policy as policies
import preference_model
from data import Comparisons
from policy import Tokens
from preference_model import PreferenceModel
from reference_sampler import END, gpt2

PROMPTS = [[1, 2, 3, 4], [2], [4, 1]]
FIRST = [[3, END], [1, 1, 2, 4], [END]]
SECOND = [[2, 2, 4], [4, END], [1, 3, END]]


def build(pairwise=True, seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PreferenceModel(gpt2(seed).to(dtype), pairwise).to(dtype).eval()
        for name, value in model.named_parameters():
            if not name.startswith("body"):  # far from a fresh model's p of nearly 1/2
                value.data += 0.3 * torch.randn_like(value)
    return model


def batch(repeat=1):
    """A prompt, y and y' for each row of PROMPTS, FIRST and SECOND."""
    return (
        policies.pad(PROMPTS * repeat, "left", END),
        policies.pad(FIRST * repeat, "right", END),
        policies.pad(SECOND * repeat, "right", END),
    )


def always(comparisons):
    """A source that gives the same comparisons at every step."""

    def source(step):
        return comparisons

    return source


@pytest.mark.parametrize("pairwise", [True, False])
def test_antisymmetric_by_construction(pairwise):
    """For random weights: the logit of (y, y') is minus that of (y', y) to the bit.

    p + p' = 1 to one rounding of float32, and p(y, y) = 1/2 exactly. A position bias is therefore
    impossible; a model that reads pairs in one order fails.
    """
    for seed in range(5):
        model = build(pairwise, seed)
        prompt, y, other = batch()
        with torch.no_grad():
            logit = model.logit(prompt, y, other)
            back = model.logit(prompt, other, y)
            p = model(prompt, y, other)
            q = model(prompt, other, y)
            same = model(prompt, y, y)
        assert torch.equal(logit, -back)
        assert logit.abs().max() > 0.01, "a constant would pass"
        assert ((p + q) - 1).abs().max() <= 2**-23
        assert torch.equal(same, torch.full((3,), 0.5))
        torch.testing.assert_close(p, torch.sigmoid(logit), rtol=0, atol=0)


def test_the_reward_is_a_difference_and_the_pairwise_model_is_not():
    """r(a) - r(b) + r(b) - r(c) + r(c) - r(a) = 0 round every triangle (1e-5, float32).

    The pairwise model's sum is not 0.
    """
    prompt = policies.pad([[1, 2]], "left", END)
    a, b, c = (policies.pad([row], "right", END) for row in FIRST)
    for pairwise in (True, False):
        model = build(pairwise)
        with torch.no_grad():
            around = model.logit(prompt, a, b) + model.logit(prompt, b, c)
            around = (around + model.logit(prompt, c, a)).abs().item()
        if pairwise:
            assert around > 1e-2
        else:
            assert around < 1e-5


def test_rock_paper_scissors():
    """Trained on votes at 0.9 round the cycle, in random order: only the pairwise model fits them.

    It ends within 0.1 of 0.9 on all three (votes of 300 steps are that noisy). Bradley-Terry has no
    reward for a cycle: the mean of its three p is 1/2 within 0.05, since the logits sum to 0, and
    it misses each by more than 0.25.
    """
    words = policies.word_tokenizer(["rock", "paper", "scissors", "?"])
    body = policies.build("tiny", words, 8, seed=0)
    prompt = policies.pad([[4]] * 3, "left", END)
    response = policies.pad([[1, END], [2, END], [3, END]], "right", END)
    winner = torch.tensor([1, 2, 0])
    loser = torch.tensor([0, 1, 2])
    for pairwise in (True, False):
        rng = torch.Generator().manual_seed(1)

        def comparisons(step, rng=rng):
            flip = torch.rand(3, generator=rng) < 0.5  # who stands first says nothing
            return Comparisons(
                prompt=prompt,
                response=response,
                first=torch.where(flip, loser, winner),
                second=torch.where(flip, winner, loser),
                preference=torch.where(flip, 0.1, 0.9),
                generator=rng,
            )

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = PreferenceModel(body, pairwise)
        preference_model.train_on_votes(model, comparisons, 250, 1e-3, False, "cycle")
        p = model(prompt, response.rows(winner), response.rows(loser))
        if pairwise:
            assert (p - 0.9).abs().max() < 0.1, p
        else:
            assert abs(p.mean().item() - 0.5) < 0.05, p
            assert (p < 0.65).all(), p


@pytest.mark.parametrize("finetune", [True, False])
def test_bfloat16_learns_as_float32(finetune):
    """The same votes: p within 0.05 of float32's, far from where it began; p itself is float32.

    With both networks under autocast and its cache, which keeps the first cast of every weight,
    training never saw its own steps: p ended at 1, 1e-3 and 1e-12.
    """
    words = policies.word_tokenizer(["rock", "paper", "scissors", "?"])
    body = policies.build("tiny", words, 8, seed=0)
    prompt = policies.pad([[4]] * 3, "left", END)
    response = policies.pad([[1, END], [2, END], [3, END]], "right", END)
    first, second = torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2])
    wanted = torch.tensor([0.9, 0.6, 0.3])
    found = {}
    for dtype in ("float32", "bfloat16"):
        rng = torch.Generator().manual_seed(1)
        votes = Comparisons(prompt, response, first, second, wanted, rng)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = PreferenceModel(body, True)
        options = job.options.parse(["--device", "cpu", "--dtype", dtype])
        with job.options.precision(options):
            given = model, always(votes), 200, 1e-3, finetune, "votes"
            preference_model.train_on_votes(*given)
            p = model(prompt, response.rows(first), response.rows(second))
        assert p.dtype == torch.float32
        found[dtype] = p
    assert (found["float32"] - wanted).abs().max() < 0.15, found
    assert (found["bfloat16"] - found["float32"]).abs().max() < 0.05, found


@pytest.mark.parametrize("finetune", [True, False])
@pytest.mark.parametrize("pairwise", [True, False])
def test_learns_a_plain_order(pairwise, finetune):
    """Recorded winners (preference 1): both models put the better first with p > 0.9 in 60 steps.

    With the body trained too (finetune) or kept.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = policies.build("tiny", policies.word_tokenizer(list("abcd")), 8, 0)
        model = PreferenceModel(body, pairwise)
    before = model.body.transformer.wte.weight.clone()
    recorded = Comparisons(
        prompt=policies.pad([[4]] * 2, "left", END),
        response=policies.pad([[1, END], [2, END]], "right", END),
        first=torch.tensor([1]),
        second=torch.tensor([0]),
        preference=torch.ones(1),
        generator=torch.Generator().manual_seed(0),
    )
    preference_model.train_on_votes(model, always(recorded), 60, 1e-3, finetune, "order")
    prompt = recorded.prompt.rows(slice(1))
    better = recorded.response.rows(recorded.first)
    worse = recorded.response.rows(recorded.second)
    assert model(prompt, better, worse).item() > 0.9
    assert torch.equal(before, model.body.transformer.wte.weight) != finetune


def test_features_are_remembered_of_the_right_batch(monkeypatch):
    """Without finetune a batch's features are computed once, even if its Tokens are made anew.

    A batch that is gone may leave its place in memory to another, which must not take its features.
    """
    responses = policies.pad([*FIRST, *SECOND], "right", END)
    pairs = torch.arange(3), torch.arange(3, 6), torch.full((3,), 0.7)
    rng = torch.Generator().manual_seed(0)
    kept = [policies.pad(PROMPTS * 2, "left", END), policies.pad(PROMPTS[::-1] * 2, "left", END)]

    def pool(step):  # two batches that come again, moved to where they are already
        return Comparisons(kept[step % 2], responses, *pairs, rng).to("cpu")

    def fresh(step):  # a batch of its own at every step
        prompt = policies.pad([[1 + step % 4], [2], [3]] * 2, "left", END)
        return Comparisons(prompt, responses, *pairs, rng)

    for comparisons, times in ((pool, 2), (fresh, 6)):
        model = build()
        features = model.features
        computed = []

        def count(prompt, response, features=features, computed=computed):
            computed.append(prompt.lists())
            return features(prompt, response)

        monkeypatch.setattr(model, "features", count)
        preference_model.train_on_votes(model, comparisons, 6, 1e-3, False, "votes")
        assert len(computed) == times, comparisons.__name__


def test_it_learns_from_single_votes():
    """Of one pair with p = 0.7 each visit's loss is -log p_hat of the first or of the second, each
    as often as it is voted for: within 5 standard errors of 400 visits. The two are computed by
    the model's own p; the loss against 0.7 itself lies between them."""
    model, rows = build(), policies.pad(PROMPTS[:1] * 2, "left", END)
    response = policies.pad([FIRST[0], SECOND[0]], "right", END)
    pair = torch.tensor([0]), torch.tensor([1]), torch.tensor([0.7])
    votes = Comparisons(rows, response, *pair, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = model(rows.rows(slice(1)), response.rows(pair[0]), response.rows(pair[1])).double()
        features, first = model.features(rows, response), 0
        for _ in range(400):
            cost = preference_model.vote_loss(model, votes, features).exp().double()
            apart = torch.stack([cost * p - 1, cost * (1 - p) - 1]).abs()
            assert apart.min() < 1e-5
            first += int(apart.argmin() == 0)
    assert (p - 0.5).abs() > 0.01 and abs(first / 400 - 0.7) < 5 * (0.7 * 0.3 / 400) ** 0.5


def test_frozen_and_in_eval_after_training_and_loading(tmp_path):
    """No parameter of a fitted or loaded model wants a gradient, and none is in train mode.

    Nor does p carry a gradient.
    """
    prompt, y, other = batch()
    votes = Comparisons(
        prompt=prompt.repeat(2),
        response=policies.pad([*FIRST, *SECOND], "right", END),
        first=torch.arange(3),
        second=torch.arange(3, 6),
        preference=torch.full((3,), 0.7),
        generator=torch.Generator().manual_seed(0),
    )
    fitted = preference_model.train_on_votes(build().train(), always(votes), 2, 1e-3, True, "votes")
    preference_model.save(fitted, tmp_path / "p")
    for model in (fitted, preference_model.load(tmp_path / "p")):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(prompt, y, other).requires_grad


@pytest.mark.parametrize("pairwise", [True, False])
def test_save_and_load(tmp_path, pairwise):
    """The loaded model has the same weights to the bit, from config.json and safetensors alone.

    And the same preferences (1e-6: float32 kernels may choose another order of summation for
    another address).
    """
    model = build(pairwise)
    arguments = batch()
    preference_model.save(model, tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"config.json", "model.safetensors"}
    loaded = preference_model.load(tmp_path / "kept")
    with torch.no_grad():
        torch.testing.assert_close(loaded(*arguments), model(*arguments), rtol=0, atol=1e-6)
    assert loaded.pairwise is pairwise
    weights = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    body = loaded.body
    assert body.lm_head.weight is body.transformer.wte.weight, "the head is tied to the embedding"


def test_loading_says_what_is_wrong(tmp_path):
    """No folder, no weights, damaged ones or those of something else: ValueError in one line.

    It names the folder.
    """
    weights = {}
    for name in ("no_weights", "damaged", "other"):
        preference_model.save(build(), tmp_path / name)
        weights[name] = tmp_path / name / "model.safetensors"
    preference_model.save(build(False), tmp_path / "reward")
    weights["no_weights"].unlink()
    weights["damaged"].write_bytes(weights["damaged"].read_bytes()[:100])
    weights["other"].write_bytes((tmp_path / "reward" / "model.safetensors").read_bytes())
    for name in ("nowhere", *weights):
        with pytest.raises(ValueError, match=name) as error:
            preference_model.load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("pairwise", [True, False])
def test_batch_and_padding_change_nothing(pairwise):
    """In float64, to 1e-10: other pads and other rows beside it give a pair the same logit.

    Every pair of a batch alone and unpadded, pads of another id, ten more pad columns on both
    sides, and junk behind the mask.
    """
    model = build(pairwise, dtype=torch.float64)
    prompt, y, other = batch(4)
    with torch.no_grad():
        whole = model.logit(prompt, y, other)
        assert whole.dtype == torch.float64
        for row in range(3):
            alone = model.logit(
                policies.pad([PROMPTS[row]], "left", END),
                policies.pad([FIRST[row]], "right", END),
                policies.pad([SECOND[row]], "right", END),
            )
            torch.testing.assert_close(alone, whole[row : row + 1], rtol=0, atol=1e-10)
        for fill in (0, 3):
            longer = model.logit(
                widen(prompt, "left", fill), widen(y, "right", fill), widen(other, "right", fill)
            )
            torch.testing.assert_close(longer, whole, rtol=0, atol=1e-10)


def widen(tokens, side, fill):
    """The same rows with ten more columns of padding, every pad of them the id fill."""
    ids = tokens.ids.masked_fill(~tokens.mask, fill)
    pads = torch.full((len(ids), 10), fill)
    never = torch.zeros_like(pads, dtype=torch.bool)
    if side == "left":
        return Tokens(torch.cat([pads, ids], 1), torch.cat([never, tokens.mask], 1))
    return Tokens(torch.cat([ids, pads], 1), torch.cat([tokens.mask, never], 1))


def test_accuracy_by_hand(monkeypatch):
    """Four held-out pairs with true p 0.9, 0.2, 0.5, 0.8 and guesses 0.6, 0.4, 0.9, 0.3.

    Three have a sign and two of them are right; mean |p_hat - p| = (0.3 + 0.2 + 0.4 + 0.5)/4;
    lengths 1:2, 1:2, 1:2, 2:2: the shorter wins 1, 0 and (equal) 1/2 of the three with a sign.
    1e-6: float32.
    """
    model = build()
    guesses = torch.logit(torch.tensor([0.6, 0.4, 0.9, 0.3]))
    monkeypatch.setattr(model, "compare_vectors", lambda vector, vector_other: guesses)
    held_out = Comparisons(
        prompt=policies.pad([[1]] * 8, "left", END),
        response=policies.pad([[1]] * 3 + [[1, 1]] * 5, "right", 1),
        first=torch.arange(4),
        second=torch.arange(4, 8),
        preference=torch.tensor([0.9, 0.2, 0.5, 0.8]),
        generator=None,
    )
    numbers = preference_model.accuracy(*preference_model.guesses(model, always(held_out), 1))
    assert numbers["accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert numbers["error"] == pytest.approx(0.35, abs=1e-6)
    assert numbers["shorter_wins"] == pytest.approx(0.5, abs=1e-6)
    assert numbers["longer_wins"] == pytest.approx(0.5, abs=1e-6)
    assert numbers["pairs"] == 4
