"The list of deliberate defects fits the code and the tests: `make mutants` shows that each is noticed."
import ast, pytest, re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def mutants(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    from tools import mutants
    return mutants

@cache
def functions_in(file): return {o.name for o in ast.parse((ROOT/'tests'/file).read_text()).body if isinstance(o, ast.FunctionDef)}

def test_every_defect_can_be_planted(mutants):
    "What is replaced stands there exactly once, and what comes of it is Python"
    assert len(mutants.MUTANTS) >= 30 and len({o.name for o in mutants.MUTANTS}) == len(mutants.MUTANTS)
    for mutant in mutants.MUTANTS: ast.parse(mutants.mutated(mutant))

def test_every_named_test_exists(mutants):
    for mutant in mutants.MUTANTS:
        file, name = re.match(r'(\w+\.py)::(test_\w+)(\[.*\])?$', mutant.killed_by).groups()[:2]
        assert name in functions_in(file), mutant.killed_by

def test_a_stale_defect_is_an_error(mutants):
    mutant = mutants.MUTANTS[0]
    for old in 'this is not in the source', 'self': # not there; there more than once
        with pytest.raises(ValueError, match=f'{mutant.name}: [0-9]+ times in {mutant.file}'): mutants.mutated(mutant._replace(old=old))

def test_the_naive_callback_takes_what_ours_takes(mutants):
    "Or what it fails would say nothing"
    def params(path):
        classes = {o.name: o for o in ast.parse(path.read_text()).body if isinstance(o, ast.ClassDef)}
        init = next(o for o in classes['KnowledgeDistillationCallback'].body if getattr(o, 'name', '') == '__init__')
        return [arg.arg for arg in init.args.args], [ast.unparse(o) for o in init.args.defaults]
    assert params(ROOT/'tools'/'naive.py') == params(ROOT/'fastkd'/'callback.py')
