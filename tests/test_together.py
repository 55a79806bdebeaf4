"Together with fastai's own callbacks, and with callbacks that do what people's callbacks do."
import copy, pytest, torch, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, Learner, OptimWrapper, SGD, params
from fastai.callback.fp16 import AMPMode
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.text.models.awdlstm import AWD_LSTM
from fastkd.all import *
from functools import partial
from helpers import (At, OnCPU, convnet, fitted, furthest, learner, loaders, n_hooks, quiet, same, seeded, soft_target, trained_teacher,
    weights)
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)
def fitnet(**kwargs): return KD(trained_teacher(), SoftTarget() + 10*FitNet().on('block2', 'block2'), **kwargs)

def adapters(cb): return {name: p.detach().clone() for name, p in cb.loss.named_parameters()}

class NoNorm(nn.Module):
    "A student whose samples know nothing of each other"
    def __init__(self):
        super().__init__()
        self.block2, self.head = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Linear(64, 10)

    def forward(self, x): return self.head(self.block2(x).relu().flatten(1))

# ---- Accumulated, clipped, half precision

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientClip(.1)]], ids=['plain', 'clipped'])
def test_accumulation_is_a_large_batch(cbs):
    "For the student and for what the losses learn; 20 is not a divisor of 50, so that the batches differ"
    def run(bs, *more):
        cb, learn = fitnet(), learner(seeded(NoNorm), bs=bs, opt_func=SGD)
        learn.dls.train.shuffle = False
        fitted(learn, [cb, *cbs(), *more], lr=.1)
        return weights(learn.model) | adapters(cb)
    assert furthest(run(50), run(25, GradientAccumulation(50))) < 1e-6
    assert furthest(run(100), run(20, GradientAccumulation(100))) < 1e-6

def test_clip():
    "What is learned is clipped by its own norm, with the student's limit"
    cb, learn, steps = fitnet(weight=1., task_weight=1.), learner(opt_func=partial(SGD, mom=0.), wd=0.), []
    def note(learn): steps.append(adapters(cb))
    learn.fit(1, 1., cbs=[cb, GradientClip(.01), At('before_step', note, 99, 0), At('after_step', note, 99, 0)])
    for before, after in zip(steps[::2], steps[1::2]):
        assert sum((after[name] - before[name]).pow(2).sum() for name in after)**.5 == pytest.approx(.01, rel=1e-3)

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

@pytest.mark.parametrize('mode,tol', [(AMPMode.FP16, 3e-3), (AMPMode.BF16, 3e-2)])
def test_mixed_precision(mode, tol):
    "Close to float32; adapters stay float32, and autocast ends"
    cb, cb_half = fitnet(), fitnet()
    full, half = [learner(opt_func=SGD) for _ in range(2)]
    fitted(full, cb)
    fitted(half, [cb_half, OnCPU(mode)])
    assert 0 < furthest(weights(full.model), weights(half.model)) < tol
    assert 0 < furthest(adapters(cb), adapters(cb_half)) < tol
    assert {p.dtype for p in cb_half.loss.parameters()} == {torch.float32} and not torch.is_autocast_enabled('cpu')
    for name in 'task_loss', 'distillation_loss':
        values = [torch.tensor(learn.recorder.distillation[name]) for learn in (full, half)]
        assert torch.allclose(*values, rtol=.05) and values[1].dtype == torch.float32

def test_overflow_skips_the_adapters_too():
    "With a scale that overflows at first, steps that the student skips are skipped"
    cb, learn, seen = fitnet(), learner(), []
    def note(learn): seen.append((weights(nn.ModuleList(learn.model[i] for i in range(1))), adapters(cb)))
    params_of = [At('before_backward', note, 99, 0), At('after_batch', lambda learn: note(learn) if learn.training else None, 99, 0)]
    fitted(learn, [cb, OnCPU(init_scale=2.**40, growth_interval=1000), *params_of])
    stays = [torch.equal(a[0]['0.0.weight'], b[0]['0.0.weight']) for a, b in zip(seen[::2], seen[1::2])]
    assert stays == [same(a[1], b[1]) for a, b in zip(seen[::2], seen[1::2])]
    assert stays[0] and all(p.isfinite().all() for p in cb.loss.parameters())

def test_overflow_ends():
    "And training goes on, for both, once the scale fits"
    cb, learn = fitnet(), learner()
    fitted(learn, [cb, OnCPU(init_scale=2.**20, growth_interval=1000)])
    plain = fitnet()
    fitted(learner(), plain)
    assert furthest(adapters(cb), adapters(plain)) < .1 and not same(adapters(cb), adapters(plain))

def test_teacher_in_half_precision():
    "Of its own, whatever the student does"
    dtypes, teacher = [], trained_teacher()
    teacher.head[3].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    learn = fitted(learner(opt_func=SGD), KD(teacher, SoftTarget, teacher_dtype=torch.bfloat16))
    assert set(dtypes) == {torch.bfloat16}
    assert 0 < furthest(weights(learn.model), weights(fitted(learner(opt_func=SGD), KD(trained_teacher(), SoftTarget)).model)) < .01

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_teacher_of_another_dtype(dtype):
    "Its weights stay what they are, and its answer is compared in full precision"
    teacher = trained_teacher().to(dtype)
    learn = fitted(learner(opt_func=SGD), KD(teacher, SoftTarget() + 10*FitNet().on('block2', 'block2')))
    assert {p.dtype for p in teacher.parameters()} == {dtype} and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    expected = fitted(learner(opt_func=SGD), fitnet())
    assert furthest(weights(learn.model), weights(expected.model)) < (.02 if dtype == torch.bfloat16 else 1e-5)

# ---- Optimizers and groups

@pytest.mark.parametrize('kind', ['class', 'instance'])
def test_torch_optimizers(kind):
    "A wrapped optimizer of torch gives the adapters one of the same kind, or AdamW where an instance is passed"
    model = seeded(convnet, 4)
    func = partial(OptimWrapper, opt=torch.optim.SGD) if kind == 'class' else OptimWrapper(model.parameters(), torch.optim.SGD, lr=.1)
    cb, learn = fitnet(), learner(model, opt_func=func)
    fitted(learn, cb)
    assert type(cb._learned.opt.opt) is (torch.optim.SGD if kind == 'class' else torch.optim.AdamW)
    assert cb._learned.opt.hypers[-1]['lr'] == learn.opt.hypers[-1]['lr'] == 1e-2
    values = learn.recorder.distillation['fit_net_loss']
    assert values[-1] < values[0]

# ---- Callbacks of other people

@pytest.mark.parametrize('name', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'after_batch'])
@pytest.mark.parametrize('order', [4, 6])
def test_copies_of_the_student(name, order):
    "A running average of weights copies the model, hooks included, and runs the copy: neither disturbs the other"
    def average(learn):
        copied = copy.deepcopy(learn.model).eval()
        with torch.no_grad(): copied(torch.zeros(3, 1, 8, 8))
        copies.append(copied)
    copies, cb, plain = [], fitnet(), fitnet()
    learn, expected = fitted(learner(), [cb, At(name, average, order, 0)]), fitted(learner(), plain)
    assert len(copies) >= 8 and same(weights(learn.model), weights(expected.model)) and same(adapters(cb), adapters(plain))
    assert learn.recorder.distillation == expected.recorder.distillation

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

def test_trackers_find_the_columns(tmp_path):
    "Smaller is better for what ends in `_loss`"
    stop, save = EarlyStoppingCallback('task_loss', min_delta=100., patience=2), SaveModelCallback('distillation_loss')
    learn = fitted(learner(path=tmp_path), [stop, save, fitnet()], n_epoch=9)
    assert len(learn.recorder.values) == 3
    column = learn.recorder.metric_names.index('distillation_loss') - 1
    assert save.best == min(float(row[column]) for row in learn.recorder.values)

def test_train_metrics_and_no_time():
    "Other settings of the recorder"
    learn = learner()
    learn.recorder.train_metrics, learn.recorder.add_time = True, False
    fitted(learn, KD(trained_teacher(), SoftTarget))
    assert len(learn.recorder.values[-1]) == len(learn.recorder.metric_names) - 1 == 8

# ---- Recurrent models

def language_model(width):
    "A recurrent model that returns its prediction, and its activations for the regularizer"
    model = AWD_LSTM(30, width, width, 2, pad_token=1)
    class Decoded(nn.Module):
        "The core of a language model"
        def __init__(self):
            super().__init__()
            self.core, self.head = model, nn.Linear(width, 30)
        def reset(self): self.core.reset()
        def forward(self, x):
            out = self.core(x)
            return self.head(out), out, out
    return Decoded()

def text_learner(cbs=()):
    torch.manual_seed(0)
    text = torch.randint(2, 30, (40, 7))
    dls = loaders([(row[:-1], row[1:]) for row in text], bs=10)
    rnn = [ModelResetter(), RNNCallback(), RNNRegularizer(alpha=2., beta=1.)]
    return quiet(Learner(dls, seeded(language_model, 8), CrossEntropyLossFlat(axis=-1), cbs=[*rnn, *cbs]))

@pytest.mark.filterwarnings('ignore:The .* from `torch.compile`')
def test_recurrent_models():
    "The first loss is that of a hand computation, from states that begin anew"
    teacher, seen = seeded(language_model, 16, seed=1), {}
    learn = text_learner()
    note = At('after_pred', lambda learn: seen.update(x=learn.x, pred=learn.pred.detach()) if not seen else None, 4, 0)
    fitted(learn, [note, KD(teacher, SoftTarget(T=2))], lr=0.)
    teacher.reset()
    with torch.no_grad(): expected = soft_target(seen['pred'].flatten(0, 1), teacher.eval()(seen['x'])[0].flatten(0, 1), 2.)
    assert float(learn.recorder.distillation['distillation_loss'][0]) == pytest.approx(float(expected), rel=1e-4)

def test_recurrent_weight_zero():
    "Is plain training, though the probe ran the model on a batch of another size"
    plain, silent = text_learner(), text_learner([KD(seeded(language_model, 16, seed=1), SoftTarget, weight=0.)])
    for learn in plain, silent: fitted(learn)
    assert same(weights(plain.model), weights(silent.model))

def test_hidden_layer_of_a_recurrent_model():
    "Whose output is a tuple: the first tensor is compared"
    teacher, learn = seeded(language_model, 16, seed=1), text_learner()
    fitted(learn, KD(teacher, FitNet(), 'core.rnns.1', 'core.rnns.1', weight=10., task_weight=1.), n_epoch=1)
    assert learn.recorder.distillation['distillation_loss'][0] > 0 and n_hooks(learn.model) == 0

# ---- In place

def test_a_value_that_is_overwritten():
    "A batch norm whose output a ReLU overwrites: the values are the norm's own, negative ones too, and so are the gradients"
    seen = []
    def keep(fm_s, fm_t):
        seen.append((fm_s['block1.1'].min().item(), fm_t['block1.1'].min().item()))
        return F.mse_loss(fm_s['block1.1'].mean(1), fm_t['block1.1'].mean(1))
    found = fitted(learner(opt_func=SGD), KD(trained_teacher(), keep, 'block1.1', 'block1.1'))
    assert len(seen) == 8 and all(s < 0 and t < 0 for s, t in seen)
    outside, teacher = seeded(convnet, 4), trained_teacher()
    for model in outside, teacher: model.block1[2].inplace = False
    expected = fitted(learner(outside, opt_func=SGD), KD(teacher, keep, 'block1.1', 'block1.1'))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6
