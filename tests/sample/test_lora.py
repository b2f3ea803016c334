"""Adapters on a release: what they change, what a mistake in them says. Without peft, as a core install."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kinoflow.configs.errors import UserError
from kinoflow.dit_video.lora import TARGETS
from kinoflow.sample.__main__ import main
from kinoflow.sample.release import Release
from tests.sample.test_sample_cli import PROMPT, probe, refused

RANK, ALPHA = 2, 5


@pytest.fixture
def adapter(tiny_release, tmp_path):
    """A folder as peft writes it, with an adapter for every target."""
    folder, generator = tmp_path / "adapter", torch.Generator().manual_seed(3)
    folder.mkdir()
    halves = {}
    for name, weight in tiny_release.backbone().state_dict().items():
        if weight.ndim == 2 and name.removesuffix(".weight").endswith(
            tuple(f".{target}" for target in TARGETS)
        ):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            for half, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
                halves[f"{key}.lora_{half}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    assert len(halves) == 2 * 2 * 7
    save_file(halves, folder / "adapter_model.safetensors")
    write_config(folder)
    return folder


def write_config(folder, **changes):
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))


def changed(folder, change):
    """The folder's tensors after `change`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_weights_have_the_scaled_product_added(tiny_release_folder, tiny_release, adapter):
    halves = load_file(adapter / "adapter_model.safetensors")
    before = tiny_release.backbone().state_dict()
    after = Release.load(tiny_release_folder, [f"{adapter}:0.5", str(adapter)]).backbone().state_dict()
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        product = torch.zeros_like(weight)
        if f"{key}.lora_A.weight" in halves:
            product = halves[f"{key}.lora_B.weight"] @ halves[f"{key}.lora_A.weight"]
            assert not torch.equal(after[name], weight)
        torch.testing.assert_close(after[name], weight + 1.5 * ALPHA / RANK * product)


def test_an_adapter_changes_the_clip_and_none_of_it_does_not(run, adapter):
    frames = {}
    options = {"without": [], "none": ["--lora", f"{adapter}:0"], "half": ["--lora", f"{adapter}:0.5"]}
    for name, words in (options | {"all": ["--lora", str(adapter)]}).items():
        assert run(PROMPT, "--frames", "1", "--out", f"{name}.png", *words)[0] == 0
        frames[name] = probe_pixels(f"{name}.png")
    assert frames["none"] == frames["without"]
    assert len({frames[name] for name in ("without", "half", "all")}) == 3


def probe_pixels(name):
    from PIL import Image

    with Image.open(name) as picture:
        return picture.tobytes()


def test_a_clip_is_made_again_with_adapters_in_a_folder_with_a_space(run, tiny_release_folder, adapter):
    moved = adapter.rename(adapter.with_name("my own's adapter"))
    assert run(PROMPT, "--out", "clip.mp4", "--lora", f"{moved}:0.5", "--lora", str(moved))[0] == 0
    assert main(["again", "clip.mp4", "--weights", str(tiny_release_folder)]) == 0


def test_the_file_says_which_adapters_made_it(run, tiny_release_folder, adapter):
    run(PROMPT, "--out", "clip.mp4", "--lora", f"{adapter}:0.5")
    facts = probe("clip.mp4").metadata
    assert facts["lora"] == f"{adapter}:0.5"
    hashes = {Release.load(tiny_release_folder, words).weights_hash
              for words in ([], [str(adapter)], [f"{adapter}:0.5"])}  # fmt: skip
    assert len(hashes) == 3 and facts["weights"] in hashes
    changed(adapter, lambda tensors: tensors[min(tensors)].add_(1))
    assert Release.load(tiny_release_folder, [f"{adapter}:0.5"]).weights_hash not in hashes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"base_model.model.blocks.9.ffn.out.lora_A.weight": torch.ones(RANK, 4),
                             "base_model.model.blocks.9.ffn.out.lora_B.weight": torch.ones(4, RANK)}),
         "changes blocks.9.ffn.out.weight, which this transformer has not"),
        (lambda t: t.update({"base_model.model.blocks.0.ffn.out.lora_A.weight": torch.ones(RANK, 5)}),
         r"made for a blocks.0.ffn.out.weight of \(32, 5\), this transformer's has \(32, 48\)"),
        (lambda t: t.update({"base_model.model.blocks.0.ffn.out.lora_A.weight": torch.ones(3, 48)}),
         "A and B of blocks.0.ffn.out.weight are .* not of rank 2"),
        (lambda t: t.pop("base_model.model.blocks.0.ffn.out.lora_A.weight"),
         "A or B of blocks.0.ffn.out.weight is missing"),
        (lambda t: t.update({"blocks.0.ffn.out.lora_A.weight": torch.ones(2)}), "is no part of plain LoRA"),
        (lambda t: t.clear(), "is empty"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_line(tiny_release_folder, adapter, change, said):
    changed(adapter, change)
    with pytest.raises(UserError, match=said) as error:
        Release.load(tiny_release_folder, [str(adapter)])
    assert str(adapter) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora is not plain LoRA"),
        ({"use_rslora": True}, "use_rslora is not plain LoRA"),
        ({"alpha_pattern": {"ffn.out": 3}}, "alpha_pattern is not plain LoRA"),
        ({"bias": "all"}, "bias is not plain LoRA"),
        ({"peft_type": "LOHA"}, "LOHA is not plain LoRA"),
        ({"r": 0}, "must be numbers above 0"),
        ({"lora_alpha": "16"}, "must be numbers above 0"),
    ],
)
def test_another_kind_of_adapter_is_one_line(tiny_release_folder, adapter, changes, said):
    write_config(adapter, **changes)
    with pytest.raises(UserError, match=said):
        Release.load(tiny_release_folder, [str(adapter)])


def test_a_mistake_in_the_option_is_one_line(run, adapter):
    assert "'much' is no number" in refused(run(PROMPT, "--lora", f"{adapter}:much"))
    assert "nowhere" in refused(run(PROMPT, "--lora", "nowhere"))
    assert "nowhere" in refused(run(PROMPT, "--lora", "nowhere:0.5"))
    (adapter / "adapter_config.json").write_text("{")
    assert "damaged" in refused(run(PROMPT, "--lora", str(adapter)))
    (adapter / "adapter_config.json").unlink()
    assert "adapter_config.json: missing" in refused(run(PROMPT, "--lora", str(adapter)))
    write_config(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: missing" in refused(run(PROMPT, "--lora", str(adapter)))


def test_a_folder_with_a_colon_in_its_name_is_one(tiny_release_folder, adapter):
    odd = adapter.rename(adapter.with_name("odd:2"))
    plain, scaled = (Release.load(tiny_release_folder, [f"{odd}{end}"]) for end in ("", ":0.5"))
    assert [release.adapters[0].scale for release in (plain, scaled)] == [ALPHA / RANK, 0.5 * ALPHA / RANK]


def test_sampling_with_an_adapter_imports_no_peft(tiny_release_folder, adapter):
    script = f"""
import sys
from kinoflow.sample.release import Release
Release.load({str(tiny_release_folder)!r}, [{str(adapter)!r}]).backbone()
assert "peft" not in sys.modules
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
