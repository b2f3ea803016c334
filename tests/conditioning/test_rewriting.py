"""Prompts through a tiny language model and a server that stands in: greedy, in one line, quotes kept."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kinoflow.conditioning import rewriting
from kinoflow.conditioning.encoders import quiet
from kinoflow.conditioning.rewriting import Answer, LocalModel, Rewriter, Server, conversation, open_model
from kinoflow.configs.errors import UserError

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT


def write_model(folder, chat=None):
    """A Llama of two layers that reads bytes, with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8192, eos_token_id=256, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def greedy(folder, text, count):
    """Token by token, without a cache: the plain twin."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == 256:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True), bool(ids[0, -1] == 256)


@pytest.fixture
def few_tokens(monkeypatch):
    monkeypatch.setattr(rewriting, "MOST_TOKENS", 12)


@pytest.mark.parametrize(
    ("chat", "text"),
    [
        (CHAT, "<system>Do.\n<user>a\n<assistant>b\n<user>a cat\n<assistant>"),
        (NO_SYSTEM, "<user>Do.\n\na\n<assistant>b\n<user>a cat\n<assistant>"),
        (None, "Do.\n\nPrompt: a\nCaption: b\n\nPrompt: a cat\nCaption:"),
    ],
)
def test_a_local_model_answers_greedily(tmp_path, few_tokens, chat, text):
    with quiet():
        folder = write_model(tmp_path / "lm", chat)
        expected, ended = greedy(folder, text, 12)
    found = open_model(str(folder))("Do.", [("a", "b")], "a cat")
    if chat is None:
        line, newline, _ = expected.lstrip().partition("\n")
        assert found == Answer(text=line, whole=bool(newline) or ended)
    else:
        assert found == Answer(text=expected, whole=ended)
    assert open_model(str(folder)).name == "lm"


def test_a_model_of_text_ends_with_its_line_and_one_of_chat_with_its_token(tmp_path, few_tokens, monkeypatch):
    with quiet():
        text, chat = (LocalModel(str(write_model(tmp_path / str(i), c))) for i, c in enumerate([None, CHAT]))
    tokenizer = text._tokenizer

    def saying(said, end):
        def generate(**settings):
            ids = settings["input_ids"]
            for token in [*tokenizer(said)["input_ids"], *end]:
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
                if bool(settings["stopping_criteria"][0](ids, None).all()):
                    break
            assert settings["do_sample"] is False
            return ids

        return generate

    for model, said, end, answer in [
        (text, "\n one line\nand more", [], Answer(text="one line", whole=True)),
        (text, " one line", [256], Answer(text="one line", whole=True)),
        (text, " one line", [], Answer(text="one line", whole=False)),
        (chat, "two\nlines", [256], Answer(text="two\nlines", whole=True)),
        (chat, "two\nlines", [], Answer(text="two\nlines", whole=False)),
    ]:
        monkeypatch.setattr(model._model, "generate", saying(said, end))
        assert model("Do.", [], "a cat") == answer


class Fixed:
    name = "it"

    def __init__(self, text, whole=True):
        self._answer, self.heard = Answer(text=text, whole=whole), []

    def __call__(self, *heard):
        self.heard.append(heard)
        return self._answer


@pytest.mark.parametrize(
    ("prompt", "said", "caption"),
    [
        ("a cat", "  A cat\n sits. ", "A cat sits."),
        ("a cat", '"A cat sits."', "A cat sits."),
        ("a cat", "<think>A cat?\n</think>\n\nA cat sits.", "A cat sits."),
        ('a sign "KITE"', "A sign reads “KITE” on a wall.", "A sign reads “KITE” on a wall."),
        ('"KITE"', '"KITE"', '"KITE"'),
        ("it's a cat's toy", "It's a cat's toy.", "It's a cat's toy."),
    ],
)
def test_an_answer_becomes_one_line(prompt, said, caption):
    assert Rewriter(Fixed(said))(prompt) == (caption, None)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("A sign.", 'it lost "KITE" of'),
        ('A sign "KIT".', 'it lost "KITE"'),
        ('"KITE" and "SKY"', 'it added "SKY"'),
    ],
)
def test_words_in_quotes_survive_or_the_prompt_stays(said, why):
    caption, advice = Rewriter(Fixed(said))('a sign "KITE"')
    assert caption == 'a sign "KITE"'
    assert why in advice and "stays as it is" in advice


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Fixed(" \n"), 'it has no answer to "a cat"'),
        (Fixed('""'), "it has no answer"),
        (Fixed("a cat", whole=False), "it finds no end"),
        (Fixed("a " * 1001), "it finds no end"),
    ],
)
def test_no_answer_and_one_without_an_end_are_one_line(model, why):
    with pytest.raises(UserError, match=why) as error:
        Rewriter(model)("a cat")
    assert "\n" not in str(error.value)


def test_a_small_release_names_its_words():
    words = frozenset({"a", "red", "heart", "grows", "slowly", "on", "black", "background", "fps-16", ","})
    model = Fixed("a red heart")
    Rewriter(model, words)("love")
    Rewriter(model, words - {"heart"})("love")
    Rewriter(model)("love")
    (few, examples, prompt), (_, none, _), (many, long, _) = model.heard
    assert "no words but these: a, background, black, grows, heart, on, red, slowly." in few
    assert prompt == "love" and len(examples) == 1 and not none
    assert "these:" not in many and len(long[0][1].split()) > 40


@pytest.fixture
def server():
    """A server of OpenAI's protocol; `replies` is what it answers next, `asked` what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, body=None):
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            status, reply = self.server.replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode())

        def do_GET(self):
            self._reply()

        def do_POST(self):
            self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.replies = [], []
        server.address = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def said(text, why="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": why}]}


def test_a_server_is_asked_as_openai_is(server):
    server.replies += [
        (200, {"data": [{"id": "small"}, {"id": "large"}]}),
        said("A cat."),
        said("A", "length"),
    ]
    model = open_model(server.address + "/", key="secret")
    assert model.name == "small of 127.0.0.1"
    assert model("Do.", [("a", "b")], "a ☂") == Answer(text="A cat.", whole=True)
    assert model("Do.", [], "a cat") == Answer(text="A", whole=False)
    assert [asked[:2] for asked in server.asked] == [
        ("/v1/models", "Bearer secret"), *[("/v1/chat/completions", "Bearer secret")] * 2
    ]  # fmt: skip
    body = server.asked[1][2]
    assert (body["model"], body["temperature"]) == ("small", 0)
    assert body["messages"] == conversation("Do.", [("a", "b")], "a ☂")
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    server.replies += [said(None)]
    named = open_model(f"{server.address}#large")
    assert (named.name, named("Do.", [], "a").text) == ("large of 127.0.0.1", "")
    assert server.asked[-1][1] is None and server.asked[-1][2]["model"] == "large"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ((401, b"no\nkey"), "v1/chat/completions: 401 no key; set OPENAI_API_KEY"),
        ((404, b"no such model"), "404 no such model; see that it serves that model"),
        ((200, b"<html>"), "no answer of OpenAI's protocol; end the address in /v1"),
        ((200, {"choices": []}), "no answer of OpenAI's protocol"),
        ((200, []), "no answer of OpenAI's protocol"),
        (said(7), "no answer of OpenAI's protocol"),
    ],
)
def test_what_a_server_answers_wrongly_is_one_line(server, reply, why):
    server.replies.append(reply)
    with pytest.raises(UserError, match=why) as error:
        open_model(f"{server.address}#m")("Do.", [], "a cat")
    assert "\n" not in str(error.value)


def test_no_server_and_no_model_are_one_line(tmp_path, server):
    server.replies.append((200, {"data": []}))
    (tmp_path / "empty").mkdir()
    with quiet():
        write_model(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    for source, why in [
        (server.address, "no answer of OpenAI's protocol"),
        ("http://127.0.0.1:1/v1#m", "cannot be asked"),
        ("http://[/v1#m", "Invalid IPv6 URL; write http://HOST"),
        (str(tmp_path / "gone"), "no such folder"),
        (str(tmp_path / "empty"), "holds no causal language model"),
        (str(tmp_path / "damaged"), "holds no causal language model"),
    ]:
        with pytest.raises(UserError, match=why) as error:
            open_model(source)("Do.", [], "a cat")
        assert "\n" not in str(error.value)


def test_the_name_of_a_server_has_no_key():
    assert Server("http://user:secret@host:8000/v1#m").name == "m of host"
