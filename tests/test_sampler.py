"""The sampler against exact enumeration and a slow sampler without a cache; what it must not do."""

import math
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import policy as policies
import sampler
from reference_sampler import END, constant_gpt2, every_response, gpt2, uncached_sample

PROMPTS = [[1, 2, 3, 2], [2], [3, 1]]  # left padding by 0, 3 and 2 columns


@pytest.fixture(scope="module")
def pair():
    return gpt2(0), gpt2(1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rows(tokens):
    """The responses of a sample (ids, mask, ...) as lists of ids, masks applied."""
    ids, mask = tokens[:2]
    return policies.Tokens(ids, mask).lists()


def left(prompts):
    """Lists of ids as prompts."""
    return policies.pad(prompts, "left", END)


def chi_square(counts, law):
    """Pearson's statistic of counts (response -> number) against law (response -> probability)."""
    total = sum(counts.values())
    assert set(counts) <= set(law), "a response that cannot be drawn"
    statistic = 0.0
    for response, p in law.items():
        expected = total * p
        statistic += (counts.get(response, 0) - expected) ** 2 / expected
    return statistic


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distribution_against_enumeration(beta):
    """10,000 responses to each of two prompts, one of them padded by two columns.

    End-of-text and two words, at most 3 tokens: 15 responses, whose exact probabilities under the
    per-token mixture come from transformers, row by row, unpadded.
    Pearson's chi-square with 14 degrees of freedom is above 55.5 once in a million (Wilson-Hilferty
    at z = 4.75), so the six comparisons here raise a false alarm with probability 6e-6 (every
    expected count is above 20). The other betas, whose laws are the mistakes (an inverted weight,
    one model only), and the arithmetic mixture fail the same test, so it can tell them apart.
    """
    policy = gpt2(2, vocabulary=3, spread=0.2)
    reference = gpt2(3, vocabulary=3, spread=0.2)
    prompts = [[1, 2, 1], [2]]
    sampled = sampler.sample(policy, reference, left(prompts * 10000), beta, seeded(1), 3)
    drawn = rows(sampled)
    for row, prompt in enumerate(prompts):
        counts = Counter(tuple(response) for response in drawn[row::2])
        law = every_response(policy, reference, prompt, beta, 3)
        assert len(law) == 15
        assert sum(law.values()) == pytest.approx(1, abs=1e-12)
        assert min(law.values()) * 10000 > 20
        assert chi_square(counts, law) < 55.5, f"beta = {beta} is not drawn after {prompt}"
        for other in {0.0, 0.3, 0.7, 1.0} - {beta}:
            wrong = every_response(policy, reference, prompt, other, 3)
            assert chi_square(counts, wrong) > 55.5, f"{beta} cannot be told from {other}"


@pytest.mark.parametrize("beta", [0.0, 0.125, 1.0])
def test_first_token_frequencies_by_hand(beta):
    """Two constant laws, 20,000 first tokens: frequencies are p^(1-beta) q^beta / Z.

    Each within 5 standard errors (false alarm 3 x 6e-7). The arithmetic mixture at 0.125 is more
    than 15 standard errors away.
    """
    p, q = torch.tensor([[0.8, 0.05, 0.15], [0.05, 0.75, 0.2]], dtype=torch.float64)
    policy, reference = constant_gpt2(p.log()), constant_gpt2(q.log())
    prompt = left([[1]] * 20000)
    ids, _, _ = sampler.sample(policy, reference, prompt, beta, seeded(0), max_tokens=1)
    frequency = ids[:, 0].bincount(minlength=3) / 20000
    geometric = p ** (1 - beta) * q**beta
    law = geometric / geometric.sum()
    error = (law * (1 - law) / 20000).sqrt()
    assert ((frequency - law).abs() < 5 * error).all()
    if beta == 0.125:
        assert ((frequency - (0.875 * p + 0.125 * q)).abs() > 15 * error).any()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, (0.0, 0.3), (0.5, 0.0, 1.0)], ids=str)
def test_against_the_sampler_without_a_cache(pair, beta):
    """The same uniforms through the slow sampler: the same responses, token by token.

    That one has no cache, no batch and no padding. Rows end at different steps, and some are cut.
    In float64 the two disagree only if a uniform falls within some 1e-14 of an edge.
    """
    slow, _ = uncached_sample(*pair, PROMPTS, beta, seeded(4), 9)
    fast = sampler.sample(*pair, left(PROMPTS), beta, seeded(4), 9)
    assert rows(fast) == slow
    assert fast[2].tolist() == [response[-1] == END for response in slow]


@pytest.mark.parametrize("beta", [0.0, 0.3, (0.0, 0.3)], ids=str)
def test_cached_logits_at_every_step(pair, beta, monkeypatch):
    """The log-law that the sampler draws from, at every step and running row: 1e-12.

    Against the slow sampler's. A shared cache, positions that count pads, or a finished row that
    disturbs others would be of order 1.
    """
    laws = []
    draw = sampler.draw

    def record(logits, uniform):
        laws.append(torch.log_softmax(logits, -1))
        return draw(logits, uniform)

    monkeypatch.setattr(sampler, "draw", record)
    fast = sampler.sample(*pair, left(PROMPTS), beta, seeded(4), 9)
    slow, slow_laws = uncached_sample(*pair, PROMPTS, beta, seeded(4), 9)
    assert len({len(response) for response in slow}) >= 2, "rows must end at different steps"
    for row, row_laws in enumerate(slow_laws):
        for step, law in enumerate(row_laws):
            torch.testing.assert_close(laws[step][row], law, rtol=0, atol=1e-12)
    assert len(laws) == fast[0].shape[1]


def test_cached_model_against_transformers(pair):
    """One Stream fed fixed tokens, left-padded rows: its logits at every step.

    Against transformers on the whole prefix with mask and positions, 1e-11 (logits of order 10).
    Both models at once, to catch a cache that they share.
    """
    prompt = left(PROMPTS)
    tokens = torch.tensor([[4, END, 3, 1, 2], [1, 1, 1, END, 4], [3, 2, END, END, 1]])
    weight = torch.ones(3, dtype=torch.float64)
    with torch.no_grad():
        streams = [sampler.Stream(model, torch.arange(3), weight, prompt, 5) for model in pair]
    for step in range(6):
        ids = torch.cat([prompt.ids, tokens[:, :step]], 1)
        mask = torch.cat([prompt.mask, torch.ones(3, step, dtype=torch.bool)], 1)
        given = dict(attention_mask=mask.long(), position_ids=policies.positions(mask))
        for model, stream in zip(pair, streams, strict=True):
            with torch.no_grad():
                exact = model(ids, **given).logits[:, -1]
            torch.testing.assert_close(stream.logits, exact, rtol=0, atol=1e-11)
            if step < 5:
                with torch.no_grad():
                    stream.advance(tokens[:, step])


def test_drawn_probability_is_the_scored_one(pair, monkeypatch):
    """log_prob of a response is the sum of the log-probabilities it was drawn with: 1e-12.

    At beta = 0. Temperature, top-k or stale weights in the sampler would show here.
    """
    drawn = []
    draw = sampler.draw

    def record(logits, uniform):
        token = draw(logits, uniform)
        drawn.append(torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0])
        return token

    monkeypatch.setattr(sampler, "draw", record)
    prompt = left(PROMPTS * 5)
    ids, mask, _ = sampler.sample(pair[0], None, prompt, 0.0, seeded(0), 9)
    total = (torch.stack(drawn, 1) * mask).sum(1)
    scored = policies.log_prob(pair[0], prompt, policies.Tokens(ids, mask)).detach()
    torch.testing.assert_close(total, scored, rtol=0, atol=1e-12)


def test_plain_sampling_never_runs_the_reference(pair):
    """beta = 0 with no reference at all; beta = 1 with a policy that is a configuration only."""
    prompt = left(PROMPTS)
    sampler.sample(pair[0], None, prompt, 0.0, seeded(0), 4)
    sampler.sample(pair[0], None, prompt, (0.0, 0.0), seeded(0), 4)
    hollow = SimpleNamespace(config=pair[0].config)
    one = sampler.sample(hollow, pair[1], prompt, 1.0, seeded(0), 4)
    plain = sampler.sample(pair[1], None, prompt, 0.0, seeded(0), 4)
    assert rows(one) == rows(plain), "beta = 1 is the reference"


def test_work_done(pair, monkeypatch):
    """What runs, in rows and columns: every prompt once for each model, whatever is wanted of it.

    Then one token a step for the rows that a model serves; and the loop ends when all rows have.
    """
    short = constant_gpt2([5.0, 0.0, 0.0])  # ends soon: 0.99 a token
    models = [*pair, short]
    calls = []
    run_model = policies.run_model

    def record(model, ids, *rest):
        calls.append((models.index(model), *ids.shape))
        return run_model(model, ids, *rest)

    monkeypatch.setattr(policies, "run_model", record)
    ids, _, finished = sampler.sample(*pair, left(PROMPTS), (0.0, 0.3), seeded(4), 9)
    steps = ids.shape[1] - 1
    assert calls == [(0, 3, 4), (1, 3, 4)] + [(0, 6, 1), (1, 3, 1)] * steps
    calls.clear()
    ids, _, finished = sampler.sample(short, None, left([[1]] * 20), 0.0, seeded(0), 20)
    assert finished.all() and len(calls) == ids.shape[1] < 6


def test_ends_and_limits(pair):
    """A finished row ends with its only end-of-text and its mask with it.

    A cut row has the limit's length and none. A mask is a prefix of True. Both kinds must occur in
    300 rows.
    """
    ids, mask, finished = sampler.sample(pair[0], None, left(PROMPTS * 100), 0.0, seeded(0), 5)
    assert finished.any() and not finished.all() and ids.shape == mask.shape == (300, 5)
    for row, response in enumerate(rows((ids, mask))):
        assert mask[row, : len(response)].all()
        if finished[row]:
            assert response[-1] == END and END not in response[:-1]
        else:
            assert END not in response and len(response) == 5


def test_any_of_several_ends_a_response():
    """A law of two words and two end tokens, of which the first is the tokenizer's: a response ends
    at either, which belongs to it; both occur, and no word follows one."""
    model = constant_gpt2([0.0, 0.0, 0.0, 0.0])
    model.config.eos_token_id = [END, 3]
    ids, mask, finished = sampler.sample(model, None, left([[1]] * 60), 0.0, seeded(0), 8)
    last = set()
    for response, done in zip(rows((ids, mask)), finished.tolist(), strict=True):
        assert not {END, 3} & set(response[:-1]) and done == (response[-1] in (END, 3))
        last.add(response[-1])
    assert {END, 3} <= last and (ids[~mask] == END).all()


def test_an_end_in_the_prompt_ends_nothing():
    """GPT-2's pad is its end-of-text, and a prompt may hold it.

    A model that always says 2 goes on to the limit, unfinished.
    """
    stubborn = constant_gpt2([-50.0, 0.0, 50.0])
    prompt = left([[1, END, 2], [END]])
    ids, mask, finished = sampler.sample(stubborn, None, prompt, 0.0, seeded(0), 6)
    assert (ids == 2).all() and mask.all() and not finished.any()


def assert_same(one, other):
    """Two samples are equal: ids, masks and what is finished."""
    for part, other_part in zip(one, other, strict=True):
        assert torch.equal(part, other_part)


def test_generator_decides(pair):
    """One seed gives the same responses whatever the global random state, which is left alone.

    Another seed gives others. A longer limit continues what a shorter one cut.
    """
    prompt = left(PROMPTS * 3)
    torch.manual_seed(0)
    first = sampler.sample(*pair, prompt, 0.3, seeded(5), 6)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(9)
    assert_same(first, sampler.sample(*pair, prompt, 0.3, seeded(5), 6))
    assert rows(first) != rows(sampler.sample(*pair, prompt, 0.3, seeded(6), 6))
    longer = rows(sampler.sample(*pair, prompt, 0.3, seeded(5), 12))
    assert [response[:6] for response in longer] == rows(first) and longer != rows(first)


def test_pads_change_no_draw(pair):
    """The same prompts with two more columns of padding, filled with another id.

    The same responses: in float64 the law moves by 1e-15 only.
    """
    prompt = left(PROMPTS)
    more_ids = torch.cat([torch.full((3, 2), 4), prompt.ids.masked_fill(~prompt.mask, 3)], 1)
    more_mask = torch.cat([torch.zeros(3, 2, dtype=torch.bool), prompt.mask], 1)
    wide = policies.Tokens(more_ids, more_mask)
    narrow = sampler.sample(*pair, prompt, 0.3, seeded(7), 8)
    assert rows(sampler.sample(*pair, wide, 0.3, seeded(7), 8)) == rows(narrow)


@pytest.mark.parametrize("beta", [0.0, 0.3, (0.0, 0.3), (0.5, 0.0, 1.0)], ids=str)
def test_given_uniforms_are_the_generators(pair, beta):
    """With the uniforms that a generator would draw, and no generator: the same responses.

    A plain (ids, mask) will do for a prompt.
    """
    prompt = left(PROMPTS)
    count = len(beta) if isinstance(beta, tuple) else 1
    uniforms = torch.rand(9, 3 * count, generator=seeded(4), dtype=torch.float64)
    before = uniforms.clone()
    drawn = sampler.sample(*pair, prompt, beta, seeded(4), 9)
    assert_same(sampler.sample(*pair, prompt, beta, None, 9, uniforms=uniforms), drawn)
    assert torch.equal(uniforms, before)
    assert_same(sampler.sample(*pair, tuple(prompt), beta, None, 9, uniforms=uniforms), drawn)
    other = sampler.sample(*pair, prompt, beta, None, 9, uniforms=1 - uniforms)
    assert rows(other) != rows(drawn), "the uniforms decide"


@pytest.mark.parametrize("beta", [0.3, (0.0, 0.3)], ids=str)
def test_columns_of_uniforms_may_be_shared_out(pair, beta):
    """12 prompts in one call, or 5 and 7 in two with their columns: the same responses.

    In float64, where another batch or padding moves the law by 1e-15. The second call's prompts are
    the shorter ones, so that they have fewer columns of padding there.
    """
    prompts = sorted(PROMPTS * 4, key=len, reverse=True)
    count = len(beta) if isinstance(beta, tuple) else 1
    uniforms = torch.rand(9, count, 12, generator=seeded(8), dtype=torch.float64)
    whole = rows(sampler.sample(*pair, left(prompts), beta, None, 9, uniforms.flatten(1)))
    found = []
    for some in (slice(5), slice(5, 12)):
        columns = uniforms[:, :, some].flatten(1)
        part = sampler.sample(*pair, left(prompts[some]), beta, None, 9, columns)
        found.append(rows(part))
    for which in range(count):  # a call's first responses come before its second ones
        first, second = found[0][5 * which :][:5], found[1][7 * which :][:7]
        assert first + second == whole[12 * which :][:12]
    assert len({len(response) for response in whole}) >= 3, "rows must end at different steps"


@pytest.mark.parametrize("shape", [(9, 1), (9,), (8, 3), (9, 6), (3, 9)], ids=str)
def test_uniforms_of_another_shape_are_refused(pair, shape):
    """One column for three rows would be broadcast: three rows with the same draws."""
    uniforms = torch.rand(shape, generator=seeded(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="uniforms"):
        sampler.sample(*pair, left(PROMPTS), 0.3, None, 9, uniforms)


def test_weights_of_two_responses(pair):
    """(0, 1): the first responses are the policy's draws and the second the reference's.

    From one run. Constant models that always say 1 or 2 show who spoke; in between, (0, 0) and 0 on
    doubled prompts draw the same.
    """
    one, two = constant_gpt2([-50.0, 50.0, 0.0]), constant_gpt2([-50.0, 0.0, 50.0])
    prompt = left([[1], [2, 1]])
    ids, _, _ = sampler.sample(one, two, prompt, (0.0, 1.0), seeded(0), 3)
    assert (ids[:2] == 1).all() and (ids[2:] == 2).all()
    both = sampler.sample(pair[0], None, prompt, (0.0, 0.0), seeded(0), 6)
    doubled = sampler.sample(pair[0], None, prompt.repeat(2), 0.0, seeded(0), 6)
    assert rows(both) == rows(doubled)


def test_no_gradient_through_sampling(pair):
    """A sample carries no graph, and the models' weights are as before."""
    before = pair[0].transformer.wte.weight.clone()
    ids, _, _ = sampler.sample(*pair, left(PROMPTS), 0.3, seeded(0), 4)
    assert not ids.requires_grad and torch.equal(before, pair[0].transformer.wte.weight)


def test_half_precision_is_raised_before_the_softmax(pair):
    """bfloat16 weights: the logits that are mixed and drawn from are float32.

    The float64 model's stay float64.
    """
    prompt = left(PROMPTS)
    half = gpt2(0).bfloat16()
    weight = torch.ones(3, dtype=torch.float64)
    for model, dtype in ((half, torch.float32), (pair[0], torch.float64)):
        with torch.no_grad():
            stream = sampler.Stream(model, torch.arange(3), weight, prompt, 2)
            stream.advance(torch.tensor([1, 2, 3]))
        assert sampler.mix([stream], 3).dtype == dtype
    assert rows(sampler.sample(half, half, prompt, 0.3, seeded(0), 3))


def test_autocast_casts_the_weights_once(pair):
    """Under autocast the sampler runs a bfloat16 copy, its cache is bfloat16 and its law close.

    The model itself stays as it was.
    """
    prompt = left(PROMPTS)
    model = gpt2(0, spread=0.2).float()
    weight = torch.ones(3, dtype=torch.float64)
    assert sampler.lower(model) is model
    streams = []
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            lowered = sampler.lower(model)
            streams.append(sampler.Stream(lowered, torch.arange(3), weight, prompt, 2))
    kept = [stream.cache.layers[0].keys.dtype for stream in streams]
    assert kept == [torch.bfloat16, torch.float32]
    assert model.dtype == torch.float32
    laws = [torch.log_softmax(stream.logits, -1) for stream in streams]
    assert 1e-6 < (laws[0] - laws[1]).abs().max() < 0.05


@pytest.mark.parametrize("beta", [0.3, (0.0, 0.3)], ids=str)
def test_side_by_side_changes_no_draw(pair, beta, monkeypatch):
    """Two threads, a model each, draw what one draws, and score it to 1e-12.

    Two threads are used.
    """
    names, run_model = set(), policies.run_model

    def record(model, *rest):
        names.add(threading.current_thread().name)
        return run_model(model, *rest)

    monkeypatch.setattr(policies, "run_model", record)
    draws = []
    try:
        for threads in (1, 2):
            names.clear()
            torch.set_num_threads(threads)
            draws.append(rows(sampler.sample(*pair, left(PROMPTS * 5), beta, seeded(3), 9)))
            assert len(names) == threads and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert draws[0] == draws[1]


def test_draw_by_hand():
    """Inverse distribution function of (0.2, 0, 0.8): below 0.2 the first, from 0.2 on the third.

    Never the second, also at the ends 0 and just below 1.
    """
    logits = torch.tensor([[0.2, 0.0, 0.8]], dtype=torch.float64).log()
    for uniform, token in ((0.0, 0), (0.19999, 0), (0.20001, 2), (1 - 2**-53, 2)):
        assert sampler.draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() == token
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for uniform in (0.0, 1 - 2**-53):
        assert sampler.draw(impossible, torch.tensor([uniform], dtype=torch.float64)).item() == 1


def test_worked_example(capsys):
    """What `python sampler.py` prints, against the numbers that its text says to check by hand."""
    sampler.worked_example()
    lines = capsys.readouterr().out.splitlines()
    table = {}
    for line in lines[1:7]:
        name, law = line.split("[")
        table[name.strip()] = [float(p) for p in law.rstrip("]").split(", ")]
    assert table["pi"] == table["mixture, beta = 0.0"] == [0.1, 0.4, 0.4, 0.1]
    assert table["pi_ref"] == table["mixture, beta = 1.0"] == [0.4, 0.1, 0.4, 0.1]
    by_hand = [0.2 / 0.9, 0.2 / 0.9, 0.4 / 0.9, 0.1 / 0.9]
    assert table["mixture, beta = 0.5"] == pytest.approx(by_hand, abs=5e-5)
    assert lines[-4].startswith("Responses from 0.6, 0.3, 0.15, 0.95")
    # Sums of beta = 0: 0.1, 0.5, 0.9, 1; 0.5: 0.22, 0.44, 0.89, 1; 1: 0.4, 0.5, 0.9, 1.
    expected = ["b a a c finished: False", "b a <end> finished: True", "b <end> finished: True"]
    assert [" ".join(line.split()[3:]) for line in lines[-3:]] == expected
