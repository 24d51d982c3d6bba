"""A judge that says what it is worth: models of recorded comparisons stop where they are best, are
held beside what lengths alone tell, warn, and are used again."""

import itertools
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import policy as policies
import preference_model
import train
from data import Comparisons
from job import recorded, report, stages
from job.options import SIZES, parse
from reference_sampler import END, gpt2
from studies import judge as study
from studies import preference as alone
from test_data import records, task_of, write
from test_golden import fill
from test_parallel import apart, flat, together
from test_resume import between, fork

FEW = "--supervised-steps 4 --preference-steps 6 --steps 4 --batch-size 4 --eval-prompts 12".split()
FEW += "--max-prompt-tokens 12 --max-response-tokens 8 --device cpu --save-every 2".split()


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


# ---- intervals ----


def binomial(count, wins, p):
    return math.comb(count, wins) * p**wins * (1 - p) ** (count - wins)


def test_wilson():
    """Its ends are the p from which the share is 1.96 standard errors of p away (1e-12); it holds
    the true p in 93 to 97 % of all samples of 100, summed exactly, and 0 of 10 has a width."""
    for wins, count in ((3, 10), (58, 100), (0, 10), (10, 10)):
        for p in preference_model.wilson(wins, count):
            away = wins / count - p
            assert away**2 == pytest.approx(1.96**2 * p * (1 - p) / count, abs=1e-12)
    assert preference_model.wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-4)
    for p in (0.3, 0.5, 0.62, 0.75):
        held = 0.0
        for wins in range(101):
            low, high = preference_model.wilson(wins, 100)
            held += binomial(100, wins, p) * (low <= p <= high)
        assert 0.93 < held < 0.97, p


@pytest.mark.parametrize("count, one, other", [(40, 0.2, 0.1), (230, 0.15, 0.25), (40, 0.05, 0.02)])
def test_paired_interval_holds_the_difference(count, one, other):
    """In at least 93 % of 2,000 samples of pairs of which a share is right by the one rule alone,
    and by the other alone; and it is shorter than that of two independent samples."""
    rng = torch.Generator().manual_seed(0)
    held, width = 0, 0.0
    for _ in range(2000):
        drawn = torch.rand(count, generator=rng)
        difference = (drawn < one).double() - (drawn > 1 - other).double()
        low, high = preference_model.paired_interval(difference)
        held += low <= one - other <= high
        width += (high - low) / 2000
    assert held / 2000 > 0.93
    # Two shares around 1/2, each of its own pairs.
    assert width < 2 * 1.96 * (2 * 0.25 / count) ** 0.5


def test_correlation_does_not_know_who_stands_first():
    """By hand, with numpy's coefficient of both orders, and unchanged where pairs are exchanged."""
    rng = torch.Generator().manual_seed(1)
    one = torch.rand(30, generator=rng, dtype=torch.float64) - 0.4
    other = torch.randint(-5, 9, (30,), generator=rng).double()
    found = preference_model.correlation(one, other)
    both = torch.stack([torch.cat([one, -one]), torch.cat([other, -other])])
    assert found == pytest.approx(torch.corrcoef(both)[0, 1].item(), abs=1e-12)
    sign = torch.where(torch.rand(30, generator=rng) < 0.5, -1.0, 1.0)
    assert preference_model.correlation(sign * one, sign * other) == pytest.approx(found, abs=1e-12)
    assert preference_model.correlation(one, torch.zeros(30)) == 0.0


def test_worth_by_hand():
    """Five recorded pairs, two told right; longer by 3, 1, 0, -2, 4 tokens: the longer wins 3.5.

    The loss is the mean of -log p_hat; p_hat of exactly 0 costs 100 nats.
    """
    guess = torch.tensor([0.9, 0.4, 0.8, 0.3, 0.2])
    longer_by = torch.tensor([3.0, 1, 0, -2, 4])
    found = preference_model.worth(guess, torch.ones(5), longer_by)
    assert found["accuracy"] == pytest.approx(0.4) and found["pairs"] == 5
    assert found["rule"] == "longer wins" and found["rule_accuracy"] == pytest.approx(0.7)
    assert found["longer_wins"] == pytest.approx(0.7)
    assert found["gain"] == pytest.approx(-0.3)
    assert (found["low"], found["high"]) == pytest.approx(preference_model.wilson(2, 5))
    # 0, -1, 1/2, 0, -1 and four halves of a pair: mean -1.5/7, mean square (2.25 + 1)/7
    width = 1.96 * ((3.25 / 7 - (1.5 / 7) ** 2) / 7) ** 0.5
    expected = (-1.5 / 7 - width, -1.5 / 7 + width)
    assert (found["gain_low"], found["gain_high"]) == pytest.approx(expected)
    mean = -sum(math.log(p) for p in guess.tolist()) / 5
    assert found["loss"] == pytest.approx(mean, rel=1e-6)
    # The other order of every pair says the same.
    back = preference_model.worth(1 - guess, torch.zeros(5), -longer_by)
    for name, value in found.items():
        assert back[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5))
    surely = preference_model.worth(torch.zeros(2), torch.ones(2), torch.ones(2))
    assert surely["loss"] == 100.0 and surely["rule_accuracy"] == 1.0


# ---- stopping ----


def noisy(seed=0, pairs=12):
    """(training, validation): comparisons of random responses; the training's votes are noise, the
    validation's winner is the response with more 1s."""
    rng = random.Random(seed)
    parts = []
    for part in range(2):
        first, second = [], []
        for _ in range(pairs):
            one = [rng.choice([1, 2, 3, 4]) for _ in range(4)] + [END]
            two = [rng.choice([1, 2, 3, 4]) for _ in range(4)] + [END]
            if part == 1 and one.count(1) < two.count(1):
                one, two = two, one
            first.append(one)
            second.append(two)
        found = Comparisons(
            prompt=policies.pad([[1, 2]] * (2 * pairs), "left", END),
            response=policies.pad(first + second, "right", END),
            first=torch.arange(pairs),
            second=torch.arange(pairs, 2 * pairs),
            preference=torch.ones(pairs, dtype=torch.float64),
            generator=torch.Generator().manual_seed(0),
        )
        parts.append(found)
    return parts


def loss_on(model, batch):
    """Mean of -log p of the first of each pair, by the model's own call."""
    prompt = batch.prompt.rows(batch.first)
    y, y_other = batch.response.rows(batch.first), batch.response.rows(batch.second)
    return -torch.log(model(prompt, y, y_other)).mean()


@pytest.mark.parametrize("finetune", [True, False])
def test_the_best_weights_are_kept(finetune):
    """Votes that are noise: the training loss falls, that of pairs kept apart falls and rises.

    The weights kept are those of an independent loop that takes the same steps and looks at the
    same ones (1e-10, float64); they are neither the first nor the last, and no other look has less.
    """
    training, validation = noisy()
    steps, every, lr, decay = 60, 4, 1e-2, 0.5

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return fill(preference_model.PreferenceModel(gpt2(0)), 3)

    def validate(model):
        return dict(loss=loss_on(model, validation).item(), other=7)

    model = build()
    given = lambda step: training  # noqa: E731
    looks = preference_model.train_until_best(
        model, given, validate, every, steps, lr, finetune, "noise", weight_decay=decay
    )
    hand = build()
    heads = [*hand.token.parameters(), *hand.compare.parameters()]
    groups = [dict(params=heads, lr=lr)]
    if finetune:
        groups.append(dict(params=list(hand.body.parameters()), lr=lr / 30))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    seen, kept, trained = [], {}, []
    for step in range(steps + 1):
        if step % every == 0:
            seen.append(loss_on(hand, validation).item())
            kept[step] = {name: p.detach().clone() for name, p in hand.state_dict().items()}
        if step == steps:
            break
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1, (step + 1) / 13) * max(0.02, 1 - step / steps)
        optimizer.zero_grad()
        loss = loss_on(hand, training)
        trained.append(loss.item())
        loss.backward()
        optimizer.step()
    assert [look["loss"] for look in looks] == pytest.approx(seen, rel=1e-9)
    assert [look["step"] for look in looks] == list(kept) and looks[0]["other"] == 7
    best = every * seen.index(min(seen))
    assert trained[-1] < trained[0] - 0.1, "the training loss falls"
    assert 0 < best < steps and seen[-1] > min(seen) + 0.01, (best, seen)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, kept[best][name], rtol=0, atol=1e-10)
    assert loss_on(model, validation).item() == pytest.approx(min(seen), rel=1e-9)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_of_equal_looks_the_first_is_kept():
    """And of a loss that is NaN from the start the first weights are."""
    training, _ = noisy()
    for value in (1.0, float("nan")):
        model = fill(preference_model.PreferenceModel(gpt2(0)), 3)
        before = flat(model.parameters()).clone()
        given = model, lambda step: training, lambda model, value=value: dict(loss=value)
        looks = preference_model.train_until_best(*given, 1, 3, 1e-3, True, "x")
        assert len(looks) == 4 and torch.equal(flat(model.parameters()), before)


# ---- parts ----


@pytest.mark.parametrize("with_demos", [True, False])
def test_parts_share_no_prompt(with_demos):
    """A role's training and validation pairs are its own, all of them, and share no prompt; unseen
    are all others but those whose chosen responses the policy imitated. A text decides alone."""
    demos, compared = records(300)
    # Some prompts were compared twice: both go the same way.
    compared += [dict(row, rejected=" other") for row in compared[::3]]
    task = task_of(demos if with_demos else [], compared)
    for role, other in (("preference", "judge"), ("judge", "preference")):
        parts = {}
        for name in ("training", "validation", "unseen"):
            parts[name] = {row["prompt"] for row in task.parts[f"{role} {name}"]}
        for one, two in itertools.combinations(parts.values(), 2):
            assert one and two and not one & two
        own = {row["prompt"] for row in task.compared[role]}
        assert parts["training"] | parts["validation"] == own
        assert len(own) / 10 < len(parts["validation"]) < len(own) / 3
        assert {row["prompt"] for row in task.compared[other]} < parts["unseen"]
        assert not {row["prompt"] for row in task.demonstrations} & parts["unseen"]
        count = sum(len(task.parts[f"{role} {name}"]) for name in parts)
        supervised = len(task.compared.get("supervised", []))
        assert count == len(compared) - supervised
    half = task_of(demos if with_demos else [], compared[::-2] + compared[-2::-2])
    for name, rows in half.parts.items():
        assert {r["prompt"] for r in rows} == {r["prompt"] for r in task.parts[name]}, name


@pytest.mark.parametrize("count", [1, 40, 96, 97, 232, 960])
def test_batches_hold_nearly_all(count):
    batches, pairs = recorded.batches_of(count)
    assert pairs <= 96 and 0 <= count - batches * pairs < batches


def test_study_folds():
    """Every prompt is tested on in one fold, and never learned from or stopped by there."""
    _, compared = records(300)
    tested = []
    for fold in range(study.FOLDS):
        parts = study.fold_parts(compared, fold)
        prompts = [{row["prompt"] for row in rows} for rows in parts.values()]
        assert sum(map(len, prompts)) == 300 == len(set.union(*prompts)) and all(prompts)
        tested += [row["prompt"] for row in parts["preference unseen"]]
    assert sorted(tested) == sorted(row["prompt"] for row in compared)


# ---- the warning ----


def judged(guess, longer_by):
    return report.judge_worth(preference_model.worth(guess, torch.ones(len(guess)), longer_by))


def test_the_warning():
    """200 recorded pairs, of which the longer wins 70 %: p that is noise, p that is the length, and
    p that is right on 72 % of other pairs warn; p that is right on 85 % does not."""
    rng = torch.Generator().manual_seed(0)
    longer_by = torch.where(torch.arange(200) % 10 < 7, 3.0, -3.0)
    noise = torch.rand(200, generator=rng)
    length = torch.sigmoid(longer_by)
    order = torch.randperm(200, generator=rng)
    slightly = torch.where(order < 144, 0.8, 0.3)
    truly = torch.where(order < 170, 0.8, 0.3)
    for guess in (noise, length, slightly):
        found = judged(guess, longer_by)
        assert "'longer wins' on 0.700" in found["warning"], found
        assert list(found)[0] == "warning" and found["judge_rule"] == pytest.approx(0.7)
    found = judged(truly, longer_by)
    assert "warning" not in found and found["judge_accuracy"] == pytest.approx(0.85)
    assert found["judge_low"] < 0.85 < found["judge_high"]
    assert "'shorter wins'" in judged(noise, -longer_by)["warning"]
    assert report.judge_worth({}) == {} == report.judge_worth(dict(accuracy=1.0, pairs=3))


def test_a_number_that_is_none_warns():
    """A model whose p are NaN has told nothing."""
    assert "warning" in judged(torch.full((50,), float("nan")), torch.ones(50))


def test_about_equal_length():
    """By hand: 10 and 12 tokens are, 10 and 13 are not; 30 and 33 are, 30 and 34 are not; without
    records the numbers are as they were, and without such pairs there is none."""
    win = [0.9, 0.8, 0.3, 0.2]
    rows = [
        [p, 0.0, float(a), float(b), 1.0]
        for p, a, b in zip(win, (10, 10, 33, 30), (12, 13, 30, 34), strict=True)
    ]
    parts = [([torch.tensor(rows[:3]).double(), torch.tensor(rows[3:]).double()], [(1,)])]
    found = evaluate.summarise(parts, by_length=True)
    assert found["win_rate_equal"] == pytest.approx(0.6) and found["equal_length"] == 2
    plain = evaluate.summarise(parts)
    assert plain == {k: v for k, v in found.items() if "equal" not in k}
    far = [([torch.tensor([rows[1], rows[3]])], [(1,)])]
    assert evaluate.summarise(far, by_length=True)["win_rate_equal"] is None


# ---- runs ----


def labelled(kind, count=400, seed=0):
    """Comparisons: good and bad words in the text, of 2 to 7 words each.

    kind:
        "good": the one with the word good wins, whatever its length; "length": the longer wins;
        "noise": any.
    """
    rng, rows = random.Random(seed), []
    for k in range(count):
        words = [["w"] * rng.randint(2, 7) for _ in range(2)]
        good = rng.randrange(2)
        words[good][0], words[1 - good][0] = "good", "bad"
        win = good
        if kind == "length":
            win = int(len(words[1]) > len(words[0]))
        if kind == "noise":
            win = rng.randrange(2)
        if len(words[0]) == len(words[1]) and kind == "length":
            continue
        chosen, rejected = (" " + " ".join(words[side]) for side in (win, 1 - win))
        rows.append(dict(prompt=f"post {k} asks\nTL;DR:", chosen=chosen, rejected=rejected))
    return rows


def run(folder, name, *more):
    places = ["--stages", str(folder / "stages"), "--out", str(folder / name)]
    return train.main([*FEW, *places, *map(str, more)])


def result(folder):
    """What must be equal to the bit: the weights, the metrics, the summary but for its time."""
    summary = json.loads((folder / "summary.json").read_text())
    weights = load_file(folder / "policy" / "model.safetensors")
    return (
        {name: value.tolist() for name, value in weights.items()},
        (folder / "metrics.jsonl").read_bytes(),
        (folder / "samples.txt").read_bytes(),
        {name: value for name, value in summary.items() if name != "seconds"},
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("good", marks=pytest.mark.slow),
        pytest.param("length", marks=pytest.mark.slow),
        "noise",
    ],
)
def test_a_run_says_what_its_judge_is_worth(tmp_path, capsys, kind):
    """Labels by a word are learned and beat the lengths: no warning. Labels by length, and labels
    that are noise: a warning, before the win rate on the screen and in summary.json."""
    path = write(tmp_path / "c.jsonl", labelled(kind))
    steps = () if kind == "noise" else ("--preference-steps", 150)
    assert run(tmp_path, "run", "--comparisons", path, *steps) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = list(summary)
    assert names.index("judge_accuracy") < names.index("win_rate")
    assert {"win_rate_equal", "equal_length"} <= set(names)
    assert out.count("pairs that it has no part in: right sign") == 2
    if kind == "good":
        assert "warning" not in summary and "warning: the judge" not in out
        assert summary["judge_low"] > summary["judge_rule"] + 0.1
    else:
        assert names[0] == "warning" and summary["warning"] in out
        assert out.index("warning: the judge") < out.index("win_rate")
    if kind == "length":
        assert summary["judge_accuracy"] > 0.8 and "'longer wins' on 1.000" in summary["warning"]
    (stage,) = (tmp_path / "stages").glob("judge-*")
    numbers = json.loads((stage / "accuracy.json").read_text())
    assert [look["step"] for look in numbers["looks"]][-1] == numbers["steps"]
    assert (stage / "accuracy.png").stat().st_size > 1000
    # The same command shows the same once more, from the folder.
    assert run(tmp_path, "run", "--comparisons", path, *steps) == 0
    assert ("warning: the judge" in capsys.readouterr().out) == (kind != "good")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small):
    """A folder with a finished run: (folder, comparisons, demos, preference's stage)."""
    folder = tmp_path_factory.mktemp("trained")
    demos, _ = records(150)
    path = write(folder / "c.jsonl", labelled("good", 200))
    demos = write(folder / "d.jsonl", demos)
    assert run(folder, "first", "--comparisons", path, "--demos", demos) == 0
    (stage,) = (folder / "stages").glob("preference-*")
    return folder, path, demos, stage


def test_a_reused_model_gives_the_same_run(trained, tmp_path, capsys):
    """--preference-model with the stage's folder, or with a copy that python -m studies.preference
    made: bit for bit the run that trained it, and none is trained."""
    folder, path, demos, stage = trained
    own = ["--comparisons", path, "--demos", demos]
    capsys.readouterr()
    made = [*FEW, *own, "--stages", str(folder / "stages"), "--out", str(tmp_path / "kept")]
    assert alone.main([*map(str, made)]) == 0
    out = capsys.readouterr().out
    assert "preference: reused" in out and "--preference-model" in out
    assert alone.main([*map(str, made)]) == 2 and "is there already" in capsys.readouterr().err
    os.rename(stage, f"{stage}-away")
    try:
        for name, given in (("copy", tmp_path / "kept"), ("stage", f"{stage}-away")):
            assert run(folder, name, *own, "--preference-model", given) == 0
            out = capsys.readouterr().out
            assert "none is trained" in out and out.count("right sign") == 2
            assert result(folder / name) == result(folder / "first")
            assert not stage.exists()
    finally:
        os.rename(f"{stage}-away", stage)


def test_a_reused_model_judges_where_no_other_can_be_trained(trained, capsys):
    """Without --comparisons: it is the judge, too, and the summary says what it is worth."""
    folder, _, demos, stage = trained
    vocabulary = folder / "first" / "policy"
    given = ["--demos", demos, "--tokenizer", vocabulary, "--preference-model", stage]
    assert run(folder, "demos", *given) == 0
    assert "the preference judges, too" in capsys.readouterr().out
    summary = json.loads((folder / "demos" / "summary.json").read_text())
    numbers = json.loads((stage / "accuracy.json").read_text())
    assert summary["judge_accuracy"] == numbers["accuracy"]


def test_a_model_that_does_not_fit_is_refused(trained, tmp_path, capsys):
    """Another tokenizer, the reward in a preference's place, too few positions, none there, and
    options that do not go together: one line that names the option, exit 2."""
    folder, path, demos, stage = trained
    own = ["--comparisons", path, "--demos", demos]
    other = write(tmp_path / "o.jsonl", labelled("good", 200) + records(50)[1])
    code = tmp_path / "p.py"
    code.write_text("def preference(prompts, ys, ys_other):\n    return [0.5] * len(ys)\n")
    # A folder of before says no vocabulary: its size decides.
    old = tmp_path / "old"
    shutil.copytree(stage, old)
    config = json.loads((old / "config.json").read_text())
    del config["vocabulary"]
    (old / "config.json").write_text(json.dumps(config))
    wrong = {
        "another tokenizer": ["--comparisons", other, "--preference-model", stage],
        "another tokenizer's size": ["--comparisons", other, "--preference-model", old],
        "needs a Bradley-Terry": [*own, "--loss", "rl", "--preference-model", stage],
        "positions": [*own, "--max-prompt-tokens", 200, "--preference-model", stage],
        "not a preference model": [*own, "--preference-model", tmp_path],
        "takes its place": [*own, "--preference", code, "--preference-model", stage],
        "asks no model": [*own, "--loss", "ipo", "--offline", "--preference-model", stage],
    }
    for reason, given in wrong.items():
        capsys.readouterr()
        assert run(folder, "refused", *given) == 2, reason
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert "error: --preference-model" in line, (reason, line)
        assert reason.replace("'s size", "") in line
        assert not (folder / "refused").exists()
    assert run(folder, "old", *own, "--preference-model", old) == 0


def test_a_stopped_run_goes_on(trained, monkeypatch):
    """Stopped by a signal in its second step, resumed with the reused model: the same bits."""
    folder, path, demos, stage = trained
    own = ["--comparisons", path, "--demos", demos, "--preference-model", stage]

    def stop(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    between(monkeypatch, stop)
    pid = fork(lambda: run(folder, "stopped", *own))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    monkeypatch.undo()
    assert run(folder, "stopped", *own, "--resume") == 0
    assert result(folder / "stopped") == result(folder / "first")


def test_what_is_said_of_a_model_was_never_seen(monkeypatch):
    """Before its last look a stage asks for its training and validation pairs alone; those that it
    has no part in come once, at the end. A study's spy asks for them at every look."""
    demos, _ = records(150)
    task = task_of(demos, labelled("good", 200), max_prompt=12, max_response=8)
    options = parse("--preference-steps 4 --device cpu --comparisons here".split())
    reference = policies.build("tiny", task.tokenizer, 64, 0)
    asked = []
    comparisons = task.comparisons

    def watched(role, *given, **more):
        asked.append(role.removeprefix("judge "))
        return comparisons(role, *given, **more)

    monkeypatch.setattr(task, "comparisons", watched)
    for spy in (False, True):
        asked.clear()
        model = preference_model.PreferenceModel(reference)
        recorded.train_and_test(options, task, reference, model, "judge", "judge", spy=spy)
        said = [role for role, _ in itertools.groupby(asked)]
        look = ["validation", "unseen"] if spy else ["validation"]
        assert said == [*([*look, "training"] * 4), "validation", "unseen"], said


def stage_of(folder, monkeypatch):
    """The weights of a recorded stage after six steps in float64, and its numbers."""
    argv = "--preference-steps 6 --device cpu --comparisons here --stages".split()
    options = parse([*argv, str(folder)])
    demos, _ = records(150)
    task = task_of(demos, labelled("good", 200), max_prompt=12, max_response=8)
    size = len(task.tokenizer)
    reference = policies.build("tiny", task.tokenizer, 64, 0)
    reference = fill(reference, 3).requires_grad_(False)
    assert reference.config.vocab_size == size
    empty = preference_model.PreferenceModel
    monkeypatch.setattr(preference_model, "PreferenceModel", lambda *given: fill(empty(*given), 2))
    _, path = stages.preference(options, task, reference, "reference", "judge")
    weights = load_file(os.path.join(path, "model.safetensors"))
    return flat(weights.values()), stages.numbers_of(path)


def test_processes_stop_at_the_same_step(tmp_path, monkeypatch):
    """Two and three processes: weights of one to 1e-9, the same looks, the same numbers."""
    wanted, numbers = stage_of(tmp_path / "alone", monkeypatch)
    monkeypatch.undo()
    assert len(numbers["looks"]) == 7
    for count in (2, 3):
        parts = together(
            tmp_path, count, lambda count=count: stage_of(tmp_path / f"by{count}", monkeypatch)
        )
        for weights, its_numbers in parts:
            assert apart(weights, wanted) < 1e-9
            looks, its_looks = numbers["looks"], its_numbers["looks"]
            for one, two in zip(its_looks, looks, strict=True):
                assert one == pytest.approx(two, rel=1e-5)
            for name in ("stopped", "pairs", "rule", "training", "validation"):
                assert its_numbers[name] == numbers[name]
            assert its_numbers["accuracy"] == pytest.approx(numbers["accuracy"], abs=1e-9)


# ---- sizes ----


def test_sizes_come_from_the_data(capsys):
    """What is not given is chosen, never above the built-in task's; what is given stays; one line
    says it. The built-in task's sizes are as they were, and no name of these is left behind."""
    demos, compared = records(300)
    task = task_of(demos, compared, max_prompt=448)
    for given, kept in (([], {}), (["--steps", "7"], {"steps": 7})):
        options = parse(["--comparisons", "c", "--demos", "d", *given])
        recorded.choose_sizes(options, task, pretrained=False)
        line = capsys.readouterr().out
        assert line.startswith("chosen from the data: ") and line.count("\n") == 1
        assert ("--steps" in line) == (not given)
        training = len(task.parts["preference training"])
        expected = dict(
            supervised_steps=math.ceil(len(task.demonstrations) * 8 / 32),
            preference_steps=math.ceil(training * 8 / 32),
            steps=math.ceil(task.most("align") * 4 / 32),
            max_prompt_tokens=options.max_prompt_tokens,
        )
        for name, value in {**expected, **kept}.items():
            assert getattr(options, name) == value <= SIZES[name], name
        assert 1 < task.max_prompt == options.max_prompt_tokens < 64
        assert not hasattr(options, "from_data")
    long = SimpleNamespace(**vars(task))
    long.demonstrations = task.demonstrations * 1000
    long.parts = {name: rows * 1000 for name, rows in task.parts.items()}
    long.most = lambda split: 10**6
    options = parse(["--comparisons", "c", "--demos", "d"])
    recorded.choose_sizes(options, long, pretrained=True)
    found = [getattr(options, name) for name in ("supervised_steps", "preference_steps", "steps")]
    assert found == [900, 2000, 200]
    capsys.readouterr()
    options = parse([])
    before = dict(vars(options))
    recorded.choose_sizes(options, data.BuiltIn(), pretrained=False)
    assert vars(options) == before and not capsys.readouterr().out
    assert {name: before[name] for name in SIZES} == SIZES


# ---- the study ----


@pytest.mark.slow
def test_the_study_goes_on_and_prints(tmp_path, capsys):
    """A line a fold and recipe; the same command adds nothing, a torn line is made again; the table
    is drawn from the lines alone; whole body, last layer and frozen body all train."""
    path = write(tmp_path / "c.jsonl", labelled("good", 200))
    results = tmp_path / "judge.jsonl"
    argv = ["--comparisons", path, "--stages", tmp_path / "stages", "--results", results]
    argv += ["--supervised-steps", 2, "--preference-steps", 4]
    argv += ["--recipes", "whole body, 2e-3", "last layer, 2e-3", "frozen body, 2e-3"]
    argv = [str(word) for word in argv]
    assert study.main(argv) == 0
    whole = results.read_text()
    assert whole.count("\n") == 15
    capsys.readouterr()
    results.write_text(whole[:-20])
    assert study.main(argv) == 0
    assert results.read_text() == whole
    table = capsys.readouterr().out
    assert table.count("4 steps") == 3 and "| 5 | " in table
    assert study.main(["--results", str(results), "--from-results"]) == 0
    assert table.endswith(capsys.readouterr().out)
    # Of another version they are made again: none is taken for the same.
    assert len(study.read_lines(str(results), False)) == 15
    results.write_text(whole.replace(f'"version": "{study.VERSION}"', '"version": "0"'))
    assert not study.read_lines(str(results), False)
    assert len(study.read_lines(str(results), True)) == 15
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len({line["loss"] for line in lines}) == 15, "the recipes differ"
    for line in lines:
        assert line["looks"][0]["step"] == 0 and "unseen_accuracy" in line["looks"][-1]
    assert study.main(["--results", str(results)]) == 2


def test_the_committed_table_is_the_documented_one(capsys):
    """docs/your_data.md holds what `python -m studies.judge --from-results` prints, each line."""
    root = Path(study.__file__).parent.parent
    given = ["--from-results", "--results", str(root / "results" / "judge.jsonl")]
    assert study.main(given) == 0
    page = (root / "docs" / "your_data.md").read_text(encoding="utf-8")
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 5 and not [line for line in shown if line not in page]
