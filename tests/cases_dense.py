"Losses on dense outputs, in float64 and without torch."
import formulas as f, numpy as np, torch
from cases import Case, labels
from fastkd.losses.dense import BoxRegression, PyramidFeatures

BOXES = [((2, 3, 4), (2, 3, 4)), ((1, 5, 4), (1, 5, 4)), ((3, 2, 4), (3, 2, 4))]
LEVELS = [((2, 3, 2, 3), (2, 3, 2, 3)), ((1, 2, 3, 2), (1, 4, 3, 2)), ((2, 2, 4, 3), (2, 2, 2, 5)),
    ([(2, 2, 3, 2), (2, 2, 2, 1)], [(2, 2, 3, 2), (2, 3, 4, 2)]), ([(1, 2, 2, 2)]*3, [(1, 2, 2, 2)]*3)]

def classes(given):
    "The class of every anchor, 0 for background; the first anchor is never background"
    target = labels(3, next(iter(given['fm_s'].values())).shape[:2])
    target[:, 0] = 1
    return dict(target=target)

def classes_and_mask(given):
    target = classes(given)['target']
    return dict(target=target, mask=torch.arange(target.numel()).reshape(target.shape) % 4 != 1)

def is_object(target): return target > 0

def boxes(g, beta=1.):
    "Smooth-L1, number by number, over the anchors that count"
    values = []
    for b, n in np.ndindex(g.fm_s[0].shape[:2]):
        if hasattr(g, 'target') and g.target[b, n] == 0: continue
        if hasattr(g, 'mask') and not g.mask[b, n]: continue
        for d in np.abs(g.fm_s[0][b, n] - g.fm_t[0][b, n]): values.append(d**2/(2*beta) if d < beta else d - beta/2)
    return sum(values)/max(1, len(values))

def pyramid(g):
    "Mean over levels, sample by sample"
    total = 0
    for i in range(len(g.fm_s)):
        f_s, f_t = f.meet(g.fm_s[i], g.fm_t[i])
        if f'learned.{i}.weight' in g.learned: f_s = f.adapt(f_s, g.learned[f'learned.{i}.weight'], g.learned[f'learned.{i}.bias'])
        of_samples = []
        for s, t in zip(f_s, f_t):
            w = np.abs(t).mean(0)
            of_samples.append(((w/w.max()*(s - t))**2).mean())
        total += np.mean(of_samples)/len(g.fm_s)
    return total

CASES = [Case(BoxRegression(), boxes, BOXES), Case(BoxRegression(beta=.1), lambda g: boxes(g, .1), BOXES),
    Case(BoxRegression(positives=is_object), boxes, BOXES, classes, name='BoxRegression(positives)'),
    Case(BoxRegression(2., is_object), lambda g: boxes(g, 2.), BOXES, classes_and_mask, name='BoxRegression(positives), masked'),
    Case(PyramidFeatures(), pyramid, LEVELS)]
