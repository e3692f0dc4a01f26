"""Muon: momentum whose matrices are made orthogonal; what is not a matrix of a hidden layer gets AdamW.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale that lets both share
a learning rate is Liu et al. (arXiv 2502.16982). ``torch.optim.Muon`` multiplies in bf16, which many CPUs emulate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd polynomial that drives singular values towards 1
_STEPS = 5
_RMS_OF_ADAMW = 0.2  # of an update's elements, about


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return roughly the nearest orthogonal matrices: [N, rows, columns] with all singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Optimise by Muon with Nesterov momentum and decoupled weight decay, for parameters of two dimensions."""

    def __init__(self, parameters: Any, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the parameters from their gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalized(torch.stack([self._direction(parameter) for parameter in parameters]))
                scale = _RMS_OF_ADAMW * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)

    def _direction(self, parameter: Tensor) -> Tensor:
        """Return Nesterov's direction: the gradient mixed with the momentum that already includes it."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights of the linear layers but for those with a few outputs, which are heads."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return [weight for weight in weights if min(weight.shape) >= 16 and weight.requires_grad]
