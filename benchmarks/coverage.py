"""Does a 95 % interval hold the truth 95 times in a hundred? Asked of 200 real runs of the demo's student, alone and with a teacher.

`python -m benchmarks.coverage [--n 200] [--out benchmarks]` trains what is not yet in coverage.json, one seed after the other, so that
it goes on where it was stopped; then it writes coverage.md. The 200 runs stand for all runs there could be: comparisons of a few seeds
are drawn from them at random, and what each says is held against the mean of all."""
import json, numpy as np, torch
from argparse import ArgumentParser
from fastkd.demo import EXPERIMENTS, draw, train
from fastkd.shared import whole_file
from fastkd.statistics import paired_interval
from functools import partial
from pathlib import Path
from scipy.stats import t

def trained(path, n):
    "Accuracies of `n` seeds on the demo's test images: same labels, same teacher, other weights, batches and augmentation"
    found = json.loads(path.read_text()) if path.exists() else dict(alone=[], distilled=[])
    experiment = EXPERIMENTS['digits']
    data = experiment.data()
    few = draw(data['pool'], experiment.n_labels, 0)
    run = partial(train, data=(few, data['test']), experiment=experiment, augmented=True, curve=False)
    student = partial(run, experiment.student, epochs=experiment.student_epochs, lr=experiment.lr)
    teacher = None
    for seed in range(len(found['alone']), n):
        if teacher is None: teacher = run(experiment.teacher, seed=0, epochs=experiment.teacher_epochs, lr=experiment.teacher_lr)['model']
        alone, distilled = student(seed=seed), student(seed=seed, teacher=teacher)
        for name, o in dict(alone=alone, distilled=distilled).items(): found[name].append(round(o['accuracy'][-1], 4))
        with whole_file(path) as part: part.write_text(json.dumps(found) + '\n')
    return found

def many(values):
    "`paired_interval` with 0 for many rows at once: means, half widths and p-values"
    n = values.shape[-1]
    mean, error = values.mean(-1), values.std(-1, ddof=1)/n**.5
    varied = error > 1e-9 # where all differences are equal, nothing is known of how much they vary
    p = np.where(varied, 2*t.sf(np.divide(abs(mean), error, out=np.zeros_like(mean), where=varied), n - 1), 1.)
    return mean, np.where(varied | (mean == 0), t.ppf(.975, n - 1)*error, np.inf), p

def simulated(found, sizes=(3, 5, 10, 20), n_times=20_000, n_equal=3):
    "How often, in percent, intervals hold the mean of all runs, and how often equal set-ups are said to differ by noise only"
    alone, distilled = (np.array(found[name]) for name in ('alone', 'distilled'))
    random, rows = np.random.default_rng(0), {}
    for n in sizes:
        chosen = random.integers(len(alone), size=(n_times, n))
        shares = {}
        for name, values in dict(mean=alone, difference=distilled - alone).items():
            mean, half, _ = many(values[chosen])
            if name == 'mean': half = np.where(half < np.inf, half, 0.) # as `mean_interval` says of equal values
            shares[name] = abs(mean - values.mean()) <= half
        p = many(random.choice(alone, (n_equal, n_times, n)) - alone[chosen])[2] # not even of the same seeds
        shares |= {'no difference': p[0] >= .05, 'none in three': n_equal*p.min(0) >= .05} # of Holm's the smallest
        rows[n] = {name: round(100*float(share.mean()), 1) for name, share in shares.items()}
    return rows

def told(found):
    "All of it as Markdown"
    mean, low, high, _ = paired_interval(found['distilled'], found['alone'])
    accuracy = {name: np.mean(values) for name, values in found.items()}
    lines = ['# What 95 % intervals hold', '',
        f"Made by `python -m benchmarks.coverage`: {len(found['alone'])} seeds of the demo's student on "
        f"digits, alone {accuracy['alone']:.2f} % right, distilled {accuracy['distilled']:.2f} % (difference {mean:+.2f}, 95 % "
        f'interval {low:+.2f} to {high:+.2f}). Comparisons of a few seeds are drawn from them 20,000 times. How often, in percent:', '',
        '| seeds | the interval of a mean holds it | the interval of a paired difference holds it | two equal set-ups: within noise '
        '| three set-ups equal to the baseline: all within noise |', '|--:|--:|--:|--:|--:|']
    lines += [f"| {n} | {' | '.join(map(str, row.values()))} |" for n, row in simulated(found).items()]
    return '\n'.join(lines) + '\n'

def main(out, n):
    torch.set_num_threads(1)
    text = told(trained(out/'coverage.json', n))
    (out/'coverage.md').write_text(text)
    print(text)

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--n', type=int, default=200)
    parser.add_argument('--out', type=Path, default='benchmarks')
    args = parser.parse_args()
    main(args.out, args.n)
