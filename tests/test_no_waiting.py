"On a GPU the host never waits in a training step: no number is read, nothing is selected by what a tensor holds."
import math, pytest, torch
from cases import value_and_grads
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastkd.all import *
from fastkd.losses.core import counted_mean
from fastkd.modules import on_host
from helpers import At, NoWaiting, Waited, as_on_a_gpu, digits, fitted, learner, loaders, quiet, seeded, trained_teacher, without_waiting
from test_zoo import each_of_predictions
from test_zoo_fit import each, make, task
from torch import nn

@pytest.fixture
def gpu(monkeypatch): as_on_a_gpu(monkeypatch)

def check(learn, *cbs, n_epoch=2, n_first=1):
    "Training goes through all its batches, and none after the first makes the host wait"
    fitted(without_waiting(learn, n_first), [*cbs], n_epoch=n_epoch)
    assert len(learn.watched) == n_epoch*len(learn.dls.train) > n_first
    values = torch.tensor(learn.recorder.distillation['distillation_loss'])
    assert len(values) == len(learn.watched) and values.isfinite().all()

KD = KnowledgeDistillationCallback

# ---- The watch itself

@pytest.mark.parametrize('wait', [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: float(x[0]), lambda x: x[x > 0],
    lambda x: x.nonzero(), lambda x: torch.where(x > 0), lambda x: x.masked_select(x > 0), lambda x: torch.equal(x, x),
    lambda x: x.unique(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.numpy(), lambda x: torch.bincount(x.long().abs()),
    lambda x: x.sum() > 0 or 1, lambda x: x.index_put((x > 0,), torch.ones(())), lambda x: torch.repeat_interleave(x.long().abs()),
    lambda x: range(9)[(x > 0).sum()]])
def test_the_watch_sees(wait):
    x = torch.randn(5)
    wait(x)
    with pytest.raises(Waited), NoWaiting(): wait(x)

@pytest.mark.parametrize('does_not', [lambda x: x[torch.tensor([0, 1])], lambda x: x.masked_fill(x > 0, 0), lambda x: x.where(x > 0, 1),
    lambda x: len(x) and x.shape[0], lambda x: x.argmax(), lambda x: x[1:], lambda x: x.sort()])
def test_the_watch_leaves_alone(does_not):
    with NoWaiting(): does_not(torch.randn(5))

def test_the_watch_watches_training(gpu):
    "From the second batch on, in both halves of a step"
    for event in ('before_batch', 'after_loss', 'after_backward', 'after_step'):
        asks = At(event, lambda learn: learn.xb[0].sum().item(), nth=2)
        with pytest.raises(Waited): check(learner(), asks, KD(trained_teacher(), SoftTarget))

# ---- Every loss

@each
def test_every_loss(name, gpu):
    "Of the zoo, in training"
    made = task(name)
    check(made.learn, KD(made.teacher, weight=.5, **made.settings))

def test_all_kinds_of_divergence(gpu):
    for kind in Divergence.kinds: check(learner(), KD(trained_teacher(), Divergence(kind=kind)), n_epoch=1)

def test_memory_of_samples(gpu):
    "CRD with banks reads the samples' positions from the loader, on the host"
    check(learner(), KD(trained_teacher(), CRD(form='nce', negatives=20), 'block2', 'block2', weight=.5))

# ---- The callback

def rounded(pred, target): return (pred.argmax(1) == target).float().mean()

SETTINGS = dict(schedule=lambda: dict(schedule=cos), schedules=lambda: dict(schedule=dict(weight=lin, T=SchedLin(8, 1))),
    weight_0=lambda: dict(weight=0.), task_weight=lambda: dict(weight=3., task_weight=1.), span=lambda: dict(schedule=lin, span=4),
    metrics=lambda: dict(teacher_metrics=[rounded]), dtype=lambda: dict(teacher_dtype=torch.bfloat16),
    inputs=lambda: dict(teacher_input=lambda x: x*2), mask=lambda: dict(mask=lambda x: x.mean((1, 2, 3)) > .25))

@pytest.mark.parametrize('name', SETTINGS)
def test_settings(name, gpu): check(learner(), KD(trained_teacher(), SoftTarget(T=4), **SETTINGS[name]()))

CBS = dict(MixUp=MixUp, CutMix=CutMix, GradientAccumulation=lambda: GradientAccumulation(50), GradientClip=lambda: GradientClip(.1))

@pytest.mark.parametrize('name', CBS)
@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD])
def test_other_callbacks(name, loss, gpu): check(learner(), CBS[name](), KD(trained_teacher(), loss))

def test_samples_that_count_among_others(gpu):
    "DIST compares columns of those samples that count"
    check(learner(), KD(trained_teacher(), DIST, mask=lambda x: x.mean((1, 2, 3)) > .25))

def test_adapters_that_are_clipped(gpu):
    kd = KD(trained_teacher(), SoftTarget() + 10*FitNet(), ['block1', 'block2'], ['block1', 'block2'])
    check(learner(), GradientClip(.1), kd)
    assert kd._learned is not None

@pytest.mark.parametrize('loss', [SoftTarget, DecoupledKD, Logits, HardLabel, DIST])
def test_pixels_that_are_ignored(loss, gpu):
    "Segmentation with a border of 255"
    def label(x): return (x[0] > .5).long().masked_fill(torch.arange(8) == 0, 255)
    dls = loaders([(x, label(x)) for x, _ in digits()[:60]], bs=20)
    learn = quiet(Learner(dls, seeded(nn.Conv2d, 1, 2, 3, padding=1), CrossEntropyLossFlat(axis=1, ignore_index=255)))
    check(learn, KD(seeded(nn.Conv2d, 1, 2, 3, padding=1, seed=1), loss))

def test_looking_up_stored_predictions_waits(gpu):
    "The one way that does: predictions are in the host's memory, and so have to be the positions"
    stored = StoredTeacher(trained_teacher()(torch.stack([x for x, _ in digits()[:100]])).detach().numpy())
    with pytest.raises(Waited, match='tolist'): check(learner(), KD(stored, SoftTarget))

# ---- A teacher that says nan

def test_nan_is_reported_at_the_end_of_the_epoch(gpu):
    "Without waiting for it, and naming the teacher"
    teacher, learn = trained_teacher(), without_waiting(learner())
    def spoil(learn): nn.init.constant_(teacher.head[3].bias, math.nan)
    steps = At('after_step', lambda learn: None, nth=0)
    with pytest.raises(RuntimeError, match=r'not finite in this epoch .*Frozen\(Sequential\).*SoftTarget'):
        fitted(learn, [At('before_batch', spoil, nth=3), steps, KD(teacher, SoftTarget)])
    assert steps.n == 4 and learn.watched == [0, 1, 2, 3] # the whole epoch, and nothing of the next one

def test_nan_of_an_earlier_epoch_is_forgotten(gpu):
    "A learner that failed can go on with a teacher that is mended"
    teacher, learn = trained_teacher(), learner()
    good = teacher.head[3].bias.detach().clone()
    def put(value): return lambda learn: teacher.head[3].bias.data.copy_(value)
    kd = KD(teacher, SoftTarget)
    with pytest.raises(RuntimeError, match='Frozen'): fitted(learn, [At('before_batch', put(torch.tensor(math.nan)), nth=2), kd], n_epoch=1)
    put(good)(learn)
    seeded_again = learner()
    fitted(seeded_again, kd, n_epoch=1)
    assert torch.tensor(seeded_again.recorder.distillation['distillation_loss']).isfinite().all()

# ---- Both ways give the same

def both_ways(monkeypatch, run):
    "What `run` returns on the host and off it"
    monkeypatch.undo()
    first = run()
    as_on_a_gpu(monkeypatch)
    return first, run()

def agree(found):
    (value, grads), (other, other_grads) = found
    torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
    for grad, other_grad in zip(grads, other_grads): torch.testing.assert_close(other_grad, grad, rtol=1e-9, atol=1e-9)

def masks_for(n): return torch.arange(n) < n - 1, torch.arange(n) % 2 == 1, torch.ones(n).bool(), torch.zeros(n).bool()

@each_of_predictions
def test_rows_that_count(case, monkeypatch):
    for i in range(len(case.shapes)):
        given = case.given(i)
        pred, loss = given['pred'], case.built(given)
        for mask in masks_for(len(pred)):
            mask = mask.reshape(-1, *[1]*(pred.ndim - 2)).expand(len(pred), *pred.shape[2:])
            agree(found := both_ways(monkeypatch, lambda: value_and_grads(loss, given | dict(mask=mask))))
            if not mask.any(): assert all(value == 0 and not grads[0].any() for value, grads in found)

SEQUENCES = dict(Embeddings=(3, 5, 4), HiddenStates=(3, 5, 4), CosineHidden=(3, 5, 4), AttentionMaps=(3, 2, 5, 5), BoxRegression=(3, 5, 4))

@pytest.mark.parametrize('name', [*SEQUENCES, 'AttentionMaps scores'])
@pytest.mark.parametrize('counted', ['lengths', 'samples', 'all', 'none'])
def test_positions_that_count(name, counted, monkeypatch):
    name, _, kind = name.partition(' ')
    torch.manual_seed(0)
    loss = AttentionMaps(input='scores') if kind else make(name) if name != 'BoxRegression' else BoxRegression()
    draw = lambda: torch.randn(SEQUENCES[name], dtype=torch.float64)
    fm_s, fm_t = (o.softmax(-1) if name == 'AttentionMaps' and not kind else o for o in (draw(), draw()))
    mask = dict(lengths=torch.arange(5) < torch.tensor([[2], [5], [0]]), samples=torch.tensor([True, False, True]),
        all=torch.ones(3, 5).bool(), none=torch.zeros(3, 5).bool())[counted]
    agree(found := both_ways(monkeypatch, lambda: value_and_grads(loss, dict(fm_s=dict(s=fm_s), fm_t=dict(t=fm_t), mask=mask))))
    if counted == 'none': assert all(value == 0 and not grads[0].any() for value, grads in found)

@pytest.mark.parametrize('wrong', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('loss', [SoftTarget(), Logits(), HardLabel(), SoftMAE(), BinaryKD(), DecoupledKD(), DIST()], ids=repr)
def test_what_stands_in_padding_has_no_say(loss, wrong, gpu):
    "Neither the student's numbers nor the teacher's"
    pred, teacher_pred, mask = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([True, False, True, False])
    given = dict(mask=mask) | (dict(target=torch.tensor([0, 1, 2, 3])) if isinstance(loss, DecoupledKD) else {})
    value, (grad,) = value_and_grads(loss, dict(pred=pred, teacher_pred=teacher_pred, **given))
    spoilt = lambda o: torch.where(mask[:, None], o, wrong)
    again, (again_grad,) = value_and_grads(loss, dict(pred=spoilt(pred), teacher_pred=spoilt(teacher_pred), **given))
    assert torch.equal(again, value) and torch.equal(again_grad, grad) and not grad[~mask].any() and grad[mask].any()

def test_counted_mean_of_a_mean_that_is_not_0_for_zeros(gpu):
    "What padding adds is taken off again"
    mean = lambda o: (o + 3).square().mean()
    values, mask = torch.randn(6, 2, dtype=torch.float64), torch.tensor([True, False, True, True, False, False])
    torch.testing.assert_close(counted_mean(mean, mask, values), mean(values[mask]), rtol=1e-12, atol=0)

def test_on_host(): assert on_host(torch.ones(1)) and not on_host(torch.ones(1, device='meta'))
