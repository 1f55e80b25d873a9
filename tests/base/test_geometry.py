from __future__ import annotations

import pytest

from tapct.base.exits import UserError
from tapct.base.geometry import patch_grid


def test_the_grid_times_the_patch_is_the_window() -> None:
    for grid in ((1, 1, 1), (3, 28, 28), (2, 1, 7)):
        for patch in ((1, 1, 1), (4, 8, 8), (6, 16, 16)):
            window = [cells * side for cells, side in zip(grid, patch, strict=True)]
            assert patch_grid(window, patch, "window") == grid


@pytest.mark.parametrize(
    ("window", "axis"),
    [((5, 16, 16), "z"), ((4, 17, 16), "y"), ((4, 16, 0), "x"), ((4, 16, 4), "x")],
)
def test_a_window_that_is_no_multiple_is_one_line_with_setting_sizes_axis_and_next_step(
    window: tuple[int, int, int], axis: str
) -> None:
    with pytest.raises(UserError) as caught:
        patch_grid(window, (4, 8, 8), "views.global_window")
    size = "x".join(map(str, window))
    start = f"views.global_window {size} is no multiple of the patch 4x8x8 along {axis}; change"
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
