"""losses/ppo.py: its numbers by hand, its expected gradient by enumeration, and in the trainer.

The truths beside it: a loop over single responses without padding or shared code (by_hand), the
exact RLHF objective of enumerated.py's 85 responses, RLOO's loss. All in float64.
"""

import copy
import math
import types

import pytest
import torch

import enumerated
import policy as policies
import train
from clock import Clock, align
from job import parallel, report
from job.options import constants, of_batch, parse, requested, requests
from losses import dro, groups, ppo, rloo
from policy import Tokens
from reference_sampler import gpt2
from test_parallel import apart, ten_steps, together
from test_resume import between, kill, killed, options, result, same

DOUBLE = torch.float64
TAU = 0.3
PROMPT = policies.pad([[1, 2, 3], [2], [4, 4]], "left", 0)
# Of different widths: the loss pads them to the widest.
Y = policies.pad([[1, 0], [2, 3, 4, 1], [0]], "right", 0)
OTHER = policies.pad([[3, 2, 0], [0], [1, 2, 3]], "right", 0)
REWARDS = torch.tensor([[1.2, -0.4], [0.3, 0.9], [-1.0, 0.5]], dtype=DOUBLE)
BATCH = PROMPT, Y, OTHER, REWARDS


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


def parsed(*more):
    return parse(["--loss", "ppo", "--tau", str(TAU), "--device", "cpu", *more])


def numbers(*rows):
    return torch.tensor(rows, dtype=DOUBLE)


def assert_close(value, expected, tolerance=1e-12):
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def with_value(seed):
    """A small policy whose value network is not 0."""
    policy = gpt2(seed)
    ppo.prepare(policy)
    fill(policy.value, seed)
    return policy


@torch.no_grad()
def fill(module, seed, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        parameter.copy_(scale * noise)


def moved(policy, seed=7, size=0.05):
    """A copy of a policy beside it, as after a step."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
    return other


# What the file says


def test_what_the_file_says():
    assert constants(ppo) == {"clip": 0.2, "trace": 0.95, "value_weight": 1.0}
    assert requests(ppo) == {"length", "old_logp", "old_value"}
    assert ppo.PAIR == ("policy", "policy") and ppo.RESPONSES == 2 and not ppo.OFFLINE
    assert ppo.label_pairs is groups.label_rewards and ppo.prepare is dro.prepare
    assert parse(["--loss", "ppo", "--set", "trace=1"]).set == {"trace": 1.0}


def test_a_worked_example(capsys):
    """Its numbers by hand: the slopes are 0 past the clip, -e^-0.3 * 0.15, 0.1."""
    ppo.worked_example()
    out = capsys.readouterr().out
    for line in (
        "-0.1000 +0.0000 +0.9000",
        "+0.3000 +0.2000 -0.1000",
        "+0.3750 +0.1500 -0.1000",
        "+0.7750 +0.9500 +0.9000",
        "+0.0000 -0.1111 +0.1000",
    ):
        assert line in out


# Values by hand


def test_the_reward_is_at_the_last_token():
    """Of three responses of 3, 1 and 2 tokens; the penalty is at every token."""
    log_ratio = numbers([1.0, -2.0, 0.5], [3.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    found = ppo.token_rewards(log_ratio, numbers(10.0, 20.0, 30.0), 0.1, torch.tensor([3, 1, 2]))
    wanted = numbers([-0.1, 0.2, 9.95], [19.7, 0.0, 0.0], [0.0, 29.9, 0.0])
    assert_close(found, wanted)


@pytest.mark.parametrize(
    "trace, wanted",
    [
        # Errors of V: 1 + 0.7 - 0.5, -2 + 0.1 - 0.7, 4 + 0 - 0.1
        (0.0, (1.2, -2.6, 3.9)),
        # Returns to go 3, 2, 4 less V
        (1.0, (2.5, 1.3, 3.9)),
        (0.95, (1.2 + 0.95 * (-2.6 + 0.95 * 3.9), -2.6 + 0.95 * 3.9, 3.9)),
    ],
)
def test_advantages_by_hand(trace, wanted):
    """And the same with padding behind, where they are 0."""
    reward, value = numbers(1.0, -2.0, 4.0), numbers(0.5, 0.7, 0.1)
    assert_close(ppo.advantages(reward, value, trace), numbers(*wanted))
    wide = torch.cat([reward, numbers(0.0, 0.0)]), torch.cat([value, numbers(0.0, 0.0)])
    assert_close(ppo.advantages(*wide, trace), numbers(*wanted, 0.0, 0.0))


def one_token(logp, old_logp=0.0, rewards=1.0, value=0.0, old_value=0.0, **constant):
    """The loss of one response of one token; pi_ref is pi_old: no penalty. A = rewards - V_old."""
    logp, old_logp, value, old_value = (
        torch.as_tensor(number, dtype=DOUBLE).reshape(1, 1, 1)
        for number in (logp, old_logp, value, old_value)
    )
    given = dict(length=torch.ones(1, 1, dtype=torch.long), old_logp=old_logp, old_value=old_value)
    return ppo.loss(logp, old_logp, numbers([rewards]), TAU, value, **given, **constant)


@pytest.mark.parametrize(
    "advantage, ratio, slope",
    [
        # Inside, and outside on the side that costs: -u A. Past the clip on the side of A: 0.
        (2.0, 1.1, -2.2),
        (2.0, 1.3, 0.0),
        (2.0, 0.5, -1.0),
        (-2.0, 0.9, 1.8),
        (-2.0, 0.7, 0.0),
        (-2.0, 1.5, 3.0),
        (2.0, 1.0, -2.0),
        (-2.0, 1.0, 2.0),
    ],
)
def test_the_clip(advantage, ratio, slope):
    """The slope on log pi, for both signs of A, on both sides; the value is min(u A, clip(u) A)."""
    logp = torch.tensor(math.log(ratio), dtype=DOUBLE, requires_grad=True)
    cost = one_token(logp, rewards=advantage)
    clipped = min(max(ratio, 0.8), 1.2)
    gain = min(ratio * advantage, clipped * advantage)
    # V is 0, and so is V_old: its loss is A^2/2.
    assert cost.item() == pytest.approx(-gain + advantage**2 / 2, rel=1e-12)
    (found,) = torch.autograd.grad(cost.sum(), logp)
    assert found.item() == pytest.approx(slope, rel=1e-12, abs=1e-15)


def test_the_clip_is_a_constant():
    logp = torch.tensor(math.log(1.3), dtype=DOUBLE, requires_grad=True)
    for clip, slope in ((0.2, 0.0), (0.4, -1.3)):
        (found,) = torch.autograd.grad(one_token(logp, clip=clip).sum(), logp)
        assert found.item() == pytest.approx(slope)


def test_the_value_by_hand():
    """Target A + V_old = r; the slope on V is c (V - target) and has no part of the surrogate."""
    value = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    cost = one_token(0.0, rewards=2.0, value=value, old_value=0.5, value_weight=3.0)
    assert cost.item() == pytest.approx(-1.5 + 1.5 * 1.3**2, rel=1e-12)
    (slope,) = torch.autograd.grad(cost.sum(), value)
    assert slope.item() == pytest.approx(3 * (0.7 - 2.0), rel=1e-12)


def random_batch(seed, count=6, responses=3, width=4):
    """Random token arrays of right-padded responses, as loss takes them: (args, keywords)."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, responses, width
    length = torch.randint(1, width + 1, shape[:2], generator=generator)
    mask = torch.arange(width) < length[..., None]
    noise = torch.randn(5, *shape, generator=generator, dtype=DOUBLE) * mask
    rewards = torch.randn(shape[:2], generator=generator, dtype=DOUBLE)
    logp, ref_logp, old_logp = -noise[0].abs() * mask, -noise[1].abs(), -noise[2].abs()
    given = dict(length=length, old_logp=old_logp, old_value=noise[3])
    return (logp, ref_logp, rewards, TAU, noise[4]), given


def test_slopes_by_finite_differences():
    """On log pi and on V, entry by entry; no entry lies on a kink."""
    (logp, ref_logp, rewards, tau, value), given = random_batch(0)
    inputs = logp.requires_grad_(), value.requires_grad_()

    def cost():
        return ppo.loss(logp, ref_logp, rewards, tau, value, **given).sum()

    slopes = torch.autograd.grad(cost(), inputs)
    step = 1e-6
    for tensor, slope in zip(inputs, slopes, strict=True):
        assert slope.abs().max() > 1e-2
        flat = tensor.data.view(-1)
        for place in range(flat.numel()):
            ends = []
            for sign in (1, -2):
                flat[place] += sign * step
                ends.append(cost().item())
            flat[place] += step
            assert slope.view(-1)[place].item() == pytest.approx(
                (ends[0] - ends[1]) / (2 * step), abs=1e-7
            )


def test_a_loop_over_the_tokens_of_each_response():
    """The whole loss of padded groups is that of each response alone, in loops."""
    (logp, ref_logp, rewards, tau, value), given = random_batch(1)
    found = ppo.loss(logp, ref_logp, rewards, tau, value, **given)
    wanted = torch.zeros_like(found)
    for row in range(6):
        for column in range(3):
            length = given["length"][row, column].item()
            parts = []
            for tensor in (logp, ref_logp, given["old_logp"], value, given["old_value"]):
                parts.append(tensor[row, column, :length].tolist())
            wanted[row] += cost_in_loops(*parts, rewards[row, column].item(), tau) / 3
    assert_close(found, wanted)


def cost_in_loops(logp, ref_logp, old_logp, value, old_value, reward, tau, clip=0.2, trace=0.95):
    """PPO's loss of one response from lists of numbers, or of scalars with gradient."""
    length = len(old_logp)
    error = []
    for t in range(length):
        r = -tau * (old_logp[t] - ref_logp[t])
        last = t == length - 1
        error.append(r + (reward if last else old_value[t + 1]) - old_value[t])
    cost = 0.0
    for t in range(length):
        advantage = sum(trace ** (s - t) * error[s] for s in range(t, length))
        ratio = math.e ** (logp[t] - old_logp[t])
        gain = ratio * advantage
        if advantage > 0 and ratio > 1 + clip:
            gain = (1 + clip) * advantage
        if advantage < 0 and ratio < 1 - clip:
            gain = (1 - clip) * advantage
        cost = cost - gain + (value[t] - advantage - old_value[t]) ** 2 / 2
    return cost


# The expected gradient, by enumeration


class Tree:
    """enumerated.py's 85 responses to a prompt, one to three tokens, with random rewards."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.log_ref = enumerated.world(seed).log_ref[0]
        responses = enumerated.RESPONSES
        self.rewards = torch.randn(len(responses), generator=generator, dtype=DOUBLE)
        self.length = torch.tensor([len(response) for response in responses])
        self.mask = torch.arange(enumerated.LIMIT) < self.length[:, None]
        # Each token's prefix with and without it; the empty one, whose log-law is 0, as padding.
        self.longer = torch.zeros(len(responses), enumerated.LIMIT, dtype=torch.long)
        self.shorter = torch.zeros_like(self.longer)
        for row, response in enumerate(responses):
            for t in range(len(response)):
                self.longer[row, t] = enumerated.PREFIXES.index(tuple(response[: t + 1]))
                self.shorter[row, t] = enumerated.PREFIXES.index(tuple(response[:t]))
        self.random = torch.randn(len(enumerated.PREFIXES), generator=generator, dtype=DOUBLE)

    def tokens(self, log_law):
        """[85, 3] log-probabilities of each token, of a law of whole responses."""
        return enumerated.token_log_law(log_law)[self.longer]

    def before(self, value):
        """[85, 3] V before each token, of a table over all prefixes."""
        return value[self.shorter] * self.mask

    def soft_value(self, tau):
        """tau log of the mean of e^(r/tau) over pi_ref's responses that begin so: V of RLHF."""
        outside = ~enumerated.BEGINS
        level = (self.log_ref + self.rewards / tau).expand(len(outside), -1)
        weight = self.log_ref.expand(len(outside), -1)
        level = torch.logsumexp(level.masked_fill(outside, -torch.inf), -1)
        return tau * (level - torch.logsumexp(weight.masked_fill(outside, -torch.inf), -1))

    def gradient(self, log_law, value, trace, tau=TAU):
        """PPO's expected gradient on the logits of whole responses, at pi_old = pi, [85]."""
        logits = log_law.detach().requires_grad_()
        log_now = logits.log_softmax(0)
        logp, value = self.tokens(log_now)[:, None], self.before(value)[:, None]
        given = dict(length=self.length[:, None], old_logp=logp.detach(), old_value=value)
        sides = logp, self.tokens(self.log_ref)[:, None], self.rewards[:, None]
        cost = ppo.loss(*sides, tau, value, trace=trace, **given)
        return torch.autograd.grad((log_now.detach().exp() * cost).sum(), logits)[0]

    def exact(self, log_law, tau=TAU):
        """The gradient of -(E r - tau KL(pi, pi_ref)) on the logits, [85]."""
        logits = log_law.detach().requires_grad_()
        log_now = logits.log_softmax(0)
        gain = log_now.exp() * (self.rewards - tau * (log_now - self.log_ref))
        return torch.autograd.grad(-gain.sum(), logits)[0]

    def law(self, seed=3):
        """Some policy."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(self.rewards), generator=generator, dtype=DOUBLE)
        return (self.log_ref + 0.5 * noise).log_softmax(0)


@pytest.fixture(scope="module")
def tree():
    return Tree()


def test_at_ratio_1_it_is_the_policy_gradient(tree):
    """Lambda 1: sum of grad log pi(y_t) (return to go - V), written out for every response."""
    law = tree.law()
    logits = law.clone().requires_grad_()
    log_now = logits.log_softmax(0)
    logp, ref_logp = tree.tokens(log_now), tree.tokens(tree.log_ref)
    value, objective = tree.before(tree.random), 0.0
    for row in range(len(tree.rewards)):
        to_go = tree.rewards[row]
        for t in reversed(range(tree.length[row].item())):
            to_go = to_go - TAU * (logp[row, t] - ref_logp[row, t]).detach()
            weight = log_now[row].detach().exp() * (to_go - value[row, t])
            objective = objective - weight * logp[row, t]
    wanted = torch.autograd.grad(objective, logits)[0]
    assert wanted.abs().max() > 1e-3
    assert_close(tree.gradient(law, tree.random, 1.0), wanted, 1e-13)


def test_the_expectation_is_rloos(tree):
    """Lambda 1, V 0 or of any prefix: what came before a token has mean 0 in its gradient, so
    returns to go are as good as whole ones, which REINFORCE and RLOO take."""
    law = tree.law()
    wanted = tree.exact(law)
    assert wanted.abs().max() > 1e-3
    for value in (torch.zeros_like(tree.random), tree.random, 10 * tree.random):
        assert_close(tree.gradient(law, value, 1.0), wanted, 1e-13)
    logits = law.clone().requires_grad_()
    log_now = logits.log_softmax(0)
    pairs = torch.cartesian_prod(*[torch.arange(len(law))] * 2)
    cost = rloo.loss(log_now[pairs], tree.log_ref[pairs], tree.rewards[pairs], TAU)
    weight = log_now.detach()[pairs].sum(1).exp()
    assert_close(torch.autograd.grad((weight * cost).sum(), logits)[0], wanted, 1e-13)


def test_the_rlhf_policy_is_where_it_stops(tree):
    """No gradient at pi_ref e^(r/tau)/Z with lambda 1, whatever V, and with any lambda if V is
    right: then every single advantage is 0. With lambda below 1 and a wrong V there is one."""
    point = (tree.log_ref + tree.rewards / TAU).log_softmax(0)
    right = tree.soft_value(TAU)
    assert tree.gradient(point, tree.random, 1.0).abs().max() < 1e-13
    for trace in (0.0, 0.5, 0.95, 1.0):
        assert tree.gradient(point, right, trace).abs().max() < 1e-13
        log_ratio = tree.tokens(point) - tree.tokens(tree.log_ref)
        reward = ppo.token_rewards(log_ratio, tree.rewards, TAU, tree.length)
        assert ppo.advantages(reward, tree.before(right), trace).abs().max() < 1e-12
    assert tree.gradient(point, tree.random, 0.95).abs().max() > 1e-4
    assert tree.gradient(tree.law(), right, 0.95).abs().max() > 1e-3


def test_a_models_expected_gradient():
    """Of all 85 responses to both prompts, through of_batch and pair_losses: the exact gradient of
    E r - tau KL in the policy's weights, lambda 1 and any V; and V's own, towards what follows."""
    w = enumerated.world(0)
    policy = moved(w.reference, size=0.1).requires_grad_(True)
    ppo.prepare(policy)
    fill(policy.value, 0)
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(len(w.batch[0].ids), generator=generator, dtype=DOUBLE)
    batch = *w.batch, rewards[:, None]
    settings = parsed("--set", "trace=1")
    whole = of_batch(settings, ppo, policy, policy, w.reference, *batch)
    whole["length"] = w.batch[1].lengths()[:, None]
    cost, ratio = ppo.pair_losses(settings, ppo, policy, w.reference, *batch, **whole)
    log_pi, log_ref = policies.log_prob(policy, *w.batch), w.log_ref.flatten()
    assert_close(ratio, log_pi - log_ref)
    body = [part for name, part in policy.named_parameters() if "value" not in name]
    gain = log_pi.exp() * (rewards - TAU * (log_pi - log_ref))
    wanted = torch.autograd.grad(-gain.sum(), body)
    (log_pi.detach().exp() * cost).sum().backward()
    found = torch.cat([part.grad.flatten() for part in body])
    wanted = torch.cat([part.flatten() for part in wanted])
    assert wanted.abs().max() > 1e-2
    assert_close(found, wanted, 1e-12)
    assert all(part.grad.abs().max() > 1e-6 for part in policy.value.parameters())


# In the trainer


def tokens_of(policy, reference, prompt, y):
    """One response alone, without padding: lists of log pi, log pi_ref and V of its tokens."""
    ids = torch.tensor([prompt + y])
    first = len(prompt) - 1
    logs = []
    for model in (policy, reference):
        law = model(ids).logits[0].log_softmax(-1)
        logs.append([law[first + t, token] for t, token in enumerate(y)])
    states = reference(ids, output_hidden_states=True).hidden_states[-1][0].detach()
    value = [policy.value(states[first + t])[0] for t in range(len(y))]
    return logs[0], [number.detach() for number in logs[1]], value


def by_hand(policy, drawer, reference, batch, **constant):
    """The mean loss of a batch, each response alone; the drawer's numbers without gradient."""
    prompt, *responses, rewards = batch
    total = 0.0
    for row, ids in enumerate(prompt.lists()):
        for column, response in enumerate(responses):
            y = response.lists()[row]
            logp, ref_logp, value = tokens_of(policy, reference, ids, y)
            with torch.no_grad():
                old_logp, _, old_value = tokens_of(drawer, reference, ids, y)
            given = logp, ref_logp, old_logp, value, old_value, rewards[row, column]
            total = total + cost_in_loops(*given, TAU, **constant) / rewards.numel()
    return total


def widened(response, extra=3):
    """The same response with more padding, that holds other ids."""
    ids = torch.nn.functional.pad(response.ids, (0, extra), value=3)
    return Tokens(ids, torch.nn.functional.pad(response.mask, (0, extra)))


def gradient_of(policy, reference, batch, drawer=None, size=None, demos=None):
    """(the gradient, the numbers) of train.update on a batch, as one vector."""
    settings, policy = parsed(), copy.deepcopy(policy)
    settings.micro_batch_size = size
    settings.ptx = 0.5 if demos else 0.0
    still = types.SimpleNamespace(zero_grad=policy.zero_grad, step=lambda: None)
    whole = of_batch(settings, ppo, policy, drawer or policy, reference, *batch)
    if demos:
        whole["demos"] = lambda: demos(policy)
    line = train.update(settings, ppo, policy, reference, still, *batch, **whole)
    return torch.cat([part.grad.flatten() for part in policy.parameters()]), line


def test_the_trainers_gradient_is_the_loops():
    """Of pi beside pi_old, where some tokens are clipped, and of pi_old itself."""
    drawer, reference = with_value(0), gpt2(1).requires_grad_(False)
    for policy in (drawer, moved(drawer)):
        wanted_of = copy.deepcopy(policy)
        cost = by_hand(wanted_of, drawer, reference, BATCH)
        cost.backward()
        wanted = torch.cat([part.grad.flatten() for part in wanted_of.parameters()])
        found, line = gradient_of(policy, reference, BATCH, drawer)
        assert line["loss"] == pytest.approx(cost.item(), rel=1e-12)
        assert_close(found, wanted)
    unclipped = by_hand(policy, drawer, reference, BATCH, clip=100.0)
    assert abs(unclipped.item() - cost.item()) > 1e-3


def test_padding_and_micro_batches_change_nothing():
    """Wider responses, whose padding holds other ids, and parts of 1 and 2 rows."""
    drawer, reference = with_value(0), gpt2(1).requires_grad_(False)
    policy = moved(drawer)
    wanted, line = gradient_of(policy, reference, BATCH, drawer)
    wide = PROMPT, widened(Y), widened(OTHER, 1), REWARDS
    for batch in (BATCH, wide):
        for size in (None, 1, 2):
            found, its_line = gradient_of(policy, reference, batch, drawer, size)
            assert_close(found, wanted)
            assert its_line["loss"] == pytest.approx(line["loss"], rel=1e-12)


def test_the_numbers_of_a_batch():
    """[B, K, T], padded with 0 to the widest response, without gradient; the drawer's, not the
    policy's; a part at a time or at once."""
    drawer, reference = with_value(0), gpt2(1).requires_grad_(False)
    policy = moved(drawer)
    found = {}
    for size in (None, 1, 2):
        found[size] = ppo.of_batch(parallel, size, policy, drawer, reference, *BATCH)
        for name, values in found[size].items():
            assert values.shape == (3, 2, 4) and not values.requires_grad
            assert_close(values, found[None][name])
    assert set(found[None]) == set(ppo.OF_BATCH)
    for column, response in enumerate((Y, OTHER)):
        width = response.ids.shape[1]
        logp = policies.token_log_probs(drawer, PROMPT, response).detach()
        assert_close(found[None]["old_logp"][:, column, :width], logp)
        for values in found[None].values():
            behind = ~torch.nn.functional.pad(response.mask, (0, 4 - width))
            assert values[:, column][behind].abs().max() == 0


def test_what_v_reads():
    """The first token's is DRO's V(x). Another token changes the V after it, not its own nor the
    one before; and V has no gradient but in its own network, not in a reference that would take
    one either."""
    policy, reference = with_value(0), gpt2(1)

    def value(ids):
        response = policies.pad([ids], "right", 0)
        prompt = PROMPT.rows(slice(1, 2))
        return ppo.values(policy, ppo.read(reference, prompt, [response]), [response])[0, 0]

    first = value([1, 2, 3, 0])
    assert_close(first[0], dro.extra(policy, reference, PROMPT, None)[1])
    for place in range(4):
        ids = [1, 2, 3, 0]
        ids[place] = 4
        other = value(ids)
        assert_close(other[: place + 1], first[: place + 1])
        assert place == 3 or (other[place + 1 :] - first[place + 1 :]).abs().min() > 1e-4
    first.sum().backward()
    learns = {name for name, part in policy.named_parameters() if part.grad is not None}
    assert learns == {f"value.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert all(part.grad is None for part in reference.parameters())


def task_of(rewards):
    """A task of three prompts, and a reward that tells responses apart."""
    task = types.SimpleNamespace(prompts=lambda *_: PROMPT, max_response=4, judge=None)

    def reward(prompt, y):
        return rewards * (y.ids * y.mask).sum(1).double() - y.lengths()

    return task, reward


def recorded(monkeypatch):
    """The arguments of every call of ppo.loss: (logp, old_logp, old_value), a list that grows."""
    calls, loss = [], ppo.loss

    def watched(logp, ref_logp, rewards, tau, value, *, length, old_logp, old_value, **constant):
        calls.append((logp.detach(), old_logp, old_value))
        sides = logp, ref_logp, rewards, tau, value
        return loss(*sides, length=length, old_logp=old_logp, old_value=old_value, **constant)

    monkeypatch.setattr(ppo, "loss", watched)
    return calls


def test_epochs_by_hand(monkeypatch):
    """Two steps of two epochs through align: the weights are those of a hand-written loop, whose
    second epoch takes the old numbers of the first."""
    few = ["--epochs", "2", "--batch-size", "3", "--lr", "0.02", "--warm-up", "0", "--decay"]
    settings = parsed(*few, "none")
    task, reward = task_of(0.5)
    reference = gpt2(1).requires_grad_(False)
    policy, hand = gpt2(1), gpt2(1)
    calls = recorded(monkeypatch)
    clock = align(Clock(0, 1), settings, task, policy, reference, reward)
    ppo.prepare(hand)
    optimizer = torch.optim.AdamW(hand.parameters(), lr=0.02, weight_decay=0.0)
    for step in range(2):
        drawer = copy.deepcopy(hand)
        for _ in range(2):
            optimizer.zero_grad()
            by_hand(hand, drawer, reference, clock.pairs[step]).backward()
            optimizer.step()
    for name, part in hand.state_dict().items():
        assert_close(policy.state_dict()[name], part, 1e-9)
    assert policy.value[2].weight.abs().max() > 1e-3
    assert len(calls) == 4
    for first, second in (calls[:2], calls[2:]):
        assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])
        assert_close(first[0], first[1])
        assert (second[0] - second[1]).abs().max() > 1e-3


def test_a_lagging_drawers_numbers(monkeypatch):
    """--refresh 2: in step 1 pi_old and V_old are still those of the start, which drew the batch;
    in step 2 they are of the policy after two steps."""
    settings = parsed("--refresh", "2", "--batch-size", "3", "--lr", "0.02", "--warm-up", "0")
    task, reward = task_of(0.5)
    start = gpt2(1)
    policy, reference = copy.deepcopy(start), gpt2(1).requires_grad_(False)
    calls = recorded(monkeypatch)
    clock = align(Clock(0, 1, 2), settings, task, policy, reference, reward)
    _, *responses, _ = clock.pairs[1]
    with torch.no_grad():
        drawn = ppo.score(start, PROMPT, responses)
    assert_close(calls[1][1], drawn)
    assert (calls[1][0] - calls[1][1]).abs().max() > 1e-3
    assert calls[1][2].abs().max() == 0
    assert_close(calls[2][0], calls[2][1])
    assert calls[2][2].abs().max() > 1e-3


def test_ptx():
    """--ptx 0.5 adds half of the demos' gradient to the step's."""
    policy, reference = with_value(0), gpt2(1).requires_grad_(False)

    def demos(model):
        return -policies.log_prob(model, PROMPT, Y).mean()

    alone = copy.deepcopy(policy)
    gradients = torch.autograd.grad(demos(alone), alone.parameters(), materialize_grads=True)
    wanted = gradient_of(policy, reference, BATCH)[0]
    wanted = wanted + 0.5 * torch.cat([part.flatten() for part in gradients])
    assert_close(gradient_of(policy, reference, BATCH, demos=demos)[0], wanted)


def test_a_step_is_shown(capsys):
    """The first two prompts with their responses, and each token's old numbers."""
    policy, reference, settings = with_value(0), gpt2(1).requires_grad_(False), parsed()
    words = policies.word_tokenizer(["a", "b", "c", "d"])
    whole = of_batch(settings, ppo, policy, policy, reference, *BATCH)
    report.show(settings, ppo, words, policy, reference, *BATCH, **whole)
    out = capsys.readouterr().out
    asked = requested(ppo, policy, reference, *BATCH[:-1])
    found, _ = ppo.pair_losses(settings, ppo, policy, reference, *BATCH, **whole, **asked)
    shown = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("  loss")]
    assert shown == pytest.approx(found[:2].tolist(), abs=2e-6)
    logs = [line.split()[1:] for line in out.splitlines() if "old_logp" in line]
    assert len(logs) == 4
    assert [float(number) for number in logs[0]] == pytest.approx(
        whole["old_logp"][0, 0].tolist(), abs=1e-6
    )


@pytest.mark.slow
def test_processes_are_one_run(tmp_path):
    """Five prompts a step, two epochs, by one and two processes, whose rows are padded to widths of
    their own: ids equal, the last gradient of step 0 to 1e-9, the weights to 1e-9."""
    case = "ppo --epochs 2 --micro-batch-size 2"
    ids, gradient, weights, _ = ten_steps(case)
    parts = together(tmp_path, 2, lambda: ten_steps(case))
    for step, wanted in enumerate(ids):
        assert parts[0][0][step] + parts[1][0][step] == wanted
    for _, its_gradient, its_weights, _ in parts:
        assert apart(its_gradient, gradient) < 1e-9
        assert apart(its_weights, weights) < 1e-9


@pytest.mark.slow
def test_a_killed_run_is_resumed(tmp_path, monkeypatch):
    """Killed in step 6, between checkpoints 4 and 8, in the middle of a --refresh: policy, value
    network and metrics are those of the run that was not, to the bit."""
    short = "--supervised-steps 5 --preference-steps 5 --steps 9 --lr 0.01 --loss ppo".split()
    argv = [*short, "--epochs", "2", "--refresh", "3"]
    assert train.main(options(tmp_path, *argv, "--out", str(tmp_path / "whole" / "run"))) == 0
    plain = result(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        between(patch, lambda step: kill() if step == 6 else None)
        assert killed(*options(tmp_path, *argv))
    assert train.main(options(tmp_path, *argv, "--resume")) == 0
    assert same(result(tmp_path), plain)
    assert plain[0]["value.2.weight"].abs().max() > 0.01
