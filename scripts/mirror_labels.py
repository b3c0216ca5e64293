"""Which label a clip has after a horizontal flip: pushing to the left becomes pushing to the right.

    from scripts.mirror_labels import mirror_labels
    mirrored, alone = mirror_labels(["swipe_left", "swipe_right", "clap"])      # [1, 0, 2] and []

train.py asks this before the first step, flips half of the clips by the answer, and prints it.
"""
import re

import numpy as np

SWAP = dict(left="right", l="r", lr="rl", ltr="rtl", ltor="rtol", clockwise="counterclockwise")
SWAP.update({right: left for left, right in SWAP.items()})
WORDS = r"left|(?<!up)(?<!b)(?<!copy)right|(?:counter)?clockwise"       # anywhere in a name
LETTERS = r"\b(?:l(?:to?)?r|r(?:to?)?l)\b|\b[lr](?=(?:to|hs?)?\b)"     # also lh, lhs, l to r
BETWEEN_WORDS = (r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|"       # camel case
                 r"(?<=[a-zA-Z])(?=\d)|(?<=\d)(?=[a-zA-Z])|[\W_]+")


def mirror_labels(classes):
    """The label of each class after a horizontal flip, our reading of 4.2's "random inversion".

    Two classes are a pair if swapping left and right, or clockwise and counterclockwise, turns the
    name of one into the name of the other. "swipe_left", "SwipeLeft", "swipe-L" and "swipeleft"
    all name a side, but not "sign L" among the signs of an alphabet. Returns an integer for each
    class, and the names that have a side but no partner.
    """
    names = [re.sub(BETWEEN_WORDS, " ", name).lower() for name in classes]
    names = [re.sub(r"\b(anti|counter) ?(?=clock)|\b[ac](?=cw\b)", "counter", n) for n in names]
    names = [re.sub(r"\b(counter)?cw\b", r"\1clockwise", name) for name in names]
    names = [re.sub(r"\b(l|r)(?:f?t|g?h?t)\b", r"\1", name) for name in names]           # lft, rgt
    shapes = [re.sub(r"\b[a-z]\b", "?", name) for name in names]        # "sign ?"
    swapped = []
    for name, shape in zip(names, shapes):
        alike = [other for other, its_shape in zip(names, shapes) if its_shape == shape]
        letters = {*re.findall(r"\b[a-z]\b", " ".join(alike))}
        alphabet = len(alike) > 2 and not letters <= {*"lrudfbcm"}      # more than left, up, ...
        sides = WORDS if alphabet else f"{WORDS}|{LETTERS}"
        swapped.append(re.sub(sides, lambda side: SWAP[side[0]], name))
    joined = [name.replace(" ", "") for name in names]
    place = {name: i for i, name in enumerate(joined) if joined.count(name) == 1}
    mirrored = np.array([place.get(name.replace(" ", ""), i) for i, name in enumerate(swapped)])
    alone = [c for i, c in enumerate(classes) if swapped[i] != names[i] and mirrored[i] == i]
    return mirrored, alone
