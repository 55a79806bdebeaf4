"A student that begins with its teacher's weights: what is copied, what is not and why, and that nothing else changes."
import copy, pytest, torch
from fastkd.all import *
from helpers import convnet, learner, same, seeded, state, weights
from torch import nn

class Block(nn.Module):
    "Two linear layers and a norm with running means"
    def __init__(self, width=6, bias=True):
        super().__init__()
        self.inside, self.outside, self.norm = nn.Linear(width, width, bias=bias), nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x): return x + self.norm(self.outside(self.inside(x).relu()))

class Tower(nn.Module):
    "Blocks between an embedding and a head, a parameter and a buffer of its own"
    def __init__(self, n_blocks, width=6, n_out=3, seed=0, make=Block):
        super().__init__()
        torch.manual_seed(seed)
        self.place, self.embed = nn.Parameter(torch.randn(width)), nn.Linear(4, width)
        self.blocks, self.head = nn.ModuleList(make(width) for _ in range(n_blocks)), nn.Linear(width, n_out)
        self.register_buffer('scale', torch.rand(width))
        self.register_buffer('passing', torch.full((1,), float(seed)), persistent=False)
        for block in self.blocks: block.norm.running_mean.normal_()

    def forward(self, x): return self.head(nn.Sequential(*self.blocks)(self.embed(x)*self.scale + self.place))

def pair(n_s=3, n_t=6, **kwargs): return Tower(n_s, **kwargs), Tower(n_t, seed=1)
def values(module): return [*weights(module).values()]
def equal(a, b): return len(values(a)) == len(values(b)) and all(map(torch.equal, values(a), values(b)))

@pytest.mark.parametrize('n_s,n_t,chosen', [(3, 6, [0, 2, 4]), (6, 6, range(6)), (4, 6, [0, 1, 3, 4]), (1, 6, [0]),
    (6, 3, [0, 0, 1, 1, 2, 2])])
def test_blocks_are_taken_evenly(n_s, n_t, chosen):
    "Parameters and buffers of every second one, say; the rest by name"
    student, teacher = pair(n_s, n_t)
    before = state(teacher)
    found = init_from_teacher(student, teacher)
    assert all(equal(block, teacher.blocks[i]) for block, i in zip(student.blocks, chosen))
    assert equal(student.embed, teacher.embed) and equal(student.head, teacher.head)
    assert torch.equal(student.place, teacher.place) and torch.equal(student.scale, teacher.scale) and student.passing == 0
    assert [found.copied[f'blocks.{i}.norm'] for i in range(n_s)] == [f'blocks.{i}.norm' for i in chosen]
    assert found.table['copied'].all() and same(weights(teacher), before[0])

def test_numbers_are_counted():
    student, teacher = pair(n_out=5)
    found = init_from_teacher(student, teacher)
    own, head = 6 + 6, 6*5 + 5
    total = own + 5*6 + head + 3*(2*(6*6 + 6) + 4*6 + 1) # a norm counts its batches, too
    assert found.table['numbers'].sum() == total and repr(found).endswith(f'{total - head} of {total} numbers copied')
    assert 'weight (5, 6), not (3, 6); bias (5,), not (3,)' in repr(found) and 'head' not in found.copied

def test_a_layer_is_copied_as_a_whole():
    "A matrix without a bias is not the teacher's with one; other layers of the block are copied"
    student, teacher = pair(make=lambda width: Block(width, bias=False))
    before, found = weights(student.blocks[1].inside), init_from_teacher(student, teacher)
    assert same(weights(student.blocks[1].inside), before) and equal(student.blocks[1].outside, teacher.blocks[2].outside)
    row = found.table.set_index('student').loc['blocks.1.inside']
    assert not row['copied'] and row['why not'] == "it has weight, the teacher's weight, bias" and row['teacher'] == 'blocks.2.inside'

def test_chosen_layers():
    "Only these; a later pair may be more specific"
    student, teacher = pair()
    before = weights(student)
    layers = {'blocks.0': 'blocks.5', 'blocks.1': 'blocks.4', 'blocks.1.outside': 'blocks.0.inside'}
    found = init_from_teacher(student, teacher, layers)
    assert equal(student.blocks[0], teacher.blocks[5]) and equal(student.blocks[1].inside, teacher.blocks[4].inside)
    assert equal(student.blocks[1].outside, teacher.blocks[0].inside)
    after = weights(student)
    kept = [name for name in before if not name.startswith(('blocks.0', 'blocks.1'))]
    assert same({name: before[name] for name in kept}, {name: after[name] for name in kept})
    assert found.table.set_index('student').loc['head', 'why not'] == 'no layer of the teacher is its partner'

@pytest.mark.parametrize('layers', [['blocks.0', 'head'], ('blocks.0', 'head'), {'blocks.0': 'blocks.0', 'head': 'head'}], ids=repr)
def test_names_that_both_have(layers):
    student, teacher = pair()
    found = init_from_teacher(student, teacher, layers)
    assert set(found.copied) == {'blocks.0.inside', 'blocks.0.outside', 'blocks.0.norm', 'head'} and equal(student.head, teacher.head)
    assert init_from_teacher(student, teacher, 'embed').copied == {'embed': 'embed'}
    with pytest.raises(ValueError, match="teacher has no layer 'blocks.5'"): init_from_teacher(teacher, student, ['blocks.5'])

def test_a_list_chosen():
    "Is taken evenly, too, wherever it is"
    student, teacher = Tower(2), nn.ModuleDict(dict(body=Tower(4, seed=1)))
    init_from_teacher(student, teacher, {'blocks': 'body.blocks'})
    assert equal(student.blocks[1], teacher['body'].blocks[2])

@pytest.mark.parametrize('layers,match', [
    ({'blocks.0': 'blocks.1', 'blokcs.1': 'blocks.2'}, r"student has no layer 'blokcs.1'; nearest: blocks"),
    ({'blocks.0': 'blocks.1', 'blocks.1': 'block.2'}, r"teacher has no layer 'block.2'; nearest: blocks.2")], ids=['student', 'teacher'])
def test_a_wrong_name_changes_nothing(layers, match):
    student, teacher = pair()
    before = weights(student), weights(teacher)
    with pytest.raises(ValueError, match=match): init_from_teacher(student, teacher, layers)
    assert same(weights(student), before[0]) and same(weights(teacher), before[1])

def test_nothing_fits():
    student, teacher = nn.Sequential(nn.Linear(3, 5)), Tower(2)
    before = weights(student)
    with pytest.warns(UserWarning, match='nothing of the teacher fits'): init_from_teacher(student, teacher)
    assert same(weights(student), before)

def test_the_students_tensors_stay_its_own():
    "Identity, dtype, `requires_grad` and gradients; later steps of the student do not reach the teacher"
    student, teacher = pair()
    student.double().embed.requires_grad_(False)
    before, of_teacher = {name: (id(p), p.dtype, p.requires_grad) for name, p in student.named_parameters()}, weights(teacher)
    init_from_teacher(student, teacher)
    assert {name: (id(p), p.dtype, p.requires_grad) for name, p in student.named_parameters()} == before
    assert torch.equal(student.embed.weight, teacher.embed.weight.double()) and student.place.is_leaf and student.place.grad is None
    with torch.no_grad():
        for p in student.parameters(): p.add_(1.)
    for buffer in student.buffers(): buffer.zero_()
    assert same(weights(teacher), of_teacher)
    memory = lambda model: {o.data_ptr() for o in model.state_dict().values()}
    assert not memory(student) & memory(teacher)

def test_learners_and_wrapped_models():
    "Names are those of the plain model, also with the learner's `model.` in front"
    teacher, student = learner(seeded(convnet, 4, seed=1)), learner(nn.DataParallel(seeded(convnet, 4)))
    init_from_teacher(student, teacher, {'model.block1': 'block1'})
    assert equal(student.model.module.block1, teacher.model.block1)
    assert not equal(student.model.module.head[3], teacher.model.head[3])
    found = init_from_teacher(student, teacher)
    assert equal(student.model.module, teacher.model) and found.copied['head.3'] == 'head.3'

@pytest.mark.slow # torch takes its time to load the compiler
def test_compiled_parts():
    "A block within `torch.compile` has the place of the block"
    student, teacher = pair()
    plain = [*student.blocks]
    for i in (0, 2): student.blocks[i] = torch.compile(student.blocks[i])
    for i in range(6): teacher.blocks[i] = torch.compile(teacher.blocks[i])
    found = init_from_teacher(student, teacher, {'blocks.1': 'blocks.3', 'blocks.2._orig_mod.inside': 'blocks.0.outside'})
    assert equal(plain[1], teacher.blocks[3]._orig_mod) and equal(plain[2].inside, teacher.blocks[0]._orig_mod.outside)
    assert '_orig_mod' not in repr(found)

def test_both_are_one():
    "A model is no teacher of itself, and a common part would be written to"
    student, teacher = pair()
    with pytest.raises(ValueError, match="share 'place'"): init_from_teacher(teacher, teacher)
    student.head = teacher.head
    with pytest.raises(ValueError, match="share 'head.weight'"): init_from_teacher(student, teacher)
    with pytest.raises(TypeError, match='modules or Learners are needed, not dict'): init_from_teacher(student, weights(teacher))

def test_a_copied_model_is_the_teacher():
    "Of equal depth, the student answers as its teacher"
    student, teacher = pair(4, 4)
    init_from_teacher(student, copy.deepcopy(teacher))
    x = torch.randn(5, 4)
    assert torch.equal(student.eval()(x), teacher.eval()(x))

def test_a_tensor_that_is_shared_is_written_once():
    "And the table does not say of the second layer that it was copied, unless the teacher shares it, too"
    class Tied(nn.Module):
        def __init__(self, is_tied):
            super().__init__()
            self.embed, self.decode = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            if is_tied: self.decode.weight = self.embed.weight
    student, teacher = Tied(True), Tied(False)
    found = init_from_teacher(student, teacher)
    assert torch.equal(student.embed.weight, teacher.embed.weight) and list(found.copied) == ['embed']
    assert 'weight is shared with a layer above' in found.table['why not'].iloc[1]
    assert list(init_from_teacher(Tied(True), Tied(True)).copied) == ['embed', 'decode']
