"""The demo's figures: intervals against scipy, attributes and retrieval on media with a known answer."""

import numpy as np
import pytest
import scipy
from demo_tools import load_tool

load_tool("demo_samples")
figures = load_tool("demo_figures")


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 10), (48, 48), (1, 200)])
def test_intervals_are_wilsons(right, n):
    found = figures.share([True] * right + [False] * (n - right))
    theirs = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert found["interval"] == pytest.approx([theirs.low, theirs.high], abs=1e-6)
    assert (found["n"], found["right"], found["share"]) == (n, right, right / n)
    assert figures.share([])["share"] is None


def test_attributes_of_every_form_of_caption():
    assert figures.attributes("medium-dark skin, woman, firefighter") == {
        "skin": "medium-dark skin",
        "gender": "woman",
        "subject": "firefighter",
    }
    assert figures.attributes("red, round table") == {"colour": "red", "subject": "round table"}
    turning = figures.attributes("turning left, blue, sofa")
    assert turning == {"direction": "turning left", "colour": "blue", "subject": "sofa"}
    assert figures.attributes("three one four") == {"word 1": "three", "word 2": "one", "word 3": "four"}


def test_an_attribute_is_right_where_both_captions_say_the_same():
    real = ["cook, man, dark skin", "cook, woman, dark skin", "ok hand, light skin", "judge, man, light skin"]
    read = ["cook, man, light skin", "judge, woman, dark skin", "ok hand, light skin", "nonsense"]
    found = figures.of_attributes(real, read)
    assert {name: (value["right"], value["n"]) for name, value in found.items()} == {
        "subject": (2, 4),
        "gender": (2, 3),
        "skin": (2, 4),
    }


class Pictures:
    name = "image"


def test_retrieval_counts_the_real_media_that_are_nearer_than_the_right_one():
    real = [np.full((2, 2, 3), 10 * i, dtype=np.uint8) for i in range(20)]
    made = [*real[:10], *(real[(i + 3) % 20] for i in range(10, 19)), None]
    found = figures.retrieval(Pictures(), made, real)
    # Shifted by three, at most six are nearer: fewer at the end of the row, many where it wraps around.
    assert found["r1"]["right"] == 10 and found["r1"]["n"] == 20
    nearer = [sum(abs(j - (i + 3) % 20) < abs(i - (i + 3) % 20) for j in range(20)) for i in range(10, 19)]
    assert found["r5"]["right"] == 10 + sum(count < 5 for count in nearer)
    assert (found["chance_r1"], found["chance_r5"]) == (0.05, 0.25)
