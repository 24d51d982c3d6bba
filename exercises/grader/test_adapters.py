"""A student's file is a namespace of its own: what stays theirs, what is read, what is lost."""

import sys

import pytest
import torch

from exercises.grader import adapters
from exercises.teacher.mutants_table import run


@pytest.fixture(autouse=True)
def the_reference_afterwards():
    yield
    adapters.put_back()


def graded(folder, exercise, handout=False, **files):
    """(points, failed) of a folder with these files: name without .py -> text or bytes."""
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (folder / f"{name}.py").write_bytes(content)
    adapters.lay(folder, exercise, handout)
    return run(exercise)


IPO = """import torch


def target_gap(h, tau):
    return h, 1 / (2 * tau)


def log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other):
    return (logp - ref_logp) - (logp_other - ref_logp_other)


def loss(logp, logp_other, ref_logp, ref_logp_other, preference, tau):
    h, target = target_gap(log_ratio_gap(logp, logp_other, ref_logp, ref_logp_other), tau)
    return preference * (h - target) ** 2 + (1 - preference) * (h + target) ** 2
"""
POLICY = """import torch


def forward(model, ids, mask):
    return model(input_ids=ids, attention_mask=mask.long(), position_ids=pad(mask)).logits


def pad(mask):
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def token_log_probs(model, prompt, response):
    ids = torch.cat([prompt.ids, response.ids], 1)
    logits = forward(model, ids, torch.cat([prompt.mask, response.mask], 1))
    logits = logits[:, prompt.ids.shape[1] - 1 : -1]
    precise = logits if logits.dtype == torch.float64 else logits.float()
    every = precise.log_softmax(-1).gather(2, response.ids[..., None])[..., 0]
    return every * response.mask


def log_prob(model, prompt, response):
    return token_log_probs(model, prompt, response).sum(1)
"""
DPO_POINT = """
def newton(matrix):
    return matrix.sum(-1)


def dpo_point(preferences, log_ref, tau):
    log_pi = log_ref
    for _ in range(2000):
        pull = preferences - bradley_terry(tau * (log_pi - log_ref))
        log_pi = torch.log_softmax(log_pi + newton(pull * log_pi.exp()) / tau, -1)
    return log_pi
"""


@pytest.mark.parametrize("handout", [True, False])
def test_helpers_stay_the_students(handout, tmp_path):
    """Named like functions of the reference that do something else, they reach nobody else."""
    points, failed = graded(tmp_path, 2, handout, ipo=IPO)
    assert points == 10 and sys.modules["ipo"].target_gap(1.0, 0.5) == 1.0, failed
    adapters.put_back()
    nash_md = (adapters.ROOT / "nash_md.py").read_text(encoding="utf-8")
    points, failed = graded(tmp_path, 7, policy=POLICY, nash_md=nash_md)
    assert points == 10, failed
    assert sys.modules["policy"].pad([[1]], "left", 0).ids.tolist() == [[1]]


def test_a_solver_called_newton(tmp_path):
    """dpo_point uses the student's newton; fixed_point, the reference's here, its own."""
    dpo = (adapters.ROOT / "dpo.py").read_text(encoding="utf-8")
    answers = (adapters.ROOT / "exercises/teacher/answers/predictions.json").read_bytes()
    (tmp_path / "predictions.json").write_bytes(answers)
    points, failed = graded(tmp_path, 5, bandit=DPO_POINT, dpo=dpo)
    assert points == 10, failed


def test_byte_order_mark_and_line_ends(tmp_path):
    windows = b"\xef\xbb\xbf" + IPO.replace("\n", "\r\n").encode()
    assert graded(tmp_path, 2, ipo=windows) == (10, {})


@pytest.mark.parametrize(
    "line", ["print(loss(1, 2))", "assert loss is None", "exit()", "from nowhere import x", "1/0"]
)
def test_a_debug_line_costs_itself(line, tmp_path):
    for text in (f"{IPO}\n{line}\n", f"{line}\n{IPO}"):
        assert graded(tmp_path, 2, ipo=text) == (10, {})
        (problem,) = adapters.laid["problems"]["ipo"]
        assert problem.startswith("ipo.py, line ")


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    points, failed = graded(tmp_path, 2, ipo=IPO.replace("return h, 1", "return (h, 1"))
    assert points == 0 and len(failed) == 5
    assert all("ipo.py does not define" in message for message in failed.values())
    assert all("cannot be read: '(' was never closed" in message for message in failed.values())


def test_another_exercises_function_is_the_references(tmp_path):
    """A wrong win_rate in the file costs exercise 1 and no other; in a handout it is one's own."""
    bandit = (adapters.ROOT / "bandit.py").read_text(encoding="utf-8")
    wrong = bandit.replace(
        "return (preferences @ log_opponent.exp()[..., None])[..., 0]",
        "return (preferences @ log_opponent.exp()[..., None])[..., 0] / 2",
    )
    ipo_md = (adapters.ROOT / "ipo_md.py").read_text(encoding="utf-8")
    assert graded(tmp_path, 1, bandit=wrong)[0] == 6
    assert graded(tmp_path, 3, bandit=wrong, ipo_md=ipo_md) == (10, {})
    assert graded(tmp_path, 3, handout=True, bandit=wrong, ipo_md=ipo_md)[0] < 10


def test_default_dtype_at_the_top_of_a_file(tmp_path):
    points, failed = graded(
        tmp_path, 2, ipo=f"import torch\ntorch.set_default_dtype(torch.float64)\n{IPO}"
    )
    assert points == 0 and torch.get_default_dtype() == torch.float32
    assert all("changes torch's default dtype" in message for message in failed.values())


def test_the_line_of_a_wrong_value_is_named(tmp_path):
    wrong = IPO.replace(
        "return (logp - ref_logp) - (logp_other", "return (logp - 2 * ref_logp) - (logp_other"
    )
    _, failed = graded(tmp_path, 2, ipo=wrong)
    assert "from ipo.py, line 9: return (logp - 2 * ref_logp)" in failed["test_gap"]


def key_of(value):
    """Something to look a result up by: a tensor's numbers, anything else as text."""
    if torch.is_tensor(value):
        return str(value.tolist())
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(
    "exercise, target",
    [(1, "bandit.cycle"), (1, "bandit.bradley_terry"), (1, "bandit.win_rate"), (3, "bandit.kl")]
    + [(3, "bandit.duality_gap"), (3, "ipo_md.mixture"), (5, "bandit.dpo_point")],
)
def test_a_table_of_the_visible_answers_fails(exercise, target, monkeypatch):
    """Written down in the handout's course it is right there, and wrong in another course."""
    module, name = target.split(".")
    adapters.put_back()
    right, table = getattr(sys.modules[module], name), {}

    def write_down(*arguments):
        key = tuple(map(key_of, arguments))
        table[key] = table.get(key, right(*arguments))
        return table[key]

    def look_up(*arguments):
        return table[tuple(map(key_of, arguments))]

    for function, seed, points in ((write_down, 0, 10), (look_up, 0, 10), (look_up, 1, None)):
        monkeypatch.setitem(adapters.course, "seed", seed)
        monkeypatch.setattr(sys.modules[module], name, function)
        found, _ = run(exercise)
        assert found == points if points else found < 10
