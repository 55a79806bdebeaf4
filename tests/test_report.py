"What a report says, against counts and formulas by hand, and that it leaves everything as it was."
import copy, math, pytest, random, torch, torch.nn.functional as F
from contextlib import nullcontext
from fastai.basics import BCEWithLogitsLossFlat, Callback, CrossEntropyLossFlat, DataLoaders, L, Learner, MSELossFlat, mae
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.tracker import SaveModelCallback
from fastai.metrics import accuracy
from fastkd.all import CachedTeacher, KnowledgeDistillationCallback, SoftTarget
from fastkd.plots import AgreementCallback, plot_activations
from fastkd.report import divergence, file_bytes, latencies, log_probabilities, macs, peak_bytes, report, tally, threads
from fastkd.stored import StoredTeacher
from functools import partial
from io import BytesIO
from helpers import (At, convnet, digits, error_of, fitted, is_unchanged, learner, loaders, n_hooks, named_learner, quiet, raising, same,
    seeded, state, trained_teacher, weights)
from matplotlib.colors import to_rgba
from torch import nn
from torchmetrics.functional import calibration_error

def taught(n=100, **kwargs): return learner(trained_teacher(), n, **kwargs)
def predictions(model, dl): return torch.cat([model.eval()(x).detach() for x, _ in dl]), torch.cat([y for _, y in dl])

def by_hand(student, teacher, dl):
    "Rows of the table, from all predictions at once, in float64"
    (z_s, y), (z_t, _) = predictions(student, dl), predictions(teacher, dl)
    p_s, p_t = (z.double().softmax(1) for z in (z_s, z_t))
    kl, wrong, agree = (p_t*(p_t.log() - p_s.log())).sum(1), p_t.argmax(1) != y, p_s.argmax(1) == p_t.argmax(1)
    both = lambda func: [func(p_s).item(), func(p_t).item()]
    return {'accuracy, %': both(lambda p: 100*(p.argmax(1) == y).double().mean()), 'loss': both(lambda p: F.nll_loss(p.log(), y)),
        'calibration error, %': both(lambda p: 100*calibration_error(p, y, 'multiclass', n_bins=15, num_classes=10)),
        'agreement, %': [100*agree.double().mean().item()], 'KL from the teacher, nats': [kl.mean().item()],
        'agreement where the teacher is wrong, %': [100*agree[wrong].double().mean().item()],
        'KL where the teacher is wrong, nats': [kl[wrong].mean().item()]}

def close(a, b, eps=1e-4): return a == pytest.approx(b, rel=eps, abs=eps)

def test_numbers():
    "On a teacher that errs, so that there is something to say of its errors"
    student, teacher = fitted(learner(bs=20)), seeded(convnet, 8, seed=4)
    found = report(student, teacher, n_runs=0)
    for name, values in by_hand(student.model, teacher, student.dls.valid).items():
        assert close(found.table.loc[name].tolist()[:len(values)], values), name
    ratios = found.table['student/teacher']
    assert close(ratios['loss'], found.table.student['loss']/found.table.teacher['loss'])
    assert found.table.loc['agreement, %'].isna().tolist() == [False, True, True]
    _, y = predictions(student.model, student.dls.valid)
    assert found.classes['count'].tolist() == y.bincount(minlength=10).tolist()
    weighted = (found.classes['count']*found.classes['student, %'].fillna(0)).sum()/len(y)
    assert close(weighted, found.table.student['accuracy, %'])

def test_unsure_teachers_and_logits_of_minus_infinity():
    log_s, log_t = (log_probabilities(torch.tensor([row])) for row in ([0., 0, 0], [0., 0, -math.inf]))
    assert close(divergence(log_s, log_t).tolist(), [math.log(1.5)]) and divergence(log_t, log_t).tolist() == [0]
    assert log_probabilities(torch.zeros(2, 3, dtype=torch.float16)).dtype == torch.float32
    endless = tally(log_t, log_s, torch.tensor([0])) # where the teacher is right, nothing stands among its errors
    assert endless[0].tolist() == [1, 1, 1, 1, math.inf, 0, 0, 0]

def test_ignored_positions_may_be_infinitely_far():
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 1, -100])
    dls = loaders(list(zip(x, y)), bs=4)
    class Sure(nn.Linear):
        def forward(self, x): return super().forward(x) + torch.where(torch.arange(4)[:, None] == 3, torch.tensor([0., -math.inf]), 0.)
    found = report(quiet(Learner(dls, Sure(2, 2), CrossEntropyLossFlat())), seeded(nn.Linear, 2, 2), batch_sizes=4, n_runs=0)
    assert found.kl.isfinite().all() and found.kl[3] == 0

def test_pixels_and_ignored_ones():
    "A class at each pixel, of which some do not count"
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 4, 4), torch.randint(3, (8, 4, 4))
    y[:, 0] = 255
    func = CrossEntropyLossFlat(axis=1, ignore_index=255)
    learn = quiet(Learner(loaders(list(zip(x, y)), bs=3), seeded(nn.Conv2d, 3, 3, 1), func))
    teacher = seeded(nn.Conv2d, 3, 3, 1, seed=1)
    found, keep = report(learn, teacher, n_runs=0), (y != 255).flatten()
    z_s, z_t = (m(x).detach().movedim(1, -1).reshape(-1, 3)[keep].double() for m in (learn.model, teacher))
    assert close(found.table.student['accuracy, %'], 100*(z_s.argmax(1) == y.flatten()[keep]).double().mean().item())
    assert close(found.table.student['agreement, %'], 100*(z_s.argmax(1) == z_t.argmax(1)).double().mean().item())
    kl = F.kl_div(z_s.log_softmax(1), z_t.log_softmax(1), reduction='none', log_target=True).sum(1)
    assert close(found.kl.tolist(), kl.view(8, -1).mean(1).tolist())
    assert found.classes['count'].sum() == keep.sum()
    expected = calibration_error(z_s.softmax(1), y.flatten()[keep], 'multiclass', n_bins=15, num_classes=3)
    assert close(found.table.student['calibration error, %'], 100*expected.item())
    with pytest.raises(ValueError, match='many labels'): found.disagreements()

def test_ignored_labels_of_a_partial():
    "A function that leaves out a label, as a loss of torch or fastai does"
    learn, agreement = learner(loss_func=partial(F.cross_entropy, ignore_index=9)), AgreementCallback(trained_teacher())
    found, (_, y) = report(learn, trained_teacher(), n_runs=0), predictions(learn.model, learn.dls.valid)
    assert found.classes['count'].tolist() == y[y != 9].bincount(minlength=10).tolist()
    learn.fit(1, cbs=agreement)
    (z_s, _), (z_t, _) = (predictions(model, learn.dls.valid) for model in (learn.model, trained_teacher()))
    assert close(agreement.history['teacher_agreement'], [(z_s.argmax(1) == z_t.argmax(1))[y != 9].float().mean().item()])

def test_metrics_of_any_name():
    "fastai's accuracy is what a report computes itself; what is only called so, or like a row, or like another metric, is kept"
    def constant(name, value):
        def metric(pred, y): return torch.tensor(value)
        metric.__name__ = name
        return metric
    mine = [('accuracy', .125), ('parameters', 7.), ('loss', 3.), ('f1_score', .25), ('f1_score', .5), ('f1_score', .75)]
    student = learner(metrics=[accuracy, *[constant(*o) for o in mine]])
    table = report(student, trained_teacher(), n_runs=0).table
    assert table.index[3:9].tolist() == ['accuracy', 'parameters#2', 'loss#2', 'f1_score', 'f1_score#2', 'f1_score#3']
    assert table.student[3:9].tolist() == table.teacher[3:9].tolist() == [value for _, value in mine]
    assert table.student['parameters'] == sum(p.numel() for p in student.model.parameters())
    expected = by_hand(student.model, trained_teacher(), student.dls.valid)
    for name in ('accuracy, %', 'loss'): assert close(table.loc[name].tolist()[:2], expected[name])

class Keeping(nn.Module):
    "A model that remembers its last input, and how many there were"
    def __init__(self, model):
        super().__init__()
        self.model, self.n = model, 0

    def forward(self, x):
        self.last, self.n = x, self.n + 1
        return self.model(x)

def test_batches_are_made_from_the_first_one():
    "The last batch of a loader may be a small one"
    student, dl = learner(Keeping(seeded(convnet, 4))), loaders(digits()[:29], bs=25).valid
    report(student, trained_teacher(), dl=dl, batch_sizes=30, n_runs=1)
    first = next(iter(dl))[0]
    assert torch.equal(student.model.last, torch.cat([first, first[:5]]))

def test_vocab_and_statistics_of_the_teacher():
    "A teacher with its classes in another order and images in another scale says the same"
    vocab, stats = 'jihgfedcba', ([.2], [.5])
    teacher, model = named_learner(seeded(convnet, 8, seed=2), vocab, stats), seeded(convnet, 4)
    student = named_learner(model)
    with pytest.warns(UserWarning, match='another order|other statistics'): found = report(student, teacher, n_runs=0)
    x, y = student.dls.valid.one_batch()
    z = teacher.model.eval()((x - .2)/.5).flip(1)
    assert close(found.table.teacher['accuracy, %'], 100*(z.argmax(1) == y).float().mean().item())
    assert found.classes.index.tolist() == list('abcdefghij')
    top = found.disagreements(3)
    assert top.label.tolist() == [student.dls.vocab[int(y[i])] for i in top.index]
    assert top.kl.is_monotonic_decreasing and len(top) == 3

def test_nothing_changes(tmp_path):
    "Modes, hooks, random states, threads, the recorder, the loader's shuffling, other callbacks, and what the learner saves"
    student, teacher = learner(cbs=SaveModelCallback(), path=tmp_path), taught()
    student.add_cb(ProgressCallback())
    with student.no_bar(): fitted(student, KnowledgeDistillationCallback(teacher.model, SoftTarget(T=2)))
    student.model[0].train(), teacher.model.train(), student.model.block2.eval()
    (tmp_path/'models'/'model.pth').unlink()
    values, metrics, cbs = copy.deepcopy(student.recorder.values), list(student.metrics), {id(cb) for cb in student.cbs}
    before, rng = [state(o.model) for o in (student, teacher)], student.dls.train.rng.getstate()
    states, n_threads = (random.getstate(), torch.get_rng_state()), torch.get_num_threads()
    report(student, teacher, dl=student.dls.train, batch_sizes=(1, 2), n_threads=(1, 2), n_runs=2)
    assert all(is_unchanged(o.model, was) for o, was in zip((student, teacher), before))
    assert n_hooks(student.model) == n_hooks(teacher.model) == 0 and torch.get_num_threads() == n_threads
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1]) and student.dls.train.rng.getstate() == rng
    assert student.recorder.values == values and list(student.metrics) == metrics and {id(cb) for cb in student.cbs} == cbs
    assert not (tmp_path/'models'/'model.pth').exists() and torch.backends.mha.get_fastpath_enabled()

@pytest.mark.parametrize('exc', [None, RuntimeError])
def test_the_last_fit_is_remembered(tmp_path, exc):
    "What learner, recorder and metrics hold, and the order of callbacks: a CSVLogger after the bar writes the next fit's lines, too"
    student, teacher = learner(path=tmp_path).add_cbs([ProgressCallback(), CSVLogger()]), Keeping(trained_teacher())
    with student.no_mbar(): student.fit(1)
    cbs, known, held = [*student.cbs], {**vars(student)}, lambda: [o.value for o in (student.recorder.loss, *student.metrics)]
    values, rng = held(), student.dls.train.rng
    if exc is not None: teacher.forward = raising(exc)
    with nullcontext() if exc is None else pytest.raises(exc): report(student, teacher, dl=student.dls.train, n_runs=0)
    assert student.dls.train.rng is rng and student.progress.run and held() == values
    assert [*map(id, student.cbs)] == [*map(id, cbs)]
    assert vars(student).keys() == known.keys() and all(value is known[name] for name, value in vars(student).items())
    with student.no_mbar(): student.fit(1)
    assert len((tmp_path/'history.csv').read_text().splitlines()) == 2

def test_nothing_stays_after_an_error():
    student, teacher = learner(), trained_teacher()
    student.metrics = L(student.metrics) + L(learner(metrics=raising(RuntimeError)).metrics)
    before, cbs = state(teacher), [*student.cbs]
    with pytest.raises(RuntimeError, match='on purpose'): report(student, teacher)
    assert is_unchanged(teacher, before) and {*map(id, student.cbs)} == {*map(id, cbs)} and student.model.training

def test_shuffled_loaders_find_the_same_samples():
    student, teacher = learner(), trained_teacher()
    ordered = report(student, teacher, dl=student.dls.train.new(shuffle=False), n_runs=0).kl
    assert close(report(student, teacher, dl=student.dls.train, n_runs=0).kl.tolist(), ordered.tolist())

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(3, 10)

    def forward(self, x, z): return dict(logits=self.a(x.flatten(1)) + self.b(z))

def test_several_inputs():
    torch.manual_seed(0)
    items = [(x, torch.randn(3), y) for x, y in digits()[:20]]
    dls = loaders(items, bs=10)
    dls.n_inp = 2
    student = quiet(Learner(dls, Two(), lambda pred, y: F.cross_entropy(getattr(pred, 'get', lambda k: pred)('logits'), y)))
    found = report(student, Two(), batch_sizes=(1, 30), n_runs=1)
    assert found.table.student['MACs per sample'] == 670 and found.table.student['agreement, %'] >= 0
    assert sum('latency' in name for name in found.table.index) == 4

def test_a_loss_that_reads_the_whole_output():
    "Of the teacher, only a prediction is known: its loss stays empty, and agreement is told"
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = convnet(4)
        def forward(self, x): return dict(logits=self.model(x))

    student = learner(Named(), loss_func=lambda out, y: F.cross_entropy(out['logits'], y), metrics=None)
    found = report(student, trained_teacher(), n_runs=0)
    assert found.table.loc['loss'].isna().tolist() == [False, True, True] and found.table.student['agreement, %'] >= 0
    assert "nothing of the teacher's by loss and metrics" in repr(found)

def test_all_loaders_at_once():
    student = learner()
    with pytest.raises(TypeError, match='dl=dls.valid, and not dls'): report(student, trained_teacher(), student.dls)

def test_a_cache_is_reported_as_its_teacher():
    student, teacher = learner(), trained_teacher()
    cached, expected = (report(student, o, n_runs=0).table for o in (CachedTeacher(teacher), teacher))
    assert cached.equals(expected)

@pytest.mark.parametrize('target,func', [(torch.randn(8, 1), MSELossFlat()), (torch.randint(2, (8, 4)).float(), BCEWithLogitsLossFlat())])
def test_without_classes(target, func):
    "Single outputs, and classes that can coexist"
    dls = loaders(list(zip(torch.randn(8, 3), target)), bs=4)
    student, n = quiet(Learner(dls, nn.Linear(3, target.shape[1]), func, metrics=mae)), target.shape[1]
    found = report(student, nn.Linear(3, n), n_runs=0)
    assert 'no agreement' in repr(found) and 'no agreement' in found._repr_html_() and found.classes is None
    assert {'loss', 'mae'} <= {*found.table.index} and 'agreement, %' not in found.table.index
    for ask in (found.disagreements, found.plot_disagreements):
        with pytest.raises(ValueError, match='no agreement'): ask()

@pytest.mark.parametrize('name,gmacs,params', [('resnet18', 1.814, 11.69), ('mobilenet_v2', .300, 3.50)])
def test_published_costs(name, gmacs, params):
    import torchvision
    model = getattr(torchvision.models, name)()
    assert macs(model, torch.randn(1, 3, 224, 224))/1e9 == pytest.approx(gmacs, rel=.01)
    assert sum(p.numel() for p in model.parameters())/1e6 == pytest.approx(params, rel=.01)

def test_recurrent_costs():
    "Of a fused LSTM torch's counter sees nothing; oneDNN is on again afterwards"
    lstm, x, before = nn.LSTM(16, 32), torch.randn(10, 1, 16), torch.backends.mkldnn.enabled
    assert macs(lstm, x) == 10*4*32*(16 + 32) and peak_bytes(lstm, x) > 10*32*4
    assert torch.backends.mkldnn.enabled == before

def test_costs_by_hand(tmp_path):
    "Sizes of files, activations alive at a time, and transformers that torch would run as one operation"
    model = seeded(convnet, 4)
    torch.save(model.state_dict(), tmp_path/'model.pth')
    assert file_bytes(model) == pytest.approx((tmp_path/'model.pth').stat().st_size, rel=.03) # the file's name stands in the file
    torch.save(model.state_dict(), buffer := BytesIO())
    assert file_bytes(model) == len(buffer.getvalue())
    wide = nn.Sequential(nn.Linear(8, 100, bias=False), nn.Linear(100, 8, bias=False), nn.Linear(8, 100, bias=False))
    assert peak_bytes(wide, torch.randn(5, 8)) == 5*108*4
    assert peak_bytes(nn.Sequential(nn.Linear(8, 100), nn.ReLU(inplace=True)), torch.randn(5, 8)) == 5*100*4
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert macs(layer, torch.randn(1, 6, 16)) == 6*16*(3*16 + 16 + 2*32) + 2*6*6*16

def test_turns_and_threads():
    "Each is called as often, in turns; threads are those asked for, and given back after an error"
    calls = []
    taken = latencies({name: lambda name=name: calls.append((name, torch.get_num_threads())) for name in 'ab'}, 4)
    assert [name for name, _ in calls] == list('ab'*7) and [len(o) for o in taken.values()] == [4, 4]
    fast = dict.fromkeys('ab', int)
    assert [len(o) for o in latencies(fast).values()] == [100, 100]
    assert [len(o) for o in latencies(fast, seconds=0).values()] == [30, 30]
    with pytest.raises(KeyError), threads(2): raise KeyError(torch.get_num_threads())
    assert torch.get_num_threads() == 1

def test_plot():
    found = report(learner(), trained_teacher(), batch_sizes=2, n_runs=2)
    ax = found.plot()
    assert len(ax.patches) == (found.table['student/teacher'] > 0).sum() and ax.get_xscale() == 'log'
    assert [bar.get_width() + 1 for bar in ax.patches] == pytest.approx(found.table['student/teacher'].dropna().tolist())
    assert len(found.plot('parameters').patches) == 1
    rows = ['accuracy, %', 'parameters', 'peak of activations, bytes (bs 2)']
    better = [bar.get_facecolor() == to_rgba('tab:blue') for bar in found.plot(rows).patches]
    assert better == [False, True, True], 'a student that is worse and smaller'

def test_colours_of_other_metrics():
    "Grey where nobody knows the direction, and the right way round below 0"
    def sharpness(pred, y): return pred.std()
    def r2(pred, y): return -pred.std()
    found = report(learner(metrics=[sharpness, r2]), trained_teacher(), batch_sizes=2, n_runs=0)
    grey, low = found.plot(['sharpness', 'r2']).patches
    student, teacher = found.table.loc['r2', ['student', 'teacher']]
    assert grey.get_facecolor() == to_rgba('grey') and student < 0 > teacher
    assert low.get_facecolor() == to_rgba('tab:blue' if student > teacher else 'tab:orange')

def test_what_can_be_drawn():
    found = report(learner(), trained_teacher(), batch_sizes=2, n_runs=2)
    assert math.isnan(found.table['student/teacher']['latency p95, ms (bs 2, CPU threads: 1)'])
    for row in ('agreement, %', 'agreement'):
        with pytest.raises(ValueError, match=f"'{row}' is no row with a ratio above 0; those are accuracy, %, "): found.plot(['loss', row])
    ms = found.table.loc['latency p50, ms (bs 2, CPU threads: 1)'].student
    assert close(found.table.loc['throughput, samples/s (bs 2, CPU threads: 1)'].student, 2000/ms)

def test_errors():
    with pytest.raises(TypeError, match='learners, or one of them'): report(convnet(4), convnet(4))
    with pytest.raises(TypeError, match='a Learner, a module or Frozen'): report(learner(), 'teacher')
    with pytest.raises(ValueError, match='other shapes'): report(learner(), convnet(4, n_out=7))
    dl = learner().dls.valid.new(bs=50, drop_last=True)
    with pytest.raises(ValueError, match='the loader has no batch'): report(learner(), convnet(4), dl=dl)
    loaded = learner()
    loaded.dls.loaders = [dl.new([]) for dl in loaded.dls.loaders]
    with pytest.raises(ValueError, match='the learner was loaded, and has no data: report'): report(loaded, convnet(4))

@pytest.mark.parametrize('name,value', [('batch_sizes', ()), ('batch_sizes', None), ('batch_sizes', 0), ('batch_sizes', (1, 2.5)),
    ('n_runs', -1), ('n_threads', 0), ('n_threads', ())])
def test_numbers_that_make_no_sense(name, value):
    "Are refused before anything runs"
    student, seen = learner(), []
    student.add_cb(At('before_batch', seen.append, nth=0))
    with pytest.raises(ValueError, match=f'{name}: whole numbers of at least'): report(student, convnet(4), **{name: value})
    assert not seen

def test_repeated_numbers_are_measured_once():
    once, again = Keeping(convnet(4)), Keeping(convnet(4))
    report(learner(), once, batch_sizes=2, n_threads=1, n_runs=1)
    found = report(learner(), again, batch_sizes=[2, 2], n_threads=[1, 1], n_runs=1)
    assert again.n == once.n > 0
    for k in (0, -1):
        with pytest.raises(ValueError, match='k: whole numbers of at least 1'): found.disagreements(k)

def test_torchmetrics_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'torchmetrics.classification', None)
    with pytest.raises(ImportError, match=r'pip install "fastkd\[report\]"'): report(learner(), convnet(4))

# ---- Agreement by epoch

def test_agreement_by_epoch():
    "The columns are means over the validation set, go after the fit, and change nothing of the training"
    plain, teacher = fitted(learner()), trained_teacher()
    agreement, before = AgreementCallback(teacher), state(teacher)
    learn = fitted(learner(), agreement)
    assert same(weights(learn.model), weights(plain.model)) and is_unchanged(teacher, before)
    expected = by_hand(learn.model, teacher, learn.dls.valid)
    assert close(agreement.history['teacher_kl'][-1], expected['KL from the teacher, nats'][0])
    assert close(100*agreement.history['teacher_agreement'][-1], expected['agreement, %'][0])
    assert learn.metrics.attrgot('name') == ['accuracy'] and [len(o) for o in learn.recorder.values] == [5, 5]
    assert learn.recorder.metric_names[4:6] == ['teacher_kl', 'teacher_agreement']
    assert len(learn.validate()) == 2
    assert len(agreement.plot()) == 2

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
def test_agreement_leaves_after_an_interrupt(exc):
    learn, agreement = learner(), AgreementCallback(trained_teacher())
    with pytest.raises(exc): learn.fit(1, cbs=[agreement, At('after_pred', raising(exc), nth=2)])
    assert learn.metrics.attrgot('name') == ['accuracy']
    assert learn.fit(1, cbs=agreement) is None and len(agreement.history['teacher_kl']) == 1

def test_agreement_stays_behind_when_exported(tmp_path):
    learn = learner(cbs=AgreementCallback(trained_teacher()), path=tmp_path)
    learn.fit(1)
    copied = copy.deepcopy(learn)
    assert copied.agreement.teacher is None and len(copied.agreement.history['teacher_kl']) == 1
    copied.fit(1)
    assert len(copied.recorder.values[0]) == 3

def test_agreement_of_learners_with_other_orders():
    teacher = named_learner(seeded(convnet, 8, seed=2), 'jihgfedcba')
    agreement, student = AgreementCallback(teacher), named_learner(seeded(convnet, 4))
    with pytest.warns(UserWarning, match='another order'): student.fit(1, cbs=agreement)
    x, _ = student.dls.valid.one_batch()
    z_s, z_t = student.model.eval()(x), teacher.model.eval()(x).flip(1)
    assert close(agreement.history['teacher_agreement'], [(z_s.argmax(1) == z_t.argmax(1)).float().mean().item()])

def test_agreement_is_refused_before_training():
    "Models of other classes, and teachers that a validation cannot ask"
    said = error_of(ValueError, learner(), AgreementCallback(convnet(4, n_out=7)))
    assert 'student and teacher predict other shapes, (1, 10) and (1, 7)' in said
    assert 'asks for index' in error_of(ValueError, learner(), AgreementCallback(StoredTeacher(torch.zeros(100, 10))))

# ---- Activations

def test_activations_are_drawn():
    "The maps are those of the layers, scaled to length 1, beside the inputs"
    student, teacher, x = seeded(convnet, 4), trained_teacher(), torch.stack([x for x, _ in digits()[:3]])
    before = state(student)
    axs = plot_activations(student, learner(teacher), x, ['block1', 'block2'], ['block1', 'block2'], n=2)
    assert axs.shape == (2, 5) and is_unchanged(student, before) and n_hooks(student) == n_hooks(teacher) == 0
    shown = torch.tensor(axs[1, 1].images[0].get_array())
    hidden = student.eval().block1(x[1:2]).pow(2).mean(1)
    assert close(shown.flatten().tolist(), F.normalize(hidden.flatten(1)).flatten().tolist())
    for layers, said in ((['block1'], 'name pairs'), (['head.3', 'block1'], 'vectors'), (['blok1', 'block2'], 'block1')):
        with pytest.raises(ValueError, match=said): plot_activations(student, teacher, x, layers, ['block1', 'block2'])

def test_activations_of_a_teacher_with_other_statistics():
    "A learner as teacher gets its own scale, as in training; a layer in two pairs is drawn twice"
    teacher, student = named_learner(seeded(convnet, 8), stats=([.2], [.5])), named_learner(seeded(convnet, 4))
    x, _ = student.dls.valid.one_batch()
    with pytest.warns(UserWarning, match='other statistics'):
        axs = plot_activations(student, teacher, x, ['block1', 'block1'], ['block1', 'block2'], n=2)
    assert axs.shape == (2, 5)
    shown = lambda i: torch.tensor(axs[1, i].images[0].get_array())
    hidden = teacher.model.eval().block1((x[1:2].as_subclass(torch.Tensor) - .2)/.5).pow(2).mean(1)
    assert close(shown(2).flatten().tolist(), F.normalize(hidden.flatten(1)).flatten().tolist())
    assert torch.equal(shown(1), shown(3)) and shown(4).shape == (4, 4)
    assert [ax.get_title() for ax in axs[0, 1:]] == ['student: block1', 'teacher: block1', 'student: block1', 'teacher: block2']

@pytest.mark.parametrize('n,n_samples', [(0, 3), (-1, 3), (2, 0)])
def test_no_sample_to_draw(n, n_samples):
    with pytest.raises(ValueError, match=f'nothing to show: n is at least 1, not {n}, and xb has {n_samples} sample'):
        plot_activations(convnet(4), convnet(4), torch.zeros(n_samples, 1, 8, 8), 'block1', 'block1', n=n)

# ---- Samples by their place, and what is given back

def test_positions_where_a_loader_drops_and_shuffles():
    "The samples that are named are those of the dataset, and are not named where nobody knows"
    data, teacher = digits()[:110], trained_teacher()
    dls = DataLoaders.from_dsets(data, data, bs=25, num_workers=0, device='cpu')
    learn = quiet(Learner(dls, seeded(convnet, 4), CrossEntropyLossFlat(), metrics=accuracy))
    found = report(learn, teacher, dls.train, n_runs=0)
    shown = found.disagreements(5)
    assert [data[i][1].item() for i in shown.index] == shown['label'].tolist()
    whole = report(learn, teacher, n_runs=0).disagreements(110)['kl']
    assert shown['kl'].tolist() == pytest.approx(whole[shown.index].tolist(), rel=1e-4)
    with pytest.raises(ValueError, match='fastai cannot show single samples'): found.plot_disagreements(2) # not all of them are there
    theirs = torch.utils.data.DataLoader([*data], 25, shuffle=True, generator=(drawn := torch.Generator().manual_seed(1)))
    before = drawn.get_state()
    found = report(learn, teacher, theirs, n_runs=0)
    assert drawn.get_state().equal(before)
    with pytest.raises(ValueError, match='does not tell which samples'): found.disagreements(5)

def test_ignored_labels_disagree_on_nothing():
    data = [(x, y if i % 2 else torch.tensor(-100)) for i, (x, y) in enumerate(digits()[:20])]
    learn = quiet(Learner(loaders(data, bs=10), seeded(convnet, 4), CrossEntropyLossFlat()))
    assert len(report(learn, trained_teacher(), n_runs=0).disagreements(15)) == sum(len(y) for _, y in learn.dls.valid)/2

def test_calibration_by_hand():
    "Where confidence is exactly 1, too"
    sure = torch.cat([torch.full((100,), .95), torch.ones(100)])
    right = torch.cat([torch.ones(100), (torch.arange(100) < 90).float()]).bool()
    pred, target = torch.stack([sure, 1 - sure], 1).log().clamp(min=-1e4), (~right).long()
    same = nn.Linear(2, 2)
    same.weight.data, same.bias.data = torch.eye(2), torch.zeros(2)
    learn = quiet(Learner(loaders([*zip(pred, target)], bs=50), same, CrossEntropyLossFlat()))
    dl = learn.dls.valid.new(dataset=[*zip(pred, target)])
    found = report(learn, copy.deepcopy(same), dl, n_runs=0).table.loc['calibration error, %', 'student']
    bins, by_hand = (sure*15).ceil(), 0.
    for i in bins.unique():
        inside = bins == i
        by_hand += inside.float().mean().item()*abs(sure[inside].mean() - right[inside].float().mean()).item()
    assert found == pytest.approx(100*by_hand, abs=1e-3)

class Remembers(Callback):
    def before_fit(self): self.losses = []
    def after_batch(self): self.losses.append(self.loss.item())

def test_callbacks_keep_what_they_hold():
    learn = learner(convnet(4), cbs=Remembers())
    learn.fit(1, 1e-2)
    before = [*learn.remembers.losses]
    report(learn, trained_teacher(), n_runs=0)
    assert learn.remembers.losses == before != []
