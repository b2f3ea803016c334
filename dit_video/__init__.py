"""The video backbone: a patchified spatiotemporal transformer that predicts flow-matching velocities."""

from kinoflow.dit_video.video_dit import DiTConfig, TextContext, VideoDiT

__all__ = ["DiTConfig", "TextContext", "VideoDiT"]
