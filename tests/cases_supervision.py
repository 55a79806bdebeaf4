"Losses with classifiers at the student's layers, from their papers, in float64 and without torch."
import numpy as np, torch
from cases import Case, draw, labels
from cases_response import kl, softmax
from fastkd.losses.core import Mixed
from fastkd.losses.supervision import DeepSupervision

def pooled(o):
    "Means over positions; the channels of tokens come last"
    if o.ndim == 3: return o.mean(1)
    return o.reshape(*o.shape[:2], -1).mean(2)

def one_label(z, z_t, y, T, alpha): return (1 - alpha)*-np.log(softmax(z)[y]) + alpha*T**2*kl(softmax(z_t, T), softmax(z, T))

def deep_supervision(g, T=3., alpha=.3):
    "Head by head, sample by sample"
    values = []
    for k, o in enumerate(g.fm_s):
        logits = pooled(o) @ g.learned[f'learned.{k}.weight'].T + g.learned[f'learned.{k}.bias']
        for i, (z, z_t) in enumerate(zip(logits, g.teacher_pred)):
            if isinstance(g.target, Mixed):
                lam, (first, second) = g.target.lam[i], (one_label(z, z_t, y[i], T, alpha) for y in g.target[:2])
                values.append(lam*first + (1 - lam)*second)
            else: values.append(one_label(z, z_t, g.target[i].argmax() if g.target.ndim == 2 else g.target[i], T, alpha))
    return np.mean(values)

LAYERS = [([(3, 2, 4, 3)], []), ([(2, 3, 4, 2), (2, 5, 4)], []), ([(4, 6), (4, 2, 3, 4), (4, 3, 2, 4, 2)], []), ([(1, 3, 5, 4)], [])]

def more(given, n_classes=4, kind='classes'):
    "The teacher's prediction and labels for what is in `fm_s`"
    first = next(iter(given['fm_s'].values()))
    n, y = len(first), labels(n_classes, (len(first),))
    if kind == 'mixed': y = Mixed(y, labels(n_classes, (n,), 3), draw((n,), 4).sigmoid())
    if kind == 'one-hot': y = torch.nn.functional.one_hot(y, n_classes)
    return dict(teacher_pred=draw((n, n_classes), 7, first.dtype), target=y)

def case(loss, kind='classes', **settings):
    return Case(loss, lambda g: deep_supervision(g, **settings), LAYERS, lambda given: more(given, kind=kind), at_equal=None, learns=True,
        name=f'{loss} {kind}')

CASES = [case(DeepSupervision()), case(DeepSupervision(T=1, alpha=.8), T=1, alpha=.8), case(DeepSupervision(alpha=0), alpha=0),
    case(DeepSupervision(), 'mixed'), case(DeepSupervision(), 'one-hot')]
