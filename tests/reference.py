"""MABN in float64, written in numpy from the paper's formulas. Knows nothing of the package."""
import numpy as np


class ReferenceMABN:
    """One layer. Shapes: x, d (N, C, H, W); weight, bias, running_var (C,)."""

    def __init__(
        self, num_features, eps=1e-5, momentum=0.02, buffer_size=16, warmup_iters=100,
        renorm_clip=5.0, renorm_start_iter=1000,
    ):  # fmt: skip
        self.eps, self.momentum, self.m = eps, momentum, buffer_size
        self.warmup_iters, self.clip, self.renorm_start = warmup_iters, renorm_clip, renorm_start_iter
        self.weight, self.bias = np.ones(num_features), np.zeros(num_features)
        self.running_var = np.ones(num_features)
        self.t, self.moments, self.psis = 0, [], []

    def _average(self, recorded):
        if self.t <= self.m or self.t < self.warmup_iters:
            return recorded[-1]
        return np.mean(recorded[-self.m :], axis=0)

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


def _map(vector):
    return vector[None, :, None, None]
