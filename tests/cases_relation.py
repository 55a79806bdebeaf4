"Losses on relations between samples, from their papers, in float64 and without torch."
import formulas as f, math, numpy as np, torch
from cases import Case, draw
from fastkd.losses.relation import CRD, PKT, RKD, Contrastive, CorrelationCongruence, CosineSimilarity, Gram, InstanceGraph, Similarity

ROWS   = [((3, 4), (3, 2)), ((4, 2, 3, 2), (4, 3, 1, 4)), ((2, 2), (2, 2)), ((5, 3), (5, 7))]
ALONE  = [((1, 4), (1, 3))]
WIDE   = [((3, 2, 3, 2), (3, 3, 3, 2)), ((4, 3), (4, 2)), ((1, 2, 4, 3), (1, 2, 2, 3))] # other channels, sizes, one sample
POOLED = [((3, 3), (3, 3)), *WIDE, ((3, 5, 2), (3, 3, 4, 2)), ((2, 2), (2, 5, 3))] # maps, tokens, vectors

def flat(o): return o.reshape(len(o), -1)

def both(relation):
    "A formula that compares a table of relations, in the mean over its entries"
    def formula(g):
        t_s, t_t = np.array(relation(flat(g.fm_s[0]))), np.array(relation(flat(g.fm_t[0])))
        return ((t_s - t_t)**2).sum()/t_s.size
    return formula

def length(x): return math.sqrt(sum(x**2))

def cosine(x, y): return sum(x*y)/(length(x)*length(y))

def row_normalized(rows):
    "Row by row: inner products with all samples, and their length"
    table = []
    for x in rows:
        products = np.array([sum(x*y) for y in rows])
        table.append(products/length(products))
    return table

def whole_normalized(rows):
    products = np.array([[sum(x*y) for y in rows] for x in rows])
    return products/math.sqrt((products**2).sum())

def cosines(rows): return [[cosine(x, y) for y in rows] for x in rows]

def gaussian_series(gamma, P):
    def term(p, x, y): return math.exp(-2*gamma)*(2*gamma)**p/math.factorial(p)*cosine(x, y)**p
    return lambda rows: [[sum(term(p, x, y) for p in range(P + 1)) for y in rows] for x in rows]

def huber(x): return x**2/2 if abs(x) < 1 else abs(x) - .5

def measured(rows, normalize):
    d = [[length(x - y) for y in rows] for x in rows]
    positive = [o for row in d for o in row if o > 0]
    if not positive: return d
    unit = max(positive) if normalize == 'max' else sum(positive)/len(positive)
    return [[o/unit for o in row] for row in d]

def triplets(rows):
    "The cosine at i between j and k; 0 where two of the samples are one"
    n = range(len(rows))
    def at(i, j, k): return 0. if i in (j, k) else cosine(rows[j] - rows[i], rows[k] - rows[i])
    return [[[at(i, j, k) for k in n] for j in n] for i in n]

def rkd(distance=25, angle=50, normalize='mean'):
    def formula(g):
        rows_s, rows_t = flat(g.fm_s[0]), flat(g.fm_t[0])
        parts = []
        for of in (lambda rows: measured(rows, normalize), triplets):
            pairs = list(zip(np.ravel(of(rows_s)), np.ravel(of(rows_t))))
            parts.append(sum(huber(a - b) for a, b in pairs)/len(pairs))
        return distance*parts[0] + angle*parts[1]
    return formula

# ---- Single samples: features are averaged over positions

def pooled(o): return o if o.ndim == 2 else o.mean(1) if o.ndim == 3 else o.mean((2, 3))

def through(rows, g, name):
    "Rows through a learned linear layer; as they are where there is none"
    weight = g.learned.get(f'learned.0.{name}weight')
    if weight is None: return rows
    return np.array([weight.reshape(weight.shape[:2]) @ x for x in rows]) + g.learned[f'learned.0.{name}bias']

def contrastive(T):
    def formula(g):
        s, t = through(pooled(g.fm_s[0]), g, ''), pooled(g.fm_t[0])
        value = 0
        for i, x in enumerate(s):
            weights = [math.exp(cosine(x, y)/T) for y in t]
            value -= math.log(weights[i]/sum(weights))/len(s)
        return value
    return formula

def projections(g):
    for side, fm in (('student', g.fm_s), ('teacher', g.fm_t)):
        rows = through(pooled(fm[0]), g, f'{side}.')
        yield np.array([x/length(x) for x in rows])

def crd_queue(T):
    def formula(g):
        (s, t), n = projections(g), int(g.learned['learned.0.n_keys'])
        keys, value = g.learned['learned.0.keys'][:n], 0
        for x, y in zip(s, t):
            right, wrong = math.exp(sum(x*y)/T), sum(math.exp(sum(x*key)/T) for key in keys)
            value -= math.log(right/(right + wrong))/len(s)
        return value
    return formula

def crd_nce(T, K):
    "Equations 17 to 19, once with the student's features against the teacher's bank, once the other way round"
    def formula(g):
        seed, n_draws = g.learned['learned.0.draws._extra_state']
        uniform = torch.rand(K, generator=torch.Generator().manual_seed(int(seed + n_draws + 1))).numpy()
        (s, t), value = projections(g), 0
        for side, (rows, bank) in enumerate(((s, g.learned['learned.0.bank_t']), (t, g.learned['learned.0.bank_s']))):
            N, Z = len(bank), math.exp(g.learned['learned.0.log_z'][side])
            drawn = [bank[int(u*N)] for u in uniform]
            for x, i in zip(rows, g.index):
                def h(y):
                    p = math.exp(sum(x*y)/T)/Z
                    return p/(p + K/N)
                value -= (math.log(h(bank[i])) + sum(math.log(1 - h(y)) for y in drawn))/len(rows)
        return value
    return formula

class Remembering(Case):
    "A loss that has seen three batches before"
    def built(self, given):
        loss = super().built(given)
        for seed in (20, 21, 22):
            others = lambda fm: {name: draw(o.shape, seed, o.dtype) for name, o in fm.items()}
            loss(**given | dict(fm_s=others(given['fm_s']), fm_t=others(given['fm_t'])))
        return loss

def numbered(given): return dict(index=torch.tensor([7, 2, 5, 0, 3])[:len(next(iter(given['fm_s'].values())))])

# ---- Samples and their distances

def instance_graph(edges=1., vertices=1.):
    def formula(g):
        n, value = len(g.fm_s[0]), 0
        if n > 1:
            pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
            d_s, d_t = ([length(flat(o)[i] - flat(o)[j]) for i, j in pairs] for o in (g.fm_s[0], g.fm_t[0]))
            value = edges*sum((a/np.mean(d_s) - b/np.mean(d_t))**2 for a, b in zip(d_s, d_t))/len(pairs)
        if not vertices: return value
        f_s, f_t = f.meet(g.fm_s[0], g.fm_t[0])
        if 'learned.0.weight' in g.learned: f_s = f.adapt(f_s, g.learned['learned.0.weight'], g.learned['learned.0.bias'])
        f_s, f_t = flat(f_s), flat(f_t)
        differences = [x/length(x) - y/length(y) for x, y in zip(f_s, f_t)]
        return value + vertices*np.mean(np.square(differences))
    return formula

CASES = [Case(PKT(), lambda g: f.pkt(g.fm_s[0], g.fm_t[0]), ROWS),
    Case(Similarity(), both(row_normalized), ROWS + ALONE),
    Case(RKD(), rkd(), ROWS + ALONE),
    Case(RKD(distance=2, angle=3, normalize='max'), rkd(2, 3, 'max'), ROWS + ALONE),
    Case(CorrelationCongruence(), both(gaussian_series(.4, 2)), ROWS + ALONE),
    Case(CorrelationCongruence(gamma=1.2, P=4), both(gaussian_series(1.2, 4)), ROWS + ALONE),
    Case(Gram(), both(whole_normalized), ROWS + ALONE),
    Case(CosineSimilarity(), both(cosines), ROWS + ALONE),
    Case(Contrastive(), contrastive(.5), POOLED, at_equal=None),
    Case(Contrastive(T=.1), contrastive(.1), POOLED, at_equal=None),
    Remembering(CRD(dim=4, negatives=6), crd_queue(.07), POOLED, at_equal=None, learns=True),
    Remembering(CRD(dim=3, negatives=30, T=.3), crd_queue(.3), POOLED, at_equal=None, learns=True), # not full
    Remembering(CRD(dim=4, negatives=5, form='nce'), crd_nce(.07, 5), POOLED, numbered, dict(n_samples=9), at_equal=None, learns=True),
    Case(InstanceGraph(), instance_graph(), [((3, 3), (3, 3)), *WIDE]),
    Case(InstanceGraph(edges=3, vertices=0), instance_graph(3, 0), ROWS + ALONE)]
