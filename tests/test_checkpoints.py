"Checkpoints: any optimizer goes on bit for bit, nothing is changed by what cannot be loaded, and no run writes over another."
import copy, gc, os, pytest, random, re, signal, time, torch, weakref
from collections import OrderedDict
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD, load_learner
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import Lamb, Larc, Lookahead, Optimizer, OptimWrapper, QHAdam, RAdam, RMSProp, ranger, weight_decay
from fastkd.all import *
from fastkd.optimizers import gradients, optimizer_kind, optimizer_state
from functools import partial
from helpers import At, OnCPU, block, convnet, digits, learner, quiet, raising, same, seed_cpu, seeded, slow, started, trained_teacher, weights
from learning import fitnet, learned
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

def run(learn, cbs, n_epoch=4, start_epoch=0): learn.fit_one_cycle(n_epoch, 1e-2, cbs=cbs, start_epoch=start_epoch)

def check_resumed(make, make_cbs, folder, fit=run, dies=2):
    "A run that dies in the epoch after `dies`, and goes on in a new learner, ends as one that does not; returns both learners"
    whole, cbs, stateful = started(make(folder/'whole')), make_cbs(), lambda cbs: [cb for cb in cbs if hasattr(type(cb), 'state_dict')]
    fit(whole, cbs)
    dying = started(make(folder/'run'))
    last = At('after_backward', raising(KeyboardInterrupt), order=99, nth=dies*len(dying.dls.train) + 2)
    with pytest.raises(KeyboardInterrupt): fit(dying, [*make_cbs(), CheckpointCallback(), last])
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
MORE = dict(plain_sgd=partial(SGD, mom=0.), l2=partial(Adam, decouple_wd=False), rmsprop=RMSProp, rmsprop_mom=partial(RMSProp, mom=.9), radam=RAdam,
    qhadam=QHAdam, larc=Larc, lamb=Lamb, torch_plain=wrapped('SGD'), torch_adam=wrapped('Adam', amsgrad=True), torch_nadam=wrapped('NAdam'),
    torch_radam=wrapped('RAdam'), torch_rmsprop=wrapped('RMSprop', momentum=.5, centered=True), torch_adagrad=wrapped('Adagrad'),
    torch_adadelta=wrapped('Adadelta'), torch_adamax=wrapped('Adamax'), torch_asgd=wrapped('ASGD'), torch_rprop=wrapped('Rprop'),
    torch_adafactor=wrapped('Adafactor'))
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
        learn.fit(2, 1e-2, cbs=[OnCPU(init_scale=8.), At('before_batch', lambda learn: seen.append(learn.scaler.get_scale()))],
            start_epoch=start_epoch)
        assert not any(type(cb).__name__ == '_FitState' for cb in learn.cbs)
        return seen
    started(learner(path=tmp_path)).fit(1, 1e-2, cbs=[OnCPU(init_scale=8., growth_interval=4), CheckpointCallback()]) # four batches: 16
    assert scales(1) == [16.] and scales(0) == [8.]
    assert scales(1, Learner.validate, lambda learn: learn.lr_find(num_it=3, show_plot=False)) == [16.]

def test_what_was_loaded_is_exported_without_us(tmp_path):
    "Before it goes on, too"
    started(learner(path=tmp_path)).fit(1, 1e-2, cbs=[OnCPU(), CheckpointCallback()])
    learn = learner(path=tmp_path)
    learn.load_checkpoint()
    assert any(type(cb).__name__ == '_FitState' for cb in learn.cbs)
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learn.opt = None
    learn.export()
    assert b'fastkd' not in (tmp_path/'export.pkl').read_bytes()

class Average(Callback):
    "A mean of the weights, as many users write it"
    def after_create(self): self.mean = None
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
    mean, n = None, 0

def test_a_callback_of_a_users(tmp_path):
    "Its mean goes on, beside an adapter and dropout"
    check_resumed(lambda path: learner(seeded(convnet, 4, .3), path=path), lambda: [adapter(), Average()], tmp_path)

def test_peers_go_on(tmp_path):
    "Students that teach each other are one model"
    def make(path): return learner(Peers([seeded(convnet, 4, seed=i) for i in range(2)]), path=path, opt_func=wrapped('AdamW'), metrics=None)
    check_resumed(make, lambda: [MutualLearning()], tmp_path)

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
    with pytest.raises(ValueError, match='was saved with loaders that shuffle in another way'): learner(path=tmp_path/'run').load_checkpoint()

@pytest.mark.parametrize('name', ['adam', 'torch_adamw', 'ranger'])
def test_an_export_in_between(name, tmp_path):
    "fastai makes a new optimizer with the old state; that of an adapter goes on, too"
    def trained(exported):
        learn, cb = learner(nn.Sequential(OrderedDict(block1=nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), head=nn.Linear(8, 10))),
            path=tmp_path, opt_func=optimizer[name]), KD(linear(), FitNet(), 'block1', 'block1', task_weight=1.)
        seed_cpu(0)
        for p in learn.model.parameters(): nn.init.normal_(p, std=.1)
        started(learn).fit(1, 1e-2, cbs=cb)
        if exported: learn.export()
        started(learn, 5).fit(1, 1e-2, cbs=cb)
        return weights(learn.model) | learned(cb) if name == 'adam' else weights(learn.model)
    def linear(): return seeded(lambda: nn.Sequential(OrderedDict(block1=nn.Sequential(nn.Flatten(), nn.Linear(64, 12)), head=nn.Linear(12, 10))))
    assert same(trained(True), trained(False))
