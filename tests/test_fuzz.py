"Any settings, sensible or not: a fit ends with finite numbers, or says in our own words why it does not begin."
import fastkd, inspect, math, pytest, torch, torch.nn.functional as F, traceback
from fastai.basics import Learner
from fastai.callback.fp16 import AMPMode
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin, sched_cos, sched_exp, sched_lin, sched_no
from fastai.metrics import accuracy
from fastkd.all import *
from functools import partial
from helpers import At, OnCPU, is_unchanged, loaders, n_hooks, quiet, same, state, weights
from hypothesis import event, given, settings, strategies as st
from numbers import Number
from pathlib import Path
from torch import nn

HOME = Path(fastkd.__file__).parent
pytestmark = pytest.mark.filterwarnings('ignore')

# ---- Models of all shapes

class Net(nn.Module):
    "Convolutions and a head; what it returns has many forms"
    def __init__(self, width, n_classes, form):
        super().__init__()
        self.form, self.first, self.second = form, nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2*width, 3, stride=2, padding=1)
        self.norm, self.head, self.unused = nn.GroupNorm(1, 2*width), nn.Linear(2*width, n_classes), nn.Linear(1, 1)

    def forward(self, x):
        maps = self.norm(self.second(self.first(x).relu_()).relu())
        tokens, pred = maps.flatten(2).mT, self.head(maps.mean((2, 3)))
        if self.form == 'tensor': return pred
        if self.form == 'tuple': return pred, tokens
        if self.form == 'nothing': return None
        attention = (tokens @ tokens.mT).softmax(-1)
        return dict(logits=pred, hidden_states=(tokens, 2*tokens), attentions=(torch.stack([attention, attention], 1),), scalar=pred.sum())

def task(output, y): return F.cross_entropy(logits(output), y)
def right(output, y): return accuracy(logits(output), y)

# ---- Settings: some that make sense, and some that do not

ODD_NUMBERS = st.sampled_from([0, -1, .5, 1e-9, 1e9, math.nan, math.inf, -math.inf, True, None, '4', 2.5, [1.], 1e30])
CLASSES = [getattr(fastkd.all, name) for name in available_losses().index]
GIVEN = dict(SRRL=dict(head='head'), CRD=dict(dim=4, negatives=6), MaskedGenerative=dict(mask='channel'))

def good_numbers(value):
    if isinstance(value, bool): return st.booleans()
    if isinstance(value, float): return st.floats(.1, 10)
    return st.integers(1, 6) if isinstance(value, int) else st.just(value)

@st.composite
def one_loss(draw, odd=False):
    "A class of the zoo, a setting of it, and a factor"
    cls = draw(st.sampled_from(CLASSES))
    params = [p for p in inspect.signature(cls).parameters.values() if p.default is not p.empty]
    settings = dict(GIVEN.get(cls.__name__, {}))
    for p in params:
        if isinstance(p.default, Number) and draw(st.booleans()): settings[p.name] = draw(good_numbers(p.default))
    if odd and params: settings[draw(st.sampled_from(params)).name] = draw(ODD_NUMBERS)
    factor = draw(ODD_NUMBERS if odd and draw(st.booleans()) else st.sampled_from([1, 1, .1, 100]))
    return cls, settings, factor

def layers(names): return st.lists(st.sampled_from(names), min_size=1, max_size=3)

fractions = st.sampled_from([0., .2, .5, 1.])
annealers = st.builds(lambda make, start, end: make(start, end), st.sampled_from([SchedLin, SchedCos]), st.floats(.5, 1), st.floats(.5, 1))

def curve(func, ends, vals): return Schedule(func, *ends, *vals)
vals = st.tuples(fractions, fractions)
curves = st.builds(curve, st.sampled_from([sched_lin, sched_cos]), vals.map(sorted), vals)
odd_curves = st.builds(partial(partial, curve), st.sampled_from([sched_lin, sched_exp, sched_no, SchedExp, len]),
    st.tuples(ODD_NUMBERS, fractions), st.tuples(fractions, ODD_NUMBERS))

GOOD = dict(losses=st.lists(one_loss(), min_size=1, max_size=2), weight=st.floats(0, 1), schedule=st.one_of(st.none(), curves, annealers),
    task_weight=st.sampled_from([None, None, 1., 0.]), span=st.sampled_from([None, 1, 3]), teacher_metrics=st.booleans(),
    mask=st.sampled_from([None, None, lambda x: torch.ones(len(x)).bool(), lambda x: torch.zeros(len(x))]),
    layers=layers([('first', 'first'), ('second', 'second'), ('norm', 'norm'), ('hidden_states.0', 'hidden_states.0'),
        ('attentions.0', 'attentions.0')]).map(lambda pairs: tuple(map(list, zip(*pairs)))),
    teacher_input=st.sampled_from([None, None, lambda x: x, lambda x: (2*x,)]), teacher_dtype=st.sampled_from([None, None, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]), n_classes_t=st.none(),
    forms=st.sampled_from([('dict', 'dict'), ('dict', 'dict'), ('tuple', 'dict'), ('tensor', 'tensor')]))
NAMES = ['first', 'second', 'norm', 'head', 'unused', 'frist', 'hidden_states.0', 'hidden_states.7', 'scalar', '', 'second.weight', 3, None]
ODD = dict(losses=st.one_of(st.lists(one_loss(odd=True), min_size=1, max_size=2), st.lists(one_loss(), max_size=0)), weight=ODD_NUMBERS,
    schedule=st.one_of(odd_curves, ODD_NUMBERS, st.dictionaries(st.sampled_from(['weight', 'T', 'factor', 'soft_target.T', 'p', 'x']),
        st.one_of(curves, annealers, ODD_NUMBERS), min_size=1, max_size=2)),
    task_weight=ODD_NUMBERS, span=ODD_NUMBERS, teacher_metrics=st.sampled_from([[right], right, ['x'], []]),
    mask=st.sampled_from([lambda x: None, lambda x: torch.ones(7).bool(), lambda x, y: x, 'mask', lambda x: torch.ones(len(x), 2, 2)]),
    layers=st.tuples(st.one_of(st.just([]), layers(NAMES)), st.one_of(st.just([]), layers(NAMES))),
    teacher_input=st.sampled_from([lambda x: None, lambda x: x[:, 0], lambda x: (x, x), 'x']),
    teacher_dtype=st.sampled_from([torch.float64, torch.int64, 'half', 16]), dtype=st.just(torch.float16),
    n_classes_t=st.integers(1, 4), forms=st.sampled_from([('tensor', 'nothing'), ('dict', 'tuple'), ('tuple', 'tensor')]))

@st.composite
def fits(draw):
    "Settings of which at most two make no sense, and sizes"
    odd = draw(st.sets(st.sampled_from(sorted(GOOD)), max_size=2))
    chosen = {name: draw((ODD if name in odd else GOOD)[name]) for name in sorted(GOOD)}
    lengths, widths = st.integers(3, 8), st.integers(1, 4)
    sizes = dict(bs=st.integers(1, 5), size=st.tuples(lengths, lengths), widths=st.tuples(widths, widths), n_classes=st.integers(2, 4),
        half=st.sampled_from([False, False, True]), seed=st.integers(0, 99))
    return chosen | {name: draw(o) for name, o in sizes.items()}

# ---- One fit

def make_callback(teacher, o):
    "The callback of these settings; what needs no learner is refused here"
    schedule = o['schedule']() if isinstance(o['schedule'], partial) else o['schedule']
    loss = sum(factor*as_sum(cls(**settings)) for cls, settings, factor in o['losses']) or None
    wants_layers = loss is not None and any(part.wants_layers for part in loss.parts)
    names_s, names_t = o['layers'] if wants_layers else (None, None)
    names = 'weight', 'task_weight', 'span', 'mask', 'teacher_input', 'teacher_dtype', 'teacher_metrics'
    return KnowledgeDistillationCallback(teacher, loss, names_s, names_t, schedule=schedule, **{name: o[name] for name in names})

def check(o):
    "Finite numbers, or a message of ours before the first step; the teacher is what it was"
    torch.manual_seed(o['seed'])
    n, n_classes, (form_s, form_t) = 2*o['bs'] + 1, o['n_classes'], o['forms']
    x, y = torch.randn(n, 1, *o['size']), torch.randint(0, n_classes, (n,))
    student = Net(o['widths'][0], n_classes, form_s)
    teacher = Net(o['widths'][1], o['n_classes_t'] or n_classes, form_t).to(o['dtype'])
    learn = quiet(Learner(loaders(list(zip(x, y)), bs=o['bs']), student, task, metrics=right))
    before_s, before_t, steps = weights(student), state(teacher), []
    count = At('before_step', lambda learn: steps.append(1), -50, 0)
    try:
        learn.fit(1, 1e-3, cbs=[count, make_callback(teacher, o), *([OnCPU(AMPMode.BF16)] if o['half'] else [])])
        assert all(value.isfinite().all() for value in weights(student).values())
        assert all(math.isfinite(value) for values in learn.recorder.distillation.values() for value in values)
        event('trains')
    except AssertionError: raise
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        assert Path(where.filename).is_relative_to(HOME) and 'raise ' in where.line, e
        assert isinstance(e, (ValueError, TypeError)) and len(str(e)) > 20
        assert not steps and same(weights(student), before_s)
        event(f'{type(e).__name__} of {where.name}')
    assert is_unchanged(teacher, before_t) and n_hooks(student) == n_hooks(teacher) == 0
    assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()

@settings(max_examples=40)
@given(fits())
def test_any_settings(o): check(o)

@pytest.mark.slow
@settings(max_examples=600)
@given(fits())
def test_many_settings(o): check(o)
