"What is special about losses on predictions: known values, exact identities, masks, ties, and numbers beyond `exp`."
import formulas as f, math, numpy as np, pytest, torch, torch.nn.functional as F
from cases import apply, draw
from cases_response import CASES, LABELLED, dist
from fastkd.losses.core import LabelledResponseLoss, Mixed, Probe, to_rows, wanted_inputs
from fastkd.losses.response import (DIST, BinaryKD, DecoupledKD, Divergence, HardLabel, Logits, Mutual, NormalizedKD, SoftMAE, SoftTarget,
    WeightedSoftLabel, split_by_target)
from formulas import close
from torch import tensor
from types import SimpleNamespace

each = pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
each_labelled = pytest.mark.parametrize('case', LABELLED, ids=lambda case: case.name)
y = tensor([0, 2, 1])

def a_pair(*shape): return draw(shape), draw(shape, 1)

def grad_of(loss, student, *rest):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, *rest), student)[0]

# ---- For all of them

def test_usual_weights():
    weights = {cls: cls.usual_weight for cls in {type(case.loss) for case in CASES}}
    assert weights == {SoftTarget: .9, DecoupledKD: 1, NormalizedKD: 1, DIST: 2, WeightedSoftLabel: 2.5, HardLabel: .5} | dict.fromkeys(
        (Logits, Mutual, Divergence, BinaryKD, SoftMAE))

def rows_that_count(given, mask):
    "The positions where `mask` is true, as a batch of vectors"
    shape = given['pred'].shape
    keep = lambda o: to_rows(o)[mask.flatten()] if o.shape == shape else o.flatten()[mask.flatten()]
    rows = {key: keep(given[key]) for key in ('pred', 'teacher_pred')}
    target = given.get('target')
    if target is None: return rows
    if not isinstance(target, Mixed): return rows | dict(target=keep(target))
    lam = target.lam.reshape(-1, 1, 1).expand(mask.shape)
    return rows | dict(target=Mixed(keep(target.y), keep(target.y1), keep(lam)))

@pytest.fixture(params=[True, False], ids=['host', 'device'])
def on_host(request, monkeypatch):
    "Where masks are, for the losses: a device is not asked how many rows count"
    monkeypatch.setattr('fastkd.losses.core.on_host', lambda tensor: request.param)

@each
def test_a_mask_leaves_positions_out(case, on_host):
    "As if they had never been there: whatever they hold has no influence, and they get no gradient"
    given = case.given(shapes=((2, 4, 3, 2), (2, 4, 3, 2)))
    mask = draw((2, 3, 2), 5) > 0
    expected = case.loss(**rows_that_count(given, mask))
    noisy = {key: torch.where(mask[:, None], given[key], 50*draw((2, 4, 3, 2), 6)) for key in ('pred', 'teacher_pred')}
    student = noisy['pred'].requires_grad_()
    value = case.loss(**given | noisy, mask=mask)
    close(value, expected, rtol=1e-10)
    grad = torch.autograd.grad(value, student)[0].movedim(1, -1)
    assert not grad[~mask].any() and grad[mask].any()

@each
def test_nothing_counts(case, on_host):
    "Padding only: the value is 0, and so is the gradient"
    given = case.given()
    student = given['pred'].requires_grad_()
    value = case.loss(**given, mask=torch.zeros(3, dtype=torch.bool))
    assert value == 0 and not torch.autograd.grad(value, student)[0].any()

@each_labelled
def test_ignored_labels(case):
    "A mask covers labels that are no classes"
    given = case.given()
    if not isinstance(given['target'], torch.Tensor) or given['target'].ndim > 1: return
    ignored = given | dict(target=given['target'].masked_fill(tensor([False, True, False]), -100), mask=tensor([True, False, True]))
    close(case.loss(**ignored), case.loss(**rows_that_count(given, ignored['mask'])))

@each_labelled
def test_labels_that_are_no_classes_do_not_count(case):
    "Without a mask, too: -100 below, and 255 above the classes"
    given = case.given()
    if not isinstance(given['target'], torch.Tensor) or given['target'].ndim > 1: return
    expected = case.loss(**rows_that_count(given, tensor([True, False, True])))
    for ignored in -100, 255:
        close(case.loss(**given | dict(target=given['target'].masked_fill(tensor([False, True, False]), ignored))), expected)

@each
def test_classes_last(case):
    "The classes may stand in any dimension"
    given = case.given(shapes=((2, 4, 3, 5), (2, 4, 3, 5)))
    last = apply(lambda o: o.movedim(1, -1) if o.shape == (2, 4, 3, 5) else o, given)
    for axis in (3, -1): close(case.loss(**last, axis=axis), case.loss(**given))

@each
def test_shapes_that_differ(case):
    given = case.given()
    with pytest.raises(ValueError, match='student predicts 4 classes and the teacher 7'):
        case.loss(**given | dict(teacher_pred=draw((3, 7))))

@each_labelled
def test_labels_that_are_no_classes(case):
    "Soft and multi-label targets, and missing ones, are named before training"
    pred = draw((1, 4))
    for target, said in ((torch.full((3, 4), .25), 'soft or multi-label'), (tensor([[1, 1, 0, 0]]), 'soft or multi-label'),
        (tensor([.5, 1.]), 'integers or one-hot'), (None, 'needs labels')):
        with pytest.raises(ValueError, match=said): case.loss.without_learned().build(Probe(pred=pred, teacher_pred=pred, target=target))

ONE_OF = r"one of \('reverse', 'js', 'tv', 'forward'\), not 'KL'"

@pytest.mark.parametrize('cls,settings,said', [(DecoupledKD, dict(T=0), 'T must be positive'),
    (DecoupledKD, dict(alpha=-1), 'alpha must be at least 0'), (NormalizedKD, dict(gamma=-1), 'gamma must be at least 0'),
    (DIST, dict(beta=math.inf), 'beta must be at least 0 and finite'), (WeightedSoftLabel, dict(T=-1), 'T must be positive'),
    (Divergence, dict(beta=0), 'beta must be positive'), (Divergence, dict(beta=1.), 'beta must be below 1'),
    (Divergence, dict(kind='KL'), ONE_OF),
    (BinaryKD, dict(T=0), 'T must be positive'), (SoftMAE, dict(T=0), 'T must be positive')])
def test_settings_out_of_range(cls, settings, said):
    "When the loss is made, and when a setting is changed"
    with pytest.raises(ValueError, match=said): cls(**settings)
    loss = cls()
    for name, value in settings.items():
        with pytest.raises(ValueError, match=said): setattr(loss, name, value)

# ---- Mutual, HardLabel, Divergence

def test_mutual_is_soft_target():
    student, teacher = a_pair(3, 5)
    close(Mutual()(student, teacher), SoftTarget(T=1)(student, teacher), rtol=1e-14)
    close(grad_of(Mutual(), student, teacher), f.soft_target_grad(student.numpy(), teacher.numpy(), 1))

@pytest.mark.parametrize('teacher,first', [([1., 3., 3., 0.], 1), ([0., 0., 0., 0.], 0), ([-1., -2., -1., -1.], 0), ([0., 1., 1., 2.], 3)])
def test_hard_label_ties(teacher, first):
    student = draw((1, 4))
    close(HardLabel()(student, tensor([teacher])), F.cross_entropy(student, tensor([first])))

def test_hard_label_wants_no_labels(): assert 'target' not in wanted_inputs(HardLabel())

def test_divergence_directions():
    pair = student, teacher = a_pair(4, 6)
    close(9*Divergence('forward', T=3)(*pair), SoftTarget(T=3)(*pair))
    close(Divergence()(*pair), Divergence('forward')(teacher, student))
    close(Divergence('js', beta=.3)(*pair), Divergence('js', beta=.7)(teacher, student))
    close(2/6*Divergence('tv')(*pair), SoftMAE()(*pair))
    for beta, kind in ((1e-6, 'forward'), (1 - 1e-6, 'reverse')):
        close(Divergence('js', beta=beta)(*pair)*1e6, Divergence(kind)(*pair), rtol=1e-4)

def test_divergences_that_are_bounded():
    "Sure of different classes"
    student, teacher = tensor([[300., 0.]]), tensor([[0., 300.]])
    for kind, expected in dict(js=math.log(2), tv=1., forward=300., reverse=300.).items():
        close(Divergence(kind)(student, teacher), expected, rtol=1e-6)

# ---- DecoupledKD, NormalizedKD

@pytest.mark.parametrize('T', [1, 4])
@pytest.mark.parametrize('n_classes', [2, 3, 10])
def test_decoupled_parts_make_the_whole(n_classes, T):
    "Equation 6, sample by sample"
    student, teacher = a_pair(3, n_classes)
    label = y % n_classes
    share = 1 - (teacher/T).softmax(1).gather(1, label[:, None])[:, 0]
    of_target, of_others = (DecoupledKD(T, a, 1 - a).rows(student, teacher, label) for a in (1, 0))
    close((of_target + share*of_others).mean(), f.soft_target(student.numpy(), teacher.numpy(), T))

def test_decoupled_with_two_classes():
    "There is nothing to tell the one other class from"
    student, teacher = a_pair(3, 2)
    for beta in (0., 8., 1000.):
        loss = DecoupledKD(beta=beta)
        close(loss(student, teacher, y % 2), SoftTarget(T=4)(student, teacher))
        close(grad_of(loss, student, teacher, y % 2), f.soft_target_grad(student.numpy(), teacher.numpy(), 4))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_decoupled_where_the_student_is_most_wrong(dtype):
    "The target's probability is 0 in floating point: the gradient is as strong as it can be"
    student, teacher = (tensor([o], dtype=dtype) for o in ([0., 800., 0.], [800., 0., 0.]))
    label = tensor([0])
    assert student.softmax(1)[0, 0] == 0
    close(DecoupledKD(T=1, beta=0)(student, teacher, label), 800., rtol=1e-6)
    close(grad_of(DecoupledKD(T=1, beta=0), student, teacher, label), [[-1., 1., 0.]], atol=1e-6)

def test_the_target_is_no_other():
    "However large its logit is; a mask of -1000 fails from 1000 times the temperature"
    for size in (10., 1e4, 1e6):
        two, others = split_by_target(tensor([[1., size, 2., 3.]]), tensor([1]))
        close(others[0, [0, 2, 3]], F.log_softmax(tensor([1., 2., 3.]), 0), rtol=1e-5)
        assert others[0, 1] == 0
        close(two, [[size, torch.logsumexp(tensor([1., 2., 3.]), 0)]], rtol=1e-6)

def test_normalized_is_not_decoupled():
    "The others' gradient is that of NCKD, the target's is the task loss's times the teacher's belief, also for equal predictions"
    for student, teacher in (a_pair(3, 5), 2*a_pair(3, 5)[:1]):
        p_s, p_t = student.softmax(1), teacher.softmax(1).gather(1, y[:, None])
        pull = p_t*(p_s - F.one_hot(y, 5))/3
        close(grad_of(NormalizedKD(.7, 2.), student, teacher, y), grad_of(DecoupledKD(2., 0., .7), student, teacher, y) + pull)

# ---- WeightedSoftLabel

def test_weights_have_no_gradient():
    student, teacher = a_pair(3, 6)
    weight = 1 - torch.exp(-F.cross_entropy(student, y, reduction='none')/(F.cross_entropy(teacher, y, reduction='none') + 1e-7))
    by_hand = 2*weight[:, None]*((student/2).softmax(1) - (teacher/2).softmax(1))/3
    close(grad_of(WeightedSoftLabel(), student, teacher, y), by_hand)

def test_weights_of_the_sure():
    "A student that knows the label weighs 0; a teacher that knows it, and a student that does not, 1"
    knows, does_not = 300.*F.one_hot(y, 4), torch.zeros(3, 4)
    assert WeightedSoftLabel()(knows, does_not, y) == 0
    close(WeightedSoftLabel()(does_not, knows, y), 4*math.log(4), rtol=1e-6)
    close(WeightedSoftLabel(T=1)(does_not, does_not, y), (1 - 1/math.e)*math.log(4), rtol=1e-6)

# ---- DIST

def test_dist_of_constant_columns():
    "Class 2 is as likely in every row of the teacher's, and in none of the student's"
    p_t = tensor([[.5, .2, .3], [.1, .6, .3], [.4, .3, .3]], dtype=torch.float64)
    student = draw((3, 3))
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(student.softmax(1).T[:2], p_t.T[:2])]
    close(DIST(beta=0)(student, p_t.log()), 1 - sum(columns)/3)
    close(DIST(beta=0)(p_t.log(), p_t.log()), 0, atol=1e-12)
    swapped = p_t[:, [1, 0, 2]]
    close(DIST(beta=0)(swapped.log(), p_t.log()), 1 - (2*np.corrcoef(p_t.T)[0, 1] + 1)/3)

def test_dist_of_no_opinion():
    flat, teacher = torch.zeros(4, 5), draw((4, 5), dtype=torch.float32)
    assert DIST()(flat, flat) == 0 and DIST(beta=1.5, gamma=.5)(flat, teacher) == 2 == DIST()(teacher, flat)
    assert not grad_of(DIST(), flat, teacher).any()

def test_dist_does_not_ask_for_the_same_confidence():
    teacher = draw((5, 4))
    for share in (.9, .5, .01): close(DIST()((share*teacher.softmax(1) + (1 - share)/4).log(), teacher), 0, atol=1e-9)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_dist_of_sure_predictions(dtype):
    "1000 classes: equal predictions cost nothing, and the gradient is 0"
    sure = 20.*F.one_hot(torch.arange(8)*7, 1000) + draw((8, 1000))
    assert DIST()(sure.to(dtype), sure.to(dtype)) == 0 and not grad_of(DIST(), sure.to(dtype), sure.to(dtype)).any()

@pytest.mark.parametrize('offset', [0., -40., -300., -2000.])
def test_dist_of_a_class_that_never_occurs(offset):
    "Its probabilities cannot be held by float32, but their correlation can; and it counts as much as those of others"
    student, teacher = (o + offset*F.one_hot(tensor(2), 4) for o in a_pair(5, 4))
    exact = dist(SimpleNamespace(pred=student.numpy().astype(np.longdouble), teacher_pred=teacher.numpy().astype(np.longdouble)))
    close(DIST()(student, teacher), float(exact), rtol=1e-10)
    close(DIST()(student.float(), teacher.float()), float(exact), rtol=2e-4)

# ---- BinaryKD, SoftMAE

def test_binary_is_a_softmax_over_two():
    pair = student, teacher = a_pair(4, 3)
    entropy = BinaryKD(T=3)(teacher, teacher)
    as_two = [torch.stack([o.flatten(), torch.zeros(12)], 1) for o in pair]
    close(BinaryKD(T=3)(*pair), SoftTarget(T=3)(*as_two) + entropy)

def test_binary_of_the_sure():
    student, teacher = tensor([[-300., 300., 300.]]), tensor([[300., 300., -300.]])
    close(BinaryKD(T=1)(student, teacher), 200., rtol=1e-6)
    close(grad_of(BinaryKD(T=1), student, teacher), [[-1/3, 0, 1/3]], atol=1e-7)

def test_one_question_per_sample():
    "A head with a single output"
    student, teacher = a_pair(6)
    close(BinaryKD()(student, teacher), BinaryKD()(student[:, None], teacher[:, None]))
    assert SoftMAE()(student, teacher) == 0 # one class is always sure

def test_soft_mae_is_bounded():
    close(SoftMAE()(tensor([[300., 0., 0., 0.]]), tensor([[0., 300., 0., 0.]])), 2/4)
    student, teacher = a_pair(3, 4)
    close((SoftTarget() + SoftMAE())(pred=student, teacher_pred=teacher), SoftTarget()(student, teacher) + SoftMAE()(student, teacher))

# ---- Classes that are ruled out, and single outputs

@pytest.mark.parametrize('loss', [SoftTarget(), Mutual(), DecoupledKD(), DIST(), Divergence('js'), Divergence('tv'), Divergence('forward'),
    WeightedSoftLabel(), NormalizedKD(), HardLabel(), SoftMAE()], ids=repr)
def test_classes_that_the_teacher_rules_out(loss):
    "A logit of -inf is a probability of 0: what a very low logit gives, and finite"
    z, t, y = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    y = y.argmax(1)
    values = []
    for low in (-1e4, -math.inf):
        student = z.clone().requires_grad_()
        ruled_out = t.index_fill(1, (y[:1] + 1) % 4, low)
        value = loss(student, ruled_out, **(dict(target=y.fill_(y[0])) if isinstance(loss, LabelledResponseLoss) else {}))
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all()
        values.append(value.item())
    if not isinstance(loss, DIST): assert values[0] == pytest.approx(values[1], rel=1e-4) # DIST compares columns of any size

@pytest.mark.parametrize('shape', [(3, 1), (3,)])
def test_single_outputs(shape):
    "Their softmax is always 1, so that nothing would be learned"
    probe = Probe(torch.randn(shape), torch.randn(shape), target=torch.zeros(shape[0], dtype=torch.long))
    for loss in (SoftTarget(), DIST(), HardLabel(), DecoupledKD()):
        with pytest.raises(ValueError, match='the softmax of a single output is always 1'): loss.build(probe)
    for loss in (Logits(), BinaryKD()): assert loss.build(probe)(torch.randn(shape), torch.randn(shape)) > 0
