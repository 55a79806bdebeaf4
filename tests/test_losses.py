"Every loss against its formula in numpy, against its peers, and in every situation that a loss must survive."
import formulas, math, numpy as np, pytest, torch, torch.nn.functional as F
from collections import namedtuple
from functools import partial
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage, TensorMask
from fastkd.losses.core import (LabelledResponseLoss, Loss, Mixed, PairLoss, Probe, RelationLoss, ResponseLoss, channels_first,
    make_adapter, mean_of, same_positions, to_rows, to_square, unit)
from fastkd.losses.feature import Attention, FitNet
from fastkd.losses.relation import PKT
from fastkd.losses.response import Logits, SoftTarget
from formulas import close, numeric_grad, value_and_grad

def draw(*shape, seed=0, dtype=torch.float64):
    "The same numbers whenever the same shape is asked for"
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)

def a_pair(shape_s, shape_t=None, dtype=torch.float64): return draw(*shape_s, dtype=dtype), draw(*(shape_t or shape_s), seed=1, dtype=dtype)

def with_adapter(loss, f_s, f_t):
    "`loss` with an adapter whose weights are given numbers"
    loss.build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1])))
    for i, p in enumerate(loss.parameters()): p.data = draw(*p.shape, seed=7 + i, dtype=p.dtype)
    return loss

def ids(o): return repr(o) if isinstance(o, Loss) else 'x'.join(map(str, o)) if isinstance(o, tuple) else None

def each(names, *args): return pytest.mark.parametrize(names, *args, ids=ids)

# ---- Value and every element of the gradient, in float64

LOGITS = [(4, 5), (1, 3), (3, 2), (2, 4, 3, 2), (1, 3, 6)]

def agrees(loss, formula, student, teacher, grad=None):
    value, actual = value_and_grad(lambda s: loss(s, teacher), student)
    assert value.dtype == actual.dtype == torch.float64 and value.ndim == 0
    close(value, formula(student.numpy(), teacher.numpy()), rtol=1e-9)
    by_differences = numeric_grad(lambda s: formula(s, teacher.numpy()), student.numpy())
    close(actual, by_differences, rtol=1e-6, atol=1e-9)
    if grad is not None: close(actual, grad(student.numpy(), teacher.numpy()), rtol=1e-9, atol=1e-12)

@each('T', [.5, 1., 5.])
@each('shape', LOGITS)
def test_soft_target(shape, T):
    agrees(SoftTarget(T), partial(formulas.soft_target, T=T), *a_pair(shape), grad=partial(formulas.soft_target_grad, T=T))

@each('shape', LOGITS)
def test_soft_target_standardized(shape):
    agrees(SoftTarget(2, standardize=True), partial(formulas.soft_target, T=2, standardized=True), *a_pair(shape))

@each('shape', LOGITS)
def test_logits(shape): agrees(Logits(), formulas.logits, *a_pair(shape), grad=formulas.logits_grad)

MAPS  = [(3, 4, 5, 2), (1, 2, 3, 3), (2, 3, 2, 4)]
SIZES = [((2, 3, 4, 6), (2, 3, 2, 3)), ((1, 2, 3, 2), (1, 2, 7, 5)), ((2, 3, 5, 3), (2, 3, 3, 4))] # larger, smaller, both

@each('normalize', [False, True])
@each('shape_s,shape_t', [(o, o) for o in [*MAPS, (4, 3)]] + SIZES)
def test_fitnet(shape_s, shape_t, normalize):
    agrees(FitNet(normalize=normalize), partial(formulas.fitnet, normalize=normalize), *a_pair(shape_s, shape_t))

@each('normalize', [False, True])
@each('shape_s,shape_t', [((2, 3, 3, 2), (2, 5, 3, 2)), ((1, 4, 5, 4), (1, 2, 3, 2)), ((3, 2, 2, 3), (3, 3, 5, 3)), ((4, 3), (4, 6)),
    ((1, 2, 2, 1, 3), (1, 3, 2, 1, 3))])
def test_fitnet_adapter(shape_s, shape_t, normalize):
    "The gradient of the student, and those of the adapter's own weight and bias"
    f_s, f_t = a_pair(shape_s, shape_t)
    loss = with_adapter(FitNet(normalize=normalize), f_s, f_t)
    weight, bias = (p.detach().numpy() for p in loss.parameters())
    assert weight.shape == (shape_t[1], shape_s[1], *[1]*(len(shape_s) - 2))
    flat = weight.reshape(weight.shape[:2])
    formula = partial(formulas.fitnet, normalize=normalize)
    agrees(loss, partial(formula, weight=flat, bias=bias), f_s, f_t)
    grads = torch.autograd.grad(loss(f_s, f_t), list(loss.parameters()))
    by_weight = numeric_grad(lambda w: formula(f_s.numpy(), f_t.numpy(), w, bias), flat)
    by_bias = numeric_grad(lambda b: formula(f_s.numpy(), f_t.numpy(), flat, b), bias)
    close(grads[0].flatten(1), by_weight.reshape(len(by_weight), -1))
    close(grads[1], by_bias)

def test_fitnet_own_adapter():
    made = []
    def make(student, teacher):
        made.append((student.shape, teacher.shape))
        return nn.Conv2d(student.shape[1], teacher.shape[1], 3, padding=1)
    f_s, f_t = a_pair((2, 3, 4, 4), (2, 5, 2, 2), torch.float32)
    loss = FitNet(adapter=make).build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1])))
    assert made == [((1, 3, 2, 2), (1, 5, 2, 2))] # it sees the activations where they meet
    close(loss(f_s, f_t), F.mse_loss(loss.learned[0](F.adaptive_avg_pool2d(f_s, 2)), f_t))

@each('form', ['code', 'paper'])
@each('p', [1, 2, 3, 2.5])
@each('shape_s,shape_t', [((3, 4, 5, 2), (3, 2, 5, 2)), ((1, 2, 3, 3), (1, 5, 3, 3)), *SIZES])
def test_attention(shape_s, shape_t, p, form):
    formula = partial(formulas.attention, p=p, form=form)
    agrees(Attention(p, form), formula, *a_pair(shape_s, shape_t))

@each('eps', [1e-7, 1e-3])
@each('shape_s,shape_t', [((5, 3), (5, 7)), ((4, 2, 3, 2), (4, 3, 1, 4)), ((2, 2), (2, 2)), ((3, 4, 2), (3, 2))])
def test_pkt(shape_s, shape_t, eps): agrees(PKT(eps), partial(formulas.pkt, eps=eps), *a_pair(shape_s, shape_t))

GRADCHECK = [(SoftTarget(T=3), (3, 4), (3, 4)), (SoftTarget(standardize=True), (3, 4), (3, 4)), (Logits(), (3, 4), (3, 4)),
    (FitNet(), (2, 3, 4, 2), (2, 3, 2, 2)), (FitNet(normalize=True), (2, 3, 2, 2), (2, 3, 2, 2)),
    (Attention(p=1), (2, 3, 4, 2), (2, 2, 2, 2)), (Attention(), (2, 3, 4, 2), (2, 2, 2, 2)),
    (Attention(p=3, form='paper'), (2, 3, 2, 2), (2, 2, 2, 2)), (PKT(), (4, 3), (4, 2))]

@each('loss,shape_s,shape_t', GRADCHECK)
def test_gradcheck(loss, shape_s, shape_t):
    "Both inputs: `Mutual` and other online schemes train the teacher, too"
    student, teacher = (o.requires_grad_() for o in a_pair(shape_s, shape_t))
    assert torch.autograd.gradcheck(loss, (student, teacher))

# ---- Numbers that are known

def test_dark_knowledge():
    "Cow, dog, plane, cat, car"
    z = tensor([[1.3, 3.1, .2, 1.9, -.3]], dtype=torch.float64)
    close(z.softmax(1), [[.1063, .6431, .0354, .1937, .0215]], atol=5e-5)
    close((z/3).softmax(1), [[.1879, .3423, .1302, .2294, .1102]], atol=6e-5)
    uniform = torch.zeros_like(z)
    close(SoftTarget(T=3)(uniform, z), 9*(math.log(5) + (np.array([.1879, .3423, .1302, .2294, .1102])
        *np.log([.1879, .3423, .1302, .2294, .1102])).sum()), atol=2e-3)

@each('gap', [30., 300., 3000.])
def test_logit_gap(gap):
    "Where the student is sure of the wrong class, the value is the gap, and the gradient pulls with all its strength"
    sure, teacher = (tensor([row], dtype=torch.float64) for row in ([gap, 0., 0.], [0., gap, 0.]))
    for dtype in (torch.float32, torch.float64):
        value, grad = value_and_grad(lambda s: SoftTarget(T=1)(s, teacher.to(dtype)), sure.to(dtype))
        close(value, gap, rtol=1e-6)
        close(grad, [[1., -1., 0.]], atol=1e-6)
    value, grad = value_and_grad(lambda s: SoftTarget()(s, teacher), sure)
    close(value, formulas.soft_target(sure.numpy(), teacher.numpy()))
    close(grad, formulas.soft_target_grad(sure.numpy(), teacher.numpy()), atol=1e-12)

def test_soft_target_is_independent_of_T_for_small_logits():
    "T² times the divergence tends to half the variance of the difference: Hinton et al. 2015, section 2.1"
    student, teacher = a_pair((4, 6))
    difference = student - teacher
    expected = difference.var(1, unbiased=False).mean()/2
    close(SoftTarget(T=1e3)(student, teacher), expected, rtol=1e-2)
    close(SoftTarget(T=1e4)(student, teacher), expected, rtol=1e-3)

@each('loss', [SoftTarget(), SoftTarget(T=1), SoftTarget(standardize=True)])
def test_shift_invariance(loss):
    student, teacher = a_pair((4, 6))
    close(loss(student + 17, teacher - 5), loss(student, teacher))

def test_standardize_counts_shape_only():
    student, teacher = a_pair((4, 6))
    loss = SoftTarget(T=2, standardize=True)
    close(loss(7*student, 20*teacher + 3), loss(student, teacher), rtol=1e-5)

@each('loss', [Attention(), Attention(p=1), Attention(form='paper'), FitNet(normalize=True), PKT()])
def test_scale_invariance(loss):
    f_s, f_t = a_pair((3, 4, 2, 3))
    close(loss(9*f_s, .01*f_t), loss(f_s, f_t), rtol=1e-9)

def test_binary_single_output_has_no_dark_knowledge():
    "One logit has no softmax to speak of: the loss is 0, and Logits is what compares"
    student, teacher = a_pair((4, 1))
    assert SoftTarget()(student, teacher) == 0
    close(Logits()(student[:, 0], teacher[:, 0]), Logits()(student, teacher))

# ---- All losses in all situations

Case = namedtuple('Case', 'loss shape_s shape_t')

def case_of(loss, n=3):
    "A loss with shapes that suit it, for `n` samples"
    if isinstance(loss, ResponseLoss): return Case(loss, (n, 5), (n, 5))
    if isinstance(loss, RelationLoss): return Case(loss, (n, 4, 3, 2), (n, 3, 2, 2))
    if isinstance(loss, Attention): return Case(loss, (n, 4, 6, 4), (n, 6, 3, 2))
    return Case(loss, (n, 4, 6, 4), (n, 4, 3, 2))

ZOO = [SoftTarget(), SoftTarget(T=1), SoftTarget(standardize=True), Logits(), FitNet(), FitNet(normalize=True), Attention(p=1), Attention(),
    Attention(p=3), Attention(form='paper'), PKT()]
OF_ACTIVATIONS = [loss for loss in ZOO if isinstance(loss, PairLoss)]
OF_PREDICTIONS = [loss for loss in ZOO if isinstance(loss, ResponseLoss)]

def inputs_of(loss, n=3, dtype=torch.float32):
    _, shape_s, shape_t = case_of(loss, n)
    return a_pair(shape_s, shape_t, dtype)

def adapted(dtype=torch.float32):
    "FitNet with an adapter, and inputs for it"
    f_s, f_t = a_pair((3, 4, 6, 4), (3, 5, 3, 2), dtype)
    return with_adapter(FitNet(), f_s.float(), f_t.float()), f_s, f_t

@each('dtype', [torch.float16, torch.bfloat16])
@each('loss', ZOO)
def test_half_precision(loss, dtype):
    "The value is that of the same numbers in float32, exactly; autocast around it changes nothing"
    student, teacher = inputs_of(loss, dtype=dtype)
    value, grad = value_and_grad(lambda s: loss(s, teacher), student)
    exact, exact_grad = value_and_grad(lambda s: loss(s, teacher.float()), student.float())
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(value, exact) and torch.equal(grad, exact_grad.to(dtype))
    autocast = torch.autocast('cpu', dtype=torch.bfloat16)
    inside, grad_inside = value_and_grad(lambda s: autocast(loss)(s, teacher), student) # backward runs outside, as in fastai
    assert torch.equal(inside, value) and torch.equal(grad_inside, grad)
    assert torch.equal(autocast(loss)(student.float(), teacher.float()), exact)
    close(value, loss(*inputs_of(loss)), rtol=.1, atol=1e-6) # the inputs themselves were rounded

@each('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_of_adapters(dtype):
    loss, f_s, f_t = adapted(dtype)
    exact = loss(f_s.float(), f_t.float())
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = loss(f_s, f_t)
    assert torch.equal(loss(f_s, f_t), exact) and torch.equal(inside, exact)
    assert {p.dtype for p in loss.parameters()} == {torch.float32}
    loss(f_s, f_t).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in loss.parameters())

@each('loss', ZOO)
def test_large_half_precision(loss):
    "Close to the largest float16"
    student, teacher = inputs_of(loss)
    student, teacher = (o.sign().half()*6e4*o.abs().clamp(max=1).half() for o in (student, teacher))
    value, grad = value_and_grad(lambda s: loss(s, teacher), student)
    assert value.isfinite() and grad.float().isfinite().all()

@each('loss', ZOO)
def test_float64_stays(loss):
    student, teacher = inputs_of(loss, dtype=torch.float64)
    with torch.autocast('cpu', dtype=torch.bfloat16): value, grad = value_and_grad(lambda s: loss(s, teacher), student)
    assert value.dtype == grad.dtype == torch.float64
    close(value, loss(student.float(), teacher.float()), rtol=1e-4)
    assert abs(value - loss(student.float(), teacher.float())) > 0 # it did not go through float32

def test_float64_adapter():
    "Adapters are made in the precision of the activations, at least float32"
    f_s, f_t = a_pair((1, 3, 4, 4), (1, 5, 4, 4))
    probe = lambda dtype: Probe(fm_s=dict(s=f_s.to(dtype)), fm_t=dict(t=f_t.to(dtype)))
    made = {dtype: {p.dtype for p in FitNet().build(probe(dtype)).parameters()} for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    assert made == {torch.float64: {torch.float64}, torch.float32: {torch.float32}, torch.bfloat16: {torch.float32}}
    assert FitNet().build(probe(torch.float64))(f_s, f_t).dtype == torch.float64

@each('loss', ZOO)
def test_equal_inputs(loss):
    student, _ = inputs_of(loss)
    value, grad = value_and_grad(lambda s: loss(s, student), student)
    close(value, 0, atol=1e-6)
    assert grad.isfinite().all() and grad.abs().max() < 1e-3

@each('loss', ZOO)
def test_never_negative(loss):
    for seed in range(5):
        student, teacher = (draw(*shape, seed=seed + i) for i, shape in enumerate(case_of(loss)[1:]))
        assert loss(student, teacher) > -1e-12

@each('n', [1, 2])
@each('loss', ZOO)
def test_small_batches(loss, n):
    student, teacher = inputs_of(loss, n)
    value, grad = value_and_grad(lambda s: loss(s, teacher), student)
    assert value.isfinite() and grad.isfinite().all() and grad.shape == student.shape
    if n == 1 and isinstance(loss, RelationLoss): assert value == 0 and not grad.any() # nobody to be compared with

def flat_inputs(student, teacher):
    "Inputs without information: zeros, a constant, equal rows, one zero row; of either model or of both"
    equal_rows = lambda o: o[:1].expand_as(o).clone()
    def zero_row(o): return torch.cat([torch.zeros_like(o[:1]), o[1:]])
    for change in (torch.zeros_like, lambda o: torch.full_like(o, .1), lambda o: torch.full_like(o, -1.7), equal_rows, zero_row):
        for changed in ((True, False), (False, True), (True, True)):
            yield tuple(change(o) if c else o for o, c in zip((student, teacher), changed))

@each('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@each('loss', ZOO)
def test_flat_inputs(loss, dtype):
    for student, teacher in flat_inputs(*inputs_of(loss, dtype=dtype)):
        value, grad = value_and_grad(lambda s: loss(s, teacher), student)
        assert value.isfinite() and grad.isfinite().all() and grad.abs().max() <= 1e6

@each('dtype', [torch.float32, torch.float64])
@each('n_classes', [2, 3, 7, 10, 100, 1000])
def test_constant_logits(n_classes, dtype):
    "A row that is constant but for rounding says nothing, whatever its size"
    teacher = draw(2, n_classes, dtype=dtype)
    loss = SoftTarget(T=2, standardize=True)
    for constant in (0., .1, .3, 1.7, -1000.1, 12345.678):
        student = torch.full((2, n_classes), constant, dtype=dtype)
        value, grad = value_and_grad(lambda s: loss(s, teacher), student)
        assert not grad.any()
        close(value, loss(torch.zeros_like(student), teacher))
        close(loss(teacher, student), loss(teacher, torch.zeros_like(student)))

def test_zero_positions_have_no_direction():
    "Some positions of a map are zero, as after a ReLU"
    f_s, f_t = a_pair((2, 3, 4, 4), dtype=torch.float32)
    f_s[..., 1], f_t[..., 2, :] = 0, 0
    for loss in (FitNet(normalize=True), Attention(), Attention(p=1)):
        value, grad = value_and_grad(lambda s: loss(s, f_t), f_s)
        assert value.isfinite() and grad.isfinite().all() and grad.abs().max() < 1e3
        if isinstance(loss, FitNet): assert not grad[..., 1].any()

@each('n_features', [2, 64, 16384])
def test_pkt_of_opposite_samples(n_features):
    "Rounding makes a cosine of -1 a little less, and a similarity negative: no logarithm of it"
    for seed in range(20):
        row = 10*draw(1, n_features, seed=seed, dtype=torch.float32)
        opposite, teacher = torch.cat([row, -1.3*row]), draw(2, 5, seed=seed, dtype=torch.float32)
        for loss in (PKT(), PKT(eps=1e-12)):
            value, grad = value_and_grad(lambda s: loss(s, teacher), opposite)
            assert value.isfinite() and grad.isfinite().all() and grad.abs().max() <= 1e6
            assert loss(teacher, opposite).isfinite()

@each('loss', OF_ACTIVATIONS)
def test_channels_last(loss):
    student, teacher = inputs_of(loss)
    value, grad = value_and_grad(lambda s: loss(s, teacher), student)
    last, first = torch.channels_last, torch.contiguous_format
    for memory in ((last, first), (first, last), (last, last)):
        s, t = (o.contiguous(memory_format=m) for o, m in zip((student, teacher), memory))
        close(loss(s, t), value)
        close(value_and_grad(lambda s: loss(s, t), s)[1], grad, atol=1e-7)

@each('loss', OF_PREDICTIONS)
def test_channels_last_of_dense_predictions(loss):
    student, teacher = a_pair((2, 3, 4, 5), dtype=torch.float32)
    close(loss(student.contiguous(memory_format=torch.channels_last), teacher), loss(student, teacher))

@each('loss', OF_ACTIVATIONS)
def test_names_do_not_matter(loss):
    student, teacher = inputs_of(loss)
    expected = loss(student, teacher)
    for fm_s, fm_t in ((dict(a=student), dict(b=teacher)), ([student], [teacher]), ((student,), dict(a=teacher))):
        assert torch.equal(loss(fm_s, fm_t), expected)
        assert torch.equal(loss(fm_s=fm_s, fm_t=fm_t), expected)

@each('loss', OF_ACTIVATIONS)
def test_pairs_are_summed_by_position(loss):
    student, teacher = inputs_of(loss)
    other_s, other_t = student.flip(0) + 1, teacher.square()
    fm_s, fm_t = {'layer2': student, 'layer1': other_s}, {'layer1': teacher, 'layer2': other_t}
    close(loss(fm_s, fm_t), loss(student, teacher) + loss(other_s, other_t))
    swapped = loss(fm_s, dict(reversed(fm_t.items())))
    close(swapped, loss(student, other_t) + loss(other_s, teacher))
    repeated = loss({'a': student, 'a#2': student}, {'b': teacher, 'c': other_t})
    close(repeated, loss(student, teacher) + loss(student, other_t))

@each('loss', OF_ACTIVATIONS)
def test_pairs_must_be_complete(loss):
    student, teacher = inputs_of(loss)
    with pytest.raises(ValueError, match='2 student and 1 teacher activations do not pair'): loss([student]*2, [teacher])
    with pytest.raises(ValueError, match='1 student and 2 teacher activations do not pair'):
        loss.without_learned().build(Probe(fm_s=dict(a=student[:1]), fm_t=dict(a=teacher[:1], b=teacher[:1])))
    with pytest.raises(ValueError, match='3 samples of the student, 2 of the teacher'): loss(student, teacher[:2])

def test_adapters_belong_to_pairs():
    "A loss that was built for one pair does not drop the second one"
    loss, f_s, f_t = adapted()
    with pytest.raises(ValueError, match='built for 1 pair'): loss([f_s]*2, [f_t]*2)
    with pytest.raises(ValueError, match='built for 1 pair'): loss.build(Probe(fm_s=dict(a=f_s, b=f_s), fm_t=dict(a=f_t, b=f_t)))

def test_adapters_of_several_pairs():
    f_s, f_t = [draw(2, 3, 4, 4), draw(2, 6)], [draw(2, 5, 2, 2, seed=1), draw(2, 6, seed=2)]
    loss = FitNet().build(Probe(fm_s=dict(zip('ab', f_s)), fm_t=dict(zip('cd', f_t))))
    conv, identity = loss.learned
    assert [type(o) for o in loss.learned] == [nn.Conv2d, nn.Identity]
    by_hand = F.mse_loss(conv(F.adaptive_avg_pool2d(f_s[0], 2)), f_t[0]) + F.mse_loss(*[o[1] for o in (f_s, f_t)])
    close(loss(f_s, f_t), by_hand)

# ---- Predictions of other shapes

@each('loss', OF_PREDICTIONS)
def test_dense_predictions(loss):
    "Class axis 1 of `(B, C, H, W)`: the mean of what single positions say"
    student, teacher = a_pair((2, 3, 4, 5))
    by_position = [loss(student[..., i, j], teacher[..., i, j]) for i in range(4) for j in range(5)]
    value, grad = value_and_grad(lambda s: loss(s, teacher), student)
    close(value, torch.stack(by_position).mean())
    close(grad[..., 2, 3], value_and_grad(lambda s: loss(s, teacher[..., 2, 3]), student[..., 2, 3])[1]/20)

@each('loss', OF_PREDICTIONS)
def test_sequences(loss):
    "Class axis -1 of `(B, L, V)`, which is axis 1 of the transposed tensor"
    student, teacher = a_pair((2, 7, 3))
    expected = loss(student.transpose(1, 2), teacher.transpose(1, 2))
    for axis in (-1, 2): close(loss(student, teacher, axis=axis), expected)
    close(expected, torch.stack([loss(student[:, i], teacher[:, i]) for i in range(7)]).mean())

@each('loss', OF_PREDICTIONS)
def test_mask(loss):
    "Masked positions have no say and no gradient, whatever stands there"
    student, teacher = a_pair((3, 4, 5))
    mask = tensor([[1, 1, 0, 1], [0]*4, [1, 0, 0, 0]]).bool()
    value, grad = value_and_grad(lambda s: loss(s, teacher, mask=mask, axis=-1), student)
    kept = value_and_grad(lambda s: loss(s, teacher[mask]), student[mask])
    close(value, kept[0])
    close(grad[mask], kept[1])
    assert not grad[~mask].any()
    padding = student.masked_fill(~mask[..., None], 1e4)
    assert torch.equal(loss(padding, teacher, mask=mask, axis=-1), value)
    assert torch.equal(loss(student, teacher, mask=torch.ones(3, 4).bool(), axis=-1), loss(student, teacher, axis=-1))

@each('loss', OF_PREDICTIONS)
def test_nothing_counts(loss):
    student, teacher = a_pair((2, 3))
    value, grad = value_and_grad(lambda s: loss(s, teacher, mask=torch.zeros(2).bool()), student)
    assert value == 0 and not grad.any()

@each('loss', OF_PREDICTIONS)
def test_no_silent_broadcasting(loss):
    for shape in ((3, 1), (1, 4), (4, 4), (3, 5)):
        with pytest.raises(ValueError, match='classes|shape'): loss(*a_pair((3, 4), shape))
    with pytest.raises(ValueError, match=r'\(2, 3, 4, 5\) and \(2, 3, 5, 4\)'): loss(*a_pair((2, 3, 4, 5), (2, 3, 5, 4)))
    with pytest.raises(ValueError, match='student predicts 7 classes and the teacher 6'): loss(*a_pair((2, 5, 7), (2, 5, 6)), axis=-1)

def test_regression():
    student, teacher = a_pair((6,))
    close(Logits()(student, teacher), ((student - teacher)**2).mean())
    mask = student > 0
    close(Logits()(student, teacher, mask=mask), ((student - teacher)**2)[mask].mean())

def test_rows():
    z = draw(2, 3, 4, 5)
    assert torch.equal(to_rows(z), z.permute(0, 2, 3, 1).reshape(-1, 3))
    sequence = draw(2, 4, 3)
    assert to_rows(sequence, -1).data_ptr() == sequence.data_ptr() # no copy
    assert torch.equal(to_rows(z[:, 0, 0, 0]), z[:, 0, 0, 0][:, None])
    close(mean_of(tensor([1., 2., 4.]), tensor([[True], [False], [True]])), 2.5)

def test_tensor_subclasses():
    "fastai's images and masks work by hand, and what comes out is a plain tensor"
    student, teacher = a_pair((2, 3, 4, 4), dtype=torch.float32)
    mask = student[:, 0] > 0
    for loss in ZOO:
        plain, plain_grad = value_and_grad(lambda s: loss(s, teacher), student)
        images = TensorImage(student.clone()).requires_grad_(), TensorImage(teacher)
        value = loss(*images)
        value.backward()
        assert type(value) is torch.Tensor
        close(value, plain)
        close(images[0].grad.as_subclass(torch.Tensor), plain_grad)
        if isinstance(loss, ResponseLoss): close(loss(*images, mask=TensorMask(mask)), loss(student, teacher, mask=mask))

# ---- Labels, and mixed labels

class CrossEntropy(LabelledResponseLoss):
    "Looks at the student and the labels"
    def rows(self, student, teacher, target): return F.cross_entropy(student, target, reduction='none')

@each('shape,y_shape,axis', [((4, 3), (4,), 1), ((2, 3, 4, 5), (2, 4, 5), 1), ((2, 6, 3), (2, 6), -1)])
def test_labels(shape, y_shape, axis):
    student, teacher = a_pair(shape)
    y, y1 = torch.randint(3, (2, *y_shape), generator=torch.Generator().manual_seed(0))
    class_first = student.movedim(axis, 1)
    loss = CrossEntropy()
    close(loss(student, teacher, y, axis=axis), F.cross_entropy(class_first, y))
    close(loss(student, teacher, y, axis=axis), CrossEntropyLossFlat(axis=axis if y.ndim > 1 else -1)(student, y))
    lam = torch.linspace(.5, .9, shape[0], dtype=torch.float64)
    per_position = [F.cross_entropy(class_first, o, reduction='none') for o in (y, y1)]
    shares = lam.view(-1, *[1]*(y.ndim - 1))
    blended = per_position[0]*shares + per_position[1]*(1 - shares)
    close(loss(student, teacher, Mixed(y, y1, lam), axis=axis), blended.mean())
    mask = y == y1
    close(loss(student, teacher, Mixed(y, y1, lam), mask=mask, axis=axis), blended[mask].mean())
    assert torch.equal(loss(student, teacher, Mixed(y, y1, torch.ones_like(lam)), axis=axis), loss(student, teacher, y, axis=axis))
    one = .7*per_position[0].mean() + .3*per_position[1].mean()
    for share in (tensor(.7), tensor([.7]), tensor(.7, dtype=torch.float64), .7):
        close(loss(student, teacher, Mixed(y, y1, share), axis=axis), one)

@each('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mixed_labels_in_every_precision(dtype):
    student, teacher = a_pair((4, 3), dtype=dtype)
    y = tensor([0, 1, 2, 0])
    for lam_dtype in (dtype, torch.float32, torch.float64):
        value = CrossEntropy()(student, teacher, Mixed(y, y.flip(0), torch.full((4,), .75, dtype=lam_dtype)))
        exact = (student.double() if dtype == torch.float64 else student.float())
        close(value, .75*F.cross_entropy(exact, y) + .25*F.cross_entropy(exact, y.flip(0)))
        assert value.dtype == exact.dtype

# ---- Layouts of activations

@each('loss', [FitNet(), Attention(), Attention(p=1)])
def test_tokens_meet_maps(loss):
    "Tokens with a class token in front, tokens without, a channels-last map, and the map itself are one and the same"
    f_s, f_t = a_pair((2, 4, 3, 3))
    expected = loss(f_s, f_t)
    tokens = f_t.flatten(2).transpose(1, 2)
    with_class_token = torch.cat([draw(2, 1, 4), tokens], 1)
    channels_last = f_t.permute(0, 2, 3, 1).contiguous()
    for same in (tokens, with_class_token, channels_last):
        close(loss(f_s, same), expected)
        close(loss(same, f_s), loss(f_t, f_s))
    close(loss(with_class_token, tokens), loss(f_t, f_t), atol=1e-12)
    pooled = f_s.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2) # 36 tokens
    close(loss(pooled, with_class_token), expected)

def test_tokens_of_one_length_pair_as_they_are():
    "Also where they are no image: language models"
    f_s, f_t = a_pair((2, 7, 4), (2, 7, 4))
    close(FitNet()(f_s, f_t), F.mse_loss(f_s, f_t))
    q_s, q_t = (unit(o.square().mean(2)) for o in (f_s, f_t))
    close(Attention()(f_s, f_t), F.mse_loss(q_s, q_t))
    with pytest.raises(ValueError, match='no square image'): FitNet()(f_s, draw(2, 16, 4))

@each('shape_s,shape_t', [((2, 8, 8, 6), (2, 16, 8, 6)), ((2, 16, 8, 6), (2, 8, 8, 6)), ((2, 6, 6, 4), (2, 3, 12, 8)),
    ((2, 4, 4, 9), (2, 5, 2, 7))])
def test_channels_as_many_as_rows(shape_s, shape_t):
    "A map that is not square is no channels-last map because it happens to have as many channels as rows"
    f_s, f_t = a_pair(shape_s, shape_t)
    close(Attention()(f_s, f_t), formulas.attention(f_s.numpy(), f_t.numpy()))
    loss = with_adapter(FitNet(), f_s, f_t)
    weight, bias = (p.detach().numpy() for p in loss.parameters())
    close(loss(f_s, f_t), formulas.fitnet(f_s.numpy(), f_t.numpy(), weight[..., 0, 0], bias))

@each('loss', [Attention(), FitNet(normalize=True)])
def test_pictures_that_are_not_square(loss):
    "Where both maps could be channels-last, the probe tells that they are not: 256×128 pictures give ResNets 64 channels of 64 rows"
    f_s, f_t = a_pair((2, 8, 8, 6))
    expected = dict(Attention=formulas.attention, FitNet=partial(formulas.fitnet, normalize=True))[type(loss).__name__]
    loss = loss.without_learned().build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1]), square=False))
    close(loss(f_s, f_t), expected(f_s.numpy(), f_t.numpy()))
    loss.build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1]), square=True))
    last = [o.permute(0, 3, 1, 2).numpy() for o in (f_s, f_t)]
    close(loss(f_s, f_t), expected(*last))

def test_layouts_that_do_not_compare():
    for shape_s, shape_t in (((2, 3, 4, 4), (2, 3)), ((2, 3, 4, 4, 4), (2, 3, 4, 4)), ((2, 16, 3), (2, 3))):
        with pytest.raises(ValueError, match='no positions in common|no square image'): FitNet()(*a_pair(shape_s, shape_t))
    with pytest.raises(ValueError, match='these are vectors'): Attention()(*a_pair((2, 3), (2, 5)))

def test_positions():
    assert channels_first(draw(2, 7, 7, 96)).shape == (2, 96, 7, 7)
    assert channels_first(draw(2, 5, 8)).shape == (2, 8, 5)
    assert to_square(draw(2, 8, 50)).shape == (2, 8, 7, 7)
    volumes = same_positions(*a_pair((1, 2, 4, 4, 2), (1, 3, 2, 6, 2)))
    assert [o.shape for o in volumes] == [(1, 2, 2, 4, 2), (1, 3, 2, 4, 2)]
    adapters = [make_adapter(*a_pair((1, 3, *size), (1, 5, *size))) for size in ((), (4,), (4, 4), (2, 2, 2))]
    assert [type(o) for o in adapters] == [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]

def test_unit():
    close(unit(tensor([[3., 4.], [0., 0.]])), [[.6, .8], [0., 0.]])
    _, grad = value_and_grad(lambda o: unit(o).sum(), tensor([[0., 0.], [1e-13, 0.]]))
    assert not grad.any()

# ---- Settings

@each('make,message', [(lambda: SoftTarget(T=0), 'T must be positive'), (lambda: SoftTarget(T=-1), 'T must be positive'),
    (lambda: SoftTarget(T=math.nan), 'T must be positive'), (lambda: SoftTarget(T=math.inf), 'T must be positive'),
    (lambda: Attention(p=.5), 'p must be at least 1'), (lambda: Attention(p=math.inf), 'p must be at least 1'),
    (lambda: Attention(form='equation'), "form is 'code' or 'paper'"), (lambda: PKT(eps=0), 'eps must be positive'),
    (lambda: FitNet(adapter='conv'), "adapter is 'auto', None or a function that makes a module, not 'conv'"),
    (lambda: FitNet(adapter=nn.Conv2d(3, 5, 1)), r"adapter is 'auto', None or a function that makes a module, not Conv2d\(3, 5")])
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message): make()

@each('make,message', [(lambda: SoftTarget(T='4'), "T is a number, not '4'"), (lambda: SoftTarget(T=None), 'T is a number, not None'),
    (lambda: SoftTarget(temperature=4), 'temperature'), (lambda: FitNet(draw(2, 3), draw(2, 3)), 'fm_s, fm_t'),
    (lambda: SoftTarget(draw(2, 3), draw(2, 3)), r'SoftTarget\(T=…\)\(pred, teacher_pred\)'),
    (lambda: SoftTarget(T=tensor(4.)), r'SoftTarget\(T=…\)\(pred, teacher_pred\)'),
    (lambda: Logits(draw(2, 3), draw(2, 3)), r'Logits\(\)\(pred, teacher_pred\)')])
def test_settings_of_a_wrong_kind(make, message):
    with pytest.raises(TypeError, match=message): make()

def test_settings_are_checked_when_they_change():
    loss = SoftTarget()
    with pytest.raises(ValueError, match='T must be positive'): loss.T = 0
    assert loss.T == 5
    loss.T = 2
    close(loss(*a_pair((2, 3))), SoftTarget(2)(*a_pair((2, 3))))

def test_usual_weights(): assert [cls.usual_weight for cls in (SoftTarget, FitNet, Attention, PKT)] == [.9, 100, 1000, 30000]

def test_check_names_the_layers():
    f_s, f_t = a_pair((1, 3, 4, 4), (1, 5, 4, 4))
    with pytest.raises(ValueError, match=r"student layer 'stem' \(1, 3, 4, 4\) with teacher layer 'body.0' \(1, 5, 4, 4\).*no adapter"):
        FitNet(adapter=None).build(Probe(fm_s=dict(stem=f_s), fm_t={'body.0': f_t}))
    with pytest.raises(ValueError, match='student predicts 3 classes and the teacher 5'):
        SoftTarget().build(Probe(pred=draw(1, 3), teacher_pred=draw(1, 5)))

# ---- Shapes that nobody thought of

few = settings(max_examples=25)
sizes = st.integers(1, 5)

@few
@given(n=sizes, n_classes=st.integers(2, 7), positions=st.lists(st.integers(1, 3), max_size=2), T=st.floats(.3, 20),
    standardized=st.booleans())
def test_soft_target_of_any_shape(n, n_classes, positions, T, standardized):
    student, teacher = a_pair((n, n_classes, *positions))
    close(SoftTarget(T, standardized)(student, teacher), formulas.soft_target(student.numpy(), teacher.numpy(), T, standardized), rtol=1e-8)

@few
@given(n=sizes, channels=st.tuples(sizes, sizes), size_s=st.tuples(sizes, sizes), size_t=st.tuples(sizes, sizes), p=st.floats(1, 4))
def test_attention_of_any_shape(n, channels, size_s, size_t, p):
    f_s, f_t = a_pair((n, channels[0], *size_s), (n, channels[1], *size_t))
    if all(o.shape[2] in (o.shape[1], o.shape[3]) for o in (f_s, f_t)): return # may be channels-last maps
    close(Attention(p)(f_s, f_t), formulas.attention(f_s.numpy(), f_t.numpy(), p), rtol=1e-8)
    loss = with_adapter(FitNet(), f_s, f_t)
    given_numbers = [p.detach().numpy() for p in loss.parameters()]
    if given_numbers: given_numbers[0] = given_numbers[0][..., 0, 0]
    close(loss(f_s, f_t), formulas.fitnet(f_s.numpy(), f_t.numpy(), *given_numbers), rtol=1e-8)

@few
@given(n=st.integers(1, 6), widths=st.tuples(sizes, sizes), seed=st.integers(0, 1000))
def test_pkt_of_any_shape(n, widths, seed):
    f_s, f_t = (draw(n, width, seed=seed + i) for i, width in enumerate(widths))
    close(PKT()(f_s, f_t), formulas.pkt(f_s.numpy(), f_t.numpy()), rtol=1e-6, atol=1e-10)

@few
@given(values=st.lists(st.floats(-1e4, 1e4, width=16), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_any_numbers(values, dtype):
    "Values and gradients of ordinary numbers are finite"
    student, teacher = tensor(values, dtype=dtype).view(2, 3), draw(2, 3, dtype=dtype)
    for loss in OF_PREDICTIONS + [PKT()]:
        value, grad = value_and_grad(lambda s: loss(s, teacher), student)
        assert value.isfinite() and grad.float().isfinite().all()
