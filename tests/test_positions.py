"Which samples a batch is made of: as they say it themselves, for whatever a loader does to them."
import copy, numpy as np, pandas as pd, pickle, pytest, random, torch, torch.nn.functional as F
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.training import GradientAccumulation
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader, SkipItemException
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.text.data import LMDataLoader, SortedDL, TensorText, pad_input
from fastkd.all import *
from fastkd.positions import Positions, no_positions, untraced, with_positions
from fastkd.unlabelled import Unlabelled
from functools import partial
from helpers import At, error_of, quiet, same, seed_cpu, weights
from torch import nn

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is')

BAD = 5, 17, 18

class Items:
    "Samples that begin with their number; some cannot be read"
    def __init__(self, bad=BAD, n=40): self.bad, self.n = bad, n
    def __len__(self): return self.n
    def __getitem__(self, i):
        if i in self.bad: raise SkipItemException()
        return torch.tensor([float(i), i % 7, 1., -i]), torch.tensor(i % 3)

class Texts:
    "Sentences that begin with their number, of several lengths"
    def __init__(self, bad=()): self.bad = bad
    def __len__(self): return 40
    def __getitem__(self, i):
        if i in self.bad: raise SkipItemException()
        return TensorText([i, *[2]*(1 + i*7 % 11)]), torch.tensor(i % 3)

class ReadsOther(TfmdDL):
    "Takes the next sample where one cannot be read"
    def create_item(self, s):
        try: return super().create_item(s)
        except SkipItemException: return self.create_item((s + 1) % self.n)

class ReadsNone(TfmdDL):
    def do_item(self, s): return None if s in BAD else super().do_item(s)

class ReadsSome(TfmdDL):
    def create_item(self, s):
        if s in BAD: raise SkipItemException()
        return super().create_item(s)

class Buckets(TfmdDL):
    "Sorts more samples than one batch holds"
    def chunkify(self, items): return super().chunkify(sorted(items, key=number, reverse=True))

class Rows(TfmdDL):
    "Reads a batch at once"
    def do_item(self, s): return 0 if s is None else s
    def create_batch(self, b): return [torch.stack(o) for o in zip(*[Items(())[i] for i in b])]

class AtOnce(TfmdDL):
    "Reads the samples of an epoch before any batch"
    def create_batches(self, samples):
        items = [self.dataset[i] for i in samples]
        yield from map(self.do_batch, self.chunkify(items))

class Ahead(TfmdDL):
    "Makes two batches before the first one is used"
    def create_batches(self, samples):
        batches = [*super().create_batches(samples)]
        yield from batches[::-1]

def double(x:torch.Tensor): return 2*x
def number(item): return item[0][0].item()
def by_number(items): return sorted(items, key=number)
def even(items): return [o for o in items if number(o) % 2 == 0]
def anew(items): return [(x.clone(), int(y)) for x, y in items]
def collated(items): return [torch.stack([torch.as_tensor(o) for o in part]) for part in zip(*items)]
def skips(item):
    if item[0][0] in BAD: raise SkipItemException()
    return item

def of_items(cls=TfmdDL, dataset=Items(), **settings): return cls(dataset, **(dict(bs=8, shuffle=True, num_workers=0) | settings))
LENGTHS = [len(Texts()[i][0]) for i in range(40)]
def of_texts(bad=(), **settings): return of_items(SortedDL, Texts(bad), before_batch=pad_input, res=LENGTHS, **settings)

def once(): return iter([9, 17, 3, 5, 4, 4, 39, 0, 1])
def twice(): return two_views(DataLoaders(of_items(), of_items())).train
def with_copies(): return of_items(dataset=[Items(())[i] for i in range(20)]*2, get_idxs=lambda: [3, 23, 3, 1])

LOADERS = dict(plain=partial(of_items, dataset=Items(())), skips=of_items, drop_last=partial(of_items, drop_last=True))
LOADERS |= {f'workers_{name}': partial(make, num_workers=2) for name, make in LOADERS.items()}
LOADERS |= dict(worker=partial(of_items, num_workers=1),
    simple=partial(of_items, DataLoader), in_order=partial(of_items, shuffle=False), single=partial(of_items, bs=1),
    first=partial(of_items, n=30), after_item=partial(of_items, DataLoader, Items(()), after_item=skips))
LOADERS |= {cls.__name__: partial(of_items, cls, Items(bad)) for cls, bad in
    ((ReadsNone, ()), (ReadsSome, ()), (ReadsOther, BAD), (Rows, ()), (Buckets, BAD), (Ahead, BAD))}
LOADERS |= dict(weighted=partial(of_items, WeightedDL, wgts=range(1, 41)), partial=partial(of_items, PartialDL, partial_n=20), twice=twice,
    iterator=partial(of_items, get_idxs=once), tensor=partial(of_items, get_idxs=lambda: torch.arange(39, 0, -2)),
    array=partial(of_items, get_idxs=lambda: np.array([*once()])), duplicates=with_copies)
LOADERS |= {func.__name__: partial(of_items, before_batch=func) for func in (by_number, even, anew)}
LOADERS |= dict(both=partial(of_items, before_batch=[by_number, even], num_workers=2), collated=partial(of_items, create_batch=collated),
    sorted_and_collated=partial(of_items, before_batch=by_number, create_batch=collated))
LOADERS |= dict(texts=of_texts, texts_in_order=partial(of_texts, shuffle=False),
    texts_skipped=partial(of_texts, BAD, drop_last=True, num_workers=2))

@pytest.mark.parametrize('name', LOADERS)
def test_told(name):
    "What the sample itself says, in each of two epochs"
    dl, n = with_positions(LOADERS[name]()), 0
    for _ in range(2):
        for x, y in dl:
            index = dl.index % 20 if name == 'duplicates' else dl.index
            assert untraced(dl.index, len(x)) == '' and index.tolist() == x[:, 0].tolist() and (y == index % 3).all()
            n += len(x)
    assert n >= 8

@pytest.mark.parametrize('name', LOADERS)
def test_neutral(name):
    "The same batches, random states and settings as without"
    runs = []
    for wrap in (lambda dl: dl), with_positions:
        seed_cpu(0)
        dl = LOADERS[name]()
        before = {**vars(dl)}
        batches = [o for _ in range(2) for o in wrap(dl)]
        changed = {key for key in vars(dl) if key not in before or vars(dl)[key] is not before[key]}
        runs.append((batches, random.random(), np.random.rand(), torch.rand(1), dl.rng.random(), changed))
    assert len(runs[0][0]) == len(runs[1][0]) and runs[0][1:] == runs[1][1:]
    for (x, y), (x2, y2) in zip(runs[0][0], runs[1][0]): assert torch.equal(x, x2) and torch.equal(y, y2) and type(x) is type(x2)

def test_by_hand():
    "Numbers 0 to 8 but 5 in batches of three, from one process, and from two that take turns"
    for num_workers, expected in (0, [[0, 1, 2], [3, 4, 6], [7, 8]]), (2, [[0, 1, 2], [3, 4], [6, 7, 8]]):
        dl = with_positions(of_items(dataset=Items(n=9), bs=3, shuffle=False, num_workers=num_workers))
        assert [dl.index.tolist() for _ in dl] == expected

def test_what_is_read_is_noted():
    "The sample that came, not the one that was asked for"
    dl = with_positions(of_items(ReadsOther, shuffle=False, bs=40))
    for x, y in dl: assert dl.index[[5, 17, 18]].tolist() == x[[5, 17, 18], 0].tolist() == [6, 19, 19]

# ---- Who is refused

class Pairs(TfmdDL):
    "Each sample is made of two"
    def create_item(self, s): return self.dataset[s or 0][0] + self.dataset[(s or 0) - 1][0], torch.tensor(0)

def windows():
    texts = [TensorText(range(i, i + 20 + (i == 7))) for i in range(8)]
    return LMDataLoader(texts, lens=[*map(len, texts)], bs=4, seq_len=20, num_workers=0)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter([Items(())[i] for i in range(16)])

class Batches:
    def __len__(self): return 5
    def __getitem__(self, i): return torch.full((8, 4), float(i)), torch.zeros(8).long()

def anew_in_order(items): return [(x.clone(), y.clone()) for x, y in by_number(items)]
def collate_sorted(items): return collated(by_number(items))
def collate_even(items): return collated(even(items))
def collate_shuffled(items): return collated(random.sample(items, len(items)))
def two_rows(items): return [torch.cat([o, o]) for o in collated(items)]

REFUSED = dict(torch=lambda: torch.utils.data.DataLoader(Items(()), 8, shuffle=True), whole_batches=lambda: DataLoader(Batches(), bs=None),
    stream=lambda: TfmdDL(Stream(), bs=8, n=16, num_workers=0), by_function=partial(of_items, create_item=lambda i: Items(())[i or 0]))
REFUSED |= {cls.__name__: partial(of_items, cls, Items(())) for cls in (Pairs, AtOnce)}
REFUSED |= {func.__name__: partial(of_items, create_batch=func) for func in (collate_sorted, collate_even, two_rows)}
REFUSED |= dict(before_batch=partial(of_items, before_batch=anew_in_order),
    worker=partial(of_items, create_batch=collate_shuffled, num_workers=1))

def student(dl):
    dls = DataLoaders(dl, of_items(dataset=Items(())), device='cpu')
    return quiet(Learner(dls, nn.Linear(4, 3), CrossEntropyLossFlat()))

ANSWERS = torch.stack([Items(())[i][0][:3]*5 for i in range(40)])

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    "Before the first step, with what would do"
    for kd in KD(StoredTeacher(lambda i: ANSWERS[i])), KD(nn.Linear(4, 3), lambda pred, index: pred.mean()):
        learn = student(REFUSED[name]())
        before = weights(learn.model)
        text = error_of(ValueError, learn, kd)
        assert 'which these loaders do not supply: ' in text and ('; ' in text or 'DataLoader(dataset, bs=…, shuffle=True)' in text)
        assert same(before, weights(learn.model))

def test_windows_of_texts_are_no_samples():
    "Also where there happen to be as many of them"
    dl = windows()
    assert len(dl.dataset) == dl.n == 8
    numbered = with_positions(dl)
    assert [untraced(numbered.index, 4) != '' for _ in numbered] == [True]*len(dl)

@pytest.mark.parametrize('name', ['Pairs', 'collate_sorted', 'stream'])
def test_who_does_not_need_them_goes_without(name):
    "A loss that takes everything, or has a default"
    seen = []
    def everything(pred, **kwargs): return seen.append(kwargs.get('index')) or pred.pow(2).mean()
    def optional(pred, index=None): return seen.append(index) or pred.pow(2).mean()
    for loss in everything, optional: student(REFUSED[name]()).fit(1, cbs=KD(nn.Linear(4, 3), loss))
    assert len(seen) >= 4 and all(o is None for o in seen)

# ---- In a fit

def mse(pred, teacher_pred): return F.mse_loss(pred, teacher_pred)
def KD(teacher, loss=mse): return KnowledgeDistillationCallback(teacher, loss)

class Wrong(Callback):
    "How many samples got the answer to another one, of how many"
    order, run_valid = 6, False
    def __init__(self): self.n, self.wrong = 0, 0
    def after_loss(self):
        said, x = self.learn.knowledge_distillation._fit.teacher.said, self.learn.xb[0]
        self.n, self.wrong = self.n + len(x), self.wrong + (said != x[:, :3]*5).any(1).sum().item()

class Noted(StoredTeacher):
    "Keeps its last answer"
    def outputs(self, *args, **kwargs):
        found = super().outputs(*args, **kwargs)
        self.said = found[0]
        return found

def wrong(dl, n_epoch=2, cbs=(), fit=None):
    "Samples that were compared with the answer to another, in a fit; and how many samples there were"
    learn, kd, watch = student(dl), KD(Noted(ANSWERS)), Wrong()
    if fit is None: learn.fit(n_epoch, 1e-4, cbs=[kd, watch, *cbs])
    else: fit(learn, [kd, watch, *cbs])
    return watch.wrong, watch.n

FITS = {name: make for name, make in LOADERS.items() if not name.startswith(('texts', 'dupl', 'workers_'))}

@pytest.mark.parametrize('name', FITS)
def test_answers(name):
    n_wrong, n = wrong(FITS[name]())
    assert n_wrong == 0 and n >= 8

@pytest.mark.parametrize('cbs', [lambda: [GradientAccumulation(20)],
    lambda: [At('before_batch', lambda learn: learn.dls.train.one_batch(), nth=0)],
    lambda: [At('after_batch', lambda learn: learn.validate(dl=learn.dls.train), nth=3)],
    lambda: [At('before_batch', lambda learn: list(learn.dls.train), order=-9, nth=2)],
    lambda: [Curriculum(StoredTeacher(ANSWERS), start=.5)]], ids=['accumulated', 'one_batch', 'validated', 'run_through', 'curriculum'])
def test_answers_beside(cbs):
    "Where others use the loader at the same time"
    for num_workers in 0, 1:
        n_wrong, n = wrong(of_items(num_workers=num_workers), cbs=cbs())
        assert n_wrong == 0 and n > 40

def test_answers_after_a_change():
    "Another loader between fits and between epochs, and another batch size"
    def fit(learn, cbs):
        learn.fit(1, cbs=cbs)
        learn.dls = DataLoaders(of_items(bs=5, drop_last=True), learn.dls.valid)
        learn.fit(1, cbs=cbs)
        def change(learn): learn.dls.loaders[0] = of_items(SortedDL, bs=4, res=[*range(40)], num_workers=2)
        learn.fit(2, cbs=[*cbs, At('after_epoch', change, nth=1)])
    assert wrong(of_items(), fit=fit) == (0, 37 + 35 + 35 + 37) # the change comes after an epoch

def test_answers_in_lr_find():
    assert wrong(of_items(), fit=lambda learn, cbs: [learn.add_cbs(cbs), learn.lr_find(num_it=12, show_plot=False)])[0] == 0

def test_two_at_once():
    "Two losses share what is noted, and two learners share a loader"
    learn, seen, dl = student(of_items()), [], of_items()
    def other(learn): student(dl).fit(1, cbs=KD(StoredTeacher(ANSWERS)))
    def ask(pred, index): return seen.append((index, learn.xb[0][:, 0])) or pred.mean()*0
    learn.dls.loaders[0] = dl
    learn.fit(1, cbs=[KD(StoredTeacher(ANSWERS)), KD(nn.Linear(4, 3), ask), At('before_batch', other, order=3, nth=2)])
    assert len(seen) == 5 and all(index.tolist() == x.tolist() for index, x in seen)

@pytest.mark.parametrize('how', ['fit', 'learner'])
def test_nothing_is_left(how):
    "After an interrupt the loader, its settings and the learner are the user's"
    learn, kd = student(of_items()), KD(StoredTeacher(ANSWERS))
    dl = learn.dls.train
    before = {**vars(dl)}
    def stop(learn): raise KeyboardInterrupt
    cbs = [kd, At('after_batch', stop, nth=2)]
    if how == 'learner': learn.add_cbs(cbs)
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=cbs if how == 'fit' else None)
    if how == 'learner': kd.cleanup()
    assert learn.dl is learn.dls.train is dl and vars(dl).keys() - before.keys() <= {'it', '_DataLoader__idxs', '_types', '_n_inp'}
    assert {key for key in before if vars(dl)[key] is not before[key]} <= {'rng'}
    assert type(pickle.loads(pickle.dumps(learn.dls)).train) is TfmdDL and len(learn.validate()) == 1
    learn.fit(1)
    assert type(learn.dls.train) is TfmdDL

def test_unlabelled_samples_have_none():
    learn = student(of_items())
    learn.add_cb(Unlabelled([Items(())[i][:1] for i in range(9)]))
    text = error_of(ValueError, learn, KD(StoredTeacher(lambda i: ANSWERS[i])))
    assert 'samples without labels have no position' in text

def test_transforms_are_seen():
    "Those of a batch can be looked at, called and added to"
    dl = of_items(after_batch=[double])
    numbered = with_positions(dl)
    assert numbered.after_batch.fs is dl.after_batch.fs and numbered.after_batch(torch.ones(2)).tolist() == [2, 2]
    for x, _ in numbered: assert (2*numbered.index).tolist() == x[:, 0].tolist()

def test_a_worker_that_starts_anew():
    "Of what it gets by a pickle it makes the same batches"
    numbered = with_positions(of_items(before_batch=by_number))
    expected = [numbered.index.tolist() for _ in numbered]
    fake = pickle.loads(pickle.dumps(numbered.fake_l))
    assert [index.tolist() for index, _ in fake] == expected and type(fake.d) is Positions

def test_seen_from_outside():
    "Of the class of the loader, with its settings; a copy is one too, and so is what a worker that starts anew gets"
    dl = of_items(WeightedDL, wgts=range(1, 41))
    numbered = with_positions(dl)
    assert isinstance(numbered, WeightedDL) and numbered.bs == 8 and numbered.loader is dl and with_positions(numbered) is numbered
    numbered.note = 'mine'
    assert dl.note == 'mine' and len(numbered) == 5 and no_positions(numbered.new()) == ''
    del numbered.note
    assert not hasattr(dl, 'note')
    for other in pickle.loads(pickle.dumps(numbered)), copy.deepcopy(numbered), copy.copy(numbered):
        assert type(other) is Positions and all(other.index.tolist() == x[:, 0].tolist() for x, _ in other)

# ---- Tables

@pytest.fixture(scope='module')
def table():
    df = pd.DataFrame(dict(n=[float(i) for i in range(40)], kind=['abc'[i % 3] for i in range(40)], y=['uv'[i % 2] for i in range(40)]))
    return TabularDataLoaders.from_df(df, '.', [Categorify], cat_names=['kind'], cont_names=['n'], y_names='y', valid_idx=[*range(8)], bs=8)

def test_rows_of_a_table(table):
    numbered = with_positions(table.train)
    for _ in range(2):
        for cats, conts, y in numbered: assert (numbered.index + 8).tolist() == conts[:, 0].tolist() # the first eight are for validation
    learn, seen = quiet(tabular_learner(table, layers=[4])), []
    def ask(pred, index): return seen.append((index + 8).tolist() == learn.xb[1][:, 0].tolist()) or pred.mean()
    learn.fit(1, cbs=KD(quiet(tabular_learner(table, layers=[4])), ask))
    assert seen == [True]*4
