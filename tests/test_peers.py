"""The same losses in torchdistill and in fasterai: where they agree, and where they do not, by how much and why.

Both numbers of each difference are written down, so that the quick tests know them. That they are what the peers
compute is checked by the slow tests, on the peers' wheels from PyPI, unpacked and not installed."""
import math, numpy as np, pytest, subprocess, sys, torch, torch.nn.functional as F
from copy import deepcopy
from fastkd.losses.core import Probe, unit
from fastkd.losses.feature import FSP, ActivationBoundaries, Attention, FitNet
from fastkd.losses.relation import CRD, PKT, RKD, CorrelationCongruence, CosineSimilarity, Similarity
from fastkd.losses.response import DIST, DecoupledKD, Logits, Mutual, NormalizedKD, SoftTarget
from fastkd.losses.translators import VID, FactorTransfer, ReviewKD, context_loss
from fastkd.schedules import Schedule, cos, lin
from fastai.callback.schedule import sched_exp
from formulas import close, value_and_grad
from types import SimpleNamespace
from zipfile import ZipFile

# ---- The peers

@pytest.fixture(scope='session')
def unpacked(tmp_path_factory):
    "A folder with the code of both peers, without what they require"
    folder = tmp_path_factory.mktemp('peers')
    wheels = ['fasterai==0.4.1', 'torchdistill==1.1.5']
    cmd = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:', '-d', folder, *wheels]
    done = subprocess.run([*map(str, cmd)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'no peers from PyPI: {done.stderr[-300:]}')
    for wheel in folder.glob('*.whl'): ZipFile(wheel).extractall(folder)
    return folder

@pytest.fixture
def peers(unpacked, monkeypatch):
    "Their modules of losses, fasterai's of schedules, and torchdistill's of what is learned"
    monkeypatch.syspath_prepend(str(unpacked))
    import fasterai.core.schedule as schedule, fasterai.distill.losses as fasterai, torchdistill.losses.mid_level as torchdistill
    import torchdistill.models.wrapper as learned
    return SimpleNamespace(fasterai=fasterai, schedule=schedule, torchdistill=torchdistill, learned=learned)

class TorchDistill:
    "Calls a loss of torchdistill with two tensors"
    where = dict(student_module_path='s', student_module_io='output', teacher_module_path='t', teacher_module_io='output')
    pairs = dict(pair=dict(teacher=dict(io='output', path='t'), student=dict(io='output', path='s'), weight=1))
    paths = dict(where, feature_pairs=pairs, student_output_path='s', teacher_output_path='t', student_linear_path='s',
        teacher_linear_path='t', translator_path='s', paraphraser_path='t', feature_adapter_path='s', knowledge_translator_path='t')
    def __init__(self, peers): self.module = peers.torchdistill
    def loss(self, name, **kwargs): return self._call(getattr(self.module, name)(**self.paths, **kwargs))
    def kd(self, name, T, alpha=0): return self._call(getattr(self.module, name)(**self.where, temperature=T, alpha=alpha))
    def pkt(self, eps): return self._call(self.module.PKTLoss(**self.where, eps=eps))

    def attention(self, mode): return self._call(self.module.ATLoss(self.pairs, mode))

    def context(self):
        loss = self.loss('HierarchicalContextLoss')
        return lambda s, t: loss((s, None), t)

    def fsp(self):
        "Of two lists of layers: each flow goes from one layer to the next"
        place = lambda side, i: dict(io='output', path=f'{side}{i}')
        ends = [(name, i, end) for name in ('student', 'teacher') for i, end in enumerate(('first', 'second'))]
        flow = lambda i: {f'{name}_{end}': place(name[0], i + j) for name, j, end in ends}
        outputs = lambda side, layers: {f'{side}{i}': dict(output=o) for i, o in enumerate(layers)}
        return lambda s, t: self.module.FSPLoss({i: flow(i) for i in range(len(s) - 1)})(outputs('s', s), outputs('t', t))

    def flows(self):
        "Mean squared difference of its flow matrices"
        matrices = lambda layers: map(self.module.FSPLoss.compute_fsp_matrix, layers, layers[1:])
        return lambda s, t: sum(map(F.mse_loss, matrices(s), matrices(t)))

    def _call(self, loss): return lambda s, t, targets=None: loss(dict(s=dict(output=s)), dict(t=dict(output=t)), targets)

def a_pair(shape_s, shape_t=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (shape_s, shape_t or shape_s)]

def agree(ours, theirs, inputs, factor=1, rtol=1e-6, atol=1e-9):
    "Value and every element of the gradient are `factor` times theirs, and there is a gradient"
    student, teacher = inputs
    value, grad = value_and_grad(lambda s: ours(s, teacher), student)
    their_value, their_grad = value_and_grad(lambda s: theirs(s, teacher), student)
    close(value, factor*their_value, rtol=rtol, atol=atol)
    close(grad, factor*their_grad, rtol=rtol, atol=atol)
    assert grad.abs().max() > 1e-5

def on(loss, layers): return lambda s, t: loss(layers(s), layers(t))
def by_name(loss, **kwargs): return lambda s, t: loss(dict(a=s), dict(b=t), **kwargs)
def labelled(loss, y, **kwargs): return lambda s, t: loss(s, t, target=y, **kwargs)

def overlapping(o): return [o[:, :2], o[:, 1:], o[:, :1]]
def narrowing(o): return [o, o[..., ::2, ::2]]
def pyramid(o): return [F.avg_pool2d(o, n) for n in (1, 2, 4)]

BOTH, GAUSSIAN = dict(dist_factor=25., angle_factor=50., reduction='mean'), dict(type='gaussian', gamma=.4, max_p=2)
LOGITS, MAPS = [(4, 5), (1, 3), (6, 3)], [((2, 3, 4, 5), (2, 6, 4, 5)), ((1, 2, 3, 3), (1, 2, 3, 3)), ((3, 4, 2, 6), (3, 1, 2, 6))]

@pytest.mark.slow
@pytest.mark.parametrize('T', [1., 4.])
@pytest.mark.parametrize('shape', LOGITS)
def test_response_losses_agree(peers, shape, T):
    kd, inputs = TorchDistill(peers).kd, a_pair(shape)
    agree(SoftTarget(T), lambda s, t: peers.fasterai.SoftTarget(s, t, T=T), inputs)
    agree(Logits(), peers.fasterai.Logits, inputs)
    agree(Mutual(), peers.fasterai.Mutual, inputs)
    agree(SoftTarget(T), kd('KDLoss', T), inputs, factor=T**2) # without labels it leaves T² out
    agree(SoftTarget(T), TorchDistill(peers).loss('SKDInstanceLoss', temperature=T), inputs, factor=T**2)
    agree(SoftTarget(T, standardize=True), kd('LogitStdKDLoss', T), inputs, factor=T**2)

@pytest.mark.slow
@pytest.mark.parametrize('T', [1., 4.])
@pytest.mark.parametrize('shape', [(4, 5), (7, 2), (6, 3)])
def test_decoupled_and_dist_agree(peers, shape, T):
    inputs, y = a_pair(shape), torch.arange(shape[0])*2%shape[1]
    for normalize in (False, True): # which changes nothing but how the target is left out
        agree(labelled(DecoupledKD(T), y), labelled(peers.fasterai.DecoupledKD, y, T=T, normalize=normalize), inputs)
    agree(DIST(.5, 2., T), TorchDistill(peers).loss('DISTLoss', beta=.5, gamma=2., tau=T), inputs)

@pytest.mark.slow
def test_blend_with_the_task_loss_agrees(peers):
    "With labels, torchdistill has T²: its α·CE + (1−α)·T²·KL is our blend"
    student, teacher = a_pair((4, 5))
    y = torch.tensor([0, 4, 2, 2])
    theirs = TorchDistill(peers).kd('KDLoss', 4., alpha=.3)(student, teacher, y)
    close(.3*torch.nn.functional.cross_entropy(student, y) + .7*SoftTarget(4)(student, teacher), theirs)

@pytest.mark.slow
@pytest.mark.parametrize('shape_s,shape_t', MAPS)
def test_attention_agrees(peers, shape_s, shape_t):
    inputs, attention = a_pair(shape_s, shape_t), TorchDistill(peers).attention
    for form in ('code', 'paper'): agree(Attention(form=form), attention(form), inputs)
    agree(Attention(), lambda s, t: peers.fasterai.Attention(dict(a=s), dict(b=t)), inputs)
    agree(Attention(p=4), lambda s, t: peers.fasterai.Attention(dict(a=s), dict(b=t), p=4), inputs)

@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 2, 3, 3), (4, 6)])
def test_fitnet_agrees(peers, shape): agree(FitNet(), lambda s, t: peers.fasterai.FitNet(dict(a=s), dict(b=t)), a_pair(shape))

@pytest.mark.slow
@pytest.mark.parametrize('eps', [1e-7, 1e-9])
@pytest.mark.parametrize('shape_s,shape_t', [((5, 3), (5, 7)), ((2, 4), (2, 4)), ((8, 16), (8, 2))])
def test_pkt_agrees(peers, shape_s, shape_t, eps):
    "torchdistill also adds ε to the length of a row, a change of order ε"
    agree(PKT(eps), TorchDistill(peers).pkt(eps), a_pair(shape_s, shape_t), rtol=100*eps, atol=10*eps)

@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 2, 3, 3), (3, 4, 2, 6)])
def test_feature_losses_agree(peers, shape):
    td, inputs = TorchDistill(peers), a_pair(shape)
    agree(ActivationBoundaries(2), by_name(peers.fasterai.ActivationBoundaries), inputs)
    sum_over_batch = td.loss('AltActTransferLoss', margin=.7, reduction='mean')
    agree(ActivationBoundaries(.7), sum_over_batch, inputs, factor=1/math.prod(shape[1:]))
    for name in ('FTLoss', 'KTALoss'): agree(FactorTransfer(rate=None), td.loss(name), inputs)
    agree(context_loss, td.context(), inputs)
    agree(on(FSP(), overlapping), on(td.flows(), overlapping), inputs)

@pytest.mark.slow
@pytest.mark.parametrize('shape_s,shape_t', [((5, 3), (5, 7)), ((3, 4), (3, 4)), ((6, 2, 3, 2), (6, 3, 2, 2))])
def test_relation_losses_agree(peers, shape_s, shape_t):
    td, inputs, n = TorchDistill(peers), a_pair(shape_s, shape_t), shape_s[0]
    agree(Similarity(), by_name(peers.fasterai.Similarity, pred=None), inputs)
    agree(RKD(), td.loss('RKDLoss', **BOTH), inputs)
    for ours, kernel in (CorrelationCongruence(), GAUSSIAN), (CosineSimilarity(), dict(type='bilinear')):
        norm = td.loss('CCKDLoss', kernel_config=kernel, reduction='batchmean') # ‖difference‖/n², not squared, of rows as they are
        agree(ours, lambda s, t: (n*norm(unit(s.flatten(1)), unit(t.flatten(1))))**2, inputs)

@pytest.mark.slow
def test_schedules_agree(peers):
    theirs = peers.schedule
    for start, end in ((0., 1.), (.2, .7), (.5, .5)):
        for func in (cos.sched_func, lin.sched_func, sched_exp):
            args = func, start, end, .1, .9
            for pct in np.linspace(0, 1, 41): assert Schedule(*args).progress(pct) == theirs.Schedule(*args).progress(pct)
    for pct in np.linspace(0, 1, 41): assert (cos.progress(pct), lin.progress(pct)) == (theirs.cos.progress(pct), theirs.lin.progress(pct))

# ---- Losses that learn: torchdistill's modules with our weights

def built(loss, inputs, layers=lambda o: [o], **kwargs):
    fm_s, fm_t = (dict(enumerate(layers(o))) for o in inputs)
    return loss.build(Probe(fm_s=fm_s, fm_t=fm_t, **kwargs))

def with_weights(theirs, ours):
    "Their module as ours, in float64"
    theirs.double().load_state_dict({name: value for name, value in ours.state_dict().items() if name != 'rho'})
    return theirs

@pytest.mark.slow
@pytest.mark.parametrize('shape_s,shape_t', [((2, 3, 4, 5), (2, 6, 4, 5)), ((1, 8, 3, 3), (1, 8, 3, 3)), ((3, 4, 2, 6), (3, 5, 2, 6))])
def test_vid_agrees(peers, shape_s, shape_t):
    inputs, n_t = a_pair(shape_s, shape_t), shape_t[1]
    ours, loss = built(VID(), inputs), TorchDistill(peers).loss('VIDLoss')
    theirs = peers.learned.Regressor4VID(shape_s[1], n_t, n_t, eps=1e-5, init_pred_var=5.).double()
    close(ours.learned[0].rho, theirs.soft_plus_param)
    with_weights(theirs.regressor, ours.learned[0])
    for param in (ours.learned[0].rho, theirs.soft_plus_param): param.data = torch.linspace(-3, 3, n_t, dtype=param.dtype)
    agree(ours, lambda s, t: loss(theirs(s), t), inputs)

@pytest.mark.slow
@pytest.mark.parametrize('shape_s,shape_t', MAPS)
def test_factor_transfer_agrees(peers, shape_s, shape_t):
    inputs, learned = a_pair(shape_s, shape_t), peers.learned
    ours, loss, n_t = built(FactorTransfer(2.), inputs), TorchDistill(peers).loss('FTLoss'), shape_t[1]
    encoder = with_weights(learned.Paraphraser4FactorTransfer(2., n_t, uses_bn=False).encoder, ours.learned[0]['paraphraser'])
    translator = with_weights(learned.Translator4FactorTransfer(shape_s[1], 2*n_t, uses_bn=False), ours.learned[0]['translator'])
    agree(ours, lambda s, t: loss(translator(s), encoder(t)), inputs)

@pytest.mark.slow
@pytest.mark.parametrize('shape_s,shape_t', [((2, 3, n, n), (2, n_t, n, n)) for n, n_t in ((8, 3), (16, 5), (12, 1))])
def test_review_agrees(peers, shape_s, shape_t):
    inputs, context = a_pair(shape_s, shape_t), TorchDistill(peers).context()
    ours = built(ReviewKD(), inputs, pyramid)
    fusions = [peers.learned.AttentionBasedFusion(shape_s[1], shape_s[1], shape_t[1], o.attention is not None) for o in ours.learned]
    for theirs, o in zip(fusions, ours.learned):
        with_weights(theirs.conv1, o.inward)
        with_weights(theirs.conv2, o.outward)
        if o.attention is not None: with_weights(theirs.attention_conv[0], o.attention)

    def review(s, t):
        value, deeper = 0, None
        for fusion, student, teacher in reversed(list(zip(fusions, pyramid(s), pyramid(t)))):
            out, deeper = fusion(student, deeper, student.shape[2])
            value = value + context(out, teacher)
        return value
    agree(on(ours, pyramid), review, inputs)

@pytest.mark.slow
@pytest.mark.parametrize('shape_s,shape_t', [((4, 3), (4, 5)), ((1, 2), (1, 2)), ((6, 5), (6, 2))])
def test_crd_agrees(peers, shape_s, shape_t):
    "Three batches: without its ε, from our banks, and with the same negatives for all samples of a batch"
    ours = built(CRD(dim=4, negatives=5, form='nce'), a_pair(shape_s, shape_t), n_samples=8)
    places = dict(student_norm_module_path='s', student_empty_module_path='index', teacher_norm_module_path='t')
    theirs = peers.torchdistill.CRDLoss(**places, input_size=4, output_size=8, num_negative_samples=5, num_samples=8, eps=0.).double()
    memory, theirs.params[1] = ours.learned[0], .07
    theirs.memory_v1, theirs.memory_v2 = memory.bank_s.clone(), memory.bank_t.clone()
    for i in range(3):
        index = (torch.arange(shape_s[0])*3 + i)%8
        drawn = (deepcopy(memory.draws).rand(5, torch.empty(0))*8).long().expand(len(index), 5)
        given = dict(pos_idx=index, contrast_idx=torch.cat([index[:, None], drawn], 1))

        def nce(s, t):
            s, t = unit(memory.student(s)), unit(memory.teacher(t))
            return theirs(dict(s=dict(output=s), index=dict(input=given)), dict(t=dict(output=t))).squeeze()
        agree(lambda s, t: ours(s, t, index=index), nce, [o + i for o in a_pair(shape_s, shape_t)])
    close(memory.bank_s, theirs.memory_v1)
    close(memory.bank_t, theirs.memory_v2)

# ---- Where they differ: what each computes, our number, their number

def value_of(loss, inputs): return loss(*inputs)
def grad_of(loss, inputs): return value_and_grad(lambda s: loss(s, inputs[1]), inputs[0])[1].abs().max()

def fasterai(name, **kwargs): return lambda o: by_name(getattr(o.fasterai, name), **kwargs)
def torchdistill(name, **kwargs): return lambda o: TorchDistill(o).loss(name, **kwargs)

DENSE, MAP = a_pair((2, 3, 4, 5)), a_pair((2, 3, 4, 4))
ZEROS     = torch.zeros(2, 3, 4, 4, dtype=torch.float64), MAP[1]
CONSTANT  = torch.ones(2, 3, dtype=torch.float64), MAP[1][..., 0, 0]
ZERO_ROW  = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double(), MAP[1].flatten()[:12].view(4, 3)

BATCH, ONE, NARROW, FEATURES = a_pair((4, 5)), a_pair((1, 3)), a_pair((2, 3, 5, 3)), a_pair((5, 3), (5, 7))
LABELS, DENSE_LABELS, ZERO = torch.tensor([0, 4, 2, 2]), torch.arange(40).view(2, 4, 5)%3, torch.tensor([0])
WRONG = torch.tensor([[0., 100, 0]]).double(), torch.tensor([[50., 0, 10]]).double()
LARGE = torch.tensor([[5000., 0, 1]]).double(), torch.tensor([[5000., 1, 0]]).double()
SURE  = 2*(torch.tensor([[30., 0, 1, 2], [2, 30, 0, 1]]).double(),)
EQUAL = torch.eye(3)[[0, 0, 1, 2]].double(), a_pair((4, 3))[1]
CLOSE = torch.tensor([[4096.], [4097.], [4099.]]), torch.tensor([[0.], [1.], [3.]]) # in float32 their squares are rounded

DIFFERENCES = []
def differs(name, *sides): DIFFERENCES.append(pytest.param(*sides, id=name))

# dense outputs: both peers divide the sum over 4×5 positions by the batch size only; torchdistill has no T² unless there are
# labels, and standardizes the last dimension, whatever it is; it divides a constant row by 1e-7
STANDARDIZED = SoftTarget(2, standardize=True)
differs('dense', value_of, DENSE, SoftTarget(), .53909, lambda o: o.fasterai.SoftTarget, 10.7818)
differs('dense-no-T²', value_of, DENSE, SoftTarget(), .53909, lambda o: TorchDistill(o).kd('KDLoss', 5.), .431272)
differs('dense-std', value_of, DENSE, STANDARDIZED, .631113, lambda o: TorchDistill(o).kd('LogitStdKDLoss', 2.), 2.43076)
differs('constant-row', grad_of, CONSTANT, STANDARDIZED, 0., lambda o: TorchDistill(o).kd('LogitStdKDLoss', 2.), 521937.)
differs('dense-mutual', value_of, DENSE, Mutual(), .426422, lambda o: o.fasterai.Mutual, 8.52845)

# fasterai divides the other classes, but not the target class, by the batch size only; it clamps the student's probability at 1e-7,
# which stops the gradient where the student is most wrong (our choice: log space); to hide the target it subtracts 1000 (as the
# authors' code), which a larger logit outweighs; its "Normalized KD" is DecoupledKD again, and not the loss of Yang et al. 2023
def decoupled(name, measure, inputs, y, ours, our_number, their_number, **settings):
    differs(name, measure, inputs, labelled(ours, y), our_number, lambda o: labelled(o.fasterai.DecoupledKD, y, **settings), their_number)
decoupled('dense-decoupled', value_of, DENSE, DENSE_LABELS, DecoupledKD(), 3.90212, 73.7025)
decoupled('decoupled-wrong', grad_of, WRONG, ZERO, DecoupledKD(beta=0), 3.99980, 0., beta=0)
decoupled('decoupled-large', value_of, LARGE, ZERO, DecoupledKD(T=1, alpha=0), 3.69694, 0., T=1, alpha=0)
decoupled('normalized', value_of, BATCH, LABELS, NormalizedKD(), 2.23577, .489218, T=1, beta=1.5, normalize=True)

# we correlate a class over all positions (as the authors' code for segmentation), torchdistill over the batch, at each position;
# there, a class that is constant in both, such as in a batch of one, counts as unmatched, and so does one shorter than 1e-8
differs('dense-dist', value_of, DENSE, DIST(), 1.92188, torchdistill('DISTLoss'), 2.02165)
differs('dist-one-sample', value_of, ONE, DIST(), .00280869, torchdistill('DISTLoss'), 1.00281)
differs('dist-sure', value_of, SURE, DIST(), 0., torchdistill('DISTLoss'), .5)

# fasterai takes no absolute values, so that signs cancel at odd p, and divides a map of zeros by 1e-12
differs('odd-p', value_of, MAP, Attention(p=3), .085881, fasterai('Attention', p=3), .113463)
differs('zero-map', grad_of, ZEROS, Attention(p=1), 0., fasterai('Attention', p=1), 1.03383e10)

# fasterai's margin is 2, ours 1; torchdistill's boundaries are a sum over units (as the authors' code), and ours a mean
differs('margin', value_of, MAP, ActivationBoundaries(), 2.27332, fasterai('ActivationBoundaries'), 5.55476)
SUMMED = torchdistill('AltActTransferLoss', margin=1, reduction='mean')
differs('boundaries', value_of, MAP, ActivationBoundaries(), 2.27332, SUMMED, 109.119)

# FSP is a mean of squares after average pooling (as in RepDistiller); torchdistill adds up lengths of columns after maximum pooling
differs('fsp', value_of, MAP, on(FSP(), overlapping), .206973, lambda o: on(TorchDistill(o).fsp(), overlapping), 1.25829)
differs('fsp-pool', value_of, MAP, on(FSP(), narrowing), .136319, lambda o: on(TorchDistill(o).flows(), narrowing), .662734)

# torchdistill asks the height only which pools are smaller than a map (as the authors' code; our choice: both sides); it divides zero
# factors by zero
differs('narrow-context', value_of, NARROW, context_loss, 1.23182, lambda o: TorchDistill(o).context(), 1.26233)
differs('zero-factors', grad_of, ZEROS, FactorTransfer(rate=None), 0., torchdistill('FTLoss'), math.nan)

# torchdistill divides rows of similarity by their L1 length (the paper: L2), both peers a row of zeros by 1e-12
SPKD = torchdistill('SPKDLoss', reduction='batchmean')
differs('similarity', value_of, FEATURES, Similarity(), .205040, SPKD, .0677147)
differs('similarity-zero-row', grad_of, ZERO_ROW, Similarity(), .106150, SPKD, 2.50674e10)
differs('similarity-zero-row-fasterai', grad_of, ZERO_ROW, Similarity(), .106150, fasterai('Similarity', pred=None), 4.04254e10)

# torchdistill takes the square root of zero
differs('zero-row', grad_of, ZERO_ROW, PKT(), .0140134, lambda o: TorchDistill(o).pkt(1e-7), math.nan)

# torchdistill's congruence is a norm (the paper: its square), of rows of any length (the series is one of a Gaussian at length 1)
CCKD = torchdistill('CCKDLoss', kernel_config=GAUSSIAN, reduction='batchmean')
differs('congruence', value_of, FEATURES, CorrelationCongruence(), .0445767, CCKD, 1.11995)
differs('congruence-unit', value_of, tuple(map(unit, FEATURES)), CorrelationCongruence(), .0445767, CCKD, .0422264)

# equal rows are 1e-6 apart in torchdistill, and count in the mean distance (as in the authors' code; our choice: they do not), their
# angle is divided by 1e-12; close rows are lost in the rounding of xx + yy − 2xy; a single sample has no mean distance
RELATIONS = torchdistill('RKDLoss', **BOTH)
differs('equal-rows', value_of, EQUAL, RKD(angle=0), 2.07607, torchdistill('RKDLoss', **{**BOTH, 'angle_factor': 0}), 2.35846)
differs('equal-rows-angle', grad_of, EQUAL, RKD(distance=0), 1.35093, torchdistill('RKDLoss', **{**BOTH, 'dist_factor': 0}), 1.83598e12)
differs('close-rows', value_of, CLOSE, RKD(), 0., RELATIONS, 9.02776)
differs('rkd-one-sample', value_of, ONE, RKD(), 0., RELATIONS, math.nan)
each_difference = pytest.mark.parametrize('measure,inputs,ours,our_number,theirs,their_number', DIFFERENCES)

@each_difference
def test_our_side_of_a_difference(measure, inputs, ours, our_number, theirs, their_number):
    close(measure(ours, inputs), our_number, rtol=1e-4)
    assert not math.isclose(our_number, their_number, rel_tol=.01)

@pytest.mark.slow
@each_difference
def test_their_side_of_a_difference(peers, measure, inputs, ours, our_number, theirs, their_number):
    close(measure(theirs(peers), inputs), their_number, rtol=1e-4)

# ---- Where they broadcast, or cannot go on

BROADCAST = [(FitNet(), 'FitNet', ((2, 1, 4, 4), (2, 3, 4, 4)), '1 channels of the student, 3 of the teacher', 1.94555),
    (Logits(), 'Logits', ((4, 1), (4, 3)), 'student predicts 1 classes and the teacher 3', 2.60811),
    (Logits(), 'Logits', ((1, 3), (4, 3)), r'\(1, 3\) and \(4, 3\)', 2.10416)]
each_broadcast = pytest.mark.parametrize('loss,name,shapes,message,number', BROADCAST, ids=['channels', 'classes', 'samples'])

@each_broadcast
def test_we_refuse(loss, name, shapes, message, number):
    with pytest.raises(ValueError, match=message): loss(*a_pair(*shapes))

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:Using a target size')
@each_broadcast
def test_they_broadcast(peers, loss, name, shapes, message, number):
    inputs, theirs = a_pair(*shapes), getattr(peers.fasterai, name)
    close(by_name(theirs)(*inputs) if name == 'FitNet' else theirs(*inputs), number, rtol=1e-4)

@pytest.mark.slow
def test_we_pool(peers):
    "Maps of different resolution: fasterai stops, and torchdistill, too"
    inputs = a_pair((2, 3, 8, 8), (2, 5, 4, 4))
    pooled = torch.nn.functional.adaptive_avg_pool2d(inputs[0], 4), inputs[1]
    close(Attention()(*inputs), by_name(peers.fasterai.Attention)(*pooled))
    for loss in (by_name(peers.fasterai.Attention), TorchDistill(peers).attention('code')):
        with pytest.raises(RuntimeError): loss(*inputs)

@pytest.mark.slow
def test_we_go_on(peers):
    "Samples without a label, maps that are not square, negatives that are not given: they stop"
    ignored, maps, fusion = torch.tensor([0, 4, 2, -100]), a_pair((2, 3, 4, 6)), peers.learned.AttentionBasedFusion(3, 3, 3, True).double()
    close(DecoupledKD()(*BATCH, ignored), DecoupledKD()(*(o[:3] for o in BATCH), ignored[:3]))
    with pytest.raises(RuntimeError, match='out of bounds'): peers.fasterai.DecoupledKD(*BATCH, target=ignored)
    assert built(ReviewKD(), maps, narrowing)(*map(narrowing, maps)).isfinite()
    with pytest.raises(RuntimeError, match='Sizes of tensors'): fusion(maps[0], maps[0][..., ::2, ::2], 4)
    assert built(CRD(negatives=5, form='nce'), FEATURES, n_samples=8)(*FEATURES, torch.arange(5)).isfinite()
    crd = peers.torchdistill.CRDLoss('s', 'index', 't', input_size=4, output_size=8, num_negative_samples=5, num_samples=8)
    with pytest.raises(AttributeError, match='prob'): crd.draw(5)
