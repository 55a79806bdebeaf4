"A cache that is never wrong: fingerprints, what is kept and for how long, what is written, and training with it."
import copy, numpy as np, os, pickle, pytest, random, resource, signal, subprocess, sys, time, torch, torch.nn.functional as F, warnings
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, SGD, load_learner, set_seed
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.text.models.core import get_language_model, get_text_classifier
from fastai.torch_core import TensorImage
from fastai.vision.models.unet import DynamicUnet
from fastkd import cache
from fastkd.all import *
from fastkd.cache import N_CONTROL, CachedTeacher, _by_hash, _by_sums, fingerprints, identity
from fastkd.learners import _select
from fastkd.modules import logits
from fastkd.stored import StoredTeacher
from fastkd.teachers import Frozen, Teacher
from functools import partial, wraps
from helpers import (At, OnCPU, convnet, digits, fitted, furthest, learner, loaders, named_learner, quiet, raising, same, seeded,
    trained_teacher, weights)
from hypothesis import given, settings, strategies as st
from pathlib import Path
from torch import nn

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is') # random weights
each_method = pytest.mark.parametrize('method', [_by_hash, _by_sums])

# ---- Fingerprints

@each_method
@pytest.mark.parametrize('dtype', [torch.float32, torch.uint8, torch.float64])
def test_every_bit_counts(method, dtype):
    "A sample of 7 numbers, and all that differ from it in one bit or two bits"
    n_bits = 7*8*dtype.itemsize
    flips = [()] + [(i,) for i in range(n_bits)] + [(i, j) for i in range(n_bits) for j in range(i)][:2000]
    raw = torch.randint(256, (1, 7*dtype.itemsize), dtype=torch.uint8).repeat(len(flips), 1)
    for row, bits in enumerate(flips):
        for bit in bits: raw[row, bit//8] ^= 1 << bit%8
    assert len(set(method([raw.view(dtype)]))) == len(flips)

def check_neighbours(method, n):
    "Words that count up, in two places of a sample, and that only change places"
    base = torch.randint(-2**31, 2**31, (9,), dtype=torch.int64).int()
    x = base.repeat(n, 1)
    x[:n//2, 8] += torch.arange(n//2, dtype=torch.int32)
    x[n//2:, 0] += torch.arange(1, n - n//2 + 1, dtype=torch.int32)
    swapped = torch.stack([base[torch.randperm(9)] for _ in range(n//100)]).unique(dim=0)
    assert len(set(method([x]))) == n
    assert len(set(method([swapped]))) == len(swapped)

@each_method
def test_neighbours_differ(method): check_neighbours(method, 200_000)

@pytest.mark.slow
@each_method
def test_many_neighbours_differ(method): check_neighbours(method, 4_000_000)

def sample_of(dtype, shape):
    raw = torch.randint(2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).view(shape)

@each_method
@pytest.mark.parametrize('shape', [(40,), (40, 1), (40, 3), (40, 5, 1), (40, 2, 3, 3)])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.bool, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_content_of_any_type(method, dtype, shape):
    "Equal fingerprints where all bytes are equal, others elsewhere; whatever batch or layout they come in"
    x = sample_of(dtype, shape)
    rows = [x[i].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for i in range(len(x))]
    found = method([x])
    assert {(len(f), type(f)) for f in found} == {(16, bytes)}
    assert [[a == b for b in found] for a in found] == [[a == b for b in rows] for a in rows]
    picked = [7, 3, 3, 30]
    assert method([x[picked]]) == [found[i] for i in picked] and method([x[::3]]) == found[::3] and method([x[5:6]]) == [found[5]]
    assert method([x.as_subclass(TensorImage)]) == found
    if len(shape) > 1: assert method([x.transpose(0, 1).contiguous().transpose(0, 1)]) == found
    if len(shape) == 4: assert method([x.to(memory_format=torch.channels_last)]) == found

@each_method
def test_bits_and_not_values(method):
    "nan is nan, and the zeros differ: another key is never wrong"
    x = torch.tensor([[float('nan'), 1.], [float('nan'), 1.], [0., 1.], [-0., 1.], [1., 0.]])
    a, b, c, d, e = method([x])
    assert a == b and len({a, c, d, e}) == 4
    assert method([torch.ones(2, 1).expand(2, 4)]) == method([torch.ones(2, 4)])

@each_method
def test_inputs_without_numbers(method):
    "As the categories of a table that has none"
    x = torch.randn(5, 3)
    assert len(set(method([torch.zeros(5, 0, dtype=torch.int64), x]))) == 5

def key_of(*inputs):
    cached = CachedTeacher(Frozen(seeded(nn.Linear, 2, 2)))
    tensors = cached._checked(inputs)
    return cached._question(inputs), fingerprints(tensors)[0]

def test_where_inputs_end():
    "('ab', 'c') is not ('a', 'bc'); nor are other types, shapes, names or flags of the same bytes"
    x, y = torch.arange(3, dtype=torch.uint8)[None], torch.arange(4, dtype=torch.float32)[None]
    questions = [(x[:, :1], x[:, 1:]), (x[:, :2], x[:, 2:]), (x,), (x[:, None],), ([x],), ({'a': x},), ({'b': x},), (x, True), (x, None),
        (y,), (y.view(torch.int32),), (y.view(torch.int64),), ({'a': y, 'b': y + 1},), ({'b': y, 'a': y + 1},)]
    assert len({key_of(*question) for question in questions}) == len(questions)
    assert key_of({'a': x}) == key_of({'a': x.clone()})

@pytest.mark.parametrize('inputs', [(torch.zeros(2, 3), torch.zeros(3, 3)), (torch.tensor(1.),), (torch.zeros(2, 3), torch.tensor(1.)), ()])
def test_inputs_that_are_no_batch(inputs):
    with pytest.raises(ValueError, match='of one batch size'): key_of(*inputs)

# ---- Whose answer

class Scaled(nn.Module):
    "A plain attribute is part of the answer"
    def __init__(self, scale=1.):
        super().__init__()
        self.head, self.scale = nn.Linear(4, 3), scale

    def forward(self, x): return self.head(x)*self.scale

def first_half(output): return output[:, :1]
def other_half(output): return output[:, 1:]
def columns(*order): return partial(_select, find=logits, columns=torch.tensor(order), axis=1)

TEACHERS = dict(plain=lambda: Frozen(seeded(Scaled)), weights=lambda: Frozen(seeded(Scaled, seed=1)),
    scale=lambda: Frozen(seeded(Scaled, 2.)), tensor=lambda: Frozen(seeded(Scaled, torch.tensor(3.))),
    half=lambda: Frozen(seeded(Scaled), dtype=torch.bfloat16), double=lambda: Frozen(seeded(Scaled).double()),
    first=lambda: Frozen(seeded(Scaled), first_half), other=lambda: Frozen(seeded(Scaled), other_half),
    columns=lambda: Frozen(seeded(Scaled), columns(2, 1, 0)), columns2=lambda: Frozen(seeded(Scaled), columns(1, 2, 0)))

def test_teachers_differ():
    "And the same one is the same when it is made again"
    found = [identity(make(), on_disk=True) for make in TEACHERS.values()]
    assert len(set(found)) == len(TEACHERS)
    assert found == [identity(make(), on_disk=True) for make in TEACHERS.values()]

MADE = """
import torch
from fastkd.cache import _by_hash, _by_sums, identity
from fastkd.learners import _select
from fastkd.modules import logits
from fastkd.teachers import Frozen
from functools import partial
x, model = torch.arange(60.).view(4, 15), torch.nn.Linear(4, 3)
with torch.no_grad(): model.weight.copy_(x[:3, :4]), model.bias.zero_()
columns = partial(_select, find=logits, columns=torch.tensor([2, 1, 0]), axis=1)
made = [o.hex() for method in (_by_hash, _by_sums) for o in method([x])] + [identity(Frozen(model, columns), on_disk=True)]
"""

@pytest.mark.slow
def test_same_in_every_process():
    "Fingerprints, and the identity of a teacher whose settings hold a tensor, in a process of its own"
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', MADE + 'print(made)'], capture_output=True, text=True,
        env={**os.environ, 'PYTHONHASHSEED': '7', 'PYTHONPATH': str(Path(cache.__file__).parents[1])})
    space = {}
    exec(MADE, space)
    assert run.stdout.strip() == str(space['made']), run.stderr[-500:]

def test_state_is_no_setting():
    "What layers keep of their last input, as the hooks of a U-Net do, does not make a teacher another"
    def encoder(): return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1))
    unets = [seeded(DynamicUnet, encoder(), 2, (16, 16), seed=i) for i in range(2)]
    unets[1].load_state_dict(unets[0].state_dict())
    assert identity(Frozen(unets[0]), on_disk=True) == identity(Frozen(unets[1]), on_disk=True)

def test_quantized_teachers_differ():
    "Their weights are no parameters"
    one, other = [torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3))) for _ in range(2)]
    assert identity(Frozen(one)) != identity(Frozen(other))

REWRITTEN = ['def find(output): return output', 'def find(output): return output*2', 'def find(output): return output*3',
    'def find(output, k=1): return output*k', 'def find(output, k=2): return output*k', 'def find(output, *, k=2): return output*k',
    '@twice\ndef find(output): return output', '@twice\ndef find(output): return output + 1',
    'def find(output): return (lambda o: o + 1)(output)', 'def find(output): return (lambda o: o + 2)(output)']

def twice(func):
    "A decorator"
    @wraps(func)
    def inner(output): return func(func(output))
    return inner

def test_a_rewritten_function_is_another():
    "A cell of a notebook that is changed and run again gives a function of the same name"
    def made(code):
        space = {'__name__': 'fastkd.cache', 'twice': twice}
        exec(code, space)
        return identity(Frozen(seeded(Scaled), space['find']), on_disk=True)
    found = [made(code) for code in REWRITTEN]
    assert len(set(found)) == len(REWRITTEN) and found == [made(code) for code in REWRITTEN]

class Settled(nn.Module):
    "A layer with a setting"
    def __init__(self, setting):
        super().__init__()
        self.setting = setting

def test_plain_attributes():
    "Numbers of all kinds, names, functions, and lists and dicts of them; each another teacher, and the same when made again"
    def make():
        numbers = [0, 0., 1, True, np.float32(2), np.float64(2), np.int64(3)]
        lists = [None, 'a', 'b', (1, 2), [1, 2], {'a': 1}, {'a': 2}, {1, 2}]
        of_torch = [torch.float16, torch.tensor([1.]), torch.tensor([2.]), torch.Size([1, 2]), torch.relu, torch.tanh, nn.ReLU]
        return [*numbers, *lists, *of_torch, F.gelu, F.relu, partial(F.gelu, approximate='tanh'), first_half, other_half]
    found = [identity(Frozen(Settled(o))) for o in make()]
    assert len(set(found)) == len(found) and found == [identity(Frozen(Settled(o))) for o in make()]

def test_what_cannot_be_told_from_others(tmp_path):
    "A teacher that says nothing about itself is not written for other runs"
    teacher = type('Mine', (Teacher,), {})()
    cached = CachedTeacher(teacher, tmp_path)
    with pytest.raises(ValueError, match='cannot fingerprint .* for a cache on disk'): cached.outputs((torch.zeros(1, 4),))
    assert not list(tmp_path.iterdir())

def test_lambdas_are_told_by_their_code(tmp_path):
    "Also those that close over a number; the same one is the same in another run"
    def made(): return [lambda output: output, lambda output: output*2, *(twice_of(k) for k in (1, 2))]
    def twice_of(k): return lambda output: 2*k*output
    found = [identity(Frozen(seeded(Scaled), find), on_disk=True) for find in made()]
    assert len(set(found)) == 4 and found == [identity(Frozen(seeded(Scaled), find), on_disk=True) for find in made()]

def test_teachers_of_your_own():
    "In memory they are told apart by what they are"
    class Mine(Teacher):
        def __init__(self, factor): self.factor = factor
        def outputs(self, xb, layers=(), pred=True): return xb[0]*self.factor, {}
    x = torch.randn(5, 3)
    for factor in 2, 3:
        cached = CachedTeacher(Mine(factor))
        for _ in range(2): assert torch.equal(cached.outputs((x,))[0], x*factor)
        assert cached.stats['hits'] == 5

# ---- A teacher that is edited

SOURCE = """
import dataclasses, torch
from types import SimpleNamespace
from torch import nn
FACTOR, TABLE = {a}, torch.tensor([{b}])
def scaled(x): return x*FACTOR

@dataclasses.dataclass
class Inner:
    k: float = {a}

class Config:
    def __init__(self): self.k, self.inner = {b}, Inner()

class Net(nn.Module):
    power = {c}
    def __init__(self):
        super().__init__()
        self.cfg, self.names, self.offset = Config(), SimpleNamespace(scale={a}), {b}
        self.head, self.act = nn.Linear(4, 3), lambda x: x + {c}
        self.register_buffer('shift', torch.zeros(3), persistent=False)

    @property
    def gain(self): return {a}
    @staticmethod
    def turned(x): return x.flip(1)*{b}
    @classmethod
    def squared(cls, x): return x.abs()**cls.power
    def features(self, x): return scaled(x)*self.cfg.k + self.cfg.inner.k
    def _forward_impl(self, x): return self.squared(self.turned(self.features(x)))*self.gain
    def forward(self, x): return self.act(self.head(self._forward_impl(x))*self.names.scale + self.shift)*TABLE - self.offset
"""
NUMBERS = {name: 1. for name in 'abc'}

def written(**numbers):
    "A teacher as a file of code has it, with weights of its own"
    space = {'__name__': 'models_of_a_user'}
    exec(SOURCE.format(**{**NUMBERS, **numbers}), space)
    return seeded(space['Net']).eval()

class Listed:
    "A hook whose numbers stand in a list, which no fingerprint sees"
    def __init__(self, numbers): self.numbers = numbers
    def __call__(self, module, args, output): return output*self.numbers[0]

def edits():
    "Changes of a teacher in memory, each with a number"
    def method(name, change): return lambda model, k: setattr(model, name, change(getattr(model, name), k))
    yield 'weights', lambda model, k: model.head.weight.data.add_(k)
    yield 'buffer', lambda model, k: model.shift.add_(k)
    yield 'config', lambda model, k: setattr(model.cfg, 'k', 1 + k)
    yield 'nested config', lambda model, k: setattr(model.cfg.inner, 'k', 1 + k)
    yield 'namespace', lambda model, k: setattr(model.names, 'scale', 1 + k)
    yield 'number', lambda model, k: setattr(model, 'offset', k)
    yield 'method', method('features', lambda old, k: lambda x: old(x) + k)
    yield 'private method', method('_forward_impl', lambda old, k: lambda x: old(x)*(1 + k))
    yield 'method of the class', lambda model, k: setattr(type(model), 'features', lambda self, x: x*(1 + k))
    yield 'class attribute', lambda model, k: setattr(type(model), 'power', 1 + k)
    yield 'activation', lambda model, k: setattr(model, 'act', lambda x: x - k)
    yield 'hook', lambda model, k: model.head.register_forward_hook(lambda module, args, output: output*(1 + k))
    yield 'hook before', lambda model, k: model.head.register_forward_pre_hook(lambda module, args: (args[0] + k,))
    yield 'hook with a list', lambda model, k: model.register_forward_hook(Listed([1 + k]))
    yield 'layer', lambda model, k: setattr(model, 'head', seeded(nn.Linear, 4, 3, seed=int(1000*k)))
    yield 'global', lambda model, k: model.forward.__func__.__globals__.update(FACTOR=1 + k)

@pytest.mark.parametrize('name, edit', [pytest.param(name, edit, id=name) for name, edit in edits()])
@pytest.mark.parametrize('on_disk', [False, True])
def test_edits(name, edit, on_disk, tmp_path):
    "Ten of each kind, after which every answer is what the edited teacher says now"
    for i in range(10):
        folder, k = tmp_path/str(i), random.Random(f'{name} {i}').uniform(.01, 1)
        model = written()
        cached, before = CachedTeacher(model, folder if on_disk else None), Frozen(model).outputs((PICTURES,))[0].clone()
        cached.outputs((PICTURES,))
        cached.flush()
        edit(model, k)
        now = Frozen(model).outputs((PICTURES,))[0]
        assert not torch.allclose(now, before, 1e-4, 1e-4), 'this edit changes nothing'
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            if on_disk: cached = CachedTeacher(model, folder)
            else: cached.reset()
            assert torch.equal(cached.outputs((PICTURES,))[0], now), k
        by_sample = [o for o in said if 'answers otherwise than when its answers were stored' in str(o.message)]
        assert len(by_sample) == name.startswith('hook')
        assert torch.equal(cached.outputs((PICTURES,))[0], now) and cached.hits == 12 # the new answers are kept

@pytest.mark.parametrize('changed', [dict(a=2.), dict(b=2.), dict(c=2.), dict(a=1.5, c=3.)], ids=str)
def test_code_of_another_day(changed, tmp_path):
    "Methods, properties, defaults and numbers in a file that was edited between two runs; the first one's answers are there for it"
    x = PICTURES
    for numbers in {}, changed, {}, changed:
        cached = CachedTeacher(written(**numbers), tmp_path)
        assert torch.equal(cached.outputs((x,))[0], Frozen(written(**numbers)).outputs((x,))[0])
        cached.flush()
    assert (cached.hits, cached.misses) == (12, 0)

def test_what_is_unchanged_is_known(tmp_path):
    "A hook that watches, another run, a copy: no reason to ask anew"
    CachedTeacher(written(), tmp_path).precompute([PICTURES])
    model = written()
    for teacher in model, copy.deepcopy(model), pickle.loads(pickle.dumps(net())):
        if teacher is model: seen = count(teacher)
        cached = CachedTeacher(teacher, tmp_path)
        cached.outputs((PICTURES,))
        assert cached.misses == (12 if len(teacher._modules) == 3 else 0)
    assert seen == [6] # the control sample

def test_a_teacher_that_no_fingerprint_sees(tmp_path):
    "What it says depends on something outside: noticed when the folder is opened, and in each epoch"
    outside = [torch.tensor(1.)]
    class Outside(Scaled):
        def forward(self, x): return self.head(x)*outside[0]
    cached, x = CachedTeacher(seeded(Outside), tmp_path), PICTURES
    cached.outputs((x,))
    cached.flush()
    for factor in 2., 3.:
        outside[0] = torch.tensor(factor)
        for again in CachedTeacher(seeded(Outside), tmp_path), cached:
            again.reset()
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                assert torch.equal(again.outputs((x,))[0], seeded(Outside)(x))
            again.flush()
    again = CachedTeacher(seeded(Outside), tmp_path)
    assert torch.equal(again.outputs((x,))[0], seeded(Outside)(x)) and again.misses == 0

def test_what_is_discarded_is_that_teachers_only(tmp_path):
    "Others in the folder keep what they have"
    outside = [torch.tensor(1.)]
    class Outside(Scaled):
        def forward(self, x): return self.head(x)*outside[0]
    teachers = lambda: [CachedTeacher(o, tmp_path) for o in (seeded(Outside), net())]
    for cached in teachers(): cached.precompute([PICTURES])
    outside[0] = torch.tensor(2.)
    with pytest.warns(UserWarning, match='discarded'):
        for cached in teachers(): cached.precompute([PICTURES])
    assert [(o.hits, o.misses) for o in [cached.precompute([PICTURES]) for cached in teachers()]] == [(12, 0), (12, 0)]

def test_answers_without_their_control_sample(tmp_path):
    "Are not used"
    CachedTeacher(net(), tmp_path).precompute([PICTURES])
    control, = tmp_path.glob('*.control')
    control.unlink()
    cached = CachedTeacher(net(), tmp_path)
    cached.outputs((PICTURES,))
    assert (cached.hits, cached.misses) == (0, 12)

SEEN = """
from types import SimpleNamespace
from operator import itemgetter
from torch import nn
import torch
CFG, REGISTRY = dict(lim={a}), dict(act=lambda o: o.clamp(max={b}))
def bounded(o): return o.clamp(max=bounded.lim)
bounded.lim = {c}
def in_turn(*funcs):
    def run(o):
        for func in funcs: o = func(o)
        return o
    return run

class Net(nn.Module):
    cfg = SimpleNamespace(lim={d})
    def __init__(self):
        super().__init__()
        self.head, self.act = nn.Linear(4, 3), in_turn(lambda o: o.clamp(max={e}))
    def forward(self, x): return self.act(bounded(REGISTRY['act'](self.head(x).clamp(max=CFG['lim'])))).clamp(max=self.cfg.lim)
"""

@pytest.mark.parametrize('edited', 'abcde')
def test_edits_that_no_control_sample_sees(edited, tmp_path):
    "A bound that the kept inputs do not reach: in a dict or a registry of functions, on a function, on a class, in a closure"
    def made(**numbers):
        space = {'__name__': 'models_of_a_user'}
        exec(SEEN.format(**{**dict.fromkeys('abcde', 1e9), **numbers}), space)
        return seeded(space['Net']).eval()
    x = torch.cat([PICTURES*.01, 100*PICTURES])
    before, teacher = made(**{edited: 5.}), made(**{edited: 9.})
    CachedTeacher(before, tmp_path).precompute([x])
    expected = teacher(x)
    assert torch.equal(expected[:8], before(x)[:8]) and not torch.equal(expected, before(x))
    cached = CachedTeacher(teacher, tmp_path)
    assert torch.equal(cached.outputs((x,))[0], expected) and cached.hits == 0

def test_an_edit_between_two_calls_of_precompute(tmp_path):
    "Each call looks at the teacher anew"
    model = seeded(Scaled)
    cached = CachedTeacher(model, tmp_path).precompute([PICTURES])
    model.scale = 3.
    cached.precompute([PICTURES + 1])
    for scale, x in (1., PICTURES), (3., PICTURES + 1), (1., PICTURES + 1):
        assert torch.equal(CachedTeacher(seeded(Scaled, scale), tmp_path).outputs((x,))[0], Frozen(seeded(Scaled, scale)).outputs((x,))[0])

# ---- Without a teacher

def files(folder): return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}

def test_without_its_teacher(tmp_path):
    "It reads, for training too; it writes and deletes nothing, and what it does not know is an error"
    CachedTeacher(trained_teacher(), tmp_path, 10_000_000).precompute(loaders(digits()[:100]).train, ['block2'])
    before = files(tmp_path)
    for loss in SoftTarget(T=4), SoftTarget(T=4) + 10*FitNet().on('block2', 'block2'):
        cached = CachedTeacher(None, tmp_path, max_bytes=10)
        assert furthest(trained(KD(cached, loss)), trained(KD(trained_teacher(), loss))) < 2e-6
        assert cached.misses == 0
    with pytest.raises(ValueError, match='no answer to 1 of these inputs.*CachedTeacher.teacher, path'): trained(KD(cached), [noise()])
    def of(*places): return torch.stack([digits()[i][0] for i in places]),
    with pytest.raises(ValueError, match='no answer to 1 of these inputs'): cached.outputs(of(5, 500))
    with pytest.raises(ValueError, match='no answer to 2 of these inputs'): cached.outputs(of(5, 6), ['block1'])
    assert files(tmp_path) == before and not cached.settings() and not cached.modules() and cached.live is cached

def test_without_its_teacher_in_another_precision(tmp_path):
    "The answers are what they are, also where the student runs in half precision"
    CachedTeacher(trained_teacher(), tmp_path).precompute(loaders(digits()[:100]).train)
    cached = CachedTeacher(None, tmp_path)
    trained(KD(cached), [OnCPU(AMPMode.BF16)], n_epoch=2)
    assert (cached.hits, cached.misses) == (201, 0) # and the probe's

def test_whose_answers(tmp_path):
    "Of two teachers in a folder one has to be given; no folder, no teacher"
    for seed in range(2): CachedTeacher(seeded(convnet, 4, seed=seed), tmp_path).precompute(loaders(digits()[:10], bs=5).train)
    cached = CachedTeacher(None, tmp_path)
    with pytest.raises(ValueError, match='holds answers of several teachers'): cached.outputs((digits()[0][0][None],))
    with pytest.raises(TypeError, match='reads from a folder: CachedTeacher.None, path'): CachedTeacher(None)
    with pytest.raises(FileNotFoundError, match='there is no folder'): CachedTeacher(None, tmp_path/'nowhere')
    assert not (tmp_path/'nowhere').exists()

# ---- Content, and not how it lies in memory

@each_method
def test_strides_are_not_content(method):
    "Of tables of one column as pandas 3 makes them, of one row, turned, cut out, expanded, empty"
    x = torch.randn(32, 5)
    views = [(x[:, :1].clone(), torch.empty(32).as_strided((32, 1), (1, 32)).copy_(x[:, :1])),
        (x[:1].clone(), torch.empty(5).as_strided((1, 5), (77, 1)).copy_(x[:1])),
        (x[:1, :1].clone(), torch.empty(1).as_strided((1, 1), (32, 32)).copy_(x[:1, :1])),
        (x, x.T.contiguous().T), (x, torch.cat([x, x], 1)[:, :5]), (x[:1].repeat(4, 1), x[:1].expand(4, 5)), (x[:, :0], x.T[:0].T)]
    for plain, view in views: assert method([view]) == method([plain]) and len(method([view])) == len(plain)

def test_batches_of_a_table(tmp_path):
    "As pandas hands them out, with strides of (1, 32)"
    import pandas as pd
    cached = CachedTeacher(seeded(nn.Linear, 1, 2), tmp_path)
    for i in range(2):
        frame = pd.DataFrame(dict(a=np.arange(32.), b=np.arange(32.)))
        x = torch.as_tensor(frame[['a']].values).float().as_strided((32, 1), (1, 32))
        assert torch.equal(cached.outputs((x,))[0], cached.teacher.outputs((x,))[0])
    assert cached.hits == 32

# ---- Against a model of it

def net(): return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
PICTURES = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
SIZES = {'pred': 12, 'layer 0': 32, 'layer 1': 32} # bytes of a sample

def change(model, seed):
    "New weights, on each of the ways in which they come"
    values = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if seed%3 == 0: p.copy_(values[name])
            elif seed%3 == 1: p.data = values[name]
            else: setattr(model[int(name[0])], name[2:], nn.Parameter(values[name]))

def count(model):
    "Sizes of the batches that reach a model"
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes

def check_kept(memory, interrupted=False):
    "What is really there is within the limit; the count is exact, or too large after an interrupt; no tensor holds a larger one"
    tensors = [o for block in memory.blocks for o in block.tensors.values()]
    assert sum(o.numel()*o.element_size() for o in tensors) <= memory.n_bytes <= memory.max_bytes
    n_bytes = sum(block.n_bytes for block in memory.blocks)
    assert n_bytes == memory.n_bytes or interrupted and n_bytes < memory.n_bytes
    for block in memory.blocks: assert block.file or all(o.untyped_storage().nbytes() == o.nbytes for o in block.tensors.values())
    indexed = {id(block) for places in memory.places.values() for block, *_ in places.values()}
    assert indexed <= {id(block) for block in memory.blocks}

class Expected:
    "Which questions are known, by the rules: blocks of what was asked anew, the oldest out first"
    def __init__(self, max_bytes): self.max_bytes, self.blocks, self.n_bytes, self.checked = max_bytes, [], [], set()

    def ask(self, version, rows, fields):
        "How many samples the model has to be asked about"
        new = [row for row in rows if not all(self._last((version, row, field)) for field in fields)]
        if not new: return 0
        self.blocks.append({(version, row, field) for row in new for field in fields})
        self.n_bytes.append(sum(len(new)*(SIZES[field] + 300) for field in fields))
        while sum(self.n_bytes) > self.max_bytes: self.blocks, self.n_bytes = self.blocks[1:], self.n_bytes[1:]
        alone = len(new) > 1 and (version, fields) not in self.checked
        if alone: self.checked.add((version, fields))
        return len(new) + alone*min(N_CONTROL, len(new)//2)

    def _last(self, question): return any(question in block for block in self.blocks)

layers_asked = st.sampled_from([(), ('0',), ('1', '0')])
asks = st.tuples(st.just('ask'), st.lists(st.integers(0, 11), min_size=1, max_size=6), st.booleans(), layers_asked)
others = st.tuples(st.just('change'), st.integers(3, 11)) | st.sampled_from([('flush',), ('reopen',)])

def run_against_model(steps, max_bytes, folder=None):
    model, version = net(), 0
    sizes, cached, expected = count(model), CachedTeacher(model, folder, max_bytes), Expected(max_bytes)
    for step, *args in steps:
        if step == 'change':
            version, = args
            change(model, version)
        elif step == 'flush': cached.flush()
        elif step == 'reopen' and folder:
            cached.flush()
            with warnings.catch_warnings(): # it may be larger than the limit by a little
                warnings.simplefilter('ignore')
                cached, expected.checked = CachedTeacher(model, folder, max_bytes), set()
            cached._holds = lambda *args: True # this asks about control samples, which the model does not count
        elif step == 'ask':
            rows, pred, layers = args
            fields = tuple(['pred']*pred + [f'layer {name}' for name in layers])
            if not fields: continue
            sizes.clear()
            answer, activations = cached.outputs((PICTURES[rows],), layers, pred)
            if folder is None or max_bytes > 1e6: assert sum(sizes) == expected.ask(version, rows, fields)
            expect, expect_fm = Frozen(copy.deepcopy(model)).outputs((PICTURES[rows],), layers, pred)
            assert (answer is None) == (not pred) and list(activations) == list(layers)
            for a, b in zip([answer]*pred + list(activations.values()), [expect]*pred + list(expect_fm.values())):
                assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
        check_kept(cached.memory)
        if folder: assert sum(file.stat().st_size for file in folder.glob('*.safetensors')) <= max_bytes + 1000*len(cached.memory.blocks)

@settings(max_examples=60)
@given(steps=st.lists(asks | others, max_size=25), max_bytes=st.sampled_from([0, 700, 2000, 5000, 2**30]))
def test_against_a_model_in_memory(steps, max_bytes): run_against_model(steps, max_bytes)

@settings(max_examples=25)
@given(steps=st.lists(asks | others, max_size=20), max_bytes=st.sampled_from([0, 2000, 20000, 2**30]))
def test_against_a_model_on_disk(steps, max_bytes, tmp_path_factory): run_against_model(steps, max_bytes, tmp_path_factory.mktemp('cache'))

@pytest.mark.slow
@settings(max_examples=1500)
@given(steps=st.lists(asks | others, max_size=60), max_bytes=st.integers(0, 20000) | st.just(2**30))
def test_against_a_model_for_long(steps, max_bytes): run_against_model(steps, max_bytes)

def test_oldest_out_first():
    model = net()
    cached = CachedTeacher(model, max_bytes=4*(12 + 300))
    for row in range(8): cached.outputs((PICTURES[[row]],))
    sizes = count(model)
    for row in [7, 6, 5, 4]: cached.outputs((PICTURES[[row]],))
    assert sizes == []
    cached.outputs((PICTURES[[3]],))
    assert sizes == [1] and cached.memory.n_samples == 4

def test_weights_changed_out_of_sight():
    "In place through `.data`, of which PyTorch keeps no count: seen at the next epoch"
    model = net()
    cached = CachedTeacher(model)
    cached.outputs((PICTURES,))
    model[2].weight.data.add_(1)
    cached.reset()
    assert torch.equal(cached.outputs((PICTURES,))[0], Frozen(model).outputs((PICTURES,))[0])

def test_answers_of_other_precision():
    "Under autocast, in it again, and without"
    model = net()
    cached, sizes = CachedTeacher(model), count(model)
    for _ in range(2):
        for dtype in torch.float32, torch.bfloat16, torch.float16:
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32): assert cached.outputs((PICTURES,))[0].dtype == dtype
        assert cached.outputs((PICTURES.double(),))[0].dtype == torch.float32 # the weights' precision
    assert sizes == 3*[12, 6]

class InHalf(nn.Module):
    "Answers in float32 what it computed in half precision"
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)])

    def forward(self, x): return self.layers(x).float() if not x.dtype.is_complex else x

def test_rounding_in_half_precision_is_no_reason_to_refuse():
    x = torch.randn(64, 64)
    model = seeded(InHalf)
    for teacher, on in (Frozen(model), True), (Frozen(model, dtype=torch.bfloat16), False):
        with torch.autocast('cpu', torch.bfloat16, enabled=on): answer = CachedTeacher(teacher).outputs((x,))[0]
        assert answer.dtype == torch.float32

@pytest.mark.parametrize('find', [lambda output: [output], lambda output: output.sum(), lambda output: output[:3], lambda output: output.T])
def test_answers_that_are_no_rows(find):
    with pytest.raises((TypeError, ValueError), match="the teacher's pred"): CachedTeacher(Frozen(net(), find)).outputs((PICTURES,))

def test_what_can_be_cached():
    for wrong in 3, nn.ReLU, StoredTeacher(torch.zeros(3, 2)), 'teacher':
        with pytest.raises(TypeError): CachedTeacher(wrong).outputs(())
    with pytest.raises(ValueError, match='matched to its student in `fit`'): CachedTeacher(learner()).outputs((PICTURES,))

def test_caches_nest_and_are_copied():
    "A copy goes on by itself"
    model = net()
    cached = CachedTeacher(CachedTeacher(Frozen(model, dtype=torch.bfloat16)), max_bytes=5000)
    assert cached.settings() == (logits, torch.bfloat16) and isinstance(cached.live, Frozen)
    expected = cached.outputs((PICTURES,))[0]
    for other in copy.deepcopy(cached), pickle.loads(pickle.dumps(cached)):
        assert torch.equal(other.outputs((PICTURES[:5],))[0], expected[:5])
        for i in range(20): other.outputs((PICTURES[:5] + i,))
        check_kept(other.memory)
    check_kept(cached.memory)

# ---- Through the callback

def KD(teacher, loss=SoftTarget(T=4), **kwargs): return KnowledgeDistillationCallback(teacher, loss, **kwargs)
def features(): return SoftTarget(T=4) + 10*FitNet().on('block2', 'block2') + Attention().on('block1', 'block1')

def trained(cb, cbs=(), shuffle=False, n_epoch=3, seed=1, make=learner, **kwargs):
    "Weights after a fit with a callback"
    learn = make(opt_func=SGD, **kwargs)
    learn.dls.train.shuffle = shuffle
    return weights(fitted(learn, [cb, *cbs], n_epoch, seed=seed).model)

@pytest.mark.parametrize('loss', [SoftTarget(T=4), features], ids=['response', 'features'])
@pytest.mark.parametrize('on_disk', [False, True])
def test_training_is_the_same(loss, on_disk, tmp_path):
    "Bit for bit, and the teacher sees each sample once, the probe's, and the control sample when it is made and in each later epoch"
    loss = loss() if loss is features else loss
    model = trained_teacher()
    sizes, cached = count(model), CachedTeacher(model, tmp_path if on_disk else None)
    assert same(trained(KD(cached, loss)), trained(KD(trained_teacher(), loss)))
    assert sorted(sizes) == [1, 8, 8, 8, 25, 25, 25, 25]
    assert (cached.hits, cached.misses, cached.stats['samples']) == (200, 100, 100)
    sizes.clear()
    trained(KD(cached, loss), shuffle=True, seed=2, model=seeded(convnet, 6))
    assert sizes == [1, 8, 8, 8] # the probe of another student, another seed
    if not on_disk: return
    again = CachedTeacher(trained_teacher(), tmp_path)
    assert same(trained(KD(again, loss)), trained(KD(trained_teacher(), loss))) and again.misses == 0

def test_shuffled_training():
    "Rounding apart"
    cached = CachedTeacher(trained_teacher())
    for loss in SoftTarget(T=4), features():
        assert furthest(trained(KD(cached, loss), shuffle=True), trained(KD(trained_teacher(), loss), shuffle=True)) < 2e-6
    assert cached.misses == 200 # with layers, everything is asked anew

def test_smaller_last_batch_and_validation():
    cached = CachedTeacher(trained_teacher())
    def make(**kwargs):
        learn = learner(n=90, **kwargs)
        learn.dls.train.drop_last = False
        return learn
    assert same(trained(KD(cached), make=make), trained(KD(trained_teacher()), make=make))
    assert (cached.hits, cached.misses) == (180, 90)

def noise(): return At('before_batch', lambda learn: setattr(learn, 'xb', (learn.xb[0] + torch.randn_like(learn.xb[0]),)), nth=0)

@pytest.mark.parametrize('mixed', [lambda: MixUp(.4), noise], ids=['mixup', 'noise'])
@pytest.mark.parametrize('on_disk', [False, True])
def test_what_never_repeats(mixed, on_disk, tmp_path, recwarn):
    "Nothing is kept after two epochs, which is said once; fits with the same cache stay right, and `precompute` begins anew"
    cached = CachedTeacher(trained_teacher(), tmp_path if on_disk else None)
    kept = []
    note = At('after_train', lambda learn: kept.append(cached.memory.n_samples), nth=0)
    assert same(trained(KD(cached), [mixed(), note], n_epoch=5), trained(KD(trained_teacher()), [mixed()], n_epoch=5))
    assert kept == [100, 200, 0, 0, 0] and cached.memory.n_bytes == 0 and not cached.memory.places
    assert same(trained(KD(cached)), trained(KD(trained_teacher())))
    assert len([o for o in recwarn if 'no longer kept' in str(o.message)]) == 1
    assert not list(tmp_path.iterdir())
    dls = loaders(digits()[:100])
    cached.precompute(dls.train)
    assert cached.memory.n_samples == 100
    hits = cached.hits
    trained(KD(cached))
    assert cached.hits == hits + 300

def test_a_small_cache_gives_up_too(recwarn):
    "Where it can hold but a part, the limit does not hide that nothing repeats"
    cached = CachedTeacher(trained_teacher(), max_bytes=10_000)
    trained(KD(cached), [noise()], n_epoch=4)
    assert cached.memory.n_bytes == 0 and not cached.repeats
    in_order = CachedTeacher(trained_teacher(), max_bytes=10_000)
    with pytest.warns(UserWarning, match='no longer kept.*So does a max_bytes of 10000, which holds 25 answers'): trained(KD(in_order))

def test_a_part_is_better_than_nothing():
    "Of shuffled samples a small cache knows some"
    cached = CachedTeacher(trained_teacher(), max_bytes=20_000)
    assert furthest(trained(KD(cached), shuffle=True, n_epoch=5), trained(KD(trained_teacher()), shuffle=True, n_epoch=5)) < 2e-6
    assert cached.repeats and 20 < cached.hits < 300

def test_new_is_not_random(recwarn, tmp_path):
    "Another precision, larger images, another teacher in the folder, `lr_find` and interrupted fits are no reason to give up"
    other = CachedTeacher(seeded(convnet, 8), tmp_path)
    trained(KD(other), n_epoch=1)
    cached = CachedTeacher(trained_teacher(), tmp_path)
    for cbs in [], [OnCPU(AMPMode.BF16)], []: trained(KD(cached), cbs, n_epoch=1)
    larger = At('before_batch', lambda learn: setattr(learn, 'xb', (learn.xb[0].repeat(1, 1, 2, 2),)), nth=0)
    for _ in range(2): trained(KD(cached), [larger], n_epoch=1)
    assert (cached.hits, cached.misses, cached.repeats) == (200, 300, True)
    stopped = CachedTeacher(trained_teacher())
    for seed in range(4):
        stop = At('after_batch', raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): trained(KD(stopped), [stop], shuffle=True, n=1500, seed=seed)
    assert stopped.repeats

def test_precisions_are_not_mixed(tmp_path):
    "A student in half precision asks the teacher in half precision; a teacher has its own"
    cached, half = CachedTeacher(trained_teacher(), tmp_path), CachedTeacher(Frozen(trained_teacher(), dtype=torch.bfloat16), tmp_path)
    for _ in range(2):
        assert same(trained(KD(cached)), trained(KD(trained_teacher())))
        assert same(trained(KD(cached), [OnCPU(AMPMode.BF16)]), trained(KD(trained_teacher()), [OnCPU(AMPMode.BF16)]))
        assert same(trained(KD(half)), trained(KD(trained_teacher(), teacher_dtype=torch.bfloat16)))
    assert (cached.misses, half.misses) == (200, 100)

def test_a_learner_as_teacher(tmp_path):
    "Classes in another order, other statistics; a second fit finds what the first one asked"
    def teacher(): return named_learner(trained_teacher(), 'jihgfedcba', (.1, .5))
    def make(model=None, **kwargs): return named_learner(seeded(convnet, 4), stats=(.3, .4), **kwargs)
    with pytest.warns(UserWarning, match='reordered|converted'):
        cached = CachedTeacher(teacher(), tmp_path)
        expected = trained(KD(teacher()), make=make)
        for _ in range(2): assert same(trained(KD(cached), make=make), expected)
        again = CachedTeacher(teacher(), tmp_path)
        assert same(trained(KD(again), make=make), expected)
    assert (cached.misses, again.misses) == (100, 0)

def test_random_teacher_input(recwarn):
    "Is part of the question: every batch is a new one"
    def teacher(): return Frozen(trained_teacher(), inputs=lambda x: x + .1*torch.randn_like(x))
    cached = CachedTeacher(teacher())
    assert same(trained(KD(cached), n_epoch=2), trained(KD(teacher()), n_epoch=2))
    assert cached.hits == 0

class Two(nn.Module):
    "Two inputs, or a dict of them"
    def __init__(self, width):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(7, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, *xs):
        if isinstance(xs[0], dict): xs = xs[0]['a'], xs[0]['b']
        return self.head(torch.cat(xs, 1))

@pytest.mark.parametrize('as_dict', [False, True])
def test_several_inputs(as_dict):
    xs = torch.randn(40, 7)
    samples = [(dict(a=x[:3], b=x[3:]), (x[0] > 0).long()) if as_dict else (x[:3], x[3:], (x[0] > 0).long()) for x in xs]
    def make(**kwargs): return quiet(Learner(loaders(samples, bs=10), seeded(Two, 4), CrossEntropyLossFlat(), **kwargs))
    cached = CachedTeacher(seeded(Two, 8))
    assert same(trained(KD(cached), make=make), trained(KD(seeded(Two, 8)), make=make))
    assert furthest(trained(KD(cached), make=make, shuffle=True), trained(KD(seeded(Two, 8)), make=make, shuffle=True)) < 1e-6
    assert cached.misses == 40

def texts(n=40, bs=10):
    "Token numbers, padded in front to one length in a batch; the longest first"
    lengths = sorted([random.Random(i).randint(5, 30) for i in range(n)], reverse=True)
    rows = [torch.randint(2, 50, (length,), generator=torch.Generator().manual_seed(i)) for i, length in enumerate(lengths)]
    pad = lambda x, length: torch.cat([torch.ones(length - len(x), dtype=torch.int64), x])
    return [(pad(x, lengths[i - i%bs]), x[-1]%3) for i, x in enumerate(rows)]

def text_learner(samples, model, bs=10, loss_func=None, **kwargs):
    dls = DataLoaders.from_dsets(samples, samples, bs=bs, num_workers=0, device='cpu', shuffle=False)
    return quiet(Learner(dls, model, loss_func or CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback()], **kwargs))

def test_text_classifier():
    "Padding is part of the content"
    config = {**awd_lstm_clas_config, 'emb_sz': 12, 'n_hid': 16, 'n_layers': 2}
    def model(seed): return seeded(get_text_classifier, AWD_LSTM, 50, 3, seq_len=8, config=config, seed=seed)
    def make(**kwargs): return text_learner(texts(), model(0), **kwargs)
    cached = CachedTeacher(model(1))
    assert same(trained(KD(cached), make=make), trained(KD(model(1)), make=make))
    assert (cached.hits, cached.misses) == (80, 40)

class Elman(nn.Module):
    "A recurrent language model made of products alone, which every processor has in bfloat16, unlike torch's LSTM"
    def __init__(self, remembers=True):
        super().__init__()
        self.embed, self.step, self.head = nn.Embedding(50, 12), nn.Linear(28, 16), nn.Linear(16, 50)
        self.remembers = remembers
        self.reset()

    def reset(self): self.state = torch.zeros(10, 16)

    def forward(self, x):
        if not self.remembers: self.reset()
        state, states = self.state[:len(x)], []
        for word in self.embed(x).unbind(1):
            state = self.step(torch.cat([word, state], 1)).tanh().float()
            states.append(state)
        self.state = torch.cat([state.detach(), self.state[len(x):]])
        return self.head(torch.stack(states, 1)), states, states # as fastai's

def awd_lstm(): return get_language_model(AWD_LSTM, 50, {**awd_lstm_lm_config, 'emb_sz': 12, 'n_hid': 16, 'n_layers': 2})

@pytest.mark.parametrize('make,cbs', [(awd_lstm, []), (Elman, []), (Elman, [OnCPU(AMPMode.BF16)])], ids=['lstm', 'elman', 'bfloat16'])
def test_a_recurrent_language_model_is_refused(make, cbs):
    "Its answer depends on the batch before: said before the first step, and autocast is off"
    samples = [(x[:-1], x[1:]) for x in torch.randint(2, 50, (40, 11))]
    learn = text_learner(samples, seeded(make), loss_func=CrossEntropyLossFlat(axis=-1))
    before = weights(learn.model)
    cached = CachedTeacher(seeded(make, seed=1))
    with pytest.raises(ValueError, match='depends on more than the sample'): learn.fit(1, cbs=[KD(cached), *cbs])
    assert same(weights(learn.model), before) and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('cbs', [[], [OnCPU(AMPMode.BF16)]], ids=['float32', 'bfloat16'])
def test_a_recurrent_model_that_forgets_is_kept(cbs):
    "What is refused is the memory, and not the architecture"
    samples, cached = [(x[:-1], x[1:]) for x in torch.randint(2, 50, (40, 11))], CachedTeacher(seeded(Elman, False, seed=1))
    text_learner(samples, seeded(Elman), loss_func=CrossEntropyLossFlat(axis=-1)).fit(2, cbs=[KD(cached), *cbs])
    assert (cached.hits, cached.misses) == (40, 40)

def test_together_with_positions_and_metrics():
    "Losses that ask for positions, and what is shown of the teacher"
    seen = []
    def loss(pred, teacher_pred, index):
        seen.append(index.tolist())
        return (pred - teacher_pred).pow(2).mean()
    shown = []
    for teacher in CachedTeacher(trained_teacher()), trained_teacher():
        learn = learner(opt_func=SGD)
        note = At('after_epoch', lambda learn: shown.append(dict(zip(learn.recorder.metric_names[1:], learn.recorder.log[1:]))), 99, 0)
        fitted(learn, [KD(teacher, loss, teacher_metrics=True), note])
    half = len(shown)//2
    for a, b in zip(shown[:half], shown[half:]):
        assert a['teacher_accuracy'] == b['teacher_accuracy'] > .5 and a['teacher_agreement'] == b['teacher_agreement']
    assert sorted(sum(seen[:4], [])) == list(range(100))

def test_learners_are_copied_without_it(tmp_path):
    "As without a cache, the teacher stays behind"
    cached = CachedTeacher(trained_teacher(), tmp_path/'cache')
    learn = named_learner(seeded(convnet, 4), cbs=KD(cached), path=tmp_path)
    learn.fit(1)
    learn.export('learn.pkl')
    for other in copy.deepcopy(learn), pickle.loads(pickle.dumps(learn)), load_learner(tmp_path/'learn.pkl'):
        assert other.knowledge_distillation.teacher is None
    assert (tmp_path/'learn.pkl').stat().st_size < 60_000
    assert learn.knowledge_distillation.teacher is cached

def test_precompute():
    "Then nothing is left to ask, and training is not changed by it, loaders' random states included"
    model = trained_teacher()
    cached, learn, plain = CachedTeacher(model), learner(opt_func=SGD), learner(opt_func=SGD)
    set_seed(3)
    expected = random.random(), torch.rand(1)
    set_seed(3)
    cached.precompute(learn.dls.train)
    assert (random.random(), torch.rand(1)) == expected
    sizes = count(model)
    a, b = fitted(learn, KD(cached)), fitted(plain, KD(trained_teacher()))
    assert sizes == [1, 8, 8] and cached.stats == dict(hits=200, misses=100, samples=100, bytes=100*(40 + 300))
    assert furthest(weights(a.model), weights(b.model)) < 2e-6

def test_precompute_from_anything():
    "Loaders of PyTorch, lists of batches, batches without labels, several inputs"
    xs = torch.stack([x for x, _ in digits()[:20]])
    cached, pairs = CachedTeacher(trained_teacher()), digits()[:10]
    cached.precompute(torch.utils.data.DataLoader(pairs, batch_size=4))
    assert (cached.hits, cached.misses) == (0, 10)
    for batches in [(xs[:10], None)], [xs[:5], xs[5:10]], [[xs[:10]]]: cached.precompute(batches)
    assert (cached.hits, cached.misses) == (30, 10)
    two = CachedTeacher(seeded(Two, 4)).precompute(loaders([(x[:3], x[3:], 0) for x in torch.randn(12, 7)], bs=5).train, layers=['head.0'])
    assert two.memory.n_samples == 12 and [name.rpartition(' ')[0] for name in two.memory.places] == ['pred', 'layer head.0']

def test_other_loaders():
    "Content is all that a cache needs: those of PyTorch do as well"
    train = torch.utils.data.DataLoader(digits()[:60], batch_size=20)
    def make(**kwargs): return quiet(Learner(DataLoaders(train, train), seeded(convnet, 4), CrossEntropyLossFlat(), **kwargs))
    def run(teacher): return weights(fitted_plain(make(opt_func=SGD), KD(teacher)).model)
    cached = CachedTeacher(trained_teacher())
    assert same(run(cached), run(trained_teacher())) and (cached.hits, cached.misses) == (60, 60)

def fitted_plain(learn, cb):
    learn.fit(2, 1e-2, cbs=cb)
    return learn

# ---- Interrupted

class Interrupt:
    "Raise at the `nth` line of the cache's code"
    def __init__(self, nth): self.nth, self.n = nth, 0
    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != cache.__file__: return None
        if event == 'line':
            self.n += 1
            if self.n == self.nth: raise KeyboardInterrupt('on purpose')
        return self

    def during(self, act):
        before = sys.gettrace()
        sys.settrace(self)
        try: act()
        finally: sys.settrace(before)

def check_interrupts(places, tmp_path):
    "Wherever it is interrupted, what is kept is right and within the limit, and the folder opens"
    def work(cached):
        for i in range(6):
            cached.outputs((PICTURES[:8] + i,), ('0',))
            cached.outputs((PICTURES[4:] + i,))
        cached.flush()
    whole, cached = Interrupt(0), CachedTeacher(net(), tmp_path/'whole', 12_000)
    whole.during(lambda: work(cached))
    expected = Frozen(net())
    for place in places(whole.n):
        folder = tmp_path/str(place)
        cached = CachedTeacher(net(), folder, 12_000)
        with pytest.raises(KeyboardInterrupt): Interrupt(place).during(lambda: work(cached))
        for again in CachedTeacher(net(), folder, 12_000), cached:
            for i in range(6):
                for layers in (), ('0',):
                    found, live = again.outputs((PICTURES + i,), layers), expected.outputs((PICTURES + i,), layers)
                    assert torch.allclose(found[0], live[0], rtol=1e-6, atol=1e-6)
                    assert all(torch.allclose(found[1][name], live[1][name], rtol=1e-6, atol=1e-6) for name in layers)
            again.flush()
            check_kept(again.memory, interrupted=again is cached)

def test_interrupted_in_any_place(tmp_path): check_interrupts(lambda n: random.Random(0).sample(range(1, n), 10), tmp_path)

@pytest.mark.slow
def test_interrupted_in_many_places(tmp_path): check_interrupts(lambda n: range(1, n, 23), tmp_path)

@pytest.mark.parametrize('exc', [ValueError, KeyboardInterrupt])
def test_a_fit_that_fails_writes(exc, tmp_path):
    "What was asked until then"
    cached, learn = CachedTeacher(trained_teacher(), tmp_path), learner()
    with pytest.raises(exc): learn.fit(2, cbs=[KD(cached), At('before_step', raising(exc), nth=3)])
    assert CachedTeacher(trained_teacher(), tmp_path).memory.n_samples == 75

# ---- On disk

def in_child(act):
    "Run in a process of its own; returns its id"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        act()
        status = 0
    finally: os._exit(status)

def write_for_ever(folder, seed=0, n=10**9):
    "More answers than there is room for, so that files come and go all the time"
    cached = CachedTeacher(net(), folder, 60_000)
    for i in range(n):
        cached.outputs((PICTURES + (seed + i)%300,), ('0',))
        if i%3 == 0: cached.flush()

def check_folder(folder):
    "It opens, and all that is in it is what the teacher says; returns how many answers were there"
    cached, expected = CachedTeacher(net(), folder), Frozen(net())
    cached.path = None # only reads
    for i in range(300):
        found, live = cached.outputs((PICTURES + i,), ('0',)), expected.outputs((PICTURES + i,), ('0',))
        assert torch.allclose(found[0], live[0], rtol=1e-6, atol=1e-6) and torch.allclose(found[1]['0'], live[1]['0'], rtol=1e-6, atol=1e-6)
    return cached.hits

def check_kills(n, tmp_path):
    rand = random.Random(0)
    for _ in range(n):
        pid = in_child(lambda: write_for_ever(tmp_path, rand.randrange(300)))
        while not list(tmp_path.glob('*.safetensors')): time.sleep(.01)
        time.sleep(rand.uniform(0, .3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert check_folder(tmp_path) > 0

def test_killed(tmp_path): check_kills(3, tmp_path)

@pytest.mark.slow
def test_killed_often(tmp_path): check_kills(30, tmp_path)

def test_parts_of_killed_runs_go(tmp_path):
    "But not those that another process may be writing"
    for name, age in ('old', 7200), ('new', 60):
        (tmp_path/f'{name}.part').write_bytes(b'half')
        os.utime(tmp_path/f'{name}.part', (time.time() - age,)*2)
    CachedTeacher(net(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['new.part']

def test_a_file_that_vanishes_while_it_is_opened(tmp_path, monkeypatch):
    "Another process let it go between the look at its bytes and the mapping: the others are read"
    for i in range(2): cache.write_block(tmp_path, cache.Block([bytes([i])*24], {'pred': torch.full((1, 3), float(i))}))
    first, safe_open = sorted(tmp_path.glob('*.safetensors'))[0], cache._safetensors().safe_open
    def vanish(file, *args):
        if file != first: return safe_open(file, *args)
        file.unlink()
        raise RuntimeError(f'unable to open file <{file}> in read-only mode')
    monkeypatch.setattr(cache._safetensors(), 'safe_open', vanish)
    assert [block.tensors['pred'][0, 0].item() for block in cache.read_folder(tmp_path)] == [1.]

def test_two_processes(tmp_path):
    "Write to one folder at once, and let one another's oldest files go"
    children = [in_child(lambda: write_for_ever(tmp_path, 50*i, 60)) for i in range(2)]
    for _ in range(10): CachedTeacher(net(), tmp_path, 2**20)
    for pid in children: assert os.waitpid(pid, 0)[1] == 0
    assert check_folder(tmp_path) > 0 and not list(tmp_path.glob('*.part'))

def filled(folder):
    "Some files of answers"
    cached = CachedTeacher(net(), folder)
    for i in range(3):
        cached.outputs((PICTURES + i,), ('0',))
        cached.flush()
    return sorted(folder.glob('*.safetensors'))

def check_damage(n, folder):
    files, rand = filled(folder), random.Random(0)
    for _ in range(n):
        file = rand.choice(files)
        content = file.read_bytes()
        place = rand.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << rand.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f'{file.name} is damaged: delete it'): CachedTeacher(net(), folder)
        file.write_bytes(content)
    for length in 0, 1, 7, 8, 100, len(content) - 1:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match='is damaged'): CachedTeacher(net(), folder)
    file.unlink()
    assert check_folder(folder) == 24

def test_damaged(tmp_path): check_damage(20, tmp_path)

@pytest.mark.slow
def test_damaged_everywhere(tmp_path): check_damage(300, tmp_path)

@pytest.mark.parametrize('name', ['notes.txt', 'model.safetensors', '00000001-abc.safetensors', 'sub/x'])
def test_somebody_elses_folder(name, tmp_path):
    (tmp_path/name).parent.mkdir(exist_ok=True)
    (tmp_path/name).write_text('')
    with pytest.raises(ValueError, match='give the cache a folder of its own'): CachedTeacher(net(), tmp_path)
    assert (tmp_path/name).exists()

def test_a_file_is_no_folder(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): CachedTeacher(net(), tmp_path/'file')

def test_others_in_the_folder(tmp_path):
    "Every teacher finds its own answers, and no other's"
    x = torch.randn(6, 4)
    for n_hits in 0, 6:
        for name, make in TEACHERS.items():
            cached = CachedTeacher(make(), tmp_path)
            assert torch.equal(cached.outputs((x,))[0], make().outputs((x,))[0]), name
            assert cached.hits == n_hits
            cached.flush()

def test_limit_on_disk(tmp_path):
    "The oldest files go while it is filled; opened with another limit, all stays until something is written"
    cached = CachedTeacher(net(), tmp_path, 40_000)
    for i in range(40): cached.outputs((PICTURES + i,))
    cached.flush()
    size = lambda: sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 10_000 < cached.memory.n_bytes <= 40_000 and size() < 40_000
    newest = sorted(tmp_path.iterdir())[-1]
    before = sorted(tmp_path.iterdir())
    with pytest.warns(UserWarning, match='more than max_bytes=10000: the oldest files will go.*To keep them: max_bytes='):
        smaller = CachedTeacher(net(), tmp_path, 10_000)
    smaller.outputs((PICTURES + 39,))
    assert sorted(tmp_path.iterdir()) == before and (smaller.hits, smaller.misses) == (12, 0)
    smaller.outputs((PICTURES + 40,))
    smaller.flush()
    assert smaller.memory.n_bytes <= 10_000 and newest in tmp_path.iterdir() and len([*tmp_path.iterdir()]) < len(before)

def test_blocks_of_several_kinds(tmp_path):
    "Predictions, layers, other shapes of input, all pending"
    model, x = seeded(convnet, 4), torch.randn(8, 1, 16, 16)
    questions = [(x, ()), (x, ('block1',)), (x[..., :8, :8], ('block1',)), (x[:3] + 1, ('block2', 'block1'))]
    cached = CachedTeacher(model, tmp_path)
    expected = [cached.outputs((x,), layers) for x, layers in questions]
    cached.flush()
    assert not [block for block in cached.memory.blocks if block.file is None]
    for again in cached, CachedTeacher(seeded(convnet, 4), tmp_path):
        found, n_misses = [again.outputs((x,), layers) for x, layers in questions], again.misses
        for (pred, fm), (pred2, fm2) in zip(found, expected): assert torch.equal(pred, pred2) and same(fm, fm2)
    assert n_misses == 0

def test_full_disk(tmp_path, recwarn):
    "Training goes on, in memory, and is what it would have been; what was written stays"
    filled(tmp_path)
    before, limit = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    cached = CachedTeacher(trained_teacher(), tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try: found = trained(KD(cached))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert same(found, trained(KD(trained_teacher()))) and same(trained(KD(cached)), found)
    assert [str(o.message) for o in recwarn if f'cannot be written to {tmp_path}' in str(o.message)]
    assert sorted(tmp_path.iterdir()) == before and cached.misses == 100

def test_read_only_folder(tmp_path, monkeypatch):
    "An error at once: root, who may run the tests, can write anywhere"
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='cannot be written'): CachedTeacher(net(), tmp_path)

def test_without_safetensors(tmp_path, monkeypatch):
    "The error comes when the cache is made and not when it is full; in memory nothing is needed"
    for name in 'safetensors', 'safetensors.torch': monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "fastkd\[cache\]"'): CachedTeacher(net(), tmp_path)
    assert CachedTeacher(net()).outputs((PICTURES,))[0].shape == (12, 3)

# ---- What a layer computes

class Halves(nn.Module):
    def __init__(self, act=None):
        super().__init__()
        self.head, self.act = nn.Linear(6, 3), act

    def forward(self, x): return self.head(x)/2

def test_a_layer_of_other_code():
    "The same name, the same weights, another `forward`: another teacher"
    class Whole(Halves):
        def forward(self, x): return self.head(x)
    Whole.__name__ = Whole.__qualname__ = 'Halves'
    models = seeded(Halves), seeded(Whole), seeded(Halves)
    assert len({repr(model) for model in models}) == 1 and same(weights(models[0]), weights(models[1]))
    one, other, again = (identity(Frozen(model)) for model in models)
    assert one == again != other

def test_a_lambda_in_a_layer(tmp_path):
    "It is told from another one by its code, in memory and on disk"
    one, other = seeded(Halves, lambda x: x), seeded(Halves, lambda x: 100*x)
    teachers = [CachedTeacher(model).teacher for model in (one, other)]
    assert identity(teachers[0]) != identity(teachers[1]) and identity(teachers[0]) == identity(teachers[0])
    x = torch.randn(5, 6)
    for model in one, other:
        cached = CachedTeacher(model, tmp_path)
        assert torch.equal(cached.outputs((x,))[0], Frozen(model).outputs((x,))[0]) and cached.misses == 5
        cached.flush()

def test_attributes_are_looked_at_in_every_epoch():
    model, x = seeded(Halves), torch.randn(5, 6)
    cached = CachedTeacher(model)
    cached.outputs((x,))
    model.act = 3
    cached.reset()
    cached.outputs((x,))
    assert cached.stats['misses'] == 10
