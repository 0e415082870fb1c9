"""What GenEval's metadata may say: its objects, colours and relations."""

from collections.abc import Mapping
from typing import Any

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's, in its order, under GenEval's names.
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
_CLAIMED = ("class", "count", "color", "position")


def geneval_fault(metadata: Mapping[str, Any]) -> str | None:
    """What of a prompt's metadata is not GenEval's, or None. What is null is left out.

    It has one claim or more in ``include``: ``class`` (of `OBJECTS`), ``count``, and perhaps ``color`` (of `COLORS`)
    and ``position`` (of `RELATIONS`, and the number of a claim before it); and perhaps some in ``exclude``: ``class``
    and ``count``. Anything else no picture could fulfil, or would be read by nobody.
    """
    claims = metadata.get("include")
    if not isinstance(claims, list) or not claims:
        return "'include' is no list of claims"
    others = metadata.get("exclude") or []
    if not isinstance(others, list):
        return "'exclude' is no list of claims"
    for number, claim in enumerate([*claims, *others]):
        if fault := _fault(claim, number, excluded=number >= len(claims)):
            return f"claim {number} {fault}"
    return None


def _fault(claim: Any, number: int, *, excluded: bool) -> str | None:
    counted = isinstance(claim, Mapping) and isinstance(claim.get("class"), str)
    if not counted or type(claim.get("count")) is not int or claim["count"] < 1:
        return "has no 'class' or no 'count' from 1"
    if claim["class"] not in OBJECTS:
        return f"is of {claim['class']!r}, none of COCO's 80 objects as GenEval names them"
    said = {key for key, value in claim.items() if value is not None}
    if unread := said - set(_CLAIMED[:2] if excluded else _CLAIMED):
        return f"says {', '.join(sorted(unread))}, which is not read" + " of 'exclude'" * excluded
    if "color" in said and claim["color"] not in COLORS:
        return f"has the colour {claim['color']!r}, none of {', '.join(COLORS)}"
    place = claim.get("position")
    if place is None:
        return None
    if not isinstance(place, list) or len(place) != 2 or place[1] not in range(number):
        return "has a 'position' that is no relation to a claim before it"
    if place[0] not in RELATIONS:
        return f"has the relation {place[0]!r}, none of {', '.join(RELATIONS)}"
    return None
