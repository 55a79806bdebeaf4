"What the losses learn: that they learn, that it can be saved, and that files of the learner know nothing of it."
import io, pytest, torch
from fastkd.all import *
from helpers import At, OnCPU, convnet, fitted, learner, named_learner, raising, same, seeded, slow, trained_teacher, weights
from learning import each_kind, fitnet, learned, two_kinds, with_banks, with_masks, with_queue
from fastai.basics import CancelStepException, SGD
from fastai.callback.training import GradientClip
from functools import partial

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

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
@pytest.mark.parametrize('save', [slow(in_memory), through_a_file])
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

@two_kinds
def test_export_in_between_changes_nothing(make, tmp_path):
    "fastai makes a new optimizer with the old state; the learned parts keep theirs, too"
    plain, exported = [(named_learner(seeded(convnet, 4), path=tmp_path), make()) for _ in range(2)]
    for learn, cb in plain, exported: fitted(learn, cb)
    exported[0].export()
    for learn, cb in plain, exported: fitted(learn, cb, seed=2)
    assert same(weights(plain[0].model), weights(exported[0].model)) and same(learned(plain[1]), learned(exported[1]))

# ---- Another student, another state

@pytest.mark.parametrize('make', [fitnet, with_banks, with_queue, with_masks])
def test_another_student_begins_anew(make):
    "A loop over seeds with one callback trains what a loop with new ones trains"
    cb = make()
    fitted(learner(), cb, n_epoch=1)
    found, expected = learner(seeded(convnet, 4, seed=5)), learner(seeded(convnet, 4, seed=5))
    fitted(found, cb, n_epoch=1)
    fitted(expected, make(), n_epoch=1)
    assert same(weights(found.model), weights(expected.model))

def test_a_state_of_other_layers():
    "Is an error in every fit, not in the first one only"
    cb, other = fitnet(), KD(trained_teacher(), SoftTarget() + 10*FitNet().on(['block1', 'block1'], ['block2', 'block2']))
    fitted(learner(), other, n_epoch=1)
    cb.load_state_dict(other.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match='was learned by other losses or layers than those of'): learner().fit(1, cbs=cb)

def test_loading_in_the_middle_of_a_fit():
    "Counts from the next batch on, and adapters go on learning"
    cb, moved = fitnet(), []
    fitted(learner(), cb, n_epoch=1)
    state, last = cb.state_dict(), {}
    def note(learn):
        now = {name: p.detach().clone() for name, p in cb.loss.named_parameters()}
        moved.append(last and not same(now, last))
        last.update(now)
    learn = learner()
    learn.fit(1, cbs=[cb, At('before_batch', lambda learn: cb.load_state_dict(state), 0, 3), At('after_step', note, 99, 0)])
    assert all(moved[1:]) and len(moved) == 4

def test_lr_find_that_dies_before_the_first_batch(tmp_path):
    "With a state that was loaded before"
    cb = fitnet()
    fitted(learner(), cb, n_epoch=1)
    fresh, learn = fitnet(), learner(path=tmp_path)
    fresh.load_state_dict(cb.state_dict())
    learn.add_cbs([fresh, At('before_train', raising(KeyboardInterrupt))])
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=4, show_plot=False)
    learn.validate()
    learn.fit(1)
    assert learn.recorder.distillation['distillation_loss']
