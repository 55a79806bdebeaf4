"Comparisons: same start and batches for all, what a restart repeats, what is measured, and what is refused."
import helpers, json, numpy as np, os, pandas as pd, pickle, pytest, random, re, signal, subprocess, sys, time, torch, warnings
from fastai.basics import Callback, DataLoaders, Learner, accuracy, error_rate, set_seed
from fastai.callback.tracker import SaveModelCallback
from fastai.data.block import CategoryBlock, RegressionBlock
from fastai.metrics import mae
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastkd.all import *
from fastkd.compare import ALONE, Arm, Comparison, compare, description, is_lower_better, sweep, train_once, weights_digest
from fastkd.statistics import holm, mean_interval, paired_interval
from functools import lru_cache, partial
from helpers import At, convnet, learner, trained_teacher
from pathlib import Path
from torch import nn

def make(): return learner(convnet(4))
def make_wide(): return learner(convnet(6, p=.2))
def fit(learn, cbs, times=1): learn.fit(round(times), 1e-2, cbs=cbs)

def kd(T=4, **kwargs): return KnowledgeDistillationCallback(trained_teacher(), SoftTarget(T=T), **kwargs)

quick = partial(compare, make, fit=fit, seeds=2, progress=False)

class Watch(Callback):
    "What each run starts from, and the batches that it sees"
    seen = []
    def before_fit(self): self.seen.append(dict(start=weights_digest(self.learn.model), batches=[]))
    def before_batch(self):
        if self.training: self.seen[-1]['batches'].append(self.y.tolist())

@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watch, 'seen', [])
    return Watch.seen

# ---- The same for all

def test_same_start_and_batches(watched):
    "For each seed all set-ups start from the same weights and see the same batches; other students see them, too"
    compare(make, {ALONE: Watch, 'kd': lambda: [kd(), Watch()], 'wide': dict(make_learner=make_wide, cbs=Watch)}, fit, 2, progress=False)
    for seed in range(2):
        alone, distilled, wide = watched[3*seed:3*seed + 3]
        assert alone == distilled and wide['batches'] == alone['batches'] and wide['start'] != alone['start']
    assert watched[0]['start'] != watched[3]['start'] and watched[0]['batches'] != watched[3]['batches']

def test_loaders_that_are_shared(watched):
    "Loaders outside of make_learner shuffle by a state that goes on from run to run: it begins anew for each, and is given back"
    learn = make()
    state = learn.dls.train.rng.getstate()
    def make_on_shared(): return learner_on(learn.dls)
    compare(make_on_shared, {ALONE: Watch, 'same': Watch}, fit, 2, progress=False)
    assert watched[0] == watched[1] and watched[2] == watched[3] and watched[0]['batches'] != watched[2]['batches']
    assert learn.dls.train.rng.getstate() == state

class Numbered(torch.utils.data.Dataset):
    def __len__(self): return 40
    def __getitem__(self, i): return torch.full((1, 8, 8), i/40), i % 3

def test_loaders_of_torch(watched):
    "Those with a generator of their own, too; its state is given back"
    generator = torch.Generator().manual_seed(7)
    sampler = torch.utils.data.RandomSampler(Numbered(), generator=generator)
    for kwargs in (dict(shuffle=True), dict(shuffle=True, generator=generator), dict(sampler=sampler)):
        watched.clear()
        dls, state = DataLoaders(*[torch.utils.data.DataLoader(Numbered(), 10, **kwargs)]*2), generator.get_state()
        compare(lambda: learner_on(dls), {ALONE: Watch, 'same': Watch}, fit, 2, progress=False)
        assert watched[0] == watched[1] and watched[2] == watched[3] and watched[0]['batches'] != watched[2]['batches']
        assert generator.get_state().equal(state)

def test_loaders_that_a_fit_brings(watched):
    "As in progressive resizing; a second fit goes on where the first one stopped"
    others = make().dls
    state = others.train.rng.getstate()
    def resizing(learn, cbs):
        for dls in (learn.dls, others, others):
            learn.dls = dls
            learn.fit(1, 1e-2, cbs=cbs)
    compare(make, {ALONE: Watch, 'same': Watch}, resizing, 2, progress=False)
    assert watched[:3] == watched[3:6] and watched[1]['batches'] != watched[2]['batches'] and others.train.rng.getstate() == state

def learner_on(dls):
    learn = make()
    learn.dls = dls
    return learn

def test_callbacks_that_draw_numbers(watched):
    "What a set-up draws while it is made does not move its batches"
    compare(make, {ALONE: Watch, 'draws': lambda: [torch.rand(3), random.random(), Watch()][2:]}, fit, 2, progress=False)
    assert watched[0] == watched[1]

def test_random_states_are_given_back():
    set_seed(3)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    set_seed(3)
    quick(dict(same=None))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected

def test_a_model_that_is_trained_on_is_refused():
    model = convnet(4)
    with pytest.raises(RuntimeError, match=r"'kd' failed with seed 0: it starts from weights that another run has trained"):
        compare(lambda: learner(model), dict(kd=kd), fit, 2, progress=False)

# ---- What is measured

def test_the_last_epoch_and_not_the_best():
    seen = []
    def watching(learn, cbs):
        learn.fit(4, .3, cbs=[*cbs, SaveModelCallback('accuracy')])
        seen.append([row[2] for row in learn.recorder.values])
    run = train_once(Arm(make, watching), 1)
    assert run['metric'] == 'accuracy' and run['value'] == seen[0][-1] and max(seen[0]) > seen[0][-1]
    assert run['batches'] == 16 and run['parameters'] == sum(p.numel() for p in convnet(4).parameters())

def test_other_metrics():
    run = partial(train_once, Arm(make, fit), 0)
    by_column, after = run('valid_loss'), run(lambda learn: learn.validate()[0])
    assert by_column['metric'] == 'valid_loss' and after['metric'] == 'metric'
    assert by_column['value'] == pytest.approx(after['value'])
    assert train_once(Arm(lambda: learner(convnet(4), metrics=None), fit), 0)['metric'] == 'valid_loss'

@pytest.mark.parametrize('other', [dict(metrics=error_rate), dict(metrics=None)], ids=['another', 'none'])
def test_metrics_that_are_not_the_same(other, watched):
    "An accuracy and an error rate make no pair; nothing is trained for it"
    said = "'other' failed with seed 0: its metric is '(error_rate|valid_loss)', and that of the others 'accuracy'"
    setups = dict(other=dict(make_learner=lambda: learner(convnet(4), **other), cbs=Watch))
    with pytest.raises(RuntimeError, match=said): quick(setups)
    assert watched == []

def test_a_metric_that_no_column_has():
    "Said before the first step"
    steps = []
    def stepping(learn, cbs): learn.fit(1, cbs=[*cbs, At('before_step', steps.append)])
    with pytest.raises(RuntimeError, match="the training table has no 'acuracy', but train_loss, valid_loss, accuracy"):
        quick(dict(kd=kd), fit=stepping, metric='acuracy')
    assert steps == []

def test_keywords_that_nobody_knows():
    with pytest.raises(TypeError, match="unexpected keyword argument 'seed'"): quick(dict(kd=kd), seed=3)

def runs_of(metric='accuracy', **values):
    "Runs as `train_all` returns them"
    return [dict(setup=name, seed=seed, metric=metric, value=value, cpu=1. + seed, wall=2., batches=10, parameters=7)
        for name, row in values.items() for seed, value in enumerate(row)]

VALUES = dict(alone=[.912, .931, .898, .925, .907], kd=[.919, .936, .909, .930, .917], noise=[.91, .94, .89, .93, .90])

def test_table():
    "Means, paired differences and p-values of the whole table; any set-up can be the baseline"
    comparison = Comparison(runs_of(**VALUES), 'alone')
    table = comparison.table()
    assert list(table.index) == ['alone', 'kd', 'noise'] and list(table.columns[:7]) == ['accuracy', 'low', 'high', 'difference',
        'difference low', 'difference high', 'p']
    for name, values in VALUES.items(): assert list(table.loc[name].iloc[:3]) == list(mean_interval(values))
    pairs = {name: paired_interval(VALUES[name], VALUES['alone']) for name in ('kd', 'noise')}
    for name, pair in pairs.items(): assert list(table.loc[name].iloc[3:7]) == list(pair)
    assert list(table['p (Holm)'][1:]) == holm([o[3] for o in pairs.values()]) and table.loc['alone'].iloc[3:8].isna().all()
    assert list(table.loc['kd'].iloc[8:]) == [3., 2., 10, 7]
    assert comparison.table('kd').loc['alone', 'difference'] == pytest.approx(-table.loc['kd', 'difference'])
    with pytest.raises(ValueError, match="there is no 'nobody' .* alone, kd, noise"): comparison.table('nobody')

def test_words():
    lines = repr(Comparison(runs_of(**VALUES), 'alone')).splitlines()
    assert lines[0].startswith("'kd' is better than 'alone': accuracy +0.0076") and "Holm's p 0.007" in lines[0]
    assert lines[1].startswith("'noise' is within noise of 'alone'") and len(lines) == 2
    losses = Comparison(runs_of('valid_loss', **VALUES), 'alone')
    assert losses.words()[0].startswith("'kd' is worse than 'alone': valid_loss +0.0076")
    assert Comparison(runs_of('valid_loss', **VALUES), 'alone', False).words()[0].startswith("'kd' is better")
    longer = runs_of(**VALUES)
    for run in longer[5:10]: run['batches'] = 20
    assert Comparison(longer, 'alone').words()[2] == "'kd' was trained on 20 batches, 'alone' on 10"
    longer[5]['batches'] = 21
    assert Comparison(longer, 'alone').words()[2] == "'kd' was trained on 20.2 batches, 'alone' on 10"
    assert Comparison(longer, 'alone').table().loc['kd', 'batches'] == 20.2

def test_plot():
    comparison = Comparison(runs_of(**VALUES), 'alone', labels=dict(kd='4'), xlabel='T')
    ax = comparison.plot()
    assert [o.get_text() for o in ax.get_xticklabels()] == ['4', 'noise']
    assert ax.get_ylabel() == 'accuracy, minus alone' and ax.get_xlabel() == 'T'
    bars = [o.lines[0].get_ydata()[0] for o in ax.containers]
    pairs = [paired_interval(VALUES[name], VALUES['alone']) for name in ('kd', 'noise')]
    ends = [o.lines[2][0].get_segments()[0][:, 1].tolist() for o in ax.containers]
    assert bars == [o[0] for o in pairs] and ends == [pytest.approx(o[1:3]) for o in pairs] and comparison.plot(ax) is ax
    assert [o.lines[0].get_markerfacecolor() == 'white' for o in ax.containers[:2]] == [False, True], 'noise is hollow'

@pytest.mark.parametrize('lower,names', [
    (True, 'valid_loss error_rate perplexity mae mse msle _rmse _exp_rmspe brier_score_loss hamming_loss teacher_kl task_loss test_error'),
    (False, 'accuracy accuracy_multi top_k_accuracy foreground_acc dice dice_multi jaccard_coeff f1_score fbeta_score precision_score '
        'recall_score roc_auc_score average_precision_score balanced_accuracy_score cohen_kappa_score matthews_corrcoef pearsonr spearmanr '
        'r2_score explained_variance_score corpus_bleu teacher_agreement JaccardCoeff F1Score my_accuracy'),
    (None, 'sharpness metric n_of_boxes')], ids=['lower', 'higher', 'unknown'])
def test_directions(lower, names):
    "All metrics of fastai; of others nobody knows"
    assert {name for name in names.split() if is_lower_better(name) is not lower} == set()

def test_a_direction_that_nobody_knows():
    assert "'kd' is higher than 'alone': sharpness" in Comparison(runs_of('sharpness', **VALUES), 'alone').words()[0]
    def sharpness(pred, y): return pred.std()
    def make_sharp(): return learner(convnet(4), metrics=sharpness)
    candidates = {ALONE: [at_lr(1e-2), at_lr(1e-3)], 'same': None}
    with pytest.raises(ValueError, match="a smaller 'sharpness' is better is not known.* say lower_is_better="):
        compare(make_sharp, candidates, fit, 2, progress=False)
    with pytest.raises(ValueError, match="a smaller 'sharpness' is better is not known.* learner's first metric"):
        compare(make_sharp, candidates, fit, 2, lambda learn: 1., progress=False, lower_is_better=True)
    smallest = compare(make_sharp, candidates, fit, 2, progress=False, lower_is_better=True)
    assert smallest.chosen['alone'] == np.argmin(smallest.trials['alone'])

def test_identical_set_ups():
    table = quick(dict(same=None)).table()
    assert list(table.loc['same'][['difference', 'difference low', 'difference high', 'p']]) == [0, 0, 0, 1]

# ---- A comparison goes on

def test_nothing_is_repeated(tmp_path, watched):
    "A second call takes what is there, more seeds and set-ups are added"
    go = partial(compare, make, fit=fit, path=tmp_path, progress=False)
    first = go({ALONE: Watch, 'kd': kd}, seeds=np.arange(2))
    assert len(watched) == 2
    again = go({ALONE: Watch, 'kd': kd}, seeds=2)
    assert len(watched) == 2 and again.table().equals(first.table())
    more = go({ALONE: Watch, 'kd': kd, 'half': partial(kd, weight=.2)}, seeds=3)
    assert len(watched) == 3 and more.values().iloc[:2][['alone', 'kd']].equals(first.values()) and more.values().shape == (3, 3)

def test_runs_of_something_else_are_refused(tmp_path, watched):
    "Other code or another number under the same name, another fit, another metric, another folder"
    def soft(T): return lambda: kd(T)
    quick({ALONE: Watch, 'kd': soft(4)}, path=tmp_path)
    watched.clear()
    go = partial(quick, path=tmp_path)
    with pytest.raises(ValueError, match="holds runs of another 'kd', with other code or settings"): go({ALONE: Watch, 'kd': soft(2)})
    with pytest.raises(ValueError, match='holds another comparison, whose metric differed'):
        go({ALONE: Watch, 'kd': soft(4)}, metric='valid_loss')
    with pytest.raises(ValueError, match='holds another comparison, whose fit differed'):
        go({ALONE: Watch, 'kd': soft(4)}, fit=lambda learn, cbs: learn.fit(2, cbs=cbs))
    (tmp_path/'own').mkdir()
    (tmp_path/'own'/'thesis.tex').touch()
    with pytest.raises(ValueError, match='holds thesis.tex and no comparison'): go(dict(kd=soft(4)), path=tmp_path/'own')
    assert watched == [] and os.listdir(tmp_path/'own') == ['thesis.tex']

def test_description():
    "Code, numbers in it, what it names: models by their weights, functions of the same module by their code"
    def soft(T): return lambda: kd(T)
    assert description(soft(4)) == description(soft(4)) != description(soft(2))
    assert description(lambda: kd(T=4)) == description(lambda: kd(T=4)) != description(lambda: kd(T=2))
    assert description(partial(kd, weight=.1)) == description(partial(kd, weight=.1)) != description(partial(kd, weight=.2))
    model = convnet(2)
    def names_model(): return model
    before = description(names_model)
    with torch.no_grad(): next(model.parameters())[0] += 1e-3
    assert description(names_model) != before

class Named:
    "Its number is not in its repr"
    def __init__(self, n): self.n = n
    def __repr__(self): return 'Named'
    def __call__(self): return kd(self.n)
    def method(self): return kd(self.n)

@lru_cache
def remembered(n): return kd(n)

LEVEL = 1
def names_within(): return lambda: kd(LEVEL)
def names_a_class(): return Named(2)

def differs(what, monkeypatch, name, value, of=None):
    "Whether the description of a function changes with something that it names"
    before = description(what)
    assert description(what) == before
    monkeypatch.setattr(of or sys.modules[__name__], name, value)
    return description(what) != before

def test_description_of_what_is_named(monkeypatch):
    "In inner functions, in classes, behind decorators, in other modules of the user's"
    assert differs(lambda: names_within(), monkeypatch, 'LEVEL', 2)
    assert differs(names_a_class, monkeypatch, '__call__', lambda self: kd(5), of=Named)
    assert differs(lambda: helpers.convnet(4), monkeypatch, 'convnet', lambda c: None, of=helpers)
    assert differs(remembered, monkeypatch, 'kd', None)

def test_description_of_objects():
    for make_one in (lambda n: Named(n), lambda n: Named(n).method, lambda n: partial(remembered, n)):
        assert description(make_one(1)) == description(make_one(1)) != description(make_one(2))

def test_description_in_another_process():
    "Sets have another order in each"
    code = "from fastkd.compare import description\nNAMES = {*'abcdefgh'}\nprint(description(lambda: NAMES and 'a' in {'b', 'c', 'd'}))"
    told = [subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, 'PYTHONHASHSEED': seed}).stdout for seed in '12']
    assert told[0] == told[1] and len(told[0]) == 33

def test_teachers_that_met_no_student(tmp_path):
    "A fresh cache of a learner can be described, is the same after a fit, and another one's is not"
    teachers = [learner(convnet(width)) for width in (8, 16)]
    for i, wrapped in enumerate((CachedTeacher, lambda o: Ensemble([o, o]), lambda o: CachedTeacher(Ensemble([o, o])))):
        one, other = (partial(KnowledgeDistillationCallback, wrapped(o), SoftTarget(T=4)) for o in teachers)
        first = quick(dict(kd=one), path=tmp_path/str(i))
        assert quick(dict(kd=one), path=tmp_path/str(i)).table().equals(first.table())
        with pytest.raises(ValueError, match="holds runs of another 'kd'"): quick(dict(kd=other), path=tmp_path/str(i))

def test_runs_of_other_versions_are_refused(tmp_path):
    "What computes has changed, and seconds may be those of another machine"
    quick(dict(kd=kd), path=tmp_path)
    head = tmp_path/'comparison.json'
    known = json.loads(head.read_text())
    assert {'python', 'torch', 'fastai', 'fastkd', 'device'} <= known.keys()
    head.write_text(json.dumps(known | dict(torch='1.0', device='mps')))
    with pytest.raises(ValueError, match='another comparison, whose torch and device differed'): quick(dict(kd=kd), path=tmp_path)

def test_a_set_up_that_fails(tmp_path):
    "What is finished is kept, and mending the set-up goes on"
    def stops(learn, cbs): learn.fit(1, cbs=[*cbs, At('after_batch', lambda learn: 1/0)])
    said = r"'bad' failed with seed 0: [^\0]*division by zero. 2 runs were finished: they are kept in"
    with pytest.raises(RuntimeError, match=said) as e: quick(dict(kd=kd, bad=dict(fit=stops)), path=tmp_path)
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['alone-0.json', 'comparison.json', 'kd-0.json']
    assert quick(dict(kd=kd, bad=None), path=tmp_path).values().shape == (2, 3)
    with pytest.raises(RuntimeError, match='1 runs were finished: give a path= and they are kept'): quick(dict(bad=dict(fit=stops)))
    with pytest.raises(RuntimeError, match=r"'alone' failed with seed 0: [^\0]*division by zero$"):
        quick(dict(alone=dict(fit=stops), kd=kd))
    with pytest.raises(RuntimeError, match="'kd' failed with seed 0: its function returned None"): quick(dict(kd=lambda: None))
    def lost(learn): return np.nan
    with pytest.raises(RuntimeError, match="'alone' failed with seed 0: its lost is nan"): quick(dict(kd=kd), metric=lost)

SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
from helpers import At, convnet, learner, trained_teacher
from fastkd.all import *
from fastkd.compare import compare
teacher = trained_teacher()
n_dead, path = int(sys.argv[1]), sys.argv[2]
runs = 0
def die(learn):
    global runs
    runs += 1
    if runs == n_dead: os.kill(os.getpid(), signal.SIGKILL)
def fit(learn, cbs): learn.fit(1, 1e-2, cbs=[*cbs, At('after_batch', lambda learn: sys.modules['__main__'].__dict__['die'](learn))])
comparison = compare(lambda: learner(convnet(4)), {'kd': lambda: KnowledgeDistillationCallback(teacher, SoftTarget(T=4))}, fit, 2,
    path=path or None, progress=False)
print(runs)
print(comparison.values().to_json())
"""

@pytest.mark.slow
def test_killed_and_restarted(tmp_path):
    "Killed in its third run, and again in its fourth, it ends with the table of one that was left in peace"
    root = Path(__file__).parent.parent
    def go(n_dead, path):
        env = {**os.environ, 'PYTHONPATH': f'{root}{os.pathsep}{root/"tests"}'}
        command = [sys.executable, '-W', 'ignore', '-c', SCRIPT, str(n_dead), str(path)]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    whole = go(0, '')
    killed = go(3, tmp_path)
    assert killed.returncode == -signal.SIGKILL and sorted(o.name for o in tmp_path.glob('*-*')) == ['alone-0.json', 'kd-0.json']
    assert go(2, tmp_path).returncode == -signal.SIGKILL
    ended = go(0, tmp_path)
    assert whole.stdout.split() == ['4', whole.stdout.split()[1]] and ended.stdout.split() == ['1', whole.stdout.split()[1]], ended.stderr

def test_what_a_killed_write_leaves(tmp_path):
    "A run that was half written is made again"
    first = quick(dict(kd=kd), path=tmp_path)
    file = tmp_path/'kd-1.json'
    (tmp_path/'kd-1.json.part').write_text(file.read_text()[:20])
    file.unlink()
    assert quick(dict(kd=kd), path=tmp_path).values().equals(first.values())

def test_a_file_is_no_folder(tmp_path):
    (tmp_path/'runs').write_text('mine')
    with pytest.raises(ValueError, match='runs is a file: runs are kept in a folder'): quick(dict(kd=kd), path=tmp_path/'runs')
    assert (tmp_path/'runs').read_text() == 'mine'

def test_any_name(tmp_path):
    name = '../T=4 / α'
    first = quick({name: kd}, path=tmp_path/'a')
    assert os.listdir(tmp_path) == ['a'] and quick({name: kd}, path=tmp_path/'a').table().equals(first.table())
    long = [300*letter + ending for letter in 'xα' for ending in 'ab']
    first = quick({name: kd for name in long}, path=tmp_path/'b')
    (tmp_path/'b'/'.DS_Store').write_bytes(b'\xff')
    assert quick({name: kd for name in long}, path=tmp_path/'b').table().equals(first.table()) and len(first.table()) == 5

# ---- Tuning and time

def at_lr(lr): return dict(fit=lambda learn, cbs: learn.fit(1, lr, cbs=cbs))

def test_tuning():
    "Candidates are tried on seeds of their own; the best goes into the comparison"
    comparison = quick({ALONE: [at_lr(1e-2), at_lr(30.)], 'kd': [partial(kd, weight=.5), partial(kd, weight=.6)]}, metric='valid_loss')
    assert comparison.trials.keys() == {'alone', 'kd'} and [len(o) for o in comparison.trials.values()] == [2, 2]
    assert comparison.trials['alone'][0] < comparison.trials['alone'][1]
    assert comparison.values()['alone'].tolist() == quick(dict(same=None), metric='valid_loss').values()['alone'].tolist()
    assert "'alone' is its candidate 1 of 2" in comparison.words() and {*comparison.runs['seed']} == {0, 1}

def test_tuning_looks_at_the_validation_set_only():
    calls = []
    def on_test(learn): return calls.append(1) or 1. + len(calls)
    quick({ALONE: [at_lr(1e-2), at_lr(1e-3)], 'same': None}, metric=on_test)
    assert len(calls) == 4 # two set-ups, two seeds

def test_a_direction_is_that_of_its_metric():
    "A smaller test error is better, and candidates are chosen by a validation metric of which the larger is better"
    def test_loss(learn): return learn.validate()[0]
    found = quick({ALONE: [at_lr(1e-2), at_lr(30.)], 'same': None}, metric=test_loss, lower_is_better=True)
    assert found.trials['alone'][0] > found.trials['alone'][1] and found.chosen == dict(alone=0)

def test_more_trials_than_the_baseline():
    with pytest.raises(ValueError, match="'kd' has 2 candidates and the baseline 1: what is tuned more, looks better"):
        quick(dict(kd=[kd, kd]))
    with pytest.raises(ValueError, match=r'seeds \[1\] would both choose and judge'):
        quick({ALONE: [kd, kd]} | dict(a=None), tuning_seeds=[1, 5])

def test_cost_honest(tmp_path, watched):
    "The baseline trains as many times longer as the slowest set-up takes, also after a restart, whatever the clock says then"
    def wait(learn): time.sleep(.2)
    def slow(): return At('after_fit', wait)
    go = partial(compare, make, {ALONE: Watch, 'kd': kd, 'slow': slow}, fit, 2, path=tmp_path, cost_honest=True, progress=False)
    comparison = go()
    name = 'alone, as long as slow'
    run = comparison.runs[comparison.runs['setup'] == name].iloc[0]
    wall = comparison.runs.pivot(index='seed', columns='setup', values='wall')
    assert run['times'] == round((wall['slow']/wall['alone']).median(), 2) > 1 and run['batches'] == 4*round(run['times'])
    for file in tmp_path.glob('alone-*.json'):
        text = json.loads(file.read_text())
        file.write_text(json.dumps(text | dict(wall=1e-3)))
    (tmp_path/'alone%2C%20as%20long%20as%20slow-1.json').unlink()
    assert {*go().runs.query('setup == @name')['times']} == {run['times']}

def test_cost_honest_needs_a_fit_that_can():
    def fixed(learn, cbs): learn.fit(1, cbs=cbs)
    with pytest.raises(TypeError, match=r'let fit take how much, fit=lambda learn, cbs, times=1'):
        quick(dict(kd=kd), fit=fixed, cost_honest=True)
    with pytest.raises(TypeError, match='let fit take how much'):
        quick(dict(kd=kd), fit=lambda learn, cbs, **kwargs: learn.fit(1, cbs=cbs, **kwargs), cost_honest=True)
    for other in ('nobody', 1):
        with pytest.raises(ValueError, match=f"no set-up '{other}'"): quick(dict(kd=kd), cost_honest=other)

def test_time_that_was_not_taken():
    "A fit that takes `times` and forgets it is told of"
    def forgets(learn, cbs, times=1): learn.fit(1, cbs=cbs)
    comparison = quick(dict(slow=lambda: At('after_fit', lambda learn: time.sleep(.3))), fit=forgets, cost_honest=True)
    assert re.match(r"'alone, as long as slow' was to train [\d.]+ times as long, and saw no batch more", comparison.words()[-1])

# ---- Sweeps and errors

def test_sweep(tmp_path):
    comparison = sweep(make, lambda weight: kd(weight=weight), fit, 2, path=tmp_path, weight=[.1, .9], progress=False)
    assert list(comparison.values()) == ['alone', 'weight=0.1', 'weight=0.9']
    again = quick({'weight=.9': partial(kd, weight=.9)})
    assert comparison.values()['weight=0.9'].tolist() == again.values()['weight=.9'].tolist()
    ax = comparison.plot()
    assert [o.get_text() for o in ax.get_xticklabels()] == ['0.1', '0.9'] and ax.get_xlabel() == 'weight'
    with pytest.raises(TypeError, match='one setting, as in T'): sweep(make, kd, fit, weight=[.1], T=[1])
    with pytest.raises(TypeError, match='not none'): sweep(make, kd, fit)
    with pytest.raises(TypeError, match=r'T=4: a sweep has several values, T=\[…\]'): sweep(make, kd, fit, T=4)

def test_values_of_a_sweep():
    "Twice the same, a generator, numbers that no decimal fraction is"
    go = partial(sweep, make, fit=fit, seeds=2, progress=False)
    twice, generated = go(kd, T=[1, 1, 2]), go(kd, T=(o for o in (1, 2)))
    assert list(twice.values()) == ['alone', 'T=1', 'T=2'] and twice.values().equals(generated.values())
    assert twice.values()['T=2'].tolist() == quick(dict(kd=partial(kd, 2))).values()['kd'].tolist()
    fractions = go(lambda weight: kd(weight=weight), weight=np.linspace(.1, .3, 3))
    assert list(fractions.values()) == ['alone', 'weight=0.1', 'weight=0.2', 'weight=0.3']
    named = go(lambda loss: KnowledgeDistillationCallback(trained_teacher(), loss), loss=dict(soft=SoftTarget(T=4), logits=Logits()))
    assert list(named.values()) == ['alone', 'loss=soft', 'loss=logits']
    for values in ([lambda: 1], [.1234567, .1234568], [nn.Linear(1, 1), nn.Linear(1, 1)]):
        with pytest.raises(ValueError, match=r'is no name for a value of T, or one of two: give them names, T=dict\('): go(kd, T=values)
    with pytest.raises(TypeError, match='a sweep has several values'): go(kd, T='abc')
    rising = go(kd, T=[1], lower_is_better=True)
    assert rising.lower_is_better

@pytest.mark.parametrize('setups,error,text', [
    (dict(kd=kd()), TypeError, "'kd': cbs is a function that is called anew for each run and makes the callbacks, not Knowledge"),
    (dict(kd=dict(make_learner=4)), TypeError, "'kd': make_learner is a function that is called anew for each run"),
    (dict(kd=dict(loss=kd)), TypeError, "'kd' says loss: a set-up is a dict of make_learner, fit and cbs"),
    (dict(kd=dict(cbs=[kd])), TypeError, "'kd': cbs is a function"),
    (dict(kd=KnowledgeDistillationCallback), TypeError, "'kd': cbs is a function"),
    (dict(kd=dict(fit=lambda learn: learn.fit(1))), TypeError, "'kd': fit is a function that is called anew for each run with a learner"),
    (dict(kd=[]), ValueError, "'kd' has no candidate"),
    (dict(kd=kd, KD=kd), ValueError, 'names differ in more than capital letters'),
    ({}, ValueError, 'at least one set-up beside the baseline')],
    ids=['instance', 'number', 'unknown', 'list', 'class', 'no callbacks', 'empty', 'capitals', 'none'])
def test_set_ups_that_are_none(setups, error, text):
    with pytest.raises(error, match=re.escape(text)): quick(setups)

@pytest.mark.parametrize('setups', [None, [kd], kd, {4: kd}], ids=['none', 'list', 'function', 'number'])
def test_set_ups_that_are_no_dict(setups):
    with pytest.raises(ValueError, match='setups is a dict of names and at least one set-up'): quick(setups)

@pytest.mark.parametrize('made', [make(), make().model, 5, lambda learn, cbs: learn], ids=['learner', 'model', 'number', 'arguments'])
def test_what_makes_no_learner(made):
    "It is named as the argument that it is, and not as the baseline's"
    with pytest.raises(TypeError, match='^make_learner is a function that is called anew'): compare(made, dict(kd=kd), fit)

def test_metrics_of_a_batch():
    "`metric=accuracy` has two arguments, and would fail after the first training"
    with pytest.raises(TypeError, match='metric is the name of a column, or a function of the trained learner, not <function acc'):
        quick(dict(kd=kd), metric=accuracy)

def test_says_nothing_of_its_own():
    "No callback's name is that of an attribute, of which fastai warns"
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', 'the teacher is right on')
        assert quick(dict(same=None)).values().shape == (2, 2)

def test_numbers_of_seeds():
    with pytest.raises(TypeError, match="seeds is a number, or a list of numbers, not '3'"): quick(dict(same=None), seeds='3')
    assert quick(dict(same=None), seeds=np.int64(2)).values().shape == (2, 2)
    assert quick(dict(same=None), seeds={1, 2}).values().index.tolist() == [1, 2]
    for seeds in (2.5, [.2, .7]):
        with pytest.raises(TypeError): quick(dict(same=None), seeds=seeds)
    with pytest.raises(ValueError, match='candidates are chosen by tuning_seeds, and there is none'):
        quick({ALONE: [at_lr(1e-2), at_lr(1e-3)]} | dict(same=None), tuning_seeds=0)

def test_other_errors():
    with pytest.raises(ValueError, match='at least two seeds'): quick(dict(kd=kd), seeds=1)
    with pytest.raises(RuntimeError, match="'alone' failed with seed 0: make_learner returns a Learner, not Sequential"):
        compare(lambda: convnet(4), dict(kd=kd), fit, 2, progress=False)

def test_a_fit_that_forgets_its_callbacks():
    with pytest.raises(RuntimeError, match='let fit pass them on'): quick(dict(kd=kd), fit=lambda learn, cbs: learn.fit(1))

def test_progress(capsys):
    compare(make, dict(kd=kd), fit, 2)
    said = capsys.readouterr().out
    assert 'seed 1:' in said and 'epoch' not in said.lower() # of two seeds and two set-ups, and not of the epochs of each run

# ---- What else could differ between set-ups

def dropping(): return learner(convnet(4, p=.3))

def test_a_set_up_that_draws_numbers_leaves_dropout_alone():
    def draws(): torch.rand(3)
    values = compare(dropping, dict(draws=lambda: draws() or []), fit, 2, progress=False).values()
    assert values['draws'].tolist() == values['alone'].tolist()

def test_torch_loaders_shuffle_alike(watched):
    "Without a generator of their own, in the second epoch as well, whatever the student draws"
    def loaded(model):
        from torch.utils.data import DataLoader
        data = helpers.digits()[:100]
        return Learner(DataLoaders(DataLoader(data, 25, shuffle=True), DataLoader(data, 25)), model, helpers.CrossEntropyLossFlat(),
            metrics=accuracy)
    two = lambda learn, cbs: learn.fit(2, 1e-2, cbs=cbs)
    wide = dict(make_learner=lambda: loaded(convnet(6, p=.5)), cbs=Watch)
    compare(lambda: loaded(convnet(4)), {ALONE: Watch, 'wide': wide}, two, 2, progress=False)
    alone, other = watched[:2]
    assert len(alone['batches']) == 8 and alone['batches'] == other['batches'] and alone['batches'][:4] != alone['batches'][4:]

def test_validation_that_is_shuffled():
    "Shared loaders of which one is for validation: equal set-ups are equal, and both have their random state back"
    learn = make()
    valid = learn.dls.train.new(shuffle=True, drop_last=True, bs=30)
    dls = DataLoaders(learn.dls.train, valid)
    before = [dl.rng.getstate() for dl in dls.loaders]
    def shared(): return Learner(dls, helpers.seeded(convnet, 4), learn.loss_func, metrics=accuracy)
    values = compare(shared, dict(same=None, more=None), fit, 2, progress=False).values()
    assert values['same'].tolist() == values['more'].tolist() == values['alone'].tolist()
    assert [dl.rng.getstate() for dl in dls.loaders] == before

def test_of_two_metrics_of_one_name_the_first():
    from fastai.metrics import F1Score
    seen = []
    def noting(learn, cbs):
        learn.fit(1, 1e-2, cbs=cbs)
        seen.append(float(learn.recorder.values[-1][2]))
    run = train_once(Arm(lambda: learner(convnet(4), metrics=[F1Score(average='macro'), F1Score(average='micro')]), noting), 1)
    assert run['value'] == seen[0] and run['metric'] == 'f1_score'

def test_one_model_for_all_seeds():
    model = helpers.seeded(convnet, 6)
    with pytest.raises(RuntimeError, match="'kd' failed with seed 1: it starts from weights that another run has trained"):
        quick(dict(kd=dict(make_learner=lambda: learner(model))))

def test_what_is_missing_is_said_before_a_run(tmp_path):
    def alone(): return Learner(DataLoaders(make().dls.train), convnet(4), helpers.CrossEntropyLossFlat(), metrics=accuracy)
    with pytest.raises(RuntimeError, match='accuracy is measured on a validation set, and the learner has none'):
        compare(alone, dict(kd=kd), fit, 2, progress=False)
    with pytest.raises(ValueError, match='seeds are 0 or more, not -1'): quick(dict(kd=kd), seeds=[-1, 1])
    quick(dict(kd=kd), path=tmp_path)
    (tmp_path/'notes.json').write_text('{"mine": 1}')
    with pytest.raises(ValueError, match='notes.json, which is no run'): quick(dict(kd=kd), path=tmp_path)

def test_a_fit_may_export_its_learner():
    "What a run has noted of loaders is no part of it, and cannot be pickled"
    kept = []
    def export(learn): kept.append(pickle.loads(pickle.dumps({**learn.shuffle.__getstate__(), '_learn': None, 'learn': None})))
    train_once(Arm(make, lambda learn, cbs: learn.fit(1, 1e-2, cbs=[*cbs, At('after_epoch', export)])), 1)
    assert kept[0]['n'] > 0 and kept[0]['begun'] == []

# ---- Tables

def table_of(kind):
    "A new learner of a table with gaps"
    r = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=r.randn(60), b=np.where(r.rand(60) < .2, np.nan, r.randn(60)), k=r.choice([*'abc'], 60),
        y=r.choice([*'uv'], 60), z=r.randn(60)))
    procs = dict(full=[Categorify, FillMissing, Normalize], numbers=[Normalize], names=[Categorify], regression=[Categorify, Normalize])
    cats, conts = ([] if kind == 'numbers' else ['k']), dict(names=[], numbers=['a'], regression=['a']).get(kind, ['a', 'b'])
    y = dict(y_names='z', y_block=RegressionBlock()) if kind == 'regression' else dict(y_names='y', y_block=CategoryBlock())
    dls = TabularDataLoaders.from_df(df, procs=procs[kind], cat_names=cats, cont_names=conts, valid_idx=[*range(20)], bs=10, **y)
    learn = tabular_learner(dls, layers=[4], metrics=mae if kind == 'regression' else accuracy)
    return helpers.quiet(learn)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['full', 'numbers', 'names', 'regression'])
def test_tables(kind, tmp_path, watched):
    "Finished runs of tabular learners are found again, and those of another table are not"
    set_seed(0)
    teacher = table_of(kind)
    def taught(): return KnowledgeDistillationCallback(teacher, Logits())
    go = partial(compare, setups=dict(kd=taught, watch=Watch), fit=fit, seeds=2, path=tmp_path, progress=False)
    first = go(partial(table_of, kind))
    assert len(watched) == 2 and go(partial(table_of, kind)).values().equals(first.values()) and len(watched) == 2
    with pytest.raises(ValueError, match='holds another comparison'): go(partial(table_of, 'names' if kind == 'full' else 'full'))
