"Samples without labels: what each loss sees, what others see, and what is said where that cannot be."
import pandas as pd, pickle, pytest, random, torch, torch.nn.functional as F
from fastai.basics import CancelBatchException, DataLoaders, MSELossFlat, Learner
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedLin
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock
from fastai.data.core import Datasets
from fastai.tabular.all import Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.augment import RandTransform
from fastkd.all import (Attention, CheckpointCallback, Curriculum, DecoupledKD, Ensemble, HardLabel, KnowledgeDistillationCallback, Logits,
    OtherView, SoftTarget, StoredTeacher)
from fastkd.unlabelled import Confident, Stream, Unlabelled
from helpers import (At, OnCPU, as_on_a_gpu, convnet, digits, fitted, learner, quiet, raising, same, seeded, trained_teacher, weights,
    without_waiting)
from torch import nn
from typing import NamedTuple

KD = KnowledgeDistillationCallback

def rest(n=80): return [x for x, y in digits()[500:500 + n]]

def mlp(n_out=10):
    "A student in which samples do not meet"
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, n_out))

class Batches:
    "The first training batch as the distillation finds it, and gradients of the student"
    def __init__(self):
        self.seen, self.grads = [], []
        self.cbs = [At('after_loss', self.see, order=4.5, nth=0), At('after_loss', self.see_blend, order=5.5, nth=0),
            At('after_backward', self.see_grads, nth=0)]

    def see(self, learn):
        if learn.training: self.seen.append(dict(x=learn.xb[0].clone(), y=learn.yb[0].clone(), pred=learn.pred,
            task=learn.loss_grad.detach()))

    def see_blend(self, learn):
        if learn.training: self.seen[-1]['blend'] = learn.loss_grad.detach().clone()

    def see_grads(self, learn): self.grads.append([p.grad.clone() for p in learn.model.parameters()])

def run(*cbs, loss=None, ratio=2, weight=.5, student=None, n=50, **kwargs):
    "One epoch; what was seen"
    batches, learn = Batches(), learner(student or seeded(mlp), n=n, **kwargs)
    kd = KD(trained_teacher(), SoftTarget(T=4) if loss is None else loss, weight=weight)
    fitted(learn, [kd, Unlabelled(rest(), ratio=ratio), *cbs, *batches.cbs], n_epoch=1)
    return batches, learn

def test_each_loss_by_hand():
    "The task loss is cross-entropy over the labelled rows only, the distillation loss is over all rows, and so are their gradients"
    batches, learn = run()
    first, model = batches.seen[0], seeded(mlp)
    assert first['x'].shape == (75, 1, 8, 8) and first['y'].shape == (25,)
    with torch.no_grad(): z_t = trained_teacher().eval()(first['x'])
    labelled, unlabelled = model(first['x'][:25]), model(first['x'][25:]) # two passes
    task = F.cross_entropy(labelled, first['y'])
    kd = 16*F.kl_div((torch.cat([labelled, unlabelled])/4).log_softmax(1), (z_t/4).softmax(1), reduction='batchmean')
    torch.testing.assert_close(first['task'], task.detach())
    torch.testing.assert_close(first['blend'], (.5*task + .5*kd).detach())
    for ours, theirs in zip(batches.grads[0], torch.autograd.grad(.5*task + .5*kd, model.parameters())):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    assert learn.recorder.distillation['task_loss'][0] == pytest.approx(task.item(), abs=1e-6)
    images = {o.numpy().tobytes() for o in rest()}
    assert all((o.numpy().tobytes() in images) == (i >= 25) for i, o in enumerate(first['x']))

def test_weight_0_is_plain_training():
    "Of a student in which samples do not meet"
    plain = fitted(learner(seeded(mlp)), [])
    ours = fitted(learner(seeded(mlp)), [KD(trained_teacher(), SoftTarget(), weight=0), Unlabelled(rest())])
    torch.testing.assert_close(weights(ours.model), weights(plain.model), atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing(mix):
    "Labelled samples are mixed with each other; the task loss is that of a fit with mixing and without unlabelled samples"
    mixing = mix()
    batches, learn = run(mixing, loss=SoftTarget(T=4) + DecoupledKD())
    images = {o.numpy().tobytes() for o in rest()}
    for batch in batches.seen: assert all(o.numpy().tobytes() in images for o in batch['x'][25:])
    last, lam = batches.seen[-1], mixing.lam
    task = lam*F.cross_entropy(last['pred'][:25], last['y'], reduction='none') + (1 - lam)*F.cross_entropy(last['pred'][:25],
        mixing.yb1[0], reduction='none')
    torch.testing.assert_close(last['task'], task.mean().detach())
    alone = Batches()
    fitted(learner(seeded(mlp), n=50), [KD(trained_teacher(), SoftTarget()), mix(), *alone.cbs], n_epoch=1)
    assert not torch.equal(alone.seen[0]['x'][0], last['x'][0]) and len(alone.seen[0]['x']) == 25

def test_losses_with_labels_leave_unlabelled_samples_out():
    batches, learn = run(loss=DecoupledKD())
    first = batches.seen[0]
    with torch.no_grad(): z_t = trained_teacher().eval()(first['x'])
    by_hand = DecoupledKD()(first['pred'][:25], z_t[:25], first['y'])
    assert learn.recorder.distillation['distillation_loss'][0] == pytest.approx(by_hand.item(), rel=1e-5)

def test_ignored_labels():
    "A labelled position that the task loss ignores is left out; unlabelled samples count"
    batches, learn = Batches(), learner(seeded(mlp), n=50)
    ignore = At('before_batch', lambda learn: learn.training and learn.yb[0][:10].fill_(-100), nth=0)
    fitted(learn, [KD(trained_teacher(), SoftTarget(T=4)), Unlabelled(rest()), ignore, *batches.cbs], n_epoch=1)
    first = batches.seen[0]
    with torch.no_grad(): by_hand = SoftTarget(T=4)(first['pred'][10:], trained_teacher().eval()(first['x'][10:]))
    assert learn.recorder.distillation['distillation_loss'][0] == pytest.approx(by_hand.item(), rel=1e-5)
    torch.testing.assert_close(first['task'], F.cross_entropy(first['pred'][10:25], first['y'][10:]).detach())

def test_gradient_accumulation():
    "Two batches of 25 labelled samples make the step of one batch of 50: accumulation counts labelled samples"
    steps, grads = [], []
    def keep(learn): steps.append(learn.train_iter) or grads.append([p.grad.clone() for p in learn.model.parameters()])
    def train(bs, *cbs):
        learn = learner(seeded(mlp), n=50, bs=bs)
        learn.dls.train.shuffle = False
        fitted(learn, [KD(trained_teacher(), SoftTarget()), Unlabelled(rest(1), ratio=1), *cbs, At('after_step', keep, nth=0)], n_epoch=1)
    train(25, GradientAccumulation(50))
    train(50)
    assert steps == [1, 0]
    for two, one in zip(*grads): torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-4)

def test_columns_and_metrics():
    "Training metrics are those of labelled samples, the teacher's too; validation knows nothing of it"
    learn = learner(seeded(mlp), n=50)
    learn.recorder.train_metrics, said = True, []
    kd, seen = KD(trained_teacher(), SoftTarget(), teacher_metrics=True), Batches()
    fitted(learn, [kd, Unlabelled(rest(), ratio=2), *seen.cbs, At('after_epoch',
        lambda learn: said.append([*learn.recorder.metric_names]))], n_epoch=1)
    row = dict(zip(said[0][1:], learn.recorder.values[0]))
    rows = [(o['pred'][:25].argmax(1) == o['y']).float().mean().item() for o in seen.seen]
    with torch.no_grad():
        of_teacher = [(trained_teacher().eval()(o['x'][:25]).argmax(1) == o['y']).float().mean().item() for o in seen.seen]
    assert row['train_accuracy'] == pytest.approx(sum(rows)/2) and row['train_teacher_accuracy'] == pytest.approx(sum(of_teacher)/2)
    plain = learn.validate()
    assert row['valid_loss'] == pytest.approx(plain[0], abs=1e-6)

def test_callbacks_after_the_batch_see_labelled_samples():
    sizes = []
    see = At('after_batch', lambda learn: sizes.append((len(learn.xb[0]), len(learn.pred), len(learn.yb[0]))), order=50, nth=0)
    run(see)
    assert {*sizes} == {(25, 25, 25)}

def test_layers():
    "Losses on activations compare those of all samples"
    batches = Batches()
    learn = learner(n=50)
    kd = KD(trained_teacher(), 1000*Attention(), 'block2', 'block2')
    model = seeded(convnet, 4)
    fitted(learn, [kd, Unlabelled(rest(), ratio=2), *batches.cbs], n_epoch=1)
    x, fms = batches.seen[0]['x'], []
    for o in (model.train(), trained_teacher().eval()): fms.append(o.block2(o.pool(o.block1(x))).detach())
    assert learn.recorder.distillation['distillation_loss'][0] == pytest.approx(1000*Attention()(*fms).item(), rel=1e-4)

def test_regression():
    "Any task loss: here the squared error of one number"
    samples = [(x, y.float()) for x, y in digits()[:50]]
    dls = DataLoaders.from_dsets(samples, samples[:25], bs=25, num_workers=0, device='cpu')
    learn, batches = quiet(Learner(dls, seeded(mlp, 1), MSELossFlat())), Batches()
    fitted(learn, [KD(seeded(mlp, 1, seed=3), Logits()), Unlabelled(rest()), *batches.cbs], n_epoch=1)
    first = batches.seen[0]
    assert first['pred'].shape == (50, 1)
    torch.testing.assert_close(first['task'], F.mse_loss(first['pred'][:25, 0], first['y']).detach())

def test_mixed_precision():
    batches, learn = run(OnCPU())
    assert len(batches.seen) == 2 and all(o['blend'].isfinite() for o in batches.seen) and batches.seen[0]['pred'].shape == (75, 10)

def test_tuples_of_inputs_and_outputs():
    "Models of two inputs that return more than a prediction"
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
        def forward(self, a, b): return self.body(a + b), [a.flatten(1)]
    samples = [(x, x/2, y) for x, y in digits()[:50]]
    dls = DataLoaders.from_dsets(samples, samples[:25], bs=25, num_workers=0, device='cpu')
    dls.n_inp, sizes = 2, []
    learn = quiet(Learner(dls, seeded(Two), lambda pred, y: sizes.append([len(pred[0]), len(pred[1][0])]) or F.cross_entropy(pred[0], y)))
    fitted(learn, [KD(seeded(Two, seed=4), SoftTarget()), Unlabelled([(x, x/2) for x in rest()], ratio=1)], n_epoch=1)
    assert {*map(tuple, sizes)} == {(25, 25)}

class Answer(NamedTuple):
    logits: torch.Tensor
    number: int

class Fields(dict): "A dictionary of a kind of its own"

@pytest.mark.parametrize('make', [lambda o: Answer(o, 3), lambda o: Fields(logits=o, number=3), lambda o: [o, 3]])
def test_the_form_of_outputs(make):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
        def forward(self, x): return make(self.body(x))
    seen, first = [], lambda o: o['logits'] if isinstance(o, dict) else o[0]
    def loss(pred, y): return seen.append((type(pred), len(first(pred)))) or F.cross_entropy(first(pred), y)
    learn = learner(Wrapped(), n=50, loss_func=loss, metrics=[])
    fitted(learn, [KD(trained_teacher(), SoftTarget(), logits=lambda o: o if isinstance(o, torch.Tensor) else first(o)),
        Unlabelled(rest())], n_epoch=1)
    assert {*seen} == {(type(make(0)), 25)}

def test_a_batch_that_is_cancelled():
    "Before the student has seen it: the next one is as ever, and so are inputs and predictions"
    sizes = []
    see = At('after_batch', lambda learn: sizes.append((len(learn.xb[0]), len(learn.pred))), order=50, nth=0)
    for nth in 1, 2:
        cancel = At('before_batch', raising(CancelBatchException), order=10, nth=nth)
        run(cancel, At('after_cancel_batch', lambda learn: setattr(learn, 'pred', torch.zeros(1))), see)
    assert {o[0] for o in sizes} == {25} and {o[1] for o in sizes} == {1, 25}

# ---- Which samples come

def test_every_sample_once_before_any_again():
    stream, drawn = Stream(7), []
    for stream.wanted in (3, 10, 1, 7): drawn += stream()
    assert len(drawn) == 21 and all(sorted(drawn[i:i + 7]) == [*range(7)] for i in (0, 7, 14))

def test_the_stream_goes_on_over_epochs():
    batches, learn = Batches(), learner(seeded(mlp), n=50)
    fitted(learn, [KD(trained_teacher(), SoftTarget()), Unlabelled(rest(100), ratio=1), *batches.cbs], n_epoch=2)
    images = [o.numpy().tobytes() for batch in batches.seen for o in batch['x'][25:]]
    assert len(images) == 100 and {*images} == {o.numpy().tobytes() for o in rest(100)}

def test_small_last_batch_and_fractions():
    "The ratio holds in the last batch of an epoch, too"
    learn, sizes = learner(seeded(mlp), n=60), []
    learn.dls.train.drop_last = False
    see = At('after_loss', lambda learn: sizes.append((len(learn.yb[0]), len(learn.xb[0]))) if learn.training else None, order=5, nth=0)
    fitted(learn, [KD(trained_teacher(), SoftTarget()), Unlabelled(rest(), ratio=.4), see], n_epoch=1)
    assert sizes == [(25, 35), (25, 35), (10, 14)]

class Shift(RandTransform):
    "Augmentation that can be seen"
    def encodes(self, x: torch.Tensor): return x + 100

def as_items():
    items = list(range(100))
    dsets = Datasets(items, [[lambda i: digits()[i][0], Shift(p=1.)], [lambda i: digits()[i][1]]], splits=[items[:50], items[50:75]])
    return dsets.dataloaders(bs=25, num_workers=0, device='cpu')

@pytest.mark.parametrize('given', [lambda dls: list(range(500, 580)), lambda dls: dls.test_dl(list(range(500, 580))),
    lambda dls: dls.test_dl(list(range(500, 580)), with_labels=True), lambda dls: dls.test_dl(list(range(500, 580))).dataset])
def test_transforms_of_the_training_set(given):
    "However samples are given, they are augmented as labelled ones, and what was given is not changed"
    learn, batches = learner(seeded(mlp)), Batches()
    learn.dls = as_items()
    unlabelled = given(learn.dls)
    fitted(learn, [KD(trained_teacher(), SoftTarget()), Unlabelled(unlabelled), *batches.cbs], n_epoch=1)
    x = batches.seen[0]['x']
    assert (x > 90).all() and {(o - 100).round(decimals=2).numpy().tobytes() for o in x[25:]} <= {
        ((o + 100) - 100).round(decimals=2).numpy().tobytes() for o in rest()}
    dataset = getattr(unlabelled, 'dataset', unlabelled)
    assert getattr(dataset, 'split_idx', 1) == 1 and learn.dls.valid_ds.split_idx == 1

def test_labels_are_never_read():
    "Those of a dataset that has some are not even loaded"
    items, read = list(range(500, 580)), []
    dsets = Datasets(items, [[lambda i: digits()[i][0]], [read.append]])
    read.clear() # fastai looks at the first
    learn = learner(seeded(mlp))
    learn.dls = as_items()
    fitted(learn, [KD(trained_teacher(), SoftTarget()), Unlabelled(dsets)], n_epoch=1)
    assert read == []

# ---- What is the user's stays

def test_loaders_and_export_are_the_users(tmp_path):
    learn = learner(seeded(mlp), cbs=Unlabelled(rest()), path=tmp_path)
    dls, train = learn.dls, learn.dls.train
    learn.fit(1, cbs=KD(trained_teacher(), SoftTarget()))
    assert learn.dls is dls and dls.train is train and len(train.one_batch()[0]) == 25
    assert learn.unlabelled.loader is None and pickle.loads(pickle.dumps(learn.unlabelled)).samples is None
    learn.unlabelled.samples = None
    learn.validate()
    with pytest.raises(RuntimeError, match='did not come along'): learn.fit(1)

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_backward'])
def test_interrupted(event):
    learn, cb = learner(seeded(mlp)), Unlabelled(rest())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[KD(trained_teacher(), SoftTarget()), cb, At(event, raising(KeyboardInterrupt), order=20)])
    assert cb.loader is None and cb.n_unlabelled == 0
    fitted(learn, [KD(trained_teacher(), DecoupledKD())], n_epoch=1)

def test_lr_find_and_inference_inside_a_fit():
    learn = learner(seeded(mlp), cbs=[KD(trained_teacher(), SoftTarget()), Unlabelled(rest())])
    before, sizes = weights(learn.model), []
    learn.lr_find(num_it=6, show_plot=False)
    assert same(before, weights(learn.model))
    look = At('after_backward', lambda learn: sizes.append(len(learn.get_preds(ds_idx=0)[0])), nth=1)
    learn.fit(1, cbs=look)
    assert sizes == [100]

# ---- Errors

@pytest.mark.parametrize('unlabelled,said', [([], 'there are no unlabelled samples'),
    ([torch.zeros(1, 9, 9)]*30, r'\(1, 9, 9\), and a labelled one \(1, 8, 8\)'),
    ([(torch.zeros(1, 8, 8), torch.zeros(2))][:0], 'there are no')])
def test_samples_that_do_not_fit(unlabelled, said):
    learn = learner(seeded(mlp))
    before = weights(learn.model)
    with pytest.raises(ValueError, match=said): learn.fit(1, cbs=[KD(trained_teacher(), SoftTarget()), Unlabelled(unlabelled)])
    assert same(before, weights(learn.model))

def test_errors():
    kd = lambda loss=SoftTarget(), **kwargs: KD(trained_teacher(), loss, **kwargs)
    fit = lambda cb, kd, learn=None: (learn or learner(seeded(mlp))).fit(1, cbs=[kd, cb])
    with pytest.raises(TypeError, match='drawn by their positions'): fit(Unlabelled(iter(rest())), kd())
    with pytest.raises(TypeError, match=r'dls.test_dl\(items\), not DataLoaders'): fit(Unlabelled(learner().dls), kd())
    for ratio in (0, -1, 'all', float('inf')):
        with pytest.raises(ValueError, match='ratio is a number > 0'): Unlabelled(rest(), ratio=ratio)
    for teacher, name in (StoredTeacher(torch.randn(100, 10)), 'StoredTeacher'), (OtherView(), 'OtherView'):
        with pytest.raises(ValueError, match=f'no position in the training set, and {name}.* asks for one'):
            fit(Unlabelled(rest()), KD(teacher, SoftTarget()))
    empty = learner(seeded(mlp))
    empty.dls = DataLoaders(empty.dls.train.new([]), empty.dls.valid)
    with pytest.raises(ValueError, match='no training set'): fit(Unlabelled(rest()), kd(), empty)
    with pytest.warns(UserWarning, match='teach nothing by themselves'): learner(seeded(mlp)).fit(1, cbs=Unlabelled(rest()))

def test_tables():
    "Rows come from a test loader; as they are, they are not prepared"
    df = pd.DataFrame(dict(a=[0., 1, 2, 3]*5, y=list('pq')*10))
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=['a'], y_names='y', valid_idx=range(4), bs=4,
        y_block=CategoryBlock())
    learn, teacher = (quiet(tabular_learner(dls, layers=[5])) for _ in range(2))
    kd = KD(teacher, SoftTarget())
    with pytest.raises(TypeError, match=r'give dls.test_dl\(df\), not a DataFrame'): learn.fit(1, cbs=[kd, Unlabelled(df[['a']])])
    sizes = []
    see = At('after_loss', lambda learn: sizes.append(len(learn.xb[0])), order=5, nth=1)
    fitted(learn, [kd, Unlabelled(dls.test_dl(df[['a']])), Curriculum(teacher), see], n_epoch=1)
    assert sizes == [8]

def test_one_hot_labels_and_losses_with_labels():
    "Which samples have no label cannot be told there"
    samples = [(x, F.one_hot(y, 10)) for x, y in digits()[:50]]
    dls = DataLoaders.from_dsets(samples, samples[:25], bs=25, num_workers=0, device='cpu')
    learn = quiet(Learner(dls, seeded(mlp), lambda pred, y: F.cross_entropy(pred, y.float())))
    with pytest.raises(ValueError, match='only where labels are classes as integers'):
        learn.fit(1, cbs=[KD(trained_teacher(), DecoupledKD()), Unlabelled(rest())])
    fitted(learn, [KD(trained_teacher(), SoftTarget()), Unlabelled(rest())], n_epoch=1)

def test_teachers_weighted_by_confidence():
    "Where there is no label all teachers count alike"
    teachers = [trained_teacher(), seeded(convnet, 8, seed=5)]
    batches, learn = Batches(), learner(seeded(mlp), n=50)
    fitted(learn, [KD(Ensemble(teachers, weights='confidence'), SoftTarget()), Unlabelled(rest()), *batches.cbs], n_epoch=1)
    first = batches.seen[0]
    with torch.no_grad():
        x, y = first['x'], first['y']
        z_t = torch.cat([Ensemble(teachers, weights='confidence').outputs((x[:25],), target=y)[0],
            Ensemble(teachers).outputs((x[25:],))[0]])
        by_hand = SoftTarget()(first['pred'], z_t)
    assert learn.recorder.distillation['distillation_loss'][0] == pytest.approx(by_hand.item(), rel=1e-4)

# ---- Confident

def test_confident_by_hand():
    torch.manual_seed(0)
    z, z_t, y = torch.randn(40, 5), 3*torch.randn(40, 5), torch.randint(5, (40,))
    sure, mask = z_t.softmax(1).max(1).values >= .8, torch.rand(40) < .5
    for loss in (HardLabel(), SoftTarget(T=2), DecoupledKD()):
        more = dict(target=y) if isinstance(loss, DecoupledKD) else {}
        of = lambda rows: loss(z[rows], z_t[rows], **{name: o[rows] for name, o in more.items()})
        torch.testing.assert_close(Confident(loss, least=.8)(z, z_t, **more), of(sure))
        torch.testing.assert_close(Confident(loss, least=.8)(z, z_t, mask=mask, **more), of(sure & mask))
        torch.testing.assert_close(Confident(loss, least=0)(z, z_t, **more), of(slice(None)))

def test_never_that_sure(recwarn):
    "Is warned of, once, after the first epoch"
    fitted(learner(seeded(mlp)), [KD(trained_teacher(), SoftTarget() + Confident(HardLabel(), 1 - 1e-9)), Unlabelled(rest())], n_epoch=2)
    assert [str(o.message) for o in recwarn] == ['Confident(loss=HardLabel(), least=0.999999999) was 0 in every batch of an epoch, '
        'so it taught nothing. The teacher was never sure enough: lower least=1']

def test_confident_of_positions():
    z, z_t = torch.randn(2, 5, 4, 4), 3*torch.randn(2, 5, 4, 4)
    sure = z_t.softmax(1).amax(1) >= .8
    by_hand = F.cross_entropy(z.movedim(1, -1)[sure], z_t.argmax(1)[sure])
    torch.testing.assert_close(Confident(HardLabel(), .8)(z, z_t), by_hand)
    torch.testing.assert_close(Confident(HardLabel(), .8)(z.movedim(1, -1), z_t.movedim(1, -1), axis=-1), by_hand)

def test_nobody_is_sure():
    z = torch.randn(4, 5, requires_grad=True)
    value = Confident(HardLabel(), .99)(z, torch.zeros(4, 5))
    value.backward()
    assert value == 0 and (z.grad == 0).all()

def test_confident_in_sums_and_schedules():
    learn, seen = learner(seeded(mlp)), []
    loss = SoftTarget(T=4) + .5*Confident(HardLabel())
    kd = KD(trained_teacher(), loss, schedule={'confident.least': SchedLin(.9, .1)})
    learn.fit(1, cbs=[kd, Unlabelled(rest()), At('after_epoch', lambda learn: seen.extend(learn.recorder.metric_names))])
    assert repr(loss) == 'SoftTarget(T=4) + 0.5*Confident(loss=HardLabel(), least=0.95)'
    assert 'confident_loss' in seen and learn.recorder.distillation['confident.least'] == pytest.approx([.9, .7, .5, .3])
    with pytest.raises(ValueError, match="must be below 1, not 1.0002 .schedule of 'confident.least' at 33.4%"):
        learn.fit(1, cbs=KD(trained_teacher(), loss, schedule={'confident.least': SchedLin(.9, 1.2)}))

def test_confident_refuses():
    with pytest.raises(TypeError, match='wraps a loss on predictions'): Confident(Attention())
    with pytest.raises(ValueError, match='least must be below 1'): Confident(HardLabel(), least=1)
    assert isinstance(Confident(HardLabel).loss, HardLabel)

def test_no_waiting(monkeypatch):
    "A GPU is never waited for"
    as_on_a_gpu(monkeypatch)
    learn = without_waiting(learner(seeded(mlp)))
    kd = KD(trained_teacher(), SoftTarget() + Confident(HardLabel()), weight=.5)
    learn.fit(1, cbs=[kd, Unlabelled(rest(), ratio=1)])
    assert len(learn.watched) == 4

# ---- Resuming

def test_resume(tmp_path):
    "An interrupted run goes on in the stream of unlabelled samples, whatever was drawn before, and in whatever order callbacks are given"
    def cbs(): return [KD(trained_teacher(), SoftTarget(T=2), weight=.7), Unlabelled(rest(), ratio=1.3)]
    def fit(learn, cbs, **kwargs):
        with quiet(learn): learn.fit(4, 1e-2, cbs=cbs, **kwargs)
        return learn
    torch.manual_seed(0)
    whole = fit(learner(seeded(mlp), path=tmp_path), cbs())
    torch.manual_seed(0)
    interrupt = At('after_backward', raising(KeyboardInterrupt), nth=9) # in the third epoch of four batches
    with pytest.raises(KeyboardInterrupt): fit(learner(seeded(mlp), path=tmp_path), [*cbs(), CheckpointCallback(), interrupt])
    random.random()
    torch.rand(3)
    second, again = learner(seeded(mlp, seed=5), path=tmp_path), cbs()[::-1]
    assert second.load_checkpoint(cbs=again) == 2
    fit(second, again, start_epoch=2)
    assert same(weights(second.model), weights(whole.model))

def test_a_checkpoint_after_an_interrupt(tmp_path):
    "What is saved by hand when the fit is over has the stream, too, and other callbacks are an error that says what to do"
    cbs = [KD(trained_teacher(), SoftTarget()), Unlabelled(rest())]
    learn = learner(seeded(mlp), path=tmp_path)
    with pytest.raises(KeyboardInterrupt): fitted(learn, [*cbs, At('after_backward', raising(KeyboardInterrupt), nth=1)])
    left = cbs[1].state_dict()['left']
    assert 0 < len(left) < 80
    learn.save_checkpoint('manual', cbs=cbs)
    again = Unlabelled(rest())
    learn.load_checkpoint('manual', cbs=[KD(trained_teacher(), SoftTarget()), again])
    assert again.state_dict()['left'] == left # also before the next fit begins
    with pytest.raises(ValueError, match='also holds the state of Unlabelled: pass all'): learn.load_checkpoint('manual', cbs=cbs[0])
    learn.save_checkpoint('plain', cbs=[])
    with pytest.raises(ValueError, match='holds no state of KnowledgeDistillationCallback, Unlabelled: pass the callbacks that were saved'):
        learn.load_checkpoint('plain', cbs=cbs)

def test_a_stream_of_other_samples():
    stream = Stream(5)
    stream.wanted = 3
    stream()
    stream.load_state_dict(stream.state_dict())
    with pytest.raises(ValueError, match='there were 5 unlabelled samples when the run was saved, and now 6'):
        Stream(6).load_state_dict(stream.state_dict())
    unlabelled = Unlabelled(rest())
    unlabelled.load_state_dict(stream.state_dict())
    cbs = [KD(trained_teacher(), SoftTarget()), unlabelled]
    with pytest.raises(ValueError, match='the next fit begins a stream of its own'): fitted(learner(seeded(mlp)), cbs)
    fitted(learner(seeded(mlp)), cbs, n_epoch=1)
