"Predictions that were made elsewhere: found by position, whatever the order, and refused where they do not fit."
import numpy as np, pytest, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, SGD
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import MixUp
from fastai.data.core import TfmdDL
from fastkd.all import *
from fastkd.cache import CachedTeacher
from fastkd.stored import StoredTeacher
from functools import cache
from helpers import At, convnet, digits, error_of, fitted, furthest, learner, loaders, quiet, seeded, trained_teacher, weights
from torch import nn

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is') # random weights

@cache
def answers(n=100):
    "What the teacher says about the first `n` digits"
    teacher = trained_teacher().eval()
    with torch.no_grad(): return teacher(torch.stack([x for x, _ in digits()[:n]]))

def on_disk(folder):
    "One file for each sample"
    for i, row in enumerate(answers()): np.save(folder/f'{i}.npy', row.numpy())
    return [folder/f'{i}.npy' for i in range(100)]

def whole(folder):
    np.save(folder/'all.npy', answers().numpy())
    return folder/'all.npy'

SOURCES = dict(tensor=lambda folder: answers(), array=lambda folder: answers().numpy(), file=whole, path=lambda folder: str(whole(folder)),
    memmap=lambda folder: np.load(whole(folder), mmap_mode='r'), rows=lambda folder: list(answers()), files=on_disk,
    arrays=lambda folder: list(answers().numpy()), names=lambda folder: [str(file) for file in on_disk(folder)],
    dict=lambda folder: dict(enumerate(answers())), numbers=lambda folder: answers().tolist(),
    function=lambda folder: lambda i: answers()[i], file_by_function=lambda folder: lambda i, files=on_disk(folder): files[i])

def KD(teacher, loss=SoftTarget(T=4), **kwargs): return KnowledgeDistillationCallback(teacher, loss, **kwargs)

def trained(teacher, cbs=(), loss=SoftTarget(T=4), **kwargs):
    "Weights after a shuffled fit"
    learn = learner(opt_func=SGD, **kwargs)
    return weights(fitted(learn, [KD(teacher, loss), *cbs]).model)

# ---- Sources

@pytest.mark.parametrize('name', SOURCES)
def test_sources(name, tmp_path):
    "Each is looked up by position; a shuffled fit is the one with the teacher, but for rounding"
    teacher, index = StoredTeacher(SOURCES[name](tmp_path)), torch.tensor([5, 0, 99, 5])
    pred, activations = teacher.outputs((torch.zeros(4),), index=index)
    assert torch.equal(pred, answers()[index]) and type(pred) is torch.Tensor and activations == {}
    assert teacher.outputs((torch.zeros(4),), pred=False, index=index) == (None, {})
    assert furthest(trained(teacher), trained(trained_teacher())) < 2e-6

def test_a_memory_map_is_left_alone(tmp_path):
    "It is read only, and what is handed out is a copy"
    teacher = StoredTeacher(whole(tmp_path))
    pred, _ = teacher.outputs((torch.zeros(2),), index=torch.tensor([1, 2]))
    pred += 1
    assert isinstance(teacher.source, np.memmap) and torch.equal(torch.tensor(np.array(teacher.source)), answers())

@pytest.mark.parametrize('dtype', [np.float16, np.float64])
def test_types(dtype):
    "Compared in full precision; the student stays what it is"
    found = trained(StoredTeacher(answers().numpy().astype(dtype)))
    assert furthest(found, trained(trained_teacher())) < (1e-3 if dtype == np.float16 else 2e-6)
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}

# ---- Positions

def positions(dls, cbs=(), n_epoch=2, model=None):
    "Rows of the data that the student saw, and positions that the teacher was asked about, batch by batch"
    asked, seen = [], []
    def row(i):
        asked.append(i)
        return torch.zeros(3)
    learn = quiet(Learner(dls, model or nn.Linear(4, 3), CrossEntropyLossFlat()))
    def note(learn):
        if learn.training: seen.extend(learn.xb[0][:, 0].tolist())
    fitted(learn, [KD(StoredTeacher(row), weight=1e-3), At('before_batch', note, order=-5, nth=0), *cbs], n_epoch)
    return asked[1:], [int(x) for x in seen] # the first one is the probe's

class Numbered(torch.utils.data.Dataset):
    "Samples that begin with their number"
    def __init__(self, n=50): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.tensor([float(i), 1., 2., i%3]), i%3

def numbered(n=50, bs=8, **kwargs):
    train = TfmdDL(Numbered(n), bs=bs, **{**dict(shuffle=True, drop_last=True, num_workers=0), **kwargs})
    return DataLoaders(train, valid())

class Odd(TfmdDL):
    "A loader that draws some positions only"
    def get_idxs(self): return [i for i in super().get_idxs() if i%2]

def valid(): return TfmdDL(Numbered(8), bs=8, num_workers=0)
def drawn(cls, **kwargs): return DataLoaders(cls(Numbered(), bs=8, shuffle=True, drop_last=True, num_workers=0, **kwargs), valid())

LOADERS = dict(shuffled=lambda: numbered(), in_order=lambda: numbered(shuffle=False), all=lambda: numbered(drop_last=False),
    workers=lambda: numbered(num_workers=2), single=lambda: numbered(bs=1, n=5),
    odd=lambda: drawn(Odd), weighted=lambda: drawn(WeightedDL, wgts=list(range(1, 51))))

@pytest.mark.parametrize('name', LOADERS)
def test_positions(name):
    "Those of the samples in the batch, in their order, in every epoch, and never those of the validation set"
    asked, seen = positions(LOADERS[name]())
    assert asked == seen and len(seen) >= 10

def test_positions_with_mixup():
    "Of the first of the two that are mixed"
    asked, seen = positions(numbered(), [MixUp(.4)])
    assert asked == seen

def test_positions_with_dicts():
    "A batch is as large as its tensors, however many a dict has"
    samples = [(dict(a=x[:2], b=x[2:], c=x), y) for x, y in (Numbered()[i] for i in range(50))]
    class FromDict(nn.Linear):
        def forward(self, x): return super().forward(torch.cat([x['a'], x['b']], 1))
    learn, asked = quiet(Learner(loaders(samples, bs=8), FromDict(4, 3), CrossEntropyLossFlat())), []
    def row(i):
        asked.append(i)
        return torch.zeros(3)
    learn.fit(1, cbs=KD(StoredTeacher(row), weight=1e-3))
    assert len(asked) == 1 + 48 and len(set(asked[1:])) == 48

def test_nobody_sees_the_position():
    "Model and task loss get what they get without a teacher"
    n_args = []
    class Watched(CrossEntropyLossFlat):
        def __call__(self, *args, **kwargs):
            n_args.append((len(args), len(kwargs)))
            return super().__call__(*args, **kwargs)
    model = seeded(convnet, 4)
    model.register_forward_pre_hook(lambda module, args, kwargs: n_args.append((len(args) + 1, len(kwargs))), with_kwargs=True)
    learn = learner(model, loss_func=Watched())
    learn.fit(1, cbs=KD(StoredTeacher(answers())))
    assert set(n_args) == {(2, 0)}

# ---- What does not fit

def said(source, exc=ValueError, loss=SoftTarget(T=4), **kwargs): return error_of(exc, learner(), KD(StoredTeacher(source), loss, **kwargs))

def test_wrong_length():
    for source in answers()[:90], answers(110).numpy(), list(answers()[:1]):
        assert 'predictions are stored, and the training set has 100 samples' in said(source)

def test_missing(tmp_path):
    "Before the first step, where the first sample is missing; else when its turn comes"
    files = on_disk(tmp_path)
    for file in files: file.unlink()
    for source in files, {}, lambda i: None, lambda i: {}[i]: assert 'there is none for sample' in said(source)
    learn = learner()
    learn.dls.train.shuffle = False
    teacher = StoredTeacher({i: row for i, row in enumerate(answers()) if i != 60})
    assert 'there is none for sample 60 of the training set' in error_of(ValueError, learn, KD(teacher), n_batches=2)

def test_shapes():
    "Of other classes, of rows that differ, and of labels in the place of logits"
    assert 'predicts 10 classes and the teacher 9' in said(answers()[:, :9])
    learn = learner()
    learn.dls.train.shuffle = False
    rows = list(answers())
    rows[30] = rows[30][:9]
    teacher = StoredTeacher(rows)
    assert 'they differ in shape, (10,) for sample 25 of' not in (text := error_of(ValueError, learn, KD(teacher), n_batches=1))
    assert 'they differ in shape, (10,) for sample 25, (9,) for 30' in text
    assert 'the teacher 1 (shape (1, 10) and (1,))' in said(answers().argmax(1))
    assert '(1, 10, 2)' in said(answers()[..., None].repeat(1, 1, 2))

def test_not_finite(): assert "prediction is not finite" in said(answers()*float('nan'))

def test_layers():
    "Predictions have none"
    text = said(answers(), loss=SoftTarget() + FitNet().on('block2', 'block2'))
    assert "has predictions and no activations, and layer 'block2' was asked for" in text

def test_settings_of_a_model():
    text = said(answers(), teacher_dtype=torch.bfloat16)
    assert 'has settings of its own' in text and 'CachedTeacher(Frozen(model, logits=…, inputs=…, dtype=…))' in text

@pytest.mark.parametrize('mixing,n', [((), 0), ([MixUp()], 1)], ids=['plain', 'mixed'])
def test_mixed_samples(mixing, n, recwarn):
    "Stored answers are those to the samples before they were mixed: said once"
    learner().fit(2, cbs=[KD(StoredTeacher(answers())), *mixing])
    assert len([o for o in recwarn if 'mix_up mixes it with another: a teacher that runs' in str(o.message)]) == n

def test_loaders_without_numbers():
    "Those of PyTorch shuffle in secret, and a stream has no positions"
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(digits()[:100])
    plain = torch.utils.data.DataLoader(digits()[:100], batch_size=25, shuffle=True)
    for train in plain, TfmdDL(Stream(), bs=25, num_workers=0):
        learn = quiet(Learner(DataLoaders(train, plain), seeded(convnet, 4), CrossEntropyLossFlat()))
        assert 'these loaders do not supply' in error_of(ValueError, learn, KD(StoredTeacher(lambda i: answers()[i])))

def test_no_cache_for_it():
    with pytest.raises(TypeError, match='by position and not by content'): CachedTeacher(StoredTeacher(answers()))

# ---- Together

def test_in_a_sum_and_shown():
    "As the teacher itself, in losses and columns"
    shown, loss = [], SoftTarget(T=4) + 2*DecoupledKD() + DIST()
    for teacher in StoredTeacher(answers()), trained_teacher():
        learn = learner(opt_func=SGD)
        fitted(learn, KD(teacher, loss, teacher_metrics=True))
        shown.append(dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1])))
    assert shown[0].keys() == shown[1].keys() >= {'teacher_accuracy', 'teacher_agreement', 'soft_target_loss'}
    assert torch.allclose(*[torch.tensor(list(o.values())) for o in shown], rtol=1e-5)
    assert shown[0]['teacher_accuracy'] > .5

def test_positions_of_pixels():
    "Predictions with positions of their own, `(n_classes, h, w)`"
    xs = torch.randn(20, 3, 4, 4)
    samples = [(x, (x[0] > 0).long()) for x in xs]
    teacher = seeded(nn.Conv2d, 3, 2, 1)
    def run(teacher):
        learn = quiet(Learner(loaders(samples, bs=5), seeded(nn.Conv2d, 3, 2, 1, seed=1), CrossEntropyLossFlat(axis=1), opt_func=SGD))
        return weights(fitted(learn, KD(teacher)).model)
    with torch.no_grad(): stored = StoredTeacher(teacher(xs))
    assert furthest(run(stored), run(teacher)) < 2e-6
