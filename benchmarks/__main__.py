"""What a training step costs: plain, with a hand-written distillation callback, and with fastkd's.

`python -m benchmarks [--steps 20] [--out benchmarks]` writes step.md and step.json. The arms take turns step by step in one process
with one thread, so that a busy machine disturbs all alike; the figures are medians of CPU time and their ratios."""
import json, platform, statistics, time, torch, torch.nn.functional as F
from argparse import ArgumentParser
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner
from pathlib import Path
from torchvision.models import resnet18, resnet34
from fastkd.all import Attention, KnowledgeDistillationCallback, SoftTarget

class HandWritten(Callback):
    "The least that distillation needs: the teacher's answer, the formula, the blend"
    order,run_valid = 5,False
    def __init__(self, teacher): self.teacher = teacher.eval()
    def after_loss(self):
        with torch.no_grad(): teacher_pred = self.teacher(*self.xb)
        log_s,log_t = F.log_softmax(self.learn.pred/4, 1), F.log_softmax(teacher_pred/4, 1)
        distillation = 16*F.kl_div(log_s, log_t, reduction='batchmean', log_target=True)
        self.learn.loss_grad = .5*self.learn.loss_grad + .5*distillation
        self.learn.loss = self.learn.loss_grad.detach().clone()

def learner(cbs, bs, size):
    "A learner in the middle of a fit, ready for `one_batch`"
    samples = [(torch.randn(3, size, size), torch.tensor(i % 10)) for i in range(2*bs)]
    dls = DataLoaders.from_dsets(samples, samples, bs=bs, num_workers=0, device='cpu')
    learn = Learner(dls, resnet18(num_classes=10), CrossEntropyLossFlat(), cbs=cbs)
    learn.remove_cb(learn.progress)
    learn.create_opt()
    learn.n_epoch,learn.n_iter,learn.dl = 1,10**6,dls.train
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    return learn, dls.train.one_batch()

def arms(teacher):
    "The callbacks of each arm; the first is the baseline"
    layers = ['layer2', 'layer3']
    return dict(plain=[], hand_written=[HandWritten(teacher)], fastkd=[KnowledgeDistillationCallback(teacher, SoftTarget(T=4))],
        fastkd_two_pairs=[KnowledgeDistillationCallback(teacher, SoftTarget(T=4) + 1000*Attention(), layers, layers)])

def measure(steps, bs=16, size=64):
    "CPU seconds of each step of each arm, in turns"
    torch.manual_seed(0)
    teacher = resnet34(num_classes=10)
    learners = {name: learner(cbs, bs, size) for name,cbs in arms(teacher).items()}
    taken = {name: [] for name in learners}
    for i in range(-2, steps): # two rounds to warm up
        for name,(learn,batch) in learners.items():
            start = time.process_time()
            learn.one_batch(0, batch)
            if i >= 0: taken[name].append(time.process_time() - start)
    return taken

def table(taken):
    "The medians and ratios as Markdown"
    medians = {name: statistics.median(o) for name,o in taken.items()}
    rows = [f'| {name} | {1000*o:.0f} | {o/medians["plain"]:.2f} | {o/medians["hand_written"]:.2f} |' for name,o in medians.items()]
    return '\n'.join(['| arm | ms of CPU per step | to plain | to hand-written |', '|---|---|---|---|', *rows])

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=20, help='steps per arm')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for step.md and step.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    taken = measure(args.steps)
    machine = f'{platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, one thread'
    text = f'resnet34 teaches resnet18, 64×64, batches of 16, {args.steps} steps per arm, in turns. {machine}.\n\n{table(taken)}\n'
    (args.out/'step.md').write_text(text)
    (args.out/'step.json').write_text(json.dumps(dict(machine=machine, seconds=taken), indent=1) + '\n')
    print(text)
