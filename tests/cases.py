"What every loss is tested with: a `Case` says what a loss is compared with and which inputs suit it."
import copy, torch
from collections.abc import Callable
from dataclasses import dataclass, field
from fastkd.losses.core import Loss, Probe, wanted_inputs
from formulas import numeric_grad
from types import SimpleNamespace

def draw(shape, seed=0, dtype=torch.float64):
    "The same numbers whenever the same shape and seed are asked for"
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)

def labels(n_classes, shape, seed=2): return torch.randint(n_classes, tuple(shape), generator=torch.Generator().manual_seed(seed))

def as_shapes(shape): return shape if isinstance(shape, list) else [shape]

@dataclass
class Case:
    "A loss, its formula in numpy, and shapes of the student's and the teacher's inputs"
    loss: Loss # With its settings, not built
    formula: Callable # `formula(given)`: `given.pred`, …, `.fm_s`, `.fm_t` (lists), `.target`, `.learned` by name, `.fixed`
    shapes: list # `(shape_s, shape_t)`; a list of shapes where the loss takes several activations; the first one is small
    extra: Callable = lambda given: {} # Further inputs, made from those by shape
    probe: dict = field(default_factory=dict) # Further fields of the probe
    at_equal: float = 0. # The value for equal inputs; None where it has no fixed value
    learns: bool = False # Whether it needs `build`
    holds_fixed: bool = False # Whether the gradient leaves something out on purpose: the formula takes it from `given.fixed`
    opposed: tuple = () # What climbs the value instead of descending: 'student', and parts of names of learned parameters
    name: str = ''

    def __post_init__(self): self.name, self.inputs = self.name or repr(self.loss), wanted_inputs(self.loss)

    @property
    def is_response(self): return 'pred' in self.inputs and 'fm_s' not in self.inputs

    def given(self, i=0, dtype=torch.float64, shapes=None, seed=0):
        "Inputs by name, in the `i`-th shape"
        shape_s, shape_t = shapes or self.shapes[i]
        if self.is_response: given = dict(pred=draw(shape_s, seed, dtype), teacher_pred=draw(shape_t, seed + 1, dtype))
        else:
            given = dict(fm_s={f's{j}': draw(o, seed + 10*j, dtype) for j, o in enumerate(as_shapes(shape_s))},
                fm_t={f't{j}': draw(o, seed + 10*j + 1, dtype) for j, o in enumerate(as_shapes(shape_t))})
            given = {key: value for key, value in given.items() if key in self.inputs}
        return given | self.extra(given)

    def probe_of(self, given):
        "What the callback would show of the inputs: one sample, and all labels"
        one = {key: apply(lambda o: o[:1], given[key]) for key in ('pred', 'teacher_pred', 'fm_s', 'fm_t') if key in given}
        return Probe(**one, **{key: given[key] for key in ('target', 'axis') if key in given}, **self.probe)

    def built(self, given):
        "The loss, its learned parameters set to known numbers"
        loss = self.loss.without_learned().build(self.probe_of(given))
        for j, (name, p) in enumerate(loss.named_parameters()):
            if p.requires_grad: p.data = p.data + .3*draw(p.shape, 100 + j, p.dtype)
        return loss

    def numbers(self, loss, given):
        "All inputs and all that was learned as numpy arrays, for the formula"
        as_numpy = lambda o: o.detach().double().numpy() if o.is_floating_point() else o.numpy()
        plain = {key: apply(as_numpy, value) for key, value in given.items()}
        plain |= {key: list(plain[key].values()) for key in ('fm_s', 'fm_t') if key in plain}
        learned = {name: as_numpy(o) for name, o in loss.state_dict().items() if isinstance(o, torch.Tensor)}
        return SimpleNamespace(**plain, learned=learned, fixed=SimpleNamespace(**plain)) # `fixed` stays when an input is varied

def apply(func, value):
    "`func` of all tensors in a dict, a tuple or alone"
    if isinstance(value, dict): return {key: apply(func, o) for key, o in value.items()}
    if hasattr(value, '_fields'): return type(value)(*(apply(func, o) for o in value))
    return func(value) if isinstance(value, torch.Tensor) else value

def same_state(loss):
    "A function that calls `loss` as if for the first time: banks and random masks are as they are now; a call leaves parameters alone"
    params = dict(loss.named_parameters())
    state = {name: value for name, value in copy.deepcopy(loss.state_dict()).items() if name not in params}
    def call(**given):
        loss.load_state_dict(copy.deepcopy(state), strict=False, assign=True)
        return loss(**given)
    return call

def students(given): return [given['pred']] if 'pred' in given else list(given['fm_s'].values())

def with_students(given, tensors):
    "`given` with other student's tensors"
    if 'pred' in given: return given | dict(pred=tensors[0])
    return given | dict(fm_s=dict(zip(given['fm_s'], tensors)))

def value_and_grads(call, given):
    "The value, and its gradient for each of the student's tensors"
    leaves = [o.detach().clone(memory_format=torch.preserve_format).requires_grad_() for o in students(given)]
    value = call(**with_students(given, leaves))
    grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None]*len(leaves)
    return value.detach(), [torch.zeros_like(o) if g is None else g for o, g in zip(leaves, grads)]

def numeric_grads(case, loss, given):
    "The formula's gradients for the student's tensors and for each learned parameter, by central differences"
    numbers = case.numbers(loss, given)
    def at(place, key, name='student'):
        kept, sign = place[key], -1 if any(o in name for o in case.opposed) else 1
        def formula(o):
            place[key] = o
            try: return sign*case.formula(numbers)
            finally: place[key] = kept
        return numeric_grad(formula, kept)
    of_students = [at(vars(numbers), 'pred')] if case.is_response else [at(numbers.fm_s, j) for j in range(len(numbers.fm_s))]
    learned = {name: at(numbers.learned, name, name) for name, p in loss.named_parameters() if p.requires_grad}
    return of_students, learned
