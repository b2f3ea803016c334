"""A one-dimensional Gaussian mixture whose fields along every Gaussian path are known in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kinoflow.dit_video.flow.paths import Coefficients, GaussianPath

F64 = torch.float64


@dataclass(frozen=True)
class Mixture:
    """Components N(mean, std²) with weights; std 0 makes points of them."""

    weights: tuple[float, ...] = (0.2, 0.5, 0.3)
    means: tuple[float, ...] = (-2.0, 0.3, 1.5)
    stds: tuple[float, ...] = (0.4, 0.2, 0.6)

    def _components(self, at: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
        weight, mean, std = (torch.tensor(v, dtype=F64) for v in (self.weights, self.means, self.stds))
        variance = (at.alpha[..., None] * std) ** 2 + at.beta[..., None] ** 2
        return weight, at.alpha[..., None] * mean, variance

    def log_density(self, x: Tensor, t: Tensor, path: GaussianPath) -> Tensor:
        """log p_t(x): each component is N(α m, α² s² + β²)."""
        weight, mean, variance = self._components(path(t))
        exponent = -0.5 * (x[..., None] - mean) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)
        return torch.logsumexp(exponent + weight.log(), dim=-1)

    def responsibilities(self, x: Tensor, t: Tensor, path: GaussianPath) -> Tensor:
        """Which component x came from, [..., component]."""
        weight, mean, variance = self._components(path(t))
        return (weight.log() - 0.5 * (x[..., None] - mean) ** 2 / variance - 0.5 * variance.log()).softmax(-1)

    def data_and_noise(self, x: Tensor, t: Tensor, path: GaussianPath) -> tuple[Tensor, Tensor]:
        """E[z|x] and E[ε|x]: in each component z and ε are jointly Gaussian with x."""
        at = path(t)
        _, mean, variance = self._components(at)
        std = torch.tensor(self.stds, dtype=F64)
        share = self.responsibilities(x, t, path) * (x[..., None] - mean) / variance
        data = self.responsibilities(x, t, path) * torch.tensor(self.means, dtype=F64)
        data = data.sum(-1) + (share * at.alpha[..., None] * std**2).sum(-1)
        return data, at.beta * share.sum(-1)

    def velocity(self, x: Tensor, t: Tensor, path: GaussianPath) -> Tensor:
        """The marginal velocity E[α̇ z + β̇ ε | x]."""
        at = path(t)
        data, noise = self.data_and_noise(x, t, path)
        return at.alpha_dot * data + at.beta_dot * noise

    def score(self, x: Tensor, t: Tensor, path: GaussianPath) -> Tensor:
        """∇ log p_t(x), by the derivative of the density: not by way of the velocity."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.log_density(x, t, path).sum(), x)
        return slope

    def distribution(self, x: Tensor) -> Tensor:
        """P(z <= x) of the data."""
        weight, mean, std = (torch.tensor(v, dtype=F64) for v in (self.weights, self.means, self.stds))
        return (weight * torch.special.ndtr((x[..., None] - mean) / std)).sum(-1)

    def at(self, t: float, path: GaussianPath) -> "Mixture":
        """p_t, which is a mixture too."""
        at = path(torch.tensor(t, dtype=F64))
        alpha, beta = float(at.alpha), float(at.beta)
        return Mixture(
            self.weights,
            tuple(alpha * mean for mean in self.means),
            tuple(math.hypot(alpha * std, beta) for std in self.stds),
        )

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws of the data and the component each came from."""
        which = torch.multinomial(
            torch.tensor(self.weights, dtype=F64), count, replacement=True, generator=generator
        )
        mean, std = torch.tensor(self.means, dtype=F64)[which], torch.tensor(self.stds, dtype=F64)[which]
        return mean + std * torch.randn(count, generator=generator, dtype=F64), which
