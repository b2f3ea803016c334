"""The video backbone: a patchified spatiotemporal transformer that predicts flow-matching velocities."""

from dit_video.model import DiTConfig, TextContext, VideoDiT

__all__ = ["DiTConfig", "TextContext", "VideoDiT"]
