"""Why a Linear isn't faster, and what a model loses where: rules over measured numbers.

A layer's time is held against three floors: what a call costs however small the layer
(``overhead``), reading its kept weights once (``bandwidth``), and its multiply-adds at the cores'
peak (``compute``). The first rule that holds gives the reason:

1. the largest floor explains at least `EXPLAINED` of the time: ``overhead-bound``,
   ``bandwidth-bound`` or ``compute-bound``;
2. the same layer with its kept counts rounded up to whole panels runs in at most `ALIGNED` of the
   time, though it does more: ``misaligned``;
3. else the largest floor again, which is what remains when the kernel gets better.
"""

from __future__ import annotations

from collections.abc import Mapping

EXPLAINED = 0.6
ALIGNED = 0.93
FLOORS = ("overhead", "bandwidth", "compute")
# A model's other parts by the reason they give: nothing was removed from them.
REASONS = {
    "attention": "attention",
    "norm": "norm",
    "embedding": "embedding",
    "rest": "python/rest",
}


def why_not_faster(
    seconds: float,
    floors: Mapping[str, float],
    aligned: float | None = None,
) -> str:
    """Return the reason.

    Args:
        seconds: the layer's time.
        floors: seconds by name, the names of `FLOORS`.
        aligned: time of the layer with aligned counts over its own, None where not measured.

    Example:
        >>> why_not_faster(1.0, {"overhead": 0.1, "bandwidth": 0.7, "compute": 0.2})
        'bandwidth-bound'
        >>> why_not_faster(1.0, {"overhead": 0.1, "bandwidth": 0.3, "compute": 0.2}, aligned=0.8)
        'misaligned'
    """
    largest = max(FLOORS, key=lambda name: floors[name])
    if floors[largest] >= EXPLAINED * seconds:
        return f"{largest}-bound"
    if aligned is not None and aligned <= ALIGNED:
        return "misaligned"
    return f"{largest}-bound"


def losses(parts: Mapping[str, float], by_reason: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds lost by reason, largest first.

    Args:
        parts: seconds of the parts other than Linears, lost as a whole.
        by_reason: seconds that Linears take beyond their share of the dense time, by reason.
    """
    lost = dict(by_reason)
    for part, seconds in parts.items():
        reason = REASONS.get(part)
        if reason is not None:
            lost[reason] = lost.get(reason, 0.0) + seconds
    return dict(sorted(lost.items(), key=lambda item: -item[1]))
