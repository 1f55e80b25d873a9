"""Config: merging, strict types, and one helpful line for every mistake."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tapct.base.exits import UserError
from tapct.config import ConfigError, from_dict, load_config, plugins, setting, to_dict

ROUND = """
    from dataclasses import dataclass
    from tapct.config import setting
    from tapct.types import UserError

    @dataclass(frozen=True)
    class Config:
        radius: float = setting(1.0, "mm", gt=0)
        edge: int = setting(2, "voxels", ge=0)

        def __post_init__(self):
            if self.edge > 10 * self.radius:
                raise UserError(f"edge {self.edge} must be at most 10 x radius {self.radius}")

    def build(config):
        return config
"""
SQUARE = """
    from dataclasses import dataclass
    from tapct.config import setting

    @dataclass(frozen=True)
    class Config:
        side: int = setting(3, "voxels", ge=1)

    def build(config):
        return config
"""


def plug_ins(folder: Path) -> None:
    package = folder / "cfgshapes"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "round.py").write_text(textwrap.dedent(ROUND))
    (package / "square.py").write_text(textwrap.dedent(SQUARE))
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Optim:
    lr: float = setting(5e-4, "at batch 1024", gt=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam", ge=0, lt=1)
    clip: float | None = setting(3.0, "largest gradient norm", gt=0)
    schedule: Literal["cosine", "flat"] = setting("cosine", "shape of the schedule")

    def __post_init__(self) -> None:
        if self.betas[0] > self.betas[1]:
            raise UserError(f"betas {self.betas} must rise")


@dataclass(frozen=True)
class Views:
    num_globals: int = setting(2, "crops", ge=1)
    num_locals: int = setting(8, "crops", ge=0)
    window: tuple[int, int, int] = setting((12, 224, 224), "voxels", ge=1)


@dataclass(frozen=True)
class Root:
    name: str = setting("run", "name")
    store: Path | None = setting(None, "folder")
    flag: bool = setting(False, "a claim")
    kind: str = setting("a", "which", choices=("a", "b"))
    scales: tuple[float, ...] = setting((1.0,), "any number of them")
    optim: Optim = setting(Optim(), "optimizer")
    views: Views = setting(Views(num_locals=6), "crops")
    teacher: Views | None = setting(None, "crops of the teacher, if others")


def shape_root() -> type:
    """A root with plug-ins; made late, for its defaults need them importable."""

    @dataclass(frozen=True)
    class ShapeRoot:
        size: int = setting(1, "of all", ge=0)
        shape: plugins.Plugin = plugins.section("losses", "cfgshapes.round", "one shape")
        shapes: tuple[plugins.Plugin, ...] = plugins.table(
            "losses", ("cfgshapes.round",), "several shapes"
        )

    ShapeRoot.__annotations__ = {
        "size": int,
        "shape": plugins.Plugin,
        "shapes": tuple[plugins.Plugin, ...],
    }
    return ShapeRoot


@pytest.fixture()
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    for name in [name for name in sys.modules if name.startswith("cfgshapes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    plug_ins(tmp_path)
    return shape_root()


@pytest.fixture()
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def message(cls: type, path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_alone_give_the_dataclass_itself() -> None:
    resolved = load_config(Root, None, [])
    assert resolved.value == Root()
    assert set(resolved.sources.values()) == {"default"}


def test_a_chain_of_bases_is_overlaid_from_the_deepest_up(write: Callable[..., Path]) -> None:
    write("optim: {lr: 1, clip: 2}\nviews:\n  num_locals: 1\n", "deep/deepest.yaml")
    write("base: deep/deepest.yaml\noptim:\n  lr: 3.5\n", "middle.yaml")
    top = write("base: middle.yaml\nname: top\n")
    resolved = load_config(Root, top, ["views.window=[1,2,3]", "optim.clip=null"])
    value = resolved.value
    assert (value.name, value.optim.lr, value.optim.clip) == ("top", 3.5, None)
    assert (value.views.num_locals, value.views.window) == (1, (1, 2, 3))
    assert resolved.sources["name"] == "run.yaml:2"
    assert resolved.sources["optim.lr"] == "middle.yaml:3"
    assert resolved.sources["views.num_locals"] == "deep/deepest.yaml:3"
    assert resolved.sources["views.window"] == "override"
    assert resolved.sources["optim.clip"] == "override"
    assert resolved.sources["flag"] == "default"


def test_defaults_of_a_nested_section_are_those_of_the_field_not_of_its_class(
    write: Callable[..., Path],
) -> None:
    assert load_config(Root, write("views: {num_globals: 3}"), []).value.views == Views(
        num_globals=3, num_locals=6
    )


def test_an_optional_section_can_be_switched_on_and_off(write: Callable[..., Path]) -> None:
    on = write("teacher: {num_locals: 0}")
    assert load_config(Root, on, []).value.teacher == Views(num_locals=0)
    assert load_config(Root, on, ["teacher=null"]).value.teacher is None


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr=2e-4", 2e-4),
        ("optim.lr=1E-5", 1e-5),
        ("optim.lr=3", 3.0),
        ("optim.lr=.5", 0.5),
        ("scales=[1, 2e0]", (1.0, 2.0)),
        ("scales=[]", ()),
        ("store=/data/x=y", Path("/data/x=y")),
        ("name='12'", "12"),
        ("name='B30' in kernel", "'B30' in kernel"),
        ('name="it\'s" in "a\\b"', '"it\'s" in "a\\b"'),
        ("flag=true", True),
        ("optim={lr: 7, clip: 1}", Optim(lr=7.0, clip=1.0)),
        ("views.num_locals=1e4", 10_000),
        ("views.num_locals=2.0", 2),
    ],
)
def test_overrides_are_typed_as_yaml(word: str, expected: Any) -> None:
    value = load_config(Root, None, [word]).value
    for part in word.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("text", ["1.5", "1e4.5", "1e-1", "1e30", ".inf", ".nan", "'1e4'", "true"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    line = message(Root, None, f"views.num_locals={text}")
    assert "views.num_locals" in line and "must be a whole number" in line


@pytest.mark.parametrize(
    "text", ["~/store", "$HOME/store", "${HOME}/store", "'${oc.env:HOME}/store'"]
)
def test_paths_are_expanded_in_files_and_overrides(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    wanted = Path("/home/me/store")
    assert load_config(Root, None, [f"store={text}"]).value.store == wanted
    resolved = load_config(Root, write(f"store: {text}\n"), [])
    assert resolved.value.store == wanted
    assert load_config(Root, write(resolved.to_yaml()), []).value == resolved.value


def test_a_path_with_a_dollar_survives_the_config_of_the_run(write: Callable[..., Path]) -> None:
    resolved = load_config(Root, write("store: /data/a$$b\n"), [])
    assert resolved.value.store == Path("/data/a$b")
    assert load_config(Root, write(resolved.to_yaml()), []).value == resolved.value


def test_a_variable_that_is_not_set_is_named_with_its_line(write: Callable[..., Path]) -> None:
    for text in ("$NOT_SET_HERE/a", "${NOT_SET_HERE}/a"):
        line = message(Root, write(f"name: x\nstore: {text}\n"))
        assert line.startswith("run.yaml:2: store = ") and "NOT_SET_HERE" in line


def test_later_overrides_win() -> None:
    assert load_config(Root, None, ["optim.lr=1", "name=x", "optim.lr=2"]).value.optim.lr == 2.0


def test_interpolation_reaches_defaults_and_the_environment(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPCT_TEST_SCRATCH", "/scratch")
    path = write("name: ${views.num_globals}x\nstore: ${oc.env:TAPCT_TEST_SCRATCH}/store\n")
    value = load_config(Root, path, []).value
    assert (value.name, value.store) == ("2x", Path("/scratch/store"))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("name: 3", "must be text; quote it"),
        ("flag: 1", "must be true or false"),
        ("optim:\n  lr: true", "must be a number"),
        ("optim:\n  lr: fast", "must be a number"),
        ("optim:\n  lr: null", "must be a number"),
        ("optim:\n  lr: .nan", "must be finite"),
        ("optim:\n  lr: 0", "must be > 0"),
        ("optim:\n  betas: [0.9, 1.0]", "must be >= 0 and < 1"),
        ("optim:\n  betas: [0.9]", "must be a list of 2, each item a number, not 1"),
        ("optim:\n  betas: 0.9", "must be a list of 2"),
        ("optim:\n  clip: [1]", "must be a number or null"),
        ("optim:\n  schedule: linear", "must be one of cosine, flat"),
        ("views:\n  num_locals: 2.5", "must be a whole number"),
        ("views:\n  num_locals: true", "must be a whole number"),
        ("views:\n  window: [1, 2, 3.5]", "each item a whole number"),
        ("views:\n  window: [1, 0, 3]", "must be >= 1"),
        ("kind: c", "must be one of a, b"),
        ("store: 3", "must be a path"),
        ("views: 3", "must be a section with num_globals"),
        ("views:", "must be a section with num_globals"),
        ("teacher: 3", "must be a section with num_globals"),
    ],
)
def test_a_wrong_value_is_reported_with_line_key_value_and_rule(
    write: Callable[..., Path], text: str, rule: str
) -> None:
    number = len(text.splitlines())
    key = ".".join(line.split(":")[0].strip() for line in text.splitlines())
    value = text.rpartition(": ")[2] if ": " in text else "null"
    line = message(Root, write(text))
    assert line.startswith(f"run.yaml:{number}: {key} = {value}: ")
    assert rule in line


def test_a_wrong_override_is_reported_as_such(write: Callable[..., Path]) -> None:
    line = message(Root, write("optim: {lr: 1}"), "optim.lr=-1")
    assert line == "override: optim.lr = -1: must be > 0"


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("lr=1", "optim.lr"),
        ("optim.lrr=1", "optim.lr"),
        ("optm.lr=1", "optim.lr"),
        ("num_local=1", "views.num_locals"),
        ("view.num_locals=1", "views.num_locals"),
        ("optin.lr=1", "optim.lr"),
        ("views.lr=1", "optim.lr"),
        ("nmae=x", "name"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(word: str, near: str) -> None:
    line = message(Root, None, word)
    assert line.startswith("override: " + word.partition("=")[0] + " = ")
    assert f"unknown key; did you mean {near}?" in line


def test_an_unknown_section_with_several_keys_is_reported_as_a_whole() -> None:
    line = message(Root, None, "optin={lr: 1, clip: 2}")
    assert line == "override: optin = {lr: 1, clip: 2}: unknown key; did you mean optim?"


@pytest.mark.parametrize("word", ["optim={lr: 1, lr: 2}", "optim={1: a, 1: b}"])
def test_a_key_that_is_given_twice_in_an_override_is_one_line(word: str) -> None:
    key = word[7:9].rstrip(":")
    twice = f"{key} is given twice, in line 1; keep one of them"
    assert message(Root, None, word) == f"override: {word}: {twice}"


def test_an_unknown_key_like_nothing_lists_what_there_is(write: Callable[..., Path]) -> None:
    line = message(Root, write("name: x\noptim:\n  zzzzzzzz: 1"))
    assert line.startswith(
        "run.yaml:3: optim.zzzzzzzz = 1: unknown key; known here: optim.lr, optim.betas"
    )


def test_a_rule_between_fields_is_reported_with_section_and_source(
    write: Callable[..., Path],
) -> None:
    path = write("optim:\n  lr: 1\n  betas: [0.9, 0.1]\n")
    assert message(Root, path) == "run.yaml:3: optim: betas (0.9, 0.1) must rise"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\nname: y\n", "run.yaml: name is given twice, in lines 1 and 2; keep one"),
        ("optim: {lr: 1, lr: 2}\n", "run.yaml: optim.lr is given twice, in line 1; keep one"),
        ("labels:\n  1: a\n  1: b\n", "run.yaml: labels.1 is given twice, in lines 2 and 3"),
        ("labels:\n- {1: a, '1': b}\n", "run.yaml: labels.0.1 is given twice, in line 2"),
        ("name: x\noptim: [1\nviews: 2\n", "run.yaml:3: not valid YAML"),
        ("name: x\n\tflag: true\n", "run.yaml:2: not valid YAML"),
        ("- 1\n- 2\n", "run.yaml: must be a mapping of keys to values"),
        ("3\n", "run.yaml: must be a mapping of keys to values"),
        ("name: a\n---\nname: b\n", "run.yaml:2: not valid YAML"),
        ("name: !!python/object:os.system {}\n", "run.yaml:1: not valid YAML"),
        ("name: &a [*a]\n", "run.yaml:1: not valid YAML"),
        ("name: ${nowhere}\n", "run.yaml:1: name = ${nowhere}: nowhere is neither a key"),
        ("name: ${b\n", "run.yaml"),
        ("name: ???\n", "run.yaml:1: name"),
        ("base: other.yaml\n", "run.yaml:1: base = other.yaml: no such config file"),
        (
            "name: x\nbase: [a, b]\n",
            "run.yaml:2: base = ['a', 'b']: must be the path of one YAML file",
        ),
        ("base: run.yaml\n", "run.yaml:1: base = run.yaml: the base chain is a circle"),
    ],
)
def test_a_broken_file_gives_a_one_line_error(
    write: Callable[..., Path], text: str, expected: str
) -> None:
    path = write("")
    path.write_text(text)
    assert message(Root, path).startswith(expected)


def test_a_missing_file_names_what_is_there(write: Callable[..., Path]) -> None:
    write("", "configs/smoke.yaml")
    expected = "configs/smok.yaml: no such config file; did you mean configs/smoke.yaml?"
    assert message(Root, Path("configs/smok.yaml")) == expected
    expected = "configs/ours_for_ct.yaml: no such config file; configs holds smoke.yaml"
    assert message(Root, Path("configs/ours_for_ct.yaml")) == expected


def test_a_folder_and_a_binary_file_are_no_configs(write: Callable[..., Path]) -> None:
    write("", "configs/smoke.yaml")
    assert message(Root, Path("configs")).startswith("configs: ")
    Path("scan.nii.gz").write_bytes(b"\x1f\x8b\x08\x00\xff\xfe")
    assert message(Root, Path("scan.nii.gz")) == (
        "scan.nii.gz is not UTF-8 text; a config is a YAML file, e.g. mine.yaml"
    )


def test_a_circle_of_two_files_is_found(write: Callable[..., Path]) -> None:
    write("base: run.yaml\n", "b.yaml")
    line = message(Root, write("base: b.yaml\n"))
    assert (
        line
        == "b.yaml:1: base = run.yaml: the base chain is a circle: run.yaml -> b.yaml -> run.yaml"
    )


def test_an_empty_file_and_an_empty_section_change_nothing(write: Callable[..., Path]) -> None:
    assert load_config(Root, write(""), []).value == Root()
    assert load_config(Root, write("# only words\nviews: {}\n"), []).value == Root()


@pytest.mark.parametrize("word", ["name", "=3", "name=[1", "name=x: y: z", "name='x"])
def test_a_broken_override_gives_a_one_line_error(word: str) -> None:
    assert message(Root, None, word).startswith("override: ")


def test_yaml_anchors_and_merges_keep_working(write: Callable[..., Path]) -> None:
    path = write("views: &v\n  num_locals: 1\nteacher:\n  <<: *v\n  num_globals: 9\n")
    resolved = load_config(Root, path, [])
    assert resolved.value.teacher == Views(num_globals=9, num_locals=1)
    assert resolved.sources["teacher.num_locals"] == "run.yaml:3"


def test_a_missing_required_value_is_named() -> None:
    @dataclass(frozen=True)
    class Needs:
        path: str

    assert "path is missing: it has no default, set it (text)" in message(Needs, None)
    assert load_config(Needs, None, ["path=x"]).value == Needs("x")


def test_a_section_takes_the_fields_of_its_own_plug_in(
    shapes: type, write: Callable[..., Path]
) -> None:
    path = write("shape: {name: cfgshapes.square, side: 7}")
    value = load_config(shapes, path, []).value
    assert (value.shape.name, value.shape.config.side) == ("cfgshapes.square", 7)
    assert load_config(shapes, None, ["shape.radius=2"]).value.shape.config.radius == 2.0


def test_a_default_plug_in_keeps_the_fields_that_its_owner_gave_it(shapes: type) -> None:
    module = plugins.load("losses", "cfgshapes.round")
    entry = plugins.Plugin("cfgshapes.round", module.Config(radius=5.0))
    start = dataclasses.replace(shapes(), shape=entry, shapes=(entry,))

    @dataclass(frozen=True)
    class Outer:
        inner: Any = setting(start, "shapes")

    Outer.__annotations__ = {"inner": shapes}
    value = load_config(
        Outer, None, ["inner.shape.edge=1", "inner.shapes[cfgshapes.round].edge=2"]
    ).value.inner
    assert (value.shape.config.radius, value.shape.config.edge) == (5.0, 1)
    assert (value.shapes[0].config.radius, value.shapes[0].config.edge) == (5.0, 2)
    other = load_config(Outer, None, ["inner.shape.name=cfgshapes.square"]).value.inner
    assert to_dict(other)["shape"] == {"name": "cfgshapes.square", "side": 3}


def test_a_new_name_drops_the_fields_of_the_old_plug_in(
    shapes: type, write: Callable[..., Path]
) -> None:
    write("shape:\n  name: cfgshapes.round\n  radius: 9\n", "base.yaml")
    path = write("base: base.yaml\nshape:\n  name: cfgshapes.square\n  side: 4\n")
    resolved = load_config(shapes, path, [])
    assert to_dict(resolved.value)["shape"] == {"name": "cfgshapes.square", "side": 4}
    assert resolved.sources["shape.side"] == "run.yaml:4"
    back = load_config(shapes, path, ["shape.edge=5", "shape.name=cfgshapes.round"])
    assert to_dict(back.value)["shape"] == {"name": "cfgshapes.round", "radius": 1.0, "edge": 5}
    assert back.sources["shape.radius"] == "default"
    same = load_config(shapes, Path("base.yaml"), ["shape.name=cfgshapes.round"])
    assert same.value.shape.config.radius == 9.0


def test_a_table_switches_plug_ins_on_and_off_in_order(
    shapes: type, write: Callable[..., Path]
) -> None:
    def names(*overrides: str, text: str = "") -> list[str]:
        value = load_config(shapes, write(text), list(overrides)).value
        return [entry.name.rpartition(".")[2] for entry in value.shapes]

    assert names() == ["round"]
    assert names(text="shapes: {cfgshapes.square: {}}") == ["round", "square"]
    assert names(text="shapes: {cfgshapes.square: {}, cfgshapes.round: {}}") == ["square", "round"]
    assert names("shapes[cfgshapes.square].side=2", "shapes[cfgshapes.round].edge=2") == [
        "round",
        "square",
    ]
    assert names("shapes[cfgshapes.round]=null") == []
    assert names("shapes[cfgshapes.round].edge=3", text="shapes: {cfgshapes.round: null}") == [
        "round"
    ]


def test_mistakes_inside_plug_ins_are_reported_like_others(
    shapes: type, write: Callable[..., Path]
) -> None:
    path = write("shapes:\n  cfgshapes.square:\n    sides: 3\n")
    line = message(shapes, path)
    assert line.startswith(
        "run.yaml:3: shapes[cfgshapes.square].sides = 3: unknown key; did you mean"
    )
    assert "shapes[cfgshapes.square].side?" in line
    line = message(shapes, write("shape:\n  radius: 0.1\n  edge: 4\n"))
    assert line == "run.yaml:2, run.yaml:3: shape: edge 4 must be at most 10 x radius 0.1"
    assert message(shapes, None, "shape.edge=-1") == "override: shape.edge = -1: must be >= 0"
    assert "no module 'cfgshapes.oval'" in message(shapes, None, "shapes[cfgshapes.oval]=null")
    assert message(shapes, None, "shape.name=ovel").startswith(
        "override: shape.name: no plug-in 'ovel' in losses"
    )
    assert "must be the name of a plug-in" in message(shapes, None, "shape.name=3")
    assert "must be a section with a name" in message(shapes, None, "shape=3")
    assert "must be a section with a name" in message(shapes, None, "shape=null")
    assert "must map plug-in names" in message(shapes, None, "shapes=[a]")
    assert "must map plug-in names" in message(shapes, None, "shapes=null")
    assert "{}, or null for off" in message(shapes, None, "shapes[cfgshapes.round]=3")


def test_a_resolved_config_reads_back_to_the_same_value(
    shapes: type, write: Callable[..., Path]
) -> None:
    overrides = [
        "shapes[cfgshapes.round]=null",
        "shapes[cfgshapes.square].side=9",
        "shape.radius=0.1",
        "shape.edge=1",
    ]
    first = load_config(shapes, None, overrides)
    assert from_dict(shapes, first.to_dict(), "run/config.yaml") == first.value
    assert load_config(shapes, write(first.to_yaml()), []).value == first.value
    assert to_dict(first.value)["shapes"]["cfgshapes.round"] is None


numbers = st.floats(min_value=1e-300, max_value=1e300)
words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="$"), max_size=12)
roots = st.builds(
    Root,
    name=words
    | st.sampled_from(["2e-4", "12", "null", "true", "0x1", "1:30", "~", "", "a: b", "# x"]),
    store=st.none() | st.sampled_from([Path("/a b/ü"), Path("12")]),
    flag=st.booleans(),
    scales=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    optim=st.builds(Optim, lr=numbers, clip=st.none() | numbers),
    teacher=st.none() | st.builds(Views, num_locals=st.integers(0, 10**12)),
)


@given(roots)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_value_survives_yaml_and_back(write: Callable[..., Path], value: Root) -> None:
    text = dataclasses.replace(load_config(Root, None, []), value=value).to_yaml()
    assert load_config(Root, write(text), []).value == value
    assert from_dict(Root, yaml.safe_load(text), "config.yaml") == value


def test_a_bad_stored_config_names_its_file() -> None:
    with pytest.raises(ConfigError, match=r"^export/config.json: optim.lr = -1: must be > 0$"):
        from_dict(Root, {"optim": {"lr": -1}}, "export/config.json")
    with pytest.raises(
        ConfigError, match=r"^export/config.json: optim.rl = 1: unknown key; did you mean optim.lr"
    ):
        from_dict(Root, {"optim": {"rl": 1}}, "export/config.json")


def test_pretty_lines_up_keys_values_and_sources(write: Callable[..., Path]) -> None:
    text = load_config(
        Root, write("name: x\noptim:\n  lr: 1e-3\n"), ["flag=true", "scales=[2]"]
    ).pretty()
    lines = text.splitlines()
    assert len({line.index("  # ") for line in lines if len(line.partition("  # ")[0]) <= 60}) >= 1
    table = {line.partition(":")[0]: line.partition(": ")[2].split("  # ") for line in lines}
    assert [part.strip() for part in table["optim.lr"]] == ["0.001", "run.yaml:3"]
    assert [part.strip() for part in table["flag"]] == ["true", "override"]
    assert [part.strip() for part in table["scales"]] == ["[2.0]", "override"]
    assert [part.strip() for part in table["store"]] == ["null", "default"]
    assert len({line.index("# ") for line in lines}) == 1


def test_each_line_of_pretty_is_an_override_that_gives_the_value_back() -> None:
    words = ["optim.lr=1e-5", "name='1e3'", "optim.clip=null", "views.window=[1,2,3]", "store=/a b"]
    resolved = load_config(Root, None, words)
    rows = [line.rpartition("  # ")[0].rstrip() for line in resolved.pretty().splitlines()]
    back = [row.replace(": ", "=", 1) for row in rows]
    assert load_config(Root, None, back).value == resolved.value


@pytest.mark.parametrize(
    ("below", "above", "line"),
    [
        ("optim: {lr: 1}", "optim: []", "run.yaml:2: optim = []: must be a section with lr, betas"),
        ("optim: []", "optim: {lr: 1}", ""),
        ("scales: [1, 2]", "scales: {lr: 1}", "run.yaml:2: scales = {lr: 1}: must be a list"),
        ("scales: {lr: 1}", "scales: [1, 2]", ""),
    ],
)
def test_a_list_over_a_section_is_an_error_with_its_line(
    write: Callable[..., Path], below: str, above: str, line: str
) -> None:
    path = write(f"base: below.yaml\n{above}\n")
    write(f"{below}\n", "below.yaml")
    if line:
        assert message(Root, path).startswith(line)
    else:  # what is wrong below is replaced
        load_config(Root, path, [])


def test_a_list_for_the_fields_of_a_plug_in_is_an_error_with_its_line(
    write: Callable[..., Path], shapes: type
) -> None:
    write("shapes: {cfgshapes.round: {radius: 2.0}}\n", "below.yaml")
    path = write("base: below.yaml\nshapes: {cfgshapes.round: [1]}\n")
    expected = "run.yaml:2: shapes[cfgshapes.round] = [1]: must be a section with its fields"
    assert message(shapes, path).startswith(expected)
