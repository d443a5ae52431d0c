"""The service's model: from a registry, followed when its alias moves; its answers are MLflow's."""

import asyncio
import json
from pathlib import Path

import mlflow.pyfunc
import pytest
from mlflow import MlflowClient
from mlflow.pyfunc.scoring_server import invocations

from copydesk import registry
from copydesk.saved import load_saved, read_description, save_folder
from copydesk.serve.desk import Desk
from copydesk.serve.settings import Settings
from copydesk.serve.source import ModelSource, reload, watch

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "data" / "sample" / "pages").glob("*/*.*"))[:12]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path):
    """Return the working folder of a store whose alias names the first of two versions."""
    folder = tmp_path_factory.mktemp("store")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("copydesk", artifact_location=(folder / "mlartifacts").as_uri())
    for model in (tiny_model, another(tiny_model, folder / "another")):
        run_id = client.create_run(experiment).info.run_id
        registry.publish(model, example="<p>goal", store=client, run_id=run_id, register=True)
    client.set_registered_model_alias("tiny", "champion", "1")
    return folder


@pytest.fixture
def client(store: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(store)
    return MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def another(folder: Path, target: Path) -> Path:
    """Write a model that differs in its thresholds."""
    save_folder(
        target,
        tensors=load_saved(folder).model.state_dict(),
        description=read_description(folder).model_copy(update={"thresholds": [0.5, 0.5, 0.5]}),
        tokenizer=(folder / "tokenizer.json").read_text(),
        name="tiny",
        created="2026-01-02",
        run={},
        card="",
    )
    return target


def test_the_service_follows_the_alias_and_keeps_its_model_while_the_registry_is_away(client, monkeypatch):
    source = ModelSource("models:/tiny@champion", device="cpu")

    async def scenario() -> list[str]:
        desk = Desk(await asyncio.to_thread(source.load), Settings())
        seen = [desk.predictor.info.version]
        watching = asyncio.create_task(watch(desk, source, every=0.01, version=source.version()))
        with monkeypatch.context() as patch:
            patch.setattr("copydesk.serve.source.version_of", lambda _: (_ for _ in ()).throw(OSError("away")))
            await asyncio.sleep(0.1)
        assert desk.predictor.info.version == seen[0]
        client.set_registered_model_alias("tiny", "champion", "2")
        async with asyncio.timeout(60):
            while desk.predictor.info.version == seen[0]:  # noqa: ASYNC110 (another task changes it)
                await asyncio.sleep(0.01)
        watching.cancel()
        return [*seen, desk.predictor.info.version]

    try:
        first, second = asyncio.run(scenario())
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
    assert first != second


def test_only_an_alias_is_watched():
    addresses = ["models:/tiny@champion", "models:/tiny/3", "models/released"]

    assert [ModelSource(address).is_watched for address in addresses] == [True, False, False]


def test_an_unknown_alias_is_named(client):
    with pytest.raises(registry.RegistryError, match="models:/tiny@gold"):
        registry.version_of("models:/tiny@gold")


def test_a_model_that_cannot_be_loaded_again_leaves_the_old_one(predictor, tmp_path):
    async def scenario() -> None:
        desk = Desk(predictor, Settings())
        assert not await reload(desk, ModelSource(str(tmp_path / "gone")))
        assert desk.predictor is predictor
        assert b'copydesk_model_reloads_total{outcome="failed"} 1.0' in desk.meters.exposition()

    asyncio.run(scenario())


def test_mlflow_answers_like_the_service(client, client_of, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    rows = [
        {"html" if path.suffix == ".html" else "text": path.read_text("utf-8"), "url": path.name} for path in SAMPLES
    ]

    ours = client_of().post("/v1/pages", json=rows).json()
    loaded = model.predict(rows)
    response = invocations(json.dumps({"inputs": rows}), "application/json", model, model.metadata.get_input_schema())

    served = json.loads(response.response)["predictions"]
    for theirs in (loaded, served):
        assert len(theirs) == len(ours) == len(SAMPLES)
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)


def assert_equal(page: dict, other: dict) -> None:
    """Compare pages: all is the same, scores within 0.005."""
    for part in ("sections", "topics"):
        assert len(page[part]) == len(other[part])
        for one, two in zip(page[part], other[part], strict=True):
            scores = {"score", "scores"}
            assert {k: v for k, v in one.items() if k not in scores} == {
                k: v for k, v in two.items() if k not in scores
            }
            assert one["score"] == pytest.approx(two["score"], abs=0.005)
            assert one.get("scores", {}) == pytest.approx(two.get("scores", {}), abs=0.005)
    rest = page.keys() - {"sections", "topics"}
    assert {name: page[name] for name in rest} == {name: other[name] for name in rest}
