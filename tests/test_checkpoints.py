"Checkpoints: any optimizer goes on bit for bit, nothing is changed by what cannot be loaded, and no run writes over another."
import copy, gc, os, pytest, random, re, signal, time, torch, weakref
from collections import OrderedDict
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD, load_learner
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Lamb, Larc, OptimWrapper, QHAdam, RAdam, RMSProp, ranger
from fastkd.all import *
from fastkd.optimizers import gradients, optimizer_state
from functools import partial
from helpers import (At, OnCPU, convnet, digits, learner, named_learner, quiet, raising, same, seed_cpu, seeded, slow, started,
    trained_teacher, weights)
from learning import each_kind
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)
def adapter(): return KD(trained_teacher(), 100*FitNet(), 'block2', 'block1', task_weight=1.)

def flat(o, prefix=''):
    "Numbers, tensors and names in a nested state, by path"
    if isinstance(o, dict): o = o.items()
    elif hasattr(o, '__iter__') and not isinstance(o, (str, torch.Tensor)): o = enumerate(o)
    else: return {prefix: o}
    return {path: value for key, child in o for path, value in flat(child, f'{prefix}.{key}').items()}

def equal(a, b):
    "Whether two nested states are the same bit for bit"
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)

def everything(learn, cbs=()):
    "All that a run is made of"
    opt = None if learn.opt is None else optimizer_state(learn.opt) | dict(frozen=learn.opt.frozen_idx)
    params = dict(learn.model.named_parameters())
    return copy.deepcopy(dict(model=dict(learn.model.state_dict()), opt=opt, flags={name: p.requires_grad for name, p in params.items()},
        grads=gradients(params), callbacks=[cb.state_dict() for cb in cbs], random=random.getstate(), torch=torch.get_rng_state(),
        shuffling=learn.dls.train.rng.getstate()))

def run(learn, cbs, start_epoch=0):
    "One cycle, or a constant rate for an optimizer without momentum, which fastai cannot schedule"
    if learn.opt is None: learn.create_opt()
    fit = learn.fit_one_cycle if 'mom' in learn.opt.hypers[0] else learn.fit
    fit(4, 1e-2, cbs=cbs, start_epoch=start_epoch)

def check_resumed(make, make_cbs, folder, fit=run, dies=2):
    "A run that dies in the epoch after `dies`, and goes on in a new learner, ends as one that does not; returns both learners"
    def stateful(cbs): return [cb for cb in cbs if hasattr(type(cb), 'state_dict')]
    cbs, lost = make_cbs(), make_cbs() # before random states are set: a teacher that is made for the first time is trained
    whole = started(make(folder/'whole'))
    fit(whole, cbs)
    dying = started(make(folder/'run'))
    last = At('after_backward', raising(KeyboardInterrupt), order=99, nth=dies*len(dying.dls.train) + 2)
    with pytest.raises(KeyboardInterrupt): fit(dying, [*lost, CheckpointCallback(), last])
    seed_cpu(99)
    learn, again = make(folder/'run'), make_cbs()
    for p in learn.model.parameters(): p.data.add_(1.)
    start = learn.load_checkpoint(cbs=stateful(again))
    assert start == dies
    fit(learn, [*again, CheckpointCallback()], start_epoch=start)
    assert equal(everything(learn, stateful(again)), everything(whole, stateful(cbs)))
    assert [list(row[1:]) for row in learn.recorder.values[dies:]] == [list(row[1:]) for row in whole.recorder.values[dies:]]
    return whole, learn

# ---- Any optimizer

def wrapped(opt, **kwargs): return partial(OptimWrapper, opt=getattr(torch.optim, opt), **kwargs)

OPTIMIZERS = dict(adam=Adam, sgd=partial(SGD, mom=.9), ranger=partial(ranger, k=3), torch_adamw=wrapped('AdamW'),
    torch_sgd=wrapped('SGD', momentum=.9, nesterov=True))
MORE = dict(plain_sgd=partial(SGD, mom=0.), l2=partial(Adam, decouple_wd=False), rmsprop=RMSProp, rmsprop_mom=partial(RMSProp, mom=.9),
    radam=RAdam, qhadam=QHAdam, larc=Larc, lamb=Lamb, torch_plain=wrapped('SGD'), torch_adam=wrapped('Adam', amsgrad=True),
    torch_nadam=wrapped('NAdam'), torch_radam=wrapped('RAdam'), torch_rmsprop=wrapped('RMSprop', momentum=.5, centered=True),
    torch_adagrad=wrapped('Adagrad'), torch_adadelta=wrapped('Adadelta'), torch_adamax=wrapped('Adamax'), torch_asgd=wrapped('ASGD'),
    torch_rprop=wrapped('Rprop'), torch_adafactor=wrapped('Adafactor'))
each_optimizer = pytest.mark.parametrize('name', [*OPTIMIZERS, *map(slow, MORE)])
optimizer = OPTIMIZERS | MORE

@each_optimizer
@pytest.mark.parametrize('make_cbs', [list, lambda: [adapter()]], ids=['plain', 'adapter'])
def test_any_optimizer_goes_on(name, make_cbs, tmp_path):
    whole, _ = check_resumed(lambda path: learner(seeded(convnet, 4, .3), path=path, opt_func=optimizer[name]), make_cbs, tmp_path)
    assert all(o.isfinite().all() for o in whole.model.parameters())

@pytest.mark.parametrize('opt', ['AdamW', slow('SGD')])
@pytest.mark.parametrize('make_cbs', [list, lambda: [adapter()]], ids=['plain', 'adapter'])
def test_an_optimizer_that_was_built(opt, make_cbs, tmp_path):
    "fastai also takes an instance of `OptimWrapper`"
    def make(path):
        model = seeded(convnet, 4)
        return learner(model, path=path, opt_func=OptimWrapper(opt=getattr(torch.optim, opt)(model.parameters(), lr=.1)))
    check_resumed(make, make_cbs, tmp_path)

def halves(model): return [list(model[:1].parameters()), list(model[1:].parameters())]
def sliced(learn, cbs, **kwargs): learn.fit_one_cycle(4, slice(1e-3, 1e-2), wd=.1, cbs=cbs, **kwargs)

@pytest.mark.parametrize('name', ['adam', 'torch_adamw', slow('ranger'), slow('torch_sgd')])
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('kwargs', [dict(), slow(dict(wd_bn_bias=True)), slow(dict(train_bn=False))], ids=str)
def test_groups_with_rates_of_their_own(name, frozen, kwargs, tmp_path):
    "Frozen or not, with and without weight decay of biases, with batch norm that trains while it is frozen"
    def make(path): return learner(seeded(convnet, 4), path=path, splitter=halves, opt_func=optimizer[name], **kwargs)
    def fit(learn, cbs, **kwargs):
        if frozen and not kwargs: learn.freeze() # what goes on is frozen by its checkpoint
        sliced(learn, cbs, **kwargs)
    whole, resumed = check_resumed(make, list, tmp_path, fit)
    n_frozen = 0 if not frozen else 3 if not kwargs.get('train_bn', True) else 1 # a convolution, and weight and bias of its batch norm
    assert [sum(not p.requires_grad for p in o.model.parameters()) for o in (whole, resumed)] == [n_frozen]*2

@pytest.mark.parametrize('dies,phase', [(1, 'frozen'), (3, 'unfrozen')])
def test_fine_tune_goes_on(dies, phase, tmp_path):
    "In the phase in which it died: two epochs with a frozen body, then two with all of it; batches of both are counted"
    def make(path): return learner(seeded(convnet, 4), path=path, splitter=halves)
    def second(learn, cbs, **kwargs): learn.fit_one_cycle(2, slice(5e-5, 5e-3), pct_start=.3, div=5., cbs=cbs, **kwargs)
    whole, dying = (started(make(tmp_path/name)) for name in ('whole', 'run'))
    whole.fine_tune(2, 1e-2, freeze_epochs=2)
    last = At('after_backward', raising(KeyboardInterrupt), nth=4*dies + 2)
    with pytest.raises(KeyboardInterrupt): dying.fine_tune(2, 1e-2, freeze_epochs=2, cbs=[CheckpointCallback(), last])
    learn = make(tmp_path/'run')
    start = learn.load_checkpoint()
    assert (start, learn.opt.frozen_idx) == (1, phase == 'frozen')
    if phase == 'frozen':
        learn.fit_one_cycle(2, slice(1e-2), pct_start=.99, start_epoch=start)
        learn.unfreeze()
        start = 0
    second(learn, [], start_epoch=start)
    assert equal(everything(learn), everything(whole))

def test_a_layer_that_its_owner_froze_stays_frozen(tmp_path):
    "After the optimizer was made, so that it is in a group, with a gradient that fastai's optimizers go on to decay"
    def make(path): return learner(seeded(convnet, 4), path=path)
    whole, first = started(make(tmp_path/'whole')), started(make(tmp_path))
    for learn in whole, first:
        learn.fit(1, 1e-2)
        learn.model.block1.requires_grad_(False)
    first.save_checkpoint()
    second = make(tmp_path)
    second.load_checkpoint()
    before = weights(whole.model)['block1.0.weight']
    for learn in whole, second: started(learn, 7).fit(1, 1e-2)
    assert equal(everything(second), everything(whole))
    assert not torch.equal(weights(whole.model)['block1.0.weight'], before) # weight decay, as in one place

# ---- What a fit sets up anew

def accumulated(): return [GradientAccumulation(60), adapter()]
def scaled(): return [OnCPU(init_scale=2.**24, growth_interval=3)]
def both(): return [*accumulated(), *scaled()]

@pytest.mark.parametrize('name', ['adam', 'torch_adamw', slow('torch_sgd')])
@pytest.mark.parametrize('make_cbs', [accumulated, scaled, both])
def test_the_middle_of_a_step(name, make_cbs, tmp_path):
    "An epoch of four batches of 25, and a step after 60 samples: one batch waits; a loss scale that falls and grows"
    check_resumed(lambda path: learner(seeded(convnet, 4), path=path, opt_func=optimizer[name]), make_cbs, tmp_path)

def test_a_new_fit_has_a_new_scale(tmp_path):
    "Only the fit that goes on gets the one that was saved, and neither `validate` nor `lr_find` takes it away"
    def scales(start_epoch, *looks):
        learn, seen = learner(path=tmp_path), []
        learn.load_checkpoint()
        for look in looks: look(learn)
        learn.fit(2, 1e-2, cbs=[OnCPU(init_scale=8.), At('before_batch', lambda learn: seen.append(learn.scaler.get_scale()), 99)],
            start_epoch=start_epoch)
        assert not any(type(cb).__name__ == '_FitState' for cb in learn.cbs)
        return seen
    started(learner(path=tmp_path)).fit(1, 1e-2, cbs=[OnCPU(init_scale=8., growth_interval=4), CheckpointCallback()]) # four batches: 16
    assert scales(1) == [16.] and scales(0) == [8.]
    assert scales(1, Learner.validate, lambda learn: learn.lr_find(num_it=8, show_plot=False)) == [16.]

def test_what_was_loaded_is_exported_without_us(tmp_path):
    "Before it goes on, too"
    started(learner(path=tmp_path)).fit(1, 1e-2, cbs=[OnCPU(), CheckpointCallback()])
    learn = named_learner(seeded(convnet, 4), path=tmp_path)
    learn.load_checkpoint()
    assert any(type(cb).__name__ == '_FitState' for cb in learn.cbs)
    learn.export()
    assert b'fastkd' not in (tmp_path/'export.pkl').read_bytes()

class Average(Callback):
    "A mean of the weights, as many users write it"
    mean, n = None, 0
    def before_fit(self):
        if self.mean is None: self.mean, self.n = copy.deepcopy(self.learn.model).requires_grad_(False), 0
    def after_batch(self):
        if not self.training: return
        self.n += 1
        for mean, p in zip(self.mean.parameters(), self.model.parameters()): mean.lerp_(p.detach(), .1)
    def state_dict(self): return dict(mean=self.mean.state_dict(), n=self.n)
    def load_state_dict(self, state):
        if self.mean is None: self.mean = seeded(convnet, 4, n_out=10).requires_grad_(False)
        self.mean.load_state_dict(state['mean'])
        self.n = state['n']

def test_a_callback_of_a_users(tmp_path):
    "Its mean goes on, beside an adapter and dropout"
    check_resumed(lambda path: learner(seeded(convnet, 4, .3), path=path), lambda: [adapter(), Average()], tmp_path)

def test_peers_go_on(tmp_path):
    "Students that teach each other are one model"
    def peers(): return Peers([seeded(convnet, 4, seed=i) for i in range(2)])
    def make(path): return learner(peers(), path=path, opt_func=wrapped('AdamW'), metrics=None)
    check_resumed(make, lambda: [MutualLearning(SoftTarget())], tmp_path)

def test_loaders_of_torch(tmp_path):
    "That shuffle by a generator of their own"
    def make(path):
        generator = torch.Generator().manual_seed(3)
        loader = lambda: torch.utils.data.DataLoader(digits()[:50], 10, shuffle=True, generator=generator)
        return quiet(Learner(DataLoaders(loader(), loader()), seeded(convnet, 4), CrossEntropyLossFlat(), path=path))
    whole, first, second = (make(tmp_path/name) for name in ('whole', 'run', 'run'))
    whole.fit(2, 1e-2)
    first.fit(1, 1e-2, cbs=CheckpointCallback())
    second.fit(2, 1e-2, start_epoch=second.load_checkpoint())
    whole_opt, second_opt = optimizer_state(whole.opt), optimizer_state(second.opt)
    assert same(weights(second.model), weights(whole.model)) and equal(whole_opt, second_opt)
    with pytest.raises(ValueError, match='was saved with loaders that shuffle in another way'):
        learner(path=tmp_path/'run').load_checkpoint()

@pytest.mark.parametrize('name', ['adam', 'torch_adamw', 'ranger'])
def test_an_export_in_between(name, tmp_path):
    "fastai makes a new optimizer with the old state; that of an adapter goes on, too"
    def trained(exported):
        learn, cb = named_learner(seeded(convnet, 4), path=tmp_path, opt_func=optimizer[name]), adapter()
        started(learn).fit(1, 1e-2, cbs=cb)
        if exported: learn.export()
        started(learn, 5).fit(1, 1e-2, cbs=cb)
        return weights(learn.model) | {name: o.detach() for name, o in cb.loss.named_parameters()}
    assert same(trained(True), trained(False))

# ---- Nothing is changed by what cannot be loaded

def saved(folder, model=None, name='checkpoint', cbs=None, **kwargs):
    "A checkpoint of a short run"
    learn = started(learner(model or seeded(convnet, 4, seed=3), path=folder, **kwargs), seed=3)
    learn.fit(1, 1e-2, cbs=cbs)
    learn.save_checkpoint(name, cbs=cbs)
    return learn

def refusal(learn, cbs=(), file='checkpoint', exc=ValueError):
    "What `load_checkpoint` says, and whether all is as it was: objects, values, and what the next fit makes of them"
    had_opt, opt, callbacks = learn.opt is not None, learn.opt, list(learn.cbs)
    before, held = everything(learn, cbs), [dict(vars(cb)) for cb in cbs]
    with pytest.raises(exc) as e: learn.load_checkpoint(file, cbs=list(cbs))
    assert equal(everything(learn, cbs), before) and [dict(vars(cb)) for cb in cbs] == held
    assert learn.opt is opt and (learn.opt is not None) == had_opt and list(learn.cbs) == callbacks
    return str(e.value)

def fresh(folder, model, **kwargs): return learner(model, path=folder, **kwargs)
def trained(folder, model, **kwargs): return used(fresh(folder, model, **kwargs))
def used(learn):
    started(learn).fit(1, 1e-2)
    return learn

before_and_after = pytest.mark.parametrize('ready', [fresh, trained], ids=['fresh', 'trained'])

def with_layer(model): return nn.Sequential(OrderedDict([*model.named_children(), ('more', nn.Linear(10, 10))]))
def other_buffer(n):
    model = seeded(convnet, 4)
    model.register_buffer('prior', torch.zeros(n))
    return model

@before_and_after
def test_another_model(ready, tmp_path):
    "The first tensor that differs is named, with both shapes or types, by hand: a head of 8 inputs and 10 classes"
    saved(tmp_path)
    wrong = 'checkpoint.pth is of another model, and nothing was loaded: '
    def said(model): return refusal(ready(tmp_path, model)).removeprefix(wrong)
    assert said(seeded(convnet, 4, n_out=12)) == 'head.3.weight is float32 of shape (10, 8) in the file, and float32 of shape (12, 8) here'
    assert said(seeded(convnet, 6)) == (
        'block1.0.weight is float32 of shape (4, 1, 3, 3) in the file, and float32 of shape (6, 1, 3, 3) here')
    assert said(with_layer(seeded(convnet, 4))) == 'more.weight, float32 of shape (10, 10) here, is not in the file'
    assert said(other_buffer(3)) == 'prior, float32 of shape (3,) here, is not in the file'

@before_and_after
def test_a_model_with_less(ready, tmp_path):
    saved(tmp_path, with_layer(seeded(convnet, 4)), 'more')
    saved(tmp_path, other_buffer(3), 'buffer')
    assert 'more.weight, float32 of shape (10, 10) in the file, is not in this model' in refusal(
        ready(tmp_path, seeded(convnet, 4)), file='more')
    assert 'prior is float32 of shape (3,) in the file, and float32 of shape (5,) here' in refusal(
        ready(tmp_path, other_buffer(5)), file='buffer')
    learn = ready(tmp_path, other_buffer(3))
    learn.model.prior = learn.model.prior.long()
    assert 'prior is float32 of shape (3,) in the file, and int64 of shape (3,) here' in refusal(learn, file='buffer')
    double = fresh(tmp_path, other_buffer(3).double())
    assert 'prior is float32 of shape (3,) in the file, and float64 of shape (3,) here' in refusal(double, file='buffer')

KINDS = dict(adam="fastai's Adam (weight_decay, average_grad(dampening=True), average_sqr_grad, step_stat, adam_step)",
    sgd="fastai's SGD (weight_decay, average_grad, momentum_step)", torch_adamw="torch's AdamW", torch_sgd="torch's SGD (nesterov)")

@before_and_after
@pytest.mark.parametrize('there', KINDS)
def test_another_optimizer(ready, there, tmp_path):
    "Both kinds are named"
    saved(tmp_path, opt_func=optimizer[there])
    for here in KINDS:
        if here == there: continue
        said = refusal(ready(tmp_path, seeded(convnet, 4), opt_func=optimizer[here]))
        assert f'was saved by {KINDS[there]}, and this learner trains with {KINDS[here]}: make it with the `opt_func`' in said

@pytest.mark.parametrize('there,here', [('plain_sgd', 'sgd'), ('adam', 'l2'), ('adam', 'radam'), ('adam', 'lamb'), ('ranger', 'radam'),
    ('torch_adam', 'torch_adamw'), ('rmsprop', 'rmsprop_mom'), ('torch_plain', 'plain_sgd')])
def test_optimizers_that_are_nearly_the_same(there, here, tmp_path):
    saved(tmp_path, opt_func=optimizer[there])
    assert 'was saved by' in refusal(fresh(tmp_path, seeded(convnet, 4), opt_func=optimizer[here]))

def test_an_instance_and_a_partial_are_one_kind(tmp_path):
    "What steps is the same; an instance that is refused keeps what it had"
    saved(tmp_path, opt_func=wrapped('AdamW'))
    model = seeded(convnet, 4)
    opt = torch.optim.AdamW(model.parameters())
    other = seeded(convnet, 5)
    learn = fresh(tmp_path, model, opt_func=OptimWrapper(opt=opt))
    assert learn.load_checkpoint() == 1 and learn.opt.opt is opt and len(opt.state) == len(list(model.parameters()))
    opt = torch.optim.AdamW(other.parameters())
    sum(p.sum() for p in other.parameters()).backward()
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    refusal(fresh(tmp_path, other, opt_func=OptimWrapper(opt=opt)))
    assert equal(opt.state_dict(), before) and len(opt.state) == len(list(other.parameters()))

@before_and_after
def test_other_groups(ready, tmp_path):
    "Fewer, of other layers, in another order, or with a layer that is frozen"
    saved(tmp_path, splitter=halves)
    assert 'holds 2 parameter groups, and this learner has 1' in refusal(ready(tmp_path, seeded(convnet, 4)))
    def later(model): return [list(model[:2].parameters()) + list(model[2].parameters()), list(model[3:].parameters())]
    assert 'holds other parameters in group 0: none, where this learner has block2.0.weight. Is it the same splitter' in refusal(
        ready(tmp_path, seeded(convnet, 4), splitter=later))
    def turned(model): return [o[::-1] for o in halves(model)]
    assert 'in group 0: block1.0.weight, where this learner has block1.1.bias' in refusal(
        ready(tmp_path, seeded(convnet, 4), splitter=turned))
    saved(tmp_path, name='whole')
    model = seeded(convnet, 4)
    model.block1.requires_grad_(False)
    assert 'in group 0: block1.0.weight, where this learner has block2.0.weight' in refusal(ready(tmp_path, model), file='whole')

class Fails(Average):
    "Loads half of its state"
    def load_state_dict(self, state):
        super().load_state_dict(state)
        if not hasattr(self, 'spared'): raise RuntimeError('on purpose')

@before_and_after
@pytest.mark.parametrize('name', ['adam', 'torch_adamw', slow('ranger')])
def test_a_callback_that_fails(ready, name, tmp_path):
    "After the weights were loaded, and another callback"
    def cbs():
        both = [adapter(), Fails()]
        both[1].mean, both[1].n = seeded(convnet, 4, seed=8).requires_grad_(False), 5
        return both
    saved(tmp_path, cbs=cbs(), opt_func=optimizer[name], splitter=halves)
    learn, pair = ready(tmp_path, seeded(convnet, 4), opt_func=optimizer[name], splitter=halves), cbs()
    if ready is trained: learn.freeze()
    assert refusal(learn, pair, exc=RuntimeError) == 'on purpose'
    pair[1].spared = True
    assert learn.load_checkpoint(cbs=pair) == 1 # and nothing is in the way of a second try
    assert learn.opt.frozen_idx == 0

def test_other_callbacks(tmp_path):
    "More, fewer, or others"
    saved(tmp_path, cbs=[adapter()])
    more = Average()
    more.mean = seeded(convnet, 4)
    learn = fresh(tmp_path, seeded(convnet, 4), cbs=more)
    assert 'also holds the state of KnowledgeDistillationCallback: pass all callbacks that were saved' in refusal(learn, [more])
    assert 'holds no state of Average: pass the callbacks that were saved' in refusal(learn, [adapter(), more])

def damaged(content, how):
    "Cut off at some place, or with one bit turned in a tensor"
    if isinstance(how, float): return content[:int(how*len(content))]
    place = len(content)//2
    return content[:place] + bytes([content[place] ^ 8]) + content[place + 1:]

@before_and_after
@pytest.mark.parametrize('how', [0., .001, .3, .9, .9999, 'a bit'])
def test_a_damaged_file(ready, how, tmp_path):
    saved(tmp_path)
    file = tmp_path/'models/checkpoint.pth'
    content = file.read_bytes()
    file.write_bytes(damaged(content, how))
    assert 'checkpoint.pth is damaged' in refusal(ready(tmp_path, seeded(convnet, 4)))
    file.write_bytes(content)
    assert fresh(tmp_path, seeded(convnet, 4)).load_checkpoint() == 1

@pytest.mark.slow
def test_any_bit(tmp_path):
    "Is seen, or is between what is read"
    learn = saved(tmp_path)
    file, expected, rand = tmp_path/'models/checkpoint.pth', weights(learn.model), random.Random(0)
    content, n_seen = file.read_bytes(), 0
    for _ in range(200):
        place = rand.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rand.randrange(8)]) + content[place + 1:])
        other = fresh(tmp_path, seeded(convnet, 4))
        try: other.load_checkpoint()
        except ValueError: n_seen += 1
        else: assert same(weights(other.model), expected)
    assert n_seen > 100

def test_files_of_other_makers(tmp_path):
    "Those of `learn.save`, with an optimizer and without, and what is no file of a model"
    learn = used(named_learner(seeded(convnet, 4), path=tmp_path))
    learn.save('student')
    learn.save('weights', with_opt=False)
    torch.save([1, 2], tmp_path/'models/list.pth')
    learn.export('models/whole.pth')
    for name in 'student', 'weights', 'list', 'whole':
        with pytest.raises(ValueError, match=f'{name}.pth was not written by `learn.save_checkpoint`'): learn.load_checkpoint(name)
    (tmp_path/'models/text.pth').write_text('weights')
    with pytest.raises(ValueError, match='text.pth is damaged, or was not written by'): learn.load_checkpoint('text')
    with pytest.raises(FileNotFoundError, match='absent.pth'): learn.load_checkpoint('absent')

@pytest.mark.parametrize('state', [{1, re.compile('x')}, lambda: 0, re.compile('x'), random.Random(0)],
    ids=['set', 'function', 'pattern', 'rng'])
def test_what_could_not_be_loaded_is_not_saved(state, tmp_path):
    "And the checkpoint before it stays"
    class Odd(Callback):
        def state_dict(self): return dict(state=state)
        def load_state_dict(self, state): pass
    learn = saved(tmp_path)
    file = tmp_path/'models/checkpoint.pth'
    content = file.read_bytes()
    with pytest.raises(ValueError, match='the state of Odd cannot be loaded again: a checkpoint holds tensors'):
        learn.save_checkpoint(cbs=Odd())
    assert file.read_bytes() == content and os.listdir(tmp_path/'models') == ['checkpoint.pth']

# ---- Two runs in one folder

def going_on(folder, name='checkpoint'):
    learn = learner(seeded(convnet, 4), path=folder)
    return learn, learn.load_checkpoint(name)

@pytest.mark.parametrize('every_epoch,files', [(False, ['checkpoint.pth']), (True, ['checkpoint_0.pth', 'checkpoint_1.pth'])])
def test_another_run_is_not_written_over(every_epoch, files, tmp_path):
    "Before it trains, the second run is told how it can; each of the three ways helps"
    def second(fname='checkpoint', learn=None, **kwargs):
        learn = learn or learner(seeded(convnet, 4, seed=1), path=tmp_path)
        started(learn).fit(2, 1e-2, cbs=CheckpointCallback(fname, every_epoch), **kwargs)
    def contents(): return {file.name: file.read_bytes() for file in (tmp_path/'models').iterdir()}
    second()
    before, steps, learn = contents(), [], learner(seeded(convnet, 4, seed=2), path=tmp_path)
    assert sorted(before) == files
    with pytest.raises(ValueError) as e:
        learn.fit(2, 1e-2, cbs=[CheckpointCallback(every_epoch=every_epoch), At('after_step', steps.append, nth=0)])
    said = str(e.value)
    assert re.search(rf'models/checkpoint(_\d)?\.pth is not of this run, and stays as it is', said) and steps == [] and contents() == before
    name = re.search(r"start_epoch=learn.load_checkpoint\('(\w+)'\)", said).group(1)
    assert "CheckpointCallback(fname='another')" in said and 'delete the file' in said
    second('another', learn)
    assert {name: contents()[name] for name in before} == before
    learn, start = going_on(tmp_path, name)
    second(learn=learn, start_epoch=start%2)
    assert contents() != before
    for file in files: (tmp_path/'models'/file).unlink()
    second()
    assert sorted(contents())[:len(files)] != [] and all(name in contents() for name in files)

def test_one_run_writes_over_itself(tmp_path):
    "In as many fits as you like, and after going back to an epoch"
    learn = started(learner(path=tmp_path))
    cbs = CheckpointCallback(every_epoch=True)
    for _ in range(2): learn.fit(2, 1e-2, cbs=cbs)
    assert learn.load_checkpoint('checkpoint_0') == 1
    learn.fit(2, 1e-2, cbs=cbs, start_epoch=1)
    learn.save_checkpoint('checkpoint_0')
    assert sorted(os.listdir(tmp_path/'models')) == ['checkpoint_0.pth', 'checkpoint_1.pth']

def test_two_that_go_on_from_one(tmp_path):
    "The first to save has the file; the one that was there, and the other one, have lost nothing"
    first = saved(tmp_path)
    (second, _), (third, _) = going_on(tmp_path), going_on(tmp_path)
    second.save_checkpoint()
    for learn in first, third:
        with pytest.raises(ValueError, match='is not of this run'): learn.save_checkpoint()
    fourth, _ = going_on(tmp_path)
    fourth.save_checkpoint() # of the line of the second

@pytest.mark.parametrize('other', [copy.deepcopy, lambda learn: load_learner(learn.path/'export.pkl')], ids=['copied', 'exported'])
def test_a_copy_is_another_run(other, tmp_path):
    learn = named_learner(seeded(convnet, 4), path=tmp_path)
    learn.save_checkpoint()
    learn.export()
    with pytest.raises(ValueError, match='is not of this run'): other(learn).save_checkpoint()

def test_what_learn_save_wrote_is_nobodys(tmp_path):
    learn = learner(path=tmp_path)
    content = learn.save('checkpoint').read_bytes()
    with pytest.raises(ValueError, match='checkpoint.pth is not of this run'): learn.fit(1, 1e-2, cbs=CheckpointCallback())
    assert (tmp_path/'models/checkpoint.pth').read_bytes() == content

def test_two_processes_that_begin_at_once(tmp_path):
    "Neither finds a file; the one that is later gives way, says so, and can be taken up from its own file"
    def late(learn): started(learner(seeded(convnet, 4, seed=2), path=tmp_path), 3).fit(1, 1e-2, cbs=CheckpointCallback())
    learn = started(learner(path=tmp_path))
    said = r'another run wrote checkpoint.pth while this one trained. This one goes on in checkpoint_\w{8}.pth'
    with pytest.warns(UserWarning, match=said): learn.fit(2, 1e-2, cbs=[CheckpointCallback(), At('after_epoch', late)])
    names = sorted(file.stem for file in (tmp_path/'models').iterdir())
    assert len(names) == 2 and names[0] == 'checkpoint'
    other, start = going_on(tmp_path, names[1])
    assert start == 2 and same(weights(other.model), weights(learn.model))
    other, start = going_on(tmp_path)
    assert start == 1 and not same(weights(other.model), weights(learn.model))

def test_a_look_is_no_run(tmp_path):
    "`validate` and `lr_find` do not ask whose file it is"
    saved(tmp_path)
    learn = learner(path=tmp_path, cbs=CheckpointCallback())
    learn.validate()
    learn.lr_find(num_it=8, show_plot=False)
    assert len(os.listdir(tmp_path/'models')) == 1

def test_learners_are_let_go(tmp_path):
    "Their ids do not keep them"
    learn = weakref.ref(saved(tmp_path))
    gc.collect()
    assert learn() is None

# ---- Killed

def in_child(act):
    "Run in a process of its own; returns its id"
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        act()
        status = 0
    finally: os._exit(status)

def make_killed(path, seed=0): return learner(seeded(convnet, 8, .3, seed=seed), path=path, n=50, opt_func=wrapped('AdamW'))

def train_on(folder, n_epoch):
    "Go on where the last checkpoint is, and save all the time"
    learn, cb = make_killed(folder), adapter()
    started(learn)
    start = learn.load_checkpoint(cbs=cb) if (folder/'models/checkpoint.pth').exists() else 0
    learn.fit(n_epoch, 1e-3, cbs=[cb, CheckpointCallback()], start_epoch=start)

def check_kills(n, folder):
    "Each time the last checkpoint is whole, and what goes on from it, after all kills, ends as what was never killed"
    trained_teacher()
    n_epoch, rand, file, starts = 10**6, random.Random(0), folder/'models/checkpoint.pth', [0]
    for _ in range(n):
        pid, before = in_child(lambda: train_on(folder, n_epoch)), file.stat().st_mtime_ns if file.exists() else 0
        while not file.exists() or file.stat().st_mtime_ns == before: time.sleep(.005)
        time.sleep(rand.uniform(0, .1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        starts.append(make_killed(folder, seed=9).load_checkpoint(cbs=adapter()))
    assert all(a < b for a, b in zip(starts, starts[1:]))
    return starts[-1]

def check_killed_run(n, folder):
    done = check_kills(n, folder/'killed')
    learn, cb, whole, cb_whole = make_killed(folder/'killed', seed=9), adapter(), started(make_killed(folder/'whole')), adapter()
    started(whole).fit(done + 2, 1e-3, cbs=cb_whole)
    learn.fit(done + 2, 1e-3, cbs=cb, start_epoch=learn.load_checkpoint(cbs=cb))
    assert equal(everything(learn, [cb]), everything(whole, [cb_whole]))

def test_killed(tmp_path): check_killed_run(3, tmp_path)

@pytest.mark.slow
def test_killed_often(tmp_path): check_killed_run(30, tmp_path)

# ---- Before and after other fits

@each_kind
def test_saved_before_the_first_fit(make, tmp_path):
    "Without an optimizer, with losses that have learned nothing yet; the callback that goes on may have learned elsewhere"
    whole, cb, again = learner(path=tmp_path), make(), make()
    assert whole.opt is None
    whole.save_checkpoint(cbs=cb)
    started(whole).fit(2, 1e-2, cbs=cb)
    for _ in range(2):
        learn = learner(path=tmp_path)
        assert learn.load_checkpoint(cbs=again) == 0
        started(learn).fit(2, 1e-2, cbs=again)
        assert equal(everything(learn, [again]), everything(whole, [cb]))

def test_a_callback_that_learned_for_another_student(tmp_path):
    "Of another width; its adapter is made for the student that goes on"
    cb, whole = adapter(), started(learner(seeded(convnet, 4), path=tmp_path))
    whole.fit(2, 1e-2, cbs=[cb, CheckpointCallback(every_epoch=True)])
    other = adapter()
    started(learner(seeded(convnet, 6))).fit(1, 1e-2, cbs=other)
    assert [p.shape[1] for p in other.loss.parameters() if p.ndim == 4] == [12]
    learn = learner(path=tmp_path)
    learn.fit(2, 1e-2, cbs=other, start_epoch=learn.load_checkpoint('checkpoint_0', cbs=other))
    assert equal(everything(learn, [other]), everything(whole, [cb]))
    assert [p.shape[1] for p in other.loss.parameters() if p.ndim == 4] == [8]

def test_an_adapter_of_another_optimizer(tmp_path):
    "Is said, where its state is loaded without a checkpoint"
    cb, other = adapter(), adapter()
    started(learner(opt_func=Adam)).fit(1, 1e-2, cbs=cb)
    other.load_state_dict(cb.state_dict())
    said = 'was trained by another kind of optimizer, with eps, lr, mom, sqr_mom, wd, and this one has lr, mom, wd'
    with pytest.raises(ValueError, match=said): learner(opt_func=SGD).fit(1, 1e-2, cbs=other)

@pytest.mark.parametrize('name', ['adam', 'torch_adamw'])
def test_flags_of_fastai(name, tmp_path):
    "A layer that its owner trains while it is frozen, in an optimizer of either kind"
    kwargs = dict(path=tmp_path, splitter=halves, opt_func=optimizer[name], train_bn=False)
    first, second = (learner(seeded(convnet, 4), **kwargs) for _ in range(2))
    first.create_opt()
    first.opt.state[first.model.block1[0].weight]['force_train'] = True
    first.save_checkpoint()
    second.load_checkpoint()
    second.freeze()
    assert [name for name, p in second.model.block1.named_parameters() if p.requires_grad] == ['0.weight']

def test_other_layers_of_a_callback_that_has_learned(tmp_path):
    "Whose shapes are known before anything is loaded: 8 channels were compared, and 4 are"
    saved(tmp_path, cbs=[adapter()])
    cb = KD(trained_teacher(), 100*FitNet(), 'block1', 'block1', task_weight=1.)
    learn = used(fresh(tmp_path, seeded(convnet, 4), cbs=cb))
    said = refusal(learn, [cb])
    assert 'what was saved was learned by other losses or layers than those of KnowledgeDistillationCallback(100*FitNet()' in said
    assert [p.shape for p in cb.loss.parameters() if p.ndim == 4] == [(16, 4, 1, 1)]
