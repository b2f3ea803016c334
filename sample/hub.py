"""`kinoflow sample push RELEASE REPO_ID`: a release on the Hugging Face hub, with a model card.

The card is the release's README.md, or one that is written of its kinoflow.yaml and figures.json where there
is none; what the hub reads of it (kind, licence, figures) stands in front.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from kinoflow.configs.errors import UserError, one_line
from kinoflow.configs.terminal import print_json
from kinoflow.sample.adapters import FOLDER as ADAPTERS
from kinoflow.sample.card import CARD_NAME
from kinoflow.sample.release import PARTS, UPSAMPLER, Release
from kinoflow.sample.stable_diffusion import StableDiffusion, open_release

README, FIGURES = "README.md", "figures.json"
_ALONE = (CARD_NAME, FIGURES, "model_index.json", "pipeline.py")
_MEASURED = {
    "color": "colour",
    "shape": "shape",
    "motion": "motion",
    "word": "written word",
    "joint": "all of colour, shape, motion",
}
_TEMPLATE = """# {name}

Version {version}{base}, of [kinoflow](https://arxiv.org/abs/2410.13720): {kind} by flow matching.

```bash
kinoflow sample {asked} --weights {repo}
```

It makes: {offers}.
"""
_HELD_OUT = """
## Figures

{prompts} held-out prompts, seed {seed}, {num_steps} {solver} steps, guidance {guidance_scale:g}{chosen},
clips of {clip} (`kinoflow sample evaluate --prompts {prompts} --json`; 95 % intervals; "real" is the judge
on real renders of the same scenes):

| | generated | real |
| --- | --- | --- |
{rows}
| Fréchet distance in the judge's features | {frechet:.1f} | {frechet_real:.1f} |
"""


def main(argv: list[str]) -> int:
    """Upload and say where; 0."""
    args = _parser().parse_args(argv)
    release = open_release(None if args.release == "mini" else args.release)
    if isinstance(release, StableDiffusion):
        raise UserError(f"{release.folder}: is Stable Diffusion's; give a release of kinoflow")
    card = model_card(release, args.repo_id, args.license)
    if args.dry_run:
        print(card, end="")
        return 0
    url = push(release, card, args.repo_id, private=args.private)
    if args.json:
        print_json({"url": url, "release": release.name, "weights": release.weights_hash})
        return 0
    print(f"{url}: {release.name}")
    print(f'next: kinoflow sample "PROMPT" --weights {args.repo_id}')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kinoflow sample push",
        description="Upload a release, or a folder of export-diffusers, to the Hugging Face hub: one commit, "
        "with a model card made of its README.md and figures.json.",
    )
    add = parser.add_argument
    add("release", metavar="RELEASE", help="folder or hub id; mini is the shipped one")
    add("repo_id", metavar="REPO_ID", help="owner/name; it is made where there is none")
    add("--private", action="store_true", help="when it is made, only its owner sees it")
    add("--license", metavar="ID", help="for the card, as the hub writes it: apache-2.0, cc-by-4.0, other")
    add("--dry-run", action="store_true", help="print the model card, and upload nothing")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def push(release: Release, card: str, repo_id: str, *, private: bool = False) -> str:
    """Upload the release's own files and the card as README.md, in one commit; the repository's address.

    Raises:
        UserError: a name that is none, no token, or what the hub answers.
    """
    api = HfApi()
    with TemporaryDirectory() as place:
        (Path(place) / README).write_text(card, encoding="utf-8")
        for path in _files(release.folder):
            link = Path(place) / path.relative_to(release.folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"{release.name} {release.config.version}, weights {release.weights_hash}"
            api.upload_folder(repo_id=made.repo_id, folder_path=place, commit_message=message)
        except HFValidationError as error:
            said = f"{repo_id}: no name for a repository ({one_line(error)}); write owner/name"
            raise UserError(said) from None
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            remedy = "see that `hf auth login` or HF_TOKEN may write there, and run it again"
            raise UserError(f"{repo_id}: not uploaded ({one_line(error)}); {remedy}") from None
    return str(made)


def _files(folder: Path) -> Iterator[Path]:
    """What belongs to a release, and to diffusers' form of it; no other file that lies there."""
    yield from (folder / name for name in _ALONE if (folder / name).is_file())
    for part in (*PARTS, ADAPTERS, UPSAMPLER):
        for path in sorted((folder / part).rglob("*")):
            inside = path.relative_to(folder).parts
            if path.is_file() and not any(name.startswith((".", "__")) for name in inside):
                yield path


def model_card(release: Release, repo_id: str, license: str | None = None) -> str:
    """The README.md of a release for the hub, in Markdown with YAML in front.

    A README.md that has its YAML already is taken as it is.

    Raises:
        UserError: figures.json cannot be read, or was measured on other weights.
    """
    readme = release.folder / README
    body = readme.read_text(encoding="utf-8") if readme.is_file() else None
    if body is not None and body.startswith("---\n"):
        return body
    figures = _figures(release)
    if body is None:
        body = _written(release, repo_id, figures)
    # Pictures that lie outside of the folder do not come along.
    body = re.sub(r"^!\[[^\]]*\]\(\.\./[^)]*\)\n\n?", "", body, flags=re.MULTILINE)
    data = ModelCardData(
        library_name="kinoflow",
        pipeline_tag=None if release.config.classes else "text-to-video",
        license=license,
        tags=["flow-matching", *(["diffusers"] if (release.folder / "model_index.json").is_file() else [])],
        model_name=release.name if figures else None,
        eval_results=_results(figures) if figures else None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _figures(release: Release) -> dict[str, Any]:
    path = release.folder / FIGURES
    if not path.is_file():
        return {}
    again = f"kinoflow sample evaluate --release {release.folder} --json > {path}"
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        weights = figures["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not what evaluate prints; delete it, or run {again}") from None
    if weights != release.weights_hash:
        others = f"measured on weights {weights}, these are {release.weights_hash}"
        raise UserError(f"{path}: {others}; delete it, or run {again}")
    return figures


def _results(figures: dict[str, Any]) -> list[EvalResult]:
    """Its figures as the hub lists them."""
    world: dict[str, Any] = {"task_type": "text-to-video", "dataset_type": "kinoflow-world"}
    name = f"first {figures['prompts']} held-out prompts of kinoflow's world"
    found = [(f"accuracy, {said}", "accuracy", share["share"]) for said, share in _shares(figures)]
    found.append(("Fréchet distance in the judge's features", "frechet", figures["frechet"]))
    found.append(("PSNR of the autoencoder, dB", "psnr", figures["autoencoder_psnr"]))
    return [
        EvalResult(
            **world, dataset_name=name, metric_name=said, metric_type=kind, metric_value=round(value, 4)
        )
        for said, kind, value in found
        if value is not None
    ]


def _shares(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What was measured, by its name: where no prompt had a word, none was."""
    found = [(said, figures[key]) for key, said in _MEASURED.items() if figures[key] is not None]
    strict = figures.get("strict")
    return found if strict is None else [*found, ("all that is named, and nothing else", strict["wholly"])]


def _written(release: Release, repo_id: str, figures: dict[str, Any]) -> str:
    config = release.config
    text = _TEMPLATE.format(
        name=config.name,
        version=config.version,
        base=f", trained from {config.trained_from}" if config.trained_from else "",
        kind="classes to pictures and clips" if config.classes else "text to video",
        asked=f"--label {config.classes[0]!r}" if config.classes else '"PROMPT"',
        repo=repo_id,
        offers=", ".join(f"`{bucket}`" for bucket in config.buckets),
    )
    if not figures:
        return text
    best_of = figures.get("best_of", 1)  # figures of before have none
    chosen = f", the best of up to {best_of}" if best_of > 1 else ""
    rows = "\n".join(_row(*pair) for pair in _shares(figures))
    text += _HELD_OUT.format(rows=rows, chosen=chosen, **figures)
    psnr = figures["autoencoder_psnr"]
    return (
        text if psnr is None else f"{text}\nThe autoencoder gives the same scenes back with {psnr:.1f} dB.\n"
    )


def _row(said: str, share: dict[str, Any]) -> str:
    made, low, high, real = (f"{100 * share[key]:.1f}" for key in ("share", "low", "high", "real"))
    return f"| {said} ({share['count']}) | {made} % ({low}-{high}) | {real} % |"
