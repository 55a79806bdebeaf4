"Small learners, callbacks that interfere, and a hand-written callback to compare with."
import numpy as np, os, pytest, random, runpy, sys, torch, torch.nn.functional as F, traceback, warnings
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from fastai.basics import Callback, Categorize, CrossEntropyLossFlat, DataLoaders, Datasets, Learner, Normalize
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import CutMix
from fastai.learner import AvgLoss, AvgSmoothLoss
from fastai.metrics import accuracy
from fastai.torch_core import TensorImage
from functools import cache
from multiprocessing import get_context, set_start_method
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

def seed_cpu(seed):
    "fastai's `set_seed` for a CPU: torch's formats a stack for each kind of device that is missing, a millisecond each time"
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)

def slow(*args): return pytest.param(*args, marks=pytest.mark.slow)

# processes that start with most of what tests import
FORKS = get_context('forkserver')
FORKS.set_forkserver_preload(['nbdev.test', 'fastai.vision.all', 'matplotlib.pyplot', 'fastkd.all'])

def as_elsewhere(func, *args, **kwargs):
    "`func(*args, **kwargs)`, in a process whose loaders start theirs as they do elsewhere, not as this one was started"
    set_start_method(None, force=True)
    return func(*args, **kwargs)

def run_script(path, args, env):
    "What `python path *args` does, in this process; an error is left in a file of the folder"
    os.environ.update(env)
    set_start_method(None, force=True) # a loader's processes start as they do elsewhere, not as this one did
    sys.argv = [path, *map(str, args)]
    try: runpy.run_path(path, run_name='__main__')
    except Exception:
        (args[0]/f'{os.getpid()}.error').write_text(traceback.format_exc())
        raise

# one line that a user writes; notebook 49 makes a table of these lines and of the first lines of their tests' docstrings
def shows(line): return lambda test: test

@cache
def digits():
    "Handwritten digits as (image, label) pairs"
    images, labels = load_digits(return_X_y=True)
    return list(zip(torch.tensor(images).float().view(-1, 1, 8, 8)/16, torch.tensor(labels)))

def loaders(train, valid=None, bs=25): return DataLoaders.from_dsets(train, valid or train, bs=bs, num_workers=0, device='cpu')

def block(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))

def convnet(width, p=0., n_out=10):
    "Two blocks with batch norm and a head with dropout"
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(2*width, n_out))
    return nn.Sequential(OrderedDict(block1=block(1, width), pool=nn.MaxPool2d(2), block2=block(width, 2*width), head=head))

def seeded(make, *args, seed=0, **kwargs):
    "A model whose weights depend on `seed` only"
    seed_cpu(seed)
    return make(*args, **kwargs)

def quiet(learn):
    "A learner that prints nothing"
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = len
    return learn

def learner(model=None, n=100, bs=25, cbs=None, metrics=accuracy, loss_func=None, **kwargs):
    "A student, by default 4 channels wide, on the first `n` digits"
    if model is None: model = seeded(convnet, 4)
    dls = loaders(digits()[:n], digits()[1000:1000 + bs], bs)
    return quiet(Learner(dls, model, loss_func or CrossEntropyLossFlat(), metrics=metrics, cbs=cbs, **kwargs))

def image(i): return digits()[i][0].as_subclass(TensorImage)
def name(i): return 'abcdefghij'[digits()[i][1]]

def named_learner(model, vocab='abcdefghij', stats=None, n=100, bs=25, **kwargs):
    "A learner of images whose classes have names; `stats` are the mean and deviation that normalize them"
    dsets = Datasets(range(n), [[image], [name, Categorize(list(vocab), sort=False)]], splits=[range(n), range(bs)])
    norm = [] if stats is None else [Normalize(*[torch.tensor(o).view(1, 1, 1, 1) for o in stats])]
    dls = dsets.dataloaders(bs=bs, num_workers=0, device='cpu', after_batch=norm)
    return quiet(Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, **kwargs))

def error_of(exc, learn, cb, n_batches=0):
    "What is said instead of training; the student is as it was"
    before, done = weights(learn.model), []
    with pytest.raises(exc) as e: learn.fit(1, cbs=[At('after_step', lambda learn: done.append(1), nth=0), cb])
    assert len(done) == n_batches
    if n_batches == 0: assert same(weights(learn.model), before)
    return str(e.value)

@cache
def trained_state():
    seed_cpu(1)
    learn = learner(convnet(16), n=400, bs=50)
    learn.fit_one_cycle(8, 2e-2)
    return learn.model.state_dict()

def trained_teacher():
    "A teacher of 16 channels that reads digits well; a new copy for each test"
    model = convnet(16)
    model.load_state_dict(trained_state())
    return model

def started(learn, seed=1):
    "`learn`, about to be trained from a known random state"
    seed_cpu(seed)
    learn.dls.train.rng = random.Random(seed) # loaders shuffle by a state of their own
    return learn

def fitted(learn, cbs=None, n_epoch=2, lr=1e-2, seed=1):
    "`learn`, trained from a known random state"
    started(learn, seed).fit(n_epoch, lr, cbs=cbs)
    return learn

def messages(learn, *cbs, n_fits=1):
    "What is said in fits"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(n_fits): fitted(learn, cbs)
    return [str(o.message) for o in said if issubclass(o.category, UserWarning)]

def weights(model): return {name: value.clone() for name, value in model.state_dict().items()}

def same(a, b):
    "Whether two dicts of tensors are equal bit for bit"
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

def furthest(a, b):
    "The largest difference between tensors of the same name"
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)

def state(model):
    "Everything of a model that is its owner's"
    flags = {name: module.training for name, module in model.named_modules()}
    return weights(model), flags, {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}

def is_unchanged(model, before):
    (values, *flags), (values_before, *flags_before) = state(model), before
    return same(values, values_before) and flags == flags_before

def n_hooks(model):
    "Hooks of all kinds on all layers"
    kinds = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)

class At(Callback):
    "Call `act(learn)` when `event` comes for the `nth` time; every time if `nth` is 0"
    def __init__(self, event, act, order=0, nth=1):
        self.act, self.order, self.nth, self.n = act, order, nth, 0
        setattr(self, event, self._count)

    def _count(self):
        self.n += 1
        if self.nth in (0, self.n): self.act(self.learn)

def raising(exc, text='on purpose'):
    "A function that raises"
    def act(*args): raise exc(text)
    return act

@contextmanager
def recorded(model, names):
    "Outputs of layers by name, as a forward hook finds them"
    found = {}
    def keep(name): return lambda module, args, output: found.update({name: output.clone()})
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try: yield found
    finally:
        for handle in handles: handle.remove()

class ByHand(Callback):
    "Distillation as one would write it for a single run: `loss(pred, teacher_pred, fm_s, fm_t)` and a weight for each step"
    order, run_valid = 5, False
    def __init__(self, teacher, loss, weight=.5, layers_s=(), layers_t=(), task_weight=None):
        self.teacher, self.loss, self.layers_s, self.layers_t = teacher.eval(), loss, layers_s, layers_t
        self.weight, self.task_weight = weight if callable(weight) else lambda pct: weight, task_weight

    def before_batch(self):
        self.context = recorded(self.learn.model, self.layers_s)
        self.found = self.context.__enter__()

    def after_loss(self):
        self.context.__exit__(None, None, None)
        with torch.no_grad(), recorded(self.teacher, self.layers_t) as fm_t: teacher_pred = self.teacher(*self.xb)
        weight = self.weight(self.pct_train)
        task_weight = 1 - weight if self.task_weight is None else self.task_weight
        self.learn.loss_grad = task_weight*self.loss_grad + weight*self.loss(self.pred, teacher_pred, self.found, fm_t)
        self.learn.loss = self.loss_grad.detach().clone()

def soft_target(pred, teacher_pred, T=5.):
    "Hinton et al. 2015"
    log_s, log_t = F.log_softmax(pred/T, 1), F.log_softmax(teacher_pred/T, 1)
    return T**2*F.kl_div(log_s, log_t, reduction='batchmean', log_target=True)

def attention(student, teacher):
    "Zagoruyko and Komodakis 2017, as in their code, for maps of one size"
    maps = [F.normalize(o.pow(2).mean(1).flatten(1)) for o in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()

def by_soft_target(weight=.5): return ByHand(trained_teacher(), lambda pred, teacher_pred, *fms: soft_target(pred, teacher_pred), weight)

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.nonzero_numpy, aten.argwhere, aten.masked_select, aten.equal,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.histc, aten.repeat_interleave}
COPIES = Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__array__
# its recorder copies the loss to the host for table and plot, and CutMix cuts by numbers that it drew as tensors
OF_FASTAI = [func.__code__ for func in (AvgLoss.accumulate, AvgSmoothLoss.accumulate, CutMix.before_batch)]

def of_fastai():
    "Whether fastai itself asks"
    frame = sys._getframe()
    while frame is not None and frame.f_code not in OF_FASTAI: frame = frame.f_back
    return frame is not None

class Waited(Exception): "The host would have waited for a GPU"

class NoCopies(TorchFunctionMode):
    "Raise where a tensor is copied to the host"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in COPIES and not of_fastai(): raise Waited(func.__name__)
        return func(*args, **(kwargs or {}))

class NoWaiting(TorchDispatchMode):
    "Raise where the host has to know what is in a tensor, or how many of its elements are True"
    def __enter__(self):
        self.copies = NoCopies()
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.copies.__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.overloadpacket
        by_mask = kind in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            o is not None and o.dtype in (torch.bool, torch.uint8) for o in args[1])
        if (by_mask or kind in WAITS) and not of_fastai(): raise Waited(str(func))
        return func(*args, **(kwargs or {}))

def as_on_a_gpu(monkeypatch):
    "Go the way of a GPU, where the host does not know what is in a tensor"
    for module in ('fastkd.callback', 'fastkd.losses.core'): monkeypatch.setattr(f'{module}.on_host', lambda tensor: False)

def without_waiting(learn, n_first=1):
    "`learn`, whose training batches after the first `n_first` raise where a host would wait"
    one_batch, seen = learn.one_batch, []
    def watched(i, b):
        if learn.training: seen.append(i)
        with NoWaiting() if learn.training and len(seen) > n_first else nullcontext(): one_batch(i, b)
    learn.one_batch, learn.watched = watched, seen
    return learn

class OnCPU(MixedPrecision):
    "fastai's mixed precision, which knows only CUDA, on a CPU"
    def __init__(self, amp_mode=AMPMode.FP16, **scaler):
        super().__init__(amp_mode)
        self.scaler_args = scaler

    def before_fit(self):
        half = self.amp_mode == AMPMode.FP16
        self.autocast = torch.autocast('cpu', dtype=torch.float16 if half else torch.bfloat16)
        self.learn.scaler, self.scales = torch.amp.GradScaler('cpu', enabled=half, **self.scaler_args), []
