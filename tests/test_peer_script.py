"A script written for fasterai's callback runs with its import changed, and computes what it computed there."
import math, pytest, torch, torch.nn.functional as F
from fastkd.all import *
from functools import partial
from helpers import ByHand, attention, convnet, fitted, furthest, learner, seeded, soft_target, trained_teacher, weights

def run(*args, n_epoch=3, **kwargs):
    "The script: one line in `fit`"
    return weights(fitted(learner(), KnowledgeDistillationCallback(*args, **kwargs), n_epoch).model)

def by_hand(loss, n_epoch=3, **kwargs): return weights(fitted(learner(), ByHand(trained_teacher(), loss, **kwargs), n_epoch).model)

def response(T): return lambda pred, teacher_pred, *fms: soft_target(pred, teacher_pred, T)

def user_loss(pred, teacher_pred, **kwargs): return F.mse_loss(pred, teacher_pred)

def both(pred, teacher_pred, fm_s, fm_t, **kwargs):
    "A user's loss on predictions and activations"
    return F.mse_loss(pred, teacher_pred) + sum((fm_s[s].mean(1) - fm_t[t].mean(1)).abs().mean() for s, t in zip(fm_s, fm_t))

def test_a_class(): assert furthest(run(trained_teacher(), SoftTarget), by_hand(response(5))) < 1e-6

def test_a_partial(): assert furthest(run(trained_teacher(), partial(SoftTarget, T=2), weight=.8), by_hand(response(2), weight=.8)) < 1e-6

def test_a_function():
    expected = by_hand(lambda pred, teacher_pred, *fms: F.mse_loss(pred, teacher_pred), weight=.3)
    assert furthest(run(trained_teacher(), user_loss, weight=.3), expected) < 1e-6

@pytest.mark.parametrize('layers', ['block1', ['block1'], ['block1', 'block2'], ['model.block1', 'model.block2']], ids=str)
def test_a_function_of_activations(layers):
    names = [name.removeprefix('model.') for name in ([layers] if isinstance(layers, str) else layers)]
    assert furthest(run(trained_teacher(), both, layers, layers), by_hand(both, layers_s=names, layers_t=names)) < 1e-6

@pytest.mark.parametrize('layer', ['block2', ['block2']], ids=str)
def test_layers_as_str_or_list(layer):
    "And `schedule=cos`: the weight of a step is that at the share of training that is done"
    expected = by_hand(lambda pred, teacher_pred, fm_s, fm_t: attention(fm_s['block2'], fm_t['block2']), layers_s=['block2'],
        layers_t=['block2'], weight=lambda pct: .9*(1 - math.cos(math.pi*pct))/2)
    assert furthest(run(trained_teacher(), Attention, layer, layer, weight=.9, schedule=cos), expected) < 1e-6

def test_schedule_is_recorded():
    learn = fitted(learner(), KnowledgeDistillationCallback(trained_teacher(), SoftTarget, schedule=cos), n_epoch=3)
    expected = [.5*(1 - math.cos(math.pi*i/12))/2 for i in range(12)] # 3 epochs of 4 batches
    assert learn.recorder.distillation['weight'] == pytest.approx(expected)

def test_layer_names():
    learn, model = learner(), convnet(4)
    names = get_model_layers(learn)
    assert names == [name for name, _ in model.named_modules() if name]
    assert get_module_by_name(learn, 'model.block2.0') is learn.model.block2[0]
    assert get_module_by_name(learn.model, 'block2.0') is learn.model.block2[0]
    assert get_module_by_name(learn, 'model.block3') is None
    assert get_model_layers(learn, get_layer_repr=True)['head.3'] == repr(learn.model.head[3])

def test_matched_layers_go_into_the_callback():
    teacher, learn = trained_teacher(), learner()
    pairs = match_feature_layers(learn.model, teacher, torch.zeros(1, 1, 8, 8))
    assert (pairs['student'], pairs['teacher']) == (['block1', 'block2'], ['block1', 'block2'])
    found = run(teacher, Attention, pairs['student'], pairs['teacher'])
    expected = by_hand(lambda pred, teacher_pred, fm_s, fm_t: sum(attention(fm_s[n], fm_t[n]) for n in fm_s),
        layers_s=['block1', 'block2'], layers_t=['block1', 'block2'])
    assert furthest(found, expected) < 1e-6

def test_positional_order():
    "`teacher, loss, activations_student, activations_teacher, weight, schedule`, as in the peer"
    cb = KnowledgeDistillationCallback(seeded(convnet, 8), Attention, ['block1'], ['block2'], .7, cos)
    part, = cb.loss.parts
    assert (part.students, part.teachers, cb.weight, cb.schedules) == (['block1'], ['block2'], .7, dict(weight=cos))
