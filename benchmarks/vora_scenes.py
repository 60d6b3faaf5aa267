"""Scenes of handwritten digits with captions and questions, and a text about numbers: the data of `vora.py`.

Images are the 1,797 digits of scikit-learn (8 x 8, 0 ... 16), enlarged to 16 x 16. A scene has one digit, or two
side by side on a square of 16 x 16, each 8 x 8. The digits are divided into four disjoint parts: for the teacher, for
training, for validation and for the test, so that the teacher cannot pass on labels of the others. Rows of text in the
mix have three of the six kinds of sentences that the language model was pretrained on, so that what is forgotten of
the others can be measured.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARTS = {"teacher": (0, 700), "train": (700, 1300), "valid": (1300, 1450), "test": (1450, 1797)}
MIXED, APART = (0, 1, 3), (2, 4, 5)
"""The kinds of sentences in the mix, and those that it lacks."""
PIXELS = 16
CAPTION = "a picture of the digit"
_OTHERS = "a picture of and plus is odd even larger smaller than the left right digit ? which sum ."
WORDS = ("<pad>", "<end>", *NAMES, *(f"ten{n}" for n in range(9)), *_OTHERS.split(" "))
IDS = {word: number for number, word in enumerate(WORDS)}


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image [1, 16, 16] in 0 ... 1, a prompt that follows it, and the answer."""

    image: Tensor
    prompt: str
    answer: str


def digits(part: str) -> tuple[Tensor, list[int]]:
    """The images [n, 8, 8] in 0 ... 1 and the digits of a part."""
    from sklearn.datasets import load_digits

    found = load_digits()
    first, last = PARTS[part]
    order = random.Random(0).sample(range(len(found.target)), len(found.target))[first:last]
    images = torch.tensor(found.images[order], dtype=torch.float32) / 16
    return images, [int(found.target[number]) for number in order]


def number(value: int) -> str:
    """A number from 0 to 18 in words of the vocabulary."""
    return NAMES[value] if value < 10 else f"ten{value - 10}"


def scenes(part: str, count: int, seed: int) -> list[Scene]:
    """So many scenes from the digits of a part.

    A fourth each asks for the name of one digit, whether it is odd, the name of one of two digits, and what two make.
    """
    images, labels = digits(part)
    draw = random.Random(f"{part} {seed}")
    made = []
    for index in range(count):
        one, two = (draw.randrange(len(labels)) for _ in range(2))
        a, b = labels[one], labels[two]
        if index % 4 < 2:
            image = F.interpolate(images[one][None, None], size=(PIXELS, PIXELS), mode="bilinear")[0]
            asked = ((CAPTION, NAMES[a]), ("the digit is", _parity(a)))[index % 4]
        else:
            image = torch.zeros(1, PIXELS, PIXELS)
            image[0, 4:12, :8], image[0, 4:12, 8:] = images[one], images[two]
            larger = "left" if a > b else "right" if b > a else "even"
            where = (("the left digit is", NAMES[a]), ("the right digit is", NAMES[b]))
            facts = (("which is larger ?", larger), ("the sum is", number(a + b)))
            asked = (where if index % 4 == 2 else facts)[draw.randrange(2)]
        made.append(Scene(image, *asked))
    return made


def _parity(digit: int) -> str:
    return "odd" if digit % 2 else "even"


def texts(count: int, seed: int, kinds: Sequence[int] = (*MIXED, *APART)) -> list[str]:
    """Sentences of these kinds about numbers, with the words of the scenes."""
    draw = random.Random(f"text {seed}")
    made = []
    for _ in range(count):
        a, b = draw.randrange(10), draw.randrange(10)
        sentences = (
            f"{NAMES[a]} plus {NAMES[b]} is {number(a + b)} .",
            f"the digit {NAMES[a]} is {_parity(a)} .",
            f"{NAMES[max(a, b)]} is larger than {NAMES[min(a, b)]} ." if a != b else f"{NAMES[a]} is {NAMES[a]} .",
            f"a picture of the digit {NAMES[a]}",
            f"the left digit is {NAMES[a]} and the right digit is {NAMES[b]} . the sum is {number(a + b)}",
            f"the left digit is {NAMES[a]} . which is larger ? {draw.choice(('left', 'right', 'even'))}",
        )
        made.append(sentences[draw.choice(kinds)])
    return made


def ids(text: str) -> list[int]:
    """The ids of the words of a text."""
    return [IDS[word] for word in text.split()]
