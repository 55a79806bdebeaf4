"Losses in sums: what they ask for, what they are called, how settings move, and what `build` makes."
import copy, gc, math, numpy as np, pickle, pytest, random, torch, weakref
from functools import partial, wraps
from torch import nn, tensor
from fastkd.losses.core import INPUTS, Loss, Mixed, Part, Probe, ResponseLoss, Sum, as_sum, loss_name, pick, wanted_inputs
from fastkd.losses.feature import Attention, FitNet
from fastkd.losses.relation import PKT
from fastkd.losses.response import DecoupledKD, Logits, SoftTarget
from formulas import close

def by_function(pred, teacher_pred): return (pred - teacher_pred).abs().mean()
def takes_everything(pred, teacher_pred, **kwargs): return (pred - teacher_pred).abs().mean()*len(kwargs)
def with_setting(pred, teacher_pred, T=2): return (pred - teacher_pred).abs().mean()/T

class Relational(nn.Module):
    "A user's module that is no `Loss`"
    def forward(self, fm_s, fm_t): return sum((s - t).abs().mean() for s, t in zip(fm_s.values(), fm_t.values()))

def batch(n=4, n_classes=3, seed=0):
    "Predictions of both, and activations of the layers a, b and c"
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    fm_s = dict(a=draw(n, 2, 4, 4), b=draw(n, 3, 4, 4), c=draw(n, 5))
    fm_t = dict(a=draw(n, 6, 4, 4), b=draw(n, 3, 2, 2), c=draw(n, 5))
    return dict(pred=draw(n, n_classes), teacher_pred=draw(n, n_classes), fm_s=fm_s, fm_t=fm_t)

def probe_of(given): return Probe(**{k: {n: o[:1] for n, o in v.items()} if isinstance(v, dict) else v[:1] for k, v in given.items()})

def predictions(given): return given['pred'], given['teacher_pred']

def layers(given, s, t): return given['fm_s'][s], given['fm_t'][t]

# ---- Arithmetic

def test_factors():
    given = batch()
    soft, logits = SoftTarget()(*predictions(given)), Logits()(*predictions(given))
    for total, expected in ((SoftTarget() + Logits(), soft + logits), (2*SoftTarget(), 2*soft), (SoftTarget()*2, 2*soft),
        (3*(2*SoftTarget() + Logits()), 6*soft + 3*logits), ((2*SoftTarget() + Logits())*.5, soft + logits/2),
        (0*SoftTarget() + Logits(), logits),
        (SoftTarget() + 2*(Logits() + 3*SoftTarget()), 7*soft + 2*logits), (sum([SoftTarget(), Logits()]), soft + logits),
        (np.float64(2)*SoftTarget(), 2*soft)):
        assert isinstance(total, Sum)
        close(total(*predictions(given)), expected)

def test_functions_in_sums():
    given = batch()
    plain, soft = by_function(*predictions(given)), SoftTarget()(*predictions(given))
    function = as_sum(by_function)
    for total in (SoftTarget() + by_function, by_function + SoftTarget(), function + SoftTarget, SoftTarget() + function):
        close(total(**given), plain + soft)
    close((SoftTarget() + partial(SoftTarget, T=1))(**given), soft + SoftTarget(1)(*predictions(given)))
    close((10*as_sum(by_function))(**given), 10*plain)

def test_a_sum_of_sums_keeps_its_parts():
    a, b = SoftTarget() + 2*Attention().on('a', 'a'), 3*Logits()
    both = a + b
    assert [(part.name, part.factor) for part in both.parts] == [('soft_target', 1), ('attention', 2), ('logits', 3)]
    assert [part.name for part in a.parts] == ['soft_target', 'attention'] and len(b.parts) == 1 # the operands are what they were
    assert (2*both).parts[1].factor == 4 and both.parts[1].factor == 2

@pytest.mark.parametrize('factor', [-1, math.inf, math.nan])
def test_factors_out_of_range(factor):
    with pytest.raises(ValueError, match='soft_target: a factor is a finite number >= 0'): factor*SoftTarget()

@pytest.mark.parametrize('factor', [tensor(2.), None, '2', [1.]])
def test_factors_are_numbers(factor):
    with pytest.raises(TypeError, match='a loss is multiplied by a number'): SoftTarget()*factor

def test_values_and_total():
    given = batch()
    loss = SoftTarget() + 100*Attention().on('a', 'a') + by_function
    values = loss.values(**given)
    assert list(values) == ['soft_target', 'attention', 'by_function']
    close(values['attention'], Attention()(*layers(given, 'a', 'a'))) # without its factor
    close(loss.total(values), values['soft_target'] + 100*values['attention'] + values['by_function'])
    close(loss(**given), loss.total(values))

# ---- Layers of a part

def test_on():
    given = batch()
    loss = SoftTarget() + 2*Attention().on('a', 'b') + FitNet().on(['c', 'c'], ['c', 'c'])
    expected = SoftTarget()(*predictions(given)) + 2*Attention()(*layers(given, 'a', 'b')) + 2*FitNet()(*layers(given, 'c', 'c'))
    close(loss(**given), expected)
    assert [(part.students, part.teachers) for part in loss.parts] == [(None, None), (['a'], ['b']), (['c', 'c'], ['c', 'c'])]

def test_on_takes_the_order_of_the_pairs():
    given = batch()
    for students, teachers in ((['a', 'b'], ['b', 'a']), (['b', 'a'], ['a', 'b']), (['a', 'a'], ['a', 'b'])):
        expected = sum(Attention()(*layers(given, s, t)) for s, t in zip(students, teachers))
        close(Attention().on(students, teachers)(**given), expected)

def test_on_fills_what_is_open():
    "The callback's layers go to the parts that have none of their own and want some"
    loss = (SoftTarget() + Attention().on('b', 'b') + PKT() + Relational()).on(['a', 'c'], ['c', 'a'])
    assert [part.students for part in loss.parts] == [None, ['b'], ['a', 'c'], ['a', 'c']]
    assert [part.teachers for part in loss.parts] == [None, ['b'], ['c', 'a'], ['c', 'a']]

def test_without_layers_of_its_own_a_part_gets_all():
    given = batch()
    expected = Attention()(*layers(given, 'a', 'a'))
    close(as_sum(Attention)(fm_s=dict(x=given['fm_s']['a']), fm_t=dict(y=given['fm_t']['a'])), expected)

def test_unequal_layers():
    message = r"2 student layers \['a', 'b'\] and 1 teacher layers \['a'\] do not pair"
    with pytest.raises(ValueError, match=message): Attention().on(['a', 'b'], 'a')

@pytest.mark.parametrize('layers,said', [(('a', None), r"student layers \['a'\] have no partners: name teacher layers, too"),
    ((None, 'a'), r"teacher layers \['a'\] have no partners: name student layers, too")])
def test_layers_of_one_side(layers, said):
    with pytest.raises(ValueError, match=said): Attention().on(*layers)

def test_unknown_setting():
    with pytest.raises(TypeError, match='SoftTarget has no setting temperature; its settings: T, standardize'): SoftTarget(temperature=4)
    with pytest.raises(TypeError, match='Logits has no setting p; its settings: none'): as_sum(partial(Logits, p=2))
    with pytest.raises(TypeError, match=r'no setting normalize; .*What you mean is NormalizedKD\(\)'): DecoupledKD(normalize=True)

def test_functions_with_other_parameters():
    with pytest.raises(TypeError, match='mse_loss asks for input.*by one that does: `lambda pred, teacher_pred'): as_sum(nn.MSELoss())

def test_pick():
    given = dict(a=1, b=2)
    assert pick(given, ['b', 'a', 'b', 'b']) == {'b': 2, 'a': 1, 'b#2': 2, 'b#3': 2}
    assert list(pick(given, ['b', 'a', 'b'])) == ['b', 'a', 'b#2']

# ---- Names

class KLLoss(SoftTarget): "Named with capitals"

def test_names():
    names = {loss_name(loss) for loss in (SoftTarget(), SoftTarget, partial(SoftTarget, T=2), partial(partial(SoftTarget, T=2), T=3))}
    assert names == {'soft_target'}
    assert [loss_name(o) for o in (PKT(), FitNet(), KLLoss(), by_function, lambda pred: 0, Relational())] == [
        'pkt', 'fit_net', 'kl_loss', 'by_function', 'loss', 'relational']

def test_repeated_names():
    loss = Attention(p=1) + SoftTarget() + Attention(p=2) + (Attention(p=3) + (lambda pred: 0) + (lambda pred: 1))
    assert [part.name for part in loss.parts] == ['attention', 'soft_target', 'attention_2', 'attention_3', 'loss', 'loss_2']
    assert [part.loss.p for part in loss.parts if isinstance(part.loss, Attention)] == [1, 2, 3]
    assert list(loss.losses) == ['attention', 'soft_target', 'attention_2', 'attention_3']

def test_names_are_unique():
    "Also where a function is called what a repeated part would be called"
    def loss_2(pred): return 10
    names = lambda *parts: [part.name for part in sum(map(as_sum, parts)).parts]
    zero, one = (lambda pred: 0), (lambda pred: 1)
    assert names(zero, one, loss_2) == ['loss', 'loss_2', 'loss_2_2']
    assert names(loss_2, zero, one) == ['loss_2', 'loss', 'loss_3']
    assert (as_sum(zero) + one + loss_2)(pred=0) == 11

# ---- What a loss asks for

def test_wanted_inputs():
    assert wanted_inputs(SoftTarget()) == dict(pred=True, teacher_pred=True, mask=False, axis=False)
    assert wanted_inputs(Attention()) == wanted_inputs(PKT()) == dict(fm_s=True, fm_t=True)
    assert wanted_inputs(takes_everything) == {name: name in ('pred', 'teacher_pred') for name in INPUTS}
    assert wanted_inputs(with_setting) == wanted_inputs(partial(with_setting, T=3)) == dict(pred=True, teacher_pred=True)
    assert wanted_inputs(Relational()) == dict(fm_s=True, fm_t=True)

def test_wanted_inputs_of_unusual_callables():
    @wraps(by_function)
    def wrapped(*args, **kwargs): return by_function(*args, **kwargs)
    class Judge:
        def __call__(self, pred, *, target, index=None): return pred.mean()
        def judge(self, teacher_pred): return teacher_pred.mean()
    assert wanted_inputs(wrapped) == dict(pred=True, teacher_pred=True)
    assert wanted_inputs(Judge()) == dict(pred=True, target=True, index=False)
    assert wanted_inputs(Judge().judge) == dict(teacher_pred=True)
    with pytest.raises(TypeError, match='<lambda>|loss asks for teacher; a loss can ask for pred, teacher_pred, fm_s'):
        wanted_inputs(lambda pred, teacher: 0)
    with pytest.raises(TypeError, match='mse_loss asks for input'): as_sum(nn.MSELoss())

def test_plain_functions_get_what_they_name():
    given, seen = batch() | dict(target=tensor([0, 1, 2, 0]), mask=torch.ones(4).bool(), index=torch.arange(4), axis=1), {}
    def everything(**kwargs):
        seen.update(kwargs)
        return 0.
    def some(pred, target, fm_t=None): return torch.equal(pred, given['pred']) + torch.equal(target, given['target']) + len(fm_t)
    assert (as_sum(everything) + some)(**given) == 5
    assert list(seen) == list(INPUTS) and all(seen[name] is given[name] for name in INPUTS)

def test_missing_inputs():
    given = batch()
    with pytest.raises(ValueError, match=r'SoftTarget\(T=5\) needs teacher_pred \(logits of the teacher'): as_sum(SoftTarget)(given['pred'])
    with pytest.raises(ValueError, match='needs fm_s .*, fm_t'): as_sum(Attention)(**{k: given[k] for k in ('pred', 'teacher_pred')})

# ---- Every way of naming a loss

def test_as_sum():
    given = batch()
    attention = SoftTarget(T=2)
    close(as_sum(attention)(*predictions(given)), attention(*predictions(given)))
    assert as_sum(attention).parts[0].loss is attention
    assert as_sum(SoftTarget).parts[0].loss.T == 5 and as_sum(partial(SoftTarget, T=2)).parts[0].loss.T == 2
    total = SoftTarget() + Logits()
    assert as_sum(total) is total
    for plain in (by_function, with_setting, partial(with_setting, T=3), lambda pred, teacher_pred: pred.sum()):
        assert as_sum(plain).parts[0].loss is plain
        close(as_sum(plain)(**given), plain(*predictions(given)))
    assert as_sum(Relational).parts[0].wants_layers and not as_sum(SoftTarget).parts[0].wants_layers

class NeedsSettings(Loss):
    "Cannot be made without `width`"
    def __init__(self, width):
        super().__init__()
        self.width = width
    def forward(self, pred): return pred.mean()*self.width

def test_as_sum_refuses():
    with pytest.raises(TypeError, match="cannot be made from its class alone, so pass an instance: .*'width'"): as_sum(NeedsSettings)
    with pytest.raises(TypeError, match='several losses are added'): as_sum([SoftTarget(), Attention()])
    for wrong in ('SoftTarget', 4, None, tensor(1.)):
        with pytest.raises(TypeError, match='a loss is a callable that returns a scalar, not'): as_sum(wrong)
    assert as_sum(partial(NeedsSettings, width=3))(pred=tensor([2.])) == 6

# ---- Settings that move

def test_find_setting():
    loss = SoftTarget() + 10*Attention().on('a', 'a') + Attention(p=3).on('b', 'b') + PKT() + by_function
    attention, second = loss.parts[1:3]
    assert loss.find_setting('T') == loss.find_setting('soft_target.T') == (loss.parts[0], 'T')
    assert loss.find_setting('attention.p') == (attention, 'p') and loss.find_setting('attention_2.p') == (second, 'p')
    assert loss.find_setting('attention_2.factor') == (second, 'factor') and loss.find_setting('eps')[1] == 'eps'
    assert loss.find_setting('by_function.factor') == (loss.parts[4], 'factor')
    assert as_sum(SoftTarget).find_setting('factor')[1] == 'factor'
    assert (SoftTarget() + Attention(p=2.5)).find_setting('p')[0].loss.p == 2.5
    assert as_sum(SoftTarget(T=np.float32(4))).find_setting('T')[0].loss.T == 4

@pytest.mark.parametrize('key,message', [('p', r"'p' is ambiguous in .*; write attention.p or attention_2.p"),
    ('factor', 'write soft_target.factor or attention.factor or attention_2.factor'),
    ('temperature', 'nothing is called .*: weight, soft_target.factor, soft_target.T, attention.factor, attention.p, attention_2.factor'),
    ('soft_target.p', "nothing is called 'soft_target.p'"), ('attention_3.p', 'nothing is called'), ('form', 'nothing is called'),
    ('standardize', 'nothing is called'), ('soft_target.standardize', 'nothing is called'), ('', 'nothing is called')])
def test_settings_that_are_not_there(key, message):
    loss = SoftTarget() + Attention() + Attention(p=1)
    with pytest.raises(ValueError, match=message): loss.find_setting(key)

def test_setting():
    given = batch()
    loss = SoftTarget() + 10*Attention().on('a', 'a')
    with loss.setting({'T': 2, 'attention.p': 3, 'attention.factor': 7}):
        close(loss(**given), SoftTarget(T=2)(*predictions(given)) + 7*Attention(p=3)(*layers(given, 'a', 'a')))
    assert (loss.parts[0].loss.T, loss.parts[1].loss.p, loss.parts[1].factor) == (5, 2, 10)

def test_setting_is_undone_after_errors():
    loss = SoftTarget() + Attention()
    with pytest.raises(KeyboardInterrupt):
        with loss.setting({'T': 2, 'attention.factor': 3}): raise KeyboardInterrupt
    with pytest.raises(ValueError, match='p must be at least 1'):
        with loss.setting({'T': 2, 'attention.factor': 3, 'p': .5}): pass
    assert (loss.parts[0].loss.T, loss.parts[1].loss.p, loss.parts[1].factor) == (5, 2, 1)

def test_check_factor():
    part = as_sum(SoftTarget).parts[0]
    part.check_factor(0)
    with pytest.raises(ValueError, match='soft_target: a factor is a finite number >= 0, not -1'): part.check_factor(-1)

# ---- How they look

def test_repr():
    losses = SoftTarget(), SoftTarget(2.5, standardize=True), Logits(), FitNet(), FitNet(None, normalize=True), PKT()
    assert [*map(repr, losses)] == ['SoftTarget(T=5)', 'SoftTarget(T=2.5, standardize=True)', 'Logits()', 'FitNet()',
        'FitNet(adapter=None, normalize=True)', 'PKT(eps=1e-07)']
    loss = SoftTarget(T=4) + 1000*Attention(form='paper').on('layer2', 'body.2') + .25*as_sum(by_function)
    assert repr(loss) == "SoftTarget(T=4) + 1000*Attention(p=2, form='paper').on(['layer2'], ['body.2']) + 0.25*by_function"
    assert repr(1234567.5*Logits()) == '1234567.5*Logits()'

def test_repr_can_be_evaluated():
    at = Attention(form='paper').on(['a', 'b'], ['c', 'd'])
    loss = SoftTarget(T=4, standardize=True) + 30000*PKT() + 1000*at + FitNet(normalize=True)
    again = eval(repr(loss))
    assert repr(again) == repr(loss)
    given = batch()
    given['fm_t'] |= dict(d=given['fm_t']['b'])
    some = lambda loss: loss.parts[0].loss(*predictions(given)) + loss.parts[2].loss(*layers(given, 'a', 'a'))
    assert torch.equal(some(again), some(loss))

# ---- Learned parts

def learning(): return SoftTarget() + 100*FitNet().on(['a', 'c'], ['a', 'c']) + Attention().on('a', 'a') + FitNet().on('b', 'a')

def test_build():
    given = batch()
    loss = learning()
    assert not list(loss.parameters())
    assert loss.build(probe_of(given)) is loss
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {
        'losses.fit_net.learned.0.weight': (6, 2, 1, 1), 'losses.fit_net.learned.0.bias': (6,),
        'losses.fit_net_2.learned.0.weight': (6, 3, 1, 1), 'losses.fit_net_2.learned.0.bias': (6,)}
    close(loss(**given), loss.total(loss.values(**given)))

def test_adapters_are_made_once():
    given = batch()
    loss = learning().build(probe_of(given))
    made, before = list(loss.parameters()), copy.deepcopy(loss.state_dict())
    loss.build(probe_of(batch(seed=3)))
    assert all(a is b for a, b in zip(made, loss.parameters()))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())

def states():
    "The next numbers of all generators, taken without moving them"
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.initial_seed()

def test_build_leaves_generators_alone():
    before = states()
    learning().build(probe_of(batch()))
    assert states() == before

def test_build_leaves_gpus_alone(monkeypatch):
    "`torch.manual_seed` would seed them, too, and a fork of the CPU's state would not bring theirs back"
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    learning().build(probe_of(batch()))
    assert seeded == []
    torch.manual_seed(3)
    assert seeded == [3] # this is the way that a seed takes to a GPU

def test_build_is_seeded():
    "The same seed makes the same adapters, whatever was drawn since; another seed makes others"
    def weights(seed, n_drawn):
        torch.manual_seed(seed)
        torch.randn(n_drawn)
        return learning().build(probe_of(batch())).state_dict()
    first, same, other = weights(1, 0), weights(1, 100), weights(2, 0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)

def test_parts_start_with_numbers_of_their_own():
    loss = (FitNet().on('a', 'a') + FitNet().on('a', 'a')).build(probe_of(batch()))
    first, second = (part.loss.learned[0].weight for part in loss.parts)
    assert not torch.equal(first, second)

def test_adapters_are_no_copy_of_the_students_weights():
    "With the seed of `build`, a student made first would start with the same numbers"
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 6, 1)
    torch.manual_seed(1)
    loss = FitNet().on('a', 'a').build(probe_of(batch()))
    assert not torch.equal(conv.weight, next(loss.parameters()))

def test_state_dict():
    given = batch()
    loss = learning().build(probe_of(given))
    torch.manual_seed(5)
    other = learning().build(probe_of(given))
    assert not torch.equal(loss(**given), other(**given))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(loss(**given), other(**given))

def test_without_learned():
    given = batch()
    loss = learning().build(probe_of(given))
    bare = loss.without_learned()
    assert not list(bare.parameters()) and len(list(loss.parameters())) == 4
    assert repr(bare) == repr(loss) and [part.name for part in bare.parts] == [part.name for part in loss.parts]
    loss.parts[0].loss.T = 2
    assert bare.parts[0].loss.T == 5 # a loss of its own
    rebuilt = bare.build(probe_of(given))
    assert len(list(rebuilt.parameters())) == 4 and not set(rebuilt.parameters()) & set(loss.parameters())

@pytest.mark.parametrize('copied', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=['deepcopy', 'pickle'])
def test_copies(copied):
    given = batch()
    for built in (False, True):
        loss = learning() + by_function + PKT().on('c', 'c')
        if built: loss.build(probe_of(given))
        again = copied(loss)
        assert repr(again) == repr(loss)
        assert not set(map(id, again.parameters())) & set(map(id, loss.parameters()))
        assert all(part.loss is again.losses[part.name] for part in again.parts if isinstance(part.loss, nn.Module))
        with again.setting({'T': 2}): assert loss.parts[0].loss.T == 5
        if built: assert torch.equal(again(**given), loss(**given))

@pytest.mark.parametrize('loss,setting', [(SoftTarget(T=3), 'T'), (Attention(p=3, form='paper'), 'p'), (PKT(eps=1e-6), 'eps')])
def test_copies_of_losses(loss, setting):
    for again in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.without_learned()):
        assert type(again) is type(loss) and repr(again) == repr(loss) and again is not loss
        with pytest.raises(ValueError): setattr(again, setting, -1) # settings are still checked

def test_a_loss_keeps_no_batch():
    given = batch()
    loss = learning().build(probe_of(given))
    value = loss(**given)
    value.backward()
    dead = [weakref.ref(o) for o in (value, given['pred'], given['fm_s']['a'])]
    del value, given
    gc.collect()
    assert [ref() for ref in dead] == [None]*3

class Remembers(ResponseLoss):
    "Has a buffer beside what it learns"
    def make_learned(self, probe): return nn.BatchNorm1d(probe.pred.shape[1], affine=False)
    def rows(self, student, teacher): return (self.learned(student) - teacher).abs().mean(1)

def test_buffers_are_learned_parts():
    given = batch()
    loss = (Remembers() + SoftTarget()).build(probe_of(given))
    loss(**given)
    assert loss.state_dict()['losses.remembers.learned.num_batches_tracked'] == 1
    assert not list(loss.without_learned().buffers())

def test_parts_and_mixed_are_plain():
    part = Part(SoftTarget(), 2., name='x')
    assert part.wants == wanted_inputs(part.loss) and repr(part) == '2*SoftTarget(T=5)'
    assert Mixed(1, 2, 3)._fields == ('y', 'y1', 'lam')

# ---- Predictions by name

def test_prediction_of_a_layer():
    "A part may compare the output of a layer instead of the model's; other parts go on with the model's"
    given = batch()
    given['fm_s']['aux'], given['fm_t']['other'] = torch.randn(4, 3), torch.randn(4, 3)
    values = (Logits().on(pred='aux', teacher_pred='other') + Logits().on(pred='aux') + Logits()).values(**given)
    close(values['logits'], (given['fm_s']['aux'] - given['fm_t']['other']).pow(2).mean())
    close(values['logits_2'], (given['fm_s']['aux'] - given['teacher_pred']).pow(2).mean())
    close(values['logits_3'], (given['pred'] - given['teacher_pred']).pow(2).mean())

def test_predictions_and_layers_of_a_sum():
    "Each name goes to the parts that ask for it and have none of their own"
    loss = (SoftTarget() + Attention() + SoftTarget().on(pred='other')).on('a', 'b', pred='aux')
    assert [part.pred for part in loss.parts] == ['aux', None, 'other'] and [part.students for part in loss.parts] == [None, ['a'], None]
    assert repr(SoftTarget().on(pred='aux', teacher_pred='1')) == f"{SoftTarget()}.on(pred='aux', teacher_pred='1')"
    assert repr((2*loss).without_learned()) == repr(2*loss)

def test_build_looks_at_the_named_prediction():
    given = batch()
    given['fm_s']['aux'] = torch.randn(4, 7)
    with pytest.raises(ValueError, match='the student predicts 7 classes and the teacher 3'):
        SoftTarget().on(pred='aux').build(probe_of(given))

@pytest.mark.parametrize('loss,kwargs,said', [(Attention, dict(pred='a'), 'asks for a pred and has none'),
    (lambda: SoftTarget().on(pred='a'), dict(pred='b'), 'asks for a pred and has none'),
    (SoftTarget, dict(teacher_pred=3), 'by their names'), (SoftTarget, {}, 'compares predictions')],
    ids=['features', 'twice', 'number', 'nothing'])
def test_predictions_of_nobody(loss, kwargs, said):
    with pytest.raises((ValueError, TypeError), match=said): loss().on(**kwargs)
    with pytest.raises(ValueError, match=r'needs pred \(logits'): Logits().on(pred='aux').values(**batch())
