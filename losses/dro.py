"""DRO-V: each response's reward against a value of its prompt, no pairs (2405.19107).

1/2 (r(x, y) - V(x) - tau log pi(y)/pi_ref(y))^2, minimised in pi and V at once; the mean over the
group, whose responses have nothing to do with each other. Its minimum, whoever drew the responses:
pi = pi_ref exp(r/tau)/Z and V = tau log Z. tau is the paper's, 1 there (from memory).
V is a small network on the frozen reference's last hidden state at the prompt's last token. The
paper trains two separate models and finds a shared body worse (from memory); so no gradient of V
reaches the policy here. V belongs to the run: the policy carries it through checkpoints.
Left out: the policy's rate divided by tau, as one program has it; labels of recorded responses.
Run: python -m losses.dro    (residuals and slopes at and beside the minimum)
"""

import torch

import policy as policies
from losses.groups import PAIR, pair_losses  # noqa: F401
from losses.groups import label_rewards as label_pairs  # noqa: F401

TAU = 1.0  # the default: the paper's
RATE = 2e-3  # the default of --lr, V's too: dpo's, not tuned for this loss
RESPONSES = 2  # the default of --responses
LABEL = "rewards"  # each response's own reward; V takes up their unknown constant
LEARNS_FROM = 2  # all of a group
OFFLINE = False  # records have no rewards
CONTRASTIVE = False


def prepare(policy):
    """Gives the policy V's network, as policy.value; V is 0 to begin with."""
    width = policy.get_output_embeddings().weight.shape[1]
    with torch.random.fork_rng():  # the weights depend on nothing, and move no random state
        torch.manual_seed(0)
        inner, outer = torch.nn.Linear(width, width), torch.nn.Linear(width, 1)
    for parameter in outer.parameters():
        torch.nn.init.zeros_(parameter)
    value = torch.nn.Sequential(inner, torch.nn.GELU(), outer)
    policy.value = value.to(policy.device, policy.dtype)


def extra(policy, reference, prompt, response):
    """V(x), [B] nats, with gradient in policy.value alone; it does not see the response."""
    place = policies.positions(prompt.mask)
    with torch.no_grad():
        read = policies.forward(reference, *prompt, place, keep=1, states=True)
    # Padding is on the left: the last column is every prompt's last token.
    state = policies.raise_precision(read.hidden_states[-1][:, -1])
    return policies.raise_precision(policy.value(state)).squeeze(-1)


def loss(logp, ref_logp, rewards, tau, *, extra):
    """DRO-V loss, one value a group: the mean of its responses'.

    logp, ref_logp:
        [B, K] log pi(y_k | x) and the reference's, nats; the first with gradient.
    rewards:
        [B, K] r(y_k), nats.
    tau:
        above 0, the regularisation strength.
    extra:
        [B, K] V(x), nats, with gradient.

    Returns [B], unreduced.
    """
    # Neither side is detached: V fits the level, and pi the differences.
    residual = rewards - extra - tau * (logp - ref_logp)
    return (residual**2).mean(-1) / 2


def worked_example():
    """Prints residuals and slopes of two responses at the minimum, and with V off by 1/2."""
    ref_logp = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    rewards = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    print("two responses, pi_ref 1/2 each, r = 2 and 0, tau = 1")
    level = torch.logsumexp(ref_logp + rewards, 1)
    print(
        f"V = log(e^2/2 + 1/2) = {level.item():.4f}, pi = sigmoid(2), sigmoid(-2): 0.8808, 0.1192"
    )
    for off in (0.0, 0.5):
        logp = (ref_logp + rewards - level[:, None]).requires_grad_()
        value = (level + off).requires_grad_()
        cost = loss(logp, ref_logp, rewards, 1.0, extra=value[:, None].expand(1, 2))
        slope, slope_value = torch.autograd.grad(cost.sum(), (logp, value))
        print(f"  V + {off}: loss {cost.item():.4f}, slopes on log pi", end=" ")
        print(f"{slope[0, 0]:+.4f} {slope[0, 1]:+.4f}, on V {slope_value.item():+.4f}")


if __name__ == "__main__":
    worked_example()
