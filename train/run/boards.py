"""Where figures are looked at: TensorBoard in the run folder, and Weights & Biases where a run says so."""

from collections.abc import Mapping
from contextlib import ExitStack, closing
from importlib import import_module
from pathlib import Path
from typing import Any

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import seeded


class Boards:
    """Both of them for one run folder, from step `start` on.

    Raises:
        UserError: tensorboard is not installed.
        ModuleNotFoundError: nor is wandb, and the run names a project.
    """

    def __init__(self, folder: Path, start: int, project: str | None) -> None:
        self._open = ExitStack()
        self._tensorboard = self._open.enter_context(closing(_tensorboard(folder, start)))
        self._wandb = None if project is None else _wandb(folder, project)
        if self._wandb is not None:
            self._open.callback(self._wandb.finish)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step."""
        for key, value in figures.items():
            self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(figures), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._open.close()


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tensorboard is missing: pip install 'kinoflow[train]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)


def _wandb(folder: Path, project: str) -> Any:
    """The run of this folder, which a resumed one goes on with: steps that were shown stay as they are."""
    whole = folder.resolve()
    identity = f"{seeded('wandb', str(whole)):x}"
    library = import_module("wandb")
    return library.init(project=project, id=identity, name=whole.name, dir=str(whole), resume="allow")
