"Models of all kinds as students and teachers, and that each learns what a loop written by hand would teach it."
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.basics import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DataLoaders, Learner, SGD
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.data import LMDataLoader
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.vision.models.unet import DynamicUnet
from fastkd.all import *
from helpers import (At, ByHand, attention, convnet, digits, error_of, fitted, furthest, learner, loaders, n_hooks, quiet,
    same, seeded, shows, slow, soft_target, trained_teacher, weights)
from torch import nn
from torch.utils.checkpoint import checkpoint
from types import SimpleNamespace

pytestmark = pytest.mark.filterwarnings('ignore:the teacher is right on', 'ignore:.*its gradient on the student is') # random weights
def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)
def student(**kwargs): return learner(**kwargs)
def steady_student(): return learner(opt_func=SGD)

def gap(make, teacher, loss, by_hand, lr=1e-2, **kwargs):
    "How far a run with the callback ends from one by hand, where `by_hand(pred, output)` compares with the teacher's output"
    found, expected = make(), make()
    hooks = n_hooks(found.model), n_hooks(teacher)
    fitted(found, KD(teacher, loss, **kwargs), lr=lr)
    fitted(expected, Sequence(teacher, lambda pred, output, *fms: by_hand(pred, output)), lr=lr)
    assert (n_hooks(found.model), n_hooks(teacher)) == hooks and len(found.recorder.losses) > 1
    return furthest(weights(found.model), weights(expected.model))

def soft_and_attention(factor, layer='block2'):
    "A prediction and a map, by hand"
    def loss(pred, output, fm_s, fm_t): return soft_target(pred, output) + factor*attention(fm_s[layer], fm_t[layer])
    return ByHand(trained_teacher(), loss, layers_s=[layer], layers_t=[layer])

class Sequence(ByHand):
    "As by hand, with a teacher that begins a new sequence in every epoch"
    def before_train(self):
        if hasattr(self.teacher, 'reset'): self.teacher.reset()

# ---- Inputs and outputs

class TwoInputs(nn.Module):
    "Adds two images"
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, a, b): return self.model(a + b)

def two_inputs(model):
    return quiet(Learner(loaders([(x/2, x/2, y) for x, y in digits()[:100]]), TwoInputs(model), CrossEntropyLossFlat(), metrics=accuracy))

@shows('Learner(dls_of_two_inputs, student, cbs=kd).fit(5)')
def test_several_inputs():
    "Both reach a teacher of two inputs; `teacher_input` makes one of them for a teacher of one."
    found = fitted(two_inputs(seeded(convnet, 4)), KD(TwoInputs(trained_teacher()), SoftTarget))
    merged = fitted(two_inputs(seeded(convnet, 4)), KD(trained_teacher(), SoftTarget, teacher_input=lambda a, b: a + b))
    assert same(weights(found.model), weights(merged.model))
    calls = ByHand(trained_teacher(), lambda pred, teacher_pred, *fms: soft_target(pred, teacher_pred))
    calls.teacher = TwoInputs(calls.teacher)
    assert furthest(weights(found.model), weights(fitted(two_inputs(seeded(convnet, 4)), calls).model)) < 1e-6

class Wrapped(nn.Module):
    "A model that returns its logits in a dict or tuple, with something before them"
    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, x):
        pred = self.model(x)
        if self.form == 'dict': return dict(aux=pred.mean(), logits=pred)
        return (pred, x) if self.form == 'tuple' else SimpleNamespace(logits=pred)

@shows('KnowledgeDistillationCallback(teacher_of_dicts, SoftTarget)')
@pytest.mark.parametrize('form', ['dict', 'tuple', 'object'])
def test_outputs(form):
    "Predictions in a dict, a tuple or an object, such as those of `transformers`, are found, and train as plain tensors do."
    def task(output, y): return F.cross_entropy(logits(output), y)
    model = Wrapped(seeded(convnet, 4), form)
    found = learner(model, loss_func=task, metrics=[], opt_func=SGD)
    fitted(found, KD(Wrapped(trained_teacher(), form), SoftTarget() + 10*Attention(), 'model.block2', 'model.block2'))
    expected = learner(loss_func=F.cross_entropy, metrics=[], opt_func=SGD)
    fitted(expected, soft_and_attention(10))
    assert furthest(weights(found.model.model), weights(expected.model)) < 1e-6

@shows('KnowledgeDistillationCallback(teacher, SoftTarget, logits=lambda output: output[-1])')
def test_logits_function():
    "A function finds the prediction in an output that nobody knows."
    class Odd(Wrapped):
        "The prediction is the last of three"
        def forward(self, x): return x, x, self.model(x)
    def last(output): return output[-1]
    def task(output, y): return F.cross_entropy(output[-1], y)
    found = learner(Odd(seeded(convnet, 4), None), loss_func=task, metrics=[])
    fitted(found, KD(Odd(trained_teacher(), None), SoftTarget, logits=last))
    expected = fitted(learner(loss_func=F.cross_entropy, metrics=[]), KD(trained_teacher(), SoftTarget))
    assert same(weights(found.model.model), weights(expected.model))

# ---- Tables

@pytest.fixture(scope='module')
def tables():
    "Loaders of rows with names and numbers, some of them missing, for a class and for a number"
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(dict(color=rng.choice(['red', 'green', 'blue'], 80), size=rng.normal(size=80), weight=rng.normal(size=80)))
    frame.loc[::9, 'size'] = np.nan
    frame['kind'] = np.where(frame.weight + (frame.color == 'red') > 0, 'a', 'b')
    frame['price'] = frame.weight*2 + 1.
    def dls(y): return TabularDataLoaders.from_df(frame, procs=[Categorify, FillMissing, Normalize], cat_names=['color'],
        cont_names=['size', 'weight'], y_names=y, bs=16, valid_idx=list(range(64, 80)), device='cpu')
    return dict(kind=dls('kind'), price=dls('price'))

def table(dls, width, seed=0, **kwargs): return quiet(seeded(tabular_learner, dls, layers=[width], seed=seed, opt_func=SGD, **kwargs))

@shows('tabular_learner(dls, layers=[50], cbs=KnowledgeDistillationCallback(teacher_learner, SoftTarget)).fit(5)')
def test_tabular(tables):
    "Categories and numbers both reach the teacher, a wider model that has been trained on the same table."
    teacher = fitted(table(tables['kind'], 32, seed=1), n_epoch=4, lr=.1)
    def make(): return table(tables['kind'], 8)
    assert [o.shape[1] for o in make().dls.one_batch()[:2]] == [2, 2] # a color and whether a size is missing; two numbers
    assert gap(make, teacher.model, SoftTarget, soft_target) < 1e-6
    given, module = [fitted(make(), KD(o, SoftTarget)) for o in (teacher, teacher.model)]
    assert same(weights(given.model), weights(module.model))

@pytest.mark.parametrize('loss', [DecoupledKD, NormalizedKD, WeightedSoftLabel])
def test_labels_of_a_table(tables, loss):
    "fastai's `(bs, 1)` labels of eight bits teach what `(bs,)` ones of 64 teach"
    teacher = fitted(table(tables['kind'], 32, seed=1), n_epoch=4, lr=.1)
    def as_usual(learn): learn.yb = learn.y.squeeze(1).long(),
    given, usual = [fitted(table(tables['kind'], 8), [KD(teacher, loss), *cbs]) for cbs in ([], [At('before_batch', as_usual, nth=0)])]
    assert given.dls.one_batch()[-1].shape == (16, 1) and given.dls.one_batch()[-1].dtype == torch.int8
    assert same(weights(given.model), weights(usual.model))

def test_judges_a_table(tables):
    "Agreement, the report and the warning of a teacher at chance see the classes of a table"
    teacher, found = (fitted(table(tables['kind'], width, metrics=accuracy), n_epoch=4, lr=.1) for width in (32, 8))
    fitted(found, [agreement := AgreementCallback(teacher)], n_epoch=1)
    judged = report(found, teacher, n_runs=0)
    (pred, target), (answer, _) = found.get_preds(), teacher.get_preds()
    expected = 100*(pred.argmax(1) == answer.argmax(1)).float().mean().item()
    assert judged.table.loc['agreement, %', 'student'] == pytest.approx(expected)
    assert 100*agreement.history['teacher_agreement'][-1] == pytest.approx(expected)
    assert judged.table.loc['accuracy, %', 'student'] == pytest.approx(100*(pred.argmax(1) == target.flatten()).float().mean().item())
    assert judged.classes['count'].sum() == 16
    wrong = nn.Module()
    wrong.forward = lambda cats, conts: -9*teacher.model(cats, conts)
    with pytest.warns(UserWarning, match='the teacher is right on'): fitted(table(tables['kind'], 8), KD(wrong, SoftTarget), n_epoch=1)

@shows('tabular_learner(dls, y_range=(-5, 5), cbs=KnowledgeDistillationCallback(teacher, Logits)).fit(5)')
def test_regression(tables):
    "A number is compared with the teacher's number."
    teacher = table(tables['price'], 32, seed=1, y_range=(-5, 5)).model
    assert gap(lambda: table(tables['price'], 8, y_range=(-5, 5)), teacher, Logits, F.mse_loss) < 1e-6

@shows('Learner(dls, student, BCEWithLogitsLossFlat(), cbs=KnowledgeDistillationCallback(teacher, BinaryKD)).fit(5)')
def test_multi_label():
    "Each label is compared on its own, as two classes."
    dls = loaders([(x, F.one_hot(y, 10).float() + F.one_hot((y + 1)%10, 10)) for x, y in digits()[:100]])
    def make(): return quiet(Learner(dls, seeded(convnet, 4), BCEWithLogitsLossFlat(), opt_func=SGD))
    def binary(pred, output):
        p, q = (pred/2).sigmoid(), (output/2).sigmoid()
        return 4*-(q*p.log() + (1 - q)*(1 - p).log()).mean()
    assert gap(make, trained_teacher(), BinaryKD(T=2), binary) < 1e-6

# ---- Text

def small(config, width): return {**config, 'emb_sz': width, 'n_hid': width, 'n_layers': 2}

def texts():
    torch.manual_seed(0)
    return [torch.randint(2, 30, (13,)) for _ in range(16)]

def with_vocab(dls, **attrs):
    "Loaders that know what a text learner asks for"
    for name, value in dict(vocab=[str(i) for i in range(30)], **attrs).items(): setattr(dls, name, value)
    return dls

def classifier(width, seed=0):
    dls = with_vocab(loaders([(x, i%2) for i, x in enumerate(texts())], bs=4), c=2)
    settings = dict(config=small(awd_lstm_clas_config, width), pretrained=False, loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    return quiet(seeded(text_classifier_learner, dls, AWD_LSTM, seed=seed, **settings))

def language(width, seed=0):
    dls = with_vocab(DataLoaders(*[LMDataLoader(texts(), bs=4, seq_len=6, num_workers=0, device='cpu', shuffle=False) for _ in range(2)]))
    config = small(awd_lstm_lm_config, width)
    return quiet(seeded(language_model_learner, dls, AWD_LSTM, seed=seed, config=config, pretrained=False, opt_func=SGD))

def first_rows(pred, output):
    "Predictions of a recurrent model come first in a tuple; in a language model there is one for each token"
    return soft_target(*[o.flatten(0, -2) for o in (pred, output[0])])

@shows('text_classifier_learner(dls, AWD_LSTM, config=small, cbs=kd).fit(5)')
@pytest.mark.filterwarnings('ignore:The .* from `torch.compile`')
def test_text_classifier():
    "A small AWD-LSTM learns from a larger one; both return tuples."
    assert gap(lambda: classifier(8), classifier(16, seed=1).model, SoftTarget, first_rows) < 1e-6

@shows('language_model_learner(dls, AWD_LSTM, config=small, cbs=kd).fit(5)')
def test_language_model():
    "The states of both models run through an epoch and begin anew with the next one, whatever was asked of them before."
    teacher = language(16, seed=1).model
    assert gap(lambda: language(8), teacher, SoftTarget, first_rows) < 1e-6

@shows('KnowledgeDistillationCallback(teacher, FitNet(), "0.rnns.1", "0.rnns.1")')
def test_layer_of_a_language_model():
    "The output of a recurrent layer is a tuple: its first tensor is compared, and an adapter learns."
    cb, learn = KD(language(16, seed=1).model, FitNet(), '0.rnns.1', '0.rnns.1', weight=10., task_weight=1.), language(8)
    fitted(learn, cb, lr=.1)
    values = learn.recorder.distillation['distillation_loss']
    assert values[-1] < values[0] and n_hooks(learn.model) == 0
    assert [p.shape[:2] for p in cb.loss.parameters() if p.ndim > 1] == [(16, 8)]

@shows('KnowledgeDistillationCallback(teacher, SoftTarget, weight=0.)')
def test_language_model_with_weight_zero():
    "Is plain training, bit for bit, though a sample ran through the model before the first batch."
    plain, silent = fitted(language(8)), fitted(language(8), KD(language(16, seed=1).model, SoftTarget, weight=0.))
    assert same(weights(plain.model), weights(silent.model))

def test_recurrent_teacher_begins_anew_in_each_epoch():
    resets, teacher = [], trained_teacher()
    teacher.reset = lambda: resets.append(1)
    learn = student()
    learn.fit(3, cbs=KD(teacher, SoftTarget))
    assert len(resets) == 4 # three epochs, and the probe

# ---- Pictures to pictures

def unet(width, n_out=3):
    "A U-Net of fastai on an encoder of two strides"
    def stage(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())
    return DynamicUnet(nn.Sequential(stage(1, width), stage(width, 2*width)), n_out, (8, 8))

def masks(width):
    samples = [(x, (x[0] > .3).long() + (x[0] > .7)) for x, _ in digits()[:16]]
    return quiet(Learner(loaders(samples, bs=8), seeded(unet, width), CrossEntropyLossFlat(axis=1), opt_func=SGD))

def pixels(pred, output): return soft_target(*[torch.Tensor(o).movedim(1, -1).flatten(0, 2) for o in (pred, output)])

@shows('unet_learner(dls, resnet18, cbs=kd).fit(5)')
def test_unet():
    "Every pixel counts like one label, and the model's own hooks stay."
    teacher = masks(8).model
    assert gap(lambda: masks(4), teacher, SoftTarget, pixels) < 1e-5
    learn = fitted(masks(4), KD(teacher, SoftTarget() + ChannelWise(), 'layers.0', 'layers.0'))
    assert n_hooks(learn.model) == n_hooks(masks(4).model) > 0

# ---- Models of other libraries

@shows("KnowledgeDistillationCallback(timm.create_model('resnet18', pretrained=True), SoftTarget() + 1000*Attention(), 'block2', 'layer2')")
def test_timm_teacher():
    "A model of timm teaches, and its layers have timm's names."
    timm = pytest.importorskip('timm')
    teacher = seeded(timm.create_model, 'resnet10t', num_classes=10, in_chans=1).eval()
    learn = steady_student()
    fitted(learn, KD(teacher, SoftTarget() + 1000*Attention(), 'block2', 'layer1'), n_epoch=1)
    assert learn.recorder.distillation['attention_loss'][0] > 0
    assert gap(steady_student, teacher, SoftTarget, soft_target) < 1e-6

@shows("KnowledgeDistillationCallback(AutoModelForSequenceClassification.from_pretrained(name), SoftTarget)")
def test_transformers_teacher():
    "A model of transformers teaches, and a field of its output is a layer."
    transformers = pytest.importorskip('transformers')
    def bert(width, seed=0):
        config = transformers.BertConfig(vocab_size=30, hidden_size=width, intermediate_size=width, num_hidden_layers=2,
            num_attention_heads=2, num_labels=2, output_hidden_states=True)
        model = seeded(transformers.BertForSequenceClassification, config, seed=seed)
        model(texts()[0][None]) # the first call leaves hooks of transformers' own
        return model
    dls = loaders([(x, i%2) for i, x in enumerate(texts())], bs=4)
    def task(output, y): return F.cross_entropy(output.logits, y)
    def make(): return quiet(Learner(dls, bert(8), task, opt_func=SGD))
    teacher = bert(16, seed=1)
    assert gap(make, teacher, SoftTarget, lambda pred, output: soft_target(pred.logits, output.logits)) < 1e-5
    learn = fitted(make(), KD(teacher, FitNet(), 'hidden_states.1', 'hidden_states.1'))
    assert learn.recorder.distillation['distillation_loss'][0] > 0

# ---- Wrapped models

LOSS = lambda: SoftTarget() + 1000*Attention()

@pytest.fixture
def fresh_compiler():
    yield
    torch._dynamo.reset()

def plain(width): return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
def of_plain(teacher, *layers): return KD(teacher, SoftTarget() + 10*FitNet(), *layers)

@shows('Learner(dls, torch.compile(student), cbs=kd).fit(5)')
@pytest.mark.parametrize('backend,traced', [('eager', True), slow('eager', False), slow('aot_eager', False)])
def test_compiled_student(backend, traced, fresh_compiler):
    "Layers of a compiled model are heard, also when it was traced before, and it learns what a plain one learns."
    found, expected = learner(torch.compile(seeded(plain, 8), backend=backend)), learner(seeded(plain, 8))
    for learn in found, expected:
        if traced: fitted(learn, n_epoch=1)
        fitted(learn, of_plain(trained_teacher(), '1', 'head.1'))
    assert furthest(weights(found.model._orig_mod), weights(expected.model)) < 1e-5
    assert found.recorder.distillation['fit_net_loss'][-1] > 0 and n_hooks(found.model) == 0

@shows('KnowledgeDistillationCallback(torch.compile(teacher), SoftTarget() + 10*FitNet(), layers, layers)')
@pytest.mark.parametrize('traced', [True, slow(False)])
def test_compiled_teacher(traced, fresh_compiler):
    "A compiled teacher says what a plain one says, and its layers are heard, also when it was traced before."
    teacher = torch.compile(seeded(plain, 32), backend='eager')
    if traced:
        with torch.no_grad(): teacher.eval()(digits()[0][0][None]), teacher(torch.stack([x for x, _ in digits()[:25]]))
    found, expected = [fitted(learner(), of_plain(o, 'head.1', '1')) for o in (teacher, seeded(plain, 32))]
    assert furthest(weights(found.model), weights(expected.model)) < 1e-5
    assert found.recorder.distillation['fit_net_loss'][-1] > 0 and n_hooks(teacher) == 0

def test_compiled_teacher_within_another(fresh_compiler):
    "It is heard behind an ensemble's memory, too."
    teacher = torch.compile(seeded(plain, 32), backend='eager')
    with torch.no_grad(): teacher.eval()(torch.stack([x for x, _ in digits()[:25]]))
    found, expected = [fitted(learner(), of_plain(CachedTeacher(Ensemble([o])), 'head.1', '0.1')) for o in (teacher, seeded(plain, 32))]
    assert furthest(weights(found.model), weights(expected.model)) < 1e-5

@shows('Learner(dls, nn.DataParallel(student), cbs=kd).fit(5)')
def test_data_parallel():
    "On one device the wrapper changes nothing, and layers keep the names that they have without it."
    def run(wrap):
        learn = student(model=wrap(seeded(convnet, 4)), opt_func=SGD)
        return fitted(learn, KD(wrap(trained_teacher()), LOSS(), 'block2', 'block2'))
    found, expected = run(nn.DataParallel), run(lambda model: model)
    assert same(weights(found.model.module), weights(expected.model))
    assert furthest(weights(expected.model), weights(fitted(steady_student(), soft_and_attention(1000)).model)) < 1e-6

@shows('with learn.distrib_ctx(): learn.fit(5, cbs=kd)')
def test_data_parallel_over_several():
    "`DataParallel` over several devices is refused before training, with the line that works instead."
    learn = student(model=nn.DataParallel(seeded(convnet, 4)))
    learn.model.device_ids = [0, 1]
    said = error_of(ValueError, learn, KD(trained_teacher(), SoftTarget))
    assert 'DataParallel over several devices' in said and '`with learn.distrib_ctx(): learn.fit(...)`' in said

# ---- Values that are overwritten

@shows("KnowledgeDistillationCallback(teacher, Attention, 'block1.1', 'block1.1')")
def test_a_value_that_is_overwritten():
    "A batch norm whose output an in-place ReLU overwrites is compared as it was, negative values too, and so are the gradients."
    seen = []
    def keep(fm_s, fm_t):
        seen.append((fm_s['block1.1'].min().item(), fm_t['block1.1'].min().item()))
        return F.mse_loss(fm_s['block1.1'].mean(1), fm_t['block1.1'].mean(1))
    found = fitted(learner(opt_func=SGD), KD(trained_teacher(), keep, 'block1.1', 'block1.1'))
    assert len(seen) == 8 and all(s < 0 and t < 0 for s, t in seen)
    outside, teacher = seeded(convnet, 4), trained_teacher()
    for model in outside, teacher: model.block1[2].inplace = False
    expected = fitted(learner(outside, opt_func=SGD), KD(teacher, keep, 'block1.1', 'block1.1'))
    assert furthest(weights(found.model), weights(expected.model)) < 1e-6

@pytest.mark.parametrize('use_reentrant', [False, True])
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_checkpointed_activations(use_reentrant):
    "A student that computes its activations anew in the backward pass learns what a plain one learns"
    class Checkpointed(nn.Module):
        "Keeps nothing of `model[1:]`"
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x): return checkpoint(self.model[2:], self.model[1](self.model[0](x)), use_reentrant=use_reentrant)
    found, expected = learner(Checkpointed(seeded(convnet, 4)), opt_func=SGD), steady_student()
    fitted(found, KD(trained_teacher(), SoftTarget() + 1000*Attention(), 'model.block1', 'block1'))
    fitted(expected, soft_and_attention(1000, 'block1'))
    names = [name for name, _ in expected.model.named_parameters()] # batch norm sees batches twice
    assert furthest(*({name: model.get_parameter(name) for name in names} for model in (found.model.model, expected.model))) < 1e-6
