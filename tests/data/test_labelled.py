"""Labelled pictures: the same digits from every layout, split alike, and what is wrong with a source."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinoflow.configs.errors import UserError
from kinoflow.data.clips.fit import fit, pad
from kinoflow.data.clips.manifest import Manifest
from kinoflow.data.labelled.images import Labelled, Place, read

COUNT = 60


@pytest.fixture(scope="module")
def digits():
    """Sixty pictures of 6 x 6 with two dark corners, and labels 3, 4 and 7."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (COUNT, 6, 6), np.uint8)
    pictures[:, 0, 0] = pictures[:, -1, -1] = 0
    return pictures, rng.choice(np.array([3, 4, 7]), COUNT)


def write_idx(folder: Path, pictures, labels, *, packed=False, name="train") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    images = bytes.fromhex("00000803") + np.array(pictures.shape, ">u4").tobytes() + pictures.tobytes()
    numbers = bytes.fromhex("00000801") + np.array(labels.shape, ">u4").tobytes()
    numbers += labels.astype(np.uint8).tobytes()
    for content, kind in ((images, "images-idx3"), (numbers, "labels-idx1")):
        file = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_csv(path: Path, pictures, labels, *, last=True, head="") -> Path:
    rows = [
        [*picture.ravel().tolist(), label] if last else [label, *picture.ravel().tolist()]
        for picture, label in zip(pictures, labels.tolist(), strict=True)
    ]
    text = head + "".join(",".join(map(str, row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def write_folder(folder: Path, pictures, labels) -> Path:
    for i, (picture, label) in enumerate(zip(pictures, labels.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / str(label) / f"{i}.png")
    return folder


def both(path: Path) -> tuple[Labelled, Labelled]:
    return read(Place(path=path, side="train")), read(Place(path=path, side="heldout"))


def pairs(found: Labelled) -> dict[bytes, str]:
    assert isinstance(found.pictures, np.ndarray)
    classes = [found.classes[label] for label in found.labels]
    return {picture.tobytes(): name for picture, name in zip(found.pictures, classes, strict=True)}


LAYOUTS = {
    "npz": lambda at, x, y: write_npz(at / "a.npz", images=x, labels=y),
    "npz, other names, floats": lambda at, x, y: write_npz(at / "a.npz", x=x / 255, y=y.astype(float)),
    "npz, rows, 16 bit": lambda at, x, y: write_npz(
        at / "a.npz", x=x.reshape(COUNT, 36) * np.uint16(257), y=y
    ),
    "idx": lambda at, x, y: write_idx(at / "mnist", x, y),
    "idx, packed": lambda at, x, y: write_idx(at / "mnist", x, y, packed=True),
    "idx, one file": lambda at, x, y: write_idx(at / "mnist", x, y, name="t10k") / "t10k-images-idx3-ubyte",
    "csv": lambda at, x, y: write_csv(at / "a.csv", x, y),
    "csv, label first": lambda at, x, y: write_csv(at / "a.csv.gz", x, y, last=False),
}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_holds_the_same(write, digits, tmp_path):
    pictures, labels = digits
    train, held = both(write(tmp_path, pictures, labels))
    want = {x.tobytes(): str(y) for x, y in zip(pictures, labels, strict=True)}
    assert train.classes == held.classes == ("3", "4", "7")
    assert pairs(train) | pairs(held) == want and not pairs(train).keys() & pairs(held).keys()
    assert train.grey and train.pictures.shape[1:] == (6, 6, 1)
    assert 0 < len(held.labels) < COUNT / 3
    assert train.labels.tolist() != sorted(train.labels.tolist()), "classes are mixed"


def test_the_order_of_a_source_does_not_matter(digits, tmp_path):
    pictures, labels = digits
    order = np.random.default_rng(1).permutation(COUNT)
    first = both(write_npz(tmp_path / "a.npz", x=pictures, y=labels))
    second = both(write_npz(tmp_path / "b.npz", x=pictures[order], y=labels[order]))
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.pictures, other.pictures) and np.array_equal(one.labels, other.labels)
        assert one.fingerprint == other.fingerprint
    changed = labels.copy()
    changed[:] = np.where(labels == 3, 4, 3)
    third, _ = both(write_npz(tmp_path / "c.npz", x=pictures, y=changed))
    assert third.fingerprint != first[0].fingerprint


def test_a_tenth_is_held_out_and_copies_are_on_one_side(tmp_path):
    pictures = np.random.default_rng(2).integers(0, 256, (4000, 3, 3), np.uint8)
    twice = np.concatenate([pictures, pictures])
    train, held = both(write_npz(tmp_path / "a.npz", x=twice, y=np.arange(8000) % 2))
    assert abs(len(held.labels) - 800) < 160  # three standard deviations, each picture counts twice
    assert len(train.labels) + len(held.labels) == 8000
    assert not {p.tobytes() for p in train.pictures} & {p.tobytes() for p in held.pictures}


def test_colour_in_front_or_behind(tmp_path):
    rgb = np.random.default_rng(3).integers(0, 256, (40, 5, 4, 3), np.uint8)
    labels = np.arange(40) % 2
    behind, _ = both(write_npz(tmp_path / "a.npz", x=rgb, y=labels[:, None]))
    before, _ = both(write_npz(tmp_path / "b.npz", x=rgb.transpose(0, 3, 1, 2), y=labels))
    assert np.array_equal(behind.pictures, before.pictures) and not behind.grey
    assert both(write_npz(tmp_path / "c.npz", x=rgb[..., :1].repeat(3, -1), y=labels))[0].grey


def test_a_row_of_names_says_where_the_label_is(digits, tmp_path):
    pictures, labels = digits
    noisy = pictures.copy()
    noisy[:, -1, -1] = noisy[:, 1, 1]  # both ends vary now
    head = "Label," + ",".join(f"pixel{i}" for i in range(36)) + "\n"
    found, _ = both(write_csv(tmp_path / "a.csv", noisy, labels, last=False, head=head))
    assert set(pairs(found)) <= {picture.tobytes() for picture in noisy} and found.classes == ("3", "4", "7")


def test_a_folder_of_classes(digits, tmp_path):
    pictures, labels = digits
    root = write_folder(tmp_path / "digits", pictures, labels)
    (root / "3" / ".DS_Store").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "notes.txt").write_text("not a class")
    (root / "3" / "bad.png").write_bytes(b"no picture")
    train, held = both(root)
    assert train.classes == held.classes == ("3", "4", "7") and train.grey
    assert isinstance(train.pictures, Manifest) and isinstance(held.pictures, Manifest)
    for side in (train, held):
        for entry, label in zip(side.pictures.entries, side.labels, strict=True):
            path = side.pictures.resolve(entry)
            assert path.is_file() and path.parent.name == entry.caption == side.classes[label]
    names = [entry.path for side in (train, held) for entry in side.pictures.entries]
    assert len(names) == len(set(names)) == COUNT + 1
    Image.fromarray(np.dstack([pictures[0]] * 2 + [255 - pictures[0]])).save(root / "3" / "colour.png")
    assert not both(root)[0].grey


def test_kinds_of_pictures(tmp_path):
    """16 bit, palette, alpha and a turned photograph count as the reader of clips shows them."""
    for name in "ab":
        (tmp_path / name).mkdir()
    level = np.full((4, 6), 0x8000, np.uint16)
    Image.fromarray(level).save(tmp_path / "a" / "deep.png")
    Image.fromarray(level.astype(np.uint8)).save(tmp_path / "b" / "plain.png")
    Image.fromarray(np.dstack([np.full((4, 6), 200, np.uint8)] * 4)).save(tmp_path / "a" / "alpha.png")
    Image.fromarray(np.full((4, 6, 3), 9, np.uint8)).convert("P").save(tmp_path / "b" / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((4, 6), 9, np.uint8)).save(tmp_path / "b" / "turned.jpg", exif=exif)
    entries = [e for side in ("train", "heldout") for e in _some(tmp_path, side)]
    sizes = {Path(entry.path).name: (entry.height, entry.width) for entry in entries}
    assert sizes == {"deep.png": (4, 6), "plain.png": (4, 6), "alpha.png": (4, 6), "palette.png": (4, 6),
                     "turned.jpg": (6, 4)}  # fmt: skip


def _some(path, side):
    try:
        return read(Place(path=path, side=side)).pictures.entries
    except UserError:
        return ()


def test_padding_keeps_the_picture_amid_its_background():
    picture = np.full((1, 28, 28, 3), 7, np.uint8)
    picture[0, 10:20, 0] = 250  # touches the edge in a few places
    padded = pad(picture, 32, 32)
    assert np.array_equal(padded[:, 2:30, 2:30], picture)
    padded[:, 2:30, 2:30] = 7
    assert (padded == 7).all()
    wide = np.full((1, 20, 80, 3), 30, np.uint8)
    wide[:, :, 38:42] = 200
    small = pad(wide, 16, 16)
    assert small.shape == (1, 16, 16, 3) and (small == 30).all(axis=-1).mean() > 0.9
    assert np.array_equal(pad(picture, 28, 28), fit(picture, 28, 28))
    assert pad(picture, 29, 30).shape == (1, 29, 30, 3)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("images:a/b.npz", Place(path=Path("a/b.npz"), side="train")),
        ("images:a:heldout", Place(path=Path("a"), side="heldout")),
        ("images:C:/a:train", Place(path=Path("C:/a"), side="train")),
        ("world:heldout", None),
        ("images", None),
        ("clips.jsonl", None),
    ],
)
def test_a_place_is_read(text, place):
    assert Place.parse(text) == place


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def images_of(mnist: Path) -> Path:
    return mnist / "train-images-idx3-ubyte"


def pack_and_cut(mnist: Path, x, y) -> None:
    images_of(mnist).unlink()
    cut(write_idx(mnist, x, y, packed=True) / "train-images-idx3-ubyte.gz", 300)


# What is done to a folder of good IDX files.
IDX = {
    "idx cut": lambda at, x, y: cut(images_of(at), 500),
    "idx head cut": lambda at, x, y: cut(images_of(at), 9),
    "idx magic": lambda at, x, y: images_of(at).write_bytes(b"\x89PNG" + images_of(at).read_bytes()[4:]),
    "idx gz cut": pack_and_cut,
    "idx without labels": lambda at, x, y: (at / "train-labels-idx1-ubyte").unlink(),
    "idx twice": lambda at, x, y: write_idx(at, x, y, name="letters-train"),
    "idx counts": lambda at, x, y: write_idx(at, x, y[:-1]),
}
# What is in an .npz.
NPZ = {
    "npz names": lambda x, y: {"pixels": x, "y": y},
    "npz both": lambda x, y: {"x": x, "images": x, "y": y},
    "npz labels": lambda x, y: {"x": x, "y": y + 0.5},
    "npz words": lambda x, y: {"x": x, "y": np.array(["a"] * len(y))},
    "npz objects": lambda x, y: {"x": x, "y": np.array([{}] * len(y), dtype=object)},
    "npz counts": lambda x, y: {"x": x, "y": y[:-2]},
    "npz shape": lambda x, y: {"x": x.reshape(COUNT, 6, 3, 2), "y": y},
    "npz range": lambda x, y: {"x": x - 3.0, "y": y},
    "one class": lambda x, y: {"x": x, "y": y * 0},
    "few": lambda x, y: {"x": x[:2], "y": np.array([0, 1])},
}


def spoiled(at: Path, x, y, how: str) -> Path:
    """A source with one thing wrong."""
    if how in NPZ:
        return write_npz(at / "a.npz", **NPZ[how](x, y))
    if how == "npz damaged":
        (at / "a.npz").write_bytes(b"PK\x03\x04 no zip")
        return at / "a.npz"
    mnist = write_idx(at / "mnist", x, y)
    IDX[how](mnist, x, y)
    return mnist


BAD = {
    "idx cut": r"train-images-idx3-ubyte: has 500 bytes where its head asks for 2,176 bytes; fetch it again",
    "idx head cut": r"has 9 bytes where its head asks for a head of 16 bytes",
    "idx magic": r"begins with 89504e47, which is no IDX file of pictures \(00000803\); fetch it again",
    "idx gz cut": r"images-idx3-ubyte\.gz: damaged or cut short \(.*\); fetch it again",
    "idx without labels": r"train-labels-idx1-ubyte is not beside it; fetch it",
    "idx twice": r"mnist: has letters-train-images-idx3-ubyte, train-images-idx3-ubyte; name one of them",
    "idx counts": r"has 60 pictures and 59 labels; give one for each",
    "npz names": r"a\.npz: has pixels, y, and none is called x or images; name one of them so",
    "npz both": r"a\.npz: has both x and images; leave out one of them",
    "npz labels": r"its labels are not whole numbers, such as [347]\.5; number the classes",
    "npz words": r"its labels are not whole numbers, such as 'a'",
    "npz objects": r"no \.npz of plain arrays \(.*\); save it again with numpy\.savez",
    "npz counts": r"has 60 pictures and 58 labels",
    "npz shape": r"its pictures have the shape 60 x 6 x 3 x 2; store n x height x width",
    "npz range": r"its pixels are float64 from -3 to \d+; store bytes, or numbers from 0 to 1",
    "npz damaged": r"a\.npz: no \.npz of plain arrays",
    "one class": r"has one class only, 0; name what holds all of them",
    "few": r"too few pictures, none is on the side heldout; add some",
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_wrong_is_one_line(how, digits, tmp_path):
    with pytest.raises(UserError, match=BAD[how]) as caught:
        both(spoiled(tmp_path, *digits, how))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1,2,3,1\n0,1,2,4\n", r"row 2 has 4 values, the first has 5; mend it"),
        ("0,1,2,3,1\n0,one,2,4,0\n", r"row 2 has 'one' where a number should be; mend it"),
        ("", r"is empty; write a row for each picture"),
        ("label,a,b,c,d\n", r"has no row"),
        ("1,1,2,3,1\n0,1,2,4,0\n", r"its first and its last column could both be the label"),
        ("1,1,2,1\n0,1,2,1\n", r"its pictures have the shape 2 x 3; store"),
    ],
)
def test_a_wrong_csv(text, message, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read(Place(path=tmp_path / "a.csv", side="train"))


def test_wrong_folders(digits, tmp_path):
    root = write_folder(tmp_path / "digits", *digits)
    (root / "9").mkdir()
    cases = {
        root: r"digits/9: no picture in it; add some, or remove the folder",
        root / "3": r"3: has no folders; put the pictures of each class into one of its name",
        tmp_path / "gone": r"gone: no such file or folder",
        root / "3" / "notes.txt": r"notes\.txt: no labelled pictures; name a folder with a folder for each",
    }
    (root / "3" / "notes.txt").write_text("x")
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            read(Place(path=path, side="train"))
    (tmp_path / "outer").mkdir()
    root.rename(tmp_path / "outer" / "7")
    for folder in list((tmp_path / "outer" / "7").iterdir()):
        for file in folder.iterdir():
            file.rename(tmp_path / "outer" / "7" / f"{folder.name}-{file.name}")
        folder.rmdir()
    with pytest.raises(UserError, match="has one class only, 7"):
        read(Place(path=tmp_path / "outer", side="train"))
