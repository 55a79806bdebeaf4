"What is special about the losses that learn a translator: exact values, settings, errors, and what must not change."
import copy, pytest, torch
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.losses.core import Probe
from fastkd.losses.translators import VID, AdversarialFeatures, FactorTransfer, MaskedGenerative, ReviewKD, SRRL
from fastkd.losses.translators import Paraphraser, context_loss, train_paraphrasers
from formulas import close
from helpers import convnet, learner, seeded, trained_teacher
from torch import nn

def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def built(loss, f_s, f_t, **given): return loss.build(Probe(fm_s=dict(a=f_s), fm_t=dict(b=f_t), **given))

F_S, F_T = draw(4, 3, 5, 6), draw(4, 4, 5, 6, seed=1)
EACH = [VID(), FactorTransfer(), MaskedGenerative(), ReviewKD(), AdversarialFeatures()]
each = pytest.mark.parametrize('loss', EACH, ids=repr)

# ---- All of them

@each
def test_unbuilt_says_so(loss):
    with pytest.raises(ValueError, match='build'): loss.without_learned()(F_S, F_T)

@each
def test_same_parts_whatever_was_drawn_before(loss):
    first = built(loss.without_learned(), F_S, F_T).state_dict()
    torch.rand(3)
    second = built(loss.without_learned(), F_S, F_T).state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

@pytest.mark.parametrize('loss', [*EACH, SRRL('head.3'), SRRL(['head.2', 'head.3'])], ids=repr)
def test_trains_in_a_fit(loss):
    "Everything learned moves with the student; the teacher stays"
    layers = ['block2'] if isinstance(loss, SRRL) else ['block1', 'block2']
    teacher = trained_teacher()
    before = copy.deepcopy(teacher.state_dict())
    cb = KnowledgeDistillationCallback(teacher, 1e-3*loss.without_learned().on(layers, layers), task_weight=1)
    learn = learner(n=50)
    learn.fit(1, cbs=cb)
    assert all(torch.equal(o, before[name]) for name, o in teacher.state_dict().items())
    learned = cb.loss.parts[0].loss
    fresh = copy.deepcopy(learned.state_dict())
    learn.fit(1, cbs=cb)
    for name, p in learned.named_parameters(): assert torch.equal(p, fresh[name]) == (not p.requires_grad), name

@pytest.mark.parametrize('loss', [ReviewKD(), SRRL('fc')], ids=repr)
def test_one_value_per_channel(loss):
    "Batch normalization falls back on its running statistics, and leaves them alone"
    f_s, f_t = draw(1, 3), draw(1, 4, seed=1)
    loss = built(loss.without_learned(), f_s, f_t, teacher_pred=draw(1, 2), teacher_module=lambda name: nn.Linear(4, 2))
    before = copy.deepcopy(dict(loss.named_buffers()))
    given = dict(fm_s=f_s, fm_t=f_t, **(dict(teacher_pred=draw(1, 2)) if isinstance(loss, SRRL) else {}))
    close(loss.train()(**given), loss.eval()(**given))
    assert all(torch.equal(o, before[name]) for name, o in loss.named_buffers())

# ---- VID

def test_vid_starts_at_variance_five():
    vid = built(VID(), F_S, F_T)
    close(nn.functional.softplus(vid.learned[0].rho.double()) + 1e-5, torch.full((4,), 5.), rtol=1e-6)
    assert [tuple(p.shape) for p in vid.parameters()] == [(4,), (4, 3, 1, 1), (4, 4, 1, 1), (4, 4, 1, 1)]

@pytest.mark.parametrize('rho', [-1e4, -100., 100., 1e4])
def test_vid_is_finite_at_any_variance(rho):
    vid = built(VID(), F_S, F_T)
    with torch.no_grad(): vid.learned[0].rho.fill_(rho)
    value = vid(F_S, F_T)
    value.backward()
    assert value.isfinite() and all(p.grad.isfinite().all() for p in vid.parameters())

# ---- Factor transfer

class Unlabelled(list): n_inp = 1

def a_teacher():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))

def test_paraphrasers_reconstruct_and_leave_the_teacher():
    teacher, batches = a_teacher().train(), [draw(8, 1, 5, 6, seed=i) for i in range(4)]
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(0)
    found = train_paraphrasers(teacher, ['2', '3'], batches, epochs=30, lr=3e-3)
    assert all(torch.equal(o, before[name]) for name, o in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert [p.n_factors for p in found] == [3, 2] and not any(p.requires_grad or p.grad is not None for p in found.parameters())
    seen = teacher.eval()(batches[0]).detach()
    error = lambda paraphraser: (paraphraser(seen) - seen).square().mean()
    assert error(found[1]) < .5*seen.var() < .7*error(Paraphraser(seen))

@pytest.mark.parametrize('batches', [[F_S[:, :1]], [(F_S[:, :1], 'labels are not looked at')], Unlabelled([(F_S[:, :1],)])])
def test_paraphrasers_look_at_inputs_only(batches): assert len(train_paraphrasers(a_teacher(), '3', batches, epochs=1)) == 1

def test_paraphrasers_of_a_learner():
    learn = learner(n=50)
    found = train_paraphrasers(learn, ['block1', 'block2'], learn.dls.train, rate=.25, epochs=1)
    assert [p.n_factors for p in found] == [1, 2]
    cb = KnowledgeDistillationCallback(learn.model, FactorTransfer(paraphrasers=found).on(['block1', 'block2'], ['block1', 'block2']))
    learner(seeded(convnet, 4, seed=1), n=50).fit(1, cbs=cb)

def test_given_paraphrasers_are_a_setting():
    "Copied into what is learned, so the user's are never touched, and a fresh loss has them again"
    given = nn.ModuleList([Paraphraser(F_T, .5)])
    loss = FactorTransfer(paraphrasers=given)
    assert not list(loss.parameters()) and not loss.state_dict()
    first = built(loss.without_learned(), F_S, F_T)
    inner = first.learned[0]['paraphraser']
    own, users = list(inner.parameters()), list(given[0].encoder.parameters())
    assert all(torch.equal(a, b) and a is not b and not a.requires_grad and b.requires_grad for a, b in zip(own, users, strict=True))
    with torch.no_grad():
        for p in inner.parameters(): p.zero_()
    again = built(first.without_learned(), F_S, F_T)
    assert again.learned is not first.learned and again.learned[0]['paraphraser'][0].weight.any()
    assert repr(again) == 'FactorTransfer(rate=0.5, paraphrasers=<1 paraphrasers>)'
    assert built(copy.deepcopy(loss), F_S, F_T)(F_S, F_T).isfinite()

def test_factors_are_as_many_as_the_paraphrasers():
    loss = built(FactorTransfer(paraphrasers=[Paraphraser(F_T, .75)]), F_S, F_T)
    assert loss.learned[0]['translator'](F_S).shape == loss.learned[0]['paraphraser'](F_T).shape == (4, 3, 5, 6)

def test_factor_transfer_errors():
    with pytest.raises(ValueError, match='rate must be positive'): FactorTransfer(rate=0)
    with pytest.raises(ValueError, match='no use for paraphrasers'): FactorTransfer(rate=None, paraphrasers=[Paraphraser(F_T)])
    with pytest.raises(ValueError, match=r'1 paraphraser\(s\) for 2 pair\(s\)'):
        FactorTransfer(paraphrasers=[Paraphraser(F_T)]).build(Probe(fm_s=dict(a=F_S, b=F_S), fm_t=dict(a=F_T, b=F_T)))
    with pytest.raises(ValueError, match="student layer 'a'.*the same channels"): built(FactorTransfer(rate=None), F_S, F_T)
    with pytest.raises(ValueError, match="teacher layer 'b'"): built(FactorTransfer(paraphrasers=[Paraphraser(F_S)]), F_S, F_T)

def test_opposite_factors():
    "Of two unit vectors of D equal elements with opposite signs, each element differs by 2/√D"
    ones = torch.ones(2, 4, 2, 2)
    close(FactorTransfer(rate=None)(ones, -ones), 2/4)

# ---- Masked generative

@pytest.mark.parametrize('mask,ratio', [('spatial', .65), ('channel', .15), ('spatial', 0.)])
def test_share_that_is_hidden(mask, ratio):
    features = torch.ones(20, 30, 12, 10)
    loss = MaskedGenerative(ratio, mask)
    draws = built(MaskedGenerative(), F_S, F_T).learned[0]['draws']
    first, second = loss.kept(features, draws), loss.kept(features, draws)
    assert first.shape == ((20, 1, 12, 10) if mask == 'spatial' else (20, 30, 1, 1))
    close(1 - first.float().mean(), ratio, atol=.05)
    assert torch.equal(first, second) == (ratio == 0)

def test_nothing_is_hidden_in_eval_mode():
    "And no number is drawn, by `build`, by its check, or in evaluation"
    loss = built(MaskedGenerative(), F_S, F_T)
    draws = loss.learned[0]['draws']
    assert draws.n_draws == 0
    close(loss.eval()(F_S, F_T), loss(F_S, F_T))
    assert draws.n_draws == 0
    assert loss.train()(F_S, F_T) != loss(F_S, F_T) and draws.n_draws == 2

def test_masks_are_drawn_aside():
    loss = built(MaskedGenerative(), F_S, F_T)
    before = torch.get_rng_state()
    loss(F_S, F_T)
    assert torch.equal(torch.get_rng_state(), before)

def test_sum_over_a_sample_mean_over_samples():
    loss = built(MaskedGenerative(), F_S, F_T).eval()
    close(loss(F_S, F_T), torch.stack([loss(s[None], t[None]) for s, t in zip(F_S, F_T)]).mean(), rtol=1e-5)

def test_masked_generative_errors():
    with pytest.raises(ValueError, match="'spatial' or 'channel', not 'both'"): MaskedGenerative(mask='both')
    for ratio in (-.1, 1, 1.5):
        with pytest.raises(ValueError, match='ratio must be'): MaskedGenerative(ratio)
    with pytest.raises(ValueError, match="use mask='channel'"): built(MaskedGenerative(), draw(4, 3), draw(4, 5))

# ---- ReviewKD

SIZES = {(8, 8): (1, .5, .25, .125), (4, 6): (1, .5, .25), (2, 9): (1, .5), (9, 2): (1, .5), (1, 7): (1,)}

@pytest.mark.parametrize('size,weights', SIZES.items())
def test_weights_of_the_context_loss(size, weights):
    "A difference whose mean is 0 and that vanishes in every pool leaves the first weight's share; a shift is seen by all"
    maps = torch.zeros(2, 3, *size)
    close(context_loss(maps, maps + 3), 9.)
    if size == (8, 8):
        checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2*2. - 1
        close(context_loss(maps, maps + checks), 1/sum(weights))
    noise = draw(2, 3, *size, seed=4)
    pooled = (nn.functional.adaptive_avg_pool2d(noise, n) for n in (4, 2, 1) if n < min(size))
    means = [o.square().mean() for o in (noise, *pooled)]
    close(context_loss(maps, noise), sum(w*m for w, m in zip(weights, means))/sum(weights), rtol=1e-5)

def test_review_goes_from_deep_to_shallow():
    "The teacher's shallow stage teaches the student's deep one, and never the other way round"
    shapes = [(3, 8, 6), (4, 4, 3), (5, 2, 2)]
    student, teacher = ([draw(2, *shape, seed=i + j).requires_grad_(j == 0) for i, shape in enumerate(shapes)] for j in (0, 5))
    loss = ReviewKD().build(Probe(fm_s=dict(enumerate(student)), fm_t=dict(enumerate(teacher))))
    grads = lambda teacher: torch.autograd.grad(loss(student, teacher), student)
    before, shallow = grads(teacher), grads([teacher[0] + 1, *teacher[1:]])
    deep = grads([*teacher[:2], teacher[2] + draw(2, 5, 2, 2)])
    changed = lambda grads: [not torch.allclose(a, b, atol=1e-7) for a, b in zip(grads, before)]
    assert changed(shallow) == [True, True, True] and changed(deep) == [False, False, True]

def test_common_channels_are_those_of_the_deepest_student():
    fm_s, fm_t = dict(a=draw(2, 3, 8, 8), b=draw(2, 600, 2, 2)), dict(a=draw(2, 4, 8, 8), b=draw(2, 6, 2, 2))
    wide = ReviewKD().build(Probe(fm_s=fm_s, fm_t=fm_t)).learned
    assert [fusion.inward[0].out_channels for fusion in wide] == [512, 512] and wide[1].attention is None
    assert ReviewKD().build(Probe(fm_s=fm_s | dict(b=draw(2, 5, 2, 2)), fm_t=fm_t)).learned[0].inward[0].out_channels == 5

def test_review_of_tokens_and_volumes():
    "A token in front of the image is dropped"
    tokens_s, tokens_t = draw(2, 17, 6), draw(2, 17, 8, seed=1)
    loss = built(ReviewKD(), tokens_s, tokens_t)
    close(loss(tokens_s, tokens_t), loss(*(o[:, 1:].transpose(1, 2).reshape(2, -1, 4, 4) for o in (tokens_s, tokens_t))))
    with pytest.raises(ValueError, match='maps, tokens and vectors'): built(ReviewKD(), draw(2, 3, 4, 4, 4), draw(2, 3, 4, 4, 4))

# ---- SRRL

HEAD = nn.Sequential(nn.Dropout(.9), nn.BatchNorm1d(4), nn.Linear(4, 5))

def srrl(head=HEAD, f_t=F_T, n=5): return built(SRRL('fc'), F_S, f_t, teacher_pred=draw(4, n), teacher_module=lambda name: head)

def test_head_is_a_frozen_copy_in_eval_mode():
    head = copy.deepcopy(HEAD).train()
    before = copy.deepcopy(head.state_dict())
    loss = srrl(head).train()
    close(loss(F_S, F_T, draw(4, 5)), loss(F_S, F_T, draw(4, 5)), rtol=1e-6) # dropout would show
    loss(F_S.clone().requires_grad_(), F_T, draw(4, 5)).backward()
    assert all(torch.equal(o, before[name]) for name, o in head.state_dict().items()) and head.training
    assert all(p.requires_grad and p.grad is None for p in head.parameters())
    inner = loss.learned[0]['head']
    assert not any(p.requires_grad for p in inner.parameters()) and inner[0][1].num_batches_tracked == 0

def test_gradient_comes_through_the_head():
    "A head that looks at nothing leaves the first term's gradient alone"
    blind, loss = nn.Linear(4, 5), srrl(nn.Linear(4, 5))
    nn.init.zeros_(blind.weight)
    grads = []
    for head in (blind, loss.learned[0]['head'][0]):
        f_s = F_S.clone().requires_grad_()
        loss.learned[0]['head'][0] = copy.deepcopy(head)
        loss(f_s, F_T, draw(4, 5)).backward()
        grads.append(f_s.grad)
    assert not torch.allclose(*grads) and grads[0].any()

def test_sizes_may_differ():
    "Both are pooled, so no map is brought to the other's size first"
    small = draw(4, 4, 2, 3, seed=1)
    loss = srrl(f_t=small)
    close(loss(F_S, small, draw(4, 5)), loss(F_S, small.mean((2, 3)), draw(4, 5)), rtol=1e-6)

def test_several_layers_are_one_head():
    layers = dict(norm=nn.BatchNorm1d(4).eval(), fc=nn.Linear(4, 5))
    loss = built(SRRL(['norm', 'fc']), F_S, F_T, teacher_pred=draw(4, 5), teacher_module=layers.get)
    rows = draw(4, 4)
    close(loss.learned[0]['head'].eval()(rows), layers['fc'](layers['norm'](rows)), rtol=1e-6)

def test_srrl_errors():
    with pytest.raises(ValueError, match='one pair'): SRRL('fc').matched(2, 2)
    with pytest.raises(ValueError, match='do not pair'): SRRL('fc').on(['a', 'b'], ['c', 'd'])
    with pytest.raises(ValueError, match='teacher_module'): built(SRRL('fc'), F_S, F_T, teacher_pred=draw(4, 5))
    with pytest.raises(ValueError, match="does not take the teacher's pooled activation"): srrl(nn.Linear(7, 5))
    with pytest.raises(ValueError, match=r'the head answers \(4, 5\), the teacher \(4, 3\)'): srrl(n=3)
    with pytest.raises(TypeError): SRRL()

# ---- Adversarial features

def test_gradients_of_both_sides():
    "The discriminator descends; the student and its adapter climb"
    loss, f_s = built(AdversarialFeatures(), F_S, F_T), F_S.clone().requires_grad_()
    part = loss.learned[0]
    adapter, discriminator = list(part['adapter'].parameters()), list(part['discriminator'].parameters())
    actual = torch.autograd.grad(loss(f_s, F_T), [f_s, *adapter, *discriminator])
    logits = torch.cat([part['discriminator'](o) for o in (part['adapter'](f_s), F_T)])
    truth = torch.cat([torch.zeros(4, 1, 5, 6), torch.ones(4, 1, 5, 6)])
    plain = torch.autograd.grad(nn.functional.binary_cross_entropy_with_logits(logits, truth), [f_s, *adapter, *discriminator])
    n = 1 + len(adapter)
    for a, b in zip(actual[:n], plain[:n]): close(a, -b, rtol=1e-4, atol=1e-8)
    for a, b in zip(actual[n:], plain[n:]): close(a, b, rtol=1e-4, atol=1e-8)

def test_equal_features_cost_log_two_at_the_optimum():
    loss = built(AdversarialFeatures(), F_T, F_T)
    opt = torch.optim.Adam(loss.parameters(), lr=.03)
    for _ in range(300):
        value = loss(F_T, F_T)
        value.backward()
        opt.step()
        opt.zero_grad()
    close(value.detach(), torch.tensor(2.).log(), atol=1e-3)
    sure = loss.learned[0]['discriminator'][2]
    with torch.no_grad(): sure.bias.fill_(3.)
    assert loss(F_T, F_T) > value # nothing is below log 2
