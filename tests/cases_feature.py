"Losses on activations, from their papers, in float64 and without torch."
import formulas as f, math, numpy as np, torch
from cases import Case
from functools import cache
from fastkd.losses.feature import FSP, NST, ActivationBoundaries, Attention, ChannelWise, FitNet, MarginReLU
from torch import nn

SAME  = [((2, 3, 2, 2), (2, 3, 2, 2)), ((3, 4, 5, 2), (3, 4, 5, 2)), ((1, 2, 3, 3), (1, 2, 3, 3))]
SIZES = [((2, 3, 4, 6), (2, 3, 2, 3)), ((1, 2, 3, 2), (1, 2, 7, 5)), ((2, 3, 5, 3), (2, 3, 3, 4))] # larger, smaller, both
WIDE  = [((2, 2, 3, 2), (2, 3, 3, 2)), ((1, 4, 5, 4), (1, 2, 3, 2)), ((3, 2), (3, 4))] # other channels, with an adapter

def adapted(g, i=0):
    "The `i`-th student activation through its adapter, and the teacher's"
    weight, bias = (g.learned.get(f'learned.{i}.{name}') for name in ('weight', 'bias'))
    f_s, f_t = f.meet(g.fm_s[i], g.fm_t[i])
    return (f_s if weight is None else f.adapt(f_s, weight, bias)), f_t

CASES = [Case(FitNet(), lambda g: f.fitnet(*adapted(g)), SAME + SIZES + WIDE),
    Case(FitNet(normalize=True), lambda g: f.fitnet(*adapted(g), normalize=True), SAME + SIZES + WIDE)]

CASES += [Case(Attention(), lambda g: f.attention(g.fm_s[0], g.fm_t[0]), SAME + SIZES + WIDE[:2]),
    Case(Attention(p=3, form='paper'), lambda g: f.attention(g.fm_s[0], g.fm_t[0], 3, 'paper'), SAME + SIZES + WIDE[:2])]

# ---- Activation boundaries

def activation_boundaries(f_s, f_t, m=1.):
    "Unit by unit"
    total = 0.
    for s, t in zip(f_s.ravel(), f_t.ravel()):
        if t <= 0 and s > -m: total += (s + m)**2
        if t > 0 and s <= m: total += (s - m)**2
    return total/f_s.size

CASES += [Case(ActivationBoundaries(), lambda g: activation_boundaries(*adapted(g)), SAME + SIZES + WIDE, at_equal=None),
    Case(ActivationBoundaries(margin=.3), lambda g: activation_boundaries(*adapted(g), .3), SAME + WIDE, at_equal=None)]

# ---- Margin ReLU

@cache
def negative_mean(mean, std):
    "E[x | x < 0] of a normal distribution by integration; -3 deviations where no more than .001 of it is negative"
    std = abs(std)
    if std == 0: return min(mean, 0.)
    if .5*math.erfc(mean/std/math.sqrt(2)) <= .001: return -3*std
    low = min(mean, 0.) - 12*std
    nodes, weights = np.polynomial.legendre.leggauss(200)
    x = low*(1 - nodes)/2
    weights = weights*np.exp(-((x - mean)/std)**2/2)
    return (weights*x).sum()/weights.sum()

def batch_norm(bias, weight):
    "A BatchNorm with given parameters, and statistics that play no part"
    bn = nn.BatchNorm2d(len(bias)).double().eval()
    bn.bias.data, bn.weight.data = (torch.tensor(o, dtype=torch.float64) for o in (bias, weight))
    bn.running_mean.fill_(7.)
    return bn

BNS = dict(t0=([.4, -.6, 3.5], [.8, -1.2, .5]), pair=([-.3, .2], [0., .7]), four=([0., -2., 1., .1], [1., .3, 1., -.2]))

def teacher_module(name):
    "A block of the teacher; its last BatchNorm is the one that counts"
    bias, weight = BNS[name]
    return nn.Sequential(batch_norm([9.]*len(bias), [1.]*len(bias)), nn.ReLU(), batch_norm(bias, weight), nn.ReLU())

def margin_relu(g, *names):
    "Pair by pair, unit by unit"
    total = 0.
    for i, name in enumerate(names):
        f_s, f_t = adapted(g, i)
        margins, cost = [negative_mean(*o) for o in zip(*BNS[name])], 0.
        for index in np.ndindex(*f_s.shape):
            s, target = f_s[index], max(f_t[index], margins[index[1]])
            if not s <= target <= 0: cost += (s - target)**2
        total += cost/f_s.size
    return total

THREE = [((2, 3, 2, 2), (2, 3, 2, 2)), ((1, 3, 4, 6), (1, 3, 2, 3)), ((2, 2, 3, 2), (2, 3, 5, 2))]
TWO   = [((2, 2), (2, 2)), ((1, 2, 3, 2), (1, 2, 2, 3)), ((2, 3, 2, 4), (2, 2, 4, 2))]
MIXED = [([(2, 3, 2, 2), (2, 4, 2, 2)], [(2, 3, 2, 2), (2, 4, 2, 2)]), ([(1, 2, 4, 2), (1, 3, 2, 1)], [(1, 3, 2, 2), (1, 4, 2, 3)]),
    ([(2, 3, 2, 3), (2, 2)], [(2, 3, 2, 3), (2, 4)])]

def margin_case(shapes, *names, **settings):
    "Margins of the teacher's BatchNorms called `names`"
    return Case(MarginReLU(**settings), lambda g: margin_relu(g, *names), shapes, probe=dict(teacher_module=teacher_module), learns=True)

CASES += [margin_case(THREE, 't0'), margin_case(TWO, 'pair', layers_bn='pair'), margin_case(MIXED, 't0', 'four', layers_bn=['t0', 'four'])]

# ---- FSP

def fsp(g):
    "Gram matrices of neighbours, entry by entry"
    def grams(maps):
        for first, second in zip(maps, maps[1:]):
            first, second = (o.reshape(*o.shape[:2], -1) for o in f.meet(first, second))
            yield np.stack([[[(x*y).mean() for y in ys] for x in xs] for xs, ys in zip(first, second)])
    return sum(((g_s - g_t)**2).mean() for g_s, g_t in zip(grams(g.fm_s), grams(g.fm_t)))

LAYERS = [([(2, 3, 4, 2), (2, 2, 2, 1)], [(2, 3, 4, 2), (2, 2, 2, 1)]), # the second layer is smaller
    ([(1, 2, 2, 3), (1, 3, 4, 3), (1, 2, 5, 2)], [(1, 2, 3, 3), (1, 3, 4, 2), (1, 2, 2, 2)]), # the teacher has other sizes
    ([(3, 1, 2, 2), (3, 4, 2, 2)], [(3, 1, 6, 5), (3, 4, 5, 6)]), ([(2, 3), (2, 4)], [(2, 3), (2, 4)])]

CASES += [Case(FSP(), fsp, LAYERS)]

# ---- Channel-wise

def channel_wise(f_s, f_t, T=4.):
    "Channel by channel, each flattened"
    total = 0.
    for b in range(len(f_s)):
        for s, t in zip(f_s[b], f_t[b]):
            log_s, log_t = (f.log_softmax(o.ravel()/T) for o in (s, t))
            total += T**2*(np.exp(log_t)*(log_t - log_s)).sum()/(len(f_s)*f_s.shape[1])
    return total

CASES += [Case(ChannelWise(), lambda g: channel_wise(*adapted(g)), SAME + SIZES + WIDE[:2]),
    Case(ChannelWise(T=.5), lambda g: channel_wise(*adapted(g), .5), SAME + SIZES + WIDE[:2])]

# ---- NST

def nst(f_s, f_t):
    "Every map with every other one"
    def mean_kernel(xs, ys): return np.mean([((x/np.linalg.norm(x))*(y/np.linalg.norm(y))).sum()**2 for x in xs for y in ys])
    pairs = list(zip(*f.meet(f_s, f_t)))
    return np.mean([mean_kernel(s, s) + mean_kernel(t, t) - 2*mean_kernel(s, t) for s, t in pairs])

LATE = [((2, 9, 2, 2), (2, 5, 2, 2)), ((1, 2, 1, 3), (1, 4, 3, 1)), ((2, 6, 1, 3), (2, 5, 2, 2))] # more channels than positions

CASES += [Case(NST(), lambda g: nst(g.fm_s[0], g.fm_t[0]), SAME + SIZES + WIDE[:2] + LATE)]
