"""Where sound waits between a clip and a latent file: a file in the system's temporary folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinoflow.configs.errors import UserError


@contextmanager
def sound_file() -> Iterator[Path]:
    """The path of a file for sound, in a folder of its own that goes with the block.

    Raises:
        UserError: no folder can be made.
    """
    with blamed_on_temporary_folder():
        folder = tempfile.TemporaryDirectory()
    with folder:
        yield Path(folder.name) / "sound"


@contextmanager
def blamed_on_temporary_folder() -> Iterator[None]:
    """For blocks whose only errors of the system are those of writing a `sound_file`.

    Raises:
        UserError: such an error; the line names the temporary folder, not the clip.
    """
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "temporary folder"
        raise UserError(
            f"{folder}: {error.strerror or error}; sound passes through this folder, "
            "free some space in it or set TMPDIR to another one"
        ) from error
