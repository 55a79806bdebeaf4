"Losses on activations, from their papers, in float64 and without torch."
import formulas as f
from cases import Case
from fastkd.losses.feature import Attention, FitNet

SAME  = [((2, 3, 2, 2), (2, 3, 2, 2)), ((3, 4, 5, 2), (3, 4, 5, 2)), ((1, 2, 3, 3), (1, 2, 3, 3))]
SIZES = [((2, 3, 4, 6), (2, 3, 2, 3)), ((1, 2, 3, 2), (1, 2, 7, 5)), ((2, 3, 5, 3), (2, 3, 3, 4))] # larger, smaller, both
WIDE  = [((2, 2, 3, 2), (2, 3, 3, 2)), ((1, 4, 5, 4), (1, 2, 3, 2)), ((3, 2), (3, 4))] # other channels, with an adapter

def adapted(g, i=0):
    "The `i`-th student activation through its adapter, and the teacher's"
    weight, bias = (g.learned.get(f'learned.{i}.{name}') for name in ('weight', 'bias'))
    f_s, f_t = f.meet(g.fm_s[i], g.fm_t[i])
    return (f_s if weight is None else f.adapt(f_s, weight, bias)), f_t

CASES = [Case(FitNet(), lambda g: f.fitnet(*adapted(g)), SAME + SIZES + WIDE),
    Case(FitNet(normalize=True), lambda g: f.fitnet(*adapted(g), normalize=True), SAME + SIZES + WIDE),
    Case(Attention(), lambda g: f.attention(g.fm_s[0], g.fm_t[0]), SAME + SIZES + WIDE[:2]),
    Case(Attention(p=3, form='paper'), lambda g: f.attention(g.fm_s[0], g.fm_t[0], 3, 'paper'), SAME + SIZES + WIDE[:2])]
