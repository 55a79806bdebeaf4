"Losses on sequences, from their papers, in float64 and without torch."
import numpy as np, torch
from cases import Case, apply
from fastkd.losses.sequence import AttentionMaps, CosineHidden, Embeddings, HiddenStates

SAME  = [((2, 3, 4), (2, 3, 4)), ((3, 5, 2), (3, 5, 2)), ((1, 4, 3), (1, 4, 3)), ((2, 1, 2), (2, 1, 2))]
WIDE  = [((2, 3, 4), (2, 3, 3)), ((1, 2, 2), (1, 2, 5))]
DEEP  = [([(2, 3, 4)]*4, [(2, 3, 4)]*4), ([(2, 2, 3)]*2, [(2, 2, 4)]*5), ([(1, 3, 2)]*3, [(1, 3, 2)]*6)]
SPLIT = [([(2, 2, 3)]*3, [(2, 2, 3)]*3), ([(2, 2, 2)]*3, [(2, 2, 4)]*3), ([(1, 2, 2)]*4, [(1, 2, 2)]*4)]
MAPS  = [((2, 2, 3, 3), (2, 2, 3, 3)), ((1, 3, 2, 4), (1, 3, 2, 4)), ((2, 3, 2, 2), (2, 2, 2, 2)), ((3, 1, 2, 3), (3, 4, 2, 3))]

def masked(given, axis=1):
    "Some positions count; the first sample has padding at its end"
    shape = next(iter(given['fm_s'].values())).shape
    mask = torch.ones(shape[0], shape[axis], dtype=torch.bool)
    mask[0, max(1, shape[axis] - 1):] = False
    return dict(mask=mask)

def probabilities(given):
    "Attention of every query over the keys"
    soft = lambda o: o.double().softmax(-1).to(o.dtype)
    return {key: apply(soft, given[key]) for key in ('fm_s', 'fm_t')}

def masked_probabilities(given): return probabilities(given) | masked(given, 2)

def mean_over(g, values):
    "Mean of the numbers `values[b, n]` where the mask says so, in loops"
    mask = getattr(g, 'mask', np.ones(values.shape, bool))
    kept = [values[b, n] for b, n in np.ndindex(values.shape) if mask[b, n]]
    return sum(kept)/max(1, len(kept))

def rounded(x): return int(np.floor(x + .5))

def uniform(n_s, n_t): return [(m - 1, rounded(m*n_t/n_s) - 1) for m in range(1, n_s + 1)]

def hidden(g, pairs):
    "Sum over pairs of the mean squared difference, the student's features mapped where a matrix was learned"
    total = 0
    for k, (i, j) in enumerate(pairs):
        f_s, f_t = g.fm_s[i], g.fm_t[j]
        if f'learned.{k}.weight' in g.learned: f_s = f_s @ g.learned[f'learned.{k}.weight'].T + g.learned[f'learned.{k}.bias']
        total += mean_over(g, ((f_s - f_t)**2).mean(2))
    return total

def attention(g, pairs, scores=False):
    "Sum over pairs of KL(A_T ‖ A_S), query by query"
    total = 0
    for i, j in pairs:
        a_s, a_t = g.fm_s[i], g.fm_t[j]
        if scores: a_s, a_t = (np.exp(a)/np.exp(a).sum(3, keepdims=True) for a in (a_s, a_t))
        if a_s.shape[1] != a_t.shape[1]: a_s, a_t = a_s.mean(1, keepdims=True), a_t.mean(1, keepdims=True)
        total += mean_over(g, (a_t*np.log(a_t/a_s)).sum(3).mean(1))
    return total

def cosine(g):
    f_s, f_t = g.fm_s[0], g.fm_t[0]
    return mean_over(g, 1 - (f_s*f_t).sum(2)/np.sqrt((f_s**2).sum(2)*(f_t**2).sum(2)))

def sizes(g): return len(g.fm_s), len(g.fm_t)

ONE, SKIP, CHOSEN = [(0, 0)], {(3, 3): [(0, 0), (1, 1)], (4, 4): [(0, 0), (1, 1), (2, 2)], (3, 6): [(0, 1), (1, 3)]}, {1: 0, 0: 2}
MAPPED = [([(2, 2, 2, 3)]*2, [(2, 2, 2, 3)]*2), ([(1, 2, 2, 2)]*2, [(1, 2, 2, 2)]*3), ([(2, 1, 2, 2)]*2, [(2, 3, 2, 2)]*4)]

CASES = [Case(Embeddings(), lambda g: hidden(g, ONE), SAME + WIDE),
    Case(Embeddings(), lambda g: hidden(g, ONE), SAME + WIDE, masked, name='Embeddings, masked'),
    Case(HiddenStates(), lambda g: hidden(g, uniform(*sizes(g))), DEEP + SAME + WIDE),
    Case(HiddenStates(), lambda g: hidden(g, uniform(*sizes(g))), DEEP, masked, name='HiddenStates, masked'),
    Case(HiddenStates('skip'), lambda g: hidden(g, SKIP[sizes(g)]), SPLIT + [([(1, 2, 2)]*3, [(1, 2, 3)]*6)]),
    Case(HiddenStates(CHOSEN), lambda g: hidden(g, [(1, 0), (0, 2)]), SPLIT, masked, at_equal=None),
    Case(HiddenStates(None), lambda g: hidden(g, [(i, i) for i in range(len(g.fm_s))]), SPLIT),
    Case(AttentionMaps(), lambda g: attention(g, ONE), MAPS, probabilities, at_equal=None), # 0, with a slope that the softmax levels
    Case(AttentionMaps(), lambda g: attention(g, ONE), MAPS, masked_probabilities, at_equal=None, name='AttentionMaps, masked'),
    Case(AttentionMaps('scores'), lambda g: attention(g, ONE, True), MAPS),
    Case(AttentionMaps('scores'), lambda g: attention(g, uniform(*sizes(g)), True), MAPPED, lambda given: masked(given, 2),
        name="AttentionMaps('scores'), masked"),
    Case(CosineHidden(), cosine, SAME),
    Case(CosineHidden(), cosine, SAME, masked, name='CosineHidden, masked')]
