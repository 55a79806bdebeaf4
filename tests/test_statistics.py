"Statistics: intervals, p-values and sentences against hand computations and other formulas."
import itertools, json, math, numpy as np, pytest
from fastkd.statistics import holm, in_words, mean_interval, paired_interval
from pathlib import Path
from scipy.stats import t, ttest_1samp, ttest_rel

def by_hand(values, factor):
    mean = sum(values)/len(values)
    deviation = math.sqrt(sum((o - mean)**2 for o in values)/(len(values) - 1))
    return mean, mean - factor*deviation/math.sqrt(len(values)), mean + factor*deviation/math.sqrt(len(values))

# factors from a printed table of Student's distribution
@pytest.mark.parametrize('values,factor', [([.9, .92], 12.706), ([1, 2, 4], 4.303), ([.91, .93, .9, .92, .97], 2.776)])
def test_interval(values, factor): assert mean_interval(values) == pytest.approx(by_hand(values, factor), rel=1e-3)

def test_another_confidence():
    values = [3, 1, 4, 1, 5]
    assert mean_interval(values, .5) == pytest.approx(by_hand(values, .7407), rel=1e-3)
    assert mean_interval(values)[1:] == pytest.approx(ttest_1samp(values, 0).confidence_interval(.95))

def test_paired_difference():
    a, b = [.919, .936, .909, .930, .917], [.912, .931, .898, .925, .907]
    differences = [.007, .005, .011, .005, .010]
    mean, low, high, p = paired_interval(a, b)
    assert (mean, low, high) == pytest.approx(by_hand(differences, 2.7764), rel=1e-3)
    assert p == pytest.approx(ttest_rel(a, b).pvalue) and paired_interval(b, a) == pytest.approx((-mean, -high, -low, p))
    statistic = .0076/(np.std(differences, ddof=1)/5**.5)
    assert p == pytest.approx(2*t.sf(statistic, 4))

def test_pairs_matter():
    "The same numbers in another order of seeds are another result"
    a = [.92, .94, .91]
    assert paired_interval(a, [.91, .935, .90])[3] < .06 < paired_interval(a, [.935, .90, .91])[3]

def test_equal_differences_tell_nothing_of_noise():
    "Also where rounding makes them differ in the last place"
    assert paired_interval([.9, .8, .7], [.8, .7, .6])[1:] == (-math.inf, math.inf, 1.)
    assert paired_interval([.9]*5, [.9]*5) == (0., 0., 0., 1.) == paired_interval([0.]*5, [0.]*5)

def holm_by_hand(ps):
    "Holm 1979: the k-th smallest of m is rejected at a level while all before it are and it is at most level/(m - k)"
    found = [0.]*len(ps)
    for at in sorted(ps, reverse=True):
        rank = sorted(ps).index(at)
        found[ps.index(at)] = max(min(1., (len(ps) - i)*p) for i, p in enumerate(sorted(ps)[:rank + 1]))
    return found

@pytest.mark.parametrize('ps', [*itertools.permutations([.01, .02, .04]), [.3], [.9, .8, .5, .001]])
def test_holm(ps): assert holm(ps) == pytest.approx(holm_by_hand(list(ps)))

def test_holm_of_nothing(): assert holm([]) == []

def test_interval_of_equal_values(): assert mean_interval([.9, .9, .9]) == pytest.approx((.9, .9, .9))

def test_words():
    def say(*difference, **kwargs): return in_words('kd', 'alone', 'accuracy', difference, 5, **kwargs)
    assert say(.01, .004, .016, .003) == \
        "'kd' is better than 'alone': accuracy +0.0100 (95 % interval +0.0040 to +0.0160, p 0.003, 5 seeds)"
    assert say(-.01, -.016, -.004, .003).startswith("'kd' is worse than 'alone': accuracy -0.0100")
    assert say(-.01, -.016, -.004, .003, lower_is_better=True).startswith("'kd' is better than 'alone'")
    assert say(.01, -.004, .024, .1).startswith("'kd' is within noise of 'alone'")
    assert say(.01, .004, .016, .03, p=.09).startswith("'kd' is within noise of 'alone'") # in a table of three
    assert say(math.nan, math.nan, math.nan, math.nan).startswith("'kd' is within noise of 'alone'")

def test_errors():
    with pytest.raises(ValueError, match='at least two runs, not 1'): mean_interval([1.])
    with pytest.raises(ValueError, match='not 3 and 2'): paired_interval([1, 2, 3], [1, 2])

RUNS = Path(__file__).parent.parent/'benchmarks'/'coverage.json'

@pytest.mark.slow
def test_intervals_hold_what_they_promise():
    "Comparisons drawn from 200 real runs: a 95 % interval holds the mean of all in 93 to 97 %, equal set-ups differ in at most 7 %"
    from benchmarks.coverage import many, simulated
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    mean, half, p = many((a - b)[None])
    assert (mean[0], mean[0] - half[0], mean[0] + half[0], p[0]) == pytest.approx(paired_interval(a, b)) # the same statistics, quickly
    for differences in ([1., 1, 1], [0., 0, 0]): # equal ones tell nothing of how much they vary
        (mean,), (half,), (p,) = many(np.array([differences]))
        assert (mean, mean - half, mean + half, p) == paired_interval(differences, [0, 0, 0])
    found = simulated(json.loads(RUNS.read_text()))
    assert len(found) > 3
    for n, row in found.items():
        assert 93 <= row['mean'] <= 97 and 93 <= row['difference'] <= 97 and row['no difference'] >= 93 and row['none in three'] >= 93, n
