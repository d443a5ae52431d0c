"""What more than one test needs."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, sync_playwright
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel

from copydesk.encode import Encoding
from copydesk.labels import CLASSES, SectionLabel, TopicInfo
from copydesk.network import CopydeskConfig, CopydeskModel
from copydesk.saved import Description, save_folder

TOPICS = [
    TopicInfo(id="medtop:11000000", slug="politics", name="politics"),
    TopicInfo(id="medtop:20000638", slug="diplomacy", name="international relations", parent="medtop:11000000"),
    TopicInfo(id="medtop:15000000", slug="sport", name="sport"),
]
HINTS = "0:div 0:h1 0:li 0:p 1:article 1:body 1:div 1:ul in:article in:footer in:nav own:lead own:promo with:a".split()
WORDS = (
    "the a of to in and minister said talks match goal subscribe cookies share sponsored by more read news today . ,"
)


def make_tokenizer() -> Tokenizer:
    """Build a tokenizer of a few words that frames text like BERT's."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS.split()]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a text encoder with random weights, as `fit.encoder` names one."""
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Prepare the sample for a tiny experiment: a folder with `tiny.yaml` and an empty MLflow store."""
    import datasets
    from mlflow import MlflowClient

    from train.arguments import load_experiment
    from train.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    sample = Path(__file__).parents[1] / "data"
    settings = {
        "name": "tiny",
        "prepare": {
            "topics": str(sample / "topics.yaml"),
            "pages": [
                {
                    "name": "sample",
                    "annotations": str(sample / "sample" / "annotations.jsonl"),
                    "folder": str(sample / "sample" / "pages"),
                }
            ],
            "articles": [{"name": "sample-articles", "path": str(sample / "sample" / "articles.jsonl")}],
            "test_fraction": 0.2,
            "num_folds": 3,
        },
        "fit": {
            "kind": "transformer",
            "encoder": str(tiny_encoder),
            "encoding": {"max_article_tokens": 64},
            "network": {"page_width": 64, "page_layers": 1, "page_encoders": 2, "hint_width": 16},
            "epochs": 2,
            "tokens_per_batch": 8_000,
            "learning_rate": 0.01,
            "head_learning_rate": 0.01,
            "class_weight_power": 0.5,
        },
        "release": {"name": "tiny", "register_model": False},
        "evaluate": {"bootstrap_samples": 20},
    }
    (folder / "tiny.yaml").write_text(json.dumps(settings), "utf-8")  # JSON is YAML
    MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")  # to make the tables takes seconds: once is enough
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        prepare(load_experiment("tiny.yaml"))
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Move to a copy of the prepared folder."""
    import datasets

    # On so small a network threads only wait for each other; on a busy machine, for minutes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path / "workplace"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", prepared / "cache")
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a real model folder with random weights: its answers are arbitrary, but always the same."""
    tokenizer = make_tokenizer()
    encoder = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    encoding = Encoding(max_article_tokens=64)
    config = CopydeskConfig(
        encoder=encoder.to_dict(),
        num_topics=len(TOPICS),
        page_width=64,
        page_layers=1,
        num_hints=len(HINTS),
        hint_width=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CopydeskModel(config)
        model.page_encoders[0].feature_projection.weight.data *= 20  # else one label wins on every section
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(
        folder,
        tensors=model.state_dict(),
        description=Description(
            network=config,
            encoding=encoding,
            hints=HINTS,
            classes=list(CLASSES),
            topics=TOPICS,
            thresholds=[0.9, 0.1, 0.9],
            section_temperature=1.0,
            topic_temperature=1.0,
            base=None,
        ),
        tokenizer=tokenizer.to_str(),
        name="tiny",
        created="2026-01-01",
        run={"git": "0000000"},
        card="# tiny\n",
    )
    return folder


def make_page_table(wrong: dict[int, int], *, num_sites: int = 12, topics_hits: int = 2) -> list[dict]:
    """Return counts of two pages a site with 20 sections a label, of which some are read as the next label."""
    from train.counts import CELLS, TOPICS

    rows = []
    for number in range(2 * num_sites):
        confusion = np.diag([20] * len(SectionLabel))
        for label, count in wrong.items():
            moved = count + number % 3  # pages differ
            confusion[label, label] -= moved
            confusion[label, (label + 1) % 4] += moved
        topics = dict(zip(TOPICS, (topics_hits, 2, 3), strict=True))
        cells = dict(zip(CELLS, confusion.ravel().tolist(), strict=True))
        rows.append({"page": f"p{number}", "site": f"s{number % num_sites}", "labels": "0", **cells, **topics})
    return rows


@pytest.fixture(scope="session")
def page_table() -> Callable[..., list[dict]]:
    """Give a function that makes what an evaluation logs of each page."""
    return make_page_table


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start headless Chromium; CI, which says so by the variable `CI`, must have it."""
    chromium = shutil.which("chromium")
    if not chromium and not os.environ.get("CI"):
        pytest.skip("there is no chromium: apt-get install chromium, as .ci/run does")
    assert chromium, "there is no chromium, though .ci/run installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def apart() -> ForkServerContext:
    """Start processes that have the slow modules loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "train.fit", "train.runs", "mlflow.server"])
    with pytest.MonkeyPatch.context() as patch:  # all processes get the environment in which this one starts
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        forkserver.ensure_running()
    return context


@pytest.fixture
def no_sender_is_left() -> Iterator[None]:
    """End what sends runs that a test did not finish, before its folder is left."""
    yield
    from train.sender import Sender

    for thread in threading.enumerate():
        if isinstance(thread, Sender):
            thread.finish()
            thread.journal.close()


@pytest.fixture
def within() -> Iterator[Callable[[float], AbstractContextManager[None]]]:
    """Give a context that fails after so many seconds of this process's own time, however busy the machine."""

    def stop(*_: object) -> None:
        raise AssertionError("took longer than allowed")

    @contextmanager
    def limited(seconds: float) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    before = signal.signal(signal.SIGPROF, stop)
    yield limited
    signal.signal(signal.SIGPROF, before)
