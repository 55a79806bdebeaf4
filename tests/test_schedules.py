"Schedules: curves that are values, and errors before training."
import math, numpy as np, pickle, pytest
from copy import copy, deepcopy
from dataclasses import FrozenInstanceError, replace
from functools import partial
from hypothesis import given, strategies as st
from fastai.callback.schedule import SchedCos, SchedExp, SchedLin, SchedPoly, combine_scheds, sched_cos, sched_exp, sched_lin, sched_no
from fastkd.schedules import Schedule, Stages, as_schedules, check_curve, cos, lin, multiplies, scheduled_value

# ---- Curves

def curve(func, pct, start_pct=0., end_pct=1., start_val=0., end_val=1.):
    "By formula: waits, moves, stays"
    position = np.clip((pct - start_pct)/max(end_pct - start_pct, 1e-300), 0, 1) if start_pct < end_pct else float(pct >= end_pct)
    share = position if func == 'lin' else (1 - math.cos(math.pi*position))/2
    return start_val + share*(end_val - start_val)

PCTS = np.linspace(0, 1, 101)

def test_the_two_with_names():
    for schedule, name in ((lin, 'lin'), (cos, 'cos')):
        np.testing.assert_allclose([schedule.progress(pct) for pct in PCTS], [curve(name, pct) for pct in PCTS], atol=1e-12)
    assert [lin.progress(o) for o in (0, .25, .5, 1)] == [0, .25, .5, 1]
    assert [round(cos.progress(o), 6) for o in (0, .25, .5, 1)] == [0, .146447, .5, 1]

fractions = st.floats(0, 1)

values = st.floats(-10, 10)

@given(ends=st.tuples(fractions, fractions), vals=st.tuples(values, values), pct=fractions, name=st.sampled_from(['lin', 'cos']))
def test_any_span(ends, vals, pct, name):
    start, end = sorted(ends)
    schedule = Schedule(dict(lin=sched_lin, cos=sched_cos)[name], start, end, *vals)
    assert schedule.progress(pct) == pytest.approx(curve(name, pct, start, end, *vals), abs=1e-9)
    assert schedule.progress(start) == pytest.approx(vals[start == end], abs=1e-9)
    assert schedule.progress(end) == pytest.approx(vals[1], abs=1e-9) and min(vals) - 1e-9 <= schedule.progress(pct) <= max(vals) + 1e-9

def test_outside_of_training():
    "Rounding may leave [0, 1] a little"
    assert [Schedule(sched_cos, start_val=.2, end_val=.7).progress(pct) for pct in (-.001, 1.001)] == [.2, .7]

def test_no_hidden_state():
    "What was asked before does not matter: two fits and an `lr_find` see the same curve"
    schedule = Schedule(sched_exp, .2, .8, 1., .01)
    forward = [schedule.progress(pct) for pct in PCTS]
    backward = [schedule.progress(pct) for pct in PCTS[::-1]][::-1]
    assert forward == backward == [schedule.progress(pct) for pct in PCTS]
    assert vars(schedule) == dict(sched_func=sched_exp, start_pct=.2, end_pct=.8, start_val=1., end_val=.01)

def test_one_curve_over_two_fits():
    "The halves of a schedule, seen from two fits of one and three epochs, are those of one fit of four epochs"
    one_fit = [cos.progress(step/40) for step in range(40)]
    two_fits = [cos.progress((0 + step/10*1)/4) for step in range(10)] + [cos.progress((1 + step/30*3)/4) for step in range(30)]
    np.testing.assert_allclose(two_fits, one_fit, atol=1e-12)

# ---- Values

def test_equality():
    assert cos == Schedule(sched_cos) and cos != lin and Schedule(sched_cos, .1) != cos and cos != 'cos'
    assert len({cos, lin, Schedule(sched_cos), Schedule(sched_lin, 0, 1)}) == 2
    assert {cos: 'found'}[Schedule(sched_cos, 0., 1., 0., 1.)] == 'found'
    assert replace(cos, end_pct=.5) == Schedule(sched_cos, end_pct=.5)

def test_copies():
    for schedule in (cos, Schedule(sched_exp, .1, .9, 2., .5)):
        for again in (pickle.loads(pickle.dumps(schedule)), copy(schedule), deepcopy(schedule)):
            assert again == schedule and hash(again) == hash(schedule) and again.progress(.3) == schedule.progress(.3)

def test_frozen():
    with pytest.raises(FrozenInstanceError): cos.end_pct = .5
    assert cos.end_pct == 1

def test_repr():
    assert repr(cos) == 'Schedule(sched_cos, 0→1 of training, 0→1)'
    assert repr(Schedule(sched_lin, .25, .5, 1, 0)) == 'Schedule(sched_lin, 0.25→0.5 of training, 1→0)'
    assert 'partial' in repr(Schedule(partial(lambda start, end, pos, power: start + (end - start)*pos**power, power=2)))

def test_plot():
    ax = Schedule(sched_lin, .5).plot(n_points=11)
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(x, np.linspace(0, 1, 11))
    np.testing.assert_allclose(y, [0]*6 + [.2, .4, .6, .8, 1], atol=1e-12)
    assert lin.plot(ax) is ax and len(ax.lines) == 2

# ---- Errors, when a schedule is written down

@pytest.mark.parametrize('start,end', [(.8, .2), (-.1, 1), (0, 1.1), (1.5, 2), (math.nan, 1), (0, math.nan)])
def test_ends_out_of_range(start, end):
    with pytest.raises(ValueError, match=f'0 <= start_pct <= end_pct <= 1 is needed, not start_pct={start}, end_pct={end}'):
        Schedule(sched_lin, start, end)

@pytest.mark.parametrize('name', ['start_pct', 'end_pct', 'start_val', 'end_val'])
def test_ends_that_are_no_numbers(name):
    for wrong in '4', None, [1.]:
        with pytest.raises(TypeError, match=f'{name} is a number, not'): Schedule(sched_cos, **{name: wrong})

@pytest.mark.parametrize('func', [SchedCos, SchedLin(0, 1), 'cos', None, lambda pos: pos, lambda start, end, pos: None])
def test_functions_that_are_no_annealers(func):
    with pytest.raises(TypeError, match=r'sched_func is called as f\(start, end, position\) and returns a number'): Schedule(func)

def test_exponential_from_zero():
    "`sched_exp` cannot leave 0"
    with pytest.raises(TypeError, match='division'): Schedule(sched_exp)
    assert Schedule(sched_exp, start_val=1e-3).progress(1) == pytest.approx(1)

# ---- Several numbers

def test_as_schedules():
    anneal = SchedLin(8, 1)
    assert as_schedules(None) == {} and as_schedules({}) == {}
    assert as_schedules(cos) == dict(weight=cos) and as_schedules(anneal) == dict(weight=anneal)
    given_ones = {'weight': cos, 'T': anneal, 'attention.p': SchedExp(1, 3)}
    assert as_schedules(given_ones) == given_ones and as_schedules(given_ones) is not given_ones

@pytest.mark.parametrize('wrong', [4, 'cos', sched_cos, SchedCos, Schedule, lambda pct: None, [cos]])
def test_as_schedules_refuses(wrong):
    "What cannot be asked for its value at one half of training"
    for schedule in (wrong, {'T': wrong}):
        message = r"schedule\['(weight|T)'\] is a `Schedule` or a fastai annealer such as `SchedLin\(start, end\)`, not "
        with pytest.raises(TypeError, match=message): as_schedules(schedule)

@pytest.mark.parametrize('name', ['T', 'attention.p', 'attention.factor'])
def test_progress_is_for_the_weight(name):
    message = rf"schedule\['{name}'\] is a `Schedule`, which multiplies .*{{'{name}': SchedLin\(start, end\)}}"
    with pytest.raises(ValueError, match=message): as_schedules({name: cos})

def test_scheduled_value():
    assert scheduled_value(None, 3., .7) == 3. and scheduled_value(None, None, .7) is None
    assert scheduled_value(lin, .8, .25) == .2
    assert scheduled_value(SchedLin(8, 1), .8, .5) == 4.5 # the value itself
    assert scheduled_value(SchedPoly(1, 3, 2), None, .5) == 1.5

@pytest.mark.parametrize('func,said', [(sched_cos, r'`SchedCos\(start, end\)`.*`Schedule\(sched_cos\)`'), (sched_lin, '`SchedLin'),
    (sched_exp, '`SchedExp'), (lambda start, end, pos: start, r'`Schedule\(<lambda>\)`')])
def test_functions_of_start_end_and_position(func, said):
    "fastai's annealers are made of them, and are easily taken for them"
    for schedule in (func, dict(weight=func), dict(T=func)):
        with pytest.raises(TypeError, match=f'it is a function of start, end and position. Write .*{said}'): as_schedules(schedule)

# ---- Stages

def by_hand(curve, pct, n): return curve(min(math.floor(pct*n), n - 1)/(n - 1))

@pytest.mark.parametrize('n', [2, 3, 5, 8])
def test_stages(n):
    for annealer in (SchedLin(10, 1), SchedCos(.5, 1), SchedExp(8, 1)):
        for pct in (np.arange(997) + .37)/997.1: # never close to an edge
            assert Stages(annealer, n)(pct) == pytest.approx(by_hand(annealer, pct, n)), pct
    assert Stages(cos, n).progress(.999) == 1 and Stages(cos, n).progress(0) == 0

def test_edges_of_stages():
    "A stage begins at its first step, though the fractions that fastai adds up are a little less"
    held, pct, seen = Stages(SchedLin(4, 0), 5), 0., []
    for step in range(50):
        seen.append(held(pct))
        pct += 1/50
    assert seen == [4.]*10 + [3.]*10 + [2.]*10 + [1.]*10 + [0.]*10
    assert held(-.001) == 4 and held(1.001) == 0

def test_stages_do_what_their_curve_does():
    assert as_schedules(Stages(cos, 5)) == dict(weight=Stages(cos, 5))
    assert scheduled_value(Stages(lin, 2), .8, .6) == .8 and scheduled_value(Stages(SchedLin(8, 1), 2), .8, .6) == 1
    assert scheduled_value(Stages(Stages(lin, 5), 3), .8, .4) == .8*Stages(lin, 5).progress(.5)
    with pytest.raises(ValueError, match='which multiplies and is for the weight only'): as_schedules({'T': Stages(cos, 5)})

def test_stages_are_values():
    assert Stages(cos, 5) == Stages(Schedule(sched_cos), 5) != Stages(cos, 4) and len({Stages(cos, 5), Stages(cos, 5), Stages(lin, 5)}) == 2
    assert pickle.loads(pickle.dumps(Stages(cos, 5))) == Stages(cos, 5)
    with pytest.raises(FrozenInstanceError): Stages(cos, 5).n = 4
    assert repr(Stages(SchedLin(10, 1), 5)) == 'Stages(SchedLin(10, 1), 5)'
    assert repr(Stages(lin, 5)) == 'Stages(Schedule(sched_lin, 0→1 of training, 0→1), 5)'

def test_plot_of_stages():
    ax = Stages(SchedLin(10, 2), 5).plot(n_points=11)
    np.testing.assert_allclose(ax.lines[0].get_data()[1], [10, 10, 8, 8, 6, 6, 4, 4, 2, 2, 2])
    assert Stages(cos, 5).plot(ax) is ax and len(ax.lines) == 2

@pytest.mark.parametrize('n', [1, 0, -2, 2.5, '5', None])
def test_numbers_of_stages(n):
    with pytest.raises(ValueError, match='n is a whole number of stages, at least 2'): Stages(cos, n)

def test_stages_of_what_is_no_curve():
    with pytest.raises(TypeError, match=r'the curve of `Stages` is .*`SchedCos\(start, end\)`'): Stages(sched_cos, 5)
    with pytest.raises(TypeError, match='the curve of `Stages` is .* not 4'): Stages(4, 5)

# ---- The whole curve is checked

def positive(value):
    if not value > 0: raise ValueError(f'T must be positive, not {value:g}')

def at_most_one(value):
    if value > 1: raise ValueError(f'{value:g} is too much')

def test_check_curve():
    for fine in (SchedLin(8, 1), SchedExp(8, .1), None, combine_scheds([.5, .5], [SchedLin(4, 2), SchedCos(2, 1)])):
        assert check_curve('T', fine, 4., positive) is None
    assert check_curve('weight', cos, 1., at_most_one) is None

@pytest.mark.parametrize('curve,pct', [(SchedLin(2, -1), '66.7%'), (SchedLin(0, 4), '0.0%'), (SchedCos(4, 0), '100.0%'),
    (combine_scheds([.5, .5], [SchedLin(4, 2), lambda pos: -1. if .2 < pos < .21 else 2.]), '60.[01]%'),
    (lambda pct: math.nan if pct > .9995 else 1., '100.0%'),
    (Stages(SchedLin(4, 0), 5), '80.0%'), (lambda pct: -1. if pct else 1., '0.1%')])
def test_check_curve_finds_where(curve, pct):
    with pytest.raises(ValueError, match=rf"T must be positive, not .* \(schedule of 'T' at {pct} of training\)$"):
        check_curve('T', curve, None, positive)

def test_check_curve_of_products():
    "A schedule multiplies, so the number that is checked is the product"
    message = r"1.002 is too much \(schedule of 'weight' at 50.1% of training\)"
    with pytest.raises(ValueError, match=message): check_curve('weight', lin, 2., at_most_one)
    with pytest.raises(ValueError, match='^2 is too much$'): check_curve('weight', None, 2., at_most_one)
    check_curve('weight', Schedule(sched_no, start_val=.5, end_val=.5), 2., at_most_one)

def test_check_curve_looks_everywhere():
    seen = []
    check_curve('T', SchedLin(0, 1), None, seen.append)
    np.testing.assert_allclose(seen, np.linspace(0, 1, 1001), atol=1e-12)
    seen.clear()
    check_curve('T', None, 7, seen.append)
    assert seen == [7]

def test_schedules_of_fasterai():
    "Those that are not in fastkd multiply the weight as they do there"
    theirs = pytest.importorskip('fasterai.core.schedule')
    for name in ('agp', 'one_cycle', 'dsd', 'cos', 'lin'):
        curve, = as_schedules(getattr(theirs, name)).values()
        assert multiplies(curve) and scheduled_value(curve, .8, .3) == pytest.approx(.8*curve.progress(.3))
    assert scheduled_value(theirs.cos, 1., .3) == pytest.approx(scheduled_value(cos, 1., .3))
