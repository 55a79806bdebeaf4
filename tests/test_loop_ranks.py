"""Two processes on one machine, forked here; in the slow tier as `torchrun` and `accelerate launch` start them.

They talk by gloo, on a CPU: nothing here has run on a GPU."""
import os, pytest, ranks, re, shlex, socket, subprocess, sys, torch
from fastai.basics import SGD
from fastkd.all import *
from functools import partial
from multiprocessing.connection import wait
from helpers import FORKS, At, fitted, furthest, learner, n_hooks, run_script, same, shows, trained_teacher, weights
from torch import nn

EXAMPLE = ranks.ROOT/'examples'/'distributed.py'

LAUNCHERS = dict(torchrun='torch.distributed.run --standalone --nproc_per_node 2'.split(),
    accelerate='accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0'.split())

def started(cmd, folder, timeout=300):
    "Run Python in `folder` with all that this process can import"
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ranks.ROOT), *filter(None, sys.path)]), 'PYTHONWARNINGS': 'ignore'}
    cmd = [sys.executable, *map(str, cmd)]
    return subprocess.run(cmd, cwd=folder, env=env | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=timeout)

def launched(launcher, folder, *names, **kwargs):
    "The runs of those names, all by default, in two processes"
    return started(['-m', *LAUNCHERS[launcher], ranks.__file__, folder, *names], folder, **kwargs)

def forked(folder, *names):
    "The same without a launcher, in processes that have everything imported"
    with socket.socket() as free:
        free.bind(('localhost', 0))
        env = dict(MASTER_ADDR='localhost', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    of_rank = [env | dict(RANK=rank, LOCAL_RANK=rank) for rank in '01']
    runs = [FORKS.Process(target=run_script, args=(ranks.__file__, [folder, *names], env)) for env in of_rank]
    for run in runs: run.start()
    try:
        while waiting := [run.sentinel for run in runs if run.exitcode is None]:
            assert wait(waiting, timeout=300), 'nothing ended in 300 seconds'
            assert not any(run.exitcode for run in runs), '\n'.join(file.read_text() for file in folder.glob('*.error'))
    finally: # where one has ended with an error the other waits for it
        for run in runs: run.kill()

@pytest.fixture(scope='session', params=['forked', *(pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS)])
def both(request, tmp_path_factory):
    "`both(run)` is what each of the two processes found in a run; all runs are made at one launch"
    return found_by_both(request.param, tmp_path_factory.mktemp(request.param))

def found_by_both(launcher, folder, *names):
    if launcher == 'forked': forked(folder, *names)
    else:
        done = launched(launcher, folder, *names)
        assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: [torch.load(folder/f'{name}.{rank}', weights_only=False) for rank in range(2)]

def assert_equal(first, second):
    "The student, and all that the losses learned, after each step and at the end"
    assert len(first['steps']) == len(second['steps']) > 1
    for (*_, a), (*_, b) in zip(first['steps'], second['steps']): assert furthest(a, b) <= 1e-7
    for key in 'student', 'learned': assert furthest(first[key], second[key]) <= 1e-7
    assert not same(first['steps'][0][2], first['steps'][-1][2])

def assert_as_one(first, name):
    "Close to one process with batches as large as those of both"
    alone = ranks.RUNS[name]()
    for key in 'student', 'learned': assert furthest(first[key], alone[key]) < 1e-5
    return alone

# ---- What is learned

@shows('with learn.distrib_ctx(): learn.fit(2, cbs=kd)')
def test_adapters_and_schedules(both):
    "Student and adapters are equal on all processes, and as in one process with the batches of all; the teacher stays as it was, unwrapped"
    first, second = both('fitnet')
    assert_equal(first, second)
    assert_as_one(first, 'fitnet')
    for found in first, second:
        assert {step[:2] for step in found['steps']} == {('DistributedDataParallel', 'Sequential')}
        assert found['is_same_teacher']

@shows('learn.fit(2, cbs=[kd, GradientAccumulation(64), GradientClip(.1)])')
def test_accumulated_and_clipped(both):
    "Gradients of several batches, clipped: adapters step when the student does, on all processes"
    first, second = both('accumulated')
    assert_equal(first, second)
    assert_as_one(first, 'accumulated')
    assert len(first['steps']) == 4 # two epochs of 40 samples on each process, 20 to a step

@shows("kd = KnowledgeDistillationCallback(teacher, CRD(), 'layer4', 'layer4')")
def test_queue(both):
    "The queue of negatives holds the samples of all processes, and is the same on each"
    first, second = both('queue')
    assert_equal(first, second)
    owners = first['learned']['losses.crd.learned.0.owners']
    assert first['learned']['losses.crd.learned.0.n_keys'] == len(owners) == 12 and (owners >= 0).all()

@shows("kd = KnowledgeDistillationCallback(teacher, CRD(form='nce'), 'layer4', 'layer4')")
def test_banks(both):
    "Banks take in the samples of all processes, one that pads the last batch only once, and all draw the same negatives"
    first, second = both('banks')
    assert_equal(first, second)
    assert first['learned']['losses.crd.learned.0.draws._extra_state'][1] == 2 # a batch in each epoch
    banks = [first['learned'][f'losses.crd.learned.0.bank_{side}'] for side in 'st']
    assert all(torch.allclose(bank.norm(dim=1), torch.ones(19)) for bank in banks)

@shows("kd = KnowledgeDistillationCallback(teacher, AdversarialFeatures(), 'layer4', 'layer4')")
def test_adversary(both):
    "A discriminator is trained by the gradients of all processes, and goes the way of one process"
    first, second = both('adversarial')
    assert_equal(first, second)
    assert_as_one(first, 'adversarial')

@shows("kd = KnowledgeDistillationCallback(teacher, SRRL(head='fc'), 'layer4', 'layer4')")
def test_statistics_of_adapters(both):
    "Running means of batch norms in adapters are those of the first process, as in the student"
    first, second = both('statistics')
    assert_equal(first, second)
    assert sum(name.endswith('running_var') for name in first['learned']) == 1

# ---- Schemes

@pytest.fixture(scope='session')
def schemes(tmp_path_factory):
    "The same of schemes: who teaches whom"
    return found_by_both('torchrun', tmp_path_factory.mktemp('schemes'), *ranks.SCHEMES)

def assert_same_steps(first, second):
    assert len(first['steps']) == len(second['steps']) > 1 and not same(first['steps'][0], first['steps'][-1])
    for a, b in zip(first['steps'], second['steps']): assert furthest(a, b) <= 1e-7

@pytest.mark.slow
@shows('learn = Learner(dls, Peers([student, other])); learn.fit(2, cbs=MutualLearning(SoftTarget))')
@pytest.mark.parametrize('name', ['mutual', 'supervised'])
def test_schemes_as_one(schemes, name):
    "Peers that teach each other, and heads taught by the last layer, are those of one process with the batches of all"
    first, second = schemes(name)
    assert_same_steps(first, second)
    assert furthest(first['student'], ranks.SCHEMES[name]()['student']) < 1e-5

@pytest.mark.slow
@shows('learn.fit(2, cbs=KnowledgeDistillationCallback(MeanTeacher(), SoftTarget))')
def test_mean_teacher(schemes):
    "The mean of the steps of all processes"
    first, second = schemes('mean_teacher')
    assert_same_steps(first, second)
    alone = ranks.SCHEMES['mean_teacher']()
    assert same(first['mean'], second['mean']) and furthest(first['mean'], alone['mean']) < 1e-5
    assert not same(first['mean'], first['student'])

@pytest.mark.slow
@shows('learn.fit(2, cbs=[Curriculum(teacher), kd])')
def test_curriculum_over_processes(schemes):
    "The student stays the same on all of them"
    assert_same_steps(*schemes('curriculum'))

@pytest.mark.slow
@shows('learn.fit(2, cbs=[kd, Unlabelled(items)])')
def test_unlabelled_over_processes(schemes):
    "Each draws samples of its own, also in a run that goes on from a file of the first one; the student stays the same"
    first, second = schemes('unlabelled')
    assert_same_steps(first, second)
    assert len(first['drawn']) == len(second['drawn']) and [0]*8 in first['drawn']
    for a, b in zip(first['drawn'], second['drawn']): assert a != b

# ---- What is said and written

@shows('learn.recorder.values')
def test_columns(both):
    "Columns are means over all processes, those of one process with the batches of all; so is what the recorder keeps of each step"
    first, second = both('fitnet')
    alone = ranks.RUNS['fitnet']()
    assert len(first['table']) == 2 and all(len(row) == 7 for row in first['table'])
    for row, row_2, expected in zip(first['table'], second['table'], alone['table']):
        assert row[1:] == row_2[1:] # the first is fastai's `train_loss`, which it does not average
        assert row[1:] == pytest.approx(expected[1:], abs=1e-5)
    assert first['recorded'].keys() == alone['recorded'].keys()
    for name, values in alone['recorded'].items():
        assert first['recorded'][name] == second['recorded'][name] == pytest.approx(values, abs=1e-5)

@shows("learn.fit(2, cbs=[kd, SaveModelCallback('distillation_loss')])")
def test_one_process_writes(both):
    "Files are written by the first process only"
    first, second = both('saved')
    assert (first['n_writes'], second['n_writes']) == (2, 0)
    assert first['files'] == ['best.pth', 'last.pth']

@shows('with learn.distrib_ctx(): learn.fit(2, cbs=kd)  # a teacher that is broken on one machine')
def test_error_on_one_process(both):
    "What the first sample shows on one process ends training on all, and each says why"
    first, second = both('not_finite')
    assert 'prediction is not finite on the first training sample' in second['text'] and second['kind'] == 'ValueError'
    assert 'process 1 cannot train: ValueError' in first['text'] and 'prediction is not finite' in first['text']

@shows('kd.weight = 2.  # on one process')
def test_settings_of_one_process(both):
    "Settings that are wrong on one process end training on all before it begins"
    first, second = both('setting')
    assert 'leaves a negative weight for the task loss' in second['text']
    assert 'process 1 cannot train: ValueError' in first['text'] and 'leaves a negative weight' in first['text']

# ---- The script of the docs

@shows('torchrun --nproc_per_node 2 examples/distributed.py')
def test_example(both):
    "The script of the docs trains, and its student and adapters are equal on both processes"
    first, second = both('example')
    for key in 'student', 'learned': assert furthest(first[key], second[key]) <= 1e-7
    assert [row[1:] for row in first['table']] == [row[1:] for row in second['table']] and first['table'][-1][2] > .5
    assert 'adapters.pth' in first['files'] and 'models/student.pth' in first['files']

@pytest.mark.slow
@shows('python examples/distributed.py')
def test_lines_of_the_example(tmp_path):
    "Each line of the script's docstring that starts it on one machine does so"
    lines = re.findall(r'^    ((?:python|torchrun|accelerate) .*)$', EXAMPLE.read_text(), re.M)
    assert [line.split()[0] for line in lines] == ['python', 'torchrun', 'accelerate', 'torchrun']
    modules = dict(python=[], torchrun=['-m', 'torch.distributed.run', '--standalone'],
        accelerate=['-m', 'accelerate.commands.accelerate_cli'])
    for i, line in enumerate(lines[:3]):
        (folder := tmp_path/str(i)).mkdir()
        command, *words = shlex.split(line.replace('examples/distributed.py', str(EXAMPLE)))
        if command == 'accelerate': words[1:1] = ['--multi_gpu', '--main_process_port', '0'] # without a GPU
        done = started([*modules[command], *words], folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob('*.pth')) == ['adapters.pth', 'models/student.pth']

def test_an_error_is_reported(tmp_path):
    "Also where the other process waits"
    with pytest.raises(AssertionError, match="the teacher's answer is not"): forked(tmp_path, 'cut_short')

@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['torchrun', 'accelerate'])
@shows('torchrun --nproc_per_node 2 train.py  # and an error in the middle')
def test_error_in_the_middle(launcher, tmp_path):
    "An error on one process in the middle of training ends it, and the launcher ends the others, which wait for it"
    done = launched(launcher, tmp_path, 'cut_short', timeout=120)
    assert done.returncode != 0 and "the teacher's answer is not: Frozen(Sequential)" in done.stderr
    assert not list(tmp_path.glob('cut_short.*'))

# ---- What a single process can show

class SyncBatchNorm(At):
    "Convert as `distrib_ctx` does, when it does"
    def __init__(self): super().__init__('before_fit', self.convert, order=11)
    def convert(self, learn): learn.model = nn.SyncBatchNorm.convert_sync_batchnorm(learn.model)

@shows("kd = KnowledgeDistillationCallback(teacher, FitNet(), 'layer1.0.bn1', 'layer1.0.bn1')  # and sync_bn=True")
def test_synchronized_batch_norm():
    "Layers are looked up after batch norms were replaced, so that their activations are still read"
    def train(*cbs):
        kd = KnowledgeDistillationCallback(trained_teacher(), FitNet(), 'block1.1', 'block1.1')
        learn = fitted(learner(opt_func=partial(SGD, mom=0.)), [kd, *cbs])
        return learn, kd
    (learn, kd), (plain, kd_plain) = train(SyncBatchNorm()), train()
    assert type(learn.model.block1[1]) is nn.SyncBatchNorm and n_hooks(learn.model) == 0
    assert furthest(weights(learn.model), weights(plain.model)) < 1e-6
    assert furthest(weights(kd.loss), weights(kd_plain.loss)) < 1e-6
    assert learn.recorder.distillation['distillation_loss'] == pytest.approx(plain.recorder.distillation['distillation_loss'], rel=1e-5)

@shows('with learn.distrib_ctx(): learn.fit(2, cbs=kd)  # on the second GPU')
def test_teacher_follows_late():
    "The teacher goes to the student's device after `distrib_ctx` has put the student there"
    events, learn = [], learner()
    class Noted(Frozen):
        "Tells when it is moved"
        def to(self, device):
            events.append('teacher')
            return super().to(device)
    moves = At('before_fit', lambda learn: events.append('student'), order=11)
    fitted(learn, [KnowledgeDistillationCallback(Noted(trained_teacher()), SoftTarget), moves], n_epoch=1)
    assert events == ['student', 'teacher']

@shows('len(dls.train_ds) % n_processes > 0')
def test_sample_that_comes_twice():
    "A sample that pads the batch, and so comes twice, is written into a bank once"
    kd = KnowledgeDistillationCallback(trained_teacher(), CRD(dim=4, negatives=5, form='nce'), 'block2', 'block2')
    fitted(learner(), kd, n_epoch=1)
    banks, = kd.loss.parts[0].loss.learned
    s, t, before = *torch.eye(4)[:2].repeat_interleave(2, 0)[None].expand(2, 4, 4), banks.bank_s.clone()
    banks.remember(s, t, torch.tensor([7, 3, 7, 3]), banks.log_z, momentum=.5)
    for i in 7, 3: assert torch.allclose(banks.bank_s[i], nn.functional.normalize(before[i] + s[0], dim=0))
    assert (banks.bank_s != before).any(1).nonzero().flatten().tolist() == [3, 7]
