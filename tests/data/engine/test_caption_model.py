"""A model of transformers that sees pictures, tiny and random, writes captions as the server does."""

import shutil
from pathlib import Path

import pytest

from kinoflow.configs.errors import UserError
from kinoflow.data.__main__ import main
from kinoflow.data.clips import manifest
from kinoflow.data.engine import captioners
from kinoflow.data.engine.captioners import LocalModel
from kinoflow.data.engine.captioning import BY
from kinoflow.data.engine.kept import pictures
from tests.data.making import real_clip

WORDS = ["a", "man", "in", "the", "car", "sits", ".", "<image>", "user:", "assistant:", "Describe", "it"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A LLaVA of some thousand weights, whose answer is one whole sentence or none."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<unk>", "</s>", *WORDS]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=16, patch_size=8),
        text_config=LlamaConfig(**size, vocab_size=len(words), eos_token_id=2, pad_token_id=0),
        image_token_index=words.index("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    shown = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        shown, tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("eye"))


def test_it_is_asked_about_pictures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(captioners, "MOST_TOKENS", 12)
    said: list[tuple[str, bool]] = []

    def kept(text: str, *, whole: bool, name: str) -> str:
        said.append((text, whole))
        return f"{name}: {text}"

    monkeypatch.setattr(captioners, "plain", kept)
    clip = tmp_path / "clip.mp4"
    shutil.copy(real_clip("bikes.mp4"), clip)
    manifest.write(tmp_path / "manifest.jsonl", [
        manifest.ClipEntry(path=str(clip), first_frame=first, frames=30) for first in (0, 150)
    ])  # fmt: skip
    words = ["caption", str(tmp_path), "--model", str(model), "--frames", "2", "--workers", "0"]
    assert main(words) == 0
    assert len(said) == 2 and all(len(text.split()) <= 12 for text, _ in said)
    first, other = manifest.read(tmp_path / "manifest.jsonl").entries
    assert first.extra[BY] == model.name and first.caption.startswith(f"{model.name}: ")
    assert {first.caption, other.caption} == {f"{model.name}: {text}" for text, _ in said}
    assert main(words) == 0 and len(said) == 2, "cached"
    capsys.readouterr()


def test_pictures_and_the_prompt_count(model: Path) -> None:
    """Of a random model the inputs are looked at, not the words that it says."""
    eye, heard = LocalModel(str(model)), []
    generate = eye._model.generate

    def listening(**given: object) -> object:
        heard.append(given)
        return generate(**given)

    eye._model.generate = listening
    clip = str(real_clip("bikes.mp4"))
    for prompt, frames in [("Describe it", [0, 60]), ("Describe it", [60, 0]), ("Describe", [0])]:
        shown = [pictures(clip, [frame], 64)[0] for frame in frames]
        try:
            eye(prompt, shown)
        except UserError as error:  # a random model may well find no end
            assert model.name in str(error)
    one, turned, less = (given["pixel_values"] for given in heard)
    assert one.shape == (2, 3, 16, 16) and (one.flip(0) == turned).all() and (less == one[:1]).all()
    assert (one[0] != one[1]).any()
    tokens = [given["input_ids"].shape[1] for given in heard]
    assert tokens[0] == tokens[1] == tokens[2] + 4 + 1, "four for a picture, one for a word"


def test_one_without_a_template_and_another_kind_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        LocalModel(str(write_model(tmp_path / "plain", template=None)))
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="holds no model of pictures that can be read"):
        LocalModel(str(tmp_path / "damaged"))
