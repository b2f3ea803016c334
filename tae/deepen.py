"""A deeper decoder that starts as the one it grew from (Chen et al. 2016, Net2DeeperNet)."""

from dataclasses import replace

from torch import nn

from tae.layers import ResBlock
from tae.model import TAE


def deepened(tae: TAE, blocks: int) -> TAE:
    """A copy with `blocks` more residual blocks at the decoder's finest level, which add nothing yet.

    Encoder and latents are those of `tae`, and so are decoded clips until the new blocks are trained.
    """
    finest, *others = tae.config.decoder_blocks
    deeper = TAE(replace(tae.config, decoder_blocks=(finest + blocks, *others)))
    deeper.init_weights()
    # The finest level comes last, so the old layers keep their names.
    for block in list(deeper.decoder.layers)[len(tae.decoder.layers) :]:
        assert isinstance(block, ResBlock)
        for parameter in block.conv2.temporal.parameters():
            nn.init.zeros_(parameter)
    deeper.load_state_dict(deeper.state_dict() | tae.state_dict())
    return deeper
