"""Files of eight bits mean the same on every processor: what onnxruntime answers here is what integers in numpy answer.

Where a processor has AVX2 and no VNNI, onnxruntime multiplies unsigned activations with signed weights by `vpmaddubsw`, which adds two
products in 16 bits and ends at 32,767. `in_16_bits` does that in numpy, so that no test here depends on the machine that it runs on."""
import numpy as np, onnx, onnxruntime.quantization, pytest, torch
from fastai.basics import CrossEntropyLossFlat, Learner
from fastai.tabular.model import TabularModel
from fastkd import export
from fastkd.export import _Batches, _lost, export_onnx, quantize_onnx
from functools import cache, partial
from helpers import convnet, loaders, quiet, seeded
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator
from test_export import Tokens
from torch import nn

def exactly(a, w): return a.astype(np.int64) @ w.astype(np.int64)

def in_16_bits(a, w):
    "As `vpmaddubsw` of AVX2 adds, where signed weights stand beside unsigned activations"
    if (a.dtype, w.dtype) != (np.uint8, np.int8): return exactly(a, w)
    n, total = a.shape[-1], 0
    for i in range(0, n, 2): total = total + exactly(a[..., i:i+2], w[..., i:i+2, :]).clip(-2**15, 2**15 - 1)
    return total

def product(multiply, a, a_zero, w, w_zero):
    "Integers less their zero points, multiplied as they are stored; what zero points add is exact everywhere"
    if a.dtype == np.int8: a, a_zero = (a.astype(np.int16) + 128).astype(np.uint8), a_zero.astype(np.int16) + 128 # as onnxruntime does
    a_zero, w_zero = np.int64(a_zero), np.asarray(w_zero, np.int64)
    a_sum, w_sum = (o.astype(np.int64).sum(axis, keepdims=True) for o, axis in ((a, -1), (w, -2)))
    return multiply(a, w) - a_zero*w_sum - a_sum*w_zero + a.shape[-1]*a_zero*w_zero

def dynamic(x):
    "Integers, scale and zero point of activations whose range is looked up"
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low)/255) or np.float32(1)
    zero = np.uint8(np.rint(-low/scale).clip(0, 255))
    return (np.rint(x/scale) + zero).clip(0, 255).astype(np.uint8), scale, zero

def patches(x, fill, shape, pads, strides, dilations):
    "(bs, channels, *positions, *kernel) of images with a border of zeros"
    n = len(shape)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:n], pads[n:])], constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, [(k - 1)*d + 1 for k, d in zip(shape, dilations)], tuple(range(2, 2 + n)))
    every = tuple(slice(None, None, s) for s in strides), tuple(slice(None, None, d) for d in dilations)
    return windows[(slice(None), slice(None), *every[0], *every[1])]

def settings(node): return {o.name: onnx.helper.get_attribute_value(o) for o in node.attribute}

class Integers:
    "A file as integers in numpy; `multiply` says how products are added"
    def __init__(self, file, multiply=exactly): self.graph, self.multiply = onnx.load(file).graph, multiply

    def __call__(self, *xb):
        self.values = {'': None, **{o.name: to_array(o) for o in self.graph.initializer}}
        self.values |= {o.name: x.numpy() for o, x in zip(self.graph.input, xb, strict=True)}
        self.whole = {} # of dequantized values: integers, scale and zero point
        for node in self.graph.node:
            xs, run = [self.values[o] for o in node.input], getattr(self, node.op_type, None)
            found = run(node, *xs) if run else ReferenceEvaluator(node).run(None, dict(zip(node.input, xs)))
            self.values |= dict(zip(node.output, found))
        return torch.from_numpy(np.asarray(self.values[self.graph.output[0].name], np.float32))

    def DequantizeLinear(self, node, x, scale, zero):
        axis = settings(node).get('axis', 1) if scale.ndim else None
        spread = [-1 if i == axis else 1 for i in range(x.ndim)]
        if scale.ndim: scale, zero = scale.reshape(spread), zero.reshape(spread)
        self.whole[node.output[0]] = x, scale.astype(float), zero
        return [((x.astype(np.int64) - zero)*scale.astype(float))]

    def QuantizeLinear(self, node, x, scale, zero):
        kind = np.iinfo(zero.dtype)
        return [(np.rint(x/scale.astype(float)) + zero).clip(kind.min, kind.max).astype(zero.dtype)]

    def DynamicQuantizeLinear(self, node, x): return dynamic(x)

    def MatMulInteger(self, node, a, w, a_zero, w_zero): return [product(self.multiply, a, a_zero, w, w_zero).astype(np.int32)]

    def MatMul(self, node, a, w):
        if not {*node.input} <= {*self.whole}: return [a @ w]
        (a, a_scale, a_zero), (w, w_scale, w_zero) = (self.whole[o] for o in node.input)
        return [product(self.multiply, a, a_zero, w, w_zero)*(a_scale*w_scale)]

    def Gemm(self, node, a, w, bias=0):
        (a, a_scale, a_zero), (w, w_scale, w_zero) = (self.whole[o] for o in node.input[:2])
        assert dict(alpha=1, beta=1, transA=0, transB=1) == dict(alpha=1, beta=1, transA=0, transB=0) | settings(node)
        return [product(self.multiply, a, a_zero, w.T, np.transpose(w_zero))*(a_scale*np.transpose(w_scale)) + bias]

    def Conv(self, node, x, w, bias=np.zeros(1)):
        (x, x_scale, x_zero), (w, w_scale, w_zero) = (self.whole[o] for o in node.input[:2])
        given, n = settings(node), w.ndim - 2
        shape, groups = w.shape[2:], given.get('group', 1)
        x = patches(x, x_zero, shape, given.get('pads', [0]*2*n), given.get('strides', [1]*n), given.get('dilations', [1]*n))
        rows, found = np.moveaxis(x, 1, -1), [] # pairs are channels, as onnxruntime has them
        for channels, some in zip(*(np.split(np.arange(o), groups) for o in (rows.shape[-1], len(w)))):
            a, weights = rows[..., channels].reshape(*rows.shape[:n + 1], -1), np.moveaxis(w[some], 1, -1).reshape(len(some), -1).T
            zero, scale = (o.reshape(-1)[some] for o in (w_zero, w_scale))
            found.append(product(self.multiply, a, x_zero, weights, zero)*(x_scale*scale))
        return [np.moveaxis(np.concatenate(found, -1) + bias.reshape(-1), -1, 1)]

    def DynamicQuantizeLSTM(self, node, x, w, r, bias, lengths, h, c, peepholes, w_scale, w_zero, r_scale, r_zero):
        assert lengths is None and peepholes is None
        n, both, last = r.shape[1], [], []
        def times(x, i, weights, scale, zero):
            whole, x_scale, x_zero = dynamic(x)
            return product(self.multiply, whole, x_zero, weights[i], zero[i])*(x_scale*scale[i].astype(float))
        sigmoid = lambda x: 1/(1 + np.exp(-x))
        for i in range(len(w)):
            state, cell, states = h[i], c[i], []
            inputs = times(x, i, w, w_scale, w_zero) + bias[i, :4*n] + bias[i, 4*n:]
            for step in inputs[::-1] if i else inputs:
                gates = step + times(state.astype(np.float32), i, r, r_scale, r_zero)
                gate_in, gate_out, forget, new = (gates[:, k*n:(k + 1)*n] for k in range(4))
                cell = sigmoid(forget)*cell + sigmoid(gate_in)*np.tanh(new)
                state = sigmoid(gate_out)*np.tanh(cell)
                states.append(state)
            both.append(np.stack(states[::-1] if i else states))
            last.append((state, cell))
        return np.stack(both, 1).astype(np.float32), *(np.stack(o).astype(np.float32) for o in zip(*last))

    def QAttention(self, node, x, w, bias, x_scale, w_scale, mask, x_zero, w_zero, past):
        assert mask is None and past is None
        given = settings(node)
        n, width = given['num_heads'], w.shape[1]//3
        qkv = product(self.multiply, x, x_zero, w, w_zero)*(x_scale*w_scale.astype(float)) + bias
        q, k, v = (o.reshape(*x.shape[:2], n, -1).swapaxes(1, 2) for o in np.split(qkv, 3, -1))
        scores = np.exp(q @ k.swapaxes(2, 3)/(width/n)**.5)
        return [((scores/scores.sum(-1, keepdims=True)) @ v).swapaxes(1, 2).reshape(*x.shape[:2], width).astype(np.float32)]

class Reader(nn.Module):
    "Two recurrent layers over words"
    def __init__(self, **kwargs):
        super().__init__()
        self.embed, self.rnn = nn.Embedding(50, 16), nn.LSTM(16, 24, num_layers=2, batch_first=True, **kwargs)
        self.head = nn.Linear(24*(2 if kwargs else 1), 5)

    def forward(self, x): return self.head(self.rnn(self.embed(x))[0][:, -1])

def pool(): return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

def grouped(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(),
    nn.Conv2d(8, 16, 3, groups=2, stride=2), pool())

def dead_channels():
    "Pruned: nothing in them to take a scale from"
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), pool())
    for layer in model[0], model[2]: layer.weight.data[::2] = 0
    return model

def tabular(): return TabularModel([(10, 4), (7, 3)], 5, 3, [50, 20])

def images(): return torch.rand(1, 8, 8)
def rows(): return torch.rand(64)
def signals(): return torch.randn(4, 20)
def words(): return torch.randint(50, (9,))
def table(): return torch.stack([torch.randint(10, ()), torch.randint(7, ())]), torch.randn(5)

MODELS = dict(mlp=(lambda: nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), rows), cnn=(lambda: convnet(8), images),
    no_bias=(lambda: nn.Sequential(nn.Linear(64, 33, bias=False), nn.ReLU(), nn.Linear(33, 10, bias=False)), rows),
    signal=(lambda: nn.Sequential(nn.Conv1d(4, 12, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(12*16, 10)), signals),
    grouped=(grouped, images), dead_channels=(dead_channels, images), table=(tabular, table),
    lstm=(Reader, words), both_ways=(partial(Reader, bidirectional=True), words), transformer=(Tokens, images))

@cache
def exported(name, folder):
    "A model with random weights as a file, and a loader of what it reads"
    make, sample = MODELS[name]
    model, xs = seeded(make), [sample() for _ in range(60)]
    items = [(*x, 0) if isinstance(x, tuple) else (x, 0) for x in xs]
    learn = quiet(Learner(loaders(items, bs=20), model, CrossEntropyLossFlat()))
    learn.dls.n_inp = len(items[0]) - 1
    return export_onnx(learn, folder/f'{name}.onnx'), learn.dls.valid

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('exported')

WAYS = dict(static='mlp cnn no_bias signal grouped dead_channels table lstm transformer',
    dynamic='mlp no_bias table lstm both_ways transformer')
every = pytest.mark.parametrize('name,way', [(name, way) for way, names in WAYS.items() for name in names.split()])

def quantized(name, way, folder, file, **kwargs):
    "A file of eight bits, one batch for it, and its loss of precision"
    source, dl = exported(name, folder)
    small = quantize_onnx(source, file, dl if way == 'static' else None, valid=dl, limit=10, **kwargs)
    names = [o.name for o in source.session().get_inputs()]
    return small, dl.one_batch()[:-1], _lost(source, small, _Batches(dl, names, 10))

def integers(file):
    kinds = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    return {o.name: o for o in onnx.load(file).graph.initializer if o.data_type in kinds}

def without_moving(monkeypatch): monkeypatch.setattr(export, '_unsigned', lambda *_: True)

@every
def test_answers_are_those_of_integers(name, way, folder, tmp_path):
    "As numpy adds them, and as a processor adds that has 16 bits for a pair"
    small, xb, _ = quantized(name, way, folder, tmp_path/'int8.onnx')
    exact, said = Integers(small.file)(*xb), small(*xb)
    assert torch.equal(Integers(small.file, in_16_bits)(*xb), exact)
    off = (said - exact).abs().amax(1)/exact.abs().max()
    # what float32 rounds otherwise around the products may bring a value to the other side of the border of two steps, in a few samples
    assert off.max() < .05
    if (name, way) != ('transformer', 'static'): assert (off < 1e-6).float().mean() >= .9 # there a softmax of integers is a table

@every
def test_all_integers_are_unsigned(name, way, folder, tmp_path):
    "Weights stand around 128, with as many steps below as above"
    small, _, _ = quantized(name, way, folder, tmp_path/'int8.onnx')
    whole = integers(small.file)
    assert {o.data_type for o in whole.values()} == {onnx.TensorProto.UINT8}
    graph, n_weights = onnx.load(small.file).graph, 0
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        at = dict(MatMulInteger=[(1, 3)], DynamicQuantizeLSTM=[(1, 9), (2, 11)]).get(node.op_type, [])
        pairs = [(node.input[i], node.input[j]) for i, j in at]
        if node.op_type in ('Conv', 'Gemm', 'MatMul') and node.input[1] in made: # of QDQ
            given = made[node.input[1]]
            if given.op_type == 'DequantizeLinear': pairs = [given.input[i] for i in (0, 2)],
        for weight, zero in pairs:
            if weight not in whole: continue
            values, zeros = (to_array(whole[o]) for o in (weight, zero))
            n_weights += 1
            assert values.min() >= 1 and (zeros == 128).all()
    assert n_weights > 0

@every
def test_nothing_is_lost_by_it(name, way, folder, tmp_path, monkeypatch):
    "Integers of signed weights have the same answers, where they are added exactly, and others in 16 bits; seven bits lose more"
    small, xb, lost = quantized(name, way, folder, tmp_path/'int8.onnx')
    without_moving(monkeypatch)
    signed, _, _ = quantized(name, way, folder, tmp_path/'signed.onnx')
    exact = Integers(small.file)(*xb)
    assert torch.equal(Integers(signed.file)(*xb), exact)
    assert (Integers(signed.file, in_16_bits)(*xb) - exact).abs().max() > .01*exact.abs().max()
    for ways in 'static', 'dynamic':
        write = getattr(onnxruntime.quantization, f'quantize_{ways}')
        monkeypatch.setattr(onnxruntime.quantization, f'quantize_{ways}', partial(write, reduce_range=True))
    seven, _, seven_lost = quantized(name, way, folder, tmp_path/'seven.onnx')
    assert torch.equal(Integers(seven.file, in_16_bits)(*xb), Integers(seven.file)(*xb))
    assert lost < seven_lost

class Sum(nn.Module):
    "Two numbers and a row that is theirs"
    def __init__(self, row):
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight.data = torch.tensor([row, [1., -1.]])

    def forward(self, x): return self.layer(x)

@pytest.mark.parametrize('row,expected,wrong', [([1., 1.], 2, 32767/32385), ([-1., -1.], -2, -32768/32385), ([1., .5], 1.5, 32767/32385)])
def test_by_hand(row, expected, wrong, tmp_path, monkeypatch):
    "1 is 255 steps of 1/255, a weight of 1 is 127 of 1/127, and so 1·1 is 32,385: two of them are 64,770, beyond 32,767"
    learn = quiet(Learner(loaders([(torch.rand(2), 0) for _ in range(20)], bs=10), Sum(row), CrossEntropyLossFlat()))
    source, x = export_onnx(learn, tmp_path/'sum.onnx'), torch.ones(1, 2)
    small = quantize_onnx(source, tmp_path/'int8.onnx', valid=learn.dls.valid)
    for model in small, Integers(small.file), Integers(small.file, in_16_bits):
        assert model(x)[0].tolist() == pytest.approx([expected, 0], abs=.005)
    without_moving(monkeypatch)
    signed = quantize_onnx(source, tmp_path/'signed.onnx', valid=learn.dls.valid, limit=10)
    assert Integers(signed.file, in_16_bits)(x)[0].tolist() == pytest.approx([wrong, 0], abs=1e-4)

class Masked(nn.Module):
    "Has a table of small integers of its own, which are no weights"
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.register_buffer('signs', torch.tensor([[1, -1]*32, [-1, 1]*32, [0, 1]*32], dtype=torch.int8))

    def forward(self, x, i): return self.layer(x*self.signs[i])

@pytest.mark.parametrize('way', ['static', 'dynamic'])
def test_integers_of_the_model_stay(way, tmp_path):
    dls = loaders([(rows(), i%3, 0) for i in range(21)], bs=7)
    dls.n_inp = 2
    learn = quiet(Learner(dls, seeded(Masked), CrossEntropyLossFlat()))
    source, xb = export_onnx(learn, tmp_path/'masked.onnx'), dls.valid.one_batch()[:2]
    small = quantize_onnx(source, tmp_path/'int8.onnx', dls.train if way == 'static' else None, valid=dls.valid)
    whole = [to_array(o).tolist() for o in integers(small.file).values() if o.data_type == onnx.TensorProto.INT8]
    assert whole == [learn.model.signs.tolist()]
    assert (small(*xb) - source(*xb)).abs().max() < .05

@pytest.mark.parametrize('name,way', [('mlp', 'static'), ('mlp', 'dynamic'), ('cnn', 'static'), ('table', 'dynamic'), ('lstm', 'dynamic')])
@pytest.mark.parametrize('moved', [True, False], ids=['unsigned', 'signed'])
def test_a_file_of_integers_is_no_source(moved, name, way, folder, tmp_path, monkeypatch):
    "What another tool or an earlier version wrote would be copied, with weights that no processor but some adds exactly"
    if not moved: without_moving(monkeypatch)
    small, dl = quantized(name, way, folder, tmp_path/'int8.onnx')[0], exported(name, folder)[1]
    monkeypatch.undo()
    for source in small, small.file:
        for calibration in None, dl:
            match = r'OnnxModel\(int8.onnx\) computes with integers already \(.*D.*: give the file that `export'
            with pytest.raises(ValueError, match=match): quantize_onnx(source, tmp_path/'again.onnx', calibration, valid=dl, limit=10)
    assert [o.name for o in tmp_path.iterdir()] == ['int8.onnx']
    quantize_onnx(exported(name, folder)[0], tmp_path/'again.onnx', dl if way == 'static' else None, valid=dl, limit=10) # what it says

class Signs(nn.Module):
    "Has small integers, and no weight that the dynamic way knows"
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 10, 8)
        self.register_buffer('signs', torch.tensor([[1, -1]*5, [-1, 1]*5], dtype=torch.int8))

    def forward(self, x, i): return self.layer(x).flatten(1)*self.signs[i]

def test_integers_of_the_model_are_no_quantization(tmp_path):
    dls = loaders([(images(), i%2, 0) for i in range(20)], bs=10)
    dls.n_inp = 2
    source = export_onnx(quiet(Learner(dls, seeded(Signs), CrossEntropyLossFlat())), tmp_path/'signs.onnx')
    assert [o.data_type for o in integers(source.file).values()] == [onnx.TensorProto.INT8]
    with pytest.warns(UserWarning, match='convolutions stay'), pytest.raises(ValueError, match='nothing in .* became integers'):
        quantize_onnx(source, tmp_path/'int8.onnx', valid=dls.valid)
    assert not (tmp_path/'int8.onnx').exists()

def test_attention_of_onnxruntime(tmp_path, monkeypatch):
    "A file from elsewhere, with the operator that onnxruntime has for itself"
    make, value = onnx.helper, lambda name, *shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    stored = [onnx.numpy_helper.from_array(np.random.default_rng(i).uniform(-1, 1, shape).astype(np.float32), name)
        for i, (name, shape) in enumerate([('weight', (32, 96)), ('bias', (96,))])]
    node = make.make_node('Attention', ['x', 'weight', 'bias'], ['y'], name='attention', domain='com.microsoft', num_heads=4)
    graph = make.make_graph([node], 'attention', [value('x', 'batch', 5, 32)], [value('y', 'batch', 5, 32)], stored)
    versions = [make.make_opsetid('', 17), make.make_opsetid('com.microsoft', 1)]
    onnx.save(make.make_model(graph, opset_imports=versions, ir_version=9), tmp_path/'attention.onnx')
    x = torch.rand(20, 5, 32)
    small = quantize_onnx(tmp_path/'attention.onnx', tmp_path/'int8.onnx', valid=[x])
    exact = Integers(small.file)(x)
    assert {o.data_type for o in integers(small.file).values()} == {onnx.TensorProto.UINT8}
    assert (small(x) - exact).abs().max() < 1e-5 and torch.equal(Integers(small.file, in_16_bits)(x), exact)
    without_moving(monkeypatch)
    signed = quantize_onnx(tmp_path/'attention.onnx', tmp_path/'signed.onnx', valid=[x], limit=10)
    assert (Integers(signed.file, in_16_bits)(x) - exact).abs().max() > .1

class Heads(nn.Module):
    "Attention as torch has it"
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(16, 96), nn.Linear(32, 5)

    def forward(self, x):
        qkv = self.qkv(x).view(x.shape[0], 6, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.head(nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape[0], 6, 32).mean(1))

def test_attention_of_onnx(tmp_path):
    "An operator of the same name, from version 23 on, that has no weights: it stays, and what is around it becomes integers"
    learn = quiet(Learner(loaders([(torch.randn(6, 16), 0) for _ in range(40)], bs=20), seeded(Heads), CrossEntropyLossFlat()))
    source, x = export_onnx(learn, tmp_path/'heads.onnx', opset=23), learn.dls.valid.one_batch()[0]
    small = quantize_onnx(source, tmp_path/'int8.onnx', valid=learn.dls.valid)
    found = [o.op_type for o in onnx.load(small.file).graph.node]
    assert found.count('Attention') == 1 and found.count('MatMulInteger') == 2
    assert (small(x) - source(x)).abs().max() < .02
