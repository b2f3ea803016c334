"""Raw video to clips that are worth training on: signals of every frame, scores of every shot, decisions.

A frame is decoded once, small (`scan`); what the stages say of frames and shots are plain numbers in Parquet
(`shots`, `borders`, `text`, `motion`, `quality`, `duplicates`); `selection` decides on them without a video.
"""
