"""Text to video by flow matching, from a laptop to a cluster.

The names that a script needs, imported when they are first asked for: `TAE`, `accelerate` and `Codec`,
`VideoDiT`, `PromptEncoder`, `Release`, `Pipeline` and `generate`, and `UserError`, which all of them raise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kinoflow.conditioning.prompt_encoder import PromptEncoder
    from kinoflow.configs.errors import UserError
    from kinoflow.dit_video import VideoDiT
    from kinoflow.sample.generate import generate
    from kinoflow.sample.pipeline import Pipeline
    from kinoflow.sample.release import Release
    from kinoflow.tae import TAE
    from kinoflow.tae.codec.codec import Codec

__version__ = "0.1.0"
__all__ = ["TAE", "Codec", "Pipeline", "PromptEncoder", "Release", "UserError", "VideoDiT", "generate"]

_HOMES = {
    "TAE": "kinoflow.tae",
    "Codec": "kinoflow.tae.codec.codec",
    "Pipeline": "kinoflow.sample.pipeline",
    "PromptEncoder": "kinoflow.conditioning.prompt_encoder",
    "Release": "kinoflow.sample.release",
    "UserError": "kinoflow.configs.errors",
    "VideoDiT": "kinoflow.dit_video",
    "generate": "kinoflow.sample.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kinoflow' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
