"What goes wrong in the peer library, and what a careless callback would do to a training loop."
import numpy as np, pytest, random, torch, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, Learner, SGD
from fastai.callback.tracker import SaveModelCallback
from fastkd.all import *
from helpers import (At, ByHand, convnet, digits, fitted, furthest, learner, loaders, quiet, same, seeded, soft_target,
    trained_teacher, weights)
from torch import nn

BLOCKS = ['block1', 'block2']

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

# ---- The teacher

def test_teacher_builds_no_graph():
    "Nothing is saved for a backward pass while it runs, and its answers can be saved for the student's"
    teacher, running, saved, answers = trained_teacher(), [], {True: 0, False: 0}, []
    def pack(tensor):
        saved[bool(running)] += tensor.nbytes
        return tensor
    def keep(module, args, output):
        running.clear()
        answers.append(output)
    teacher.register_forward_pre_hook(lambda *args: running.append(1))
    teacher.register_forward_hook(keep)
    loss = SoftTarget() + 10*FitNet().on(BLOCKS, BLOCKS)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor): fitted(learner(), KD(teacher, loss), n_epoch=1)
    assert saved[True] == 0 and saved[False] > 0 and len(answers) == 5
    assert not any(o.requires_grad or o.is_inference() for o in answers)

def test_dict_inputs():
    "A batch of named tensors reaches a teacher, also one of another precision, and its samples have their positions"
    class Named(nn.Module):
        "Adds the two halves of an image"
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch): return self.model(batch['left'] + batch['right'])
    def named(model):
        data = loaders([(dict(left=x/2, right=x/2), y) for x, y in digits()[:100]])
        return quiet(Learner(data, Named(model), CrossEntropyLossFlat(), opt_func=SGD))
    def ask_index(pred, index):
        seen.append((index, learn.xb[0]['left']))
        return 0*pred.mean()
    expected, seen = fitted(learner(opt_func=SGD), KD(trained_teacher(), SoftTarget)), []
    for teacher, tol in (trained_teacher(), 1e-6), (trained_teacher().double(), 1e-5):
        learn = named(seeded(convnet, 4))
        fitted(learn, KD(Named(teacher), SoftTarget() + ask_index))
        assert furthest(weights(learn.model.model), weights(expected.model)) < tol
    assert len(seen) == 16
    for index, left in seen: assert torch.equal(torch.stack([digits()[i][0]/2 for i in index]), left)

# ---- The loop

def test_valid_loss_is_the_task_loss(tmp_path):
    "Where nothing is learned it stays, though the weight of distillation rises, and SaveModel saves once"
    saved, learn = [], learner(linear(), path=tmp_path)
    save = learn.save
    learn.save = lambda name, **kwargs: saved.append(name) or save(name, **kwargs)
    learn.fit(4, 0., cbs=[SaveModelCallback(), KD(trained_teacher(), SoftTarget(), schedule=cos)])
    values = [row[1] for row in learn.recorder.values]
    weight = learn.recorder.distillation['weight']
    assert values == [pytest.approx(float(learn.validate()[0]))]*4 and weight[0] == 0 and weight[-1] > .4
    assert saved == ['model']
    with torch.no_grad(): expected = F.cross_entropy(*(f(o) for f, o in zip((learn.model, lambda y: y), learn.dls.valid.one_batch())))
    assert values[-1] == pytest.approx(float(expected), rel=1e-5)

def test_blend_is_made_of_the_whole_task_loss():
    "What fastai's regularizers add at order 1 is part of it, and what divides the loss at order 6 divides the blend"
    def penalty(learn):
        if learn.training: learn.loss_grad = learn.loss_grad + learn.model[1].weight.pow(2).sum()
    def divide(learn):
        if learn.training: learn.loss_grad /= 4
    def run(cb):
        learn = learner(seeded(linear), opt_func=SGD)
        return fitted(learn, [cb, At('after_loss', penalty, 1, 0), At('after_loss', divide, 6, 0)], lr=.1)
    found = run(KD(trained_teacher(), SoftTarget, weight=.75))
    expected = run(ByHand(trained_teacher(), lambda pred, teacher_pred, *fms: soft_target(pred, teacher_pred), .75))
    plain = seeded(linear)[1].weight.pow(2).sum()
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6
    assert found.recorder.distillation['task_loss'][0] > plain > 0

def test_weight_zero_leaves_the_loss_alone():
    "A distillation loss that is infinite at weight 0 is not felt"
    def infinite(pred, teacher_pred): return (pred - teacher_pred).pow(2).sum()*torch.inf
    silent, plain = learner(), learner()
    fitted(silent, KD(trained_teacher(), infinite, weight=0.))
    assert same(weights(silent.model), weights(fitted(plain).model))
    assert silent.recorder.losses == plain.recorder.losses

class Noisy(nn.Module):
    "Draws from all generators, in evaluation as in training"
    def __init__(self):
        super().__init__()
        self.layers = linear()

    def forward(self, x): return self.layers(x + .1*torch.randn_like(x) + .1*np.random.rand() + .1*random.random())

def test_probe_leaves_random_states_alone():
    "A student whose forward pass is random sees the same numbers with a callback of weight 0 as without"
    silent, plain = learner(seeded(Noisy)), learner(seeded(Noisy))
    fitted(silent, KD(trained_teacher(), SoftTarget, weight=0.))
    assert same(weights(silent.model), weights(fitted(plain).model))

def test_recorded_values_are_copies():
    "Others scale the loss in place afterwards; no value keeps the graph of its batch alive"
    seen, graphs = [], []
    def note(learn):
        if learn.training: seen.append(float(learn.loss_grad))
    def divide(learn):
        if learn.training: learn.loss_grad /= 3
    def look(learn):
        last = [values[-1] for values in learn.recorder.distillation.values()]
        if learn.training: graphs.extend(value.requires_grad for value in last if torch.is_tensor(value))
    cbs = At('after_loss', note, 4, 0), At('after_loss', divide, 6, 0), At('after_batch', look, 99, 0)
    learn = fitted(learner(), [*cbs, KD(trained_teacher(), SoftTarget, weight=0.)], n_epoch=1)
    assert learn.recorder.distillation['task_loss'] == seen
    assert graphs == [False]*8
