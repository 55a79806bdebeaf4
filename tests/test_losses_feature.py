"Losses on features: known values, what changes nothing, settings, and errors."
import copy, gc, pytest, torch, torch.nn.functional as F, weakref
from cases import draw
from cases_feature import BNS, batch_norm, negative_mean, nst, teacher_module
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.losses.core import Probe
from fastkd.losses.feature import FSP, NST, ActivationBoundaries, Attention, ChannelWise, MarginReLU, flow_matrix, last_bn, negative_means
from formulas import close, value_and_grad
from helpers import convnet, error_of, learner, same, seeded, weights
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

def probe(f_s, f_t, **kwargs): return Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t0=f_t[:1]), **kwargs)

# ---- Activation boundaries

def test_sides():
    "On its side and beyond the margin nothing; a teacher at exactly 0 is off"
    values = dict(on={2.: 0., 1.: 0., .5: .25, 0.: 1., -1.: 4.}, off={-2.: 0., -1.: 0., -.5: .25, 0.: 1., 1.: 4.})
    for side, t in ('on', 1e-30), ('off', 0.), ('off', -0.), ('off', -5.), ('on', 5.):
        for s, cost in values[side].items(): assert ActivationBoundaries()(torch.tensor([[s]]), torch.tensor([[t]])) == cost

def test_boundaries_of_the_authors():
    "Their sum over units, divided by the batch size and 1000/3"
    f_s, f_t = draw((3, 4, 5, 2)), draw((3, 4, 5, 2), 1)
    theirs = ((f_s + 1)**2*((f_s > -1) & (f_t <= 0)) + (f_s - 1)**2*((f_s <= 1) & (f_t > 0))).sum()/3/(1000/3)
    close(ActivationBoundaries()(f_s, f_t)*40*3/1000, theirs, rtol=1e-12)

@pytest.mark.parametrize('margin', [0, -1, float('inf'), float('nan')])
def test_margins_that_are_none(margin):
    with pytest.raises(ValueError, match='margin must be positive'): ActivationBoundaries(margin=margin)

# ---- Margin ReLU

@pytest.mark.parametrize('name', BNS)
def test_margins(name): close(negative_means(batch_norm(*BNS[name])), [negative_mean(*o) for o in zip(*BNS[name])], rtol=1e-10, atol=1e-15)

@pytest.mark.parametrize('bias', [-1e30, -5., -1e-30, 0., 1e-30, 3.0902, 3.0903, 5., 1e30])
@pytest.mark.parametrize('weight', [0., 1e-38, 1e-3, 1., 1e30])
def test_any_margin(bias, weight):
    "Finite and never positive, and in between: between the constant channel and -3 deviations, the formula"
    margins = negative_means(batch_norm([bias, bias], [weight, -weight]))
    assert margins.isfinite().all() and (margins <= 0).all() and margins[0] == margins[1]
    if weight == 0: assert margins[0] == min(bias, 0.)
    if bias/max(weight, 1e-300) > 3.0903: assert margins[0] == -3*weight

def test_margin_without_parameters():
    "Such a BatchNorm's output has mean 0 and deviation 1"
    close(negative_means(nn.BatchNorm1d(2, affine=False)), [-(2/torch.pi)**.5]*2, rtol=1e-12)
    close(negative_means(FrozenBatchNorm2d(2)), [-(2/torch.pi)**.5]*2, rtol=1e-12)
    assert negative_means(nn.BatchNorm2d(2).half()).dtype == torch.float64

def test_last_batch_norm():
    block = teacher_module('t0')
    assert last_bn(block, 'block') is block[2] and last_bn(block[2], 'bn') is block[2]
    for bn in (nn.SyncBatchNorm(3), nn.BatchNorm1d(3), nn.BatchNorm3d(3), FrozenBatchNorm2d(3)):
        assert last_bn(nn.Sequential(bn, nn.ReLU()), 'x') is bn

def test_margins_are_a_copy():
    "The teacher's BatchNorm is read once: it is not held, not changed, and no part of the state"
    block = teacher_module('t0')
    before, alive = copy.deepcopy(block.state_dict()), weakref.ref(block[2])
    f_s, f_t = draw((2, 3, 2, 2)), draw((2, 3, 2, 2), 1)
    loss = MarginReLU().build(probe(f_s, f_t, teacher_module=lambda name: block))
    value = loss(f_s, f_t)
    assert list(loss.state_dict()) == ['learned.0.margins'] and not list(loss.parameters())
    assert same(before, block.state_dict())
    for p in block.parameters(): p.data += 1
    assert loss(f_s, f_t) == value
    del block, p
    gc.collect()
    assert alive() is None

def test_one_layer_twice():
    "`t0#2` is the teacher's layer `t0` once more"
    asked, (f_s, f_t) = [], (draw((2, 3, 2, 2)), draw((2, 3, 2, 2), 1))
    def look(name):
        asked.append(name)
        return teacher_module(name)
    loss = MarginReLU().build(Probe(fm_s=dict(s=f_s, u=f_s), fm_t={'t0': f_t, 't0#2': f_t}, teacher_module=look))
    assert asked == ['t0', 't0'] and len(loss.learned) == 2

def test_errors_of_margin_relu():
    f_s, f_t = draw((2, 3, 2, 2)), draw((2, 3, 2, 2), 1)
    def says(words, loss, **kwargs):
        with pytest.raises(ValueError, match=words): loss.build(probe(f_s, f_t, **kwargs))
    says("no BatchNorm in 't0' of the teacher.*layers_bn", MarginReLU(), teacher_module=lambda name: nn.Conv2d(3, 3, 1))
    says('no BatchNorm in', MarginReLU('norm'), teacher_module=lambda name: nn.GroupNorm(1, 3))
    says(r'layers_bn names 2 layer\(s\) for 1 pair', MarginReLU(['t0', 't0']), teacher_module=teacher_module)
    says("teacher layer 't0'.*BatchNorm has 2 channels and the activation 3: .*layers_bn", MarginReLU('pair'),
        teacher_module=teacher_module)
    says('no teacher_module', MarginReLU())
    with pytest.raises(ValueError, match='by `build`'): MarginReLU()(f_s, f_t)
    for wrong in (3, [nn.ReLU()]):
        with pytest.raises(ValueError, match='no names of layers'): MarginReLU(wrong)

@pytest.mark.parametrize('n', [4, 6])
def test_margin_relu_trains(n):
    "Through the callback: margins of the teacher's own layers, and an adapter where the teacher is wider"
    teacher = seeded(convnet, n, seed=1)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d): nn.init.normal_(module.bias)
    before = weights(teacher)
    cb = KnowledgeDistillationCallback(teacher, MarginReLU(), ['block1.1', 'block2'], ['block1.1', 'block2'], weight=1.)
    learn = learner(cbs=cb)
    learn.fit(2, 1e-2)
    first, last = learn.recorder.distillation['distillation_loss'][0], learn.recorder.distillation['distillation_loss'][-1]
    assert last < first
    for part, name in zip(cb.loss.losses['margin_re_lu'].learned, ('block1', 'block2')):
        close(part.margins.flatten(), negative_means(teacher.get_submodule(name)[1]).float())
        assert isinstance(part, nn.Identity if n == 4 else nn.Conv2d)
    assert same(weights(teacher), before)

def test_margin_relu_without_batch_norm():
    "Said before the first step"
    cb = KnowledgeDistillationCallback(seeded(convnet, 4, seed=1), MarginReLU(), 'block1', 'block1.2')
    assert "no BatchNorm in 'block1.2'" in error_of(ValueError, learner(), cb)

# ---- FSP

def test_flow_matrix():
    "Two channels by one, at two positions"
    first, second = torch.tensor([[[[1., 2.]], [[3., 4.]]]]), torch.tensor([[[[5., 6.]]]])
    assert flow_matrix(first, second).tolist() == [[[8.5], [19.5]]]

def test_flows_of_neighbours():
    "Three layers are two pairs of neighbours"
    maps_s, maps_t = ([draw((2, c, 4, 3), i + j) for i, c in enumerate((2, 3, 5))] for j in (0, 10))
    close(FSP()(maps_s, maps_t), FSP()(maps_s[:2], maps_t[:2]) + FSP()(maps_s[1:], maps_t[1:]), rtol=1e-12)

def test_errors_of_fsp():
    a, b, wide = draw((2, 3, 4, 4)), draw((2, 5, 2, 2)), draw((2, 6, 2, 2))
    with pytest.raises(ValueError, match='at least two'): FSP()(a, a)
    with pytest.raises(ValueError, match='at least two'): FSP().on('block1', 'block1')
    with pytest.raises(ValueError, match='2 student and 3 teacher activations'): FSP()([a, b], [a, b, b])
    with pytest.raises(ValueError, match='both models need the same channels'): FSP()([a, b], [a, wide])
    with pytest.raises(ValueError, match=r"'deep': \(2, 6, 2, 2\).*same channels"):
        FSP().build(Probe(fm_s=dict(early=a, late=b), fm_t=dict(shallow=a, deep=wide)))
    with pytest.raises(ValueError, match='no positions in common'): FSP().build(Probe(fm_s=dict(a=a, b=b[..., 0, 0]), fm_t=dict(a=a, b=b)))

def test_fsp_trains():
    blocks = ['block1', 'block2']
    learn = learner()
    learn.fit(2, 1e-2, cbs=KnowledgeDistillationCallback(seeded(convnet, 4, seed=1), FSP(), blocks, blocks, weight=1.))
    losses = learn.recorder.distillation['distillation_loss']
    assert losses[-1] < losses[0]
    cb = KnowledgeDistillationCallback(seeded(convnet, 6, seed=1), FSP(), blocks, blocks)
    assert 'same channels' in error_of(ValueError, learner(), cb)

# ---- Channel-wise

def test_where_not_how_much():
    "A constant added to a channel changes neither value nor gradient"
    f_s, f_t = draw((2, 3, 4, 2)), draw((2, 3, 4, 2), 1)
    value, grad = value_and_grad(lambda s: ChannelWise()(s, f_t), f_s)
    moved, moved_grad = value_and_grad(lambda s: ChannelWise()(s, f_t), f_s + 50*draw((2, 3, 1, 1), 2))
    close(value, moved, rtol=1e-9)
    close(grad, moved_grad, atol=1e-12)

def test_gap_between_positions():
    "A softmax of 0 in float32"
    f_s, f_t = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    f_s[..., 0, 0], f_t[..., 1, 1] = 2000., 2000.
    value, grad = value_and_grad(lambda s: ChannelWise()(s, f_t), f_s)
    close(value, 16*2000/4)
    assert grad[0, :, 0, 0].tolist() == [2., 2.] and grad[0, :, 1, 1].tolist() == [-2., -2.]

def test_vectors_have_no_positions():
    for loss in (ChannelWise(), NST()):
        with pytest.raises(ValueError, match='these are vectors'): loss(draw((2, 3)), draw((2, 3)))

# ---- NST

def with_kernels(f_s, f_t):
    "All pairs of channels at once, in memory as large as that"
    s, t = (F.normalize(o.flatten(2), dim=2) for o in (f_s, f_t))
    kernel = lambda x, y: (x[:, :, None]*y[:, None]).sum(-1).pow(2).mean()
    return kernel(t, t) + kernel(s, s) - 2*kernel(s, t)

@pytest.mark.parametrize('n_s,n_t,size', [(2, 3, (4, 5)), (8, 3, (2, 3)), (3, 8, (2, 3)), (6, 6, (2, 3)), (7, 5, (1, 1))])
def test_both_sides_of_nst(n_s, n_t, size):
    "More positions than channels, more channels, and as many: the same formula, and the same gradient"
    f_s, f_t = draw((2, n_s, *size)), draw((2, n_t, *size), 1)
    value, grad = value_and_grad(lambda s: NST()(s, f_t), f_s)
    close(value, nst(f_s.numpy(), f_t.numpy()), rtol=1e-9, atol=1e-14)
    close(grad, value_and_grad(lambda s: with_kernels(s, f_t), f_s)[1], rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('size', [(2, 2), (5, 5)])
def test_equal_clouds(size):
    "Exactly 0 for equal maps, and 0 for those in another order, doubled or scaled; also in float32"
    f_s = draw((2, 6, *size), dtype=torch.float32)
    assert NST()(f_s, f_s) == 0
    others = f_s.flip(1), torch.cat([f_s, f_s], 1), f_s*draw((1, 6, 1, 1), 3, torch.float32), -f_s
    for other in others: close(NST()(f_s, other), 0., atol=1e-6)

def test_nst_in_little_memory():
    "Nothing of size channels × channels × positions is ever made"
    biggest = 0
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): biggest = max(biggest, out.numel())
            return out
    f_s, f_t = torch.randn(2, 40, 12, 12, requires_grad=True), torch.randn(2, 60, 12, 12)
    with Watch(): NST()(f_s, f_t).backward()
    assert biggest <= 2*60*144

@pytest.mark.parametrize('p', [1, 2, 3, 4])
def test_attention_has_no_scale(p):
    "Small activations and large ones have the same map"
    f_s, f_t = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    expected = Attention(p)(f_s, f_t)
    for scale in (1e-4, 1e4): torch.testing.assert_close(Attention(p)(scale*f_s, f_t), expected)

@pytest.mark.parametrize('p', [2, 2.5, 3, 4])
def test_second_derivatives_of_attention(p):
    "Also where a map is zero, as most of it is after a ReLU"
    f_s, f_t = draw((2, 3, 4, 4)).relu().requires_grad_(), draw((2, 3, 4, 4), 1)
    grad, = torch.autograd.grad(Attention(p)(f_s, f_t), f_s, create_graph=True)
    second, = torch.autograd.grad(grad.square().sum(), f_s)
    assert second.isfinite().all() and second.any()
