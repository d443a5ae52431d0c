"""The README's tree is the real tree, and the pipeline's names are one set of names."""

import re
from pathlib import Path

import pytest
import yaml

from train.arguments import load_experiment
from train.config import Experiment

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]
REPEATED = {name: stage for name, stage in STAGES.items() if not stage.get("frozen")}
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
GENERATED = [
    Path(next(iter(out)) if isinstance(out, dict) else out) for stage in STAGES.values() for out in stage["outs"]
]


def printed_tree() -> list[Path]:
    """Return the paths in the README's first code block below a heading that speaks of the tree."""
    readme = (ROOT / "README.md").read_text("utf-8")
    block = re.search(r"^#+ [^\n]*\btree\b.*?^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    assert block, "README.md has no heading with 'tree' and a code block below it"
    paths: list[Path] = []
    folders: list[tuple[int, Path]] = [(-1, Path())]
    for line in filter(str.strip, block[1].splitlines()):
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while folders[-1][0] >= indent:
            folders.pop()
        paths.append(folders[-1][1] / name)
        if name.endswith("/"):
            folders.append((indent, paths[-1]))
    return paths


@pytest.mark.parametrize("path", printed_tree(), ids=str)
def test_what_the_readme_prints_is_there(path):
    assert (ROOT / path).exists() or path in GENERATED


@pytest.mark.parametrize("package", ["copydesk", "train", "bench"])
def test_the_readme_names_every_module(package):
    printed = set(printed_tree())
    modules = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py"}

    # A folder inside of a package may stand for its modules.
    missing = {
        path for path in modules if path not in printed and (path.parent == Path(package) or path.parent not in printed)
    }
    assert missing == set()


def test_stages_are_the_sections_of_a_config_in_this_order():
    no_stage = {"name", "sweep"}
    assert list(REPEATED) == [name for name in Experiment.model_fields if name not in no_stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_the_module_of_its_name(stage):
    assert STAGES[stage]["cmd"].startswith(f"python -m train.{stage}")
    assert (ROOT / "train" / f"{stage}.py").is_file()


@pytest.mark.parametrize("stage", REPEATED)
def test_a_stage_runs_every_shipped_experiment_and_reads_its_section(stage):
    assert sorted(STAGES[stage]["matrix"]["experiment"]) == EXPERIMENTS
    assert STAGES[stage]["params"] == [{"configs/${item.experiment}.yaml": [stage]}]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_stages_write_where_the_experiment_says(name):
    experiment = load_experiment(ROOT / "configs" / f"{name}.yaml")
    outs = {stage: [out.replace("${item.experiment}", name) for out in REPEATED[stage]["outs"]] for stage in REPEATED}

    assert outs == {
        "prepare": [str(experiment.prepared)],
        "fit": [str(experiment.fitted)],
        "release": [str(experiment.released)],
        "evaluate": [str(experiment.evaluated)],
    }


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_depends_on_is_in_the_checkout_or_made_by_a_stage(stage):
    needed = [Path(dep) for dep in STAGES[stage]["deps"] if dep != "data/articles"]  # fetched, or left out

    assert [str(path) for path in needed if not (ROOT / path).exists() and path not in GENERATED] == []


@pytest.mark.parametrize("stage", REPEATED)
def test_a_stage_depends_on_its_own_module(stage):
    assert f"train/{stage}.py" in STAGES[stage]["deps"]
