"""What processes do together, started by a launcher as `torchrun --nproc_per_node 2 tests/ranks.py FOLDER`.

Each process leaves what it found in FOLDER. Without a launcher, a run is that of one process with batches as large as those of both."""
import os, random, runpy, sys, torch
from collections import OrderedDict
from fastai.basics import SGD, CrossEntropyLossFlat, Learner
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.metrics import accuracy
from fastkd.all import *
from functools import partial
from helpers import At, convnet, digits, loaders, n_hooks, quiet, same, seeded, seed_cpu, weights
from pathlib import Path
from torch import nn
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
RANK, N_RANKS = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('WORLD_SIZE', 1)))

def student():
    "Its samples know nothing of each other"
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(OrderedDict(block2=nn.Conv2d(1, 4, 3, stride=2, padding=1), head=head))

def in_turn(rows, bs):
    "The order in which one process meets the samples that two processes share"
    half = len(rows)//2
    return [row for i in range(0, half, bs) for part in (rows[:half], rows[half:]) for row in part[i:min(i + bs, half)]]

def learner(n=80, bs=10, shuffle=False, make=student, **kwargs):
    "A student on `n` digits; each of two processes takes `bs` of them at a time"
    rows = digits()[:n] if N_RANKS == 2 or shuffle else in_turn(digits()[:n], bs)
    dls = loaders(rows, digits()[1000:1040], bs*2//N_RANKS)
    dls.train.shuffle = shuffle
    return quiet(Learner(dls, seeded(make), CrossEntropyLossFlat(), metrics=accuracy, opt_func=partial(SGD, mom=.9), **kwargs))

def KD(loss, weight=.5, teacher=None, **kwargs):
    layers = [] if isinstance(loss, SoftTarget) else ['block2']
    return KnowledgeDistillationCallback(teacher or seeded(convnet, 16), loss, layers, layers, weight=weight, **kwargs)

def run(kd, *cbs, **kwargs):
    "Train two epochs, each process from a random state of its own"
    learn, teacher, seen = learner(**kwargs), weights(kd.teacher), []
    note = At('after_step', lambda learn: seen.append((type(learn.model).__name__, type(kd._fit.teacher.module).__name__,
        {name: p.detach().clone() for name, p in kd.loss.named_parameters()})), order=99, nth=0) # before what an epoch's end may repair
    seed_cpu(RANK)
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(2, .05, cbs=[kd, note, *cbs])
    assert len(seen) > 0 and n_hooks(learn.model) == n_hooks(kd.teacher) == 0
    told = dict(table=[list(row) for row in learn.recorder.values], recorded=learn.recorder.distillation)
    is_same = same(weights(kd.teacher), teacher)
    return told | dict(student=weights(learn.model), learned={**kd.loss.state_dict()}, steps=seen, is_same_teacher=is_same)

def adapted(): return KD(SoftTarget() + 10*FitNet(), schedule={'weight': cos, 'T': SchedLin(8, 1)})

def error(*teachers, **kwargs):
    "What each process says, each with a teacher of its own"
    learn, kd = learner(), KD(SoftTarget() + FitNet(), teacher=teachers[RANK], **{name: values[RANK] for name, values in kwargs.items()})
    try:
        with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(1, cbs=kd)
    except Exception as e: return dict(kind=type(e).__name__, text=str(e))

def broken():
    "A teacher whose answers are no numbers"
    model = seeded(convnet, 16)
    nn.init.constant_(model.head[3].bias, float('nan'))
    return model

def cut_short():
    "The teacher of the second process answers no numbers in the second batch"
    teacher, seen = seeded(convnet, 16), []
    def spoil(module, args, output):
        seen.append(1)
        if RANK == 1 and len(seen) > 2: return output*float('nan') # after the sample that is sent ahead, and the first batch
    teacher.head[3].register_forward_hook(spoil)
    with (learn := learner()).distrib_ctx(cpu=True, sync_bn=False): learn.fit(1, cbs=KD(SoftTarget(), teacher=teacher))

def saved():
    "How many files each process writes"
    learn, kd = learner(path=Path('saved')), adapted()
    with patch.object(torch, 'save', wraps=torch.save) as save:
        with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(1, cbs=[kd, SaveModelCallback('distillation_loss', fname='best')])
        learn.save('last')
    return dict(n_writes=save.call_count, files=sorted(p.name for p in learn.path.glob('models/*')))

MAIN = runpy.run_path(str(ROOT/'examples'/'distributed.py'))['main'] # the script of the docs; it also puts gloo in the place of CUDA

def example():
    learn, kd = MAIN()
    return dict(student=weights(learn.model), learned={**kd.loss.state_dict()}, table=[list(row) for row in learn.recorder.values],
        files=sorted(str(path) for path in Path().rglob('*.pth')))

def fitnet(): return run(adapted())
def accumulated(): return run(adapted(), GradientAccumulation(40//N_RANKS), GradientClip(.1), bs=5)
def queue(): return run(KD(CRD(dim=8, negatives=12)), n=45, shuffle=True)
def banks(): return run(KD(CRD(dim=8, negatives=6, form='nce')), n=19, shuffle=True)
def adversarial(): return run(KD(AdversarialFeatures()))
def statistics(): return run(KD(SRRL(['head.3'])))
def not_finite(): return error(seeded(convnet, 16), broken())
def setting(): return error(seeded(convnet, 16), seeded(convnet, 16), weight=(.5, 2.))

def scheme(kd, *cbs, make=student, **kwargs):
    "A scheme of who teaches whom, each process from a random state of its own"
    learn, seen = learner(make=make, **kwargs), []
    note = At('after_step', lambda learn: seen.append(weights(learn.model)), order=99, nth=0)
    seed_cpu(RANK)
    with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(2, .05, cbs=[kd, note, *cbs])
    return dict(student=weights(learn.model), table=[list(row) for row in learn.recorder.values], steps=seen)

def two_students(): return Peers([seeded(student), seeded(student, seed=1)])
def mutual(): return scheme(MutualLearning(SoftTarget(T=2)), make=two_students)
def mean_teacher():
    teacher = MeanTeacher(.8)
    return scheme(KnowledgeDistillationCallback(teacher, SoftTarget())) | dict(mean=weights(teacher.model))
def supervised(): return scheme(KnowledgeDistillationCallback(Itself(), DeepSupervision(), ['block2']))
def curriculum(): return scheme(KD(SoftTarget()), Curriculum(seeded(convnet, 16), start=.4))
def unlabelled():
    "And resumed, from one file"
    drawn = []
    def note(learn): drawn.append(learn.unlabelled.loader.get_idxs.left[:8])
    def run(cb, **kwargs): return scheme(KD(SoftTarget()), cb, At('after_batch', note, nth=0), **kwargs)
    first, again = Unlabelled(digits()[100:160]), Unlabelled(digits()[100:160])
    found = run(first)
    again.load_state_dict(dict(n=60, left=[0]*60, random=random.Random(0).getstate()))
    run(again)
    return found | dict(drawn=drawn)

RUNS = {make.__name__: make for make in (fitnet, accumulated, queue, banks, adversarial, statistics, not_finite, setting, saved, example)}
SCHEMES = {make.__name__: make for make in (mutual, mean_teacher, supervised, curriculum, unlabelled)}

if __name__ == '__main__':
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    for name in sys.argv[2:] or RUNS: torch.save((RUNS | SCHEMES | dict(cut_short=cut_short))[name](), f'{name}.{RANK}')
