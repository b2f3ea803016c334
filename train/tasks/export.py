"""`kinoflow train export RUN RELEASE`: the averaged weights of a run as a part of a release folder.

With `--adapter` the adapters of a run alone, in a folder of their own; with `--int8` beside it in half the
bytes, which peft does not read.
"""

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kinoflow.configs.errors import UserError
from kinoflow.configs.files import replacing
from kinoflow.configs.schema import dump, load
from kinoflow.data.clips.buckets import parse
from kinoflow.data.latents.index import PIXELS, LatentIndex
from kinoflow.data.latents.sets import LatentSets
from kinoflow.dit_video.backbone import BACKBONES
from kinoflow.sample.adapters import write_sampling
from kinoflow.sample.card import CARD_NAME, ReleaseConfig, read_card
from kinoflow.sample.release import PARTS, Release, lent
from kinoflow.sample.stable_diffusion import is_diffusers, open_release
from kinoflow.sample.upsample import NEAR_STEPS, STEPS, WINDOW_SHARE, UpsampleConfig
from kinoflow.tae.model.inflate import inflate
from kinoflow.train.run.averages import AveragedState
from kinoflow.train.run.checkpoint import check_base, newest
from kinoflow.train.run.config import RunConfig
from kinoflow.train.run.task import Task
from kinoflow.train.tasks.distill import sampling_of
from kinoflow.train.tasks.flow_task import FlowTask


def main(arguments: Sequence[str], build: Callable[[RunConfig], Task]) -> int:
    """Export the run that the two words name, whose task `build` makes, and say what for; 0."""
    words = [word for word in arguments if word not in ("--adapter", "--int8")]
    if len(words) != 2:
        raise UserError("export: name the run and the release folder: kinoflow train export RUN RELEASE")
    alone, small = "--adapter" in arguments, "--int8" in arguments
    if small and not alone:
        raise UserError("--int8: is for --adapter; a release gets its 8 bits by kinoflow train average")
    run, release = map(Path, words)
    config = load(RunConfig, [str(run / "config.yaml")])
    if alone:
        found = export_adapter(run, release, build(config), config, torch.int8 if small else torch.float16)
        print(f"{release}: adapters from {found}, for {config.init_from}")
        print(f'next: kinoflow sample "PROMPT" --weights {config.init_from} --lora {release}')
        return 0
    found = export(run, release, build(config), config)
    before = _before(config)
    print(f"{release}: {config.model} from {found}{f', which went on from {before}' if before else ''}")
    print(_purpose(release, config))
    return 0


def export(run: Path, release: Path, task: Task, config: RunConfig) -> Path:
    """Write the task's part of a release from the run's newest checkpoint; the checkpoint's folder.

    Parts that the release folder lacks are copied from `config.release`, if there is one, but for those that
    a release around it has. A kinoflow.yaml that is there or comes with them gets the name of the run's
    folder, and says what the run went on from and which path and objective it was trained on. A model of
    labels names their classes there; one that makes pixels needs nothing beside it, and gets one.
    Files already there are replaced only once everything is written.

    Raises:
        UserError: the run has no whole checkpoint, its shards are incomplete, its adapters belong to other
            weights than init_from has now, or the release has another kind of backbone.
    """
    unwanted = _unwanted(config)
    for name in unwanted & BACKBONES.keys():
        if (release / name).exists():
            raise UserError(f"{release}: has {name}/, and {run} gives {config.model}/; name another folder")
    found = _newest(run, task, config)
    state = AveragedState(found)
    release.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{release.name}.", dir=release.parent) as place:
        aside = Path(place)
        task.export(state, aside)
        others = Path(config.release) if config.release else None
        spared = unwanted if others is None else unwanted | lent(release, others)
        wanted = [name for name in PARTS if name not in spared]
        for source in [] if others is None else [others / name for name in wanted]:
            if source.exists() and not any((there / source.name).exists() for there in (aside, release)):
                shutil.copytree(source, aside / source.name)
        if others is not None and is_diffusers(others):
            inflate(others / "vae").save_pretrained(aside / "tae")
        _write_card(aside / CARD_NAME, [release] if others is None else [release, others], run, config)
        release.mkdir(exist_ok=True)
        for entry in sorted(aside.iterdir()):  # what stays is not copied: of a large release it is many GiB
            target = release / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            entry.replace(target)
    return found


def export_adapter(
    run: Path, folder: Path, task: Task, config: RunConfig, dtype: torch.dtype = torch.float16
) -> Path:
    """Write the adapters of the run's newest checkpoint, as peft writes them; the checkpoint's folder.

    Raises:
        UserError: the run trains no adapters, or as `export` does.
    """
    if not isinstance(task, FlowTask) or not config.lora.rank:
        raise UserError(f"--adapter: {run} trains no adapters (lora.rank=0); leave it out")
    found = _newest(run, task, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        task.export_adapter(AveragedState(found), Path(place), dtype)
        if config.distill.steps:
            write_sampling(Path(place), sampling_of(config))
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(place).iterdir()):
            with replacing(folder / file.name) as new:  # with the rights of any new file
                file.replace(new)
    return found


def _newest(run: Path, task: Task, config: RunConfig) -> Path:
    found = newest(run)
    if found is None:
        raise UserError(f"{run}: no checkpoint to export, train it first")
    check_base(found, task.base, config)
    return found


def _unwanted(config: RunConfig) -> set[str]:
    """Parts that have no place beside what it trains: another backbone; what reads prompts, beside labels."""
    if config.model not in BACKBONES:
        return set()
    return BACKBONES.keys() - {config.model} | ({"text", "verifier"} if _labelled(config) else set())


def _labelled(config: RunConfig) -> bool:
    return config.backbone is not None and config.backbone.classes > 0


def _write_card(path: Path, sources: Sequence[Path], run: Path, config: RunConfig) -> None:
    """The first kinoflow.yaml of the sources, for this run: new weights do not keep the name of before.

    That of the first source, where the release is written, keeps its clips.
    """
    cards = [_card_of_diffusers(each) if is_diffusers(each) else read_card(each) for each in sources]
    card = next((card for card in cards if card is not None), None)
    if _labelled(config):
        assert config.data.latents is not None, "it was trained on them"
        index = LatentSets(config.data.latents).index
        if card is None and index.made_from["tae"] == PIXELS:
            card = _card_of_pixels(index)
        card = card and replace(card, classes=index.classes, best_of=1)
    if card is None:
        return
    name = run.resolve().name
    if card.name != name:  # else it is this run's already, of an earlier checkpoint
        card = replace(card, name=name, version="1", trained_from=_before(config))
    if config.model in BACKBONES:
        trained = replace(card.sampling, path=config.flow.path, objective=config.flow.objective)
        if config.distill.steps:
            trained = sampling_of(config)
        card = replace(card, sampling=trained)
        card = card if cards[0] is not None else _with_clips(card, config)
    if config.known.upsample and config.data.latents:
        card = _of_upsampler(card, config, LatentSets(config.data.latents).index)
    dump(card, path)


def _card_of_diffusers(folder: Path) -> ReleaseConfig:
    """Stable Diffusion's settings; its text encoders stay where they are."""
    card = open_release(folder).config
    return replace(card, text=replace(card.text, clip_t5=str(folder.resolve())))


def _card_of_pixels(index: LatentIndex) -> ReleaseConfig:
    buckets = tuple(map(_shape, index.buckets))
    return ReleaseConfig(name="", buckets=buckets, default_bucket=buckets[0], pixels=len(index.latent_mean))


def _of_upsampler(card: ReleaseConfig, config: RunConfig, index: LatentIndex) -> ReleaseConfig:
    """It makes clips of the sizes that it was trained on, once, in windows as long; text hardly matters."""
    taken = [parse(name) for name in config.data.buckets or index.buckets]
    most = config.known.window or max(bucket.frames for bucket in taken)
    cut = [replace(each, frames=min(each.frames, most), weight=1.0, batch_size=None) for each in taken]
    longest = max(cut, key=lambda bucket: bucket.frames)
    steps = NEAR_STEPS if config.dit.shown_variance else STEPS
    return replace(
        card,
        buckets=tuple(dict.fromkeys(map(str, cut))),
        default_bucket=str(longest),
        sampling=replace(card.sampling, guidance_scale=1.0, num_steps=steps),
        best_of=1,
        upsample=UpsampleConfig(factor=index.upsample, overlap=round(longest.frames * WINDOW_SHARE)),
    )


def _with_clips(card: ReleaseConfig, config: RunConfig) -> ReleaseConfig:
    """A backbone makes the clips that it was trained on, and those of the release that it went on from."""
    trained, folders = config.data.buckets, config.data.latents or ()
    if trained is None and folders and all((Path(folder) / "index.json").is_file() for folder in folders):
        trained = tuple(LatentSets(folders).index.buckets)
    if not trained:  # the latents are gone and the run does not name their buckets
        return card
    before = None if config.init_from is None else read_card(Path(config.init_from))
    makes = dict.fromkeys((*(before.buckets if before else ()), *map(_shape, trained)))
    default = card.default_bucket if card.default_bucket in makes else _shape(trained[0])
    return replace(card, buckets=tuple(makes), default_bucket=default)


def _shape(bucket: str) -> str:
    """A bucket without its weight and batch size."""
    return bucket.partition(" ")[0]


def _before(config: RunConfig) -> str:
    """Name and version of the release that the run went on from, or where it lies; empty without one."""
    if config.init_from is None:
        return ""
    card = read_card(Path(config.init_from))
    return config.init_from if card is None else f"{card.name} {card.version}"


def _purpose(folder: Path, config: RunConfig) -> str:
    """What to do with what was written, or what it lacks, in one line."""
    try:
        card = Release.load(folder).config
    except UserError as error:
        return str(error)
    if config.model == "tae" and not config.freeze_encoder:
        remedy = "train one on them (kinoflow train precompute), or the autoencoder with freeze_encoder=true"
        return f"{folder}: dit/ does not know the latents of this new encoder; {remedy}"
    if card.upsample.factor:
        return f"next: kinoflow sample upsample CLIP OUT.mp4 --weights {folder}"
    classes = card.classes
    asked = f"--label {shlex.quote(classes[0])}" if classes else '"PROMPT"'
    return f"next: kinoflow sample {asked} --weights {folder}"
