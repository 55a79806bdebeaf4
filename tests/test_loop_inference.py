"What comes after training, or in between: predictions, files, and going on with a run that died."
import copy, numpy as np, os, pickle, pytest, torch
from fastai.basics import TfmdDL, Transform, load_learner, set_seed
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.torch_core import TensorImage
from fastkd.all import *
from helpers import (At, convnet, digits, fitted, learner, n_hooks, named_learner, quiet, raising, same, seeded, shows, started,
    trained_teacher, weights)
from learning import each_kind, fitnet, learned
from torch import nn

pytestmark = pytest.mark.filterwarnings('ignore:load_learner` uses Python')
def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

class Case:
    "A distilled learner, one without a callback and with the same weights, and how often the teacher was asked"
    def __init__(self, path):
        self.calls, teacher = [], trained_teacher()
        teacher.register_forward_hook(lambda *args: self.calls.append(1))
        self.cb = KD(teacher, SoftTarget() + 10*FitNet().on('block2', 'block2'))
        self.learn = named_learner(seeded(convnet, 4), n=50, cbs=self.cb, path=path)
        fitted(self.learn, n_epoch=1)
        self.plain = named_learner(copy.deepcopy(self.learn.model), path=path)
        self.calls.clear()

    def check(self):
        "The teacher was not asked, and nothing is left behind"
        assert self.calls == [] and n_hooks(self.learn.model) == 0 and list(self.learn.metrics.attrgot('name')) == ['accuracy']

@pytest.fixture
def case(tmp_path):
    case = Case(tmp_path)
    yield case
    case.check()

def equal(a, b): return len(a) == len(b) and all(x is y is None or torch.equal(x, y) for x, y in zip(a, b))

class Noise(Transform):
    "An augmentation, for training and for `tta`"
    split_idx = 0
    def encodes(self, x:TensorImage): return x + .3*torch.randn_like(x)

# ---- Predictions and what is made of them

@shows('learn.validate()')
def test_validate(case):
    "The loss is the task loss, as the column `valid_loss` was and as a learner without a callback has it, and no teacher runs."
    losses = case.learn.validate()
    assert losses == case.plain.validate() and len(losses) == 2
    assert list(case.learn.recorder.values[-1][:2]) == list(losses) # a validation writes its own row
    learn = fitted(named_learner(seeded(convnet, 4)), fitnet())
    assert list(learn.recorder.values[-1][1:3]) == pytest.approx(list(learn.validate()), abs=1e-6)

@shows('learn.get_preds()')
def test_get_preds(case):
    "Predictions and labels are those of a learner without a callback."
    found = case.learn.get_preds()
    assert equal(found, case.plain.get_preds()) and found[0].shape == (25, 10)

@shows('learn.get_preds(with_input=True, with_loss=True, with_decoded=True)')
def test_get_preds_with_loss(case):
    "One loss for each sample, the task loss."
    found = case.learn.get_preds(with_input=True, with_loss=True, with_decoded=True)
    assert equal(found, case.plain.get_preds(with_input=True, with_loss=True, with_decoded=True))
    with torch.no_grad(): logits = case.learn.model.eval()(found[0])
    assert torch.allclose(found[-1], nn.functional.cross_entropy(logits, found[2].long(), reduction='none'), atol=1e-6)

@shows('learn.get_preds(dl=dls.test_dl(items))')
def test_get_preds_without_labels(case):
    "Samples without labels are predicted, too."
    preds, targets = case.learn.get_preds(dl=case.learn.dls.test_dl(list(range(7))))
    assert targets is None and torch.equal(preds, case.plain.get_preds(dl=case.plain.dls.test_dl(list(range(7))))[0])

@shows('learn.predict(item)')
def test_predict(case):
    "Class, index and probabilities are those of a learner without a callback."
    for item in 0, 17:
        (name, *found), (expected, *others) = case.learn.predict(item), case.plain.predict(item)
        assert name == expected and equal(found, others)

@shows('learn.tta()')
def test_tta(case):
    "Predictions averaged over augmented samples are those of a learner without a callback."
    for learn in case.learn, case.plain: learn.dls.valid.after_batch.add(Noise())
    found, expected = [started(learn).tta(n=2) for learn in (case.learn, case.plain)]
    assert equal(found, expected) and not torch.equal(found[0], case.learn.get_preds()[0])

@shows('learn.show_results()')
def test_show_results(case, monkeypatch):
    "The results shown are those of a learner without a callback."
    shown = []
    monkeypatch.setattr(TfmdDL, 'show_results', lambda dl, b, out, **kwargs: shown.append((*b, out)))
    for learn in case.learn, case.plain: learn.show_results(shuffle=False)
    assert len(shown) == 2 and equal(*shown) and shown[0][2].shape == (25,)

@shows('ClassificationInterpretation.from_learner(learn)')
def test_interpretation(case):
    "Confusion matrix and largest losses are those of a learner without a callback."
    found, expected = [ClassificationInterpretation.from_learner(learn) for learn in (case.learn, case.plain)]
    assert np.array_equal(found.confusion_matrix(), expected.confusion_matrix()) and found.confusion_matrix().sum() == 25
    found, expected = [Interpretation.from_learner(learn).top_losses(5) for learn in (case.learn, case.plain)]
    assert equal(found, expected)

@shows('learn.summary()')
def test_summary(case):
    "The table of layers has no layer of the losses."
    tables = [repr(learn.summary()).partition('Optimizer')[0] for learn in (case.learn, case.plain)]
    assert tables[0] == tables[1] and 'Conv2d' in tables[0]

def test_teacher_does_not_run_in_validation():
    calls, teacher = [], trained_teacher()
    teacher.register_forward_hook(lambda *args: calls.append(1))
    learn = learner(cbs=KD(teacher, SoftTarget))
    fitted(learn, n_epoch=1)
    assert len(calls) == 5 # the probe and four batches
    learn.validate()
    learn.get_preds()
    learn.predict(digits()[0])
    assert len(calls) == 5

# ---- Files

@shows("learn.save('student'); Learner(dls, student).load('student')")
def test_save_and_load(tmp_path):
    "The file is what it is without a callback, with the optimizer's state, and loads into a learner that has none."
    learn, plain = learner(path=tmp_path), learner(path=tmp_path)
    fitted(learn, fitnet())
    fitted(plain)
    one, other = (torch.load(o.save(name), weights_only=False) for o, name in ((learn, 'a'), (plain, 'b')))
    assert one['model'].keys() == other['model'].keys()
    assert [len(o['opt']['state']) for o in (one, other)] == [len(list(convnet(4).parameters()))]*2
    plain.load('a')
    assert same(weights(plain.model), weights(learn.model))
    assert list(learn.recorder.values[-1][1:3]) == pytest.approx(list(plain.validate()), abs=1e-6)
    averages = [[o.opt.state[p]['grad_avg'] for p in o.model.parameters()] for o in (plain, learn)]
    assert equal(*averages)

def exported(tmp_path, name, *cbs):
    "A learner trained and exported, and the file"
    learn = named_learner(seeded(convnet, 32), n=25, cbs=[*cbs], path=tmp_path)
    fitted(learn)
    learn.export(name)
    return learn, tmp_path/name

@shows('learn.export(); load_learner(path)')
def test_export_and_load_learner(tmp_path):
    "The loaded learner predicts, validates and describes itself, and says that its teacher is missing when it is to be trained."
    learn, path = exported(tmp_path, 'distilled.pkl', fitnet())
    loaded, dls = quiet(load_learner(path)), learn.dls
    for item in 0, 17: assert loaded.predict(item)[0] == learn.predict(item)[0]
    assert torch.equal(loaded.get_preds(dl=dls.valid)[0], learn.get_preds()[0])
    assert torch.equal(loaded.tta(dl=dls.valid)[0], learn.tta()[0])
    loaded.dls = dls
    assert loaded.validate() == learn.validate()
    table, expected = (repr(o.summary()).partition('Optimizer')[0] for o in (loaded, learn))
    assert table == expected and 'Conv2d' in table
    before = weights(loaded.model)
    said = 'the teacher did not come along .* `learn.knowledge_distillation.teacher = teacher`'
    with pytest.raises(RuntimeError, match=said): loaded.fit(1)
    assert same(weights(loaded.model), before) and list(loaded.metrics.attrgot('name')) == ['accuracy']
    loaded.knowledge_distillation.teacher = trained_teacher()
    fitted(loaded) # as the message says
    loaded.remove_cb(KnowledgeDistillationCallback)
    fitted(loaded)
    assert len(loaded.recorder.values[-1]) == 3

@shows('learn.export()')
def test_export_is_as_small_as_without(tmp_path):
    "The file is as small as without a callback: no teacher, no adapters, no recorded values."
    plain = exported(tmp_path, 'plain.pkl')[1].stat().st_size
    loss = SoftTarget() + FitNet().on(['block1', 'block2'], ['block1', 'block2'])
    cb = KD(seeded(convnet, 256), loss, schedule={'T': lambda pct: 5 - pct}, teacher_input=lambda x: x, mask=None)
    learn, path = exported(tmp_path, 'distilled.pkl', cb)
    assert sum(p.numel() for p in cb.teacher.parameters())*4 > 10*plain
    assert path.stat().st_size == pytest.approx(plain, rel=.05)
    assert cb.teacher is not None and len(list(cb.loss.parameters())) == 4 # the learner itself keeps them

def test_export_of_a_fit_is_as_without(tmp_path):
    "With `fit(cbs=)` there is nothing of ours in the file"
    learn = named_learner(seeded(convnet, 16), path=tmp_path)
    fitted(learn, fitnet())
    learn.export('distilled.pkl')
    assert b'fastkd' not in (tmp_path/'distilled.pkl').read_bytes()

@shows('copy.deepcopy(learn); pickle.dumps(learn)')
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))], ids=['deepcopy', 'pickle'])
def test_copied_callback(copied):
    "A copy keeps the callback's settings and leaves teacher and adapters behind; the original keeps both."
    cb = KD(trained_teacher(), SoftTarget(T=3) + 10*FitNet().on('block2', 'block2'), weight=.7, schedule=cos, span=3)
    learn = learner(cbs=cb)
    other = copied(learn).knowledge_distillation
    fitted(learn)
    again = copied(learn.knowledge_distillation)
    for o in other, again:
        assert o.teacher is None and list(o.loss.parameters()) == []
        assert (repr(o), o.span, o.schedules) == (repr(cb), 3, cb.schedules)
    assert cb.teacher is not None and len(list(cb.loss.parameters())) == 2

# ---- Going on with a run

def dropped(path, seed=0): return learner(seeded(convnet, 4, .3, seed=seed), n=50, path=path)

def died(learn, cbs):
    "A run that is interrupted in its third epoch"
    last = At('after_backward', raising(KeyboardInterrupt), nth=2*len(learn.dls.train) + 2)
    with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(4, 1e-2, cbs=[last, *cbs])

def rows(learn): return [list(row[1:]) for row in learn.recorder.values[2:]] # `train_loss`, which fastai smooths, begins anew

@shows("learn.fit_one_cycle(9, 1e-2, cbs=[kd, CheckpointCallback()], start_epoch=learn.load_checkpoint(cbs=kd))")
@each_kind
def test_going_on(make, tmp_path):
    "A run that died, taken up in a new process, gives the numbers of one that did not: weights, adapters, banks, schedules and all."
    def scheduled():
        cb = make()
        cb.schedules = as_schedules(dict(weight=cos))
        return cb
    mix = lambda: [MixUp(), CheckpointCallback()]
    whole, dying, other = scheduled(), scheduled(), scheduled()
    expected = started(dropped(tmp_path/'whole'))
    expected.fit_one_cycle(4, 1e-2, cbs=[whole, *mix()])
    died(started(dropped(tmp_path)), [dying, *mix()])
    set_seed(99)
    learn = dropped(tmp_path, seed=9)
    start = learn.load_checkpoint(cbs=other)
    assert start == 2
    learn.fit_one_cycle(4, 1e-2, cbs=[other, *mix()], start_epoch=start)
    assert same(weights(learn.model), weights(expected.model)) and same(learned(other), learned(whole))
    assert rows(learn) == rows(expected)
    assert learn.recorder.distillation['weight'] == expected.recorder.distillation['weight'][4:]

@shows("learn.fit(9, cbs=[kd, CheckpointCallback(every_epoch=True)])")
def test_checkpoint_of_each_epoch(tmp_path):
    "One can go on from any epoch; epochs that are skipped keep their files."
    def run(learn, cb, **kwargs): learn.fit(3, 1e-2, cbs=[cb, CheckpointCallback(every_epoch=True)], **kwargs)
    expected, whole, other = started(dropped(tmp_path)), fitnet(), fitnet()
    run(expected, whole)
    files = [tmp_path/f'models/checkpoint_{i}.pth' for i in range(3)]
    before = [file.stat().st_mtime_ns for file in files]
    learn = dropped(tmp_path, seed=9)
    run(learn, other, start_epoch=learn.load_checkpoint('checkpoint_0', other))
    assert same(weights(learn.model), weights(expected.model)) and same(learned(other), learned(whole))
    assert [old == file.stat().st_mtime_ns for old, file in zip(before, files)] == [True, False, False]

@shows("learn.save_checkpoint('half', kd); learn.load_checkpoint('half', kd)")
def test_checkpoint_after_a_fit(tmp_path):
    "One call saves all of a run, also after a fit, and one call restores it; a span goes on where it was."
    def make(): return fitnet(schedule=lin, span=4)
    cb, other, learn, more = make(), make(), dropped(tmp_path), dropped(tmp_path, seed=9)
    fitted(learn, cb)
    assert learn.save_checkpoint('half', cb) == tmp_path/'models/half.pth'
    learn.fit(2, 1e-2, cbs=cb)
    assert more.load_checkpoint('half', other) == 2
    more.fit(2, 1e-2, cbs=other)
    assert same(weights(learn.model), weights(more.model)) and same(learned(cb), learned(other))
    assert more.recorder.distillation['weight'] == pytest.approx([.5*(4 + i)/8 for i in range(4)])

@shows("Learner(dls, student).load('checkpoint')")
def test_checkpoint_without_the_callback(tmp_path):
    "A checkpoint is a file of fastai's: student and optimizer load into a learner that knows nothing of distillation."
    learn = fitted(learner(path=tmp_path), [fitnet(), CheckpointCallback()])
    plain = learner(seeded(convnet, 4, seed=9), path=tmp_path).load('checkpoint', with_opt=True)
    assert same(weights(plain.model), weights(learn.model))
    assert equal(*[[o.opt.state[p]['sqr_avg'] for p in o.model.parameters()] for o in (plain, learn)])

@shows("learn.load_checkpoint(cbs=[kd, other])")
def test_checkpoint_of_two_callbacks(tmp_path):
    "Each callback gets back what is its own; to leave one out is an error."
    pair, others = [[fitnet(), KD(trained_teacher(), FitNet(), 'block1', 'block1')] for _ in range(2)]
    fitted(learner(path=tmp_path), [*pair, CheckpointCallback()], n_epoch=1)
    learn = learner(path=tmp_path)
    assert learn.load_checkpoint(cbs=others) == 1
    for cb, other in zip(pair, others):
        state, restored = cb.state_dict(), other.state_dict()
        assert state['epochs_done'] == 1 and restored['epochs_done'] == 0 # the fit goes on
        assert same(state['loss'], restored['loss'])
    said = 'also holds the state of KnowledgeDistillationCallback, KnowledgeDistillationCallback: pass all callbacks that were saved'
    with pytest.raises(ValueError, match=said): learn.load_checkpoint()
    learn.save('student')
    with pytest.raises(ValueError, match='student.pth was not written by `learn.save_checkpoint`'): learn.load_checkpoint('student')

def test_a_checkpoint_that_is_cut_off(tmp_path, monkeypatch):
    "A process that dies while it writes leaves the file before it"
    learn, cb = learner(path=tmp_path), fitnet()
    fitted(learn, [cb, CheckpointCallback()])
    before = (tmp_path/'models/checkpoint.pth').read_bytes()
    def cut(state, file, **kwargs):
        file.write_bytes(b'half')
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(torch, 'save', cut)
        learn.save_checkpoint(cbs=cb)
    assert (tmp_path/'models/checkpoint.pth').read_bytes() == before

def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    fitted(learner(path=tmp_path), [fitnet(), CheckpointCallback()])
    assert os.listdir(tmp_path) in ([], ['models']) and not list(tmp_path.glob('models/*'))

def test_no_checkpoint_of_a_look(tmp_path):
    "Neither `validate` nor `lr_find` is a run"
    learn = learner(path=tmp_path, cbs=[fitnet(), CheckpointCallback()])
    learn.validate()
    learn.lr_find(num_it=4, show_plot=False)
    assert not list(tmp_path.glob('models/*'))

@shows("learn.load('model_1', with_opt=True); learn.fit_one_cycle(9, 1e-2, cbs=kd, start_epoch=2)")
def test_files_of_save_model_callback(tmp_path):
    "Files of `SaveModelCallback(every_epoch=True, with_opt=True)` are enough where the losses learn nothing and nothing is random."
    def make():
        learn = learner(path=tmp_path)
        learn.dls.train.shuffle = False
        return learn, KD(trained_teacher(), SoftTarget, schedule=cos)
    def run(learn, cbs, **kwargs): learn.fit_one_cycle(4, 1e-2, cbs=cbs, **kwargs)
    (expected, whole), (learn, cb), (other, again) = make(), make(), make()
    run(expected, whole)
    died(learn, [cb, SaveModelCallback(every_epoch=True, with_opt=True)])
    run(other.load('model_1', with_opt=True), again, start_epoch=2)
    assert same(weights(other.model), weights(expected.model)) and rows(other) == rows(expected)

def halves(model): return [list(model[:1].parameters()), list(model[1:].parameters())]

@shows('learn.freeze(); learn.fit(3, cbs=[kd, CheckpointCallback()])')
def test_a_frozen_phase_goes_on_frozen(tmp_path):
    "A checkpoint knows which layers were frozen."
    first, second = (learner(path=tmp_path, splitter=halves, train_bn=False) for _ in range(2))
    first.freeze()
    fitted(first, [fitnet(), CheckpointCallback()], n_epoch=1)
    kd = fitnet()
    start = second.load_checkpoint(cbs=kd)
    before = weights(second.model[:1])
    second.fit(2, cbs=kd, start_epoch=start)
    assert start == 1 and same({k: v for k, v in before.items() if 'running' not in k and 'num' not in k},
        {k: v for k, v in weights(second.model[:1]).items() if 'running' not in k and 'num' not in k})

def test_short_epochs_are_epochs(tmp_path):
    "Also where a callback cuts them short"
    from fastai.callback.training import ShortEpochCallback
    learn, kd = learner(path=tmp_path), fitnet()
    fitted(learn, [kd, CheckpointCallback(), ShortEpochCallback(.3)], n_epoch=2)
    assert learner(path=tmp_path).load_checkpoint(cbs=fitnet()) == 2

def test_a_checkpoint_of_other_groups(tmp_path):
    "Is refused before anything is changed"
    fitted(learner(path=tmp_path), [fitnet(), CheckpointCallback()], n_epoch=1)
    other = learner(path=tmp_path, splitter=halves)
    before = weights(other.model)
    with pytest.raises(ValueError, match='holds 1 parameter groups, and this learner has 2'): other.load_checkpoint(cbs=fitnet())
    assert same(weights(other.model), before)
