import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from copydesk.predictor import native_bfloat16

ROOT = Path(__file__).parents[1]
RUNTIME = sorted((ROOT / "copydesk").rglob("*.py"))
ALL = [*RUNTIME, *sorted((ROOT / "train").rglob("*.py"))]
ONLY_FOR_TRAINING = ("mlflow", "datasets", "sklearn", "dvc", "train", "accelerate", "peft")
BLOCKED = [*ONLY_FOR_TRAINING, "transformers", "torch._dynamo"]
"""The last two take seconds to import."""
READ_A_PAGE = """
import json, sys
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
import copydesk
page = copydesk.load(sys.argv[2]).predict_one("<h1>Minister said talks</h1><p>The match today.</p>")
print(page.model_dump_json())
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level or (node.module or "").partition(".")[0])
    return found


def test_a_page_is_read_without_what_training_needs_and_what_is_slow_to_import(tiny_model):
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        READ_A_PAGE,
        json.dumps([*ONLY_FOR_TRAINING, "transformers"]),
        str(tiny_model),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr
    assert [section["text"] for section in json.loads(done.stdout)["sections"]] == [
        "Minister said talks",
        "The match today.",
    ]


@pytest.mark.parametrize(("asked", "compiled"), [(None, 101), ("1024", 100)])
def test_onednn_keeps_few_of_the_products_that_it_compiled_unless_the_user_says_more(asked, compiled):
    code = """
import copydesk, torch
for size in [*range(3, 103), 3]:
    torch.conv2d(torch.ones(2, 16, size, 8), torch.ones(8, 16, 3, 3))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ONEDNN_VERBOSE": "all"}
    environment |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": asked} if asked else {}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )

    assert done.stdout.count("create:cache_miss,cpu,convolution") == compiled


@pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="this processor does not multiply bfloat16")
def test_memory_does_not_grow_with_the_sizes_of_products():
    code = """
import ctypes
import copydesk, torch
class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
for size in range(100, 900):
    torch.bmm(*torch.ones(2, 2, size, size).bfloat16())
    if size in (400, 899):
        print(mallinfo().used // 2**20)
"""
    capacities = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in capacities}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )

    early, late = map(int, done.stdout.split())
    assert late < early + 30


@pytest.mark.parametrize("path", RUNTIME, ids=name_of)
def test_the_runtime_imports_nothing_of_training(path):
    assert not imported(path) & {"train", "bench", "tests", *ONLY_FOR_TRAINING} - {"mlflow"}


def test_few_files_know_mlflow():
    knowing = {name_of(path) for path in ALL if "mlflow" in imported(path)}

    assert knowing <= {"copydesk/registry.py", "copydesk/pyfunc.py", "train/store.py", "train/runs.py"}


def test_the_file_that_mlflow_runs_is_imported_by_nobody():
    assert [name_of(path) for path in ALL if "copydesk.pyfunc" in path.read_text("utf-8")] == []


@pytest.mark.parametrize("path", RUNTIME, ids=name_of)
def test_the_runtime_guards_nothing_with_an_assertion_that_optimisation_drops(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assert)]

    assert lines == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_nothing_is_imported_relatively(path):
    assert not {name for name in imported(path) if name.startswith(".")}


def test_the_wheel_holds_the_runtime_and_nothing_else():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]

    assert build["targets"]["wheel"] == {"packages": ["copydesk"]}
    assert set(build) == {"targets"}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SERVICE = [path for path in RUNTIME if path.parent.name == "serve"]


def names_of(dependencies: list[str]) -> set[str]:
    return {dependency.partition(">")[0].replace("-", "_") for dependency in dependencies}


def test_what_the_runtime_imports_is_a_dependency():
    declared = names_of(PROJECT["dependencies"])
    files = set(RUNTIME) - set(SERVICE)
    used = set().union(*(imported(path) for path in files if path.name not in {"registry.py", "pyfunc.py"}))

    with_transformers = {"huggingface_hub"}
    assert used - set(sys.stdlib_module_names) - {"copydesk"} <= declared | with_transformers
    assert declared - {"charset_normalizer"} <= used


def test_what_the_service_imports_besides_is_its_extra():
    extra = names_of(PROJECT["optional-dependencies"]["serve"])
    used = set().union(*map(imported, SERVICE)) - set(sys.stdlib_module_names) - {"copydesk"}

    with_fastapi, with_uvicorn = {"starlette"}, {"h11"}
    assert used - names_of(PROJECT["dependencies"]) <= extra | with_fastapi | with_uvicorn
    assert extra <= used


def test_every_other_command_works_without_the_service(tiny_model):
    blocked = ["fastapi", "fastapi_offline", "prometheus_client", "starlette", "uvicorn", "mlflow"]
    block = "import json, sys; sys.modules.update(dict.fromkeys(json.loads(sys.argv.pop(1))))"
    code = f"{block}; from copydesk.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COPYDESK_MODEL": str(tiny_model)}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, json.dumps(blocked), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert "weights.safetensors" in run("info").stdout
    refused = run("serve", "--port", "0")
    assert (refused.returncode, "pip install 'copydesk[serve]'" in refused.stderr) == (2, True)
