"What is special about losses on sequences: padding, maps of layers, attention with zeros, and models that return dicts."
import numpy as np, pytest, torch, torch.nn.functional as F
from cases import draw
from fastai.basics import CrossEntropyLossFlat, Learner
from fastkd.callback import KnowledgeDistillationCallback
from fastkd.losses.core import Probe
from fastkd.losses.response import SoftTarget
from fastkd.losses.sequence import AttentionMaps, CosineHidden, Embeddings, HiddenStates, mapped_layers
from formulas import close, log_softmax, soft_target, value_and_grad
from helpers import loaders, quiet, seeded
from torch import nn

each = pytest.mark.parametrize('loss', [Embeddings(), HiddenStates(), CosineHidden(), AttentionMaps(), AttentionMaps('scores')], ids=repr)

def pair_for(loss, seed=0):
    "Activations of two sentences with four positions"
    if not isinstance(loss, AttentionMaps): return draw((2, 4, 6), seed), draw((2, 4, 6), seed + 1)
    maps = draw((2, 3, 4, 4), seed), draw((2, 3, 4, 4), seed + 1)
    return maps if loss.input == 'scores' else tuple(o.softmax(-1) for o in maps)

WORDS = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]]).bool()

def padded(activation, value):
    "`activation` with `value` at the positions that do not count"
    words = WORDS[:, None, :, None] if activation.ndim == 4 else WORDS[..., None]
    return activation.masked_fill(~words, value)

def test_second_derivatives_of_attention_maps():
    "Of both sides"
    maps = [o.requires_grad_() for o in pair_for(AttentionMaps())]
    assert torch.autograd.gradgradcheck(AttentionMaps(), maps)

# ---- Padding

@each
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1e30, 0.])
def test_padding_has_no_say(loss, value):
    student, teacher = pair_for(loss)
    expected, grad = value_and_grad(lambda s: loss(s, teacher, mask=WORDS), student)
    actual, padded_grad = value_and_grad(lambda s: loss(s, padded(teacher, value), mask=WORDS), padded(student, value))
    assert torch.equal(actual, expected) and torch.equal(padded_grad, grad)
    assert torch.equal(padded(grad, 0.), grad) and grad.any()

@each
def test_mean_over_positions_that_count(loss):
    "The mean over all sentences' words, whatever their lengths"
    student, teacher = pair_for(loss)
    one = lambda b, n: loss(student[b:b+1], teacher[b:b+1], mask=torch.arange(4)[None] == n)
    close(loss(student, teacher, mask=WORDS), np.mean([one(b, n) for b, n in WORDS.nonzero().tolist()]))

@each
def test_kinds_of_masks(loss):
    student, teacher = pair_for(loss)
    plain = loss(student, teacher)
    close(loss(student, teacher, mask=torch.ones(2, 4, dtype=torch.bool)), plain)
    close(loss(student, teacher, mask=WORDS.long()), loss(student, teacher, mask=WORDS))
    close(loss(student, teacher, mask=torch.tensor([True, False])), loss(student[:1], teacher[:1]))
    value, grad = value_and_grad(lambda s: loss(s, teacher, mask=torch.zeros(2, 4, dtype=torch.bool)), student)
    assert value == 0 and not grad.any()
    for shape in [(2, 3), (1, 4), (3,), (2, 3, 1)]:
        with pytest.raises(ValueError, match='a mask of shape'): loss(student, teacher, mask=torch.ones(shape).bool())

def test_padding_teaches_the_adapter_nothing():
    student, teacher = draw((2, 4, 3)), draw((2, 4, 5), 1)
    loss = HiddenStates().build(Probe(fm_s=dict(s=student[:1]), fm_t=dict(t=teacher[:1])))
    loss(padded(student, torch.nan), padded(teacher, torch.nan), mask=WORDS).backward()
    grads = [p.grad for p in loss.parameters()]
    loss.zero_grad()
    loss(padded(student, 5.), teacher, mask=WORDS).backward()
    assert all(torch.equal(p.grad, grad) and grad.any() for p, grad in zip(loss.parameters(), grads))

# ---- Which layer learns from which

MAPS = [('uniform', 4, 12, [2, 5, 8, 11]), ('uniform', 6, 12, [1, 3, 5, 7, 9, 11]), ('uniform', 12, 12, list(range(12))),
    ('uniform', 1, 5, [4]), ('uniform', 5, 12, [1, 4, 6, 9, 11]), ('uniform', 2, 5, [2, 4]),
    ('uniform', 4, 6, [1, 2, 4, 5]), # 1.5 and 4.5 are rounded up
    ('skip', 6, 12, [1, 3, 5, 7, 9]), ('skip', 3, 12, [3, 7]), ('skip', 2, 2, [0])]

@pytest.mark.parametrize('layer_map,n_s,n_t,partners', MAPS, ids=str)
def test_known_maps(layer_map, n_s, n_t, partners):
    "6 of 12 and 3 of 12 are those of Patient Knowledge Distillation, 4 of 12 is TinyBERT's"
    assert mapped_layers(layer_map, n_s, n_t) == list(enumerate(partners))
    assert HiddenStates(layer_map).matched(n_s, n_t) == AttentionMaps(layer_map=layer_map).matched(n_s, n_t) == list(enumerate(partners))

def test_every_uniform_map():
    "Partners rise, and end with the teacher's last layer"
    for n_s in range(1, 13):
        for n_t in range(n_s, 25):
            partners = [j for _, j in mapped_layers('uniform', n_s, n_t)]
            assert partners == sorted(set(partners)) and partners[0] >= 0 and partners[-1] == n_t - 1
            assert all(abs(j + 1 - (i + 1)*n_t/n_s) <= .5 for i, j in enumerate(partners))

WRONG = [('uniform', 4, 3, "'uniform' needs as many layers in the teacher"), ('skip', 1, 4, 'leaves the last layer out'),
    (None, 2, 4, 'do not pair'), ({0: 4}, 2, 4, 'end at 1 in the student and 3 in the teacher'),
    ({2: 0}, 2, 4, 'end at 1'), ({0: 1}, 0, 0, 'end at -1')]

@pytest.mark.parametrize('layer_map,n_s,n_t,said', WRONG, ids=str)
def test_impossible_maps(layer_map, n_s, n_t, said):
    for loss in (HiddenStates(layer_map), AttentionMaps(layer_map=layer_map)):
        with pytest.raises(ValueError, match=said) as e: loss.matched(n_s, n_t)
        assert type(loss).__name__ in str(e.value)
        with pytest.raises(ValueError, match='do not pair|have no partners'):
            loss.on([f's{i}' for i in range(n_s)] or ['s'], [f't{i}' for i in range(n_t)])

@pytest.mark.parametrize('layer_map', ['last', 3, {}, {0: -1}, {-1: 0}, {'a': 0}, {0: 1.5}, [0, 1]], ids=repr)
def test_wrong_maps(layer_map):
    for make in (HiddenStates, lambda o: AttentionMaps(layer_map=o)):
        with pytest.raises(ValueError, match="'uniform', 'skip', None or a dict"): make(layer_map)
    with pytest.raises(ValueError, match="'uniform', 'skip'"): HiddenStates().layer_map = layer_map

def test_adapters_are_those_of_the_pairs():
    fm_s, fm_t = ({f'h{i}': draw((1, 2, width), i) for i, width in enumerate(widths)} for widths in [(2, 3, 4), (5, 6, 7, 4, 8, 9)])
    def adapters(layer_map):
        built = HiddenStates(layer_map).build(Probe(fm_s=fm_s, fm_t=fm_t))
        return [tuple(o.weight.shape) for o in built.learned if hasattr(o, 'weight')]

    assert adapters('uniform') == [(6, 2), (4, 3), (9, 4)]
    assert adapters('skip') == [(6, 2), (4, 3)]
    assert adapters({2: 3}) == [] and adapters({2: 0, 0: 3}) == [(5, 4), (4, 2)]

def test_names_in_errors():
    fm_s, fm_t = {name: draw((1, 4, 2)) for name in 'ab'}, {name: draw((1, 4 + (name == 'f'), 2)) for name in 'cdef'}
    said = r"(?s)'b' \(1, 4, 2\).*'f' \(1, 5, 2\): 4 positions of the student, 5 of the teacher"
    for loss in (HiddenStates(), HiddenStates({1: 3})):
        with pytest.raises(ValueError, match=said): loss.check(Probe(fm_s=fm_s, fm_t=fm_t))
    with pytest.raises(ValueError, match=r'activations are \(bs, seq, features\), not \(2, 3\)'): Embeddings()(draw((2, 3)), draw((2, 3)))
    with pytest.raises(ValueError, match=r'\(bs, heads, query, key\)'): AttentionMaps()(draw((2, 3, 3)), draw((2, 3, 3)))
    with pytest.raises(ValueError, match='4 keys of the student, 5 of the teacher'): AttentionMaps()(draw((2, 3, 3, 4)), draw((2, 3, 3, 5)))
    with pytest.raises(ValueError, match='3 positions of the student, 4'): AttentionMaps()(draw((2, 3, 3, 4)), draw((2, 3, 4, 4)))
    with pytest.raises(ValueError, match='samples'): Embeddings()(draw((2, 3, 3)), draw((1, 3, 3)))
    built = HiddenStates().build(Probe(fm_s=dict(a=fm_s['a']), fm_t=dict(c=fm_t['c'])))
    with pytest.raises(ValueError, match='was built for 1 pair'): built(list(fm_s.values()), list(fm_t.values())[:2])

# ---- Attention

def test_equal_maps():
    "Nothing to learn: 0, and a slope on the probabilities that their softmax levels"
    scores = draw((2, 3, 4, 5))
    value, grad = value_and_grad(lambda s: AttentionMaps()(s.softmax(-1), scores.softmax(-1)), scores)
    close(value, 0., atol=1e-14)
    close(grad, torch.zeros_like(grad), atol=1e-14)

@pytest.mark.parametrize('loss', [AttentionMaps('scores'), AttentionMaps()], ids=repr)
def test_gradient_of_scores_by_hand(loss):
    "`(p_S − p_T)` over the number of heads and queries"
    student, teacher = draw((2, 3, 4, 5)), draw((2, 3, 4, 5), 1)
    maps = (lambda o: o) if loss.input == 'scores' else (lambda o: o.softmax(-1))
    _, grad = value_and_grad(lambda s: loss(maps(s), maps(teacher)), student)
    close(grad, (np.exp(log_softmax(student.numpy())) - np.exp(log_softmax(teacher.numpy())))/24)

@pytest.mark.parametrize('n_heads', [3, 2])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('hidden', [-float('inf'), 'min'])
def test_padded_keys(n_heads, dtype, hidden):
    "They change neither the value nor any gradient, as scores or as probabilities"
    value_of_hidden = torch.finfo(dtype).min if hidden == 'min' else hidden
    few = draw((2, n_heads, 4, 3), dtype=dtype), draw((2, 3, 4, 3), 1, dtype)
    more = [F.pad(o, (0, 2), value=value_of_hidden) for o in few]
    expected, few_grad = value_and_grad(AttentionMaps('scores'), *few)[:2]
    value, grad = value_and_grad(AttentionMaps('scores'), *more)[:2]
    close(value, expected, rtol=1e-6)
    close(grad[..., :3], few_grad, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-7)
    assert not grad[..., 3:].any()
    probabilities = [o.float().softmax(-1) for o in more]
    assert (probabilities[0][..., 3:] == 0).all()
    value, grad = value_and_grad(AttentionMaps(), *probabilities)[:2]
    close(value, expected, rtol=1e-4, atol=1e-6)
    assert grad.isfinite().all() and not grad[..., 3:].any()

@pytest.mark.parametrize('n_heads', [3, 2])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_sure_heads(n_heads, dtype):
    "A gap of 300 between scores, of the same key or of another one: the gradient is not lost"
    sure = lambda n, key: 300*F.one_hot(torch.tensor(key), 4).to(dtype).expand(2, n, 4, 4)
    value, grad = value_and_grad(AttentionMaps('scores'), sure(n_heads, 0), sure(3, 1))[:2]
    close(value, 300.)
    close(grad[..., 0], torch.full((2, n_heads, 4), 1/(8*n_heads)), rtol=1e-5)
    value, grad = value_and_grad(AttentionMaps('scores'), sure(n_heads, 1), sure(3, 1))[:2]
    close(value, 0., atol=1e-6)
    assert grad.abs().max() < 1e-6

def test_zeros_of_the_student_only():
    "Dropout after the softmax: finite, and the zeros get no gradient"
    teacher = draw((1, 2, 3, 4)).softmax(-1).float()
    student = teacher*torch.tensor([0., 1., 1., 1.])
    value, grad = value_and_grad(lambda s: AttentionMaps()(s, teacher), student)
    close(value, (teacher[..., 0]*(teacher[..., 0].log() - np.log(torch.finfo(torch.float32).tiny))).mean(), rtol=1e-5)
    assert not grad[..., 0].any() and grad[..., 1:].all() and grad.abs().max() <= 1e6

def test_cross_attention():
    "The mask speaks of queries; there may be other keys"
    student, teacher = draw((2, 3, 4, 7)), draw((2, 3, 4, 7), 1)
    words = lambda o: o.movedim(1, 2)[WORDS].movedim(1, 0)[None]
    close(AttentionMaps('scores')(student, teacher, mask=WORDS), AttentionMaps('scores')(words(student), words(teacher)))

# ---- Other settings

def test_cosine_as_in_torch():
    student, teacher = pair_for(CosineHidden())
    by_torch = F.cosine_embedding_loss(student[WORDS], teacher[WORDS], torch.ones(5))
    close(CosineHidden()(student, teacher, mask=WORDS), by_torch, rtol=1e-7)
    close(CosineHidden()(student, -7*student), 2.)
    assert CosineHidden.usual_weight == 1

def test_wrong_input():
    with pytest.raises(ValueError, match="'probabilities' or 'scores', not 'logits'"): AttentionMaps('logits')

# ---- With the callback

class TinyModel(nn.Module):
    "Embeddings, layers with something like attention, and a dict as output"
    def __init__(self, width, n_layers, n_heads=2):
        super().__init__()
        self.embed, self.head, self.n_heads = nn.Embedding(9, width), nn.Linear(width, 9), n_heads
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(n_layers))

    def forward(self, ids):
        hidden, attentions = [self.embed(ids)], []
        for layer in self.layers:
            parts = hidden[-1].unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            scores = (parts @ parts.transpose(2, 3)).masked_fill((ids == 0)[:, None, None], -torch.inf)
            attentions.append(scores.softmax(-1))
            mixed = (attentions[-1] @ parts).transpose(1, 2).flatten(2)
            hidden.append(hidden[-1] + layer(mixed).tanh())
        return dict(logits=self.head(hidden[-1]), hidden_states=tuple(hidden), attentions=tuple(attentions))

def sentences():
    "Ids with padding, 0, and labels of the masked words only"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (8, 6), generator=generator)
    ids[::2, 4:] = 0
    labels = torch.where(torch.rand(8, 6, generator=generator) < .4, ids, -100).where(ids != 0, -100)
    labels[:, 0] = ids[:, 0]
    return list(zip(ids, labels))

def masked_words(pred, target):
    pred = pred['logits'] if isinstance(pred, dict) else pred
    return F.cross_entropy(pred.flatten(0, 1), target.flatten())

masked_words.axis = -1

def fit_once(loss, students, teachers, width=4, loss_func=masked_words, mask=lambda ids: ids != 0, **kwargs):
    "Values of the distillation loss in one step at learning rate 0, and both models' outputs"
    teacher = seeded(TinyModel, 8, 4, seed=1)
    learn = quiet(Learner(loaders(sentences(), bs=8), seeded(TinyModel, width, 2), loss_func))
    cb = KnowledgeDistillationCallback(teacher, loss, students, teachers, mask=mask, **kwargs)
    learn.fit(1, 0., cbs=cb)
    ids, labels = (torch.stack(o) for o in zip(*sentences()))
    with torch.no_grad(): return learn, cb, learn.model(ids), teacher(ids), ids != 0, labels

def fields(name, indices): return [f'{name}.{i}' for i in indices]

def test_triple_loss():
    "5·SoftTarget + 2·task + CosineHidden; the teacher speaks of all words, the task of masked ones"
    triple = 5*SoftTarget(T=2) + 1*CosineHidden()
    learn, _, out_s, out_t, words, labels = fit_once(triple, 'hidden_states.2', 'hidden_states.4', 8, weight=1, task_weight=2)
    soft = soft_target(out_s['logits'][words].double().numpy(), out_t['logits'][words].double().numpy(), 2)
    cosine = 1 - F.cosine_similarity(out_s['hidden_states'][2][words], out_t['hidden_states'][4][words]).mean()
    close(learn.recorder.distillation['distillation_loss'][0], 5*soft + cosine.item(), rtol=1e-5)
    close(learn.recorder.distillation['task_loss'][0], masked_words(out_s, labels), rtol=1e-5)

def test_all_layers_of_a_model():
    for loss, name, first in [(HiddenStates(), 'hidden_states', 1), (AttentionMaps(), 'attentions', 0)]:
        students, teachers = fields(name, range(first, first + 2)), fields(name, range(first, first + 4))
        learn, cb, out_s, out_t, words, _ = fit_once(loss, students, teachers, weight=1)
        built = cb.loss.parts[0].loss
        by_hand = built(list(out_s[name][first:]), list(out_t[name][first:]), mask=words)
        close(learn.recorder.distillation['distillation_loss'][0], by_hand, rtol=1e-5)
        assert by_hand > 0 and (built.learned is None or len(built.learned) == 2)

def test_ignored_labels_are_left_out():
    "A loss function with an `ignore_index` leaves its positions out of the distillation"
    func = CrossEntropyLossFlat()
    func_of_dict = lambda pred, target: func(pred['logits'], target)
    func_of_dict.axis, func_of_dict.ignore_index = -1, -100
    last = 'hidden_states.2', 'hidden_states.4'
    learn, _, out_s, out_t, words, labels = fit_once(CosineHidden(), *last, 8, func_of_dict, mask=None, weight=1)
    expected = CosineHidden()(out_s['hidden_states'][2], out_t['hidden_states'][4], mask=labels != -100)
    close(learn.recorder.distillation['distillation_loss'][0], expected, rtol=1e-5)
