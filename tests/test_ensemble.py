"Several teachers as one: what is averaged, with which weights, and that it is a teacher like others."
import numpy as np, pytest, torch
from fastai.basics import SGD
from fastai.callback.mixup import MixUp
from fastkd.all import *
from fastkd.cache import N_CONTROL
from fastkd.ensemble import by_confidence
from fastkd.losses.core import Mixed
from helpers import (ByHand, convnet, error_of, fitted, furthest, is_unchanged, learner, n_hooks, named_learner, seeded, soft_target,
    state, trained_teacher, weights)
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)
def student(**kwargs): return learner(opt_func=SGD, **kwargs)
def two(): return [trained_teacher(), seeded(convnet, 8, seed=3)]

def softmax(z, T=1.):
    e = np.exp(z/T - (z/T).max(1, keepdims=True))
    return e/e.sum(1, keepdims=True)

def logits(n=2, shape=(6, 5), dtype=torch.float64):
    torch.manual_seed(0)
    return [3*torch.randn(shape, dtype=dtype) for _ in range(n)]

BY_HAND = dict(arithmetic=lambda zs, w: sum(o*softmax(z) for o, z in zip(w, zs)),
    logits=lambda zs, w: softmax(sum(o*z for o, z in zip(w, zs))),
    geometric=lambda zs, w: (lambda p: p/p.sum(1, keepdims=True))(np.prod([softmax(z)**o for o, z in zip(w, zs)], 0)))

@pytest.mark.parametrize('given,used', [(None, [1/3]*3), ([1, 0, 3], [.25, 0, .75])], ids=str)
@pytest.mark.parametrize('mean', BY_HAND)
def test_means(mean, given, used):
    preds = logits(3)
    found = Ensemble([nn.Identity()]*3, mean, given).average(preds)
    np.testing.assert_allclose(found.softmax(1), BY_HAND[mean]([o.numpy() for o in preds], used), rtol=1e-10)

def test_mean_at_a_temperature():
    "Softened with the loss's T, the answer is the mean of the softened"
    preds = logits()
    found = Ensemble([nn.Identity()]*2, T=4).average(preds)
    np.testing.assert_allclose((found/4).softmax(1), sum(softmax(o.numpy(), 4.) for o in preds)/2, rtol=1e-10)

def test_log_probabilities_are_exact():
    "Also where one teacher rules out what the other is sure of"
    sure, other = torch.tensor([[400., 0, -300]]), torch.tensor([[-300., 0, -torch.inf]])
    found = Ensemble([nn.Identity()]*2).average([sure, other])
    assert torch.allclose(found[:, :2], torch.tensor([[np.log(.5), np.log(.5)]], dtype=torch.float32), atol=1e-6)
    assert found[0, 2] == pytest.approx(-700 + np.log(.5), rel=1e-6)

def confidence(preds, y):
    losses = np.stack([-np.log(softmax(o.numpy())[range(len(y)), y]) for o in preds])
    return (1 - np.exp(losses)/np.exp(losses).sum(0))/(len(preds) - 1)

def test_confidence():
    preds, y = logits(3), torch.tensor([0, 4, 2, 2, 1, 3])
    found = by_confidence(preds, y)
    np.testing.assert_allclose(found[..., 0], confidence(preds, y), rtol=1e-9)
    assert torch.allclose(found.sum(0), torch.ones(6, 1, dtype=torch.float64))

def test_confidence_of_mixed_labels():
    preds, y, y1, lam = logits(), torch.tensor([0, 4, 2, 2, 1, 3]), torch.tensor([1, 1, 2, 0, 0, 4]), torch.rand(6, dtype=torch.float64)
    losses = [torch.stack([-o.log_softmax(1)[range(6), labels] for o in preds]) for labels in (y, y1)]
    expected = 1 - (lam*losses[0] + (1 - lam)*losses[1]).softmax(0)
    assert torch.allclose(by_confidence(preds, Mixed(y, y1, lam))[..., 0], expected)

@pytest.mark.parametrize('axis', [1, -1])
def test_confidence_at_each_position(axis):
    preds, y = logits(2, (4, 5, 7)), torch.randint(0, 5, (4, 7))
    y[0, 0] = -100
    turned = [o.movedim(1, axis) for o in preds]
    found = by_confidence(turned, y, axis)
    rows = [o.movedim(1, -1).flatten(0, 1) for o in preds]
    known = (y != -100).flatten()
    expected = confidence([o[known] for o in rows], y.flatten()[known])
    np.testing.assert_allclose(found.movedim(axis + 1 if axis > 0 else axis, -1).flatten(1)[:, known], expected, rtol=1e-9)
    assert torch.equal(found.movedim(axis + 1 if axis > 0 else axis, -1).flatten(1)[:, 0], torch.tensor([.5, .5], dtype=torch.float64))

# ---- In a fit

@pytest.mark.parametrize('given', [list, tuple, lambda o: Ensemble(o)], ids=['list', 'tuple', 'Ensemble'])
def test_fit(given):
    "As by hand with the mean of probabilities; no teacher is touched"
    teachers, found, expected = two(), student(), student()
    before = [state(o) for o in teachers]
    fitted(found, KD(given(teachers), SoftTarget(T=1), weight=.5))
    class Mean(nn.Module):
        def forward(self, x): return sum(o.eval()(x).softmax(1) for o in two()).div(2).log()
    fitted(expected, ByHand(Mean(), lambda pred, teacher_pred, *fms: soft_target(pred, teacher_pred, 1.)))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6
    assert all(is_unchanged(o, b) for o, b in zip(teachers, before)) and all(n_hooks(o) == 0 for o in (*teachers, found.model))

def test_confidence_in_a_fit():
    "A trained teacher beside one that knows nothing: the ensemble that looks at labels is nearer to the trained one"
    def values(teacher):
        learn = student()
        learn.fit(1, 0., cbs=KD(teacher, SoftTarget(T=1)))
        return torch.tensor(learn.recorder.distillation['distillation_loss'])
    alone, alike, weighed = (values(o) for o in (trained_teacher(), two(), Ensemble(two(), weights='confidence')))
    assert (weighed - alone).abs().mean() < .5*(alike - alone).abs().mean()

def test_mixup_with_confidence():
    learn = fitted(student(), [KD(Ensemble(two(), weights='confidence'), SoftTarget), MixUp()])
    assert all(torch.isfinite(torch.tensor(learn.recorder.distillation['distillation_loss'])))

def test_layers_of_all():
    "Each is named with the place of its teacher"
    teachers, seen = two(), []
    def compare(fm_s, fm_t):
        seen.append([value.shape[1] for value in fm_t.values()])
        return sum(o.mean() for o in fm_s.values())
    student().fit(1, cbs=KD(teachers, compare, ['block2', 'block1'], ['0.block2', '1.block1']))
    assert seen[-1] == [32, 8]
    learn = fitted(student(), KD(teachers, FitNet() , ['block2', 'block2'], ['0.block2', '1.block2']))
    values = learn.recorder.distillation['distillation_loss']
    assert values[-1] < values[0]

def test_only_the_teachers_that_are_asked_run():
    "For activations of the second, the first has nothing to do"
    teachers, seen = two(), []
    for i, teacher in enumerate(teachers): teacher.register_forward_pre_hook(lambda *args, i=i: seen.append(i))
    student().fit(1, cbs=KD(teachers, FitNet(), 'block2', '1.block2'))
    assert set(seen) == {1}

def test_learners_among_them():
    "Each speaks the student's language"
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    turned = trained_teacher()
    turned.head[3].weight.data, turned.head[3].bias.data = turned.head[3].weight.data[order], turned.head[3].bias.data[order]
    teachers = [named_learner(turned, ''.join('abcdefghij'[i] for i in order)), trained_teacher()]
    found, expected = (named_learner(seeded(convnet, 4), opt_func=SGD) for _ in range(2))
    with pytest.warns(UserWarning, match='in another order'): fitted(found, KD(teachers, SoftTarget))
    fitted(expected, KD(trained_teacher(), SoftTarget))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6

def test_with_a_cache():
    "Around the ensemble or within it, training goes the same way, and each teacher answers once"
    def run(teacher, seen):
        for model in teacher.modules(): model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        return weights(fitted(student(), KD(teacher, SoftTarget), n_epoch=3).model)
    counts = [], [], []
    live = run(Ensemble(two()), counts[0])
    around, within = run(CachedTeacher(Ensemble(two())), counts[1]), run(Ensemble([CachedTeacher(o) for o in two()]), counts[2])
    assert furthest(live, around) < 1e-6 and furthest(live, within) < 1e-6
    assert sum(counts[0]) > 600 and [*map(sum, counts[1:])] == 2*[2*(100 + 1 + 3*N_CONTROL)] # with the probe, and control samples

def test_nested():
    "An ensemble of an ensemble"
    a, b = two()
    nested, flat = Ensemble([Ensemble([a, b]), a]), Ensemble([a, b], weights=[3, 1])
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(nested.outputs((x,))[0], flat.outputs((x,))[0], atol=1e-5)
    assert nested.outputs((x,), ['0.1.block2'])[1]['0.1.block2'].shape == (4, 16, 4, 4)

def test_each_part_has_a_teacher_of_its_own():
    "One part learns from the first teacher, another from the second, a third from their mean"
    first, second = two()
    loss = SoftTarget(T=2).on(teacher_pred='0') + 3*SoftTarget(T=8).on(teacher_pred='1') + SoftTarget(T=5)
    def by_hand(pred, of_first, *fms):
        with torch.no_grad(): preds = [model.eval()(by_hand.x) for model in (first, second)]
        return soft_target(pred, preds[0], 2) + 3*soft_target(pred, preds[1], 8) + soft_target(pred, average(preds), 5)
    def average(preds): return sum(o.softmax(1) for o in preds).div(2).log()
    class Both(ByHand):
        def after_loss(self):
            by_hand.x = self.x
            super().after_loss()
    found, expected = student(), student()
    fitted(found, KD(Ensemble([first, second]), loss))
    fitted(expected, Both(first, by_hand))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6
    columns = [name for name in found.recorder.distillation if name.startswith('soft')]
    assert columns == ['soft_target_loss', 'soft_target_loss_2', 'soft_target_loss_3']

def test_one_voice_only():
    "Where every part has a teacher of its own, the mean is not computed, and shapes need not agree"
    other = convnet(4, n_out=7)
    student().fit(1, cbs=KD(Ensemble([trained_teacher(), other]), SoftTarget().on(teacher_pred='0')))
    said = error_of(ValueError, student(), KD(Ensemble([trained_teacher(), other]), SoftTarget().on(teacher_pred='1')))
    assert 'the student predicts 10 classes and the teacher 7' in said

class Echo(Teacher):
    "Says what it hears from the student"
    wants = 'student_pred', 'fm_s'
    def __init__(self): self.heard = []
    def student_layers(self, layers): return layers
    def outputs(self, xb, layers=(), pred=True, *, student_pred, fm_s):
        self.heard.append((student_pred, fm_s))
        return student_pred, {name: fm_s[name] for name in layers}

@pytest.mark.parametrize('around,place,own', [(lambda echo: echo, 'block2', SoftTarget()),
    (lambda echo: Ensemble([trained_teacher(), echo]), '1.block2', SoftTarget().on(teacher_pred='1'))], ids=['alone', 'in an ensemble'])
def test_a_teacher_that_hears_the_student(around, place, own):
    "It gets the batch's predictions and the layers that it needs, without a graph, and the student learns from them"
    echo, learn = Echo(), student()
    fitted(learn, KD(around(echo), FitNet().on('block1', place) + own), n_epoch=1)
    pred, fm_s = echo.heard[-1]
    assert len(echo.heard) == 1 + 4 and len(pred) == 25 and list(fm_s) == ['block1', 'block2'] and fm_s['block2'].shape == (25, 8, 4, 4)
    assert not pred.requires_grad and not any(o.requires_grad for o in fm_s.values())

# ---- What is refused, before the first step

def test_other_classes():
    said = error_of(ValueError, student(), KD([trained_teacher(), convnet(4, n_out=7)], SoftTarget))
    assert 'predict other classes or positions: [(1, 10), (1, 7)]' in said

def test_layers_of_nobody():
    said = error_of(ValueError, student(), KD(two(), Attention, 'block2', 'block2'))
    assert "the ensemble has no layer 'block2': names begin with the place of a teacher, 0 to 1" in said
    assert "nearest: block2" in error_of(ValueError, student(), KD(two(), Attention, 'block2', '0.blok2'))

@pytest.mark.parametrize('wrong,exc', [([], ValueError), ([1], TypeError), ([SoftTarget()], TypeError)], ids=str)
def test_no_teachers(wrong, exc):
    with pytest.raises(exc): student().fit(1, cbs=KD(wrong, SoftTarget))

@pytest.mark.parametrize('make', [lambda a, b: Ensemble(a, b), lambda a, b: Ensemble(learner(a), b), lambda a, b: Ensemble(Frozen(a), b),
    lambda a, b: Ensemble(nn.Sequential(a, b))], ids=['module', 'learner', 'teacher', 'sequential'])
def test_teachers_come_in_a_list(make):
    "Layers of a `Sequential` are no teachers; the entries of a `ModuleList` are"
    with pytest.raises(TypeError, match=r'in a list: Ensemble\(\[first, second\]\)'): make(*two())
    assert len(Ensemble(nn.ModuleList(two())).teachers) == 2

@pytest.mark.parametrize('ask', [lambda: Ensemble([trained_teacher(), MeanTeacher]), lambda: KD(MeanTeacher, SoftTarget),
    lambda: KD([MeanTeacher], SoftTarget)], ids=['in an ensemble', 'alone', 'in a list'])
def test_a_class_is_no_teacher(ask):
    with pytest.raises(TypeError, match=r'the class MeanTeacher \(write MeanTeacher\(\)\)'): ask()

def test_the_student_among_them():
    learn = student()
    assert 'the teacher is the student' in error_of(ValueError, learn, KD([trained_teacher(), learn.model], SoftTarget))

def test_confidence_without_classes():
    x = torch.randn(40, 1, 8, 8)
    from fastai.basics import BCEWithLogitsLossFlat
    from helpers import loaders, quiet, Learner
    learn = quiet(Learner(loaders(list(zip(x, torch.rand(40, 10)))), seeded(convnet, 4), BCEWithLogitsLossFlat()))
    assert "needs a class for each position" in error_of(ValueError, learn, KD(Ensemble(two(), weights='confidence'), BinaryKD))

def test_confidence_in_a_cache():
    with pytest.raises(TypeError): CachedTeacher(Ensemble(two(), weights='confidence'))

def test_logits_are_the_students():
    "A teacher that is a `Teacher` has its own; what is given finds the student's prediction"
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(convnet, 4)
        def forward(self, x): return dict(hidden=x.flatten(1), scores=self.net(x))
    scores = lambda output: output['scores']
    found = learner(Wrapped(), loss_func=lambda output, y: nn.functional.cross_entropy(scores(output), y), metrics=[], opt_func=SGD)
    fitted(found, KD(Ensemble([trained_teacher()]), SoftTarget, logits=scores))
    expected = fitted(student(), KD(trained_teacher(), SoftTarget))
    assert furthest(weights(found.model.net), weights(expected.model)) < 1e-6
