"""Every policy against every other, from one set of responses: one of each policy to each prompt.

So a policy is sampled once, whatever the number of its rivals, and all comparisons of it share that
sample. The line holds matrices, row against column: the win rate under the panel (the truth), the
learned model's, and, where asked for, KL(row, column) in nats.
No command of its own: see table2.py and same_tau.py.
"""

import hashlib

import job  # noqa: F401  before torch: it sets how torch's threads wait

# isort: split
import torch

import data
import policy as policies
import preference_model
import sampler
from studies import runs

CHUNK = 100  # prompts at a time


def tournament(study, key, players, lines, split="test", kl=False):
    """The line of a tournament.

    key:
        of the line's name, with a hash of the players: others play another tournament.
    players:
        policies as runs.load_policy names them.
    lines:
        of the runs whose policies they are.
    split:
        "validation" or "test"; how many prompts is the study's.
    kl:
        True for the matrix of KLs, a scoring for each pair.
    """
    digest = hashlib.sha256(" ".join(players).encode()).hexdigest()[:8]
    count = study.test if split == "test" else study.prompts
    todo = dict(name=f"tournament {key} {digest}", players=players, split=split, kl=kl)
    runs.run_again(study, [todo], lines)
    return runs.gather(study, play, [dict(todo, where=runs.where(study, count))])[0]


@torch.no_grad()
def play(todo):
    """Plays a tournament. Returns its line: win_rate, learned and kl, lists of rows."""
    there, names = todo["where"], todo["players"]
    task = data.BuiltIn()
    learned = preference_model.load(there["shared"]["learned"])
    models = [runs.load_policy(there, name) for name in names]
    names_of = ["win_rate", "learned", *(["kl"] if todo["kl"] else [])]
    size = len(models)
    totals = {name: torch.zeros(size, size, dtype=torch.float64) for name in names_of}
    count = there["prompts"]
    for step in range(-(-count // CHUNK)):  # rounded up
        prompt = task.prompts(todo["split"], step, CHUNK).rows(slice(0, count - step * CHUNK))
        answers = [
            answer(model, task, prompt, todo["split"], step, k) for k, model in enumerate(models)
        ]
        vectors = [learned.read(prompt, y) for y in answers]
        for row in range(size):
            for column in range(row + 1, size):
                p = task.judge(prompt, answers[row], answers[column])
                q = torch.sigmoid(learned.compare_vectors(vectors[row], vectors[column]))
                for name, values in (("win_rate", p), ("learned", q)):
                    won = values.double().sum()
                    totals[name][row, column] += won
                    totals[name][column, row] += len(values) - won  # p(y' > y) = 1 - p(y > y')
            if todo["kl"]:
                scores = [policies.log_prob(model, prompt, answers[row]) for model in models]
                own = scores[row]
                totals["kl"][row] += torch.stack([(own - s).double().sum() for s in scores])
    line = runs.line_of(todo)
    for name in names_of:
        matrix = totals[name] / count
        if name != "kl":
            matrix.fill_diagonal_(0.5)
        line[name] = matrix.tolist()
    return line | dict(prompts=count)


def answer(model, task, prompt, split, step, player):
    """A player's response to each prompt, Tokens. Each has uniforms of its own: with another's it
    would give a twin's responses to a twin, and p = 1/2 for free."""
    rng = data.generator(0, f"{split} player {player}", step)
    drawn = data.uniforms(rng, task.max_response, 1, len(prompt.ids))[:, 0]
    ids, mask, _ = sampler.sample(model, None, prompt, 0.0, None, task.max_response, drawn)
    return policies.Tokens(ids, mask)
