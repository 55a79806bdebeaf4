"Large logits are compared chunk by chunk: the same numbers, the memory of their gradient and little more."
import fastkd.losses.core as core, math, pytest, torch
from cases import value_and_grads
from fastai.basics import CrossEntropyLossFlat
from fastai.callback.schedule import SchedLin
from fastkd.all import *
from fastkd.losses.core import Mixed, ResponseLoss
from helpers import as_on_a_gpu, fitted, furthest, learner, slow, trained_teacher, weights
from pathlib import Path
from torch import nn

@pytest.fixture
def in_chunks(monkeypatch):
    "Chunks of so many elements, for logits of any size"
    def of(size):
        monkeypatch.setattr(core, 'LARGE', 0 if size else math.inf)
        monkeypatch.setattr(core, 'CHUNK', size)
    return of

def logits(*shape, dtype=torch.float64): return dict(pred=3*torch.randn(shape).to(dtype), teacher_pred=3*torch.randn(shape).to(dtype))

def agree(found, expected, tol=1e-9):
    (value, grads), (expected_value, expected_grads) = found, expected
    torch.testing.assert_close(value, expected_value, rtol=tol, atol=tol)
    for grad, expected_grad in zip(grads, expected_grads): torch.testing.assert_close(grad, expected_grad, rtol=tol, atol=tol)

LOSSES = [SoftTarget(), SoftTarget(standardize=True), DecoupledKD(), NormalizedKD(), WeightedSoftLabel(), Mutual(), Logits(), HardLabel(),
    BinaryKD(), SoftMAE(), *(Divergence(kind) for kind in Divergence.kinds)]
each_loss = pytest.mark.parametrize('loss', LOSSES, ids=repr)

def labels_for(loss, *shape):
    if 'target' not in core.wanted_inputs(loss): return {}
    return dict(target=torch.randint(6, shape).masked_fill(torch.rand(shape) < .2, -100))

# ---- The same numbers

@each_loss
@pytest.mark.parametrize('size', [1, 6, 12, 30, 59, 66, 67, 10**6])
def test_borders(loss, size, in_chunks):
    "Chunks of one row, of two, of all but one, of all; 11 rows of 6 classes"
    given = logits(11, 6) | labels_for(loss, 11)
    in_chunks(0)
    expected = value_and_grads(loss, given)
    in_chunks(size)
    agree(value_and_grads(loss, given), expected)

@each_loss
@pytest.mark.parametrize('off_host', [False, True])
def test_masks(loss, off_host, in_chunks, monkeypatch):
    "Of sequences and pictures; some chunks count as a whole, some not at all"
    for shape, axis in ((2, 7, 6), -1), ((2, 6, 3, 4), 1):
        positions = [n for i, n in enumerate(shape) if i != axis % len(shape)]
        given = logits(*shape) | labels_for(loss, *positions) | dict(axis=axis)
        for mask in torch.rand(positions) < .6, torch.arange(2) == 0, torch.zeros(positions).bool():
            in_chunks(0)
            expected = value_and_grads(loss, given | dict(mask=mask))
            with monkeypatch.context() as patch:
                if off_host: as_on_a_gpu(patch)
                in_chunks(13)
                agree(value_and_grads(loss, given | dict(mask=mask)), expected)

def test_mixed_labels(in_chunks):
    given = logits(9, 6) | dict(target=Mixed(torch.randint(6, (9,)), torch.randint(6, (9,)), torch.rand(9, dtype=torch.float64)))
    in_chunks(0)
    expected = value_and_grads(DecoupledKD(), given)
    in_chunks(13)
    agree(value_and_grads(DecoupledKD(), given), expected)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@each_loss
def test_half_precision(loss, dtype, in_chunks):
    "As of the same numbers in float32, also where a mixed-precision trainer scales the loss; no whole copy is made of them"
    given = logits(11, 6, dtype=dtype) | labels_for(loss, 11)
    in_chunks(13)
    seen, counted = [], loss.counted
    loss.counted = lambda mask, *values, **kwargs: seen.append(values[0].shape[0]) or counted(mask, *values, **kwargs)
    try: value, grads = value_and_grads(lambda **given: 2**8*loss(**given), given)
    finally: del loss.counted
    full = given | {key: given[key].float() for key in ('pred', 'teacher_pred')}
    expected, exact = value_and_grads(lambda **given: 2**8*loss(**given), full)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads[0], exact[0].to(dtype), rtol=1e-2, atol=0)
    assert grads[0].dtype == dtype and max(seen) == 2 and torch.isfinite(grads[0]).all()

def test_a_schedule_has_moved_on(in_chunks):
    "Gradients are those of the temperature at which the value was computed"
    found = []
    for size in 0, 7:
        in_chunks(size)
        kd = KnowledgeDistillationCallback(trained_teacher(), SoftTarget(), schedule=dict(T=SchedLin(8, 1)))
        learn = fitted(learner(), kd, n_epoch=1)
        found.append((weights(learn.model), torch.tensor(learn.recorder.distillation['distillation_loss'])))
    assert furthest(found[0][0], found[1][0]) < 1e-5
    torch.testing.assert_close(found[0][1], found[1][1])

def test_gradients_are_taken_twice(in_chunks):
    "With `retain_graph`, as the callback does on the first batch"
    in_chunks(13)
    given = logits(11, 6)
    pred = given['pred'].requires_grad_()
    value = SoftTarget()(**given)
    first, = torch.autograd.grad(value, pred, retain_graph=True)
    second, = torch.autograd.grad(3*value, pred)
    torch.testing.assert_close(second, 3*first)

# ---- What goes the plain way, and what is refused

def test_a_teacher_that_learns(in_chunks):
    "It gets its gradient, too"
    in_chunks(13)
    given = {key: o.requires_grad_() for key, o in logits(11, 6).items()}
    found = torch.autograd.grad(SoftTarget()(**given), given.values())
    in_chunks(0)
    for grad, expected in zip(found, torch.autograd.grad(SoftTarget()(**given), given.values())):
        torch.testing.assert_close(grad, expected)
        assert grad.any()

def test_a_loss_that_learns(in_chunks):
    class Scaled(ResponseLoss):
        def make_learned(self, probe): return nn.Linear(1, 1, bias=False).double()
        def rows(self, student, teacher): return (student*self.learned.weight - teacher).square().sum(1)
    in_chunks(13)
    given = logits(11, 6)
    loss = Scaled().build(core.Probe(**{key: o[:1] for key, o in given.items()}))
    loss(**given).backward()
    assert loss.learned.weight.grad.abs() > 0

def test_columns_are_not_cut(in_chunks):
    given = logits(11, 6)
    in_chunks(0)
    expected = value_and_grads(DIST(), given)
    in_chunks(13)
    agree(value_and_grads(DIST(), given), expected)

def test_a_forward_of_ones_own(in_chunks):
    "It may not know of chunks, so half precision is cast before it"
    class Whole(ResponseLoss):
        def forward(self, pred, teacher_pred): return (pred - teacher_pred).square().mean()
    in_chunks(13)
    assert Whole()(**logits(11, 6, dtype=torch.float16)).dtype == torch.float32

def test_second_derivatives_are_refused(in_chunks):
    in_chunks(13)
    given = logits(11, 6)
    pred = given['pred'].requires_grad_()
    with pytest.raises(RuntimeError, match=r'no gradient of its own: .*fastkd.losses.core.LARGE = math.inf'):
        torch.autograd.grad(SoftTarget()(**given), pred, create_graph=True)
    core.LARGE = math.inf
    grad, = torch.autograd.grad(SoftTarget()(**given), pred, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), pred)[0].any()

def test_few_logits_go_the_plain_way():
    "As they are, up to the bit"
    value = SoftTarget()(torch.randn(4, 5, requires_grad=True), torch.randn(4, 5))
    assert 'MeanByChunks' not in str(value.grad_fn)
    large = 2048, core.LARGE//2048 + 1
    assert 'MeanByChunks' in str(SoftTarget()(torch.randn(large, requires_grad=True), torch.randn(large)).grad_fn)

def test_in_training(in_chunks):
    "Ignored labels, chunk by chunk, in a fit"
    found = []
    for size in 0, 33:
        in_chunks(size)
        learn = learner(loss_func=CrossEntropyLossFlat(ignore_index=3))
        found.append(weights(fitted(learn, KnowledgeDistillationCallback(trained_teacher(), DecoupledKD()), n_epoch=1).model))
    assert furthest(*found) < 1e-5

# ---- Memory

@pytest.mark.parametrize('n', [256, slow(2048)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('loss', [SoftTarget(T=4), DecoupledKD(), *map(Divergence, Divergence.kinds)], ids=repr)
def test_memory(loss, dtype, n, monkeypatch):
    "At most 1.2 times the student's logits, their gradient included; 32,768 classes"
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent)
    from benchmarks.losses import check_peak_bytes, peak_bytes
    check_peak_bytes()
    given = {key: torch.randn(n, 32768).to(dtype) for key in ('pred', 'teacher_pred')}
    if isinstance(loss, DecoupledKD): given['target'] = torch.randint(32768, (n,))
    leaf, size = given['pred'].requires_grad_(), given['pred'].nbytes
    found = peak_bytes(lambda: torch.autograd.grad(loss(**given), leaf))
    temporary = found - size # of a chunk, the same for any number of rows
    assert 0 < temporary <= 13*4*core.CHUNK
    if n == 2048: assert found <= 1.2*size
