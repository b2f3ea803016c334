"""What a text encoder's states say, read by one linear layer: a loss in training, a probe after it."""

import string
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from kinoflow.conditioning.embedding import TextEmbedding, TextEncoder
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.data.world import Split, labels
from kinoflow.train.mini.corpus import sample

_SPLITS: tuple[Split, Split] = "train", "heldout"
# Unseen seeds for the probes: training counts from 0.
_PROBE_SEED = 10**9


def mean_state(states: TextEmbedding) -> Float[Tensor, "b d"]:
    """The mean of each prompt's real tokens."""
    return states.hidden.sum(1) / states.mask.sum(1, keepdim=True)


def last_state(states: TextEmbedding) -> Float[Tensor, "b d"]:
    """The state of each prompt's end token."""
    return states.hidden[torch.arange(len(states.hidden)), states.mask.sum(1) - 1]


class AttributeHeads(nn.Module):
    """Asks the mean state and the end state for the attributes of the scene.

    Denoising alone leaves a small encoder's tokens to themselves: which colour belongs to which of two
    things is then nowhere to be read.

    Args:
        width: of the states.
        classes: the number of values of each attribute.
    """

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.classes = list(classes)
        self.heads = nn.ModuleList([nn.Linear(width, sum(classes)) for _ in range(2)])

    def forward(
        self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], attributes: Int[Tensor, "b a"]
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy over attributes and both states."""
        states = TextEmbedding(hidden=hidden.masked_fill(~mask[..., None], 0), mask=mask)
        losses = [
            functional.cross_entropy(logits, attributes[:, index])
            for head, read in zip(self.heads, (mean_state, last_state), strict=True)
            for index, logits in enumerate(head(read(states)).split(self.classes, dim=1))
        ]
        return torch.stack(losses).mean()


def accuracy(
    features: tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]], labels: tuple[Sequence[str], Sequence[str]]
) -> float:
    """Fit a linear classifier on the first of both pairs, return the share it gets right of the second."""
    names = {name: index for index, name in enumerate(sorted(set(labels[0])))}
    target = torch.tensor([names[name] for name in labels[0]])
    mean, std = features[0].mean(0), features[0].std(0) + 1e-6
    inputs, held = ((each - mean) / std for each in features)
    weights = _fit(inputs, target, len(names))
    truth = torch.tensor([names.get(name, -1) for name in labels[1]])
    found = functional.pad(held, (0, 1), value=1.0) @ weights
    return float((found.argmax(1) == truth).float().mean())


def _fit(inputs: Float[Tensor, "n d"], target: Int[Tensor, " n"], classes: int) -> Float[Tensor, "d+1 k"]:
    inputs = functional.pad(inputs, (0, 1), value=1.0)
    weights = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=150, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = functional.cross_entropy(inputs @ weights, target) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # pyright: ignore[reportArgumentType]
    return weights.detach()


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Linear probes of the encoders in a folder, loaded as every user loads them.

    Fitted on `count` complete train captions, judged on as many of held-out combinations: colour, shape and
    motion of the first thing from UL2's and MetaCLIP's mean and end states. ByT5: the letter at each place
    of an unseen word of four from the mean state, and letter and place from each letter's own state. Shares
    of 1.
    """
    encoder = PromptEncoder.from_pretrained(folder)
    drawn = [
        [sample(_PROBE_SEED + index, split=split, complete=True) for index in range(count)]
        for split in _SPLITS
    ]
    prompts = [[each.prompt for each in half] for half in drawn]
    scenes = [[labels(each.scene) for each in half] for half in drawn]
    probes: dict[str, float] = {}
    tokens: dict[str, float] = {}
    for name, text_encoder in (("ul2", encoder.ul2), ("metaclip", encoder.metaclip)):
        train_states, held_states = (text_encoder(half) for half in prompts)
        tokens[name] = float(train_states.mask.sum(1).float().mean())
        for kind, read in (("mean", mean_state), ("end", last_state)):
            features = (read(train_states), read(held_states))
            for key in ("color", "shape", "motion"):
                truth = ([each[key] for each in scenes[0]], [each[key] for each in scenes[1]])
                probes[f"{name}_{kind}_{key}"] = accuracy(features, truth)
    return {"probes": probes | _measure_bytes(encoder.byt5, count), "tokens_per_caption": tokens}


def _measure_bytes(encoder: TextEncoder, count: int) -> dict[str, float]:
    random = Random("words")
    words = ["".join(random.choices(string.ascii_uppercase, k=4)) for _ in range(2 * count)]
    fit, held = words[:count], words[count:]
    fit_states, held_states = encoder(fit), encoder(held)
    means = (mean_state(fit_states), mean_state(held_states))
    right = [accuracy(means, ([word[i] for word in fit], [word[i] for word in held])) for i in range(4)]
    own = (fit_states.hidden[:, :4].flatten(0, 1), held_states.hidden[:, :4].flatten(0, 1))
    places = list("0123") * count
    return {
        "byt5_mean_letter": sum(right) / 4,
        "byt5_token_letter": accuracy(own, (list("".join(fit)), list("".join(held)))),
        "byt5_token_place": accuracy(own, (places, places)),
    }
