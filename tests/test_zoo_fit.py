"Every loss in training: its first gradient is the hand value, it falls, and nothing is lost in other precisions and layouts."
import copy, fastkd.all, pytest, torch, torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import AMPMode
from fastai.callback.mixup import MixUp
from fastkd.all import *
from fastkd.losses.core import Sum, wanted_inputs
from helpers import At, OnCPU, convnet, digits, fitted, learner, loaders, quiet, recorded, seeded, trained_teacher
from types import SimpleNamespace
from torch import nn

# ---- A task for each kind of loss

def pixels_of(kind, **kwargs):
    "A student of 4 and 8 channels for the digits, its teacher of 16 and 32, and the layers that are compared"
    blocks = [] if kind == 'response' else ['block1', 'block2']
    learn = learner(seeded(convnet, 4), n=60, bs=20, **kwargs)
    return SimpleNamespace(learn=learn, teacher=trained_teacher(), layers_s=blocks, layers_t=blocks)

class Attends(nn.Module):
    "A transformer's layer that shows its attention"
    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(width, heads, batch_first=True), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2*width), nn.GELU(), nn.Linear(2*width, width))

    def forward(self, x, padding):
        attended, probabilities = self.attention(x, x, x, key_padding_mask=padding, average_attn_weights=False)
        x = self.norm(x + attended)
        return x + self.mlp(x), probabilities

class Reader(nn.Module):
    "A language model with outputs by name, as those of `transformers`; token 0 is padding"
    def __init__(self, width, heads, n_layers, n_words=12):
        super().__init__()
        self.embed, self.head = nn.Embedding(n_words, width), nn.Linear(width, n_words)
        self.layers = nn.ModuleList(Attends(width, heads) for _ in range(n_layers))

    def forward(self, tokens):
        x, hidden, attentions = self.embed(tokens), [], []
        for layer in self.layers:
            x, probabilities = layer(x, tokens == 0)
            hidden.append(x)
            attentions.append(probabilities)
        return dict(logits=self.head(x), embeddings=self.embed(tokens), hidden_states=tuple(hidden), attentions=tuple(attentions))

def sentences(n=60, length=7):
    "Counting modulo 11 from a random start, padded; the next word is the label, and padding is ignored"
    generator = torch.Generator().manual_seed(0)
    starts, lengths = torch.randint(11, (n, 1), generator=generator), torch.randint(3, length + 1, (n, 1), generator=generator)
    words, counts = (starts + torch.arange(length + 1)) % 11 + 1, torch.arange(length) < lengths
    return list(zip(words[:, :-1]*counts, torch.where(counts, words[:, 1:], -100)))

class NextWord(CrossEntropyLossFlat):
    "The task loss of a model with outputs by name"
    def __init__(self): super().__init__(axis=-1)
    def __call__(self, output, target): return super().__call__(output['logits'], target)

SEQUENCE_LAYERS = dict(Embeddings=['embeddings'], HiddenStates=['hidden_states.0', 'hidden_states.1'],
    AttentionMaps=['attentions.0', 'attentions.1'], CosineHidden=['hidden_states.1'])

def words_of(name, **kwargs):
    "A reader of two layers, and a teacher of as many; wider ones where the loss can adapt"
    dls, width = loaders(sentences(), bs=20), 8 if name == 'CosineHidden' else 12
    learn = quiet(Learner(dls, seeded(Reader, 8, 2, 2), NextWord(), **kwargs))
    layers, teacher = SEQUENCE_LAYERS[name], seeded(Reader, width, 2, 2, seed=1)
    return SimpleNamespace(learn=learn, teacher=teacher, layers_s=layers, layers_t=layers, mask=lambda tokens: tokens != 0)

class Boxes(nn.Module):
    "A detector of two anchors: classes and boxes"
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(width, 20), nn.Linear(width, 8)])

    def forward(self, x):
        x = self.body(x)
        return dict(logits=self.heads[0](x).view(-1, 10, 2), boxes=self.heads[1](x).view(-1, 2, 4))

def boxes_of(name, **kwargs):
    dls = loaders([(x, torch.stack([y, (y + 1) % 10])) for x, y in digits()[:60]], bs=20)
    learn = quiet(Learner(dls, seeded(Boxes, 8), lambda output, y: F.cross_entropy(output['logits'], y), **kwargs))
    return SimpleNamespace(learn=learn, teacher=seeded(Boxes, 16, seed=1), layers_s=['boxes'], layers_t=['boxes'])

SPECIAL = dict(SRRL=dict(head='head.3'), CRD=dict(negatives=20), MaskedGenerative=dict(mask='channel'),
    BoxRegression=dict(positives=lambda y: y < 5))
LAYERS = dict(MarginReLU=['block1.1', 'block2.1'], SRRL=['block2'], DeepSupervision=['block1', 'block2'])
KINDS = available_losses().kind.to_dict()

def make(name): return getattr(fastkd.all, name)(**SPECIAL.get(name, {}))

def task(name, **kwargs):
    "A learner, a teacher and the callback's settings for the loss called `name`"
    if KINDS[name] == 'sequence': made = words_of(name, **kwargs)
    else: made = boxes_of(name, **kwargs) if name == 'BoxRegression' else pixels_of(KINDS[name], **kwargs)
    if name == 'FSP': made.teacher = seeded(convnet, 4, seed=1) # flows of equal channels
    if name in LAYERS: made.layers_s = made.layers_t = LAYERS[name]
    if name == 'DeepSupervision': made.layers_t = []
    mask = getattr(made, 'mask', None)
    made.settings = dict(loss=make(name), activations_student=made.layers_s, activations_teacher=made.layers_t, mask=mask)
    return made

each = pytest.mark.parametrize('name', KINDS)

# ---- The first step, by hand

def by_hand(made, seen):
    "Gradients of the blend of task loss and distillation loss, from copies of model, loss and batch"
    def run(model, layers):
        fields = {name for name in layers if name.split('.')[0] in ('embeddings', 'hidden_states', 'attentions', 'boxes')}
        with recorded(model, [name for name in layers if name not in fields]) as found: output = model(*seen.xb)
        for name in fields:
            field, _, i = name.partition('.')
            found[name] = output[field][int(i)] if i else output[field]
        return output, (output['logits'] if isinstance(output, dict) else output), {name: found[name] for name in layers}
    output, pred, fm_s = run(seen.model, made.layers_s)
    with torch.no_grad(): _, teacher_pred, fm_t = run(made.teacher.eval(), made.layers_t)
    loss, y = seen.loss.parts[0].loss, seen.yb[0]
    mask = seen.xb[0] != 0 if 'mask' in vars(made) else None
    given = dict(pred=pred, teacher_pred=teacher_pred, fm_s=fm_s, fm_t=fm_t, target=y, mask=mask, index=seen.index)
    value = loss(**{key: o for key, o in given.items() if key in wanted_inputs(loss) and o is not None})
    params, total = list(seen.model.parameters()), .5*made.learn.loss_func(output, y) + .5*value
    own = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True)
    assert max(grad.abs().max() for grad in own if grad is not None) > 1e-6 # a comparison of nothing would be none
    return value, torch.autograd.grad(total, params, allow_unused=True)

@each
def test_first_gradient(name):
    "Of the first batch, or of the second where the first one only fills a memory"
    made, seen = task(name), SimpleNamespace()
    nth = 2 if make(name).starts_silent else 1
    def before(learn):
        seen.model, seen.loss, seen.xb, seen.yb = copy.deepcopy(learn.model), copy.deepcopy(cb.loss), learn.xb, learn.yb
        seen.index = cb._index()
    def after(learn): seen.grads = [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
    cb = KnowledgeDistillationCallback(made.teacher, weight=.5, **made.settings)
    fitted(made.learn, [At('before_batch', before, 6, nth), At('after_backward', after, nth=nth), cb], n_epoch=1)
    value, expected = by_hand(made, seen)
    first = torch.tensor(made.learn.recorder.distillation['distillation_loss'][nth - 1])
    torch.testing.assert_close(first, value.detach().float(), rtol=1e-5, atol=1e-7)
    for grad, by_hand_grad in zip(seen.grads, expected):
        assert (grad is None or not grad.any()) if by_hand_grad is None else True
        if by_hand_grad is not None: torch.testing.assert_close(grad, by_hand_grad, rtol=1e-4, atol=1e-6)

# ---- It falls

RISES = ['AdversarialFeatures'] # the student raises what the discriminator minimises

@pytest.mark.parametrize('name', [name for name in KINDS if name not in RISES])
def test_it_falls_with_frozen_adapters(name, monkeypatch):
    "Training the student alone brings the loss down"
    build = Sum.build
    def frozen(self, probe): return build(self, probe).requires_grad_(False)
    monkeypatch.setattr(Sum, 'build', frozen)
    made = task(name)
    cb = KnowledgeDistillationCallback(made.teacher, weight=1., task_weight=0., **made.settings)
    values = fitted(made.learn, cb, n_epoch=5, lr=8e-3).recorder.distillation['distillation_loss']
    start = 3 if make(name).starts_silent else 0 # when the memory is full
    assert sum(values[-3:]) < sum(values[start:start + 3]) and cb._learned is None

# ---- Precisions and layouts

REGIMES = ['float32', 'bfloat16', 'channels_last', 'mixup']
def has_pictures(name): return KINDS[name] not in ('sequence', 'dense') or name == 'PyramidFeatures'

@pytest.mark.parametrize('name,regime', [(name, regime) for name in KINDS for regime in (REGIMES if has_pictures(name) else REGIMES[:2])])
def test_nothing_is_lost(name, regime):
    "One epoch: all numbers are finite, the learned parts move, the teacher does not"
    cbs = dict(float32=[], bfloat16=[OnCPU(AMPMode.BF16)], channels_last=[ChannelsLast()], mixup=[MixUp()])[regime]
    made, first = task(name), []
    before = copy.deepcopy(made.teacher.state_dict())
    cb = KnowledgeDistillationCallback(made.teacher, weight=.5, **made.settings)
    note = At('before_batch', lambda learn: first.append([p.clone() for p in cb.loss.parameters() if p.requires_grad]), 6)
    learn = fitted(made.learn, [*cbs, note, cb], n_epoch=1)
    recorded_values = torch.tensor(learn.recorder.distillation['distillation_loss'] + learn.recorder.distillation['task_loss'])
    assert recorded_values.isfinite().all() and all(p.isfinite().all() for p in learn.model.parameters())
    learned = [p for p in cb.loss.parameters() if p.requires_grad]
    assert not learned or any(not torch.equal(a, b) for a, b in zip(first[0], learned))
    assert all(torch.equal(before[key], value) for key, value in made.teacher.state_dict().items())
