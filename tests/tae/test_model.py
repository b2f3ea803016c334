"""The autoencoder's shapes, frame rule and starting values."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kinoflow.configs.errors import UserError
from kinoflow.tae import TAE, TAEConfig, accelerate
from kinoflow.tae.model import chunks
from kinoflow.tae.model.layers import (
    Attention,
    ChannelRMSNorm,
    Downsample,
    TemporalConv,
    Upsample,
    fold,
    unfold,
)
from kinoflow.tae.tiles.tiled import TiledTAE

TINY = TAEConfig(
    channels=32,
    multipliers=(1, 1, 2, 2),
    encoder_blocks=(1, 1, 1, 1),
    decoder_blocks=(1, 1, 1, 1),
    latent_channels=4,
)
PACKED = TAEConfig(
    patch_size=(2, 4, 4),
    channels=16,
    multipliers=(1, 2, 2),
    strides=((2, 2, 2), (2, 1, 1)),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    shortcuts=True,
    latent_channels=4,
    norm="rms",
    attention=False,
)

DETAILED = replace(PACKED, detail_channels=16, detail_blocks=1)
LAYOUTS = pytest.mark.parametrize("config", [TINY, PACKED, DETAILED], ids=["movie_gen", "packed", "detailed"])


def build(config: TAEConfig, seed: int = 0) -> TAE:
    model = TAE(config)
    torch.manual_seed(seed)
    model.init_weights()
    return model.eval()


@LAYOUTS
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 16, 17])
def test_any_length_round_trips_in_shape(config: TAEConfig, frames: int) -> None:
    model, video = build(config), torch.rand(2, 3, frames, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = model.encode(video)
        decoded = model.decode(posterior.mean, frames)
    assert posterior.mean.shape == (2, 4, -(-frames // 8), 2, 3)
    assert decoded.shape == video.shape
    assert config.latent_shape(frames, 16, 24).frames == posterior.mean.shape[2]


@pytest.mark.parametrize(
    ("frames", "height", "message"), [(0, 16, "frames"), (4, 12, "height"), (4, 0, "height")]
)
def test_impossible_sizes_are_named(frames: int, height: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TINY.latent_shape(frames, height, 16)


@pytest.mark.parametrize("shape", [(3, 8, 16, 16), (1, 8, 16, 16, 3), (16, 16, 3)])
def test_a_tensor_that_is_no_batch_is_told_what_shape_is_wanted(shape: tuple[int, ...]) -> None:
    """Without the checks of types, which only tests have."""
    model, wrong = build(PACKED), torch.zeros(shape)
    tiled, bare = TiledTAE(model), inspect.unwrap
    clip, latent = "give (batch, 3, frames, height, width)", "give (batch, 4, t, h, w)"
    for call, wanted in (
        (lambda: bare(TAE.encode)(model, wrong), clip),
        (lambda: bare(TAE.decode)(model, wrong, 8), latent),
        (lambda: next(bare(TiledTAE.encode_stream)(tiled, [wrong])), clip),
        (lambda: next(bare(TiledTAE.decode_stream)(tiled, [wrong], frames=8)), latent),
    ):
        with pytest.raises(UserError) as refusal:
            call()
        assert str(refusal.value).endswith(f": has shape {shape}; {wanted}")


@pytest.mark.parametrize(
    "changes", [{"patch_size": (1, 1, 1)}, {"patch_size": (2, 3, 4)}, {"norm": "group", "channels": 32}]
)
def test_detail_needs_a_patch_that_can_be_halved_and_whole_norm_groups(changes) -> None:
    with pytest.raises(ValueError, match="detail_channels"):
        replace(DETAILED, **changes)


@pytest.mark.parametrize("frames", [0, 8, 17])
def test_decode_refuses_a_length_that_the_latent_does_not_stand_for(frames: int) -> None:
    with pytest.raises(ValueError, match="frames"):
        build(PACKED).decode(torch.zeros(1, 4, 2, 2, 2), frames)


def test_temporal_layers_start_as_the_identity() -> None:
    """A still clip is treated as its one frame, frame by frame, as an inflated image model must."""
    model = build(TINY)
    frame = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        one, many = model.encode(frame).mean, model.encode(frame.expand(-1, -1, 16, -1, -1)).mean
    torch.testing.assert_close(many, one.expand_as(many), atol=1e-5, rtol=1e-5)


def test_temporal_attention_starts_by_adding_nothing() -> None:
    """Frames that differ: a still clip cannot tell, as attention over equal frames keeps them equal."""
    attention = next(m for m in build(TINY).modules() if isinstance(m, Attention))
    x = torch.randn(1, 64, 3, 4, 4)
    with torch.no_grad():
        frames = torch.cat([attention(frame) for frame in x.split(1, dim=2)], dim=2)
        torch.testing.assert_close(attention(x), frames)
    assert not attention.temporal_out.weight.any()


def test_temporal_conv_replicates_the_ends() -> None:
    conv = TemporalConv(2)
    torch.nn.init.normal_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    still = torch.randn(1, 2, 1, 3, 3)
    clip = conv(still.expand(-1, -1, 5, -1, -1))
    torch.testing.assert_close(clip, clip[:, :, :1].expand_as(clip))


def test_fold_and_unfold_are_inverse_and_keep_offsets_apart() -> None:
    x = torch.randn(2, 3, 4, 8, 8)
    folded = fold(x, (2, 4, 4))
    assert torch.equal(unfold(folded, (2, 4, 4)), x)
    assert torch.equal(folded[:, :3, 0, 0, 0], x[:, :, 0, 0, 0])


def test_shortcuts_carry_the_signal_when_the_convolutions_are_zero() -> None:
    """Down averages groups of folded channels; up repeats them: together the mean of each group."""
    down, up = Downsample(4, 16, (2, 2, 2), shortcut=True), Upsample(16, 4, (2, 2, 2), shortcut=True)
    for parameter in (*down.parameters(), *up.parameters()):
        torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 4, 4, 4, 4)
    folded = fold(x, (2, 2, 2))
    pairs = folded.unflatten(1, (16, 2)).mean(dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(up(down(x)), unfold(pairs, (2, 2, 2)))


def test_channel_rms_norm_is_its_formula_in_float64() -> None:
    norm = ChannelRMSNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    expected = x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * norm.weight.view(1, -1, 1, 1, 1)
    torch.testing.assert_close(norm(x), expected)


def test_posterior_samples_have_its_moments() -> None:
    posterior = build(PACKED).encode(torch.rand(1, 3, 8, 16, 16) * 2 - 1)
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([posterior.sample(generator) for _ in range(4000)]).detach()
    torch.testing.assert_close(samples.mean(0), posterior.mean.detach(), atol=0.02, rtol=0)
    torch.testing.assert_close(samples.std(0), posterior.std.detach(), atol=0.02, rtol=0)


def test_normalization_is_inverted_and_needs_statistics(tmp_path) -> None:
    model, latent = build(PACKED), torch.randn(2, 4, 1, 2, 2)
    with pytest.raises(ValueError, match="latent_mean"):
        model.normalize(latent)
    model.with_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    torch.testing.assert_close(model.denormalize(model.normalize(latent)), latent)
    torch.testing.assert_close(model.normalize(latent)[:, 1], (latent[:, 1] - 1) / 2)
    model.save_pretrained(tmp_path)
    again = TAE.from_pretrained(tmp_path)
    assert again.config == model.config
    video = torch.rand(1, 3, 9, 16, 16)
    assert torch.equal(again.encode(video).mean, model.encode(video).mean)


def test_meta_device_build_materializes_to_the_same_starting_distribution() -> None:
    with torch.device("meta"):
        model = TAE(PACKED)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for (name, one), other in zip(model.named_parameters(), build(PACKED).parameters(), strict=True):
        assert torch.equal(one, other), name


@LAYOUTS
@pytest.mark.parametrize("frames", [1, 9, 17])
@pytest.mark.parametrize("put_on", [lambda tae: tae, accelerate], ids=["plain", "accelerated"])
def test_without_gradients_chunks_give_what_the_whole_clip_gives(
    config: TAEConfig, frames: int, put_on: Callable[[TAE], TAE], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One frame a chunk, and the frames that the decoder would discard are not computed."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)
    video = torch.rand(2, 3, frames, 16, 24, dtype=torch.float64) * 2 - 1
    model = put_on(build(config)).double()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    whole = model.encode(video)
    decoded = model.decode(whole.mean, frames)
    assert decoded.requires_grad
    with torch.no_grad():
        streamed = model.encode(video)
        torch.testing.assert_close(streamed.mean, whole.mean)
        torch.testing.assert_close(streamed.logvar, whole.logvar)
        torch.testing.assert_close(model.decode(whole.mean, frames), decoded)


def test_spurious_frames_are_not_computed() -> None:
    model, seen = build(TINY), []
    model.decoder.conv_out.spatial.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[2])
    )
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(chunks.CHUNK_BYTES, "cpu", 1)
        model.decode(torch.randn(1, 4, 3, 2, 2), 17)
    assert sum(seen) == 17 + 1  # the last convolution in time looks one frame ahead


@pytest.mark.parametrize("grad", [False, True], ids=["streamed", "whole"])
@LAYOUTS
def test_bytes_are_encoded_as_their_values(config, grad):
    model = build(config).eval()
    frames = torch.randint(0, 256, (1, 3, 19, 16, 24), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        from_values = model.encode(frames / 127.5 - 1).mean
        assert torch.equal(model.encode(frames.to(torch.uint8)).mean, from_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@LAYOUTS
def test_half_precision_is_near_single(config: TAEConfig, dtype: torch.dtype) -> None:
    model, video = build(config), torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model(video).video
        output = model.to(dtype)(video.to(dtype)).video
    assert output.dtype == dtype
    bound = 2 * torch.finfo(dtype).eps * len(list(model.modules())) ** 0.5
    assert (output.float() - expected).norm() < bound * expected.norm()
