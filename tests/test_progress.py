"""job/progress.py: the time left over all stages, by hand on a clock of the test's."""

from types import SimpleNamespace

import pytest

import ipo_md
import rl
from job import progress


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic for progress.py; what its bars said after each step is in clock.said."""
    told = SimpleNamespace(now=100.0, said=[])

    class Bar(list):
        def set_postfix_str(self, text, refresh):
            told.said.append(text)

    monkeypatch.setattr(progress.time, "monotonic", lambda: told.now)
    monkeypatch.setattr(progress, "tqdm", lambda steps, **_: Bar(steps))
    yield told
    progress.begin({})


def take(clock, name, steps, seconds):
    """All steps of a stage, each of so many seconds. Returns what its bar said."""
    clock.said.clear()
    for _ in progress.bar(name)(range(steps), desc=name):
        clock.now += seconds
    return clock.said


def options(**changed):
    given = dict(supervised_steps=10, preference_steps=20, steps=5, batch_size=4, epochs=1)
    given |= dict(loss="ipo_md", responses=None, offline=False, preference_model=None)
    return SimpleNamespace(**given | dict(comparisons="file") | changed)


def test_times_by_hand(clock, capsys):
    """A supervised step of 9.6 s passes 32 responses three times: 0.1 s a pass. A preference
    model's takes 192 of them, an alignment's 4 x 2 x 4 = 32."""
    plan = progress.plan(options(), ipo_md, SimpleNamespace(judge=None), None)
    alignment = "alignment, ipo_md"
    assert list(plan) == ["supervised policy", "preference model", "judge model", alignment]
    progress.begin(plan)
    progress.announce("supervised policy")
    assert capsys.readouterr().out == (
        "stage 1 of 4: supervised policy, 10 steps; then preference model, 20 steps; judge model, "
        "20 steps; alignment, ipo_md, 5 steps: no time is known yet\n"
    )
    later = 2 * 20 * 19.2 + 5 * 3.2
    said = take(clock, "supervised policy", 10, 9.6)
    assert said[0] == f"all: over {progress.minutes(9 * 9.6 + later)}"
    assert said[-1] == f"all: over {progress.minutes(later)}" == "all: over 13 min"
    progress.announce("preference model")
    line = capsys.readouterr().out
    assert line.startswith("stage 2 of 4: preference") and line.endswith("at least 13 min in all\n")
    # Steps that take twice as long as was thought: what is not done yet is twice as long, too.
    said = take(clock, "preference model", 20, 38.4)
    assert said[-1] == f"all: over {progress.minutes(20 * 38.4 + 5 * 6.4)}"
    # The judge was kept; the alignment is the last, and knows all that is left.
    progress.announce(alignment)
    assert capsys.readouterr().out.startswith("stage 4 of 4: alignment, ipo_md, 5 steps: at least")
    assert take(clock, alignment, 5, 30) == [
        "all: 2 min",
        "all: 2 min",
        "all: 1 min",
        "all: 30 s",
        "all: 0 s",
    ]


def test_what_is_not_known_is_not_said(clock, capsys):
    """On the built-in task a model's step says nothing of an alignment's, and a kept supervised
    policy was not timed; without a plan a bar is a plain one."""
    panel = SimpleNamespace(judge=len)
    progress.begin(progress.plan(options(comparisons=None), ipo_md, panel, None))
    progress.announce("preference model")
    assert take(clock, "preference model", 20, 1)[-2] == "all: over 1 s + alignment, ipo_md"
    progress.announce("alignment, ipo_md")
    assert capsys.readouterr().out.count("no time is known yet") == 2
    progress.begin({})
    progress.announce("supervised policy")
    assert not take(clock, "supervised policy", 3, 1) and not capsys.readouterr().out


def test_the_stages_of_a_run():
    """--offline asks nobody, --preference neither, nor a model that is there; rl has a reward."""
    own, panel = SimpleNamespace(judge=None), SimpleNamespace(judge=len)

    def models(given, method=ipo_md, task=own, asked=None):
        return [name for name in progress.plan(given, method, task, asked) if "model" in name]

    assert models(options(offline=True)) == ["judge model"]
    assert models(options(preference_model="folder")) == ["judge model"]
    assert models(options(preference_model="folder", comparisons=None)) == []
    assert models(options(), asked=len) == []
    assert models(options(), rl, panel) == ["reward model"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3700, "1 h 2 min")]
)
def test_times_as_text(seconds, text):
    assert progress.minutes(seconds) == text
