"""A run that is killed at any of its file operations: what is in its folders then.

SIGKILL leaves the files as the last system call left them. So one run is enough for all moments:
before each operation that Python makes (open to write, mkdir, rename, remove, rmdir, fsync) its
folders are copied, and every copy is what a kill at that moment leaves. Not covered: moments inside
a write of a library's own (safetensors', in a folder that has no name yet), and a machine that
loses what it had not yet put on its disk.
"""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import policy as policies
import train
from job import folder, stages
from job import run as runs
from job.options import parse
from test_rough_runs import argv, content, result

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
active = []  # the Watch whose run is going on: an audit hook cannot be taken off again


class Watch:
    """Copies a place's folders to copies/0, 1, ... before each file operation in it."""

    def __init__(self, place, copies):
        self.place, self.copies = place, copies
        self.seen = {}  # content -> number of the first copy with it
        self.moments = 0

    def before(self, path):
        # A relative path is of rmtree, which removes beside an open folder.
        if os.path.isabs(path) and not str(path).startswith(str(self.place)):
            return
        active.clear()  # what the copying does is no moment of the run
        self.moments += 1
        folders = tuple(sorted(str(path) for path in self.place.rglob("*") if path.is_dir()))
        now = folders, tuple(content(self.place).items())
        if now not in self.seen:
            self.seen[now] = len(self.seen)
            shutil.copytree(self.place, self.copies / str(self.seen[now]))
        active.append(self)


def hook(event, given):
    if active and event in EVENTS and isinstance(given[0], (str, bytes, os.PathLike)):
        reads = event == "open" and given[1] in ("r", "rb")
        if not reads:
            active[0].before(os.fsdecode(given[0]))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(the folder of the whole run, the copies' folder, number of moments)."""
    place, copies = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("copies")
    sys.addaudithook(hook)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        watch, fsync = Watch(place, copies), os.fsync

        def synced(file):
            watch.before(place)
            fsync(file)

        patch.setattr(os, "fsync", synced)
        active.append(watch)
        assert train.main(argv(place)) == 0
        active.clear()
        patch.undo()
        patch.setitem(policies.SIZES, "tiny", dict(n_layer=1, n_head=2, n_embd=16))
        yield place, copies, watch.moments


def in_order(copies):
    """The copies' folders, in the order of their moments."""
    return sorted(copies.iterdir(), key=lambda path: int(path.name))


def test_nothing_half_made_has_a_name(watched):
    """In every copy: what is called a stage, a checkpoint, a policy or a summary is whole, and as
    many checkpoints are there as were to be kept, from the moment when there were so many."""
    place, copies, moments = watched
    policy = policies.load(str(place / "run" / "policy"))[0]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0)
    given = SimpleNamespace(steps=6, device="cpu"), policy, optimizer, {}
    found = dict(stages=0, checkpoints=0, policies=0, summaries=0)
    kept = 0
    for copy in in_order(copies):
        for path in (copy / "stages").glob("*"):
            if path.suffix not in (".tmp", ".lock"):
                found["stages"] += stages.is_kept(str(path))
                assert content(path) == content(place / "stages" / path.name), copy
        run = copy / "run"
        there = folder.checkpoints(run) if run.is_dir() else []
        for path in there:
            folder.read_checkpoint(path, *given)
            found["checkpoints"] += 1
        assert len(there) >= kept, copy
        kept = min(len(there), parse([]).keep)
        if (run / "policy").is_dir():
            policies.load(str(run / "policy"))
            found["policies"] += 1
        if (run / "summary.json").is_file():
            runs.finished(str(run))
            found["summaries"] += 1
            left = {name: of for name, of in content(run).items() if name != ".lock"}
            assert left == content(place / "run"), copy
    assert moments > 200 and len(list(copies.iterdir())) > 60
    assert min(found.values()) > 0, found


def goes_on(copy, whole):
    """Resumes what a kill left: the same bits at the end, and nothing else is left over."""
    assert train.main(argv(copy, "--resume")) == 0
    assert result(copy) == result(whole), copy
    left = sorted(str(path.relative_to(copy)) for path in copy.rglob("*"))
    assert left == sorted(str(path.relative_to(whole)) for path in whole.rglob("*")), copy


@pytest.mark.slow
def test_every_tenth_moment_goes_on(watched):
    """KILLED_EVERY=1 in the environment takes every one."""
    place, copies, _ = watched
    every = int(os.environ.get("KILLED_EVERY", 10))
    for copy in in_order(copies)[::every]:
        goes_on(Path(copy), place)
