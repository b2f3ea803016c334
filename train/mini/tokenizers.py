"""The tokenizers of the small text encoders: a word a token for UL2, byte pairs for MetaCLIP.

What stands in quotes gets no token of its own: a written word shall look the same to an encoder whether it
was in the training set or not. ByT5 reads bytes and needs none.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from kinoflow.train.mini.corpus import RATES, pieces

SENTINELS = [f"<extra_id_{index}>" for index in range(16)]
PAD, END, _UNKNOWN = 0, 1, 2
_WORD_FLOOR, _LETTER_SCORE, _PAIR_SCORE = -9.0, -14.0, -20.0


def word_tokenizer(texts: Iterable[str], max_tokens: int) -> PreTrainedTokenizerFast:
    """A T5 tokenizer (Unigram) with a token for each word of the texts; other words fall into letters.

    Letter case and accents do not matter.
    """
    normalizer = normalizers.Sequence([
        normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex("[“”„«»]"), '"'), normalizers.Replace(Regex("[‘’]"), "'"),
    ])  # fmt: skip
    splitter = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always"),
    ])  # fmt: skip
    counts = Counter(word.strip(",.") for text in texts for word in _unquoted(text).lower().split())
    counts.update(f"fps-{fps.numerator}" for fps in RATES if fps.denominator == 1)
    counts.update({"fps-": 1, '"': 1, ",": 1})
    total = counts.total()
    vocabulary = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for word, count in sorted(counts.items()):
        if word:
            vocabulary[f"▁{word}"] = max(math.log(count / total), _WORD_FLOOR)
    for piece in ("▁", *pieces()):
        vocabulary.setdefault(piece, _LETTER_SCORE if len(piece) == 1 else _PAIR_SCORE)
    tokenizer = Tokenizer(models.Unigram(list(vocabulary.items()), unk_id=_UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    ending = [("</s>", END)]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ending)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=SENTINELS, model_max_length=max_tokens,
    )  # fmt: skip


def byte_pair_tokenizer(texts: Iterable[str], merges: int, max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a merge table learned from the texts, less what stands in quotes."""
    own = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = own.normalizer, own.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False, min_frequency=2,
    )  # fmt: skip
    learner.train_from_iterator((_unquoted(text) for text in texts), trainer)
    table = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"][:merges]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in table)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=table, model_max_length=max_tokens)  # pyright: ignore[reportArgumentType]


def _unquoted(text: str) -> str:
    return re.sub('"[^"]*"', '" "', text)
