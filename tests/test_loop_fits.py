"Every way to fit: what a user writes, and that a teacher takes part as it should."
import math, pytest, torch
from fastai.basics import SGD, params
from fastkd.all import *
from helpers import (At, ByHand, attention, by_soft_target, convnet, fitted, furthest, learner, n_hooks, raising, same, seeded, shows,
    slow, soft_target, started, trained_teacher, weights)
from learning import KINDS, adapters, each_kind, fitnet, learned

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

def groups(model): return [params(model[:1]), params(model[1:3]), params(model[3:])]
def student(p=0., **kwargs): return learner(seeded(convnet, 4, p), **kwargs)
def grouped(**kwargs): return student(splitter=groups, **kwargs)
def soft(**kwargs): return KD(trained_teacher(), SoftTarget, **kwargs)

def gap(run, make=grouped):
    "How far a run with the callback ends from the same run with a callback written by hand"
    found, expected = make(), make()
    ours, by_hand = soft(), by_soft_target()
    run(started(found), ours)
    run(started(expected), by_hand)
    assert found.recorder.values and list(found.metrics.attrgot('name')) == ['accuracy'] and n_hooks(found.model) == 0
    for row, other in zip(found.recorder.values, expected.recorder.values): assert list(row[:2]) == pytest.approx(list(other[:2]), abs=1e-5)
    assert found.recorder.lrs == expected.recorder.lrs
    return furthest(weights(found.model), weights(expected.model))

# ---- Fits

@shows('learn.fit(10, cbs=kd)')
def test_fit():
    "Forty steps end where a loop written by hand ends, to six decimals."
    found, expected = student(.3), student(.3)
    fitted(found, KD(trained_teacher(), SoftTarget(T=4), weight=.7), n_epoch=10)
    fitted(expected, ByHand(trained_teacher(), lambda pred, teacher_pred, *fms: soft_target(pred, teacher_pred, 4.), .7), n_epoch=10)
    assert len(found.recorder.losses) == 40
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6
    assert found.recorder.values[-1][1] == pytest.approx(expected.recorder.values[-1][1], abs=1e-6)

@shows('learn.fit_one_cycle(5, 1e-2, cbs=kd)')
def test_fit_one_cycle():
    "The learning rates and the weights are those of a loop written by hand."
    assert gap(lambda learn, cb: learn.fit_one_cycle(2, 1e-2, cbs=cb)) < 1e-6

@shows('learn.fit_one_cycle(5, slice(1e-4, 1e-2), cbs=kd)')
def test_fit_one_cycle_with_slices():
    "Each group of layers has its own learning rate, and adapters follow the last group's rate and momentum."
    assert gap(lambda learn, cb: learn.fit_one_cycle(2, slice(1e-4, 1e-2), cbs=cb)) < 1e-6
    seen, cb, learn = [], fitnet(), grouped()
    def note(learn): seen.append([(o.hypers[-1]['lr'], o.hypers[-1]['mom']) for o in (cb._learned.opt, learn.opt)])
    learn.fit_one_cycle(2, slice(1e-3, 1e-2), cbs=[cb, At('after_step', note, 6, 0)])
    assert len(seen) == 8 and all(own == last for own, last in seen) and len({lr for (lr, _), _ in seen}) == 8
    assert {type(o) for o in cb.state_dict()['opt']['hypers'][0].values()} <= {float, bool, int} # not numbers of numpy

@shows('learn.fit_flat_cos(5, 1e-2, cbs=kd)')
@pytest.mark.parametrize('fit', [lambda learn, cb: learn.fit_flat_cos(2, 1e-2, cbs=cb),
    lambda learn, cb: learn.fit_sgdr(2, 1, 1e-2, cbs=cb)], ids=['flat cos', 'restarts'])
def test_other_schedules(fit):
    "Other schedules of fastai give the weights of a loop written by hand."
    assert gap(fit) < 1e-6

@shows('learn.fine_tune(3, 1e-2, cbs=kd)')
def test_fine_tune():
    "Both phases, the frozen one and the other, give the weights of a loop written by hand."
    assert gap(lambda learn, cb: learn.fine_tune(2, 1e-2, cbs=cb)) < 1e-6

@shows('kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=cos, span=4); learn.fine_tune(3, 1e-2, cbs=kd)')
def test_fine_tune_with_span():
    "A schedule of the weight runs once through both phases, and anew when the same is done again."
    seen, cb = [], soft(weight=.8, schedule=cos, span=4)
    learn = grouped(cbs=cb)
    note = At('after_batch', lambda learn: seen.append(learn.recorder.distillation['weight'][-1]) if learn.training else None, 6, 0)
    for _ in range(2): learn.fine_tune(3, 1e-2, cbs=note)
    curve = [.8*(1 - math.cos(math.pi*i/16))/2 for i in range(16)]
    assert seen == pytest.approx(curve*2)

@shows('learn.freeze(); learn.fit(2, cbs=kd)')
def test_freeze():
    "Frozen layers stay as they are, and an adapter on one of them learns."
    cb, learn = KD(trained_teacher(), SoftTarget() + 10*FitNet().on('block2', 'block2')), grouped(train_bn=False)
    learn.freeze()
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    with pytest.warns(UserWarning, match='No parameter that is trained has a gradient'): fitted(learn, cb)
    moved = {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'head.3.weight', 'head.3.bias'}
    values = learn.recorder.distillation['fit_net_loss']
    assert values[-1] < values[0]

@shows('learn.unfreeze(); learn.fit(2, cbs=kd)')
def test_unfreeze():
    "After a frozen fit the whole student learns again, as in a loop written by hand, and the adapter goes on."
    def run(learn, cb):
        learn.freeze_to(-1)
        learn.fit(1, 1e-2, cbs=cb)
        learn.unfreeze()
        learn.fit(1, 1e-2, cbs=cb)
    assert gap(run) < 1e-6
    cb, learn = fitnet(), grouped()
    learn.freeze_to(-2)
    fitted(learn, cb, n_epoch=1)
    first, opt = weights(learn.model.block1), cb._learned.opt
    learn.unfreeze()
    fitted(learn, cb, n_epoch=1)
    assert cb._learned.opt is opt and not torch.equal(first['0.weight'], learn.model.block1[0].weight)

@shows('learn.fit(5, slice(1e-4, 1e-2), cbs=kd)')
def test_discriminative_learning_rates():
    "With a rate of 0 for the first layers only the others learn from the teacher, each at its own rate."
    assert gap(lambda learn, cb: learn.fit(2, slice(1e-4, 1e-2), cbs=cb)) < 1e-6
    learn = grouped()
    before = weights(learn.model)
    fitted(learn, soft(weight=1.), lr=[0., 0., 1e-2], n_epoch=1)
    moved = {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'head.3.weight', 'head.3.bias'}

# ---- Learning rates

@shows('Learner(dls, student, cbs=kd).lr_find()')
@pytest.mark.parametrize('make,n_fits', [(fitnet, 1), *((make, 0) for make in KINDS), *(slow(make, 1) for make in KINDS[1:])])
def test_lr_find(make, n_fits, tmp_path):
    "Student, adapters, their optimizer and the numbers of the following fit are as they were before it."
    plain, found = [(learner(n=50, path=tmp_path), make()) for _ in range(2)]
    for learn, cb in plain, found:
        learn.create_opt()
        learn.add_cb(cb)
        for i in range(n_fits): fitted(learn, seed=5 + i)
    before, student = learned(found[1]), weights(found[0].model)
    found[0].lr_find(num_it=6, show_plot=False)
    assert same(learned(found[1]), before) and same(weights(found[0].model), student)
    start = adapters(found[1])
    for learn, cb in plain, found: fitted(learn)
    assert same(weights(plain[0].model), weights(found[0].model)) and same(learned(plain[1]), learned(found[1]))
    assert plain[0].recorder.values == found[0].recorder.values
    assert not start or furthest(start, adapters(found[1])) > 1e-4 # what is equal has learned

@each_kind
def test_lr_find_that_fails(make, tmp_path):
    "Leaves what was learned before as it was, too"
    learn, cb = learner(n=50, path=tmp_path), make()
    fitted(learn, cb, n_epoch=1)
    before = learned(cb)
    learn.add_cbs([cb, At('after_step', raising(KeyboardInterrupt), nth=3)])
    with pytest.raises(KeyboardInterrupt): learn.lr_find(num_it=8, show_plot=False)
    cb.cleanup()
    assert same(learned(cb), before)

@shows('kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=lin, span=2); Learner(dls, student, cbs=kd).lr_find()')
def test_lr_find_does_not_use_up_a_schedule(tmp_path):
    "Neither before nor between two fits does it move the schedule that spans them."
    learn = learner(path=tmp_path, cbs=soft(schedule=lin, span=2))
    learn.lr_find(num_it=8, show_plot=False)
    weight = fitted(learn, n_epoch=1).recorder.distillation['weight']
    learn.lr_find(num_it=8, show_plot=False)
    weight += fitted(learn, n_epoch=1).recorder.distillation['weight']
    assert weight == pytest.approx([.5*i/8 for i in range(8)])

# ---- Fit after fit

@shows('learn.fit(1, cbs=kd); learn.fit(1, cbs=kd)')
@each_kind
def test_fit_twice(make):
    "Adapters and the averages of their optimizer go on from fit to fit, as the student's do; `reset_opt=True` resets both."
    cb, learn = make(), learner(n=50)
    fitted(learn, cb)
    opt = cb._learned.opt
    fitted(learn, cb, seed=2)
    assert cb._learned.opt is opt
    learn.fit(1, cbs=cb, reset_opt=True)
    assert cb._learned.opt is not opt

@shows('kd = KnowledgeDistillationCallback(teacher, SoftTarget, schedule=lin); learn.fit(1, cbs=kd); learn.fit(1, cbs=kd)')
def test_schedule_of_each_fit():
    "Without `span` a schedule begins anew with every fit."
    cb = soft(schedule=lin)
    learn = learner(cbs=cb)
    curves = [fitted(learn, n_epoch=1).recorder.distillation['weight'] for _ in range(2)]
    assert curves[0] == curves[1] == pytest.approx([0, .125, .25, .375])

@shows('learn.fit(4, cbs=kd, start_epoch=2)')
def test_start_epoch():
    "Skipped epochs ask no teacher, and schedules begin where those epochs end."
    calls, teacher = [], trained_teacher()
    teacher.register_forward_hook(lambda *args: calls.append(1))
    learn, expected, by_hand = student(), student(), by_soft_target(lambda pct: .5*pct)
    started(learn).fit(4, 1e-2, cbs=KD(teacher, SoftTarget, schedule=lin), start_epoch=2)
    assert len(calls) == 8 + 1 # and the probe
    assert learn.recorder.distillation['weight'] == pytest.approx([.5*(8 + i)/16 for i in range(8)])
    started(expected).fit(4, 1e-2, cbs=by_hand, start_epoch=2)
    assert furthest(weights(learn.model), weights(expected.model)) < 1e-6

# ---- Where the callback is

@shows('learn = Learner(dls, student, cbs=kd); learn.fit(5)')
def test_callback_of_the_learner():
    "In the Learner it does in every fit what it does with `fit(cbs=kd)`."
    cb, given = soft(), soft()
    owner, other = student(cbs=cb), student()
    for seed in 1, 2:
        fitted(owner, seed=seed)
        fitted(other, given, seed=seed)
    assert same(weights(owner.model), weights(other.model)) and owner.recorder.distillation == other.recorder.distillation
    assert owner.knowledge_distillation is cb and not hasattr(other, 'knowledge_distillation')
    assert gap(lambda learn, cb: learn.add_cb(cb).fit(2, 1e-2)) < 1e-6

@shows('with learn.added_cbs(kd): learn.fit(5)')
def test_added_cbs():
    "Within the context every fit distils, and after it training is plain again."
    learn, expected = student(), student()
    with learn.added_cbs(soft()): fitted(learn)
    fitted(expected, by_soft_target())
    for o in learn, expected: fitted(o, n_epoch=1, seed=2)
    assert furthest(weights(learn.model), weights(expected.model)) < 1e-6
    assert len(learn.recorder.values[-1]) == 3 and not any(isinstance(o, KnowledgeDistillationCallback) for o in learn.cbs)

@shows('with learn.removed_cbs(kd): learn.fit(1)')
def test_removed_cbs():
    "Within the context training is bit for bit plain, and after it the teacher is back."
    cb = soft()
    learn, expected = student(cbs=cb), student()
    with learn.removed_cbs(cb): fitted(learn, n_epoch=1)
    assert same(weights(learn.model), weights(fitted(expected, n_epoch=1).model))
    fitted(learn, seed=2)
    fitted(expected, by_soft_target(), seed=2)
    assert furthest(weights(learn.model), weights(expected.model)) < 1e-6

# ---- Two at once

def second(**kwargs): return KD(trained_teacher(), 100*Attention() + 100*Attention(p=4), 'block2', 'block2', **kwargs)

class Both(ByHand):
    "Two distillations by hand: the second blends with what the first has made"
    order = 5
    def blend(self, pred, teacher_pred, fm_s, fm_t):
        self.first = soft_target(pred, teacher_pred)
        self.parts = attention(fm_s['block2'], fm_t['block2']), self.fourth(fm_s['block2'], fm_t['block2'])
        return self.first

    def fourth(self, student, teacher):
        maps = [torch.nn.functional.normalize(o.abs().pow(4).mean(1).flatten(1)) for o in (student, teacher)]
        return (maps[0] - maps[1]).pow(2).mean()

    def after_loss(self):
        super().after_loss()
        first, distillation = self.loss_grad, 100*sum(self.parts)
        self.learn.loss_grad = .8*first + .2*distillation
        self.learn.loss = self.loss_grad.detach().clone()
        self.rows.append([o.item() for o in (self.first, first, distillation, *self.parts)])

@shows('learn.fit(5, cbs=[kd, KnowledgeDistillationCallback(other, 1000*Attention(), layers, layers)])')
def test_two_callbacks():
    "Each blends with the loss that it finds: the second's task loss is the blend of the first, and its columns end in `#2`."
    learn, expected = student(opt_func=SGD), student(opt_func=SGD)
    hand = Both(trained_teacher(), None, .3, ['block2'], ['block2'])
    hand.loss, hand.rows = hand.blend, []
    fitted(learn, [soft(weight=.3), second(weight=.2)])
    fitted(expected, hand)
    assert furthest(weights(learn.model), weights(expected.model)) < 1e-6
    names = ['task_loss', 'distillation_loss', 'task_loss#2', 'distillation_loss#2', 'attention_loss#2', 'attention_loss_2#2']
    assert list(learn.recorder.metric_names[4:-1]) == names
    rows, steps, table = torch.tensor(hand.rows), learn.recorder.distillation, learn.recorder.values
    assert set(steps) == {*names, 'weight', 'weight#2'} and steps['weight'] == [.3]*8 and steps['weight#2'] == [.2]*8
    for name, column in zip(names[1:], rows.T): assert [float(o) for o in steps[name]] == pytest.approx(column.tolist(), rel=1e-4)
    for row, means in zip(table, rows.view(2, 4, 5).mean(1)): assert list(row[4:]) == pytest.approx(means.tolist(), rel=1e-4)
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and n_hooks(learn.model) == 0
    fitted(learn, soft())
    assert set(learn.recorder.distillation) == {'weight', 'task_loss', 'distillation_loss'}

@shows('learn.fit(5, cbs=[KnowledgeDistillationCallback(t, SoftTarget, weight=.5, task_weight=1.) for t in (one, two)])')
def test_two_callbacks_add_up():
    "With `task_weight=1` both teachers are added to the task loss, in whatever order they stand, and each trains its own adapter."
    def pair(): return [soft(weight=.3, task_weight=1.), KD(trained_teacher(), FitNet(), 'block2', 'block2', weight=.2, task_weight=1.)]
    def adapters_of(cbs): return [adapters(cb) for cb in cbs if list(cb.loss.parameters())][0]
    loss = .2*FitNet().on('block2', 'block2') + .3*SoftTarget()
    one, other, still, summed = pair(), pair(), pair(), KD(trained_teacher(), loss, weight=1., task_weight=1.)
    runs = [fitted(student(opt_func=SGD), cbs) for cbs in (one, other[::-1], summed)]
    found = [adapters_of(cbs) for cbs in (one, other, [summed])]
    for learn in runs[1:]: assert furthest(weights(runs[0].model), weights(learn.model)) < 1e-6
    fitted(student(), still, lr=0., n_epoch=1)
    assert [len(o) for o in found] == [2, 2, 2] and furthest(found[0], adapters_of(still)) > 1e-3
    for values in found[1:]: assert max((a - b).abs().max() for a, b in zip(found[0].values(), values.values())) < 1e-6
