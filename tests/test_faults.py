"Whatever goes wrong during a fit, nothing of the user's is changed and nothing is left behind."
import copy, pickle, pytest, torch
from fastai.basics import (CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException, CancelStepException,
    CancelTrainException, CancelValidException, Learner, event)
from fastai.callback.schedule import SchedLin
from fastkd.all import *
from helpers import At, convnet, fitted, is_unchanged, learner, n_hooks, raising, same, seeded, state, weights

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is') # random weights
BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step', 'after_batch']
TRAIN = ['before_train', *BATCH, 'after_train']
FIT = ['before_fit', 'before_epoch', *TRAIN, 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
SCOPES = {CancelBatchException: BATCH[:-1], CancelBackwardException: ['before_backward'], CancelStepException: ['before_step'],
    CancelTrainException: TRAIN[:-1], CancelValidException: ['before_validate'],
    CancelEpochException: ['before_epoch', *TRAIN, 'before_validate', 'after_validate'], CancelFitException: FIT[:-1]}
each_event, each_order = pytest.mark.parametrize('name', FIT), pytest.mark.parametrize('order', [4, 6]) # before and after ours
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

@each_error
@each_order
@each_event
def test_raised_by_another_callback(name, order, exc):
    case = Case()
    with pytest.raises(exc): case.fit(At(name, raising(exc), order))
    case.check()

def test_used_again():
    "The same callback, after each failure"
    case = Case()
    for name in FIT:
        with pytest.raises(KeyboardInterrupt): case.fit(At(name, raising(KeyboardInterrupt), 6))
    case.fit()
    case.check()

@pytest.mark.parametrize('exc,order', [(KeyboardInterrupt, 4), (ValueError, 6)])
@each_event
def test_raised_beside_a_callback_of_the_learner(name, order, exc):
    "Such a callback hears nothing of an exception: hooks of a batch and columns may stay until the next event, but can be copied"
    case = Case(in_learner=True)
    with pytest.raises(exc): case.fit(At(name, raising(exc), order))
    assert n_hooks(case.teacher) == 0 and is_unchanged(case.teacher, case.before)
    assert n_hooks(case.learn.model) <= 2
    copied = pickle.loads(pickle.dumps(case.learn))
    assert same(weights(copied.model), weights(case.learn.model)) and same(weights(copy.deepcopy(case.learn.model)), weights(copied.model))
    assert copied.validate() == case.learn.validate()
    assert copied.metrics.attrgot('name') == ['accuracy']
    case.check()

@each_error
def test_cleanup_by_hand(exc):
    case = Case(in_learner=True)
    with pytest.raises(exc): case.fit(At('after_pred', raising(exc), 4))
    assert n_hooks(case.learn.model) > 0
    case.cb.cleanup()
    case.check()

@each_error
@pytest.mark.parametrize('who,nth', [('student', 1), ('student', 2), ('student', 4), ('teacher', 1), ('teacher', 3)])
@pytest.mark.parametrize('in_learner', [False, True])
def test_raised_in_a_forward_pass(who, nth, in_learner, exc):
    "The first call is the probe, two are batches, and only a student is called in validation"
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

@pytest.mark.parametrize('order,in_learner', [(4, False), (6, True)])
@pytest.mark.parametrize('exc,name', [(exc, name) for exc, names in SCOPES.items() for name in names],
    ids=lambda o: getattr(o, '__name__', o))
def test_cancelled(exc, name, order, in_learner):
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

def test_next_fit_after_an_interrupt():
    "Gives the numbers of a fit that nothing went before, from the same weights"
    fresh, case = Case(in_learner=True), Case(in_learner=True)
    before = weights(case.learn.model)
    with pytest.raises(KeyboardInterrupt): fitted(case.learn, At('after_loss', raising(KeyboardInterrupt), 99))
    case.learn.model.load_state_dict(before) # batch norm has seen a batch
    for o in fresh, case: fitted(o.learn)
    assert same(weights(case.learn.model), weights(fresh.learn.model))
    assert case.learn.recorder.values == fresh.learn.recorder.values

def test_lr_find_interrupted():
    "It is a fit like others"
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

def test_put_off_and_on_in_the_middle():
    "A callback that is taken away for a while, as `removed_cbs` does"
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
