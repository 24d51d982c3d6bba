"""The main job: align a policy with preferences, online, by any of the methods (arXiv 2403.08635).

data -> supervised policy (= reference = start) -> preference model -> align -> evaluate -> folder.
`align` is App. B's algorithms in one: a method's file says who draws and what a pair costs.
The stages before it do not depend on --seed, nor on --loss but for rl's reward, and are used again.

Run: python train.py --loss ipo_md    (the built-in task, on a CPU, without network)
     python train.py --loss ipo_md --steps 1 --show --out runs/show    (one step in numbers)
     python train.py --loss ipo_md --policy gpt2 --comparisons my.jsonl
     torchrun --nproc-per-node=2 train.py --loss ipo_md    (the same run: job/parallel.py)
A killed run goes on with --resume, bit for bit (job/run.py).
Online or iterated, with a reference that stays or follows: --refresh, --renew-reference, --epochs.
"""

import math
import sys
import time
from functools import partial

import job.run  # before torch: it sets how torch's threads wait

# isort: split

import torch

import data
import evaluate
import policy as policies
import sampler
import side_by_side
from job import judged, parallel, progress, recorded, report, residual, stages, terminal
from job.options import drawn_by, find_method, of_batch, own, parse, precision, requested


def align(run, options, method, task, policy, reference, preference, judge):
    """The algorithm: draw pairs, label them, take a step on their mean loss.

    run:
        the open run (job/run.py): its clock, its metrics.
    options:
        of the run.
    method:
        a method's file, such as ipo_md: PAIR says who draws, loss what a pair costs.
    task:
        where prompts and recorded pairs come from (data.py).
    policy, reference:
        two models with equal weights; the policy is trained in place, the reference never.
    preference:
        what label_pairs asks: preference(prompt, y, y_other) -> p(y > y' | x) or a reward gap, [B].
    judge:
        who evaluates now and then: judge(prompt, y, y_other) -> [B].
    """
    if hasattr(method, "prepare"):  # the method's own weights, trained and saved with the policy
        method.prepare(policy)
    # No weight decay: it would pull the policy to 0, not to pi_ref.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, weight_decay=0.0)
    every = max(10, options.steps // 10)
    mine = parallel.share(options.batch_size)  # this process's rows; alone, all of them
    start = reference  # what evaluations compare with, whatever the loss's reference becomes
    # By default the policy itself draws, and pi_ref is the start; else they are copies that lag.
    drawer, reference, copies = policies.lagging_copies(options, policy, start)
    for step in run.steps(policy, optimizer, copies):  # a clock: it restores, saves and stops
        policies.renew(copies, policy, step, options)
        with precision(options):
            if step % every == 0:
                run.log(step, evaluate.validate(policy, start, judge, task))
            if options.offline:  # eq 10: pairs of the data, which the policy had no part in
                given = step, options.batch_size, start, parallel.share, options.device
                batch = data.recorded_pairs(task, *given, options.seed)
            else:  # eq 11's pairs: y, y' ~ SG[pi], or the mixture (section 5), as PAIR says
                prompt = task.prompts("align", step, options.batch_size).rows(mine)
                prompt = prompt.to(options.device)
                # From seed and step alone: no random state, and all methods see equal uniforms.
                rng = data.generator(options.seed, "sample", step)
                pair = drawn_by(options, method)  # or K, of groups (losses/groups.py)
                uniforms = data.uniforms(rng, task.max_response, len(pair), options.batch_size)
                given = drawer, reference, prompt, options.beta, uniforms[:, :, mine], preference
                responses = own(method, sampler.draw_pairs)(pair, *given)
                label = own(method, label_pairs)(preference, prompt, *responses)
                batch = (prompt, *responses, label)
            # Numbers that a few losses take of the whole batch as it was drawn: see losses/.
            whole = of_batch(options, method, policy, drawer, reference, *batch)
            if options.show and step == 0:
                report.show(options, method, task.tokenizer, policy, reference, *batch, **whole)
            optimizer.param_groups[0]["lr"] = policies.rate_at(step, options)
            given = options, method, policy, reference, optimizer, *batch
            if options.ptx:
                whole["demos"] = partial(stages.demo_loss, options, task, policy, step)
            with run.evidence(step, *batch):  # kept in a file if the loss is not finite
                for _ in range(options.epochs):
                    numbers = update(*given, **whole)
        run.log(step, numbers)
    with precision(options):
        run.log(options.steps, evaluate.validate(policy, start, judge, task))


def update(options, method, policy, reference, optimizer, *batch, demos=None, **whole):
    """One optimiser step on the mean loss of all pairs of all processes, in micro-batches.

    batch:
        prompt, y, y_other, label: Tokens with a row a pair, and [B] what the method's loss takes as
        its preference; of several processes each has its own.
    demos:
        demos() is the supervised loss that --ptx adds, None without it.
    whole:
        [B] each, what the loss takes of the whole batch.

    Returns the step's numbers, means over the pairs (docs/metrics.md). Raises
    FloatingPointError, with the weights as they were, if the loss or the gradient is not finite.
    """
    prompt, *responses, label = batch
    rows = len(label)
    count = sum(parallel.gather(rows))
    size = options.micro_batch_size or rows
    optimizer.zero_grad()
    # Layers are computed again only by a model in train mode; nothing else differs there.
    policy.train(options.gradient_checkpointing)
    loss, log_ratio = 0.0, 0.0
    for begin in range(0, rows, size):
        part = slice(begin, begin + size)
        tokens = [both.rows(part) for both in (prompt, *responses)]
        asked = requested(method, policy, reference, *tokens)  # lengths, for a few losses
        asked |= {name: values[part] for name, values in whole.items()}
        given = options, method, policy, reference, *tokens, label[part]
        value, ratio = own(method, pair_losses)(*given, **asked)
        # The global count: a mean of means over uneven parts would weight them wrongly.
        (value.sum() / count).backward()
        # Detached: a number to log must not keep its part's graph alive.
        loss += value.detach().sum().item() / count
        log_ratio += ratio.detach().sum().item() / count
    if demos:  # PPO-ptx's term, for any loss
        (options.ptx * demos()).backward()
    policy.eval()
    parallel.add_gradients(policy.parameters())
    means = report.means(rows / count, label, responses)
    numbers = parallel.total(dict(log_ratio=log_ratio, **means, loss=loss))
    loss = numbers.pop("loss")
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), math.inf).item()  # not clipped
    if not (math.isfinite(loss) and math.isfinite(norm)):  # before the weights take it in
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: lower --lr or raise --tau")
    optimizer.step()
    return dict(loss=loss, grad_norm=norm, **numbers)


def pair_losses(options, method, policy, reference, prompt, y, y_other, label, **asked):
    """The method's loss of every pair, and log pi(y)/pi_ref(y), nats: [B] each, unreduced."""
    sides = (y, y_other)[: method.LEARNS_FROM]  # an opponent may be not learned from
    log_prob = policies.scoring(options)  # sums over tokens, unless --length-average
    of_policy = partial(score, log_prob, policy, prompt, sides)
    # pi_ref is a constant of the loss: no gradient.
    of_reference = torch.no_grad()(partial(score, log_prob, reference, prompt, sides))
    logp, ref_logp = side_by_side.run([of_policy, of_reference], options.device)
    # For IPO eq 10 and 11, written out in ipo.py:loss.
    value = method.loss(*logp, *ref_logp, label, options.tau, **options.set, **asked)
    return value, logp[0] - ref_logp[0]


def score(log_prob, model, prompt, sides):
    """[log pi(y), log pi(y')] of the sides learned from, [B] each; None for one that is not."""
    logp = [log_prob(model, prompt, side) for side in sides]
    return logp if len(logp) == 2 else [*logp, None]


@torch.no_grad()  # a label is a number: no gradient flows through it
def label_pairs(preference, prompt, y, y_other):
    return preference(prompt, y, y_other)


def run_job(options):
    """All stages of the main job. Returns the summary."""
    begun = time.time()
    task, start, data_hash = data.open_task(options)
    recorded.choose_sizes(options, task, pretrained=start is not None)
    look = partial(job.run.existing_run, options, data_hash)
    config, summary = parallel.from_first(look)
    if summary:
        print(f"this run is finished; its result in {options.out}:")
        return summary
    method = find_method(options.loss)
    report.print_method(options, method)
    asked = judged.asked_file(options, task.tokenizer)
    progress.begin(progress.plan(options, method, task, asked))
    stages.reused(options, method, task, start)  # a model that does not fit is refused here
    with job.run.Run(options, config, task.tokenizer) as run:
        reference, path = stages.supervised(options, task, start, data_hash)
        reference.requires_grad_(False)  # frozen for good; the policy is another copy
        preference, judge, folders, worth = stages.labels_and_judge(
            options, method, task, reference, path, asked
        )
        policy = policies.load(path)[0].to(options.device)
        if options.gradient_checkpointing:
            policies.recompute_layers(policy)
        run.begins_from(reference=path, **folders)
        align(run, options, method, task, policy, reference, preference, judge)
        count = options.eval_prompts
        numbers, kept = evaluate.measure(policy, reference, judge, task, "test", count)
        numbers = worth | numbers  # what the judge is worth stands before what it says
        numbers |= residual.measure(options, policy, reference, preference, task)
        seconds = time.time() - begun
        write = partial(report.write_results, options, task, policy, numbers, kept, judge, seconds)
        return parallel.from_first(write)


def main(argv=None):
    """Runs the job.

    Returns the exit status: 0, 1 if another process of the run ended, 2 after an error, 130 and 143
    after Ctrl-C and SIGTERM.
    """
    policies.quiet()
    with parallel.joined() as say, terminal.shown():
        try:
            with job.run.signals(job.run.stop):
                options = parse(argv)
                if options.table1:
                    report.print_table1()
                else:
                    report.print_summary(options, run_job(options))
            return 0
        except report.EXPECTED as error:
            status, line = report.ending(error)
            say(f"train.py: {line}")
            return status


if __name__ == "__main__":
    sys.exit(main())
