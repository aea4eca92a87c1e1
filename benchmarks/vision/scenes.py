"""Small images that say something: shapes in colours, numbers, bar charts, each with a question and its answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 180), "yellow": (240, 200, 20),
    "black": (0, 0, 0), "orange": (255, 127, 14), "pink": (240, 130, 190), "white": (255, 255, 255),
}  # fmt: skip
BACKGROUNDS = ("white", "black", "yellow", "blue")
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = ("no", "one", "two", "three", "four")
SIDES = (64, 80, 96)  # pixels; a token of the model is 16 x 16 of them
SEGMENTS = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")  # of the digits
Size = tuple[int, int]
PLACES = {"a": (0, 0, 1, 0), "b": (1, 0, 1, 1), "c": (1, 1, 1, 2), "d": (0, 2, 1, 2), "e": (0, 1, 0, 2),
          "f": (0, 0, 0, 1), "g": (0, 1, 1, 1)}  # fmt: skip


def scene(chance: random.Random) -> tuple[Image.Image, str, str]:
    """An image, a question and an answer that nobody knows without the image."""
    size = chance.choice(SIDES), chance.choice(SIDES)
    paper = chance.choice(BACKGROUNDS)
    image = Image.new("RGB", size, COLOURS[paper])
    inks = [name for name in COLOURS if name != paper]
    question, answer = chance.choice((_shapes, _number, _bars))(ImageDraw.Draw(image), size, inks, chance)
    return image, question, f"{answer} The background is {paper}."


def _shapes(draw: ImageDraw.ImageDraw, size: Size, inks: list[str], chance: random.Random) -> tuple[str, str]:
    kind, ink, count = chance.choice(SHAPES), chance.choice(inks), chance.randint(1, 4)
    cells = [(x, y) for x in range(2) for y in range(2)]
    for x, y in chance.sample(cells, count):
        left, top = x * size[0] // 2 + chance.randint(2, 6), y * size[1] // 2 + chance.randint(2, 6)
        right, bottom = left + size[0] // 2 - 9, top + size[1] // 2 - 9
        if kind == "circle":
            draw.ellipse((left, top, right, bottom), fill=COLOURS[ink])
        elif kind == "square":
            draw.rectangle((left, top, right, bottom), fill=COLOURS[ink])
        elif kind == "triangle":
            draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=COLOURS[ink])
        else:
            draw.line((left, top, right, bottom), fill=COLOURS[ink], width=5)
            draw.line((left, bottom, right, top), fill=COLOURS[ink], width=5)
    verb, plural = ("is", "") if count == 1 else ("are", "s")
    return "What shapes are there?", f"There {verb} {COUNTS[count]} {ink} {kind}{plural}."


def _number(draw: ImageDraw.ImageDraw, size: Size, inks: list[str], chance: random.Random) -> tuple[str, str]:
    ink, digits = chance.choice(inks), f"{chance.randint(10, 99)}"
    width, height = size[0] / 2 - 20, (size[1] - 20) / 2
    for place, digit in enumerate(digits):
        left = 10 + place * size[0] / 2
        for segment in SEGMENTS[int(digit)]:
            x0, y0, x1, y1 = PLACES[segment]
            line = (left + x0 * width, 10 + y0 * height, left + x1 * width, 10 + y1 * height)
            draw.line(line, fill=COLOURS[ink], width=6)
    return "What number is it?", f"The number is {digits[0]} {digits[1]} in {ink}."


def _bars(draw: ImageDraw.ImageDraw, size: Size, inks: list[str], chance: random.Random) -> tuple[str, str]:
    bars = chance.sample(inks, 3)
    heights = chance.sample(range(2, 8), 3)
    for place, (ink, height) in enumerate(zip(bars, heights, strict=True)):
        left = 6 + place * (size[0] - 8) // 3
        draw.rectangle((left, size[1] * (8 - height) // 8, left + size[0] // 4, size[1] - 1), fill=COLOURS[ink])
    highest = bars[heights.index(max(heights))]
    return "Which bar is the highest?", f"The bars are {bars[0]}, {bars[1]} and {bars[2]}. The highest is {highest}."


def conversation(question: str, answer: str) -> list[dict[str, object]]:
    """In the form that chat templates of vision models take."""
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def scenes(count: int, seed: int) -> Iterator[tuple[Image.Image, str, str]]:
    chance = random.Random(seed)
    for _ in range(count):
        yield scene(chance)


def write(folder: Path, count: int, seed: int) -> Path:
    """`count` scenes as PNG files, and samples.jsonl beside them, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "samples.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number, (image, question, answer) in enumerate(scenes(count, seed)):
            name = f"{number:04}.png"
            image.save(folder / name, optimize=True)
            lines.write(json.dumps({"image": name, "messages": conversation(question, answer)}) + "\n")
    return path
