"""Models of which nothing is zero."""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def shake(model: Model) -> Model:
    """Move every value a little by torch's own generator: what starts at zero then carries signal."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model
