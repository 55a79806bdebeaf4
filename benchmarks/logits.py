"""What losses on predictions cost with the logits of a language model: in one piece, and chunk by chunk as fastkd does.

`python -m benchmarks.logits [--rows 2048] [--repeats 3] [--out benchmarks]` writes logits.md and logits.json. Memory is the most
that is allocated at a time in a forward and a backward pass, the gradient included, in units of the logits; times are medians of CPU time,
one thread. The system gives and takes tensors of this size page by page, unless the allocator keeps them, as it does on a GPU: times are
measured both ways."""
import fastkd.losses.core as core, json, math, statistics, torch
from argparse import ArgumentParser
from benchmarks import machine
from benchmarks.losses import be_steady, keep_memory, peak_bytes
from fastkd.all import DecoupledKD, Divergence, SoftTarget
from functools import partial
from pathlib import Path
from time import process_time

N_CLASSES = 32768
LOSSES = [SoftTarget(T=4), DecoupledKD(), *map(Divergence, Divergence.kinds)]

def step(loss, given): return torch.autograd.grad(loss(**given), given['pred'])[0]

def way(large, run):
    "`run()` with another limit for what is cut into chunks"
    before, core.LARGE = core.LARGE, large
    try: return run()
    finally: core.LARGE = before

def measure(loss, n, repeats, dtype=torch.float32):
    "Seconds of each step and memory, both ways"
    torch.manual_seed(0)
    given = {key: (3*torch.randn(n, N_CLASSES)).to(dtype) for key in ('pred', 'teacher_pred')}
    if 'target' in core.wanted_inputs(loss): given['target'] = torch.randint(N_CLASSES, (n,))
    size = given['pred'].requires_grad_().nbytes
    arms = dict(whole=partial(way, math.inf, partial(step, loss, given)), chunks=partial(step, loss, given))
    grads = [run().float() for run in arms.values()]
    apart = ((grads[0] - grads[1]).norm()/grads[0].norm()).item()
    assert apart < (1e-2 if dtype == torch.bfloat16 else 1e-4), f'{loss}: the gradients differ by {apart:.2g}'
    del grads
    seconds = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, run in arms.items():
            start = process_time()
            run()
            seconds[arm].append(process_time() - start)
    return dict(seconds=seconds, memory={arm: peak_bytes(run)/size for arm, run in arms.items()}, apart=apart)

def ratio(found):
    whole, chunks = (statistics.median(o) for o in found['seconds'].values())
    return chunks/whole

def row(name, found, kept):
    "A line of the table"
    whole, memory = statistics.median(found['seconds']['whole']), found['memory']
    return f"| {name} | {memory['whole']:.2f} | {memory['chunks']:.2f} | {1000*whole:.0f} | {ratio(found):.2f} | {ratio(kept):.2f} |"

def all_losses(n, repeats):
    found = {repr(loss): measure(loss, n, repeats) for loss in LOSSES}
    return found | {'SoftTarget(T=4), bfloat16': measure(SoftTarget(T=4), n, repeats, torch.bfloat16)}

def told(found):
    "All of it as Markdown"
    repeats = len(next(iter(found['found'].values()))['seconds']['whole'])
    lines = [f"`python -m benchmarks.logits --rows {found['rows']} --repeats {repeats}`, {found['machine']}: {found['rows']} positions, "
        f'{N_CLASSES} classes; memory in units of the logits, their gradient included.', '',
        '| loss | memory in one piece | in chunks | ms in one piece | time, chunks to one piece | time ratio where memory is kept |',
        '|---|---|---|---|---|---|', *[row(name, o, found['kept'][name]) for name, o in found['found'].items()], '',
        f"8192 positions, 1.07 GB of logits, SoftTarget in chunks: {found['largest']:.2f} times the logits."]
    return '\n'.join(lines) + '\n'

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=1024, help='positions')
    parser.add_argument('--repeats', type=int, default=3, help='measurements of each way')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for logits.md and logits.json')
    args = parser.parse_args()
    be_steady(keeps_memory=False)
    found = all_losses(args.rows, args.repeats)
    keep_memory()
    kept = all_losses(args.rows, args.repeats)
    given = {key: torch.randn(8192, N_CLASSES) for key in ('pred', 'teacher_pred')}
    given['pred'].requires_grad_()
    largest = peak_bytes(partial(step, SoftTarget(T=4), given))/given['pred'].nbytes
    results = dict(machine=machine(), rows=args.rows, found=found, kept=kept, largest=largest)
    (args.out/'logits.json').write_text(json.dumps(results, indent=1) + '\n')
    (args.out/'logits.md').write_text(told(results))
    print(told(results))
