"""A slow twin of the progressive search, written from the patent's text alone.

No classes, no NumPy, no early exits: every step lists all layers that can go down, draws from them,
scores every drawn assignment from scratch and sorts. Scores and costs are whole numbers and all
comparisons are exact fractions, so a history either equals this one or it does not.

Only the source of randomness is shared by agreement: the key of a layer in a step is the SHA-256
of ``"seed/step/name"``, read as one big number, and smaller keys are drawn first.
"""

import hashlib
from collections.abc import Callable
from fractions import Fraction

Assignment = dict[str, int]
Step = tuple[tuple[int, ...], int, int, tuple[int, int]]
"""Bits in the order of the layers, score, cost, (step, slot) of the candidate it was."""


def draw(
    notches: dict[str, list[int]],
    incumbent: Assignment,
    cost: Callable[[Assignment], int],
    *,
    n: int,
    seed: int,
    step: int,
) -> list[Assignment]:
    """Draw layers one after the other without putting back, and lower each by one notch.

    What does not lower the cost goes back into the urn, and counts only where nothing does.
    """
    urn = {}
    for name, bits in notches.items():
        if incumbent[name] != min(bits):
            text = f"{seed}/{step}/{name}"
            urn[name] = int(hashlib.sha256(text.encode("ascii")).hexdigest(), base=16)
    candidates: list[Assignment] = []
    useless: list[Assignment] = []
    while urn and len(candidates) < n:
        drawn = min(urn, key=lambda name: urn[name])
        del urn[drawn]
        lower = max(b for b in notches[drawn] if b < incumbent[drawn])
        lowered = {**incumbent, drawn: lower}
        (candidates if cost(lowered) < cost(incumbent) else useless).append(lowered)
    return candidates or useless[:n]


def rank(
    rule: str, score: int, cost: int, *, score_before: int, cost_before: int, limit: int | None
) -> tuple[int, Fraction]:
    """Return what the winner has least of; the leading 1 puts what saves nothing last."""
    if rule == "min":
        return (0, Fraction(score))
    saved = cost_before - cost
    if limit is not None and cost_before > limit:
        saved = min(saved, cost_before - limit)
    if saved <= 0:
        return (1, Fraction(0))
    rise = score - score_before
    return (0, Fraction(rise, saved) if rise >= 0 else Fraction(rise * saved))


def progressive(
    notches: dict[str, list[int]],
    score: Callable[[Assignment], int],
    cost: Callable[[Assignment], int],
    *,
    limit: int | None,
    n: int,
    rule: str,
    seed: int,
) -> list[Step]:
    """Return the incumbent of every step. ``limit=None`` goes to the bottom."""

    def within(assignment: Assignment) -> bool:
        return limit is not None and cost(assignment) <= limit

    def row(assignment: Assignment, origin: tuple[int, int]) -> Step:
        bits = tuple(assignment[name] for name in notches)
        return (bits, score(assignment), cost(assignment), origin)

    incumbent = {name: max(bits) for name, bits in notches.items()}
    seen = {(0, 0): incumbent}
    history = [row(incumbent, (0, 0))]
    while not within(incumbent):
        step = len(history)
        candidates = draw(notches, incumbent, cost, n=n, seed=seed, step=step)
        if not candidates:
            break
        for slot, candidate in enumerate(candidates):
            seen[step, slot] = candidate
        order = sorted(
            range(len(candidates)),
            key=lambda slot: (
                rank(
                    rule,
                    score(candidates[slot]),
                    cost(candidates[slot]),
                    score_before=score(incumbent),
                    cost_before=cost(incumbent),
                    limit=limit,
                ),
                slot,
            ),
        )
        origin = (step, order[0])
        incumbent = seen[origin]
        if within(incumbent):
            met = [place for place in seen if within(seen[place])]
            origin = min(met, key=lambda place: (score(seen[place]), place))
            incumbent = seen[origin]
        history.append(row(incumbent, origin))
    return history
