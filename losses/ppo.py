"""PPO as RLHF uses it: token by token, a value network, clipped steps (1707.06347, 2203.02155).

At token t of a response, with u = pi(y_t)/pi_old(y_t) and pi_old, V_old as the batch was drawn:
    r_t = -tau log pi_old(y_t)/pi_ref(y_t), and r(x, y) more at the last: end-of-text or the cut,
    A_t = sum over s >= t of lambda^(s - t) (r_s + V_old(y_<=s) - V_old(y_<s)), 0 behind the last,
    the loss: -min(u A_t, clip(u, 1 - eps, 1 + eps) A_t) + c/2 (V(y_<t) - V_old(y_<t) - A_t)^2,
summed over a response's tokens, the mean over a prompt's responses; nothing is discounted.
`--epochs 4` takes four steps on each batch; with one, u is 1 and nothing is clipped. `--ptx 0.5`
adds the demos' term: PPO-ptx. With --refresh the batch's numbers are of who drew it, as it was.
At u = 1 the gradient is the policy gradient. With lambda = 1, whatever V, or with the right V, its
expectation is RLOO's; below 1 a wrong V moves the point. A token's slope is 0 once its u is past
the clip on the side that A_t asks for; others' slopes may move it further: no bound holds pi.
V is dro.py's small network on the frozen reference's last hidden state before the token, trained
with the policy's optimiser. The papers train a separate model, begun as the reward model. Here too
no gradient of V reaches the policy's body; so, under Adam, c hardly matters.
From memory, InstructGPT's: eps 0.2, lambda 0.95, no discount, tau 0.02, ptx 27.8, one pass over
eight parts of a batch. Ours: steps on whole batches, c = 1, two responses a prompt.
Left out: whitening of A, a number of the batch that moves no point and whose scale Adam takes up;
clipping of V's step, a guard for a shared body; an entropy bonus; a tau that follows the KL; a
constant that makes the reward's mean 0, so that a V of 0 is not far off at the start.
Run: python -m losses.ppo    (one response of three tokens, by hand)
"""

from functools import partial

import torch
from torch.nn.functional import pad

import policy as policies
import rl
import side_by_side
from losses.dro import prepare  # noqa: F401  V's network, 0 to begin with
from losses.groups import PAIR  # noqa: F401
from losses.groups import label_rewards as label_pairs  # noqa: F401

TAU = rl.TAU  # the default: rl's, whose point it shares
RATE = rl.RATE  # the default of --lr, V's too: rl's, not tuned for this loss
RESPONSES = 2  # the default of --responses: as many as a pair method draws
LABEL = "rewards"  # each response's own reward
LEARNS_FROM = 2  # all of a group, one by one
OFFLINE = False  # the clip allows for a few steps, not for the samples of others
CONTRASTIVE = False
OF_BATCH = ("old_logp", "old_value")  # what of_batch gives


@torch.no_grad()
def of_batch(parallel, size, policy, drawer, reference, prompt, *responses_and_label):
    """{"old_logp", "old_value": [B, K, T]}: each token's log pi_old and V_old, 0 where padded.

    The drawer's, with the value network that it carries: the numbers of the batch as it was drawn.
    size: rows of a pass, or None.
    """
    *responses, _ = responses_and_label
    found = {"old_logp": [], "old_value": []}
    size = size or len(prompt.ids)
    for begin in range(0, len(prompt.ids), size):
        part = slice(begin, begin + size)
        given = prompt.rows(part), [response.rows(part) for response in responses]
        found["old_logp"].append(score(drawer, *given))
        found["old_value"].append(values(drawer, read(reference, *given), given[1]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def pair_losses(options, method, policy, reference, prompt, *responses_and_label, **asked):
    """The loss of every prompt's responses, and their mean log pi(y)/pi_ref(y), nats: [B] each.

    In place of train.pair_losses: it scores tokens, not responses. asked holds the lengths [B, K]
    and what of_batch gave.
    """
    *responses, rewards = responses_and_label
    given = prompt, responses
    of_policy = partial(score, policy, *given)
    of_reference = torch.no_grad()(partial(score, reference, *given))
    # The reference once more, for what V reads: without the output head it is the cheapest pass.
    states = partial(read, reference, *given)
    logp, ref_logp, states = side_by_side.run([of_policy, of_reference, states], options.device)
    value = values(policy, states, responses)
    cost = method.loss(logp, ref_logp, rewards, options.tau, value, **options.set, **asked)
    return cost, (logp - ref_logp).sum(-1).mean(1)


def score(model, prompt, responses):
    """log pi(y_t | x, y_<t) of all tokens of K responses, [B, K, T] nats, 0 where padded."""
    return side_by_width([policies.token_log_probs(model, prompt, y) for y in responses])


@torch.no_grad()  # V's loss must move V alone
def read(reference, prompt, responses):
    """What V reads: the reference's last hidden state before each token, [B, T, width] K times."""
    found = []
    begin = prompt.ids.shape[1] - 1
    for response in responses:
        ids = torch.cat([prompt.ids, response.ids], 1)
        mask = torch.cat([prompt.mask, response.mask], 1)
        place = policies.positions(mask)
        output = policies.forward(reference, ids, mask, place, keep=1, states=True)
        # From the prompt's last token to the last token but one: a column later, V would see the
        # token that it is a baseline for, and the gradient would be wrong.
        found.append(policies.raise_precision(output.hidden_states[-1][:, begin:-1]))
    return found


def values(policy, states, responses):
    """V(x, y_<t), [B, K, T] nats, 0 where padded, with gradient in policy.value alone.

    states: as read returns them.
    """
    found = []
    for state, response in zip(states, responses, strict=True):
        value = policies.raise_precision(policy.value(state)).squeeze(-1)
        # Behind the last token, end-of-text or cut, there is nothing more to come.
        found.append(value.masked_fill(~response.mask, 0.0))
    return side_by_width(found)


def side_by_width(columns):
    """K tensors [B, T_k], each padded with 0 to the widest, as [B, K, T]."""
    width = max(column.shape[1] for column in columns)
    return torch.stack([pad(column, (0, width - column.shape[1])) for column in columns], 1)


def token_rewards(log_ratio, rewards, tau, length):
    """-tau log_ratio at every token, and a response's reward more at its last, [..., T] nats.

    log_ratio:
        [..., T] log pi_old/pi_ref of each token, 0 where padded.
    rewards, length:
        [...] r(y) and the number of tokens, 1 or more.
    """
    return (-tau * log_ratio).scatter_add(-1, length[..., None] - 1, rewards[..., None])


def advantages(reward, value, trace):
    """Generalised advantage estimates (1506.02438) without discount, [..., T] nats.

    reward, value:
        [..., T], 0 where padded.
    trace:
        lambda in [0, 1]: at 0 each token's own error of V, at 1 the return to go less V.
    """
    following = pad(value[..., 1:], (0, 1))  # V after the token; behind the widest response 0
    error = reward + following - value
    found = []
    later = torch.zeros_like(error[..., 0])
    for place in reversed(range(error.shape[-1])):
        later = error[..., place] + trace * later
        found.append(later)
    return torch.stack(found[::-1], -1)


def loss(
    logp,
    ref_logp,
    rewards,
    tau,
    value,
    *,
    length,
    old_logp,
    old_value,
    clip=0.2,
    trace=0.95,
    value_weight=1.0,
):
    """PPO's loss, one value a group: the mean over its responses of sums over their tokens.

    logp, ref_logp:
        [B, K, T] each token's log pi and log pi_ref, nats, 0 where padded; logp with gradient.
    rewards:
        [B, K] r(y_k), nats.
    tau:
        above 0, the regularisation strength.
    value:
        [B, K, T] V before each token, nats, 0 where padded, with gradient in V alone.
    length:
        [B, K] tokens of each response, 1 or more.
    old_logp, old_value:
        [B, K, T] log pi and V as the batch was drawn, without gradient: equal ones at every epoch.
    clip:
        above 0, eps: how far u may leave 1.
    trace:
        in [0, 1], lambda.
    value_weight:
        0 or more, c.

    Returns [B], unreduced: its value means nothing.
    """
    with torch.no_grad():  # the score function's weights and V's target are numbers
        # pi_old, not pi: the penalty is a part of the return that was drawn.
        reward = token_rewards(old_logp - ref_logp, rewards, tau, length)
        advantage = advantages(reward, old_value, trace)
        target = advantage + old_value
    ratio = (logp - old_logp).exp()
    # The smaller gain: no credit for going past the clip, full cost for having gone the wrong way.
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    # Where padded, gain and value and target are 0.
    cost = value_weight / 2 * (value - target) ** 2 - gain
    return cost.sum(-1).mean(-1)


def worked_example():
    """Prints rewards, advantages, targets and clipped gains of a response of three tokens."""
    rows = [[-1.0, -2.0, -0.5], [-1.5, -2.0, -1.0], [0.4, 0.8, 1.0], [-0.7, -2.3, -0.5]]
    old_logp, ref_logp, old_value, logp = torch.tensor(rows, dtype=torch.float64)
    one, length = torch.ones((), dtype=torch.float64), torch.tensor(3)
    print("log pi_old -1, -2, -0.5, log pi_ref -1.5, -2, -1, r = 1, tau = 0.2, V 0.4, 0.8, 1")
    reward = token_rewards(old_logp - ref_logp, one, 0.2, length)
    print("  r_t: -0.2 * 0.5, 0, 1 - 0.2 * 0.5      ", text(reward))
    error = advantages(reward, old_value, 0.0)
    print("  errors r_t + V_next - V                ", text(error))
    advantage = advantages(reward, old_value, 0.5)
    print("  lambda 0.5: each + 0.5 the next's A_t  ", text(advantage))
    print("  targets of V: A_t + V                  ", text(advantage + old_value))
    logp.requires_grad_()
    print("later log pi is -0.7, -2.3, -0.5, eps 0.2:")
    print("  u = e^0.3, e^-0.3, e^0                 ", text((logp - old_logp).exp()))
    given = dict(length=length[None, None], old_logp=old_logp[None, None], trace=0.5)
    sides = logp[None, None], ref_logp[None, None], one[None, None]
    value = old_value[None, None]
    cost = loss(*sides, 0.2, value, old_value=value, **given)
    (slope,) = torch.autograd.grad(cost.sum(), logp)
    print("  slopes on log pi: 0 past 1.2, else -u A", text(slope))


def text(numbers):
    # + 0.0: not "-0.0000"
    return " ".join(f"{number:+.4f}" for number in (numbers + 0.0).tolist())


if __name__ == "__main__":
    worked_example()
