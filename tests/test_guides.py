"Pages that are made from something else say what it says now: the reference from the package, the benchmarks from their tables."
import fastkd.all, inspect, json, pytest
from importlib import import_module
from pathlib import Path

NBS, BENCHMARKS = (Path(__file__).resolve().parent.parent/o for o in ('nbs', 'benchmarks'))
PUBLIC = {name: o for name, o in vars(fastkd.all).items() if not name.startswith('_')}

def code_cells(page): return [cell for cell in json.loads((NBS/page).read_text())['cells'] if cell['cell_type'] == 'code']

@pytest.fixture(scope='module')
def cells(): return code_cells('70_guide.reference.ipynb')

@pytest.fixture
def made(cells, monkeypatch):
    "What the code of the page makes now"
    monkeypatch.chdir(NBS)
    found = {}
    for cell in cells: exec(''.join(cell['source']), found)
    return found

def test_table_is_fresh(cells, made):
    shown, = cells[-1]['outputs']
    assert ''.join(shown['data']['text/markdown']) == made['table']

def test_every_name_is_there_once(made): assert sorted(name for _, name in made['exported']) == sorted(PUBLIC)

def test_rooms_exist(made): assert all((NBS/path.name).exists() for path in made['room_of'].values())

def test_every_name_has_a_docstring():
    "Classes have their own, not that of their base"
    assert [name for name, o in PUBLIC.items() if (inspect.isclass(o) or callable(o)) and not o.__doc__] == []

def test_benchmarks_are_fresh(monkeypatch):
    "The page shows the tables of the folder"
    monkeypatch.chdir(NBS)
    found, shown = {}, 0
    for cell in code_cells('69_guide.benchmarks.ipynb'):
        source = ''.join(cell['source'])
        if source.startswith('#| hide'): exec(source, found)
        if 'table(' not in source or not cell['outputs']: continue
        assert ''.join(cell['outputs'][0]['data']['text/markdown']) == eval(source.splitlines()[-1], found).data, source
        shown += 1
    assert shown == 12

def test_counts_are_fresh():
    "How many losses, settings and planted defects there are"
    found, cells = {}, code_cells('68_guide.checked.ipynb')
    counts = next(i for i, cell in enumerate(cells) if "'planted defects'" in ''.join(cell['source']))
    for cell in cells[:counts]: exec(''.join(cell['source']), found)
    first, counted = ''.join(cells[counts]['source']).split('\n', 1)
    exec(first, found)
    assert eval(''.join(cells[counts]['outputs'][0]['data']['text/plain'])) == eval(counted, found)

@pytest.mark.parametrize('name', ['fashion', 'traps', 'unlabelled'])
def test_tables_say_what_was_measured(name):
    "The Markdown is that of the numbers beside it"
    told = import_module(f'benchmarks.{name}').told
    assert told(json.loads((BENCHMARKS/f'{name}.json').read_text())) == (BENCHMARKS/f'{name}.md').read_text()
