"What is particular to losses on relations: known values, what they take for the same, and what CRD remembers."
import copy, math, numpy as np, pytest, torch, torch.nn.functional as F
from cases import draw
from fastkd.losses import relation
from fastkd.losses.core import Probe, unit
from fastkd.losses.relation import (CRD, PKT, RKD, Contrastive, CorrelationCongruence, CosineSimilarity, Gram, InstanceGraph,
    Similarity, pairwise_distances, triplet_angles)
from formulas import close
from helpers import convnet, learner, seeded
from fastkd.callback import KnowledgeDistillationCallback

TURN = torch.linalg.qr(draw((4, 4), 9))[0]
RELATIONS = [Similarity(), PKT(), RKD(), CorrelationCongruence(), Gram(), CosineSimilarity(), InstanceGraph(vertices=0)]

each_relation = pytest.mark.parametrize('loss', RELATIONS, ids=repr)

def built(loss, f_s, f_t, n_samples=None): return loss.build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1]), n_samples=n_samples))

def crd(**settings):
    "A built loss, and a batch of three"
    f_s, f_t = draw((3, 4)), draw((3, 5), 1)
    return built(CRD(**dict(dim=6, negatives=5) | settings), f_s, f_t, n_samples=10), f_s, f_t

# ---- Relations

def test_usual_weights():
    known = {type(loss).__name__: loss.usual_weight for loss in [*RELATIONS, Contrastive(), CRD()] if loss.usual_weight}
    assert known == dict(Similarity=3000, PKT=30000, RKD=1, CRD=.8)

@each_relation
def test_what_is_the_same(loss):
    "Turned and scaled features have the same relations, and so have samples in another order"
    f_s, f_t = draw((5, 4)), draw((5, 3), 1)
    close(loss(f_s, 7*f_s @ TURN), 0., atol=1e-12)
    close(loss(f_s.flip(0), f_t.flip(0)), loss(f_s, f_t), rtol=1e-12)
    assert loss(f_s, f_t) > 1e-4

@each_relation
def test_small_and_large_features(loss):
    "A common factor changes nothing"
    f_s, f_t = draw((5, 4), dtype=torch.float32), draw((5, 3), 1, torch.float32)
    expected = loss(f_s, f_t)
    for scale in (1e-8, 1e8): close(loss(scale*f_s, f_t), expected, rtol=2e-5)

def gradient(rows, distances):
    rows = rows.clone().requires_grad_()
    n_pairs = len(rows)*(len(rows) - 1)//2
    return torch.autograd.grad((distances(rows)*torch.linspace(.1, 1, n_pairs).to(rows)).sum(), rows)[0].double()

def close_rows():
    "Far from the origin, one pair is much closer than the others, down to one step of single precision; and rows that are nearly 0"
    rows = (5 + draw((16, 32))).float()
    for apart in (1, 1e-2, 1e-4, 0):
        pair = rows[0] + apart*draw((32,), 1).float() if apart else torch.nextafter(rows[0], torch.tensor(9.))
        yield torch.cat([rows[:1], pair[None], rows[2:]])
    for size in (1e-7, 1e-9, 1e-11): yield torch.cat([size*draw((3, 32), 2).relu(), draw((13, 32))]).float()

@pytest.mark.parametrize('rows', [*close_rows()])
def test_gradient_of_close_samples(rows):
    expected = gradient(rows.double(), F.pdist)
    assert ((gradient(rows, pairwise_distances) - expected).norm(dim=1) <= 1e-6*expected.norm(dim=1)).all()

def test_second_derivatives_of_distances(): assert torch.autograd.gradgradcheck(pairwise_distances, draw((5, 3)).requires_grad_())

def test_known_values():
    "Two samples, once at a right angle, once in the same direction"
    apart, alike = torch.eye(2).double(), torch.tensor([[1., 0.], [1., 0.]]).double()
    close(Similarity()(apart, alike), (2*(1 - .5**.5)**2 + 2*.5)/4)
    close(CosineSimilarity()(apart, alike), .5)
    close(Gram()(apart, alike), (2*(.5**.5 - .5)**2 + 2*.5**2)/4)
    close(CorrelationCongruence()(apart, alike), math.exp(-1.6)*(.8 + .32)**2/2)
    close(CorrelationCongruence(P=1)(apart, alike), math.exp(-1.6)*.8**2/2)

def test_equilateral_against_line():
    "Three samples in a triangle with equal sides, and on a line"
    triangle = torch.tensor([[0., 0.], [1., 0.], [.5, .75**.5]], dtype=torch.float64)
    line = torch.tensor([[0.], [1.], [3.]]).double()
    close(RKD(angle=0)(triangle, line), 25*sum((d - 1)**2 for d in (.5, 1, 1.5))/9, rtol=1e-12)
    close(RKD(angle=0, normalize='max')(triangle, line), 25*((1 - 1/3)**2 + (1 - 2/3)**2)/9, rtol=1e-12)
    close(RKD(distance=0)(triangle, line), 50*2*(.125 + .125 + (1.5 - .5))/27, rtol=1e-12) # cosines .5 against 1, 1, -1
    close(InstanceGraph(vertices=0)(triangle, line), sum((d - 1)**2 for d in (.5, 1, 1.5))/3, rtol=1e-12)

def test_distances_of_samples_that_are_close():
    near = 100 + torch.tensor([[0., 0.], [.0625, 0.]])
    assert pairwise_distances(near).tolist() == [.0625]
    many = torch.cat([near, 100 + draw((40, 2), dtype=torch.float32)])
    assert pairwise_distances(many)[0] == .0625 # torch.cdist would take inner products for more than 25 rows

def test_rkd_is_zero_where_nothing_can_be_compared():
    twin = draw((1, 4)).expand(3, 4).clone().requires_grad_()
    value = RKD()(twin, draw((3, 4), 1))
    value.backward()
    assert not twin.grad.any() and value > 0
    assert RKD()(twin, twin.detach()*2) == 0 and not triplet_angles(twin.detach()).any()

@pytest.mark.parametrize('make,message', [(lambda: RKD(normalize='sum'), "'mean' or 'max'"), (lambda: RKD(distance=-1), 'at least 0'),
    (lambda: CorrelationCongruence(P=0), 'P must be at least 1'), (lambda: CorrelationCongruence(P=1.5), 'whole number'),
    (lambda: CorrelationCongruence(gamma=0), 'gamma must be positive'), (lambda: Contrastive(T=0), 'T must be positive'),
    (lambda: CRD(form='bank'), "'queue' or 'nce'"), (lambda: CRD(T=-1), 'T must be positive'), (lambda: CRD(momentum=-1), 'at least 0'),
    (lambda: InstanceGraph(edges=-1), 'at least 0')])
def test_settings(make, message):
    with pytest.raises(ValueError, match=message): make()

# ---- Pooled features

def test_layouts_are_pooled():
    "A channels-last map, tokens and a vector, each against a map"
    f_s = draw((3, 4, 2, 5))
    expected = Contrastive()(f_s.mean((2, 3)), draw((3, 4), 1))
    close(Contrastive()(f_s, draw((3, 4), 1)), expected)
    tokens = f_s.flatten(2).transpose(1, 2)
    close(Contrastive()(tokens, draw((3, 4), 1)), expected)
    square = draw((3, 4, 6, 6))
    close(Contrastive()(square.permute(0, 2, 3, 1), draw((3, 4), 1)), Contrastive()(square, draw((3, 4), 1)))

def test_contrastive_floor(): close(Contrastive(T=.25)(torch.eye(7), torch.eye(7)), math.log(1 + 6*math.exp(-4)), rtol=1e-5)

def test_instance_graph_pairs():
    "Edges need no adapter and no common positions; vertices need both"
    f_s, f_t = draw((3, 4, 5, 5)), draw((3, 7), 1)
    assert InstanceGraph(vertices=0).build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1]))).learned is None
    with pytest.raises(ValueError, match='no positions in common'): InstanceGraph()(f_s, f_t)
    with pytest.raises(ValueError, match='4 channels of the student, 6 of the teacher'): InstanceGraph()(f_s, draw((3, 6, 5, 5)))
    one = InstanceGraph()(f_s[:1], draw((1, 4, 5, 5), 1))
    close(one, InstanceGraph(edges=0)(f_s[:1], draw((1, 4, 5, 5), 1)))

# ---- What CRD remembers

def test_queue_holds_the_latest():
    loss, f_s, f_t = crd()
    queue, keys = loss.learned[0], []
    assert loss(f_s, f_t) == 0 # nothing to tell the sample from
    for seed in range(3):
        batch = draw((3, 5), 30 + seed)
        before = queue.keys
        loss(f_s, batch)
        keys.append(torch.nn.functional.normalize(queue.teacher(batch).detach()))
        assert before is not queue.keys # the backward pass may still need it
    assert queue.n_keys == 5
    close(queue.keys, torch.cat(keys[::-1])[:5])

def test_batch_larger_than_the_queue():
    loss, f_s, f_t = crd(negatives=2)
    loss(f_s, f_t)
    close(loss.learned[0].keys, torch.nn.functional.normalize(loss.learned[0].teacher(f_t).detach())[:2])
    assert loss.learned[0].n_keys == 2 and loss(f_s, f_t) > 0

@pytest.mark.parametrize('form', ['queue', 'nce'])
def test_looking_does_not_change_the_memory(form):
    "Neither the check before training, nor eval, nor a call without gradients"
    loss, f_s, f_t = crd(form=form)
    index = torch.tensor([3, 1, 2])
    state = {name: o.clone() for name, o in loss.named_buffers()}
    loss.check(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1]), n_samples=10))
    with torch.no_grad(): loss(f_s, f_t, index=index)
    loss.eval()(f_s, f_t, index=index)
    assert all(torch.equal(o, state[name]) for name, o in loss.named_buffers())
    loss.train()(f_s, f_t, index=index)
    assert not all(torch.equal(o, state[name]) for name, o in loss.named_buffers())

@pytest.mark.parametrize('form', ['queue', 'nce'])
def test_memory_is_written_before_backward(form):
    "Two calls, and then the backward pass of both: gradients are those of the single calls"
    index, f_s = torch.tensor([3, 1, 2]), [draw((3, 4), 50), draw((3, 4), 51)]
    together, apart = [], []
    for grads, at_once in ((together, True), (apart, False)):
        loss, _, f_t = crd(form=form)
        values = []
        for o in f_s:
            leaf = o.clone().requires_grad_()
            value = loss(leaf, f_t, index=index)
            if at_once: values.append((value, leaf))
            else: grads.append(torch.autograd.grad(value, leaf)[0])
        grads.extend(torch.autograd.grad(value, leaf)[0] for value, leaf in values)
    for a, b in zip(together, apart): close(a, b)
    assert together[1].abs().max() > 1e-3

def test_banks_change_only_where_samples_were():
    loss, f_s, f_t = crd(form='nce')
    banks = loss.learned[0]
    before, index = banks.bank_t.clone(), torch.tensor([9, 4, 0])
    loss(f_s, f_t, index=index)
    others = [i for i in range(10) if i not in index]
    assert torch.equal(banks.bank_t[others], before[others])
    t = torch.nn.functional.normalize(banks.teacher(f_t).detach())
    close(banks.bank_t[index], torch.nn.functional.normalize(.5*before[index] + .5*t))

def test_normalisers_are_those_of_the_first_batch():
    loss, f_s, f_t = crd(form='nce')
    banks, index = loss.learned[0], torch.tensor([9, 4, 0])
    seed, bank = banks.draws.seed + banks.draws.n_draws + 1, banks.bank_t.clone().numpy() # the check before has drawn, too
    loss(f_s, f_t, index=index)
    drawn = (torch.rand(5, generator=torch.Generator().manual_seed(seed))*10).long().numpy()
    s = torch.nn.functional.normalize(banks.student(f_s).detach()).numpy()
    scores = [np.exp(x @ row/.07) for x, i in zip(s, index) for row in (bank[i], *bank[drawn])]
    close(banks.log_z[0].exp(), 10*np.mean(scores), rtol=1e-9)
    first = banks.log_z.clone()
    for seed in range(3): loss(draw((3, 4), seed), f_t, index=index)
    assert torch.equal(banks.log_z, first)

def test_extreme_scores_stay_finite():
    "At T=.001 exponents reach 1000, far beyond float64"
    loss, f_s, f_t = crd(form='nce', T=1e-3)
    f_s.requires_grad_()
    for _ in range(2):
        value = loss(f_s, f_t, index=torch.tensor([9, 4, 0]))
        assert value.isfinite() and torch.autograd.grad(value, f_s)[0].isfinite().all()

def test_nce_needs_numbered_samples():
    loss, f_s, f_t = crd(form='nce')
    probe = Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1]))
    with pytest.raises(ValueError, match='needs `index`'): loss(f_s, f_t)
    with pytest.raises(ValueError, match='number their samples'): loss.check(probe)
    unbuilt = CRD(form='nce')
    with pytest.raises(ValueError, match='number their samples'): unbuilt.build(probe)
    assert unbuilt.learned is None
    probe.n_samples = 11
    with pytest.raises(ValueError, match='banks of 10 samples, and the training set has 11'): loss.check(probe)
    with pytest.raises(ValueError, match='build'): CRD()(f_s, f_t)

@pytest.mark.parametrize('form', ['queue', 'nce'])
def test_zero_embeddings_stay_finite(form):
    "A projection of zeros has no direction"
    loss, f_s, f_t = crd(form=form)
    for p in loss.parameters(): p.data.zero_()
    f_s.requires_grad_()
    for _ in range(3):
        value = loss(f_s, f_t, index=torch.tensor([1, 2, 3]))
        value.backward()
        assert value.isfinite() and not f_s.grad.any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())

@pytest.mark.parametrize('form', ['queue', 'nce'])
def test_memory_of_all_processes(form, monkeypatch):
    "Two processes with the same batch: the memory is that of one with the batch twice, and so are the normalisers"
    loss, f_s, f_t = crd(form=form, negatives=8)
    alone, index = copy.deepcopy(loss), torch.tensor([3, 1, 2])
    monkeypatch.setattr(relation.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(relation.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(relation.dist, 'all_gather', lambda parts, rows: [part.copy_(rows) for part in parts])
    loss(f_s, f_t, index=index)
    monkeypatch.undo()
    alone(torch.cat([f_s, f_s]), torch.cat([f_t, f_t]), index=torch.cat([index, index]))
    for (name, a), b in zip(loss.named_buffers(), alone.buffers()): close(a, b, rtol=1e-10), name

# ---- In training

@pytest.mark.parametrize('loss', [1000*Similarity(), RKD(), CorrelationCongruence(), CRD(dim=8, negatives=60),
    CRD(dim=8, negatives=20, form='nce'), Contrastive(), InstanceGraph()], ids=repr)
def test_it_trains(loss):
    "A student of 8 channels with a teacher of 12, for two epochs of four batches"
    student = learner()
    cb = KnowledgeDistillationCallback(seeded(convnet, 6, seed=1), loss, 'block2', 'block2')
    student.fit(2, cbs=cb)
    assert all(math.isfinite(o) for row in student.recorder.values for o in row)
    loss = cb.loss.parts[0].loss
    if not isinstance(loss, CRD): return
    memory = loss.learned[0]
    if loss.form == 'queue': assert memory.n_keys == 60
    else: assert len(memory.bank_s) == 100 and memory.log_z.isfinite().all() and memory.draws.n_draws == 8 # the check draws nothing

def test_no_sample_is_its_own_negative():
    "With positions in the dataset, keys of the same sample from earlier batches are left out"
    f_s, f_t, index = draw((4, 3), dtype=torch.float32), draw((4, 3), 1, dtype=torch.float32), torch.arange(4)
    loss = CRD(dim=2, negatives=8).build(Probe(fm_s=dict(s=f_s[:1]), fm_t=dict(t=f_t[:1])))
    loss(f_s, f_t, index=index)
    memory = loss.learned[0]
    assert memory.owners.tolist() == [0, 1, 2, 3, -1, -1, -1, -1] and memory.n_keys == 4
    s, t = unit(memory.student(f_s)), unit(memory.teacher(f_t))
    scores = s @ memory.keys[:4].T
    others = scores.masked_fill(torch.eye(4).bool(), -math.inf)
    expected = F.cross_entropy(torch.cat([(s*t).sum(1, keepdim=True), others], 1)/.07, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(loss.eval()(f_s, f_t, index=index), expected)
    assert loss(f_s, f_t) > expected # without positions nobody knows
