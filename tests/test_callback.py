"What the callback computes, against hand-written training and hand computations."
import numpy as np, pytest, torch, torch.nn.functional as F, warnings
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, SGD
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedLin
from fastai.metrics import accuracy, top_k_accuracy
from fastai.torch_core import TensorImage, TensorMask
from fastai.callback.training import GradientAccumulation
from fastkd.all import *
from functools import partial
from helpers import (At, ByHand, attention, convnet, digits, error_of, fitted, furthest, learner, loaders, messages, quiet, same,
    seeded, soft_target, trained_teacher, weights)
from collections import OrderedDict
from types import SimpleNamespace
from torch import nn

BLOCKS = ['block1', 'block2']

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

# ---- The same numbers as by hand

def student(p=0., **kwargs): return learner(seeded(convnet, 4, p), **kwargs)
def steady_student(): return learner(opt_func=SGD) # Adam would turn a rounding error of a gradient that is 0 into a step

def test_hundred_steps_of_a_sum():
    "Attention on two pairs, one of them with layers whose values the next layer overwrites"
    def by_hand(pred, teacher_pred, fm_s, fm_t):
        of_maps = sum(attention(fm_s[name], fm_t[name]) for name in ('block1.1', 'block2'))
        return soft_target(pred, teacher_pred) + 1000*of_maps
    layers, found, expected, teacher = ['block1.1', 'block2'], steady_student(), steady_student(), trained_teacher()
    fitted(found, KD(teacher, SoftTarget() + 1000*Attention(), layers, layers), n_epoch=25)
    fitted(expected, ByHand(teacher, by_hand, layers_s=layers, layers_t=layers), n_epoch=25)
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6

def test_task_weight():
    "A weight of its own for the task: `task + 3·distillation`"
    found = fitted(steady_student(), KD(trained_teacher(), Logits, weight=3., task_weight=1.))
    mse = lambda pred, teacher_pred, *fms: F.mse_loss(pred, teacher_pred)
    expected = fitted(steady_student(), ByHand(trained_teacher(), mse, 3., task_weight=1.))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6

@pytest.mark.parametrize('weight,task_weight', [(1., None), (1., 0.)])
def test_only_the_teacher(weight, task_weight):
    "The labels do not matter: a student learns as well from samples whose labels are wrong"
    wrong = [(x, (y + 1)%10) for x, y in digits()[:100]]
    right, other = student(), student()
    other.dls = loaders(wrong)
    for learn in right, other: fitted(learn, KD(trained_teacher(), SoftTarget, weight=weight, task_weight=task_weight))
    assert same(weights(right.model), weights(other.model))

def test_schedule_of_a_temperature_and_of_parts():
    "T falls from 8 to 1, the power of the attention and its factor rise"
    class Scheduled(ByHand):
        "Numbers that follow the share of training"
        def after_loss(self):
            T, p, factor = 8 - 7*self.pct_train, 1 + 2*self.pct_train, 500*self.pct_train
            def maps(o): return F.normalize(o.abs().pow(p).mean(1).flatten(1))
            self.loss = lambda pred, teacher_pred, fm_s, fm_t: (soft_target(pred, teacher_pred, T)
                + factor*(maps(fm_s['block2']) - maps(fm_t['block2'])).pow(2).mean())
            super().after_loss()
    loss = SoftTarget() + Attention().on('block2', 'block2')
    schedule = {'T': SchedLin(8, 1), 'attention.p': SchedLin(1, 3), 'attention.factor': SchedLin(0, 500)}
    teacher = trained_teacher()
    cb = KD(teacher, loss, schedule=schedule)
    found = fitted(steady_student(), cb, n_epoch=5)
    expected = fitted(steady_student(), Scheduled(teacher, None, layers_s=['block2'], layers_t=['block2']), n_epoch=5)
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6
    assert found.recorder.distillation['T'] == pytest.approx([8 - 7*i/20 for i in range(20)])
    assert found.recorder.distillation['attention.factor'] == pytest.approx([500*i/20 for i in range(20)])
    assert (cb.loss.parts[0].loss.T, cb.loss.parts[1].loss.p, cb.loss.parts[1].factor) == (5, 2, 1) # given back

# ---- Weight 0

FEATURES = dict(response=lambda: KD(trained_teacher(), SoftTarget, weight=0.),
    schedule=lambda: KD(trained_teacher(), SoftTarget, schedule=lambda pct: 0.),
    features=lambda: KD(trained_teacher(), 100*FitNet().on(BLOCKS, BLOCKS) + Attention().on('block1.1', 'block1.1'), weight=0.))

@pytest.mark.parametrize('mix', [lambda: [], lambda: [MixUp()], lambda: [CutMix()]], ids=['plain', 'mixup', 'cutmix'])
@pytest.mark.parametrize('make', FEATURES.values(), ids=FEATURES)
def test_weight_zero(make, mix):
    "Bit for bit plain training, with batch norm and dropout"
    plain, silent = student(.5), student(.5)
    fitted(plain, mix(), n_epoch=3)
    fitted(silent, [*mix(), make()], n_epoch=3)
    assert same(weights(plain.model), weights(silent.model))
    assert all(torch.equal(plain.opt.state[p]['grad_avg'], silent.opt.state[q]['grad_avg'])
        for p, q in zip(plain.model.parameters(), silent.model.parameters()))
    assert [o[:3] for o in plain.recorder.values] == [o[:3] for o in silent.recorder.values]
    assert plain.recorder.losses == silent.recorder.losses

def test_weight_zero_still_measures():
    learn = student()
    learn.fit(1, 0., cbs=KD(trained_teacher(), SoftTarget, weight=0.))
    assert learn.recorder.distillation['distillation_loss'][0] > 0

# ---- Columns

def test_columns():
    "Names, order and values: means over the training batches of what a hand computation gives"
    seen = []
    class Watch(ByHand):
        "Compute what the columns show, and change nothing"
        order = 4
        def after_loss(self):
            loss, grad = self.learn.loss, self.learn.loss_grad
            super().after_loss()
            y = self.y
            agree = (self.pred.argmax(1) == self.teacher_pred.argmax(1)).float().mean()
            seen.append([grad, self.soft + 1000*self.att, self.soft, self.att, accuracy(self.teacher_pred, y), agree])
            self.learn.loss, self.learn.loss_grad = loss, grad
        def compare(self, pred, teacher_pred, fm_s, fm_t):
            self.teacher_pred, self.soft = teacher_pred, soft_target(pred, teacher_pred)
            self.att = attention(fm_s['block2'], fm_t['block2'])
            return self.soft
    watch = Watch(trained_teacher(), None, layers_s=['block2'], layers_t=['block2'])
    watch.loss = watch.compare
    learn, loss = student(), SoftTarget() + 1000*Attention()
    fitted(learn, [watch, KD(trained_teacher(), loss, 'block2', 'block2', teacher_metrics=True)])
    names = ['task_loss', 'distillation_loss', 'soft_target_loss', 'attention_loss', 'teacher_accuracy', 'teacher_agreement']
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *names, 'time']
    means = torch.tensor(seen).view(2, 4, 6).mean(1)
    for row, expected in zip(learn.recorder.values, means): assert list(row[3:]) == pytest.approx(expected.tolist(), rel=1e-5)
    steps = learn.recorder.distillation
    for i, name in enumerate(names[:4]): assert [float(o) for o in steps[name]] == pytest.approx([float(o[i]) for o in seen], rel=1e-5)
    assert steps['weight'] == [.5]*8

def test_train_loss_is_the_blend():
    learn = fitted(student(), KD(trained_teacher(), SoftTarget, weight=.25), n_epoch=1)
    steps, smooth = learn.recorder.distillation, 0.
    for task, distillation in zip(steps['task_loss'], steps['distillation_loss']): smooth = .98*smooth + .02*(.75*task + .25*distillation)
    assert learn.recorder.values[-1][0] == pytest.approx(float(smooth)/(1 - .98**4), rel=1e-5)

def test_columns_of_two_of_a_kind():
    loss = SoftTarget() + Attention().on('block1', 'block1') + Attention(p=4).on('block2', 'block2')
    learn = fitted(student(), KD(trained_teacher(), loss), n_epoch=1)
    names = ['task_loss', 'distillation_loss', 'soft_target_loss', 'attention_loss', 'attention_loss_2']
    assert list(learn.recorder.metric_names[4:-1]) == names

@pytest.mark.parametrize('metric', [partial(top_k_accuracy, k=2), top_k_accuracy], ids=['partial', 'function'])
def test_teacher_metrics(metric):
    "The metrics that are shown for the teacher may be written as those of a learner"
    learn = fitted(student(), KD(trained_teacher(), SoftTarget, teacher_metrics=[metric]), n_epoch=1)
    assert list(learn.recorder.metric_names[-3:-1]) == ['teacher_top_k_accuracy', 'teacher_agreement']
    assert .9 < learn.recorder.values[-1][-2] <= 1

def test_recorded_values_stay_what_they_were():
    "Though gradient accumulation scales the loss in place, and nothing of the graph is kept"
    seen, note = [], At('after_loss', lambda learn: seen.append(float(learn.loss_grad)) if learn.training else None, 4, 0)
    learn = fitted(student(), [note, GradientAccumulation(100), KD(trained_teacher(), SoftTarget, weight=0.)], n_epoch=1)
    assert [float(o) for o in learn.recorder.distillation['task_loss']] == seen
    assert not any(o.requires_grad for values in learn.recorder.distillation.values() for o in values if isinstance(o, torch.Tensor))

# ---- What losses ask for

def test_functions_ask_by_name():
    "Labels and activations, each what the batch has"
    seen = {}
    def ask_target(pred, target):
        seen['target'] = target
        return F.cross_entropy(pred, target)
    def ask_fm_s(fm_s):
        seen['fm_s'] = list(fm_s)
        return sum(o.mean() for o in fm_s.values())
    def ask_all(pred, **kwargs):
        seen['all'] = sorted(kwargs)
        return pred.mean()
    batches, loss = [], as_sum(ask_target) + ask_fm_s + ask_all
    note = At('before_batch', lambda learn: batches.append(learn.y) if learn.training else None, 99, 0)
    fitted(student(), [note, KD(trained_teacher(), loss, BLOCKS, BLOCKS)], n_epoch=1)
    assert torch.equal(seen['target'], batches[-1])
    assert (seen['fm_s'], seen['all']) == (BLOCKS, ['axis', 'fm_s', 'fm_t', 'index', 'mask', 'target', 'teacher_pred'])

@pytest.mark.parametrize('num_workers', [0, 2])
def test_positions_in_the_dataset(num_workers):
    "Shuffled anew in each epoch, and by worker processes too"
    learn, seen = student(), []
    learn.dls = DataLoaders.from_dsets(digits()[:90], digits()[:25], bs=25, num_workers=num_workers, device='cpu')
    def ask_index(pred, index):
        seen.append((index, learn.xb[0]))
        return pred.mean()
    fitted(learn, KD(trained_teacher(), ask_index), n_epoch=2)
    assert len(seen) == 6 and not torch.equal(seen[0][0], seen[3][0])
    for index, x in seen: assert torch.equal(torch.stack([digits()[i][0] for i in index]), x)

def test_loss_that_asks_for_nothing_of_the_teacher_leaves_it_alone():
    calls, teacher = [], trained_teacher()
    teacher.register_forward_hook(lambda *args: calls.append(1))
    fitted(student(), KD(teacher, lambda pred: pred.pow(2).mean()), n_epoch=1)
    assert calls == []

def test_teacher_stops_after_the_last_layer():
    calls, teacher = [], trained_teacher()
    teacher.head.register_forward_hook(lambda *args: calls.append(1))
    fitted(student(), KD(teacher, 1000*Attention(), 'block1', 'block1'), n_epoch=2)
    assert len(calls) == 1 # the probe, which has to see all

# ---- Kinds of outputs, inputs and data

def masked_kl(pred, teacher_pred, keep, T):
    "Mean over the kept rows, written with loops"
    rows = [soft_target(s[None], t[None], T) for s, t, k in zip(pred, teacher_pred, keep) if k]
    return sum(rows)/len(rows)

def distillation_losses(dls, model, loss_func, **kwargs):
    "The first distillation loss of a fit, and what it is made of"
    learn, seen = quiet(Learner(dls, model, loss_func)), {}
    note = At('after_loss', lambda learn: seen.update(xb=learn.xb, yb=learn.yb, pred=learn.pred.detach().clone()), 4)
    learn.fit(1, 0., cbs=[note, KD(**kwargs)])
    return float(learn.recorder.distillation['distillation_loss'][0]), SimpleNamespace(**seen)

def sequences():
    "Token labels of which some are ignored, and the classes in the last dimension"
    torch.manual_seed(0)
    tokens, y = torch.randint(1, 20, (16, 6)), torch.randint(0, 5, (16, 6))
    y[torch.rand(16, 6) < .4], tokens[:, 4:] = -100, 0
    return loaders(list(zip(tokens, y)), bs=16)

def tagger(width): return nn.Sequential(nn.Embedding(20, width), nn.Linear(width, 5))

def test_sequences_count_where_labels_do():
    "`axis=-1`: ignored labels count neither in the task nor in the distillation, unless `mask=` says what counts"
    for mask in None, lambda tokens: tokens != 0:
        teacher = seeded(tagger, 8, seed=2)
        settings = dict(teacher=teacher, loss=SoftTarget(T=2), mask=mask)
        value, seen = distillation_losses(sequences(), seeded(tagger, 4), CrossEntropyLossFlat(axis=-1), **settings)
        keep = (seen.yb[0] != -100) if mask is None else seen.xb[0] != 0
        expected = masked_kl(seen.pred.flatten(0, 1), teacher(*seen.xb).detach().flatten(0, 1), keep.flatten(), 2.)
        assert value == pytest.approx(float(expected), rel=1e-5)

@pytest.mark.parametrize('image,mask', [(torch.Tensor, torch.Tensor), (TensorImage, TensorMask)], ids=['tensors', 'images'])
def test_segmentation_counts_where_labels_do(image, mask):
    "`axis=1`, and one of the classes ignored; also with fastai's own types of tensors"
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 6, 6), torch.randint(0, 4, (8, 6, 6))
    dls = loaders([(a.as_subclass(image), b.as_subclass(mask)) for a, b in zip(x, y)], bs=8)
    teacher, student = seeded(nn.Conv2d, 3, 4, 3, padding=1, seed=2), seeded(nn.Conv2d, 3, 4, 1)
    value, seen = distillation_losses(dls, student, CrossEntropyLossFlat(axis=1, ignore_index=3), teacher=teacher, loss=SoftTarget(T=2))
    rows = [o.as_subclass(torch.Tensor).detach().movedim(1, -1).flatten(0, 2) for o in (seen.pred, teacher(*seen.xb))]
    expected = masked_kl(*rows, (seen.yb[0].as_subclass(torch.Tensor) != 3).flatten(), 2.)
    assert value == pytest.approx(float(expected), rel=1e-5)

@pytest.mark.parametrize('ignore,n', [(-100, 5), (4, 5)])
def test_ignored_batch(ignore, n):
    "Where no position counts, distillation is 0 and weights stay finite"
    dls = loaders([(x, torch.full((6,), ignore)) for x in torch.randint(1, 20, (8, 6))], bs=8)
    func = lambda pred, y: F.cross_entropy(pred.flatten(0, 1), y.flatten(), ignore_index=ignore, reduction='sum')
    learn = quiet(Learner(dls, seeded(tagger, 4), func))
    learn.loss_func.ignore_index = ignore
    learn.loss_func.axis = -1
    learn.fit(1, cbs=KD(seeded(tagger, 8), SoftTarget))
    assert learn.recorder.distillation['distillation_loss'][0] == 0
    assert all(p.isfinite().all() for p in learn.model.parameters())

# ---- Warnings

HEALTHY = dict(soft_target=lambda: SoftTarget(T=4), sum=lambda: SoftTarget(T=4) + (30*Attention()).on(BLOCKS, BLOCKS)
    + (3*FitNet()).on('block2', 'block2') + (30000*PKT()).on('head.1', 'head.1'), logits=Logits)

@pytest.mark.parametrize('loss', HEALTHY.values(), ids=HEALTHY)
def test_nothing_is_said_of_what_works(loss): assert messages(student(), KD(trained_teacher(), loss()), n_fits=2) == []

def test_advice_is_given_once():
    said = messages(student(), KD(seeded(convnet, 16), 10*SoftTarget() + Attention(), BLOCKS, BLOCKS, weight=.02), n_fits=2)
    assert ['the teacher is right on' in o for o in said] == [True, False]
    assert '1000*Attention(p=2), would drown the labels here. For a tenth of the task loss, the factor is' in said[1]

def test_a_part_that_drowns_the_labels():
    "The usual factor is one for large maps; on 8x8 pictures it is named, with one that fits"
    said = messages(student(), KD(trained_teacher(), SoftTarget(T=4) + 1000*Attention(), BLOCKS, BLOCKS))
    assert len(said) == 1 and 'so the labels hardly count' in said[0] and '1000*Attention(p=2)' in said[0]
    factor = float(said[0].split('the factor is ')[1].split(':')[0])
    assert 1 < factor < 100 and messages(student(), KD(trained_teacher(), SoftTarget(T=4) + factor*Attention(), BLOCKS, BLOCKS)) == []

def test_a_part_of_factor_zero_is_meant_so():
    assert messages(student(), KD(trained_teacher(), SoftTarget(T=4) + 0*Attention(), BLOCKS, BLOCKS)) == []

@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_models_that_end_in_a_softmax(side):
    models = dict(student=seeded(convnet, 4), teacher=trained_teacher())
    models[side] = nn.Sequential(OrderedDict(models[side].named_children(), softmax=nn.Softmax(1)))
    said = messages(learner(models['student']), KD(models['teacher'], SoftTarget))
    assert [f"the {side}'s predictions are probabilities" in o for o in said].count(True) == 1

@pytest.mark.parametrize('n', [1, 2, 3])
def test_the_same_distillation_twice(n):
    "As when a notebook's cell with `add_cb` runs again; two different ones are no mistake"
    teacher, learn = trained_teacher(), student()
    for _ in range(n): learn.add_cb(KD(teacher, SoftTarget(T=4)))
    said = messages(learn, KD(teacher, SoftTarget(T=2)))
    assert [f'is in this fit {n} times' in o for o in said] == [True]*(n > 1)

def test_task_weight_holds_while_the_weight_is_zero():
    "Distillation alone with a warm-up: labels do not count before it begins either"
    learn, seen = student(), []
    def ramp(pct): return 0. if pct < .5 else .5
    note = At('before_backward', lambda learn: seen.append(float(learn.loss_grad.detach())), 99, 0)
    learn.fit(1, cbs=[KD(trained_teacher(), SoftTarget, task_weight=0., schedule={'weight': ramp}), note])
    values = learn.recorder.distillation
    assert seen == pytest.approx([w*d for w, d in zip(values['weight'], values['distillation_loss'])], rel=1e-5) and seen[0] == 0

def test_numbers_of_numpy():
    "As a loop over `np.linspace` gives them"
    found, expected = (fitted(student(), KD(trained_teacher(), SoftTarget, weight=weight), n_epoch=1) for weight in (np.float64(.3), .3))
    assert same(weights(found.model), weights(expected.model))

def test_a_loss_of_one_element():
    "Is taken for a scalar"
    learn = fitted(student(), KD(trained_teacher(), lambda pred, teacher_pred: (pred - teacher_pred).pow(2).mean()[None]), n_epoch=1)
    assert all(isinstance(value, float) for value in learn.recorder.distillation['distillation_loss'])

def test_another_loss_on_the_same_callback():
    cb = KD(trained_teacher(), SoftTarget)
    cb.loss = Logits
    assert fitted(student(), cb, n_epoch=1).recorder.distillation['distillation_loss'][0] > 0

def test_only_the_first_batch_is_looked_at(monkeypatch):
    "Advice costs two backward passes, and a part that has been learned is quiet for a good reason"
    import fastkd.callback
    calls = []
    monkeypatch.setattr(fastkd.callback, 'unbalanced_parts', lambda *args: calls.append(1) or {})
    fitted(student(), KD(trained_teacher(), SoftTarget), n_epoch=3)
    assert calls == [1]

def test_a_schedule_that_begins_at_zero_gets_the_same_advice():
    "Also with gradient accumulation, which scales the loss in place"
    for cbs in [], [GradientAccumulation(1000)]:
        for schedule in None, cos:
            said = messages(student(), *cbs, KD(trained_teacher(), Attention(), 'block2', 'block2', .02, schedule))
            assert len(said) == 1 and '1000*Attention(p=2)' in said[0]
            factor = float(said[0].split('the factor is ')[1].split(':')[0])
            assert 10 < factor < 100
            assert messages(student(), *cbs, KD(trained_teacher(), factor*Attention(), 'block2', 'block2', .02, schedule)) == []

def test_ignored_labels_are_no_chance():
    "A teacher that is right wherever labels count is not at chance"
    x = torch.randint(1, 20, (32, 6))
    y = torch.where(torch.rand(32, 6) < .1, x%2, -100)
    teacher = nn.Embedding.from_pretrained(F.one_hot(torch.arange(20)%2).float()*9, freeze=False)
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 2))
    learn = quiet(Learner(loaders(list(zip(x, y)), bs=32), model, CrossEntropyLossFlat(axis=-1)))
    assert messages(learn, KD(teacher, SoftTarget)) == []

@pytest.mark.parametrize('loss,quiet_about_it', [(SoftTarget, False), (DIST, False), (HardLabel, False), (BinaryKD, True), (Logits, True)])
def test_labels_that_coexist(loss, quiet_about_it):
    "A softmax over classes that do not exclude each other is worth a warning that names the loss to take"
    x = torch.randn(64, 6)
    y = (x[:, :3] > 0).float()
    learn = quiet(Learner(loaders(list(zip(x, y)), bs=32), nn.Linear(6, 3), BCEWithLogitsLossFlat()))
    said = [message for message in messages(learn, KD(nn.Linear(6, 3), loss)) if 'softmax distributions' in message]
    assert len(said) == (0 if quiet_about_it else 1)
    assert quiet_about_it or 'take BinaryKD(T=2) for multi-label models' in said[0]

def test_attention_at_half_on_resnets():
    "Values of attention are small: the usual factor is 1000"
    from torchvision.models import resnet18
    torch.manual_seed(0)
    samples = list(zip(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))))
    learn = quiet(Learner(loaders(samples, bs=4), seeded(resnet18, num_classes=10), CrossEntropyLossFlat()))
    cb = KD(seeded(resnet18, num_classes=10, seed=1), Attention, 'layer2', 'layer2', weight=.5)
    with pytest.warns(UserWarning, match=r'loss=1000\*Attention\(p=2\)'): learn.fit(1, cbs=cb)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1, cbs=cb)

def test_mask_that_nobody_uses():
    "Losses on whole activations cannot leave positions out, and say so"
    cb = KD(trained_teacher(), 100*FitNet(), BLOCKS, BLOCKS, mask=lambda x: torch.ones(len(x)).bool())
    with pytest.warns(UserWarning, match='compares whole activations: mask= leaves nothing out'): fitted(student(), cb, n_epoch=1)

@pytest.mark.parametrize('func', [partial(F.cross_entropy, ignore_index=3), torch.nn.CrossEntropyLoss(ignore_index=3),
    CrossEntropyLossFlat(ignore_index=3)], ids=['partial', 'torch', 'fastai'])
def test_every_way_to_ignore_labels(func):
    "Samples of class 3 are left out of the distillation"
    seen = []
    def ask_mask(pred, mask):
        seen.append((mask, learn.y))
        return pred.mean()
    learn = student(loss_func=func)
    fitted(learn, KD(trained_teacher(), ask_mask), n_epoch=1)
    for mask, y in seen: assert torch.equal(mask, y != 3)

class RulesOut(nn.Module):
    "A teacher that rules a class out"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x): return self.model(x).index_fill(1, torch.tensor([7]), -torch.inf)

def test_teacher_that_rules_out_a_class():
    learn = fitted(student(), KD(RulesOut(trained_teacher()), SoftTarget), n_epoch=1)
    assert torch.tensor(learn.recorder.distillation['distillation_loss']).isfinite().all()

def test_an_annealer_that_is_meant_for_the_temperature():
    "A weight of 8 is said to be one, unless the task loss has a weight of its own"
    kd = lambda **kwargs: KnowledgeDistillationCallback(trained_teacher(), SoftTarget(T=4), **kwargs)
    for curve, said in (SchedLin(8, 1), 'SchedLin(8, 1)'), (Stages(SchedLin(8, 1), 5), 'Stages(SchedLin(8, 1), 5)'):
        message = error_of(ValueError, learner(), kd(schedule=curve))
        assert "weight 8 leaves a negative weight" in message and f"If that is a temperature: schedule={{'T': {said}}}" in message
    messages = [error_of(ValueError, learner(), o) for o in (kd(weight=1.5), kd(weight=2, schedule=cos))]
    assert 'temperature' not in ''.join(messages)
    learner().fit(1, cbs=kd(schedule=SchedLin(8, 1), task_weight=1.))

def test_stages_in_a_fit():
    "Weight and temperature of each step"
    learn, schedule = learner(), {'T': Stages(SchedLin(10, 1), 4), 'weight': Stages(SchedLin(.5, 1), 2)}
    learn.fit(2, cbs=KnowledgeDistillationCallback(trained_teacher(), SoftTarget, schedule=schedule))
    found = learn.recorder.distillation
    assert found['T'] == [10, 10, 7, 7, 4, 4, 1, 1] and found['weight'] == [.5]*4 + [1.]*4
    assert found['task_loss'][7] > 0 and learn.recorder.distillation['weight'][-1] == 1
    learn.fit(2, cbs=KnowledgeDistillationCallback(trained_teacher(), SoftTarget, weight=.8, schedule=Stages(cos, 2)))
    assert learn.recorder.distillation['weight'] == [0.]*4 + [.8]*4

# ---- What is drawn

def drawn(axs): return {ax.get_title(): len(ax.lines[0].get_xdata()) for ax in axs}

def test_curves_of_a_fit():
    "What moved, and the validation loss of each epoch; anything by name; nothing of a later fit"
    learn = learner()
    with pytest.raises(ValueError, match='nothing was distilled yet'): learn.recorder.plot_distillation()
    learn.fit(3, 1e-2, cbs=KD(trained_teacher(), SoftTarget(T=4), schedule=lin))
    assert drawn(learn.recorder.plot_distillation()) == dict(weight=12, task_loss=12, distillation_loss=12, valid_loss=3)
    assert drawn(learn.recorder.plot_distillation(['accuracy', 'weight'], skip_start=5)) == dict(accuracy=2, weight=7)
    with pytest.raises(ValueError, match="'loss' was not recorded; what was: train_loss"): learn.recorder.plot_distillation('loss')
    learn.fit(1, 1e-2)
    assert 'valid_loss' not in drawn(learn.recorder.plot_distillation())

def test_what_stays_is_not_drawn():
    learn = learner()
    learn.fit(1, 1e-2, cbs=KD(trained_teacher(), SoftTarget(T=4)))
    assert [*drawn(learn.recorder.plot_distillation())] == ['task_loss', 'distillation_loss', 'valid_loss']
