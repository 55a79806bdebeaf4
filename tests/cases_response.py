"Losses on predictions, from their papers, in float64 and without torch."
import formulas as f, numpy as np, torch, torch.nn.functional as F
from cases import Case, labels
from fastkd.losses.core import Mixed
from fastkd.losses.response import (DIST, BinaryKD, DecoupledKD, Divergence, HardLabel, Logits, Mutual, NormalizedKD, SoftMAE, SoftTarget,
    WeightedSoftLabel)

LOGITS = [((3, 4), (3, 4)), ((1, 3), (1, 3)), ((4, 2), (4, 2)), ((2, 4, 3, 2), (2, 4, 3, 2)), ((1, 3, 6), (1, 3, 6))]

# ---- One row after the other: `p_s` and `p_t` are the probabilities of one position

def softmax(z, T=1): return np.exp(f.log_softmax(z/T))

def kl(p, q): return sum(a*np.log(a/b) for a, b in zip(p, q))

def cross_entropy(p, q): return -sum(a*np.log(b) for a, b in zip(p, q))

def row_mean(of_row, g): return np.mean([of_row(z_s, z_t) for z_s, z_t in zip(f.rows(g.pred), f.rows(g.teacher_pred))])

def class_rows(y, pred):
    "One class for each row of `pred`, from classes or one-hot labels"
    return (y.argmax(1) if y.shape == pred.shape else y).reshape(-1)

def labelled_mean(of_row, g):
    "The mean of `of_row(z_s, z_t, y, fixed z_s)`; where labels are mixed, that of both labels by their shares"
    rows_s, rows_t, fixed = (f.rows(o) for o in (g.pred, g.teacher_pred, g.fixed.pred))
    of_labels = lambda y: np.array([of_row(*o) for o in zip(rows_s, rows_t, class_rows(y, g.pred), fixed)])
    if not isinstance(g.target, Mixed): return of_labels(g.target).mean()
    lam = np.repeat(np.broadcast_to(g.target.lam, len(g.pred)), len(rows_s)//len(g.pred))
    return (lam*of_labels(g.target.y) + (1 - lam)*of_labels(g.target.y1)).mean()

def others(p, y):
    "Probabilities of all classes but `y`, among themselves"
    p = np.delete(p, y)
    return p/p.sum()

def decoupled(z_s, z_t, y, fixed, T=4, alpha=1., beta=8.):
    p_s, p_t = softmax(z_s, T), softmax(z_t, T)
    return T**2*(alpha*kl([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]]) + beta*kl(others(p_t, y), others(p_s, y)))

def normalized(z_s, z_t, y, fixed, gamma=1.5, T=1.):
    q_s, q_t = (others(softmax(z, T), y) for z in (z_s, z_t))
    return -softmax(z_t)[y]*np.log(softmax(z_s)[y]) + gamma*T**2*cross_entropy(q_t, q_s)

def weighted(z_s, z_t, y, fixed, T=2.):
    task_s, task_t = (-np.log(softmax(z)[y]) for z in (fixed, z_t))
    return T**2*(1 - np.exp(-task_s/(task_t + 1e-7)))*cross_entropy(softmax(z_t, T), softmax(z_s, T))

def pearson(a, b):
    a, b = a - np.mean(a), b - np.mean(b)
    size_a, size_b = np.sqrt((a**2).sum()), np.sqrt((b**2).sum())
    if not size_a or not size_b: return float(size_a == size_b)
    return (a*b).sum()/(size_a*size_b)

def dist(g, beta=1., gamma=1., T=1.):
    y_s, y_t = (softmax(f.rows(z), T) for z in (g.pred, g.teacher_pred))
    of_rows, of_columns = (1 - np.mean([pearson(*o) for o in zip(a, b)]) for a, b in ((y_s, y_t), (y_s.T, y_t.T)))
    return T**2*(beta*of_rows + gamma*of_columns)

def hard_label(g): return row_mean(lambda z_s, z_t: -np.log(softmax(z_s)[list(z_t).index(max(z_t))]), g)

def divergence(kind, T=1., beta=.5):
    def of_row(z_s, z_t):
        p_s, p_t = softmax(z_s, T), softmax(z_t, T)
        m = beta*p_t + (1 - beta)*p_s
        return dict(forward=kl(p_t, p_s), reverse=kl(p_s, p_t), js=beta*kl(p_t, m) + (1 - beta)*kl(p_s, m), tv=abs(p_s - p_t).sum()/2)[kind]
    return lambda g: row_mean(of_row, g)

def binary(g, T=2.):
    p_s, p_t = (1/(1 + np.exp(-z/T)) for z in (g.pred, g.teacher_pred))
    return T**2*-np.mean(p_t*np.log(p_s) + (1 - p_t)*np.log(1 - p_s))

def soft_mae(g, T=1.): return row_mean(lambda z_s, z_t: abs(softmax(z_s, T) - softmax(z_t, T)).mean(), g)

# ---- Labels of each kind, for the predictions at hand

def classes_of(given, seed=2):
    shape = given['pred'].shape
    return labels(shape[1], (shape[0], *shape[2:]), seed)

def one_hot_of(given, seed=2):
    "A column for each class, in the predictions' layout"
    return F.one_hot(classes_of(given, seed), given['pred'].shape[1]).movedim(-1, 1)

def mixed_of(given, make=classes_of):
    "A share for each sample"
    return Mixed(make(given), make(given, 3), torch.linspace(.25, 1, len(given['pred']), dtype=torch.float64))

def whole_batch(given): return Mixed(classes_of(given), classes_of(given, 3), torch.tensor(.7, dtype=torch.float64))

TARGETS = dict(classes=classes_of, one_hot=one_hot_of, mixed=mixed_of, mixed_one_hot=lambda given: mixed_of(given, one_hot_of),
    one_share=whole_batch)

def labelled(loss, of_row, kinds=tuple(TARGETS), **kwargs):
    "A case for each kind of labels"
    return [Case(loss, lambda g: labelled_mean(of_row, g), LOGITS, extra=lambda given, kind=kind: dict(target=TARGETS[kind](given)),
        name=f'{loss!r} {kind}', **kwargs) for kind in kinds]

LABELLED = labelled(DecoupledKD(), decoupled) + labelled(NormalizedKD(), normalized, at_equal=None)
LABELLED += labelled(DecoupledKD(1.5, .3, 2.), lambda *o: decoupled(*o, 1.5, .3, 2.), ['classes', 'mixed'])
LABELLED += labelled(NormalizedKD(.4, 3.), lambda *o: normalized(*o, .4, 3.), ['classes'], at_equal=None)
LABELLED += labelled(WeightedSoftLabel(), weighted, at_equal=None, holds_fixed=True)
LABELLED += labelled(WeightedSoftLabel(T=1.), lambda *o: weighted(*o, 1.), ['classes'], at_equal=None, holds_fixed=True)

OTHERS = {SoftTarget(): lambda g: f.soft_target(g.pred, g.teacher_pred), Logits(): lambda g: f.logits(g.pred, g.teacher_pred),
    SoftTarget(T=2, standardize=True): lambda g: f.soft_target(g.pred, g.teacher_pred, 2, standardized=True),
    Mutual(): divergence('forward'), DIST(): dist, DIST(beta=.5, gamma=2., T=3.): lambda g: dist(g, .5, 2., 3.),
    Divergence('js', beta=.1): divergence('js', beta=.1), SoftMAE(): soft_mae, SoftMAE(T=4.): lambda g: soft_mae(g, 4.)}
OTHERS |= {Divergence(kind, T=T): divergence(kind, T) for kind in Divergence.kinds for T in (1., 2.5)}
FLOORED = {HardLabel(): hard_label, BinaryKD(): binary, BinaryKD(T=1.): lambda g: binary(g, 1.)} # above 0 for equal predictions

CASES = [Case(loss, formula, LOGITS) for loss, formula in OTHERS.items()] + LABELLED
CASES += [Case(loss, formula, LOGITS, at_equal=None) for loss, formula in FLOORED.items()]
