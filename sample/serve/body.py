"""What a client asks for, checked, as a ClipRequest."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from kinoflow.configs.errors import UserError
from kinoflow.configs.terminal import parse_rate
from kinoflow.data.clips.buckets import Bucket
from kinoflow.sample.guidance import GuidanceKind
from kinoflow.sample.options import parse_interval
from kinoflow.sample.request import ClipRequest
from kinoflow.sample.serve import pictures
from kinoflow.sample.serve.errors import ApiError
from kinoflow.sample.serve.request import Maker

MAX_PROMPT = 2000
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_FORMS_OF = {
    "size": "not a size; write WIDTHxHEIGHT, for example 128x128",
    "seconds": "not a number of seconds; write 2 for example",
    "fps": "not a frame rate; write 16 or 24000/1001",
    "guidance_interval": "not an interval of flow times; write A:B, for example 0.1:0.9",
}
# What makers and releases call what clients know by another name.
_NAMES = {
    "--frames": "num_frames",
    "--size": "size",
    "--fps": "fps",
    "frames": "num_frames",
    "num_steps": "num_inference_steps",
    "negative": "negative_prompt",
    "label": "prompt",
    **{key: field for field, key in pictures.FIELDS.items()},
}
_NAMED = re.compile(r"--(?:frames|size|fps)\b|^(?:frames|num_steps|negative|label|image|last)\b")


def _text(value: Any) -> Any:
    """Refuse text that no file and no database holds."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("has a NUL character; leave it out")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("is not Unicode text (half of a surrogate pair); leave it out") from None
    return value


def _number(value: Any) -> Any:
    """Refuse true and false, which Python would count as numbers."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return str(value) if isinstance(value, float) else value


Text = Annotated[str, Field(max_length=MAX_PROMPT), BeforeValidator(_text)]
Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
# Short ones only: a fraction of 1e999999999 would fill the memory.
_SHARE = r"(?:\d|\d?\.\d{1,20})"
Interval = Annotated[str, Field(pattern=rf"^{_SHARE}:{_SHARE}$")]
Rate = Annotated[
    str,
    Field(pattern=r"^\d{1,6}(\.\d{1,20})?(/\d{1,6})?$"),
    BeforeValidator(lambda value: str(_number(value))),
]


class CreateVideo(BaseModel):
    """The parameters of `POST /v1/videos`: OpenAI's, then ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Text
    model: Annotated[str, Field(max_length=200)] | None = None
    seconds: Rate | None = None
    size: Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")] | None = None
    seed: Whole | None = None
    negative_prompt: Text | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Real | None = None
    guidance_kind: GuidanceKind | None = None
    guidance_interval: Interval | None = None
    guidance_rescale: Real | None = None
    cache: Real | None = None
    best_of: Whole | None = None
    fps: Rate | None = None
    num_frames: Whole | None = None
    rewrite: bool | None = None


async def read(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The parameters of a request's body, JSON or a form, and the pictures that a form brings.

    Raises:
        ApiError: it is neither, or cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _FORMS:
        async with request.form(max_files=len(pictures.FIELDS), max_fields=100) as form:
            values: dict[str, Any] = {}
            sent: dict[str, bytes] = {}
            for name, value in form.items():
                if not isinstance(value, UploadFile) or name not in pictures.FIELDS:
                    values[name] = value
                elif value.filename or value.size:  # a field that was left empty sends a file of no name
                    sent[name] = await value.read()
            return values, sent
    if kind != "application/json":
        wanted = f"send application/json or {_FORMS[0]}"
        raise ApiError(415, f"content-type: {kind or 'none'} is not read here; {wanted}")
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ApiError(400, 'the body is not JSON; send an object such as {"prompt": "…"}') from None
    if not isinstance(value, dict):
        raise ApiError(400, 'the body is not a JSON object; send one such as {"prompt": "…"}')
    return value, {}


def checked(
    values: dict[str, Any], maker: Maker, sent: Mapping[str, Path] = MappingProxyType({})
) -> ClipRequest:
    """The clip that is asked for, with all its settings; `sent` are the pictures by their fields.

    Raises:
        ApiError: 400 with one line that names the parameter and the remedy.
    """
    try:
        body = CreateVideo.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    try:
        if "last_reference" in sent and "input_reference" not in sent:
            raise UserError("last_reference: needs input_reference as well, which the clip begins with")
        given: dict[str, Any] = {pictures.FIELDS[field]: str(path) for field, path in sent.items()}
        return maker.check(replace(_request(body, maker), **given))
    except UserError as error:
        line = " ".join(str(error).split())
        for field, path in sent.items():
            line = line.replace(str(path), field)
        line = _NAMED.sub(lambda match: _NAMES[match[0]], line)
        name = re.split(r"[ :]", line, maxsplit=1)[0]
        name = "size" if name in ("height", "width") else name
        param = name if name in CreateVideo.model_fields or name in pictures.FIELDS else None
        raise ApiError(400, line, param=param, code="invalid_value") from None


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0])[:80]
    if param in pictures.FIELDS:
        line = f"{param}: no file; send multipart/form-data with a PNG, JPEG or WebP in it"
        raise ApiError(400, line, param=param, code="invalid_value")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, CreateVideo.model_fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(CreateVideo.model_fields)}"
        return ApiError(400, f"{param}: no such parameter; {remedy}", param=param, code="unknown_parameter")
    wording = {
        "missing": "missing; describe the clip",
        "string_pattern_mismatch": _FORMS_OF.get(param, ""),
        "string_too_long": f"longer than {MAX_PROMPT:,} characters; shorten it",
        "int_parsing": "not a whole number",
        "int_from_float": "not a whole number",
        "float_parsing": "not a number",
        "bool_parsing": "not true or false",
        "bool_type": "not true or false",
        "literal_error": f"not known; use {', '.join(get_args(GuidanceKind))}",
    }
    said = wording.get(first["type"], first["msg"].removeprefix("Value error, "))
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {said}", param=param, code=code)


def _request(body: CreateVideo, maker: Maker) -> ClipRequest:
    if not body.prompt.strip():
        raise UserError('prompt: empty; describe the clip, for example "a red star moves left"')
    if body.model not in (None, maker.name):
        raise UserError(f"model: {body.model!r} is not served; use {maker.name}, or leave it out")
    width, height = map(int, body.size.split("x")) if body.size else (None, None)
    fps = None if body.fps is None else _rate(body.fps, "fps")
    frames = body.num_frames
    if body.seconds is not None:
        if frames is not None:
            raise UserError("seconds: num_frames says how long the clip is; give one of the two")
        clip = _lasting(_rate(body.seconds, "seconds"), fps, maker)
        frames, fps = clip.frames, clip.fps
    return ClipRequest(
        prompt=body.prompt,
        negative=body.negative_prompt or None,  # an empty field of a form
        seed=body.seed or 0,
        frames=frames,
        width=width,
        height=height,
        fps=fps,
        steps=body.num_inference_steps,
        guidance=body.guidance_scale,
        guidance_kind=body.guidance_kind,
        guidance_interval=None if body.guidance_interval is None else parse_interval(body.guidance_interval),
        guidance_rescale=body.guidance_rescale,
        cache=body.cache,
        best_of=body.best_of,
        rewrite=bool(body.rewrite),
    )


def _lasting(seconds: Fraction, fps: Fraction | None, maker: Maker) -> Bucket:
    """The first of the maker's clips that lasts so long, to half a frame."""
    for clip in maker.clips:
        if fps in (None, clip.fps) and round(seconds * clip.fps) == clip.frames:
            return clip
    lengths = dict.fromkeys(f"{duration(clip)} s at {clip.fps} fps" for clip in maker.clips)
    at = "" if fps is None else f" at {fps} fps"
    raise UserError(f"seconds: no clip of {float(seconds):g} s{at}; {maker.name} makes {', '.join(lengths)}")


def duration(clip: Bucket | ClipRequest) -> str:
    """Seconds, such as "2" or "1.333"."""
    assert clip.frames is not None and clip.fps is not None
    return f"{round(float(clip.frames / clip.fps), 3):g}"


def _rate(text: str, key: str) -> Fraction:
    try:
        return parse_rate(text)
    except UserError:
        raise UserError(f"{key}: {_FORMS_OF[key]}") from None
