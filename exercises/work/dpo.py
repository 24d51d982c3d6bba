"""Exercise 5: your dpo.py.

Every name of the reference's dpo.py is at hand here, beside what you import. Your own helpers may
have any name: they stay yours, and change nothing for others. The handout: loss's docstring.
Run: pytest -m ex5
"""

import torch  # noqa: F401  for your code

from ipo import log_ratio_gap  # noqa: F401


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau, *, smoothing=0.0):
    """Soft-label DPO loss -p log sigmoid(tau h) - (1 - p) log sigmoid(-tau h), one value a pair.

    logp, logp_other:
        [B] log pi(y | x) and log pi(y' | x), nats, with gradient.
    ref_logp, ref_logp_other:
        [B] log pi_ref of the same responses, nats, without gradient.
    preference:
        [B] p(y > y' | x) in [0, 1]; 1 where y is a recorded winner, 0 where it is the loser.
    tau:
        above 0, the regularisation strength.
    smoothing:
        from 0, the source's DPO, to 1/2, where every label is a draw.

    Returns [B], unreduced. At h = 0 it is log 2 for every p.

    Exercise 5: online DPO is not a Nash solver. Functions: loss here, bandit.dpo_point, and
    predictions.json.

    Goal. Predict where online DPO stops, then show it: not at the Nash equilibrium, but for
    exceptions.
    Background. DPO puts h into a logistic loss: -log sigmoid(tau h) for the winner-loser order. It
    was derived for rewards, with data given in advance; nothing prevents drawing the pairs from the
    policy, as online IPO does. Its gradient compares p(y > y') with sigmoid(tau h): online DPO
    stops where sum_y' pi(y') (p(y > y') - sigmoid(tau h(y, y'))) = 0 for all y. At the regularised
    Nash equilibrium tau h(y, y') = p(y > pi*) - p(y' > pi*), so Nash is stationary for online DPO
    if and only if p(y > pi*) = sum_y' pi*(y') sigmoid(p(y > pi*) - p(y' > pi*)) for all y (F.5).
    Under Bradley-Terry preferences the policy pi_ref exp(r/tau)/Z satisfies online DPO's equation
    exactly (F.7): what RLHF wants, and not Nash. Some games are exceptions (F.8). tau stands in
    another place than in IPO: here it multiplies h.
    Task. First predictions.json: for each of the five games below, true if the Nash equilibrium
    (tau = 0.1) is stationary for online DPO, false if not. Think; do not run anything. Then loss,
    with smoothing: 0.1 puts 0.9 p + 0.1 (1 - p) in the place of p; and dpo_point: log pi at which
    online DPO stops, normalised. float64 [B] and [n]; in the JSON true and false, no strings.
      two_actions_0.7: p(1 > 2) = 0.7. two_actions_0.5: p = 0.5. Both with pi_ref = (0.3, 0.7).
      rock_paper_scissors_uniform: p = 0.9 round the cycle, uniform pi_ref.
      rock_paper_scissors_biased: pi_ref (0.6, 0.3, 0.1).
      bradley_terry_three: rewards 0, 0.5, 1.5, uniform pi_ref.
    Hints. logsigmoid stays finite where log(sigmoid) does not. dpo_point: newton(field, log_ref)
    finds a zero; one of the n equations is free (they sum to 0 under pi), so add to it what fixes
    the normalisation.
    Tests. Loss and slope by hand; h of 3,000 nats; the gradient at Nash against F.5 (it is not
    zero); dpo_point against its equation and F.7; the predictions.
    Questions. (1) Two actions: solve F.5 for p. (2) A team reports that online DPO "found the
    equilibrium" on rock-paper-scissors. Which other game would you ask them to try, and what do you
    expect?
    """
    raise NotImplementedError("Exercise 5: write the soft-label DPO loss")
