"Losses that learn a translator, from their papers, in float64 and without torch."
import formulas as f, numpy as np, torch
from cases import Case, draw
from fastkd.losses.translators import VID, AdversarialFeatures, FactorTransfer, MaskedGenerative, ReviewKD, SRRL
from functools import partial
from torch import nn

MAPS    = [((2, 2, 3, 2), (2, 2, 3, 2)), ((2, 3, 3, 2), (2, 2, 3, 2)), ((1, 2, 4, 3), (1, 3, 2, 3)), ((2, 2, 2, 3), (2, 3, 4, 2))]
VECTORS = [((3, 2), (3, 4)), ((1, 3), (1, 2))]

# ---- Layers: arrays of shape (B, C, H, W), vectors as (B, C, 1, 1)

def as_map(o): return o.reshape(*o.shape, *[1]*(4 - o.ndim))

def relu(o, slope=0.): return np.where(o > 0, o, slope*o)

def sigmoid(o): return 1/(1 + np.exp(-o))

def conv(o, weight, bias=None):
    "Sum over the window of each position, zeros outside the map"
    weight = as_map(weight)
    reach, out = weight.shape[2]//2, np.zeros((len(o), len(weight), *o.shape[2:]))
    n_rows, n_cols = o.shape[2:]
    padded = np.pad(o, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]): out += np.einsum('bchw,dc->bdhw', padded[:, :, i:i + n_rows, j:j + n_cols], weight[:, :, i, j])
    return out if bias is None else out + bias[:, None, None]

def batch_norm(o, learned, name):
    "With the batch's statistics; a single value per channel is normalized by the running ones"
    mean, var, weight, bias = (learned[f'{name}.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias'))
    out = np.empty_like(o)
    for c in range(o.shape[1]):
        values = o[:, c]
        m, v = (values.mean(), values.var()) if values.size > 1 else (mean[c], var[c])
        out[:, c] = (values - m)/np.sqrt(v + 1e-5)*weight[c] + bias[c]
    return out

def chain(o, learned, name, slope=None, last=False):
    "Convolutions with an activation between them, after the `last` one, too"
    layers = sorted({key[len(name) + 1:].split('.')[0] for key in learned if key.startswith(f'{name}.')} - {'rho'})
    for layer in layers:
        o = conv(o, learned[f'{name}.{layer}.weight'], learned.get(f'{name}.{layer}.bias'))
        if last or layer != layers[-1]: o = relu(o, slope or 0.)
    return o

def met(g, i=0): return tuple(map(as_map, f.meet(g.fm_s[i], g.fm_t[i])))

def adapted(g, i=0):
    "The `i`-th student activation through its adapter, and the teacher's"
    f_s, f_t = met(g, i)
    weight = g.learned.get(f'learned.{i}.adapter.weight')
    return (f_s if weight is None else conv(f_s, weight, g.learned[f'learned.{i}.adapter.bias'])), f_t

# ---- Losses

def vid(g):
    f_s, f_t = met(g)
    mean, rho = chain(f_s, g.learned, 'learned.0'), g.learned['learned.0.rho']
    variance = np.log(1 + np.exp(rho)) + 1e-5
    return np.mean([(mean[:, c] - f_t[:, c])**2/(2*v) + np.log(v)/2 for c, v in enumerate(variance)])

def factor_transfer(g, rate=.5):
    f_s, f_t = met(g)
    if rate is not None:
        factors = lambda o, name: chain(o, g.learned, f'learned.0.{name}', .1, last=True)
        f_s, f_t = factors(f_s, 'translator'), factors(f_t, 'paraphraser')
    return np.mean([np.abs(s/np.linalg.norm(s) - t/np.linalg.norm(t)) for s, t in zip(f_s, f_t)])

def masked_generative(g, ratio=.65, mask='spatial'):
    f_s, f_t = adapted(g)
    n_b, n_c, *size = f_s.shape
    seed, n_draws = g.learned['learned.0.draws._extra_state'].tolist()
    drawn = (n_b, 1, *size) if mask == 'spatial' else (n_b, n_c, 1, 1)
    kept = torch.rand(drawn, generator=torch.Generator().manual_seed(seed + n_draws + 1)).numpy() >= ratio
    return ((chain(f_s*kept, g.learned, 'learned.0.generator') - f_t)**2).sum()/n_b

def context(f_s, f_t):
    "Mean squared difference of the maps, and of the maps pooled to each smaller square"
    value, weight, total = ((f_s - f_t)**2).mean(), 1., 1.
    for size in (4, 2, 1):
        if size >= f_s.shape[2] or size >= f_s.shape[3]: continue
        weight /= 2
        pooled = [f.pool_axis(f.pool_axis(o, size, 2), size, 3) for o in (f_s, f_t)]
        value, total = value + weight*((pooled[0] - pooled[1])**2).mean(), total + weight
    return value/total

def review(g):
    total, deeper = 0, None
    for i in reversed(range(len(g.fm_s))):
        (f_s, f_t), name = met(g, i), f'learned.{i}'
        own = batch_norm(conv(f_s, g.learned[f'{name}.inward.0.weight']), g.learned, f'{name}.inward.1')
        if deeper is not None:
            for axis in (2, 3): deeper = deeper.take([k*deeper.shape[axis]//own.shape[axis] for k in range(own.shape[axis])], axis)
            both = np.concatenate([own, deeper], 1)
            share = sigmoid(conv(both, g.learned[f'{name}.attention.weight'], g.learned[f'{name}.attention.bias']))
            own = own*share[:, :1] + deeper*share[:, 1:]
        deeper = own
        out = batch_norm(conv(own, g.learned[f'{name}.outward.0.weight']), g.learned, f'{name}.outward.1')
        total += context(out, f_t)
    return total

def srrl(g):
    f_s, f_t = as_map(g.fm_s[0]), as_map(g.fm_t[0])
    seen = relu(batch_norm(conv(f_s, g.learned['learned.0.connector.0.weight']), g.learned, 'learned.0.connector.1')).mean((2, 3))
    pred = seen @ g.learned['learned.0.head.0.1.weight'].T + g.learned['learned.0.head.0.1.bias']
    return ((seen - f_t.mean((2, 3)))**2).mean() + ((pred - g.teacher_pred)**2).mean()

def adversarial(g):
    says_s, says_t = (chain(o, g.learned, 'learned.0.discriminator') for o in adapted(g))
    return -.5*np.log(1 - sigmoid(says_s)).mean() - .5*np.log(sigmoid(says_t)).mean()

# ---- Cases

def two_classes(given):
    teacher = given['fm_t']['t0']
    return dict(teacher_pred=draw((len(teacher), 2), 5, teacher.dtype))

def make_head():
    "A teacher's classifier of three features, with a layer that differs in training"
    head = nn.Sequential(nn.Dropout(), nn.Linear(3, 2))
    for j, p in enumerate(head.parameters()): p.data = draw(p.shape, 50 + j, torch.float32)
    return head

HEAD = make_head()
OF_THREE = [((2, 3, 4, 2), (2, 3, 4, 2)), ((2, 2, 2, 3), (2, 3, 4, 3)), ((1, 2, 3, 2), (1, 3, 2, 5)), ((4, 2), (4, 3)), ((1, 4), (1, 3))]
TWO   = [([(2, 2, 5, 6), (2, 2, 3, 2)], [(2, 2, 5, 6), (2, 2, 3, 2)]), ([(1, 2, 4, 2), (1, 2, 3, 2)], [(1, 2, 4, 3), (1, 3, 2, 4)])]
THREE = [([(2, 2, 5, 3), (2, 3, 2, 2), (2, 2)], [(2, 3, 4, 5), (2, 2, 3, 2), (2, 3)])]
LONE  = [((3, 2, 3, 3), (3, 3, 3, 3)), ([(1, 2, 2, 2), (1, 3)], [(1, 2, 2, 2), (1, 2)])] # one stage; one value per channel

learner = partial(Case, at_equal=None, learns=True)

CASES = [learner(VID(), vid, MAPS + VECTORS), learner(FactorTransfer(), factor_transfer, MAPS + VECTORS),
    Case(FactorTransfer(rate=None), lambda g: factor_transfer(g, None), [MAPS[0], ((3, 4, 5, 2), (3, 4, 2, 3)), ((1, 2), (1, 2))]),
    learner(MaskedGenerative(), masked_generative, MAPS), learner(ReviewKD(), review, TWO + THREE + LONE),
    learner(MaskedGenerative(ratio=.4, mask='channel'), lambda g: masked_generative(g, .4, 'channel'), MAPS + VECTORS),
    learner(SRRL('fc'), srrl, OF_THREE, extra=two_classes, probe=dict(teacher_module=lambda name: HEAD)),
    learner(AdversarialFeatures(), adversarial, MAPS + VECTORS, opposed=('student', 'adapter'))]
