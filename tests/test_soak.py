"Hundreds of short fits of all kinds in one process, some of them interrupted: nothing is left behind, and nothing grows."
import fastkd, gc, pytest, random, torch, traceback
from fastai.basics import CancelEpochException, params
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastkd.all import *
from helpers import At, OnCPU, convnet, digits, is_unchanged, learner, n_hooks, raising, seeded, state
from pathlib import Path
from test_loop_faults import FIT, SCOPES
from torch._subclasses import FakeTensor

HOME = Path(fastkd.__file__).parent
BLOCKS = ['block1', 'block2']
def at_the_end(*losses): return [lambda loss=loss: loss().on('block2', 'block2') for loss in losses]
LOSSES = at_the_end(PKT, lambda: CRD(dim=4, negatives=8), lambda: CRD(dim=4, negatives=8, form='nce'), MaskedGenerative)
LOSSES += [SoftTarget, lambda: 100*FitNet().on(BLOCKS, BLOCKS), lambda: 1000*Attention().on('block1', 'block1')]
LOSSES += [lambda: SoftTarget() + FitNet().on('block1.1', 'block1') + Attention().on(BLOCKS, BLOCKS)]
LOSSES += [lambda: DecoupledKD() + RKD().on(*BLOCKS)]
CALLBACKS = [MixUp, CutMix, lambda: GradientAccumulation(8), lambda: GradientClip(.1), ChannelsLast, SaveModelCallback,
    TerminateOnNaNCallback]
HALF = [lambda: OnCPU(AMPMode.BF16), lambda: OnCPU(AMPMode.FP16, init_scale=1024.)]
FITS = dict(fit=lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs), one_cycle=lambda learn, cbs: learn.fit_one_cycle(1, 1e-2, cbs=cbs),
    two_epochs=lambda learn, cbs: learn.fit(2, 1e-2, cbs=cbs), lr_find=lambda learn, cbs: find_lr(learn, cbs),
    fine_tune=lambda learn, cbs: learn.fine_tune(1, 1e-2, cbs=cbs))
BETWEEN = [lambda learn: None, lambda learn: learn.validate(), lambda learn: learn.get_preds(), lambda learn: learn.predict(digits()[0])]

def find_lr(learn, cbs):
    with learn.added_cbs(cbs): learn.lr_find(num_it=4, show_plot=False, suggest_funcs=())

def interrupt(rng):
    "An exception anywhere, or one that cancels where fastai expects it"
    if rng.random() < .5:
        exc, name = rng.choice([KeyboardInterrupt, ValueError]), rng.choice(FIT)
        return At(name, raising(exc), rng.choice([4, 6, 99]), rng.choice([1, 2]))
    exc = rng.choice(list(SCOPES))
    name = rng.choice(SCOPES[exc])
    order = 99 if (exc, name) == (CancelEpochException, 'before_epoch') else rng.choice([4, 6]) # fastai's Recorder needs this event
    return At(name, raising(exc), order, rng.choice([1, 2]))

def fails(func):
    "Whether `func` raises: on purpose, or by fastai's own doing, as SaveModel does after a cancelled epoch"
    try: func()
    except (Exception, KeyboardInterrupt) as e:
        ours = [frame for frame in traceback.extract_tb(e.__traceback__) if Path(frame.filename).is_relative_to(HOME)]
        assert 'on purpose' in str(e) or not ours, e
        return True
    return False

def tidy(learn, loss_func):
    "Undo what fastai itself leaves after an exception: MixUp's loss function, and autocast with its copies of weights"
    learn.loss_func = loss_func
    if not torch.is_autocast_enabled('cpu'): return
    torch.set_autocast_enabled('cpu', False)
    while torch.autocast_decrement_nesting() > 0: pass
    torch.clear_autocast_cache()

def tensors():
    "Those with storage: a compiled model of an earlier test leaves others"
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not issubclass(type(o), FakeTensor)]

def memory():
    "Bytes of all tensors that are alive, and how many objects Python keeps track of"
    gc.collect()
    storages = {o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in tensors()}
    return sum(storages.values()), len(gc.get_objects())

def with_a_graph(learn):
    "Tensors that keep a graph alive, once fastai's own are dropped"
    learn.pred = learn.loss = learn.loss_grad = None
    gc.collect()
    return [tuple(o.shape) for o in tensors() if o.grad_fn is not None]

def a_fit(learn, teacher, rng):
    "One fit of any kind, and what must hold after it"
    kind, in_learner, loss_func = rng.choice(list(FITS)), rng.random() < .5, learn.loss_func
    weight, schedule = rng.choice([0., .1, .5, 1.]), rng.choice([None, cos, lin])
    cb = KnowledgeDistillationCallback(teacher, rng.choice(LOSSES)(), weight=weight, schedule=schedule, teacher_metrics=rng.random() < .3)
    cbs = [make() for make in rng.sample(CALLBACKS, rng.randint(0, 2)) + rng.sample(HALF, rng.random() < .3)]
    if rng.random() < .5: cbs.append(interrupt(rng))
    if in_learner: learn.add_cb(cb)
    else: cbs.append(cb)
    rng.choice(BETWEEN)(learn)
    failed = fails(lambda: FITS[kind](learn, cbs))
    tidy(learn, loss_func)
    if in_learner:
        assert n_hooks(learn.model) <= 3*failed
        if failed: rng.choice([lambda: cb.cleanup(), lambda: learn.validate()])()
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and cb._fit is None
    if in_learner: learn.remove_cb(cb)
    assert n_hooks(learn.model) == n_hooks(teacher) == 0
    return failed

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_soak(tmp_path):
    rng, teacher, n_failed, sizes = random.Random(0), seeded(convnet, 4), 0, []
    before = state(teacher)
    for i in range(300):
        if i % 10 == 0:
            learn = learner(seeded(convnet, 2), n=12, bs=4, path=tmp_path, splitter=lambda model: [params(model[:1]), params(model[1:])])
        n_failed += a_fit(learn, teacher, rng)
        assert is_unchanged(teacher, before)
        if i % 5 == 4: assert with_a_graph(learn) == []
        if i % 10 == 9:
            learn = None
            sizes.append(memory())
    assert 50 < n_failed < 150
    for first, last in zip(sizes[0], sizes[-1]): assert last <= 1.05*first, sizes
