"""Do unlabelled images help a student? Fashion-MNIST with 3,000 labels, and the other 57,000 training images without.

`python -m benchmarks.unlabelled --root DIR [--seeds 3] [--ratio 2] [--epochs 40] [--out benchmarks]` reads the four idx files in
DIR/FashionMNIST/raw, and writes unlabelled.json and unlabelled.md: accuracy on the test images of a teacher trained on the labelled
images with augmentation, and of students: alone, distilled on the labelled images, distilled on the unlabelled ones besides, and there
with pseudo labels, too, where the teacher is sure. All students have the same initial weights, labelled batches and number of steps. Each
run is written down as it ends, teachers are kept in DIR/teachers, and a command that was stopped goes on where it was."""
import json, torch
from argparse import ArgumentParser
from benchmarks import machine
from dataclasses import replace
from fastkd.all import CachedTeacher, Confident, HardLabel, KnowledgeDistillationCallback, SoftTarget, Unlabelled
from fastkd.demo import EXPERIMENTS, draw, fashion_mnist, interval, train
from itertools import combinations
from pathlib import Path
from statistics import mean
from torch.utils.data import TensorDataset

ARMS = dict(alone='student alone', distilled='with teacher', unlabelled='with teacher and unlabelled images',
    pseudo='with teacher, unlabelled images and sure pseudo labels')

def parts(data, n_labels, seed):
    "Labelled images, all others of the 60,000, and those for testing"
    images, labels = (torch.cat(o) for o in zip(data['pool'], data['valid']))
    chosen, few_labels = draw((torch.arange(len(labels)), labels), n_labels, seed)
    others = torch.ones(len(labels), dtype=torch.bool)
    others[chosen] = False
    return (images[chosen], few_labels), images[others], data['test']

def cbs_of(arm, teacher, others, experiment, ratio):
    "What is different between the arms"
    if arm == 'alone': return []
    loss = SoftTarget(T=experiment.T)
    if arm == 'pseudo': loss = loss + Confident(HardLabel(), least=.95)
    more = [] if arm == 'distilled' else [Unlabelled(TensorDataset(others), ratio=ratio)]
    return [KnowledgeDistillationCallback(teacher, loss, weight=experiment.weight), *more]

def student(arm, teacher, few, others, test, experiment, seed, ratio):
    "Accuracy and CPU seconds of one student"
    run = train(experiment.student, (few, test), experiment, seed, experiment.student_epochs, experiment.lr, experiment.augment_student,
        curve=False, cbs=cbs_of(arm, teacher, others, experiment, ratio))
    return dict(accuracy=run['accuracy'][-1], seconds=run['seconds'])

def teacher_of(folder, few, test, experiment, seed):
    "The teacher of a seed, trained unless it is on disk, and its accuracy"
    file = folder/f'fashion_mnist_{experiment.teacher_epochs}_{seed}.pth'
    if not file.exists():
        run = train(experiment.teacher, (few, test), experiment, seed, experiment.teacher_epochs, experiment.teacher_lr, True, curve=False)
        folder.mkdir(exist_ok=True, parents=True)
        torch.save(dict(model=run['model'].state_dict(), accuracy=run['accuracy'][-1], seconds=run['seconds']), file)
    saved, model = torch.load(file, weights_only=True), experiment.teacher()
    model.load_state_dict(saved.pop('model'))
    return model, saved

# ---- Telling

def said(differences):
    mean, half = interval(differences)
    return f'{mean:+.2f} ± {half:.2f}' if len(differences) > 2 else f'{mean:+.2f}, of too few seeds for an interval'

def told(found):
    "All of it as Markdown, of the seeds that all arms have"
    settings, arms = found['settings'], {arm: runs for arm, runs in found['runs'].items() if runs}
    seeds = sorted(set.intersection(*map(set, arms.values())))
    values = {arm: [runs[seed]['accuracy'] for seed in seeds] for arm, runs in arms.items()}
    lines = ['# Unlabelled images', '', f"Fashion-MNIST, {settings['n_labels']} labels, {settings['ratio']:g} unlabelled images for each "
        f"labelled one in a batch, {settings['epochs']} epochs of the labelled images, {len(seeds)} seeds. {found['machine']}.", '',
        '| | accuracy, % | CPU seconds |', '|---|--:|--:|']
    lines += [f"| {name} | {mean(values[arm]):.2f} | {mean(arms[arm][seed]['seconds'] for seed in seeds):.0f} |"
        for arm, name in (dict(teacher='teacher') | ARMS).items() if arm in arms]
    lines += ['', '| difference | points |', '|---|--:|']
    for one, other in combinations([arm for arm in ARMS if arm in arms], 2):
        lines.append(f'| {ARMS[other]} – {ARMS[one]} | {said([b - a for a, b in zip(values[one], values[other])])} |')
    return '\n'.join(lines) + '\n'

def main(args):
    torch.set_num_threads(1)
    experiment = EXPERIMENTS['fashion_mnist']
    if args.epochs: experiment = replace(experiment, teacher_epochs=args.epochs, student_epochs=args.epochs)
    data, file = fashion_mnist(args.root), args.out/'unlabelled.json'
    settings = dict(n_labels=10*experiment.n_labels, ratio=args.ratio, epochs=experiment.student_epochs)
    found = json.loads(file.read_text()) if file.exists() else dict(settings=settings, runs={})
    if found['settings'] != settings: raise SystemExit(f"{file} was made with {found['settings']}: choose another --out, or move it away")
    found['machine'] = machine()
    for seed in range(args.seeds):
        few, others, test = parts(data, experiment.n_labels, seed)
        missing = [arm for arm in ARMS if str(seed) not in found['runs'].get(arm, {})]
        if not missing: continue
        teacher, found['runs'].setdefault('teacher', {})[str(seed)] = teacher_of(args.root/'teachers', few, test, experiment, seed)
        for arm in missing:
            run = student(arm, CachedTeacher(teacher), few, others, test, experiment, seed, args.ratio) # it sees each image as it is
            found['runs'].setdefault(arm, {})[str(seed)] = run
            file.write_text(json.dumps(found, indent=1) + '\n')
            (args.out/'unlabelled.md').write_text(told(found))
            print(f"seed {seed}, {ARMS[arm]}: {run['accuracy']:.2f} % in {run['seconds']:.0f} s", flush=True)
    print(told(found))

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--root', type=Path, required=True, help='folder that holds FashionMNIST/raw')
    parser.add_argument('--seeds', type=int, default=3, help='how often all is repeated')
    parser.add_argument('--ratio', type=float, default=2., help='unlabelled images for each labelled one')
    parser.add_argument('--epochs', type=int, help='epochs of teachers and students, by default those of the demo')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for unlabelled.md and unlabelled.json')
    main(parser.parse_args())
