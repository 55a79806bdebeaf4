"""What a training step costs: plain, in a loop and with a callback written by hand, with fastkd's, and with fasterai and torchdistill
where they are installed.

`python -m benchmarks [--steps 20] [--out benchmarks] [parts…]` writes step.md, step.json and step.png. The arms take turns step by step
in one process with one thread, so that a busy machine disturbs all alike; the figures are medians of CPU time and their ratios.
Memory is the most that is allocated at a time in a step, beyond what was there before it."""
import copy, json, logging, numpy as np, random, torch, torch.nn.functional as F, warnings
from argparse import ArgumentParser
from benchmarks import machine
from benchmarks.losses import be_steady, peak_bytes
from fastai.basics import Adam, Callback, CrossEntropyLossFlat, DataLoaders, IndexSplitter, Learner, set_seed
from fastai.data.block import CategoryBlock, DataBlock
from fastai.vision.augment import RandomResizedCrop, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastkd.all import Attention, CachedTeacher, KnowledgeDistillationCallback, SoftTarget
from fastkd.demo import SkipValidation
from fastkd.teachers import Frozen
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from torchvision.models import resnet18, resnet34, resnet50, resnet101

T, KD = 4, KnowledgeDistillationCallback

# ---- The arms

class HandWritten(Callback):
    "The least that distillation needs: the teacher's answer, the formula, the blend"
    order, run_valid = 5, False
    def __init__(self, teacher): self.teacher = teacher.eval()
    def after_loss(self):
        with torch.no_grad(): teacher_pred = self.teacher(*self.xb)
        self.learn.loss_grad = .5*self.learn.loss_grad + .5*formula(self.learn.pred, teacher_pred)
        self.learn.loss = self.learn.loss_grad.detach().clone()

def formula(pred, teacher_pred):
    log_s, log_t = F.log_softmax(pred/T, 1), F.log_softmax(teacher_pred/T, 1)
    return T**2*F.kl_div(log_s, log_t, reduction='batchmean', log_target=True)

def looped(teacher, student, batch):
    "A step of a PyTorch loop, with the optimizer of the other arms"
    opt, (x, y) = Adam(list(student.parameters()), 1e-3), batch
    def step():
        pred = student(x)
        with torch.no_grad(): teacher_pred = teacher(x)
        (.5*F.cross_entropy(pred, y) + .5*formula(pred, teacher_pred)).backward()
        opt.step()
        opt.zero_grad()
    return step

class HandWrittenPairs(Callback):
    "Attention maps of pairs of layers, read by hooks"
    order, run_valid = 5, False
    def __init__(self, teacher, layers): self.teacher, self.layers = teacher.eval(), layers
    def before_fit(self): self.found_s, self.found_t = (self.listen(o) for o in (self.learn.model, self.teacher))

    def listen(self, model):
        found = {}
        def keep(name): return lambda module, args, output: found.update({name: output})
        for name in self.layers: model.get_submodule(name).register_forward_hook(keep(name))
        return found

    def after_loss(self):
        with torch.no_grad(): self.teacher(*self.xb)
        at = lambda x: F.normalize(x.pow(2).mean(1).flatten(1))
        values = [(at(s) - at(t)).pow(2).mean() for s, t in zip(self.found_s.values(), self.found_t.values())]
        self.learn.loss_grad = .5*self.learn.loss_grad + .5*1000*sum(values)
        self.learn.loss = self.learn.loss_grad.detach().clone()

def by_fasterai(teacher):
    "The callback of fasterai with the same loss, or nothing where it is not installed"
    try:
        from fasterai.distill.distillation_callback import KnowledgeDistillationCallback as Theirs
        from fasterai.distill.losses import SoftTarget as their_soft_target
    except ImportError: return {}
    return dict(fasterai=lambda: [Theirs(teacher, partial(their_soft_target, T=T))])

def by_torchdistill(teacher):
    "A maker of steps of torchdistill's box with the same loss, or nothing where it is not installed"
    logging.disable(logging.INFO)
    try: from torchdistill.core.distillation import get_distillation_box
    except ImportError: return {}
    return dict(torchdistill=lambda: partial(boxed, get_distillation_box, teacher))

def boxed(get_box, teacher, student, batch):
    "A step of torchdistill, whose box holds models, loss and optimizer; it leaves the teacher's mode to its user"
    output = {f'{who}_module_{what}': value for who in ('student', 'teacher') for what, value in (('path', '.'), ('io', 'output'))}
    loss = dict(key='KDLoss', kwargs=dict(temperature=T, alpha=.5, reduction='batchmean', **output))
    forward, terms = dict(forward_proc='forward_batch_only'), dict(kd=dict(criterion=loss, weight=1.))
    config = dict(num_epochs=1, train_data_loader={}, val_data_loader={}, student=forward, teacher=dict(forward, requires_grad=False),
        optimizer=dict(key='Adam', kwargs=dict(lr=1e-3)), criterion=dict(key='WeightedSumLoss', kwargs=dict(sub_terms=terms)))
    box = get_box(copy.deepcopy(teacher), student, {}, config, torch.device('cpu'), None, False, 1) # it freezes the weights it is given
    box.optimizer = Adam(list(student.parameters()), 1e-3) # that of the other arms
    box.pre_epoch_process(epoch=0)
    def step():
        box.pre_forward_process()
        box.post_forward_process(loss=box.forward_process(*batch, supp_dict=None))
    return step

def arms_of(teacher):
    "Makers of the callbacks of each arm, or of its step; the first is the baseline"
    arms = dict(plain=list, loop=lambda: partial(looped, teacher), hand_written=lambda: [HandWritten(teacher)])
    arms |= dict(fastkd=lambda: [KD(teacher, SoftTarget(T=T))], fastkd_cached=lambda: [KD(CachedTeacher(teacher), SoftTarget(T=T))])
    return arms | by_fasterai(teacher) | by_torchdistill(teacher)

def to_the_end(teacher_pred):
    "A part of a loss that has the teacher run to its end, and adds nothing"
    return teacher_pred[0, 0]*0

def feature_arms(teacher):
    pair = ['layer2'], ['layer2']
    return dict(plain=list, whole_teacher=lambda: [KD(teacher, 1000*Attention() + to_the_end, *pair)],
        early_stop=lambda: [KD(teacher, 1000*Attention(), *pair)])

# ---- Measuring

def stepper(cbs, bs, size):
    "A function that makes one training step, in the middle of a fit"
    samples = [(torch.randn(3, size, size), torch.tensor(i % 10)) for i in range(2*bs)]
    dls = DataLoaders.from_dsets(samples, samples, bs=bs, num_workers=0, device='cpu')
    if callable(cbs): return cbs(resnet18(num_classes=10), dls.train.one_batch())
    learn = Learner(dls, resnet18(num_classes=10), CrossEntropyLossFlat(), cbs=cbs)
    learn.remove_cb(learn.progress)
    learn.create_opt()
    learn.n_epoch, learn.n_iter, learn.dl = 1, 10**6, dls.train
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    return partial(learn.one_batch, 0, dls.train.one_batch())

def in_turns(runs, steps):
    "CPU seconds of each run of each arm, after two rounds to warm up"
    taken = {name: [] for name in runs}
    for i in range(-2, steps):
        for name in random.Random(i).sample(list(runs), len(runs)): # none has always the same one before it
            start = process_time()
            runs[name]()
            if i >= 0: taken[name].append(process_time() - start)
    return taken

def steps_of(arms, bs=16, size=64):
    "A step of each arm; all students begin alike and see batches of one kind"
    runs = {}
    for name, make in arms.items():
        torch.manual_seed(0)
        runs[name] = stepper(make(), bs, size)
    return runs

def model(arch, seed=1):
    torch.manual_seed(seed)
    return arch(num_classes=10).eval()

def medians(taken): return {name: median(o) for name, o in taken.items()}

def measure_steps(steps):
    "Time and memory of each arm, resnet34 to resnet18"
    runs = steps_of(arms_of(model(resnet34)))
    seconds = in_turns(runs, steps)
    return dict(seconds=seconds, peak={name: peak_bytes(run) for name, run in runs.items()})

def measure_features(steps):
    "Feature distillation from `layer2` of a resnet50, and the teacher's passes alone"
    teacher, xb = model(resnet50), (torch.randn(16, 3, 64, 64),)
    frozen = Frozen(teacher)
    passes = dict(whole=lambda: frozen.outputs(xb, ['layer2']), early_stop=lambda: frozen.outputs(xb, ['layer2'], pred=False))
    return dict(seconds=in_turns(steps_of(feature_arms(teacher)), steps), passes=in_turns(passes, steps))

def measure_fingerprints(steps):
    "Finding out which samples a batch holds, beside a plain step"
    cached, xb = CachedTeacher(model(resnet34)), (torch.randn(16, 3, 64, 64),)
    return in_turns(dict(keys=lambda: cached._keys(xb), **steps_of(dict(plain=list))), steps)

def measure_batches(steps):
    "Steps for several batch sizes, images of 32×32"
    teacher, found = model(resnet34), {}
    for bs in 8, 16, 32, 64, 128: found[bs] = in_turns(beside_the_teacher(teacher, arms_of(teacher), bs), steps)
    return found

def beside_the_teacher(teacher, arms, bs=16):
    "The teacher's pass alone, and the steps of three arms"
    frozen, xb = Frozen(teacher), (torch.randn(bs, 3, 32, 32),)
    arms = {name: arms[name] for name in ('plain', 'hand_written', 'fastkd')}
    return dict(teacher=lambda: frozen.outputs(xb), **steps_of(arms, bs, 32))

def measure_pairs(steps):
    "Steps for several numbers of pairs, images of 32×32"
    layers, found = [f'layer{i}.{j}.conv{k}' for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)], {}
    for n in 1, 2, 4, 8, 16:
        teacher, names = model(resnet34), layers[:n]
        arms = dict(plain=list, hand_written=lambda: [HandWrittenPairs(copy.deepcopy(teacher), names)],
            fastkd=lambda: [KD(teacher, 1000*Attention() + to_the_end, names, names)])
        found[n] = in_turns(beside_the_teacher(teacher, arms), steps)
    return found

def measure_teachers(steps):
    "Step times for teachers of several sizes, with the time of the teacher's pass"
    found = {}
    for arch in resnet18, resnet34, resnet50, resnet101:
        teacher, xb = model(arch), (torch.randn(16, 3, 64, 64),)
        frozen = Frozen(teacher)
        found[arch.__name__] = in_turns(dict(teacher=lambda: frozen.outputs(xb), **steps_of(arms_of(teacher))), steps)
    return found

class Watch(Callback):
    "CPU seconds from the end of each training step to that of the next one, and the most that a cache held"
    order, run_valid = 1000, False
    def __init__(self, cached=None): self.cached, self.last, self.seconds, self.most = cached, None, [], 0
    def before_train(self): self.last = None
    def after_batch(self):
        now = process_time()
        if self.last is not None: self.seconds.append(now - self.last)
        if self.cached is not None: self.most = max(self.most, self.cached.stats['bytes'])
        self.last = process_time()

def augmented_learner(n=8*16):
    "Random pictures, cropped and changed at random by fastai"
    set_seed(0)
    pixels = np.random.randint(0, 256, (n + 16, 80, 80, 3), np.uint8)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(pixels[i]), get_y=lambda i: i % 10,
        splitter=IndexSplitter(range(n, n + 16)), item_tfms=RandomResizedCrop(64), batch_tfms=aug_transforms())
    dls = block.dataloaders(range(n + 16), bs=16, num_workers=0, device='cpu')
    return Learner(dls, resnet18(num_classes=10), CrossEntropyLossFlat())

def measure_augmented(steps, n_epochs=4, max_bytes=2**14):
    "A cache that is asked for what never comes again, beside a live teacher; short fits in turns"
    teacher, seconds, most, hits, asked, warned = model(resnet34), dict(live=[], cached=[]), 0, 0, 0, []
    for i in range(max(2, steps//5)):
        for name in list(seconds)[::1 if i % 2 else -1]:
            cached = CachedTeacher(teacher, max_bytes=max_bytes) if name == 'cached' else None
            learn, watch = augmented_learner(), Watch(cached)
            with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                learn.fit(n_epochs, cbs=[KD(cached or teacher, SoftTarget(T=T)), SkipValidation(), watch])
            seconds[name] += watch.seconds
            if cached is None: continue
            most, hits, asked = max(most, watch.most), hits + cached.hits, asked + cached.hits + cached.misses
            warned.append(sum('answers are no longer kept' in str(o.message) for o in caught))
    return dict(seconds=seconds, most=most, max_bytes=max_bytes, hits=hits, asked=asked, warned=warned, epochs=n_epochs)

PARTS_IN_FULL = dict(augmented=measure_augmented, steps=measure_steps, features=measure_features, fingerprints=measure_fingerprints)
PARTS = PARTS_IN_FULL | dict(batches=measure_batches, pairs=measure_pairs, teachers=measure_teachers)

# ---- Telling

def table(head, rows): return '\n'.join(f"| {' | '.join(map(str, o))} |" for o in (head, ['---']*len(head), *rows))

def ratio(one, other):
    "Of medians, and its 95 % interval by resampling the rounds"
    one, other, n = np.array(one), np.array(other), len(one)
    drawn = np.random.default_rng(0).integers(n, size=(4000, n))
    return np.median(one)/np.median(other), *np.quantile(np.median(one[drawn], 1)/np.median(other[drawn], 1), [.025, .975])

def judged(low, high, least, most):
    if least <= low and high <= most: return 'yes'
    return 'no' if high < least or low > most else 'cannot tell'

def targets(found):
    "What is asked for, what was measured"
    step, keys, augmented = found['steps']['seconds'], found['fingerprints'], found['augmented']
    features, passes = (found['features'][name] for name in ('seconds', 'passes'))
    extra = {name: np.subtract(features[name], features['plain']) for name in ('whole_teacher', 'early_stop')}
    fasterai = [('fasterai to live step', ratio(step['fasterai'], step['fastkd']), 1.6, np.inf)]*('fasterai' in step)
    asked = [('live step to a loop by hand', ratio(step['fastkd'], step['loop']), 0, 1.03), *fasterai,
        ('layer2 of resnet50 to its whole pass', ratio(passes['early_stop'], passes['whole']), 0, .52),
        ("layer2's step beyond a plain one, to the whole teacher's", ratio(extra['early_stop'], extra['whole_teacher']), 0, .6),
        ('step with a warm cache to plain', ratio(step['fastkd_cached'], step['plain']), 0, 1.05),
        ('fingerprints to a plain step', ratio(keys['keys'], keys['plain']), 0, .02),
        ('step with a cache under augmentation to live', ratio(augmented['seconds']['cached'], augmented['seconds']['live']), 0, 1.05)]
    rows = [(what, f'{value:.3f}', f'{low:.3f} to {high:.3f}', f'≥ {least}' if least else f'≤ {most}', judged(low, high, least, most))
        for what, (value, low, high), least, most in asked]
    sizes = {'peak memory growth to plain': (found['steps']['peak']['fastkd']/found['steps']['peak']['plain'], 1.05),
        'bytes that a cache held to max_bytes': (augmented['most']/augmented['max_bytes'], 1)}
    rows += [(what, f'{value:.3f}', '', f'≤ {most}', judged(value, value, 0, most)) for what, (value, most) in sizes.items()]
    return table(('ratio', 'measured', '95 % interval', 'target', 'met'), rows)

def said_of_augmented(found):
    "The hit rate, and how the cache gave up"
    assert {*found['warned']} == {1}
    return (f"Under `RandomResizedCrop` and `aug_transforms`, {found['hits']} of {found['asked']:,} answers were known (hit rate "
        f"{found['hits']/found['asked']:.3f}), in fits of {found['epochs']} epochs. The cache held at most {found['most']:,} of "
        f"{found['max_bytes']:,} bytes, and said once in each of {len(found['warned'])} fits that it stops.")

def overhead(found, what):
    "A table of fastkd against hand-written, and of what it takes beside student and teacher"
    rows = []
    for key, o in ((key, medians(o)) for key, o in found.items()):
        beside = o['fastkd'] - o['plain'] - o['teacher']
        rows.append((key, *(f'{1000*o[name]:.0f}' for name in ('plain', 'teacher', 'hand_written', 'fastkd')),
            f"{o['fastkd']/o['hand_written']:.3f}", f'{round(1000*beside)}'))
    head = what, 'plain, ms', 'teacher, ms', 'hand-written, ms', 'fastkd, ms', 'to hand-written', 'beyond plain and teacher, ms'
    return table(head, rows)

def told(found):
    "All of it as Markdown"
    seconds, peak, steps = medians(found['steps']['seconds']), found['steps']['peak'], len(found['steps']['seconds']['plain'])
    rows = [(name, f'{1000*o:.0f}', f"{o/seconds['plain']:.2f}", f"{o/seconds['loop']:.2f}", f'{peak[name]/1e6:.0f}',
        f"{peak[name]/peak['plain']:.2f}") for name, o in seconds.items()]
    teachers = [(name, *(f'{1000*o:.0f}' for o in medians(o).values())) for name, o in found['teachers'].items()]
    head = 'arm', 'ms of CPU per step', 'to plain', 'to the loop', 'MB at the peak', 'to plain'
    said = ['# What a training step costs',
        f'`python -m benchmarks --steps {steps}`: resnet34 teaches resnet18, 64×64, batches of 16, in turns.',
        found['machine'], table(head, rows), '## Targets', targets(found), said_of_augmented(found['augmented'])]
    said += ['## Batch sizes', '32×32 images.', overhead(found['batches'], 'batch size')]
    said += ['## Pairs of layers', 'Attention maps, batches of 16, 32×32 images.', overhead(found['pairs'], 'pairs')]
    said += ['## Teachers', 'Milliseconds of CPU: the pass of the teacher alone, and the steps.',
        table(('teacher', *list(found['teachers'].values())[0]), teachers), '![Step time against the cost of the teacher](step.png)']
    return '\n\n'.join(said) + '\n'

def picture(found, file):
    "Step time against the time of the teacher's pass"
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 4), layout='constrained')
    points = [medians(o) for o in found['teachers'].values()]
    ms = lambda name: [1000*o[name] for o in points]
    for name in list(points[0])[1:]: ax.plot(ms('teacher'), ms(name), 'o-', label=name.replace('_', ' '))
    for name, *place in zip(found['teachers'], ms('teacher'), ms('plain')):
        ax.annotate(name, place, (0, -14), textcoords='offset points', ha='center')
    ax.set(xlabel="the teacher's pass, ms of CPU", ylabel='a training step, ms of CPU', ylim=0)
    ax.legend()
    fig.savefig(file, dpi=110)

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('parts', nargs='*', help='what to measure again; all by default')
    parser.add_argument('--steps', type=int, default=20, help='steps per arm')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for step.md, step.json and step.png')
    args = parser.parse_args()
    be_steady()
    file = args.out/'step.json'
    found = json.loads(file.read_text()) if args.parts and file.exists() else {}
    for part in args.parts or PARTS:
        found[part] = PARTS[part](args.steps if part in PARTS_IN_FULL else max(3, args.steps//2))
        file.write_text(json.dumps(found | dict(machine=machine()), indent=1) + '\n')
    found = json.loads(file.read_text())
    if not found.keys() >= PARTS.keys(): raise SystemExit(f"not measured yet: {', '.join(sorted(PARTS.keys() - found.keys()))}")
    text = told(found)
    (args.out/'step.md').write_text(text)
    picture(found, args.out/'step.png')
    print(text)
