"""Checkpoints as the hub has them: ids, shards, pickles, spiece.model, bfloat16, offloading. No network."""

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import T5ForConditionalGeneration

from kinoflow.conditioning.checkpoints import Source, TextConfig, fingerprint
from kinoflow.conditioning.encoders import quiet
from kinoflow.conditioning.offload import stream
from kinoflow.conditioning.prompt_encoder import PromptEncoder
from kinoflow.configs.errors import UserError
from tests.conditioning.writing import (
    sentencepiece_model,
    to_bin,
    to_hub_cache,
    write_big_ul2,
    write_encoders,
)

FPS = Fraction(16)
PROMPT = 'a red star, a sign says "KITE"'
IDS = {"ul2": "google/ul2", "byt5": "google/byt5-large", "metaclip": "facebook/metaclip-h14-fullcc2.5b"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("text"), write_big_ul2)


@pytest.fixture(scope="module")
def encoder(folder):
    return PromptEncoder.from_pretrained(folder)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub cache that holds the three repositories; there is no network to reach any other."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, repository in IDS.items():
        to_hub_cache(folder / name, tmp_path / "hub", repository, COMMIT)
    return tmp_path / "hub"


def same(first, second):
    return all(torch.equal(one.hidden, other.hidden) for one, other in zip(first, second, strict=True))


def test_a_sharded_gated_checkpoint_loads_its_encoder_half_alone(folder, encoder):
    shards = list((folder / "ul2").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and (folder / "ul2" / "model.safetensors.index.json").exists()
    written = {name for shard in shards for name in load_file(shard)}
    assert any(name.startswith("decoder") for name in written)
    assert not any("decoder" in name for name, _ in encoder.ul2.model.named_parameters())
    with quiet(), torch.no_grad():
        whole = T5ForConditionalGeneration.from_pretrained(folder / "ul2")
    own = {name: value for name, value in whole.named_parameters() if name.startswith(("encoder", "shared"))}
    assert {name for name, _ in encoder.ul2.model.named_parameters()} <= own.keys() | {"shared.weight"}
    for name, value in encoder.ul2.model.named_parameters():
        assert torch.equal(value, own[name]), name


def test_a_spiece_model_reads_as_sentencepiece_does(folder, encoder):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(
        model_proto=(folder / "ul2" / "spiece.model").read_bytes()
    )
    assert not (folder / "ul2" / "tokenizer.json").exists()
    for text in ("FPS-16 a red star", "", 'Ring  "STAR" ?', "x" * 30):
        assert encoder.ul2.tokenizer(text)["input_ids"] == [*reference.encode(text), 1]
    assert sentencepiece_model() == sentencepiece_model()


def test_pickled_shards_load_like_safetensors(folder, encoder, tmp_path):
    for name in ("ul2", "byt5", "metaclip"):
        to_bin(Path(shutil.copytree(folder / name, tmp_path / name)))
    assert len(list((tmp_path / "ul2").glob("pytorch_model-*.bin"))) > 3
    assert not list(tmp_path.rglob("*.safetensors"))
    assert same(PromptEncoder.from_pretrained(tmp_path)([PROMPT], FPS), encoder([PROMPT], FPS))


def test_hub_ids_load_what_the_client_has_fetched(hub, encoder):
    assert same(PromptEncoder.from_pretrained(IDS)([PROMPT], FPS), encoder([PROMPT], FPS))


def test_one_hub_id_may_hold_all_three(folder, tmp_path, encoder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    to_hub_cache(folder, tmp_path / "hub", "someone/text", COMMIT)
    assert same(PromptEncoder.from_pretrained("someone/text")([PROMPT], FPS), encoder([PROMPT], FPS))


def test_what_is_asked_of_the_hub_is_weights_of_one_kind(folder, tmp_path, monkeypatch):
    """Safetensors when there are any; pickles only where there are none; never another library's weights."""
    asked = []

    def fetch(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path / "fetched")

    monkeypatch.setattr("kinoflow.conditioning.checkpoints.snapshot_download", fetch)
    shutil.copytree(folder / "ul2", tmp_path / "fetched")
    Source(name="ul2", location="google/ul2").folder()
    assert [patterns[-1] for _, patterns in asked] == ["model*.safetensors"]
    to_bin(tmp_path / "fetched")
    asked.clear()
    Source(name="ul2", location="google/ul2").folder()
    assert [patterns[-1] for _, patterns in asked] == ["model*.safetensors", "pytorch_model*.bin"]
    assert all(name == "google/ul2" for name, _ in asked)


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^google/ul2: the ul2 encoder is neither a folder here nor"
    ) as caught:
        PromptEncoder.from_pretrained(IDS)
    assert "\n" not in str(caught.value) and "give its folder" in str(caught.value)


def test_half_a_snapshot_is_one_line(hub):
    for shard in (hub / "models--google--ul2" / "snapshots" / COMMIT).glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(UserError, match=r"^google/ul2: .*delete .*fetch it again") as caught:
        PromptEncoder.from_pretrained(IDS)
    assert "\n" not in str(caught.value)


def test_bfloat16_holds_for_every_weight_and_stays_near(folder, encoder):
    half = PromptEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for near, exact in zip(half([PROMPT], FPS), encoder([PROMPT], FPS), strict=True):
        assert near.hidden.dtype == torch.bfloat16
        error = (near.hidden.float() - exact.hidden).square().mean().sqrt()
        assert error < 0.05 * exact.hidden.square().mean().sqrt()


def test_an_offloaded_encoder_gives_the_same_states(folder, encoder):
    offloaded = PromptEncoder.from_pretrained(folder, offload=("ul2", "byt5"))
    assert same(offloaded([PROMPT], FPS), encoder([PROMPT], FPS))
    offloaded.to(torch.float64)
    assert {states.hidden.dtype for states in offloaded([PROMPT], FPS)} == {torch.float64}


def test_weights_of_an_offloaded_encoder_stay_in_main_memory(folder):
    """The meta device stands for a GPU here: what is computed there has shapes and no values."""
    encoder = PromptEncoder.from_pretrained(folder, offload=("ul2",)).ul2.to("meta")
    before = {name: value.data_ptr() for name, value in encoder.named_parameters()}
    embedding, block = encoder.model.encoder.embed_tokens, encoder.model.encoder.block[1]
    seen = []
    block.layer[0].register_forward_pre_hook(
        lambda *_: seen.append({p.device.type for p in block.parameters()})
    )
    states = block(embedding(torch.zeros(1, 5, dtype=torch.long, device="meta")))[0]
    assert states.is_meta and states.shape == (1, 5, 24)
    assert seen == [{"meta"}]
    assert {value.device.type for value in encoder.parameters()} == {"cpu"}
    assert {name: value.data_ptr() for name, value in encoder.named_parameters()} == before


def test_a_failed_forward_leaves_streamed_weights_in_place():
    linear = nn.Linear(3, 2)
    stream([linear], lambda: torch.device("meta"))
    with pytest.raises(RuntimeError):
        linear(torch.zeros(1, 4, device="meta"))
    assert linear.weight.device.type == "cpu"
    assert linear(torch.zeros(1, 3, device="meta")).is_meta


@pytest.mark.gpu
def test_an_offloaded_encoder_computes_on_the_gpu_and_leaves_no_weight_there(folder, encoder):
    offloaded = PromptEncoder.from_pretrained(folder, offload=("ul2", "byt5")).to("cuda")
    states = offloaded([PROMPT], FPS)
    assert all(each.hidden.is_cuda and each.mask.is_cuda for each in states)
    assert {p.device.type for p in offloaded.ul2.parameters()} == {"cpu"}
    for one, other in zip(states, encoder([PROMPT], FPS), strict=True):
        torch.testing.assert_close(one.hidden.cpu(), other.hidden, atol=1e-4, rtol=1e-4)


def test_fingerprints_follow_weights_tokenizer_and_configuration(folder, tmp_path):
    copy = Path(shutil.copytree(folder / "ul2", tmp_path / "copy"))
    first = fingerprint(folder / "ul2")
    assert fingerprint(copy) == first
    seen = {first}
    for name in ("spiece.model", "config.json", min(path.name for path in copy.glob("*.safetensors"))):
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        seen.add(fingerprint(copy))
    assert len(seen) == 4
    (copy / "README.md").write_text("not read")
    assert fingerprint(copy) in seen


def test_the_fingerprint_of_a_snapshot_is_its_commit(hub):
    snapshot = hub / "models--google--ul2" / "snapshots" / COMMIT
    first = fingerprint(snapshot)
    (snapshot / "config.json").write_text("{}")  # a snapshot never changes, so nothing of it is read
    assert fingerprint(snapshot) == first
    assert fingerprint(snapshot.rename(snapshot.with_name(COMMIT[::-1]))) != first
    assert fingerprint(hub / "models--google--byt5-large" / "snapshots" / COMMIT) != first


def test_a_release_names_its_encoders(tmp_path):
    (tmp_path / "ours").mkdir()
    config = TextConfig(ul2="google/ul2", byt5="ours", dtype="bfloat16", offload=("ul2",))
    expected = {"ul2": "google/ul2", "byt5": f"{tmp_path}/ours", "metaclip": f"{tmp_path}/text/metaclip"}
    assert config.sources(tmp_path) == expected
    assert config.torch_dtype is torch.bfloat16
    with pytest.raises(UserError, match=r"^text.offload: 'metaclip'"):
        TextConfig(offload=("metaclip",))
