"""A run that is stopped at any moment and resumed is the run it would have been, bit for bit.

Children are forked, so that torch is imported once; each runs train.main on one thread. Tiny
models: what is tested is the order of writes, not the training. Unix only: Windows has no fork.
"""

import json
import os
import pickle
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import ipo_md
import policy as policies
import train
from job import folder
from job import run as runs

resource = pytest.importorskip("resource")  # Unix only

STEPS = "--supervised-steps 40 --preference-steps 40 --steps 30 --save-every 4".split()
STEPS += "--batch-size 4 --eval-prompts 8 --device cpu".split()


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


def options(folder, *more):
    places = ["--stages", str(folder / "stages"), "--out", str(folder / "run")]
    return [*STEPS, *places, *more]


def result(folder):
    """What must be equal to the bit: the weights, the metrics, the summary but for its time."""
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    return (
        load_file(run / "policy" / "model.safetensors"),
        (run / "metrics.jsonl").read_bytes(),
        {k: v for k, v in summary.items() if k != "seconds"},
    )


def same(one, two):
    return (
        one[1:] == two[1:]
        and one[0].keys() == two[0].keys()
        and all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: (its folder, its result, its seconds)."""
    folder, begun = tmp_path_factory.mktemp("whole"), time.time()
    assert train.main(options(folder)) == 0
    return folder, result(folder), time.time() - begun


@pytest.fixture
def started(tmp_path, whole):
    """A folder with the whole run's stages, so that only the alignment is left to do."""
    os.symlink(whole[0] / "stages", tmp_path / "stages")
    return tmp_path


def fork(work):
    """Runs work() in a child, which exits with what it returns. Returns the child's pid."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def between(monkeypatch, action):
    """Calls action(step) in every step, between the draw of its pairs and the update."""
    evidence = runs.Run.evidence

    def watched(self, step, *pairs):
        action(step)
        return evidence(self, step, *pairs)

    monkeypatch.setattr(runs.Run, "evidence", watched)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(*argv):
    """Runs the job in a child, which must die of SIGKILL."""
    return os.waitpid(fork(lambda: train.main([*argv])), 0)[1] == signal.SIGKILL


def names_of(folder):
    """The checkpoints of a run's folder."""
    return [os.path.basename(path) for path in runs.checkpoints(folder)]


@pytest.mark.slow
def test_killed_at_random_moments(whole, tmp_path):
    """SIGKILL at five random moments, one in each fifth of the run's time and so in the stages,
    too; then it is let go to its end."""
    rng, begun = random.Random(5), time.time()
    for fifth in range(5):
        pid = fork(lambda: train.main(options(tmp_path, "--resume")))
        time.sleep(whole[2] * (fifth + rng.random()) / 5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert train.main(options(tmp_path, "--resume")) == 0
    assert same(result(tmp_path), whole[1]), f"after {time.time() - begun:.0f} s"
    left = list((tmp_path / "stages").iterdir())
    assert len(left) == 2 and not [path for path in left if path.suffix]
    assert len(runs.checkpoints(tmp_path / "run")) == 2


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "step",
    [0, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW), pytest.param(17, marks=SLOW), 29],
)
def test_killed_in_a_step(whole, started, monkeypatch, step):
    """SIGKILL between a step's draw and its update: before the first checkpoint, around one, and in
    the last step."""
    between(monkeypatch, lambda now: kill() if now == step else None)
    assert killed(*options(started, "--resume"))
    monkeypatch.undo()
    assert train.main(options(started, "--resume")) == 0
    assert same(result(started), whole[1])


@pytest.mark.slow
def test_killed_while_it_writes(whole, started, monkeypatch, capsys):
    """SIGKILL before a checkpoint gets its name, and before a stage does: the unfinished folder is
    not taken for a finished one."""
    publish = folder.publish

    def stops_at(name):
        def publishes(unfinished, path):
            if name in str(path):
                kill()
            publish(unfinished, path)

        monkeypatch.setattr(folder, "publish", publishes)

    own = ["--stages", str(started / "own")]
    stops_at("checkpoint-000008")
    assert killed(*options(started, "--resume"))
    stops_at("preference")
    assert killed(*options(started, "--resume", *own))
    monkeypatch.undo()
    assert train.main(options(started, "--resume", *own)) == 0
    assert "resumed at step 4" in capsys.readouterr().out and same(result(started), whole[1])


@pytest.mark.parametrize(
    "damage",
    ["truncated", *(pytest.param(how, marks=SLOW) for how in ("missing", "state", "pickle"))],
)
def test_a_damaged_newest_checkpoint(whole, started, capsys, damage, tmp_path):
    """A warning, the one before is used, and the end is the same.

    A pickle with the right hash is refused unread.
    """
    assert train.main(options(started)) == 0
    (started / "run" / "summary.json").unlink()
    before, newest = (started / "run" / f"checkpoint-0000{step}" for step in (28, 30))
    if damage == "truncated":
        os.truncate(newest / "model.safetensors", 1000)
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    elif damage == "state":
        (newest / "state.json").write_text('{"step": 30')
    else:
        (newest / "optimizer.pt").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
        state = json.loads((newest / "state.json").read_text())
        state["files"]["optimizer.pt"] = runs.file_hash(newest / "optimizer.pt")
        (newest / "state.json").write_text(json.dumps(state))
    capsys.readouterr()
    assert train.main(options(started, "--resume")) == 0
    out, err = capsys.readouterr()
    assert (
        err.count("warning: ") == 1
        and "damaged" in err
        and f"resumed at step 28 from {before}" in out
    )
    assert same(result(started), whole[1]) and not (tmp_path / "evil").exists()


@pytest.mark.slow
def test_a_damaged_later_checkpoint_does_not_outlive_good_ones(started):
    """A damaged checkpoint of a later step is passed over, and removed at the next save: --keep
    counts the good ones."""
    assert train.main(options(started)) == 0
    (started / "run" / "summary.json").unlink()
    newest = started / "run" / "checkpoint-000030"
    (newest / "state.json").write_text("{")
    newest.rename(started / "run" / "checkpoint-000099")
    assert train.main(options(started, "--resume")) == 0
    assert names_of(started / "run") == ["checkpoint-000028", "checkpoint-000030"]


def test_what_a_kill_leaves_of_the_first_file(whole, started):
    """Half of config.json and the lock are no other things: the run begins. A damaged config.json
    is one line."""
    (started / "run").mkdir()
    (started / "run" / "config.json.tmp").write_text('{"lo')
    (started / "run" / runs.LOCK).touch()
    assert train.main(options(started)) == 0 and same(result(started), whole[1])


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_damaged_config(started, capsys, text):
    (started / "run").mkdir()
    (started / "run" / "config.json").write_text(text)
    assert train.main(options(started)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.json is damaged" in error


class Evil:
    """What a pickle can do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_another_run_is_not_resumed(started, capsys, monkeypatch):
    """Other options, another version, another reference under the same name: an error that names
    the difference; the checkpoints stay."""

    def stops(step):
        if step == 9:
            raise ValueError("stopped")

    between(monkeypatch, stops)
    assert train.main(options(started)) == 2
    monkeypatch.undo()
    kept = runs.checkpoints(started / "run")

    def refused(word, *more):
        capsys.readouterr()
        return train.main(options(started, *more)) == 2 and word in capsys.readouterr().err

    assert refused("tau 0.03 there, 0.5 here", "--resume", "--tau", "0.5")
    assert refused("data_seed", "--resume", "--data-seed", "1")
    assert refused("steps", "--resume", "--steps", "31")
    assert refused("--resume")
    now = runs.version()
    monkeypatch.setattr(runs, "version", lambda: "1.1.9.1")
    assert refused(f"version {now} there, 1.1.9.1 here", "--resume")
    monkeypatch.undo()
    file_hash = runs.file_hash

    def other_hash(path):
        return "0" * 64 if "supervised" in str(path) else file_hash(path)

    monkeypatch.setattr(runs, "file_hash", other_hash)
    assert refused("another reference", "--resume")
    assert runs.checkpoints(started / "run") == kept and len(kept) == 2


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(whole, started, monkeypatch, capsys, number, status):
    """In the alignment: the step is finished, a checkpoint written, and the end after --resume is
    the same. In a stage: it ends at once. The handlers of before are back afterwards."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    between(monkeypatch, lambda step: os.kill(os.getpid(), number) if step == 6 else None)
    assert train.main(options(started)) == status
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert names_of(started / "run") == ["checkpoint-000004", "checkpoint-000007"]
    monkeypatch.undo()
    assert train.main(options(started, "--resume")) == 0 and same(result(started), whole[1])

    def comes_in_a_stage(*given, **named):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(policies, "minimise", comes_in_a_stage)
    assert train.main(options(started / "other")) == status
    left = (started / "other" / "stages").iterdir()
    assert not [path for path in left if path.suffix != ".tmp"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_at_once(started, monkeypatch):
    """Two in one step: the step is given up, no checkpoint is written for it."""

    def twice(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    between(monkeypatch, twice)
    assert train.main(options(started)) == 130
    assert names_of(started / "run") == ["checkpoint-000004"]


def test_a_full_disk(whole, started, monkeypatch):
    """A write that fails half-way (RLIMIT_FSIZE in a child, at the second checkpoint): exit 2, the
    first one is whole, the run goes on."""
    save = runs.Run.save

    def limited(self, policy, optimizer, copies, step):
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        save(self, policy, optimizer, copies, step)

    monkeypatch.setattr(runs.Run, "save", limited)
    read, write = os.pipe()

    def work():
        sys.stderr = os.fdopen(write, "w", 1)
        return train.main(options(started))

    pid = fork(work)
    os.close(write)
    with os.fdopen(read) as pipe:
        error = pipe.read().splitlines()[-1]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert error.startswith("train.py: error: cannot write")
    monkeypatch.undo()
    assert names_of(started / "run") == ["checkpoint-000004"]
    assert train.main(options(started, "--resume")) == 0 and same(result(started), whole[1])


def test_a_folder_that_cannot_be_written(started, capsys):
    (started / "file").write_text("kept")
    assert train.main(options(started, "--out", str(started / "file" / "run"))) == 2
    assert (
        capsys.readouterr().err.startswith("train.py: error: cannot write")
        and (started / "file").read_text() == "kept"
    )


def test_two_runs_on_one_folder(started, capsys):
    """The second refuses and changes nothing; the lock is gone with a process that was killed."""
    held, ready = os.pipe()
    folder = started / "run"
    folder.mkdir()

    def hold():
        with runs.locked(folder / runs.LOCK):
            os.write(ready, b"x")
            time.sleep(60)

    pid = fork(hold)
    os.read(held, 1)
    assert train.main(options(started)) == 2
    error = capsys.readouterr().err
    assert "another run" in error and error.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == [runs.LOCK]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with runs.locked(folder / runs.LOCK, folder):
        pass
    assert not list(folder.iterdir())


def test_a_lock_is_held_by_one(tmp_path):
    """Eight processes count in one file, each time under the lock, which is removed each time."""
    (tmp_path / "number").write_text("0")

    def work():
        for _ in range(20):
            with runs.locked(tmp_path / "lock"):
                number = int((tmp_path / "number").read_text())
                time.sleep(0.001)
                (tmp_path / "number").write_text(str(number + 1))
        return 0

    pids = [fork(work) for _ in range(8)]
    assert not any(os.waitpid(pid, 0)[1] for pid in pids)
    assert (tmp_path / "number").read_text() == "160" and not (tmp_path / "lock").exists()


@pytest.mark.slow
def test_two_runs_share_the_making_of_a_stage(tmp_path):
    """Started together in an empty folder.

    One makes the stages, the other waits and takes them; both end alike.
    """

    def run(name):
        return fork(lambda: train.main(options(tmp_path, "--out", str(tmp_path / name))))

    pids = [run("a"), run("b")]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert len(list((tmp_path / "stages").iterdir())) == 2
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (
        tmp_path / "b" / "metrics.jsonl"
    ).read_bytes()


def test_a_loss_that_is_not_finite(whole, started, monkeypatch, capsys):
    """NaN from the loss, or only from its gradient: the step and a file with its prompts are named;
    the last checkpoint goes on to the same end."""
    loss, now = ipo_md.loss, []
    between(monkeypatch, now.append)

    def nan(value):
        return value * float("nan")

    def nan_in_the_gradient(value):
        return value + 0 * torch.sqrt(value - value)

    def bad_at_step_9(bad):
        def bad_loss(*given, **constants):
            value = loss(*given, **constants)
            return bad(value) if now[-1] == 9 else value

        monkeypatch.setattr(ipo_md, "loss", bad_loss)

    for bad in (nan, nan_in_the_gradient):
        bad_at_step_9(bad)
        assert train.main(options(started, "--resume")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("train.py: error: step 9: ") and "step-9.json" in error
        kept = json.loads((started / "run" / "step-9.json").read_text())
        for name in ("text", "y", "y_other", "label"):
            assert len(kept[name]) == 4
        assert "tl;dr" in kept["text"][0]
    monkeypatch.undo()
    assert runs.checkpoints(started / "run")[-1].endswith("000008")
    assert train.main(options(started, "--resume")) == 0 and same(result(started), whole[1])


def test_a_full_device(started, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmany lines")

    monkeypatch.setattr(train, "update", full)
    assert train.main(options(started)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(
        word in error for word in ("--micro-batch-size", "--batch-size", "bfloat16", "--out")
    )


@pytest.mark.slow
@pytest.mark.parametrize("loss, name", [("dro", "value.2.weight"), ("beta_dpo", "margins")])
def test_a_methods_own_weights_are_resumed(started, monkeypatch, loss, name):
    """DRO's value and beta-DPO's means are in the checkpoints: killed in step 9 and resumed,
    policy, value and metrics are those of the run that was not, to the bit, and the folder loads as
    any policy's."""
    argv = ["--loss", loss, "--steps", "12", "--lr", "0.01"]
    uninterrupted = options(started, *argv, "--out", str(started / "whole" / "run"))
    assert train.main(uninterrupted) == 0
    plain = result(started / "whole")
    between(monkeypatch, lambda step: kill() if step == 9 else None)
    assert killed(*options(started, *argv))
    monkeypatch.undo()
    monkeypatch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
    assert train.main(options(started, *argv, "--resume")) == 0
    assert same(result(started), plain)
    assert plain[0][name].abs().max() > 0.01
    policies.load(str(started / "run" / "policy"))
