"""The overlay: dropped cells dark, kept ones bright, drawn where the tokens were."""

import numpy as np
import pytest
from fakes import Engine, Processor, manifest
from PIL import Image

from foveate.runtime.errors import RunError
from foveate.runtime.overlay import DARK, panel
from foveate.runtime.session import Session


def test_cells_are_where_the_tokens_were():
    base = Image.new("RGB", (90, 60), (200, 200, 200))
    out = np.asarray(panel(base, np.array([0, 5]), 6, (2, 3)))
    centre = out[15::30, 15::30, 0]  # the centre of every cell of 2 x 3
    dark = round(200 * DARK)
    assert centre.tolist() == [[200, dark, dark], [dark, dark, 200]]


def test_without_a_grid_tokens_are_a_strip():
    base = Image.new("RGB", (100, 60), (200, 200, 200))
    out = np.asarray(panel(base, np.array([0]), 5, None))
    assert out[10, 50].tolist() == [200, 200, 200], "the picture itself is left alone"
    assert out[-2, 5].tolist() != out[-2, 60].tolist()


def test_a_png_of_all_pictures_and_sites(tmp_path):
    session = Session(Engine(keep=4, kept=True), Processor(), manifest(features_per_image=4))
    pictures = [Image.new("RGB", (40, 30), (9, 9, 9)), Image.new("RGB", (30, 40), (9, 9, 9))]
    result = session.generate(pictures, "<image> <image> what ?", max_new_tokens=1)
    path = result.overlay(tmp_path / "kept.png")
    sheet = Image.open(path)
    assert sheet.format == "PNG" and sheet.width > 3 * 250 and sheet.height > 2 * 250
    assert [p.name for p in tmp_path.iterdir()] == ["kept.png"], "no partial file stays"


def test_where_it_cannot_be_written(tmp_path):
    session = Session(Engine(), Processor(), manifest())
    result = session.generate(Image.new("RGB", (4, 4)), "<image> what ?", max_new_tokens=1)
    with pytest.raises(RunError, match="cannot write"):
        result.overlay(tmp_path / "no" / "such" / "folder.png")
    with pytest.raises(RunError, match="no sample 3; this result has 1"):
        result.overlay(tmp_path / "x.png", sample=3)
