"Names, pairs and activations, on models as people use them."
import copy, gc, io, numpy as np, pickle, pytest, random, torch, torchvision.models as tvm, weakref
from functools import cache, partial
from hypothesis import given, strategies as st
from torch import nn
from fastai.basics import DataLoaders, Learner
from fastai.vision.learner import create_unet_model, create_vision_model
from fastai.vision.models.xresnet import xresnet18
from fastkd.modules import (Captures, StopForward, _pairs_by_depth, evaluating, get_model_layers, get_module_by_name, logits,
    match_feature_layers, nearest_names, read_field, unwrap_model)
from formulas import close

def mlp(*widths):
    pairs = list(zip(widths, widths[1:]))
    return nn.Sequential(*[o for n_in, n_out in pairs for o in (nn.Linear(n_in, n_out), nn.ReLU())][:-1])

def small_cnn(n_channels=4):
    "Named stages, each half as large as the one before"
    def stage(n_in, n_out):
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True))
    return nn.Sequential(stage(3, n_channels), stage(n_channels, 2*n_channels), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2*n_channels, 3))

def learner_of(model):
    data = [(torch.randn(3, 8, 8), torch.tensor(0)) for _ in range(4)]
    return Learner(DataLoaders.from_dsets(data, data, bs=2, device='cpu'), model, loss_func=nn.CrossEntropyLoss())

# ---- Names

def chain(*funcs): return lambda o: chain(*funcs[1:])(funcs[0](o)) if funcs else o

WRAPPINGS = dict(plain=chain(), parallel=nn.DataParallel, compiled=torch.compile, compiled_parallel=chain(torch.compile, nn.DataParallel),
    parallel_compiled=chain(nn.DataParallel, torch.compile), learner=learner_of, learner_of_compiled=chain(torch.compile, learner_of))

@pytest.mark.parametrize('wrap', WRAPPINGS.values(), ids=WRAPPINGS)
def test_names_in_wrappers(wrap):
    model = small_cnn()
    conv, wrapped = model[1][0], wrap(model)
    assert unwrap_model(wrapped) is model
    assert get_model_layers(wrapped) == get_model_layers(model)
    for prefix in ('', 'model.', 'module.', '_orig_mod.', 'model.module.', 'module._orig_mod.', 'model._orig_mod.module.'):
        assert get_module_by_name(wrapped, f'{prefix}1.0') is conv
    for missing in ('1.9', '9', '1.0.weight', 'model', '', '.', '1..0', '1.0.', 'model.9', 'forward'):
        assert get_module_by_name(wrapped, missing) is None
    inner = wrapped.model if isinstance(wrapped, Learner) else wrapped
    assert all(get_module_by_name(wrapped, name) is module for name, module in inner.named_modules() if name and module is not model
        and not isinstance(module, (nn.DataParallel, torch._dynamo.OptimizedModule)))

def test_layers_called_like_wrappers():
    "A model may have a child called `model` or `module` of its own"
    model = nn.ModuleDict(dict(model=nn.ModuleDict(dict(a=nn.Linear(1, 1))), module=nn.Linear(1, 2), a=nn.Linear(1, 3)))
    assert get_module_by_name(model, 'model.a').out_features == 1
    assert get_module_by_name(model, 'a').out_features == 3
    assert get_module_by_name(model, 'module').out_features == 2
    assert get_module_by_name(model, 'model.module').out_features == 2 # not in the child, so the prefix is one
    assert get_model_layers(model) == ['model', 'model.a', 'module', 'a']

def test_wrapped_children():
    model = small_cnn()
    conv = model[0][0]
    model[0] = torch.compile(model[0])
    assert get_module_by_name(model, '0.0') is get_module_by_name(model, '0._orig_mod.0') is conv
    assert get_model_layers(model) == get_model_layers(small_cnn())
    assert get_module_by_name(nn.DataParallel(model), 'module.0.0') is conv

def test_shared_modules_keep_all_their_names():
    "`named_modules()` would show only the first"
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    assert get_model_layers(model) == ['0', '1', '2', '2.0']
    assert all(get_module_by_name(model, name) is shared for name in ('0', '2.0'))

def test_layer_descriptions():
    layers = get_model_layers(small_cnn(), get_layer_repr=True)
    assert list(layers) == get_model_layers(small_cnn())
    assert layers['0.0'] == 'Conv2d(3, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))'

def test_stages_of_a_vision_learner():
    "torchvision's names lead to where `create_body` has put the stages"
    model = create_vision_model(tvm.resnet18, 10, pretrained=False)
    assert [nearest_names(model, name)[0] for name in ('layer2', '0.layer4', 'conv1')] == ['0.5', '0.7', '0.0']
    assert all(get_module_by_name(model, nearest_names(model, f'layer{i}')[0])[0].conv1.out_channels == 32*2**i for i in range(1, 5))
    assert '0.5' not in nearest_names(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), 'layer2')

def test_nearest_names():
    model = cnn('resnet18')
    assert nearest_names(model, 'layer4.1.conv_2')[0] == 'layer4.1.conv2' and 'layer4' in nearest_names(model, 'layer5')
    assert nearest_names(model, 'zzzzzz') == [] and len(nearest_names(model, 'layer1', n=2)) == 2

# ---- Outputs

def test_logits():
    class Output(dict):
        "An object with fields, as in transformers"
        __getattr__ = dict.get
    z, hidden = torch.randn(2, 3), torch.randn(2, 5)
    fields = type('Fields', (), dict(logits=z))()
    for output in (z, (z, hidden), [z], dict(a=z, b=hidden), dict(loss=hidden, logits=z), Output(loss=hidden, logits=z),
        dict(out=z, aux=hidden), dict(logits=None, out=(z, hidden)), ((z, hidden), hidden), fields): assert logits(output) is z
    for nothing in (None, 'text', (), {}, 3.):
        with pytest.raises(TypeError, match='no prediction found in a model output of type .*logits=lambda output'): logits(nothing)

def test_read_field():
    z = torch.randn(2, 3)
    output = dict(hidden_states=(z, z + 1), last=dict(deep=[z + 2]))
    assert torch.equal(read_field(output, 'hidden_states.1'), z + 1) and torch.equal(read_field(output, 'last.deep.0'), z + 2)
    for missing in ('hidden_states.2', 'hidden_states.x', 'nothing', 'nothing.0', 'last.deep.1.2'):
        assert read_field(output, missing) is None

# ---- Pairs

@cache
def cnn(name, **kwargs): return getattr(tvm, name)(num_classes=10, **kwargs).eval()

def is_apart(names): return not any(b.startswith(f'{a}.') for a in names for b in names) and len({*names}) == len(names)

def shapes_of(model, names, x):
    captures = Captures(model, names)
    with captures, evaluating(model), torch.no_grad(): model(x)
    return [tuple(o.shape[2:]) for o in captures.take().values()]

def check_pairs(student, teacher, x):
    "What holds for all pairs of convolutional nets"
    found = match_feature_layers(student, teacher, x)
    names_s, names_t = found['student'], found['teacher']
    assert len(names_s) == len(names_t) > 0 and is_apart(names_s) and is_apart(names_t)
    assert shapes_of(student, names_s, x) == shapes_of(teacher, names_t, x)
    assert is_apart(names_s + found['unmatched']['student']) and is_apart(names_t + found['unmatched']['teacher'])
    return names_s, names_t

RESNET = ['conv1', 'layer1', 'layer2', 'layer3', 'layer4']

def features(*ids): return [f'features.{i}' for i in ids]

slow = partial(pytest.param, marks=pytest.mark.slow)

@pytest.mark.parametrize('name,stages', [('resnet34', RESNET), ('mobilenet_v3_small', features(0, 1, 3, 8, 12)), slow('resnet50', RESNET),
    slow('efficientnet_b0', features(1, 2, 3, 5, 8)), slow('mobilenet_v2', features(1, 3, 6, 13, 18)),
    slow('densenet121', features('conv0', 'denseblock1', 'denseblock2', 'denseblock3', 'denseblock4')),
    slow('regnet_y_400mf', ['stem', *[f'trunk_output.block{i}' for i in (1, 2, 3, 4)]])])
def test_stages_of_cnns(name, stages):
    x = torch.randn(1, 3, 64, 64)
    assert check_pairs(cnn(name), cnn('resnet18'), x) == (stages, RESNET)
    assert check_pairs(cnn('resnet18'), cnn(name), x) == (RESNET, stages)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['vgg11_bn', 'shufflenet_v2_x0_5', 'convnext_tiny', 'mnasnet0_5'])
def test_other_cnns(name): check_pairs(cnn(name), cnn('resnet18'), torch.randn(1, 3, 64, 64))

@pytest.mark.parametrize('size', [(64, 32), (32, 64), (96, 128), slow((256, 128))])
def test_pictures_that_are_not_square(size):
    "At 256×128, a ResNet's first stage has 64 channels and 64 rows"
    x = torch.randn(1, 3, *size)
    assert check_pairs(cnn('resnet18'), cnn('mobilenet_v3_small'), x)[0] == RESNET

def test_channels_as_many_as_rows():
    "64 channels, 64 rows, 32 columns: no channels-last map, since the picture is not square"
    wide = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.Conv2d(96, 8, 3, stride=2, padding=1))
    thin = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1))
    assert match_feature_layers(thin, wide, torch.randn(1, 3, 64, 32)) == dict(student=['0', '1', '2'], teacher=['0', '1', '2'],
        unmatched=dict(student=[], teacher=[]))

@pytest.mark.parametrize('arch,stages', [(tvm.resnet18, ['0.0', '0.4', '0.5', '0.6', '0.7']),
    (tvm.mobilenet_v3_small, ['0.0.0', '0.0.1', '0.0.3', '0.0.8', '0.0.12']), (xresnet18, ['0.2', '0.4', '0.5', '0.6', '0.7'])])
def test_vision_learner_models(arch, stages):
    "Body and head: the body returns the last stage, but holds all the others"
    model = create_vision_model(arch, 10, pretrained=False)
    names, others = check_pairs(model, cnn('resnet18'), torch.randn(1, 3, 64, 64))
    assert names == stages and '0' not in names and others == RESNET

def test_vision_learner_of_one_resolution():
    "Where the body and its only stage compete, the stage wins or the body, but never both"
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    found = match_feature_layers(model, model, torch.randn(1, 3, 8, 8))
    assert is_apart(found['student']) and found['student'] == found['teacher'] == ['0.0', '0.2']

@pytest.mark.slow
def test_unet():
    "Encoder and decoder have maps of one size: one of them is chosen, and no container with what it holds"
    unet = create_unet_model(tvm.resnet18, 2, (64, 64), pretrained=False)
    check_pairs(unet, cnn('resnet18'), torch.randn(1, 3, 64, 64))

def transformer(n_layers, dim=8): return nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, 2, dim, batch_first=True), n_layers)

def vit(n_layers, size=32):
    return tvm.VisionTransformer(image_size=size, patch_size=8, num_layers=n_layers, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)

def blocks(*ids): return [f'encoder.layers.encoder_layer_{i}' for i in ids]

def test_transformers():
    found = match_feature_layers(transformer(2), transformer(6), torch.randn(2, 5, 8))
    assert found == dict(student=['layers.0', 'layers.1'], teacher=['layers.2', 'layers.5'],
        unmatched=dict(student=[], teacher=['layers.0', 'layers.1', 'layers.3', 'layers.4']))
    other_way = match_feature_layers(transformer(6), transformer(2), torch.randn(2, 5, 8))
    assert (other_way['student'], other_way['teacher']) == (['layers.2', 'layers.5'], ['layers.0', 'layers.1'])

def test_one_block():
    "A lone block is a stage, rather than what it is made of"
    found = match_feature_layers(transformer(1), transformer(4), torch.randn(2, 5, 8))
    assert (found['student'], found['teacher']) == (['layers.0'], ['layers.3'])

def test_vision_transformers():
    x = torch.randn(1, 3, 32, 32)
    assert match_feature_layers(vit(2), vit(4), x)['teacher'] == blocks(1, 3)
    with_cnn = match_feature_layers(small_cnn(), vit(4), x)
    assert with_cnn['student'] == ['0', '1'] and with_cnn['teacher'] == blocks(1, 3)
    assert match_feature_layers(vit(4), small_cnn(), x)['student'] == blocks(1, 3)

@pytest.mark.slow
def test_swin():
    "Channels-last stages pair with those of a ResNet by resolution"
    swin = tvm.SwinTransformer([4, 4], 16, [2, 2, 2, 2], [2, 2, 2, 2], [7, 7], num_classes=3)
    found = match_feature_layers(cnn('resnet18'), swin, torch.randn(1, 3, 128, 128))
    assert found['student'] == RESNET[1:] and found['teacher'] == features(1, 3, 5, 7)
    assert found['unmatched'] == dict(student=['conv1'], teacher=[])

def test_mlps():
    student, teacher = mlp(3, 8, 2), mlp(3, 16, 16, 16, 2)
    found = match_feature_layers(student, teacher, torch.randn(2, 3))
    assert (found['student'], found['teacher']) == (['0', '2'], ['2', '6'])
    assert found['unmatched']['teacher'] == ['0', '4']

def test_convolutions_of_one_resolution_pair_by_depth():
    def net(n): return nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(n)], nn.Flatten(), nn.Linear(3*64, 2))
    found = match_feature_layers(net(2), net(4), torch.randn(1, 3, 8, 8))
    assert (found['student'], found['teacher']) == (['0', '1'], ['1', '3'])

def test_nothing_in_common():
    "No resolution is shared, so depth tells"
    student = nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.Conv2d(4, 4, 3, stride=3))
    teacher = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 2, stride=2))
    found = match_feature_layers(student, teacher, torch.randn(1, 3, 32, 32))
    assert (found['student'], found['teacher']) == (['0', '1'], ['1', '2'])
    assert found['unmatched'] == dict(student=[], teacher=['0'])

@given(n_few=st.integers(1, 12), n_more=st.integers(0, 30))
def test_pairs_by_depth(n_few, n_more):
    "In order, no layer twice, the last with the last, at most half a layer from the same relative depth"
    few, many = list(range(n_few)), list(range(n_few + n_more))
    pairs = _pairs_by_depth(few, many)
    partners = [t for _, t in pairs]
    assert [s for s, _ in pairs] == few and partners == sorted({*partners}) and partners[-1] == many[-1]
    assert all(abs((t + 1) - (s + 1)*len(many)/len(few)) <= .5 for s, t in pairs)

class TwoInputs(nn.Module):
    "A picture and a table"
    def __init__(self, n=4):
        super().__init__()
        self.image, self.table, self.head = small_cnn(n), mlp(5, n, 3), nn.Linear(6, 3)
    def forward(self, image, table): return self.head(torch.cat([self.image(image), self.table(table)], 1))

def test_several_inputs():
    xb = torch.randn(2, 3, 16, 16), torch.randn(2, 5)
    for inputs in (xb, list(xb)):
        found = match_feature_layers(TwoInputs(), TwoInputs(8), inputs)
        assert found['student'] == found['teacher'] == ['image.0', 'image.1']

def test_wrapped_models_pair():
    x, plain = torch.randn(2, 3, 16, 16), small_cnn()
    expected = match_feature_layers(plain, small_cnn(8), x)
    for student in (nn.DataParallel(plain), torch.compile(plain), learner_of(plain)):
        assert match_feature_layers(student, learner_of(small_cnn(8)), x) == expected

def test_shared_layers_pair_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), shared)
    names = match_feature_layers(model, model, torch.randn(2, 4))['student']
    assert sorted(names) == ['0', '2']

def state(*models):
    "All that a look at models must not change"
    flags = [[module.training for module in model.modules()] for model in models]
    values = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for model in models for module in model.modules()]
    grads = [p.grad is None for model in models for p in model.parameters()]
    return flags, values, hooks, grads, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

def same_state(a, b):
    same_values = all(torch.equal(x[name], y[name]) for x, y in zip(a[1], b[1]) for name in x)
    return same_values and a[:1] + a[2:] == b[:1] + b[2:]

class Draws(nn.Module):
    "Uses all three generators, and may fail"
    def __init__(self, fails=False):
        super().__init__()
        self.linear, self.fails = nn.Linear(4, 4), fails
    def forward(self, x):
        x = self.linear(x) + torch.rand(1) + random.random() + np.random.rand()
        if self.fails: raise ZeroDivisionError
        return x

def test_a_look_changes_nothing():
    student, teacher = small_cnn(), small_cnn(8)
    student.train()
    student[0].eval()
    teacher.eval()
    teacher[1].train()
    before = state(student, teacher)
    match_feature_layers(student, teacher, torch.randn(2, 3, 16, 16, generator=torch.Generator()))
    assert same_state(state(student, teacher), before)

def test_a_look_changes_nothing_where_models_draw_or_fail():
    student, teacher = nn.Sequential(Draws()), nn.Sequential(Draws(fails=True), nn.Dropout())
    teacher[1].eval()
    x = torch.randn(2, 4)
    before = state(student, teacher)
    match_feature_layers(student, student, x)
    assert same_state(state(student, teacher), before)
    with pytest.raises(ZeroDivisionError): match_feature_layers(student, teacher, x)
    assert same_state(state(student, teacher), before)

def test_evaluating():
    "Module by module, also after an error"
    model = small_cnn().train()
    model[0].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == flags

# ---- Activations

def capture(model, names, *xb):
    captures = Captures(model, names)
    with captures: model(*xb)
    return captures.take()

def test_order_of_the_names():
    model, x = small_cnn().eval(), torch.randn(2, 3, 8, 8)
    taken = capture(model, ['5', '0', '1.0', '0'], x)
    assert list(taken) == ['5', '0', '1.0']
    close(taken['5'], model(x))
    close(taken['0'], model[0](x))
    close(taken['1.0'], model[1][0](model[0](x)))

def test_repeated_layers_share_an_entry(): assert list(capture(small_cnn(), ['1', '0', '1'], torch.randn(2, 3, 8, 8))) == ['1', '0']

class Several(nn.Module):
    "Returns what it is told to return"
    def __init__(self, make):
        super().__init__()
        self.inner, self.make = nn.Identity(), make
        self.inner.forward = lambda x: self.make(x)
    def forward(self, x): return self.inner(x)

@pytest.mark.parametrize('make', [lambda x: (x*2, x), lambda x: [x*2], lambda x: dict(a=x*2, b=x), lambda x: ((x*2, x), x),
    lambda x: (dict(a=(x*2,)),)])
def test_first_tensor_of_an_output(make):
    x = torch.randn(2, 3)
    close(capture(Several(make), ['inner'], x)['inner'], 2*x)

def test_lstm():
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    x = torch.randn(2, 5, 3)
    close(capture(model, ['0'], x)['0'], model[0](x)[0])

class Twice(nn.Module):
    "One layer, called twice"
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
    def forward(self, x): return self.head(self.layer(self.layer(x).relu()))

def test_the_last_call_counts():
    model, x = Twice(), torch.randn(2, 3)
    close(capture(model, ['layer'], x)['layer'], model.layer(model.layer(x).relu()))

def test_shared_modules_have_the_last_value_under_each_name():
    shared = nn.Linear(3, 3)
    model, x = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)), torch.randn(2, 3)
    taken = capture(model, ['0', '2.0', '2'], x)
    for name in ('0', '2.0', '2'): close(taken[name], model(x))

def test_output_fields():
    class WithStates(nn.Module):
        "Returns its hidden states"
        def __init__(self):
            super().__init__()
            self.layers = mlp(3, 3, 3)
        def forward(self, x):
            states = [x]
            for layer in self.layers: states.append(layer(states[-1]))
            return dict(logits=states[-1], hidden_states=tuple(states))
    model, x = WithStates(), torch.randn(2, 3)
    taken = capture(model, ['hidden_states.1', 'layers.2', 'hidden_states.0', 'hidden_states.9', 'nowhere'], x)
    assert list(taken) == ['hidden_states.1', 'layers.2', 'hidden_states.0']
    close(taken['hidden_states.1'], model.layers[0](x))
    assert taken['hidden_states.0'] is x

def test_layers_that_do_not_run_are_absent():
    model = Twice()
    model.forward = lambda x: model.layer(x)
    assert list(capture(model, ['head', 'layer'], torch.randn(2, 3))) == ['layer']

def in_place_net():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Hardtanh(inplace=True), nn.Linear(3, 2))

def test_in_place_successors():
    "In the first pass and in later ones, in training and evaluation, the value is the layer's own, with its gradient"
    model, x = in_place_net(), 10*torch.randn(4, 3)
    captures = Captures(model, ['0', '1', '2', '4'])
    for train in (True, True, False, False, True):
        model.train(train)
        with captures: model(x)
        taken = captures.take()
        first = model[0](x)
        second = model[2](first.relu())
        for value, expected in zip(taken.values(), (first, first.relu(), second, model(x))): close(value, expected)
        assert taken['0'].min() < 0 and taken['2'].abs().max() > 1 # neither ReLU nor Hardtanh went over it
        grad, expected = (torch.autograd.grad(o.square().sum(), model[0].weight, retain_graph=True)[0] for o in (taken['0'], first))
        close(grad, expected)

def test_only_overwritten_outputs_are_copied():
    model, x = in_place_net(), torch.randn(4, 3)
    captures, seen = Captures(model, ['0', '1', '4']), []
    for _ in range(2):
        with captures: seen.append(model(x))
        taken = captures.take()
    assert captures.copies == {('0', True): True, ('1', True): False, ('4', True): False}
    assert taken['4'] is seen[1]

def test_a_new_in_place_operation_is_noticed():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3)
    captures = Captures(model, ['0'])
    with captures: model(x)
    captures.take()
    model[1].inplace = True
    with captures: model(x)
    with pytest.raises(RuntimeError, match="the output of layer '0' was overwritten by a later in-place operation"): captures.take()

def test_gradients_flow_through_captured_values():
    model, x = small_cnn(), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['0.0', '1'])
    for _ in range(2):
        with captures: model(x)
        taken = captures.take()
        taken['0.0'].sum().backward()
        assert model[0][0].weight.grad.abs().sum() > 0 and model[1][0].weight.grad is None
        model.zero_grad()

COPYING = dict(deepcopy=copy.deepcopy, pickle=lambda o: pickle.loads(pickle.dumps(o)))

def saved(model):
    "As `torch.save` of a whole model does it"
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)

@pytest.mark.parametrize('copied', [*COPYING.values(), saved], ids=[*COPYING, 'save'])
def test_copies_do_not_write_into_the_original(copied):
    model, x, other = small_cnn().eval(), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['0', '1'])
    with captures:
        model(x)
        clone = copied(model)
        clone(other)
    taken = captures.take()
    close(taken['0'], model[0](x))
    close(clone(other), model(other))
    assert not any(module._forward_hooks for module in model.modules())

def test_copies_made_before_the_pass_store_nothing():
    model, x = small_cnn(), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['0'])
    with captures:
        clone = copy.deepcopy(model)
        clone(x)
        assert captures.take() == {}

def test_replicas_do_not_write_into_the_original():
    "A shallow copy, as `DataParallel` makes it for each device, shares the hooks"
    model, x = small_cnn(), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['0.2'])
    with captures:
        model[0][2]._replicate_for_data_parallel()(x)
        copy.copy(model[0][2])(x)
        assert captures.take() == {}

def test_hooks_are_gone_after_errors():
    for error in (ValueError, KeyboardInterrupt, StopForward):
        class Fails(nn.Module):
            "Raises"
            def forward(self, x): raise error
        model = nn.Sequential(nn.Linear(3, 3), Fails())
        captures = Captures(model, ['0', '1', 'field'])
        with pytest.raises(error):
            with captures: model(torch.randn(2, 3))
        assert not any(module._forward_hooks for module in model.modules()) and captures.handles == []

def test_no_graph_is_kept_alive():
    "Neither after `take`, nor after a pass that failed, nor by a pass whose activations nobody took"
    model, x = small_cnn(), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['0', '1'])
    for _ in range(2):
        with captures: model(x)
        taken = captures.take()
        kept = [weakref.ref(o) for o in taken.values()]
        del taken
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
    assert captures.stored == {} and captures.output is None

def test_no_graph_is_kept_alive_after_errors():
    model, kept = small_cnn(), []
    captures = Captures(model, ['0', '1', '5'])
    def fails(module, args):
        kept.append(weakref.ref(args[0]))
        raise KeyboardInterrupt
    handle = model[1].register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        with captures: model(torch.randn(2, 3, 8, 8))
    handle.remove()
    gc.collect()
    assert captures.stored == {} and captures.output is None and kept[0]() is None

def test_what_nobody_took_is_forgotten_in_the_next_pass():
    model, x = Twice(), torch.randn(2, 3)
    captures = Captures(model, ['layer', 'head'])
    with captures: model(x)
    old = captures.stored['layer'][0]
    with captures: model(2*x)
    taken = captures.take()
    assert taken['layer'] is not old and captures.take() == {}
    close(taken['layer'], model.layer(model.layer(2*x).relu()))

def test_stop_after():
    "As many outputs as a whole pass made, then the pass ends"
    model, x, ran = Twice().eval(), torch.randn(2, 3), []
    model.head.register_forward_hook(lambda *args: ran.append(1))
    captures = Captures(model, ['layer'])
    with captures: whole = model(x)
    expected = captures.take()
    assert captures.counted == 2 and ran == [1] and whole.shape == (2, 2)
    captures.stop_after = captures.counted
    with captures, pytest.raises(StopForward): model(x)
    assert torch.equal(captures.take()['layer'], expected['layer']) and ran == [1]

def test_stop_after_several_layers():
    model, x = small_cnn().eval(), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['1', '0.0'])
    with captures: model(x)
    expected = captures.take()
    captures.stop_after, ran = captures.counted, []
    model[2].register_forward_hook(lambda *args: ran.append(1))
    with captures, pytest.raises(StopForward): model(x)
    taken = captures.take()
    assert list(taken) == ['1', '0.0'] and all(torch.equal(taken[name], expected[name]) for name in taken) and ran == []

def test_fields_need_the_whole_pass():
    model = Several(lambda x: dict(a=x))
    captures = Captures(model, ['a', 'inner'])
    with captures: model(torch.randn(2, 3))
    captures.take()
    assert captures.counted is None

@pytest.mark.parametrize('wrap', [nn.DataParallel, partial(torch.compile, backend='eager')], ids=['parallel', 'compiled'])
def test_captures_in_wrappers(wrap):
    model, x = in_place_net(), torch.randn(2, 3)
    wrapped = wrap(model)
    captures = Captures(wrapped, ['2', '0'])
    for _ in range(2):
        with captures: wrapped(x)
        taken = captures.take()
        assert list(taken) == ['2', '0']
        close(taken['0'], model[0](x))

def test_captures_of_a_compiled_child():
    model, x = small_cnn().eval(), torch.randn(2, 3, 8, 8)
    expected = model[0](x)
    model[0] = torch.compile(model[0], backend='eager')
    close(capture(model, ['0'], x)['0'], expected)

def test_pickled_captures_are_empty():
    model, x = small_cnn(), torch.randn(2, 3, 8, 8)
    captures = Captures(model, ['0'])
    with captures: model(x)
    captures.take()
    again = pickle.loads(pickle.dumps(captures))
    assert again.names == ['0'] and again.handles == [] and again.stored == {}
