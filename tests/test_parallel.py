"""Several processes are the same run (job/parallel.py): one, two and three compared in float64.

Children are forked, each joins the others over gloo as torchrun's do, on one thread. Unix only.
"""

import copy
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import policy as policies
import preference_model
import train
from clock import Clock, align
from job import judged, parallel, stages
from job import run as runs
from job.options import find_method, parse
from test_golden import fill, gpt2
from test_resume import between, fork, names_of, result

pytest.importorskip("resource")  # Unix only

STEPS = "--supervised-steps 12 --preference-steps 12 --steps 12 --save-every 4".split()
STEPS += "--batch-size 5 --eval-prompts 9 --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


def start(count, work):
    """Forks the processes of one run, each of which calls work(its number) and exits with that.

    Returns their process ids.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def child(number):
        address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(number))
        os.environ.update(address, RANK=str(number), WORLD_SIZE=str(count))
        return work(number)

    return [fork(lambda number=number: child(number)) for number in range(count)]


def wait(children):
    """The exit statuses of all processes, below 0 for a signal's."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def together(folder, count, work):
    """What work() returns in each of several joined processes, as a list."""

    def child(number):
        with parallel.joined():
            found = work()
        (folder / f"{count}-{number}").write_bytes(pickle.dumps(found))
        return 0

    assert wait(start(count, child)) == [0] * count
    return [pickle.loads((folder / f"{count}-{number}").read_bytes()) for number in range(count)]


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def apart(one, other):
    """The largest difference over the largest entry."""
    return ((one - other).abs().max() / other.abs().max()).item()


# ---- the parts ----


def test_shares_are_the_rows(monkeypatch):
    """All rows once, in order, sizes apart by one at most; too few rows are refused."""
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(parallel, "size", lambda count=count: count)
        for rows in (0, 1, 5, 7, 32):
            found, sizes = [], []
            for number in range(count):
                monkeypatch.setattr(parallel, "rank", lambda number=number: number)
                part = list(range(rows))[parallel.share(rows, least=0)]
                found += part
                sizes.append(len(part))
            assert found == list(range(rows)) and max(sizes) - min(sizes) <= 1
            if rows < count:
                with pytest.raises(ValueError, match=f"{count} processes are more than the {rows}"):
                    parallel.share(rows)


def test_alone_nothing_is_sent():
    """Without torchrun every function is the identity: no group is made."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.sum().backward()
    parallel.add_gradients([weight])
    assert weight.grad.tolist() == [1, 1] and parallel.share(5) == slice(0, 5)
    assert parallel.total(dict(a=2)) == dict(a=2) and parallel.gather("b") == ["b"]
    assert parallel.from_first(lambda: 3) == 3 and parallel.largest(4) == 4
    assert not torch.distributed.is_initialized()


def test_sums_gathers_and_errors(tmp_path):
    """Sums, lists in order, process 0's values and its errors, in every process."""

    def work():
        number = parallel.rank()
        weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3, 2))]
        (weights[0].sum() * (number + 1)).backward()
        weights[1].grad = torch.full((3, 2), 10.0 * number)
        parallel.add_gradients([*weights, torch.nn.Parameter(torch.zeros(1))])

        def look():
            if number:
                raise AssertionError("only process 0 looks")
            raise ValueError("cannot be read")

        with pytest.raises(ValueError, match="cannot be read"):
            parallel.from_first(look)
        return (
            [weight.grad.tolist() for weight in weights],
            parallel.total(dict(a=number, b=0.5)),
            parallel.gather([number]),
            parallel.from_first(lambda: number),
            parallel.largest(7 * number),
        )

    wanted = [[6.0, 6.0], [[30.0, 30.0]] * 3], dict(a=3.0, b=1.5), [[0], [1], [2]], 0, 14
    assert together(tmp_path, 3, work) == [wanted] * 3


def test_what_is_not_torchruns_is_not_joined(monkeypatch, capsys):
    """A WORLD_SIZE alone, as some clusters set it, starts one process; an address that is none is
    one line."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with parallel.joined():
        assert parallel.size() == 1
    for name, value in dict(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="x").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="cannot join the run's other processes"):
        with parallel.joined():
            pass


def test_who_carries_what(monkeypatch):
    """With a GPU gloo still carries the CPU's tensors: nccl alone sums no numbers of a CPU."""
    assert parallel.backends() == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert parallel.backends() == "cpu:gloo,cuda:nccl"


def test_a_line_is_said_once(tmp_path, capfd):
    """By whoever comes first, though all but process 0 are silent."""

    def child(number):
        with parallel.joined() as say:
            print(f"output of {number}")
            print(f"progress of {number}", file=sys.stderr)
            say("all found this out")
            parallel.gather(number)  # without torchrun process 0 keeps the count: it waits here
        return 0

    assert wait(start(3, child)) == [0, 0, 0]
    out, err = capfd.readouterr()
    assert out == "output of 0\n"
    assert sorted(err.splitlines()) == ["all found this out", "progress of 0"]


# ---- the same run, in float64 ----


def ten_steps(case):
    """Ids, the first gradient and the last weights of ten steps in float64, on the shared rows."""
    loss, *more = case.split()
    argv = ["--loss", loss, "--batch-size", "5", "--lr", "1e-3", "--device", "cpu", *more]
    options, method = parse(argv), find_method(loss)
    task, reference = data.BuiltIn(0), gpt2(1).requires_grad_(False)
    policy = copy.deepcopy(reference).requires_grad_(True)
    pairwise = method.LABEL == "preference"
    model = fill(preference_model.PreferenceModel(reference, pairwise=pairwise), 2)
    model.requires_grad_(False)
    labels = dict(preference=model, reward=model.logit, rewards=model.reward)
    if options.preference:
        labels = dict(preference=judged.asked_file(options, task.tokenizer))
    first = []

    def after(step):
        if step == 0:
            first.append(flat([parameter.grad for parameter in policy.parameters()]))

    clock = Clock(*range(10), after=after)
    align(clock, options, task, policy, reference, labels[method.LABEL])
    ids = []
    for _, *responses, _ in clock.pairs.values():
        ids.append(list(zip(*(response.lists() for response in responses), strict=True)))
    return ids, first[0], flat(policy.parameters()), clock.numbers


@pytest.mark.parametrize(
    "case",
    [
        "ipo_md",
        "nash_md --micro-batch-size 1",
        pytest.param("ipo --offline", marks=pytest.mark.slow),
        "kto --micro-batch-size 1",
        pytest.param("beta_dpo --micro-batch-size 1", marks=pytest.mark.slow),
        pytest.param("typo", marks=pytest.mark.slow),
        pytest.param("dro", marks=pytest.mark.slow),
        pytest.param("lipo --responses 3", marks=pytest.mark.slow),
        pytest.param("rl", marks=pytest.mark.slow),
        pytest.param(
            "inpo --micro-batch-size 1 --refresh 3 --renew-reference 4 --epochs 2 --ptx 0.1",
            marks=pytest.mark.slow,
        ),
        pytest.param("slic --micro-batch-size 2", marks=pytest.mark.slow),
    ],
)
def test_processes_are_one_run(tmp_path, case):
    """Five pairs a step by one, two and three processes: ids equal, the first gradient to 1e-12,
    the weights after ten steps to 1e-9."""
    ids, gradient, weights, numbers = ten_steps(case)
    for count in (2, 3):
        parts = together(tmp_path, count, lambda: ten_steps(case))
        for step, wanted in enumerate(ids):
            drawn = []
            for part in parts:
                drawn += part[0][step]
            assert drawn == wanted
        for _, its_gradient, its_weights, its_numbers in parts:
            assert apart(its_gradient, gradient) < 1e-12
            assert apart(its_weights, weights) < 1e-9
            for step, line in numbers.items():
                # The logged means of counts are float32's.
                assert its_numbers[step] == pytest.approx(line, rel=1e-6, abs=1e-9)


RULE = """
import os

def preference(prompts, ys, ys_other):
    assert os.environ.get("RANK") != os.environ.get("FAILS"), "this one cannot"
    pairs = zip(ys, ys_other)
    return [(1 + len(other)) / (2 + len(y) + len(other)) for y, other in pairs]
"""


@pytest.mark.slow
def test_a_preference_file_is_asked_by_all(tmp_path, alone, begun, monkeypatch, capfd):
    """Each process asks for its own pairs: the labels, and so the run, are those of one. If the
    file fails in one of them, the others do not wait: its line, and that it has ended."""
    rule = tmp_path / "rule.py"
    rule.write_text(RULE)
    monkeypatch.setenv("FAILS", "no process")
    case = f"ipo_md --preference {rule}"
    ids, gradient, weights, numbers = ten_steps(case)
    assert len({line["label"] for line in numbers.values()}) == 10
    for number, part in enumerate(together(tmp_path, 2, lambda: ten_steps(case))):
        assert part[0][9] == ids[9][:2] if number == 0 else part[0][9] == ids[9][2:]
        assert apart(part[1], gradient) < 1e-12 and apart(part[2], weights) < 1e-9
    monkeypatch.setenv("FAILS", "1")
    capfd.readouterr()
    assert sorted(job(begun, 2, "--preference", str(rule))) == [1, 2]
    lines = [line for line in capfd.readouterr().err.splitlines() if "train.py: error: " in line]
    assert len(lines) == 1 and ("this one cannot" in lines[0] or parallel.LOST in lines[0])


def test_float32_gradient(tmp_path, monkeypatch):
    """In float32 the first gradient is equal to 1e-5; a flipped token may part the runs later."""
    monkeypatch.setitem(globals(), "gpt2", lambda seed, full=gpt2: full(seed).float())
    monkeypatch.setitem(globals(), "fill", lambda model, seed, full=fill: full(model, seed).float())
    _, gradient, _, _ = ten_steps("ipo")
    assert gradient.dtype == torch.float32
    for _, its_gradient, _, _ in together(tmp_path, 2, lambda: ten_steps("ipo")):
        assert apart(its_gradient, gradient) < 1e-5


def stages_of(folder, monkeypatch):
    """The weights of both stages after three steps in float64, and the held-out numbers."""
    argv = "--supervised-steps 3 --preference-steps 3 --device cpu --stages".split()
    options, task = parse([*argv, str(folder)]), data.BuiltIn(0)
    empty = preference_model.PreferenceModel
    first, reference = gpt2(1), gpt2(3).requires_grad_(False)
    monkeypatch.setattr(policies, "build", lambda *_: first)
    monkeypatch.setattr(preference_model, "PreferenceModel", lambda *given: fill(empty(*given), 2))
    found = []
    _, path = stages.supervised(options, task, None, "built-in")
    found.append(load_file(os.path.join(path, "model.safetensors")))
    _, path = stages.preference(options, task, reference, "reference", "preference")
    found.append(load_file(os.path.join(path, "model.safetensors")))
    with open(os.path.join(path, "accuracy.json"), encoding="utf-8") as file:
        return [flat(weights.values()) for weights in found], json.load(file)


@pytest.mark.slow
def test_stages_are_shared_out(tmp_path, monkeypatch):
    """Supervised policy and preference model of three processes are those of one, to 1e-9; so are
    the numbers on held-out pairs. Only process 0 writes."""
    wanted, numbers = stages_of(tmp_path / "alone", monkeypatch)
    monkeypatch.undo()
    for found, its_numbers in together(
        tmp_path, 3, lambda: stages_of(tmp_path / "three", monkeypatch)
    ):
        for weights, alone in zip(found, wanted, strict=True):
            assert apart(weights, alone) < 1e-9
        assert its_numbers == pytest.approx(numbers, rel=1e-9)


def test_evaluation_is_shared_out(tmp_path):
    """Seven prompts in chunks of three by two processes: the last chunk has one row, so that one
    process has none."""

    def measure():
        task = data.BuiltIn(0)
        return evaluate.measure(gpt2(1), gpt2(4), task.judge, task, "test", 7, chunk=3)[0]

    alone = measure()
    for count in (2, 3):
        for numbers in together(tmp_path, count, measure):
            assert numbers == pytest.approx(alone, rel=1e-9)


# ---- the whole job ----


def job(folder, count, *more, hook=None):
    """train.main by several processes; their exit statuses. hook(number) comes before it."""
    argv = [*STEPS, "--out", str(folder / "run"), "--stages", str(folder / "stages"), *more]

    def child(number):
        if hook:
            hook(number)
        return train.main(argv)

    return wait(start(count, child))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process: its folder and result."""
    folder = tmp_path_factory.mktemp("alone")
    argv = [*STEPS, "--out", str(folder / "run"), "--stages", str(folder / "stages")]
    assert train.main(argv) == 0
    return folder, result(folder)


@pytest.fixture
def begun(tmp_path, alone):
    """A folder with the stages of the run that one process made."""
    os.symlink(alone[0] / "stages", tmp_path / "stages")
    return tmp_path


def close(one, other):
    """Summaries equal but for float32's rounding. Not the weights: where a gradient is 0 but for
    rounding, as a key's bias has it, Adam makes whole steps of the rounding."""
    numbers = [{k: v for k, v in run[2].items() if k != "loss"} for run in (one, other)]
    return numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-4)


def test_the_job_by_two(alone, tmp_path, capfd):
    """All stages by two processes: one run's output, one folder, nothing left over, its result."""
    assert job(tmp_path, 2) == [0, 0]
    out, err = capfd.readouterr()
    assert out.count("win_rate  ") == 1 and "Traceback" not in err
    assert close(result(tmp_path), alone[1])
    assert not [path for path in (tmp_path / "stages").iterdir() if path.suffix]
    assert not (tmp_path / "run" / runs.LOCK).exists()


@pytest.mark.parametrize("before, after", [(2, 1), pytest.param(1, 3, marks=pytest.mark.slow)])
def test_resumed_by_another_number(alone, begun, monkeypatch, before, after):
    """Stopped in the middle by a signal to one process only, resumed by another number of them."""

    def stop_one(step):
        if step == 5 and parallel.rank() == parallel.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    between(monkeypatch, stop_one)
    assert job(begun, before) == [143] * before
    assert names_of(begun / "run") == ["checkpoint-000004", "checkpoint-000006"]
    monkeypatch.undo()
    assert job(begun, after, "--resume") == [0] * after
    assert close(result(begun), alone[1])


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_dies(begun, monkeypatch, capfd, victim):
    """SIGKILL to one of two in a step: the other says so in one line and ends; the run goes on by
    one process from the checkpoint before."""

    def die(step):
        if step == 6 and parallel.rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    between(monkeypatch, die)
    started = time.time()
    statuses = job(begun, 2)
    assert time.time() - started < 60
    assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py:")]
    assert len(lines) == 1 and lines[0].startswith(f"train.py: error: {parallel.LOST} (")
    monkeypatch.undo()
    assert job(begun, 1, "--resume") == [0]


def test_errors_are_one_line(begun, capfd):
    """Of an option, of a folder that another run holds, of too few rows: once, exit 2 in all."""
    for wrong in (["--tau", "-1"], ["--batch-size", "1"]):
        assert job(begun, 2, *wrong) == [2, 2]
        lines = capfd.readouterr().err.splitlines()
        assert len([line for line in lines if "train.py: error: " in line]) == 1
    (begun / "run").mkdir()
    (begun / "run" / "mine.txt").write_text("not a run")
    assert job(begun, 2) == [2, 2]
    err = capfd.readouterr().err
    assert err.count("is not a run's folder") == 1


def test_a_loss_that_is_not_finite(begun, monkeypatch, capfd):
    """In one process's rows: all end with exit 2 and one line; the file holds the rows of both."""
    pair_losses = train.pair_losses

    def infinite(*given):
        value, ratio = pair_losses(*given)
        return value * float("inf") if parallel.rank() == 1 else value, ratio

    monkeypatch.setattr(train, "pair_losses", infinite)
    assert job(begun, 2) == [2, 2]
    assert capfd.readouterr().err.count("train.py: error: step 0: loss") == 1
    pairs = json.loads((begun / "run" / "step-0.json").read_text())
    assert [len(pairs[name]) for name in ("prompt", "y", "y_other", "label", "text")] == [5] * 5


@pytest.mark.slow
def test_torchrun(tmp_path, alone):
    """The command of the README; the launcher gets SIGTERM, the run saves and goes on."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    argv = [os.path.join(root, "train.py"), *STEPS, "--steps", "60", "--save-every", "1000"]
    argv += ["--out", str(tmp_path / "run"), "--stages", str(tmp_path / "stages")]
    run = subprocess.Popen([*launch, *argv], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert run.poll() is None
        time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and err.count("train.py: stopped") == 1
    (saved,) = names_of(tmp_path / "run")
    assert saved < "checkpoint-000060"
    argv += ["--resume"]
    assert subprocess.run([sys.executable, *argv], capture_output=True).returncode == 0
