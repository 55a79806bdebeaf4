"What a learner knows beyond its model travels with it: the teacher reads raw values as it would on its own, and classes belong to outputs."
import numpy as np, pandas as pd, pytest, re, torch, torch.nn.functional as F, warnings
from fastai.basics import (CategoryBlock, ColReader, CrossEntropyLossFlat, DataBlock, IntToFloatTensor, Learner, Normalize, RandomSplitter,
    RegressionBlock, TransformBlock, accuracy, load_learner)
from fastai.tabular import core
from fastai.tabular.all import Categorify, FillMissing, TabularPandas, TabularProc, tabular_learner
from fastai.text.core import BaseTokenizer
from fastai.text.data import TextBlock
from fastai.vision.all import ImageBlock, PILImage, PILImageBW, Resize, aug_transforms
from fastkd.all import *
from fastkd.callback import as_teacher
from fastkd.learners import class_names, image_size, target_names
from functools import partial
from helpers import At, NoWaiting, error_of, quiet
from torch import nn

KD = KnowledgeDistillationCallback
pytestmark = pytest.mark.filterwarnings("ignore:the teacher's table is coded otherwise", 'ignore:the teacher is right on',
    "ignore:the teacher's classes are in another order")

@pytest.fixture(autouse=True)
def contiguous(monkeypatch):
    "Rows that pandas 3 took out of a frame have strides that fastai's `tensor` cannot read"
    plain = core.tensor
    def tensor(x, *args, **kwargs):
        return torch.as_tensor(np.array(x, order='C')) if isinstance(x, (pd.DataFrame, pd.Series)) else plain(x, *args, **kwargs)
    monkeypatch.setattr(core, 'tensor', tensor)

# ---- Tables

PROCS = Categorify, FillMissing, Normalize
CATS, CONTS = ['city', 'floor', 'garden', 'grade'], ['size', 'rooms', 'year']

def houses(n=240, seed=0):
    "Text, whole numbers, truth values and grades as categories; values are missing among text and sizes"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(city=rng.choice(['ulm', 'bonn', 'jena', 'kiel', 'trier', 'aachen'], n), floor=rng.integers(-1, 4, n),
        garden=rng.random(n) > .5, grade=rng.choice(['poor', 'fair', 'good'], n), size=rng.normal(80, 20, n).round(2),
        rooms=rng.integers(1, 7, n), year=rng.integers(1900, 2020, n), price=rng.choice(['high', 'low'], n)))
    df['size'] = df['size'].where(rng.random(n) > .2)
    df['city'] = df['city'].astype(object).where(rng.random(n) > .1)
    return df

def table(df, procs=PROCS, cats=CATS, conts=CONTS, **kwargs):
    "A learner of a table"
    to = TabularPandas(df.copy(), [*procs], [*cats], [*conts], y_names='price', splits=RandomSplitter(seed=1)(df), **kwargs)
    dls = to.dataloaders(bs=16)
    if cats: return quiet(tabular_learner(dls, layers=[8], metrics=accuracy))
    return quiet(Learner(dls, nn.Identity(), CrossEntropyLossFlat())) # fastai's learner counts the names of each category

def taught(teacher, student):
    "What a teacher is given for the student's training set"
    batch = student.dls.train.new(shuffle=False, drop_last=False, bs=999).one_batch()
    return as_teacher(teacher, student).seen(batch[:-1])

def on_its_own(teacher, df, student):
    "What it loads of the same raw rows"
    raw = df.loc[student.dls.train_ds.items.index].drop(columns='price')
    return teacher.dls.test_dl(raw, bs=999).one_batch()

def agree(teacher, student, df):
    found, expected = taught(teacher, student), on_its_own(teacher, df, student)
    assert [o.dtype for o in found] == [o.dtype for o in expected] == [torch.int64, torch.float32]
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], atol=1e-5, rtol=1e-5)

def of_cities(*names): return lambda df: df[df.city.isin(names)]

def without(df, name): return df[df[name].notna()]

STUDENTS = dict(four_cities=of_cities('bonn', 'kiel', 'jena', 'trier'), one_city=of_cities('trier'), small=lambda df: df[df['size'] < 70],
    nothing_missing=lambda df: df.dropna(), rare_sizes=lambda df: df[df.year > 1990], no_garden=lambda df: df[~df.garden],
    upper_floors=lambda df: df[df.floor > 1])

@pytest.mark.parametrize('name', STUDENTS)
def test_a_part_of_the_table(name):
    "Other categories, means and medians, with and without missing values"
    df = houses()
    agree(table(df), table(STUDENTS[name](df)), df)

COLUMNS = [(CATS[::-1], CONTS[::-1]), (CATS[2:] + CATS[:2], CONTS), (CATS + ['extra'], ['more'] + CONTS)]

@pytest.mark.parametrize('cats,conts', COLUMNS, ids=str)
def test_order_and_presence(cats, conts):
    "Columns by name; what the teacher does not need is left out"
    df = houses()
    df['extra'], df['more'] = df.floor % 2, df.year/7
    agree(table(df), table(df, cats=cats, conts=conts), df)

CONSTANT = FillMissing(core.FillStrategy.constant, fill_vals={'size': -7.})
OTHER_PROCS = [((Categorify, FillMissing), PROCS), (PROCS, (Categorify, FillMissing)), ((FillMissing, Normalize, Categorify), PROCS),
    (PROCS, (Categorify, CONSTANT, Normalize)), (PROCS, (Categorify, FillMissing(add_col=False), Normalize)),
    ((Categorify, FillMissing(core.FillStrategy.mode), Normalize), (Categorify, FillMissing(add_col=False)))]

@pytest.mark.parametrize('procs_s,procs_t', OTHER_PROCS, ids=range(len(OTHER_PROCS)))
def test_other_procs(procs_s, procs_t):
    df = houses()
    agree(table(df, procs_t), table(df[df.year > 1950], procs_s), df)

def test_nothing_to_fill_in():
    "A table without `FillMissing` where nothing is missing: no flag of the teacher's is set"
    df = houses()
    student = df.dropna()
    teacher = table(df)
    agree(teacher, table(student, (Categorify, Normalize)), df)
    assert set(taught(teacher, table(student, (Categorify, Normalize)))[0][:, 4].tolist()) == {1} # False

def test_missing_values_that_stay():
    "What the student leaves missing the teacher fills in"
    df = houses()
    agree(table(df), table(df, (Categorify, Normalize)), df)

def test_filled_after_scaling():
    "Procs are followed in their own order: the median of normalized sizes, and a flag that is no category"
    df = houses()
    def late(add_col):
        proc = FillMissing(add_col=add_col)
        proc.order = 100
        return proc
    agree(table(df, (Categorify, Normalize, late(False))), table(df[df.year > 1950]), df)
    flagged = table(df, (Categorify, Normalize, late(True)), cats=[])
    assert flagged.dls.cat_names == ['size_na'] and 'size_na' not in flagged.dls.procs.categorify.classes
    agree(table(df[df.year > 1950], cats=[]), flagged, df)
    student = table(df[df.year > 1950]) # fastai cannot load raw rows for the flagged one
    missing = df['size'].isna()[student.dls.train_ds.items.index].tolist()
    fill = float(flagged.dls.procs.fill_missing.na_dict['size'])
    cats, conts = taught(flagged, student)
    assert cats[:, 0].tolist() == missing and conts[torch.tensor(missing), 0].unique().tolist() == pytest.approx([fill])

KINDS = [((CATS + ['rooms'], ['size', 'year']), (CATS, CONTS)), ((CATS, CONTS), (CATS + ['rooms'], ['size', 'year'])),
    ((CATS[:1], CONTS + ['floor']), (CATS, CONTS)), ((CATS + ['year'], ['size']), (CATS[:2], CONTS + ['garden', 'grade_'])),
    ((CATS, CONTS), (CATS + ['year'], ['size', 'rooms']))]

@pytest.mark.parametrize('teacher,student', KINDS, ids=range(len(KINDS)))
def test_categories_and_numbers(teacher, student):
    "A column that is a category for one and a number for the other"
    df = houses()
    df['grade_'] = df.grade.map(dict(poor=0., fair=1., good=2.))
    if 'garden' in student[1]: teacher = ([o for o in teacher[0] if o != 'grade'], teacher[1])
    df = df.assign(garden=df.garden.astype(int))
    agree(table(df, cats=teacher[0], conts=teacher[1]), table(df[df.year > 1950], cats=student[0], conts=student[1]), df)

def test_kinds_of_categories():
    "Ordered ones, those of pandas, dates, numbers with gaps: by their names"
    df = houses()
    df['grade'] = pd.Categorical(df.grade, ['poor', 'fair', 'good'], ordered=True)
    some = df[df.grade != 'poor'].copy()
    some['grade'] = pd.Categorical(some.grade.astype(str), ['good', 'fair'], ordered=True)
    teacher, student = table(df), table(some)
    found = taught(teacher, student)[0][:, 3]
    names = some.grade.astype(str)[student.dls.train_ds.items.index]
    assert found.tolist() == names.map(dict(poor=1, fair=2, good=3)).tolist()
    mixed = pd.DataFrame(dict(key=[1, 'a', 2., 'b']*8, price=['low', 'high']*16))
    teacher = table(mixed, (Categorify,), ['key'], [], reduce_memory=True)
    student = table(mixed[mixed.key != 'a'], (Categorify,), ['key'], [], reduce_memory=True)
    names = list(teacher.dls.procs.categorify['key'])
    assert [names[i] for i in taught(teacher, student)[0][:, 0]] == mixed.key[student.dls.train_ds.items.index].tolist()

def test_no_name_that_the_teacher_knows():
    "Of one type they are all unseen; numbers and their names in letters are no categories of one column, nor are truth values and numbers"
    df = houses()
    teacher, other = table(df), df.assign(city='rome')
    with pytest.warns(UserWarning, match="'rome' in 'city', which it never saw, #na#"): as_teacher(teacher, table(other))
    agree(teacher, table(other), other)
    with pytest.raises(ValueError, match="'garden', where .*1.* stands and not .*True"):
        as_teacher(teacher, table(df.assign(garden=df.garden.astype(int))))

@pytest.mark.parametrize('unseen', [['rome'], ['rome', 'oslo']])
def test_names_that_the_teacher_never_saw(unseen):
    "Are what fastai makes of them, and are told"
    df = houses()
    other = df.assign(city=df.city.where(df.city != 'ulm', unseen[0]).where(df.city != 'bonn', unseen[-1]))
    teacher, student = table(df), table(other)
    with pytest.warns(UserWarning, match=f"'{unseen[0]}'.* in 'city', which it never saw, #na#"): as_teacher(teacher, student)
    agree(teacher, student, other)

def test_after_loading(tmp_path):
    "A learner from a file has no rows, and knows as much"
    df, file = houses(), tmp_path/'teacher.pkl'
    teacher = table(df)
    teacher.export(file)
    student = table(of_cities('bonn', 'kiel', 'jena')(df))
    agree(load_learner(file), student, df)
    assert all(map(torch.equal, taught(load_learner(file), student), taught(teacher, student)))

WRAPPED = dict(learner=lambda o: o, list=lambda o: [o], Ensemble=lambda o: Ensemble([o, o]), CachedTeacher=CachedTeacher,
    nested=lambda o: [CachedTeacher(o)])

@pytest.mark.parametrize('teacher_of', WRAPPED.values(), ids=WRAPPED)
def test_in_a_fit(teacher_of):
    "The teacher says what it says on its own, whatever it is wrapped in"
    df = houses()
    teacher, student = table(df), table(of_cities('bonn', 'kiel', 'jena', 'trier')(df))
    teacher.model.layers[-1][0].weight.data *= 20 # answers that differ
    rows = student.dls.train.new(shuffle=False, drop_last=False, bs=999).one_batch()
    own = teacher.get_preds(dl=teacher.dls.test_dl(df.loc[student.dls.train_ds.items.index].drop(columns='price')), act=nn.Identity())[0]
    expected = {tuple(row): pred for row, pred in zip(torch.cat(rows[:2], 1).tolist(), own)}
    seen, said = [], []
    def recorded(pred, teacher_pred):
        said.append(teacher_pred)
        return F.mse_loss(pred, teacher_pred)
    watch = At('after_pred', lambda learn: learn.training and seen.append(learn.xb), nth=0)
    student.fit(1, 1e-3, cbs=[KD(teacher_of(teacher), recorded), watch])
    for xb, pred in zip(seen, said[-len(seen):]): # the first call is that of the probe
        right = torch.stack([expected[tuple(row)] for row in torch.cat(xb, 1).tolist()])
        assert torch.allclose(pred.softmax(1), right.softmax(1), atol=1e-5)
    assert len(seen) == len(student.dls.train) > 3 and own.softmax(1).std(0).min() > .1

def test_nobody_waits():
    "A batch is translated without a look at its numbers on the host"
    df = houses()
    df = df.assign(garden=df.garden.astype(int))
    student = table(df[df.year > 1950], cats=CATS[:1] + CATS[2:], conts=CONTS + ['floor'])
    translate, batch = as_teacher(table(df), student).inputs, student.dls.train.one_batch()[:2]
    with NoWaiting(): found = translate(*batch)
    assert [tuple(o.shape) for o in found] == [(16, 5), (16, 3)]

def test_one_coding_says_nothing():
    "The same loaders, or a table that came out alike: nothing is said and nothing done"
    df = houses()
    teacher = table(df)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert as_teacher(teacher, table(df)).inputs is None
        assert as_teacher(teacher, quiet(tabular_learner(teacher.dls, layers=[4]))).inputs is None

def numbers_as_text(df): return df.assign(floor=df.floor.astype(str))

class Cents(TabularProc):
    "Of the user's own"
    def __init__(self, factor=100): self.factor = factor
    def encodes(self, to): to['rooms'] = to['rooms']*self.factor

class Other(Categorify): "Does the same, as far as anybody knows"

def rooms_as_text(df): return table(df.assign(rooms=df.rooms.map(str)), cats=CATS + ['rooms'], conts=['size', 'year'])
def with_cents(df): return table(df, (Cents, *PROCS))

UNTOLD = Categorify, FillMissing(add_col=False), Normalize

REFUSED = dict(column=(table, lambda df: table(df, conts=['size', 'year']), "needs column 'rooms', which"),
    custom=(with_cents, table, 'beside Cents'), columns=(table, lambda df: table(df, cats=['city']), "'floor', 'garden', 'grade', which"),
    type=(table, lambda df: table(numbers_as_text(df)), r"no category of the student's column 'floor', where '3' \(str\)"),
    names=(table, rooms_as_text, "column 'rooms' holds categories in one table"), number=(rooms_as_text, table, "and '1' is no number"),
    unfilled=(lambda df: table(df.dropna()), table, 'never learned what to fill in'), custom_student=(table, with_cents, 'beside Cents'),
    untold=(table, lambda df: table(df, UNTOLD), "values of column 'size' were missing"),
    factor=(lambda df: table(df, (Cents(10), *PROCS)), with_cents, 'beside Cents'),
    subclass=(table, lambda df: table(df[df.year > 1950], (Other, FillMissing, Normalize)), 'beside Other'))

@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    "Before anything is trained, by name, and `teacher_input` is a way out"
    make_t, make_s, said = REFUSED[name]
    df = houses()
    teacher, student = make_t(df), make_s(df)
    with pytest.raises(ValueError, match=said) as e: as_teacher(teacher, student)
    assert str(e.value).endswith('or pass `teacher_input`, which makes the input of the teacher from that of the student')
    assert error_of(ValueError, student, KD(teacher, SoftTarget)).endswith(str(e.value))
    for own in teacher, [teacher]:
        found = as_teacher(own, student, settings=(logits, lambda *xb: xb, None))
        found = found.teachers[0] if isinstance(found, Ensemble) else found
        assert found.seen((torch.zeros(1, 4), torch.ones(1, 3)))[1].tolist() == [[1., 1., 1.]]

def test_a_fill_that_is_told():
    "What the message about missing values says helps"
    df = houses()
    told = table(df, (Categorify, FillMissing(add_col=True), Normalize))
    agree(table(df), told, df)

def test_procs_of_ones_own_in_both():
    "At the beginning they are of the raw table"
    df = houses()
    procs = Cents(10), Categorify, Normalize
    df = df.dropna()
    agree(table(df, procs), table(df[df.year > 1950], procs), df)

def test_a_student_without_a_table():
    "Whose coding nobody knows"
    teacher = table(houses())
    student = many(['high', 'low'])
    with pytest.warns(UserWarning, match="the student's loaders hold none"): as_teacher(teacher, student)

def test_targets_of_a_table_in_another_order():
    "Several numbers are outputs by the names of their columns"
    df = houses().dropna()
    def of(*names): return quiet(tabular_learner(TabularPandas(df.copy(), [Categorify, Normalize], ['city'], ['size'], y_names=[*names],
        y_block=RegressionBlock(n_out=2), splits=RandomSplitter(seed=1)(df)).dataloaders(bs=16), layers=[4]))
    teacher, student = of('rooms', 'year'), of('year', 'rooms')
    x = student.dls.train.one_batch()[:2]
    with torch.no_grad(): own = teacher.model.eval()(*x)
    assert torch.equal(as_teacher(teacher, student).outputs(x)[0], own[:, [1, 0]])
    assert class_names(student) is None and target_names(student) == [['year', 'rooms']]

# ---- Several targets

ANIMALS, SIZES, AGES = ['cat', 'cow', 'dog'], ['large', 'small'], ['young', 'old']

def point(i): return torch.tensor([float(i % 7), float(i % 5), 1.])
def nth(i, names): return names[i % len(names)]
def number(i): return float(i % 4)

def many(*vocabs, model=None, **kwargs):
    "A learner with a target for each list of names, and for None with a number"
    targets = [RegressionBlock if o is None else CategoryBlock(o, sort=False) for o in vocabs]
    block = DataBlock([TransformBlock, *targets], n_inp=1, get_x=point, splitter=RandomSplitter(.25, seed=0),
        get_y=[number if o is None else partial(nth, names=sorted(o)) for o in vocabs])
    model = model or Several(*(1 if o is None else len(o) for o in vocabs))
    return quiet(Learner(block.dataloaders([*range(32)], bs=8, num_workers=0), model, summed, **kwargs))

def summed(pred, *targets): return sum(o.float().mean() for o in (pred if isinstance(pred, (tuple, list)) else [pred]))

class Several(nn.Module):
    "An output for each target, as `form` says"
    def __init__(self, *widths, form=tuple):
        super().__init__()
        self.heads, self.form = nn.ModuleList([nn.Linear(3, n) for n in widths]), form

    def forward(self, x): return self.form([head(x) for head in self.heads])

def named(outputs): return {name: o for name, o in zip(['animal', 'size', 'age'], outputs)}
def at_once(outputs): return torch.cat(outputs, 1)
def with_hidden(outputs): return {**named(outputs), 'hidden': torch.ones(2)}

X = torch.stack([point(i) for i in range(6)]),

def heads_of(learn):
    with torch.no_grad(): found = learn.model.eval()(*X)
    return [*found.values()] if isinstance(found, dict) else [*found]

ORDERS = [(ANIMALS, SIZES), (ANIMALS, SIZES[::-1]), (ANIMALS[::-1], SIZES), (['dog', 'cat', 'cow'], SIZES[::-1])]

@pytest.mark.parametrize('order', ORDERS, ids=str)
@pytest.mark.parametrize('form,names', [(tuple, '01'), (list, '01'), (named, ['animal', 'size'])])
def test_each_output_by_its_own_classes(order, form, names):
    "By default the first is compared; a field of the output, or `logits`, names another"
    teacher, student = many(ANIMALS, SIZES, model=Several(3, 2, form=form)), many(*order)
    own = heads_of(teacher)
    expected = [own[i][:, [sorted(order[i]).index(name) for name in order[i]]] for i in range(2)]
    pred, fields = as_teacher(teacher, student).outputs(X, layers=names)
    assert torch.equal(pred, expected[0]) and all(torch.equal(fields[name], o) for name, o in zip(names, expected))
    second = lambda output: output[names[1]] if form is named else output[1]
    assert torch.equal(as_teacher(teacher, student, settings=(second, None, None)).outputs(X)[0], expected[1])
    found = [as_teacher(o, student).outputs(X)[0].log_softmax(1) for o in ([teacher], Ensemble([teacher]), CachedTeacher(teacher))]
    assert all(torch.allclose(o, expected[0].log_softmax(1), atol=1e-6) for o in found)

def test_three_heads_and_a_number():
    "Heads of any number and width, some of them without classes"
    orders = ['dog', 'cow', 'cat'], None, SIZES[::-1], AGES
    teacher, student = many(ANIMALS, None, SIZES, AGES[::-1]), many(*orders)
    own, columns = heads_of(teacher), ([2, 1, 0], [0], [1, 0], [1, 0])
    fields = as_teacher(teacher, student).outputs(X, layers='0123')[1]
    assert all(torch.equal(fields[name], o[:, order]) for name, o, order in zip('0123', own, columns))
    assert class_names(student) == orders[0] and target_names(student) == [*orders]
    first_is_a_number = many(None, SIZES)
    assert class_names(first_is_a_number) is None
    turned = as_teacher(many(None, SIZES[::-1]), first_is_a_number)
    assert torch.equal(turned.outputs(X)[0], turned.module.eval()(*X)[0])

def test_parts_of_a_loss_compare_each_output():
    "In a fit: the sum of both outputs' distances, each in the student's order"
    teacher, student = many(ANIMALS, SIZES), many(ANIMALS[::-1], SIZES[::-1])
    state = {name: o.clone() for name, o in student.model.state_dict().items()}
    rows = student.dls.train.new(shuffle=False, drop_last=False, bs=24).one_batch()[0]
    student.dls.train.bs, student.dls.train.drop_last = 24, False
    loss = Logits().on(pred='0', teacher_pred='0') + Logits().on(pred='1', teacher_pred='1')
    student.fit(1, 0., cbs=KD(teacher, loss))
    with torch.no_grad(): own, other = teacher.model.eval()(rows), student.model.eval()(rows)
    expected = [F.mse_loss(other[i], own[i].flip(1)) for i in range(2)]
    found = student.recorder.distillation
    assert all(torch.equal(o, state[name]) for name, o in student.model.state_dict().items())
    assert float(found['distillation_loss'][0]) == pytest.approx(float(sum(expected)), rel=1e-4)

@pytest.mark.parametrize('vocabs', [(ANIMALS,), (ANIMALS, SIZES, AGES)], ids=len)
def test_another_number_of_targets(vocabs):
    "The n-th goes with the n-th, as far as both go"
    teacher, student = many(ANIMALS[::-1], SIZES), many(*vocabs)
    assert torch.equal(as_teacher(teacher, student).outputs(X)[0], heads_of(teacher)[0].flip(1))

def test_other_classes_of_an_output_that_nobody_compares():
    "Matter where it is compared"
    teacher, student = many(ANIMALS[::-1], ['huge', 'tiny']), many(ANIMALS, SIZES)
    found = as_teacher(teacher, student)
    assert torch.equal(found.outputs(X)[0], heads_of(teacher)[0].flip(1))
    with pytest.raises(ValueError, match='output 1: student and teacher were made for other classes.*the teacher has huge'):
        found.outputs(X, ['1'])
    said = error_of(ValueError, many(SIZES, ANIMALS), KD(many(ANIMALS, SIZES), SoftTarget))
    assert 'output 0: student and teacher were made for other classes' in said

UNCLEAR = {r'Tensor \(6, 5\)': at_once, 'tuple of 1': lambda o: (o[0],), 'tuple of 2': lambda o: (torch.cat(o, 1), o[0]),
    'dict of 3': with_hidden}

@pytest.mark.parametrize('what,form', UNCLEAR.items(), ids=UNCLEAR)
def test_outputs_without_a_target(what, form):
    "Are refused before the first step where an order differs, and taken as they are where none does"
    teacher = many(ANIMALS, SIZES, model=Several(3, 2, form=form))
    with pytest.raises(ValueError, match=f'returns no output for each of them but a {what}: build'):
        as_teacher(teacher, many(ANIMALS, SIZES[::-1])).outputs(X)
    with torch.no_grad(): expected = logits(teacher.model.eval()(*X))
    assert torch.equal(as_teacher(teacher, many(ANIMALS, SIZES)).outputs(X)[0], expected)

def test_what_logits_makes_of_two_outputs():
    "A new tensor has no order; one of the outputs has its own, also for a student with that target alone"
    teacher, student = many(ANIMALS, SIZES), many(ANIMALS, SIZES[::-1])
    with pytest.raises(ValueError, match='let it return one of the outputs as it is'):
        as_teacher(teacher, student, settings=(lambda o: o[1]*1., None, None)).outputs(X)
    with torch.no_grad(): expected = teacher.model.eval()(*X)[1].flip(1)
    for learn in student, many(SIZES[::-1]):
        assert torch.equal(as_teacher(teacher, learn, settings=(lambda o: o[1], None, None)).outputs(X)[0], expected)

def test_all_targets_in_one_tensor_in_a_fit():
    "What the message says helps"
    def joined(order): return many(ANIMALS, order, model=Several(3, 2, form=at_once))
    student = joined(SIZES[::-1])
    assert 'CategoryBlock(vocab=…, sort=False)' in error_of(ValueError, student, KD(joined(SIZES), Logits))
    student.fit(1, 1e-3, cbs=KD(joined(SIZES[::-1]), Logits))
    assert student.recorder.values

def test_other_fields_stay_as_they_are():
    "A field that is no output of a target is nobody's to reorder, and a layer is refused where its order is unknown"
    teacher, student = many(ANIMALS, SIZES, model=Several(3, 2, form=with_hidden)), many(ANIMALS, SIZES[::-1])
    assert torch.equal(as_teacher(teacher, student).outputs(X, ['hidden'], pred=False)[1]['hidden'], torch.ones(2))
    said = error_of(ValueError, student, KD(many(ANIMALS, SIZES), Logits().on(pred='1', teacher_pred='heads.1')))
    assert "not the output of its layer 'heads.1'" in said

def test_one_column_for_two_classes():
    "Has no order"
    teacher, student = many(SIZES, model=Several(1, form=lambda o: o[0])), many(SIZES[::-1])
    with pytest.raises(ValueError, match=r'its prediction \(6, 1\) has no column for each of 2 classes'):
        as_teacher(teacher, student).outputs(X)
    assert as_teacher(teacher, many(SIZES)).outputs(X)[0].shape == (6, 1) # what it says helps

def test_names_in_an_exported_file(tmp_path):
    "Are those of the output that is exported, or none"
    onnx = pytest.importorskip('onnx')
    def classes(learn, **kwargs): # noted in the file
        export_onnx(learn, tmp_path/'student.onnx', **kwargs)
        return {o.key: o.value for o in onnx.load(tmp_path/'student.onnx').metadata_props}.get('classes')
    assert classes(many(ANIMALS[::-1], SIZES)) == '["dog", "cow", "cat"]'
    assert classes(many(ANIMALS, SIZES), logits=lambda output: output[1]) is None
    assert classes(many(ANIMALS, SIZES, model=Several(3, 2, form=at_once))) is None
    assert classes(many(None, SIZES)) is None

def test_in_a_cache_on_disk(tmp_path):
    "Each order of classes has answers of its own"
    teacher = many(ANIMALS, SIZES)
    for _ in range(2):
        for order in SIZES, SIZES[::-1]:
            found = as_teacher(CachedTeacher(teacher, tmp_path), many(ANIMALS[::-1], order)).outputs(X, ['1'])
            animals, sizes = heads_of(teacher)
            assert torch.equal(found[0], animals.flip(1))
            assert torch.equal(found[1]['1'], sizes if order == SIZES else sizes.flip(1))

# ---- Texts

SENTENCES = ['a cat sat', 'the Dog sat', 'a dog ran', 'the cow ran far', 'one cat ran']

def text_learner(texts=SENTENCES, tok=None, vocab=None, rules=None, is_lm=False, **kwargs):
    "A learner of sentences that are cut at spaces"
    df = pd.DataFrame(dict(text=texts*8, label=['x', 'y']*4*len(texts)))
    rules = [str.lower] if rules is None else rules
    block = TextBlock.from_df('text', tok=tok or BaseTokenizer(), vocab=vocab, min_freq=1, rules=rules, is_lm=is_lm, **kwargs)
    block = DataBlock(block if is_lm else (block, CategoryBlock), get_x=ColReader('text'), get_y=None if is_lm else ColReader('label'),
        splitter=RandomSplitter(.25, seed=0))
    return quiet(Learner(block.dataloaders(df, bs=4, num_workers=0), nn.Linear(1, 1), CrossEntropyLossFlat()))

def words_of(ids, learn): return [[list(learn.dls.tls[0].vocab)[i] for i in row] for row in ids.tolist()]

ELSEWHERE = [['far away a cat', 'the cow'], ['dog dog dog', 'a fly'], SENTENCES[::-1], ['a cat'], ['the big dog sat']]

@pytest.mark.filterwarnings('ignore:the teacher counts words')
@pytest.mark.parametrize('texts', ELSEWHERE, ids=str)
def test_words(texts):
    "The teacher reads the words of the student's batch, and `xxunk` for those that it never saw, as it would on its own"
    teacher, student = text_learner(), text_learner(texts)
    x = student.dls.train.one_batch()[0]
    found = as_teacher(teacher, student).seen((x,))[0]
    known = set(teacher.dls.tls[0].vocab)
    assert words_of(found, teacher) == [[word if word in known else 'xxunk' for word in row] for row in words_of(x, student)]

def test_words_that_one_of_them_lacks():
    "Are counted and told, on either side"
    with pytest.warns(UserWarning) as said: as_teacher(text_learner(), text_learner(['a big cat', 'the small dog']))
    message, = (str(o.message) for o in said if 'counts words' in str(o.message))
    assert "2 words that it does not know, such as 'big', are xxunk" in message and "does not see 5 words, such as 'ran'" in message
    with pytest.warns(UserWarning) as said: as_teacher(text_learner(), text_learner(SENTENCES[::-1]))
    assert [str(o.message) for o in said] == ["the teacher counts words in another order than the student: its inputs are translated"]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        teacher = text_learner()
        assert as_teacher(teacher, text_learner(['a big cat'], vocab=teacher.dls.tls[0].vocab)).inputs is None # what the page recommends

def test_padding():
    "By the teacher's number; on the side where the student has it, and that is told"
    teacher, student = text_learner(), text_learner(['a cat', 'the cow ran far'])
    for learn, number in (teacher, 5), (student, 6):
        for dl in learn.dls.loaders: dl.before_batch.fs[0].pad_idx = number
    x = student.dls.train.new(bs=12).one_batch()[0]
    with pytest.warns(UserWarning, match='counts words'): found = as_teacher(teacher, student).seen((x,))[0]
    assert torch.equal(found == 5, x == 6) and (x == 6).any()
    assert words_of(found[x != 6][None], teacher) == words_of(x[x != 6][None], student)
    with pytest.warns(UserWarning, match='counts words'): found = as_teacher(teacher, text_learner())
    assert found.seen((torch.arange(12)[None],))[0].tolist() == [[0, 5, *range(2, 12)]]
    teacher.dls.train.before_batch.fs[0].pad_first = False
    with pytest.warns(UserWarning, match=r'at the beginning and the teacher.*were at the end: .*pad_first=False'):
        as_teacher(teacher, text_learner())
    student = text_learner()
    for dl in student.dls.loaders: dl.before_batch.fs[0].pad_first = False
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        as_teacher(teacher, student)
    assert not [o for o in said if 'filled up' in str(o.message)] # what it says helps

READ_OTHERWISE = [(dict(rules=[]), r"rules: \['lower'\] and \[\]"), (dict(rules=[str.upper]), 'rules: '),
    (dict(texts=['ein hund', 'eine katze']), "lacks 4 of the student's words"), (dict(backwards=True), "direction: 'forwards' and"),
    (dict(tok=BaseTokenizer('-')), "settings: {'split_char': ' '} and {'split_char': '-'}")]

@pytest.mark.parametrize('settings,said', READ_OTHERWISE, ids=range(len(READ_OTHERWISE)))
def test_texts_that_are_read_otherwise(settings, said):
    teacher, student = text_learner(**settings), text_learner()
    if 'texts' in settings: teacher, student = student, teacher
    with pytest.raises(ValueError, match=said) as e: as_teacher(teacher, student)
    assert 'or pass `teacher_input`' in str(e.value)
    assert as_teacher(teacher, student, settings=(logits, lambda x: x + 1, None)).seen((torch.zeros(2),))[0].tolist() == [1., 1.]

class Letters(BaseTokenizer):
    "Of the user's own"
    def __call__(self, items): return (list(o) for o in items)

def test_another_tokenizer():
    with pytest.raises(ValueError, match="tokenizer: 'BaseTokenizer' and 'Letters'"):
        as_teacher(text_learner(tok=Letters()), text_learner())

def test_a_text_learner_from_a_file(tmp_path):
    teacher, student = text_learner(rules=[]), text_learner(SENTENCES[::-1], rules=[])
    teacher.export(tmp_path/'teacher.pkl')
    loaded, x = load_learner(tmp_path/'teacher.pkl'), student.dls.train.one_batch()[0]
    with pytest.warns(UserWarning, match='counts words'): found = as_teacher(loaded, student).seen((x,))[0]
    assert words_of(found, teacher) == words_of(x, student)
    with pytest.raises(ValueError, match='rules: '): as_teacher(loaded, text_learner())

def test_language_models():
    "Words are what they read and what they say"
    teacher, student = text_learner(is_lm=True), text_learner(SENTENCES[::-1], is_lm=True)
    words, words_t = (list(learn.dls.vocab) for learn in (student, teacher))
    assert class_names(student) == words != words_t
    with pytest.warns(UserWarning): found = as_teacher(teacher, student, axis=-1)
    x = torch.arange(12)[None]
    assert [words_t[i] for i in found.seen((x,))[0][0]] == words[:12]
    said = F.one_hot(torch.tensor([words_t.index('cow')]), len(words_t))[None].float()
    assert words[int(found.logits(said).argmax())] == 'cow'

def left(i): return ANIMALS[i % 3]
def right(i): return SIZES[i % 2]

def pairs(*vocabs):
    "A learner whose two inputs are categories"
    block = DataBlock([CategoryBlock(o, sort=False) for o in (*vocabs, AGES)], n_inp=2, get_x=[left, right], get_y=partial(nth, names=AGES),
        splitter=RandomSplitter(.25, seed=0))
    return quiet(Learner(block.dataloaders([*range(32)], bs=8, num_workers=0), nn.Identity(), CrossEntropyLossFlat()))

@pytest.mark.filterwarnings('ignore:the teacher counts words')
def test_categories_as_inputs():
    "Each input by its own vocabulary"
    teacher, student = pairs(ANIMALS[::-1], SIZES[::-1] + ['tiny']), pairs(ANIMALS, SIZES)
    a, b, _ = student.dls.train.one_batch()
    found = as_teacher(teacher, student).seen((a, b))
    assert found[0].tolist() == (2 - a).tolist() and found[1].tolist() == (1 - b).tolist()
    with pytest.raises(ValueError, match=r"lacks 1 of the student's words, such as \['tiny'\]"): as_teacher(student, teacher)

# ---- Images

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 10, 3), dtype='uint8')

def picture(i): return PIXELS[i]

def images(cls=PILImage, size=8, stats=None, div=255., batch_tfms=(), n=1):
    "A learner of pictures, `n` of them for a sample"
    block = ImageBlock(cls)
    block.batch_tfms = [IntToFloatTensor(div=div)] if div else []
    norm = [] if stats is None else [Normalize.from_stats(*stats, cuda=False)]
    block = DataBlock((*[block]*n, CategoryBlock(AGES)), n_inp=n, get_x=[picture]*n, get_y=partial(nth, names=AGES),
        splitter=RandomSplitter(.5, seed=0), item_tfms=Resize(size, method='squish') if size else None, batch_tfms=[*batch_tfms, *norm])
    return quiet(Learner(block.dataloaders([*range(8)], bs=4, num_workers=0, shuffle=False), nn.Identity(), CrossEntropyLossFlat()))

RGB, OTHER = ([.5, .4, .3], [.2, .3, .4]), ([.1, .2, .3], [.7, .6, .5])

def batch_of(learn): return learn.dls.train.new(shuffle=False).one_batch()[:-1]

SCALES = [(dict(stats=RGB), dict(stats=OTHER)), (dict(stats=RGB), {}), ({}, dict(stats=RGB)), (dict(div=127.5), {}),
    (dict(div=1., stats=([127.]*3, [50.]*3)), dict(stats=OTHER)), (dict(stats=RGB, n=2), dict(stats=OTHER, n=2)),
    (dict(stats=RGB), dict(div=None)), (dict(stats=RGB, batch_tfms=[Normalize.from_stats(*OTHER, cuda=False)]), dict(stats=OTHER))]

@pytest.mark.filterwarnings("ignore:the teacher's images were normalized")
@pytest.mark.parametrize('teacher,student', SCALES, ids=range(len(SCALES)))
def test_scale_of_images(teacher, student):
    "The teacher sees what its own loader makes of the same pictures"
    teacher, student = images(**teacher), images(**student)
    found = as_teacher(teacher, student).seen(batch_of(student))
    assert len(found) == len(batch_of(teacher)) and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, batch_of(teacher)))

@pytest.mark.parametrize('of', [dict(stats=RGB), {}, dict(div=None)], ids=str)
def test_one_scale_says_nothing(of):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert as_teacher(images(**of), images(**of)).inputs is None

@pytest.mark.parametrize('kinds', [(PILImage, PILImageBW), (PILImageBW, PILImage)])
def test_another_mode(kinds):
    teacher, student = map(images, kinds)
    with pytest.raises(ValueError, match="of mode '(L|RGB)' and the teacher's of mode '(L|RGB)'"): as_teacher(teacher, student)
    assert as_teacher(teacher, images(kinds[0])).inputs is None # what it says helps

SIZED = [(dict(size=(6, 9)), (6, 9)), (dict(batch_tfms=aug_transforms(size=5)), (5, 5)), (dict(size=None), None),
    (dict(size=9, batch_tfms=aug_transforms(size=(5, 7))), (5, 7))]

@pytest.mark.parametrize('of,size', SIZED, ids=range(len(SIZED)))
def test_image_size(of, size):
    learn = images(**of)
    assert image_size(learn) == size and (size is None or learn.dls.valid.one_batch()[0].shape[-2:] == size)

@pytest.mark.filterwarnings("ignore:the teacher's images were normalized")
@pytest.mark.parametrize('stats', [(RGB, RGB), (RGB, OTHER), (None, RGB)], ids=['same', 'other', 'none'])
def test_another_size(stats):
    "Is told with a line that helps, whatever the images are normalized by"
    teacher, learn = images(size=(12, 10), stats=stats[0]), images(size=6, stats=stats[1])
    with pytest.warns(UserWarning, match='trained on images of 12×10 and sees') as said: found = as_teacher(teacher, learn)
    assert found.seen(batch_of(learn))[0].shape == (4, 3, 6, 6) # the very batch, as long as nobody says otherwise
    line = next(str(o.message) for o in said if '12×10' in str(o.message)).partition('teacher_input=')[2].partition(' it sees')[0]
    names = dict(F=F, learn=learn, teacher=teacher)
    for imports in re.findall('(?<=after `).*(?=`)', '\n'.join(str(o.message) for o in said)): exec(imports, names)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = as_teacher(teacher, learn, settings=(logits, eval(line, names), None)).seen(batch_of(learn))[0]
    assert found.shape == (4, 3, 12, 10)
    small = images(size=6, stats=stats[0])
    assert torch.allclose(found, F.interpolate(batch_of(small)[0], (12, 10), mode='bilinear'), atol=1e-4)
