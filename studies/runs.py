"""The paper's Table 2 and figures in form, on the built-in task, with the functions of train.py and evaluate.py.

  table2     RL tuned against the supervised policy (SFT); every other method's tau, beta and checkpoint chosen against that RL policy
             on validation prompts; then several seeds of each, every seed against every seed on test prompts
  fig1..5    tau, steps and beta sweeps; fig6 is bandit.py's
  same_tau   online IPO and Nash-MD-PG (beta = 0), IPO-MD and Nash-MD-PG (beta = 0.125), all at one tau: do they meet?
  frontier   win rate over KL to the reference, under the panel and under the learned preference model that they trained on
Runs and comparisons are lines of results/SCALE.jsonl, appended as they finish: the same command goes on where it was stopped.
Left out: length-normalised losses; a learning rate and batch size of each method's own.
Run: python -m studies.runs all --scale smoke    (3 min 20 s)    python experiments.py table2 --from-results    (draws from the lines alone)
"""

import argparse
import concurrent.futures
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from types import SimpleNamespace

import torch
from tqdm import tqdm

import bandit
import data
import evaluate
import policy as policies
import preference_model
import sampler
import train  # first: it sets how torch's threads wait

SCALES = {  # prompts: validation prompts of a comparison; test: those of Table 2; long: steps of same_tau; stages: their options
    "smoke": dict(
        steps=8,
        long=16,
        seeds=2,
        prompts=30,
        test=30,
        taus=2,
        extend=0,
        stages=["--supervised-steps", "60", "--preference-steps", "60"],
    ),
    "full": dict(steps=200, long=400, seeds=3, prompts=300, test=600, taus=5, extend=4, stages=[]),
}
NAMES = {
    "ipo": "IPO",
    "ipo_md": "IPO-MD",
    "dpo": "DPO",
    "nash_md": "Nash-MD-PG",
    "slic": "SLiC",
    "rl": "RL",
}
GRID = {
    **dict.fromkeys(NAMES, (0.05, 0.1, 0.02, 0.2, 0.5)),
    "dpo": (0.1, 0.2, 0.05, 0.5, 1.0),
    "slic": (0.1, 0.2, 0.05, 0.5, 0.02),
}
BETAS, SAME_TAU = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0), 0.1  # of fig5; of same_tau


def prepare(lab):
    """Makes the stages that every cell shares. Returns the folders of SFT and of the learned preference model."""
    options = train.arguments(
        ["--stages", os.path.join(lab.folder, "stages"), "--device", "cpu", *lab.stages]
    )
    task, start, data_hash = train.open_data(options)
    reference, path = train.supervised(options, task, start, data_hash)
    return dict(SFT=path, learned=train.preference(options, task, reference, path, "preference")[1])


def cell(lab, loss, tau, beta=None, seed=0, offline=False, steps=None):
    """A run to do: what its line says of it, its options for train.py and where it goes."""
    beta, steps = train.BETA.get(loss, 0.0) if beta is None else beta, steps or lab.steps
    name = f"{loss}{'-offline' if offline else ''}-tau{tau:g}-beta{beta:g}-seed{seed}-steps{steps}"
    argv = [
        "--loss",
        loss,
        "--tau",
        str(tau),
        "--seed",
        str(seed),
        "--steps",
        str(steps),
        "--save-every",
        str(max(1, lab.steps // 4)),
        "--keep",
        "99",
        "--eval-prompts",
        "20",
        *lab.stages,
        *["--offline"][: int(offline)],
        *(["--beta", str(beta)] if loss in train.BETA else []),
    ]
    return dict(
        name=name,
        loss=loss,
        tau=tau,
        beta=beta,
        seed=seed,
        offline=offline,
        argv=argv,
        lab=(lab.folder, lab.made, lab.prompts),
    )


def align(job):
    """Runs a cell. Returns its line: the curve on validation prompts, and each checkpoint against SFT."""
    (folder, made, prompts), points = job.pop("lab"), []
    out = os.path.join(folder, job["name"])
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(
            train.arguments(
                [
                    *job["argv"],
                    "--out",
                    out,
                    "--stages",
                    os.path.join(folder, "stages"),
                    "--device",
                    "cpu",
                    "--resume",
                ]
            )
        )
    for path in train.checkpoints(out):
        line = compare(
            dict(
                name=job["name"],
                a=os.path.relpath(path, folder),
                b="SFT",
                split="validation",
                lab=(folder, made, prompts),
            )
        )
        points.append(line | dict(step=int(path[-6:])))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, "optimizer.pt"))  # the run is finished
    with open(os.path.join(out, "metrics.jsonl"), encoding="utf-8") as file:
        return job | dict(
            points=points, curve=[line for line in map(json.loads, file) if "win_rate" in line]
        )


@torch.no_grad()
def compare(job):
    """The line of checkpoint a against b: evaluate.measure's numbers under the panel, and the learned model's p of the same responses."""
    folder, made, prompts = job["lab"]
    a, b = (
        policies.load(made.get(spec) or os.path.join(folder, spec))[0]
        for spec in (job["a"], job["b"])
    )
    task, learned = data.BuiltIn(), preference_model.load(made["learned"])
    numbers, kept = evaluate.measure(a, b, task.judge, task, job["split"], prompts)
    return dict(
        name=job["name"],
        **numbers,
        learned=torch.cat([learned(*responses) for responses in kept]).mean().item(),
    )


@torch.no_grad()
def variance(job):
    """The line of Var p(y > SFT) over SFT's responses y, mean over prompts: 1/2 + Var/tau is the win rate over SFT at large tau."""
    (_, made, count), task = job["lab"], data.BuiltIn()
    prompt = task.prompts("validation", 0, count)
    drawn = sampler.sample(
        policies.load(made["SFT"])[0],
        None,
        prompt,
        (0.0,) * 16,
        data.generator(0, "variance", 0),
        task.max_response,
    )
    parts = [tuple(part[k * count : (k + 1) * count] for part in drawn) for k in range(16)]
    p = torch.stack(
        [torch.stack([task.judge(prompt, y, other) for other in parts[8:]]) for y in parts[:8]]
    )
    one, two = (
        p[:, :4].mean(1),
        p[:, 4:].mean(1),
    )  # two sets of opponents: their covariance has none of the noise of either mean
    return dict(
        name=job["name"],
        variance=((one - one.mean(0)) * (two - two.mean(0))).sum(0).mean().item() / 7,
    )


def gather(lab, work, jobs):
    """The lines of all jobs: those there are, and the rest worked off by the processes, each line appended as it comes."""
    jobs = {job["name"]: job for job in jobs}
    missing = [job for name, job in jobs.items() if name not in lab.lines]
    if missing and lab.from_results:
        raise ValueError(
            f"{lab.path}: {len(missing)} lines are missing, first {missing[0]['name']!r}; leave --from-results out to make them"
        )
    if missing:
        with open(lab.path, "a", encoding="utf-8") as file:
            for future in tqdm(
                concurrent.futures.as_completed([lab.pool.submit(work, job) for job in missing]),
                work.__name__,
                len(missing),
            ):
                line = dict(future.result(), version=lab.version)
                lab.lines[line["name"]] = line
                train.write(file, line)
    return [lab.lines[name] for name in jobs]


def at(run, k=-1):
    """A run's last checkpoint, or its k-th, as compare names it."""
    return f"{run['name']}/checkpoint-{run['points'][k]['step']:06d}"


def against(lab, pairs, split="validation"):
    """Lines of comparisons of pairs (checkpoint, checkpoint or 'SFT')."""
    where = lab.folder, lab.made, lab.test if split == "test" else lab.prompts
    return gather(
        lab,
        compare,
        [dict(name=f"{split}: {a} : {b}", a=a, b=b, split=split, lab=where) for a, b in pairs],
    )


def tune(lab, losses, rival):
    """Each method's best checkpoint against rival on validation prompts, {loss: (win rate, checkpoint's number, run's line, runs
    tried)}. Over GRID, extended while the best tau is at its edge, then beta = 0.25 at the best tau of the mixture methods."""
    cells = {loss: [cell(lab, loss, tau) for tau in GRID[loss][: lab.taus]] for loss in losses}
    for extension in range(lab.extend + 2):
        found = [
            (run, k)
            for run in gather(lab, align, sum(cells.values(), []))
            for k in range(len(run["points"]))
        ]
        lines, best = against(lab, [(at(run, k), rival) for run, k in found]), {}
        for (run, k), line in zip(found, lines, strict=True):
            best[run["loss"]] = max(
                best.get(run["loss"], (0,)), (line["win_rate"], k, run), key=lambda entry: entry[0]
            )
        for loss, (_, _, run) in best.items():
            taus = [one["tau"] for one in cells[loss]]
            if extension < lab.extend and run["tau"] in (min(taus), max(taus)):
                cells[loss].append(
                    cell(lab, loss, run["tau"] / 2 if run["tau"] == min(taus) else run["tau"] * 2)
                )
            elif extension == lab.extend and loss in train.BETA:
                cells[loss].append(cell(lab, loss, run["tau"], beta=0.25))
    return {loss: (*entry, len(cells[loss])) for loss, entry in best.items()}


def choose(lab):
    """Table 2's selection, as tune returns it, and the RL checkpoint that the others were chosen against."""
    chosen = tune(lab, ["rl"], "SFT")
    rival = at(chosen["rl"][2], chosen["rl"][1])
    return tune(lab, [loss for loss in NAMES if loss != "rl"], rival) | chosen, rival


def table2(lab):
    """Prints what was chosen, Table 2 under both judges, and which pairs are separated."""
    chosen, _ = choose(lab)
    seeds = {
        loss: gather(
            lab,
            align,
            [cell(lab, loss, run["tau"], run["beta"], seed) for seed in range(lab.seeds)],
        )
        for loss, (_, _, run, _) in chosen.items()
    }
    specs = {loss: [at(run, chosen[loss][1]) for run in runs] for loss, runs in seeds.items()}
    lines = {
        pair: against(lab, itertools.product(*(specs[loss] for loss in pair)), "test")
        for pair in itertools.combinations(NAMES, 2)
    }
    print(
        "| method | tau | beta | steps | runs tried | validation: against RL (RL: SFT) |\n|---|---|---|---|---|---|"
    )
    for loss in NAMES:
        rate, k, run, tried = chosen[loss]
        print(
            f"| {NAMES[loss]} | {run['tau']:g} | {run['beta']:g} | {run['points'][k]['step']} | {tried} | {rate:.3f} |"
        )
    for judge, title in (("win_rate", "panel"), ("learned", "learned model")):
        print(
            f"\n| {title} | "
            + " | ".join(NAMES.values())
            + " | SFT |\n"
            + "|---" * (len(NAMES) + 2)
            + "|"
        )
        for row in NAMES:
            cells = [
                [line[judge] for line in lines.get((row, column), [])]
                or [1 - line[judge] for line in lines.get((column, row), [])]
                for column in NAMES
            ]
            cells.append(
                [
                    line[judge]
                    for line in against(lab, [(spec, "SFT") for spec in specs[row]], "test")
                ]
            )
            print(
                f"| {NAMES[row]} | "
                + " | ".join(
                    f"{statistics.mean(c):.3f} ({statistics.stdev(c):.3f})" if c else "0.500"
                    for c in cells
                )
                + " |"
            )
    print()
    for pair in lines:
        print(verdict(pair, [line["win_rate"] for line in lines[pair]], lab.seeds))


def verdict(pair, values, seeds):
    """A line: is the mean of seeds x seeds comparisons away from 1/2? They share seeds, so their deviation is no standard error.
    se^2 = (var(row means) + var(column means)) / seeds is, compared with Student's t of 2 (seeds - 1) degrees, 95 %."""
    rows, columns = (
        [statistics.mean(part) for part in parts]
        for parts in (zip(*[iter(values)] * seeds), (values[k::seeds] for k in range(seeds)))
    )
    mean, limit = (
        statistics.mean(values),
        {2: 4.303, 3: 2.776}[seeds]
        * ((statistics.variance(rows) + statistics.variance(columns)) / seeds) ** 0.5,
    )
    what = (
        "not separated"
        if abs(mean - 0.5) <= limit
        else f"{NAMES[pair[0] if mean > 0.5 else pair[1]]} wins"
    )
    return f"{NAMES[pair[0]]} over {NAMES[pair[1]]}: {mean:.3f} +- {limit:.3f} (95 %): {what}"


def sweep(lab, losses, offline=False):
    """The runs of a tau sweep, {loss: [line by rising tau]}."""
    cells = {
        loss: [cell(lab, loss, tau, offline=offline) for tau in sorted(GRID[loss][: lab.taus])]
        for loss in losses
    }
    lines = iter(gather(lab, align, sum(cells.values(), [])))
    return {loss: [next(lines) for _ in cells[loss]] for loss in losses}


def over(lab, key, runs, rival, k=-1):
    """(tau or beta, win rates) of the runs' last checkpoints, or the k-th, against rival."""
    return [run[key] for run in runs], [
        line["win_rate"] for line in against(lab, [(at(run, k), rival) for run in runs])
    ]


def plot(lab, name, panels):
    """results/NAME.png (NAME-smoke.png at that scale), and its numbers on the screen. panels: as evaluate.draw."""
    for title, _, _, series in panels:
        for label, (xs, ys) in series.items():
            print(
                f"{name}, {title}, {label}: "
                + ", ".join(f"{x:.3g}: {y:.3f}" for x, y in zip(xs, ys, strict=True))
            )
    evaluate.draw(
        os.path.join(lab.results, f"{name}{'' if lab.scale == 'full' else '-' + lab.scale}.png"),
        panels,
    )


def fig1(lab):
    series = {
        NAMES[loss]: over(lab, "tau", runs, choose(lab)[1])
        for loss, runs in sweep(lab, ("ipo", "dpo")).items()
    }
    spread = gather(
        lab,
        variance,
        [dict(name=f"variance on {lab.prompts} prompts", lab=(lab.folder, lab.made, lab.prompts))],
    )[0]["variance"]
    series["1/2 + Var/tau (over SFT)"] = (
        series["IPO"][0],
        [min(1.0, 0.5 + spread / tau) for tau in series["IPO"][0]],
    )
    plot(lab, "fig1", [("win rate against RL", "tau", "p (panel)", series)])


def fig2(lab):
    series = {
        f"tau = {run['tau']:g}": tuple(
            [line[key] for line in run["curve"]] for key in ("step", "win_rate")
        )
        for run in sweep(lab, ["ipo"])["ipo"]
    }
    plot(lab, "fig2", [("online IPO against SFT, 100 prompts", "step", "p (panel)", series)])


def fig3(lab, name="fig3", rival="RL"):
    series = {
        f"{NAMES[loss]} {'offline' if offline else 'online'}": over(
            lab, "tau", runs, choose(lab)[1] if rival == "RL" else rival
        )
        for offline in (False, True)
        for loss, runs in sweep(lab, train.OFFLINE, offline).items()
    }
    plot(lab, name, [(f"win rate against {rival}", "tau", "p (panel)", series)])


def fig5(lab):
    chosen, rival = choose(lab)
    runs = gather(
        lab, align, [cell(lab, "ipo_md", chosen["ipo_md"][2]["tau"], beta) for beta in BETAS]
    )
    series = {
        f"step {runs[0]['points'][k]['step']}": over(lab, "beta", runs, rival, k)
        for k in (0, 1, -1)
    }
    plot(
        lab, "fig5", [(f"IPO-MD against RL, tau = {runs[0]['tau']:g}", "beta", "p (panel)", series)]
    )


def same_tau(lab):
    """Win rate and KL over the steps, and how far the policies are from one another, beside two seeds of one method."""
    cells = {
        f"{NAMES[loss]} {beta:g} seed {seed}": cell(
            lab, loss, SAME_TAU, beta if loss in train.BETA else None, seed, steps=lab.long
        )
        for loss, beta in (("ipo", 0.0), ("nash_md", 0.0), ("ipo_md", 0.125), ("nash_md", 0.125))
        for seed in (0, 1)
    }
    runs = dict(zip(cells, gather(lab, align, cells.values()), strict=True))
    steps = [point["step"] for point in next(iter(runs.values()))["points"]]
    panels = [
        (
            title,
            "step",
            y,
            {
                label: (steps, [point[key] for point in run["points"]])
                for label, run in runs.items()
            },
        )
        for title, y, key in (
            ("win rate against SFT", "p (panel)", "win_rate"),
            ("KL to SFT", "nats", "kl"),
        )
    ]
    far = {}
    for one, two in (
        ("IPO 0 seed 0", "Nash-MD-PG 0 seed 0"),
        ("IPO-MD 0.125 seed 0", "Nash-MD-PG 0.125 seed 0"),
        ("IPO 0 seed 0", "IPO 0 seed 1"),
        ("Nash-MD-PG 0 seed 0", "Nash-MD-PG 0 seed 1"),
    ):
        there, back = (
            against(lab, [(at(runs[a], k), at(runs[b], k)) for k in range(len(steps))])
            for a, b in ((one, two), (two, one))
        )
        far[f"{one} / {two}"] = (
            steps,
            [(line["kl"] + other["kl"]) / 2 for line, other in zip(there, back, strict=True)],
        )
    plot(
        lab,
        "same_tau",
        [*panels, ("distance of two policies, (KL + KL back)/2", "step", "nats", far)],
    )


def frontier(lab):
    """Every checkpoint of the online sweeps: win rate against SFT over KL, under both judges."""
    points = {
        NAMES[loss]: [point for run in runs for point in run["points"]]
        for loss, runs in sweep(lab, NAMES).items()
    }
    plot(
        lab,
        "frontier",
        [
            (
                f"win rate against SFT, {title}",
                "KL to SFT (nats)",
                "p",
                {
                    label: tuple([point[key] for point in some] for key in ("kl", judge))
                    for label, some in points.items()
                },
            )
            for judge, title in (("win_rate", "panel"), ("learned", "learned model"))
        ],
    )


EXPERIMENTS = dict(
    table2=table2,
    fig1=fig1,
    fig2=fig2,
    fig3=fig3,
    fig4=lambda lab: fig3(lab, "fig4", "SFT"),
    fig5=fig5,
    fig6=lambda lab: bandit.main(["--out", lab.results]),
    same_tau=same_tau,
    frontier=frontier,
)


def main(argv=None):
    """Runs one experiment or all; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    parser.add_argument(
        "--scale",
        default="full",
        choices=list(SCALES),
        help="(default full: 1 hour 30 min on 2 cores)",
    )
    parser.add_argument(
        "--from-results",
        action="store_true",
        help="draw from the lines that are there; run nothing",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes of one thread each (default 2)"
    )
    parser.add_argument(
        "--results", default="results", help="folder of the lines and pictures (default results)"
    )
    parser.add_argument(
        "--runs",
        default="runs/experiments",
        help="folder of the policies (default runs/experiments)",
    )
    lab = SimpleNamespace(**vars(parser.parse_args(argv)), version=train.version(), made={})
    vars(lab).update(
        SCALES[lab.scale],
        path=os.path.join(lab.results, f"{lab.scale}.jsonl"),
        folder=os.path.join(lab.runs, f"{lab.scale}-{lab.version}"),
    )
    policies.quiet()
    os.makedirs(lab.results, exist_ok=True)
    with open(lab.path, "a+", encoding="utf-8") as file:
        file.seek(0)
        whole = file.read().rpartition("\n")[0]
        file.truncate(len(whole.encode()) + bool(whole))  # a kill may have cut the last line
    lines = map(json.loads, whole.splitlines())
    lab.lines = {
        line["name"]: line for line in lines if lab.from_results or line["version"] == lab.version
    }  # of other versions: made again
    # Two processes of one thread use two cores better than two threads. They start with the first job.
    lab.pool = concurrent.futures.ProcessPoolExecutor(
        lab.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    )
    try:
        lab.made = {} if lab.from_results else prepare(lab)
        os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")  # in those processes
        for name in EXPERIMENTS if lab.experiment == "all" else [lab.experiment]:
            EXPERIMENTS[name](lab)
    except (ValueError, OSError) as error:
        print(f"experiments.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("experiments.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        lab.pool.shutdown(
            cancel_futures=True
        )  # what runs is waited for, what has not begun is dropped
    return 0


if __name__ == "__main__":
    sys.exit(main())
