"""Buckets: their text form, the choice per step, and which clip serves which."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.buckets import Bucket, admissible, choose, parse

SHAPES = st.builds(
    Bucket,
    frames=st.integers(1, 512),
    height=st.integers(1, 2048),
    width=st.integers(1, 2048),
    fps=st.fractions(Fraction(1, 2), 120, max_denominator=1001),
    weight=st.floats(0, 1e6),
    batch_size=st.none() | st.integers(1, 4096),
)


@given(SHAPES)
def test_text_round_trip(bucket):
    assert parse(str(bucket)) == bucket


def test_forms_that_parse_reads():
    assert str(parse("16x64x64@16")) == "16x64x64@16"
    assert parse("32x128x96@23.976").fps == Fraction(2997, 125)
    bucket = parse("32x128x96@24000/1001 weight=.5 batch=8")
    assert bucket == Bucket(
        frames=32, height=128, width=96, fps=Fraction(24000, 1001), weight=0.5, batch_size=8
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "16x64@16", "16x64x64", "axbxc@d", "0x64x64@16", "16x64x64@0", "16x64x64@1/0", "-1x64x64@16",
        "16x64x64@16 batch=0", "16x64x64@16 weight=-1", "16x64x64@16 weight=nan", "16x64x64@16 wait=3",
        "16x64x64@16 batch=two",
    ],
)  # fmt: skip
def test_forms_that_it_refuses(text):
    with pytest.raises(UserError, match="bucket") as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_choice_follows_the_weights_and_only_seed_and_step():
    buckets = [parse("16x64x64@16 weight=3"), parse("1x64x64@16"), parse("8x8x8@8 weight=0")]
    drawn = Counter(str(choose(7, step, buckets)) for step in range(4000))
    assert drawn[str(buckets[0])] == pytest.approx(3000, abs=120)
    assert drawn[str(buckets[2])] == 0
    assert [choose(7, s, buckets) for s in (5, 3, 5)] == [choose(7, s, buckets) for s in (5, 3, 5)]
    assert [choose(7, s, buckets) for s in range(50)] != [choose(8, s, buckets) for s in range(50)]
    with pytest.raises(UserError, match="weight above 0"):
        choose(0, 0, buckets[2:])


def test_a_clip_fills_by_duration_and_rate():
    bucket = parse("5x8x8@24")
    assert bucket.span == Fraction(4, 24)
    assert bucket.filled_by(duration=Fraction(6, 30), fps=Fraction(30))
    assert not bucket.filled_by(duration=Fraction(5, 30), fps=Fraction(30))
    assert not bucket.filled_by(duration=Fraction(100, 16), fps=Fraction(16)), "would show frames twice"
    ntsc = Fraction(24000, 1001)
    assert bucket.filled_by(duration=100 / ntsc, fps=ntsc), "one in a thousand may be"
    assert parse("1x8x8@24").filled_by(duration=Fraction(1), fps=Fraction(1))


def test_the_buckets_that_a_clip_serves():
    square, wide, tall = parse("16x64x64@16"), parse("16x64x112@16"), parse("16x112x64@16")
    short, image, large = parse("8x64x112@16"), parse("1x64x112@16"), parse("16x128x224@16")
    buckets = [square, wide, tall, short, image, large]
    fps = Fraction(32)
    serves = admissible(buckets, duration=Fraction(99, 32), height=360, width=640, fps=fps)
    assert set(serves) == {wide, short, image, large}
    brief = admissible(buckets, duration=Fraction(20, 32), height=360, width=640, fps=fps)
    assert set(brief) == {short, image}
    assert admissible(buckets, duration=Fraction(2, 32), height=360, width=640, fps=fps) == (image,)
    assert admissible(buckets, duration=Fraction(99, 32), height=640, width=360, fps=fps) == (tall,)
    assert admissible([square], duration=Fraction(3, 32), height=64, width=64, fps=fps) == ()
