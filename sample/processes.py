"""One clip by several processes, as torchrun, srun and the like start them.

The first process is the command: it reads what is asked for, solves the flow, decodes, writes and speaks. The
others `follow`: each holds the backbone and computes its part of every call that the first one makes of it.
So whatever decides how a clip goes on (a step cache, a client that leaves) is decided in one place, and there
is nothing on which the processes could come to differ.

Two rows of a call, both halves of a classifier-free guidance, go to one half of the processes each; within a
half, or where there is one row, the processes share the clip's tokens (`dit_video.parallel`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinoflow.conditioning.embedding import Condition
from kinoflow.conditioning.labels import Labels
from kinoflow.configs.devices import device_of
from kinoflow.configs.errors import USER_ERROR, UserError
from kinoflow.configs.launch import Launch, meeting
from kinoflow.dit_video.backbone import Backbone, BackboneConfig
from kinoflow.dit_video.flow.known import Known
from kinoflow.dit_video.parallel import shares_tokens, tokens_shared
from kinoflow.dit_video.video_dit import VideoDiT
from kinoflow.sample.release import Release

_LIMIT = timedelta(minutes=5)  # that processes wait for each other in a call, which they begin together
_IDLE = timedelta(days=20)  # that the first one may do other things; the system's own limit is 24
_FAREWELL = 5.0  # seconds
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a call is shared: its rows are cut into `parts`, the tokens of each among so many processes."""

    parts: int
    tokens: int

    def __str__(self) -> str:
        tokens = f"{self.tokens} share the clip's tokens"
        if self.parts == 1:
            return tokens
        return "one for each pass of the guidance" if self.tokens == 1 else f"for each pass {tokens}"


def way_of(size: int, rows: int) -> Way:
    """Of `size` processes, for a call of so many rows."""
    parts = 2 if rows % 2 == 0 and size % 2 == 0 else 1
    return Way(parts=parts, tokens=size // parts)


def way_for(size: int, config: BackboneConfig, *, guided: bool) -> Way:
    """Of `size` processes with a clip of this backbone.

    Raises:
        UserError: they cannot share it, and some would stand by.
    """
    rows = 2 if guided else 1
    problem = problem_of(way_of(size, rows), config)
    if problem is None:
        return way_of(size, rows)
    fewer = (less for less in range(size - 1, 0, -1) if not problem_of(way_of(less, rows), config))
    raise UserError(f"processes: {size} cannot share a clip, {problem}; start {next(fewer)}")


def together(me: Launch, command: Callable[[Team], int]) -> int:
    """The exit status of a command that several processes run, of which this is one.

    The first one runs `command`; what it raises comes out, and the others end with it. They are silent, but
    for bugs.

    Raises:
        UserError: in the first one, what the command raises, or a launcher that does not say where it is.
    """
    try:
        team = Team(me)
    except UserError:
        if me.rank:
            return USER_ERROR
        raise
    if me.rank:
        return team.follow()
    try:
        return command(team)
    finally:
        team.end()


class Team:
    """The processes of a command; rank 0 is the command.

    Raises:
        UserError: the launcher does not say where rank 0 is.
    """

    def __init__(self, me: Launch) -> None:
        os.environ.update(me.variables())  # where torch looks for the others
        self.rank, self.size, self._local = me.rank, me.size, me.local_rank
        store = meeting(me.size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=me.rank, world_size=me.size, timeout=_LIMIT)
        self._store = dist.PrefixStore("kinoflow", store)
        half, self._half = me.size // 2, None
        if me.size % 2 == 0 and half > 1:
            halves = [dist.new_group([*range(first, first + half)]) for first in (0, half)]
            mine = halves[me.rank // half]
            assert not isinstance(mine, int), "this process is in its half"
            self._half = mine
        self._turn, self._intact = 0, True

    def device(self, device: torch.device) -> torch.device:
        """This process's device, of the kind that was named.

        Raises:
            UserError: a certain GPU, or a kind that is not for several processes.
        """
        if device.type not in ("cpu", "cuda") or device.index is not None:
            raise UserError(f"device: {device}; several processes take cpu or cuda, and of that a GPU each")
        return device_of(self._local) if device.type == "cuda" else device

    def share(self, release: Release, device: torch.device, dtype: torch.dtype) -> Shared:
        """The backbone of a release, read by all processes; the first one calls this, once.

        Raises:
            UserError: a damaged file, in whichever process, or two processes with one GPU.
        """
        message = _Load(release=release, device=device.type, dtype=dtype)
        with self.turn(message):
            model, told = self._load(message)
        problems = [problem for problem, _ in told if problem is not None]
        gpus = [gpu for _, gpu in told if gpu is not None]
        if problems or model is None:
            raise UserError(problems[0])
        if len(set(gpus)) < len(gpus):
            raise UserError("processes: two have the same GPU; start as many as there are, or --device cpu")
        return Shared(self, model)

    def _load(self, message: _Load) -> tuple[Backbone | None, list[tuple[str | None, str | None]]]:
        """The backbone, and of every process what is wrong and what names its GPU."""
        model = problem = gpu = None
        try:
            device = self.device(torch.device(message.device))
            if device.type == "cuda":
                torch.cuda.set_device(device)
                gpu = f"{os.uname().nodename} {torch.cuda.get_device_properties(device).uuid}"
            model = message.release.backbone(device, message.dtype)
        except UserError as error:
            problem = str(error)
        return model, self._all((problem, gpu))

    def _all(self, value: Any) -> list[Any]:
        """Every process's value, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def turn(self, message: _Load | _Call) -> Iterator[None]:
        """Tell the others what to do now; the body is this process's part of it.

        Raises:
            RuntimeError: one of them has ended.
        """
        if not self._intact:
            raise RuntimeError("another process of this command has ended; its output says why")
        self._intact = False  # until it is done: one that is left half done they do not recover from
        self._turn += 1
        self._store.set(f"turn {self._turn}", "")
        self._store.delete_key(f"turn {self._turn - 1}")  # which all have seen: a turn ends together
        dist.broadcast_object_list([message], src=0, device=_CPU)
        yield
        self._intact = True

    def end(self, *, at_once: bool = False) -> None:
        """Have the others end, and see that those know which wait for a turn; `at_once` for an os._exit."""
        until = time.monotonic() + _FAREWELL
        with suppress(RuntimeError):
            self._store.set("over", "")
            self._store.set(f"turn {self._turn + 1}", "")
            others = [f"left {rank}" for rank in range(1, self.size)]
            while self._intact and not self._store.check(others) and time.monotonic() < until:
                time.sleep(0.005)
        if not at_once:
            dist.destroy_process_group()

    def follow(self) -> int:
        """What every process but the first does until that one ends: its part of each turn. The status."""
        for number in (signal.SIGINT, signal.SIGTERM):  # there is nothing to clean up
            signal.signal(number, signal.SIG_DFL)
        warnings.simplefilter("ignore")  # the first one says it
        try:
            self._follow()
        except RuntimeError:  # of the group, where the first process ended in the midst of a turn
            with suppress(RuntimeError):
                if self._store.check(["over"]):
                    return 0
            raise
        dist.destroy_process_group()
        return 0

    @torch.no_grad()
    def _follow(self) -> None:
        model, told = None, dict[int, Told]()
        while True:
            self._turn += 1
            self._store.wait([f"turn {self._turn}"], _IDLE)
            if self._store.check(["over"]):
                self._store.set(f"left {self.rank}", "")
                return
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0, device=_CPU)
            message = box[0]
            if isinstance(message, _Load):
                read, _ = self._load(message)
                model = None if read is None else Shared(self, read)
                continue
            assert model is not None, "what is called was read everywhere"
            if message.condition is not None:
                told[message.told] = Told(message.condition)
            told = {number: told[number] for number in message.kept}
            torch.set_num_threads(message.threads)
            model.part(message, told[message.told])

    def place(self, way: Way) -> tuple[int, dist.ProcessGroup | None]:
        """Which part of the rows is this process's, and with whom it shares their tokens, if with any."""
        if way.parts == 1:
            return 0, dist.group.WORLD
        return self.rank // way.tokens, self._half


class Told:
    """A condition, and what the backbone makes of each part of its rows."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self._contexts: dict[tuple[int, int], Any] = {}

    def context(self, model: Backbone, part: int, parts: int, device: torch.device) -> Any:
        """For the calls with one part of the rows, of so many."""
        if (part, parts) not in self._contexts:
            rows = _rows(self.condition, part, parts, device)
            self._contexts[part, parts] = model.encode_condition(rows)
        return self._contexts[part, parts]


class Shared(nn.Module):
    """A backbone that several processes compute together; a VelocityModel for the first of them.

    Calls from several threads take turns.
    """

    def __init__(self, team: Team, model: Backbone) -> None:
        super().__init__()
        self._team, self.model, self._lock = team, model, threading.Lock()
        self._numbers = WeakKeyDictionary[Told, int]()  # of the conditions that the others hold
        self._count = 0

    def encode_condition(self, condition: Condition) -> Told:
        """The condition; each process encodes its rows at the first call that has it."""
        return Told(condition)

    def forward(self, latent: Tensor, time: Tensor, told: Told, known: Known | None = None) -> Tensor:
        """The velocity, as the backbone has it but for rounding.

        Raises:
            RuntimeError: another process has ended.
        """
        way = way_of(self._team.size, len(latent))
        if problem_of(way, self.model.config):  # one row, outside of the interval with guidance
            given = () if known is None else (known,)
            return self.model(latent, time, told.context(self.model, 0, 1, latent.device), *given)
        with self._lock:
            call = self._call(latent, time, told, known)
            with self._team.turn(call):
                return self.part(replace(call, latent=latent, time=time, known=known), told)

    def _call(self, latent: Tensor, time: Tensor, told: Told, known: Known | None) -> _Call:
        condition = None
        if told not in self._numbers:
            condition = _rows(told.condition, 0, 1, _CPU)
            self._numbers[told] = self._count
            self._count += 1
        return _Call(
            told=self._numbers[told], condition=condition, kept=frozenset(self._numbers.values()),
            latent=latent.cpu(), time=time.cpu(), known=None if known is None else known.to(latent.cpu()),
            threads=torch.get_num_threads(),
        )  # fmt: skip

    def part(self, call: _Call, told: Told) -> Tensor:
        """The velocity of a call that all processes have, each of which computes its part."""
        device, way = next(self.model.parameters()).device, way_of(self._team.size, len(call.latent))
        own, group = self._team.place(way)

        def mine(tensor: Tensor) -> Tensor:
            return tensor.chunk(way.parts)[own].to(device)

        given = () if call.known is None else (call.known.each(mine),)
        context = told.context(self.model, own, way.parts, device)
        with self._together(way, group):
            velocity = self.model(mine(call.latent), mine(call.time), context, *given).contiguous()
        if way.parts == 1:
            return velocity
        parts = [velocity if part == own else torch.empty_like(velocity) for part in range(way.parts)]
        for part, found in enumerate(parts):
            dist.broadcast(found, src=part * way.tokens)
        return torch.cat(parts)

    def _together(self, way: Way, group: dist.ProcessGroup | None) -> AbstractContextManager[None]:
        if way.tokens == 1:
            return nullcontext()
        assert isinstance(self.model, VideoDiT) and group is not None, "others are not shared so"
        return tokens_shared(self.model, group)


@dataclass(frozen=True, kw_only=True)
class _Load:
    """Read the backbone of a release."""

    release: Release
    device: str
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Compute a part of a velocity."""

    told: int
    """The number of the condition."""
    condition: Condition | None
    """Itself, the first time."""
    kept: frozenset[int]
    """Conditions that there may still be calls with."""
    latent: Tensor
    time: Tensor
    known: Known | None
    threads: int


def problem_of(way: Way, config: BackboneConfig) -> str | None:
    """Why a backbone cannot be shared so; None where it can."""
    return shares_tokens(config, way.tokens) if way.tokens > 1 else None


def _rows(condition: Condition, part: int, parts: int, device: torch.device) -> Condition:
    """One part of a condition's rows, on a device."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(parts)[part].to(device)

    if isinstance(condition, Labels):
        return replace(condition, index=rows(condition.index))
    return tuple(
        replace(
            text, hidden=rows(text.hidden), mask=rows(text.mask),
            pooled=None if text.pooled is None else rows(text.pooled),
        ) for text in condition
    )  # fmt: skip
