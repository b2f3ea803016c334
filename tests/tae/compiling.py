"""Compile small autoencoders of every kind, each in one graph; one JSON object of what went wrong is printed.

In a process of its own: the suite's type checks wrap every function, and Dynamo does not look through them.
`aot_eager` traces all that the default backend does, and needs no C++ compiler; `eager` stops at the graph.
"""

import json
import sys
import traceback
from dataclasses import replace

import torch
from torch.testing import assert_close

from kinoflow.tae import TAE, TAEConfig, accelerate

WEIGHTS = "sample/mini/tae"
MOVIE_GEN = TAEConfig(
    channels=32,
    multipliers=(1, 2),
    strides=((2, 2, 2),),
    encoder_blocks=(0, 1),
    decoder_blocks=(0, 0),
    latent_channels=4,
    post_quant=True,
)


def shipped() -> TAEConfig:
    """The kind of the shipped autoencoder with the fewest layers of which each kind is one."""
    config = TAE.from_pretrained(WEIGHTS).config
    return replace(
        config,
        channels=16,
        encoder_blocks=(0, 1, 0),
        decoder_blocks=(0, 0, 0),
        detail_channels=16,
        detail_blocks=1,
    )


def build(config: TAEConfig) -> TAE:
    """No parameter zero, so that every layer has a say."""
    torch.manual_seed(0)
    model = TAE(config)
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def clip(frames: int, *, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.rand(1, 3, frames, height, width) * 2 - 1


def trains(model: TAE) -> None:
    """Outputs and gradients are those of the plain model."""
    video = clip(9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs, gradients = [], []
    for one in (model, compiled):
        model.zero_grad()
        outputs.append(one(video).video)
        outputs[-1].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(outputs[1], outputs[0])
    assert_close(gradients[1], gradients[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def infers(model: TAE, frames: tuple[int, ...], backend: str, device: str = "cpu") -> None:
    """Clips of these lengths; the second one makes the graph anew, with the length left open."""
    encode = torch.compile(lambda video: model.encode(video).mean, fullgraph=True, backend=backend)
    decode = torch.compile(model.decode, fullgraph=True, backend=backend)
    with torch.inference_mode():
        for length in frames:
            video = clip(length, height=32, width=40).to(device)
            latent = model.encode(video).mean
            assert_close(encode(video), latent, rtol=1e-3, atol=1e-3)
            assert_close(decode(latent, length), model.decode(latent, length), rtol=1e-3, atol=1e-3)


def without_detail() -> None:
    """The layout whose last layer makes the patches; all others of its layers are those of "shipped"."""
    model, video = build(replace(shipped(), detail_channels=0)), clip(9)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(video).video, model(video).video)


def accelerated() -> None:
    config = TAEConfig(channels=96, multipliers=(1,), strides=(), encoder_blocks=(1,), decoder_blocks=(1,),
                       latent_channels=4, norm="rms", attention=False)  # fmt: skip
    tae = TAE(config)
    tae.init_weights()
    accelerate(tae.eval())
    encode = torch.compile(lambda video: tae.encode(video).mean, fullgraph=True, backend="aot_eager")
    video = clip(3, height=16, width=16)
    with torch.no_grad():
        assert_close(encode(video), tae.encode(video).mean, rtol=0, atol=2e-5)


CASES = {
    "movie_gen": lambda: trains(build(MOVIE_GEN)),
    "movie_gen, without gradients": lambda: infers(build(MOVIE_GEN), (9,), "aot_eager"),
    "shipped": lambda: trains(build(shipped())),
    "shipped, without gradients": lambda: infers(build(shipped()), (9, 1), "aot_eager"),
    "without detail": without_detail,
    "accelerated": accelerated,
    "gpu": lambda: infers(TAE.from_pretrained(WEIGHTS).to("cuda"), (9, 1), "inductor", "cuda"),
}


def main(names: list[str]) -> None:
    problems = {}
    for name in names:
        torch._dynamo.reset()
        try:
            CASES[name]()
        except Exception:
            problems[name] = traceback.format_exc()[-3000:]
    print(json.dumps(problems))


if __name__ == "__main__":
    main(sys.argv[1:])
