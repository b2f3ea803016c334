"""Model folders in the Hugging Face convention: `config.json` beside safetensors weights.

Every model of the project (TAE, VideoDiT, judge) is written and read here, so a release folder, a
training export and a hub repository all look the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import replacing, write_json
from kinoflow.configs.schema import from_dict, to_dict

Schema = TypeVar("Schema")

CONFIG_NAME = "config.json"
STEM = "model"


def save_pretrained(
    folder: str | Path,
    *,
    config: object,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `config` (a dataclass) and `state` into `folder`: all aside, then file by file renamed.

    Floating tensors are cast to `dtype` when it is given; others keep theirs. Weight files of before that
    are not replaced are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cast = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()}
    old = {file.name for file in folder.glob(f"{STEM}*.safetensors*")}
    with TemporaryDirectory(prefix=".", dir=folder) as aside:
        save_torch_state_dict(cast, aside, max_shard_size=max_shard_size)
        write_json(Path(aside, CONFIG_NAME), to_dict(config))
        written = sorted(Path(aside).iterdir())  # the index comes last
        for file in written:
            with replacing(folder / file.name) as new:  # with the rights of any new file
                file.replace(new)
    for name in old - {file.name for file in written}:
        (folder / name).unlink()


def load_pretrained(source: str | Path, schema: type[Schema]) -> tuple[Schema, dict[str, Tensor]]:
    """Read (config, state) from a local folder or, when no such folder exists, a hub id.

    Raises:
        UserError: a missing folder, a missing or damaged file, or a config with unknown keys.
    """
    folder = resolve_folder(source)
    return load_config(folder, schema), read_weights(folder)


def read_weights(folder: Path, stem: str = STEM) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files, which are named `stem`, in one file or sharded.

    Raises:
        UserError: a missing or damaged file.
    """
    state: dict[str, Tensor] = {}
    for weights in weight_files(folder, stem):
        try:
            state |= load_file(weights)
        except FileNotFoundError:
            raise UserError(f"{weights}: missing; fetch the folder again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{weights}: damaged ({error}); fetch the folder again") from None
    return state


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


def resolve_folder(source: str | Path, patterns: list[str] | None = None) -> Path:
    """The local folder for `source`: itself when it exists, else a download of that hub id.

    Of a hub repository only the files that match one of `patterns` are fetched, when they are given.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    hub_id_parts = 2
    if folder.is_absolute() or len(folder.parts) != hub_id_parts or folder.parts[0].startswith("."):
        raise UserError(f"{folder}: no such folder; give a folder or a hub id such as owner/name")
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: neither a folder here nor readable from the hub ({reason})") from None


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


def load_state(model: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load fp32 copies of `state` strictly.

    Raises:
        UserError: a name or shape that does not fit, with the first one that differs.
    """
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name] != state[name].shape
    )
    if wrong:
        raise UserError(
            f"{source}: weights do not fit config.json, first at {wrong[0]}; fetch the folder again"
        )
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True
    )


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and fp16 values, equal for a model before and after saving as fp16."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        tensor = tensor.half() if tensor.is_floating_point() else tensor
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
