"""The norms in float64, written in numpy from the papers' formulas. Knows nothing of the package."""

import numpy as np


class ReferenceMABN:
    """One layer. Shapes: x, d (N, C, H, W); weight, bias, running_var (C,)."""

    def __init__(
        self, num_features, eps=1e-5, momentum=0.02, buffer_size=16, warmup_iters=100,
        renorm_clip=5.0, renorm_start_iter=1000, lag=0,
    ):  # fmt: skip
        self.eps, self.momentum, self.m, self.lag = eps, momentum, buffer_size, lag
        self.warmup_iters, self.clip, self.renorm_start = (
            warmup_iters,
            renorm_clip,
            renorm_start_iter,
        )
        self.weight, self.bias = np.ones(num_features), np.zeros(num_features)
        self.running_var = np.ones(num_features)
        self.t, self.moments, self.psis = 0, [], []

    def _average(self, recorded):
        if self.t <= self.m or self.t < self.warmup_iters:
            return recorded[-1]
        return np.mean(recorded[: len(recorded) - self.lag][-self.m :], axis=0)

    def forward(self, x):
        self.t += 1
        self.x = x.astype(np.float64)
        self.moments.append((self.x**2).mean(axis=(0, 2, 3)))
        self.chi = np.sqrt(self._average(self.moments) + self.eps)
        self.r = np.ones_like(self.chi)
        if self.t > max(self.renorm_start, self.warmup_iters):
            ratio = self.chi / np.sqrt(self.running_var + self.eps)
            self.r = np.clip(ratio, 1 / self.clip, self.clip)
        average = self.chi**2 - self.eps
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * average
        self.z = self.x / _map(self.chi)
        return _map(self.weight * self.r) * self.z + _map(self.bias)

    def backward(self, d):
        """Gradients of x, weight and bias."""
        d = d.astype(np.float64)
        g = d * _map(self.weight * self.r)
        self.psis.append((g * self.z).mean(axis=(0, 2, 3)))
        grad_x = (g - self.z * _map(self._average(self.psis))) / _map(self.chi)
        return grad_x, (d * _map(self.r) * self.z).sum(axis=(0, 2, 3)), d.sum(axis=(0, 2, 3))

    def evaluate(self, x):
        scale = self.weight / np.sqrt(self.running_var + self.eps)
        return _map(scale) * x.astype(np.float64) + _map(self.bias)


class ReferenceBRN:
    """
    One layer. Shapes: x, d (N, C, H, W); weight, bias, running_mean, running_var (C,).

    The statistics run as BN's do: the variance enters them unbiased.
    """

    def __init__(
        self, num_features, eps=1e-5, momentum=0.01, r_max=3.0, r_max_iters=(5000, 40000),
        d_max=5.0, d_max_iters=(5000, 25000),
    ):  # fmt: skip
        self.eps, self.momentum = eps, momentum
        self.r_bounds, self.r_iters = (1.0, r_max), r_max_iters
        self.d_bounds, self.d_iters = (0.0, d_max), d_max_iters
        self.weight, self.bias = np.ones(num_features), np.zeros(num_features)
        self.running_mean, self.running_var = np.zeros(num_features), np.ones(num_features)
        self.t = 0  # iterations before this one

    def forward(self, x):
        x = x.astype(np.float64)
        mean, var = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
        self.sigma_b, sigma = np.sqrt(var + self.eps), np.sqrt(self.running_var + self.eps)
        r_max = np.interp(self.t, self.r_iters, self.r_bounds)
        d_max = np.interp(self.t, self.d_iters, self.d_bounds)
        self.r = np.clip(self.sigma_b / sigma, 1 / r_max, r_max)
        self.d = np.clip((mean - self.running_mean) / sigma, -d_max, d_max)
        self.z = (x - _map(mean)) / _map(self.sigma_b)
        self.normalized = self.z * _map(self.r) + _map(self.d)
        count = x.size // len(mean)
        unbiased = var * count / max(count - 1, 1)
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased
        self.t += 1
        return _map(self.weight) * self.normalized + _map(self.bias)

    def backward(self, d):
        """Gradients of x, weight and bias; BN's, as r and d are constants."""
        d = d.astype(np.float64)
        g = d * _map(self.weight * self.r)  # ∂L/∂z
        g_b, psi_b = g.mean(axis=(0, 2, 3)), (g * self.z).mean(axis=(0, 2, 3))
        grad_x = (g - _map(g_b) - self.z * _map(psi_b)) / _map(self.sigma_b)
        return grad_x, (d * self.normalized).sum(axis=(0, 2, 3)), d.sum(axis=(0, 2, 3))

    def evaluate(self, x):
        return _evaluate(self, x, self.running_mean, self.running_var)


class ReferenceMBN:
    """One layer. Shapes: x, d (N, C, H, W); weight, bias, mean, var (C,)."""

    def __init__(
        self, num_features, eps=1e-5, memory_size=16, current_weight=0.5, decay=0.9
    ):  # fmt: skip
        self.eps, self.k, self.current_weight, self.decay = eps, memory_size, current_weight, decay
        self.weight, self.bias = np.ones(num_features), np.zeros(num_features)
        self.memory = []  # (mean, biased variance) of all batches, the newest first

    def weights(self):
        """Of the remembered batches, the newest first."""
        older = self.decay ** np.arange(1, min(self.k, len(self.memory)))
        if len(older) == 0:
            return np.ones(1)
        rest = 1 - self.current_weight
        return np.concatenate([[self.current_weight], rest * older / older.sum()])

    def forward(self, x):
        self.x = x.astype(np.float64)
        self.memory.insert(0, (self.x.mean(axis=(0, 2, 3)), self.x.var(axis=(0, 2, 3))))
        self.w = self.weights()
        means, variances = (np.stack(s) for s in zip(*self.memory[: self.k]))
        self.mean = self.w @ means
        self.var = self.w @ (variances + (means - self.mean) ** 2)
        self.z = (self.x - _map(self.mean)) / _map(np.sqrt(self.var + self.eps))
        return _map(self.weight) * self.z + _map(self.bias)

    def backward(self, d):
        """Gradients of x, weight and bias; the older batches are constants."""
        d = d.astype(np.float64)
        inverse = 1 / np.sqrt(self.var + self.eps)
        g = d * _map(self.weight)  # ∂L/∂z
        centered = self.x - _map(self.mean)
        # Of μ_M (σ²_M held fixed) and of σ²_M. As Σ w_i·(μ_i - μ_M) = 0, the derivatives by a value x_b
        # of the current batch are w_0/n and 2·w_0·(x_b - μ_M)/n.
        grad_mean = -(g * _map(inverse)).sum(axis=(0, 2, 3))
        grad_var = -0.5 * (g * centered).sum(axis=(0, 2, 3)) * inverse**3
        share = self.w[0] / (d.size // len(inverse))
        grad_x = g * _map(inverse) + share * (_map(grad_mean) + 2 * centered * _map(grad_var))
        return grad_x, (d * self.z).sum(axis=(0, 2, 3)), d.sum(axis=(0, 2, 3))

    def evaluate(self, x):
        return _evaluate(self, x, self.mean, self.var)


def _evaluate(norm, x, mean, var):
    scale = norm.weight / np.sqrt(var + norm.eps)
    return _map(scale) * (x.astype(np.float64) - _map(mean)) + _map(norm.bias)


def _map(vector):
    return vector[None, :, None, None]
