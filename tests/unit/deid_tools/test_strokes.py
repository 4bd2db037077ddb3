from __future__ import annotations

import numpy as np
import pytest

from deid_tools.pixels import TextSearch
from deid_tools.strokes import drawn_rows, letter_rows, words_on_dark

SIDE = 200


def letters(text: str, height: int, *, soft: bool = False) -> np.ndarray:
    """Return how much of each pixel [Y, X] the letters fill."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=height)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    pen = ImageDraw.Draw(picture)
    pen.fontmode = "L" if soft else "1"
    pen.text((2 - left, 2 - top), text, fill=255, font=font)
    return np.asarray(picture) / 255.0


def slices(count: int, seed: int = 0) -> np.ndarray:
    """Return slices [slice, Y, X] of a blurred, noisy disc whose middle moves."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    discs = [np.where(np.hypot(y - n, x) < 70, 200.0, 0.0) + 80 * (np.hypot(y + 20, x - n) < 25) for n in range(count)]
    return np.stack([np.rint(ndimage.gaussian_filter(d, 1.5) + rng.normal(30, 8, d.shape)) for d in discs]).astype(
        np.int16
    )


def draw(frame: np.ndarray, ink: np.ndarray, value: float, top: int = 90, left: int = 60) -> np.ndarray:
    """Draw letters into a frame, and return where they are."""
    part = frame[top : top + ink.shape[0], left : left + ink.shape[1]]
    part[:] = np.rint(part * (1 - ink) + value * ink)
    mask = np.zeros(frame.shape, bool)
    mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink > 0.5
    return mask


def covered(boxes, mask: np.ndarray) -> float:
    area = np.zeros(mask.shape, bool)
    for top, left, bottom, right in boxes:
        area[top:bottom, left:right] = True
    return float((area & mask).sum() / mask.sum())


@pytest.mark.parametrize("height", [10, 14, 20, 28])
@pytest.mark.parametrize("value", [150, 700])
def test_letters_of_one_value_over_anatomy_are_found_on_one_frame(height, value):
    frame = slices(1)[0]
    mask = draw(frame, letters("DOE 4711", height), value)
    assert covered(drawn_rows(frame), mask) >= 0.9


def test_soft_letters_on_one_of_many_frames_are_found():
    stack = slices(12)
    mask = draw(stack[5], letters("MILLER 17", 14, soft=True), 900)
    search = TextSearch()
    for frame in stack:
        search.add(frame[None])
    assert covered(search.sizes[(SIDE, SIDE)].lone(), mask) >= 0.9


def test_dark_letters_on_a_bright_field_are_found():
    frame = slices(1)[0]
    frame[88:112, 50:160] = 900
    mask = draw(frame, letters("SMITH 12", 14, soft=True), 0)
    assert covered(drawn_rows(frame), mask) >= 0.9


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_anatomy_are_no_letters(seed):
    search = TextSearch()
    for frame in slices(10, seed):
        search.add(frame[None])
    assert {k: v for k, v in search.kinds().items() if k != "words"} == {}


def test_clipped_metal_and_blocks_without_noise_are_no_letters():
    y, x = np.mgrid[:SIDE, :SIDE]
    metal = slices(8)
    metal[:, np.hypot(y - 100, x - 90) < 6] = 3071
    metal[:, np.hypot(y - 110, x - 130) < 9] = 3071
    streak = (np.abs(y - 100) < 2) & (x % 17 < 9) & (x > 40) & (x < 160)
    metal[3][streak] = 3071
    blocks = np.zeros((8, SIDE, SIDE), np.int16)
    for n, (top, left, side) in enumerate([(20, 20, 40), (20, 120, 50), (120, 30, 60), (130, 130, 30)]):
        blocks[:, top : top + side, left : left + side] = 100 * (n + 1)
    ball = np.stack([np.where(np.hypot(np.hypot(y - 100, x - 100), 12 * (n - 4)) < 60, 500, 0) for n in range(8)])
    for stack in (metal, blocks, ball.astype(np.int16), np.minimum(ball, 255).astype(np.uint8)):
        search = TextSearch()
        for frame in stack:
            search.add(frame[None])
        assert {k: v for k, v in search.kinds().items() if k != "words"} == {}


def test_order_and_stretches_do_not_matter():
    stack = slices(9)
    draw(stack[4], letters("DOE", 14), 800)
    one, two, three = TextSearch(), TextSearch(), TextSearch()
    one.add(stack)
    two.add(stack[5:])
    three.add(stack[:5])
    two.merge(three)
    first, second = one.sizes[(SIDE, SIDE)], two.sizes[(SIDE, SIDE)]
    ordered = np.sort(stack, axis=0)
    for name, naive in (("darkest", 0), ("darker", 1), ("brighter", -2), ("brightest", -1)):
        np.testing.assert_array_equal(getattr(first, name), ordered[naive])
        np.testing.assert_array_equal(getattr(second, name), ordered[naive])
    assert first.drawn == second.drawn


def test_a_row_needs_marks_of_one_height_on_one_line():
    mask = np.zeros((100, 100), bool)
    for left, top, high in ((10, 20, 10), (18, 20, 10), (26, 20, 10)):
        mask[top : top + high, left : left + 2] = True
    assert letter_rows(mask) == [(20, 10, 30, 28)]
    mask[:] = False
    for left, top, high in ((10, 20, 10), (18, 40, 10), (26, 10, 30)):
        mask[top : top + high, left : left + 2] = True
    assert letter_rows(mask) == []


@pytest.mark.parametrize("word", ["12.03.1961", "DOE JOHN", "St. Mary Hospital"])
@pytest.mark.parametrize("height", [8, 10, 16])
def test_words_too_small_or_close_to_be_told_apart_are_found_in_the_margin_of_one_slice(word, height):
    frames = slices(6)
    mask = draw(frames[3], letters(word, height, soft=True), 5000, top=6, left=12)
    search = TextSearch()
    for frame in frames:
        search.add(frame[None])
    assert covered(search.kinds()["dark"][frames[0].shape], mask) >= 0.9


def test_what_stands_in_the_margin_and_is_no_word_is_left_alone():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    picture = rng.normal(30, 8, (SIDE, SIDE))
    picture[20:23, 10:180] = 900  # the edge of a table
    picture[60:110, 60:140] = 500  # a body
    picture[170:180, 20:60] = ndimage.gaussian_filter(rng.normal(300, 200, (10, 40)), 1.5)  # a blurred pattern
    picture[150:190, 100:190] += rng.normal(0, 300, (40, 90))  # noise
    assert words_on_dark(picture, 0.0, 100.0) == []
    ink = letters("DOE 4711", 12)
    picture[4 : 4 + ink.shape[0], 10 : 10 + ink.shape[1]] += 900 * ink
    assert len(words_on_dark(picture, 0.0, 100.0)) in (1, 2)
