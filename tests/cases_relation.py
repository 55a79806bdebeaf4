"Losses on relations between samples, from their papers, in float64 and without torch."
import formulas as f
from cases import Case
from fastkd.losses.relation import PKT

ROWS = [((3, 4), (3, 2)), ((4, 2, 3, 2), (4, 3, 1, 4)), ((2, 2), (2, 2)), ((5, 3), (5, 7))]

CASES = [Case(PKT(), lambda g: f.pkt(g.fm_s[0], g.fm_t[0]), ROWS)]
