"Whatever goes wrong during a fit, nothing of the user's is changed and nothing is left behind."
import copy, pickle, pytest, torch
from fastai.basics import (CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
    CancelTrainException, CancelValidException, DataLoader, DataLoaders, Learner, SGD, event)
from fastai.callback.schedule import SchedLin
from fastkd.all import *
from helpers import (At, by_soft_target, convnet, digits, error_of, fitted, furthest, is_unchanged, learner, n_hooks, raising, same,
    seeded, shows, slow, state, trained_teacher, weights)
from learning import adapters
from torch import nn

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is') # random weights
def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
TRAIN = ['before_train', *BATCH, 'after_train']
FIT = ['before_fit', 'before_epoch', *TRAIN, 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
SCOPES = {CancelBatchException: BATCH[:-1], CancelBackwardException: ['before_backward'], CancelStepException: ['before_step'],
    CancelTrainException: TRAIN[:-1], CancelValidException: ['before_validate'],
    CancelEpochException: ['before_epoch', *TRAIN, 'before_validate', 'after_validate'], CancelFitException: FIT[:-1]}
each_event = pytest.mark.parametrize('name', FIT)
each_error = pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt])

def mixed_teacher():
    "A teacher whose modules and parameters have various flags"
    teacher = seeded(convnet, 8, seed=3)
    for i, module in enumerate(teacher.modules()): module.training = i%2 == 0
    for i, p in enumerate(teacher.parameters()): p.requires_grad_(i%3 == 0)
    return teacher

def distil(teacher):
    "A callback with everything that could be left behind: hooks on both sides, an adapter, columns, a schedule"
    loss = SoftTarget(T=4) + 100*FitNet().on('block1', 'block1') + Attention().on('block2', 'block2')
    return KnowledgeDistillationCallback(teacher, loss, schedule={'T': SchedLin(4, 3), 'weight': cos})

class Case:
    "A student and its teacher, and what they were like"
    def __init__(self, in_learner=False):
        self.teacher = mixed_teacher()
        self.cb, self.before = distil(self.teacher), state(self.teacher)
        self.learn = learner(n=10, bs=5, cbs=self.cb if in_learner else None)
        self.own_cbs = [self.cb] if in_learner else []

    def fit(self, *cbs): return self.learn.fit(1, 1e-2, cbs=[*cbs] if self.own_cbs else [*cbs, self.cb])

    def check(self):
        "All is as before the fit"
        assert is_unchanged(self.teacher, self.before)
        assert (n_hooks(self.teacher), n_hooks(self.learn.model)) == (0, 0)
        assert list(self.learn.metrics.attrgot('name')) == ['accuracy']
        assert [cb for cb in self.learn.cbs if cb is self.cb] == self.own_cbs
        assert self.cb._fit is None and self.cb.loss.parts[0].loss.T == 4
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')

def fired(learn):
    "Names of the events of a fit, each once"
    names, call = [], learn._call_one
    def note(name):
        if name not in names: names.append(name)
        return call(name)
    learn._call_one = note
    learn.fit(1)
    return names

def test_events_of_a_fit():
    "The list above is complete: cancel events fire only when something is cancelled"
    assert fired(learner(n=10, bs=5)) == FIT
    assert {name for name in vars(event) if name[0] != '_'} - {*FIT} == {'after_create', *(f'after_cancel_{o}' for o in
        ('fit', 'epoch', 'train', 'validate', 'batch', 'step', 'backward'))}

def test_plain_fit():
    case = Case()
    case.fit()
    case.check()

# ---- Exceptions and Ctrl+C

@shows('learn.fit(5, cbs=[kd, a_callback_that_raises])')
@pytest.mark.parametrize('exc,order', [(KeyboardInterrupt, 6), (ValueError, 4), slow(KeyboardInterrupt, 4), slow(ValueError, 6)])
@each_event
def test_raised_by_another_callback(name, exc, order):
    "An exception or Ctrl+C at any event leaves no hook, no column, no autocast, and both models with the flags that they had."
    case = Case()
    with pytest.raises(exc): case.fit(At(name, raising(exc), order))
    case.check()

@shows('learn.fit(5, cbs=kd); learn.fit(5, cbs=kd)')
def test_used_again():
    "After a failure the same callback can be used again, whatever the event."
    case = Case()
    for name in FIT:
        with pytest.raises(KeyboardInterrupt): case.fit(At(name, raising(KeyboardInterrupt), 6))
    case.fit()
    case.check()

@shows('learn = Learner(dls, student, cbs=kd); learn.fit(5, cbs=a_callback_that_raises)')
@pytest.mark.parametrize('exc,order', [(KeyboardInterrupt, 4), (ValueError, 6)])
@each_event
def test_raised_beside_a_callback_of_the_learner(name, order, exc):
    "A callback of the Learner hears nothing of it: hooks of one batch stay until the next event, and the learner can be copied."
    case = Case(in_learner=True)
    with pytest.raises(exc): case.fit(At(name, raising(exc), order))
    assert n_hooks(case.teacher) == 0 and is_unchanged(case.teacher, case.before)
    assert n_hooks(case.learn.model) <= 2
    copied = pickle.loads(pickle.dumps(case.learn))
    assert same(weights(copied.model), weights(case.learn.model)) and same(weights(copy.deepcopy(case.learn.model)), weights(copied.model))
    assert copied.validate() == case.learn.validate()
    assert copied.metrics.attrgot('name') == ['accuracy']
    case.check()

@shows('learn.knowledge_distillation.cleanup()')
@each_error
def test_cleanup_by_hand(exc):
    "Takes away at once what a fit that died has left."
    case = Case(in_learner=True)
    with pytest.raises(exc): case.fit(At('after_pred', raising(exc), 4))
    assert n_hooks(case.learn.model) > 0
    case.cb.cleanup()
    case.check()

@shows('learn.fit(5, cbs=kd)')
@pytest.mark.parametrize('who,nth', [('student', 1), ('student', 2), ('student', 4), ('teacher', 1), ('teacher', 3)])
@pytest.mark.parametrize('in_learner,exc', [(False, ValueError), (True, KeyboardInterrupt), slow(True, ValueError),
    slow(False, KeyboardInterrupt)])
def test_raised_in_a_forward_pass(who, nth, in_learner, exc):
    "A model that raises in its forward pass leaves nothing behind, neither in the first look nor in a batch nor in validation."
    case = Case(in_learner)
    model = case.learn.model if who == 'student' else case.teacher
    calls, forward = [], model.block2[0].forward
    def fail(x):
        calls.append(x)
        if len(calls) == nth: raise exc('on purpose')
        return forward(x)
    model.block2[0].forward = fail
    with pytest.raises(exc): case.fit()
    if in_learner: case.learn.validate()
    case.check()

@shows('learn.fit(5, cbs=[kd, a_callback_that_cancels])')
@pytest.mark.parametrize('order,in_learner', [(4, False), (6, True)])
@pytest.mark.parametrize('exc,name', [(exc, name) for exc, names in SCOPES.items() for name in names],
    ids=lambda o: getattr(o, '__name__', o))
def test_cancelled(exc, name, order, in_learner):
    "Each `Cancel…Exception` of fastai, from every event where it may be raised, ends cleanly."
    if (exc, name) == (CancelEpochException, 'before_epoch'): order = 99 # fastai's Recorder needs this event
    case = Case(in_learner)
    case.fit(At(name, raising(exc), order))
    case.check()

def test_cancelled_training_leaves_no_hook_for_validation():
    "A cancelled epoch or training phase does not reach `after_batch`"
    case, found = Case(), []
    cbs = At('before_batch', raising(CancelTrainException), 6), At('before_validate', lambda learn: found.append(n_hooks(learn.model)))
    case.fit(*cbs)
    assert found == [0]

@shows('learn.fit(5)  # again, after Ctrl+C')
def test_next_fit_after_an_interrupt():
    "The next fit gives the numbers of a fit that nothing went before, from the same weights."
    fresh, case = Case(in_learner=True), Case(in_learner=True)
    before = weights(case.learn.model)
    with pytest.raises(KeyboardInterrupt): fitted(case.learn, At('after_loss', raising(KeyboardInterrupt), 99))
    case.learn.model.load_state_dict(before) # batch norm has seen a batch
    for o in fresh, case: fitted(o.learn)
    assert same(weights(case.learn.model), weights(fresh.learn.model))
    assert case.learn.recorder.values == fresh.learn.recorder.values
    for o in fresh, case: o.check()

@shows('learn.lr_find()')
def test_lr_find_interrupted():
    "Ctrl+C in `lr_find` leaves as little as in a fit."
    case = Case(in_learner=True)
    case.learn.add_cb(At('after_step', raising(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt): case.learn.lr_find(show_plot=False, num_it=6)
    case.learn.validate()
    case.check()

def test_errors_of_ours_leave_nothing():
    case = Case()
    case.cb.loss = SoftTarget(T=4) + Attention().on('block1', 'blok2')
    with pytest.raises(ValueError, match='blok2'): case.fit()
    case.check()

def test_a_loss_that_fails_leaves_nothing():
    "In a callback of the Learner, and after it once more"
    calls = []
    def fragile(pred, teacher_pred):
        calls.append(1)
        if len(calls) == 2: raise RuntimeError('on purpose')
        return (pred - teacher_pred).pow(2).mean()
    learn = learner(n=10, bs=5, cbs=KnowledgeDistillationCallback(seeded(convnet, 8), fragile))
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    assert n_hooks(learn.model) == 0 and len(learn.validate()) == 2

@shows('with learn.removed_cbs(kd): ...  # in the middle of a fit')
def test_put_off_and_on_in_the_middle():
    "A callback that is taken away for a while leaves nothing, and takes up its work when it is back."
    case = Case()
    def swap(learn):
        learn.remove_cb(case.cb)
        assert len(learn.metrics) == 1 and n_hooks(learn.model) == 0
        learn.add_cb(case.cb)
    case.learn.fit(2, cbs=[At('after_epoch', swap, 70), case.cb])
    case.check()

def test_types_of_learners():
    "What `Learner` does with callbacks is the same in a subclass of it"
    class MyLearner(Learner): "A user's learner"
    case = Case()
    case.learn.__class__ = MyLearner
    case.fit()
    case.check()

# ---- Teachers that fail

@shows('KnowledgeDistillationCallback(a_teacher_with_nan, SoftTarget)')
def test_a_teacher_that_is_broken():
    "A teacher whose answer is not finite is named before the first step, with the layer."
    teacher = trained_teacher()
    teacher.block2[0].weight.data[0] = torch.nan
    assert "the teacher's prediction is not finite" in error_of(ValueError, learner(), KD(teacher, SoftTarget))
    assert "the teacher's layer 'block2' is not finite" in error_of(ValueError, learner(), KD(teacher, Attention, 'block2', 'block2'))

@shows('learn.fit(5, cbs=kd)')
@pytest.mark.parametrize('loss', [SoftTarget, Logits, lambda: 1000*Attention().on('block2', 'block2')])
def test_a_teacher_that_breaks(loss):
    "A teacher that yields NaN in the middle of training is named before that batch touches the student."
    teacher, learn, before = trained_teacher(), learner(), {}
    def spoil(learn):
        before.update((name, p.detach().clone()) for name, p in learn.model.named_parameters())
        teacher.block2[0].weight.data[0] = torch.nan
    cb = KD(teacher, loss())
    with pytest.raises(RuntimeError, match="not finite at training batch 3; .*the teacher's answer is not: Frozen"):
        learn.fit(1, cbs=[At('before_batch', spoil, nth=3), cb])
    assert all(torch.equal(p, before[name]) for name, p in learn.model.named_parameters())
    assert all(value.isfinite().all() for value in weights(learn.model).values())

def test_a_teacher_that_breaks_on_a_device(monkeypatch):
    "Where the host does not wait for the numbers of each batch, the end of the epoch names the teacher"
    monkeypatch.setattr('fastkd.callback.on_host', lambda tensor: False)
    teacher, learn = trained_teacher(), learner()
    def spoil(learn): teacher.block2[0].weight.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite in this epoch though the student's predictions were: Frozen"):
        learn.fit(2, cbs=[At('before_batch', spoil, nth=3), KD(teacher, SoftTarget)])
    assert len(learn.recorder.losses) == 4 and n_hooks(learn.model) == 0 and list(learn.metrics.attrgot('name')) == ['accuracy']

class Elsewhere(nn.Module):
    "A model that believes to be on another device until it is moved"
    def __init__(self):
        super().__init__()
        self.model, self.at = trained_teacher(), torch.device('cuda')

    def to(self, device):
        self.at = torch.device(device)
        return super().to(device)

    def forward(self, x):
        if x.device != self.at: raise RuntimeError(f'the input is on {x.device}, the weights are on {self.at}')
        return self.model(x)

@shows('KnowledgeDistillationCallback(teacher.cuda(), SoftTarget)')
def test_teacher_on_another_device():
    "The teacher follows the student's device, and one that has no weights (`meta`) is an error before the first step."
    teacher = Elsewhere()
    learn, expected = [fitted(learner(), KD(o, SoftTarget)) for o in (teacher, trained_teacher())]
    assert teacher.at == torch.device('cpu') and same(weights(learn.model), weights(expected.model))
    assert 'meta tensor' in error_of(NotImplementedError, learner(), KD(convnet(16).to('meta'), SoftTarget))

@shows('KnowledgeDistillationCallback(teacher.bfloat16(), SoftTarget)')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_teacher_of_another_dtype(dtype):
    "Its weights stay what they are, and its answer is compared in full precision."
    teacher = trained_teacher().to(dtype)
    before, cbs = weights(teacher), [KD(o, SoftTarget() + 10*FitNet().on('block2', 'block2')) for o in (teacher, trained_teacher())]
    learn, expected = [fitted(learner(opt_func=SGD), cb) for cb in cbs]
    assert {p.dtype for p in teacher.parameters()} == {dtype} and {p.dtype for p in learn.model.parameters()} == {torch.float32}
    assert same(weights(teacher), before)
    tol = .02 if dtype == torch.bfloat16 else 1e-5
    assert furthest(weights(learn.model), weights(expected.model)) < tol and furthest(*map(adapters, cbs)) < tol

# ---- Layers that do not run

class Idle(nn.Module):
    "A convnet with a layer that does not run, and one that runs only in eval mode"
    def __init__(self, width):
        super().__init__()
        self.model, self.idle, self.sometimes = seeded(convnet, width), nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x):
        x = self.model(x)
        return x if self.training else self.sometimes(x)

@shows("KnowledgeDistillationCallback(teacher, Attention, 'a_layer_that_never_runs', 'layer2')")
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_layer_that_never_runs(side):
    "It is named before the first step, with its side."
    layers = ('idle', 'model.block2') if side == 'student' else ('model.block2', 'idle')
    said = error_of(ValueError, learner(Idle(4)), KD(Idle(16), Attention, *layers))
    assert f"{side} layer 'idle' did not run in the {side}'s forward pass" in said

@shows("KnowledgeDistillationCallback(teacher, FitNet, 'a_layer_that_runs_in_eval_mode', 'layer2')")
def test_layer_that_does_not_run_in_training():
    "A layer that runs in eval mode only, so in the first look but not in a batch, is named before the student is touched."
    learn = learner(Idle(4))
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    with pytest.raises(ValueError, match="student layer 'sometimes' did not run in the student's forward pass"):
        learn.fit(1, cbs=KD(Idle(16), FitNet, 'sometimes', 'sometimes'))
    assert all(torch.equal(p, before[name]) for name, p in learn.model.named_parameters()) and n_hooks(learn.model) == 0

# ---- Odd batches

def only(n): return lambda learn: [setattr(learn, side, tuple(o[:n] for o in getattr(learn, side))) for side in ('xb', 'yb')]

@shows('learn.fit(5, cbs=kd)  # with a loader that filters samples out')
@pytest.mark.parametrize('nth', [1, 3])
def test_empty_batch(nth):
    "A batch that has lost all its samples teaches nothing, breaks nothing and does not count, even if it is the first."
    learn, expected, by_hand = learner(opt_func=SGD), learner(opt_func=SGD), by_soft_target()
    def cut(learn):
        if learn.training and learn.iter == nth - 1: only(0)(learn)
    blend = by_hand.after_loss
    by_hand.after_loss = lambda: blend() if len(by_hand.x) else None
    fitted(learn, [At('before_batch', cut, nth=0), KD(trained_teacher(), SoftTarget() + 0*FitNet().on('block2', 'block2'))])
    fitted(expected, [At('before_batch', cut, nth=0), by_hand])
    assert furthest(weights(learn.model), weights(expected.model)) < 1e-6
    steps = learn.recorder.distillation['distillation_loss']
    assert len(steps) == 6 and torch.tensor(steps).isfinite().all()
    assert learn.recorder.values[-1][-3] == pytest.approx(sum(steps[3:])/3, rel=1e-5)

@shows('learn.fit(5, cbs=kd)  # with a loader that is shorter than a batch')
def test_no_batch_at_all():
    "An epoch without a batch ends as without a teacher, and its columns are empty."
    learn = fitted(learner(n=10, bs=25), KD(trained_teacher(), SoftTarget), n_epoch=1)
    assert len(learn.dls.train) == 0 and list(learn.recorder.values[0][3:]) == [None, None]
    assert same(weights(learn.model), weights(learner().model)) and list(learn.metrics.attrgot('name')) == ['accuracy']

@shows('learn.fit(5, cbs=kd)  # with batches that have no labels')
def test_batches_without_labels():
    "Batches without labels are left alone: nothing fails, and the weights stay."
    learn = learner()
    before = weights(learn.model)
    learn.fit(1, cbs=[KD(trained_teacher(), SoftTarget), At('before_batch', lambda learn: setattr(learn, 'yb', ()), nth=0)])
    learned = {name: value for name, value in weights(learn.model).items() if 'running' not in name and 'num' not in name}
    assert all(torch.equal(before[name], value) for name, value in learned.items())
    fitted(learn, [KD(trained_teacher(), SoftTarget), At('before_batch', lambda learn: setattr(learn, 'yb', ()), nth=2)], n_epoch=1)
    assert len(learn.recorder.distillation['task_loss']) == 3

def of_block(loss): return lambda: loss().on('block2', 'block2')
LOSSES = dict(response=SoftTarget, classes=DIST, adapter=of_block(FitNet), memory=of_block(CRD), similarities=of_block(PKT),
    distances=of_block(RKD))

@shows('learn.fit(5, cbs=kd)  # with drop_last=False')
@pytest.mark.parametrize('name', LOSSES)
def test_last_batch_of_one(name):
    "One sample alone is taught, though it has no relation to others: losses on relations are 0, and all stay finite."
    learn = learner()
    learn.dls = DataLoaders(DataLoader(digits()[:26], bs=25, shuffle=True, num_workers=0, device='cpu'), learn.dls.valid)
    fitted(learn, KD(trained_teacher(), LOSSES[name](), weight=1., task_weight=1.))
    steps = torch.tensor(learn.recorder.distillation['distillation_loss'])
    assert len(steps) == 4 and steps.isfinite().all() and all(o.isfinite().all() for o in weights(learn.model).values())
    of_relations = name in ('similarities', 'distances')
    assert [float(o) == 0 for o in steps] == [name == 'memory', of_relations, False, of_relations]

@shows('learn.fit(5, cbs=kd)  # with drop_last=False and batch norm on vectors')
def test_batch_norm_of_one():
    "A student that cannot normalize a single sample says so in PyTorch's words, as without a teacher, and nothing is left behind."
    def model(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    def run(*cbs):
        learn = learner(seeded(model))
        with pytest.raises(ValueError, match='Expected more than 1 value per channel') as e:
            fitted(learn, [At('before_batch', lambda learn: only(1)(learn), nth=3), *cbs])
        assert n_hooks(learn.model) == 0 and list(learn.metrics.attrgot('name')) == ['accuracy']
        return str(e.value), weights(learn.model)
    (said, found), (plain, expected) = run(KD(trained_teacher(), FitNet(), '1', 'head.1', weight=0.)), run()
    assert said == plain and same(found, expected)
