"""A nested config as dotted keys and as text."""

from __future__ import annotations

from pathlib import Path

from tapct.config.flat import flatten, flatten_to_text

TREE = {
    "out": Path("runs/a"),
    "model": {"name": "vit", "window": (4, 8, 8)},
    "losses": {"dino": {"weight": 1.0, "head": {"hidden": 2048}}, "gram": {}},
    "stages": [{"from": 3}, 2],
    "seed": None,
}


def test_leaves_have_dotted_names_in_the_order_of_the_config() -> None:
    assert list(flatten(TREE).items()) == [
        ("out", "runs/a"),
        ("model.name", "vit"),
        ("model.window", [4, 8, 8]),
        ("losses.dino.weight", 1.0),
        ("losses.dino.head.hidden", 2048),
        ("losses.gram", {}),
        ("stages", [{"from": 3}, 2]),
        ("seed", None),
    ]


def test_a_tuple_and_a_list_of_the_same_values_are_equal() -> None:
    assert flatten({"a": {"b": (1, 2)}}) == flatten({"a": {"b": [1, 2]}})


def test_text_of_leaves() -> None:
    assert flatten_to_text(TREE) == {
        "out": "runs/a",
        "model.name": "vit",
        "model.window": "4 8 8",
        "losses.dino.weight": "1.0",
        "losses.dino.head.hidden": "2048",
        "losses.gram": "{}",
        "stages": '{"from": 3} 2',
        "seed": "null",
    }
