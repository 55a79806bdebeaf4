"Pages that are made from something else say what it says now: the reference from the package, the benchmarks from their tables."
import ast, fastkd.all, inspect, json, pytest
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

def shown_by(source, names):
    "What the last line of a cell shows"
    *lines, last = ast.parse(source).body
    exec(compile(ast.Module(lines, []), 'cell', 'exec'), names)
    return eval(compile(ast.Expression(last.value), 'cell', 'eval'), names)

@pytest.mark.parametrize('page,n_tables', [('69_guide.benchmarks.ipynb', 13), ('index.ipynb', 1)])
def test_benchmarks_are_fresh(page, n_tables, monkeypatch):
    "Pages show the tables of the folder"
    monkeypatch.chdir(NBS)
    names, n_shown = {}, 0
    for cell in code_cells(page):
        source = ''.join(cell['source'])
        if source.startswith('#| hide') and '#| slow' not in source: exec(source, names)
        shown = [o['data']['text/markdown'] for o in cell['outputs'] if 'text/markdown' in o.get('data', {})]
        if '#| slow' in source or not shown: continue
        assert ''.join(shown[0]) == shown_by(source, names).data, source
        n_shown += 1
    assert n_shown == n_tables

def test_choice_is_fresh(monkeypatch):
    "What is said about losses is what was measured"
    monkeypatch.chdir(NBS)
    names, cells = {}, code_cells('63_guide.choosing.ipynb')
    said = next(cell for cell in cells if 'def beside' in ''.join(cell['source']))
    for cell in cells:
        if ''.join(cell['source']).startswith(('import', '#| hide')): exec(''.join(cell['source']), names)
    assert shown_by(''.join(said['source']), names)._repr_html_() == ''.join(said['outputs'][0]['data']['text/html'])

def test_counts_are_fresh():
    "How many losses, settings and planted defects there are"
    found, cells = {}, code_cells('68_guide.checked.ipynb')
    counts = next(i for i, cell in enumerate(cells) if "'planted defects'" in ''.join(cell['source']))
    for cell in cells[:counts]: exec(''.join(cell['source']), found)
    first, counted = ''.join(cells[counts]['source']).split('\n', 1)
    exec(first, found)
    assert eval(''.join(cells[counts]['outputs'][0]['data']['text/plain'])) == eval(counted, found)

@pytest.mark.parametrize('name', sorted(o.stem for o in BENCHMARKS.glob('*.json')))
def test_tables_say_what_was_measured(name):
    "The Markdown is that of the numbers beside it"
    told = import_module('benchmarks.__main__' if name == 'step' else f'benchmarks.{name}').told
    assert told(json.loads((BENCHMARKS/f'{name}.json').read_text())) == (BENCHMARKS/f'{name}.md').read_text()
