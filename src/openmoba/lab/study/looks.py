"""How the arms and the sizes of a study are drawn: the same in every figure, whatever else is in it.

An arm's colour says what it is: full attention red, MoBA blue, hybrids orange, hybrids with key convolution green, and
the darker the more full layers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from openmoba.lab.arms import FULL, HYBRID, MOBA
from openmoba.lab.study.groups import by
from openmoba.lab.study.outcomes import Outcome
from openmoba.records.figures import BLUE, DENSE, Look

_DASH = (0, (5, 1))
_FAMILIES = {
    (FULL, False): (DENSE, Look("#994455", "d", "--")),
    (FULL, True): (Look("#882255", "X", "--"),),
    (MOBA, False): (
        Look(BLUE, "o"), Look("#33BBEE", "p", "--"), Look("#6699CC", "h", "-."), Look("#332288", "8", ":"),
        Look("#004488", "H", _DASH),
    ),
    (MOBA, True): (Look("#AA3377", "*", "--"), Look("#EE99AA", "P", "-."), Look("#662255", "H", ":")),
    (HYBRID, False): (
        Look("#F2A65A", "^", "--"), Look("#EE7733", "v", "-."), Look("#B8500C", "<", ":"), Look("#7A3300", ">", _DASH),
        Look("#401A00", "d", "--"),
    ),
    (HYBRID, True): (
        Look("#5CC9B8", "P", "--"), Look("#009988", "D", "-."), Look("#00665B", "*", ":"), Look("#003D36", "h", _DASH),
        Look("#88AA00", "p", "--"),
    ),
}  # fmt: skip
"""Kind of an arm, and whether it has a key convolution -> its looks: of hybrids, by their full layers."""
_OTHERS = (
    Look("#555555", "P", "--"), Look("#999999", "X", "-."), Look("#222222", "*", ":"), Look("#BBBBBB", "D", _DASH),
)  # fmt: skip
_FULL_LAYERS = (1, 2, 3, 9)
_BLOCK_SIZES = (64, 128, 256)
_SIZES = (Look("#CCBB44", "o"), Look("#44AA99", "^", "--"), Look("#4477AA", "D", "-."), Look("#332288", "v", ":"),
          Look("#882255", "s", _DASH))  # fmt: skip


def arm_looks(outcomes: Sequence[Outcome]) -> dict[str, Look]:
    """Choose the look of every arm, by its label.

    Of two that would look alike one takes the next of its kind: not that whose full layers are the last, nor that which
    trains with MoBA from the start.
    """
    looks: dict[str, Look] = {}
    for own in sorted(by("arm", outcomes).values(), key=_rare):
        arm = own[0].config.arm
        family = _FAMILIES.get((arm.kind, arm.key_conv is not None), _OTHERS)
        first = _place(own[-1]) % len(family)
        turned = [*family[first:], *family[:first]]
        looks[own[0].label] = next((look for look in turned if look not in looks.values()), turned[0])
    return looks


def _rare(runs: Sequence[Outcome]) -> tuple[bool, bool, str]:
    """Return what sorts arms of the same kind, the usual ones first."""
    run = runs[-1]
    return bool(run.config.arm.warm_start), not run.ends_full, run.label


def size_looks(outcomes: Sequence[Outcome]) -> dict[str, Look]:
    """Choose the look of every size, by its name in the recipe, the one with the fewest parameters first."""
    return {name: _SIZES[place % len(_SIZES)] for place, name in enumerate(by_parameters(outcomes))}


def by_parameters(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Group runs by the size's name, the one with the fewest parameters first."""
    sizes = by("size", outcomes)
    return dict(sorted(sizes.items(), key=lambda item: item[1][0].parameters))


def _place(run: Outcome) -> int:
    """Return an arm's place among the looks of its kind."""
    arm = run.config.arm
    if arm.kind is HYBRID:
        return bisect_left(_FULL_LAYERS, len(run.full_layers))
    if arm.kind is MOBA and run.run.arm != MOBA.name:
        return 1 + bisect_left(_BLOCK_SIZES, arm.block_size)
    return 0
