"The student is made small and taught in one `fit`: callbacks of fasterai and quantization-aware training of torchao beside ours."
import copy, pytest, torch, torch.nn.functional as F
from fastkd.all import *
from helpers import At, convnet, fitted, learner, n_hooks, same, seeded, shows, trained_teacher, weights
from torch import nn
from types import SimpleNamespace

@pytest.fixture
def peers():
    "fasterai's callbacks; slow to import, and no part of what fastkd needs"
    pytest.importorskip('fasterai')
    import fasterai.core.criteria as criteria, fasterai.core.schedule as schedule
    import fasterai.prune.all as prune, fasterai.quantize.all as quantize, fasterai.sparse.all as sparse
    return SimpleNamespace(criteria=criteria, schedule=schedule, prune=prune, quantize=quantize, sparse=sparse)

def both_losses(layer='block2'): return SoftTarget() + 1000*Attention().on(layer, 'block2')
def with_adapter(): return SoftTarget() + 10*FitNet().on('block2', 'block2')

def compressed(compress, loss=None, n_epoch=8, prepare=lambda model: None):
    """Learners after a fit with a teacher and after the same fit where its weight is 0, both compressed by `compress()`.

    The first is nearer to the teacher, which is bit for bit what it was, and no hook is left."""
    teacher, learners, last = trained_teacher(), [], []
    before = weights(teacher)
    for weight in .9, 0.:
        learn = learner(seeded(convnet, 8))
        prepare(learn.model)
        kd = KnowledgeDistillationCallback(teacher, loss or both_losses(), weight=weight)
        learners.append(fitted(learn, [kd, *compress()], n_epoch, lr=2e-2))
        last.append(sum(learn.recorder.distillation['distillation_loss'][-4:])/4) # the last epoch
        assert n_hooks(learn.model) == n_hooks(teacher) == 0
    assert same(weights(teacher), before) and not any(p.grad is not None for p in teacher.parameters())
    assert last[0] < .6*last[1]
    return learners

def zeros(model): return [(layer.weight == 0).float().mean().item() for layer in model.modules() if isinstance(layer, nn.Conv2d)]
def widths(model): return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]

# ---- fasterai

@pytest.mark.slow
@shows("learn.fit(8, cbs=[kd, SparsifyCallback(.5, 'weight', 'local', large_final, one_shot)])")
@pytest.mark.parametrize('loss', [both_losses, with_adapter])
def test_sparse(peers, loss):
    "Half of each convolution's weights are zero at the end, and stay zero while the student learns from its teacher"
    large_final, one_shot = peers.criteria.large_final, peers.schedule.one_shot
    def compress(): return [peers.sparse.SparsifyCallback(.5, 'weight', 'local', large_final, one_shot)]
    for learn in compressed(compress, loss()): assert zeros(learn.model) == pytest.approx([.5, .5], abs=.02)

def pruning(peers):
    return peers.prune.PruneCallback(.5, peers.schedule.agp, 'local', peers.criteria.large_final, example_inputs=torch.zeros(2, 1, 8, 8))

@pytest.mark.slow
@shows("learn.fit(8, cbs=[kd, PruneCallback(.5, agp, 'local', large_final, example_inputs=x)])")
def test_pruned(peers):
    "Convolutions lose half of their channels during the fit, and losses without adapters follow them"
    for learn in compressed(lambda: [pruning(peers)]): assert widths(learn.model) == [4, 8]

@pytest.mark.slow
@shows("PruneCallback(.5, agp, 'local', large_final, ignored_layers=[learn.model.layer4])")
def test_pruned_around_an_adapter(peers):
    "An adapter works on a layer that pruning leaves alone"
    def compress():
        prune = pruning(peers)
        def spare(learn): prune.extra_kwargs['ignored_layers'] = [learn.model.block2[0], learn.model.head[3]]
        return [At('before_fit', spare, order=-1), prune]
    for learn in compressed(compress, with_adapter()): assert widths(learn.model) == [4, 16]

@pytest.mark.slow
@shows("kd = KnowledgeDistillationCallback(teacher, FitNet(), 'layer4', 'layer4')  # and layer4 is pruned")
def test_pruned_under_an_adapter(peers):
    "An adapter cannot follow a layer that loses channels: the error names it, both widths, and what to do"
    kd, learn = KnowledgeDistillationCallback(trained_teacher(), with_adapter()), learner(seeded(convnet, 8))
    with pytest.raises(ValueError, match=r"student layer 'block2' returned \(16, 4, 4\) per sample .* and \(15, 4, 4\) now: .* leave") as e:
        fitted(learn, [kd, pruning(peers)], 8)
    assert 'Attention' in str(e.value) and n_hooks(learn.model) == 0

@pytest.mark.slow
@shows('learn.fit(8, cbs=[kd, FakeQuantizeCallback(weight_bits=4)])')
@pytest.mark.parametrize('loss', [both_losses, with_adapter])
def test_fake_quantized(peers, loss):
    "Weights take at most sixteen values per channel, and the student learned through the rounding"
    for learn in compressed(lambda: [peers.quantize.FakeQuantizeCallback(weight_bits=4)], loss()):
        layers = [layer for layer in learn.model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Conv2d, nn.Linear]
        assert all(row.unique().numel() <= 16 for layer in layers for row in layer.weight.detach())
        assert layers[1].weight[0].numel() > 16

@pytest.mark.slow
@shows("learn.fit(8, cbs=[kd, QuantizeCallback()])  # layers by the names of the prepared model: 'layer4.1.conv2'")
def test_quantized(peers):
    "The student becomes a graph with integer weights; its innermost layers can be compared on the way"
    for learn in compressed(lambda: [peers.quantize.QuantizeCallback()], both_losses('block2.0')):
        layers = [learn.model.get_submodule(name) for name in ('block1.0', 'block2.0', 'head.3')]
        assert [layer.weight().dtype for layer in layers] == [torch.qint8]*3

@pytest.mark.slow
@shows("kd = KnowledgeDistillationCallback(teacher, Attention(), 'layer4', 'layer4')  # and QuantizeCallback()")
def test_container_in_a_quantized_model(peers):
    "A block that the prepared graph took apart does not run: the error says so and names a layer inside"
    kd = KnowledgeDistillationCallback(trained_teacher(), both_losses())
    with pytest.raises(ValueError, match="'block2' did not run .* innermost layers, such as 'block2.0'"):
        fitted(learner(seeded(convnet, 8)), [kd, peers.quantize.QuantizeCallback()])

# ---- torchao

@pytest.mark.slow
@shows("quantize_(learn.model, QATConfig(config, step='prepare')); learn.fit(8, cbs=kd)")
@pytest.mark.parametrize('loss', [both_losses, with_adapter])
def test_torchao(loss):
    "Linear layers train through torchao's rounding, and hold integers after its second step"
    torchao = pytest.importorskip('torchao.quantization')
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig
    config = torchao.IntxWeightOnlyConfig(torch.int4)
    def prepare(model):
        torchao.quantize_(model, QATConfig(config, step='prepare'))
        assert type(model.head[3]) is FakeQuantizedLinear
    for learn in compressed(lambda: [], loss(), prepare=prepare):
        torchao.quantize_(learn.model, QATConfig(config, step='convert'))
        values = learn.model.head[3].weight
        assert values.qdata.dtype == torch.int8 and -8 <= values.qdata.min() and values.qdata.max() <= 7

# ---- Layers that are replaced while the student trains

class Doubled(nn.Module):
    "In the place of a layer"
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x): return 2*self.layer(x)

@shows("learn.model.layer4 = prepared(learn.model.layer4)  # in a callback, in the middle of the fit")
@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_batch'])
def test_replaced_layer(event):
    "A layer that another callback replaces is found again by its name"
    seen = []
    def keep(fm_s, fm_t):
        seen.append(fm_s['block2'].detach())
        return F.mse_loss(fm_s['block2'].mean(1), fm_t['block2'].mean(1))
    def replace(learn): learn.model.block2 = Doubled(learn.model.block2)
    kd, learn = KnowledgeDistillationCallback(trained_teacher(), keep, 'block2', 'block2'), learner()
    learn.dls.train.shuffle = False
    fitted(learn, [kd, At(event, replace)], 2, lr=0.)
    n_before = dict(before_fit=0, before_epoch=0, after_batch=1)[event]
    assert len(seen) == 8 and n_hooks(learn.model) == 0
    assert torch.allclose(seen[4], seen[0]*(2 if n_before else 1), rtol=1e-4, atol=1e-5)

@shows('learn.model = prepared(learn.model)  # in a callback, in the middle of the fit')
def test_replaced_model():
    "So is a layer of a student that is replaced as a whole"
    kd, learn = KnowledgeDistillationCallback(trained_teacher(), with_adapter()), learner()
    def replace(learn): learn.model = copy.deepcopy(learn.model)
    fitted(learn, [kd, At('after_batch', replace)], 2)
    assert len(learn.recorder.distillation['fit_net_loss']) == 8 and n_hooks(learn.model) == 0

class Narrow(nn.Module):
    "All channels but the last"
    def forward(self, x): return x[:, :-1]

@shows("learn.model.layer4 = narrower(learn.model.layer4)  # in a callback, in the middle of the fit")
def test_narrowed_layer():
    "Fewer channels than an adapter was made for: the error names the layer and both widths"
    def narrow(learn):
        learn.model.block2.append(Narrow())
        learn.model.head[3] = nn.Linear(7, 10)
    kd, learn = KnowledgeDistillationCallback(trained_teacher(), with_adapter()), learner()
    message = r"student layer 'block2' returned \(8, 4, 4\) per sample when this fit began, and \(7, 4, 4\) now"
    with pytest.raises(ValueError, match=message): fitted(learn, [kd, At('after_batch', narrow)], 1)
    assert n_hooks(learn.model) == 0
