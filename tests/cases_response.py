"Losses on predictions, from their papers, in float64 and without torch."
import formulas as f
from cases import Case
from fastkd.losses.response import Logits, SoftTarget

LOGITS = [((3, 4), (3, 4)), ((1, 3), (1, 3)), ((4, 2), (4, 2)), ((2, 4, 3, 2), (2, 4, 3, 2)), ((1, 3, 6), (1, 3, 6))]

CASES = [Case(SoftTarget(), lambda g: f.soft_target(g.pred, g.teacher_pred), LOGITS),
    Case(SoftTarget(T=2, standardize=True), lambda g: f.soft_target(g.pred, g.teacher_pred, 2, standardized=True), LOGITS),
    Case(Logits(), lambda g: f.logits(g.pred, g.teacher_pred), LOGITS)]
