"""The pairwise preference model and the Bradley-Terry reward: antisymmetry, cycles, and what must not move a preference."""

import pytest
import torch
from reference_sampler import END, gpt2

import policy as policies
import preference_model
from preference_model import PreferenceModel

PROMPTS, FIRST, SECOND = (
    [[1, 2, 3, 4], [2], [4, 1]],
    [[3, END], [1, 1, 2, 4], [END]],
    [[2, 2, 4], [4, END], [1, 3, END]],
)


def build(pairwise=True, seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PreferenceModel(gpt2(seed).to(dtype), pairwise).to(dtype).eval()
        for value in (
            value for name, value in model.named_parameters() if not name.startswith("body")
        ):
            value.data += 0.3 * torch.randn_like(value)  # far from a fresh model's p of nearly 1/2
    return model


def batch(repeat=1):
    return (
        policies.pad(PROMPTS * repeat, "left", END),
        policies.pad(FIRST * repeat, "right", END),
        policies.pad(SECOND * repeat, "right", END),
    )


@pytest.mark.parametrize("pairwise", [True, False])
def test_antisymmetric_by_construction(pairwise):
    """For random weights: the logit of (y, y') is minus that of (y', y) to the bit, p + p' = 1 to one rounding of float32,
    and p(y, y) = 1/2 exactly. A position bias is therefore impossible; a model that reads pairs in one order fails."""
    for seed in range(5):
        model, (prompt, y, other) = build(pairwise, seed), batch()
        with torch.no_grad():
            gap, back = model.gap(prompt, y, other), model.gap(prompt, other, y)
            assert torch.equal(gap, -back) and gap.abs().max() > 0.01, "a constant would pass"
            p, q, same = model(prompt, y, other), model(prompt, other, y), model(prompt, y, y)
        assert ((p + q) - 1).abs().max() <= 2**-23 and torch.equal(same, torch.full((3,), 0.5))
        torch.testing.assert_close(p, torch.sigmoid(gap), rtol=0, atol=0)


def test_the_reward_is_a_difference_and_the_pairwise_model_is_not():
    """r(a) - r(b) + r(b) - r(c) + r(c) - r(a) = 0 round every triangle (1e-5, float32); the pairwise model's sum is not 0."""
    prompt = policies.pad([[1, 2]], "left", END)
    answers = [policies.pad([row], "right", END) for row in FIRST]
    for pairwise in (True, False):
        model = build(pairwise)
        with torch.no_grad():
            around = (
                sum(model.gap(prompt, answers[k], answers[(k + 1) % 3]) for k in range(3))
                .abs()
                .item()
            )
        assert around > 1e-2 if pairwise else around < 1e-5, around


def test_rock_paper_scissors():
    """Trained on votes at 0.9 round the cycle, in random order: the pairwise model ends within 0.1 of 0.9 on all three (votes of
    300 steps are that noisy), Bradley-Terry has no reward for a cycle: the mean of its three p is 1/2 within 0.05, since the
    logits sum to 0, and it misses each by more than 0.25."""
    words = policies.word_tokenizer(["rock", "paper", "scissors", "?"])
    body = policies.build("tiny", words, 8, seed=0)
    prompt, response = (
        policies.pad([[4]] * 3, "left", END),
        policies.pad([[1, END], [2, END], [3, END]], "right", END),
    )
    winner, loser = torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2])
    for pairwise in (True, False):
        rng = torch.Generator().manual_seed(1)

        def comparisons(step, rng=rng):
            flip = torch.rand(3, generator=rng) < 0.5  # who stands first says nothing
            chance = torch.where(flip, 0.1, 0.9)
            return (
                prompt,
                response,
                torch.where(flip, loser, winner),
                torch.where(flip, winner, loser),
                chance,
                rng,
            )

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = PreferenceModel(body, pairwise)
        preference_model.fit(model, comparisons, 250, 1e-3, False, "cycle")
        p = model(prompt, *((response[0][k], response[1][k]) for k in (winner, loser)))
        if pairwise:
            assert (p - 0.9).abs().max() < 0.1, p
        else:
            assert abs(p.mean().item() - 0.5) < 0.05 and (p < 0.65).all(), p


def test_learns_a_plain_order():
    """Recorded winners (chance 1): both models put the better first with p > 0.9 after 60 steps, with the body trained too
    (finetune) or kept."""
    prompt, response = (
        policies.pad([[4]] * 2, "left", END),
        policies.pad([[1, END], [2, END]], "right", END),
    )
    chance = torch.ones(1)
    for pairwise in (True, False):
        for finetune in (True, False):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = PreferenceModel(
                    policies.build("tiny", policies.word_tokenizer(list("abcd")), 8, 0), pairwise
                )
            body = model.body.transformer.wte.weight.clone()
            rng = torch.Generator().manual_seed(0)
            pair = (torch.tensor([1]), torch.tensor([0]), chance, rng)
            preference_model.fit(
                model,
                lambda step, pair=pair: (prompt, response, *pair),
                60,
                1e-3,
                finetune,
                "order",
            )
            assert (
                model(
                    tuple(part[:1] for part in prompt),
                    *(tuple(part[k : k + 1] for part in response) for k in (1, 0)),
                ).item()
                > 0.9
            )
            assert torch.equal(body, model.body.transformer.wte.weight) != finetune


def test_frozen_and_in_eval_after_training_and_loading(tmp_path):
    """No parameter of a fitted or loaded model wants a gradient, none is in train mode, and p carries none."""
    prompt, y, other = batch()
    responses = policies.pad([*FIRST, *SECOND], "right", END)
    six = tuple(part.repeat(2, 1) for part in prompt)
    pairs = (
        torch.arange(3),
        torch.arange(3, 6),
        torch.full((3,), 0.7),
        torch.Generator().manual_seed(0),
    )
    fitted = preference_model.fit(
        build().train(), lambda step: (six, responses, *pairs), 2, 1e-3, True, "fit"
    )
    preference_model.save(fitted, tmp_path / "p")
    for model in (fitted, preference_model.load(tmp_path / "p")):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(prompt, y, other).requires_grad


@pytest.mark.parametrize("pairwise", [True, False])
def test_save_and_load(tmp_path, pairwise):
    """The loaded model has the same weights to the bit and the same preferences (1e-6: float32 kernels may choose another order of
    summation for another address), from config.json and safetensors alone."""
    model, arguments = build(pairwise), batch()
    preference_model.save(model, tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    loaded = preference_model.load(tmp_path / "kept")
    with torch.no_grad():
        torch.testing.assert_close(loaded(*arguments), model(*arguments), rtol=0, atol=1e-6)
    assert loaded.pairwise is pairwise
    assert all(
        torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items()
    )
    assert loaded.body.lm_head.weight is loaded.body.transformer.wte.weight, (
        "the head is tied to the embedding"
    )


def test_loading_says_what_is_wrong(tmp_path):
    """No folder, no weights, weights of something else: ValueError that names the folder, in one line."""
    model = build()
    for name in ("nowhere", "no_weights", "other"):
        if name != "nowhere":
            preference_model.save(model, tmp_path / name)
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    preference_model.save(build(False), tmp_path / "reward")
    (tmp_path / "other" / "model.safetensors").write_bytes(
        (tmp_path / "reward" / "model.safetensors").read_bytes()
    )
    for name in ("nowhere", "no_weights", "other"):
        with pytest.raises(ValueError, match=name) as error:
            preference_model.load(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("pairwise", [True, False])
def test_batch_and_padding_change_nothing(pairwise):
    """In float64, to 1e-10: every pair of a batch alone and unpadded, pads of another id, ten more pad columns on both sides,
    and junk behind the mask give the same logits."""
    model, (prompt, y, other) = build(pairwise, dtype=torch.float64), batch(4)
    with torch.no_grad():
        whole = model.gap(prompt, y, other)
        assert whole.dtype == torch.float64
        for row in range(3):
            alone = [
                policies.pad([tokens[row]], side, END)
                for tokens, side in ((PROMPTS, "left"), (FIRST, "right"), (SECOND, "right"))
            ]
            torch.testing.assert_close(model.gap(*alone), whole[row : row + 1], rtol=0, atol=1e-10)
        for fill in (0, 3):
            wide = torch.full((12, 10), fill)
            longer = (
                torch.cat([wide, prompt[0].masked_fill(~prompt[1], fill)], 1),
                torch.cat([wide > 9, prompt[1]], 1),
            )
            sides = [
                (torch.cat([ids.masked_fill(~mask, fill), wide], 1), torch.cat([mask, wide > 9], 1))
                for ids, mask in (y, other)
            ]
            torch.testing.assert_close(model.gap(longer, *sides), whole, rtol=0, atol=1e-10)


def test_accuracy_by_hand(monkeypatch):
    """Four held-out pairs with true p 0.9, 0.2, 0.5, 0.8 and guesses 0.6, 0.4, 0.9, 0.3: three have a sign and two of them are
    right; mean |p_hat - p| = (0.3 + 0.2 + 0.4 + 0.5)/4; lengths 1:2, 1:2, 1:2, 2:2: the shorter wins 1, 0 and (equal) 1/2 of the
    three with a sign. 1e-6: float32."""
    model = build()
    ids = torch.ones(8, 2, dtype=torch.long)
    mask = torch.tensor([[True, False]] * 3 + [[True, True]] * 5)
    guesses = torch.logit(torch.tensor([0.6, 0.4, 0.9, 0.3]))
    monkeypatch.setattr(model, "logit", lambda vector, vector_other: guesses)
    prompt = torch.ones(8, 1, dtype=torch.long), torch.ones(8, 1, dtype=torch.bool)
    chance = torch.tensor([0.9, 0.2, 0.5, 0.8])
    held_out = (prompt, (ids, mask), torch.arange(4), torch.arange(4, 8), chance, None)
    numbers = preference_model.accuracy(model, lambda step: held_out, 1)
    assert numbers["accuracy"] == pytest.approx(2 / 3, abs=1e-6) and numbers[
        "error"
    ] == pytest.approx(0.35, abs=1e-6)
    assert numbers["shorter_wins"] == pytest.approx(0.5, abs=1e-6) and numbers[
        "longer_wins"
    ] == pytest.approx(0.5, abs=1e-6)
    assert numbers["pairs"] == 4
