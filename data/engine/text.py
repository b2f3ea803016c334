"""How much of a picture is covered by written text: RapidOCR's detector, whose models its package brings."""

import functools
from typing import Any

import numpy as np
from jaxtyping import UInt8

_LIKELY = 0.6  # of a box, at least, to be text
_TALLEST = 1 / 3  # of the picture; what is taller is a face or a wall that the detector took for a line


@functools.cache
def _detector() -> Any:
    from rapidocr import RapidOCR

    quiet = {"Global.log_level": "critical", "Global.use_cls": False, "Global.use_rec": False}
    # By itself it makes a picture's shorter side 736 pixels long, which takes four times as long.
    size = {"Det.limit_type": "max", "Det.limit_side_len": 960}
    one_thread = {"EngineConfig.onnxruntime.intra_op_num_threads": 1,
                  "EngineConfig.onnxruntime.inter_op_num_threads": 1}  # fmt: skip
    return RapidOCR(params=quiet | size | one_thread)


def text_share(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """The share of the picture inside boxes of text."""
    import cv2

    found = _detector()(np.ascontiguousarray(picture[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
    if found is None or found.boxes is None or len(found.boxes) == 0:
        return 0.0
    mask = np.zeros(picture.shape[:2], np.uint8)
    scores = found.scores if found.scores is not None else [1.0] * len(found.boxes)
    for box, score in zip(found.boxes, scores, strict=True):
        thickness = min(np.linalg.norm(box[1] - box[0]), np.linalg.norm(box[2] - box[1]))
        if score >= _LIKELY and thickness <= _TALLEST * min(picture.shape[:2]):
            cv2.fillPoly(mask, [np.rint(box).astype(np.int32)], (1,))
    return float(mask.mean())
