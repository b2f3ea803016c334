"""The backbones, which predict flow-matching velocities: a spatiotemporal transformer, a U-Net."""

from kinoflow.dit_video.mmdit import MMDiT, MMDiTConfig
from kinoflow.dit_video.unet import UNet, UNetConfig
from kinoflow.dit_video.video_dit import DiTConfig, TextContext, VideoDiT

__all__ = ["DiTConfig", "MMDiT", "MMDiTConfig", "TextContext", "UNet", "UNetConfig", "VideoDiT"]
