"Callbacks whose losses learn something or remember something, one of each kind."
import pytest, torch
from fastkd.all import *
from fastkd.losses.core import Loss
from helpers import seeded, slow, trained_teacher
from torch import nn

def KD(*args, **kwargs): return KnowledgeDistillationCallback(*args, **kwargs)

def fitnet(**kwargs):
    loss = SoftTarget() + 10*FitNet().on(['block1', 'block2'], ['block2', 'block2'])
    return KD(trained_teacher(), loss, **(dict(task_weight=1.) | kwargs))

class Projected(Loss):
    "A loss of a user's, with parameters from the start and numbers that it remembers"
    def __init__(self):
        super().__init__()
        self.map, self.seen = nn.Linear(10, 10), nn.BatchNorm1d(10, affine=False)

    def forward(self, pred, teacher_pred): return (self.seen(self.map(pred)) - teacher_pred).pow(2).mean()

def projected(): return KD(trained_teacher(), seeded(Projected))

def with_banks(): return KD(trained_teacher(), CRD(dim=4, negatives=8, form='nce'), 'block2', 'block2', task_weight=1.)
def with_queue(): return KD(trained_teacher(), CRD(dim=4, negatives=40), 'block2', 'block2', task_weight=1.)
def with_masks(): return KD(trained_teacher(), MaskedGenerative(), 'block2', 'block2', weight=1e-3, task_weight=1.)

KINDS = fitnet, projected, with_banks, with_queue, with_masks
each_kind = pytest.mark.parametrize('make', KINDS)
two_kinds = pytest.mark.parametrize('make', [fitnet, with_banks, *map(slow, [projected, with_queue, with_masks])])

def adapters(cb): return {name: p.detach().clone() for name, p in cb.loss.named_parameters()}

def learned(cb):
    "Everything in `cb.state_dict()` as a flat dict of tensors"
    state, found = cb.state_dict(), {}
    def flatten(prefix, o):
        if isinstance(o, dict): o = o.items()
        elif isinstance(o, (list, tuple)): o = enumerate(o)
        else:
            found[prefix] = torch.as_tensor(o)
            return
        for key, value in o: flatten(f'{prefix}.{key}', value)
    flatten('', {key: value for key, value in state.items() if value is not None})
    return found
