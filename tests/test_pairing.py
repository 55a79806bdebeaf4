"Who is compared with whom, and what is said where that cannot be."
import copy, inspect, pytest, torch, torch.nn.functional as F, warnings
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.layers import ConvLayer
from fastai.vision.models.xresnet import xresnet18
from fastkd.all import *
from functools import partial
from helpers import (convnet, digits, error_of, fitted, furthest, learner, loaders, named_learner, quiet, recorded, same, seeded,
    soft_target, trained_teacher, weights)
from pathlib import Path
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

class Crossed(nn.Module):
    "Layers that run in another order than they are declared in"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(1, 1), nn.Linear(64, 10)

    def forward(self, x): return self.head(self.a(self.b(x.flatten(1)).tanh()).tanh())

def numbered(fm_s, fm_t):
    "A loss in which each pair counts differently"
    return sum(10**i*F.mse_loss(fm_s[s], fm_t[t]) for i, (s, t) in enumerate(zip(fm_s, fm_t)))

PAIRS = [(['b', 'a'], ['a', 'b']), (['a', 'b'], ['b', 'a']), (['a', 'a', 'b'], ['a', 'b', 'b']), ('b', 'a'), (['model.b'], ['b'])]

@pytest.mark.parametrize('students,teachers', PAIRS, ids=str)
@pytest.mark.parametrize('own', [False, True], ids=['callback', 'on'])
def test_declared_order(students, teachers, own):
    "The first student layer goes with the first teacher layer, whatever runs first; a layer may be in several pairs"
    teacher, learn = seeded(Crossed, seed=1), quiet(Learner(loaders(digits()[:25]), seeded(Crossed), CrossEntropyLossFlat()))
    names = list(zip(*([o.removeprefix('model.') for o in ([side] if isinstance(side, str) else side)] for side in (students, teachers))))
    cb = KD(teacher, as_sum(numbered).on(students, teachers)) if own else KD(teacher, numbered, students, teachers)
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad(), recorded(learn.model, ['a', 'b']) as fm_s, recorded(teacher, ['a', 'b']) as fm_t:
        learn.model(x)
        teacher(x)
    expected = sum(10**i*F.mse_loss(fm_s[s], fm_t[t]) for i, (s, t) in enumerate(names))
    learn.fit(1, 0., cbs=cb)
    assert float(learn.recorder.distillation['distillation_loss'][0]) == pytest.approx(float(expected), rel=1e-5)

def test_keys_of_repeated_layers():
    "Are told apart by a number"
    seen = []
    def keys(fm_s, fm_t):
        seen.append((list(fm_s), list(fm_t)))
        return sum(o.mean() for o in fm_s.values())
    learner().fit(1, cbs=KD(trained_teacher(), keys, ['block2', 'block1', 'block2'], ['block1', 'block2', 'block2']))
    assert seen[0] == (['block2', 'block1', 'block2#2'], ['block1', 'block2', 'block2#2'])

def test_parts_with_pairs_of_their_own():
    "Each part of a sum has its value for its own layers"
    teacher, learn = trained_teacher(), learner()
    loss = Attention().on('block1', 'block1') + Attention().on('block2', 'block2')
    fitted(learn, KD(teacher, loss, weight=0.))
    alone = [fitted(learner(), KD(teacher, Attention, name, name, weight=0.)) for name in ('block1', 'block2')]
    for column, one in zip(['attention_loss', 'attention_loss_2'], alone):
        assert learn.recorder.distillation[column] == one.recorder.distillation['distillation_loss']

# ---- Errors: before the first step, with all that is needed to mend them

@pytest.mark.parametrize('make', [lambda: KD(convnet(8), Attention, ['block1', 'block2'], ['block1']),
    lambda: KD(convnet(8), Attention().on(['block1', 'block2'], 'block1'))])
def test_unequal_lists(make):
    with pytest.raises(ValueError, match=r"2 student layers \['block1', 'block2'\] and 1 teacher layers \['block1'\]"): make()

@pytest.mark.parametrize('layers,said', [(('blok2', 'block2'), "the student has no layer 'blok2'; nearest: block2"),
    (('block2', 'blok2'), "the teacher has no layer 'blok2'; nearest: block2"),
    (('block2.7', 'block2'), "the student has no layer 'block2.7'"),
    (('zzz', 'block2'), "the student has no layer 'zzz'; its layers: block1, pool, block2, "),
    ((['block1', 'heda'], ['block1', 'head']), "the student has no layer 'heda'; nearest: head")], ids=str)
def test_wrong_name(layers, said): assert said in error_of(ValueError, learner(), KD(trained_teacher(), Attention, *layers))

def test_no_layers():
    said = error_of(ValueError, learner(), KD(trained_teacher(), SoftTarget() + FitNet()))
    assert 'FitNet() looks at activations, and no layers are named: pass activations_student=' in said
    assert 'match_feature_layers' in said

def test_shapes_that_cannot_be_compared():
    said = error_of(ValueError, learner(), KD(trained_teacher(), FitNet(adapter=None), 'block1', 'block2'))
    assert "student layer 'block1' (1, 4, 8, 8) with teacher layer 'block2' (1, 32, 4, 4)" in said
    assert '4 channels of the student, 32' in said
    said = error_of(ValueError, learner(), KD(trained_teacher(), Attention, ['block1', 'head.1'], ['block1', 'head.1']))
    assert "student layer 'head.1' (1, 8) with teacher layer 'head.1' (1, 32)" in said and 'these are vectors' in said
    said = error_of(ValueError, learner(), KD(trained_teacher(), FitNet, 'block1', 'head.1')) # found while its adapter is made
    assert "FitNet(), for student layers {'block1': (1, 4, 8, 8)} and teacher layers {'head.1': (1, 32)}: (1, 4, 8, 8) and (1, 32)" in said

def test_other_class_count():
    said = error_of(ValueError, learner(), KD(convnet(8, n_out=7), SoftTarget))
    assert 'the student predicts 10 classes and the teacher 7' in said and '(1, 10) and (1, 7)' in said

def test_not_a_teacher():
    said = 'the teacher comes first, a module, a Learner or a Teacher, and not '
    wrong_ones = {'dict': {}, 'NoneType': None, 'SoftTarget': SoftTarget, 'PKT': PKT(), '<lambda>': lambda x: x}
    for name, wrong in wrong_ones.items():
        with pytest.raises(TypeError, match=said + name): KD(wrong, SoftTarget)
    with pytest.raises(TypeError, match=said): KD(2*SoftTarget(), trained_teacher())

def test_teacher_is_the_student():
    learn = learner()
    for teacher in learn.model, learn, nn.Sequential(learn.model), nn.DataParallel(learn.model), Frozen(learn.model):
        said = error_of(ValueError, learn, KD(teacher, SoftTarget))
        assert "shares its parameter 'block1.0.weight'" in said and 'copy.deepcopy(model)' in said
    fitted(learn, KD(copy.deepcopy(learn.model), SoftTarget, weight=.1), n_epoch=1) # what is advised works

def test_teacher_shares_a_layer():
    learn, teacher = learner(), convnet(4)
    teacher.block2[0].weight = learn.model.block2[0].weight
    assert "shares its parameter 'block2.0.weight'" in error_of(ValueError, learn, KD(teacher, SoftTarget))

def test_frozen_layers_may_be_shared():
    "They do not change while the teacher teaches"
    learn, teacher = learner(), convnet(4)
    teacher.block1[0] = learn.model.block1[0]
    learn.model.block1[0].weight.requires_grad_(False)
    before = weights(teacher)
    fitted(learn, KD(teacher, SoftTarget, weight=.1), n_epoch=1)
    assert same(weights(teacher), before) and not learn.model.block1[0].weight.requires_grad

@pytest.mark.parametrize('make,said', [(lambda x: SoftTarget(x, x), r'SoftTarget\(T=…\)\(pred, teacher_pred\)'),
    (lambda x: Attention(x), r'Attention\(p=…\)\(fm_s, fm_t\)'), (lambda x: FitNet(x, x), r'FitNet\(adapter=…\)\(fm_s, fm_t\)')])
def test_tensor_in_a_constructor(make, said):
    with pytest.raises(TypeError, match='settings go into the constructor and tensors into the call: ' + said): make(torch.randn(2, 10))

def test_tensor_in_a_constructor_during_a_fit():
    "A loss of the peer is called like a function; here that is an error, with the line that works"
    def mine(pred, teacher_pred, **kwargs): return SoftTarget(pred, teacher_pred)
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert 'SoftTarget(T=…)(pred, teacher_pred)' in error_of(TypeError, learn, KD(trained_teacher(), mine))

def test_settings():
    "Weights and schedules that cannot work, with where they fail"
    for exc, said, kwargs in [(ValueError, 'task_weight', dict(weight=1.5)),
        (ValueError, 'weight is a finite number', dict(weight=float('nan'))),
        (ValueError, 'weight is a finite number', dict(weight=None, schedule=cos)),
        (ValueError, "nothing is called 'temperature'", dict(schedule=dict(temperature=lambda pct: 2.))),
        (ValueError, 'T must be positive', dict(schedule=dict(T=lambda pct: 1 - pct))),
        (TypeError, 'teacher_metrics is True, or a list of metric functions', dict(teacher_metrics=['accuracy'])),
        (ValueError, 'at 50.1% of training', dict(schedule=lambda pct: 1. if pct <= .5 else 2.))]:
        assert said in error_of(exc, learner(), KD(trained_teacher(), SoftTarget, **kwargs))

@pytest.mark.parametrize('teacher_input,exc,said', [(lambda x: (x, x), TypeError, 'takes 2 positional arguments'),
    (lambda x: x.flatten(1), ValueError, 'Expected 3D'), (lambda x: x['image'], ValueError, 'indices')])
def test_a_teacher_that_fails(teacher_input, exc, said):
    "Is named, with what it was given, before the first step"
    found = error_of(exc, learner(), KD(trained_teacher(), SoftTarget, teacher_input=teacher_input))
    assert "Frozen(Sequential) fails on a sample of the student's batch, of shape (1, 1, 8, 8); `teacher_input` can" in found
    assert said in found

def test_a_student_that_fails():
    said = error_of(ValueError, learner(nn.Sequential(nn.Flatten(), nn.Linear(7, 10))), KD(trained_teacher(), SoftTarget()))
    assert "the student fails on a sample of the student's batch, of shape (1, 1, 8, 8): mat1 and mat2" in said

@pytest.mark.parametrize('mask', [lambda x: None, lambda: None, 'mask', lambda x: [[1], []]])
def test_a_mask_that_is_none(mask):
    said = error_of(ValueError, learner(), KD(trained_teacher(), SoftTarget, mask=mask))
    assert 'mask(*xb) returns a bool tensor `(bs, ...)`' in said

@pytest.mark.parametrize('names', [3, nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), [None, 'block1']], ids=str)
def test_layers_that_are_no_names(names):
    with pytest.raises(TypeError, match=r'layers go by their names, as in get_model_layers\(model\), not'): Attention().on(names, 'block1')

def test_arguments_in_another_place():
    "A weight as third argument, settings of the loss or of other libraries, a file, weights, a layer itself"
    kd = partial(KnowledgeDistillationCallback, trained_teacher())
    with pytest.raises(TypeError, match='not 0.7; a weight is given as weight=0.7'): kd(SoftTarget(T=4), .7)
    for name, said in dict(T='a temperature belongs to the loss', alpha='is called weight', activations='activations_student=').items():
        with pytest.raises(TypeError, match=f'KnowledgeDistillationCallback has no argument {name}: .*{said}'): kd(SoftTarget, **{name: 4})
    with pytest.raises(TypeError, match='has no argument wieght: those that it has are teacher, loss, .*weight'): kd(SoftTarget, wieght=.5)
    with pytest.raises(TypeError, match='the callback takes weight and schedule'): SoftTarget(weight=.5)
    class Mine(KnowledgeDistillationCallback):
        "A subclass that passes on what it does not know"
        def __init__(self, teacher, **kwargs): super().__init__(teacher, SoftTarget(T=4), **kwargs)
    assert Mine(trained_teacher(), weight=.3).weight == .3
    for wrong in (dict(T=2), dict(wieght=.3)):
        with pytest.raises(TypeError, match=f'argument .?{[*wrong][0]}'): Mine(trained_teacher(), **wrong)
    for teacher, said in (('teacher.pkl', 'load_learner'), (Path('a.pth'), 'torch.load'), (convnet(4).state_dict(), 'load_state_dict')):
        with pytest.raises(TypeError, match=said): KnowledgeDistillationCallback(teacher, SoftTarget)
    with pytest.raises(TypeError, match=r'not a Linear$'): FitNet().on('3', nn.Linear(1, 1))
    assert list(inspect.signature(KnowledgeDistillationCallback.__init__).parameters)[1:4] == ['teacher', 'loss', 'activations_student']

@pytest.mark.parametrize('make', [lambda: nn.Sequential(ConvLayer(1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    lambda: xresnet18(n_out=10, c_in=1)], ids=['ConvLayer', 'xresnet'])
def test_names_in_models_of_fastai(make):
    "Whose containers are classes with arguments of their own"
    x, teacher = torch.randn(2, 1, 8, 8), trained_teacher()
    for side, pair in dict(student=(make(), teacher), teacher=(convnet(4), make())).items():
        layers = ('layer3', 'block2') if side == 'student' else ('block2', 'layer3')
        cb = KnowledgeDistillationCallback(pair[1], SoftTarget(T=4) + 100*FitNet().on(*layers))
        with pytest.raises(ValueError, match=f"the {side} has no layer 'layer3'"), warnings.catch_warnings(action='ignore'):
            learner(pair[0]).fit(1, cbs=cb)

# ---- A learner as teacher

def permuted(model, order):
    "The model with its classes in another order; some processors round a column otherwise in another place"
    model = copy.deepcopy(model)
    head = model.head[3]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    return model

def test_permuted_vocabulary():
    "Teaches what the teacher in the student's order teaches, and that is said"
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    teacher = named_learner(permuted(trained_teacher(), order), ''.join('abcdefghij'[i] for i in order))
    found, expected = named_learner(seeded(convnet, 4)), named_learner(seeded(convnet, 4))
    with pytest.warns(UserWarning, match="the teacher's classes are in another order"): fitted(found, KD(teacher, SoftTarget))
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        fitted(expected, KD(named_learner(trained_teacher()), SoftTarget))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-5

@pytest.mark.filterwarnings("ignore:the teacher's classes are in another order")
def test_prediction_of_a_layer_in_another_order():
    "Only the last prediction is reordered: in an ensemble, that of each teacher"
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    teacher = named_learner(permuted(trained_teacher(), order), ''.join('abcdefghij'[i] for i in order))
    fit = lambda teacher, layer: error_of(ValueError, named_learner(seeded(convnet, 4)), KD(teacher, SoftTarget().on(teacher_pred=layer)))
    assert "not the output of its layer 'head'" in fit(teacher, 'head') and "its layer '0.head'" in fit([teacher], '0.head')
    found, expected = named_learner(seeded(convnet, 4)), named_learner(seeded(convnet, 4))
    fitted(found, KD([teacher], SoftTarget().on(teacher_pred='0')))
    fitted(expected, KD(trained_teacher(), SoftTarget))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-5

def test_other_vocabulary():
    teacher = named_learner(trained_teacher(), 'abcdefghijx')
    student = named_learner(seeded(convnet, 4))
    said = error_of(ValueError, student, KD(teacher, SoftTarget))
    assert 'other classes (10 and 11): only the teacher has x (str)' in said

def test_names_of_another_type():
    "Numbers and their names in letters are other classes, and the message shows why"
    student, teacher = named_learner(seeded(convnet, 4)), named_learner(trained_teacher())
    student.dls.vocab = list(range(10)) # as from `CategoryBlock` on integers
    assert 'the student has 0 (int), 1 (int)' in error_of(ValueError, student, KD(teacher, SoftTarget))

def test_other_statistics():
    "The teacher sees images as it was trained to see them"
    teacher = named_learner(trained_teacher(), stats=(0., 1.))
    learn = named_learner(seeded(convnet, 4), stats=(.3, .25), n=25)
    with pytest.warns(UserWarning, match='normalized by other statistics'): learn.fit(1, 0., cbs=KD(teacher, SoftTarget(T=2)))
    x = torch.stack([x for x, _ in digits()[:25]])
    student = copy.deepcopy(learn.model)
    student.load_state_dict(seeded(convnet, 4).state_dict())
    with torch.no_grad(): expected = soft_target(student.train()((x - .3)/.25), teacher.model.eval()(x), 2.)
    assert float(learn.recorder.distillation['distillation_loss'][0]) == pytest.approx(float(expected), rel=1e-4)

def test_same_statistics():
    "Say nothing and change nothing"
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        found = fitted(named_learner(seeded(convnet, 4)), KD(named_learner(trained_teacher()), SoftTarget))
    assert furthest(weights(found.model), weights(fitted(named_learner(seeded(convnet, 4)), KD(trained_teacher(), SoftTarget)).model)) == 0

def test_a_learner_is_not_changed():
    "Not by being a teacher"
    teacher = named_learner(trained_teacher())
    before, cbs = weights(teacher.model), list(teacher.cbs)
    fitted(named_learner(seeded(convnet, 4)), KD(teacher, SoftTarget))
    assert same(weights(teacher.model), before) and list(teacher.cbs) == cbs and teacher.opt is None
