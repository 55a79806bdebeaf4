"""Which loss, and does it help? Fashion-MNIST with few labels and with all, for two students.

`python -m benchmarks.fashion --root DIR [--labels 3000 58000] [--students small tiny] [--seeds 5] [--out benchmarks]` reads the four idx
files in DIR/FashionMNIST/raw, and writes fashion.json and fashion.md. Every set-up has the same images, initial weights and number of
batches. Each has three candidates, and sums get those of their parts. Two seeds of ten epochs and 2,000 images that nobody trains on
choose among them, with the small student and 3,000 labels, and the choice is kept for the rest. Other seeds, and the test images, judge.
Finished runs and teachers are kept in DIR, and a command that was stopped goes on where it was. Some hours on two cores: once settings are
chosen, give each process students or numbers of labels of its own."""
import json, numpy as np, pandas as pd, torch
from argparse import ArgumentParser
from benchmarks import machine
from fastai.basics import Callback, CancelValidException, CrossEntropyLossFlat, Learner
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastkd.all import (Attention, CachedTeacher, compare, DecoupledKD, DIST, FitNet, KnowledgeDistillationCallback, Logits, PKT, RKD,
    Similarity, SoftTarget, VID)
from fastkd.compare import ALONE, Runs, as_arm
from fastkd.demo import EXPERIMENTS, TensorLoader, convnet, draw, fashion_mnist, loaders, train
from fastkd.shared import whole_file
from functools import lru_cache, partial
from pathlib import Path
from torch.utils.data import TensorDataset

EXPERIMENT = EXPERIMENTS['fashion_mnist']
EPOCHS     = {3000: 20, 58_000: 5}
TRIAL_EPOCHS = 10
WIDTHS     = dict(small=9, tiny=4)
TEACHERS   = {3000: (64, 40), 58_000: (32, 10)} # width and epochs
STAGE      = ['2'] # the last convolution, 7×7
LOGITS     = ['5'] # for RKD: angles between the teacher's 12,544 features of a stage would take 800 MB a table

# ---- What is trained on what

@lru_cache
def parts(root, n_labels):
    "Images with labels: to train on, to choose with, and for the test"
    data = fashion_mnist(root)
    images, labels = (torch.cat(o) for o in zip(data['pool'], data['valid']))
    few, _ = draw((torch.arange(len(labels)), labels), 300, 0)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[few] = False
    held_out = rest.nonzero()[:2000, 0]
    rest[few], rest[held_out] = True, False
    chosen = few if n_labels == len(few) else rest.nonzero()[:, 0]
    return (images[chosen], labels[chosen]), (images[held_out], labels[held_out]), data['test']

@lru_cache
def teacher_of(root, n_labels):
    "A teacher for the students of all seeds, trained unless it is on disk; and its test accuracy"
    (width, epochs), (labelled, _, test) = TEACHERS[n_labels], parts(root, n_labels)
    make, file = partial(convnet, width, 28), root/'teachers'/f'fashion_{n_labels}_{width}_{epochs}.pth'
    if not file.exists():
        run = train(make, (labelled, test), EXPERIMENT, 0, epochs, EXPERIMENT.teacher_lr, True, curve=False)
        file.parent.mkdir(exist_ok=True, parents=True)
        with whole_file(file) as part: torch.save(dict(model=run['model'].state_dict(), accuracy=run['accuracy'][-1]), part)
    saved, model = torch.load(file, weights_only=True), make()
    model.load_state_dict(saved['model'])
    return CachedTeacher(model, max_bytes=2**33), saved['accuracy']

def new_learner(root, n_labels, width, loss_func=CrossEntropyLossFlat):
    "A learner with an untrained student; its third loader has the test images"
    labelled, held_out, test = parts(root, n_labels)
    dls = loaders(labelled, held_out, EXPERIMENT, augmented=False)
    dls.loaders.append(TensorLoader(TensorDataset(*test), bs=1000))
    return Learner(dls, convnet(width, 28), loss_func(), metrics=accuracy)

def test_accuracy(learn): return 100*learn.validate(ds_idx=2)[1]

class ValidateLast(Callback):
    "After the last epoch only"
    def before_validate(self):
        if self.epoch < self.n_epoch - 1: raise CancelValidException

def fit(learn, cbs, epochs, lr=EXPERIMENT.lr):
    learn.fit(epochs, lr, wd=.01, cbs=[*cbs, ParamScheduler(dict(lr=combined_cos(.25, lr/25, lr, lr/1e5))), ValidateLast()])

# ---- The set-ups, with three candidates each

def scaled(loss, usual): return [usual*scale*loss for scale in (.1, 1, 10)]
def at(layers, loss, usual): return scaled(loss.on(layers, layers), usual)
at_stage = partial(at, STAGE)

RESPONSE = dict(SoftTarget=[SoftTarget(T=T) for T in (2, 4, 8)], Logits=scaled(Logits(), .3), DecoupledKD=scaled(DecoupledKD(), 1),
    DIST=scaled(DIST(), 1))
STAGED   = dict(FitNet=at_stage(FitNet(), 10), Attention=at_stage(Attention(), 1000), VID=at_stage(VID(), 1), PKT=at_stage(PKT(), 30_000),
    Similarity=at_stage(Similarity(), 3000), RKD=at(LOGITS, RKD(), 1))
ADDED    = ['FitNet', 'Attention', 'RKD'] # to soft targets, with what was chosen for each alone
SMOOTHED = 'label smoothing'

def distil(root, n_labels, loss, weight):
    "The callback of one run"
    return KnowledgeDistillationCallback(teacher_of(root, n_labels)[0], loss, weight=weight)

def candidates(root, n_labels, epochs, width):
    "What is chosen from, by name"
    cbs = partial(partial, distil, root, n_labels)
    def smoothed(eps): return dict(make_learner=partial(new_learner, root, n_labels, width, partial(LabelSmoothingCrossEntropyFlat, eps)))
    plain = [dict(fit=partial(fit, epochs=epochs, lr=lr)) for lr in (.0025, .005, .01)]
    return {ALONE: plain, SMOOTHED: [smoothed(eps) for eps in (.05, .1, .2)],
        **{name: [cbs(loss, EXPERIMENT.weight) for loss in losses] for name, losses in RESPONSE.items()},
        **{name: [cbs(loss, .5) for loss in losses] for name, losses in STAGED.items()}}

def choose(root):
    "Which candidate each name gets, and the accuracy of all: two seeds, few labels, the small student, images that nobody trains on"
    n_labels = min(EPOCHS)
    make, plain = partial(new_learner, root, n_labels, WIDTHS['small']), partial(fit, epochs=TRIAL_EPOCHS)
    listed = candidates(root, n_labels, TRIAL_EPOCHS, WIDTHS['small'])
    found = {name: [as_arm(o, name, make, plain) for o in arms] for name, arms in listed.items()}
    arms = {f'{name} #{i}': arm for name, arms in found.items() for i, arm in enumerate(arms)}
    runs = pd.DataFrame(Runs(root/'runs'/'choice').train_all(arms, [100, 101], progress=False))
    means = runs.groupby('setup')['value'].mean()
    return {name: [100*means[f'{name} #{i}'] for i in range(len(arms))] for name, arms in found.items()}

def setups(root, n_labels, width, chosen):
    "All set-ups, as they were chosen"
    best = {name: int(np.argmax(accuracies)) for name, accuracies in chosen.items()}
    found = {name: arms[best[name]] for name, arms in candidates(root, n_labels, EPOCHS[n_labels], width).items()}
    soft, stage = RESPONSE['SoftTarget'][best['SoftTarget']], {name: STAGED[name][best[name]] for name in ADDED}
    return found | {f'SoftTarget + {name}': partial(distil, root, n_labels, soft + loss, .5) for name, loss in stage.items()}

def compared(root, n_labels, student, chosen, n_seeds):
    "Everything that is known of one student on as many labels"
    make = partial(new_learner, root, n_labels, WIDTHS[student])
    found = compare(make, setups(root, n_labels, WIDTHS[student], chosen), partial(fit, epochs=EPOCHS[n_labels]), n_seeds, test_accuracy,
        root/'runs'/f'{n_labels}_{student}', progress=False)
    table = found.table()
    table['CPU s'] = found.runs.groupby('setup')['cpu'].median() # the first run of a loss has the teacher answer, the others find it
    return dict(labels=n_labels, student=student, parameters=int(table['parameters'].iloc[0]), epochs=EPOCHS[n_labels], seeds=n_seeds,
        teacher=teacher_of(root, n_labels)[1], words=found.words(), table=json.loads(table.to_json(orient='index')),
        values=found.values().to_dict('list'))

# ---- Telling

def told_cell(_, row):
    "Test accuracy, and the difference to the student alone; bold where it is more than noise"
    said = f"{row['test_accuracy']:.2f}"
    if row['difference'] is None: return said
    half = (row['difference high'] - row['difference low'])/2
    difference = f"{row['difference']:+.2f} ± {half:.2f}"
    return f"{said} (**{difference}**)" if row['p (Holm)'] < .05 else f'{said} ({difference})'

def lined(cells): return f"| {' | '.join(cells)} |"

def told(found):
    "All of it as Markdown"
    known = [found['comparisons'][key] for key in sorted(found['comparisons'])]
    names = list(dict.fromkeys(name for o in known for name in o['table']))
    heads = [f"{o['labels']:,} labels, {o['parameters']:,} parameters" for o in known]
    def rows(cell): return [lined([name, *(cell(o, o['table'][name]) for o in known)]) for name in names]
    def table(head, cell): return [lined([head, *heads]), f"|---|{'--:|'*len(known)}", *rows(cell)]
    def about(o):
        width, epochs = TEACHERS[o['labels']]
        n = sum(p.numel() for p in convnet(width, 28).parameters())
        return (f"- {o['labels']:,} labels: {o['epochs']} epochs, {o['seeds']} seeds; a teacher of {o['teacher']:.2f} % and {n:,} "
            f'parameters, trained on the same labels for {epochs} epochs with shifts and flips')
    def cost(o, row): return f"{row['CPU s']:.0f} ({row['CPU s']/o['table'][ALONE]['CPU s']:.2f})"
    larger = max(o['parameters'] for o in known)
    trials = (f'Accuracy on held-out images after {TRIAL_EPOCHS} epochs, mean of two seeds, of the student of {larger:,} parameters with '
        f'{min(EPOCHS):,} labels; the best candidate is that of all columns:')
    same = ('Labels, teacher and settings are the same for all seeds, so the intervals are about initial weights and batches. Teachers and '
        'epochs differ between numbers of labels: compare within a column.')
    lines = ['# Which loss?', '', f"`python -m benchmarks.fashion --root DIR`, {found['machine']}. Fashion-MNIST; test accuracy in "
        "percent, and the difference to the student alone, paired over seeds, with its 95 % interval; bold where Holm's p is below .05.",
        '', *dict.fromkeys(map(about, known)), '', same, '', *table('test accuracy', told_cell), '', '## What it cost', '',
        'The teacher answers from a cache; medians over seeds.', '', *table('CPU seconds (ratio to alone)', cost), '',
        '## What was chosen from', '', trials, '']
    def option(o):
        if not isinstance(o, dict): return f'`{o.args[-2]}`'
        return f"learning rate {o['fit'].keywords['lr']:g}" if 'fit' in o else f"{o['make_learner'].args[-1].args[0]:g}"
    options = {name: map(option, arms) for name, arms in candidates(Path(), min(EPOCHS), TRIAL_EPOCHS, WIDTHS['small']).items()}
    lines += [f"- {name}: " + ', '.join(f'{option} {value:.2f}' for option, value in zip(options[name], values))
        for name, values in found['choice'].items()]
    return '\n'.join(lines) + '\n'

def keep(root, out, key, what):
    "Write a result to a file of its own, since other processes may end at the same time, and the table of all"
    folder = root/'found'
    folder.mkdir(exist_ok=True)
    with whole_file(folder/f'{key}.json') as part: part.write_text(json.dumps(what))
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob('*.json'))}
    found = dict(machine=machine(), choice=found.pop('choice'), comparisons=found)
    with whole_file(out/'fashion.json') as part: part.write_text(json.dumps(found, indent=1) + '\n')
    with whole_file(out/'fashion.md') as part: part.write_text(told(found))

def main(args):
    torch.set_num_threads(1)
    if args.seeds < 2: raise SystemExit('an interval needs at least two seeds')
    choice = choose(args.root)
    keep(args.root, args.out, 'choice', choice)
    for n_labels in args.labels:
        for student in args.students:
            what = compared(args.root, n_labels, student, choice, args.seeds)
            keep(args.root, args.out, f'{n_labels:06d} {student}', what)
            print(f'{n_labels} labels, {student}', *what['words'], sep='\n', flush=True)

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, required=True, help='folder that holds FashionMNIST/raw')
    parser.add_argument('--labels', type=int, nargs='+', choices=EPOCHS, default=list(EPOCHS), help='how many images have labels')
    parser.add_argument('--students', nargs='+', choices=WIDTHS, default=list(WIDTHS), help='which students')
    parser.add_argument('--seeds', type=int, default=5, help='how often all is repeated')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for fashion.md and fashion.json')
    main(parser.parse_args())
