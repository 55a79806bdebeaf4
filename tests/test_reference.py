"The reference is made from the package: its table holds every public name as it is now, and each name says what it is for."
import fastkd.all, inspect, json, pytest
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
PUBLIC = {name: o for name, o in vars(fastkd.all).items() if not name.startswith('_')}

@pytest.fixture(scope='module')
def cells():
    "The code cells of the page"
    nb = json.loads((NBS/'70_guide.reference.ipynb').read_text())
    return [cell for cell in nb['cells'] if cell['cell_type'] == 'code']

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
