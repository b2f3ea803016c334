"""The backbones: what training, releases and sampling take alike.

Each gives the velocity of (latent "b c t h w", time "b", condition) and has `encode_condition`, for many
calls with one condition; `init_parameter` and `continue_parameter`, by which a run gives it its values;
`grid`, the tokens or cells of a latent; `from_pretrained` and `save_pretrained`.
"""

from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
from kinoflow.dit_video.unet import UNet, UNetConfig
from kinoflow.dit_video.video_dit import DiTConfig, VideoDiT

Backbone = VideoDiT | UNet | MMDiT
BackboneConfig = DiTConfig | UNetConfig | MMDiTConfig

# What a run calls it (model=), and the folder of a release that holds it.
BACKBONES: dict[str, type[VideoDiT] | type[UNet] | type[MMDiT]] = {
    "dit": VideoDiT, "unet": UNet, "mmdit": MMDiT
}  # fmt: skip
