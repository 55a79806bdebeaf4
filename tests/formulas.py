"The losses once more, from their papers, in float64 and without torch; and gradients by central differences."
import numpy as np, torch

# ---- Comparing

def as_numpy(o): return o.detach().numpy() if isinstance(o, torch.Tensor) else np.asarray(o)

def close(a, b, rtol=1e-6, atol=1e-9):
    "Raise an AssertionError that shows the largest difference"
    np.testing.assert_allclose(as_numpy(a), as_numpy(b), rtol=rtol, atol=atol)

def numeric_grad(f, x, h=1e-5):
    "Central differences of the number `f(x)`, for every element of the array `x`"
    grad = np.empty_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        grad[i] = (f(up) - f(down))/(2*h)
    return grad

def value_and_grad(f, *inputs):
    "The scalar `f(*inputs)`, and its gradient for each input"
    inputs = [o.detach().clone(memory_format=torch.preserve_format).requires_grad_() for o in inputs]
    value = f(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)

# ---- Response: arrays of shape (B, C, ...)

def rows(z): return np.moveaxis(z, 1, -1).reshape(-1, z.shape[1])

def log_softmax(z):
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

def standardize(z): return (z - z.mean(-1, keepdims=True))/(z.std(-1, ddof=1, keepdims=True) + 1e-7)

def soft_target(z_s, z_t, T=5, standardized=False):
    z_s, z_t = rows(z_s), rows(z_t)
    if standardized: z_s, z_t = standardize(z_s), standardize(z_t)
    log_s, log_t = log_softmax(z_s/T), log_softmax(z_t/T)
    return T**2*(np.exp(log_t)*(log_t - log_s)).sum(-1).mean()

def soft_target_grad(z_s, z_t, T=5):
    "By hand: T/N · (p_S − p_T), at the N positions of `(B, C, ...)`"
    p_s, p_t = (np.exp(log_softmax(rows(z)/T)) for z in (z_s, z_t))
    grad = T*(p_s - p_t)/len(p_s)
    return np.moveaxis(grad.reshape(len(z_s), *z_s.shape[2:], z_s.shape[1]), -1, 1)

def logits(z_s, z_t): return ((z_s - z_t)**2).mean()

def logits_grad(z_s, z_t): return 2*(z_s - z_t)/z_s.size

# ---- Feature: arrays of shape (B, C, *positions)

def pool_axis(f, size, axis):
    "Mean over `size` windows, which overlap where `size` does not divide the axis"
    n = f.shape[axis]
    windows = [range(i*n//size, -(-(i + 1)*n//size)) for i in range(size)]
    return np.stack([f.take(window, axis).mean(axis) for window in windows], axis)

def meet(f_s, f_t):
    "Both maps at the smaller of their sizes, axis by axis"
    for axis in range(2, f_s.ndim):
        size = min(f_s.shape[axis], f_t.shape[axis])
        f_s, f_t = pool_axis(f_s, size, axis), pool_axis(f_t, size, axis)
    return f_s, f_t

def unit(f, axis=1): return f/np.sqrt((f**2).sum(axis, keepdims=True))

def adapt(f_s, weight, bias):
    "A 1×1 convolution, or a linear layer"
    weight = weight.reshape(weight.shape[:2])
    return np.einsum('bc...,dc->bd...', f_s, weight) + bias.reshape(-1, *[1]*(f_s.ndim - 2))

def fitnet(f_s, f_t, weight=None, bias=None, normalize=False):
    f_s, f_t = meet(f_s, f_t)
    if weight is not None: f_s = adapt(f_s, weight, bias)
    if normalize: f_s, f_t = unit(f_s), unit(f_t)
    return ((f_s - f_t)**2).mean()

def attention(f_s, f_t, p=2, form='code'):
    q_s, q_t = (unit((np.abs(f)**p).mean(1).reshape(len(f), -1)) for f in meet(f_s, f_t))
    return ((q_s - q_t)**2).mean() if form == 'code' else np.sqrt(((q_s - q_t)**2).sum(1)).mean()

# ---- Relation: arrays of shape (B, ...)

def pkt(f_s, f_t, eps=1e-7):
    def shares(f):
        f = f.reshape(len(f), -1)
        length = np.sqrt((f**2).sum(1))
        similarity = (f @ f.T/np.outer(length, length) + 1)/2
        return similarity/similarity.sum(1, keepdims=True)
    p_s, p_t = shares(f_s), shares(f_t)
    return (p_t*np.log((p_t + eps)/(p_s + eps))).mean()
