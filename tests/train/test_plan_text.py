"""The sizes of text encoders against the models of transformers."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from kinoflow.conditioning.checkpoints import LIMITS as OWN_LIMITS
from kinoflow.train.plan.text import _PUBLISHED, LIMITS, NAMES, encoder_sizes

MINI = Path(__file__).parents[2] / "sample" / "mini"


def build(name, width, shape):
    with torch.device("meta"):
        if name == "metaclip":
            config = CLIPTextConfig(
                hidden_size=width, max_position_embeddings=256, num_attention_heads=8, **shape
            )
            return CLIPTextModel(config)
        return T5EncoderModel(T5Config(d_model=width, feed_forward_proj="gated-gelu", **shape))


@pytest.mark.parametrize(("name", "width"), _PUBLISHED)
def test_published_encoders_have_the_parameters_of_their_class(name, width):
    widths = {"ul2": 4096, "byt5": 1472, "metaclip": 1024, name: width}
    sizes = dict(zip(NAMES, encoder_sizes(tuple(widths[n] for n in NAMES), None), strict=True))
    source, shape = _PUBLISHED[name, width]
    model = build(name, width, shape)
    assert sizes[name].source == source
    assert sizes[name].parameters == sum(p.numel() for p in model.parameters())


def test_a_release_folder_goes_before_what_is_published():
    sizes = encoder_sizes((128, 96, 96), MINI)
    assert [size.source for size in sizes] == [str(MINI / "text" / name) for name in NAMES]
    for size in sizes:
        stored = MINI / "text" / size.name / "model.safetensors"
        assert 2 * size.parameters == pytest.approx(stored.stat().st_size, rel=0.02), "stored in fp16"


def test_limits_are_those_of_the_encoders():
    assert dict(zip(NAMES, LIMITS, strict=True)) == OWN_LIMITS
