"""RSO (losses/rso.py): the exact law of its acceptance, its rows whoever shares them, its loss.

Algorithm 1 asks a coin for every candidate. Coins that answer by a script and remember what they
were asked make its law exact: all scripts are gone through, each with its probability.
"""

import itertools
import json
import math

import pytest
import torch

import dpo
import policy as policies
import preference_model
import sampler
import slic
import train
from job import report
from job.options import parse
from losses import rso
from reference_sampler import gpt2

DOUBLE = torch.float64
REWARDS = (0.2, 1.0, -0.5)


class Coin:
    """In place of a uniform number: below a probability or not by a script."""

    def __init__(self, script, asked):
        self.script, self.asked = script, asked

    def __lt__(self, chance):
        place = len(self.asked)
        assert place < 60, "an acceptance that does not end"
        self.asked.append(chance)
        return place >= len(self.script) or self.script[place]


def run_script(accept, rewards, count, script):
    """What an acceptance with scripted coins accepts, and the probabilities it asked for."""
    asked = []
    accepted = accept(list(rewards), count, lambda: Coin(script, asked))
    return tuple(accepted), asked


def law_of(accept, rewards, count):
    """{accepted, as a tuple in order: probability} of an acceptance, by all scripts of its coins.

    A coin behind the script's end falls below; each of those is turned over once.
    """
    law, scripts = {}, [[]]
    while scripts:
        script = scripts.pop()
        accepted, asked = run_script(accept, rewards, count, script)
        fell = script + [True] * (len(asked) - len(script))
        chance = 1.0
        for below, one in zip(fell, asked, strict=True):
            chance *= one if below else 1 - one
        law[accepted] = law.get(accepted, 0.0) + chance
        for place in range(len(script), len(asked)):
            if asked[place] < 1:
                scripts.append(fell[:place] + [False])
    return law


def by_hand(rewards, count, left=None, accepted=()):
    """The same law by the paper's words: a pass over those left is a product of coins."""
    left = tuple(range(len(rewards))) if left is None else left
    best = max(rewards[one] for one in left)
    found = {}
    for answers in itertools.product((True, False), repeat=len(left)):
        chance, taken = 1.0, []
        for one, answer in zip(left, answers, strict=True):
            p = math.exp((rewards[one] - best) / 0.5)
            chance *= p if answer else 1 - p
            taken += [one] if answer else []
        if chance == 0:
            continue
        now = accepted + tuple(taken)
        rest = tuple(one for one in left if one not in taken)
        further = {now[:count]: 1.0}  # who comes after the count-th is not asked any more
        if len(now) < count:
            further = by_hand(rewards, count, rest, now)
        for outcome, p in further.items():
            found[outcome] = found.get(outcome, 0.0) + chance * p
    return found


def assert_same_law(found, expected):
    assert found.keys() == expected.keys()
    for outcome, chance in expected.items():
        assert found[outcome] == pytest.approx(chance, abs=1e-12)


def uniforms_of(numbers):
    return iter(numbers).__next__


# Algorithm 1


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rewards", [REWARDS, (1.0, 0.9, 0.8, 0.4), (0.3, 0.3, 0.3)])
def test_the_exact_law_of_acceptance(rewards, count):
    law = law_of(rso.accept, rewards, count)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    assert_same_law(law, by_hand(rewards, count))


def test_three_candidates_by_hand():
    """r = 0.2, 1, -0.5, two wanted, T = 0.5. In the first pass e^-1.6, 1 and e^-3; whoever is
    accepted beside the 2nd is so there, or else the 1st, as the best of those left, in the second.
    """
    a, b = math.exp(-1.6), math.exp(-3.0)
    law = law_of(rso.accept, REWARDS, 2)
    expected = {(0, 1): a, (1, 2): (1 - a) * b, (1, 0): (1 - a) * (1 - b)}
    assert_same_law(law, expected)


def max_of_all(rewards, count, uniform):
    """Three passes at most: the best one gone, they might never end."""
    left, accepted = list(range(len(rewards))), []
    for _ in range(3):
        for one in list(left):
            if len(accepted) < count and uniform() < math.exp((rewards[one] - max(rewards)) / 0.5):
                accepted.append(one)
                left.remove(one)
    return accepted


def without_removal(rewards, count, uniform):
    accepted = []
    while len(accepted) < count:
        for one, reward in enumerate(rewards):
            if len(accepted) < count and uniform() < math.exp((reward - max(rewards)) / 0.5):
                accepted.append(one)
    return accepted


def wrong_sign(rewards, count, uniform):
    return rso.accept([-reward for reward in rewards], count, uniform)


def unscaled(rewards, count, uniform):
    return rso.accept([reward * 0.5 for reward in rewards], count, uniform)


@pytest.mark.parametrize("wrong", [max_of_all, without_removal, wrong_sign, unscaled])
def test_planted_mistakes_have_another_law(wrong):
    with pytest.raises(AssertionError):
        assert_same_law(law_of(wrong, REWARDS, 2), by_hand(REWARDS, 2))


def test_scripted_acceptance():
    """The first pass takes the 2nd alone, the second the 1st; exactly so many numbers are asked."""
    numbers = iter([0.5, 0.9, 0.3, 0.6, 0.2, 0.7])
    assert rso.accept([0.2, 1.0, -0.5, 0.7], 2, numbers.__next__) == [1, 0]
    assert list(numbers) == [0.7]
    assert rso.accept([0.2, 1.0], 1, uniforms_of([0.0])) == [0]
    assert rso.accept([0.2, 1.0], 1, uniforms_of([math.exp(-1.6), 0.99])) == [1], "not <="


def test_few_candidates_are_all_accepted():
    assert sorted(rso.accept([5.0, -700.0, 0.0], 8, uniforms_of([0.999] * 99))) == [0, 1, 2]
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            rso.accept([0.0, broken], 1, uniforms_of([0.5] * 9))


def test_the_accepted_law_of_many_candidates():
    """One accepted of K independent candidates, all tuples of three actions: within
    (1 - pi_ref(best))^K of pi_ref e^(r/T)/Z in total variation, and not there for K = 1.

    With the best among them r_max is what one would take without end, and the first pass accepts
    somebody; so only a sample without the best can differ.
    """
    ref = (0.3, 0.2, 0.5)
    target = [p * math.exp(r / 0.5) for p, r in zip(ref, REWARDS, strict=True)]
    target = [p / sum(target) for p in target]
    apart = []
    for candidates in range(1, 7):
        law = [0.0, 0.0, 0.0]
        for drawn in itertools.product(range(3), repeat=candidates):
            chance = math.prod(ref[action] for action in drawn)
            for (first,), p in law_of(rso.accept, [REWARDS[a] for a in drawn], 1).items():
                law[drawn[first]] += chance * p
        apart.append(sum(abs(p - q) for p, q in zip(law, target, strict=True)) / 2)
        assert apart[-1] <= (1 - ref[1]) ** candidates
    assert apart[0] > 0.2 and apart[-1] < 0.4 * apart[0]
    assert all(more < less for less, more in itertools.pairwise(apart))


def test_the_papers_share():
    assert [rso.accepted_of(count) for count in (2, 8, 16, 17, 24, 64)] == [2, 2, 2, 2, 3, 8]
    assert rso.distinct([[1, 0], [2], [1, 0], [1], [2]]) == [0, 1, 3]


# On tokens


PROMPT = policies.pad([[1, 2, 3], [2], [4, 4], [1]], "left", 0)


def reward(prompt, y):
    """Of a row's own tokens: the sum of its ids, some more for a long prompt."""
    return 0.3 * (y.ids * y.mask).sum(1).double() + 0.1 * prompt.lengths()


def drawn_with(uniforms, rows=slice(None), seed=0):
    names = ["reference"] * uniforms.shape[1]
    given = PROMPT.rows(rows), 0.0, uniforms[:, :, rows], reward
    return rso.draw_pairs(names, gpt2(seed), gpt2(1), *given)


def uniforms_for(count, tokens=4, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, count, rows, generator=generator, dtype=DOUBLE)


def test_the_drawn_are_candidates_accepted_by_the_algorithm():
    """Distinct candidates of each row, by the row's own generator: the same lists of tokens; the
    policy is not asked, and the accepted have more reward than the candidates."""
    uniforms = uniforms_for(24)
    found = drawn_with(uniforms)
    names = ["reference"] * 24
    candidates = sampler.draw_pairs(names, gpt2(0), gpt2(1), PROMPT, 0.0, uniforms)
    rewards = torch.stack([reward(PROMPT, response) for response in candidates], 1)
    lists = [response.lists() for response in candidates]
    assert len(found) == 3
    for row in range(4):
        seen, kept = [], []
        for column in range(24):
            if lists[column][row] not in seen:
                seen.append(lists[column][row])
                kept.append(rewards[row, column].item())
        generator = rso.random.Random(int(uniforms[-1, 0, row].item() * 2**53))
        accepted = rso.accept(kept, 3, generator.random)
        assert [response.lists()[row] for response in found] == [seen[one] for one in accepted]
        assert len({tuple(response.lists()[row]) for response in found}) == 3
    assert torch.stack([reward(PROMPT, one) for one in found], 1).mean() > rewards.mean()
    for one, other in zip(found, drawn_with(uniforms, seed=5), strict=True):
        assert torch.equal(one.ids, other.ids), "another policy changes nothing"


def test_a_row_accepts_the_same_whoever_shares_the_batch():
    """Any slice of the rows, and the rows in another order."""
    uniforms = uniforms_for(16)
    whole = [response.lists() for response in drawn_with(uniforms)]
    for rows in (slice(0, 2), slice(1, 4), torch.tensor([2, 0, 3, 1])):
        part = [response.lists() for response in drawn_with(uniforms, rows)]
        for found, expected in zip(part, whole, strict=True):
            order = torch.arange(4)[rows].tolist()
            assert found == [expected[row] for row in order]
    other = [response.lists() for response in drawn_with(uniforms_for(16, seed=1))]
    assert other != whole


def test_too_few_distinct_candidates():
    """A start that always ends at once: both are the one response there is, with no slope."""
    same = torch.full((1, 16, 4), 0.3, dtype=DOUBLE)  # one token, drawn by one number
    found = drawn_with(same)
    assert len(found) == 2 and found[0].lists() == found[1].lists()
    label = rso.label_pairs(reward, PROMPT, *found)
    assert torch.equal(label, torch.full((4, 2, 2), 0.5, dtype=DOUBLE))
    options = parse(["--loss", "rso", "--device", "cpu"])
    policy = gpt2(0)
    value, _ = rso.pair_losses(options, rso, policy, gpt2(1), PROMPT, *found, label)
    value.sum().backward()
    assert max(part.grad.abs().max() for part in policy.parameters()) < 1e-15


def test_labels_are_bradley_terrys():
    found = drawn_with(uniforms_for(24))
    label = rso.label_pairs(reward, PROMPT, *found)
    for first in range(3):
        for second in range(3):
            gap = reward(PROMPT, found[first]) - reward(PROMPT, found[second])
            torch.testing.assert_close(label[:, first, second], torch.sigmoid(gap))
    assert not label.requires_grad


# The loss


def groups_of(seed=0, count=20, responses=3):
    generator = torch.Generator().manual_seed(seed)
    logp, ref_logp = -5 * torch.rand(2, count, responses, generator=generator, dtype=DOUBLE)
    rewards = torch.randn(count, responses, generator=generator, dtype=DOUBLE)
    return logp, ref_logp, torch.sigmoid(rewards[:, :, None] - rewards[:, None]), rewards


@pytest.mark.parametrize("hinge, expected", [(0, math.log(2)), (1, 1.0)])
def test_the_value_at_the_start(hinge, expected):
    logp, _, preferences, _ = groups_of()
    value = rso.loss(logp, logp, preferences, 0.05, hinge=hinge)
    torch.testing.assert_close(value, torch.full_like(value, expected), rtol=1e-14, atol=0)


def test_a_value_by_hand():
    """h = 2, tau = 0.05, p = 0.75: z = 0.1. For the hinge 0.75 * 0.9 + 0.25 * 1.1."""
    logp, ref_logp = torch.tensor([[[-2.0, -3.0]], [[-4.0, -3.0]]], dtype=DOUBLE)
    p = torch.tensor([[[0.5, 0.75], [0.25, 0.5]]], dtype=DOUBLE)
    expected = 0.75 * math.log(1 + math.exp(-0.1)) + 0.25 * math.log(1 + math.exp(0.1))
    assert rso.loss(logp, ref_logp, p, 0.05).item() == pytest.approx(expected, rel=1e-12)
    assert rso.loss(logp, ref_logp, p, 0.05, hinge=1).item() == pytest.approx(0.95, rel=1e-12)
    with pytest.raises(ValueError, match="hinge=2: give 0"):
        rso.loss(logp, ref_logp, p, 0.05, hinge=2)


@pytest.mark.parametrize("hinge", [0, 1])
def test_the_mean_over_pairs(hinge):
    """Of dpo.loss or slic.loss, by a loop; in whatever order the responses come."""
    logp, ref_logp, p, _ = groups_of(responses=4)
    of_pair, total = (slic if hinge else dpo).loss, 0.0
    for i, j in itertools.combinations(range(4), 2):
        sides = logp[:, i], logp[:, j], ref_logp[:, i], ref_logp[:, j]
        total += of_pair(*sides, p[:, i, j], 0.4) / 6
    value = rso.loss(logp, ref_logp, p, 0.4, hinge=hinge)
    torch.testing.assert_close(value, total, rtol=1e-12, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    turned = rso.loss(
        logp[:, order], ref_logp[:, order], p[:, order][:, :, order], 0.4, hinge=hinge
    )
    torch.testing.assert_close(value, turned, rtol=1e-12, atol=0)


@pytest.mark.parametrize("hinge", [0, 1])
def test_slopes_by_finite_differences(hinge):
    logp, ref_logp, p, _ = groups_of()
    logp = logp.requires_grad_()
    slope = torch.autograd.grad(rso.loss(logp, ref_logp, p, 0.4, hinge=hinge).sum(), logp)[0]
    assert slope.sum(1).abs().max() < 1e-12, "a constant of the group cancels"
    for place in range(3):
        ends = []
        for sign in (1, -1):
            moved = logp.detach().clone()
            moved[:, place] += sign * 1e-6
            ends.append(rso.loss(moved, ref_logp, p, 0.4, hinge=hinge))
        numeric = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(slope[:, place], numeric, rtol=1e-7, atol=1e-8)


def test_every_group_stops_at_the_rlhf_policy():
    """At log pi = log pi_ref + r/tau + c no group has a slope, so it is the point whoever drew."""
    _, ref_logp, p, rewards = groups_of()
    logp = (ref_logp + rewards / 0.4 + 0.7).requires_grad_()
    slope = torch.autograd.grad(rso.loss(logp, ref_logp, p, 0.4).sum(), logp)[0]
    assert slope.abs().max() < 1e-15
    other = (ref_logp + rewards / 0.5).requires_grad_()
    assert torch.autograd.grad(rso.loss(other, ref_logp, p, 0.4).sum(), other)[0].abs().max() > 1e-3


# In the trainer


FEW = "--loss rso --supervised-steps 5 --preference-steps 5 --steps 5 --batch-size 4".split()
FEW += "--eval-prompts 8 --device cpu --responses 8".split()


@pytest.mark.slow
def test_five_steps(tmp_path, monkeypatch, capsys):
    """Through the trainer: candidates of the start, two of eight accepted, shown and learned from;
    in micro-batches the same numbers."""
    monkeypatch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
    asked = []
    answer = preference_model.PreferenceModel.reward

    def counted(self, prompt, response):
        asked.append(len(response.ids))
        return answer(self, prompt, response)

    monkeypatch.setattr(preference_model.PreferenceModel, "reward", counted)
    lines = {}
    for name, more in (("whole", ["--show"]), ("parts", ["--micro-batch-size", "1"])):
        given = [*FEW, "--stages", str(tmp_path / "stages"), "--out", str(tmp_path / name), *more]
        assert train.main(given) == 0
        metrics = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines[name] = [line for line in map(json.loads, metrics) if "loss" in line]
    out = capsys.readouterr()
    assert "a group from the reference (8)" in out.out and "contrastive yes" in out.out
    assert "y2 (reference)" in out.err + out.out and "y3 (" not in out.err + out.out
    assert len(asked) == 2 * 5 * (8 + 2)  # the candidates, and once more those accepted
    for whole, part in zip(lines["whole"], lines["parts"], strict=True):
        assert whole["loss"] == pytest.approx(part["loss"], rel=1e-5)
        assert whole["length"] == part["length"] and whole["label"] == pytest.approx(0.5)
    assert len(lines["whole"]) == 5 and lines["whole"][0]["loss"] == pytest.approx(math.log(2))
    assert lines["whole"][-1]["log_ratio"] != 0


def test_what_is_refused():
    for argv, advice in (
        (["--responses", "1"], "takes 2 or more"),
        (["--offline"], "learns from its own samples"),
        (["--set", "gamma=1"], "it has: hinge=0"),
    ):
        with pytest.raises(ValueError, match=advice):
            parse(["--loss", "rso", *argv])
    assert parse(["--loss", "rso"]).responses == 16
    assert report.is_group(rso)
