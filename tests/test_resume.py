"""A run that is stopped at any moment and resumed is the run it would have been, bit for bit; nothing finished is lost.

Children are forked, so that torch is imported once; each runs train.main on one thread. Tiny models: what is tested is the order of
writes, not the training.
"""

import json
import os
import pickle
import random
import resource
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import policy as policies
import train

STEPS = [
    "--supervised-steps",
    "40",
    "--preference-steps",
    "40",
    "--steps",
    "30",
    "--save-every",
    "4",
    "--batch-size",
    "4",
    "--eval-prompts",
    "8",
]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


def options(folder, *more):
    return [
        *STEPS,
        "--device",
        "cpu",
        "--stages",
        str(folder / "stages"),
        "--out",
        str(folder / "run"),
        *more,
    ]


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


def test_killed_at_random_moments(whole, tmp_path):
    """SIGKILL at five random moments, one in each fifth of the run's time and so in the stages, too; then it is let go to its end."""
    rng, begun = random.Random(5), time.time()
    for fifth in range(5):
        pid = fork(lambda: train.main(options(tmp_path, "--resume")))
        time.sleep(whole[2] * (fifth + rng.random()) / 5)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert train.main(options(tmp_path, "--resume")) == 0
    assert same(result(tmp_path), whole[1]), f"after {time.time() - begun:.0f} s"
    assert (
        not list((tmp_path / "stages").glob("*.tmp"))
        and len(train.checkpoints(tmp_path / "run")) == 2
    )


@pytest.mark.parametrize("step", [0, 3, 4, 17, 29])
def test_killed_in_a_step(whole, started, monkeypatch, step):
    """SIGKILL between a step's draw and its update: before the first checkpoint, around one, and in the last step."""
    draw = train.draw
    monkeypatch.setattr(
        train,
        "draw",
        lambda *given: os.kill(os.getpid(), signal.SIGKILL) if given[-1] == step else draw(*given),
    )
    assert (
        os.waitpid(fork(lambda: train.main(options(started, "--resume"))), 0)[1] == signal.SIGKILL
    )
    monkeypatch.undo()
    assert train.main(options(started, "--resume")) == 0
    assert same(result(started), whole[1])


def test_killed_while_it_writes(whole, started, monkeypatch, capsys):
    """SIGKILL before a checkpoint gets its name, and before a stage does: the unfinished folder is not taken for a finished one."""
    publish = train.publish
    for name in ("checkpoint-000008", "preference"):
        monkeypatch.setattr(
            train,
            "publish",
            lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if name in str(b) else publish(a, b),
        )
        stages = ["--stages", str(started / "own")] if name == "preference" else []
        assert (
            os.waitpid(fork(lambda: train.main(options(started, "--resume", *stages))), 0)[1]
            == signal.SIGKILL
        )
        monkeypatch.undo()
    assert train.main(options(started, "--resume", "--stages", str(started / "own"))) == 0
    assert "resumed at step 4" in capsys.readouterr().out and same(result(started), whole[1])


@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "pickle"])
def test_a_damaged_newest_checkpoint(whole, started, capsys, damage, tmp_path):
    """A warning, the one before is used, and the end is the same. A pickle with the right hash is refused unread."""
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
        state["files"]["optimizer.pt"] = train.file_hash(newest / "optimizer.pt")
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


class Evil:
    """What a pickle can do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_another_run_is_not_resumed(started, capsys, monkeypatch):
    """Other options, another reference under the same name: an error that names the difference; the checkpoints stay."""
    draw = train.draw
    monkeypatch.setattr(
        train, "draw", lambda *given: draw(*given) if given[-1] < 9 else train.fail("stopped")
    )
    assert train.main(options(started)) == 2
    monkeypatch.undo()
    kept = train.checkpoints(started / "run")
    for more, word in (
        (["--tau", "0.5"], "tau 0.03 there, 0.5 here"),
        (["--data-seed", "1"], "data_seed"),
        (["--steps", "31"], "steps"),
    ):
        capsys.readouterr()
        assert (
            train.main(options(started, "--resume", *more)) == 2 and word in capsys.readouterr().err
        )
    assert train.main(options(started)) == 2 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(
        train,
        "file_hash",
        lambda path, right=train.file_hash: "0" * 64 if "supervised" in str(path) else right(path),
    )
    assert (
        train.main(options(started, "--resume")) == 2
        and "another reference" in capsys.readouterr().err
    )
    assert train.checkpoints(started / "run") == kept and len(kept) == 2


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(whole, started, monkeypatch, capsys, number, status):
    """In the alignment: the step is finished, a checkpoint written, and the end after --resume is the same. In a stage: it ends at once.
    The handlers of before are back afterwards."""
    draw, handlers = train.draw, [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(
        train,
        "draw",
        lambda *given: (os.kill(os.getpid(), number) if given[-1] == 6 else None, draw(*given))[1],
    )
    assert train.main(options(started)) == status
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert [os.path.basename(path) for path in train.checkpoints(started / "run")] == [
        "checkpoint-000004",
        "checkpoint-000007",
    ]
    monkeypatch.undo()
    assert train.main(options(started, "--resume")) == 0 and same(result(started), whole[1])
    monkeypatch.setattr(policies, "fit", lambda *given, **named: os.kill(os.getpid(), number))
    assert train.main(options(started / "other")) == status
    assert not [path for path in (started / "other" / "stages").iterdir() if path.suffix != ".tmp"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_at_once(started, monkeypatch):
    """Two in one step: the step is given up, no checkpoint is written for it."""
    draw = train.draw
    monkeypatch.setattr(
        train,
        "draw",
        lambda *given: (
            [os.kill(os.getpid(), signal.SIGINT) for _ in range(2 * (given[-1] == 6))],
            draw(*given),
        )[1],
    )
    assert train.main(options(started)) == 130
    assert [os.path.basename(path) for path in train.checkpoints(started / "run")] == [
        "checkpoint-000004"
    ]


def test_a_full_disk(whole, started, monkeypatch):
    """A write that fails half-way (RLIMIT_FSIZE in a child, at the second checkpoint): exit 2, the first one is whole, the run goes on."""
    save = train.save

    def limited(*given):
        if given[-1]["step"] == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        save(*given)

    monkeypatch.setattr(train, "save", limited)
    read, write = os.pipe()
    pid = fork(
        lambda: (setattr(sys, "stderr", os.fdopen(write, "w", 1)), train.main(options(started)))[1]
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        error = pipe.read().splitlines()[-1]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2 and error.startswith(
        "train.py: error: cannot write"
    )
    monkeypatch.undo()
    assert [os.path.basename(path) for path in train.checkpoints(started / "run")] == [
        "checkpoint-000004"
    ]
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

    def hold():
        with train.locked(started / "run"):
            os.write(ready, b"x")
            time.sleep(60)

    pid = fork(hold)
    os.read(held, 1)
    assert train.main(options(started)) == 2
    error = capsys.readouterr().err
    assert (
        "another run" in error and error.count("\n") == 1 and not list((started / "run").iterdir())
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with train.locked(started / "run"):
        pass


def test_two_runs_share_the_making_of_a_stage(tmp_path):
    """Started together in an empty folder: one makes the stages, the other waits and takes them; both end alike."""
    pids = [
        fork(lambda: train.main(options(tmp_path, "--out", str(tmp_path / name))))
        for name in ("a", "b")
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert len(list((tmp_path / "stages").iterdir())) == 2
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (
        tmp_path / "b" / "metrics.jsonl"
    ).read_bytes()


def test_a_loss_that_is_not_finite(whole, started, monkeypatch, capsys):
    """NaN from the loss, or only from its gradient: the step and a file with its prompts are named; the last checkpoint goes on to the
    same end."""
    loss, draw, now = train.METHODS["ipo_md"].loss, train.draw, []
    monkeypatch.setattr(train, "draw", lambda *given: (now.append(given[-1]), draw(*given))[1])
    for bad in (
        lambda value: value * float("nan"),
        lambda value: value + 0 * torch.sqrt(value - value),
    ):
        monkeypatch.setattr(
            train.METHODS["ipo_md"],
            "loss",
            lambda *given: bad(loss(*given)) if now[-1] == 9 else loss(*given),
        )
        assert train.main(options(started, "--resume")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("train.py: error: step 9: ") and "step-9.json" in error
        kept = json.loads((started / "run" / "step-9.json").read_text())
        assert (
            len(kept["text"]) == len(kept["y"]) == len(kept["y_other"]) == len(kept["label"]) == 4
            and "tl;dr" in kept["text"][0]
        )
    monkeypatch.undo()
    assert train.checkpoints(started / "run")[-1].endswith("000008")
    assert train.main(options(started, "--resume")) == 0 and same(result(started), whole[1])


def test_a_full_device(started, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmany lines")

    monkeypatch.setattr(train, "update", full)
    assert train.main(options(started)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert all(
        word in error for word in ("--micro-batch-size", "--batch-size", "bfloat16", "--resume")
    )
