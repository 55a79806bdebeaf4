"""Does `report` tell the time that a loop written by hand finds? And do its counts agree with published ones?

`python -m benchmarks.report [--rounds 40] [--out benchmarks]` writes report.md and report.json. Both ways of measuring take turns in
one process with one thread, round by round, so that a busy machine slows both; what counts is the ratio of the medians of all rounds. The
loop is also compared with itself: that ratio says how finely the machine can tell times apart while it does other work."""
import json, statistics, time, torch, torchvision
from argparse import ArgumentParser
from benchmarks import machine
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastkd.report import macs, report
from functools import partial
from pathlib import Path
from torch import nn

# GMACs at 224x224 and millions of parameters, of torchvision's table of models
PUBLISHED = dict(resnet18=(1.814, 11.69), mobilenet_v2=(.300, 3.50))

def by_hand(model, x, n):
    "Milliseconds of a call, the median of `n`, as one would write it without a library"
    taken = []
    with torch.no_grad():
        for i in range(n + 3): # the first three are not counted
            start = time.perf_counter()
            model(x)
            if i >= 3: taken.append(1000*(time.perf_counter() - start))
    return statistics.median(taken)

def reported(learn, teacher, n):
    "What a whole report says of the same"
    table = report(learn, teacher, batch_sizes=learn.dls.valid.bs, n_threads=1, n_runs=n).table
    return next(value for name, value in table['student'].items() if name.startswith('latency p50'))

def contest(model, x, rounds, n=3):
    "Medians of each way; they take turns, now in one order and now in the other"
    data = DataLoader([(o, torch.tensor(0)) for o in x], bs=len(x), num_workers=0)
    learn = Learner(DataLoaders(data, data), model, CrossEntropyLossFlat())
    teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))
    loop = partial(by_hand, model, x, n)
    ways = dict(report=partial(reported, learn, teacher, n), loop=loop, again=loop) # what differs between two loops is the machine
    taken = {name: [] for name in ways}
    for i in range(rounds):
        for name in list(ways)[::1 if i % 2 else -1]: taken[name].append(ways[name]())
    return {name: statistics.median(o) for name, o in taken.items()}

NOTE = 'Where the loop is further than 5 % from itself, the machine was too busy for its row to say anything of `report`.'
HEAD = ['| model | GMACs | published | million parameters | published | batch | ms, report | ms, loop | report to loop | loop to itself |',
    '|---' * 10 + '|']

def row(name, o):
    "A line of the table"
    model, bs = name.split()
    gmacs, millions = PUBLISHED[model]
    return (f"| {model} | {o['gmacs']:.3f} | {gmacs:.3f} | {o['million_parameters']:.2f} | {millions:.2f} | {bs} | {o['report']:.2f} | "
        f"{o['loop']:.2f} | {o['ratio']:.3f} | {o['control']:.3f} |")

def told(results):
    "All of it as Markdown"
    lines = [row(*o) for o in results['found'].items()]
    return '\n'.join(['# What `report` measures', '', f"`{results['command']}`, {results['machine']}.", NOTE, '', *HEAD, *lines, ''])

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=40, help='rounds: a report and two loops of three calls each')
    parser.add_argument('--size', type=int, default=64, help='height and width of the images that are timed')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for report.md and report.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in PUBLISHED:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)().eval()
        counts = macs(model, torch.randn(1, 3, 224, 224))/1e9, sum(p.numel() for p in model.parameters())/1e6
        for bs in (1, 4):
            times = contest(model, torch.randn(bs, 3, args.size, args.size), args.rounds)
            ratio, control = times['report']/times['loop'], times['again']/times['loop']
            found[f'{name} {bs}'] = dict(gmacs=counts[0], million_parameters=counts[1], **times, ratio=ratio, control=control)
            print(row(f'{name} {bs}', found[f'{name} {bs}']), flush=True)
    results = dict(command=f'python -m benchmarks.report --rounds {args.rounds}', machine=machine(), found=found)
    (args.out/'report.json').write_text(json.dumps(results, indent=1) + '\n')
    (args.out/'report.md').write_text(told(results))
    far = [name for name, o in found.items() if abs(o['ratio'] - 1) > .05]
    print(f'further than 5 % from the loop: {", ".join(far) or "none"}')
