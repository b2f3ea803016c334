"""An encoder that needs no checkpoint, and processes that fill a cache with its states."""

import hashlib
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import kinoflow.conditioning.cache
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


def fill(folder):
    """Keep all texts; how many were encoded for that."""
    encoder = HashEncoder(pause=0.005)
    one = cached(folder, encoder)
    for text in TEXTS:
        one([text])
    return len(encoder.seen)


def fill_together(folder, count):
    """In so many processes that start at once; each prints its number."""
    start, release = os.pipe()
    for _ in range(count):
        if not os.fork():
            os.close(release)
            os.read(start, 1)  # its end comes when the one that forks lets go
            os.write(1, b"%d\n" % fill(folder))
            os._exit(0)
    os.close(release)
    return max(os.wait()[1] for _ in range(count))


def stop_in_the_middle(folder, whole):
    """Say "half" when so many texts are kept and half of the next one's file is written, and wait."""
    written = []

    def save(tensors, path, metadata):
        save_file(tensors, path, metadata)
        written.append(path)
        if len(written) > whole:
            os.truncate(path, path.stat().st_size // 2)
            print("half", flush=True)
            sys.stdin.read()

    kinoflow.conditioning.cache.save_file = save
    fill(folder)


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
