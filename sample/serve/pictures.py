"""Pictures that clients send: checked by their header before they are decoded, kept beside their clip.

And those that they get while a clip is made.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kinoflow.configs.files import replacing
from kinoflow.sample.serve.errors import ApiError

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 2**25
# By the parameter of the API: the key of a ClipRequest, and what the file is called beside the clip.
FIELDS = {"input_reference": "image", "last_reference": "last"}
_NAMES = {"input_reference": "first", "last_reference": "last"}
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp"}
_READ = ("PNG", "JPEG", "WEBP")  # MPO, a JPEG with others behind it, comes of JPEG's reader


def suffix_of(field: str, data: bytes) -> str:
    """The ending for a picture, which is decoded to the end; one that is too large by its header is not.

    Raises:
        ApiError: 413 for too many bytes or pixels, 400 for a file that is no picture.
    """
    if len(data) > MAX_BYTES:
        raise _refusal(413, field, f"larger than {MAX_BYTES // 2**20} MiB; send a smaller picture")
    too_many = _refusal(413, field, f"more than {MAX_PIXELS:,} pixels; send a smaller picture")
    try:
        with Image.open(io.BytesIO(data), formats=_READ) as image:
            kind = image.format or ""
            if image.width * image.height > MAX_PIXELS:
                raise too_many
            frames = 1 if kind == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise _refusal(400, field, f"moves ({frames} frames); send a picture")
            image.load()
    except ApiError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many from None
    except Exception:  # readers of damaged files raise what they like
        raise _refusal(400, field, "no picture that can be read; send a PNG, JPEG or WebP") from None
    return _SUFFIXES[kind]


def encoded(frame: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A PNG file of a frame."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def _refusal(status: int, field: str, line: str) -> ApiError:
    return ApiError(status, f"{field}: {line}", param=field, code="invalid_value")


@contextmanager
def keeping(folder: Path, id: str, sent: Mapping[str, bytes]) -> Iterator[dict[str, Path]]:
    """Write the pictures of a job, each whole or not at all; yields their paths by field.

    What is raised inside takes them away again.

    Raises:
        ApiError: no picture, see `suffix_of`; 503 where it cannot be written.
    """
    suffixes = {field: suffix_of(field, data) for field, data in sent.items()}
    paths = {field: folder / f"{id}.{_NAMES[field]}{suffix}" for field, suffix in suffixes.items()}
    try:
        for field, path in paths.items():
            _write(path, sent[field])
        yield paths
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise


def _write(path: Path, data: bytes) -> None:
    try:
        with replacing(path) as aside:
            aside.write_bytes(data)
    except OSError as error:
        line = f"the picture cannot be written ({error.strerror}); free space on the server's disk, ask again"
        raise ApiError(503, line) from None
