"Descriptions: what differs is told apart, what is the same is the same in every process, and nothing is too deep."
import argparse, collections, copy, dataclasses, enum, functools, helpers, numpy as np, os, pandas as pd, \
    pytest, subprocess, sys, torch, types
from fastai.basics import AccumMetric, AvgMetric, Callback, CrossEntropyLossFlat, L, LabelSmoothingCrossEntropyFlat, SGD, accuracy, \
    error_rate
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import IndexSplitter, Normalize
from fastai.losses import FocalLossFlat
from fastai.text.models import AWD_LSTM
from fastai.vision.augment import RandomResizedCrop, aug_transforms
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageBlock
from fasttransform import Transform
from fastkd.all import *
from fastkd.description import description
from fastkd.shared import content_digest
from functools import partial, partialmethod
from helpers import convnet, learner
from pathlib import Path
from torch import nn

def add(a, b): return a + b
def subtract(a, b): return a - b
def from_right(b, a): return a - b
def with_default(a, b=1): return a*b
def other_default(a, b=2): return a*b
def keyword(a, *, b=1): return a*b
def other_keyword(a, *, b=2): return a*b

def decorated(func):
    @functools.wraps(func)
    def call(*args): return func(*args)
    return call

def recursive(n):
    def again(k): return again(k - n) if k > 0 else 0
    return again

def holder(value): return lambda: value
def nested(value): return lambda: (lambda: (lambda: value))
def many_names(n): return {f'name {i}': i for i in range(n)}

class Color(enum.Enum):
    red, blue = 1, 2

@dataclasses.dataclass
class Point:
    x: int = 0

class Slots:
    __slots__ = 'value'
    def __init__(self, value): self.value = value

class Plain:
    def __init__(self, value): self.value = value
    def __repr__(self): return 'Plain'
    def method(self): return self.value
    def __call__(self): return self.value

class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
    def forward(self, x): return x*self.by

class Answers(Teacher):
    def __init__(self, value): self.value = value
    def outputs(self, xb, layers=(), pred=True): return self.value, {}

def class_with(body, **members): return type('Made', (object,), dict(run=body, __module__=__name__, **members))
def seeded(width=2, seed=0): return helpers.seeded(nn.Linear, width, width, seed=seed)
def inputs_of(x): return x
def other_inputs(x): return -x

DIFFERENT = dict(functions=lambda: (add, subtract))
DIFFERENT |= dict(order_of_parameters=lambda: (partial(subtract, a=1, b=2), partial(from_right, a=1, b=2)))
DIFFERENT |= dict(defaults=lambda: (with_default, other_default), keywords=lambda: (keyword, other_keyword))
DIFFERENT |= dict(closures=lambda: (holder(1), holder(2)), inner_functions=lambda: (nested(1), nested(2)))
DIFFERENT |= dict(recursion=lambda: (recursive(1), recursive(2)), lambdas=lambda: (lambda x: x + 1, lambda x: x + 2))
DIFFERENT |= dict(decorators=lambda: (decorated(add), decorated(subtract)))
DIFFERENT |= dict(remembered=lambda: (functools.lru_cache(add), functools.lru_cache(subtract)))
DIFFERENT |= dict(partials=lambda: (partial(add, b=1), partial(add, b=2)), methods=lambda: (Plain(1).method, Plain(2).method))
DIFFERENT |= dict(bound_builtins=lambda: ('a'.join, 'b'.join), callables=lambda: (Plain(1), Plain(2)), slots=lambda: (Slots(1), Slots(2)))
DIFFERENT |= dict(dataclass=lambda: (Point(1), Point(2)), enums=lambda: (Color.red, Color.blue))
DIFFERENT |= dict(class_bodies=lambda: (class_with(add), class_with(subtract)))
DIFFERENT |= dict(class_constants=lambda: (class_with(add, n=1), class_with(add, n=2)))
DIFFERENT |= dict(properties=lambda: (class_with(add, p=property(add)), class_with(add, p=property(subtract))))
DIFFERENT |= dict(cached_properties=lambda: tuple(class_with(add, p=functools.cached_property(o)) for o in (add, subtract)))
DIFFERENT |= dict(partial_methods=lambda: (class_with(add, p=partialmethod(add, 1)), class_with(add, p=partialmethod(add, 2))))
DIFFERENT |= dict(static_methods=lambda: (class_with(add, p=staticmethod(add)), class_with(add, p=staticmethod(subtract))))
DIFFERENT |= dict(lists=lambda: ([1, 2], [2, 1]), dicts=lambda: (dict(a=1), dict(a=2)), sets=lambda: ({'a', 'b'}, {'a', 'c'}))
DIFFERENT |= dict(ints_and_text=lambda: (1, '1'), deques=lambda: (collections.deque([add]), collections.deque([subtract])))
DIFFERENT |= dict(l=lambda: (L(add), L(subtract)), namespaces=lambda: (types.SimpleNamespace(f=add), types.SimpleNamespace(f=subtract)))
DIFFERENT |= dict(arguments=lambda: (argparse.Namespace(classes={'a'}), argparse.Namespace(classes={'b'})))
DIFFERENT |= dict(arrays=lambda: (np.zeros(10_000), np.r_[np.zeros(9_999), 1.]), tensors=lambda: (torch.zeros(10_000), torch.ones(10_000)))
DIFFERENT |= dict(frames=lambda: (pd.DataFrame(dict(a=range(1000))), pd.DataFrame(dict(a=[*range(999), 0]))))
DIFFERENT |= dict(weights=lambda: (seeded(seed=0), seeded(seed=1)), layer_settings=lambda: (nn.Dropout(.1), nn.Dropout(.2)))
DIFFERENT |= dict(own_layers_inside=lambda: (nn.Sequential(Scale(1), nn.ReLU()), nn.Sequential(Scale(2), nn.ReLU())))
DIFFERENT |= dict(learners=lambda: tuple(learner(helpers.seeded(convnet, o)) for o in (2, 3)))
DIFFERENT |= dict(focal=lambda: (FocalLossFlat(gamma=1), FocalLossFlat(gamma=5)))
DIFFERENT |= dict(smoothing=lambda: (LabelSmoothingCrossEntropyFlat(eps=.1), LabelSmoothingCrossEntropyFlat(eps=.2)))
DIFFERENT |= dict(class_weights=lambda: (CrossEntropyLossFlat(weight=torch.ones(2)), CrossEntropyLossFlat(weight=torch.zeros(2))))
DIFFERENT |= dict(of_torch=lambda: (nn.CrossEntropyLoss(label_smoothing=.1), nn.CrossEntropyLoss(label_smoothing=.2)))
DIFFERENT |= dict(losses=lambda: (SoftTarget(T=2), SoftTarget(T=4)), callbacks=lambda: (partial(MixUp, .1), partial(MixUp, .9)))
DIFFERENT |= dict(monitors=lambda: (SaveModelCallback(monitor='accuracy'), SaveModelCallback(monitor='valid_loss')))
DIFFERENT |= dict(metrics=lambda: (AvgMetric(accuracy), AvgMetric(error_rate)))
DIFFERENT |= dict(accumulated=lambda: (AccumMetric(add), AccumMetric(subtract)))
DIFFERENT |= dict(stored=lambda: (StoredTeacher(torch.zeros(5, 2)), StoredTeacher(torch.ones(5, 2))))
DIFFERENT |= dict(frozen_inputs=lambda: tuple(Frozen(seeded(), inputs=o) for o in (inputs_of, other_inputs)))
DIFFERENT |= dict(mean_teachers=lambda: (MeanTeacher(decay=.9), MeanTeacher(decay=.5)), own_teachers=lambda: (Answers(1), Answers(2)))
DIFFERENT |= dict(ensembles=lambda: (Ensemble([seeded()], 'logits'), Ensemble([seeded()], 'geometric')))
DIFFERENT |= dict(cached=lambda: (CachedTeacher(seeded(seed=0)), CachedTeacher(seeded(seed=1))))

class Shift(Transform):
    "A transform of the user's that notes what it drew"
    def __init__(self, most): self.most = most
    def encodes(self, x:torch.Tensor):
        self.drawn = torch.randint(self.most, (1,)).item()
        return x + self.drawn

class Waits(Callback):
    "Calls its setting otherwise"
    def __init__(self, seconds): self.time = seconds

def images(max_rotate=10, size=32, labels='abcd'):
    "Loaders with transforms of fastai"
    tfms = [*aug_transforms(max_rotate=max_rotate), Normalize.from_stats([.5], [.5], cuda=False)]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=lambda i: np.full((9, 9), i, np.uint8), get_y=labels.__getitem__,
        splitter=IndexSplitter([3]), item_tfms=RandomResizedCrop(size), batch_tfms=tfms)
    return block.dataloaders(range(4), bs=2, num_workers=0)

class Squares(torch.utils.data.Dataset):
    def __init__(self, transform=None): self.transform = transform
    def __len__(self): return 4

def in_torch(**kwargs): return torch.utils.data.DataLoader(Squares(**kwargs), 2)

DIFFERENT |= dict(class_lists=lambda: (class_with(add, widths=[4, 8]), class_with(add, widths=[4, 9])))
DIFFERENT |= dict(recurrent=lambda: tuple(helpers.seeded(AWD_LSTM, 20, 8, 8, 1, weight_p=o) for o in (.1, .9)))
DIFFERENT |= dict(renamed_settings=lambda: (Waits(1), Waits(2)), mixed_up=lambda: (MixUp(.1), MixUp(.9)))
DIFFERENT |= dict(references=lambda: (lambda m: ([m, m], [m, 1]))([5]))
DIFFERENT |= dict(augmentation=lambda: (images(10), images(20)), items=lambda: (images(size=32), images(size=64)))
DIFFERENT |= dict(labels_behind_a_method=lambda: (images(), images(labels='dcba')))
DIFFERENT |= dict(transforms_of_torch=lambda: (in_torch(), in_torch(transform=add)))

@pytest.mark.parametrize('make', DIFFERENT.values(), ids=DIFFERENT)
def test_differences(make):
    "What differs has other names, also behind a function; what is made again has the same"
    one, other = make()
    assert description(one) != description(other) and description(holder(one)) != description(holder(other))
    assert [description(o) for o in (one, other)] == [description(o) for o in make()]

SCRIPT = """
import sys; sys.path.insert(0, 'tests')
from test_description import DIFFERENT, Scale
from fastkd.description import description
from fastkd.shared import content_digest
class Net(Scale):
    def __init__(self):
        super().__init__(1)
        for name in 'abcdefgh': setattr(self, name, [Scale(2), {name, name*2, name*3}])
print(*(description(o) for make in DIFFERENT.values() for o in make()), description(Net()), description({1.: add for add in [len]}))
"""

def test_processes():
    "Sets have another order in each, objects another address, and a terminal another width"
    env = [dict(PYTHONHASHSEED=str(i), COLUMNS=str(60*i)) for i in (1, 2)]
    told = [subprocess.run([sys.executable, '-W', 'ignore', '-c', SCRIPT], capture_output=True, text=True, env={**os.environ, **o},
        cwd=Path(__file__).parent.parent) for o in env]
    one, other = (o.stdout.split() for o in told)
    assert len(one) == 2*len(DIFFERENT) + 2, told[0].stderr
    assert [a == b for a, b in zip(one, other)] == [True]*len(one)

def test_what_has_no_end():
    "Cycles, depth, what is shared many times"
    ring, table, deep, shared = [], {}, holder(0), [1]
    ring.append(ring)
    table['table'] = table
    for _ in range(3000): deep = holder(deep)
    for _ in range(60): shared = [shared, shared]
    a, b = Plain(1), Plain(2)
    a.other, b.other = b, a
    assert len({description(o) for o in (ring, table, deep, shared, a, b)}) == 6

def test_what_cannot_be_looked_into():
    lazy, meta = nn.LazyLinear(3), nn.Linear(2, 3, device='meta')
    assert len({description(o) for o in (lazy, meta, open, object(), (o for o in 'abc'))}) == 5

def test_samples_are_not_looked_into():
    "Their type, size and batch size"
    class Own(torch.utils.data.Dataset):
        def __init__(self, n): self.n, self.seen = n, {}
        def __len__(self): return self.n
        def __getitem__(self, i): return self.seen.setdefault(i, i)
    data = Own(3)
    before = description(data)
    data[0]
    assert description(data) == before != description(Own(4))
    dls = images()
    before = description(dls)
    dls.one_batch()
    assert description(dls) == before # transforms have drawn numbers
    dls = learner().dls
    assert description(dls.train) == description(learner().dls.train) != description(dls.train.new(bs=7))

def test_what_runs_does_not_count():
    "A metric that was used, a class that keeps a list, a recurrent state"
    metric = AvgMetric(accuracy)
    before = description(metric)
    metric.reset()
    assert description(metric) == before
    kept = class_with(add, seen=[])
    kept.seen.append(dict(loss=1))
    before = description(kept)
    kept.seen.append(dict(loss=2))
    assert description(kept) == before
    shift = Shift(3)
    before = description(shift)
    shift(torch.zeros(2))
    assert description(shift) == before != description(Shift(4))
    recurrent = AWD_LSTM(20, 8, 8, 1)
    before = description(recurrent)
    recurrent(torch.zeros(2, 3).long())
    assert description(recurrent) == before

NUMBER = 1
def attribute_of(learn): return learn.model.NUMBER

def test_attributes_are_no_globals(monkeypatch):
    before = description(attribute_of)
    monkeypatch.setattr(sys.modules[__name__], 'NUMBER', 2)
    assert description(attribute_of) == before != description(lambda learn: NUMBER)

def test_what_is_said_does_not_count():
    def one(): "A docstring"
    def another(): "Another docstring"
    another.__name__, another.__qualname__ = one.__name__, one.__qualname__
    assert description(one) == description(another)

def test_modules_of_the_user(tmp_path, monkeypatch):
    "Named in full, imported within a function, or as an attribute of a package"
    package = tmp_path/'mine_described'
    package.mkdir()
    (package/'__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    code = 'import mine_described.models\ndef by_name(): return mine_described.models.make()\n' \
        'def within():\n    from mine_described.models import make\n    return make()\n'
    def told(number):
        (package/'models.py').write_text(f'def make(): return {number}\n')
        for name in [o for o in sys.modules if o.startswith('mine_described')]: del sys.modules[name]
        names = dict(__name__='__main__')
        exec(code, names)
        return [description(names[o]) for o in ('by_name', 'within')]
    sys.dont_write_bytecode = True
    first, second = told(1), told(22)
    assert first == told(1) and [a == b for a, b in zip(first, second)] == [False, False]

# ---- What makes a difference, and is easily overlooked

def test_frozen_weights_and_other_losses():
    model = convnet(4)
    free = description(model)
    model[0].requires_grad_(False)
    assert description(model) != free
    for name, value in dict(loss_func=LabelSmoothingCrossEntropyFlat(), opt_func=SGD, lr=.5, wd=.3).items():
        one, other = (learner(model) for _ in range(2))
        setattr(other, name, value)
        assert description(one) != description(other), name

def test_data_that_differ():
    import torchvision.transforms as T
    frames = [pd.DataFrame({name: [1, 2]}) for name in 'ab']
    assert description(frames[0]) != description(frames[1])
    assert description(np.array(['a.png'])) != description(np.array(['b.png']))
    halved, doubled = (T.Compose([T.Lambda(f)]) for f in (lambda x: x/2, lambda x: x*2))
    assert description(halved) != description(doubled)
    assert description(torch.eye(3).to_sparse()) != description(2*torch.eye(3).to_sparse())
    assert description(class_with(add, sizes=[[1, 2]])) != description(class_with(add, sizes=[[1, 3]]))

def test_a_compiled_model_is_the_model():
    model = nn.Linear(2, 2)
    assert len({description(o) for o in (torch.compile(model), torch.compile(model))}) == 1

@pytest.mark.parametrize('line', ['from mynet.parts import width', 'from .parts import width'])
def test_imports_within_a_function(tmp_path, monkeypatch, line):
    "What a function imports is described before it was ever called"
    found = []
    for width in (4, 8):
        folder = tmp_path/str(width)
        (folder/'mynet').mkdir(parents=True)
        (folder/'mynet'/'__init__.py').write_text(f'def make():\n    {line}\n    return width()\n')
        (folder/'mynet'/'parts.py').write_text(f'def width(): return {width}\n')
        code = 'import mynet; from fastkd.description import description; told = lambda: print(description(mynet.make)); ' \
            'told(); mynet.make(); told()'
        env = {**os.environ, 'PYTHONPATH': f'{folder}{os.pathsep}{Path(__file__).parent.parent}'}
        run = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=env, capture_output=True, text=True, check=True)
        found.append(run.stdout.split())
    assert found[0][0] == found[0][1] != found[1][0] == found[1][1]

# ---- Arrays and tables

X = np.arange(24., dtype='f4').reshape(4, 6)
SAME = dict(columns_first=np.asfortranarray(X), backwards=X[::-1, ::-1].copy()[::-1, ::-1], every_other=np.repeat(X, 2, 1)[:, ::2],
    other_byte_order=X.astype('>f4'), read_only=np.broadcast_to(X, X.shape), tensor=torch.tensor(X), transposed=torch.tensor(X.T.copy()).T,
    lazy=-(-torch.tensor(X)), expanded=torch.tensor(X)[None].expand(2, 4, 6)[0])

@pytest.mark.parametrize('name', SAME)
def test_strides_are_not_content(name): assert content_digest(dict(x=SAME[name])) == content_digest(dict(x=X))

def strided(*shape, stride): return torch.arange(99.).as_strided(shape, stride)

@pytest.mark.parametrize('given,plain', [
    (strided(1, 32, stride=(1, 1)), torch.arange(32.)[None]), (strided(1, stride=(7,)), torch.zeros(1)),
    (strided(1, 1, stride=(32, 32)), torch.zeros(1, 1)), (strided(3, 1, stride=(1, 50)), torch.arange(3.)[:, None]),
    (strided(1, 1, 0, stride=(0, 5, 3)), torch.zeros(1, 1, 0)), (strided(stride=()), torch.tensor(0.)),
    (strided(0, stride=(9,)), np.empty(0, 'f4')), (strided(2, 0, stride=(1, 32)), np.empty((2, 0), 'f4'))])
def test_any_stride_of_one_or_none(given, plain): assert content_digest(dict(x=given)) == content_digest(dict(x=plain))

NAMES = '?', 'i1', 'u2', '>u4', 'u8', 'f2', '>f8', 'g', 'c8', 'c16', 'G', 'O', 'S3', 'U5', 'V4'
KINDS = [*(np.arange(n).astype(name) for n in (0, 1, 3) for name in NAMES),
    *(np.empty(shape, kind) for shape in ((0, 3), (3, 0), (0,)) for kind in ('f4', 'f8', 'i4', object)), np.array(3.), np.array(None),
    *(np.array(o, kind) for o in (['2020-01-01', 'NaT'], ['2020-01-01', '2020-01-02'], '2020-01-01', []) for kind in ('M8[D]', 'M8[ns]')),
    np.array([1, 2], 'm8[s]'), np.array([(1, 2.)], [('a', 'i4'), ('b', 'f8')]), np.array([(1, 2.)], [('a', 'i4'), ('c', 'f8')]),
    np.array([(1, [1])], [('a', 'i4'), ('b', object)]), np.array([[1, 2], [3]], object), np.array([[1, 2], [4]], object),
    np.array([X, X[0]], object), np.array([X, X[1]], object), np.array([{1: X}, {2: X}]), np.array([None, len, convnet])]

def test_arrays_of_any_kind():
    "Each is told from each other, and is itself when made anew, whatever it holds"
    found = [description(o) for o in KINDS]
    assert found == [description(copy.deepcopy(o)) for o in KINDS]
    alike = [(a, b) for i, a in enumerate(KINDS) for j, b in enumerate(KINDS[:i]) if found[i] == found[j]]
    assert [(a.dtype, a.shape, b.dtype) for a, b in alike] == [(a.dtype, a.shape, a.dtype.newbyteorder()) for a, b in alike]
    many = np.zeros(5000, 'M8[s]'), np.arange(5000).astype('M8[s]'), np.array([str(i) for i in range(5000)]), np.array(['0']*5000)
    assert len({content_digest(dict(x=o)) for o in many}) == 4
    deep = np.array([np.zeros(5000), None], object), np.array([np.eye(1, 5000, 2500)[0], None], object)
    assert description(deep[0]) != description(deep[1])

FRAMES = [pd.DataFrame(), pd.DataFrame(columns=['a']), pd.DataFrame(dict(a=[1])), pd.DataFrame(dict(b=[1])), pd.DataFrame(dict(a=[[1]])),
    pd.DataFrame(dict(a=[[2]])), pd.DataFrame(dict(a=[X])), pd.DataFrame(dict(a=[X + 1])), pd.DataFrame(dict(a=[torch.ones(2)])),
    pd.DataFrame(dict(a=[torch.zeros(2)])), pd.DataFrame(dict(a=[[1]]), index=[3]), pd.Series([{1: 2}]), pd.Series([{1: 3}]),
    pd.Series([3, None], dtype='Int64'), pd.Series(pd.Categorical(['u', 'v'])), pd.Index(['a']), pd.MultiIndex.from_tuples([(1, 'a')])]

def test_tables_of_any_kind():
    found = [description(o) for o in FRAMES]
    assert found == [description(copy.deepcopy(o)) for o in FRAMES] and len({*found}) == len(FRAMES)
