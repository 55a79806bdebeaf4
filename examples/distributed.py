"""Distillation on several GPUs, on several machines, or in two processes of a CPU. Only the line that starts it differs:

    python examples/distributed.py
    torchrun --nproc_per_node 2 examples/distributed.py
    accelerate launch --num_processes 2 examples/distributed.py

On each of two machines with eight GPUs, where HOST is one of them:

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 examples/distributed.py

Without a GPU, `accelerate launch` starts more than one process only if told so, by `--multi_gpu` of all things."""
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, accuracy, rank_distrib, set_seed
from fastai.distributed import DistributedDL
from fastkd.all import FitNet, KnowledgeDistillationCallback, SoftTarget, cos
from fastkd.demo import convnet, digits

where = {}
if not torch.cuda.is_available(): # what follows is for a CPU only: fastai sends the order of the samples through a GPU
    where = dict(cpu=True, sync_bn=False)
    def send(self, idxs, rank):
        idxs = torch.tensor(idxs)
        torch.distributed.broadcast(idxs, rank)
        return idxs.tolist()
    DistributedDL._broadcast = send

def learner(width):
    data = {name: list(zip(*pair)) for name, pair in digits().items()}
    dls = DataLoaders.from_dsets(data['pool'], data['valid'], bs=64) # on each process: two of them see 128 at a time
    return Learner(dls, convnet(width, 8), CrossEntropyLossFlat(), metrics=accuracy)

def main():
    set_seed(0)
    teacher, student = learner(16), learner(2)
    with teacher.distrib_ctx(**where): teacher.fit_one_cycle(4, 2e-2)
    kd = KnowledgeDistillationCallback(teacher, SoftTarget(T=4) + 10*FitNet().on('2', '2'), weight=.9, schedule=cos)
    with student.distrib_ctx(**where): student.fit_one_cycle(4, 2e-2, cbs=kd)
    student.save('student') # the first process writes, as `SaveModelCallback` does
    if rank_distrib() == 0: torch.save(kd.state_dict(), 'adapters.pth')
    return student, kd

if __name__ == '__main__': main()
