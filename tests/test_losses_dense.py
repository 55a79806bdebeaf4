"What is special about losses on dense outputs: positives, levels, and detectors that return dicts."
import numpy as np, pytest, torch, torch.nn.functional as F
from cases import draw
from fastai.basics import Learner
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.losses.core import Probe
from fastkd.losses.dense import BoxRegression, PyramidFeatures, strength
from formulas import close, value_and_grad
from helpers import loaders, quiet, seeded
from torch import nn

def is_object(target): return target > 0

CLASSES = torch.tensor([[0, 2, 0, 1, 0], [0, 0, 0, 3, 0]])
REGRESSION = BoxRegression(positives=is_object)

def boxes(dtype=torch.float64): return draw((2, 5, 4), dtype=dtype), draw((2, 5, 4), 1, dtype)

# ---- Boxes

@pytest.mark.parametrize('beta', [0, .1, 1., 5.])
def test_as_torch(beta):
    student, teacher = boxes()
    close(BoxRegression(beta)(student, teacher), F.smooth_l1_loss(student, teacher, beta=beta))
    expected = F.smooth_l1_loss(student[CLASSES > 0], teacher[CLASSES > 0], beta=beta)
    close(BoxRegression(beta, is_object)(student, teacher, target=CLASSES), expected)

def test_known_values():
    "Differences of 0, .5, 1 and 3: 0, .125, .5 and 2.5"
    student, teacher = torch.tensor([[[0., .5, -1., 3.]]]), torch.zeros(1, 1, 4)
    value, grad = value_and_grad(lambda s: BoxRegression()(s, teacher), student)
    close(value, 3.125/4)
    close(grad, torch.tensor([[[0., .5, -1., 1.]]])/4)

@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e30])
def test_background_has_no_say(value):
    student, teacher = boxes()
    expected, grad = value_and_grad(lambda s: REGRESSION(s, teacher, target=CLASSES), student)
    background = (CLASSES == 0)[..., None]
    student, teacher = (o.masked_fill(background, value) for o in (student, teacher))
    actual, again = value_and_grad(lambda s: REGRESSION(s, teacher, target=CLASSES), student)
    assert torch.equal(actual, expected) and torch.equal(again, grad) and not grad[CLASSES == 0].any()

def test_without_objects():
    student, teacher = boxes()
    value, grad = value_and_grad(lambda s: REGRESSION(s, teacher, target=0*CLASSES), student)
    assert value == 0 and not grad.any()

def test_positives_and_mask():
    student, teacher = boxes()
    mask = torch.tensor([[True]*5, [False]*5])
    expected = F.smooth_l1_loss(student[0, [1, 3]], teacher[0, [1, 3]])
    for given in (mask, mask[:, 0], mask.long()): close(REGRESSION(student, teacher, target=CLASSES, mask=given), expected)
    close(BoxRegression()(student, teacher, target=CLASSES, mask=mask), F.smooth_l1_loss(student[0], teacher[0]))
    as_integers = BoxRegression(positives=lambda target: (target > 0).long())
    close(as_integers(student, teacher, target=CLASSES), REGRESSION(student, teacher, target=CLASSES))

def test_errors_of_boxes():
    student, teacher = boxes()
    for said, call in [('finds objects in the target', lambda: REGRESSION(student, teacher)),
        ('a mask of shape', lambda: REGRESSION(student, teacher, target=CLASSES[:, :3])),
        ('a mask of shape', lambda: REGRESSION(student, teacher, target=CLASSES, mask=torch.ones(2, 4))),
        ('5 positions of the student, 3 of the teacher', lambda: BoxRegression()(student, teacher[:, :3])),
        ('boxes of 4 and 1 coordinates', lambda: BoxRegression()(student, teacher[..., :1])),
        ('beta must be at least 0', lambda: BoxRegression(beta=-.1))]:
        with pytest.raises(ValueError, match=said): call()

def test_check_of_boxes():
    student, teacher = boxes()
    probe = lambda target: Probe(fm_s=dict(boxes=student[:1]), fm_t=dict(boxes=teacher[:1]), target=target)
    REGRESSION.check(probe(CLASSES))
    with pytest.raises(ValueError, match="layer 'boxes' has 5 anchors"): REGRESSION.check(probe(CLASSES[:, 1:]))
    with pytest.raises(ValueError, match='finds objects in the target'): REGRESSION.check(probe(None))

# ---- Pyramids

def test_levels_are_averaged():
    fm_s, fm_t = {f's{i}': draw((2, 3, 4, 2), i) for i in range(3)}, {f't{i}': draw((2, 3, 4, 2), 5 + i) for i in range(3)}
    alone = [PyramidFeatures()(s, t) for s, t in zip(fm_s.values(), fm_t.values())]
    close(PyramidFeatures()(fm_s, fm_t), np.mean(alone))
    close(PyramidFeatures()([fm_s['s0']]*4, [fm_t['t0']]*4), alone[0])

def test_each_sample_has_its_maximum():
    "A sample whose maps are a hundred times as strong changes no weight of another one"
    teacher = draw((2, 3, 4, 2))
    weight = strength(teacher)
    close(weight.amax((1, 2, 3)), torch.ones(2))
    close(strength(teacher*torch.tensor([1., 100.])[:, None, None, None]), weight)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16], ids=str)
def test_blind_teacher(dtype):
    "Weight 0 and no gradient where a sample's map is zero, and the others are not touched"
    student, teacher = draw((2, 3, 4, 2), dtype=dtype), draw((2, 3, 4, 2), 1, dtype)
    teacher[0] = 0
    value, grad = value_and_grad(lambda s: PyramidFeatures()(s, teacher), student)
    close(value, PyramidFeatures()(student[1:], teacher[1:])/2, rtol=1e-6)
    assert not grad[0].any() and grad[1].any() and grad.isfinite().all()

def test_the_smallest_numbers():
    "A map of the smallest numbers has weights up to 1 like any other"
    teacher = torch.full((1, 2, 2, 2), torch.finfo(torch.float32).smallest_normal)
    close(strength(teacher), torch.ones(1, 1, 2, 2))

# ---- With the callback

class TinyDetector(nn.Module):
    "Logits and boxes of 16 anchors, one for each position of the second level"
    def __init__(self, width):
        super().__init__()
        self.level1, self.level2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 2*width, 3, 2, 1)
        self.head = nn.Linear(2*width, 7)

    def forward(self, x):
        anchors = self.head(self.level2(self.level1(x).relu()).relu().flatten(2).transpose(1, 2))
        return dict(logits=anchors[..., :3], boxes=anchors[..., 3:])

def class_loss(pred, target): return F.cross_entropy(pred['logits'].flatten(0, 1), target.flatten())

class_loss.axis = -1

def test_detector():
    "Boxes of positive anchors and two levels, with adapters"
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8, 16), generator=generator)
    teacher = seeded(TinyDetector, 4, seed=1)
    learn = quiet(Learner(loaders(list(zip(images, labels)), bs=8), seeded(TinyDetector, 2), class_loss))
    names = ['level1', 'level2']
    loss = 3*REGRESSION.on('boxes', 'boxes') + PyramidFeatures().on(names, names)
    cb = KnowledgeDistillationCallback(teacher, loss, weight=1, task_weight=1)
    learn.fit(1, 0., cbs=cb)
    with torch.no_grad(): out_s, out_t = learn.model(images)['boxes'], teacher(images)['boxes']
    shown = learn.recorder.distillation
    close(shown['box_regression_loss'][0], F.smooth_l1_loss(out_s[labels > 0], out_t[labels > 0]), rtol=1e-5)
    close(shown['distillation_loss'][0], 3*shown['box_regression_loss'][0] + shown['pyramid_features_loss'][0], rtol=1e-5)
    assert [o.weight.shape[:2] for o in cb.loss.parts[1].loss.learned] == [(4, 2), (8, 4)]
