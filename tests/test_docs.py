"""What the pages state is true: tables are current, examples run, commands parse, links lead
somewhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from forked import python_from_nest as python_from_nest  # a fixture
from memory_store import MemoryStore
from plain_words import findings, prose
from scan_files import make_ct, write_nifti
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import evaluation_of, make_store, write_config

from tapct.cli.app import DIVIDED, app
from tapct.cluster import site
from tapct.config import load_config, plugins
from tapct.config.plugins import Plugin
from tapct.data.datasets.dataset import read_dataset
from tapct.data.scans.ingest import read_volume
from tapct.engine import loop, optim
from tapct.eval import runner
from tapct.eval.features.extraction import dense_features
from tapct.eval.features.preprocess import Preprocess
from tapct.eval.models.baselines import DEFAULTS, NamedModel, RawPatches, with_baselines
from tapct.eval.results import json_file
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.models import vit
from tapct.nn import heads
from tapct.nn.contracts import Backbone
from tapct.plan import command, scale
from tapct.run import resume
from tapct.run.config import RunConfig
from tapct.ssl import health
from tapct.ssl.inputs import Inputs
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Batch, HUContract, LabelMap, Masks, Tokens, TokenSets, Volume
from tapct.views import boxes, masks, recipe
from tapct.views.key import ViewKey
from tapct.weights import export, pretrained
from tapct.weights.card import FeatureSettings

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
TOP_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_COMMANDS = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "concepts.md",
    "extending.md",
    "faq.md",
    "ingest.md",
    "log.md",
    "result_changes.md",
    "results.md",
)
GRID, PATCH = (2, 2, 2), (2, 4, 4)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(page: Path) -> list[str]:
    """The lines of indented code that call tapct; lines that end with a backslash are joined."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return re.findall(r"^    (tapct .*)$", text, re.MULTILINE)


def table_keys(page: Path, heading: str) -> set[str]:
    """What stands in backticks in the first column of the table below a heading."""
    text = page.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    text = re.split(r"\n##+ ", text, maxsplit=1)[0]
    cells = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


# --- pages and links ---


def plugin_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Key and metadata of every field of a config that names plug-ins."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "plugin_kind" in field.metadata:
            yield prefix + field.name, field.metadata
        elif dataclasses.is_dataclass(value):
            yield from plugin_fields(value, f"{prefix}{field.name}.")


def with_every_plugin(config: RunConfig) -> Iterator[list[str]]:
    """Overrides with which every plug-in of tapct, also one that is off by default, is used once.

    Plug-ins of a table can be used together, those of a section one at a time.
    """
    together: list[str] = []
    for key, metadata in plugin_fields(config):
        others = set(plugins.available(metadata["plugin_folder"]))
        if metadata["plugin_kind"] == "table":
            together += [f"{key}.{name}={{}}" for name in others - set(metadata["plugin_default"])]
        else:
            yield from ([f"{key}.name={name}"] for name in others - {metadata["plugin_default"]})
    yield together


def test_the_table_of_all_config_keys_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location(
        "make_config_docs", ROOT / "scripts" / "make_config_docs.py"
    )
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_config_docs", maker)
    spec.loader.exec_module(maker)
    page = maker.PAGE.read_text(encoding="utf-8")
    assert page == maker.current(page), "run python scripts/make_config_docs.py"
    keys = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    # found by another way: the leaves of resolved configs, with every plug-in of tapct
    resolved: set[str] = set()
    for overrides in with_every_plugin(RunConfig()):
        resolved |= set(load_config(RunConfig, None, overrides).sources)
    assert "losses.gram.start" in resolved  # a loss that is off by default
    assert keys == resolved


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        link = next(filter(None, target))
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
                for heading in headings
            }
            assert anchor in anchors, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_tree_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"\b((?:tapct|configs|scripts|tests|docs)/[\w/]+\.\w+)", page.read_text(encoding="utf-8")
    )
    made_up = ("mine", "NAME", "site.yaml")  # in names of files that a reader is to write
    missing = [name for name in named if not (ROOT / name).exists()]
    assert [name for name in missing if not any(word in name for word in made_up)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses_and_every_override_is_a_key(page: Path) -> None:
    known: Any = typer.main.get_command(app)
    lines = commands(page)
    assert lines or page.name in WITHOUT_COMMANDS or page.parent.name == "api"
    for line in lines:
        _, *words = shlex.split(line, comments=True)
        if words[0] == "submit" and words[1] in DIVIDED:
            words[0] = "submit-array"
        context = known.commands[words[0]].make_context(words[0], words[1:])
        overrides = context.params.get("overrides") or []
        if "mylab" not in line:
            config = str(context.params.get("config") or SMOKE)
            files = [ROOT / config, ROOT / "configs" / f"{config}.yaml", SMOKE]
            load_config(RunConfig, next(file for file in files if file.is_file()), overrides)


@pytest.mark.parametrize(
    "name",
    [
        *(f"tap_{size}_{kind}" for kind in ("2d", "2p5d", "3d") for size in "sb"),
        "tap_l_3d",
        "tap_s_3d_small_batch",
    ],
)
def test_the_header_of_a_published_config_states_the_flops_of_its_plan(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(RunConfig, path, []).value
    stated = re.search(
        r"([\d.]+) PFLOP a step, ([\d.]+) EFLOP.*?about ([\d.]+) GPU-days",
        path.read_text(),
        re.DOTALL,
    )
    assert stated is not None
    step = command.costs_of(config).flops_per_step
    facts = (
        step / 1e15,
        step * config.train.steps / 1e18,
        step * config.train.steps / 200e12 / 86400,
    )
    assert [float(number) for number in stated.groups()] == pytest.approx(facts, rel=0.03)


@pytest.mark.slow  # 20 s, to compile the blocks
def test_the_header_for_small_batches_states_the_memory_of_its_plan() -> None:
    path = ROOT / "configs" / "tap_s_3d_small_batch.yaml"
    config = load_config(RunConfig, path, []).value
    (memory,) = command.estimate_of(
        config, command.costs_of(config), scale.Request(gpus=(1,), memory=24e9)
    ).as_set
    stated = re.search(r"\((\d+) GB as counted by tapct plan --memory", path.read_text())
    assert stated and abs(float(stated[1]) - memory.total / 1e9) < 0.6


def test_the_verdicts_of_the_training_page_are_those_of_the_report() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z ]+) \| (\S.*?) \| (\S.*?) \|", text, re.MULTILINE)
    table = {
        state: (information, gain) for state, information, gain in rows if state in health.STATES
    }
    assert set(table) == set(health.STATES) - {"unknown", "not finite"}
    for state, (information, gain) in table.items():
        low = 0.0 if information.startswith("<") else float(re.findall(r"[\d.]+", information)[0])
        assert float(gain.strip("≥< ")) == health.NO_PROGRESS
        ce_gain = health.NO_PROGRESS * (1.5 if gain.startswith("≥") else 0.5)
        for found in (low - 0.001, low + 0.001, low + 0.04):
            reading = health.TermReading("dino", ce_gain, found + 1.0, 1.0, 4.0)
            assert (health.verdict_of_term(reading).state == state) == (found > low or low == 0), (
                state,
                found,
            )


def test_the_page_of_the_configuration_lists_the_keys_with_which_a_run_resumes() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    row = re.search(r"^\| number of ranks or one of these keys: (.*?) \|", text, re.MULTILINE)
    keys = {f"{key}*" if key.endswith(".") else key for key in resume.HARMLESS}
    # whether another store resumes depends on its scans, which other rows explain
    assert row and set(re.findall(r"`(.*?)`", row[1])) == keys - {"data.store"}


# --- how pages are written ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_uses_plain_words(page: Path) -> None:
    assert findings(prose(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_a_page_have_at_most_100_columns(page: Path) -> None:
    """Rows of a table cannot be broken and may be longer."""
    lines = page.read_text(encoding="utf-8").splitlines()
    long = [number for number, line in enumerate(lines, 1) if len(line) > 100 and line[0] != "|"]
    assert long == []


CALL = re.compile(r"(?:tapct|python3?|torchrun|pip|uv|srun|\S*scripts/\S+) ")


def shell_lines(page: Path) -> list[str]:
    """Shell commands of a page: in indented code, in bash blocks and in code spans."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    indented = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    fenced = [line for block in blocks(page, "bash") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", text)
    return [line for line in [*indented, *fenced, *spans] if CALL.match(line)]


def unquoted(line: str) -> str:
    """What a shell sees outside of quotes, without the comment."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line).partition(" #")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_quote_what_zsh_would_expand(page: Path) -> None:
    """zsh takes [a,b] and * for patterns of file names, and stops when no file matches.

    Placeholders such as [FOLDER...] and [--store DIR] are no arguments.
    """
    lines = [re.sub(r" \[[^\],=]*\]", "", unquoted(line)) for line in shell_lines(page)]
    assert [line for line in lines if re.search(r"[\[\]*{}]", line)] == []


def test_the_check_for_quotes_sees_brackets_outside_of_quotes_alone() -> None:
    assert "[" in unquoted("tapct train CONFIG model.patch=[4,8,8]  # comment")
    assert "[" not in unquoted("tapct train CONFIG 'model.patch=[4,8,8]' \"a=[1]\"  # [comment]")
    every = [line for page in PAGES for line in shell_lines(page)]
    assert any("'losses[mylab" in line for line in every)  # a line that was continued
    assert any(line.startswith("pip install") and "[gpu]" in line for line in every)  # a span


def test_the_citation_file_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    licence = re.search(r'^license = "(.+)"$', project, re.MULTILINE)
    assert declared and str(citation["version"]) == declared[1]
    assert licence and citation["license"] == licence[1]
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["authors"] == [{"name": "The tapct developers"}]
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2512.00872")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (entry,) = blocks(ROOT / "README.md", "bibtex")
    assert str(paper["year"]) in entry and paper["url"] in readme
    listed = re.search(r"author  = \{(.*?)\},\n", entry, re.DOTALL)
    assert listed is not None
    names = [" ".join(name.split()) for name in re.split(r"\sand\s", listed[1])]
    assert names == [
        f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]
    ]


# --- docs/extending.md ---


@pytest.fixture(scope="module")
def mylab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the example files of docs/extending.md, importable."""
    folder = tmp_path_factory.mktemp("extending")
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        path = folder / block.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


def load(mylab: Path, name: str) -> ModuleType:
    assert (mylab / f"{name.replace('.', '/')}.py").is_file()
    return importlib.import_module(name)


YAML_BLOCKS = [(page.name, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), YAML_BLOCKS, ids=lambda text: text.splitlines()[0][:40])
def test_every_piece_of_yaml_is_a_config(page: str, block: str, mylab: Path) -> None:
    tree = yaml.safe_load(block)
    path = mylab / "piece.yaml"
    if "site.yaml" in block.splitlines()[0]:  # the defaults of a cluster
        path.write_text(block)
        assert set(site.read(path)) == set(tree)
        return
    if page == "datasets.md":
        path.write_text(block)
        assert read_dataset(path).facts.title == tree["title"]
        return
    base = Path(tree.get("base", SMOKE.name)).with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**tree, "base": str(ROOT / "configs" / base)}))
    resolved = load_config(RunConfig, path, [])
    assert any(
        origin.endswith(".yaml:1") or "piece.yaml" in origin for origin in resolved.sources.values()
    )


def test_the_examples_can_become_part_of_tapct_without_findings_of_ruff(mylab: Path) -> None:
    """Only the order of imports may differ: files of tapct do not import `tapct.extend`."""
    settings = ROOT / "pyproject.toml"
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore=I001"]
    found = subprocess.run(
        [*command, f"--config={settings}", str(mylab / "mylab")], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def token_sets(num_globals: int, batch: int, dim: int) -> TokenSets:
    draw = torch.Generator().manual_seed(0)
    tokens = Tokens(
        torch.randn(num_globals * batch, dim, generator=draw).mul(0.5).requires_grad_(),
        torch.zeros(num_globals * batch, 0, dim),
        torch.randn(num_globals * batch, 8, dim, generator=draw),
        GRID,
    )
    empty = torch.zeros(num_globals, batch, 8, dtype=torch.bool)
    no_masks = Masks(empty, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    return TokenSets(tokens, None, tokens, no_masks, num_globals, 0, 0.04)


def test_the_example_loss_is_the_hinge_on_the_spread_of_each_channel(mylab: Path) -> None:
    module = load(mylab, "mylab.losses.variance")
    sets = token_sets(num_globals=2, batch=5, dim=3)
    result = module.build(module.Config(weight=0.5))(sets, None, None)
    value = result.terms[0].value
    cls = sets.student_global.cls_BD.detach().double().numpy().reshape(2, 5, 3)
    slow = [
        max(0.0, 1 - math.sqrt(np.var(cls[v, :, d]) + 1e-4)) for v in range(2) for d in range(3)
    ]
    assert [term.name for term in result.terms] == ["variance"]
    assert float(value.detach()) == pytest.approx(0.5 * np.mean(slow), rel=1e-5)
    value.backward()
    assert sets.student_global.cls_BD.grad.abs().sum() > 0


def test_the_example_backbone_keeps_the_promises_of_a_backbone(mylab: Path) -> None:
    module = load(mylab, "mylab.models.patch_mlp")
    model = module.build(module.Config(patch=PATCH, dim=8))
    assert isinstance(model, Backbone)
    model.init_weights(1)
    crops = torch.randn(3, 4, 8, 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 5] = True
    (tokens,), (masked,) = model([crops]), model([crops], [mask])
    assert (
        tokens.grid == GRID
        and tokens.patches_BND.shape == (3, 8, 8)
        and tokens.registers_BRD.shape == (3, 0, 8)
    )
    assert (tokens.patches_BND != masked.patches_BND).any(-1).nonzero().tolist() == [[0, 5]]
    moved = crops.clone()
    moved[1, 2:4, 0:4, 4:8] += 1  # the patch at z 1, y 0, x 1
    changed = (model([moved])[0].patches_BND != tokens.patches_BND).any(-1)
    assert changed.nonzero().tolist() == [[1, 5]]
    assert {model.param_group_id(name) for name, _ in model.named_parameters()} == {0, 1, 2}
    twin = module.build(module.Config(patch=PATCH, dim=8))
    twin.init_weights(1)
    assert torch.equal(twin([crops])[0].patches_BND, tokens.patches_BND)


def test_the_example_backbone_is_exported_and_comes_back(mylab: Path, tmp_path: Path) -> None:
    module = load(mylab, "mylab.models.patch_mlp")
    config = module.Config(patch=PATCH, dim=8)
    model = module.build(config)
    model.init_weights(3)
    preprocess = Preprocess((8, 8), (4, 8, 8), (4, 8, 8))
    settings = FeatureSettings(Plugin("mylab.models.patch_mlp", config), HUContract(), preprocess)
    export.save_export(tmp_path / "e", model, settings, {})
    crops = torch.randn(1, 4, 8, 8)
    back = pretrained.load_pretrained(tmp_path / "e", custom_code=True)
    assert torch.equal(back(crops).patches_BND, model([crops])[0].patches_BND)


def test_embed_imports_the_example_backbone_only_if_asked(
    mylab: Path, tmp_path: Path, shell: Shell
) -> None:
    config = load(mylab, "mylab.models.patch_mlp").Config(patch=PATCH, dim=8)
    model = load(mylab, "mylab.models.patch_mlp").build(config)
    model.init_weights(3)
    preprocess = Preprocess((16, 16), (4, 8, 8), (4, 8, 8))
    settings = FeatureSettings(Plugin("mylab.models.patch_mlp", config), HUContract(), preprocess)
    export.save_export(tmp_path / "e", model, settings, {})
    scan, out = tmp_path / "case1.nii.gz", tmp_path / "case1.npz"
    write_nifti(scan, make_ct())
    assert "--custom-code" in shell.bad("embed", tmp_path / "e", scan, "--out", out)
    assert not out.exists()
    shell.good("embed", tmp_path / "e", scan, "--out", out, "--custom-code")
    dense = dense_features(model, read_volume(scan).hu_ZYX, HUContract(), preprocess)
    assert np.array_equal(np.load(out)["features_DZYX"], dense.features_DZYX.numpy())


def test_the_example_op_moves_a_whole_view_by_one_offset_per_sample(mylab: Path) -> None:
    module = load(mylab, "mylab.ops.shift")
    op = module.build(module.Config(p=(0.0, 1.0, 0.5), hu=20.0))
    view = torch.randn(200, 2, 4, 4) * 100
    sample = torch.arange(200)

    def moved(kind: boxes.Kind, number: int) -> torch.Tensor:
        offset = (
            op(view, ViewKey(7, sample, kind, number, HUContract(), torch.ones(len(sample), 3)))
            - view
        )
        assert offset.flatten(1).std(1).max() < 1e-3
        return offset[:, 0, 0, 0]

    assert moved("global", 0).abs().max() == 0
    second = moved("global", 1)
    assert second.abs().max() <= 20.001 and abs(float(second.mean())) < 3
    assert float(second.std()) == pytest.approx(40 / math.sqrt(12), rel=0.1)
    assert 70 < int((moved("local", 0).abs() > 1e-3).sum()) < 130


def rising_scan(seed: int) -> LabelledScan:
    """HU that grow with the height, and a block of label 1."""
    hu = 40 * np.arange(16)[:, None, None] + np.random.default_rng(seed).normal(0, 1, (16, 16, 16))
    labels = np.zeros((16, 16, 16), np.uint16)
    labels[4:12, 4:12, 4:12] = 1
    spacing_mm = (2.0, 1.0, 1.0)
    return LabelledScan(
        f"s{seed}", Volume(hu.astype(np.int16), spacing_mm), LabelMap(labels, spacing_mm)
    )


class Row:
    def __init__(self, number: int) -> None:
        self.id, self.patient, self.path = f"s{number}", f"p{number}", str(number)
        self.has_labels = True


def evaluate(task: Plugin, models: Any, out: Path) -> json_file.Evaluation:
    config = runner.Config(tasks=(task,), num_pictures=1)
    preprocess = Preprocess((16, 16), (4, 16, 16), (4, 16, 16))
    store: Any = MemoryStore(map(Row, range(4)), lambda row: rising_scan(int(row.path)))
    return runner.evaluate(
        models, store.scans, store, config, contract=HUContract(), out=out, preprocess=preprocess
    )


def test_the_example_task_finds_the_height_where_it_can_be_seen(
    mylab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(mylab, "mylab.tasks.depth")
    task = Plugin("mylab.tasks.depth", module.Config(ridge=1e-3))
    blind = RawPatches(PATCH)
    monkeypatch.setattr(
        blind,
        "forward",
        lambda crops: RawPatches(PATCH)([torch.zeros_like(crop) for crop in crops]),
    )
    models = (NamedModel("raw_hu", RawPatches(PATCH)), NamedModel("blind", blind))
    found = evaluate(task, models, tmp_path)
    section = found.tasks["mylab.tasks.depth"]
    # 8 slices of patches: a model that sees nothing predicts the middle, 3.5, and is off by 2
    assert section.headline.values["blind"] == pytest.approx(2.0, abs=0.02)
    assert section.headline.values["raw_hu"] < 0.1
    assert all((tmp_path / one.file).is_file() for one in section.pictures + found.pca)


def are_close(one: Any, other: Any) -> bool:
    """Whether results of two processes are equal but for the last digits of their numbers, which
    the products of BLAS round differently where memory begins elsewhere.
    """
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        names = [field.name for field in dataclasses.fields(one)]
        return all(are_close(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and are_close([*one.values()], [*other.values()])
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(are_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-9, nan_ok=True)
    return bool(one == other)


def test_the_example_task_runs_through_every_command(
    mylab: Path,
    tmp_path: Path,
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
    python_from_nest: None,
) -> None:
    """As a user would: with the YAML of the page, beside training and by hand."""
    monkeypatch.setenv("PYTHONPATH", f"{mylab}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    page = blocks(ROOT / "docs" / "extending.md", "yaml")
    block = next(block for block in page if "mylab.tasks.depth" in block)
    config = write_config(tmp_path, make_store(tmp_path))
    tree, added = yaml.safe_load(config.read_text()), yaml.safe_load(block)["eval"]
    tree["eval"] |= added | {"during": {"every": 12}}
    config.write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("SLURM_JOB_ID", "5")  # a job waits for the evaluation beside training
    shell.good("train", config)
    monkeypatch.delenv("SLURM_JOB_ID")

    run = tmp_path / "run"
    beside, why_not = json_file.read(evaluation_of(run, 12).path)
    assert beside is not None, why_not
    printed = shell.good("eval", run)
    by_hand, _ = json_file.read(evaluation_of(run, 12).path)
    assert by_hand is not None and are_close(by_hand.tasks, beside.tasks)
    assert list(by_hand.tasks) == ["mylab.tasks.depth"]
    assert " eval " in by_hand.origin.command and str(run) not in by_hand.origin.command
    values = by_hand.tasks["mylab.tasks.depth"].headline.values
    assert list(values) == ["pretrained", "untrained", "untrained_layerscale1", *DEFAULTS[1:]]
    for model, value in values.items():
        assert re.search(
            rf"^{model} +mean error {re.escape(json_file.shown(value))} ", printed, re.M
        )

    shell.good("report", run)
    html = (run / "report.html").read_text()
    html = html[html.index("<main>") : html.index("</main>")]
    assert "Depth: mean error" in html and "Error of the height in the scan" in html
    assert "estimated height over true height" in html
    assert not [word for word in ("Dice", "organ", "linear decoder") if word in html]
    printed = shell.good("compare", run, "--out", tmp_path / "compare.html")
    lead = by_hand.tasks["mylab.tasks.depth"].headline.lead()
    for text in ("Depth: mean error,", json_file.shown(lead.own), json_file.shown(abs(lead.gain))):
        assert text in printed and text in (tmp_path / "compare.html").read_text()
    assert "Dice" not in printed

    # both tasks in one pass; the second one does not change the first
    both = ("eval.tasks.segmentation.steps=5", "eval.num_pictures=1")
    printed = shell.good("eval", run, *both)
    together, _ = json_file.read(evaluation_of(run, 12).path)
    assert together is not None
    assert list(together.tasks) == ["mylab.tasks.depth", "segmentation"]  # as in the YAML
    depth = "mylab.tasks.depth"
    assert are_close(together.tasks[depth].headline, by_hand.tasks[depth].headline)
    assert "segmentation (higher is better)" in printed
    assert "mylab.tasks.depth (lower is better)" in printed
    shell.good("report", run)
    html = (run / "report.html").read_text()
    html = html[html.index("<main>") : html.index("</main>")]
    assert "Depth: mean error" in html and "Segmentation: mean Dice" in html


# --- the tables of files that a run writes ---


def test_the_table_of_metrics_has_every_key_that_a_step_writes_and_no_other() -> None:
    head = heads.Config(num_prototypes=8, hidden=8, bottleneck=4)
    losses = [
        Plugin(name, plugins.load("losses", name).Config(head=head)) for name in ("dino", "ibot")
    ]
    losses += [Plugin(name, plugins.load("losses", name).Config()) for name in ("koleo", "gram")]
    model = vit.Config(window=(4, 8, 8), patch=PATCH, dim=8, depth=1, heads=2)
    pair = StudentTeacher(Plugin("vit", model), losses, seed=0)
    views = recipe.Config(global_window=(4, 8, 8), local_window=(2, 4, 4), num_locals=1)
    written: list[dict[str, float]] = []
    trainer = loop.Trainer(
        pair,
        optim.Updater(pair, optim.Config()),
        [
            loop.StageSettings(
                0,
                "",
                loop.Config(steps=2, global_batch=2),
                Inputs(views, masks.Config(probability=1.0), HUContract(), PATCH, 0),
                Schedules(optim.Config(), 2, 2),
                optim.Config(),
                tuple(losses),
            )
        ],
        loop.Hooks(written.append, lambda step, last: None),
        loop.Cadence(2, 2),
    )
    hu = torch.randint(-1000, 400, (2, 4, 16, 16), dtype=torch.int16)
    number = torch.arange(2)
    batch = Batch(hu, torch.tensor([[4, 16, 16]] * 2), torch.ones(2, 3), number, number, number)
    assert trainer.run(iter([(batch,)] * 2), 0).step == 2
    stated = table_keys(ROOT / "docs" / "training.md", "metrics.jsonl")
    of_several = {name for name in stated if name.startswith(("ranks/", "archive/"))}
    assert of_several and set(written[0]) == stated - of_several - {"health/rankme"}
    assert set(written[1]) == stated - of_several


def test_the_tables_of_results_have_every_key_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vit.Config(window=(4, 16, 16), patch=PATCH, dim=8, depth=1, heads=2)
    section = Plugin("vit", config)
    models = with_baselines(vit.build(config), section, 0)
    task = Plugin("segmentation", plugins.load("eval.tasks", "segmentation").Config(steps=3))
    evaluate(task, models, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    page = ROOT / "docs" / "evaluation.md"
    found = written["tasks"]["segmentation"]
    assert set(written) == table_keys(page, "results.json")
    assert set(found) == table_keys(page, "The section of a task")
    assert set(found["headline"]) == table_keys(page, "The headline")
    assert set(found["models"]["pretrained"]) == table_keys(page, "Numbers of segmentation")
    assert set(found["models"]) == table_keys(page, "The baselines")
    assert set(found["scans"][0]) == {"scan", "model", "value", "parts"}
