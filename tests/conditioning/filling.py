"""An encoder that needs no checkpoint, and a process that fills a cache with its states."""

import hashlib
import sys
import time
from pathlib import Path

import torch

from kinoflow.conditioning.cache import CachedEncoder
from kinoflow.conditioning.embedding import Encoded, TextEmbedding


class HashEncoder:
    """States drawn from a hash of the text, one a letter and one more, at most `limit`; counts its texts."""

    limit = 12

    def __init__(self, dtype=torch.float32, pause=0.0):
        self.dtype, self.pause, self.seen = dtype, pause, []

    def to(self, device, dtype):
        self.dtype = dtype
        return self

    def encode(self, texts):
        time.sleep(self.pause)
        self.seen += texts
        lengths = [min(len(text) + 1, self.limit) for text in texts]
        hidden = torch.zeros(len(texts), max(lengths), 6, dtype=self.dtype)
        mask = torch.zeros(len(texts), max(lengths), dtype=torch.bool)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            states = torch.randn(self.limit, 6, generator=torch.Generator().manual_seed(seed))
            hidden[row, :length], mask[row, :length] = states[:length].to(self.dtype), True
        cut = tuple(len(text) + 1 > self.limit for text in texts)
        return Encoded(states=TextEmbedding(hidden=hidden, mask=mask), cut=cut)


def cached(folder, encoder, *, name="ul2", identity="checkpoint", dtype=torch.float32):
    return CachedEncoder(name=name, identity=identity, dtype=dtype, load=lambda: encoder, cache=Path(folder))


TEXTS = [f"text {i}" for i in range(60)]

if __name__ == "__main__":
    encoder = HashEncoder(pause=0.005)
    one = cached(sys.argv[1], encoder)
    print("ready", flush=True)
    sys.stdin.readline()  # so that both start together
    for text in TEXTS:
        one([text])
    print(len(encoder.seen), flush=True)
