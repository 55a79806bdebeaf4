"Together with fastai's own callbacks, and with callbacks that do what people's callbacks do."
import copy, csv, pytest, torch
from fastai.basics import Callback, OptimWrapper, SGD
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastkd.all import *
from functools import partial
from helpers import At, OnCPU, by_soft_target, convnet, fitted, furthest, learner, same, seeded, shows, started, trained_teacher, weights
from learning import adapters
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)
def fitnet(**kwargs): return KD(trained_teacher(), SoftTarget() + 10*FitNet().on('block2', 'block2'), **kwargs)
def soft(**kwargs): return KD(trained_teacher(), SoftTarget, **kwargs)

def gap(cbs, fit=lambda learn, cbs: learn.fit(2, 1e-2, cbs=cbs), **kwargs):
    "How far a run with the callback ends from one by hand, with `cbs()` in both"
    found, expected = [learner(opt_func=SGD, **kwargs) for _ in range(2)]
    ours, by_hand = [soft(), *cbs()], [by_soft_target(), *cbs()]
    fit(started(found), ours)
    fit(started(expected), by_hand)
    assert not torch.is_autocast_enabled('cpu')
    return furthest(weights(found.model), weights(expected.model))

class NoNorm(nn.Module):
    "A student whose samples know nothing of each other"
    def __init__(self):
        super().__init__()
        self.block2, self.head = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Linear(64, 10)

    def forward(self, x): return self.head(self.block2(x).relu().flatten(1))

# ---- Precision

@shows('learn.to_fp16().fit(5, cbs=kd)')
@pytest.mark.parametrize('mode,tol', [(AMPMode.FP16, 3e-3), (AMPMode.BF16, 3e-2)])
def test_mixed_precision(mode, tol):
    "Half precision (fp16 with its scaler, or bf16) ends close to float32; adapters stay float32, and autocast ends."
    cb, cb_half = fitnet(), fitnet()
    full, half = [learner(n=50, opt_func=SGD) for _ in range(2)]
    fitted(full, cb)
    fitted(half, [cb_half, OnCPU(mode)])
    assert 0 < furthest(weights(full.model), weights(half.model)) < tol
    assert 0 < furthest(adapters(cb), adapters(cb_half)) < tol
    assert {p.dtype for p in cb_half.loss.parameters()} == {torch.float32} and not torch.is_autocast_enabled('cpu')
    for name in 'task_loss', 'distillation_loss':
        values = [torch.tensor(learn.recorder.distillation[name]) for learn in (full, half)]
        assert torch.allclose(*values, rtol=.05) and values[1].dtype == torch.float32

class Precisions(nn.Module):
    "A teacher that notes in which precision it answers"
    def __init__(self):
        super().__init__()
        self.model, self.seen = trained_teacher(), []

    def forward(self, x):
        out = self.model(x)
        self.seen.append(out.dtype)
        return out

@shows('learn.to_fp16().fit(5, cbs=kd); learn.to_fp32().fit(5, cbs=kd)')
def test_mixed_precision_on_and_off():
    "After `to_fp32` student, teacher and adapters compute in float32 again, as in a loop written by hand."
    teacher = Precisions()
    cb = KD(teacher, SoftTarget() + 10*FitNet().on('block2', 'model.block2'))
    learn = learner(opt_func=SGD, cbs=[cb, OnCPU()])
    fitted(learn, n_epoch=1)
    assert set(teacher.seen) == {torch.float16}
    assert learn.to_fp32() is learn and not any(isinstance(o, MixedPrecision) for o in learn.cbs)
    teacher.seen.clear()
    fitted(learn)
    assert set(teacher.seen) == {torch.float32} and {p.dtype for p in cb.loss.parameters()} == {torch.float32}
    def on_and_off(learn, cbs):
        learn.fit(1, 1e-2, cbs=[*cbs, OnCPU()])
        learn.fit(1, 1e-2, cbs=cbs)
    assert gap(list, on_and_off) < 1e-3

@shows('learn.to_fp16().fit(5, cbs=kd)')
def test_mixed_precision_without_cuda():
    "On a machine without CUDA `to_fp16` changes nothing, bit for bit, and `to_fp32` neither."
    found, expected = learner(), learner()
    fitted(found.to_fp16(), fitnet())
    fitted(expected, fitnet())
    assert same(weights(found.model), weights(expected.model))
    for learn in found.to_fp32(), expected: fitted(learn, soft(), n_epoch=1)
    assert same(weights(found.model), weights(expected.model))
    assert gap(list, lambda learn, cbs: learn.to_fp16().fit(2, 1e-2, cbs=cbs)) < 1e-6

@shows('learn.to_fp16(init_scale=2.**40).fit(5, cbs=kd)')
def test_overflow_skips_the_adapters_too():
    "A step that the student skips because its gradients overflow is skipped by the adapters, too."
    cb, learn, seen = fitnet(), learner(), []
    def note(learn): seen.append((weights(nn.ModuleList(learn.model[i] for i in range(1))), adapters(cb)))
    params_of = [At('before_backward', note, 99, 0), At('after_batch', lambda learn: note(learn) if learn.training else None, 99, 0)]
    fitted(learn, [cb, OnCPU(init_scale=2.**40, growth_interval=1000), *params_of], n_epoch=7)
    stays = [torch.equal(a[0]['0.0.weight'], b[0]['0.0.weight']) for a, b in zip(seen[::2], seen[1::2])]
    assert stays == [same(a[1], b[1]) for a, b in zip(seen[::2], seen[1::2])]
    assert stays[0] and not stays[-1] and all(p.isfinite().all() for p in cb.loss.parameters())

def test_overflow_ends():
    "And training goes on, for both, once the scale fits"
    cb, learn = fitnet(), learner()
    fitted(learn, [cb, OnCPU(init_scale=2.**20, growth_interval=1000)])
    plain = fitnet()
    fitted(learner(), plain)
    assert furthest(adapters(cb), adapters(plain)) < .1 and not same(adapters(cb), adapters(plain))

@pytest.mark.parametrize('loss,match', [(lambda pred, teacher_pred: (pred - teacher_pred)**2, 'returns a scalar'),
    (lambda pred, teacher_pred: pred @ teacher_pred, 'cannot be multiplied')], ids=['no scalar', 'bad shapes'])
def test_a_failing_loss_leaves_autocast_off(loss, match):
    "Its error waits for `before_backward`: no step is taken, and the process is left as it was"
    learn = learner()
    before = dict(learn.model.named_parameters())
    before = {name: p.detach().clone() for name, p in before.items()}
    with pytest.raises((ValueError, RuntimeError), match=match): learn.fit(1, cbs=[KD(trained_teacher(), loss), OnCPU(AMPMode.BF16)])
    assert not torch.is_autocast_enabled('cpu')
    assert same(before, {name: p.detach() for name, p in learn.model.named_parameters()})

@shows('KnowledgeDistillationCallback(teacher, SoftTarget, teacher_dtype=torch.bfloat16)')
def test_teacher_in_half_precision():
    "The teacher alone computes in half precision; the student ends close to where it would."
    dtypes, teacher = [], trained_teacher()
    teacher.head[3].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    learn = fitted(learner(opt_func=SGD), KD(teacher, SoftTarget, teacher_dtype=torch.bfloat16))
    assert set(dtypes) == {torch.bfloat16}
    assert 0 < furthest(weights(learn.model), weights(fitted(learner(opt_func=SGD), KD(trained_teacher(), SoftTarget)).model)) < .01

@shows('learn.to_channelslast(use_amp=False).fit(5, cbs=kd)')
def test_channels_last():
    "Another layout of the memory changes neither the student's nor the adapters' weights, to five decimals."
    cbs, learns, untrained = [fitnet(), fitnet()], [learner(opt_func=SGD) for _ in range(2)], fitnet()
    assert any(isinstance(cb, ChannelsLast) for cb in learns[0].to_channelslast(use_amp=False).cbs)
    for learn, cb in zip(learns, cbs): fitted(learn, cb)
    assert learns[0].model.block2[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert furthest(weights(learns[0].model), weights(learns[1].model)) < 1e-5 and furthest(*map(adapters, cbs)) < 1e-5
    fitted(learner(), untrained, lr=0., n_epoch=1)
    assert furthest(adapters(cbs[0]), adapters(untrained)) > 1e-3

# ---- Gradients and optimizers

@shows('learn.fit(5, cbs=[kd, GradientAccumulation(50)])')
@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientClip(.1)]], ids=['plain', 'clipped'])
def test_accumulation_is_a_large_batch(cbs):
    "Batches that are accumulated teach the student and its adapters what one large batch teaches, to six decimals."
    def run(bs, *more, lr=.1):
        cb, learn = fitnet(), learner(seeded(NoNorm), bs=bs, opt_func=SGD)
        learn.dls.train.shuffle = False
        fitted(learn, [cb, *cbs(), *more], lr=lr)
        return weights(learn.model) | adapters(cb)
    large, still = run(50), run(50, lr=0.)
    assert not any(torch.equal(large[name], still[name]) for name in large) # adapters move, too
    assert furthest(large, run(25, GradientAccumulation(50))) < 1e-6
    assert furthest(run(100), run(20, GradientAccumulation(100))) < 1e-6

@shows('learn.fit(5, cbs=[kd, GradientClip(.1)])')
def test_clip():
    "Adapters are clipped by their own norm with the limit of the student, whose steps are those of a loop written by hand."
    cb, learn, steps = fitnet(weight=1., task_weight=1.), learner(opt_func=partial(SGD, mom=0.), wd=0.), []
    def note(learn): steps.append(adapters(cb))
    learn.fit(1, 1., cbs=[cb, GradientClip(.01), At('before_step', note, 99, 0), At('after_step', note, 99, 0)])
    assert gap(lambda: [GradientClip(.01)]) < 1e-6
    for before, after in zip(steps[::2], steps[1::2]):
        assert sum((after[name] - before[name]).pow(2).sum() for name in after)**.5 == pytest.approx(.01, rel=1e-3)

@shows('Learner(dls, student, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), cbs=kd).fit(5)')
@pytest.mark.parametrize('kind', ['class', 'instance'])
def test_torch_optimizers(kind):
    "Adapters get an optimizer of the same kind as the student, AdamW where an instance is passed, and its learning rate."
    model = seeded(convnet, 4)
    func = partial(OptimWrapper, opt=torch.optim.SGD) if kind == 'class' else OptimWrapper(model.parameters(), torch.optim.SGD, lr=.1)
    cb, learn = fitnet(), learner(model, opt_func=func)
    fitted(learn, cb)
    assert type(cb._learned.opt.opt) is (torch.optim.SGD if kind == 'class' else torch.optim.AdamW)
    assert cb._learned.opt.hypers[-1]['lr'] == learn.opt.hypers[-1]['lr'] == 1e-2
    values = learn.recorder.distillation['fit_net_loss']
    assert values[-1] < values[0]

def test_a_callback_owns_its_loss():
    "The user's loss learns nothing: the same object in two fits, or twice in a sum, is two losses with adapters of their own"
    loss = FitNet()
    cb = KD(trained_teacher(), loss.on('block1', 'block1') + loss.on('block2', 'block2'))
    fitted(learner(), cb, n_epoch=1)
    assert loss.learned is None
    assert [tuple(p.shape[:2]) for p in cb.loss.parameters() if p.ndim > 1] == [(16, 4), (32, 8)]
    equal = KD(trained_teacher(), loss.on('block2', 'block2') + loss.on('block2', 'block2'))
    learn = learner()
    learn.fit(1, 0., cbs=equal)
    first, second = [p for p in equal.loss.parameters() if p.ndim > 1]
    assert not torch.equal(first, second)

# ---- Mixed samples and soft labels

@shows('learn.fit(5, cbs=[kd, MixUp()])')
@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_samples(mix):
    "The task loss is that of both labels, and the teacher answers for the mixed picture, as in a loop written by hand."
    assert gap(lambda: [mix()]) < 1e-6

def test_teacher_sees_the_mixed_batch():
    inputs, teacher = [], trained_teacher()
    teacher.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    batches, note = [], At('after_pred', lambda learn: batches.append(learn.x) if learn.training else None, 99, 0)
    fitted(learner(), [MixUp(), note, KD(teacher, SoftTarget)], n_epoch=1)
    assert len(inputs) == 5 and all(torch.equal(a, b) for a, b in zip(inputs[1:], batches))

@shows('learn.fit(5, cbs=[KnowledgeDistillationCallback(teacher, DecoupledKD), MixUp()])')
def test_mixup_blends_both_labels():
    "A loss that asks for labels gets both, each with the share that its sample has in the picture."
    class RightShare(LabelledResponseLoss):
        "The student's probability of the label"
        def rows(self, student, teacher, target): return student.softmax(1).gather(1, target[:, None])[:, 0]
    mixup, seen = MixUp(), {}
    def note(learn): seen.update(pred=learn.pred.detach(), y=learn.y, y1=mixup.yb1[0], lam=mixup.lam)
    learn = learner()
    learn.fit(1, 0., cbs=[mixup, At('after_loss', note, 4), KD(trained_teacher(), RightShare())])
    share = seen['pred'].softmax(1)
    i = torch.arange(25)
    expected = (share[i, seen['y']]*seen['lam'] + share[i, seen['y1']]*(1 - seen['lam'])).mean()
    assert learn.recorder.distillation['distillation_loss'][0] == pytest.approx(float(expected), rel=1e-5)

@shows('Learner(dls, student, loss_func=LabelSmoothingCrossEntropyFlat(), cbs=kd).fit(5)')
def test_label_smoothing():
    "The smoothed task loss is blended as it is, alone and under MixUp."
    for cbs in list, lambda: [MixUp()]: assert gap(cbs, loss_func=LabelSmoothingCrossEntropyFlat(eps=.2)) < 1e-6

# ---- Averages, copies and looks in between

@shows('learn.fit(5, cbs=[kd, EMACallback()])')
@pytest.mark.parametrize('name', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'after_batch'])
@pytest.mark.parametrize('order', [4, 6])
def test_copies_of_the_student(name, order):
    "A callback that copies the model and runs the copy disturbs neither the student nor the adapters."
    def average(learn):
        copied = copy.deepcopy(learn.model).eval()
        with torch.no_grad(): copied(torch.zeros(3, 1, 8, 8))
        copies.append(copied)
    copies, cb, plain = [], fitnet(), fitnet()
    learn, expected = fitted(learner(), [cb, At(name, average, order, 0)], 1), fitted(learner(), plain, 1)
    assert len(copies) >= 4 and same(weights(learn.model), weights(expected.model)) and same(adapters(cb), adapters(plain))
    assert learn.recorder.distillation == expected.recorder.distillation

class Average(Callback):
    "A running average of the weights, which stands in for the student in validation"
    def before_fit(self): self.copy = copy.deepcopy(self.learn.model)
    def after_step(self): self.move(self.copy, self.learn.model, .9)
    def move(self, to, model, keep):
        for a, b in zip(to.parameters(), model.parameters()): a.data.mul_(keep).add_(b.data, alpha=1 - keep)
    def before_validate(self):
        self.own = copy.deepcopy(self.learn.model)
        self.move(self.learn.model, self.copy, 0.)
    def after_validate(self): self.move(self.learn.model, self.own, 0.)

@shows('learn.fit(5, cbs=[kd, EMACallback()])')
def test_average_of_weights():
    "A running average, swapped in for every validation, is the one that a loop written by hand gives."
    averages = []
    def add(): 
        averages.append(Average())
        return averages[-1:]
    assert gap(add) < 1e-6
    assert furthest(*[weights(cb.copy) for cb in averages]) < 1e-6 and furthest(weights(averages[0].copy), weights(averages[0].own)) > 1e-4

def test_a_callback_that_evaluates_in_between():
    "Predictions in the middle of a batch"
    def look(learn):
        if not learn.training: return
        values.append(learn.model.training)
        learn.model.eval()
        with torch.no_grad(): learn.model(torch.zeros(2, 1, 8, 8))
        learn.model.train()
    values = []
    places = [('before_batch', 4), ('before_batch', 6), ('after_pred', 6), ('after_loss', 4), ('after_loss', 6)]
    looks = [At(name, look, order, 0) for name, order in places]
    learn, expected = fitted(learner(), [fitnet(), *looks]), fitted(learner(), fitnet())
    assert values == [True]*40 and same(weights(learn.model), weights(expected.model))

def test_validation_within_a_fit():
    "`learn.validate` in `after_epoch` neither stops distillation nor adds columns"
    learn, expected = learner(), fitted(learner(), fitnet())
    fitted(learn, [fitnet(), At('after_epoch', lambda learn: learn.lock.locked() or learn.validate(), 70, 0)])
    assert same(weights(learn.model), weights(expected.model))
    assert len(learn.recorder.distillation['task_loss']) == 8

@shows('learn.fit(5, cbs=[kd, ShortEpochCallback(pct=.5)])')
def test_short_epochs():
    "The teacher is asked for the batches that there are, and the student ends where a loop written by hand ends."
    cbs = lambda: [ShortEpochCallback(pct=.5)]
    assert gap(cbs) < 1e-6
    learn = fitted(learner(), [soft(schedule=lin), *cbs()])
    assert learn.recorder.distillation['weight'] == pytest.approx([.5*i/8 for i in (0, 1, 2, 4, 5, 6)])

# ---- What watches a number

PARTS = lambda: SoftTarget() + 1000*Attention().on('block2', 'block2')

@shows("learn.fit(9, cbs=[kd, EarlyStoppingCallback('distillation_loss', patience=2)])")
@pytest.mark.parametrize('name', ['valid_loss', 'task_loss', 'distillation_loss', 'soft_target_loss', 'attention_loss'])
def test_early_stopping(name):
    "Any loss of the table can be watched, smaller is better, and the run stops when it no longer falls."
    stop = EarlyStoppingCallback(name, min_delta=100., patience=2)
    learn = fitted(learner(n=50), [stop, KD(trained_teacher(), PARTS())], n_epoch=9)
    column = learn.recorder.metric_names.index(name) - 1
    assert len(learn.recorder.values) == 3 and stop.best == learn.recorder.values[0][column]
    assert learn.recorder.values[-1][1] == pytest.approx(learn.validate()[0], abs=1e-6) # the task's, whatever is watched

@shows("learn.fit(9, cbs=[kd, SaveModelCallback('valid_loss')])")
@pytest.mark.parametrize('name', ['valid_loss', 'distillation_loss', 'attention_loss'])
def test_save_model(name, tmp_path):
    "The student of the best epoch is saved and loaded, in a file as it is without a teacher."
    learn, seen = learner(path=tmp_path), []
    def note(learn): seen.append(weights(learn.model))
    fitted(learn, [SaveModelCallback(name), At('after_epoch', note, 70, 0), KD(trained_teacher(), PARTS())], n_epoch=3, lr=.3)
    column = learn.recorder.metric_names.index(name) - 1
    values = [float(row[column]) for row in learn.recorder.values]
    best = values.index(min(values))
    assert same(weights(learn.model), seen[best])
    assert learn.recorder.values[best][1] == pytest.approx(learn.validate()[0], abs=1e-6) # the task's, whatever is watched
    assert torch.load(tmp_path/'models/model.pth', weights_only=True).keys() == convnet(4).state_dict().keys()

@shows("learn.fit(9, cbs=[kd, ReduceLROnPlateau('distillation_loss')])")
def test_reduce_on_plateau():
    "The learning rate of the student falls when the teacher's loss no longer does, and that of the adapters with it."
    cb, rates = fitnet(), []
    reduce = ReduceLROnPlateau('distillation_loss', min_delta=100., patience=1, factor=10.)
    note = At('after_step', lambda learn: rates.append((learn.opt.hypers[-1]['lr'], cb._learned.opt.hypers[-1]['lr'])), 6, 0)
    fitted(learner(), [cb, reduce, note], n_epoch=3)
    assert [own for own, _ in rates[3::4]] == pytest.approx([1e-2, 1e-2, 1e-3]) and all(own == adapter for own, adapter in rates)

@shows('learn.fit(5, cbs=[kd, TerminateOnNaNCallback()])')
def test_terminate_on_nan():
    "A student that breaks ends the run as without a teacher, and nobody blames the teacher."
    def spoil(learn): learn.model.head[3].weight.data[0] = torch.nan
    learn = learner(cbs=[TerminateOnNaNCallback(), KD(trained_teacher(), SoftTarget)])
    learn.fit(1, cbs=At('before_batch', spoil, nth=3))
    assert len(learn.recorder.losses) == 2

# ---- Tables and graphs

@shows('learn.fit(5, cbs=[kd, CSVLogger()])')
def test_csv_logger(tmp_path):
    "The file has the columns of the table, with its numbers."
    learn = fitted(learner(path=tmp_path), [CSVLogger(), KD(trained_teacher(), PARTS())])
    header, *rows = csv.reader(open(tmp_path/'history.csv'))
    losses = ['train_loss', 'valid_loss', 'accuracy', 'task_loss', 'distillation_loss', 'soft_target_loss', 'attention_loss']
    assert header == ['epoch', *losses, 'time'] and len(rows) == 2
    for row, values in zip(rows, learn.recorder.values): assert [float(o) for o in row[1:-1]] == pytest.approx(list(values))

@shows('learn.fit(5, cbs=[kd, ShowGraphCallback()])')
def test_show_graph():
    "The graph shows the blend at each step, and the task loss of each validation."
    graphs, learn = [], learner()
    def show(learn): learn.progress.mbar.update_graph = lambda lines, *bounds: graphs.append([list(map(list, line)) for line in lines])
    fitted(learn, [soft(), ProgressCallback(), ShowGraphCallback(), At('before_epoch', show, 70, 0)])
    train, valid = graphs[-1]
    assert train == [list(range(8)), [float(o) for o in learn.recorder.losses]] and valid[0] == [4, 8]
    assert valid[1][-1] == pytest.approx(learn.validate()[0], abs=1e-6)

@shows('learn.recorder.train_metrics = True; learn.fit(5, cbs=kd)')
def test_train_metrics():
    "With training metrics shown, ours are among them, and the columns of the validation hold no number of ours."
    learn = learner()
    learn.recorder.train_metrics, learn.recorder.add_time = True, False
    fitted(learn, soft())
    names = ['loss', 'accuracy', 'task_loss', 'distillation_loss']
    assert list(learn.recorder.metric_names) == ['epoch', *(f'{side}_{name}' for side in ('train', 'valid') for name in names)]
    for i, row in enumerate(learn.recorder.values):
        means = [torch.tensor(learn.recorder.distillation[name][4*i:4*i + 4]).mean().item() for name in names[2:]]
        assert list(row[2:4]) == pytest.approx(means, rel=1e-5) and list(row[6:]) == [None, None]

# ---- As people combine them

@shows('learn.to_fp16().fit_one_cycle(5, 1e-2, cbs=[kd, MixUp(), GradientAccumulation(50), SaveModelCallback()])')
def test_mixup_half_precision_accumulation_one_cycle(tmp_path):
    "All together end close to the same in a loop written by hand, and so does the saved student."
    saved = []
    def cbs():
        saved.append(SaveModelCallback(fname=f'model_{len(saved)}', comp=lambda new, best: True))
        return [MixUp(), OnCPU(), GradientAccumulation(50), saved[-1]]
    assert gap(cbs, lambda learn, cbs: learn.fit_one_cycle(2, 1e-2, cbs=cbs), path=tmp_path) < 2e-3
    assert furthest(*[torch.load(cb.last_saved_path, weights_only=True) for cb in saved]) < 2e-3

@shows("learn.to_bf16().fine_tune(5, 1e-2, cbs=[kd, CutMix(), GradientClip(.1), EarlyStoppingCallback()])")
def test_cutmix_bf16_clip_fine_tune():
    "Both phases of `fine_tune` end close to the same in a loop written by hand."
    cbs = lambda: [CutMix(), OnCPU(AMPMode.BF16), GradientClip(.1), EarlyStoppingCallback(patience=9)]
    assert gap(cbs, lambda learn, cbs: learn.fine_tune(2, 1e-2, cbs=cbs)) < 1e-2

@shows('learn.to_channelslast(use_amp=False).fit_flat_cos(5, 1e-2, cbs=[kd, GradientClip(.1), EMACallback(), CSVLogger()])')
def test_channels_last_clip_average_labels(tmp_path):
    "With label smoothing, too, the student ends where a loop written by hand ends, to five decimals."
    cbs = lambda: [ChannelsLast(), GradientClip(.1), Average(), CSVLogger()]
    fit = lambda learn, cbs: learn.fit_flat_cos(2, 1e-2, cbs=cbs)
    assert gap(cbs, fit, loss_func=LabelSmoothingCrossEntropyFlat(), path=tmp_path) < 1e-5
