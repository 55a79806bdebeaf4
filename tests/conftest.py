"What every test starts from: one thread, known random states, the CPU."
import gc, os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(name, '1')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest
from hypothesis import settings

# the same examples everywhere, and no limit of time: a busy machine is not a failure
settings.register_profile('fastkd', derandomize=True, deadline=None)
settings.load_profile('fastkd')

def pytest_collection_finish():
    "What stays until the end is not looked through again by each collection: a tenth of a second and more, thousands of times"
    gc.collect()
    gc.freeze()

@pytest.fixture(autouse=True)
def same_start():
    "Numbers in tests are those of a CPU, and do not depend on the tests that ran before"
    import torch # here, since the process that hands tests out needs none of this
    from fastai.torch_core import default_device
    from helpers import seed_cpu
    torch.set_num_threads(1)
    default_device(False)
    seed_cpu(42)
