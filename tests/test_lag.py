"""What lags behind the policy: --refresh, --renew-reference, --epochs, --ptx, and INPO, which needs
such a copy.

Each is compared with a loop by hand in float64 that knows no copies: it keeps every step's weights.
"""

import copy
import json
import os
import signal

import pytest
import torch

import data
import evaluate
import ipo
import policy as policies
import preference_model
import sampler
import train
from clock import Clock, align
from job import run as runs
from job.options import find_method, of_batch, parse
from losses import inpo
from test_golden import fill, gpt2
from test_resume import between, names_of, result, same

SMALL = (
    "--supervised-steps 6 --preference-steps 6 --steps 12 --save-every 50 --batch-size 4".split()
)
SMALL += "--eval-prompts 8 --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        yield


class Course:
    """A short float64 training by train.align, with the policy as it was before every step."""

    def __init__(self, *argv, steps=6):
        argv = ["--batch-size", "4", "--lr", "1e-2", "--steps", str(steps), "--warm-up", "0", *argv]
        self.options = parse([*argv, "--device", "cpu"])
        self.method = find_method(self.options.loss)
        self.task = data.BuiltIn(0)
        self.start = gpt2(1).requires_grad_(False)
        self.policy = copy.deepcopy(self.start).requires_grad_(True)
        self.preference = fill(preference_model.PreferenceModel(self.start), 2)
        self.preference.requires_grad_(False)
        self.before = [copy.deepcopy(self.policy)]
        self.clock = Clock(*range(steps), after=lambda _: self.keep())
        models = self.policy, self.start, self.preference
        align(self.clock, self.options, self.task, *models)

    def keep(self):
        self.before.append(copy.deepcopy(self.policy))

    def drawn(self, step, model, reference):
        """The step's two responses if model drew them, as lists."""
        count, most = self.options.batch_size, self.task.max_response
        uniforms = data.uniforms(data.generator(0, "sample", step), most, 2, count)
        prompt = self.task.prompts("align", step, count)
        given = model, reference, prompt, self.options.beta, uniforms
        return [part.lists() for part in sampler.draw_pairs(self.method.PAIR, *given)]

    def loss(self, step, model, reference, **more):
        """The mean loss of the step's own pairs, by hand."""
        prompt, y, other, label = self.clock.pairs[step]
        sides = [policies.log_prob(which, prompt, side) for which in (model, reference)
                 for side in (y, other)]  # fmt: skip
        return self.method.loss(*sides, label, self.options.tau, **more).mean()


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def ids(clock, step):
    return [part.lists() for part in clock.pairs[step][1:3]]


@pytest.mark.parametrize("loss", ["ipo", "ipo_md"])
def test_refresh_draws_from_the_policy_of_the_last_renewal(loss):
    """Every third step from the policy, the two behind it from the same; the reference stays, so
    the loss's value is that of the policy of the step itself."""
    course = Course("--loss", loss, "--refresh", "3")
    late = 0
    for step in range(6):
        drawer = course.before[step - step % 3]
        assert ids(course.clock, step) == course.drawn(step, drawer, course.start)
        late += ids(course.clock, step) != course.drawn(step, course.before[step], course.start)
        value = course.loss(step, course.before[step], course.start).item()
        assert course.clock.numbers[step]["loss"] == pytest.approx(value, rel=1e-12)
    assert late >= 3, "the policy itself would have drawn other pairs"


def test_all_of_a_run_is_offline_on_own_samples():
    """--refresh of all steps: every pair is the start's."""
    course = Course("--loss", "dpo", "--refresh", "6")
    for step in range(6):
        assert ids(course.clock, step) == course.drawn(step, course.start, course.start)


def test_a_renewed_reference():
    """Loss, log-ratio and the mixture that draws are of the reference of the last renewal."""
    course = Course("--loss", "ipo_md", "--beta", "0.5", "--renew-reference", "2")
    for step in range(6):
        reference = course.before[step - step % 2]
        assert ids(course.clock, step) == course.drawn(step, course.before[step], reference)
        value = course.loss(step, course.before[step], reference).item()
        assert course.clock.numbers[step]["loss"] == pytest.approx(value, rel=1e-12)
        if step % 2 == 0:
            assert course.clock.numbers[step]["log_ratio"] == pytest.approx(0, abs=1e-12)
        elif step > 2:
            far = course.loss(step, course.before[step], course.start).item()
            assert abs(far - value) > 1e-3 * value


def test_evaluations_and_recorded_pairs_are_the_starts(monkeypatch):
    """A renewed reference is the loss's alone: sDPO's pairs are those of DPO, and what a run is
    compared with stays the start."""
    plain = Course("--loss", "dpo", "--offline")
    moved = Course("--loss", "dpo", "--offline", "--renew-reference", "2")
    for step in range(6):
        assert ids(plain.clock, step) == ids(moved.clock, step)
    assert not torch.equal(flat(plain.policy), flat(moved.policy))
    seen = []
    monkeypatch.setattr(evaluate, "validate", lambda policy, other, *_: seen.append(flat(other)))
    course = plain
    course.policy.load_state_dict(course.start.state_dict())
    options = parse("--steps 12 --batch-size 2 --device cpu --renew-reference 1".split())
    models = course.policy, course.start, course.preference, course.task.judge
    train.align(Clock(0, 1, 10), options, find_method("ipo_md"), course.task, *models)
    assert len(seen) == 3 and all(torch.equal(weights, flat(course.start)) for weights in seen)


def test_epochs_are_steps_on_one_batch():
    """Two a batch, as a loop by hand with AdamW of its own takes them."""
    course = Course("--loss", "ipo", "--epochs", "2", steps=3)
    policy = copy.deepcopy(course.start).requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        assert ids(course.clock, step) == course.drawn(step, policy, course.start)
        for _ in range(2):
            optimizer.zero_grad()
            course.loss(step, policy, course.start).backward()
            optimizer.step()
    assert (flat(policy) - flat(course.policy)).abs().max() < 1e-10


def test_ptx_adds_the_demos_gradient(monkeypatch):
    """One step's gradient: the loss's and half that of 32 demos' mean loss a token, by hand."""
    course = Course("--loss", "ipo", "--ptx", "0.5", steps=1)
    found = torch.cat([parameter.grad.flatten() for parameter in course.policy.parameters()])
    policy = course.before[0]
    prompt, response = course.task.demos(0, 32)
    demos = policies.log_prob(policy, prompt, response).sum() / sum(map(len, response.lists()))
    (course.loss(0, policy, course.start) - 0.5 * demos).backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()


# ---- INPO ----


def sgd_in_place_of_adam(monkeypatch, scale):
    """AdamW steps by the gradient's direction alone; plain descent, its rate times a scale."""

    def optimizer(parameters, lr, weight_decay):
        return Descent(list(parameters), scale)

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)


class Descent(torch.optim.SGD):
    """SGD whose rate is the one it is given, times a scale."""

    def __init__(self, parameters, scale):
        super().__init__(parameters, lr=0.0)
        self.scale = scale

    def step(self):
        rate = self.param_groups[0]["lr"]
        self.param_groups[0]["lr"] = rate * self.scale
        super().step()
        self.param_groups[0]["lr"] = rate


@pytest.mark.parametrize("ratio", [1 / 3, pytest.param(0.8, marks=pytest.mark.slow)])
def test_inpo_with_one_step_a_batch_is_online_ipo(monkeypatch, ratio):
    """The real trainer by plain descent, INPO's rate 1/ratio times IPO's: the same pairs, the same
    weights after six steps. Two steps a batch, or a copy that lags, and they part."""
    weights = {}
    for more in ((), ("--epochs", "2"), ("--refresh", "2")):
        for loss, scale in (("ipo", 0.1), ("inpo", 0.1 / ratio)):
            sgd_in_place_of_adam(monkeypatch, scale)
            chosen = ["--set", f"ratio={ratio}"] if loss == "inpo" else []
            weights[loss, more] = flat(Course("--loss", loss, *chosen, *more).policy)
    moved = (weights["ipo", ()] - flat(gpt2(1))).norm()
    apart = {more: (weights["ipo", more] - weights["inpo", more]).norm() for _, more in weights}
    assert moved > 1e-3 and apart[()] < 1e-9 * moved
    assert apart["--epochs", "2"] > 1e-3 * moved and apart["--refresh", "2"] > 1e-3 * moved


def test_inpo_by_hand_and_its_limits():
    """The authors' form on the winner first, both orders weighed by p; at ratio 1 it is IPO; the
    target is where the slope is 0; equal policies cost ratio^2/(4 tau^2)."""
    generator = torch.Generator().manual_seed(0)
    logp, other, ref, ref_other, old, old_other = torch.randn(
        6, 5, generator=generator, dtype=torch.float64
    )
    p, tau, ratio = torch.linspace(0, 1, 5, dtype=torch.float64), 0.2, 0.4
    eta = tau / ratio
    gap = (logp - other) - ratio * (ref - ref_other) - (1 - ratio) * (old - old_other)
    wanted = p * (gap - 1 / (2 * eta)) ** 2 + (1 - p) * (-gap - 1 / (2 * eta)) ** 2
    drawn = ipo.log_ratio_gap(old, old_other, ref, ref_other)
    sides = logp, other, ref, ref_other
    found = inpo.loss(*sides, p, tau, drawn_gap=drawn, ratio=ratio)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    alone = inpo.loss(*sides, p, tau, drawn_gap=drawn, ratio=1.0)
    torch.testing.assert_close(alone, ipo.loss(*sides, p, tau), rtol=1e-12, atol=1e-12)
    h = inpo.target_gap(p, tau, drawn_gap=drawn, ratio=ratio).requires_grad_()
    zero = torch.zeros(5, dtype=torch.float64)
    value = inpo.loss(h, zero, zero, zero, p, tau, drawn_gap=drawn, ratio=ratio)
    assert torch.autograd.grad(value.sum(), h)[0].abs().max() < 1e-12
    start = inpo.loss(zero, zero, zero, zero, p, tau, drawn_gap=zero, ratio=ratio)
    torch.testing.assert_close(start, torch.full_like(p, ratio**2 / (4 * tau**2)))


def test_the_gap_of_who_drew():
    """Of the drawer, not of the policy, a part at a time or at once, and without gradient."""
    course = Course("--loss", "ipo", steps=1)
    policy, drawer = gpt2(3), gpt2(4)
    batch = course.clock.pairs[0]
    options = parse(["--loss", "inpo", "--device", "cpu", "--micro-batch-size", "3"])
    found = of_batch(options, inpo, policy, drawer, course.start, *batch)["drawn_gap"]
    prompt, y, other, _ = batch
    sides = []
    for model in (drawer, course.start):
        sides += [policies.log_prob(model, prompt, side) for side in (y, other)]
    assert not found.requires_grad
    torch.testing.assert_close(found, ipo.log_ratio_gap(*sides).detach(), rtol=1e-12, atol=1e-12)


# ---- whole runs ----


def job(folder, *more):
    places = ["--stages", str(folder / "stages"), "--out", str(folder / "run")]
    return train.main([*SMALL, *places, *more])


LAGS = "--loss inpo --refresh 3 --renew-reference 5 --epochs 2 --ptx 0.1".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with all of them: its folder and its result."""
    folder = tmp_path_factory.mktemp("whole")
    assert job(folder, *LAGS) == 0
    return folder, result(folder)


def test_a_stopped_run_goes_on_with_its_copies(whole, tmp_path, monkeypatch):
    """Stopped in a step in which all copies are older than the policy, and resumed: the same bits.
    A damaged copy makes the checkpoint a damaged one."""
    os.symlink(whole[0] / "stages", tmp_path / "stages")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        between(patch, stop)
        assert job(tmp_path, *LAGS, "--save-every", "4") == 130
    signal.signal(signal.SIGINT, handler)
    assert names_of(tmp_path / "run") == ["checkpoint-000004", "checkpoint-000008"]
    copy_file = tmp_path / "run" / "checkpoint-000008" / "drawer.safetensors"
    state = json.loads((copy_file.parent / "state.json").read_text())
    assert {"drawer.safetensors", "reference.safetensors"} < state["files"].keys()
    kept = copy_file.read_bytes()
    copy_file.write_bytes(kept[:-8] + b"\0" * 8)
    assert job(tmp_path, *LAGS, "--save-every", "4", "--resume") == 0
    assert same(result(tmp_path), whole[1])


@pytest.mark.slow
def test_a_stopped_run_without_its_copies_would_differ(whole, tmp_path, monkeypatch):
    """The same stop, with copies that are renewed when the run goes on: other weights. So the test
    above sees them."""
    os.symlink(whole[0] / "stages", tmp_path / "stages")
    renew = policies.renew

    def stop(step):
        if step == 7:
            raise KeyboardInterrupt(2)

    with monkeypatch.context() as patch:
        between(patch, stop)
        assert job(tmp_path, *LAGS, "--save-every", "7") == 130

    def forget(copies, policy, step, options):
        renew(copies, policy, 0 if step == 7 else step, options)

    monkeypatch.setattr(policies, "renew", forget)
    assert job(tmp_path, *LAGS, "--save-every", "7", "--resume") == 0
    assert not same(result(tmp_path), whole[1])


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    for argv, advice in (
        (["--loss", "ipo", "--offline", "--refresh", "2"], "--offline draws no pairs"),
        (["--loss", "inpo", "--offline"], "--loss inpo learns from its own samples"),
        (["--refresh", "0"], "give a whole number above 0"),
        (["--epochs", "0"], "give a whole number above 0"),
        (["--renew-reference", "-1"], "give a whole number, 0 or more"),
        (["--ptx", "-1"], "give a number, 0 or more"),
        (["--ptx", "nan"], "give a number, 0 or more"),
    ):
        assert job(tmp_path, *argv) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and advice in error[0]
        assert any(word in error[0] for word in argv if word.startswith("--") and word != "--loss")
    with pytest.raises(ValueError, match="--ptx 1: there is nothing to imitate"):
        rule = tmp_path / "rule.py"
        rule.write_text("")
        given = ["--prompts", "x.jsonl", "--preference", str(rule), "--policy", "gpt2"]
        parse([*given, "--supervised-steps", "0", "--ptx", "1"])


def test_a_run_from_before_these_options_goes_on(whole, tmp_path, capsys):
    """A config that lacks them had their defaults: finished it is shown, with others refused."""
    os.symlink(whole[0] / "stages", tmp_path / "stages")
    assert job(tmp_path, "--loss", "ipo") == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in runs.LATER:
        assert config.pop(name) == runs.LATER[name]
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert job(tmp_path, "--loss", "ipo") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert job(tmp_path, "--loss", "ipo", "--epochs", "2") == 2
    assert "epochs 1 there, 2 here" in capsys.readouterr().err
