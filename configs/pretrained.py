"""Model folders in the Hugging Face convention: `config.json` beside safetensors weights.

Every model of the project (TAE, VideoDiT, judge) is written and read here, so a release folder, a
training export and a hub repository all look the same.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import replacing, write_json
from kinoflow.configs.schema import from_dict, to_dict

Schema = TypeVar("Schema")

# Tensors by name; the floating ones in the dtype, where one is given.
Read = Callable[[Sequence[str], torch.dtype | None], Mapping[str, Tensor]]

CONFIG_NAME = "config.json"
STEM = "model"
SCALE = ".row_scale"
"""Behind the name of weights in 8 bits: what their levels are worth."""
_LEVELS, _MATRIX, _LARGE = 127, 2, 4096


def save_pretrained(
    folder: str | Path,
    *,
    config: object,
    state: Mapping[str, Tensor],
    read: Read | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `config` (a dataclass) and `state` into `folder`: all aside, then file by file renamed.

    Floating tensors are cast to `dtype` when it is given; others keep theirs. torch.int8 stands for matrices
    and kernels in 8 bits with a scale a row, and fp16 for all else (`Weights` gives their values). Weight
    files of before that are not replaced are removed. With `read` the tensors of `state` may lie on the meta
    device: their values are asked for by name and dtype, those of one file at a time, so that the whole is
    never in memory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outline = {name: tensor.to("meta", _stored_dtype(tensor, dtype)) for name, tensor in state.items()}
    files = split_torch_state_dict_into_shards(outline, max_shard_size=max_shard_size)
    old = {file.name for file in folder.glob(f"{STEM}*.safetensors*")}
    with TemporaryDirectory(prefix=".", dir=folder) as aside:
        for file, names in files.filename_to_tensors.items():
            values = {name: state[name] for name in names} if read is None else read(names, dtype)
            save_file(packed(values, dtype), Path(aside, file), metadata={"format": "pt"})
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            write_json(Path(aside, f"{STEM}.safetensors.index.json"), index)
        write_json(Path(aside, CONFIG_NAME), to_dict(config))
        written = sorted(Path(aside).iterdir())  # the index comes last
        for file in written:
            with replacing(folder / file.name) as new:  # with the rights of any new file
                file.replace(new)
    for name in old - {file.name for file in written}:
        (folder / name).unlink()


def packed(values: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What a file holds of these values, as `save_pretrained` says of `dtype`; `Weights` reads it."""
    held: dict[str, Tensor] = {}
    for name, value in values.items():
        stored = _stored_dtype(value, dtype)
        if stored == torch.int8 and value.is_floating_point():
            scale = _stored_scale(value)
            held |= {name: in_bytes(value, scale.float()).contiguous(), name + SCALE: scale}
        else:
            held[name] = value.to(stored).contiguous()
    return held


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point():
        return tensor.dtype
    if dtype != torch.int8:
        return dtype
    return torch.int8 if _in_bytes(tensor) else torch.float16


def _in_bytes(tensor: Tensor) -> bool:
    """Whether int8 is worth it: of a matrix or kernel that is large; what is small says more in a value."""
    return tensor.ndim >= _MATRIX and tensor.numel() >= _LARGE


def row_scale(weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """What one of 255 levels is worth in each row: they lie around 0, and the largest value has the last.

    A row of a convolution's kernel is all that makes one of its outputs.
    """
    largest = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
    return largest.clamp(min=torch.finfo(torch.float32).tiny * _LEVELS) / _LEVELS


def _stored_scale(weight: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
    """In bf16, and not below the exact one: beside the short rows of an adapter fp32 is an eighth more."""
    return (row_scale(weight) * (1 + 2**-8)).bfloat16()


def in_bytes(weight: Float[Tensor, "rows ..."], scale: Float[Tensor, "rows ..."]) -> Int8[Tensor, "rows ..."]:
    """The nearest of the 255 levels: none is further from its value than half a level."""
    return (weight.float() / scale).round().to(torch.int8)


def load_pretrained(source: str | Path, schema: type[Schema]) -> tuple[Schema, "Weights"]:
    """Read (config, weights) from a local folder or, when no such folder exists, a hub id.

    Raises:
        UserError: a missing folder, a missing or damaged file, or a config with unknown keys.
    """
    folder = resolve_folder(source)
    return load_config(folder, schema), Weights(folder)


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, which are named `stem`, in one file or sharded.

    Each is read when it is asked for, and none is kept: what has more weights than memory holds is taken
    over one by one. Those in 8 bits are given as the fp32 values that they stand for. Those named in
    `without` are passed over.

    Raises:
        UserError: a missing or damaged file.
    """

    def __init__(self, folder: Path, stem: str = STEM, without: Container[str] = ()) -> None:
        self._files: dict[str, Path] = {}
        for path in weight_files(folder, stem):
            with _opened(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)
        scales = {name for name in self._files if name.endswith(SCALE)}
        self._scaled = {name.removesuffix(SCALE) for name in scales}
        for name in [*scales, *(name for name in self._files if name in without)]:
            del self._files[name]

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            value = file.get_tensor(name)
            return value * file.get_tensor(name + SCALE).float() if name in self._scaled else value

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor, which is not read for it."""
        with _opened(self._files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: missing; fetch the folder again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); fetch the folder again") from None


def load_config(folder: Path, schema: type[Schema]) -> Schema:
    """The config of a model folder, without its weights.

    Raises:
        UserError: a missing or damaged file, or a config with unknown keys.
    """
    path = folder / CONFIG_NAME
    try:
        return from_dict(schema, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; a model folder holds {CONFIG_NAME} and safetensors") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object ({error}); fetch the folder again") from None


def resolve_folder(
    source: str | Path, patterns: list[str] | None = None, revision: str | None = None
) -> Path:
    """The local folder for `source`: itself when it exists, else a download of that hub id.

    Of a hub repository only the files that match one of `patterns` are fetched, when they are given, and of
    its `revision`: a branch, tag or commit.

    Raises:
        UserError: neither a folder nor readable from the hub, or a revision of a folder.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision: {folder} is a folder, which has none; leave it out")
        return folder
    hub_id_parts = 2
    if folder.is_absolute() or len(folder.parts) != hub_id_parts or folder.parts[0].startswith("."):
        raise UserError(f"{folder}: no such folder; give a folder or a hub id such as owner/name")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: neither a folder here nor readable from the hub ({reason})") from None


def part_folder(release: str | Path, part: str) -> Path:
    """The folder of one part of a release, which is a folder or a hub id of which that part is fetched."""
    return resolve_folder(release, [f"{part}/*"]) / part


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a model folder, in a fixed order."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return [folder / f"{stem}.safetensors"]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise UserError(f"{index}: damaged ({error}); fetch the folder again") from None
    return [folder / name for name in sorted(set(names))]


def load_state(
    model: torch.nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Load copies of `state` strictly, floating ones in `dtype`, one tensor at a time.

    Raises:
        UserError: a name or shape that does not fit, with the first one that differs.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    taken = {}
    for name in sorted(own.keys() | state.keys()):
        value = state[name] if name in own and name in state else None
        if value is None or own[name] != value.shape:
            raise misfit(name, source)
        taken[name] = value.to(dtype) if value.is_floating_point() else value
    model.load_state_dict(taken, assign=True)


def misfit(name: str, source: str | Path) -> UserError:
    """What to say of weights whose tensor of this name is missing, or not what config.json describes."""
    return UserError(f"{source}: weights do not fit config.json, first at {name}; fetch the folder again")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and fp16 values, equal for a model before and after saving as fp16."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        tensor = tensor.half() if tensor.is_floating_point() else tensor
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
