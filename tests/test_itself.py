"Teachers made of the student: who learns from whom, what the mean is a mean of, and what the other view is a view of."
import copy, io, pickle, pytest, torch, torch.nn.functional as F
from fastai.basics import CancelStepException, DataLoader, DataLoaders, ItemTransform, Learner, SGD, TfmdDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.load import SkipItemException
from fastai.text.models.awdlstm import AWD_LSTM
from fastkd.all import *
from fastkd.demo import TensorLoader
from fastkd.itself import _twice
from functools import partial
from helpers import (At, ByHand, OnCPU, convnet, digits, error_of, fitted, furthest, learner, loaders, n_hooks, named_learner, quiet,
    raising, same, seeded, slow, soft_target, trained_teacher, weights)
from learning import learned
from torch import nn
from torch.utils.data import TensorDataset

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

def moved(learn, before): return {name for name, value in weights(learn.model).items() if not torch.equal(value, before[name])}

# ---- Deep layers teach shallow ones

def test_who_learns():
    "Only what lies before the layer that is taught; batch norm's statistics follow the batches everywhere"
    learn = learner(wd=0.)
    before = weights(learn.model)
    fitted(learn, KD(Itself(), FitNet(), 'block1', 'block2', weight=1.))
    params = {name for name, _ in learn.model.named_parameters()}
    assert moved(learn, before) & params == {'block1.0.weight', 'block1.1.weight', 'block1.1.bias'}

def test_heads_by_hand():
    "One step of a student with two heads, by SGD, from copies of model and heads"
    head, learn, seen = DeepSupervision(T=2, alpha=.4), learner(opt_func=partial(SGD, mom=0.), wd=0.), []
    kd = KD([Itself()], head, ['block1', 'block2'], weight=.5) # a list is an ensemble
    note = At('before_batch', lambda learn: seen.append((copy.deepcopy(learn.model), copy.deepcopy(kd.loss), learn.xb[0], learn.yb[0])), 6)
    after = At('after_batch', lambda learn: seen.append((weights(learn.model), [p.clone() for p in kd.loss.parameters()])))
    fitted(learn, [note, after, kd], n_epoch=1, lr=.1)
    (model, loss, x, y), (expected, expected_heads) = seen
    one = model.block1(x)
    two = model.block2(model.pool(one))
    pred, values = model.head(two), []
    for linear, o in zip(loss.losses['deep_supervision'].learned, (one, two)):
        z = linear(o.mean((2, 3)))
        values.append(.6*F.cross_entropy(z, y) + .4*soft_target(z, pred.detach(), 2.))
    (.5*F.cross_entropy(pred, y) + .5*sum(values)/2).backward()
    for name, p in model.named_parameters(): torch.testing.assert_close(p.detach() - .1*p.grad, expected[name], rtol=1e-5, atol=1e-6)
    for p, after in zip(loss.parameters(), expected_heads): torch.testing.assert_close(p - .1*p.grad, after, rtol=1e-5, atol=1e-6)

def test_heads_stay_behind(tmp_path):
    "An exported model has none, and is the student alone"
    learn = named_learner(seeded(convnet, 4), path=tmp_path, cbs=KD(Itself(), DeepSupervision(), ['block1', 'block2']))
    fitted(learn)
    assert len([*learn.knowledge_distillation.loss.parameters()]) == 4
    learn.export('student.pkl')
    exported = torch.load(tmp_path/'student.pkl', weights_only=False)
    assert weights(exported.model).keys() == weights(convnet(4)).keys() and exported.knowledge_distillation.teacher is None
    assert not [*exported.knowledge_distillation.loss.parameters()]

@pytest.mark.parametrize('mix', [MixUp, slow(CutMix)])
def test_heads_of_a_real_teacher(mix):
    "Also with mixed labels; without warnings"
    learn = fitted(learner(), [KD(trained_teacher(), SoftTarget() + DeepSupervision().on('block2')), mix()])
    assert torch.tensor(learn.recorder.distillation['deep_supervision_loss']).isfinite().all()

class Everywhere(nn.Module):
    "Predicts a class for each pixel"
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 10, 1)

    def forward(self, x): return self.head(self.body(x))

def test_heads_need_one_class_per_sample():
    dls = loaders([(x, y.expand(8, 8)) for x, y in digits()[:50]])
    learn = quiet(Learner(dls, seeded(Everywhere), F.cross_entropy))
    assert 'a head predicts one class for each sample' in error_of(ValueError, learn, KD(Itself(), DeepSupervision(), 'body'))

def test_heads_have_no_partners():
    with pytest.raises(ValueError, match="looks at the student's layers only"): KD(Itself(), DeepSupervision(), ['block1'], ['block2'])
    said = error_of(ValueError, learner(), KD(Itself(), DeepSupervision()))
    assert said.endswith("no layers are named: pass activations_student=['…']")
    assert "no layer 'block9'" in error_of(ValueError, learner(), KD(Itself(), FitNet(), 'block1', 'block9'))

def test_a_beginner_is_no_mistake(recwarn):
    "A student that knows nothing yet is not called an untrained teacher"
    for teacher, loss in (Itself(), DeepSupervision().on('block2')), (MeanTeacher(), SoftTarget()), ([MeanTeacher()], SoftTarget()):
        fitted(learner(), KD(teacher, loss, weight=.5), n_epoch=1)
    assert [str(o.message) for o in recwarn if 'teacher' in str(o.message) or 'gradient' in str(o.message)] == []

@pytest.mark.parametrize('loss,layers', [(SoftTarget(), ()), (Logits(), ()), (100*FitNet(), ('block1', 'block1'))])
def test_what_it_says_itself_teaches_it_nothing(loss, layers):
    with pytest.warns(UserWarning) as said: fitted(learner(), KD(Itself(), loss, *layers))
    assert len(said) == 1 and 'take DeepSupervision(), or pairs of layers that differ' in str(said[0].message)

# ---- The mean

def followed(states, decay):
    "The mean of a list of states, name by name, and what is copied"
    mean = {name: value.double() for name, value in states[0].items()}
    for t, state in enumerate(states[1:], 1):
        a = min(1 - 1/(t + 1), decay)
        mean = {name: state[name].double() if 'num_batches' in name else a*o + (1 - a)*state[name].double() for name, o in mean.items()}
    return mean

def steps_of(kd, *cbs, n_epoch=2, **kwargs):
    "A learner, and the student's states: at the start, and after each step"
    learn = learner(**kwargs)
    states = [weights(learn.model)]
    def note(learn): states.append(weights(learn.model))
    fitted(learn, [kd, *cbs, At('after_step', note, 99, 0)], n_epoch=n_epoch)
    return learn, states

@pytest.mark.parametrize('decay', [.999, .6, 0.])
def test_mean_of_states(decay):
    "Weights and statistics of all steps; in the beginning their plain mean"
    teacher = MeanTeacher(decay)
    learn, states = steps_of(KD(teacher, SoftTarget(T=2)))
    assert len(states) == 9 and teacher.n_steps == 8
    assert furthest(weights(teacher.model), followed(states, decay)) < 1e-5
    if decay == 0: assert furthest(weights(teacher.model), weights(learn.model)) < 1e-6

def test_what_the_mean_says():
    "The second batch is compared with the mean of the start and the first step, in eval mode"
    teacher, learn, seen = MeanTeacher(), learner(seeded(convnet, 4, .5)), []
    kd = KD(teacher, SoftTarget(T=2))
    def note(learn): seen.append((weights(learn.model), learn.xb[0], learn.pred.detach()))
    fitted(learn, [kd, At('after_pred', note, nth=0)], n_epoch=1)
    start, first, mean = weights(seeded(convnet, 4, .5)), seen[0][0] | {}, convnet(4, .5).eval()
    first |= {name: value for name, value in seen[1][0].items() if 'running' not in name} # parameters after the first step
    mean.load_state_dict({name: (start[name] + first[name])/2 for name in start})
    with torch.no_grad(): expected = soft_target(seen[1][2], mean(seen[1][1]), 2.)
    assert learn.recorder.distillation['distillation_loss'][1] == pytest.approx(expected.item(), rel=1e-4)

def test_accumulated_gradients():
    "Two batches make a step"
    teacher = MeanTeacher()
    _, states = steps_of(KD(teacher, SoftTarget(T=2)), GradientAccumulation(50))
    assert len(states) == 5 and teacher.n_steps == 4 and furthest(weights(teacher.model), followed(states, .999)) < 1e-5

def test_a_cancelled_step_is_no_step():
    "By another callback, or by a scaler whose gradients overflow"
    for cancel in At('before_step', raising(CancelStepException), nth=3), OnCPU(init_scale=2.**40, growth_interval=1000):
        teacher, seen = MeanTeacher(), []
        learn = learner()
        def note(learn): seen.append(weights(learn.model)['head.3.weight'])
        fitted(learn, [KD(teacher, SoftTarget(T=2)), cancel, At('after_step', note, 99, 0)])
        n_moved = sum(not torch.equal(a, b) for a, b in zip([weights(seeded(convnet, 4))['head.3.weight'], *seen], seen))
        assert teacher.n_steps == n_moved < len(seen) == 8

def test_several_fits_and_another_student():
    "The same student goes on, another one begins anew"
    teacher, learn = MeanTeacher(), learner()
    kd = KD(teacher, SoftTarget(T=2))
    fitted(learn, kd, n_epoch=1)
    fitted(learn, kd, n_epoch=1)
    assert teacher.n_steps == 8
    other = learner(seeded(convnet, 4, seed=5))
    fitted(other, kd, n_epoch=1)
    assert teacher.n_steps == 4
    learn.model = teacher.model # the mean as the next student has a mean of its own
    fitted(learn, kd, n_epoch=1)
    assert teacher.n_steps == 4 and teacher.model is not learn.model

def test_weights_that_came_late():
    "Before its first step, the mean is the student as the fit finds it"
    def late(): return seeded(convnet, 4, seed=7)
    teacher, learn, again = MeanTeacher(), learner(), MeanTeacher()
    kd = KD(teacher, SoftTarget(T=2))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[kd, At('before_step', raising(KeyboardInterrupt))])
    learn.model.load_state_dict(late().state_dict())
    learn.opt.zero_grad()
    fitted(learn, kd, n_epoch=1)
    fitted(learner(late()), KD(again, SoftTarget(T=2)), n_epoch=1)
    assert same(weights(again.model), weights(teacher.model))

def test_no_hooks_and_no_change(tmp_path):
    "The mean has no hooks of the student's captures, and the student is trained without being copied into anything that is saved"
    teacher = MeanTeacher()
    kd = KD(teacher, SoftTarget() + FitNet().on('block1', 'block1'))
    learn = fitted(named_learner(seeded(convnet, 4), path=tmp_path, cbs=kd))
    assert n_hooks(teacher.model) == n_hooks(learn.model) == 0
    copied = pickle.loads(pickle.dumps(copy.deepcopy(learn)))
    assert copied.knowledge_distillation.teacher is None and kd.teacher is teacher
    learn.export('student.pkl')
    assert torch.load(tmp_path/'student.pkl', weights_only=False).knowledge_distillation.teacher is None

def alone(teacher): return teacher
def in_a_list(teacher): return [teacher, trained_teacher()]
def in_an_ensemble(teacher): return Ensemble([trained_teacher(), teacher])

@pytest.mark.parametrize('around,checkpoint', [(alone, False), (alone, True), slow(in_a_list, True), slow(in_an_ensemble, False)])
def test_resume(around, checkpoint, tmp_path):
    "Two fits in one place, and two fits in two places, are the same"
    def start(seed=0):
        teacher = MeanTeacher(.8)
        return teacher, learner(seeded(convnet, 4, seed=seed), path=tmp_path, cbs=KD(around(teacher), SoftTarget(T=2)))
    teacher, whole = start()
    for seed in 1, 2: fitted(whole, n_epoch=1, seed=seed)
    _, first = start()
    fitted(first, n_epoch=1, seed=1)
    if checkpoint: first.save_checkpoint('run')
    else:
        first.save('run')
        file = io.BytesIO()
        torch.save(first.knowledge_distillation.state_dict(), file)
        file.seek(0)
    fitted(first, n_epoch=1, seed=7) # what was saved is a copy
    again, second = start(seed=9)
    if checkpoint: second.load_checkpoint('run')
    else:
        second.load('run')
        second.knowledge_distillation.load_state_dict(torch.load(file, weights_only=True))
    fitted(second, n_epoch=1, seed=2)
    assert same(weights(second.model), weights(whole.model)) and same(weights(again.model), weights(teacher.model))
    assert again.n_steps == teacher.n_steps == 8
    assert same(learned(second.knowledge_distillation), learned(whole.knowledge_distillation))

def test_a_mean_of_another_student():
    kd = KD(MeanTeacher(), SoftTarget())
    fitted(learner(), kd, n_epoch=1)
    other = KD(MeanTeacher(), SoftTarget())
    other.load_state_dict(kd.state_dict())
    assert 'what was saved was learned by' in error_of(ValueError, learner(seeded(convnet, 6)), other)

@pytest.mark.parametrize('n_before', [0, 1])
def test_lr_find_leaves_it(n_before):
    "Before and between fits"
    def run(*finds):
        teacher, learn = MeanTeacher(), learner()
        kd = KD(teacher, SoftTarget(T=2))
        learn.add_cb(kd)
        for i in range(n_before + 1):
            if i == n_before and finds:
                before = weights(learn.model), teacher.model and weights(teacher.model), teacher.n_steps
                with learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
                assert teacher.n_steps == before[2] and (not before[1] or same(weights(teacher.model), before[1]))
                learn.opt = None
            if i == n_before: learn.opt = None
            fitted(learn, n_epoch=1)
        return weights(teacher.model), learned(kd)
    for found, expected in zip(run(True), run()): assert same(found, expected)

@pytest.mark.parametrize('decay', [1, -1, '.9', None])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match='decay is a number in'): MeanTeacher(decay)
    with pytest.raises(TypeError, match=r'MeanTeacher\(\) takes no model$'): MeanTeacher(convnet(4))

def test_a_mean_is_not_cached():
    for teacher in MeanTeacher(), Itself(), Ensemble([MeanTeacher()]):
        with pytest.raises(TypeError, match='leave out the cache'): CachedTeacher(teacher)

class Masked(nn.Module):
    "A layer with a mask of minus infinity, and a counter"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer('mask', torch.full((2,), -torch.inf))
        self.register_buffer('count', torch.tensor(0))

def test_other_buffers_are_copied():
    model, teacher = Masked(), MeanTeacher()
    teacher.begin(model)
    model.count += 3
    for _ in range(2): teacher.stepped(model)
    assert torch.equal(teacher.model.mask, model.mask) and teacher.model.count == 3

def test_mean_of_a_model_that_keeps_what_it_computed():
    "AWD-LSTM: its dropped weights have a graph"
    model, teacher = AWD_LSTM(10, 8, 6, 1), MeanTeacher()
    model(torch.randint(10, (2, 5)))
    teacher.begin(model)
    assert same(weights(teacher.model), weights(model)) and teacher.model(torch.randint(10, (2, 5))).shape == (2, 5, 8)

# ---- Two views

def wobbly(batch, size=.3):
    x, y = batch
    return x + size*torch.randn_like(x), y

def plain_loader(n, bs, kind=DataLoader, **kwargs):
    x, y = torch.stack([x for x, _ in digits()[:n]]), torch.stack([y for _, y in digits()[:n]])
    return kind(TensorDataset(x, y), bs=bs, num_workers=0, **kwargs)

@pytest.mark.parametrize('kind', [DataLoader, TfmdDL, TensorLoader])
@pytest.mark.parametrize('n,bs,drop_last,shuffle', [(20, 8, False, True), (21, 8, True, True), (21, 8, False, False), (3, 8, False, True)])
def test_pairs(kind, n, bs, drop_last, shuffle):
    "Two draws of one sample, each sample once per epoch, also in the last batch; as many rows as before, and positions that fit"
    after = [ItemTransform(wobbly)] if kind is TfmdDL else wobbly
    dls = DataLoaders(plain_loader(n, bs, kind, drop_last=drop_last, shuffle=shuffle, after_batch=after), plain_loader(9, 4))
    twice, seen, images = two_views(dls), [], torch.stack([x for x, _ in digits()])
    assert twice.valid is dls.valid and type(dls.train) is kind and len(dls.train) == (n//bs if drop_last else -(-n//bs))
    batches = list(twice.train)
    for i, (x, y) in enumerate(batches):
        index = torch.tensor(list(twice.train._DataLoader__idxs[i*bs:(i + 1)*bs]))
        assert torch.equal(index[::2], index[1::2]) and len(index) == len(x)
        assert (x - images[index]).abs().mean() < .4 and not torch.equal(x[::2], x[1::2])
        seen += index[::2].tolist()
    assert len(batches) == len(twice.train) and [len(x) for x, _ in batches[:-1]] == [bs]*(len(batches) - 1)
    assert len({*seen}) == len(seen) == (2*n//bs*bs//2 if drop_last else n) and (seen == sorted(seen)) != shuffle

def test_items_are_drawn_anew():
    "What is random in the dataset itself differs, too"
    class Random(list):
        def __getitem__(self, i): return super().__getitem__(i)[0] + torch.rand(1), super().__getitem__(i)[1]
    dls = two_views(loaders(Random(digits()[:20]), digits()[:20], bs=8))
    x, y = dls.one_batch()
    assert torch.equal(y[::2], y[1::2]) and not torch.isclose(x[::2], x[1::2]).all()

def viewed(kd, n=50, bs=10, **kwargs):
    dls = two_views(loaders(digits()[:n], bs=bs))
    learn = learner(**kwargs)
    learn.dls = dls
    return learn

def test_other_view_by_hand():
    "One epoch with predictions and activations exchanged by hand"
    def exchanged(o): return torch.stack([o[1::2], o[::2]], 1).flatten(0, 1).detach()
    class Swapped(ByHand):
        def after_loss(self):
            self.context.__exit__(None, None, None)
            distance = (self.found['block2'] - exchanged(self.found['block2'])).pow(2).mean()
            loss = soft_target(self.pred, exchanged(self.pred), 2.) + 3*distance
            self.learn.loss_grad = .5*self.loss_grad + .5*loss
            self.learn.loss = self.loss_grad.detach().clone()
    model = seeded(convnet, 4, .5)
    found, expected = (viewed(None, model=copy.deepcopy(model)) for _ in range(2))
    fitted(found, KD(OtherView(), SoftTarget(T=2) + 3*FitNet().on('block2', 'block2')), n_epoch=2)
    fitted(expected, Swapped(nn.Identity(), None, .5, ['block2']), n_epoch=2)
    assert furthest(weights(found.model), weights(expected.model)) < 1e-5

def test_views_that_are_the_same(recwarn):
    "Are warned of, once, after an epoch, and those that differ are not"
    learn, n = viewed(None), []
    fitted(learn, [KD(OtherView(), SoftTarget() + 0*Logits()), At('before_validate', lambda learn: n.append(len(recwarn)), nth=0)])
    assert n == [1, 1] and str(recwarn[0].message) == ('SoftTarget(T=5) was 0 in every batch of an epoch, so it taught nothing. '
        'Both views of each sample are the same: augment the training set')
    fitted(viewed(None, model=seeded(convnet, 4, .5)), KD(OtherView(), SoftTarget()))
    fitted(viewed(None), KD(OtherView(), SoftTarget(), weight=0))
    assert len(recwarn) == 1

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixing_is_refused(mix):
    for teacher in OtherView(), [trained_teacher(), OtherView()]:
        learn = viewed(None)
        learn.add_cb(mix())
        assert f'{mix.__name__} blends a view' in error_of(ValueError, learn, KD(teacher, SoftTarget()))

def test_no_pairs():
    "Of usual loaders, of odd batches, and of loaders without positions"
    for bs in 25, 10:
        learn = learner(bs=bs)
        with pytest.raises(ValueError, match='two_views'): fitted(learn, KD(OtherView(), SoftTarget()))
        assert same(dict(learn.model.named_parameters()), dict(seeded(convnet, 4).named_parameters()))
    with pytest.raises(ValueError, match='25 is not even'): two_views(learner(bs=25).dls)
    others = torch.utils.data.DataLoader(digits()[:20], 10), DataLoader(iter(digits()[:20]), bs=10), plain_loader(20, 10, get_idxs=list)
    for train in others:
        with pytest.raises(TypeError, match='by its positions'): two_views(DataLoaders(train, train))
    with pytest.raises(TypeError, match='the loaders of training and validation, not a DataLoader'): two_views(plain_loader(20, 10))

class Broken(torch.utils.data.Dataset):
    "The first ten digits, some of which cannot be read"
    def __init__(self, fails): self.fails = fails
    def __len__(self): return 10
    def __getitem__(self, i):
        if self.fails(i): raise SkipItemException
        return digits()[i]

def test_a_sample_that_is_skipped():
    "Both its views are missing, and the others stay pairs; where one of them is missing, strangers would stand side by side"
    seen, once = [], iter([True])
    def run(fails):
        dl = DataLoader(Broken(fails), bs=6, shuffle=True, num_workers=0)
        learn, kd = learner(), KD(OtherView(), SoftTarget())
        learn.dls = two_views(DataLoaders(dl, plain_loader(10, 20)))
        def note(learn):
            if learn.training: seen.append((kd._index(), learn.xb[0]))
        fitted(learn, [kd, At('after_loss', note, nth=0)])
    run(lambda i: i == 3)
    assert len(seen) == 6 and {i for index, _ in seen for i in index.tolist()} == {*range(10)} - {3}
    for index, x in seen: assert torch.equal(index[::2], index[1::2]) and torch.equal(x, torch.stack([digits()[i][0] for i in index]))
    with pytest.raises(ValueError, match='needs each sample twice, side by side'): run(lambda i: i == 3 and next(once, False))

def test_loaders_travel(tmp_path):
    "Twice is no more than once; what is set on a loader stays; a learner is exported and copied"
    learn = named_learner(seeded(convnet, 4), bs=10, path=tmp_path)
    dls = learn.dls
    dls.train.note = 'mine'
    twice = two_views(dls)
    assert two_views(twice) is twice and twice.train.note == 'mine' and type(twice.train) is _twice(TfmdDL)
    learn.dls = twice
    fitted(learn, KD(OtherView(), SoftTarget()), n_epoch=1)
    assert len(pickle.loads(pickle.dumps(twice)).train) == len(twice.train) == 20
    learn.export('student.pkl')
    assert len(torch.load(tmp_path/'student.pkl', weights_only=False).dls.train) == 0
