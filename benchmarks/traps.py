"""Known traps, each with runs that fell into it. Fashion-MNIST, 3,000 labels, the small student of benchmarks.fashion.

`python -m benchmarks.traps --root DIR [--seeds 5] [--out benchmarks]` writes traps.json and traps.md. Set-ups have the same initial
weights and number of batches. Finished runs are kept in DIR, and a command that was stopped goes on where it was."""
import copy, json, torch
from argparse import ArgumentParser
from benchmarks import machine
from fastai.basics import SGD
from fastkd.all import Frozen, KnowledgeDistillationCallback, SoftTarget, StoredTeacher, Teacher, compare
from fastkd.compare import ALONE
from fastkd.demo import loaders
from fastkd.statistics import holm, paired_interval
from functools import lru_cache, partial
from pathlib import Path
from torch import nn
from .fashion import EXPERIMENT, WIDTHS, fit, lined, new_learner, parts, teacher_of, test_accuracy

N_LABELS,T,EPOCHS = 3000, 4, 20
TWICE = 'alone, a softmax too many'
AUGMENTED = 'alone, augmented'
BY_SGD, TWICE_BY_SGD = (f'{name}, SGD' for name in (ALONE, TWICE))
PAIRS = [ # What to compare: the trap, and what to do instead
    (TWICE, ALONE, 'the model ends in a softmax, and cross entropy takes another one'),
    (TWICE_BY_SGD, BY_SGD, 'the same with SGD and a learning rate of .1: steps are as small as gradients'),
    ('distilled, a softmax too many', TWICE, 'what a teacher seems to bring to such a student'),
    ('distilled, a softmax too many', ALONE, 'what is left of it beside a student with logits'),
    ('distilled', ALONE, 'no trap: what a teacher brings'),
    ('without T²', 'distilled', f'the softened part counts T² = {T*T} times less'),
    ('teacher in train mode', 'distilled', 'dropout and statistics of the batch in what it says'),
    ('augmented', AUGMENTED, 'no trap: both see the changed image'),
    ('augmented, teacher sees the plain image', 'augmented', 'it answers for another image'),
    ('augmented, teacher sees the plain image', AUGMENTED, 'what is left of what it brings')]

class InTrainMode(Teacher):
    "What a script does that forgets `teacher.eval()`"
    def __init__(self, module): self.module = copy.deepcopy(module).train()
    def outputs(self, xb, layers=(), pred=True):
        with torch.no_grad(): return self.module(*xb), {}

def with_softmax(root):
    "The student of the tutorials that end a model in a softmax"
    learn = new_learner(root, N_LABELS, WIDTHS['small'])
    learn.model = nn.Sequential(*learn.model, nn.Softmax(1))
    return learn

def by_sgd(make):
    "Another optimizer"
    learn = make()
    learn.opt_func = partial(SGD, mom=.9)
    return learn

def augmented(root):
    "A learner whose images are shifted and mirrored at random"
    learn = new_learner(root, N_LABELS, WIDTHS['small'])
    changed = loaders(*parts(root, N_LABELS)[:2], EXPERIMENT, augmented=True)
    learn.dls.loaders[0] = changed.train
    return learn

@lru_cache
def answers(root):
    "The teacher's answers to the plain images, in their order"
    with torch.no_grad(): return torch.cat([model_of(root)(x) for x in parts(root, N_LABELS)[0][0].split(500)])

def model_of(root): return teacher_of(root, N_LABELS)[0].teacher.module.eval()

def distil(root, kind, factor=1):
    "The callback of one run"
    teacher = dict(cached=lambda: teacher_of(root, N_LABELS)[0], live=lambda: Frozen(model_of(root)),
        train=lambda: InTrainMode(model_of(root)), plain=lambda: StoredTeacher(answers(root)))[kind]()
    return KnowledgeDistillationCallback(teacher, factor*SoftTarget(T=T), weight=EXPERIMENT.weight)

def setups(root):
    "Every set-up beside the student alone"
    twice, changed = (dict(make_learner=partial(make, root)) for make in (with_softmax, augmented))
    cbs = partial(partial, distil, root)
    logits = partial(new_learner, root, N_LABELS, WIDTHS['small'])
    sgd = {name: dict(make_learner=partial(by_sgd, make), fit=partial(fit, epochs=EPOCHS, lr=.1))
        for name, make in ((BY_SGD, logits), (TWICE_BY_SGD, partial(with_softmax, root)))}
    return sgd | {'distilled': cbs('cached'), TWICE: twice, 'distilled, a softmax too many': dict(twice, cbs=cbs('cached')),
        'without T²': cbs('cached', 1/T**2), 'teacher in train mode': cbs('train'), AUGMENTED: changed,
        'augmented': dict(changed, cbs=cbs('live')), 'augmented, teacher sees the plain image': dict(changed, cbs=cbs('plain'))}

def told(found):
    "All of it as Markdown"
    table = found['table']
    lines = ['# Known traps', '', f"`python -m benchmarks.traps --root DIR`, {found['machine']}. Fashion-MNIST, {N_LABELS:,} labels, "
        f"{EPOCHS} epochs, {found['seeds']} seeds, T={T}, weight {EXPERIMENT.weight}; a teacher of {found['teacher']:.2f} %, trained on "
        'the same labels with shifts and flips. Labels and teacher are the same for all seeds. Test accuracy in percent, with 95 % '
        'intervals.', '', lined(['set-up', 'accuracy', 'CPU seconds'])]
    lines.append('|---|--:|--:|')
    lines += [lined([name, f"{o['test_accuracy']:.2f} ± {(o['high'] - o['low'])/2:.2f}", f"{o['CPU s']:.0f}"]) for name, o in table.items()]
    lines += ['', lined(['set-up', 'beside', 'difference', "Holm's p", 'what happens']), '|---|---|--:|--:|---|']
    corrected = holm([found['pairs'][f'{one}/{other}'][3] for one, other, _ in PAIRS])
    lines += [lined([one, other, '{:+.2f} ({:+.2f} to {:+.2f})'.format(*found['pairs'][f'{one}/{other}'][:3]), f'{p:.3f}', why])
        for (one, other, why), p in zip(PAIRS, corrected)]
    return '\n'.join(lines) + '\n'

def main(args):
    torch.set_num_threads(1)
    comparison = compare(partial(new_learner, args.root, N_LABELS, WIDTHS['small']), setups(args.root), partial(fit, epochs=EPOCHS),
        args.seeds, test_accuracy, args.root/'runs'/'traps')
    values = comparison.values()
    found = dict(machine=machine(), seeds=args.seeds, teacher=teacher_of(args.root, N_LABELS)[1],
        values=values.to_dict('list'), table=json.loads(comparison.table().to_json(orient='index')),
        pairs={f'{one}/{other}': paired_interval(values[one].to_numpy(), values[other].to_numpy()) for one, other, _ in PAIRS})
    (args.out/'traps.json').write_text(json.dumps(found, indent=1) + '\n')
    (args.out/'traps.md').write_text(told(found))
    print(told(found))

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, required=True, help='folder that holds FashionMNIST/raw')
    parser.add_argument('--seeds', type=int, default=5, help='how often all is repeated')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for traps.md and traps.json')
    main(parser.parse_args())
