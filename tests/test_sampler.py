"""The sampler against exact enumeration, against the slow sampler without a cache, and what it must not do."""

import math
from types import SimpleNamespace

import pytest
import torch
from reference_sampler import END, constant_gpt2, every_response, gpt2, uncached_sample

import policy as policies
import sampler

PROMPTS = [[1, 2, 3, 2], [2], [3, 1]]  # left padding by 0, 3 and 2 columns


@pytest.fixture(scope="module")
def pair():
    return gpt2(0), gpt2(1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rows(tokens):
    """The responses of a sample as lists of ids, masks applied."""
    return [row[keep].tolist() for row, keep in zip(tokens[0], tokens[1], strict=True)]


def chi_square(counts, law):
    """Pearson's statistic of counts (response -> number) against law (response -> probability)."""
    total = sum(counts.values())
    assert set(counts) <= set(law), "a response that cannot be drawn"
    return sum(
        (counts.get(response, 0) - total * p) ** 2 / (total * p) for response, p in law.items()
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distribution_against_enumeration(beta):
    """10,000 responses to each of two prompts, one of them padded by two columns: end-of-text and two words, at most 3 tokens,
    15 responses, whose exact probabilities under the per-token mixture come from transformers, row by row, unpadded.

    Pearson's chi-square with 14 degrees of freedom is above 55.5 once in a million (Wilson-Hilferty at z = 4.75), so the six
    comparisons here raise a false alarm with probability 6e-6 (every expected count is above 20). The other betas, whose laws are the mistakes (an inverted
    weight, one model only), and the arithmetic mixture fail the same test, so it can tell them apart.
    """
    policy, reference = (gpt2(seed, vocabulary=3, spread=0.2) for seed in (2, 3))
    prompts = [[1, 2, 1], [2]]
    ids, mask = policies.pad(prompts * 10000, "left", END)
    drawn = rows(sampler.sample(policy, reference, (ids, mask), beta, seeded(1), max_tokens=3))
    for row, prompt in enumerate(prompts):
        counts = {}
        for response in map(tuple, drawn[row::2]):
            counts[response] = counts.get(response, 0) + 1
        law = every_response(policy, reference, prompt, beta, 3)
        assert (
            len(law) == 15
            and sum(law.values()) == pytest.approx(1, abs=1e-12)
            and min(law.values()) * 10000 > 20
        )
        assert chi_square(counts, law) < 55.5, f"beta = {beta} is not drawn after {prompt}"
        for other in {0.0, 0.3, 0.7, 1.0} - {beta}:
            assert chi_square(counts, every_response(policy, reference, prompt, other, 3)) > 55.5, (
                f"{beta} cannot be told from {other}"
            )


@pytest.mark.parametrize("beta", [0.0, 0.125, 1.0])
def test_first_token_frequencies_by_hand(beta):
    """Two constant laws, 20,000 first tokens: every frequency within 5 standard errors of p^(1-beta) q^beta / Z (false alarm 3 x 6e-7).
    The arithmetic mixture at 0.125 is more than 15 standard errors away."""
    p, q = torch.tensor([[0.8, 0.05, 0.15], [0.05, 0.75, 0.2]], dtype=torch.float64)
    prompt = policies.pad([[1]] * 20000, "left", END)
    ids, _, _ = sampler.sample(
        constant_gpt2(p.log()), constant_gpt2(q.log()), prompt, beta, seeded(0), max_tokens=1
    )
    frequency = ids[:, 0].bincount(minlength=3) / 20000
    geometric = p ** (1 - beta) * q**beta
    law = geometric / geometric.sum()
    error = (law * (1 - law) / 20000).sqrt()
    assert ((frequency - law).abs() < 5 * error).all()
    if beta == 0.125:
        assert ((frequency - (0.875 * p + 0.125 * q)).abs() > 15 * error).any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, (0.0, 0.3), (0.5, 0.0, 1.0)], ids=str)
def test_against_the_sampler_without_a_cache(pair, beta):
    """The same uniforms through the slow sampler, which has no cache, no batch and no padding: the same responses, token by
    token, with rows that end at different steps and rows that are cut. In float64 the two disagree only if a uniform falls
    within some 1e-14 of an edge."""
    slow, _ = uncached_sample(*pair, PROMPTS, beta, seeded(4), 9)
    fast = sampler.sample(*pair, policies.pad(PROMPTS, "left", END), beta, seeded(4), 9)
    assert rows(fast) == slow
    assert fast[2].tolist() == [response[-1] == END for response in slow]


@pytest.mark.parametrize("beta", [0.0, 0.3, (0.0, 0.3)], ids=str)
def test_cached_logits_at_every_step(pair, beta, monkeypatch):
    """The log-law that the sampler draws from, at every step and for every row that is still running, against the slow
    sampler's: 1e-12. A shared cache, positions that count pads, or a finished row that disturbs others would be of order 1."""
    laws, draw = [], sampler.draw

    def record(logits, uniform):
        laws.append(torch.log_softmax(logits, -1))
        return draw(logits, uniform)

    monkeypatch.setattr(sampler, "draw", record)
    fast = sampler.sample(*pair, policies.pad(PROMPTS, "left", END), beta, seeded(4), 9)
    slow, slow_laws = uncached_sample(*pair, PROMPTS, beta, seeded(4), 9)
    assert len({len(response) for response in slow}) >= 2, "rows must end at different steps"
    for row, row_laws in enumerate(slow_laws):
        for step, law in enumerate(row_laws):
            torch.testing.assert_close(laws[step][row], law, rtol=0, atol=1e-12)
    assert len(laws) == fast[0].shape[1]


def test_cached_model_against_transformers(pair):
    """One Stream fed fixed tokens, left-padded rows: its logits at every step against transformers on the whole prefix with
    mask and positions, 1e-11 (logits of order 10). Both models at once, to catch a cache that they share."""
    prompt, tokens = (
        policies.pad(PROMPTS, "left", END),
        torch.tensor([[4, END, 3, 1, 2], [1, 1, 1, END, 4], [3, 2, END, END, 1]]),
    )
    weight = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        streams = [sampler.Stream(model, torch.arange(3), weight, prompt, 5) for model in pair]
    for step in range(6):
        ids = torch.cat([prompt[0], tokens[:, :step]], 1)
        mask = torch.cat([prompt[1], torch.ones(3, step, dtype=torch.bool)], 1)
        for model, stream in zip(pair, streams, strict=True):
            with torch.no_grad():
                exact = model(
                    ids, attention_mask=mask.long(), position_ids=policies.positions(mask)
                ).logits[:, -1]
            torch.testing.assert_close(stream.logits, exact, rtol=0, atol=1e-11)
            if step < 5:
                with torch.no_grad():
                    stream.advance(tokens[:, step])


def test_drawn_probability_is_the_scored_one(pair, monkeypatch):
    """log_prob of a response equals the sum of the log-probabilities it was drawn with at beta = 0: 1e-12. Temperature, top-k
    or stale weights in the sampler would show here."""
    chances, draw = [], sampler.draw

    def record(logits, uniform):
        token = draw(logits, uniform)
        chances.append(torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0])
        return token

    monkeypatch.setattr(sampler, "draw", record)
    prompt = policies.pad(PROMPTS * 5, "left", END)
    tokens = sampler.sample(pair[0], None, prompt, 0.0, seeded(0), 9)
    total = (torch.stack(chances, 1) * tokens[1]).sum(1)
    torch.testing.assert_close(
        total, policies.log_prob(pair[0], prompt, tokens).detach(), rtol=0, atol=1e-12
    )


def test_plain_sampling_never_runs_the_reference(pair):
    """beta = 0 with no reference at all; beta = 1 with a policy that has a configuration and nothing else."""
    prompt = policies.pad(PROMPTS, "left", END)
    sampler.sample(pair[0], None, prompt, 0.0, seeded(0), 4)
    sampler.sample(pair[0], None, prompt, (0.0, 0.0), seeded(0), 4)
    one = sampler.sample(SimpleNamespace(config=pair[0].config), pair[1], prompt, 1.0, seeded(0), 4)
    assert rows(one) == rows(sampler.sample(pair[1], None, prompt, 0.0, seeded(0), 4)), (
        "beta = 1 is the reference"
    )


def test_work_done(pair, monkeypatch):
    """What runs, in rows and columns: every prompt once for each model, however many responses are wanted; then one token a
    step for the rows that a model serves; and the loop ends when all rows have."""
    calls, forward = [], sampler.forward

    def record(model, ids, *rest):
        calls.append((pair.index(model), *ids.shape))
        return forward(model, ids, *rest)

    monkeypatch.setattr(sampler, "forward", record)
    ids, _, finished = sampler.sample(
        *pair, policies.pad(PROMPTS, "left", END), (0.0, 0.3), seeded(4), 9
    )
    steps = ids.shape[1] - 1
    assert calls == [(0, 3, 4), (1, 3, 4)] + [(0, 6, 1), (1, 3, 1)] * steps
    calls.clear()
    short = constant_gpt2([5.0, 0.0, 0.0])  # ends soon: 0.99 a token
    monkeypatch.setattr(
        sampler,
        "forward",
        lambda model, ids, *rest: calls.append(ids.shape) or forward(model, ids, *rest),
    )
    ids, _, finished = sampler.sample(
        short, None, policies.pad([[1]] * 20, "left", END), 0.0, seeded(0), 20
    )
    assert finished.all() and len(calls) == ids.shape[1] < 6


def test_ends_and_limits(pair):
    """A finished row ends with its only end-of-text and its mask with it; a cut row has the limit's length and none.
    A mask is a prefix of True. Both kinds must occur in 300 rows."""
    ids, mask, finished = sampler.sample(
        pair[0], None, policies.pad(PROMPTS * 100, "left", END), 0.0, seeded(0), 5
    )
    assert finished.any() and not finished.all() and ids.shape == mask.shape == (300, 5)
    for row, response in enumerate(rows((ids, mask))):
        assert mask[row, : len(response)].all()
        if finished[row]:
            assert response[-1] == END and END not in response[:-1]
        else:
            assert END not in response and len(response) == 5


def test_an_end_in_the_prompt_ends_nothing():
    """GPT-2's pad is its end-of-text, and a prompt may hold it: a model that always says 2 goes on to the limit, unfinished."""
    stubborn = constant_gpt2([-50.0, 0.0, 50.0])
    ids, mask, finished = sampler.sample(
        stubborn, None, policies.pad([[1, END, 2], [END]], "left", END), 0.0, seeded(0), 6
    )
    assert (ids == 2).all() and mask.all() and not finished.any()


def test_generator_decides(pair):
    """One seed gives the same responses whatever the global random state, which is left alone; another seed gives others.
    A longer limit continues what a shorter one cut."""
    prompt = policies.pad(PROMPTS * 3, "left", END)
    torch.manual_seed(0)
    first, state = sampler.sample(*pair, prompt, 0.3, seeded(5), 6), torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(9)
    again, other = (sampler.sample(*pair, prompt, 0.3, seeded(seed), 6) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and rows(
        first
    ) != rows(other)
    longer = rows(sampler.sample(*pair, prompt, 0.3, seeded(5), 12))
    assert [response[:6] for response in longer] == rows(first) and longer != rows(first)


def test_pads_change_no_draw(pair):
    """The same prompts with two more columns of padding, filled with another id: the same responses. In float64 the law moves
    by 1e-15 only."""
    ids, mask = policies.pad(PROMPTS, "left", END)
    wide = (
        torch.cat([torch.full((3, 2), 4), ids.masked_fill(~mask, 3)], 1),
        torch.cat([torch.zeros(3, 2, dtype=torch.bool), mask], 1),
    )
    assert rows(sampler.sample(*pair, wide, 0.3, seeded(7), 8)) == rows(
        sampler.sample(*pair, (ids, mask), 0.3, seeded(7), 8)
    )


def test_weights_of_two_responses(pair):
    """(0, 1): the first responses are the policy's draws and the second the reference's, from one run. Constant models that
    always say 1 or 2 show who spoke; in between, (0, 0) and 0 on doubled prompts draw the same."""
    one, two = constant_gpt2([-50.0, 50.0, 0.0]), constant_gpt2([-50.0, 0.0, 50.0])
    prompt = policies.pad([[1], [2, 1]], "left", END)
    ids, _, _ = sampler.sample(one, two, prompt, (0.0, 1.0), seeded(0), 3)
    assert (ids[:2] == 1).all() and (ids[2:] == 2).all()
    doubled = tuple(part.repeat(2, 1) for part in prompt)
    assert rows(sampler.sample(pair[0], None, prompt, (0.0, 0.0), seeded(0), 6)) == rows(
        sampler.sample(pair[0], None, doubled, 0.0, seeded(0), 6)
    )


def test_no_gradient_through_sampling(pair):
    """A sample carries no graph, and the models' weights are as before."""
    before = pair[0].transformer.wte.weight.clone()
    ids, _, _ = sampler.sample(*pair, policies.pad(PROMPTS, "left", END), 0.3, seeded(0), 4)
    assert not ids.requires_grad and torch.equal(before, pair[0].transformer.wte.weight)


def test_half_precision_is_raised_before_the_softmax(pair):
    """bfloat16 weights: the logits that are mixed and drawn from are float32, and the float64 model's stay float64."""
    prompt = policies.pad(PROMPTS, "left", END)
    half = gpt2(0).bfloat16()
    weight = torch.ones(3, dtype=torch.float64)
    for model, dtype in ((half, torch.float32), (pair[0], torch.float64)):
        with torch.no_grad():
            stream = sampler.Stream(model, torch.arange(3), weight, prompt, 2)
            stream.advance(torch.tensor([1, 2, 3]))
        assert sampler.mix([stream], 3).dtype == dtype
    assert rows(sampler.sample(half, half, prompt, 0.3, seeded(0), 3))


def test_autocast_casts_the_weights_once(pair):
    """Under autocast the sampler runs a bfloat16 copy, its cache is bfloat16 and its law close; the model itself stays as it was."""
    prompt, model = policies.pad(PROMPTS, "left", END), gpt2(0, spread=0.2).float()
    assert sampler.lower(model) is model
    streams = []
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            streams.append(
                sampler.Stream(
                    sampler.lower(model),
                    torch.arange(3),
                    torch.ones(3, dtype=torch.float64),
                    prompt,
                    2,
                )
            )
    assert [stream.cache.dtype for stream in streams] == [
        torch.bfloat16,
        torch.float32,
    ] and model.dtype == torch.float32
    laws = [torch.log_softmax(stream.logits, -1) for stream in streams]
    assert 1e-6 < (laws[0] - laws[1]).abs().max() < 0.05


def test_draw_by_hand():
    """Inverse distribution function of (0.2, 0, 0.8): below 0.2 the first, from 0.2 on the third, never the second, also at the
    ends 0 and just below 1."""
    logits = torch.tensor([[0.2, 0.0, 0.8]], dtype=torch.float64).log()
    for uniform, token in ((0.0, 0), (0.19999, 0), (0.20001, 2), (1 - 2**-53, 2)):
        assert sampler.draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() == token
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for uniform in (0.0, 1 - 2**-53):
        assert sampler.draw(impossible, torch.tensor([uniform], dtype=torch.float64)).item() == 1
