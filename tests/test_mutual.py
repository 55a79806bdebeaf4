"Peers that teach each other: who learns what from whom, what is shown, what is left behind, which one is kept."
import copy, math, pickle, pytest, torch, torch.nn.functional as F
from contextlib import nullcontext
from fastai.basics import (CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CrossEntropyLossFlat,
    Learner, MSELossFlat, SGD, set_seed)
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Recorder, load_learner
from fastai.metrics import accuracy
from fastkd.callback import KnowledgeDistillationCallback as KD
from fastkd.losses.feature import FitNet
from fastkd.losses.response import Logits, SoftTarget
from fastkd.mutual import MutualLearning, Peers, split_peers
from fastkd.unlabelled import Unlabelled
from helpers import (At, OnCPU, as_on_a_gpu, convnet, digits, error_of, fitted, furthest, learner, loaders, n_hooks, named_learner, quiet,
    raising, same, seeded, slow, started, weights, without_waiting)
from torch import nn
from torch.utils.data import TensorDataset

def several(*widths, p=0.): return [seeded(convnet, width, p, seed=i) for i, width in enumerate(widths)]
def peers(*widths, **kwargs): return learner(Peers(several(*widths)), **kwargs)
def alone(width, i, **kwargs): return learner(several(*[width]*(i + 1))[i], **kwargs)

def grads(model): return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def first_step(learn, *cbs):
    "Loss, gradients and batch of the first step"
    found = {}
    def look(learn): found.update(loss=learn.loss_grad.item(), grads=grads(learn.model), xb=learn.xb, yb=learn.yb)
    def stop(learn): raise CancelFitException()
    started(learn).fit(1, cbs=[*cbs, At('before_step', look), At('after_step', stop)])
    return found

# ---- One step

@pytest.mark.parametrize('widths,T', [((4, 6), 1.), ((4, 6), 3.), ((4, 4, 8), 1.)], ids=['two', 'two at 3', 'three'])
def test_one_step_by_hand(widths, T):
    "Each peer's gradient is that of its own cross-entropy and of its divergence from the mean of the others, who are constants"
    models, weight = several(*widths), .3
    found = first_step(peers(*widths), MutualLearning(SoftTarget(T=T), weight=weight))
    preds, losses = [model(*found['xb']) for model in models], []
    for i, pred in enumerate(preds):
        others = [o.detach() for j, o in enumerate(preds) if j != i]
        mean = sum(o.softmax(1) for o in others)/len(others)
        kd = T**2*F.kl_div(F.log_softmax(pred/T, 1), (mean.log()/T).softmax(1), reduction='batchmean')
        losses.append((1 - weight)*F.cross_entropy(pred, found['yb'][0]) + weight*kd)
        losses[-1].backward()
    by_hand = {f'students.{i}.{name}': grad for i, model in enumerate(models) for name, grad in grads(model).items()}
    assert furthest(found['grads'], by_hand) < 1e-6
    assert math.isclose(found['loss'], sum(losses).item(), rel_tol=1e-6)

def test_gradient_of_the_paper():
    "The mean of the divergences from each other peer, as in Zhang et al. 2017, has the gradient of the divergence from their mean"
    found, models = first_step(peers(4, 6, 8), MutualLearning(SoftTarget(T=1))), several(4, 6, 8)
    preds = [model(*found['xb']) for model in models]
    for i, pred in enumerate(preds):
        divergences = [F.kl_div(pred.log_softmax(1), o.detach().softmax(1), reduction='batchmean') for o in preds if o is not pred]
        (.5*F.cross_entropy(pred, found['yb'][0]) + .5*sum(divergences)/2).backward()
        of_peer = {name.removeprefix(f'students.{i}.'): grad for name, grad in found['grads'].items() if name.startswith(f'students.{i}.')}
        assert furthest(of_peer, grads(models[i])) < 1e-6

def test_two_learn_from_logits():
    "A single other peer is heard as it is, not as log-probabilities"
    found, models = first_step(peers(4, 6), MutualLearning(Logits(), weight=1.)), several(4, 6)
    first, second = (model(*found['xb']) for model in models)
    ((first - second.detach())**2).mean().backward()
    assert furthest({k: v for k, v in found['grads'].items() if k.startswith('students.0')},
        {f'students.0.{k}': v for k, v in grads(models[0]).items()}) < 1e-6

# ---- Without a weight, each on its own

@pytest.mark.parametrize('n,cbs', [(3, lambda: []), (2, lambda: [OnCPU(AMPMode.BF16)]), (2, lambda: [GradientAccumulation(50)]),
    (2, lambda: [MixUp()])], ids=['three', 'bf16', 'accumulation', 'mixup'])
def test_weight_zero(n, cbs):
    "Peers train as they would alone, bit for bit"
    together = fitted(peers(*[4]*n, n=50), [MutualLearning(SoftTarget(T=1), weight=0.), *cbs()])
    each = [fitted(alone(4, i, n=50), cbs()).model for i in range(n)]
    assert all(same(weights(a), weights(b)) for a, b in zip(together.model.students, each))

def test_weight_matters():
    first, second = (fitted(peers(4, 6), MutualLearning(SoftTarget(T=1), weight=weight)) for weight in (0., .5))
    assert furthest(weights(first.model), weights(second.model)) > 1e-3

@pytest.mark.parametrize('cbs', [lambda: [OnCPU(AMPMode.BF16)], lambda: [OnCPU()], lambda: [GradientAccumulation(50)], lambda: [MixUp()],
    lambda: [GradientClip(.1)]], ids=['bf16', 'fp16', 'accumulation', 'mixup', 'clip'])
def test_with_other_callbacks(cbs):
    learn = peers(4, 6)
    loss_func = learn.loss_func
    fitted(learn, [MutualLearning(SoftTarget(T=1) + FitNet(), 'block2'), *cbs()], n_epoch=1)
    assert learn.loss_func is loss_func and all(p.isfinite().all() for p in learn.model.parameters())
    assert n_hooks(learn.model) == 0 and len(learn.metrics) == 1

def test_accumulation_is_the_large_batch():
    "Two batches of 25 step as one batch of 50, for models without batch norm"
    def run(bs, *cbs):
        models = [seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), seed=i) for i in range(2)]
        learn = learner(Peers(models), bs=bs, opt_func=SGD)
        return weights(fitted(learn, [MutualLearning(SoftTarget(T=1)), *cbs], n_epoch=1).model)
    assert furthest(run(25, GradientAccumulation(50)), run(50)) < 1e-6

def test_what_others_add_stays():
    "A penalty that another callback adds to the loss reaches the peers, whatever its order"
    def penalty(order): return At('after_loss', lambda learn: setattr(learn, 'loss_grad', learn.loss_grad + learn.model.students[0][0][0]
        .weight.sum()), order=order, nth=0)
    plain = first_step(peers(4, 6), MutualLearning(SoftTarget(T=1), weight=0.))
    for order in (0, 8):
        found, name = first_step(peers(4, 6), MutualLearning(SoftTarget(T=1), weight=0.), penalty(order)), 'students.0.block1.0.weight'
        assert torch.allclose(found['grads'][name] - plain['grads'][name], torch.full_like(plain['grads'][name], 2.), atol=1e-5)
        assert torch.equal(found['grads']['students.1.block1.0.weight'], plain['grads']['students.1.block1.0.weight'])

def test_beside_a_trained_teacher():
    "An offline teacher may teach the ensemble in the same fit"
    learn = fitted(peers(4, 6), [MutualLearning(SoftTarget(T=1)), KD(convnet(8), Logits())], n_epoch=1)
    assert type(learn.loss_func) is CrossEntropyLossFlat and len(learn.metrics) == 1
    assert {'logits_loss', 'distillation_loss', 'distillation_loss#2'} - {*learn.recorder.metric_names} == {'logits_loss'}

# ---- Activations

class Other(nn.Module):
    "Another architecture, with other names"
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 5, 3, stride=2, padding=1), nn.Linear(5, 10)
    def forward(self, x): return self.head(F.relu(self.stem(x)).mean((2, 3)))

def test_features_of_other_architectures():
    "Peers are compared in a circle, each with an adapter of its own; no gradient flows into the next peer"
    models = [seeded(convnet, 4), seeded(Other, seed=1), seeded(convnet, 6, seed=2)]
    cb, learn = MutualLearning(FitNet(), [['block2'], ['stem'], 'block2'], weight=1.), learner(Peers(models))
    found, built = {}, {}
    def look(learn): found.update(grads=grads(learn.model), fms=cb.loss.parts, adapters=[[*o.loss.parameters()] for o in cb.loss.parts])
    started(learn).fit(1, cbs=[cb, At('before_step', look)])
    assert [(o.students, o.teachers) for o in cb.loss.parts] == [(['students.0.block2'], ['students.1.stem']),
        (['students.1.stem'], ['students.2.block2']), (['students.2.block2'], ['students.0.block2'])]
    assert [adapter[0].shape[:2] for adapter in found['adapters']] == [(5, 8), (12, 5), (8, 12)]
    assert all(p.grad is None or not p.grad.any() for name, p in learn.model.named_parameters() if 'head' in name)
    assert {name.split('.')[1] for name, grad in found['grads'].items() if grad.any()} == {'0', '1', '2'}

def test_feature_gradients_by_hand():
    "Without an adapter: peers of one width"
    found, models = first_step(peers(4, 4), MutualLearning(FitNet(), 'block1', weight=1.)), several(4, 4)
    fms = [model.block1(*found['xb']) for model in models]
    for i, model in enumerate(models):
        ((fms[i] - fms[1 - i].detach())**2).mean().backward()
        of_peer = {name: grad for name, grad in found['grads'].items() if name.startswith(f'students.{i}.block1')}
        assert furthest(of_peer, {f'students.{i}.{name}': grad for name, grad in grads(model).items()}) < 1e-6

def test_adapters_are_stepped_and_saved():
    cb, learn = MutualLearning(FitNet(), 'block2'), peers(4, 6)
    fitted(learn, cb, n_epoch=1)
    state = cb.state_dict()
    assert len([key for key in state['loss'] if key.endswith('weight')]) == 2
    other = MutualLearning(FitNet(), 'block2')
    other.load_state_dict(state)
    learn.fit(1, 0., wd=0., cbs=other)
    assert same(other.loss.state_dict(), state['loss'])

def test_second_fit_goes_on():
    "Adapters are those of the first fit; peers of another learner begin anew"
    cb, learn = MutualLearning(FitNet(), 'block2'), peers(4, 6)
    fitted(learn, cb, n_epoch=1)
    before = {name: value.clone() for name, value in cb.loss.state_dict().items()}
    learn.fit(1, 0., wd=0., cbs=cb)
    assert same(cb.loss.state_dict(), before)
    peers(4, 6, 8).fit(1, 0., cbs=cb)
    assert len(cb.loss.parts) == 3

def test_loss_of_the_user_stays():
    loss = FitNet()
    fitted(peers(4, 6), MutualLearning(loss, 'block2'), n_epoch=1)
    assert loss.learned is None

# ---- Schedules

def test_schedules_reach_all_peers():
    "A setting and a factor are moved for every peer, and factors stay shares of the mean"
    schedule = {'T': SchedLin(4, 2), 'logits.factor': SchedLin(0, 6), 'weight': SchedLin(0, 1)}
    learn = fitted(peers(4, 6, 8), MutualLearning(SoftTarget(T=1) + 2*Logits(), schedule=schedule), n_epoch=1)
    steps = learn.recorder.distillation
    for name in ('', '_2', '_3'):
        assert steps[f'soft_target{name}.T'] == [4., 3.5, 3., 2.5]
        assert steps[f'logits{name}.factor'] == pytest.approx([0., .5, 1., 1.5])
    assert steps['weight'] == [0., .25, .5, .75]

def test_parts_are_means():
    "`distillation_loss` is the mean over the peers of what stands in their columns"
    learn = fitted(peers(4, 6, 8), MutualLearning(SoftTarget(T=1) + 2*Logits()), n_epoch=1)
    steps = learn.recorder.distillation
    parts = [sum(steps[f'{base}{n}'][0] for n in ('', '_2', '_3')) for base in ('soft_target_loss', 'logits_loss')]
    assert steps['distillation_loss'][0] == pytest.approx((parts[0] + 2*parts[1])/3, rel=1e-5)

# ---- What the table shows

def test_columns():
    "Each peer's numbers are those of an evaluation of this peer alone"
    learn = fitted(peers(4, 6), MutualLearning(SoftTarget(T=1)))
    names, values = learn.recorder.metric_names[1:-1], learn.recorder.values[-1]
    assert names == ['train_loss', 'valid_loss', 'accuracy', 'valid_loss_0', 'valid_loss_1', 'accuracy_0', 'accuracy_1', 'task_loss',
        'distillation_loss', 'soft_target_loss', 'soft_target_loss_2']
    row = dict(zip(names, values))
    for i, student in enumerate(learn.model.students):
        expected = Learner(learn.dls, student, CrossEntropyLossFlat(), metrics=accuracy).validate()
        assert [row[f'valid_loss_{i}'], row[f'accuracy_{i}']] == pytest.approx(list(expected), rel=1e-5)
    assert [row['valid_loss'], row['accuracy']] == pytest.approx(list(learn.validate()), rel=1e-5)
    assert [o.name for o in learn.metrics] == ['accuracy']

def test_columns_of_training():
    learn = quiet(peers(4, 6))
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(train_metrics=True))
    fitted(learn, MutualLearning(SoftTarget(T=1)), n_epoch=1)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert row['train_loss_0'] + row['train_loss_1'] == pytest.approx(2*row['train_task_loss'], rel=1e-5)
    assert 0 <= row['train_accuracy_0'] <= 1

def test_ensemble_is_the_mean_of_probabilities():
    learn = fitted(peers(4, 6), MutualLearning(SoftTarget(T=1)), n_epoch=1)
    preds, _ = learn.get_preds()
    each = [Learner(learn.dls, student, CrossEntropyLossFlat()).get_preds()[0] for student in learn.model.students]
    assert torch.allclose(preds, sum(each)/2, atol=1e-6)
    assert torch.allclose(preds.sum(1), torch.ones(len(preds)), atol=1e-5)

# ---- Nothing left behind

def flat(i): return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), seed=i)
def quick(n=2, **kwargs): return learner(Peers([flat(i) for i in range(n)]), n=50, **kwargs)

EVENTS = [('after_pred', 70, 2), ('after_loss', -20, 2), slow('after_pred', -20, 2), slow('before_backward', 70, 1), ('after_batch', 70, 1),
    slow('before_batch', 70, 2), ('before_validate', 0, 1)]

@pytest.mark.parametrize('event,order,nth', EVENTS)
@pytest.mark.parametrize('exc', [KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize('mixup', [False, True], ids=['', 'mixup'])
def test_loss_func_comes_back(event, order, nth, exc, mixup):
    "Also where fastai has just been told to ask all peers; what MixUp leaves after an interrupt is MixUp's"
    learn = quick()
    loss_func, stop = learn.loss_func, At(event, raising(exc), order, nth)
    with pytest.raises(KeyboardInterrupt) if exc is KeyboardInterrupt else nullcontext():
        learn.fit(1, cbs=[MutualLearning(SoftTarget(T=1)), stop, *([MixUp()] if mixup else [])])
    assert stop.n == nth and [o.name for o in learn.metrics] == ['accuracy'] and n_hooks(learn.model) == 0
    if mixup and exc is KeyboardInterrupt and event != 'before_validate': assert learn.loss_func.__self__.old_lf is loss_func
    else: assert learn.loss_func is loss_func

@pytest.mark.parametrize('cancel,mixup', [(CancelBatchException, True), (CancelTrainException, True), (CancelEpochException, False)])
def test_loss_func_comes_back_in_the_fit(cancel, mixup):
    "Right after it was put in place, something cancels: what validates is the learner's own"
    learn, seen = quick(), []
    stop = At('after_pred', raising(cancel), 70, 2)
    look = [At(event, lambda learn: seen.append(learn.loss_func), nth=1) for event in ('after_train', 'after_epoch')]
    learn.fit(1, cbs=[MutualLearning(SoftTarget(T=1)), stop, *look, *([MixUp()] if mixup else [])])
    assert stop.n >= 2 and len(seen) >= 1 and seen[-1] is learn.loss_func and type(learn.loss_func) is CrossEntropyLossFlat

def test_learners_own_callback_after_an_interrupt():
    "A callback of the Learner hears nothing of an interrupt; the next event finds all in order"
    learn = peers(4, 6, cbs=MutualLearning(SoftTarget(T=1)))
    loss_func = learn.loss_func
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At('after_pred', raising(KeyboardInterrupt), order=70))
    learn.validate()
    assert learn.loss_func is loss_func and [o.name for o in learn.metrics] == ['accuracy']

def test_copy_after_an_interrupt():
    "Its loss function is that of the learner, from the next event on"
    learn = peers(4, 6, cbs=MutualLearning(SoftTarget(T=1)))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=At('after_pred', raising(KeyboardInterrupt), order=20))
    del learn.pred # its graph cannot be copied
    twin = copy.deepcopy(learn)
    assert math.isclose(twin.validate()[0], learn.validate()[0], rel_tol=1e-6) and type(twin.loss_func) is CrossEntropyLossFlat
    assert twin.fit(1) is None and learn.fit(1) is None and type(learn.loss_func) is CrossEntropyLossFlat

def test_samples_without_labels():
    "Peers hear each other on all samples; their task losses and metrics are of those with labels"
    learn, unlabelled = peers(4, 6, metrics=accuracy), torch.randn(60, 1, 8, 8)
    learn.recorder.train_metrics, seen = True, []
    def look(learn): seen.append((learn.recorder.distillation['task_loss'][-1], learn.xb[0], learn.yb[0]))
    cb = MutualLearning(SoftTarget(T=1), weight=.5)
    started(learn).fit(1, cbs=[cb, Unlabelled(TensorDataset(unlabelled, torch.zeros(60))), At('before_backward', look)])
    task, x, y = seen[0]
    with torch.no_grad(): preds = [model(x)[:len(y)] for model in several(4, 6)]
    assert len(x) == 2*len(y) and math.isclose(task, sum(F.cross_entropy(pred, y) for pred in preds)/2, rel_tol=1e-5)

def test_without_mutual_learning():
    "Peers train as any model: the loss is the ensemble's"
    learn = peers(4, 6)
    found, model = first_step(learn), Peers(several(4, 6))
    F.cross_entropy(model(*found['xb']), found['yb'][0]).backward()
    assert furthest(found['grads'], grads(model)) < 1e-7

def test_no_waiting(monkeypatch):
    "On a GPU, the host never waits for what is in a tensor"
    as_on_a_gpu(monkeypatch)
    learn = without_waiting(peers(4, 6))
    learn.fit(1, cbs=MutualLearning(SoftTarget(T=1) + FitNet(), 'block2'))
    assert len(learn.watched) == 4

def test_learners_own_callback_after_a_peer_was_kept():
    learn = quick(cbs=MutualLearning(SoftTarget(T=1)))
    learn.fit(1)
    learn.keep_peer()
    learn.validate()
    with pytest.raises(TypeError, match=r'mutual learning is over: learn.remove_cb\(MutualLearning\)'): learn.fit(1)
    learn.remove_cb(MutualLearning)
    learn.fit(1)
    assert not isinstance(learn.model, Peers)

def test_lr_find():
    learn = peers(4, 6)
    before = weights(learn.model)
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    cb = MutualLearning(FitNet(), 'block2')
    learn.add_cb(cb)
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    assert same(weights(learn.model), before) and cb.loss.state_dict() == {}

# ---- Copies and files

def test_copies(tmp_path):
    "A copy is complete: nothing but the user's own goes along, and it can go on"
    learn = peers(4, 6, cbs=MutualLearning(SoftTarget(T=1)), path=tmp_path)
    learn.fit(1)
    for other in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn.model))):
        model = getattr(other, 'model', other)
        assert same(weights(model), weights(learn.model)) and model.peer_preds == [] and len(learn.model.peer_preds) == 2
    other = copy.deepcopy(learn)
    quiet(other).fit(1)
    assert furthest(weights(other.model), weights(learn.model)) > 0
    learn.save('peers')
    fresh = peers(4, 6, path=tmp_path)
    fresh.load('peers')
    assert same(weights(fresh.model), weights(learn.model))

def test_export_of_the_kept_peer(tmp_path):
    "It predicts as before, and its file is as small as that of a student that never had peers"
    learn, lone = (named_learner(model, path=tmp_path) for model in (Peers(several(4, 6)), several(4)[0]))
    learn.fit(1, cbs=MutualLearning(SoftTarget(T=1)))
    with learn.no_bar(): together = learn.predict(3)
    assert learn.keep_peer(0) == 0
    with learn.no_bar(): alone = learn.predict(3)
    for o in (learn, lone): o.export(f'{type(o.model).__name__}_{o is learn}.pkl')
    sizes = [(tmp_path/f'Sequential_{o is learn}.pkl').stat().st_size for o in (learn, lone)]
    assert sizes[0] - sizes[1] < 2000
    loaded = load_learner(tmp_path/'Sequential_True.pkl')
    with loaded.no_bar(): again = loaded.predict(3)
    assert together[0] in 'abcdefghij' and torch.allclose(again[2], alone[2]) and not torch.allclose(together[2], alone[2])

# ---- One is kept

@pytest.mark.parametrize('best', [0, 1])
def test_keep_the_best(best):
    "The lowest task loss on the validation set, of the weights as they are now"
    learn = fitted(peers(4, 4), MutualLearning(SoftTarget(T=1)), n_epoch=1)
    with torch.no_grad(): learn.model.students[1 - best].head[3].bias[0] += 50
    model, student = learn.model, learn.model.students[best]
    losses = [values[0] for values in learn.validate_peers()]
    assert learn.model is model and losses[best] < losses[1 - best]
    assert learn.keep_peer() == best and learn.model is student and learn.opt is None
    assert learn.validate()[0] == pytest.approx(losses[best])
    before = weights(student)
    learn.fit(1)
    assert furthest(weights(learn.model), before) > 0 and not isinstance(learn.model, Peers)

def test_keep_after_fine_tune_and_save_model(tmp_path):
    "Both fits train all peers; what SaveModelCallback brought back is what is kept"
    learn = peers(4, 6, path=tmp_path, splitter=split_peers(halves))
    with learn.no_bar(): learn.fine_tune(2, 1e-2, cbs=[MutualLearning(SoftTarget(T=1)), SaveModelCallback()])
    best = weights(learn.model)
    prefix = f'students.{learn.keep_peer()}.'
    assert same(weights(learn.model), {name.removeprefix(prefix): value for name, value in best.items() if name.startswith(prefix)})
    learn.create_opt()
    assert len(learn.opt.param_lists) == 2

def halves(model): return [[*model.block1.parameters()], [*model.block2.parameters(), *model.head.parameters()]]

def test_keep_by_hand_and_by_other_data():
    learn = peers(4, 6)
    assert learn.keep_peer(1) == 1 and learn.model.block1[0].out_channels == 6
    with pytest.raises(TypeError, match='several students, and the model is a Sequential'): learn.keep_peer()
    learn = peers(4, 6)
    dl = learn.dls.test_dl([digits()[i] for i in range(500, 540)])
    losses = [values[0] for values in learn.validate_peers(dl=dl)]
    assert learn.keep_peer(dl=dl) == losses.index(min(losses))

def test_keep_with_nothing_to_choose_by():
    learn = peers(4, 6)
    with torch.no_grad():
        for student in learn.model.students: student.head[3].bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r'nothing to choose by: .*nan.*keep_peer\(0\)'): learn.keep_peer()
    assert isinstance(learn.model, Peers)

def test_a_peer_that_diverged_is_not_kept():
    learn = peers(4, 6)
    with torch.no_grad(): learn.model.students[0].head[3].bias.fill_(math.nan)
    assert learn.keep_peer() == 1

# ---- Splitters

def test_split_peers():
    model = Peers(several(4, 6))
    groups = split_peers(halves)(model)
    assert [len(group) for group in groups] == [6, 10] and {id(p) for group in groups for p in group} == {id(p) for p in model.parameters()}
    assert split_peers(halves)(model.students[0])[0][0] is model.students[0].block1[0].weight
    with pytest.raises(ValueError, match='different numbers'):
        split_peers(lambda o: [[*o.parameters()]]*(1 + (o.block1[0].out_channels == 4)))(model)
    learn = peers(4, 6, splitter=split_peers(halves))
    learn.freeze()
    before = weights(learn.model)
    fitted(learn, MutualLearning(SoftTarget(T=1)), n_epoch=1)
    moved = {name for name, value in weights(learn.model).items() if not torch.equal(value, before[name])}
    assert not any('block1.0' in name for name in moved) and {'students.0.head.3.weight', 'students.1.head.3.weight'} <= moved

# ---- Other predictions

class Named(nn.Module):
    "Returns what a transformer would"
    def __init__(self, seed): 
        super().__init__()
        set_seed(seed)
        self.body = nn.Linear(64, 10)
    def forward(self, x): return dict(hidden_states=x, logits=self.body(x.flatten(1)))

def test_outputs_with_fields():
    learn = learner(Peers([Named(0), Named(1)]))
    found = first_step(learn, MutualLearning(SoftTarget(T=1)))
    assert found['grads'].keys() == {f'students.{i}.body.{name}' for i in range(2) for name in ('weight', 'bias')}

def test_regression():
    "Plain means where outputs are no classes"
    data = [(image.flatten(), label.float()[None]) for image, label in digits()[:100]]
    models = [seeded(nn.Linear, 64, 1, seed=i) for i in range(3)]
    learn = quiet(Learner(loaders(data), Peers(copy.deepcopy(models), axis=None), MSELossFlat()))
    found = first_step(learn, MutualLearning(Logits(), weight=.5))
    preds = [model(*found['xb']) for model in models]
    (.5*F.mse_loss(preds[0], found['yb'][0]) + .5*F.mse_loss(preds[0], (preds[1] + preds[2]).detach()/2)).backward()
    assert torch.allclose(found['grads']['students.0.weight'], models[0].weight.grad, rtol=1e-4, atol=1e-5)

def test_positions_and_ignored_labels():
    "Every position has a class; those that the task loss ignores count for neither loss"
    def segments(i):
        y = (digits()[i][0][0] > .5).long()
        y[:4] = 255
        return digits()[i][0], y
    models = [seeded(nn.Conv2d, 1, 2, 3, padding=1, seed=i) for i in range(2)]
    loss_func = CrossEntropyLossFlat(axis=1, ignore_index=255)
    learn = quiet(Learner(loaders([segments(i) for i in range(50)]), Peers(copy.deepcopy(models)), loss_func))
    found = first_step(learn, MutualLearning(SoftTarget(T=1)))
    preds, y = [model(*found['xb']).movedim(1, -1)[:, 4:].flatten(0, 2) for model in models], found['yb'][0][:, 4:].flatten()
    kd = F.kl_div(preds[0].log_softmax(1), preds[1].detach().softmax(1), reduction='batchmean')
    (.5*F.cross_entropy(preds[0], y) + .5*kd).backward()
    assert torch.allclose(found['grads']['students.0.weight'], models[0].weight.grad, atol=1e-5)

def test_recurrent_peers_are_reset():
    calls = []
    class Recurrent(nn.Linear):
        def reset(self): calls.append(self)
    model = Peers([Recurrent(2, 3), nn.Linear(2, 3), Recurrent(2, 3)])
    model.reset()
    assert calls == [model.students[0], model.students[2]]

# ---- What is refused, before the first step

def two(): return Peers(several(4, 6))

@pytest.mark.parametrize('model,cb,exc,said', [
    (lambda: convnet(4), lambda: MutualLearning(SoftTarget()), TypeError, 'several students, and the model is a Sequential: Learner'),
    (lambda: Peers([convnet(4), convnet(4, n_out=7)]), lambda: MutualLearning(SoftTarget()), ValueError, 'predict the same classes'),
    (two, lambda: MutualLearning(FitNet()), ValueError, r"MutualLearning\(FitNet\(\), activations=\['…'\]\)"),
    (two, lambda: MutualLearning(SoftTarget(), 'block2'), ValueError, 'compares predictions'),
    (two, lambda: MutualLearning(FitNet(), 'blokc2'), ValueError, "peer 0: the student has no layer 'blokc2'; nearest: block2"),
    (two, lambda: MutualLearning(FitNet(), [['block2']]*3), ValueError, 'layers of 3 peers, and there are 2'),
    (two, lambda: MutualLearning(FitNet(), [['block1', 'block2'], ['block2']]), ValueError, 'do not pair'),
    (two, lambda: MutualLearning(SoftTarget().on(teacher_pred='1')), ValueError, 'leave out teacher_pred'),
    (two, lambda: MutualLearning(SoftTarget(), weight=2.), ValueError, 'task_weight=1'),
    (two, lambda: MutualLearning(SoftTarget(), schedule={'tau': SchedLin(1, 2)}), ValueError, "nothing is called 'tau'"),
    (two, lambda: MutualLearning(SoftTarget(), schedule={'T': SchedLin(1, -2)}), ValueError, 'T must be'),
], ids=['no peers', 'classes', 'no layers', 'layers for predictions', 'no such layer', 'three lists', 'unpaired', 'teacher_pred', 'weight',
    'schedule', 'range'])
def test_refused(model, cb, exc, said):
    with pytest.raises(exc, match=said): raise exc(error_of(exc, learner(seeded(model)), cb()))

@pytest.mark.parametrize('loss,activations,said', [
    (FitNet(), ['students.0.block2'], "within a peer: 'block2', not 'students.0.block2'"),
    (FitNet(), [['block2'], ['students.1.block2']], "'block2', not 'students.1.block2'"),
    (FitNet().on('block1', 'students.0.block1'), None, "'block1', not 'students.0.block1'"),
    (FitNet(), [['block2'], ['blok2']], "peer 1: the student has no layer 'blok2'; nearest: block2")], ids=['full', 'one', 'on', 'typo'])
def test_layers_are_named_as_within_a_peer(loss, activations, said):
    assert said in error_of(ValueError, peers(4, 6), MutualLearning(loss, activations))

def test_two_in_one_fit():
    learn = peers(4, 6, cbs=MutualLearning(SoftTarget()))
    assert 'the sum of both losses' in error_of(ValueError, learn, MutualLearning(Logits()))

def test_peers_that_share():
    first, second = several(4, 6)
    with pytest.raises(ValueError, match='at least two peers'): Peers([first])
    with pytest.raises(ValueError, match='peers 0 and 2 are the same module'): Peers([first, second, first])
    with pytest.raises(TypeError, match='peer 1 is a str'): Peers([first, 'second'])
    second.block1 = first.block1
    with pytest.raises(ValueError, match="share the trainable parameter 'block1.0.weight'"): Peers([first, second])
    for p in first.block1.parameters(): p.requires_grad_(False)
    learn = learner(Peers([first, second]))
    first.block1[0].weight.requires_grad_(True)
    assert "share the trainable parameter 'block1.0.weight'" in error_of(ValueError, learn, MutualLearning(SoftTarget()))

def test_other_axis():
    data = [(image[0], (image[0] > .5).long().argmax(1)) for image, _ in digits()[:50]] # rows of 8 pixels: 8 classes at each of 8 positions
    def run(axis): return quiet(Learner(loaders(data), Peers([seeded(nn.Linear, 8, 8, seed=i) for i in range(2)], axis=axis),
        CrossEntropyLossFlat(axis=-1)))
    assert 'Peers(…, axis=-1)' in error_of(ValueError, run(1), MutualLearning(SoftTarget(T=1)))
    for axis in (-1, 2): run(axis).fit(1, cbs=MutualLearning(SoftTarget(T=1)))

def test_equal_peers():
    learn = learner(Peers([seeded(convnet, 4), seeded(convnet, 4)]))
    with pytest.warns(UserWarning, match='peers 0 and 1 have the same weights'): learn.fit(1, cbs=MutualLearning(SoftTarget()))

def test_no_needless_warnings(recwarn):
    "Untrained peers agree that they know nothing: no reason to speak of a quiet loss or of a teacher at chance"
    peers(4, 6).fit(1, cbs=MutualLearning(SoftTarget(T=1)))
    assert [str(o.message) for o in recwarn if issubclass(o.category, UserWarning)] == []
