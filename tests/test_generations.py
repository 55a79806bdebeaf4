"Chains of learners: who teaches whom, what a run that was killed repeats, and what is refused before it costs anything."
import os, pytest, shutil, signal, time, torch
from fastai.basics import SGD, error_rate, set_seed
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedLin, combined_cos
from fastkd.all import *
from fastkd.generations import _teaching
from helpers import (At, ByHand, OnCPU, convnet, furthest, is_unchanged, learner, n_hooks, quiet, raising, same, seeded, soft_target,
    started, state, trained_teacher, weights)
from torch import nn

def make(generation, width=4, **kwargs):
    return started(learner(seeded(convnet, width, seed=generation), n=50, opt_func=SGD, **kwargs), generation)

def fit(learn, cbs): learn.fit(2, 1e-2, cbs=cbs)
def chain(*args, make=make, fit=fit, **kwargs): return born_again(make, fit, *args, **kwargs)

class Teachers(list):
    "As `wrap=`: notes who teaches"
    def __call__(self, teacher):
        self.append(teacher)
        return teacher

def failing(number, act, fits=None):
    "A `fit` that notes each call, and calls `act` in the middle of fit `number` of this process"
    fits = [] if fits is None else fits
    def fit_until(learn, cbs):
        fits.append(learn)
        fit(learn, [*cbs, At('before_step', act, nth=3)] if len(fits) == number + 1 else cbs)
    return fit_until

def never(learn, cbs): raise AssertionError('trained')
def all_weights(done): return [weights(learn.model) for learn in done.learners]
def all_same(a, b): return len(a) == len(b) and all(map(same, all_weights(a), all_weights(b)))

# ---- Who teaches whom

def test_each_teaches_the_next():
    "As three fits written by hand, the first one plain, each of the others with a temperature of its own"
    done, expected = chain([SoftTarget(T=4), SoftTarget(T=2)], weight=.7), [make(i) for i in range(3)]
    fit(expected[0], None)
    for i, T in (1, 4.), (2, 2.):
        fit(expected[i], ByHand(expected[i - 1].model, lambda pred, teacher_pred, *fms, T=T: soft_target(pred, teacher_pred, T), .7))
    assert len(done) == 3 and same(weights(done.learners[0].model), weights(expected[0].model))
    assert all(furthest(weights(a.model), weights(b.model)) < 1e-6 for a, b in zip(done.learners, expected))

def test_a_given_teacher_teaches_generation_0():
    teachers, given = Teachers(), trained_teacher()
    before = state(given)
    done = chain([SoftTarget(T=4), SoftTarget(T=2)], generations=2, teacher=given, wrap=teachers)
    assert teachers == [given, done.learners[0]] and is_unchanged(given, before) and n_hooks(given) == 0
    expected = make(0)
    fit(expected, KnowledgeDistillationCallback(given, SoftTarget(T=4)))
    assert same(weights(done.learners[0].model), weights(expected.model))

def test_all_before_teach_together():
    teachers, given = Teachers(), trained_teacher()
    done = chain(SoftTarget, teacher=given, ensemble=True, wrap=teachers)
    assert [teacher.source for teacher in teachers] == [[given, *done.learners[:i]] for i in range(3)]
    expected = make(2)
    fit(expected, KnowledgeDistillationCallback([given, *(learn.model for learn in done.learners[:2])], SoftTarget))
    assert same(weights(done.learners[2].model), weights(expected.model))

def test_teacher_assistants():
    "Sizes fall, and layers are compared on the way"
    layers = dict(activations_student='block2', activations_teacher='block2')
    done = chain(SoftTarget() + 100*Attention(), make=lambda i: make(i, (8, 6, 2)[i]), **layers)
    assert [learn.model.head[3].in_features for learn in done.learners] == [16, 12, 4]
    assert [len(learn.recorder.distillation['attention_loss']) for learn in done.learners[1:]] == [4, 4]
    assert not hasattr(done.learners[0].recorder, 'distillation') and not any(n_hooks(learn.model) for learn in done.learners)

def test_an_ensemble_in_a_cache_begins_a_chain():
    "A list of teachers becomes an ensemble; each teacher of the chain answers once to each image"
    caches, two = [], [trained_teacher(), seeded(convnet, 8, seed=3)]
    def wrap(teacher):
        caches.append(CachedTeacher(teacher))
        return caches[-1]
    cached, live = (chain(SoftTarget, generations=2, teacher=two, wrap=o) for o in (wrap, None))
    assert isinstance(caches[0].source, Ensemble) and caches[1].source is cached.learners[0]
    assert [(cache.hits, cache.misses) for cache in caches] == [(50, 50)]*2
    assert max(map(furthest, all_weights(cached), all_weights(live))) < 1e-6

@pytest.mark.parametrize('ensemble', [False, True])
def test_mixup_autocast_cache_ensemble_and_generations(ensemble):
    "All at once: an ensemble in a cache teaches a chain under MixUp and bfloat16; mixed images are new to the cache each time"
    caches, two = [], [trained_teacher(), seeded(convnet, 8, seed=3)]
    before = [state(model) for model in two]
    states = {} # of each generation, right after it
    def wrap(teacher):
        caches.append(CachedTeacher(teacher))
        return caches[-1]
    def fit_all(learn, cbs):
        fit(learn, [*cbs, MixUp(), OnCPU(AMPMode.BF16)])
        states[learn] = state(learn.model)
    done = chain(SoftTarget(T=4), teacher=CachedTeacher(Ensemble(two)), ensemble=ensemble, wrap=wrap, fit=fit_all)
    first, learners = caches[0].source.source[0] if ensemble else caches[0].source, done.learners
    assert isinstance(first, CachedTeacher) and [cache.source.source if ensemble else cache.source for cache in caches] == (
        [[first, *learners[:i]] for i in range(3)] if ensemble else [first, *learners[:2]])
    assert all(cache.hits + cache.misses == 100 and cache.hits < 5 for cache in caches) # some image may be mixed with itself
    assert all(map(is_unchanged, two, before)) and all(is_unchanged(learn.model, states[learn]) for learn in learners)
    for learn in learners:
        losses = torch.tensor(learn.recorder.distillation['distillation_loss'])
        assert losses.isfinite().all() and all(value.isfinite().all() for value in weights(learn.model).values())
    assert not torch.is_autocast_enabled('cpu')

# ---- What comes out

def test_values():
    "Those of `validate`; the recorder still holds the fit"
    done = chain(SoftTarget, generations=2)
    for learn, row in zip(done.learners, done.values.values.tolist()):
        assert len(learn.recorder.values) == 2 and len(learn.recorder.losses) == 4 and len(learn.recorder.lrs) == 4
        assert row == pytest.approx(list(learn.validate()))
    assert list(done.values.columns) == ['valid_loss', 'accuracy'] and done.values.index.name == 'generation'

def test_best():
    "The lowest loss on the validation data, whatever the metrics are; a generation without one is out of the question"
    from fastkd.generations import Generations
    done = Generations()
    done.learners, done._values = [*'abc'], [{'valid_loss': loss, 'perplexity': o} for loss, o in zip([None, .2, .3], [1., 2., 3.])]
    assert done.best == 'b' and done.plot().get_ylabel() == 'perplexity'
    done._values = [{'valid_loss': o} for o in (.3, float('nan'), .2)]
    assert done.best == 'c' and done.plot().get_ylabel() == 'valid_loss'
    done._values = [{'valid_loss': None}]*3
    with pytest.raises(ValueError, match='no generation has a valid_loss to choose by'): done.best

def test_together():
    "The common voice of a chain is the mean of its generations' probabilities"
    done, x = chain(SoftTarget, make=lambda i: make(i, metrics=error_rate)), torch.randn(6, 1, 8, 8)
    with torch.no_grad(): expected = sum(learn.model.eval()(x).softmax(1) for learn in done.learners)/3
    assert torch.allclose(done.ensemble.outputs((x,))[0].softmax(1), expected, atol=1e-6)
    assert done.values['error_rate'][2] == pytest.approx(done.learners[2].validate()[1])

# ---- What a run that failed repeats

def test_a_failure_says_where(tmp_path):
    "And leaves the finished generations, from which the chain goes on to the same end"
    expected, fits = chain(SoftTarget), []
    with pytest.raises(RuntimeError, match=r'generation 2 failed, ValueError: (.|\n)*on purpose') as e:
        chain(SoftTarget, fit=failing(2, raising(ValueError)), path=tmp_path)
    assert isinstance(e.value.__cause__, ValueError)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['generation_0.pth', 'generation_1.pth']
    done = chain(SoftTarget, fit=failing(9, None, fits), path=tmp_path)
    assert fits == [done.learners[2]] and all_same(done, expected) and done.values.equals(expected.values)

def test_an_interrupt_is_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt): chain(SoftTarget, fit=failing(1, raising(KeyboardInterrupt)), path=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['generation_0.pth']

def test_random_numbers_go_on(tmp_path):
    "Generations that are not seeded and share their loaders end as without the interruption"
    def unseeded():
        dls = make(0).dls
        def make_next(generation):
            learn = learner(convnet(4), n=50, opt_func=SGD)
            learn.dls = dls
            return learn
        return make_next
    expected = chain(SoftTarget, make=unseeded())
    with pytest.raises(RuntimeError): chain(SoftTarget, make=unseeded(), fit=failing(2, raising(ValueError)), path=tmp_path)
    make_next = unseeded()
    set_seed(99)
    assert all_same(chain(SoftTarget, make=make_next, path=tmp_path), expected)

def in_child(act):
    "Run in a process of its own; returns its id"
    pid = os.fork()
    if pid: return pid
    try: act()
    finally: os._exit(1)

def test_killed(tmp_path):
    "kill -9 in generation 2: generations 0 and 1 are not trained again, and the end is that of a run in peace"
    def kill(learn): os.kill(os.getpid(), signal.SIGKILL)
    pid = in_child(lambda: chain(SoftTarget(T=4), fit=failing(2, kill), path=tmp_path))
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    before, fits = {file: file.read_bytes() for file in tmp_path.iterdir()}, []
    assert sorted(file.name for file in before) == ['generation_0.pth', 'generation_1.pth']
    done, expected = chain(SoftTarget(T=4), fit=failing(9, None, fits), path=tmp_path), chain(SoftTarget(T=4))
    assert fits == [done.learners[2]] and all(file.read_bytes() == content for file, content in before.items())
    assert all_same(done, expected) and done.values.equals(expected.values)

def test_killed_while_writing(tmp_path, monkeypatch):
    "What was half written is no generation"
    def die(*args): raise KeyboardInterrupt('on purpose')
    with monkeypatch.context() as patched:
        patched.setattr(os, 'replace', die)
        with pytest.raises(KeyboardInterrupt): chain(SoftTarget, path=tmp_path)
    left = tmp_path/'generation_0.pth.1.part' # by a process that was killed
    left.write_bytes(b'half')
    os.utime(left, (time.time() - 7200,)*2)
    assert all_same(chain(SoftTarget, path=tmp_path), chain(SoftTarget))
    assert sorted(file.name for file in tmp_path.iterdir()) == [f'generation_{i}.pth' for i in range(3)]

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The folder of a chain of two"
    folder = tmp_path_factory.mktemp('finished')
    chain(SoftTarget(T=4), generations=2, path=folder)
    return folder

def other_classes(generation): return quiet(learner(seeded(convnet, 4, n_out=11), n=50))

def never_masked(x): return torch.ones(len(x), dtype=torch.bool)

@pytest.mark.parametrize('other,match', [(dict(make=other_classes), 'size mismatch for head.3.weight'), (dict(loss=SoftTarget(T=2)), 'T=2'),
    (dict(make=lambda i: make(i, 6)), 'another chain'), (dict(weight=.1), 'weight=0.1'), (dict(ensemble=True), 'all before it'),
    (dict(teacher=trained_teacher), 'no teacher'), (dict(schedule={'T': SchedLin(8, 1)}), 'T 8 to 1 by curve'),
    (dict(task_weight=1.), 'task_weight=1.0'), (dict(mask=never_masked), 'mask=<function never_masked>'),
    (dict(wrap=CachedTeacher), 'in CachedTeacher')],
    ids=['classes', 'loss', 'width', 'weight', 'ensemble', 'teacher', 'schedule', 'task_weight', 'mask', 'wrap'])
def test_a_folder_of_another_chain(other, match, finished, tmp_path):
    "Is refused before anything is trained, and stays as it is"
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before, fits = {file: file.read_bytes() for file in tmp_path.iterdir()}, []
    settings = dict(loss=SoftTarget(T=4), generations=3) | other
    if 'teacher' in other: settings['teacher'] = trained_teacher()
    with pytest.raises(ValueError, match=match): chain(settings.pop('loss'), fit=failing(9, None, fits), path=tmp_path, **settings)
    assert fits == [] and {file: file.read_bytes() for file in tmp_path.iterdir()} == before

def stored(seed): return StoredTeacher(torch.randn(50, 10, generator=torch.Generator().manual_seed(seed)).numpy())
def blind(seed): return seeded(convnet, 8, seed=seed)

@pytest.mark.parametrize('make_teacher', [blind, lambda seed: learner(blind(seed)), lambda seed: Frozen(blind(seed)), stored,
    lambda seed: [trained_teacher(), blind(seed)], lambda seed: CachedTeacher(Ensemble([blind(seed), learner(trained_teacher())]))],
    ids=['module', 'learner', 'frozen', 'stored', 'list', 'cached ensemble'])
def test_a_folder_of_another_teacher(make_teacher, tmp_path):
    "Teachers are compared by what they know: a copy is the same one, another seed is another one"
    run = lambda seed, fit: chain(SoftTarget, generations=1, teacher=make_teacher(seed), fit=fit, path=tmp_path)
    done = run(3, lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs))
    assert run(3, never).values.equals(done.values)
    with pytest.raises(ValueError, match='of another chain(.|\n)*and now by .*first'): run(4, never)

def test_a_folder_of_another_curve(tmp_path):
    "Curves are compared by their values, wherever they stand in memory"
    run = lambda curve, fit=never: chain(SoftTarget, generations=1, teacher=trained_teacher(), schedule=curve, fit=fit, path=tmp_path)
    curve = lambda middle: combined_cos(.5, 0., middle, .9)
    done = run(curve(.5), lambda learn, cbs: learn.fit(1, 1e-2, cbs=cbs))
    assert run({'weight': curve(.5)}).values.equals(done.values)
    with pytest.raises(ValueError, match='weight 0 to 0.9 by curve'): run(curve(.6))

def test_a_teacher_that_learns_is_itself(tmp_path):
    "What it knew at the end of the run before is not asked for"
    teacher = MeanTeacher()
    run = lambda fit: chain(SoftTarget, generations=1, teacher=teacher, fit=fit, path=tmp_path)
    assert run(fit).values.equals(run(never).values) and teacher.n_steps > 0

def test_a_gap_in_the_folder(finished, tmp_path):
    "Nobody knows who taught what comes after it"
    shutil.copy(finished/'generation_1.pth', tmp_path)
    with pytest.raises(ValueError, match='no generation_0.pth'): chain(SoftTarget(T=4), path=tmp_path)

def test_a_longer_chain(finished, tmp_path):
    "Goes on from a shorter one"
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    fits = []
    done = chain(SoftTarget(T=4), generations=3, fit=failing(9, None, fits), path=tmp_path)
    assert fits == [done.learners[2]] and all_same(done, chain(SoftTarget(T=4), generations=3))

def test_wrapped_models_are_kept_without_their_wrapper(tmp_path):
    "A chain goes on with plain models where it began with `DataParallel`"
    def wrapped(generation):
        learn = make(generation)
        learn.model = nn.DataParallel(learn.model)
        return learn
    first = chain(SoftTarget, generations=1, make=wrapped, path=tmp_path)
    done = chain(SoftTarget, generations=2, path=tmp_path)
    assert same(weights(first.learners[0].model.module), weights(done.learners[0].model))

# ---- What is refused

@pytest.mark.parametrize('settings,exc,match', [
    (dict(generations=0), ValueError, 'a number >= 1, not 0'), (dict(generations='3'), ValueError, "not '3'"),
    (dict(loss=[SoftTarget]), ValueError, '1 losses for 2 generations that are taught'),
    (dict(loss=[SoftTarget]*2, teacher=nn.Identity()), ValueError, '2 losses for 3'),
    (dict(teacher='resnet34'), TypeError, 'the teacher comes first'), (dict(weight=1.5), ValueError, 'negative weight'),
    (dict(wieght=.5), TypeError, 'wieght'), (dict(schedule={'t': lambda pos: 1.}), ValueError, "nothing is called 't'"),
    (dict(make=lambda generation: nn.Identity()), TypeError, r'make_learner\(0\) returns a Learner, not Identity'),
    (dict(make=raising(OSError)), RuntimeError, 'generation 0 failed, OSError: on purpose')])
def test_refused_before_training(settings, exc, match):
    settings = dict(loss=SoftTarget) | settings
    with pytest.raises(exc, match=match): chain(settings.pop('loss'), fit=never, **settings)

def shared(generation, kept={}):
    "Generation 2 has the head of generation 0"
    learn = kept[generation] = make(generation)
    if generation == 2: learn.model.head[3] = kept[0].model.head[3]
    return learn

@pytest.mark.parametrize('make_learner,match', [(lambda i, kept=make(0): kept, r'make_learner\(1\) returns the model of generation 0'),
    (shared, r"generation 0, or shares its parameter 'head.3.weight'")], ids=['model', 'head'])
def test_a_model_is_trained_once(make_learner, match):
    with pytest.raises(ValueError, match=match): chain(SoftTarget, make=make_learner)

def test_frozen_parts_may_be_shared():
    "A body that nobody trains"
    body = trained_teacher().block1.requires_grad_(False)
    def with_body(generation):
        model = seeded(convnet, 16, seed=generation)
        model.block1 = body
        return learner(model, n=50)
    assert len(chain(SoftTarget, generations=2, make=with_body)) == 2

def test_a_teacher_that_nobody_hears():
    "A `fit` that forgets `cbs` would train without it"
    with pytest.raises(RuntimeError, match='generation 1 failed, ValueError: .*gives cbs to learn.fit'):
        chain(SoftTarget, fit=lambda learn, cbs: learn.fit(1, 1e-2))

@pytest.mark.parametrize('settings', [dict(mean='logits'), dict(weights=[.9, .1]), dict(weights='confidence'), dict(T=4)], ids=str)
def test_an_ensemble_of_other_settings_is_another_first_teacher(settings):
    "The same settings are the same teacher; also behind a cache, where answers go by content"
    models, by_label = [trained_teacher(), seeded(convnet, 8)], settings.get('weights') == 'confidence'
    def said(teacher): return _teaching(teacher, False, None)
    for wrap in [lambda o: o] + [CachedTeacher]*(not by_label):
        first, same_again, other = (wrap(Ensemble(models, **o)) for o in ({}, {}, settings))
        assert said(first) == said(same_again) != said(other)
