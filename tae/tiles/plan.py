"""Which tiles to use: the fewest computed twice among those whose estimated memory fits a budget."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kinoflow.configs.errors import UserError
from kinoflow.tae.model.config import TAEConfig
from kinoflow.tae.tiles.blend import SpatialTiling, TemporalTiling, split
from kinoflow.tae.tiles.context import Context, Halo, context, exact_in_space
from kinoflow.tae.tiles.halo import HaloTile, Space, SpatialHalo
from kinoflow.tae.tiles.memory import FILL, Part, format_bytes, peak_bytes, weight_bytes

Mode = Literal["halo", "blend"]

# At these halos what a tile still misses lies below what rounding to bytes does (59 dB): measured on the
# shipped weights, 85 dB and more in time and 78 dB and more in space. The whole context costs up to three
# times as much.
ENCODER_REACH, DECODER_REACH, SPACE_REACH = 2, 3, 4
_FADE = 8  # cells over which tiles in space are blended
_TILES = (16, 12, 8, 6, 4, 3, 2, 1)
# Tiles longer than 8 latent frames save a fifth of the work at most, and a clip of 6 seconds does not fill
# them: taken for pictures that need no cutting and at most half of the budget.
_LONG, _SHARE_OF_LONG = 8, 0.5
_PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
LEAST_CELLS = 4  # a side of a tile in space
_SMALLER = 0.9  # the size of the next plan's tiles over that of one that failed, at most


@dataclass(frozen=True, kw_only=True)
class TilingRequest:
    """What is to be tiled: `part` of the model on pictures of `cells` (rows, columns) latent cells.

    `frame_bytes` is the size of one channel of one pixel in the frames that the encoder is fed.
    """

    config: TAEConfig
    part: Part
    mode: Mode
    cells: tuple[int, int]
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    frame_bytes: int = 4
    most_cells: int | None = None

    @property
    def reach(self) -> Context:
        """The context used: all of it in space and time up to the limits above."""
        time = ENCODER_REACH if self.part == "encode" else DECODER_REACH
        return context(self.config).limited(time, SPACE_REACH)

    @property
    def halos(self) -> tuple[Halo, Halo, Halo]:
        """Halos in time, rows and columns."""
        return self.reach.encoder if self.part == "encode" else self.reach.decoder


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """`tile` latent frames kept at a time, cut by `space`; `cost` is work over that of the untiled whole.

    `positions` are the latent positions of the largest tile with its halo, `bytes` what it is counted to take
    together with weights and frames.
    """

    tile: int
    space: Space | None
    cost: float
    positions: int
    bytes: int


def choose(request: TilingRequest, budget: int) -> TilePlan:
    """The cheapest plan that fits into `budget` bytes, the model's weights and all activations together.

    Raises:
        UserError: not even the smallest tiles fit.
    """
    for plan in _plans(request, budget):
        if plan.bytes <= _share(budget, plan.tile):
            return plan
    least = min(plan.bytes for plan in _plans(request))
    height, width = (
        side * factor for side, factor in zip(request.cells, request.config.factors[1:], strict=True)
    )
    raise UserError(
        f"memory: {format_bytes(budget)} is too little for frames of {width}x{height}; "
        f"give {format_bytes(least)} or more"
    )


def _share(budget: int, tile: int) -> float:
    return budget * (_SHARE_OF_LONG if tile > _LONG else 1.0)


def next_smaller(request: TilingRequest, failed: TilePlan) -> TilePlan | None:
    """The cheapest plan with clearly smaller tiles than one that failed."""
    return next(_plans(request, most=_SMALLER * failed.positions), None)


def _plans(
    request: TilingRequest, budget: int | None = None, most: float | None = None
) -> Iterator[TilePlan]:
    """Plans from the cheapest on, without those whose frames alone exceed `budget` or that compute more than
    `most` positions at a time.

    What they take is counted only when they are asked for: it takes a second for large frames.
    """
    candidates = [
        (_time_cost(request, tile) * _space_cost(request, space), tile, space)
        for tile in ((TemporalTiling(factor=1).tile,) if request.mode == "blend" else _TILES)
        for space in _spaces(request)
        if tile <= _LONG or space is None
    ]
    candidates.sort(key=lambda candidate: candidate[0])
    for cost, tile, space in candidates:
        shape = _computed(request, tile, space)
        if most is not None and math.prod(shape) > most:
            continue
        if budget is not None and _least(request, tile, space, shape) > _share(budget, tile):
            continue
        size = _bytes(request, tile, space, shape)
        yield TilePlan(tile=tile, space=space, cost=cost, positions=math.prod(shape), bytes=size)


def _spaces(request: TilingRequest) -> Iterator[Space | None]:
    """Ways to cut a picture, the whole first. Tiles that cannot agree are blended in both modes.

    Attention and group normalization see the whole picture; where their tiles meet without a blend, a step
    in colour can show.
    """
    longest, rows_columns = max(request.cells), request.config.factors[1:]
    most = min(request.most_cells or longest, longest)
    sizes = {most} | {-(-longest // parts) for parts in _PARTS}
    for size in sorted(sizes, reverse=True):
        if size > most:
            continue
        if size == longest:
            yield None
        elif size >= LEAST_CELLS:
            if request.mode == "halo" and exact_in_space(request.config):
                _, rows, columns = request.halos
                yield SpatialHalo(factors=rows_columns, rows=rows, columns=columns, tile=size)
            else:
                yield SpatialTiling(factors=rows_columns, tile=size, overlap=min(_FADE, size // 2))


def _time_cost(request: TilingRequest, tile: int) -> float:
    if request.mode == "halo":
        return (tile + request.halos[0].before + request.halos[0].after) / tile
    tiling = TemporalTiling(factor=1)
    return 1.0 if request.part == "encode" else tiling.tile / (tiling.tile - tiling.overlap)


def _space_cost(request: TilingRequest, space: Space | None) -> float:
    rows, columns = _sides(request, space)
    return math.prod(sum(sides) / cells for sides, cells in zip((rows, columns), request.cells, strict=True))


def _sides(request: TilingRequest, space: Space | None) -> tuple[list[int], list[int]]:
    """Lengths, in cells, of what is computed along rows and along columns."""
    if isinstance(space, SpatialHalo):
        rows, columns = space.tiles(*request.cells)
        return _lengths(rows), _lengths(columns)
    if space is None:
        return [request.cells[0]], [request.cells[1]]
    rows, columns = (
        [tile.stop - tile.start for tile in split(side, space.tile, space.overlap)] for side in request.cells
    )
    return rows, columns


def _lengths(tiles: Sequence[HaloTile]) -> list[int]:
    return [tile.outer.stop - tile.outer.start for tile in tiles]


def _computed(request: TilingRequest, tile: int, space: Space | None) -> tuple[int, int, int]:
    """Latent positions (t, h, w) of the largest tile with its halo."""
    around = request.halos[0].before + request.halos[0].after if request.mode == "halo" else 0
    rows, columns = (max(sides) for sides in _sides(request, space))
    return tile + around, rows, columns


def _held(request: TilingRequest, tile: int, space: Space | None, computed: tuple[int, int, int]) -> int:
    """Bytes of frames beside the model: those that wait to be encoded, or those decoded before."""
    frame = 3 * math.prod(request.config.factors) * math.prod(request.cells)
    if request.part == "encode":
        return frame * computed[0] * request.frame_bytes
    # Halo tiles are put into one picture; blended ones are joined to rows, and rows to pictures.
    joined = 0 if space is None else 1 if isinstance(space, SpatialHalo) else 2
    faded = 1 if request.mode == "blend" else 0
    return frame * tile * request.dtype.itemsize * (joined + faded)


def _least(request: TilingRequest, tile: int, space: Space | None, computed: tuple[int, int, int]) -> int:
    """What a plan takes without any activation, so that most of those too large need not be counted."""
    held = _held(request, tile, space, computed)
    if request.part == "encode":
        return int(2 * held / FILL)
    made = 3 * math.prod(request.config.factors) * math.prod(computed) * request.dtype.itemsize
    return int((held + made) / FILL)


def _bytes(request: TilingRequest, tile: int, space: Space | None, computed: tuple[int, int, int]) -> int:
    """Weights, the frames of a tile, and the model's activations, with room for what is not counted."""
    held, (time, height, width) = _held(request, tile, space, computed), request.config.factors
    if request.part == "encode":
        shape = (time * computed[0], height * computed[1], width * computed[2])
        frames = torch.uint8 if request.frame_bytes == 1 else request.dtype
    else:
        shape, frames = computed, request.dtype
    peak = held + peak_bytes(
        request.config, request.part, shape, request.dtype, on=request.device_type, frames=frames
    )
    if request.part == "encode":  # frames that come in are joined to those held, which takes twice their size
        peak = max(2 * held, peak)
    return weight_bytes(request.config, request.dtype) + int(peak / FILL)
