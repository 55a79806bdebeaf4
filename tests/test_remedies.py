"Each remedy that a message prints is taken from the message, run, and helps; a message with a line of code and no test is found."
import ast, copy, fastai.basics, fastai.callback.schedule, fastai.vision.learner, fastkd.all, math, numpy as np, pytest, re, struct, torch
import warnings
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, Datasets, Learner, accuracy
from fastai.callback.schedule import SchedCos, SchedLin, sched_lin
from fastai.torch_core import TensorMask
from fastkd import demo
from fastkd.all import *
from fastkd.shared import needed
from functools import partial
from helpers import convnet, digits, image, learner, loaders, named_learner, quiet, seeded, started, trained_teacher as teacher, weights
from pathlib import Path
from torch import nn
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KD = KnowledgeDistillationCallback
NAMES = vars(fastai.basics) | vars(fastai.callback.schedule) | vars(fastkd.all)

class Case(NamedTuple):
    said: str # What the message is known by, as it stands in the source
    wrong: object # `wrong(folder)` is what a user did
    code: str # Pattern of the remedy in the message
    right: object # `right(code, folder)` does what the remedy says, and asserts more where it can

CASES = []
def case(*args, slow=False): CASES.append(pytest.param(Case(*args), marks=[pytest.mark.slow]*slow))

def run(code, *filled, **names):
    "What a printed expression is, with its `…` filled in and names for what the reader has"
    for text in filled: code = code.replace('…', text, 1)
    return eval(code, NAMES | globals() | names)

def told(act, *args):
    "What is warned of, and the error that ends it"
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        try: act(*args)
        except Exception as e: error = f'{type(e).__name__}: {e}'
        else: error = ''
    return '\n'.join(str(o.message) for o in heard), error

@pytest.mark.parametrize('case', CASES, ids=lambda case: re.sub(r'\W+', '_', f'{case.said[:40]} {case.code[:20]}'))
def test_remedy(case, tmp_path):
    "Without it the message comes; with it no error, and the message no more"
    (tmp_path/'wrong').mkdir()
    (tmp_path/'right').mkdir()
    said = '\n'.join(told(case.wrong, tmp_path/'wrong'))
    assert case.said in said
    code = re.search(case.code, said)
    assert code, said
    warned, error = told(case.right, code[0], tmp_path/'right')
    assert error == '' and case.said not in warned

# ---- What a reader has

def student(): return learner(n=50)
def fit(*cbs, learn=None):
    learn = learn or student()
    started(learn).fit(1, 1e-2, cbs=[*cbs])
    assert all(o.isfinite().all() for o in weights(learn.model).values() if o.is_floating_point())
    return learn

def softmaxed(last=nn.Softmax(1)): return nn.Sequential(teacher(), last)
def flat(n_out=10, n_in=64): return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(n_in, n_out)))

def several_labels():
    "Students of 4 labels that do not exclude one another"
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(6, generator=g), (torch.rand(4, generator=g) < .4).float()) for _ in range(40)]
    return quiet(Learner(loaders(pairs, pairs[:20], 20), flat(4, 6), BCEWithLogitsLossFlat()))

def exported(**kwargs):
    "A learner with callbacks, as it comes out of a file"
    learn = student()
    learn.add_cbs(kwargs.pop('cbs'))
    return copy.deepcopy(learn)

# ---- advice

FACTOR, ONE_FACTOR = r'(?<=: loss=).+', SoftTarget(T=4) + Attention().on('block1', 'block1')
case(': loss=', lambda _: fit(KD(teacher(), SoftTarget(T=4) + .01*Attention().on('block1', 'block1'))), FACTOR,
    lambda code, _: fit(KD(teacher(), run(code))))
case('so the labels hardly count', lambda _: fit(KD(teacher(), SoftTarget(T=4) + 1e6*Attention().on('block1', 'block1'))), FACTOR,
    lambda code, _: fit(KD(teacher(), run(code))))
for found in (r'BinaryKD\(T=2\)', r'Logits\(\)'):
    case('and the labels of a sample do not sum to 1', lambda _: fit(KD(flat(4, 6), SoftTarget), learn=several_labels()), found,
        lambda code, _: fit(KD(flat(4, 6), run(code)), learn=several_labels()))
case('say so, KnowledgeDistillationCallback(…, returns=', lambda _: fit(KD(softmaxed(), SoftTarget)), r'KnowledgeDist.*$',
    lambda code, _: fit(run(code, 'softmaxed(), SoftTarget')))
case("leave out the model's last ", lambda _: fit(KD(teacher(), SoftTarget), learn=learner(softmaxed())), r'KnowledgeDist.*$',
    lambda code, _: fit(run(code, 'teacher(), SoftTarget'), learn=learner(softmaxed())))
case('partial(probs_to_logits, binary=True)', lambda _: fit(KD(flat(4, 6), BinaryKD), learn=several_ends_in_sigmoids()),
    r'KnowledgeDist.*$', lambda code, _: fit(run(code, 'flat(4, 6), BinaryKD'), learn=several_ends_in_sigmoids()))
case('ProbabilityTeacher(teacher, binary=True)',
    lambda _: fit(KD([nn.Sequential(flat(20, 6), nn.Sigmoid())], BinaryKD), learn=many_labels()), r'(?<=put )Prob.*(?= in its place)',
    lambda code, _: fit(KD(Ensemble([run(code, teacher=nn.Sequential(flat(20, 6), nn.Sigmoid()))]), BinaryKD), learn=many_labels()))

def root(x): return (x - x.detach()).pow(2).sum()
case('so add a small number first', lambda _: fit(KD(teacher(), lambda pred, teacher_pred: root(pred).sqrt())), r'\(x.*\)',
    lambda code, _: fit(KD(teacher(), lambda pred, teacher_pred: run(code, x=root(pred)))))

def several_ends_in_sigmoids():
    learn = several_labels()
    learn.model = nn.Sequential(flat(4, 6), nn.Sigmoid())
    return learn

def many_labels():
    pairs = [(torch.randn(6), (torch.rand(20) < .4).float()) for _ in range(40)]
    return quiet(Learner(loaders(pairs, pairs[:20], 20), flat(20, 6), BCEWithLogitsLossFlat()))

# ---- probabilities

case('Say that each has a sigmoid of its own',
    lambda _: fit(KD(nn.Sequential(flat(4, 6), nn.Sigmoid()), BinaryKD, returns='probabilities'), learn=several_labels()), r"returns='\w+'",
    lambda code, _: fit(run(f'KD(teacher, BinaryKD, {code})', teacher=nn.Sequential(flat(4, 6), nn.Sigmoid())), learn=several_labels()))
case('Say that each has a sigmoid of its own',
    lambda _: ProbabilityTeacher(nn.Sequential(flat(4), nn.Sigmoid())).outputs((torch.randn(3, 64),)), r'ProbabilityTeacher\(teacher, .*\)',
    lambda code, _: run(code, teacher=nn.Sequential(flat(4), nn.Sigmoid())).outputs((torch.randn(3, 64),)))
case('wrap those of its teachers that return probabilities', lambda _: ProbabilityTeacher(Ensemble([flat(), softmaxed()])), r'\[first.*\]',
    lambda code, _: fit(KD(run(code, first=teacher(), second=softmaxed()), SoftTarget)))

# ---- callback

case('KnowledgeDistillationCallback(teacher, loss)', lambda _: KD('teacher.pkl', SoftTarget),
    r'KnowledgeDistillationCallback\(teacher, loss\)', lambda code, _: fit(run(code, teacher=teacher(), loss=SoftTarget)))
case('a temperature belongs to the loss', lambda _: KD(teacher(), SoftTarget, T=4), r'SoftTarget\(T=4\)',
    lambda code, _: fit(KD(teacher(), run(code))))
case('layers are named for each side', lambda _: KD(teacher(), FitNet, layers=['block1']), r'activations_student.*\]',
    lambda code, _: fit(run(f'KD(teacher(), FitNet, {code})', "'block1'", "'block1'")))
case('. If that is a temperature: schedule=', lambda _: fit(KD(teacher(), SoftTarget, schedule=SchedLin(8, 1))), r'schedule=\{.*?\}',
    lambda code, _: fit(run(f'KD(teacher(), SoftTarget, {code})')))
case('or give task_weight=1, say', lambda _: fit(KD(teacher(), SoftTarget, weight=4)), 'task_weight=1',
    lambda code, _: fit(run(f'KD(teacher(), SoftTarget, weight=4, {code})')))
case("pass activations_student=['…']", lambda _: fit(KD(teacher(), FitNet())), r"activations_student.*'\]",
    lambda code, _: fit(run(f'KD(teacher(), FitNet(), {code.replace(" and ", ", ")})', 'block1', 'block1')))
case('`match_feature_layers(student, teacher, x)` suggests pairs', lambda _: fit(KD(teacher(), FitNet())), r'match_feature.*?\)',
    lambda code, _: fit(KD(teacher(), FitNet(), *pairs(run(code, student=convnet(4), teacher=teacher(), x=torch.randn(2, 1, 8, 8))))))
def pairs(found): return found['student'], found['teacher']

case('has settings of its own', lambda _: fit(KD(CachedTeacher(teacher()), SoftTarget, teacher_dtype=torch.bfloat16)),
    r'(?<=as in )CachedTeacher\(.*\)', lambda code, _: fit(KD(run(code, 'logits', 'None', 'torch.bfloat16', model=teacher()), SoftTarget)))
case('A pair of functions is one for each', lambda _: fit(KD(softmaxed(), SoftTarget, logits=lambda output: output.log())),
    r'logits=\(.*\)',
    lambda code, _: fit(run(f'KD(softmaxed(), SoftTarget, {code})', of_student=logits, of_teacher=lambda output: output.log())))
case('pass a copy, `copy.deepcopy(model)`', lambda _: fit(KD((learn := student()).model, SoftTarget), learn=learn), r'copy\.deep.*?\)',
    lambda code, _: fit(KD(run(code, model=(learn := student()).model), Logits), learn=learn))
case('`teacher_input` can make another input', lambda _: fit(KD(flat(n_in=256), SoftTarget)), 'teacher_input',
    lambda code, _: fit(run(f'KD(flat(n_in=256), SoftTarget, {code}=double)')))
def double(x): return nn.functional.interpolate(x, scale_factor=2)
for found in (r'learn\.knowledge_distillation\.teacher = teacher', r'learn\.remove_cb\(\w+\)'):
    case('`learn.knowledge_distillation.teacher = teacher`, or train without', lambda _: fit(learn=exported(cbs=KD(teacher(), SoftTarget))),
        found, lambda code, _: done(code, exported(cbs=KD(teacher(), SoftTarget)), teacher=teacher()))
def done(code, learn, **names):
    "Run a statement about a learner, and train it"
    exec(code, NAMES | names | dict(learn=learn))
    return fit(learn=learn)

def twice():
    learn, cb = student(), KD(teacher(), SoftTarget(T=4))
    for _ in range(2): learn.add_cb(KD(cb.teacher, SoftTarget(T=4)))
    return learn
case('and counts as often: give it to fit once', lambda _: fit(learn=twice()), r'learn\.remove_cb\(\w+\)',
    lambda code, _: done(code, twice()))
case('mask(*xb) returns a bool tensor', lambda _: fit(KD(teacher(), SoftTarget, mask=lambda x: 'all')), r'\(bs, \.\.\.\)',
    lambda code, _: fit(KD(teacher(), SoftTarget, mask=lambda x: torch.ones(len(x), dtype=torch.bool))))
case(' returns the tensor of predictions, not a ', lambda _: fit(KD(teacher(), SoftTarget, logits=(lambda o: [o], logits))), 'tensor',
    lambda code, _: fit(KD(teacher(), SoftTarget, logits=(lambda o: [o][0], logits))))

# ---- modules, learners, teachers

class Pair(nn.Module):
    "A model that hides its prediction"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x): return {'y': self.model(x)}.items()

case('pass `logits=lambda output: ...`', lambda _: fit(KD(Pair(teacher()), SoftTarget)), r'logits=lambda output: \.\.\.',
    lambda code, _: fit(KD(Pair(teacher()), SoftTarget, logits=(logits, run(code[7:].replace('...', '[*output][0][1]'))))))
case(' by get_model_layers(', lambda _: fit(KD(teacher(), FitNet(), 'block1', 'qqqq')), r'get_model_layers\(teacher\)',
    lambda code, _: fit(KD(teacher(), FitNet(), 'block1', run(code, teacher=teacher())[0])))
case('inputs come without labels, as in `dls.one_batch()[0]`',
    lambda _: match_feature_layers(convnet(4), teacher(), student().dls.one_batch()), r'dls\.one_batch\(\)\[0\]',
    lambda code, _: match_feature_layers(convnet(4), teacher(), run(code, dls=student().dls)))

class Mute(Teacher): "Without an answer"
class Speaks(Teacher):
    def outputs(self, xb, layers=(), pred=True): return torch.zeros(len(xb[0]), 10), {}
case('has no `outputs(xb, layers, pred=True)`', lambda _: fit(KD(Mute(), SoftTarget)), r'outputs\(xb, layers, pred=True\)',
    lambda code, _: fit(KD(Speaks(), SoftTarget)))

# ---- caches and stored answers

class Unknown(Speaks): "Nothing tells what its answers depend on"
class Told(Unknown):
    def settings(self): return 'zeros', 10
class Shown(Unknown):
    def modules(self): return [nn.Linear(2, 2)]
for found, cls in (('`settings`', Told), ('`modules`', Shown)):
    case('Give the class `settings`', lambda folder: fit(KD(CachedTeacher(Unknown(), folder), SoftTarget)), found,
        lambda code, folder, cls=cls: fit(KD(CachedTeacher(cls(), folder), SoftTarget)))

def asked(cached, seed=0, n=20):
    cached.outputs((torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),))
    cached.flush()
    return cached
def kept(folder, *models):
    for model in models or [teacher()]: asked(CachedTeacher(model, folder))
    return folder
FROM_FOLDER = r'CachedTeacher\(teacher, path\)'

case('there is no folder ', lambda folder: CachedTeacher(None, folder/'none'), FROM_FOLDER,
    lambda code, folder: asked(run(code, teacher=teacher(), path=folder/'none')))
case('without a teacher a cache reads from a folder', lambda _: CachedTeacher(None), r'CachedTeacher\(None, path\)',
    lambda code, folder: asked(run(code, path=kept(folder))))
case('holds answers of several teachers', lambda folder: asked(CachedTeacher(None, kept(folder, teacher(), convnet(4)))), FROM_FOLDER,
    lambda code, folder: asked(run(code, teacher=teacher(), path=kept(folder, teacher(), convnet(4)))))
case('Random augmentation makes new ones', lambda folder: asked(CachedTeacher(None, kept(folder)), seed=1), FROM_FOLDER,
    lambda code, folder: asked(run(code, teacher=teacher(), path=kept(folder)), seed=1))
case("' is needed: give the teacher, CachedTeacher(", lambda folder: CachedTeacher(None, kept(folder)).teacher_module('block1'),
    FROM_FOLDER, lambda code, folder: run(code, teacher=teacher(), path=kept(folder)).teacher_module('block1'))

def files(folder): return sorted(o.name for o in folder.glob('*.safetensors'))
def many(folder):
    for seed in range(3): asked(CachedTeacher(teacher(), folder), seed)
    return folder
def written(folder, **kwargs):
    before = files(many(folder))
    asked(CachedTeacher(teacher(), folder, **kwargs), 3)
    assert {*before} < {*files(folder)}, 'what was there has to stay'
case('To keep them: max_bytes=', lambda folder: written(folder, max_bytes=100), r'(?<=To keep them: )max_bytes=\d+',
    lambda code, folder: run(f'written(folder, {code})', folder=folder))
for found, use in (('`fit`', lambda learn: fit(KD(CachedTeacher(learn), SoftTarget))),
    ('its model', lambda learn: asked(CachedTeacher(learn.model)))):
    case('a Learner is matched to its student in `fit`', lambda _: asked(CachedTeacher(learner(teacher()))), found,
        lambda code, _, use=use: use(learner(teacher())))

def wrongly_sized(folder): return fit(KD(StoredTeacher(torch.zeros(49, 10)), SoftTarget))
case('store one for each, in the order of dls.train_ds', wrongly_sized, r'dls\.train_ds',
    lambda code, _: fit(KD(StoredTeacher(torch.stack([torch.eye(10)[y] for x, y in run(code, dls=student().dls)])), SoftTarget)))

# ---- ensembles, the student itself

case("weights='confidence' needs a class for each position",
    lambda _: fit(KD(Ensemble([flat(4, 6), flat(4, 6)], weights='confidence'), BinaryKD), learn=several_labels()), 'as integers',
    lambda code, _: fit(KD(Ensemble([teacher(), flat()], weights='confidence'), SoftTarget)))
case('come in a list: Ensemble([first, second])', lambda _: Ensemble(softmaxed()), r'Ensemble\(\[first, second\]\)',
    lambda code, _: fit(KD(run(code, first=teacher(), second=flat()), SoftTarget)))
case("as in '0.fc'", lambda _: Ensemble([teacher(), flat()]).teacher_module('head'), "0.fc",
    lambda code, _: Ensemble([teacher(), flat()]).teacher_module(code.replace('fc', 'head')))
case('(write ', lambda _: Ensemble([Speaks]), r'(?<=write )Speaks\(\)',
    lambda code, _: Ensemble([run(code)]).outputs((torch.zeros(2, 3),)))
case('take DeepSupervision(), or pairs', lambda _: fit(KD(Itself(), FitNet(), 'block1', 'block1')), r'DeepSupervision\(\)',
    lambda code, _: fit(KD(Itself(), run(code).on('block1'))))
case('MeanTeacher() takes no model', lambda _: MeanTeacher(teacher()), r'MeanTeacher\(\)', lambda code, _: fit(KD(run(code), Logits)))

case('dls = two_views(dls)', lambda _: fit(KD(OtherView(), Logits), learn=learner(n=48, bs=24)), r'two_views\(dls\)',
    lambda code, _: fit(KD(OtherView(), Logits), learn=on_views(code)))
def on_views(code):
    learn = learner(n=48, bs=24)
    learn.dls = run(code, dls=learn.dls)
    return learn

# ---- losses

case('Any other function is called by one that does', lambda _: fit(KD(teacher(), nn.functional.mse_loss)), r'(?<=`)lambda.*(?=`)',
    lambda code, _: fit(KD(teacher(), run(code, mse=nn.functional.mse_loss))))
case('several losses are added: ', lambda _: KD(teacher(), [SoftTarget(), Attention()]), r'SoftTarget\(\) \+ .*\)',
    lambda code, _: fit(KD(teacher(), run(code), 'block1', 'block1')))
case('a loss is multiplied by a number, as in ', lambda _: Attention()*'1000', r'1000\*Attention\(\)',
    lambda code, _: fit(KD(teacher(), run(code), 'block1', 'block1')))
case('layers go by their names, as in get_model_layers(model)', lambda _: Attention().on(convnet(4).block1, 'block1'),
    r'get_model_layers\(model\)', lambda code, _: fit(KD(teacher(), Attention().on(run(code, model=convnet(4))[0], 'block1'))))
case('a weight is given as weight=', lambda _: KD(teacher(), SoftTarget, .3), r'weight=[\d.]+',
    lambda code, _: fit(run(f'KD(teacher, SoftTarget, {code})', teacher=teacher())))
case('tensors into the call: ', lambda _: SoftTarget(torch.randn(3, 5), torch.randn(3, 5)), r'SoftTarget\(T=.*',
    lambda code, _: run(code, '4', pred=torch.randn(3, 5), teacher_pred=torch.randn(3, 5)))
case('no setting ', lambda _: SoftTarget(weight=.3), 'the callback takes weight',
    lambda code, _: fit(KD(teacher(), SoftTarget(), weight=.3)))
case("is ambiguous in ", lambda _: fit(KD(teacher(), SoftTarget() + DecoupledKD(), schedule={'T': SchedLin(8, 1)})), r'(?<=write )\S+',
    lambda code, _: fit(KD(teacher(), SoftTarget() + DecoupledKD(), schedule={code: SchedLin(8, 1)})))
case("there is no BatchNorm in '", lambda _: fit(KD(teacher(), MarginReLU(), 'block2', 'pool')), r"layers_bn=\['…'\]",
    lambda code, _: fit(KD(teacher(), run(f"MarginReLU({code.replace('…', 'block2.1')})"), 'block2', 'block2.2')))
case("form='queue' does without", lambda _: fit(KD(teacher(), CRD(form='nce'), 'head.1', 'head.1'), learn=unnumbered()), r"form='queue'",
    lambda code, _: fit(KD(teacher(), run(f'CRD({code})'), 'head.1', 'head.1'), learn=unnumbered()))
def unnumbered():
    learn = student()
    learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train.dataset, batch_size=25)
    return learn
case("looks at the student's layers only", lambda _: fit(KD(teacher(), DeepSupervision(), 'block1', 'block1')), r"(?<=only: ).*",
    lambda code, _: fit(KD(teacher(), run(code, 'block1'))))
case("vectors have no positions to hide; use mask='channel'", lambda _: fit(KD(teacher(), MaskedGenerative(), 'head.1', 'head.1')),
    "mask='channel'", lambda code, _: fit(KD(teacher(), run(f'MaskedGenerative({code})'), 'head.1', 'head.1')))

VECTORS = dict(fm_s=dict(a=torch.randn(1, 4)), fm_t=dict(a=torch.randn(1, 6)), pred=torch.randn(1, 10), teacher_pred=torch.randn(1, 10))
def probe(**kwargs): return Probe(**VECTORS | dict(target=torch.tensor([1]), axis=1) | kwargs)
def call(loss): return loss(**{name: vars(probe())[name] for name, must in wanted_inputs(loss).items() if must})
LEARNS = ' learns: make its parts with `build(probe)`'
for message, make in ((LEARNS, AdversarialFeatures), (LEARNS, DeepSupervision),
    ('learns its projections: call build(probe) first', partial(CRD, form='queue'))):
    case(message, lambda _, make=make: call(make()), r'build\(probe\)', lambda code, _, make=make: call(built(make(), code)))
def built(loss, code):
    run(f'loss.{code}', loss=loss, probe=probe())
    return loss

case("needs the teacher's layer ", lambda _: SRRL('head.3').build(probe(fm_t=dict(a=torch.randn(1, 32)))), r'Probe\(teacher_module=…\)',
    lambda code, _: SRRL('head.3').build(probe(fm_t=dict(a=torch.randn(1, 32)), teacher_module=Frozen(teacher()).teacher_module)))
case("attention before its softmax is AttentionMaps('scores')", lambda _: AttentionMaps().build(of_maps()), r"AttentionMaps\('scores'\)",
    lambda code, _: run(code).build(of_maps()))
def of_maps(): return probe(fm_s=dict(a=torch.randn(1, 2, 3, 3)), fm_t=dict(a=torch.randn(1, 2, 3, 3)))

# ---- other callbacks

case('compares with labels that are classes, as integers', lambda _: fit(Curriculum(flat(4, 6)), learn=several_labels()),
    r'Curriculum\(teacher.*?\)', lambda code, _: fit(run(code, teacher=flat(4, 6)), learn=several_labels()))
case('by(teacher_pred, target, axis) returns a number for each sample', lambda _: fit(Curriculum(teacher(), by=lambda *args: args[0])),
    r'by\(teacher_pred, target, axis\)',
    lambda code, _: fit(Curriculum(teacher(), by=lambda teacher_pred, target, axis: teacher_pred.amax(axis))))
case('leave out start=', lambda _: Curriculum(teacher(), start=.5, schedule=SchedLin(.5, 1)), r'(?<=leave out )start=[\d.]+',
    lambda code, _: fit(Curriculum(teacher(), **without(code, start=.5, schedule=SchedLin(.5, 1)))))
def without(code, **kwargs): return {name: value for name, value in kwargs.items() if not code.startswith(f'{name}=')}
case('Curriculum(teacher)', lambda _: Curriculum('teacher.pkl'), r'Curriculum\(teacher\)',
    lambda code, _: fit(run(code, teacher=teacher())))
def two_curricula():
    learn = student()
    for _ in range(2): learn.add_cb(Curriculum(teacher()))
    return learn
case('two curricula in one fit', lambda _: fit(learn=two_curricula()), r'learn\.remove_cb\(Curriculum\)',
    lambda code, _: done(f'{code}; learn.add_cb(Curriculum(teacher))', two_curricula(), teacher=teacher()))
for found in (r'learn\.curriculum\.teacher = teacher', r'learn\.remove_cb\(Curriculum\)'):
    case('`learn.curriculum.teacher = teacher`', lambda _: fit(learn=exported(cbs=Curriculum(teacher()))), found,
        lambda code, _: done(code, exported(cbs=Curriculum(teacher())), teacher=teacher()))

def items(n=20): return [x for x, _ in digits()[500:500 + n]]
for found in (r'learn\.unlabelled\.samples = items', r'learn\.remove_cb\(Unlabelled\)'):
    case('`learn.unlabelled.samples = items`', lambda _: fit(learn=exported(cbs=Unlabelled(items()))), found,
        lambda code, _: done(code, exported(cbs=Unlabelled(items())), items=items()))
case('or a loader such as dls.test_dl(items)', lambda _: fit(Unlabelled(iter(range(9))), learn=named_learner(flat())),
    r'dls\.test_dl\(items\)',
    lambda code, _: fit(Unlabelled(run(code, dls=(learn := named_learner(flat())).dls, items=[*range(500, 520)])), learn=learn))
case('lower least=', lambda _: fit(KD(flat(), Confident(HardLabel(), least=.99))), r'lower least=[\d.]+',
    lambda code, _: fit(KD(flat(), Confident(HardLabel(), least=.1))))
case('such as HardLabel(), not', lambda _: Confident(Attention()), r'HardLabel\(\)',
    lambda code, _: fit(KD(teacher(), Confident(run(code), least=.1))))

def peers(*models, **kwargs): return learner(Peers(models or [convnet(4), convnet(4)], **kwargs), n=50)
case('are not probabilities of classes: Peers(…, axis=None)', lambda _: peers(flat(1), flat(1)).model(torch.randn(3, 64)), r'Peers\(.*\)',
    lambda code, _: run(code, '[flat(1), flat(1)]')(torch.randn(3, 64)))
case("compares activations, and no layers are named: MutualLearning(", lambda _: fit(MutualLearning(FitNet()), learn=peers()),
    r'MutualLearning\(.*\)', lambda code, _: fit(run(code, 'block1'), learn=peers()))
case("and the peers' mean is taken over dimension ", lambda _: fit(MutualLearning(SoftTarget), learn=of_tokens(1)), r'Peers\(.*\)',
    lambda code, _: fit(MutualLearning(SoftTarget), learn=of_tokens(int(re.search(r'axis=(-?\d+)', code)[1]))))
def of_tokens(axis):
    pairs = [(torch.randn(5, 4), torch.randint(0, 6, (5,))) for _ in range(20)]
    return quiet(Learner(loaders(pairs, pairs, 10), Peers([nn.Linear(4, 6), nn.Linear(4, 6)], axis=axis), CrossEntropyLossFlat(axis=-1)))
case('this takes several students', lambda _: fit(MutualLearning(SoftTarget)), r'Learner\(dls, Peers.*?…\)',
    lambda code, _: fit(MutualLearning(SoftTarget), learn=of_two(code)))
def of_two(code): return quiet(run(code, 'CrossEntropyLossFlat()', dls=student().dls, first=convnet(4), second=convnet(4)))
case('mutual learning is over: learn.remove_cb(MutualLearning)', lambda _: fit(learn=one_kept()), r'learn\.remove_cb\(MutualLearning\)',
    lambda code, _: done(code, one_kept()))
def one_kept():
    learn = peers()
    learn.add_cb(MutualLearning(SoftTarget))
    learn.keep_peer(0)
    return learn
case('Say which peer, `learn.keep_peer(0)`', lambda _: spoiled().keep_peer(), r'learn\.keep_peer\(0\)',
    lambda code, _: run(code, learn=spoiled()))
def spoiled():
    learn = peers()
    for p in learn.model.parameters(): p.data.fill_(math.nan)
    return learn

# ---- schedules

def sched_sine(start, end, pct): return start + (end - start)*math.sin(pct*math.pi/2)
case('for progress from 0 to 1', lambda _: KD(teacher(), SoftTarget, schedule=sched_sine), r'Schedule\(\w+\)(?=`, for)',
    lambda code, _: fit(KD(teacher(), SoftTarget, schedule=run(code))))
case('`, for the values themselves, or ', lambda _: KD(teacher(), SoftTarget, schedule={'weight': sched_lin}),
    r'\w+\(start, end\)(?=`, for)', lambda code, _: fit(KD(teacher(), SoftTarget, schedule={'weight': run(code, start=0, end=1)})))
case('or a fastai annealer such as `SchedLin(start, end)`', lambda _: KD(teacher(), SoftTarget, schedule=.5), r'SchedLin\(start, end\)',
    lambda code, _: fit(KD(teacher(), SoftTarget, schedule=run(code, start=0, end=1))))
case("like fastai's `sched_cos` (not `SchedCos`)", lambda _: Schedule(SchedCos), r'(?<=`)sched_cos(?=`)',
    lambda code, _: fit(KD(teacher(), SoftTarget, schedule=Schedule(run(code)))))
case('give the values themselves, as in schedule=', lambda _: KD(teacher(), SoftTarget, schedule={'T': cos}), r'schedule=.*\}',
    lambda code, _: fit(run(f'KD(teacher, SoftTarget, {code})', teacher=teacher(), start=8, end=1)))

# ---- shared

case(': a file is loaded first, ', lambda _: KD('t.pkl', SoftTarget), r'load_learner\(file\)',
    lambda code, folder: fit(KD(run(code, file=saved(folder)), SoftTarget), learn=named_learner(flat())))
def saved(folder):
    named_learner(teacher()).export(folder/'t.pkl')
    return folder/'t.pkl'
case(': a file is loaded first, ', lambda _: KD('t.npy', SoftTarget), r'StoredTeacher\(file\)',
    lambda code, folder: fit(KD(run(code, file=of_numbers(folder/'t.npy')), SoftTarget)))
def of_numbers(file):
    np.save(file, torch.zeros(50, 10).numpy())
    return file
for name, found, save in (('t.pth', r'model\.load_state.*?\)\)', lambda file: torch.save(teacher().state_dict(), file)),
    ('t.pt', r'load_model.*', lambda file: torch.save(dict(model=teacher().state_dict(), opt=dict()), file))):
    case('or, for a file of learn.save, ', lambda _, name=name: KD(name, SoftTarget), found,
        lambda code, folder, save=save, name=name: loaded(code, folder/name, save))
def loaded(code, file, save):
    save(file)
    model = convnet(16)
    run(code, file=file, model=model)
    assert torch.equal(model.head[3].weight, teacher().head[3].weight)
    fit(KD(model, SoftTarget))
case('weights are loaded into a model first', lambda _: KD(teacher().state_dict(), SoftTarget), r'model\.load_state_dict\(…\)',
    lambda code, _: (run(code, 'teacher', model=(model := convnet(16)), teacher=teacher().state_dict()), fit(KD(model, SoftTarget))))
case(' takes the batches of one loader: dl=', lambda _: report(student(), teacher(), dl=student().dls, n_runs=0), r'dl=dls\.valid',
    lambda code, _: run(f'report(student(), teacher(), {code}, n_runs=0)', dls=student().dls))

# ---- export and report

def onnx(folder, learn=None): return export_onnx(learn or student(), folder/'student.onnx')
def reloaded(folder):
    named_learner(flat()).export(folder/'learner.pkl')
    return fastai.basics.load_learner(folder/'learner.pkl')
case('so give it dl=dls.valid', lambda folder: export_program(reloaded(folder), folder/'s.pt2'), r'dl=dls\.valid',
    lambda code, folder: run(f"export_program(reloaded(folder), folder/'s.pt2', {code})", folder=folder, dls=named_learner(flat()).dls))
case('report(student, teacher, dl=dls.valid)', lambda folder: report(reloaded(folder), flat(), n_runs=0), r'report\(.*\)',
    lambda code, folder: run(code.replace(')', ', n_runs=0)'), student=reloaded(folder), teacher=flat(), dls=named_learner(flat()).dls))
case('export_onnx(learner, file): a Learner is exported', lambda folder: export_onnx(convnet(4), folder/'s.onnx'),
    r'export_onnx\(learner, file\)', lambda code, folder: run(code, learner=student(), file=folder/'s.onnx'), slow=True)
case('convolutions stay as they are without calibration batches', lambda folder: eight_bits(folder), r'dl=learn\.dls\.train',
    lambda code, folder: eight_bits(folder, code), slow=True)
case('convolutions need calibration batches, such as `learn.dls.train`',
    lambda folder: eight_bits(folder, learn=learner(of_convolutions(), n=50)), r'(?<=`)learn\.dls\.train(?=`)',
    lambda code, folder: eight_bits(folder, f'dl={code}', learn=learner(of_convolutions(), n=50)), slow=True)
case('say valid=learn.dls.valid', lambda folder: quantize_onnx(onnx(folder), folder/'small.onnx'), r'valid=learn\.dls\.valid',
    lambda code, folder: eight_bits(folder, code, learner(flat(), n=50)), slow=True)
case('what `export_onnx` returned is quantized', lambda folder: quantize_onnx(flat(), folder/'small.onnx'), r'(?<=`)export_onnx(?=`)',
    lambda code, folder: eight_bits(folder, learn=learner(flat(), n=50)), slow=True)
def of_convolutions(): return seeded(lambda: nn.Sequential(nn.Conv2d(1, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
def eight_bits(folder, code='valid=learn.dls.valid', learn=None):
    learn = learn or student()
    named = dict(valid=learn.dls.valid) | run(f'dict({code})', learn=learn)
    return quantize_onnx(onnx(folder, learn), folder/'small.onnx', **named, limit=1e9)

case('a report needs labels: give it a `dl` that has them',
    lambda _: report(student(), teacher(), dl=[(torch.randn(5, 1, 8, 8),)], n_runs=0), '`dl`',
    lambda code, _: report(student(), teacher(), dl=[(torch.randn(5, 1, 8, 8), torch.zeros(5).long())], n_runs=0))
case('give a `dl` of fastai, one that does not shuffle', lambda _: shown(shuffle=True).disagreements(), 'does not shuffle',
    lambda code, _: shown(shuffle=False).disagreements())
def shown(**kwargs):
    dl = torch.utils.data.DataLoader(digits()[:50], batch_size=25, **kwargs)
    return report(student(), teacher(), dl=dl, n_runs=0)

# ---- comparisons, chains of generations, checkpoints

def make(): return learner(convnet(4), n=50)
def fitting(learn, cbs, times=1): learn.fit(1, 1e-2, cbs=cbs)
def quick(make=make, fit=fitting, setups=None, **kwargs):
    return compare(make, setups or dict(kd=lambda: KD(teacher(), SoftTarget)), fit, 2, progress=False, **kwargs)
def new(): return dict(dls=named_learner(flat()).dls, new_student=lambda: convnet(4))
case('lambda: Learner(dls, new_student(), metrics=accuracy)', lambda _: quick(make=student()), r'lambda: Learner.*',
    lambda code, _: quick(make=run(code, **new())))
case('lambda learn, cbs: learn.fit_one_cycle(8, cbs=cbs)', lambda _: quick(fit=3), r'lambda learn.*',
    lambda code, _: quick(fit=run(code.replace('(8', '(1'))))
case('lambda: KnowledgeDistillationCallback(teacher, SoftTarget(T=4))', lambda _: quick(setups=dict(kd=KD(teacher(), SoftTarget))),
    r'lambda: Know.*', lambda code, _: quick(setups=dict(kd=run(code, teacher=teacher()))))
METRIC = r'metric=(lambda.*?\])'
def metric_of(code): return run(code.removeprefix('metric='))
case('measures after the fit', lambda _: quick(metric='f1'), METRIC, lambda code, _: quick(metric=metric_of(code), lower_is_better=False))
case('or a function of the trained learner, not', lambda _: quick(metric=accuracy), METRIC,
    lambda code, _: quick(metric=metric_of(code), lower_is_better=False))
case('no batch was trained with its callbacks', lambda _: quick(fit=lambda learn, cbs: learn.fit(1)), r'learn\.fit_one.*\)',
    lambda code, _: quick(fit=lambda learn, cbs: run(code.replace('(8', '(1'), learn=learn, cbs=cbs)))
case('is a `return` missing?', lambda _: quick(setups=dict(kd=lambda: None)), '`return`',
    lambda code, _: quick(setups=dict(kd=lambda: KD(teacher(), SoftTarget))))
case('let make_learner() make a new model', lambda _: quick(make=make_again), r'make_learner\(\)', lambda code, _: quick())
SHARED = convnet(4)
def make_again(generation=0): return Learner(student().dls, SHARED, CrossEntropyLossFlat(), metrics=accuracy)
case('let fit take how much, fit=', lambda _: quick(fit=lambda learn, cbs: learn.fit(1, cbs=cbs), cost_honest=True), r'fit=lambda.*',
    lambda code, _: quick(fit=run(code.removeprefix('fit=').replace('8*', '1*')), cost_honest=True))
TWO = [dict(fit=fitting), dict(fit=fitting)]
case('Give the baseline as many: setups=', lambda _: quick(setups=dict(kd=TWO)), r'(?<=setups=).*\}',
    lambda code, _: quick(setups=run(code, 'fitting', 'dict(fit=fitting)', '"kd": TWO'), tuning_seeds=1))
def swept(**kwargs): return sweep(make, lambda T: KD(teacher(), SoftTarget(T=getattr(T, 'T', T))), fitting, 2, progress=False, **kwargs)
case('a sweep has one setting, as in T=[1, 2, 4, 8]', lambda _: swept(), r'T=\[.*\]',
    lambda code, _: run(f'swept({code.replace("4, 8", "4")})'))
for found in (r'T=\[…\]', r'T=dict\(name=value, …\)'):
    case(': a sweep has several values, ', lambda _: swept(T=3), found,
        lambda code, _: run(f"swept({code.replace(', …', ', other=4').replace('…', '1, 2')})", value=2))
class Soft:
    def __init__(self, T): self.T = T
case('give them names, ', lambda _: swept(T=[Soft(1), Soft(2)]), r'T=dict\(name=value, …\)',
    lambda code, _: run(f"swept({code.replace('…', 'other=Soft(2)')})", value=Soft(1)))

def chain(make=lambda generation: make(), fit=fitting): return born_again(make, fit, SoftTarget, 2)
case('nobody heard the teacher: fit(learn, cbs) gives cbs', lambda _: chain(fit=lambda learn, cbs: learn.fit(1)), r'fit\(learn, cbs\)',
    lambda code, _: chain())
case('make a new one each time', lambda _: chain(make=make_again), r'make_learner\(\d\)', lambda code, _: chain())

def checkpoint(folder, *saved): return placed(student(), folder, *saved).save_checkpoint('c')
def placed(learn, folder, *cbs):
    learn.path, learn.opt = folder, None
    learn.add_cbs(cbs)
    return learn
def cb(): return KD(teacher(), SoftTarget)
def unwritten(folder):
    learn = placed(student(), folder)
    learn.create_opt()
    learn.save('c')
    return learn
case('was not written by `learn.save_checkpoint`', lambda folder: unwritten(folder).load_checkpoint('c'), r'learn\.save_checkpoint',
    lambda code, folder: (run(code, learn=(learn := unwritten(folder)))('own'), learn.load_checkpoint('own')))
for found in (r'start_epoch=learn.*?\)', r"CheckpointCallback\(fname='another'\)", r"learn\.save_checkpoint\('another'\)"):
    case('is not of this run, and stays as it is', lambda folder: (checkpoint(folder), checkpoint(folder)), found,
        lambda code, folder: goes_on(code, folder, checkpoint(folder).read_bytes()))
def goes_on(code, folder, before):
    learn = placed(student(), folder)
    if code.startswith('start_epoch'): started(learn).fit(1, cbs=CheckpointCallback('c'), **run(f'dict({code})', learn=learn))
    elif code.startswith('learn'): run(code, learn=learn)
    else: fit(run(code), learn=learn)
    assert code.startswith('start_epoch') or (folder/'models'/'c.pth').read_bytes() == before and (folder/'models'/'another.pth').exists()
case('Go on with the run that wrote it', lambda folder: (in_a_folder(folder), placed(student(), folder).save_checkpoint('runs/c')),
    r'learn\.load_checkpoint.*?\)', lambda code, folder: (in_a_folder(folder), run(code, learn=placed(student(), folder))))
def in_a_folder(folder):
    (folder/'models'/'runs').mkdir(parents=True)
    placed(student(), folder).save_checkpoint('runs/c')
case('is not of this run, and stays as it is', lambda folder: (unwritten(folder), checkpoint(folder)), 'Delete the file',
    lambda code, folder: (unwritten(folder), (folder/'models'/'c.pth').unlink(), checkpoint(folder)))
case('make it with the `opt_func` that was used', lambda folder: (checkpoint(folder), trains_with('SGD', folder).load_checkpoint('c')),
    '(?<=`)opt_func', lambda code, folder: (checkpoint(folder), trains_with('Adam', folder, code).load_checkpoint('c')))
def trains_with(opt, folder, name='opt_func'): return placed(learner(n=50, **{name: vars(fastai.basics)[opt]}), folder)
case('make the learner with the `opt_func` that was used', lambda _: went_on(dict(opt_func=fastai.basics.SGD)), '(?<=`)opt_func',
    lambda code, _: went_on({code: fastai.basics.Adam}))
def went_on(kwargs):
    first, second = (KD(teacher(), FitNet(), 'block2', 'block2') for _ in range(2))
    fit(first)
    second.load_state_dict(first.state_dict())
    fit(second, learn=learner(n=50, **kwargs))
case('pass all callbacks that were saved, `cbs=[…]`',
    lambda folder: (checkpoint(folder, cb()), placed(student(), folder).load_checkpoint('c')), r'(?<=cbs=)\[…\]',
    lambda code, folder: (checkpoint(folder, cb()), placed(student(), folder).load_checkpoint('c', cbs=run(code, 'cb()'))))
case('pass the callbacks that were saved, `cbs=[…]`, and no others',
    lambda folder: (checkpoint(folder), placed(student(), folder, cb()).load_checkpoint('c')), r'(?<=cbs=)\[…\]',
    lambda code, folder: (checkpoint(folder), placed(student(), folder, cb()).load_checkpoint('c', cbs=run(code, ''))))

# ---- the rest

case('pip install "fastkd[', lambda _: needed('no_such.part', 'report', 'a report'), r'fastkd\[(\w+)\]',
    lambda code, _: known_extra(code[7:-1]))
def known_extra(extra):
    said = '\n'.join(o.read_text() for o in (ROOT/'fastkd').rglob('*.py'))
    extras = {extra, *re.findall(r"needed\([^)]*?, '(\w+)'", said)}
    assert len(extras) > 1 and all(f'{o}_requirements =' in (ROOT/'settings.ini').read_text() for o in extras)

# ---- words, boxes, tables, pictures

def reads(words):
    "A learner of texts of five words"
    pairs = [(torch.randint(0, len(words), (5,)), torch.tensor(i % 2)) for i in range(20)]
    learn = quiet(Learner(loaders(pairs, pairs, 10), nn.Sequential(nn.Embedding(len(words), 8), nn.Flatten(), nn.Linear(40, 2)),
        CrossEntropyLossFlat()))
    learn.dls.vocab = [words, ['no', 'yes']]
    return learn
OF_TEACHER, OF_STUDENT = ['xxunk', 'a', 'cat'], ['xxunk', 'dog', 'cow']
OTHERWISE = ', or pass `teacher_input`, which makes the input of the teacher from that of the student'
case("with the vocabulary of the teacher", lambda _: fit(KD(reads(OF_TEACHER), SoftTarget), learn=reads(OF_STUDENT)),
    'vocabulary of the teacher', lambda code, _: fit(KD(reads(OF_TEACHER), SoftTarget), learn=reads(OF_TEACHER)))
case(OTHERWISE, lambda _: fit(KD(reads(OF_TEACHER), SoftTarget), learn=reads(OF_STUDENT)), 'teacher_input',
    lambda code, _: fit(run(f'KD(teacher, SoftTarget, {code}=translated)', teacher=reads(OF_TEACHER)), learn=reads(OF_STUDENT)))
def translated(x): return torch.tensor([0, 1, 1])[x]

# ---- answers without their teacher

def taught_twice(folder, learn, teacher, given=None):
    "A folder of answers, and what a fit with it trains"
    fit(KD(CachedTeacher(teacher, folder/'kept'), SoftTarget), learn=learn())
    fit(KD(given or CachedTeacher(None, folder/'kept'), SoftTarget), learn=learn())
def still(vocab='abcdefghij'):
    learn = named_learner(seeded(convnet, 4), vocab, n=50)
    learn.dls.train.shuffle = False
    return learn
def halved(x): return x/2
GIVEN = r'CachedTeacher\(teacher, path\)'
def by_half(): return Frozen(teacher(), inputs=halved)
case('was made from that of the student', lambda folder: taught_twice(folder, still, by_half()), GIVEN,
    lambda code, folder: taught_twice(folder, still, by_half(), run(code, teacher=by_half(), path=folder/'kept')))
case('are for classes in another order, or others', lambda folder: in_another_order(folder), GIVEN,
    lambda code, folder: in_another_order(folder, run(code, teacher=still(), path=folder/'kept')))
def in_another_order(folder, given=None):
    fit(KD(CachedTeacher(still(), folder/'kept'), SoftTarget), learn=still())
    fit(KD(given or CachedTeacher(None, folder/'kept'), SoftTarget), learn=still('jihgfedcba'))
case('a cache on disk keeps inputs of the teacher that are', lambda folder: scaled_by(CachedTeacher(Scaled(), folder/'kept')),
    r'CachedTeacher\(teacher\)', lambda code, _: scaled_by(run(code, teacher=Scaled())))
def Scaled(): return Frozen(seeded(lambda: By()), inputs=lambda x: (x, np.ones(2)))
class By(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = flat()
    def forward(self, x, k): return self.head(x*float(k[0]))
class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.n = flat(), 0
    def forward(self, x):
        self.n += 1
        return self.head(x)
def in_epochs(model):
    learn = still()
    started(learn).fit(4, 1e-2, cbs=KD(CachedTeacher(model), SoftTarget))
case('Leave that out, or pass', lambda _: in_epochs(Counting()), '`forward`', lambda code, _: in_epochs(flat()))
def scaled_by(cached): assert cached.outputs((torch.randn(4, 1, 8, 8),))[0].shape == (4, 10)

# ---- positions

def answers(): return StoredTeacher(torch.randn(50, 10))
def stored(train):
    learn = student()
    learn.dls.loaders = [train, learn.dls.valid]
    fit(KD(answers(), SoftTarget), learn=learn)
def by_fastai(code): return run(code, '25', dataset=digits()[:50])
case('is not of fastai; take DataLoader(dataset, bs=…, shuffle=True) of fastai.data.load', lambda _: stored(of_torch()),
    r'DataLoader\(.*?\)', lambda code, _: stored(by_fastai(code)))
def of_torch(): return torch.utils.data.DataLoader(digits()[:50], batch_size=25)
class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(digits()[:50])
case('a stream has none; give a dataset with `__getitem__` and `__len__`', lambda _: stored(fastai.basics.DataLoader(Streamed(), bs=25)),
    '(?<=`)__getitem__', lambda code, _: hasattr(list, code) and stored(fastai.basics.DataLoader(digits()[:50], bs=25)))
class Ahead(fastai.basics.DataLoader):
    def __iter__(self): yield from super().__iter__()
case('its class has an `__iter__` of its own; leave that to fastai', lambda _: stored(Ahead(digits()[:50], bs=25)), '(?<=`)__iter__',
    lambda code, _: hasattr(Ahead, code) and stored(fastai.basics.DataLoader(digits()[:50], bs=25)))
class Whole:
    def __len__(self): return 2
    def __getitem__(self, i): return tuple(map(torch.stack, zip(*digits()[25*i:25*i + 25])))
case('with bs=None its dataset makes whole batches; let it make single samples, and set bs',
    lambda _: stored(fastai.basics.DataLoader(Whole(), bs=None)), 'set bs',
    lambda code, _: stored(run(f"DataLoader(digits()[:50], {code.removeprefix('set ')}=25)")))

def maps(): return dict(fm_s=dict(a=torch.randn(2, 3, 4, 4)), fm_t=dict(b=torch.randn(2, 3, 4, 4)))
def margins(build=None):
    loss = MarginReLU()
    if build: getattr(loss, build)(Probe(**maps(), teacher_module=lambda name: nn.BatchNorm2d(3)))
    assert loss(**maps()) > 0
case("margins are read from the teacher's BatchNorm by `build`", lambda _: margins(), '(?<=`)build(?=`)', lambda code, _: margins(code))
def banks(**given):
    loss = CRD(form='nce')
    loss.build(Probe(**maps(), n_samples=9))
    assert loss(**maps(), **given).isfinite()
case('needs `index`, the positions of the samples in the dataset', lambda _: banks(), '(?<=`)index(?=`)',
    lambda code, _: banks(**{code: torch.tensor([3, 5])}))

def dense(): return seeded(nn.Conv2d, 1, 2, 3, padding=1)
def of_maps_of_labels():
    "A report on pictures with a label for each pixel"
    dsets = Datasets(range(20), [[image], [lambda i: TensorMask((image(i)[0] > .5).long())]], splits=[range(20), range(10)])
    learn = quiet(Learner(dsets.dataloaders(bs=5, num_workers=0, device='cpu'), dense(), CrossEntropyLossFlat(axis=1)))
    return report(learn, dense(), n_runs=0)
case('every sample has many labels here: `plot_disagreements`', lambda _: of_maps_of_labels().disagreements(),
    '(?<=`)plot_disagreements(?=`)', lambda code, _: run(f'of_maps_of_labels().{code}(2)'))
case('cannot show single samples of these loaders: `disagreements`', lambda _: shown().plot_disagreements(), '(?<=`)disagreements(?=`)',
    lambda code, _: run(f'shown().{code}()'))

class Stub:
    "torchvision, with a download of ten images"
    datasets = property(lambda self: self)
    def FashionMNIST(self, root, download):
        folder = Path(root)/'FashionMNIST'/'raw'
        folder.mkdir(parents=True)
        for part in 'train', 't10k':
            (folder/f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>iiii', 2051, 10, 28, 28) + bytes(7840))
            (folder/f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>ii', 2049, 10) + bytes(range(10)))
def clothes(code, folder):
    run(code.replace(re.search(r"'(.*)'", code)[1], str(folder)), torchvision=Stub())
    assert demo.fashion_mnist(folder)['test'][0].shape == (10, 1, 28, 28)
case('or let torchvision download them with `torchvision', lambda folder: demo.fashion_mnist(folder), r'torchvision\.datasets.*\)', clothes)

# ---- None is left out

# tests in other files, where it takes processes, or what is set up there
ELSEWHERE = {'train with `with learn.distrib_ctx()': 'test_loop_ranks.py::test_adapters_and_schedules',
    'set fastkd.losses.core.LARGE = math.inf first': 'test_many_logits.py::test_second_derivatives_are_refused',
    'give dls.test_dl(df), not a': 'test_unlabelled.py::test_tables'}
ELSEWHERE['computes with integers already'] = 'test_eight_bits.py::test_a_file_of_integers_is_no_source'
OF_LEARNERS = {'returns no output for each of them but a': 'all_targets_in_one_tensor_in_a_fit', 'Pad_Chunk(pad_first=': 'padding',
    'build the data of both with one `vocab`': 'one_column_for_two_classes', "F.interpolate(x, …, mode='bilinear')": 'another_size',
    'let it return one of the outputs as it is': 'what_logits_makes_of_two_outputs',
    'renormalize(…, student=statistics(learn)': 'another_size', ': with teacher_input=lambda x: ': 'another_size',
    ', after `from fastkd.learners import': 'another_size',
    'ImageBlock(PILImage) or ImageBlock(PILImageBW)': 'another_mode', 'use FillMissing(add_col=True)': 'a_fill_that_is_told'}
ELSEWHERE |= {said: f'test_learners.py::test_{name}' for said, name in OF_LEARNERS.items()}
# what looks like code and is no remedy: what a setting is called, how something is written, what the error is about
NO_REMEDY = ['logits of the student, `(bs', "the batch's labels, or `Mixed`", 'positions that count, a bool tensor',
    'positions of the samples in the dataset, `(bs', 'dimension of `pred` that holds', 'more than tolerance=', 'more than limit=',
    'make_learner(…) returns a Learner, not', 'BoxRegression: `positives` ', 'rate=None has no use', 'without factors (rate=None)',
    'is needed, not start_pct=', 'the curve of `Stages`', 'Lookahead(k=…, alpha=…) of …']

CODE = re.compile(r'`|\b\w+=[\w…\'"\[{(]|\w\((?!s\))[\w…\'"\[{(]|\w\(\)|pip install|\blearn\.\w')

def text(node):
    "A string as it stands in the source, with … for what is filled in; what is added to it later is another string"
    if isinstance(node, ast.JoinedStr): return ''.join(o.value if isinstance(o, ast.Constant) else '…' for o in node.values)
    if isinstance(node, ast.BinOp): return text(node.left) + text(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''

def printed(file):
    "Strings of a module that hold something like code, but docstrings and `repr`"
    tree, seen = ast.parse(file.read_text()), set()
    own = [o for o in ast.walk(tree) if isinstance(o, ast.FunctionDef) and o.name == '__repr__'] + [
        o for o in ast.walk(tree) if isinstance(o, ast.Expr) and isinstance(o.value, ast.Constant)]
    seen.update(id(inner) for o in own for inner in ast.walk(o))
    for node in ast.walk(tree):
        if id(node) in seen or not (said := text(node)): continue
        seen.update(map(id, ast.walk(node)))
        if ' ' in said and CODE.search(said): yield said

MODULES = sorted(o for o in (ROOT/'fastkd').rglob('*.py') if o.name not in ('_modidx.py', '__init__.py'))

@pytest.mark.parametrize('file', MODULES, ids=lambda file: file.stem)
def test_every_remedy_is_run(file):
    known = [case.values[0].said for case in CASES] + [*ELSEWHERE, *NO_REMEDY]
    assert [said for said in printed(file) if not any(o in said for o in known)] == []

def test_no_remedy_is_stale():
    "What a case is known by still stands in the source, and the other tests are there"
    source = '\n'.join(text(o) for file in MODULES for o in ast.walk(ast.parse(file.read_text())))
    known = [case.values[0].said for case in CASES] + [*ELSEWHERE, *NO_REMEDY]
    assert [o for o in known if o not in source] == []
    for file, name in (place.split('::') for place in ELSEWHERE.values()): assert f'def {name}(' in (ROOT/'tests'/file).read_text()
