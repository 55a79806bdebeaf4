"What the losses learn: that they learn, that it can be saved, and that files of the learner know nothing of it."
import copy, io, pickle, pytest, torch
from fastai.basics import CancelStepException, SGD, load_learner, params
from fastai.callback.training import GradientClip
from fastkd.all import *
from fastkd.losses.core import Loss
from functools import partial
from helpers import At, OnCPU, convnet, fitted, learner, named_learner, quiet, raising, same, seeded, trained_teacher, weights
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

def fitnet(): return KD(trained_teacher(), SoftTarget() + 10*FitNet().on(['block1', 'block2'], ['block2', 'block2']), task_weight=1.)

class Projected(Loss):
    "A loss of a user's, with parameters from the start and numbers that it remembers"
    def __init__(self):
        super().__init__()
        self.map, self.seen = nn.Linear(10, 10), nn.BatchNorm1d(10, affine=False)

    def forward(self, pred, teacher_pred): return (self.seen(self.map(pred)) - teacher_pred).pow(2).mean()

def projected(): return KD(trained_teacher(), seeded(Projected))

def with_banks(): return KD(trained_teacher(), CRD(dim=4, negatives=8, form='nce'), 'block2', 'block2', task_weight=1.)
def with_queue(): return KD(trained_teacher(), CRD(dim=4, negatives=40), 'block2', 'block2', task_weight=1.)
def with_masks(): return KD(trained_teacher(), MaskedGenerative(), 'block2', 'block2', weight=1e-3, task_weight=1.)

each_kind = pytest.mark.parametrize('make', [fitnet, projected, with_banks, with_queue, with_masks])

def learned(cb):
    "Everything in `cb.state_dict()` as a flat dict of tensors"
    state, found = cb.state_dict(), {}
    def flatten(prefix, o):
        if isinstance(o, dict): o = o.items()
        elif isinstance(o, (list, tuple)): o = enumerate(o)
        else:
            found[prefix] = torch.as_tensor(o)
            return
        for key, value in o: flatten(f'{prefix}.{key}', value)
    flatten('', {key: value for key, value in state.items() if value is not None})
    return found

# ---- Learning

def test_adapter_learns():
    "Between other widths and other resolutions: 8 channels of 4×4 and 16 of 8×8"
    cb, learn = KD(trained_teacher(), FitNet(), 'block2', 'block1', weight=10., task_weight=1.), learner(n=400)
    learn.fit_one_cycle(4, 2e-2, cbs=cb)
    assert [tuple(p.shape) for p in cb.loss.parameters()] == [(16, 8, 1, 1), (16,)]
    values = torch.tensor(learn.recorder.distillation['distillation_loss'])
    assert values[-8:].mean() < values[:4].mean()/2

def test_adapter_alone_learns():
    "With the student frozen by a learning rate of 0 for its groups, only the adapter can lower the loss: it follows the last group"
    cb, learn = KD(trained_teacher(), FitNet(), 'block2', 'block2', weight=1.), learner(n=200)
    before = weights(learn.model.block2)
    for p in learn.model.parameters(): p.requires_grad_(False)
    learn.model.head[3].bias.requires_grad_(True) # a loss needs something to differentiate
    fitted(learn, cb, n_epoch=4, lr=2e-2)
    values = learn.recorder.distillation['distillation_loss']
    assert values[-1] < .8*values[0]
    assert torch.equal(before['0.weight'], learn.model.block2[0].weight)

def test_adapter_follows_the_schedules_of_the_student():
    "Learning rate and momentum of its last group, which `fit_one_cycle` gives as numbers of numpy"
    seen, cb, learn = [], fitnet(), learner(splitter=lambda model: [params(model[:1]), params(model[1:])])
    def note(learn): seen.append([(o.hypers[-1]['lr'], o.hypers[-1]['mom']) for o in (cb._learned.opt, learn.opt)])
    learn.fit_one_cycle(2, slice(1e-3, 1e-2), cbs=[cb, At('after_step', note, 6, 0)])
    assert len(seen) == 8 and all(own == last for own, last in seen) and len({lr for (lr, _), _ in seen}) == 8
    assert {type(o) for o in cb.state_dict()['opt']['hypers'][0].values()} <= {float, bool, int}

def test_adapters_depend_on_the_seed_only():
    "And not on what was drawn before; two seeds give two adapters"
    def weight(seed, draws):
        cb, learn = fitnet(), learner()
        torch.manual_seed(seed)
        torch.rand(draws)
        learn.fit(1, 0., cbs=cb)
        return next(cb.loss.parameters()).detach()
    assert torch.equal(weight(1, 0), weight(1, 7)) and not torch.equal(weight(1, 0), weight(2, 0))

def test_nothing_of_it_is_in_the_student():
    "Neither parameters nor groups of the optimizer"
    learn = learner(cbs=fitnet())
    fitted(learn)
    assert weights(learn.model).keys() == weights(convnet(4)).keys()
    assert [len(group) for group in learn.opt.param_lists] == [len(list(learn.model.parameters()))]

# ---- With the student's steps

def numbers(cb): return {name: p.detach().clone() for name, p in cb.loss.named_parameters()}

def test_a_cancelled_step_is_no_step():
    "A step that another callback cancels for the student is none of the adapters, and its gradient is not added to the next"
    def run(*cbs):
        cb, learn, seen = fitnet(), learner(opt_func=partial(SGD, mom=0.)), []
        note = At('before_backward', lambda learn: seen.append((numbers(cb), weights(learn.model)['head.3.weight'])), nth=0)
        fitted(learn, [cb, note, *cbs], n_epoch=1)
        return seen
    steps = run(At('before_step', raising(CancelStepException), nth=2))
    assert [same(a[0], b[0]) for a, b in zip(steps, steps[1:])] == [False, True, False]
    assert [torch.equal(a[1], b[1]) for a, b in zip(steps, steps[1:])] == [False, True, False]

def test_gradients_start_anew():
    "With each step, and after one that was cancelled"
    cb, learn, sizes = fitnet(), learner(), []
    def look(learn): sizes.append(max(0 if p.grad is None else p.grad.abs().max().item() for p in cb.loss.parameters()))
    looks = [At(name, look, 99, 0) for name in ('before_backward', 'after_backward')]
    fitted(learn, [cb, *looks, At('before_step', raising(CancelStepException), nth=2)], n_epoch=1)
    assert sizes[::2] == [0]*4 and all(size > 0 for size in sizes[1::2])

def test_clip_in_half_precision():
    "The limit holds for gradients as they are, not for those that the scaler made large"
    cb, learn, steps = fitnet(), learner(opt_func=partial(SGD, mom=0.), wd=0.), []
    note = lambda name: At(name, lambda learn: steps.append(numbers(cb)), 99, 0)
    learn.fit(1, 1., cbs=[cb, OnCPU(init_scale=1024.), GradientClip(.01), note('before_step'), note('after_step')])
    assert len(steps) == 8
    for before, after in zip(steps[::2], steps[1::2]):
        assert sum((after[name] - before[name]).pow(2).sum() for name in after)**.5 == pytest.approx(.01, rel=1e-2)

def test_scaler_of_an_interrupted_fit():
    "fastai leaves it on the learner: a later fit in full precision has nothing to do with it"
    def run(*first):
        cb, learn = fitnet(), learner(opt_func=SGD)
        for cbs in first:
            with pytest.raises(KeyboardInterrupt): learn.fit(1, 0., cbs=[*cbs, KD(trained_teacher(), SoftTarget)])
        learn.model, learn.opt = seeded(convnet, 4), None # batch norm has seen a batch, and gradients are there
        fitted(learn, cb)
        assert hasattr(learn, 'scaler') == (len(first) > 0)
        return weights(learn.model) | numbers(cb)
    expected = run()
    for name in 'before_batch', 'after_step': assert same(run([OnCPU(), At(name, raising(KeyboardInterrupt), order=9)]), expected)

# ---- Saving

def in_memory(cb): return cb.state_dict()

def through_a_file(cb):
    "As a user saves it; the file is plain enough for torch's safe loader"
    file = io.BytesIO()
    torch.save(cb.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)

@each_kind
@pytest.mark.parametrize('save', [in_memory, through_a_file])
def test_resume(make, save, tmp_path):
    "Two fits in one place, and two fits in two places, are the same"
    whole, cb_whole = learner(path=tmp_path), make()
    for seed in 1, 2: fitted(whole, cb_whole, seed=seed)
    first, cb_first = learner(path=tmp_path), make()
    fitted(first, cb_first, seed=1)
    state = save(cb_first)
    first.save('student')
    fitted(first, cb_first, seed=5) # what was saved is a copy
    second, cb_second = learner(seeded(convnet, 4, seed=9), path=tmp_path), make()
    second.load('student')
    cb_second.load_state_dict(state)
    fitted(second, cb_second, seed=2)
    assert same(weights(second.model), weights(whole.model))
    assert same(learned(cb_second), learned(cb_whole))
    assert second.recorder.values == whole.recorder.values

@each_kind
def test_state_before_and_after_loading(make):
    "What was loaded is what is saved, before the next fit as after it begins"
    cb = make()
    fitted(learner(), cb)
    other = make()
    other.load_state_dict(cb.state_dict())
    assert same(learned(other), learned(cb))
    other.learn = None
    assert same(learned(other), learned(cb))

def test_resume_of_a_span():
    "A schedule goes on where it was"
    def make(): return KD(trained_teacher(), SoftTarget, schedule=lin, span=4)
    cb, other, learn = make(), make(), learner()
    fitted(learn, cb)
    other.load_state_dict(cb.state_dict())
    fitted(learn, other)
    assert learn.recorder.distillation['weight'] == pytest.approx([.5*(8 + i)/16 for i in range(8)])

@each_kind
def test_a_second_fit_goes_on(make):
    "The optimizer of the learned parts keeps its averages from fit to fit, as that of the learner does"
    cb, learn = make(), learner()
    fitted(learn, cb)
    opt = cb._learned.opt
    fitted(learn, cb, seed=2)
    assert cb._learned.opt is opt
    learn.fit(1, cbs=cb, reset_opt=True)
    assert cb._learned.opt is not opt

@each_kind
def test_export_in_between_changes_nothing(make, tmp_path):
    "fastai makes a new optimizer with the old state; the learned parts keep theirs, too"
    plain, exported = [(named_learner(seeded(convnet, 4), path=tmp_path), make()) for _ in range(2)]
    for learn, cb in plain, exported: fitted(learn, cb)
    exported[0].export()
    for learn, cb in plain, exported: fitted(learn, cb, seed=2)
    assert same(weights(plain[0].model), weights(exported[0].model)) and same(learned(plain[1]), learned(exported[1]))

# ---- lr_find

@each_kind
@pytest.mark.parametrize('n_fits', [0, 1], ids=['first', 'later'])
def test_lr_find(make, n_fits, tmp_path):
    "Leaves adapters, their optimizer and the numbers of the following fit as they were"
    plain, found = [(learner(path=tmp_path), make()) for _ in range(2)]
    for learn, cb in plain, found:
        learn.create_opt()
        learn.add_cb(cb)
        for i in range(n_fits): fitted(learn, seed=5 + i)
    before = learned(found[1])
    found[0].lr_find(num_it=8, show_plot=False)
    assert same(learned(found[1]), before)
    for learn, cb in plain, found: fitted(learn)
    assert same(weights(plain[0].model), weights(found[0].model)) and same(learned(plain[1]), learned(found[1]))
    assert plain[0].recorder.values == found[0].recorder.values

@each_kind
def test_lr_find_that_fails(make, tmp_path):
    "Leaves what was learned before as it was, too"
    learn, cb = learner(path=tmp_path), make()
    fitted(learn, cb)
    before = learned(cb)
    learn.add_cbs([cb, At('after_step', raising(KeyboardInterrupt), nth=3)])
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=8, show_plot=False)
    cb.cleanup()
    assert same(learned(cb), before)

def test_lr_find_does_not_use_up_a_schedule(tmp_path):
    cb, learn = KD(trained_teacher(), SoftTarget, schedule=lin, span=2), learner(path=tmp_path)
    learn.add_cb(cb)
    learn.lr_find(num_it=8, show_plot=False)
    weight = fitted(learn, n_epoch=1).recorder.distillation['weight']
    learn.lr_find(num_it=8, show_plot=False)
    weight += fitted(learn, n_epoch=1).recorder.distillation['weight']
    assert weight == pytest.approx([.5*i/8 for i in range(8)])

# ---- Export

def exported(tmp_path, name, *cbs):
    "A learner trained and exported, and the file"
    learn = named_learner(seeded(convnet, 32), cbs=[*cbs], path=tmp_path)
    fitted(learn)
    learn.export(name)
    return learn, tmp_path/name

def test_export_is_as_small_as_without(tmp_path):
    "A fat teacher, adapters and recorded values are not in the file"
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

def test_loaded_learner(tmp_path):
    "It predicts, validates and describes itself, and says what it misses when it is to be trained"
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

@pytest.mark.parametrize('copied', [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))], ids=['deepcopy', 'pickle'])
def test_copied_callback(copied):
    "Keeps its settings, without teacher and learned parts; the original keeps both"
    cb = KD(trained_teacher(), SoftTarget(T=3) + 10*FitNet().on('block2', 'block2'), weight=.7, schedule=cos, span=3)
    learn = learner(cbs=cb)
    other = copied(learn).knowledge_distillation
    fitted(learn)
    again = copied(learn.knowledge_distillation)
    for o in other, again:
        assert o.teacher is None and list(o.loss.parameters()) == []
        assert (repr(o), o.span, o.schedules) == (repr(cb), 3, cb.schedules)
    assert cb.teacher is not None and len(list(cb.loss.parameters())) == 2

def test_files_of_the_learner(tmp_path):
    "`learn.save` writes what it writes without a callback"
    learn, plain = learner(path=tmp_path), learner(path=tmp_path)
    fitted(learn, fitnet())
    fitted(plain)
    one, other = (torch.load(o.save(name), weights_only=False) for o, name in ((learn, 'a'), (plain, 'b')))
    assert one['model'].keys() == other['model'].keys()
    assert [len(o['opt']['state']) for o in (one, other)] == [len(list(convnet(4).parameters()))]*2
    plain.load('a')
    assert same(weights(plain.model), weights(learn.model))
