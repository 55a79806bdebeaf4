"""What each loss costs: against its authors' formula, written plainly.

`python -m benchmarks.losses [--repeats 20] [--out benchmarks] [names…]` writes losses.md and losses.json. Both take turns in one process
with one thread, forward and backward; times are medians of CPU time, memory is the peak of what is allocated meanwhile, the gradients too.
Both must give the same value and the same gradient, so that the same thing is measured."""
import copy, ctypes, importlib, inspect, json, math, os, pkgutil, statistics, sys, time
import fastkd.losses, torch, torch.nn.functional as F
from argparse import ArgumentParser
from benchmarks import machine
from functools import partial
from itertools import accumulate
from pathlib import Path
from torch import nn
from torch.profiler import ProfilerActivity, profile
from fastkd.losses.core import Probe

# Inputs, all random
def logits(): return dict(pred=3*torch.randn(128, 1000), teacher_pred=3*torch.randn(128, 1000))
def labelled(): return dict(**logits(), target=torch.randint(1000, (128,)))
def pair_of(*size): return dict(fm_s=dict(s=torch.randn(size)), fm_t=dict(t=torch.randn(size)))
def maps(): return pair_of(16, 64, 28, 28)
def small_maps(): return pair_of(16, 32, 14, 14)
def classified(): return dict(**small_maps(), teacher_pred=torch.randn(16, 10))
def tiny_logits(): return dict(pred=torch.randn(2, 3), teacher_pred=torch.randn(2, 3))
def tiny_maps(): return pair_of(2, 3, 2, 2)
def rows(): return pair_of(128, 512)
def many_rows(): return pair_of(1024, 128)
def numbered(): return dict(**rows(), index=torch.randperm(N_SAMPLES)[:128])
def few_positions(): return pair_of(16, 256, 7, 7)
def wide_maps(): return dict(fm_s=dict(s=torch.randn(16, 32, 28, 28)), fm_t=dict(t=torch.randn(16, 64, 28, 28)))
def partly(): return dict(**logits(), mask=torch.rand(128) < .5)
def boxes(): return dict(**pair_of(16, 8732, 4), mask=torch.rand(16, 8732) < .05)
def tokens(): return pair_of(16, 128, 768)
def words(): return dict(**tokens(), mask=torch.arange(128) < torch.randint(32, 128, (16, 1)))
def scores(): return pair_of(8, 12, 128, 128)
def attentions():
    inputs = scores()
    return {side: {name: o.softmax(-1) for name,o in fm.items()} for side,fm in inputs.items()}
def layers(n_s, n_t, *size):
    draw = lambda n: {f'layer{i}': torch.randn(size) for i in range(n)}
    return dict(fm_s=draw(n_s), fm_t=draw(n_t))
def levels(): return layers(3, 3, 16, 64, 28, 28)
def stages(): return layers(3, 3, 16, 32, 14, 14)
def two_maps(): return layers(2, 2, 16, 64, 28, 28)
def hidden(): return layers(2, 4, 16, 128, 768)

# The formulas. They take inputs of a loss by name; `s` and `t` are the only pair of activations, `learned` is what the loss learns
# and `part` that of the only pair

# response

def soft_target(pred, teacher_pred, T=5):
    return F.kl_div(F.log_softmax(pred/T, 1), F.softmax(teacher_pred/T, 1), reduction='batchmean')*T**2

def of_standardized(pred, teacher_pred):
    pred,teacher_pred = ((z - z.mean(1, keepdim=True))/(z.std(1, keepdim=True) + 1e-7) for z in (pred, teacher_pred))
    return soft_target(pred, teacher_pred)

def of_counted(pred, teacher_pred, mask): return soft_target(pred[mask], teacher_pred[mask])
def mse_of_logits(pred, teacher_pred): return F.mse_loss(pred, teacher_pred)
def mutual(pred, teacher_pred): return soft_target(pred, teacher_pred, T=1)

def decoupled(pred, teacher_pred, target, T=4, alpha=1, beta=8):
    is_target = torch.zeros_like(pred).scatter_(1, target[:, None], 1).bool()
    def two(z):
        p = F.softmax(z/T, 1)
        return torch.cat([(p*is_target).sum(1, keepdim=True), (p*~is_target).sum(1, keepdim=True)], 1)
    of_target = F.kl_div(two(pred).log(), two(teacher_pred), reduction='sum')*T**2/len(pred)
    log_s, p_t = F.log_softmax(pred/T - 1000*is_target, 1), F.softmax(teacher_pred/T - 1000*is_target, 1)
    return alpha*of_target + beta*F.kl_div(log_s, p_t, reduction='sum')*T**2/len(pred)

def normalized(pred, teacher_pred, target, gamma=1.5, T=1):
    label = target[:, None]
    log_s, p_t = F.log_softmax(pred, 1).gather(1, label), F.softmax(teacher_pred, 1).gather(1, label)
    others = torch.ones_like(pred).scatter_(1, label, 0).bool()
    s, t = (z[others].reshape(len(z), -1) for z in (pred, teacher_pred))
    return -(p_t*log_s).mean() - gamma*T**2*(F.softmax(t/T, 1)*F.log_softmax(s/T, 1)).sum(1).mean()

def pearson(a, b, eps=1e-8):
    a,b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a*b).sum(1)/(a.norm(dim=1)*b.norm(dim=1) + eps)

def correlations(pred, teacher_pred):
    y_s, y_t = pred.softmax(1), teacher_pred.softmax(1)
    return 1 - pearson(y_s, y_t).mean() + 1 - pearson(y_s.T, y_t.T).mean()

def weighted_soft_label(pred, teacher_pred, target, T=2):
    soft = -(F.softmax(teacher_pred/T, 1)*F.log_softmax(pred/T, 1)).sum(1)
    one_hot = F.one_hot(target, pred.shape[1]).float()
    task_s, task_t = (-(one_hot*F.log_softmax(z.detach(), 1)).sum(1) for z in (pred, teacher_pred))
    return T**2*((1 - torch.exp(-task_s/(task_t + 1e-7)))*soft).mean()

def hard_label(pred, teacher_pred): return F.cross_entropy(pred, teacher_pred.argmax(1))

def reverse_kl(pred, teacher_pred):
    log_s, log_t = F.log_softmax(pred, 1), F.log_softmax(teacher_pred, 1)
    return (log_s.exp()*(log_s - log_t)).sum(1).mean()

def forward_kl(pred, teacher_pred): return reverse_kl(teacher_pred, pred)

def jensen_shannon(pred, teacher_pred):
    p_s, p_t = pred.softmax(1), teacher_pred.softmax(1)
    log_m = ((p_s + p_t)/2).log()
    return (F.kl_div(log_m, p_t, reduction='batchmean') + F.kl_div(log_m, p_s, reduction='batchmean'))/2

def total_variation(pred, teacher_pred): return (pred.softmax(1) - teacher_pred.softmax(1)).abs().sum(1).mean()/2
def binary(pred, teacher_pred, T=2): return T**2*F.binary_cross_entropy_with_logits(pred/T, torch.sigmoid(teacher_pred/T))

def soft_mae(pred, teacher_pred): return F.l1_loss(pred.softmax(1), teacher_pred.softmax(1))

# feature

def fitnet(s, t): return F.mse_loss(s, t)

def adapted(s, t, part): return F.mse_loss(part(s), t)
def normalized_maps(s, t): return F.mse_loss(F.normalize(s), F.normalize(t))

def attention_maps_of(s, t, p): return (F.normalize(x.abs().pow(p).mean(1).flatten(1)) for x in (s, t))

def attention(s, t):
    at = lambda x: F.normalize(x.pow(2).mean(1).flatten(1))
    return (at(s) - at(t)).pow(2).mean()

def attention_of_power(s, t, p=4):
    at_s,at_t = attention_maps_of(s, t, p)
    return (at_s - at_t).pow(2).mean()

def attention_of_paper(s, t):
    at_s,at_t = attention_maps_of(s, t, 2)
    return (at_s - at_t).norm(dim=1).mean()

def boundaries(s, t, m=1):
    off,on = ((s > -m) & (t <= 0)).float(), ((s <= m) & (t > 0)).float()
    return ((s + m)**2*off + (s - m)**2*on).mean()

def margin_relu(s, t, part):
    t = torch.max(t, part.margins.view(-1, 1, 1))
    return (F.mse_loss(s, t, reduction='none')*((s > t) | (t > 0)).float()).mean()

def fsp(fm_s, fm_t):
    def flow(fm):
        first,second = (o.flatten(2) for o in fm.values())
        return torch.bmm(first, second.transpose(1, 2))/first.shape[2]
    return (flow(fm_s) - flow(fm_t)).pow(2).mean()

def channel_wise(s, t, T=4):
    n = s.shape[0]*s.shape[1]
    s,t = (o.reshape(n, -1)/T for o in (s, t))
    return (F.softmax(t, 1)*(F.log_softmax(t, 1) - F.log_softmax(s, 1))).sum()*T**2/n

def nst(s, t):
    s,t = (F.normalize(o.flatten(2), dim=2) for o in (s, t))
    kernel = lambda a, b: (a.unsqueeze(1)*b.unsqueeze(2)).sum(-1).pow(2).mean()
    return kernel(t, t) + kernel(s, s) - 2*kernel(s, t)

# feature, with learned parts

def vid(s, t, part):
    variance = (torch.log(1 + torch.exp(part.rho)) + 1e-5).view(1, -1, 1, 1)
    return .5*((part(s) - t)**2/variance + torch.log(variance)).mean()

def factors(s, t): return F.l1_loss(F.normalize(s.flatten(1)), F.normalize(t.flatten(1)))

def factors_of_convs(s, t, part): return factors(part['translator'](s), part['paraphraser'](t))

def masked_generative(s, t, part, ratio=.65, hide='spatial'):
    n,c,h,w = s.shape
    kept = torch.where(part['draws'].rand((n, 1, h, w) if hide == 'spatial' else (n, c, 1, 1), s) < ratio, 0, 1)
    return F.mse_loss(part['generator'](s*kept), t, reduction='sum')/n

def hierarchical_context(s, t):
    loss,total,weight = F.mse_loss(s, t), 1., 1.
    for size in 4, 2, 1:
        weight /= 2
        loss = loss + weight*F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
        total += weight
    return loss/total

def review(fm_s, fm_t, learned):
    loss,deeper = 0., None
    for s,t,part in reversed(list(zip(fm_s.values(), fm_t.values(), learned))):
        own = part.inward(s)
        if deeper is not None:
            deeper = F.interpolate(deeper, own.shape[2:], mode='nearest')
            share = torch.sigmoid(part.attention(torch.cat([own, deeper], 1)))
            own = own*share[:, :1] + deeper*share[:, 1:]
        loss,deeper = loss + hierarchical_context(part.outward(own), t), own
    return loss

def srrl(s, t, teacher_pred, part):
    seen = part['connector'](s).mean((2, 3))
    return F.mse_loss(seen, t.mean((2, 3))) + F.mse_loss(part['head'](seen), teacher_pred)

class Reversal(torch.autograd.Function):
    "The identity, with the opposite gradient"
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, grad): return -grad

def adversarial(s, t, part):
    says_s, says_t = part['discriminator'](Reversal.apply(s)), part['discriminator'](t)
    bce = F.binary_cross_entropy_with_logits
    return (bce(says_s, torch.zeros_like(says_s)) + bce(says_t, torch.ones_like(says_t)))/2

# relation

def similarity(s, t):
    gram = lambda f: F.normalize(f @ f.T)
    return (gram(t) - gram(s)).pow(2).sum()/len(s)**2

def pkt(s, t, eps=1e-7):
    def shares(f):
        f = f/(f.pow(2).sum(1, keepdim=True).sqrt() + eps)
        p = (f @ f.T + 1)/2
        return p/p.sum(1, keepdim=True)
    p_s, p_t = shares(s), shares(t)
    return (p_t*torch.log((p_t + eps)/(p_s + eps))).mean()

def pdist(f, eps=1e-12):
    square = f.pow(2).sum(1)
    d = (square[:, None] + square[None] - 2*f @ f.T).clamp(min=eps).sqrt().clone()
    d[range(len(f)), range(len(f))] = 0
    return d

def rkd(s, t, distance=25, angle=50, normalize='mean'):
    def spread(f):
        d = pdist(f)
        return d/(d[d > 0].mean() if normalize == 'mean' else d.max())
    def angles(f):
        e = F.normalize(f.unsqueeze(0) - f.unsqueeze(1), dim=2)
        return torch.bmm(e, e.transpose(1, 2))
    with torch.no_grad(): d_t = spread(t)
    value = distance*F.smooth_l1_loss(spread(s), d_t)
    if angle == 0: return value
    with torch.no_grad(): a_t = angles(t)
    return value + angle*F.smooth_l1_loss(angles(s), a_t)

def congruence(s, t, gamma=.4, P=2):
    def kernel(f):
        f = F.normalize(f)
        cosine,corr = f @ f.T, 0
        for p in range(P + 1): corr = corr + math.exp(-2*gamma)*(2*gamma)**p/math.factorial(p)*cosine.pow(p)
        return corr
    return F.mse_loss(kernel(s), kernel(t))

def gram(s, t):
    def table(f):
        g = f @ f.T
        return g/g.norm()
    return F.mse_loss(table(s), table(t))

def cosines(s, t):
    table = lambda f: F.normalize(f) @ F.normalize(f).T
    return F.mse_loss(table(s), table(t))

def contrastive(s, t, T=.5): return F.cross_entropy(F.normalize(s) @ F.normalize(t).T/T, torch.arange(len(s)))

def crd(s, t, part, T=.07):
    s,t = F.normalize(part.student(s)), F.normalize(part.teacher(t))
    queue,n = part.keys.clone(), len(s)
    free = torch.arange(len(queue)) >= part.n_keys
    scores = torch.cat([(s*t).sum(1, keepdim=True), (s @ queue.T).masked_fill(free, -math.inf)], 1)/T
    with torch.no_grad(): part.keys[:n] = t
    return F.cross_entropy(scores, torch.zeros(n, dtype=torch.long))

def contrastive_maps(s, t, part): return contrastive(part(s.mean((2, 3))), t.mean((2, 3)))

def crd_nce(s, t, part, index, T=.07, momentum=.5):
    s,t = F.normalize(part.student(s)), F.normalize(part.teacher(t))
    drawn = (part.draws.rand(K, s)*N_SAMPLES).long()
    def nce(f, bank, log_z):
        scores = torch.cat([(f*bank[index]).sum(1, keepdim=True), f @ bank[drawn].T], 1)
        p = torch.exp(scores/T)/log_z.exp()
        return -(torch.log(p[:, 0]/(p[:, 0] + K/N_SAMPLES)) + torch.log(K/N_SAMPLES/(p[:, 1:] + K/N_SAMPLES)).sum(1)).mean()
    loss = nce(s, part.bank_t, part.log_z[0]) + nce(t, part.bank_s, part.log_z[1])
    with torch.no_grad():
        for bank,new in (part.bank_s, s), (part.bank_t, t): bank[index] = F.normalize(momentum*bank[index] + (1 - momentum)*new)
    return loss

def graph_edges(s, t):
    n_edges = len(s)*(len(s) - 1)
    def edges(f):
        d = pdist(f)
        return d/(d.sum()/n_edges)
    return (edges(s) - edges(t)).pow(2).sum()/n_edges

def instance_graph(s, t): return graph_edges(s, t) + F.mse_loss(F.normalize(s), F.normalize(t))

# sequence

def hidden_states(fm_s, fm_t): return F.mse_loss(fm_s['layer0'], fm_t['layer1']) + F.mse_loss(fm_s['layer1'], fm_t['layer3'])
def attention_maps(s, t): return (t*(t.log() - s.log())).sum(-1).mean()
def attention_scores(s, t): return (t.softmax(-1)*(t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
def counted_tokens(s, t, mask): return F.mse_loss(s[mask], t[mask])
def cosine_hidden(s, t): return (1 - F.cosine_similarity(s, t, dim=-1)).mean()

# dense

def box_regression(s, t, mask): return F.smooth_l1_loss(s[mask], t[mask])

def pyramid(fm_s, fm_t):
    def level(s, t):
        w = t.abs().mean(1, keepdim=True)
        return (w/w.amax((1, 2, 3), keepdim=True)*(s - t)).pow(2).mean()
    return sum(level(s, t) for s,t in zip(fm_s.values(), fm_t.values()))/len(fm_s)

# inputs, the formula and our settings; what is behind the name of a class tells rows apart
CASES = dict(SoftTarget=(logits, soft_target), SoftTarget_standardize=(logits, of_standardized, dict(standardize=True)),
    SoftTarget_mask=(partly, of_counted), Logits=(logits, mse_of_logits), Mutual=(logits, mutual), DecoupledKD=(labelled, decoupled),
    NormalizedKD=(labelled, normalized), DIST=(logits, correlations), WeightedSoftLabel=(labelled, weighted_soft_label),
    HardLabel=(logits, hard_label))
CASES |= dict(Divergence_reverse=(logits, reverse_kl), Divergence_js=(logits, jensen_shannon, dict(kind='js')),
    Divergence_tv=(logits, total_variation, dict(kind='tv')), Divergence_forward=(logits, forward_kl, dict(kind='forward')),
    BinaryKD=(logits, binary), SoftMAE=(logits, soft_mae), FitNet=(maps, fitnet),
    FitNet_normalize=(maps, normalized_maps, dict(normalize=True)), FitNet_adapter=(wide_maps, adapted), Attention=(maps, attention))
CASES |= dict(Attention_power=(maps, attention_of_power, dict(p=4)), Attention_paper=(maps, attention_of_paper, dict(form='paper')),
    ActivationBoundaries=(maps, boundaries), MarginReLU=(maps, margin_relu), FSP=(two_maps, fsp), ChannelWise=(maps, channel_wise),
    NST=(maps, nst), NST_few_positions=(few_positions, nst), VID=(small_maps, vid), FactorTransfer=(small_maps, factors_of_convs))
CASES |= dict(FactorTransfer_as_they_are=(maps, factors, dict(rate=None)), MaskedGenerative=(small_maps, masked_generative),
    MaskedGenerative_channel=(small_maps, partial(masked_generative, ratio=.15, hide='channel'), dict(ratio=.15, mask='channel')),
    ReviewKD=(stages, review), SRRL=(classified, srrl, dict(head='head')), AdversarialFeatures=(small_maps, adversarial),
    Similarity=(rows, similarity), Similarity_many_rows=(many_rows, similarity), PKT=(rows, pkt), PKT_many_rows=(many_rows, pkt))
CASES |= dict(RKD=(rows, rkd), RKD_max=(rows, partial(rkd, normalize='max'), dict(normalize='max')),
    RKD_distance=(rows, partial(rkd, angle=0), dict(angle=0)), CorrelationCongruence=(rows, congruence),
    CorrelationCongruence_many_rows=(many_rows, congruence), Gram=(rows, gram), Gram_many_rows=(many_rows, gram),
    CosineSimilarity=(rows, cosines), CosineSimilarity_many_rows=(many_rows, cosines), Contrastive=(rows, contrastive))
CASES |= dict(Contrastive_many_rows=(many_rows, contrastive), Contrastive_maps=(wide_maps, contrastive_maps), CRD_queue=(rows, crd),
    CRD_nce=(numbered, crd_nce, dict(form='nce')), InstanceGraph=(rows, instance_graph),
    InstanceGraph_edges=(rows, graph_edges, dict(vertices=0)), Embeddings=(tokens, fitnet), Embeddings_mask=(words, counted_tokens),
    HiddenStates=(hidden, hidden_states), AttentionMaps=(attentions, attention_maps))
CASES |= dict(AttentionMaps_scores=(scores, attention_scores, dict(input='scores')), CosineHidden=(tokens, cosine_hidden),
    BoxRegression=(boxes, box_regression), PyramidFeatures=(levels, pyramid))
N_SAMPLES,K = 50000, 16384 # of the training set, and of CRD's negatives
TEACHER = dict(t=nn.BatchNorm2d(64), head=nn.Linear(32, 10)) # the layers of the teacher that a loss reads

def keep_memory():
    "Free memory stays with the process: handing pages back and forth would cost more than small losses, as luck has it (glibc)"
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt is None: return
    mallopt(-1, 2**30) # M_TRIM_THRESHOLD
    mallopt(-4, 0) # M_MMAP_MAX

def zoo():
    "Everything in the modules of losses by name"
    found = [importlib.import_module(o.name) for o in pkgutil.iter_modules(fastkd.losses.__path__, 'fastkd.losses.')]
    return {name: o for module in found for name,o in vars(module).items()}

def first(given):
    "The first sample of each input"
    if isinstance(given, dict): return {name: first(o) for name,o in given.items()}
    return given[:1] if isinstance(given, torch.Tensor) else given

def step(f, leaves):
    "Forward and backward"
    value = f()
    return value, torch.autograd.grad(value, leaves, allow_unused=True)

def contest(name, cls):
    "Steps of the plain formula and of ours, without arguments, and our loss"
    torch.manual_seed(0)
    make,formula,settings = (*CASES[name], {})[:3]
    given,loss = make(), cls(**settings)
    of_probe = first({key: o for key,o in given.items() if key not in ('mask', 'index')})
    loss.build(Probe(**of_probe, teacher_module=TEACHER.get, n_samples=N_SAMPLES))
    students = [given['pred']] if 'pred' in given else given['fm_s'].values()
    leaves = [*(o.requires_grad_() for o in students), *(o for o in loss.parameters() if o.requires_grad)]
    offered = dict(given, learned=loss.learned)
    for side,key in ('s', 'fm_s'), ('t', 'fm_t'): offered[side] = next(iter(given.get(key, {}).values()), None)
    if isinstance(loss.learned, nn.ModuleList): offered['part'] = loss.learned[0]
    taken = {key: offered[key] for key in inspect.signature(formula).parameters if key in offered}
    return dict(plain=partial(step, partial(formula, **taken), leaves), ours=partial(step, partial(loss, **given), leaves)), loss

def check_same(name, steps, loss):
    "Raise an AssertionError unless value and gradients agree"
    for _ in range(2): steps['ours']() # a queue is not empty any more
    state,found = copy.deepcopy(loss.state_dict()), {}
    for arm,run in steps.items():
        loss.load_state_dict(state)
        value,grads = run()
        found[arm] = value.detach(), torch.cat([o.flatten() for o in grads if o is not None])
    (value,grad),(value_ours,grad_ours) = found['plain'], found['ours']
    assert torch.allclose(value_ours, value, rtol=1e-4, atol=0), f'{name}: {value_ours.item()} instead of {value.item()}'
    apart = ((grad_ours - grad).norm()/grad.norm()).item()
    assert apart <= 1e-3, f'{name}: the gradients differ by {apart:.2g}'

def cpu_seconds(steps, repeats):
    "Seconds of each step of each arm, in turns; short ones several times in a row"
    def seconds(run, n=1):
        start = time.process_time()
        for _ in range(n): run()
        return (time.process_time() - start)/n
    n = max(1, round(.01/max(seconds(steps['plain']), 1e-5)))
    taken = {arm: [] for arm in steps}
    for i in range(repeats):
        for arm in list(steps)[::1 if i%2 else -1]: taken[arm].append(seconds(steps[arm], n))
    return taken

def peak_bytes(run):
    "The most that is allocated at a time while `run` runs"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: _ = run()
    events = [o for o in prof.profiler.kineto_results.events() if o.name() == '[memory]']
    return max(accumulate(o.nbytes() for o in sorted(events, key=lambda o: o.start_ns())))

def check_peak_bytes():
    "A known case: 1 MB that `exp` saves, and 1 MB for the gradient"
    x = torch.randn(2**18, requires_grad=True)
    run = partial(step, lambda: x.exp().sum(), [x])
    run()
    found = peak_bytes(run)
    assert 2**21 <= found < 2**21 + 1000, f'{found} bytes instead of {2**21}'

def be_steady(keeps_memory=True):
    "What every benchmark of time and memory begins with"
    torch.set_num_threads(1)
    os.environ['KINETO_LOG_LEVEL'] = '99' # the profiler has much to say
    if keeps_memory: keep_memory()
    check_peak_bytes()

def call_cost(name, make, repeats=2000):
    "Microseconds that a call of ours takes beside its formula, on inputs so small that nothing else is measured"
    formula,taken = CASES[name][1], {}
    CASES['tiny'] = make,formula
    steps,_ = contest('tiny', zoo()[name])
    for arm,run in steps.items():
        tries = []
        for _ in range(10):
            start = time.process_time()
            for _ in range(repeats//10): run()
            tries.append(time.process_time() - start)
        taken[arm] = statistics.median(tries)/(repeats//10)
    return 1e6*(taken['ours'] - taken['plain'])

NOTES = """Ratios are of medians, and above 1 they have four reasons.

- **A call has a price of its own**: inputs are looked through for half precision, autocast is asked for, activations are paired. Here it
  is {response:.0f} µs for a loss on predictions and {feature:.0f} µs for one on activations when called over and over, and
  more between computations that take its place in the processor's memory. Rows whose formula takes less than 2 ms show it. There is
  one walk over the inputs, and a fast way for plain tensors; what is left is mostly what a module of torch costs.
- **Numbers that are ruled out.** `Divergence` keeps classes finite that a teacher rules out, and `AttentionMaps` from scores keys that are
  masked in both models: one pass more, over one side or both. By `clamp` and by `masked_fill`, in autograd or in a function of its own,
  that took more time than by `threshold`.
- **Exact distances.** `InstanceGraph` and `RKD` take distances from differences (`pdist`); the authors take them from inner products, a
  matrix product that rounds the distance of close samples away. Three gradients were tried: that of `pdist` walks over all pairs and is
  slow, a product in single precision is fast and as wrong for close samples as the authors' distances, and a product in double precision
  is right, and is what is used.
- **A gradient that has one, too.** `AttentionMaps` takes one logarithm, of the quotient that is its gradient, and makes that quotient again
  in the backward pass. To keep it is faster, and loses second derivatives.

What is below 1: powers of `Attention` are those of squares, `DIST` takes correlations from `layer_norm` and `batch_norm`, which have fast
gradients, and `NST` and `RKD distance` compute the same from smaller tables."""

def measure(name, cls, repeats):
    "Times and memory of both arms"
    steps,loss = contest(name, cls)
    check_same(name, steps, loss)
    return dict(seconds=cpu_seconds(steps, repeats), bytes={arm: peak_bytes(run) for arm,run in steps.items()})

HEAD = ['| loss | ms of CPU, plain | time, ours to plain | MB, plain | memory, ours to plain |', '|---|---|---|---|---|']

def row(name, found):
    "A line of the table"
    if found is None: return f'| {name} | skipped, for it is not in this version | | | |'
    (time_plain,time_ours),(size_plain,size_ours) = [statistics.median(o) for o in found['seconds'].values()], found['bytes'].values()
    return f'| {name} | {1000*time_plain:.2f} | {time_ours/time_plain:.2f} | {size_plain/1e6:.2f} | {size_ours/size_plain:.2f} |'

def told(results):
    "All of it as Markdown"
    lines = [row(name.replace('_', ' '), o) for name, o in results['found'].items()]
    return '\n'.join([f"`{results['command']}`: {results['machine']}.", '', *HEAD, *lines, '', NOTES.format(**results['calls']), ''])

if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help='classes to compare; all by default')
    parser.add_argument('--repeats', type=int, default=20, help='measurements per arm')
    parser.add_argument('--out', type=Path, default=Path('benchmarks'), help='folder for losses.md and losses.json')
    args = parser.parse_args()
    be_steady()
    classes,found = zoo(), {}
    print(*HEAD, sep='\n')
    for name in args.names or CASES:
        cls = classes.get(name.partition('_')[0])
        found[name] = None if cls is None else measure(name, cls, args.repeats)
        print(row(name.replace('_', ' '), found[name]), flush=True)
    calls = dict(response=call_cost('Logits', tiny_logits), feature=call_cost('FitNet', tiny_maps))
    command = ' '.join(['python -m benchmarks.losses', *sys.argv[1:]])
    results = dict(command=command, machine=machine(), calls=calls, found=found)
    (args.out/'losses.json').write_text(json.dumps(results, indent=1) + '\n')
    (args.out/'losses.md').write_text(told(results))
