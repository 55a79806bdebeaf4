"Teachers and students that end in a softmax or a sigmoid: said, declared, and trained as with logits."
import math, numpy as np, pytest, torch
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, L1LossFlat, Learner
from fastkd.all import *
from fastkd.advice import last_activation
from helpers import (convnet, digits, error_of, fitted, furthest, learner, loaders, messages, named_learner, quiet, seeded, soft_target,
    trained_teacher, weights)
from torch import nn

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is',
    "ignore:the teacher's classes are in another order")
KD = KnowledgeDistillationCallback

def softmaxed(model=None): return nn.Sequential(model or trained_teacher(), nn.Softmax(1))
def sigmoided(model=None): return nn.Sequential(model or trained_teacher(), nn.Sigmoid())

def trained(teacher, loss=SoftTarget(T=4), learn=None, **kwargs):
    return weights(fitted(learn or learner(), KD(teacher, loss, **kwargs)).model)

# ---- The inverse

@pytest.mark.parametrize('scale', [1, 5, 10])
@pytest.mark.parametrize('T', [1, 4, 20])
def test_logarithms_are_as_good_as_logits(scale, T):
    "At any temperature, also for classes of probability 1e-30; in float64, by hand"
    z = scale*torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    found, expected = (probs_to_logits(z.softmax(1)).double()/T).softmax(1), (z.double()/T).softmax(1)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-7)

def test_values_by_hand():
    probs = torch.tensor([[.25, .75, 0.]])
    assert probs_to_logits(probs)[0].tolist() == pytest.approx([math.log(.25), math.log(.75), math.log(2**-126)], rel=1e-6)
    found = probs_to_logits(torch.tensor([[.2, .5, 1., 0.]]), binary=True)[0].tolist()
    assert found == pytest.approx([math.log(.25), 0, 24*math.log(2), math.log(2**-126)], abs=1e-6, rel=1e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precisions(dtype):
    "Zeros and ones stay finite; what float16 can hold is not cut off; float64 stays"
    probs = torch.tensor([[0., 1, 2**-24, .5]], dtype=dtype)
    found, binary = probs_to_logits(probs), probs_to_logits(probs, binary=True)
    assert found.isfinite().all() and binary.isfinite().all() and found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert found[0, 1:].tolist() == pytest.approx([0, -24*math.log(2), -math.log(2)], rel=1e-6)
    assert found[0, 0] == pytest.approx(-24*math.log(2) if dtype == torch.float16 else -126*math.log(2), rel=1e-6)

def test_whole_numbers_and_outputs_of_other_kinds():
    assert probs_to_logits(torch.tensor([[0, 1]]))[0, 1] == 0
    assert probs_to_logits(dict(logits=torch.tensor([[.5, .5]]), loss=0)).tolist() == [[pytest.approx(math.log(.5))]*2]

def test_a_certain_student_has_a_gradient():
    "Its likeliest class has probability 1 and another one 0; nothing is NaN"
    z = torch.tensor([[0., 200, 80], [0., -30, 30]], requires_grad=True)
    SoftTarget(T=4)(probs_to_logits(z.softmax(1)), torch.tensor([[9., 0, 0], [0, 9, 0]])).backward()
    assert z.grad.isfinite().all() and z.grad.abs().sum() > 0

# ---- Every kind of teacher is heard as it would be without its softmax

def stored(folder, dtype, T=1):
    with torch.no_grad(): probs = softmaxed().eval()(torch.stack([x for x, _ in digits()[:100]])).to(dtype)
    np.save(folder/'probs.npy', probs.numpy())
    return StoredTeacher(folder/'probs.npy')

KINDS = dict(module=lambda folder: softmaxed(), frozen=lambda folder: Frozen(softmaxed()), learner=lambda folder: learner(softmaxed()),
    list=lambda folder: [softmaxed()], stored=lambda folder: stored(folder, torch.float32),
    cached=lambda folder: CachedTeacher(softmaxed()), cached_learner=lambda folder: CachedTeacher(learner(softmaxed())),
    on_disk=lambda folder: CachedTeacher(softmaxed(), folder/'kept'))

@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_teachers(kind, tmp_path):
    "Declared by returns=, all train the student that the model without its softmax trains; undeclared, they do not, and are warned of"
    expected, learn = trained(trained_teacher()), learner()
    assert messages(learn, KD(KINDS[kind](tmp_path), SoftTarget(T=4), returns='probabilities'), n_fits=1) == []
    assert furthest(weights(learn.model), expected) < 2e-5
    said = messages(other := learner(), KD(KINDS[kind](tmp_path), SoftTarget(T=4)), n_fits=1)
    assert sum('predictions' in o and 'are probabilities' in o for o in said) == 1 and furthest(weights(other.model), expected) > 1e-2

@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: CachedTeacher(o), lambda o: [o], lambda o: Ensemble([o])])
def test_a_teacher_that_is_wrapped(wrap):
    "Within caches and ensembles the class does what returns= does outside"
    assert furthest(trained(wrap(ProbabilityTeacher(softmaxed()))), trained(trained_teacher())) < 2e-5

def test_in_a_cache_on_disk(tmp_path):
    "With softmax and without have different answers, and are not taken for one another; the second run asks nothing"
    teachers, runs, found = (ProbabilityTeacher(softmaxed()), ProbabilityTeacher(softmaxed()), softmaxed()), [], []
    for teacher in teachers:
        runs.append(CachedTeacher(teacher, tmp_path))
        found.append(trained(runs[-1]))
    assert furthest(found[0], trained(trained_teacher())) < 2e-5 and furthest(found[1], found[0]) == 0 < furthest(found[2], found[0])
    assert [cached.misses for cached in runs] == [100, 0, 100]

def test_float16():
    "As .npy files often are"
    rows = torch.randn(30, 10)
    found = ProbabilityTeacher(StoredTeacher(rows.softmax(1).half().numpy())).outputs((rows,), index=torch.arange(30))[0]
    assert found.dtype == torch.float32 and torch.allclose(found.softmax(1), rows.softmax(1), atol=1e-3)

def turned(model): return nn.Sequential(model, Turn())

class Turn(nn.Module):
    def forward(self, x): return x.flip(1)

@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: [o], CachedTeacher])
def test_a_learner_with_classes_in_another_order(wrap):
    "They are reordered, and the logarithm is taken of the probability that belongs to each"
    of = lambda model, vocab='abcdefghij': named_learner(model, vocab)
    expected = trained(of(trained_teacher()), learn=of(seeded(convnet, 4)))
    teacher = wrap(of(softmaxed(turned(trained_teacher())), 'jihgfedcba'))
    assert furthest(trained(teacher, learn=of(seeded(convnet, 4)), returns='probabilities'), expected) < 2e-5

def test_one_member_of_two(tmp_path):
    "The answer is the mean of both distributions, by hand; all that is said names the one that is not declared"
    first, second, x = trained_teacher().eval(), seeded(convnet, 8).eval(), torch.stack([x for x, _ in digits()[:25]])
    with torch.no_grad():
        found = Ensemble([first, ProbabilityTeacher(softmaxed(second))]).outputs((x,))[0].softmax(1)
        assert torch.allclose(found, (first(x).softmax(1) + second(x).softmax(1))/2, atol=1e-6)
    for teacher in ([first, softmaxed(second)], Ensemble([first, softmaxed(second)]), CachedTeacher(Ensemble([first, softmaxed(second)]))):
        said = [o for o in messages(learner(), KD(teacher, SoftTarget), n_fits=1) if 'are probabilities' in o]
        assert len(said) == 1 and said[0].startswith('the predictions of teacher 1 in the ensemble')
    nested = Ensemble([first, Ensemble([first, softmaxed(second)])])
    assert any(o.startswith('the predictions of teacher 1.1 in') for o in messages(learner(), KD(nested, SoftTarget), n_fits=1))
    assert not any('are probabilities' in o for o in messages(learner(), KD([first, ProbabilityTeacher(softmaxed(second))], SoftTarget)))

def test_an_ensemble_answers_with_logits():
    with pytest.raises(ValueError, match='as in .first, ProbabilityTeacher'): ProbabilityTeacher(CachedTeacher(Ensemble([softmaxed()])))
    assert 'wrap those' in error_of(ValueError, learner(), KD(Ensemble([softmaxed()]), SoftTarget, returns='probabilities'))

# ---- Shapes and labels

def dense(n_classes=3): return nn.Conv2d(1, n_classes, 3, padding=1)

def maps(shape=(8, 8)):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(1, *shape, generator=g), torch.randint(0, 3, shape, generator=g)) for _ in range(20)]

def on(pairs, model, loss_func): return quiet(Learner(loaders(pairs, pairs[:20], 20), model, loss_func))

@pytest.mark.parametrize('loss_func', [nn.CrossEntropyLoss, lambda: CrossEntropyLossFlat(axis=1)])
def test_maps(loss_func):
    "Classes on axis 1, a distribution at each of 64 positions"
    teacher, make = seeded(dense, seed=3), lambda: on(maps(), seeded(dense), loss_func())
    expected = trained(teacher, learn=make())
    ends = nn.Sequential(teacher, nn.Softmax(1))
    assert furthest(trained(ends, learn=make(), returns='probabilities'), expected) < 2e-5
    assert sum('they sum to 1' in o for o in messages(make(), KD(ends, SoftTarget))) == 1

def test_classes_last():
    "As language models have them"
    pairs = [(torch.randn(5, 4), torch.randint(0, 6, (5,))) for _ in range(20)]
    teacher, make = seeded(nn.Linear, 4, 6, seed=3), lambda: on(pairs, seeded(nn.Linear, 4, 6), CrossEntropyLossFlat(axis=-1))
    ends = nn.Sequential(teacher, nn.Softmax(-1))
    assert furthest(trained(ends, learn=make(), returns='probabilities'), trained(teacher, learn=make())) < 2e-5
    assert sum('they sum to 1' in o for o in messages(make(), KD(ends, SoftTarget))) == 1

def of_labels(n=4):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(6, generator=g), (torch.rand(n, generator=g) < .4).float()) for _ in range(40)]

@pytest.mark.parametrize('n', [1, 4])
def test_several_labels(n):
    "A sigmoid for each class, or for a single one: declared, it teaches what its logits teach"
    teacher, make = seeded(nn.Linear, 6, n, seed=3), lambda: on(of_labels(n), seeded(nn.Linear, 6, n), BCEWithLogitsLossFlat())
    ends, expected = nn.Sequential(teacher, nn.Sigmoid()), trained(teacher, BinaryKD(), make())
    assert furthest(trained(ends, BinaryKD(), make(), returns='binary_probabilities'), expected) < 2e-5
    said = [o for o in messages(make(), KD(ends, BinaryKD), n_fits=1) if 'are probabilities' in o]
    assert len(said) == 1 and said[0].endswith("returns='binary_probabilities')")
    if n > 1: assert "binary=True" in error_of(ValueError, make(), KD(ends, BinaryKD, returns='probabilities'))

def test_what_is_no_probability_is_refused():
    "A learner whose softmax is in its loss function returns logits"
    said = error_of(ValueError, learner(), KD(learner(trained_teacher()), SoftTarget, returns='probabilities'))
    assert 'are no probabilities. If they are logits, leave out' in said
    assert error_of(ValueError, learner(), KD(trained_teacher(), SoftTarget, returns='softmax')).endswith("not 'softmax'")
    with pytest.raises(TypeError, match='not str'): ProbabilityTeacher('model')

LOGITS = dict(logits=lambda o: o, log_softmax=lambda o: o.log_softmax(1), normalized=lambda o: o/9, positive=lambda o: o.clamp_min(0))

@pytest.mark.parametrize('kind', LOGITS)
def test_logits_are_not_accused(kind):
    "Log-probabilities are logits"
    class Last(nn.Module):
        def forward(self, x): return LOGITS[kind](x)
    said = messages(learner(), KD(nn.Sequential(trained_teacher(), Last()), SoftTarget(T=4)))
    assert not any('are probabilities' in o for o in said)

def test_values_between_0_and_1_are_not_accused():
    "Regression, or too few numbers to tell"
    pred = torch.linspace(.1, .9, 40).view(10, 4)
    assert last_activation(pred, torch.rand(10, 4)) is None and last_activation(pred, torch.randint(0, 4, (10,))) == 'sigmoid'
    assert last_activation(pred[:2], torch.randint(0, 4, (2,))) is None and last_activation(None) is None
    pairs = [(torch.randn(6), torch.rand(1)) for _ in range(40)]
    learn = on(pairs, nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), L1LossFlat())
    assert not any('probabilities' in o for o in messages(learn, KD(nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), Logits)))

# ---- Students

@pytest.mark.parametrize('teacher', [trained_teacher, lambda: learner(trained_teacher()), lambda: [trained_teacher()]])
def test_a_student_that_ends_in_a_softmax(teacher):
    "A pair of functions is one for each side, and the first distillation loss is that of the logits, by hand"
    body, cb = seeded(convnet, 4), KD(teacher(), SoftTarget(T=5), logits=(probs_to_logits, logits))
    learn, seen = learner(softmaxed(body)), []
    learn.dls.train.shuffle = False
    x = torch.stack([x for x, _ in digits()[:25]])
    expected = soft_target(body(x), trained_teacher().eval()(x)).item()
    assert messages(learn, cb, n_fits=1) == []
    assert learn.recorder.distillation['distillation_loss'][0] == pytest.approx(expected, rel=1e-4)

def test_both_end_in_a_softmax():
    both = KD(softmaxed(), SoftTarget(T=5), logits=probs_to_logits)
    assert messages(learn := learner(softmaxed(seeded(convnet, 4))), both) == [] and math.isfinite(learn.recorder.losses[-1])

@pytest.mark.parametrize('given', [3, (logits,), (logits, logits, logits), [logits, None]])
def test_functions_that_are_no_pair(given):
    with pytest.raises(TypeError, match='logits is a function, or a pair of them'): KD(trained_teacher(), SoftTarget, logits=given)

# ---- NaN that comes of settings

def log_of(output): return output.log()
def overflowing(output): return output*1e38*1e38

@pytest.mark.parametrize('func', [log_of, overflowing, lambda output: output/0., lambda output: output.sqrt()])
@pytest.mark.parametrize('teacher', [softmaxed, lambda: stored_logits()])
def test_logits_that_spoil_the_student(func, teacher):
    "Its own output is finite; said before the first step, with the function's name"
    said = error_of(ValueError, learner(), KD(teacher(), SoftTarget, logits=func))
    assert f"what logits={func.__name__} makes of the student's output is not finite" in said

def stored_logits(): return StoredTeacher(torch.randn(100, 10))

def test_logits_that_spoil_a_later_batch():
    "Finite on the first sample and not later: an error at that batch, not blamed on the loss"
    calls = []
    def at_the_fourth(output): return output*(math.nan if calls.append(1) or len(calls) > 3 else 1) # one sample comes before the batches
    said = error_of(ValueError, learner(), KD(trained_teacher(), SoftTarget, logits=(at_the_fourth, logits)), n_batches=2)
    assert 'what logits=at_the_fourth makes of' in said

def test_logits_that_are_no_tensor():
    said = error_of(TypeError, learner(), KD(trained_teacher(), SoftTarget, logits=(as_dict, logits)))
    assert 'logits=as_dict returns the tensor of predictions, not a dict' in said

def as_dict(output): return dict(logits=output)

def test_a_schedule_with_a_hole():
    "Between the points that are checked beforehand"
    learn = learner(bs=7) # 14 batches
    hole_at = lambda pct: math.nan if abs(pct - 3/14) < 1e-9 else .5
    said = error_of(ValueError, learn, KD(trained_teacher(), SoftTarget, schedule={'weight': hole_at}), n_batches=3)
    assert 'the schedule of weight is nan' in said

def roots(pred, teacher_pred): return (pred - pred.detach()).pow(2).sum().sqrt()
def powers(pred, teacher_pred): return (pred - pred.detach()).abs().pow(.5).mean()

@pytest.mark.parametrize('loss', [roots, powers])
def test_a_gradient_that_is_not_finite(loss):
    "The value is 0, and one step would make every weight NaN"
    without_norms = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) # whose statistics would move before the first step
    said = error_of(ValueError, learner(without_norms), KD(trained_teacher(), loss))
    assert 'its gradient on the student is not finite, though its value is' in said

def test_a_mask_that_leaves_nothing():
    said = messages(learner(), KD(trained_teacher(), SoftTarget, mask=lambda x: torch.zeros(len(x))), n_fits=1)
    assert sum('mask= leaves nothing of the first batch' in o for o in said) == 1

def test_a_student_that_diverges_is_not_blamed_on_settings():
    "Its own prediction is NaN, of which fastai's TerminateOnNaN tells"
    learn = learner()
    with torch.no_grad(): learn.model.head[-1].bias.fill_(math.nan)
    fitted(learn, KD(trained_teacher(), SoftTarget), n_epoch=1)
    assert math.isnan(learn.recorder.distillation['distillation_loss'][0])
