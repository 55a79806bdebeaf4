"A curriculum: who is ranked how, which samples an epoch draws, and that nothing of it stays."
import pickle, pytest, torch, torch.nn.functional as F
from fastai.basics import Categorize, DataLoader, DataLoaders, set_seed
from fastai.callback.data import PartialDL
from fastai.callback.schedule import SchedLin, sched_cos
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import Datasets
from fastai.data.load import SkipItemException
from fastai.data.transforms import IndexSplitter
from fastai.text.data import SortedDL
from fastai.vision.augment import RandTransform
from fastkd.all import (CachedTeacher, Ensemble, Itself, KnowledgeDistillationCallback, MeanTeacher, OtherView, SoftTarget, StoredTeacher,
    cos, lin, two_views)
from fastkd.cache import N_CONTROL
from fastkd.curriculum import Curriculum, sure_of_any, sure_of_label
from fastkd.schedules import Stages, multiplies
from helpers import (At, convnet, digits, fitted, image, learner, name, named_learner, raising, same, seeded, started, trained_teacher,
    weights)

def easiest(teacher, n=100):
    "By hand: positions by the probability of the label"
    x, y = (torch.stack([torch.as_tensor(o[i]) for o in digits()[:n]]) for i in (0, 1))
    with torch.no_grad(): return teacher.eval()(x).softmax(1)[range(n), y].argsort(descending=True).tolist()

class Drawn:
    "What each epoch drew, and what it delivered"
    def __init__(self):
        self.positions, self.n_batches, self.images = [], [], []
        self.cbs = [At('after_train', self.keep, nth=0), At('before_batch', self.see, nth=0)]

    def see(self, learn):
        if learn.training: self.images.append(learn.xb[0].clone())

    def keep(self, learn):
        self.positions.append(list(learn.dls.train._DataLoader__idxs))
        self.n_batches.append(learn.n_iter)

def test_epochs_draw_the_easiest():
    "A fixed number of samples, from a growing share; the whole set in the order in which it would have come"
    teacher, drawn, learn = trained_teacher(), Drawn(), learner()
    order = easiest(teacher)
    learn.fit(4, cbs=[Curriculum(teacher, start=.5), *drawn.cbs])
    assert [len(o) for o in drawn.positions] == [100]*4 and drawn.n_batches == [4]*4
    for positions, n in zip(drawn.positions, (50, 75, 100, 100)): assert {*positions} == {*order[:n]}
    assert max(map(drawn.positions[0].count, range(100))) == 2 and [drawn.positions[1].count(i) for i in range(100)].count(2) <= 25
    assert torch.equal(drawn.images[0], torch.stack([digits()[i][0] for i in drawn.positions[0][:25]]))

def test_pairs_stay_pairs():
    "Two views: as many batches as ever, of easy samples twice in a row"
    teacher, drawn, learn = trained_teacher(), Drawn(), learner(bs=20)
    learn.dls = two_views(learn.dls)
    kd = KnowledgeDistillationCallback(OtherView(), SoftTarget())
    see = At('after_fit', lambda learn: drawn.n_batches.append(learn.pct_train))
    learn.fit(2, cbs=[Curriculum(teacher, start=.5), kd, *drawn.cbs, see])
    assert drawn.n_batches == [10, 10, pytest.approx(1)] and [len(o) for o in drawn.positions] == [200]*2
    assert all(o[::2] == o[1::2] for o in drawn.positions) and {*drawn.positions[0]} == {*easiest(teacher)[:50]}

def test_partial_epochs():
    "Of loaders that draw a part of the samples, as many batches as ever"
    learn, drawn = named_learner(seeded(convnet, 4)), Drawn()
    items = list(range(100))
    dsets = Datasets(items, [[image], [name, Categorize(list('abcdefghij'), sort=False)]], splits=[items, items[:25]])
    learn.dls = dsets.dataloaders(dl_type=PartialDL, dl_kwargs=[dict(partial_n=16), {}], bs=8, num_workers=0, device='cpu')
    learn.fit(3, cbs=[Curriculum(trained_teacher(), start=.1), *drawn.cbs])
    assert drawn.n_batches == [2]*3 and {*drawn.positions[0]} <= {*easiest(trained_teacher())[:10]}

def test_the_whole_set_is_plain_training():
    "With `start=1` not a bit is different, though the teacher ranked"
    plain, with_one = (fitted(learner(), cbs) for cbs in ([], [Curriculum(trained_teacher(), start=1.)]))
    assert same(weights(plain.model), weights(with_one.model))

def test_steps_and_schedules_are_those_of_a_fit_without():
    seen = {}
    for name, cbs in dict(plain=[], curriculum=[Curriculum(trained_teacher(), start=.3, schedule=cos)]).items():
        learn, pcts = learner(), []
        learn.fit_one_cycle(3, 1e-2, cbs=[*cbs, At('before_batch', lambda learn: pcts.append((learn.training, learn.pct_train)), nth=0)])
        seen[name] = learn.recorder.lrs, pcts
    assert seen['plain'] == seen['curriculum']

@pytest.mark.parametrize('schedule,expected', [(lin, [.2, .4, .6, .8]), (SchedLin(.1, .9), [.1, .3, .5, .7]),
    (Stages(SchedLin(.2, 1), 2), [.2, .2, 1, 1]), (Stages(lin, 2), [.2, .2, 1, 1])])
def test_shares(schedule, expected):
    curriculum = Curriculum(None, start=.2 if multiplies(schedule) else None, schedule=schedule)
    assert [curriculum.share(epoch/4) for epoch in range(4)] == pytest.approx(expected)

def test_at_least_a_batch():
    drawn = Drawn()
    learner().fit(1, cbs=[Curriculum(trained_teacher(), start=.01), *drawn.cbs])
    assert len({*drawn.positions[0]}) == 25

def test_by_entropy_and_by_hand():
    teacher, curriculum = trained_teacher().eval(), Curriculum(trained_teacher(), by=sure_of_any)
    learner().fit(1, cbs=curriculum)
    x = torch.stack([o[0] for o in digits()[:100]])
    with torch.no_grad(): p = teacher(x).softmax(1)
    assert curriculum.ranking.tolist() == (-(p*p.log()).sum(1)).argsort().tolist()
    late = Curriculum(teacher, by=lambda pred, target, axis: target.float())
    learner().fit(1, cbs=late)
    assert [digits()[i][1].item() for i in late.ranking] == sorted((o[1].item() for o in digits()[:100]), reverse=True)

def test_easiness_of_positions():
    "Dense labels: the mean over positions whose label is a class"
    z, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    y[0, 0], y[1, :, 1] = -100, 255
    log_probs = z.log_softmax(1)
    of = lambda i: [log_probs[i, y[i, a, b], a, b] for a in range(4) for b in range(4) if 0 <= y[i, a, b] < 3]
    by_hand = [torch.stack(of(i)).mean() for i in (0, 1)]
    torch.testing.assert_close(sure_of_label(z, y), torch.stack(by_hand))
    torch.testing.assert_close(sure_of_label(z.movedim(1, -1), y, axis=-1), torch.stack(by_hand))
    torch.testing.assert_close(sure_of_any(z), (log_probs.exp()*log_probs).sum(1).mean((1, 2)))
    with pytest.raises(ValueError, match='by=sure_of_any'): sure_of_label(z, torch.randn(2, 3))

@pytest.mark.parametrize('by', [sure_of_label, lambda pred, target, axis: -F.cross_entropy(pred, target, reduction='none')])
def test_fastais_own_loaders(by):
    "Images and categories that are subclasses of tensors, as a DataBlock makes them"
    block = DataBlock((TransformBlock, CategoryBlock(vocab=list('abcdefghij'), sort=False)), get_x=image, get_y=name,
        splitter=IndexSplitter(range(25)))
    learn, curriculum = named_learner(seeded(convnet, 4)), Curriculum(trained_teacher(), by=by)
    learn.dls = block.dataloaders(range(100), bs=25, num_workers=0, device='cpu')
    learn.fit(1, cbs=[curriculum, KnowledgeDistillationCallback(trained_teacher(), SoftTarget())])
    assert [25 + i for i in curriculum.ranking.tolist()] == [i for i in easiest(trained_teacher()) if i >= 25]

def test_labels_of_tables():
    "A column of classes"
    z, y = torch.randn(5, 3), torch.randint(3, (5, 1))
    torch.testing.assert_close(sure_of_label(z, y.char()), z.log_softmax(1).gather(1, y)[:, 0])

@pytest.mark.parametrize('make', [lambda o: o, CachedTeacher, lambda o: [o, o], lambda o: Ensemble([o], weights='confidence'),
    lambda o: learner(o), lambda o: StoredTeacher(o.eval()(torch.stack([x for x, y in digits()[:100]])).detach())])
def test_any_teacher(make):
    curriculum = Curriculum(make(trained_teacher()))
    learner().fit(1, cbs=curriculum)
    assert curriculum.ranking.tolist() == easiest(trained_teacher())

def test_the_cache_is_filled_once():
    cached, passes = CachedTeacher(trained_teacher()), []
    cached.teacher.module.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    learner().fit(3, cbs=[Curriculum(cached), KnowledgeDistillationCallback(cached, SoftTarget())])
    assert sum(size for size in passes if size not in (1, N_CONTROL)) == 100 # beside the probe and control samples

def test_positions_are_right():
    "What looks answers up by positions finds those of the samples that came"
    preds = trained_teacher().eval()(torch.stack([x for x, y in digits()[:100]])).detach()
    runs = [fitted(learner(), [Curriculum(trained_teacher()), KnowledgeDistillationCallback(o, SoftTarget())])
        for o in (trained_teacher(), StoredTeacher(preds))]
    torch.testing.assert_close(*(torch.cat([p.flatten() for p in learn.model.parameters()]) for learn in runs), atol=1e-4, rtol=1e-4)

# ---- Nothing stays

@pytest.mark.parametrize('event', ['before_train', 'before_batch', 'after_backward', 'before_validate'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_after_an_interrupt(event, exc):
    learn = learner()
    with pytest.raises(exc): learn.fit(2, cbs=[Curriculum(trained_teacher()), At(event, raising(exc), order=200)])
    assert 'get_idxs' not in vars(learn.dls.train)
    learn.dls.train.one_batch()
    assert sorted(learn.dls.train._DataLoader__idxs) == [*range(100)]

def test_get_idxs_of_the_user_comes_back():
    order = [*range(50), *range(50)]
    learn, drawn = learner(), Drawn()
    learn.dls.train.get_idxs = own = lambda: order
    learn.fit(1, cbs=[Curriculum(trained_teacher()), *drawn.cbs])
    easiest_30 = easiest(trained_teacher())[:30]
    easy = [i for i in order if i in easiest_30]
    assert vars(learn.dls.train)['get_idxs'] is own and drawn.positions[0] == (easy*100)[:100]

def test_no_easy_sample_in_reach():
    learn = learner()
    hard = easiest(trained_teacher())[50:]
    learn.dls.train.get_idxs = lambda: hard
    with pytest.raises(ValueError, match='none of the easy samples'): learn.fit(1, cbs=Curriculum(trained_teacher()))

def test_lr_find_leaves_nothing():
    learn = learner(cbs=Curriculum(trained_teacher()))
    before, positions = weights(learn.model), [*learn.dls.train.get_idxs()]
    learn.lr_find(num_it=6, show_plot=False)
    assert same(before, weights(learn.model)) and 'get_idxs' not in vars(learn.dls.train) and len(positions) == 100

def test_inference_inside_a_fit():
    "Predictions on the training set in the middle of a fit are in the order of the dataset"
    learn, seen = learner(), []
    def look(learn): seen.append(learn.get_preds(ds_idx=0)[1].tolist())
    learn.fit(2, cbs=[Curriculum(trained_teacher()), At('before_train', look, order=200, nth=0), At('after_train', look, nth=0)])
    assert all(sorted(o) == sorted(y.item() for _, y in digits()[:100]) for o in seen)

def test_export_leaves_the_teacher_behind(tmp_path):
    learn = learner(cbs=Curriculum(trained_teacher()), path=tmp_path)
    learn.fit(1)
    again = pickle.loads(pickle.dumps(learn.curriculum))
    assert again.teacher is None and again.ranking is None and again.start == .3
    learn.curriculum.teacher = None
    learn.validate()
    with pytest.raises(RuntimeError, match='learn.curriculum.teacher = teacher'): learn.fit(1)

class Noise(RandTransform):
    "Augmentation that hides the image"
    def encodes(self, x: torch.Tensor): return x + 100*torch.randn_like(x)

def test_random_transforms_are_off_while_ranking():
    items = list(range(100))
    dsets = Datasets(items, [[lambda i: digits()[i][0], Noise(p=1.)], [lambda i: digits()[i][1]]], splits=[items, items[:25]])
    dls = dsets.dataloaders(bs=25, num_workers=0, device='cpu')
    learn = learner()
    learn.dls, curriculum, drawn = dls, Curriculum(trained_teacher()), Drawn()
    learn.fit(1, cbs=[curriculum, *drawn.cbs])
    assert curriculum.ranking.tolist() == easiest(trained_teacher())
    assert dls.train_ds.split_idx == 0 and drawn.images[0].std() > 10 # training is augmented as ever

def test_random_numbers_are_the_students():
    set_seed(3)
    learn, states = started(learner()), []
    learn.fit(1, cbs=[At('before_train', lambda learn: states.append(torch.get_rng_state()), order=o) for o in (99, 101)]
        + [Curriculum(trained_teacher())])
    assert torch.equal(*states)

# ---- Errors before training

@pytest.mark.parametrize('kwargs', [dict(start=0.), dict(start=1.5), dict(schedule=SchedLin(.3, 1.2)), dict(schedule=SchedLin(0, 1))])
def test_shares_out_of_range(kwargs):
    with pytest.raises(ValueError, match='above 0 and at most 1'): Curriculum(None, **kwargs)

def test_errors():
    with pytest.raises(TypeError, match='schedule is a `Schedule`'): Curriculum(None, schedule='lin')
    with pytest.raises(TypeError, match='the teacher comes first'): learner().fit(1, cbs=Curriculum('resnet'))
    by = lambda pred, target, axis: pred
    with pytest.raises(ValueError, match='returns a number for each sample'): learner().fit(1, cbs=Curriculum(trained_teacher(), by=by))
    broken = trained_teacher()
    broken.head[-1].bias.data[0] = float('nan')
    with pytest.raises(ValueError, match='gives no number to sample 0'): learner().fit(1, cbs=Curriculum(broken))

def test_errors_of_its_own():
    "In its own words, where it is written down"
    with pytest.raises(TypeError, match='schedule is a `Schedule` or .* Write `SchedCos.* for progress from 0 to 1'):
        Curriculum(None, schedule=sched_cos)
    with pytest.raises(TypeError, match=r'not SoftTarget: Curriculum\(teacher\)'): Curriculum(SoftTarget)
    with pytest.raises(ValueError, match=r'SchedLin\(0.2, 1\) is the share itself .* leave out start=0.9'):
        Curriculum(None, start=.9, schedule=SchedLin(.2, 1))
    assert [str(o) for o in (Curriculum(None), Curriculum(None, schedule=SchedLin(.2, 1)))] == [
        'Curriculum(start=0.3, Schedule(sched_lin, 0→0.5 of training, 0→1))', 'Curriculum(SchedLin(0.2, 1))']
    learn = learner(cbs=Curriculum(trained_teacher()))
    with pytest.raises(ValueError, match='two curricula in one fit'): learn.fit(1, cbs=Curriculum(trained_teacher()))

@pytest.mark.parametrize('teacher', [MeanTeacher(), Itself(), OtherView(), [MeanTeacher(), Itself()]])
def test_who_knows_nothing_ranks_nothing(teacher):
    with pytest.raises(ValueError, match='knows nothing before training'): learner().fit(1, cbs=Curriculum(teacher))

def test_an_untrained_teacher(recwarn):
    learner().fit(1, cbs=Curriculum(trained_teacher()))
    assert not [o for o in recwarn if 'the teacher is right' in str(o.message)]
    with pytest.warns(UserWarning, match='guessing would give 10%'): learner().fit(1, cbs=Curriculum(seeded(convnet, 4, seed=2)))

def test_loaders_without_positions():
    batches = DataLoader(iter(digits()[:50]), bs=25, n=50)
    learn = learner()
    learn.dls = DataLoaders(batches, learn.dls.valid)
    before = weights(learn.model)
    with pytest.raises(ValueError, match='which these loaders do not supply'): learn.fit(1, cbs=Curriculum(trained_teacher()))
    assert same(before, weights(learn.model))

class Broken:
    "Digits, some of which cannot be read"
    def __init__(self, bad): self.bad = bad
    def __len__(self): return 100
    def __getitem__(self, i):
        if i in self.bad: raise SkipItemException
        return digits()[i]

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('bad', [(0,), (3, 4, 60), (99,), range(0, 100, 2)])
def test_samples_that_are_skipped(bad, num_workers):
    "They have no rank, and those after them keep theirs"
    teacher, learn, drawn = trained_teacher(), learner(), Drawn()
    learn.dls = DataLoaders(DataLoader(Broken(bad), bs=25, shuffle=True, num_workers=num_workers), learn.dls.valid)
    curriculum = Curriculum(teacher, start=.3)
    learn.fit(1, cbs=[curriculum, *drawn.cbs])
    order = [i for i in easiest(teacher) if i not in {*bad}]
    assert curriculum.ranking.tolist() == order and {*drawn.positions[0]} == {*order[:30]}

def test_a_number_that_is_missing_is_that_of_the_sample():
    learn = learner()
    learn.dls = DataLoaders(DataLoader(Broken((3, 4)), bs=25, num_workers=0), learn.dls.valid)
    def by(teacher_pred, target, axis): return torch.full((len(target),), 1.).masked_fill(target == digits()[7][1], torch.nan)
    nan = next(i for i in range(100) if i not in (3, 4) and digits()[i][1] == digits()[7][1])
    with pytest.raises(ValueError, match=f'gives no number to sample {nan} of'): learn.fit(1, cbs=Curriculum(trained_teacher(), by=by))

@pytest.mark.parametrize('shuffle', [True, False])
def test_positions_that_come_one_by_one(shuffle):
    "fastai's loader of texts draws from an iterator, and each epoch what is easiest"
    learn, drawn, teacher = learner(), Drawn(), trained_teacher()
    learn.dls = DataLoaders(SortedDL(digits()[:100], bs=25, shuffle=shuffle, num_workers=0, res=[*range(100)]), learn.dls.valid)
    learn.fit(2, cbs=[Curriculum(teacher, start=.5), *drawn.cbs])
    assert {*drawn.positions[0]} == {*easiest(teacher)[:50]} and len(drawn.positions[0]) == 100
