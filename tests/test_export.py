"What is in an exported file, that it says what torch says, and what its eight-bit version loses."
import copy, json, numpy as np, onnx, PIL.Image, pickle, pytest, re, sys, torch
from fastai.basics import CrossEntropyLossFlat, Learner, set_seed
from fastai.metrics import accuracy
from fastkd.all import FitNet, KnowledgeDistillationCallback, SoftTarget
from fastkd.demo import digits
from fastkd.export import OnnxModel, _lost, export_onnx, export_program, quantize_onnx, traced
from fastkd.report import report
from functools import cache
from helpers import (At, convnet, fitted, is_unchanged, learner, loaders, n_hooks, named_learner, quiet, same, seeded, state,
    trained_teacher, weights)
from pathlib import Path
from torch import nn

class Tokens(nn.Module):
    "A small transformer that reads a digit row by row"
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width)*.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2*width, dropout=0., batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 10)

    def forward(self, x): return self.head(self.encoder(self.embed(x.squeeze(1)) + self.place).mean(1))

MODELS = dict(cnn=(lambda: convnet(8), 6, 2e-2), transformer=(Tokens, 12, 1e-2))

@cache
def trained(name):
    "A learner that reads the digits of the demo well"
    set_seed(0)
    data, (make, n_epoch, lr) = digits(), MODELS[name]
    dls = loaders(list(zip(*data['pool'])), list(zip(*data['valid'])), bs=50)
    learn = quiet(Learner(dls, make(), CrossEntropyLossFlat(), metrics=accuracy))
    learn.fit_one_cycle(n_epoch, lr)
    return learn

def small(**kwargs): return learner(n=50, **kwargs)

def test_the_student_alone(tmp_path):
    "In the middle of a fit with a teacher and an adapter, the file holds the student's weights and nothing else"
    learn, made, before = small(), [], []
    def export(learn):
        before.append(state(learn.model))
        made.append(export_onnx(learn, tmp_path/'student.onnx'))
        assert is_unchanged(learn.model, before[0]) and learn.model.training
        x, model = learn.xb[0], copy.deepcopy(learn.model).eval()
        for n in (1, 7): assert torch.allclose(made[0](x[:n]), model(x[:n]), atol=1e-5)
    cb = KnowledgeDistillationCallback(trained_teacher(), SoftTarget(T=2) + FitNet().on('block2', 'block2'))
    learn.fit(1, cbs=[cb, At('after_step', export, order=60)])
    stored = onnx.load(tmp_path/'student.onnx').graph.initializer
    n_own = sum(o.numel() for o in learn.model.state_dict().values())
    assert sum(torch.Size(o.dims).numel() for o in stored) <= n_own + 10 # reshapes have constants
    assert {16, 32} & {n for o in stored for n in o.dims} == set() # channels of teacher and adapter; the student has 4 and 8
    found = report(made[0], learn, n_runs=1, batch_sizes=3)
    assert found.table.student['file, bytes'] == (tmp_path/'student.onnx').stat().st_size
    assert found.table.student.isna()['MACs per sample'] and found.table.student['latency p50, ms (bs 3, CPU threads: 1)'] > 0
    assert b'site-packages' not in (tmp_path/'student.onnx').read_bytes() and b'helpers.py' not in (tmp_path/'student.onnx').read_bytes()
    assert [o.name for o in tmp_path.iterdir()] == ['student.onnx'] and n_hooks(learn.model) == 0

EXPORTS = [(export_onnx, 'student.onnx'), (export_program, 'student.pt2')]

@pytest.mark.parametrize('export,name', EXPORTS)
def test_a_wrong_file_is_not_kept(export, name, tmp_path):
    (tmp_path/name).write_bytes(b'the one before')
    with pytest.raises(RuntimeError, match='was not kept'): export(small(), tmp_path/name, tolerance=-1)
    assert [o.read_bytes() for o in tmp_path.iterdir()] == [b'the one before']

class Alone(nn.Module):
    "A model that treats a sample alone otherwise, as what normalizes over the batch does"
    def __init__(self):
        super().__init__()
        self.model = convnet(4)

    def forward(self, x): return self.model(x)*(2 if x.shape[0] == 1 else 1)

def test_a_batch_of_one_is_checked(tmp_path):
    with pytest.raises(RuntimeError, match='a batch of 1 the exported file differs'): export_onnx(small(model=Alone()), tmp_path/'a.onnx')
    assert [*tmp_path.iterdir()] == []

@pytest.mark.parametrize('export,name', EXPORTS)
def test_places_of_files(export, name, tmp_path):
    "Said before the student is traced; folders are made"
    learn = small()
    with pytest.raises(ValueError, match=r"ends in '\.(onnx|pt2)', and not as 'student\.bin' does"): export(learn, tmp_path/'student.bin')
    (tmp_path/'file').touch()
    with pytest.raises(FileExistsError, match=f'{tmp_path}/file'): export(learn, tmp_path/'file'/name)
    export(learn, tmp_path/'a'/'b'/name)
    assert [o.name for o in (tmp_path/'a'/'b').iterdir()] == [name]

@pytest.mark.parametrize('name', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_packages(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    said = rf'an ONNX file needs {name}: pip install "fastkd\[onnx\]"'
    with pytest.raises(ImportError, match=said): export_onnx(small(), tmp_path/'a.onnx')

class Two(nn.Module):
    "Two inputs, and a dict of answers"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(3, 10)

    def forward(self, x, z): return dict(hidden=x, logits=self.a(x.flatten(1)) + self.b(z))

def test_programs(tmp_path):
    "Several inputs, a dict of outputs, batches of any size, no class needed"
    items = [(x, torch.randn(3), y) for x, y in zip(*[o[:20] for o in digits()['pool']])]
    dls = loaders(items, bs=10)
    dls.n_inp = 2
    learn = quiet(Learner(dls, Two(), CrossEntropyLossFlat()))
    rng = torch.get_rng_state()
    program = torch.export.load(export_program(learn, tmp_path/'student.pt2')).module()
    assert torch.equal(torch.get_rng_state(), rng)
    for n in (1, 5):
        xb = torch.randn(n, 1, 8, 8), torch.randn(n, 3)
        assert torch.allclose(program(*xb), learn.model(*xb)['logits'], atol=1e-6)

class Fields(nn.Module):
    "One input, a dict, whose order is not that of its use; what it is given, it writes to"
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, fields): return self.a(fields['a'].flatten(1)) - 2*self.b(fields['b'].sub_(.5).flatten(1))

def test_nested_inputs(tmp_path):
    items = [(dict(b=x, a=-x), y) for x, y in zip(*[o[:20] for o in digits()['pool']])]
    learn = quiet(Learner(loaders(items, bs=10), Fields(), CrossEntropyLossFlat()))
    made = export_onnx(learn, tmp_path/'student.onnx')
    program = torch.export.load(export_program(learn, tmp_path/'student.pt2')).module()
    fields = learn.dls.valid.one_batch()[0]
    copied = lambda: {name: x.clone() for name, x in fields.items()}
    expected = learn.model(copied())
    for model in (made, program): assert torch.allclose(model(copied()), expected, atol=1e-5)
    for model in (made, program): assert torch.allclose(model({name: copied()[name] for name in 'ab'}), expected, atol=1e-5)
    small = quantize_onnx(made, tmp_path/'int8.onnx', learn.dls.train, limit=1)
    assert torch.allclose(small(fields), expected, atol=.2)

class Busy(nn.Module):
    "Counts its calls and draws numbers, in evaluation as well"
    def __init__(self):
        super().__init__()
        self.model = convnet(4)
        self.register_buffer('n_calls', torch.zeros(()))

    def forward(self, x):
        self.n_calls += 1
        return self.model(x) + 0*torch.rand(x.shape[0], 1)

@pytest.mark.parametrize('export,name', EXPORTS)
def test_a_fit_goes_on_as_if_nothing_had_been(export, name, tmp_path):
    "Between the student's prediction and what a loss makes of its layers, under autocast and with failures on the way"
    found = []
    def act(learn):
        before = torch.get_rng_state()
        with torch.autocast('cpu', torch.bfloat16): export(learn, tmp_path/name)
        with pytest.raises(RuntimeError, match='not kept'): export(learn, tmp_path/name, tolerance=-1)
        assert torch.equal(torch.get_rng_state(), before) and learn.model.training
    for cbs in ([], [At('after_pred', act, order=-60)]):
        cb = KnowledgeDistillationCallback(trained_teacher(), SoftTarget(T=2) + FitNet().on('model.block2', 'block2'))
        learn = fitted(small(model=seeded(Busy)), [cb, *cbs], n_epoch=1)
        found.append(weights(learn.model))
        assert n_hooks(learn.model) == 0
    assert same(*found)

def test_a_program_is_the_student_of_that_moment():
    learn = small()
    x, program = learn.dls.valid.one_batch()[0], traced(learn).module()
    before = program(x)
    learn.fit(1, 1e-1)
    assert torch.equal(program(x), before)

def test_dimensions_that_vary():
    words = [(torch.randint(20, (6,)), 0) for _ in range(8)]
    model = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 5))
    learn = quiet(Learner(loaders(words, bs=4), model, CrossEntropyLossFlat()))
    x = torch.randint(20, (3, 9))
    assert torch.equal(traced(learn, dynamic={1: 'length'}).module()(x), model(x))

@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_accuracy_of_files(name, tmp_path):
    "On the digits, ONNX is as accurate as torch, and eight bits within a point"
    learn = trained(name)
    score = 100*learn.validate()[1]
    assert score > 90
    exported = export_onnx(learn, tmp_path/'student.onnx')
    int8 = quantize_onnx(exported, tmp_path/'int8.onnx', dl=learn.dls.train if name == 'cnn' else None, valid=learn.dls.valid)
    found = {model.file.stem: report(model, learn, n_runs=3, batch_sizes=1) for model in (exported, int8)}
    assert abs(found['student'].table.student['accuracy, %'] - score) <= .1
    assert abs(found['int8'].table.student['accuracy, %'] - score) <= 1
    assert found['int8'].table.student['agreement, %'] >= 98
    if name == 'transformer': assert int8.file.stat().st_size < .6*exported.file.stat().st_size # a tiny CNN is mostly its graph
    kinds = {o.data_type for o in onnx.load(int8.file).graph.initializer if len(o.dims) > 1}
    assert onnx.TensorProto.UINT8 in kinds and onnx.TensorProto.INT8 not in kinds # so that every processor adds alike

def kinds(model): return {o.op_type for o in onnx.load(model.file).graph.node}

def test_eight_bits_are_checked(tmp_path):
    "Calibration without content is seen by itself, too narrow ranges by other data; a file that says something else is not kept"
    learn = trained('cnn')
    source, x = export_onnx(learn, tmp_path/'student.onnx'), learn.dls.valid.one_batch()[0]
    for dl in ([(x*0,)], [(x[:1].expand(20, -1, -1, -1),)], [x*0]):
        with pytest.raises(RuntimeError, match='inf of their variance .* it was not kept'): quantize_onnx(source, tmp_path/'int8.onnx', dl)
    with pytest.raises(RuntimeError, match='it was not kept'): quantize_onnx(source, tmp_path/'int8.onnx', [(x/4,)], valid=learn.dls.valid)
    with pytest.raises(RuntimeError, match='more than limit=-1'): quantize_onnx(source, tmp_path/'int8.onnx', valid=[x], limit=-1)
    assert [o.name for o in tmp_path.iterdir()] == ['student.onnx']
    before = learn.dls.train.rng.getstate(), torch.get_rng_state()
    quantize_onnx(source, tmp_path/'ready.onnx', learn.dls.train, valid=learn.dls.valid, limit=.05)
    assert learn.dls.train.rng.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])

def test_random_states_of_loaders_stay(tmp_path):
    "A loader of torch draws a number as it begins"
    learn = small()
    source, data = export_onnx(learn, tmp_path/'student.onnx'), digits()['pool'][0][:40]
    loader, before = torch.utils.data.DataLoader([(x,) for x in data], 10), torch.get_rng_state()
    quantize_onnx(source, tmp_path/'int8.onnx', loader, limit=10)
    assert torch.equal(torch.get_rng_state(), before)

def test_what_is_lost():
    "Squared error over variance, whatever the batches, with lengths that vary"
    samples = [torch.randn(n, length, 5) for n, length in [(4, 3), (2, 3), (1, 3), (3, 2)]]
    feed = iter([dict(x=o.numpy()) for o in samples])
    class Batches:
        def get_next(self): return next(feed, None)
    groups = [torch.cat(samples[:3]), samples[3]]
    expected = sum(.01*o.numel() for o in groups)/sum((o - o.mean(0)).pow(2).sum() for o in groups)
    assert _lost(lambda x: x, lambda x: x + .1, Batches()) == pytest.approx(expected.item(), rel=1e-4)

def test_a_file_is_not_its_own_source(tmp_path):
    made = export_onnx(small(), tmp_path/'student.onnx')
    (tmp_path/'link.onnx').symlink_to(made.file)
    for file in (str(made.file), tmp_path/'a'/'..'/'student.onnx', tmp_path/'link.onnx'):
        for model in (made, made.file):
            with pytest.raises(ValueError, match=r'OnnxModel\(student.onnx\) would be overwritten'): quantize_onnx(model, file)
    assert made.file.read_bytes() == made.content

def test_the_dynamic_way_leaves_convolutions(tmp_path):
    learn = small()
    exported = export_onnx(learn, tmp_path/'student.onnx')
    with pytest.warns(UserWarning, match='convolutions stay as they are without calibration batches: dl=learn.dls.train'):
        int8 = quantize_onnx(exported, tmp_path/'int8.onnx', valid=learn.dls.valid)
    assert {'Conv', 'MatMulInteger'} <= kinds(int8) and 'ConvInteger' not in kinds(int8)
    alone = small(model=nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()))
    source = export_onnx(alone, tmp_path/'alone.onnx')
    with pytest.raises(ValueError, match='nothing in .*alone.onnx.* became integers: convolutions need'):
        quantize_onnx(source, tmp_path/'none.onnx', valid=alone.dls.valid)
    assert not (tmp_path/'none.onnx').exists()

def test_a_model_stays_what_its_file_was(tmp_path):
    "When the file is written anew or goes, whatever the number of threads"
    learn = small()
    model, x = export_onnx(learn, tmp_path/'student.onnx'), learn.dls.valid.one_batch()[0]
    before = model(x)
    learn.fit(1, 1e-1)
    export_onnx(learn, tmp_path/'student.onnx')
    (tmp_path/'student.onnx').unlink()
    torch.set_num_threads(2)
    assert torch.allclose(pickle.loads(pickle.dumps(model))(x), before, atol=1e-5) and torch.allclose(model(x), before, atol=1e-5)
    assert model.costs['bytes'] == len(model.content)

@pytest.mark.slow
def test_models_from_files_are_models(tmp_path):
    "They validate, count their threads, and are copied and pickled"
    learn = small()
    model = export_onnx(learn, tmp_path/'student.onnx')
    other = quiet(Learner(learn.dls, model, CrossEntropyLossFlat(), metrics=accuracy))
    assert list(other.validate()) == pytest.approx(list(learn.validate()), abs=1e-4)
    x = learn.dls.valid.one_batch()[0]
    again = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), OnnxModel(str(model.file))
    assert all(torch.equal(o(x), model(x)) for o in again)
    torch.set_num_threads(2)
    assert torch.allclose(model(x), learn.model.eval()(x), atol=1e-5) and {*model.sessions} == {1, 2}
    with pytest.raises(ValueError): model(x, x)

def test_what_the_file_says_of_itself(tmp_path):
    "The batch has its name, and classes have theirs, in eight bits as well"
    exported = export_onnx(named_learner(convnet(4)), tmp_path/'student.onnx')
    small = quantize_onnx(exported, tmp_path/'small.onnx', learner().dls.train)
    for model in (exported, small):
        said = json.loads(model.session().get_modelmeta().custom_metadata_map['classes'])
        assert said == [*'abcdefghij'] and [o.get_inputs()[0].shape[0] for o in [model.session()]] == ['batch']

def test_a_learner_without_data(tmp_path):
    "As `load_learner` brings it back: another loader traces it"
    loaded = learner()
    valid, loaded.dls.loaders = loaded.dls.valid, [dl.new([]) for dl in loaded.dls.loaders]
    for export, file in ((export_onnx, 'student.onnx'), (export_program, 'student.pt2')):
        with pytest.raises(ValueError, match='a learner that was loaded has no data, so give it dl='): export(loaded, tmp_path/file)
        assert not (tmp_path/file).exists()
        assert Path(getattr(export(loaded, tmp_path/file, dl=valid), 'file', tmp_path/file)).exists()

def test_what_is_no_learner(tmp_path):
    with pytest.raises(TypeError, match='a Learner is exported, and not Sequential'): export_onnx(nn.Sequential(), tmp_path/'a.onnx')
    with pytest.raises(TypeError, match=r'a file is loaded first, load_learner\(file\)'): export_onnx('student.pkl', tmp_path/'a.onnx')
    with pytest.raises(TypeError, match=r'a file is loaded first, OnnxModel\(file\)'): report('a.onnx', learner(convnet(4)))
    with pytest.raises(TypeError, match=r'a file is loaded first, model.load_state'): report(learner(convnet(4)), Path('a.pth'))
    with pytest.raises(TypeError, match='what `export_onnx` returned is quantized, and not Learner'):
        quantize_onnx(learner(), tmp_path/'a.onnx')
    exported = export_onnx(learner(), tmp_path/'student.onnx')
    with pytest.raises(TypeError, match='dl=dls.train, and not dls'): quantize_onnx(exported, tmp_path/'a.onnx', learner().dls)
    with pytest.raises(ValueError, match='nothing to check the file with: say valid='): quantize_onnx(exported, tmp_path/'a.onnx')
    with pytest.raises(TypeError, match='more than once: give a loader or a list'):
        quantize_onnx(exported, tmp_path/'a.onnx', iter(learner().dls.train))
    with pytest.raises(TypeError, match='an export takes the batches of one loader: dl=dls.valid, and not dls'):
        export_onnx(learner(), tmp_path/'a.onnx', dl=learner().dls)
    with pytest.raises(TypeError, match=r'export_onnx\(learner, file\): a Learner is exported, and not str'):
        export_onnx('a.onnx', learner())

def test_a_picture_is_read_as_fastai_reads_it(tmp_path):
    "The lines of the page, for pictures in colour of any shape, beside fastai's own loader"
    from fastai.vision.all import ImageDataLoaders, Normalize, Resize, imagenet_stats
    rng, page = np.random.default_rng(0), (Path(__file__).parent.parent/'nbs'/'43_export.ipynb').read_text()
    (lines,) = [o for cell in json.loads(page)['cells'] for o in re.findall('```python\n(.*?)```', ''.join(cell['source']), re.DOTALL)
        if 'swan.png' in o]
    for i in range(6):
        pixels = rng.integers(0, 255, (*rng.integers(33, 70, 2), 3), dtype='uint8')
        PIL.Image.fromarray(pixels).save(tmp_path/f'{"ab"[i%2]}{i}.png')
    files = sorted(tmp_path.glob('*.png'))
    dls = ImageDataLoaders.from_path_func(tmp_path, files, lambda o: o.name[0], item_tfms=Resize(32), num_workers=0, bs=2,
        batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False), device='cpu')
    normalize = dls.train.after_batch.normalize
    for file in files:
        found = dict(np=np, PIL=PIL, mean=normalize.mean.cpu().numpy(), std=normalize.std.cpu().numpy())
        exec(lines.replace("'swan.png'", f'{str(file)!r}'), found)
        expected = dls.test_dl([file]).one_batch()[0].numpy()
        assert found['pixels'].dtype == np.float32 and np.abs(found['pixels'] - expected).max() < 1e-4

class RulesOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = convnet(4)

    def forward(self, x): return self.model(x).masked_fill(torch.arange(10) == 3, -torch.inf)

def test_a_class_that_is_ruled_out(tmp_path):
    "-inf in both is no difference"
    made = export_onnx(learner(RulesOut()), tmp_path/'student.onnx')
    assert (made(torch.zeros(2, 1, 8, 8))[:, 3] == -torch.inf).all()
