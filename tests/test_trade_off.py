"""The figure of loss against distance to the data."""

import math

import PIL.Image
import pytest
from matplotlib.figure import Figure

from reg_diffusers.evaluation.trade_off import draw_evaluation
from reg_diffusers.runs.measurement import Measurement

pytestmark = pytest.mark.training


def rows(*names):
    def row(value):
        return Measurement(4, dict.fromkeys(names, value), dict.fromkeys(names, 0.01), value / 2)

    return {"data": row(0.1), "without": row(0.3), "with " + " + ".join(names): row(0.2)}


@pytest.mark.parametrize("names", [("total_variation",), ("a", "b", "c", "a_very_long_name_of_a_loss_of_ones_own")])
def test_each_loss_has_a_panel_and_each_point_its_name_beside_it(names, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    draw_evaluation(tmp_path / "evaluation.png", rows(*names))
    (figure,) = figures
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in panels] == list(names)
    renderer = figure.canvas.get_renderer()
    for axes in panels:
        assert "distance to the data" in axes.get_xlabel() and "± standard error" in axes.get_ylabel()
        assert [text.get_text().split()[0] for text in axes.texts] == ["data", "without", "with"]
        markers = [line for line in axes.lines if line.get_marker() in list("osD")]
        assert [tuple(line.get_xydata()[0]) for line in markers] == [(0.05, 0.1), (0.15, 0.3), (0.1, 0.2)]
        assert len({line.get_marker() for line in markers}) == 3  # told apart without colours
        boxes = [text.get_bbox_patch().get_window_extent(renderer) for text in axes.texts]
        assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)
        frame = axes.get_window_extent(renderer).padded(3)
        assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
        points = axes.transData.transform([line.get_xydata()[0] for line in markers])
        assert not any(box.contains(*point) for box in boxes for point in points)


def test_it_is_drawn_of_a_single_image_and_of_equal_values_too(tmp_path):
    same = Measurement(1, {"a": 0.0}, {"a": math.nan}, 0.0)
    draw_evaluation(tmp_path / "evaluation.png", {"data": same, "with a": same})
    assert PIL.Image.open(tmp_path / "evaluation.png").size[0] > 400


def test_what_is_not_finite_is_named_and_ends_no_run(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: titles.extend(a.get_title() for a in figure.axes))
    for value, distance in ((math.inf, 0.1), (0.2, math.nan)):
        broken = Measurement(4, {"a": value}, {"a": math.nan}, distance)
        draw_evaluation(tmp_path / "evaluation.png", {**rows("a"), "without": broken})
        draw_evaluation(tmp_path / "evaluation.png", {"data": broken})
    assert titles == ["a\nwithout: not finite", "a\ndata: not finite"] * 2
