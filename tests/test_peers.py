"""The same losses in torchdistill and in fasterai: where they agree, and where they do not, by how much and why.

Both numbers of each difference are written down, so that the quick tests know them. That they are what the peers
compute is checked by the slow tests, on the peers' wheels from PyPI, unpacked and not installed."""
import math, numpy as np, pytest, subprocess, sys, torch
from fastkd.losses.feature import Attention, FitNet
from fastkd.losses.relation import PKT
from fastkd.losses.response import Logits, SoftTarget
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
    "Their modules of losses, and fasterai's of schedules"
    monkeypatch.syspath_prepend(str(unpacked))
    import fasterai.core.schedule as schedule, fasterai.distill.losses as fasterai, torchdistill.losses.mid_level as torchdistill
    return SimpleNamespace(fasterai=fasterai, schedule=schedule, torchdistill=torchdistill)

class TorchDistill:
    "Calls a loss of torchdistill with two tensors"
    where = dict(student_module_path='s', student_module_io='output', teacher_module_path='t', teacher_module_io='output')
    def __init__(self, peers): self.module = peers.torchdistill
    def kd(self, name, T, alpha=0): return self._call(getattr(self.module, name)(**self.where, temperature=T, alpha=alpha))
    def pkt(self, eps): return self._call(self.module.PKTLoss(**self.where, eps=eps))

    def attention(self, mode):
        side = lambda path: dict(io='output', path=path)
        return self._call(self.module.ATLoss(dict(pair=dict(teacher=side('t'), student=side('s'), weight=1)), mode))

    def _call(self, loss): return lambda s, t, targets=None: loss(dict(s=dict(output=s)), dict(t=dict(output=t)), targets)

def a_pair(shape_s, shape_t=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (shape_s, shape_t or shape_s)]

def agree(ours, theirs, inputs, factor=1, rtol=1e-6, atol=1e-9):
    "Value and every element of the gradient are `factor` times theirs"
    student, teacher = inputs
    value, grad = value_and_grad(lambda s: ours(s, teacher), student)
    their_value, their_grad = value_and_grad(lambda s: theirs(s, teacher), student)
    close(value, factor*their_value, rtol=rtol, atol=atol)
    close(grad, factor*their_grad, rtol=rtol, atol=atol)

LOGITS, MAPS = [(4, 5), (1, 3), (6, 2)], [((2, 3, 4, 5), (2, 6, 4, 5)), ((1, 2, 3, 3), (1, 2, 3, 3)), ((3, 4, 2, 6), (3, 1, 2, 6))]

@pytest.mark.slow
@pytest.mark.parametrize('T', [1., 4.])
@pytest.mark.parametrize('shape', LOGITS)
def test_response_losses_agree(peers, shape, T):
    kd, inputs = TorchDistill(peers).kd, a_pair(shape)
    agree(SoftTarget(T), lambda s, t: peers.fasterai.SoftTarget(s, t, T=T), inputs)
    agree(Logits(), peers.fasterai.Logits, inputs)
    agree(SoftTarget(T), kd('KDLoss', T), inputs, factor=T**2) # without labels it leaves T² out
    agree(SoftTarget(T, standardize=True), kd('LogitStdKDLoss', T), inputs, factor=T**2)

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
def test_schedules_agree(peers):
    theirs = peers.schedule
    for start, end in ((0., 1.), (.2, .7), (.5, .5)):
        for func in (cos.sched_func, lin.sched_func, sched_exp):
            args = func, start, end, .1, .9
            for pct in np.linspace(0, 1, 41): assert Schedule(*args).progress(pct) == theirs.Schedule(*args).progress(pct)
    for pct in np.linspace(0, 1, 41): assert (cos.progress(pct), lin.progress(pct)) == (theirs.cos.progress(pct), theirs.lin.progress(pct))

# ---- Where they differ: what each computes, our number, their number

def value_of(loss, inputs): return loss(*inputs)
def grad_of(loss, inputs): return value_and_grad(lambda s: loss(s, inputs[1]), inputs[0])[1].abs().max()

def by_name(loss, **kwargs): return lambda s, t: loss(dict(a=s), dict(b=t), **kwargs)

DENSE, MAP = a_pair((2, 3, 4, 5)), a_pair((2, 3, 4, 4))
ZEROS     = torch.zeros(2, 3, 4, 4, dtype=torch.float64), MAP[1]
CONSTANT  = torch.ones(2, 3, dtype=torch.float64), MAP[1][..., 0, 0]
ZERO_ROW  = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double(), MAP[1].flatten()[:12].view(4, 3)

# dense outputs: both peers divide the sum over 4×5 positions by the batch size only; torchdistill has no T² unless there are
# labels, and standardizes the last dimension, whatever it is; it divides a constant row by 1e-7, fasterai a map of zeros by 1e-12;
# fasterai takes no absolute values, so that signs cancel at odd p; torchdistill takes the square root of zero
STANDARDIZED = SoftTarget(2, standardize=True)
DIFFERENCES = [pytest.param(value_of, DENSE, SoftTarget(), .53909, lambda o: o.fasterai.SoftTarget, 10.7818, id='dense'),
    pytest.param(value_of, DENSE, SoftTarget(), .53909, lambda o: TorchDistill(o).kd('KDLoss', 5.), .431272, id='dense-no-T²'),
    pytest.param(value_of, DENSE, STANDARDIZED, .631113, lambda o: TorchDistill(o).kd('LogitStdKDLoss', 2.), 2.43076, id='dense-std'),
    pytest.param(grad_of, CONSTANT, STANDARDIZED, 0., lambda o: TorchDistill(o).kd('LogitStdKDLoss', 2.), 521937., id='constant-row'),
    pytest.param(value_of, MAP, Attention(p=3), .085881, lambda o: by_name(o.fasterai.Attention, p=3), .113463, id='odd-p'),
    pytest.param(grad_of, ZEROS, Attention(p=1), 0., lambda o: by_name(o.fasterai.Attention, p=1), 1.03383e10, id='zero-map'),
    pytest.param(grad_of, ZERO_ROW, PKT(), .0140134, lambda o: TorchDistill(o).pkt(1e-7), math.nan, id='zero-row')]
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
