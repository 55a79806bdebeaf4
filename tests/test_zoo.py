"Every loss, by the same questions: its formula, every gradient element, and all that a loss must survive."
import copy, fastkd.losses, importlib, math, pkgutil, pytest, torch
from cases import apply, as_shapes, numeric_grads, same_state, students, value_and_grads, with_students
from cases_dense import CASES as DENSE
from cases_feature import CASES as FEATURE
from cases_relation import CASES as RELATION
from cases_response import CASES as RESPONSE
from cases_sequence import CASES as SEQUENCE
from cases_supervision import CASES as SUPERVISION
from cases_translators import CASES as TRANSLATORS
from fastkd.losses.core import INPUTS, Loss, RelationLoss
from formulas import close
from hypothesis import given as given_any, settings, strategies as st

CASES = RESPONSE + SUPERVISION + FEATURE + TRANSLATORS + RELATION + SEQUENCE + DENSE

def over(cases): return pytest.mark.parametrize('case', cases, ids=lambda case: case.name)
each = over(CASES)
each_of_predictions = over([case for case in CASES if case.is_response])
each_shape = pytest.mark.parametrize('case,i', [(case, i) for case in CASES for i in range(len(case.shapes))],
    ids=lambda o: str(o) if isinstance(o, int) else o.name)
halves = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
dtypes = pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)

def to(dtype, given): return apply(lambda o: o.to(dtype) if o.is_floating_point() else o, given)

def ready(case, dtype=torch.float32, i=0, built=None):
    "A function that calls the loss, and inputs for it"
    given = case.given(i, dtype)
    return same_state(case.built(to(built or dtype, given))), given

# ---- The formula

def test_every_loss_has_a_case():
    for module in pkgutil.iter_modules(fastkd.losses.__path__): importlib.import_module(f'fastkd.losses.{module.name}')
    def public(cls):
        for sub in cls.__subclasses__():
            yield from public(sub)
            is_base = sub.__name__.startswith('_') or sub.__name__.endswith('Loss')
            if sub.__module__.startswith('fastkd.losses') and not is_base: yield sub
    assert {cls.__name__ for cls in public(Loss)} == {type(case.loss).__name__ for case in CASES}

@each
def test_three_shapes(case): assert len(case.shapes) >= 3 and len({str(o) for o in case.shapes}) == len(case.shapes)

@each_shape
def test_value_and_every_gradient(case, i):
    "Those of the student's tensors, and those of all that the loss learns"
    given = case.given(i)
    loss = case.built(given)
    expected, (of_students, learned) = case.formula(case.numbers(loss, given)), numeric_grads(case, loss, given) # a call moves banks on
    call = same_state(loss)
    value, grads = value_and_grads(call, given)
    assert value.dtype == torch.float64 and value.ndim == 0
    close(value, expected, rtol=1e-8, atol=1e-12)
    for grad, by_differences in zip(grads, of_students): close(grad, by_differences, rtol=2e-6, atol=2e-8)
    params = [p for p in loss.parameters() if p.requires_grad]
    if not params: return
    actual = torch.autograd.grad(call(**given), params, allow_unused=True)
    for grad, by_differences in zip(actual, learned.values()):
        close(0*by_differences if grad is None else grad, by_differences, rtol=2e-6, atol=2e-8)

# a numeric derivative of the value sees what a gradient leaves out on purpose; `test_value_and_every_gradient` does not
@over([case for case in CASES if not case.holds_fixed])
def test_gradcheck(case):
    call, given = ready(case, torch.float64)
    leaves = [o.clone().requires_grad_() for o in students(given)]
    turned = (lambda o: 2*o.detach() - o) if 'student' in case.opposed else (lambda o: o) # the same value, the opposite gradient
    assert torch.autograd.gradcheck(lambda *tensors: call(**with_students(given, [turned(o) for o in tensors])), leaves)

few = settings(max_examples=5)

def grown(shape, n, more):
    "A shape with `n` samples, and `more` rows and columns of maps or classes of logits"
    if isinstance(shape, list): return [grown(o, n, more) for o in shape]
    if len(shape) == 2: return n, shape[1] + more
    return n, shape[1], *(size + more*(len(shape) == 4) for size in shape[2:])

def may_be_channels_last(shapes):
    maps = [o for side in shapes for o in as_shapes(side) if len(o) == 4]
    return any(o[1] == o[2] != o[3] for o in maps)

@each
@few
@given_any(n=st.integers(2, 4), more=st.integers(0, 3), seed=st.integers(0, 1000))
def test_any_shape(case, n, more, seed):
    "Other batches, other sizes, other numbers; with further inputs, such as labels, sizes stay"
    n_compared, has_more = 0, set(case.given()) <= {'pred', 'teacher_pred', 'fm_s', 'fm_t'} and not case.probe
    for shapes in case.shapes[:4]:
        shapes = tuple(grown(shape, n, more*has_more) for shape in shapes)
        if may_be_channels_last(shapes): continue
        given = case.given(shapes=shapes, seed=seed)
        loss = case.built(given)
        expected = case.formula(case.numbers(loss, given))
        close(loss(**given), expected, rtol=1e-7, atol=1e-10)
        n_compared += 1
    assert n_compared > 0

# ---- What a loss must survive

@halves
@each
def test_half_precision(case, dtype):
    "The value is that of the same numbers in float32; autocast around it changes nothing"
    call, given = ready(case, dtype)
    value, grads = value_and_grads(call, given)
    exact, exact_grads = value_and_grads(call, to(torch.float32, given))
    assert value.dtype == torch.float32 and torch.equal(value, exact)
    for grad, exact_grad in zip(grads, exact_grads): assert grad.dtype == dtype and torch.equal(grad, exact_grad.to(dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(call(**given), value)

@halves
@each
def test_large_half_precision(case, dtype):
    "Close to the largest float16"
    call, given = ready(case, dtype)
    large = lambda o: o.sign()*6e4*o.abs().clamp(max=1) if o.is_floating_point() else o
    sides = {key: apply(large, value) for key, value in given.items() if key in ('pred', 'teacher_pred', 'fm_s', 'fm_t')}
    value, grads = value_and_grads(call, given | sides)
    exact_grads = value_and_grads(call, to(torch.float32, given | sides))[1]
    assert value.isfinite() and all(grad.isfinite().all() for grad in exact_grads)
    for grad, exact in zip(grads, exact_grads): # a gradient of more than 65504 is none that float16 can hold
        assert torch.equal(grad, exact.to(dtype)) and grad.isfinite()[exact.abs() <= torch.finfo(dtype).max].all()

@each
def test_float64_stays(case):
    call, given = ready(case, torch.float64)
    with torch.autocast('cpu', dtype=torch.bfloat16): value, grads = value_and_grads(call, given)
    assert {value.dtype, *(grad.dtype for grad in grads)} == {torch.float64}
    single = ready(case, torch.float32)
    close(value, single[0](**single[1]), rtol=1e-4, atol=1e-5)

def equal(given):
    "The teacher says what the student says"
    if 'pred' in given: return given | dict(teacher_pred=given['pred'])
    if 'fm_t' not in given: return given # nothing of the teacher's is of its kind
    return given | dict(fm_t=dict(zip(given['fm_t'], given['fm_s'].values())))

@each
def test_equal_inputs(case):
    "Nothing is left to learn: the value is 0, or what the case says, and so is the gradient"
    shapes = case.shapes[0]
    given = equal(case.given(shapes=(shapes[0], shapes[0]), dtype=torch.float32))
    call = same_state(case.loss.without_learned() if not case.learns else case.built(given))
    value, grads = value_and_grads(call, given)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    if case.at_equal is None: return
    close(value, case.at_equal, atol=1e-6)
    assert max(grad.abs().max() for grad in grads) < 2e-3

@pytest.mark.parametrize('n', [1, 2])
@each
def test_small_batches(case, n):
    shapes = tuple([(n, *o[1:]) for o in side] if isinstance(side, list) else (n, *side[1:]) for side in case.shapes[0])
    given = case.given(shapes=shapes, dtype=torch.float32)
    value, grads = value_and_grads(same_state(case.built(given)), given)
    assert value.isfinite() and all(grad.isfinite().all() for grad in grads)
    if n == 1 and isinstance(case.loss, RelationLoss): assert value == 0 and not any(grad.any() for grad in grads)

def flat_inputs(given):
    "Inputs without information: zeros, a constant, equal rows, one zero row; of either model or of both"
    zero_row = lambda o: torch.cat([torch.zeros_like(o[:1]), o[1:]])
    equal_rows = lambda o: o[:1].expand_as(o).clone()
    for change in (torch.zeros_like, lambda o: torch.full_like(o, .1), lambda o: torch.full_like(o, -1.7), equal_rows, zero_row):
        for sides in (('pred', 'fm_s'), ('teacher_pred', 'fm_t'), ('pred', 'fm_s', 'teacher_pred', 'fm_t')):
            yield given | {key: apply(change, given[key]) for key in sides if key in given}

@dtypes
@each
def test_flat_inputs(case, dtype):
    call, given = ready(case, dtype)
    for flat in flat_inputs(given):
        value, grads = value_and_grads(call, flat)
        assert value.isfinite() and all(grad.isfinite().all() and grad.abs().max() <= 1e6 for grad in grads)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@each_of_predictions
def test_logit_gap(case, dtype):
    "Student and teacher are sure, by 300, of the same class or of others"
    call, given = ready(case, dtype)
    for i in range(2):
        sure = torch.zeros_like(given['pred'])
        sure.select(1, i)[:] = 300
        for flip in (sure, -sure, sure.flip(1)):
            value, grads = value_and_grads(call, given | dict(pred=sure, teacher_pred=flip))
            assert value.isfinite() and all(grad.isfinite().all() and grad.abs().max() <= 1e6 for grad in grads)

@each_of_predictions
def test_what_is_masked_has_no_say(case):
    "Not even where the teacher says nan there"
    call, given = ready(case, torch.float64)
    n = len(given['pred'])
    assert n > 1
    mask = torch.arange(n) < n - 1
    mask = mask.reshape(-1, *[1]*(given['pred'].ndim - 2)).expand(n, *given['pred'].shape[2:])
    value, grads = value_and_grads(call, given | dict(mask=mask))
    for wrong in (math.nan, math.inf, -math.inf):
        teacher = given['teacher_pred'].index_fill(0, torch.tensor([n - 1]), wrong)
        again, wrong_grads = value_and_grads(call, given | dict(mask=mask, teacher_pred=teacher))
        assert torch.equal(again, value) and all(map(torch.equal, grads, wrong_grads)) and not wrong_grads[0][-1].any()

@each
def test_a_teacher_in_float64(case):
    "A student in float32 gets gradients in float32, of about the same value"
    call, given = ready(case, torch.float32)
    doubled = {key: to(torch.float64, dict(o=given[key]))['o'] for key in ('teacher_pred', 'fm_t') if key in given}
    value, grads = value_and_grads(call, given | doubled)
    close(value.double(), call(**given).double(), rtol=1e-4, atol=1e-5)
    assert {grad.dtype for grad in grads} == {torch.float32}

@each
def test_layouts_of_memory(case):
    "channels_last, and slices of larger tensors"
    i = next((i for i, (shape, _) in enumerate(case.shapes) if not isinstance(shape, list) and len(shape) == 4), 0)
    call, given = ready(case, torch.float64, i)
    value, grads = value_and_grads(call, given)
    last = lambda o: o.contiguous(memory_format=torch.channels_last) if o.ndim == 4 else o
    slices = lambda o: torch.stack([o, o], -1)[..., 0] if o.ndim > 1 else o
    for change in (last, slices):
        changed = apply(change, given)
        again, changed_grads = value_and_grads(call, changed)
        close(again, value)
        for a, b in zip(changed_grads, grads): close(a, b, atol=1e-10)

@each
def test_nothing_is_changed(case):
    "Neither inputs, nor settings, nor the random state; and the same state gives the same value"
    call, given = ready(case, torch.float32)
    before, rng, said = copy.deepcopy(given), torch.get_rng_state(), repr(case.loss)
    value = call(**given)
    assert torch.equal(value, call(**given)) and torch.equal(torch.get_rng_state(), rng) and repr(case.loss) == said
    tensors = lambda given: [o for value in given.values() for o in (value.values() if isinstance(value, dict) else [value])]
    for now, then in zip(tensors(given), tensors(before)): assert not isinstance(now, torch.Tensor) or torch.equal(now, then)

@each
def test_state_is_saved(case):
    "Another loss with the saved state goes on where the first one is, call by call"
    given = case.given(dtype=torch.float32)
    loss = case.built(given)
    params = [p.detach().clone() for p in loss.parameters()]
    loss(**given)
    assert all(map(torch.equal, loss.parameters(), params)) # only an optimizer changes those
    other = case.loss.without_learned().build(case.probe_of(given))
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    for _ in range(2): assert torch.equal(loss(**given), other(**given))
    assert case.loss.learned is None # the case's own was never touched

@each
def test_sums_and_factors(case):
    call, given = ready(case, torch.float32)
    loss = case.built(given)
    state = copy.deepcopy(loss.state_dict())
    both = 3*loss
    loss.load_state_dict(state)
    known = {key: value for key, value in given.items() if key in INPUTS}
    close(both(**known), 3*call(**given))
    assert math.isfinite(float(both.values(**known)[both.parts[0].name]))
