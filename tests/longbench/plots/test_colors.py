"""Colors and line styles are distinct, also for color-blind readers and in grayscale."""

import itertools
from pathlib import Path

import numpy
import pytest

from sparsecache.longbench.html import parts
from sparsecache.longbench.plots._figure import REFERENCE, SERIES, line_style

# Severity 1 of Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency" (2009), on linear RGB.
VISION = {
    "usual": numpy.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
JUST_NOTICEABLE = 2.3  # distance in CIELAB


def linear(color: str) -> numpy.ndarray:
    values = numpy.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return numpy.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: numpy.ndarray) -> numpy.ndarray:
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ratio = numpy.array(xyz) @ numpy.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = numpy.where(ratio > 0.008856, numpy.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def luminance(color: str) -> float:
    return float(numpy.array([0.2126, 0.7152, 0.0722]) @ linear(color))


@pytest.fixture(scope="module")
def css() -> str:
    return (Path(parts.__file__).parent / "report.css").read_text(encoding="utf-8")


@pytest.fixture(params=["paper", "dark"])
def run_colors(request: pytest.FixtureRequest, css: str) -> tuple[list[str], str]:
    """Return the colors of runs and the color of the page."""
    written = [REFERENCE, *SERIES]
    if request.param == "paper":
        return written, "#ffffff"
    dark = css[css.index("prefers-color-scheme: dark") :]
    return [dark.partition(f"--c-{color[1:]}: ")[2][:7] for color in written], dark.partition("--page: ")[2][:7]


@pytest.mark.parametrize("vision", VISION)
def test_colors_are_distinct_for_color_blind_readers(run_colors: tuple[list[str], str], vision: str) -> None:
    seen = [lab(numpy.array(VISION[vision]) @ linear(color)) for color in run_colors[0]]
    assert min(numpy.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 4 * JUST_NOTICEABLE


def test_colors_have_contrast_with_the_page(run_colors: tuple[list[str], str]) -> None:
    page = luminance(run_colors[1])
    for color in run_colors[0]:
        low, high = sorted([page, luminance(color)])
        assert (high + 0.05) / (low + 0.05) >= 3, color


def test_twelve_line_styles_are_distinct_in_grayscale() -> None:
    looks = [line_style(number) for number in range(12)]
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == 12
