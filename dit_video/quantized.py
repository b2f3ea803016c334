"""Linear layers whose weights are held in 8 bits: a quarter of the memory of fp32, for sampling only."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from torch.nn import functional

from kinoflow.configs.errors import UserError
from kinoflow.configs.pretrained import in_bytes, row_scale


class Int8Linear(nn.Module):
    """A linear layer of int8 weights with one scale an output, computed in the inputs' number type.

    Weights are rounded to the nearest of 255 levels, symmetric around 0: none is further from its value than
    half a level, which is 1/254 of the largest of its row.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scale = row_scale(weight)
        # Buffers: what asks for a parameter's number type asks for that of the computation.
        self.register_buffer("weight", in_bytes(weight, scale))
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.weight: Int8[Tensor, "outputs inputs"]
        self.scale: Float[Tensor, " outputs"]
        self.bias: Float[Tensor, " outputs"] | None

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """The layer's output."""
        scaled = functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return scaled if self.bias is None else scaled + self.bias.to(x.dtype)


def quantize(model: nn.Module) -> nn.Module:
    """Put int8 weights in the place of linear layers, one by one; the same model is returned.

    Those of the blocks, which are nearly all: what leads into tokens and out of them, time and texts keep
    theirs.

    Raises:
        UserError: a model without blocks, as a U-Net is.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise UserError("dtype: int8 is for transformers, and this one is of convolutions; use fp32 or bf16")
    for module in list(blocks.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, Int8Linear(layer))
    return model


def hold(model: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The model on a device, its weights in `dtype`, or as they are where it is None.

    torch.int8 stands for `quantize`, with what is left in fp32 on a CPU and bf16 elsewhere.

    Raises:
        UserError: int8 of a model without blocks.
    """
    if dtype is None or dtype != torch.int8:
        return model.to(device, dtype)
    return quantize(model).to(device, computed_in(dtype, device))


def computed_in(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The number type of the activations beside weights of `dtype`."""
    if dtype != torch.int8:
        return dtype
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
