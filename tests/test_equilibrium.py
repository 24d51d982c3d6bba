"""equilibrium.py against the truth: on games that are solved, and on enumerated.py's GPT-2, whose
85 responses are all counted.

A game can be built around any policy, so that this policy is its equilibrium: no training is
needed, and the slopes and R2 there are 1 to rounding.
"""

import concurrent.futures
import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import bandit
import data
import enumerated
import equilibrium
import policy as policies
import studies.equilibrium
from bandit import duality_gap, win_rate
from enumerated import END, LIMIT, PROMPTS, RESPONSES, per_token_mixture
from job import residual
from preference_model import PreferenceModel
from studies import arrival, middle, rungs, solvers
from test_studies import Here

TAU = 0.1
DOUBLE = torch.float64
# Preferences of four actions, three of them in a cycle, and a reference that is not uniform.
GAME = solvers.PREFERENCES, solvers.LOG_REF


# A game of four actions, from draws


def draws(law, shape, generator):
    """Actions from a log law [n], of a shape."""
    drawn = torch.multinomial(law.exp(), math.prod(shape), True, generator=generator)
    return drawn.view(shape)


def estimates(log_pi, opponent, responses, opponents, prompts, generator):
    """What measure has of a game: p from two disjoint sets of opponents, and d, [prompts, N]."""
    preferences, log_ref = GAME
    y = draws(log_pi, (prompts, responses, 1), generator)
    found = []
    for _ in range(2):
        rivals = draws(opponent, (prompts, 1, opponents), generator)
        found.append(preferences[y, rivals].mean(2))
    return *found, (log_pi - log_ref)[y[:, :, 0]]


def laws():
    """Policies of the game: its equilibrium, the start, others."""
    preferences, log_ref = GAME
    nash = bandit.fixed_point(preferences, log_ref, TAU)
    return dict(
        nash=nash,
        reference=log_ref,
        uniform=torch.full((4,), 0.25, dtype=DOUBLE).log(),
        response=bandit.respond(preferences, log_ref, TAU, log_ref),
        halfway=torch.log_softmax((nash + log_ref) / 2, 0),
    )


@pytest.mark.parametrize("beta", [0.0, 0.125])
def test_exact_moments_at_the_solved_points(beta):
    """Weighted by pi, with exact p: slopes and R2 are 1 at eq 12 and 13, and not elsewhere."""
    for seed in range(3):
        preferences, log_ref = bandit.random_game(6, torch.Generator().manual_seed(seed))
        point = bandit.fixed_point(preferences, log_ref, TAU, beta)
        given = point, log_ref, preferences, TAU, bandit.mixture(point, log_ref, beta)
        for drawn_from in ("policy", "reference"):
            assert (exact(*given, drawn_from) - 1).abs().max() < 1e-9
        # At another tau the equation holds but for the factor: slope 1/2, back 2.
        found = exact(point, log_ref, preferences, 2 * TAU, bandit.mixture(point, log_ref, beta))
        assert (found - torch.tensor([0.5, 2, 1], dtype=DOUBLE)).abs().max() < 1e-9
        other = bandit.respond(preferences, log_ref, TAU, log_ref)
        assert (exact(other, log_ref, preferences, TAU, other) - 1).abs().max() > 0.1


def exact(log_pi, log_ref, preferences, tau, opponent, drawn_from="policy"):
    """slope, slope_back and r2 by enumeration, [3]; with a stack of prompts, of all together."""
    p = torch.atleast_2d(win_rate(preferences, opponent))
    law = log_pi if drawn_from == "policy" else log_ref
    ratio, weight = torch.atleast_2d(log_pi - log_ref), torch.atleast_2d(law.exp())
    moments = equilibrium.moments(p, p, ratio, tau, weight).mean(0)
    return equilibrium.statistics(torch.cat([moments, torch.zeros(1, dtype=DOUBLE)]))[:3]


def test_what_a_lost_support_hides():
    """The equilibrium among two of four actions, which left the others behind: by its own responses
    slopes and R2 are 1 and nobody among them gains; by the reference's they are far off, and the
    gap is there."""
    preferences, log_ref = GAME
    kept = torch.tensor([0, 1])
    among = log_ref[kept].log_softmax(0)
    log_pi = torch.full((4,), -30.0, dtype=DOUBLE)
    log_pi[kept] = bandit.fixed_point(preferences[kept][:, kept], among, TAU)
    log_pi = log_pi.log_softmax(0)
    given = log_pi, log_ref, preferences, TAU, log_pi
    assert (exact(*given) - 1).abs().max() < 1e-6
    assert abs(exact(*given, "reference")[1] - 1) > 1
    gap = duality_gap(log_pi, preferences, log_ref, TAU)
    generator = torch.Generator().manual_seed(0)
    own = estimates(log_pi, log_pi, 64, 64, 500, generator)
    # An opponent that keeps to what the policy says gains nothing but by leaving its reference.
    assert equilibrium.gap_bound(*own, TAU).mean() < 0.01
    y = draws(log_ref, (500, 64, 1), generator)
    first, second = (preferences[y, draws(log_pi, (500, 1, 64), generator)].mean(2) for _ in "AB")
    bound = equilibrium.gap_bound(first, second, torch.zeros_like(first), TAU).mean()
    bound = bound + 2 * TAU * bandit.kl(log_pi, log_ref)
    assert 0.8 * gap < bound < gap and gap > 0.1


@pytest.mark.parametrize("name", ["nash", "response", "halfway"])
def test_estimates_have_the_exact_moments(name):
    """Means over 4,000 prompts of 8 responses and 4 opponents: (N - 1)/N times the exact moments,
    within 4 standard errors each. Few opponents: the noise of p is larger than p's own spread."""
    log_pi = laws()[name]
    generator = torch.Generator().manual_seed(0)
    first, second, ratio = estimates(log_pi, log_pi, 8, 4, 4000, generator)
    drawn = equilibrium.moments(first, second, ratio, TAU)
    p = win_rate(GAME[0], log_pi)[None]
    truth = equilibrium.moments(p, p, (log_pi - GAME[1])[None], TAU, log_pi.exp()[None])[0]
    off = (drawn.mean(0) - 7 / 8 * truth).abs()
    assert (off < 4 * drawn.std(0) / len(drawn) ** 0.5).all()
    # With the same opponents twice the variance of p is more than double.
    same = equilibrium.moments(first, first, ratio, TAU).mean(0)
    assert same[2] > 1.5 * truth[2] and abs(same[1] - 7 / 8 * truth[1]) < 0.1 * truth[1]


@pytest.mark.parametrize("responses, opponents", [(64, 64), (16, 16), (64, 8), (2, 1)])
@pytest.mark.parametrize("name", list(laws()))
def test_bound_is_below_the_gap(name, responses, opponents):
    """Its mean over 1,000 prompts, 3 standard errors added, is below the exact duality gap."""
    log_pi = laws()[name]
    generator = torch.Generator().manual_seed(0)
    drawn = estimates(log_pi, log_pi, responses, opponents, 1000, generator)
    bound = equilibrium.gap_bound(*drawn, TAU)
    error = bound.std() / len(bound) ** 0.5
    gap = duality_gap(log_pi, *GAME, TAU)
    print(f"{name}, {responses} and {opponents}: {bound.mean():.4f} ({error:.4f}) of {gap:.4f}")
    assert bound.mean() + 3 * error < gap
    # ... and not far below, where the draws are many.
    assert responses * opponents < 1000 or bound.mean() > gap - 0.016


def test_the_gap_from_draws_of_pi():
    """(d) of THEORY.md: 2 tau (log E_pi exp(p/tau - d) + E_pi d) - 1 is the duality gap; so with
    log E_ref exp(p/tau)."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        preferences, log_ref = bandit.random_game(6, generator)
        log_pi = torch.randn(6, generator=generator, dtype=DOUBLE).log_softmax(0)
        ratio = log_pi - log_ref
        gain = torch.logsumexp(log_pi + win_rate(preferences, log_pi) / TAU - ratio, 0)
        of_ref = torch.logsumexp(log_ref + win_rate(preferences, log_pi) / TAU, 0)
        for part in (gain, of_ref):
            value = 2 * TAU * (part + log_pi.exp() @ ratio) - 1
            assert (value - duality_gap(log_pi, preferences, log_ref, TAU)).abs() < 1e-12


@pytest.mark.parametrize("name", list(laws()))
def test_expected_bound_by_enumeration(name):
    """Two responses and one opponent that chooses, all 64 cases with their probabilities: below
    the gap without any noise. The second set's mean is the exact p: the bound is linear in it."""
    preferences, log_ref = GAME
    log_pi = laws()[name]
    first, second, rival = torch.cartesian_prod(*[torch.arange(4)] * 3).unbind(1)
    y = torch.stack([first, second], 1)
    weight = (log_pi[y].sum(1) + log_pi[rival]).exp()
    assert weight.sum().item() == pytest.approx(1, abs=1e-12)
    chosen_by, exact_p = preferences[y, rival[:, None]], win_rate(preferences, log_pi)[y]
    bound = equilibrium.gap_bound(chosen_by, exact_p, (log_pi - log_ref)[y], TAU)
    gap = duality_gap(log_pi, preferences, log_ref, TAU)
    assert weight @ bound < gap - 0.02
    # An opponent that is known to both turns it into more than there is to gain.
    plug_in = equilibrium.gap_bound(chosen_by, chosen_by, (log_pi - log_ref)[y], TAU)
    assert weight @ plug_in > weight @ bound + 0.1


def test_what_the_bound_loses_at_the_equilibrium():
    """The variance of the first half's noise over tau: -0.014 with 64 and 64. The same opponents
    twice, the plug-in, gain as much above the truth, which is 0."""
    nash = laws()["nash"]
    generator = torch.Generator().manual_seed(0)
    first, second, ratio = estimates(nash, nash, 64, 64, 5000, generator)
    bound = equilibrium.gap_bound(first, second, ratio, TAU).mean().item()
    plug_in = equilibrium.gap_bound(first, first, ratio, TAU).mean().item()
    noise = first - TAU * ratio  # a constant aside, which the variance within prompts drops
    lost = noise.var(1, correction=0).mean().item() / TAU
    print(f"bound {bound:.4f}, plug-in {plug_in:.4f}, predicted loss {lost:.4f}")
    assert bound == pytest.approx(-0.0142, abs=2e-3) and plug_in == pytest.approx(0.0150, abs=2e-3)
    assert bound == pytest.approx(-lost, rel=0.15) and plug_in == pytest.approx(lost, rel=0.15)


# The GPT-2 of 85 responses, drawn by the real sampler


class Enumerable:
    """enumerated.py's two prompts, in turn, as a task (data.py)."""

    max_response = LIMIT

    def prompts(self, split, step, count):
        first = step * count
        rows = [PROMPTS[place % 2] for place in range(first, first + count)]
        return policies.pad(rows, "left", END)

    def most(self, split):
        return math.inf


def asked(preferences):
    """preference(prompt, y, y_other) of tables [2, 85, 85]."""

    def preference(prompt, y, y_other):
        x = [PROMPTS.index(row) for row in prompt.lists()]
        one, two = ([RESPONSES.index(row) for row in side.lists()] for side in (y, y_other))
        return preferences[torch.tensor(x), torch.tensor(one), torch.tensor(two)]

    return preference


def game_around(log_pi, log_ref, tau, opponent):
    """Preferences [2, 85, 85] by which log_pi is the point of eq 12 or 13 with these opponents.

    p(y > y') = 1/2 + tau (d(y) - d(y')) + C(y, y'), C antisymmetric and C opponent = 0: a cycle
    that no response gains from.
    """
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(2, 85, 85, generator=generator, dtype=DOUBLE) - 0.5
    cyclic = random - random.mT
    mean = cyclic @ opponent.exp()[..., None]
    cyclic = cyclic - mean + mean.mT
    ratio = tau * (log_pi - log_ref)
    return 0.5 + ratio[..., None] - ratio[..., None, :] + cyclic / 5


@pytest.fixture(scope="module")
def w():
    return enumerated.world(0)


@pytest.fixture(scope="module")
def model(w):
    """A model that is not the reference, and log pi of it, [2, 85]."""
    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    other = policies.build("enumerable", tokenizer, 8, 1).double().requires_grad_(False)
    return other, enumerated.log_policy(other, w)


def measured(w, model, preferences, tau, beta=0.0, count=300, **options):
    """measure on the GPT-2, [count, 4]."""
    given = model, w.reference, asked(preferences), Enumerable(), tau, beta
    return equilibrium.measure(*given, count=count, **options)


FEW = dict(responses=16, opponents=4, chunk=50)


@pytest.mark.parametrize("beta", [0.0, pytest.param(0.125, marks=pytest.mark.slow)])
def test_a_policy_at_its_equilibrium(w, model, beta):
    """In a game built around it: slopes and R2 are 1 within 4 standard errors, known to 0.02.

    Nobody gains at Nash: the bound is below 0. For beta > 0 the opponents are the sampler's
    per-token mixture, and what is gained against the policy is no more than its duality gap.
    """
    policy, log_pi = model
    opponent = per_token_mixture(log_pi, w.log_ref, beta)
    game = game_around(log_pi, w.log_ref, 0.03, opponent)
    assert 0 <= game.min() and game.max() <= 1
    assert (exact(log_pi, w.log_ref, game, 0.03, opponent) - 1).abs().max() < 1e-9
    gap = torch.stack([duality_gap(log_pi[k], game[k], w.log_ref[k], 0.03) for k in range(2)])
    for drawn_from in ("policy", "reference"):
        given = w, policy, game, 0.03, beta
        numbers = equilibrium.summarise(measured(*given, **FEW, drawn_from=drawn_from))
        print(drawn_from, numbers)
        for name in ("slope", "slope_back", "r2"):
            error = numbers[f"{name}_se"]
            assert error < 0.02 and abs(numbers[name] - 1) < 4 * error
        assert numbers["exploitability"] + 3 * numbers["exploitability_se"] < gap.mean()
        assert numbers["exploitability"] > -0.06  # not far below, with 16 responses and 4 opponents
    assert beta or gap.abs().max() < 1e-9


@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.125])
def test_a_policy_away_from_its_equilibrium(w, model, beta):
    """In the world's own game: the numbers of the enumeration within 4 standard errors, and the
    bound below the exact gap."""
    policy, log_pi = model
    opponent = per_token_mixture(log_pi, w.log_ref, beta)
    gap = [duality_gap(log_pi[k], w.preferences[k], w.log_ref[k], TAU) for k in range(2)]
    for drawn_from in ("policy", "reference"):
        truth = exact(log_pi, w.log_ref, w.preferences, TAU, opponent, drawn_from)
        given = w, policy, w.preferences, TAU, beta
        numbers = equilibrium.summarise(measured(*given, **FEW, drawn_from=drawn_from))
        print(drawn_from, numbers, truth)
        for name, value in zip(("slope", "slope_back", "r2"), truth.tolist(), strict=True):
            assert abs(numbers[name] - value) < 4 * numbers[f"{name}_se"]
            assert abs(value - 1) > 0.3
        assert numbers["exploitability"] + 3 * numbers["exploitability_se"] < sum(gap) / 2


# What is around it


def test_errors_are_the_jackknifes():
    """A mean's is its standard error; a ratio's, against leaving out one prompt after the other."""
    generator = torch.Generator().manual_seed(0)
    rows = 1 + torch.rand(7, 4, generator=generator, dtype=DOUBLE)
    numbers = equilibrium.summarise(rows)
    assert numbers["exploitability_se"] == pytest.approx((rows[:, 3].std() / 7**0.5).item())
    assert numbers["slope"] == pytest.approx((rows[:, 1].sum() / rows[:, 0].sum()).item())
    assert numbers["r2"] == pytest.approx(numbers["slope"] * numbers["slope_back"])
    without = []
    for left_out in range(7):
        kept = [row for row in range(7) if row != left_out]
        without.append((rows[kept, 1].sum() / rows[kept, 2].sum()).item())
    without = torch.tensor(without)
    expected = (6 / 7 * ((without - without.mean()) ** 2).sum()).sqrt().item()
    assert numbers["slope_back_se"] == pytest.approx(expected, rel=1e-5)
    assert numbers["prompts"] == 7


def test_where_there_is_nothing_to_say(w):
    """The reference has d = 0, and no slope; one prompt has no error."""
    numbers = equilibrium.summarise(measured(w, w.reference, w.preferences, TAU, count=4, **FEW))
    assert math.isnan(numbers["slope"]) and numbers["slope_back"] == 0
    assert math.isfinite(numbers["exploitability"] + numbers["exploitability_se"])
    alone = equilibrium.summarise(measured(w, w.reference, w.preferences, TAU, count=1, **FEW))
    assert math.isfinite(alone["exploitability"]) and math.isnan(alone["exploitability_se"])


def test_a_preference_model_reads_each_response_once(w, model):
    """What its vectors say is what it says of every pair, to float32's rounding."""
    torch.manual_seed(0)
    body = policies.build("enumerable", policies.word_tokenizer(["a", "b", "c", "d"]), 8, 2)
    learned = PreferenceModel(body).eval()
    given = model[0], w.reference
    options = dict(count=6, responses=4, opponents=7, chunk=4)
    rows = equilibrium.measure(*given, learned, Enumerable(), TAU, 0.125, **options)
    pairs = partial(learned)
    again = equilibrium.measure(*given, pairs, Enumerable(), TAU, 0.125, **options)
    assert (rows - again).abs().max() < 1e-5 and rows[:, 2].max() > 1e-5


def both_ways(*given, **sizes):
    """What a run's summary has: all numbers of the policy's responses, two of the reference's."""
    own, of_reference = (
        equilibrium.summarise(equilibrium.measure(*given, **sizes, drawn_from=drawn_from))
        for drawn_from in ("policy", "reference")
    )
    del own["prompts"]
    for name in ("r2", "exploitability"):
        own[f"{name}_ref"] = of_reference[name]
        own[f"{name}_ref_se"] = of_reference[f"{name}_se"]
    return own


def test_a_runs_residual(w, model, monkeypatch):
    """At a run's end: 20 test prompts, 16 responses, twice 32 opponents, the run's tau and beta; 8
    prompts and twice 16 opponents where the task is no built-in one. A file of the user's is not
    asked; what has not moved has no slope."""
    torch.manual_seed(0)
    body = policies.build("enumerable", policies.word_tokenizer(["a", "b", "c", "d"]), 8, 2)
    learned = PreferenceModel(body).eval()
    options = SimpleNamespace(tau=0.2, beta=0.125)
    found = residual.measure(options, model[0], w.reference, learned, Enumerable())
    given = model[0], w.reference, learned, Enumerable(), 0.2, 0.125
    of_files = dict(count=8, responses=16, opponents=16)
    assert found == both_ways(*given, **of_files) and found["slope_se"] > 0
    monkeypatch.setattr(data, "BuiltIn", Enumerable)
    found = residual.measure(options, model[0], w.reference, learned, Enumerable())
    assert found == both_ways(*given, count=20, responses=16, opponents=32)
    assert residual.measure(options, model[0], w.reference, partial(learned), Enumerable()) == {}
    unmoved = residual.measure(options, w.reference, w.reference, learned, Enumerable())
    assert unmoved["slope"] is None and math.isfinite(unmoved["exploitability"])


def test_shares_of_processes_are_the_rows_of_one(w, model):
    """Two processes' prompts, halves of every chunk, are the rows that one process has."""
    options = dict(count=10, responses=5, opponents=3, chunk=8)
    policy, _ = model
    whole = measured(w, policy, w.preferences, TAU, 0.125, **options)
    halves = []
    for rank in range(2):

        def share(count, rank=rank):
            return slice(count * rank // 2, count * (rank + 1) // 2)

        halves.append(measured(w, policy, w.preferences, TAU, 0.125, **options, share=share))
    assert whole.shape == (10, 4) and [len(half) for half in halves] == [5, 5]
    first, second = halves
    joined = torch.cat([first[:4], second[:4], first[4:], second[4:]])
    assert (joined - whole).abs().max() < 1e-12


def test_who_meets_whom(w, model):
    """The responses meet both sets of the mixture's opponents and both of the policy's, once each;
    two runs of one seed ask the same, and another seed does not."""
    policy, _ = model
    seen = []

    def preference(prompt, y, y_other):
        seen.append((prompt.lists(), y.lists(), y_other.lists()))
        return torch.full((len(prompt.ids),), 0.5)

    def run(beta, seed):
        seen.clear()
        given = policy, w.reference, preference, Enumerable(), TAU, beta
        equilibrium.measure(*given, count=2, responses=3, opponents=5, seed=seed)
        return list(seen)

    once = run(0.0, 0)
    assert len(once) == 10 and once == run(0.0, 0) and once != run(0.0, 1)
    assert len(run(0.125, 0)) == 20
    for prompt, y, y_other in once:
        assert prompt == PROMPTS * 3 and y == once[0][1]
        assert y_other == y_other[:2] * 3  # a prompt's rival meets all of its responses


# The commands


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two policies' folders, a file of prompts and one of preferences."""
    folder = tmp_path_factory.mktemp("policies")
    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    for seed in (1, 2):
        policies.build("enumerable", tokenizer, 8, seed).save_pretrained(folder / str(seed))
        tokenizer.save_pretrained(folder / str(seed))
    rows = [json.dumps(dict(prompt=prompt)) for prompt in ("a b", "c", "d d a")]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "later.py").write_text(
        "def preference(prompts, ys, ys_other):\n"
        "    pairs = [(sum(map(ord, y)), sum(map(ord, other))) for y, other in zip(ys, ys_other)]\n"
        "    return [(9 + one) / (18 + one + other) for one, other in pairs]\n"
    )
    return folder


def command(folders, *more):
    """The exit status of studies.equilibrium on the two policies."""
    argv = [str(folders / "1"), str(folders / "2"), "--tau", "0.1"]
    argv += ["--prompts", str(folders / "prompts.jsonl"), "--judge", str(folders / "later.py")]
    argv += ["--max-response-tokens", "3", "--responses", "8", "--opponents", "3"]
    return studies.equilibrium.main([*argv, *more])


def test_the_command_prints_what_it_measured(folders, capsys):
    """Four numbers with their errors, of both laws' responses, the same twice, others by the
    mixture."""
    assert command(folders) == 0
    once = capsys.readouterr().out
    read, *names = [line.split()[0] for line in once.splitlines()]
    assert read == "--prompts", "what was read is said in a line"
    assert names == ["responses", "slope", "slope_back", "r2", "exploitability", "prompts"]
    for line in once.splitlines()[2:-1]:
        _, own, _, of_reference, _ = line.split()
        assert own != of_reference
    assert once.splitlines()[-1].split()[1] == "3" and "nan" not in once
    assert command(folders) == 0 and capsys.readouterr().out == once
    assert command(folders, "--beta", "0.5") == 0 and capsys.readouterr().out != once


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--tau", "0"], "--tau: 0: give a number above 0"),
        (["--beta", "2"], "--beta"),
        (["--responses", "1"], "--responses 1: give at least 2"),
        (["--count", "0"], "--count: 0: give a whole number above 0"),
        (["--judge", "panel"], "--judge panel"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folders, capsys, options, expected):
    assert command(folders, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("studies.equilibrium: error: ")
    assert expected in error


def test_a_rung_knows_where_the_top_is(w):
    """At the solved point of the sampler's own mixture: slopes and R2 1, no distance; at Nash no
    gap. The start is as far as the lab says, and the sequence-level mixture's point is not it."""
    for beta in (0.0, 0.125):
        target = enumerated.solve(w, rungs.TAU, beta, per_token_mixture)
        found = rungs.distances(w, target, beta, target)
        assert max(abs(found[name] - 1) for name in ("slope", "slope_back", "r2")) < 1e-9
        assert found["total_variation"] == 0 and -1e-12 < found["gap"] < (1e-3 if beta else 1e-9)
        start = rungs.distances(w, w.log_ref, beta, target)
        assert start["total_variation"] == pytest.approx(0.21, abs=0.03)
    other = enumerated.solve(w, rungs.TAU, 0.125)
    assert abs(rungs.distances(w, other, 0.125, target)["slope"] - 1) > 1e-4


def test_the_point_among_the_starts_own_draws(w, model, monkeypatch):
    """With so many draws that every response comes it is the enumeration's; a game of some of them
    stands for the whole only if they have enough of the start's probability."""
    policy, log_pi = model
    monkeypatch.setattr(middle, "SOLVED", 2)
    given = policy, w.reference, asked(w.preferences), Enumerable()
    monkeypatch.setattr(middle, "DRAWS", 20_000)
    found = middle.from_solved(*given)
    target = enumerated.solve(w, middle.TAU)
    for name, law in (("away", log_pi), ("away_start", w.log_ref)):
        wanted = bandit.total_variation(law, target).mean().item()
        assert found[name] == pytest.approx(wanted, abs=0.005)
    assert 0.999 < found["share_start"] <= 1 + 1e-6 and 0.99 < found["share"] <= 1 + 1e-6
    monkeypatch.setattr(middle, "DRAWS", 20)
    assert middle.from_solved(*given) == {}


def test_what_has_arrived_by_hand():
    """Slopes within two standard errors or a tenth of 1, R2 at least 0.9, all of them."""
    end = dict(slope=1.05, slope_se=0.01, slope_back=0.8, slope_back_se=0.1, r2=0.9)
    assert arrival.has_arrived(end)
    assert not arrival.has_arrived(dict(end, slope_back_se=0.09))
    assert not arrival.has_arrived(dict(end, slope=1.2))
    assert not arrival.has_arrived(dict(end, r2=0.89))
    assert not arrival.has_arrived(dict(end, slope=0.0, slope_back=None, r2=None))
    exact = dict(slope=0.99, slope_back=0.95, r2=0.94)
    assert arrival.has_arrived(exact) and not arrival.has_arrived(dict(exact, slope_back=0.89))
    lost = dict(slope_back=1.7, slope_back_se=0.3)  # among the start's responses
    assert not arrival.has_arrived(dict(end, reference=lost))
    assert arrival.has_arrived(dict(end, reference=dict(lost, slope_back=1.5)))


@pytest.mark.slow
def test_rungs_go_on_where_they_were_stopped(tmp_path, monkeypatch, capsys):
    """A line a cell, the first seed's first; again nothing is run; with another seed only its own;
    without lines --from-results says what is missing."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Here)
    monkeypatch.setitem(rungs.SCALES, "smoke", ((4, 21, False),))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    argv = ["--scale", "smoke", "--results", str(tmp_path)]
    assert rungs.main([*argv, "--from-results"]) == 2
    assert "4 lines are missing" in capsys.readouterr().err
    assert rungs.main(argv) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(row) for row in (tmp_path / "rungs-smoke.jsonl").read_text().splitlines()]
    assert {(line["method"], line["beta"]) for line in lines} == set(rungs.METHODS)
    assert all([point["step"] for point in line["points"]] == [20, 21] for line in lines)
    assert len({line["points"][-1]["slope"] for line in lines}) == 4
    assert (tmp_path / "rungs-smoke.png").stat().st_size > 5000
    monkeypatch.setattr(rungs, "run_cell", None)
    assert rungs.main(argv) == 0 and capsys.readouterr().out == printed
    seeds = [cell["seed"] for cell in rungs.cells("long", 2)]
    assert len(seeds) == 40 and seeds == sorted(seeds)
