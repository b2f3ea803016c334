"""Clips in and out, through FFmpeg: `probe`, `read`, `stream`, `thumbnails` and `frames_at`, `extract`,
`write` and `VideoWriter`.

Which of FFmpeg's features reading follows, leaves alone or refuses: `data.video.reader`; of colours,
`data.video.color`; of sound, `data.video.soundtrack` (every codec that FFmpeg decodes).
"""

from kinoflow.data.video.copying import extract
from kinoflow.data.video.info import VideoInfo
from kinoflow.data.video.reader import (
    frames_at,
    origin,
    presentation,
    probe,
    read,
    readable,
    stream,
    thumbnails,
)
from kinoflow.data.video.sheet import contact_sheet
from kinoflow.data.video.writer import VideoWriter, write

__all__ = [
    "VideoInfo", "VideoWriter", "contact_sheet", "extract", "frames_at", "origin", "presentation", "probe",
    "read", "readable", "stream", "thumbnails", "write",
]  # fmt: skip
