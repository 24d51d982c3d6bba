"""What may be wrong with a run's folder, on purpose or not: it is refused in one line and nothing
is changed, or passed over with a warning; never a wrong result with exit status 0."""

import itertools
import json
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import policy as policies
import train
from job import folder, report
from job import run as runs
from limit import within
from test_bad_input import broken

STEPS = "--supervised-steps 4 --preference-steps 4 --steps 6 --save-every 2 --batch-size 4".split()
STEPS += "--eval-prompts 4 --device cpu".split()
NEWEST = "checkpoint-000006"


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, in run/, and its stages, in stages/."""
    place = tmp_path_factory.mktemp("done")
    assert start(place) == 0
    return place


@pytest.fixture
def place(done, tmp_path):
    """A copy of the finished run; the stages are the same."""
    shutil.copytree(done / "run", tmp_path / "run")
    (tmp_path / "stages").symlink_to(done / "stages")
    return tmp_path


def argv(place, *more):
    return [*STEPS, "--stages", str(place / "stages"), "--out", str(place / "run"), *more]


def start(place, *more):
    """train.main's exit status. A whole run takes more than a folder that is read."""
    with within(cpu=120):
        return train.main(argv(place, *more))


def content(place):
    """Every file's bytes, every link's target, every pipe, by path. The stages are left out."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not path.is_dir():
            found[name] = "pipe"
    return found


def result(place):
    """What must be equal to the bit."""
    run = place / "run"
    return (run / "metrics.jsonl").read_bytes(), (run / "policy/model.safetensors").read_bytes()


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("train.py: error: "), error
    return error


def text(name, what):
    return lambda run: (run / name).write_bytes(what if isinstance(what, bytes) else what.encode())


def edited(name, **values):
    def spoil(run):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(found | values))

    return spoil


def gone(path):
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def pipe(name):
    def spoil(run):
        if (run / name).exists():
            gone(run / name)
        os.mkfifo(run / name)

    return spoil


def link(name, target=None):
    """A link to something of the user's beside the run, or to target."""

    def spoil(run):
        if (run / name).exists():
            gone(run / name)
        (run.parent / "mine").write_text("kept\n" * 99)
        (run / name).symlink_to(target or run.parent / "mine")

    return spoil


def unfinished(spoil):
    """Spoils the folder of a run whose last step is saved and no more."""

    def spoils(run):
        (run / "summary.json").unlink()
        spoil(run)

    return spoils


DEEP = "[" * 100_000
# what is spoiled, what the message must hold; all with --resume
REFUSED = {
    "config, a list": (text("config.json", "[]"), "config.json is damaged"),
    "config, null": (text("config.json", "null"), "config.json is damaged"),
    "config, empty": (text("config.json", ""), "config.json is damaged"),
    "config, binary": (text("config.json", b"\xff\x00"), "config.json is damaged"),
    "config, deep": (text("config.json", DEEP), "config.json is damaged"),
    "config, a pipe": (pipe("config.json"), "its config.json is not"),
    "config, a device": (link("config.json", "/dev/zero"), "its config.json is a link"),
    "config, control characters": (edited("config.json", tau="\x1b[31m\n"), "\\x1b[31m"),
    "config, a long value": (edited("config.json", tau="x" * 10**6), "tau xxx"),
    "summary, a list": (text("summary.json", "[]"), "summary.json: is damaged"),
    "summary, cut": (text("summary.json", "{"), "summary.json: is damaged"),
    "summary, deep": (text("summary.json", DEEP), "summary.json: is damaged"),
    "summary, a pipe": (pipe("summary.json"), "its summary.json is not"),
    "summary, a link": (link("summary.json"), "its summary.json is a link"),
    "the policy is missing": (lambda run: gone(run / "policy"), "policy/config.json is missing"),
    "the policy is cut": (
        lambda run: os.truncate(run / "policy" / "model.safetensors", 999),
        "policy/model.safetensors is missing or not as it was",
    ),
    "the policy's tokenizer is missing": (
        lambda run: gone(run / "policy" / "tokenizer.json"),
        "policy/tokenizer.json is missing",
    ),
    "the policy is a pipe": (pipe("policy/model.safetensors"), "policy/model.safetensors"),
    "the policy is a link": (link("policy"), "its policy is a link"),
    "the manifest is a list": (text("manifest.json", "[]"), "manifest.json: is damaged"),
    "metrics, a link": (unfinished(link("metrics.jsonl")), "its metrics.jsonl is a link"),
    "metrics, a pipe": (unfinished(pipe("metrics.jsonl")), "its metrics.jsonl is not"),
    "samples, a link": (unfinished(link("samples.txt")), "its samples.txt is a link"),
    "samples, a pipe": (unfinished(pipe("samples.txt")), "its samples.txt is not"),
    "the lock, a link": (unfinished(link(".lock")), "its .lock is a link"),
    "a checkpoint, a link": (unfinished(link(NEWEST)), f"its {NEWEST} is a link"),
    "a checkpoint, the user's": (
        unfinished(text("checkpoint-000003", "mine")),
        "its checkpoint-000003 is not what a run writes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_refused(place, capsys, case):
    spoil, expected = REFUSED[case]
    spoil(place / "run")
    before = content(place)
    capsys.readouterr()
    assert start(place, "--resume") == 2
    assert expected in one_line(capsys) and content(place) == before


def test_metrics_that_are_not_as_they_were(place, capsys):
    """Cut or changed: refused behind the stages, and nothing is lost."""
    (place / "run" / "summary.json").unlink()
    lines = (place / "run" / "metrics.jsonl").read_bytes()
    for wrong in (lines[:9], lines.replace(b"1", b"2"), None):
        text("metrics.jsonl", wrong or b"")(place / "run")
        if wrong is None:
            (place / "run" / "metrics.jsonl").unlink()
        capsys.readouterr()
        before = content(place)
        assert start(place, "--resume") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "metrics.jsonl is not as it was at step 6" in error and content(place) == before
    text("metrics.jsonl", lines)(place / "run")
    assert start(place, "--resume") == 0


def test_another_name_of_the_metrics_is_left_alone(place, done):
    """A hard link, such as cp -al makes: a resumed run truncates a file of its own."""
    (place / "run" / "summary.json").unlink()
    (place / "run" / NEWEST).rename(place / "moved")
    os.link(place / "run" / "metrics.jsonl", place / "backup")
    before = (place / "backup").read_bytes()
    assert start(place, "--resume") == 0
    assert (place / "backup").read_bytes() == before and result(place) == result(done)


def state(**values):
    return edited(f"{NEWEST}/state.json", **values)


def rehashed(spoil):
    """Spoils a checkpoint's file, and gives it the hash that it now has."""

    def spoils(run):
        spoil(run / NEWEST)
        path = run / NEWEST / "state.json"
        found = json.loads(path.read_text())
        for name in ("model.safetensors", "optimizer.pt"):
            found["files"][name] = runs.file_hash(run / NEWEST / name)
        path.write_text(json.dumps(found))

    return spoils


def weights(change):
    def spoil(checkpoint):
        found = load_file(checkpoint / "model.safetensors")
        change(found)
        save_file(found, checkpoint / "model.safetensors", {"format": "pt"})

    return rehashed(spoil)


def moments(change):
    def spoil(checkpoint):
        found = torch.load(checkpoint / "optimizer.pt")
        torch.save(change(found) or found, checkpoint / "optimizer.pt")

    return rehashed(spoil)


NAME = "transformer.ln_f.bias"
CHECKPOINTS = {
    "step -1": (state(step=-1), "its step"),
    "step 10^9": (state(step=10**9), "its step"),
    "step 10^400": (state(step=10**400), "its step"),
    "step, a text": (state(step="6"), "its step"),
    "step, true": (state(step=True), "its step"),
    "step of another": (state(step=4), "its step"),
    "metrics, a text": (state(metrics="9"), "its metrics"),
    "metrics, negative": (state(metrics=-9), "its metrics"),
    "no files": (state(files={}), "says nothing of"),
    "files, a list": (state(files=[1]), "list"),
    "a file elsewhere": (state(files={"../../../etc/passwd": "0"}), "says nothing of"),
    "state, a list": (text(f"{NEWEST}/state.json", "[]"), "state.json"),
    "state, deep": (text(f"{NEWEST}/state.json", DEEP), "state.json"),
    "state, a pipe": (pipe(f"{NEWEST}/state.json"), "state.json: is no file"),
    "state, a device": (link(f"{NEWEST}/state.json", "/dev/zero"), "state.json: is a link"),
    "weights, a pipe": (pipe(f"{NEWEST}/model.safetensors"), "is no file"),
    "weights, a device": (link(f"{NEWEST}/model.safetensors", "/dev/zero"), "is a link"),
    "weights, one missing": (weights(lambda found: found.pop(NAME)), f"lacks {NAME}"),
    "weights, one renamed": (
        weights(lambda found: found.update(x=found.pop(NAME))),
        "x is no weight",
    ),
    "weights, another shape": (
        weights(lambda found: found.update({NAME: torch.zeros(3)})),
        f"{NAME} is no weight",
    ),
    "weights, another type": (
        weights(lambda found: found.update({NAME: found[NAME].half()})),
        f"{NAME} is no weight",
    ),
    "weights, NaN": (weights(lambda found: found[NAME].fill_(float("nan"))), f"{NAME} holds NaN"),
    "weights, none": (weights(dict.clear), "lacks"),
    "weights, another byte": (
        lambda run: text(f"{NEWEST}/model.safetensors", flipped(run / NEWEST))(run),
        "is not as it was written",
    ),
    "moments, none": (moments(lambda found: found["state"].clear()), "lacks the moments"),
    "moments, one missing": (
        moments(lambda found: found["state"].pop(3) and None),
        "lacks the moments",
    ),
    "moments, another shape": (
        moments(lambda found: found["state"][0].update(exp_avg=torch.zeros(2))),
        "does not fit",
    ),
    "moments, NaN": (
        moments(lambda found: found["state"][0]["exp_avg"].fill_(float("nan")) is None),
        "not finite",
    ),
    "moments, another decay": (
        moments(lambda found: found["param_groups"][0].update(weight_decay=5.0)),
        "weight_decay",
    ),
    "moments, no groups": (moments(lambda found: found["param_groups"].clear()), ""),
    "moments, a list": (moments(lambda found: [1]), ""),
    "moments, a pipe": (pipe(f"{NEWEST}/optimizer.pt"), "is no file"),
}


def flipped(checkpoint):
    """The weights with the last byte changed."""
    whole = (checkpoint / "model.safetensors").read_bytes()
    return whole[:-1] + bytes([whole[-1] ^ 1])


@pytest.fixture(scope="module")
def asked(done):
    """What a resumed run gives to folder.read_checkpoint."""
    policy = policies.load(str(done / "run" / "policy"))[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0)
    return SimpleNamespace(steps=6, device="cpu"), policy, optimizer, {}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_damaged_checkpoint(place, asked, case):
    """What restore passes over (tests/test_resume.py): an error of any kind, that is not memory's.

    As it was written, the checkpoint is read.
    """
    spoil, expected = CHECKPOINTS[case]
    folder.read_checkpoint(str(place / "run" / NEWEST), *asked)
    spoil(place / "run")
    with pytest.raises(Exception) as raised, within():
        folder.read_checkpoint(str(place / "run" / NEWEST), *asked)
    assert expected in str(raised.value) and not isinstance(raised.value, MemoryError)


def test_a_damaged_checkpoint_changes_no_result(place, done, capsys):
    """Re-hashed weights without one of their names: the one before goes on to the same bits."""
    (place / "run" / "summary.json").unlink()
    CHECKPOINTS["weights, one renamed"][0](place / "run")
    capsys.readouterr()
    assert start(place, "--resume") == 0
    out, err = capsys.readouterr()
    assert err.count("warning: ") == 1 and "x is no weight" in err and "resumed at step 4" in out
    assert result(place) == result(done)


def test_the_users_things_are_left_alone(place, done):
    """What looks like a checkpoint and is none, and unfinished files that no run writes."""
    run = place / "run"
    (run / "summary.json").unlink()
    (run / NEWEST).rename(place / "moved")
    mine = [run / "checkpoint-best", run / "checkpoint-000099", run / "notes.tmp", run / "step.tmp"]
    for path in mine[:2]:
        path.mkdir()
        (path / "model.safetensors").write_text("mine")
    for path in mine[2:]:
        path.write_text("mine")
    (run / "checkpoint-1.txt").write_text("mine")
    assert start(place, "--resume") == 0 and result(place) == result(done)
    assert all(path.exists() for path in [*mine, run / "checkpoint-1.txt"])
    assert (mine[0] / "model.safetensors").read_text() == "mine"


def test_what_a_kill_left_goes_with_the_next_start(place, done):
    """Unfinished files, folders, links and pipes under a run's own names."""
    run = place / "run"
    (run / "summary.json").unlink()
    (run / NEWEST).rename(run / f"{NEWEST}.old.tmp")
    (run / "checkpoint-000002.tmp").mkdir()
    pipe("summary.json.tmp")(run)
    link("config.json.tmp")(run)
    (run / "policy.tmp").mkdir()
    assert start(place, "--resume") == 0 and result(place) == result(done)
    assert not [name for name in os.listdir(run) if name.endswith(".tmp")]
    assert (place / "mine").read_text() == "kept\n" * 99


def test_the_lock_of_a_finished_run_goes(place, done):
    """A kill between the last file and the lock's removal leaves it."""
    (place / "run" / ".lock").touch()
    assert start(place, "--resume") == 0 and content(place / "run") == content(done / "run")


def test_checkpoints_beyond_keep_go_when_a_run_is_resumed(place, done):
    """A kill between the last step's checkpoint and the removal of the oldest leaves one more."""
    run = place / "run"
    (run / "summary.json").unlink()
    shutil.copytree(run / "checkpoint-000004", run / "checkpoint-000002")
    assert start(place, "--resume") == 0 and result(place) == result(done)
    assert len(list(run.glob("checkpoint-*"))) == 2 and not (run / "checkpoint-000002").exists()


def test_a_removed_checkpoint_loses_its_name_first(place, monkeypatch):
    """A removal that stops half-way leaves no checkpoint behind that lacks a file."""

    def stops(path):
        os.unlink(os.path.join(path, "model.safetensors"))
        raise OSError("stopped")

    monkeypatch.setattr(shutil, "rmtree", stops)
    with pytest.raises(OSError, match="stopped"):
        folder.remove(str(place / "run" / NEWEST))
    monkeypatch.undo()
    assert [os.path.basename(p) for p in folder.checkpoints(place / "run")] == ["checkpoint-000004"]
    folder.clear_unfinished(place / "run")
    assert len(list((place / "run").glob("checkpoint*"))) == 1


@pytest.mark.slow
def test_a_kept_stage_is_as_it_was_made(done, tmp_path, capsys):
    """Other weights under the old name are noticed; without the folder it is made again."""
    shutil.copytree(done / "stages", tmp_path / "stages")
    path = next((tmp_path / "stages").glob("preference-*"))
    whole = flipped(path)
    text("model.safetensors", whole)(path)
    capsys.readouterr()
    assert start(tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}: model.safetensors is missing or not as it was made" in error
    shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run")
    assert start(tmp_path) == 0 and result(tmp_path) == result(done)


def test_a_judge_with_other_weights_is_noticed(place):
    """begins_from notes all three, and a checkpoint of another judge is not gone on with."""
    options = SimpleNamespace(out=str(place / "run"), steps=6, device="cpu")
    policy = policies.load(str(place / "run" / "policy"))[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0)
    state(judge="0" * 64)(place / "run")
    now = json.loads((place / "run" / NEWEST / "state.json").read_text())
    with pytest.raises(ValueError, match="another judge model"):
        runs.restore(options, policy, optimizer, {}, dict(now, judge="1" * 64))
    found = runs.restore(options, policy, optimizer, {}, now)
    assert found["step"] == 6


@pytest.mark.parametrize("name", ["stages", "out"])
def test_a_name_that_is_taken(tmp_path, capsys, name):
    """--stages or --out is a file: refused before anything is made."""
    (tmp_path / "taken").write_text("mine")
    capsys.readouterr()
    assert start(tmp_path, f"--{name}", str(tmp_path / "taken")) == 2
    assert f"--{name}" in one_line(capsys) and os.listdir(tmp_path) == ["taken"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """Neither a file nor a folder, and what had the name before keeps it."""
    (tmp_path / "a.json").write_text("1")
    with pytest.raises(TypeError):
        folder.write_json(str(tmp_path / "a.json"), object())
    with pytest.raises(OSError), folder.whole(str(tmp_path / "b")) as place:
        text("half", "of it")(tmp_path / os.path.basename(place))
        raise OSError("full")
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "1"
    (tmp_path / "b").mkdir()
    text("b", "old")(tmp_path / "b")
    with pytest.raises(OSError), folder.whole(str(tmp_path / "b")) as place:
        text("half", "of it")(tmp_path / os.path.basename(place))
        raise OSError("full")
    assert content(tmp_path) == {"a.json": b"1", "b/b": b"old"}


def test_a_name_is_of_the_whole_old_or_the_whole_new(tmp_path, monkeypatch):
    """Before each operation on a folder that replaces another, and for a moment it is nobody's."""
    old, new = ({name: of for name in "12345"} for of in (b"old", b"new"))
    (tmp_path / "a").mkdir()
    for name in old:
        text(name, "old")(tmp_path / "a")
    seen = []

    def watched(operation):
        def after_a_look(*given, **named):
            seen.append(content(tmp_path / "a"))
            return operation(*given, **named)

        return after_a_look

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    with folder.whole(str(tmp_path / "a")) as place:
        for name in new:
            text(name, "new")(tmp_path / os.path.basename(place))
    monkeypatch.undo()
    assert [found for found, _ in itertools.groupby(seen)] == [old, {}]
    assert content(tmp_path) == {f"a/{name}": of for name, of in new.items()}


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a folder is not synchronised")
def test_what_gets_a_name_is_on_the_disk(tmp_path, monkeypatch):
    """A folder and each of its files, and a file by itself: a machine that fails keeps no name
    whose bytes it had not written."""
    on_disk, missing, fsync, rename = set(), {}, os.fsync, os.rename

    def synced(file):
        fsync(file)
        on_disk.add(os.fstat(file).st_ino)

    def named(source, target):
        there = [source]
        if os.path.isdir(source):
            there += [os.path.join(source, name) for name in os.listdir(source)]
        lost = [path for path in there if os.stat(path).st_ino not in on_disk]
        missing[os.path.basename(target)] = lost
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named)
    monkeypatch.setattr(os, "replace", named)
    with folder.whole(str(tmp_path / "a")) as place:
        for name in ("1", "2"):
            text(name, "x")(tmp_path / os.path.basename(place))
    folder.write_json(str(tmp_path / "c.json"), 1)
    assert missing == {"a": [], "c.json": []}


def test_memory_is_full_on_a_cpu(place, monkeypatch, capsys):
    """torch's allocator has no exception of its own: one line; another RuntimeError is a bug."""
    (place / "run" / "summary.json").unlink()
    (place / "run" / NEWEST).rename(place / "moved")

    def full(*given, **named):
        torch.empty(2**60)

    monkeypatch.setattr(train, "update", full)
    assert start(place, "--resume") == 2
    assert "memory is full" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(RuntimeError, match="a bug"):
        report.ending(RuntimeError("a bug"))


@pytest.mark.slow
def test_fuzz_runs(place, done, capsys):
    """100 folders of which one file's bytes are spoiled, finished and not: the same end, or one
    line on the standard error but for warnings of checkpoints that are passed over."""
    rng = random.Random(11)
    good = place / "good"
    (place / "run").rename(good)
    names = [path.relative_to(good) for path in sorted(good.rglob("*")) if path.is_file()]
    for number in range(100):
        shutil.copytree(good, place / "run")
        if number % 2:
            (place / "run" / "summary.json").unlink()
        left = [name for name in names if (place / "run" / name).exists()]
        path = place / "run" / rng.choice(left)
        path.write_bytes(broken(rng, path.read_bytes()))
        capsys.readouterr()
        status = start(place, "--resume")
        error = capsys.readouterr().err.splitlines()
        said = [line for line in error if line.startswith("train.py: error: ")]
        assert status in (0, 2) and len(said) == (status == 2), (number, path)
        # Of a finished run nothing but its config, summary and policy is read again.
        if status == 0 and number % 2 and path.parent.name != "policy":
            assert result(place) == result(done), (number, path)
        shutil.rmtree(place / "run")
