"""The device that a user names, and the number type that suits it."""

import torch

from kinoflow.configs.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def parse_device(text: str) -> torch.device:
    """A torch device that is there: cpu, cuda, cuda:1, mps; auto is the GPU where there is one.

    Raises:
        UserError: torch does not know it, or has none here.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{text}: torch has no such device here; use cpu") from error
    return device


def parse_dtype(text: str, device: torch.device) -> torch.dtype:
    """fp32, bf16, fp16 or int8; auto is bf16 on a GPU and fp32 on a CPU, which has no faster one.

    Raises:
        UserError: another name.
    """
    if text == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if text not in DTYPES:
        raise UserError(f"dtype: {text} is none of {', '.join(DTYPES)}, auto")
    return DTYPES[text]


def name_of(dtype: torch.dtype) -> str:
    """What users call a number type."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def device_of(local_rank: int) -> torch.device:
    """The GPU of a process; where its launcher shows it one only, that one. The CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())
