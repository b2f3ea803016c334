"""The fast paths of a CPU, put on an autoencoder from outside by `accelerate`."""

import torch

from kinoflow.tae.cpu import scratch, winograd
from kinoflow.tae.cpu.heap import keep_pages
from kinoflow.tae.model.convolution import SpatialConv, TemporalConv
from kinoflow.tae.model.tae import TAE


def accelerate(tae: TAE) -> TAE:
    """Put the fast paths of a CPU on a model for inference, in place; the same model is returned.

    Convolutions of 3x3 take half of the products (`winograd`), rows of frames are joined in memory that is
    kept (`scratch`), and malloc keeps what is freed, in the whole process (`heap`). With gradients, under
    autocast, compiled, or moved to another device or dtype later, the layers compute as without.

    A model whose weights are not in fp32 on a CPU is left as it is.
    """
    weight = next(tae.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return tae
    keep_pages()
    for layer in tae.modules():
        if isinstance(layer, TemporalConv):
            layer.concatenate = scratch.concatenate
        elif type(layer) is SpatialConv and (layer.stride, layer.padding) == ((1, 1, 1), (0, 1, 1)):
            layer.convolve = winograd.convolve
    return tae
