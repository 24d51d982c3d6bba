"""The main job end to end, in-process, on tiny models.

All losses, reuse, refusals, real files, and what tells methods apart.
"""

import copy
import itertools
import json
import math
import re
import types
from pathlib import Path

import pytest
import torch
import transformers

import data
import evaluate
import ipo
import policy as policies
import sampler
import summaries
import train
from clock import Clock, align
from job import report, residual, versions
from job.options import find_method, is_group, method_names, of_batch, parse, precision
from losses import groups
from reference_sampler import constant_gpt2, gpt2
from test_architectures import tiny

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
FEW = [
    "--supervised-steps",
    "5",
    "--preference-steps",
    "5",
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--eval-prompts",
    "8",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Width 16 under the name tiny, and a residual of few questions: half of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        for sizes in ("BUILT_IN", "FILES"):
            patch.setattr(residual, sizes, dict(count=4, responses=4, opponents=4))
        yield patch


@pytest.fixture(scope="module")
def place(tmp_path_factory, small):
    """A folder for the runs of this file, which share their stages."""
    import datasets

    small.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    return tmp_path_factory.mktemp("runs")


def run(place, name, *options):
    """train.main in-process: the exit status. The run's folder is place/name."""
    return train.main(
        [*FEW, "--stages", str(place / "stages"), "--out", str(place / name), *options]
    )


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict()


def content(folder):
    """Every file of a folder with its bytes and time."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def first_run(place):
    """ipo_md's run, which makes the stages: (its folder, the posts that it read in their order)."""
    with pytest.MonkeyPatch.context() as patch:
        read = watch_posts(patch)
        assert run(place, "ipo_md", "--loss", "ipo_md") == 0
    return place / "ipo_md", read


def watch_posts(patch):
    """The built-in task's posts that are read from now on: a list of (split, step, count)."""
    read, posts = [], data.BuiltIn.posts

    def watched(task, *asked):
        read.append(asked)
        return posts(task, *asked)

    patch.setattr(data.BuiltIn, "posts", watched)
    return read


@pytest.fixture(scope="module")
def finished(first_run):
    """The folder of ipo_md's run."""
    return first_run[0]


# What tells the methods apart


def parsed(*options):
    return parse([*FEW, "--out", "unused", *options])


def options_of(loss):
    return parsed("--loss", loss)


def no_preference(prompt, y, y_other=None):
    """A label for pairs, or a reward of y alone."""
    return torch.zeros(len(y.ids))


def batch_of(method, prompt, responses, label):
    """A batch as a method's loss takes it: pairs with their label, or groups of len(responses) with
    [B, K, K] preferences or [B, K] rewards made of the label."""
    if not is_group(method):
        return prompt, *responses[:2], label
    count = len(responses)
    if method.label_pairs is groups.label_first:
        return prompt, *responses, label
    if method.label_pairs is groups.label_rewards:
        return prompt, *responses, torch.stack([label * place for place in range(count)], 1)
    levels = torch.stack([torch.logit(label.clamp(0.1, 0.9)) * place for place in range(count)], 1)
    return prompt, *responses, torch.sigmoid(levels[:, :, None] - levels[:, None])


GROUP_SPEAKERS = {"rloo": (1, 1, 1, 1), "typo": (1, 1, 2), "d2o": (1, 1, 2, 2, 2, 2)}
SPEAKERS = {
    "ipo": (1, 1),
    "dpo": (1, 1),
    "slic": (1, 1),
    "rl": (1, 1),
    "nash_md": (1, 2),
    "ipo_md": (2, 2),
}


@pytest.mark.parametrize("loss", [*SPEAKERS, *GROUP_SPEAKERS])
def test_who_draws_y_and_y_other(loss):
    """At beta = 1 the mixture is the reference. A policy that always says word 1 and a reference
    that always says word 2 show who spoke: Table 1's sampling column, through the trainer's own
    loop."""
    task = types.SimpleNamespace(prompts=data.BuiltIn(0).prompts, max_response=3, judge=None)
    says = [torch.full((120,), -50.0) for _ in range(2)]
    says[0][1] = says[1][2] = 50.0
    policy, reference = (wide(law) for law in says)
    mixes = hasattr(find_method(loss), "BETA")
    options = parsed("--loss", loss, *(["--beta", "1"] if mixes else []))
    clock = align(Clock(0), options, task, policy, reference, no_preference)
    _, *responses, _ = clock.pairs[0]
    for tokens, word in zip(responses, {**SPEAKERS, **GROUP_SPEAKERS}[loss], strict=True):
        assert (tokens.ids == word).all() and tokens.ids.shape == (4, 3)


@torch.no_grad()
def wide(law):
    """A model with the built-in task's room that follows one law.

    Words and limits of the small one do not fit its posts.
    """
    config = transformers.GPT2Config(
        vocab_size=120,
        n_positions=128,
        n_embd=120,
        n_layer=1,
        n_head=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.wte.weight.copy_(torch.eye(120))
    model.transformer.ln_f.weight.zero_()
    model.transformer.ln_f.bias.copy_(law)
    return model


def test_all_methods_see_the_same_prompts_and_the_same_first_responses():
    """At every step the prompts are one and the same for all losses, and other prompts at the next
    step. At step 0, when policy and reference are equal, so are all responses (mixing equal logits
    moves them by one rounding, 1e-7); with --seed they change, the prompts do not."""
    task = data.BuiltIn(0)
    start = policies.build("tiny", task.tokenizer, 128, 0)
    moved = policies.build("tiny", task.tokenizer, 128, 1)

    def pairs(loss, step, policy, *more):
        options, policy = parsed("--loss", loss, *more), copy.deepcopy(policy)
        return align(Clock(step), options, task, policy, start, no_preference).pairs[step]

    first = pairs("ipo", 0, start)
    for loss in method_names():
        if options_of(loss).responses not in (None, 2):
            continue  # more responses are drawn from more numbers
        for tokens, expected in zip(pairs(loss, 0, start)[:3], first[:3], strict=True):
            assert torch.equal(tokens.ids, expected.ids), loss
            assert torch.equal(tokens.mask, expected.mask), loss
    assert not torch.equal(first[1].ids, first[2].ids), "y and y' are two draws"
    later = pairs("ipo", 2, moved)
    for loss in method_names():
        assert torch.equal(pairs(loss, 2, moved)[0].ids, later[0].ids), loss
    assert not torch.equal(later[0].ids, first[0].ids)
    other_seed = pairs("ipo", 0, start, "--seed", "1")
    assert torch.equal(other_seed[0].ids, first[0].ids)
    assert not torch.equal(other_seed[1].ids, first[1].ids)


@pytest.mark.parametrize("loss", method_names())
def test_micro_batches_change_no_gradient(loss):
    """Seven pairs of different lengths at once, and in parts of 1, 2, 3 and 5: the gradient, in
    float64, to 1e-6 relative as promised (it is some 1e-15). A mean of means over the uneven parts,
    or a mean over tokens, is off by per cents."""
    model, reference = gpt2(0), gpt2(1).requires_grad_(False)
    prompt = policies.pad([[1, 2, 3], [2], [4, 4], [1], [3, 2], [2, 2, 2, 1], [4]], "left", 0)
    y = policies.pad([[1, 0], [2, 3, 4, 1], [0], [4, 4, 0], [1, 1, 1], [3, 0], [2, 0]], "right", 0)
    other = policies.pad(
        [[3, 2, 0], [0], [1, 2, 3, 3], [4, 0], [2, 0], [1, 4, 4, 0], [0]], "right", 0
    )
    third = policies.pad([[2], [4, 0], [1, 0], [3, 1, 0], [0], [2, 2], [1, 3, 0]], "right", 0)
    label = torch.tensor([0.9, 0.1, 0.7, 0.5, 1.0, 0.3, 0.6], dtype=torch.float64)
    method = find_method(loss)
    batch = batch_of(method, prompt, (y, other, third), label)
    gradients, numbers = [], []
    for size in (None, 1, 2, 3, 5):
        options = parsed("--loss", loss)
        options.micro_batch_size = size
        policy = copy.deepcopy(model)
        if hasattr(method, "prepare"):
            method.prepare(policy)
        still = types.SimpleNamespace(zero_grad=policy.zero_grad, step=lambda: None)
        whole = of_batch(options, method, policy, policy, reference, *batch)
        numbers.append(train.update(options, method, policy, reference, still, *batch, **whole))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    for gradient, line in zip(gradients[1:], numbers[1:], strict=True):
        assert (gradient - gradients[0]).norm() < 1e-6 * gradients[0].norm()
        assert line["loss"] == pytest.approx(numbers[0]["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(numbers[0]["grad_norm"], rel=1e-6)
    assert gradients[0].norm() > 1e-3


@pytest.mark.parametrize("loss", ["ipo", "ipo_md", "dpo", "slic", "gpo"])
def test_length_average(loss, capsys):
    """Each log-probability over its own response's tokens before the loss, by hand; the header and
    --show say so; what is no contrastive loss of pairs refuses it."""
    policy, reference = gpt2(0), gpt2(1).requires_grad_(False)
    prompt = policies.pad([[1, 2, 3], [2], [4, 4]], "left", 0)
    y = policies.pad([[1, 0], [2, 3, 4, 1], [0]], "right", 0)
    other = policies.pad([[3, 2, 0], [0], [1, 2, 3, 3]], "right", 0)
    label = torch.tensor([0.9, 0.1, 0.7], dtype=torch.float64)
    method, options = find_method(loss), parsed("--loss", loss, "--length-average")
    batch = prompt, y, other, label
    sides = []
    for model in (policy, reference):
        for side, tokens in ((y, (2, 4, 1)), (other, (3, 1, 4))):
            count = torch.tensor(tokens, dtype=torch.float64)
            sides.append(policies.log_prob(model, prompt, side) / count)
    found, ratio = train.pair_losses(options, method, policy, reference, *batch)
    wanted = method.loss(*sides, label, options.tau)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ratio, sides[0] - sides[2], rtol=1e-12, atol=1e-12)
    report.print_method(options, method)
    words = policies.word_tokenizer("abcd")
    report.show(options, method, words, policy, reference, *batch)
    out = capsys.readouterr().out
    assert "log-probabilities are means over tokens" in out
    shown = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("  loss")]
    assert shown == pytest.approx(wanted[:2].tolist(), abs=2e-6)
    for name in ("nash_md", "rl", "kto", "inpo", "lipo"):
        with pytest.raises(ValueError, match="--length-average: --loss"):
            parsed("--loss", name, "--length-average")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    """The gradient in float64 is the same to 1e-12; every layer runs twice for it, and the policy
    is left ready to sample, with its cache."""
    reference = tiny(kind, 1, torch.float64).requires_grad_(False)
    prompt = policies.pad([[1, 2, 3], [2]], "left", 0)
    y, other = (policies.pad(rows, "right", 0) for rows in ([[1, 0], [2, 3, 4]], [[3, 0], [0]]))
    label = torch.tensor([0.9, 0.2], dtype=torch.float64)
    gradients, runs = [], []
    for more in ((), ("--gradient-checkpointing",)):
        options = parsed("--loss", "ipo", *more)
        policy = tiny(kind, 0, torch.float64)
        if more:
            policies.recompute_layers(policy)
        attention = [m for m in policy.modules() if type(m).__name__.endswith("Attention")]
        calls = []
        attention[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        still = types.SimpleNamespace(zero_grad=policy.zero_grad, step=lambda: None)
        train.update(options, ipo, policy, reference, still, prompt, y, other, label)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        runs.append(len(calls))
        assert not policy.training
        sampler.sample(policy, None, prompt, 0.0, torch.Generator().manual_seed(0), 3)
    assert (gradients[1] - gradients[0]).norm() < 1e-12 * gradients[0].norm()
    assert runs == [2, 4]


def test_bfloat16_sees_every_step():
    """Inside one precision context a weight that has changed is read anew, and what was scored
    without a gradient before has one afterwards."""
    options = parsed("--loss", "ipo", "--dtype", "bfloat16", "--device", "cpu")
    layer = torch.nn.Linear(2, 1, bias=False)
    ones = torch.ones(1, 2)
    with precision(options):
        with torch.no_grad():
            layer.weight.fill_(1.0)
            assert layer(ones).item() == 2 and layer(ones).dtype == torch.bfloat16
        layer(ones).sum().backward()
        assert layer.weight.grad.tolist() == [[1.0, 1.0]]
        with torch.no_grad():
            layer.weight.fill_(2.0)
        assert layer(ones).item() == 4


def test_a_step_learns_from_the_policy_alone():
    """After one step: the policy has moved and the reference has not, shares no storage with it and
    has no gradient; the labels got none either. The numbers of the step are those of the pairs:
    with policy = reference IPO's loss is 1/(4 tau^2)."""
    reference = gpt2(0).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    before = copy.deepcopy(reference.state_dict())
    storage = {parameter.data_ptr() for parameter in reference.parameters()}
    assert not storage & {parameter.data_ptr() for parameter in policy.parameters()}
    prompt = policies.pad([[1], [2]], "left", 0)
    y = policies.pad([[1, 2, 0], [2, 0]], "right", 0)
    other = policies.pad([[1, 2, 0], [3, 1, 0]], "right", 0)
    label = torch.tensor([0.5, 0.9], dtype=torch.float64)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    options = parsed("--loss", "ipo", "--tau", "0.5")
    line = train.update(options, ipo, policy, reference, optimizer, prompt, y, other, label)
    assert line["loss"] == pytest.approx(1.0, rel=1e-12) and line["log_ratio"] == 0
    assert line["length"] == 2.5 and line["same"] == 0.5
    assert line["label"] == pytest.approx(0.7, rel=1e-12) and line["grad_norm"] > 0
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert not torch.equal(
        policy.state_dict()["transformer.wte.weight"], before["transformer.wte.weight"]
    )
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_the_rate_by_hand():
    """A line up in the warm-up, times a fall that ends at 0 behind the last step."""
    options = parsed("--lr", "0.8", "--steps", "8", "--decay", "linear", "--warm-up", "4")
    rates = [policies.rate_at(step, options) for step in range(8)]
    assert rates == pytest.approx([0.2, 0.35, 0.45, 0.5, 0.4, 0.3, 0.2, 0.1], rel=1e-12)
    options = parsed("--lr", "0.8", "--steps", "4", "--decay", "cosine", "--warm-up", "0")
    half = 0.5**0.5
    expected = [0.8, 0.4 * (1 + half), 0.4, 0.4 * (1 - half)]
    assert [policies.rate_at(step, options) for step in range(4)] == pytest.approx(
        expected, rel=1e-12
    )
    options = parsed("--lr", "0.8", "--steps", "4", "--decay", "none", "--warm-up", "0")
    assert [policies.rate_at(step, options) for step in range(4)] == [0.8] * 4


def test_the_rate_is_the_steps(monkeypatch):
    """align gives the optimiser the rate of every step before it steps."""
    rates, task = [], data.BuiltIn(0)
    start = policies.build("tiny", task.tokenizer, 128, 0)
    step = torch.optim.AdamW.step

    def recorded(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    options = parsed("--steps", "4", "--lr", "1e-3", "--decay", "linear", "--warm-up", "2")
    align(Clock(0, 1, 3), options, task, copy.deepcopy(start), start, no_preference)
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 0.25e-3], rel=1e-12)


def test_a_loss_that_is_not_finite_stops_the_run():
    """A NaN label is noticed before the weights are.

    FloatingPointError, and the policy is as it was.
    """
    policy = gpt2(0)
    before = copy.deepcopy(policy.state_dict())
    prompt, y = policies.pad([[1]], "left", 0), policies.pad([[1, 0]], "right", 0)
    other = policies.pad([[2, 0]], "right", 0)
    label = torch.tensor([float("nan")], dtype=torch.float64)
    optimizer = torch.optim.AdamW(policy.parameters())
    with pytest.raises(FloatingPointError, match="--lr"):
        options = parsed("--loss", "ipo")
        train.update(options, ipo, policy, gpt2(1), optimizer, prompt, y, other, label)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


# The numbers of the evaluation


def test_measure_against_a_hand_made_judge():
    """A policy that always says 'word 1' up to the limit against one that always ends at once: the
    judge that prefers the longer gives win rate 1 and standard error 0; lengths 3 and 1, all
    unfinished, one distinct response; KL is 3 log(p/q) of the two known laws. 1e-5: float32. The
    same policy against itself has KL 0."""
    task = types.SimpleNamespace(
        prompts=lambda split, step, count: policies.pad([[1, 2]] * count, "left", 0),
        most=lambda split: math.inf,
        max_response=3,
    )
    law, short = torch.tensor([-50.0, 50.0, 0.0]), torch.tensor([50.0, 0.0, -50.0])
    talker, quiet = constant_gpt2(law), constant_gpt2(short)

    def longer(prompt, y, other):
        return (y.lengths() > other.lengths()).double()

    numbers, kept = evaluate.measure(talker, quiet, longer, task, count=6, chunk=4)
    expected = dict(
        win_rate=1, win_rate_se=0, length=3, length_other=1, unfinished=1, distinct=1 / 6, prompts=6
    )
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    assert numbers["kl"] == pytest.approx(
        3 * (torch.log_softmax(law, 0)[1] - torch.log_softmax(short, 0)[1]).item(), rel=1e-5
    )
    assert len(kept) == 2 and kept[1][0].ids.shape[0] == 2

    def every_second(prompt, y, other):
        return torch.arange(len(y.ids)) % 2 * 1.0

    halves = evaluate.measure(talker, quiet, every_second, task, count=6, chunk=6)[0]
    assert halves["win_rate"] == 0.5
    assert halves["win_rate_se"] == pytest.approx((6 * 0.25 / 5 / 6) ** 0.5)
    assert evaluate.measure(quiet, quiet, longer, task, count=4)[0]["kl"] == 0


def test_two_policies_answer_from_two_streams():
    """Of equal policies y = y' as often as two independent draws are equal, the sum of p^2: within
    5 standard errors of 900 prompts. Two chunks of prompts, two seeds and two splits share no
    stream either. The judge is asked of these very responses."""
    law = torch.tensor([0.5, 0.3, 0.2])
    model, asked = constant_gpt2(law.log()), []
    task = types.SimpleNamespace(
        prompts=lambda split, step, count: policies.pad([[1, 2]] * count, "left", 0),
        most=lambda split: math.inf,
        max_response=1,
    )

    def judge(prompt, y, y_other):
        asked.append((y.ids[:, 0], y_other.ids[:, 0]))
        return torch.zeros(len(y.ids))

    given = model, model, judge, task
    for split, seed in (("test", 0), ("test", 1), ("validation", 0)):
        evaluate.measure(*given, split, count=900, seed=seed, chunk=450)
    draws = [torch.cat(side) for side in zip(asked[0], asked[1], strict=True)]
    pairs = {"policy and other": draws, "two chunks": (asked[0][0], asked[1][0])}
    pairs |= {"two seeds": (asked[0][0], asked[2][0]), "two splits": (asked[0][0], asked[4][0])}
    agree = law.square().sum().item()
    for name, (one, other) in pairs.items():
        share = (one == other).float().mean().item()
        assert abs(share - agree) < 5 * (agree * (1 - agree) / len(one)) ** 0.5, name


# Whole runs on the built-in task


def test_which_prompts_a_run_reads(first_run):
    """It imitates and votes on their own posts, tests its preference model and looks on the way at
    validation posts, and reads test posts when the last look is past."""
    read = first_run[1]
    order = [split for split, _ in itertools.groupby(split for split, *_ in read)]
    # The look at step 0 follows the preference model's test, both at validation posts.
    assert order == ["supervised", "preference", "validation", "align", "validation", "test"]
    assert [step for split, step, _ in read if split == "align"] == [0, 1, 2]
    # The evaluation's hundred; behind it the residual asks for some again.
    assert next(row for row in read if row[0] == "test") == ("test", 0, 100)


def test_a_run_leaves_what_it_promises(finished):
    """The files; summary.json's keys with finite numbers in range; metrics.jsonl with a line for
    each step and the first IPO loss 1/(4 tau^2), which only a step-0 log-ratio of exactly 0 gives
    (1e-5: float32); both models' samples with every annotator's vote."""
    assert {path.name for path in finished.iterdir()} >= {
        "policy",
        "config.json",
        "metrics.jsonl",
        "samples.txt",
        "curves.png",
        "summary.json",
    }
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("win_rate", "win_rate_se", "kl", "length", "unfinished", "seconds", "r2"):
        assert isinstance(summary[name], float) and abs(summary[name]) < 1e6, name
    assert (
        0 <= summary["win_rate"] <= 1
        and 0 <= summary["unfinished"] <= 1
        and 1 <= summary["length"] <= summaries.MAX_RESPONSE
    )
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert (
        steps[0]["loss"] == pytest.approx(1 / (4 * summary["tau"] ** 2), rel=1e-5)
        and steps[0]["log_ratio"] == 0
    )
    assert steps[1]["loss"] != steps[0]["loss"]
    assert [line for line in lines if "win_rate" in line][0]["kl"] == 0, (
        "the start is the reference"
    )
    text = (finished / "samples.txt").read_text()
    assert all(word in text for word in ("start", "result", *summaries.ANNOTATORS))


def test_the_readme_shows_every_number_of_a_summary(finished):
    """In its order; and docs/metrics.md has a row for each, the standard errors but the first with
    what they are of."""
    summary = json.loads((finished / "summary.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (\w+) +[\w.-]+$", readme, re.MULTILINE)
    assert shown == list(summary)
    explained = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in shown:
        assert f"`{name}`" in explained or f"`{name.removesuffix('_se')}`" in explained, name


def test_the_policy_folder_is_an_ordinary_one(finished):
    """AutoModelForCausalLM and AutoTokenizer open it, and the policy has moved away from the
    supervised one, which lies in the stages as it was."""
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "policy")
    assert (
        isinstance(model, transformers.GPT2LMHeadModel)
        and tokenizer.get_vocab() == summaries.tokenizer().get_vocab()
    )
    (stage,) = (finished.parent / "stages").glob("supervised-*")
    start = policies.load(str(stage))[0]
    assert not torch.equal(model.transformer.wte.weight, start.transformer.wte.weight)


OTHERS = [["--loss", loss] for loss in SPEAKERS if loss != "ipo_md"]
OTHERS += [["--loss", loss, "--offline"] for loss in ("ipo", "dpo", "slic")]
ROOM = []  # the losses of losses/, on their own samples and on records
for name in method_names():
    if name not in SPEAKERS:
        ROOM.append(["--loss", name])
        if find_method(name).OFFLINE:
            ROOM.append(["--loss", name, "--offline"])


@pytest.mark.parametrize("options", OTHERS, ids=" ".join)
def test_every_loss_completes_on_the_same_stages(place, finished, options, capsys):
    """Exit status 0 and a summary.

    The shared stages are used again, as they were, and the screen says so (rl adds its reward).
    """
    before, name = content(place / "stages"), "-".join(options).strip("-")
    assert run(place, name, *options) == 0
    out = capsys.readouterr().out
    after = content(place / "stages")
    assert {path: after[path] for path in before} == before and "supervised: reused" in out
    new = {
        path.relative_to(place / "stages").parts[0].split("-")[0]
        for path in set(after) - set(before)
    }
    assert new <= ({"reward"} if "rl" in options else set())
    summary = json.loads((place / name / "summary.json").read_text())
    assert summary["loss"] == options[1] and 0 <= summary["win_rate"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("options", ROOM, ids=" ".join)
def test_every_other_loss_completes(place, finished, options):
    """Exit status 0, three steps with a finite loss and a gradient, and weights that moved from the
    start's."""
    name = "-".join(options).strip("-")
    assert run(place, name, *options) == 0
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 3 and all(math.isfinite(line["loss"]) for line in steps)
    assert all(0 < line["grad_norm"] < 1e6 for line in steps) and steps[-1]["log_ratio"] != 0
    assert json.loads((place / name / "summary.json").read_text())["loss"] == options[1]


def test_ipo_md_without_mixture_is_ipo_bit_for_bit(place, finished, capsys):
    """--loss ipo_md --beta 0 and --loss ipo with one seed end in the same weights, to the bit;
    --beta 0.125 ends elsewhere, and so does another seed, on the same stages."""
    for name, options in (
        ("zero", ["--loss", "ipo_md", "--beta", "0"]),
        ("plain", ["--loss", "ipo"]),
        ("seed", ["--loss", "ipo", "--seed", "1"]),
    ):
        assert run(place, name, *options) == 0
        assert capsys.readouterr().out.count(": reused ") == 2
    one, two, mixed, seed = (weights(place / name) for name in ("zero", "plain", "ipo_md", "seed"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    for other in (mixed, seed):
        assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


def test_another_seed_is_another_run_offline_too(place, finished):
    """Two seeds of --offline end in different weights: what they learn from differs, not only what
    their evaluation draws."""
    ends = []
    for seed in ("0", "1"):
        name = f"seed {seed} of recorded pairs"
        assert run(place, name, "--loss", "dpo", "--offline", "--seed", seed) == 0
        ends.append(weights(place / name)["transformer.wte.weight"])
    assert not torch.equal(*ends)


def test_the_same_command_again_prints_the_finished_result(place, finished, capsys):
    """Nothing is run or written.

    The screen shows the same summary and says that the run is finished.
    """
    before = content(place)
    capsys.readouterr()
    assert run(place, "ipo_md", "--loss", "ipo_md") == 0
    out = capsys.readouterr().out
    assert "finished" in out and "reused" not in out and content(place) == before
    assert f"{json.loads((finished / 'summary.json').read_text())['win_rate']:.4g}" in out


def test_a_run_that_was_interrupted_goes_on(place, finished, capsys):
    """A run without its summary (stopped after its last step).

    Refused without --resume, and with it ended with the same weights.
    """
    assert run(place, "again", "--loss", "ipo_md") == 0
    (place / "again" / "summary.json").unlink()
    assert run(place, "again", "--loss", "ipo_md") == 2 and "--resume" in capsys.readouterr().err
    assert (
        run(place, "again", "--loss", "ipo_md", "--resume") == 0
        and "resumed at step 3" in capsys.readouterr().out
    )
    one, two = weights(place / "again"), weights(finished)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_raised_version_makes_its_stage_anew(place, finished, capsys, monkeypatch):
    """VERSIONS["preference"] one higher: the supervised policy is used again, the model is not."""
    monkeypatch.setitem(versions.VERSIONS, "preference", versions.VERSIONS["preference"] + 1)
    capsys.readouterr()
    assert run(place, "raised", "--loss", "ipo_md") == 0
    out = capsys.readouterr().out
    assert "supervised: reused" in out and "preference: reused" not in out
    monkeypatch.undo()
    assert run(place, "raised", "--loss", "ipo_md") == 2 and "version" in capsys.readouterr().err


def test_evaluate_compares_two_runs(place, finished, capsys, monkeypatch):
    """evaluate.py on the run and its start, on the same test posts under the panel; swapping
    them turns a policy's length into the other's. A folder that is none is a one-line error."""
    (stage,) = (place / "stages").glob("supervised-*")
    read = watch_posts(monkeypatch)
    capsys.readouterr()
    printed = []
    for a, b in ((finished, stage), (stage, finished)):
        assert evaluate.main([str(a), str(b), "--count", "12"]) == 0
        printed.append(
            dict(
                line.split()
                for line in capsys.readouterr().out.splitlines()
                if len(line.split()) == 2 and line[0] != " "
            )
        )
    assert {split for split, *_ in read} == {"test"}
    for numbers in printed:
        assert 0 <= float(numbers["win_rate"]) <= 1 and numbers["prompts"] == "12"
        assert set(numbers) >= {
            "win_rate",
            "win_rate_se",
            "kl",
            "length",
            "length_other",
            "unfinished",
        }
    assert evaluate.main([str(finished), str(place / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error


# One step made visible


def shown_pairs(out):
    """What --show prints of each pair: {what: the numbers after it}."""
    pairs = []
    for block in out.split("\nprompt ")[1:]:
        pair = {}
        for line in block.split("whole batch: ")[0].splitlines()[3:]:
            words = line.split()
            numbers = [word for word in words if word.lstrip("-").replace(".", "").isdigit()]
            name = line[: line.index(numbers[0])].strip() if numbers else line
            pair[name] = [float(number) for number in numbers]
        pairs.append(pair)
    return pairs


def by_hand(loss, p, h, log_ratio, logp, logp_other, tau):
    """(target, loss) of a pair by the formulas of the papers, from numbers."""
    sigmoid = 1 / (1 + math.exp(-tau * h))
    if loss in ("ipo", "ipo_md"):
        side = 1 / (2 * tau)
        return (p - 0.5) / tau, p * (h - side) ** 2 + (1 - p) * (h + side) ** 2
    if loss == "dpo":
        entropy = -p * math.log(sigmoid) - (1 - p) * math.log(1 - sigmoid)
        return math.log(p / (1 - p)) / tau, entropy
    if loss == "slic":
        hinges = p * max(0.0, 1 - tau * h) + (1 - p) * max(0.0, 1 + tau * h)
        return math.copysign(1 / tau, p - 0.5), hinges
    if loss == "nash_md":
        return (p - 0.5) / tau, -(p - 0.5 - tau * log_ratio) * logp
    return p / tau, -(p - tau * h) * (logp - logp_other) / 2


@pytest.mark.parametrize("loss", SPEAKERS)
def test_a_step_is_shown_in_numbers(loss, capsys):
    """For two models that differ, what is printed of a pair gives its h, target and loss by hand.

    Numbers have six decimals, and h is a difference of four of them: 1e-4.
    """
    options, method = parsed("--loss", loss, "--tau", "0.4"), find_method(loss)
    tokenizer = policies.word_tokenizer(["a", "b", "c", "d"])
    prompt = policies.pad([[1, 2, 3], [2], [4]], "left", 0)
    y = policies.pad([[1, 0], [2, 3, 4, 1], [0]], "right", 0)
    other = policies.pad([[3, 2, 0], [0], [1]], "right", 0)
    label = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)
    pairs = (prompt, y, other, label)
    report.show_pairs(options, method, tokenizer, gpt2(0), gpt2(1), *pairs)
    out = capsys.readouterr().out
    shown = shown_pairs(out)
    assert len(shown) == 2 and "prompt 1: a b c" in out and "prompt 2: b" in out
    for drawn, drawn_by in zip(("y ", "y'"), method.PAIR, strict=True):
        assert out.count(f"{drawn} ({drawn_by}): ") == 2
    assert "y  (" in out and "): b c d a\n" in out and "): c b <|endoftext|>\n" in out
    for pair, p in zip(shown, (0.9, 0.2), strict=True):
        assert pair["r(y) - r(y')" if loss == "rl" else "p(y > y')"] == [p]
        (logp, ref_logp), (logp_other, ref_logp_other) = (
            pair["log pi(y),  log pi_ref(y)"],
            pair["log pi(y'), log pi_ref(y')"],
        )
        log_ratio = logp - ref_logp
        h = log_ratio - (logp_other - ref_logp_other)
        assert abs(h) > 0.01
        target, value = by_hand(loss, p, h, log_ratio, logp, logp_other, 0.4)
        if loss == "nash_md":
            assert pair["log pi(y)/pi_ref(y), target"] == pytest.approx(
                [log_ratio, target], abs=1e-4
            )
        else:
            assert pair["h, its target"] == pytest.approx([h, target], abs=1e-4)
        assert pair["loss"] == pytest.approx([value], abs=1e-4)


def test_the_first_step_is_shown(place, finished, capsys):
    """--show in a run.

    Two pairs before the step, at h = 0, and after it the gradient norm of metrics.jsonl.
    """
    options = ["--loss", "ipo_md", "--steps", "2", "--tau", "0.5", "--show"]
    assert run(place, "shown", *options) == 0
    out = capsys.readouterr().out
    pairs = shown_pairs(out)
    assert len(pairs) == 2 and all(pair["loss"] == [1.0] for pair in pairs)
    assert all(pair["h, its target"][0] == 0 for pair in pairs)
    metrics = (place / "shown" / "metrics.jsonl").read_text().splitlines()
    norms = [line["grad_norm"] for line in map(json.loads, metrics) if "grad_norm" in line]
    batches = [line for line in out.splitlines() if line.startswith("whole batch: ")]
    assert len(batches) == len(norms) == 2
    for line, norm in zip(batches, norms, strict=True):
        assert f"grad_norm {norm:.6g}" in line


def test_showing_changes_nothing(place, finished):
    """A run with --show leaves the metrics of the run without it, and is the same run to --out."""
    assert run(place, "seen", "--loss", "ipo_md", "--show") == 0
    seen, unseen = ((folder / "metrics.jsonl").read_text() for folder in (place / "seen", finished))
    assert seen == unseen
    assert run(place, "seen", "--loss", "ipo_md") == 0


# Records of one's own


def own_files(folder, extension):
    """Small files of every layout: demos, comparisons and prompts in the format of an extension."""
    from test_data import records, write

    folder.mkdir(parents=True, exist_ok=True)
    demos, compared = records(240)
    return {
        name: write(folder / f"{name}.{extension}", rows)
        for name, rows in (("demos", demos), ("comparisons", compared), ("prompts", demos[::-1]))
    }


SMALL = ["--max-prompt-tokens", "12", "--max-response-tokens", "6"]


def without_the_judges_warning(out):
    """A run's output without it: in records of own_files the shorter always wins, which no judge
    beats, and the warning says so, once."""
    judged = [line for line in out.splitlines() if line.startswith("warning: the judge is right")]
    assert len(judged) == 1 and "the rule 'shorter wins' on " in judged[0]
    return out.replace(judged[0], "")


def test_comparisons_alone(place, capsys):
    """--comparisons FILE alone: the demos are the chosen responses, the tokenizer is made of the
    data and says so; the judge is a second model reported with its held-out accuracy beside 'longer
    wins'; evaluate.py compares the result with its start under a judge's folder; --offline learns
    from the same file; prompts that are too long are counted in one warning."""
    files = own_files(place / "csv", "csv")
    assert run(place, "own", "--loss", "ipo_md", "--comparisons", files["comparisons"], *SMALL) == 0
    out = capsys.readouterr().out
    out = without_the_judges_warning(out)
    assert (
        "no --tokenizer" in out
        and "judge" in out
        and out.count("longer wins") == 2
        and out.count("warning") <= 1
    )
    assert (
        run(
            place,
            "own-offline",
            "--loss",
            "dpo",
            "--offline",
            "--comparisons",
            files["comparisons"],
            *SMALL,
            "--max-prompt-tokens",
            "3",
        )
        == 0
    )
    out_offline = without_the_judges_warning(capsys.readouterr().out)
    assert "asks no model, none is trained" in out_offline
    assert "\npreference: " in out and "\nreward" not in out_offline and "judge: " in out_offline
    assert out_offline.count("longer wins") == 1, "the judge alone is trained"
    warning = [line for line in out_offline.splitlines() if line.startswith("warning")]
    assert (
        len(warning) == 1
        and "cut from the left" in warning[0]
        and any(word.isdigit() and int(word) > 10 for word in warning[0].split())
    )
    stage, judge = (
        next(line.split()[-1] for line in out.splitlines() if line.startswith(name))
        for name in ("supervised:", "judge:")
    )
    assert (
        evaluate.main(
            [
                str(place / "own"),
                stage,
                "--prompts",
                files["prompts"],
                "--judge",
                judge,
                "--count",
                "6",
            ]
        )
        == 0
    )
    assert "win_rate" in capsys.readouterr().out


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_demos_comparisons_and_prompts(place, extension):
    """All three options, in each format, with a tokenizer's folder.

    Completes, and the policy speaks that tokenizer's words.
    """
    files, own = (
        own_files(place / extension, extension),
        policies.byte_tokenizer(
            ["post story asks told good bad and long TL;DR: 0 1 2 3 4 5 6 7 8 9"], 280
        ),
    )
    own.save_pretrained(place / "tokenizer")
    given = [part for name, path in files.items() for part in (f"--{name}", path)]
    assert (
        run(
            place,
            f"own-{extension}",
            "--loss",
            "nash_md",
            *given,
            "--tokenizer",
            str(place / "tokenizer"),
            *SMALL,
        )
        == 0
    )
    assert (
        transformers.AutoTokenizer.from_pretrained(
            place / f"own-{extension}" / "policy"
        ).get_vocab()
        == own.get_vocab()
    )


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the sample of TL;DR lies beside the project only where it was put"
)
def test_real_posts(place, capsys):
    """Reddit posts, GPT-4's comparisons, the GPT-2 tokenizer: completes with cut prompts."""
    files = [
        "--demos",
        SHARED / "tldr_demos.jsonl",
        "--comparisons",
        SHARED / "tldr_comparisons_gpt4.jsonl",
        "--tokenizer",
        SHARED / "gpt2_tokenizer",
    ]
    few = [
        "--supervised-steps",
        "2",
        "--preference-steps",
        "2",
        "--steps",
        "1",
        "--max-prompt-tokens",
        "16",
        "--max-response-tokens",
        "3",
    ]
    assert run(place, "real", "--loss", "ipo_md", *map(str, files), *few) == 0
    assert "cut from the left" in capsys.readouterr().out
    assert (
        json.loads((place / "real" / "policy" / "config.json").read_text())["vocab_size"] == 50257
    )


# Errors


BAD = {
    "unknown loss": (["--loss", "likelihood"], "--loss"),
    "tau 0": (["--tau", "0"], "--tau"),
    "tau nan": (["--tau", "nan"], "--tau"),
    "tau a word": (["--tau", "small"], "--tau"),
    "beta above 1": (["--loss", "ipo_md", "--beta", "1.5"], "--beta"),
    "beta below 0": (["--loss", "ipo_md", "--beta", "-0.1"], "--beta"),
    "beta nan": (["--loss", "ipo_md", "--beta", "nan"], "--beta"),
    "beta without a mixture": (["--loss", "dpo", "--beta", "0.5"], "--beta"),
    "lr": (["--lr", "inf"], "--lr"),
    "batch size": (["--batch-size", "0"], "--batch-size"),
    "steps": (["--steps", "-1"], "--steps"),
    "offline rl": (["--loss", "rl", "--offline"], "--offline"),
    "offline ipo_md": (["--loss", "ipo_md", "--offline"], "--offline"),
    "unknown option": (["--taus", "1"], "--taus"),
    "missing file": (["--comparisons", "nowhere.jsonl"], "--comparisons nowhere.jsonl"),
    "demos alone": (["--demos", "nowhere.jsonl"], "--demos"),
    "a policy with the built-in task": (["--policy", "gpt2"], "--policy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_and_exit_2(tmp_path, capsys, case):
    """The line names the option; nothing is written."""
    options, expected = BAD[case]
    assert run(tmp_path, "out", *options) == 2
    out, error = capsys.readouterr()
    assert (
        out == ""
        and error.count("\n") == 1
        and error.startswith("train.py: error: ")
        and expected in error
    )
    assert list(tmp_path.iterdir()) == []


def one_error(capsys, *expected):
    """Exactly one line on stderr, with all of expected in it."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: error: "), error
    assert all(part in error for part in expected), error


def test_a_broken_line_is_named(tmp_path, capsys):
    """File and line, before anything is trained."""
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chos\n')
    before = content(tmp_path)
    assert run(tmp_path, "out", "--comparisons", str(path)) == 2
    one_error(capsys, "--comparisons", "c.jsonl", "line 2")
    assert content(tmp_path) == before


def test_another_runs_folder_is_refused(place, finished, capsys):
    """A different loss, tau or data into a finished run's folder, and any run into a folder of
    other things: --out is named and what differs; not a byte changes."""
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years of work")
    before = content(place)
    changes = (
        (["--loss", "dpo"], "loss"),
        (["--tau", "0.7"], "tau"),
        (["--data-seed", "3"], "data_seed"),
    )
    for name, options, differs in (
        *(("ipo_md", *change) for change in changes),
        ("mine", [], "mine"),
    ):
        capsys.readouterr()
        assert run(place, name, *options) == 2
        one_error(capsys, "--out", differs)
        assert content(place) == before


def test_a_hub_name_without_network(tmp_path, capsys, monkeypatch):
    """Data and policy by a hub name that cannot be reached.

    One line each that names the option or the source and says what to do.
    """
    import datasets
    import huggingface_hub

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert run(tmp_path, "out", "--comparisons", "nobody/nothing-at-all") == 2
    one_error(capsys, "--comparisons nobody/nothing-at-all", "local file")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert (
        run(
            tmp_path,
            "out",
            "--comparisons",
            str(tmp_path / "c.jsonl"),
            "--policy",
            "nobody/nothing-at-all",
        )
        == 2
    )
    one_error(capsys, "nobody/nothing-at-all", "local folder")
    assert not (tmp_path / "out").exists() and not (tmp_path / "stages").exists()
