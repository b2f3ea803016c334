"""The verifier that ships."""

from kinoflow.data.world import caption, render, sample_scene
from kinoflow.sample.release import Release


def test_the_shipped_one_passes_real_clips_and_no_others():
    """Of 16 held-out scenes: with their own prompts nearly all, with those of others none."""
    release = Release.load()
    bucket, scenes = release.bucket(), [sample_scene(index, split="heldout") for index in range(16)]
    texts = [caption(scene, index, complete=True) for index, scene in enumerate(scenes)]
    clips = [render(s, frames=32, height=128, width=128, fps=bucket.fps) for s in scenes]
    verifier = release.verifier
    own = [verifier.score(*pair, bucket.fps) for pair in zip(texts, clips, strict=True)]
    others = [verifier.score(*pair, bucket.fps) for pair in zip([*texts[1:], texts[0]], clips, strict=True)]
    assert sum(score.passed for score in own) >= 14 and not any(score.passed for score in others)
    assert all(one > other for one, other in zip(own, others, strict=True))
