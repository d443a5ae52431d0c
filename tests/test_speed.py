import functools
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from bench.speed.apart import Side, SideError
from bench.speed.cost import page_flops, peak, text_flops
from bench.speed.growth import long_page, peak_mebibytes, single, streamed
from bench.speed.measure import Goal, Row, alternate, exponent, median, table
from bench.speed.pages import read_long_articles, read_pages, write_pages
from bench.speed.setup import QUICK, Setup, save_stock
from bench.speed.steps import Clock
from bench.speed.steps import ours as timed_in_steps
from bench.speed.training import ours as our_training
from bench.speed.training import theirs as their_training
from copydesk import int8
from copydesk.network import CopydeskConfig, CopydeskModel
from copydesk.predictor import native_bfloat16
from copydesk.split import split

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(tiny_model, tmp_path) -> Setup:
    prepared = Setup(str(tiny_model), tmp_path, QUICK, repeats=1)
    save_stock(prepared)
    return prepared


def test_the_exponent_of_a_power_is_that_power():
    sizes = [100, 1_000, 10_000]

    assert exponent(sizes, [0.01 * size**1.3 for size in sizes]) == pytest.approx(1.3)


@pytest.mark.parametrize(("sizes", "seconds"), [([100], [1.0]), ([5, 5], [1.0, 2.0]), ([1, 2], [0.0, 1.0])])
def test_an_exponent_needs_two_sizes_and_times_above_zero(sizes, seconds):
    with pytest.raises(ValueError, match="two sizes at least"):
        exponent(sizes, seconds)


def test_sides_take_turns_and_every_other_round_goes_backwards():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}

    results = alternate(sides, repeats=3)

    assert "".join(calls) == "abccbaabc"
    assert results == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_a_median_is_not_moved_by_one_slow_run():
    assert median([{"seconds": 1.0}, {"seconds": 60.0}, {"seconds": 2.0}], "seconds") == 2.0


def test_a_ratio_says_how_many_times_better_ours_is():
    assert Row("seconds", 2.0, 5.0).ratio == 2.5
    assert Row("pages/s", 5.0, 2.0, more_is_better=True).ratio == 2.5


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("ratio", 2.0, 5.0, goal=Goal(2.5), of_ratio=True), True),
        (Row("ratio", 2.0, 4.0, goal=Goal(2.5), of_ratio=True), False),
        (Row("at most", 1.05, goal=Goal(1.05, at_most=True)), True),
        (Row("at most", 1.06, goal=Goal(1.05, at_most=True)), False),
        (Row("theirs is missing", 2.0, goal=Goal(2.5), of_ratio=True), None),
        (Row("ours is missing", goal=Goal(0.4)), None),
        (Row("no goal", 2.0, 5.0), None),
    ],
    ids=lambda value: value.what if isinstance(value, Row) else str(value),
)
def test_a_goal_is_met_only_by_what_was_measured(row, met):
    assert row.met is met


def test_the_table_says_what_was_not_measured_and_without_judgement_nothing_is_met():
    rows = [Row("an epoch", 2.0, 5.0, unit="s", goal=Goal(2.5), of_ratio=True), Row("engine", 2.0, goal=Goal(0.95))]
    missing = Row("engine", 2.0, goal=Goal(0.95), of_ratio=True, note="missing: no module")

    shown = table([rows[0], missing], judged=True).splitlines()

    assert shown[0] == "| what | ours | theirs | ratio | goal | met |"
    assert shown[2] == "| an epoch | 2 s | 5 s | 2.5 | ≥ 2.5 | yes |"
    assert shown[3] == "| engine (missing: no module) | 2 |  |  | ≥ 0.95 | not measured |"
    assert table(rows, judged=False).count("not judged") == 2
    assert rows[0].as_dict(judged=False)["met"] is None


def test_a_token_of_minilm_costs_what_the_paper_and_pencil_say():
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1_536)

    linear, attention = 6 * 2 * (4 * 384**2 + 2 * 384 * 1_536), 4 * 512 * 384 * 6
    assert text_flops(config, [512, 512]) == 2 * 512 * (linear + attention)
    assert text_flops(config, [512]) / 512 == pytest.approx(25.9e6, rel=0.01)


def test_the_cost_of_page_layers_grows_no_faster_than_pages_once_they_fill_a_window():
    config = BertConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with torch.device("meta"):
        model = CopydeskModel(
            CopydeskConfig(
                encoder=config.to_dict(),
                num_topics=1,
                page_width=64,
                page_layers=2,
                page_encoders=3,
                window_sections=100,
                window_overlap=25,
            )
        )

    assert page_flops(model, [200]) == pytest.approx(2 * page_flops(model, [100]))
    assert page_flops(model, [100]) > 2 * page_flops(model, [50])
    layer = 2 * 12 * 64**2 + 4 * 64 * 100
    assert page_flops(model, [100]) > 100 * 3 * 2 * layer


def test_a_peak_is_a_rate_for_each_precision_that_the_processor_knows():
    peaks = peak([16], 0.001)()

    native = {"bfloat16": native_bfloat16(torch.device("cpu")), "int8": int8.is_native()}
    assert peaks.keys() == {"float32", *(precision for precision, known in native.items() if known)}
    assert min(peaks.values()) > 0


def test_a_side_runs_in_a_process_of_its_own():
    with Side(functools.partial, os.getpid) as side:
        assert side() not in {os.getpid(), None}


def test_a_side_that_cannot_be_set_up_says_why():
    with pytest.raises(SideError, match="ZeroDivisionError"), Side(operator.truediv, 1, 0):
        pass


def test_a_call_within_a_step_counts_for_the_outer_step():
    clock = Clock()
    inner = clock.timed("inner", lambda: sum(range(1_000)))
    outer = clock.timed("outer", inner)

    outer()
    assert set(clock.seconds) == {"outer"}
    inner()
    assert set(clock.seconds) == {"outer", "inner"}


def test_pages_are_of_any_checkout_and_always_the_same():
    pages = read_pages(8)

    assert [page.source for page in pages] == ["sample"] * 2 + ["newsroom"] * 6
    assert [page.content for page in pages] == [page.content for page in read_pages(8)]


def test_long_articles_fill_512_tokens():
    assert min(len(text.split()) for text, _ in read_long_articles(50)) >= 450


def test_a_long_page_repeats_no_paragraph():
    texts = split(long_page(["a & b", "c"], 5), kind="html").texts()

    assert texts == ["a & b 0", "c 1", "a & b 2", "c 3", "a & b 4"]


@pytest.mark.parametrize("what", ["sections", "articles"])
def test_both_trainings_run_for_an_epoch(setup, what):
    mine = our_training(setup.model, setup.stock, what, 2)()
    others = their_training(setup.model, setup.stock, what, 2)()

    assert mine["seconds"] > 0
    assert mine["real"] > 0
    assert mine["flops"] > 0
    assert others["seconds"] > 0
    assert others["rows"] > 1


def test_the_steps_of_predict_add_up_to_no_more_than_it_takes(setup):
    sample = timed_in_steps(setup.model, [page.content for page in read_pages(2)])()
    steps = {name: sample[name] for name in ("parse and split", "text encoder", "page layers", "topics", "decode")}

    assert all(seconds > 0 for seconds in steps.values())
    assert sum(steps.values()) < sample["seconds"]
    assert 0 < sample["network"] < sample["seconds"]
    assert sample["computed"] >= sample["real"] > 0


def test_time_and_memory_are_noted_while_pages_stream(setup):
    write_pages(setup.folder / "pages", 2)

    sample = streamed(setup.model, str(setup.folder / "pages"), (2, 5))()

    assert sample["pages"] == [4, 5]  # the second page is read in one batch with all the others
    assert sample["marks"][0] <= sample["marks"][1]
    assert peak_mebibytes() is None or sample["mebibytes"][0] <= sample["mebibytes"][1]


def test_pages_have_about_the_lengths_asked_for(setup):
    sample = single(setup.model, [text for page in read_pages(2) for text in page.raw.texts()], (5_000, 20_000))()

    assert sample["lengths"] == pytest.approx([5_000, 20_000], rel=0.2)
    assert all(sample[str(length)] > 0 for length in sample["lengths"])


def test_a_quick_run_prints_a_table_and_judges_nothing(tiny_model, tmp_path):
    command = [sys.executable, "-m", "bench.speed", "--quick", "--only", "steps", "--model", str(tiny_model)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, "--output", str(tmp_path / "speed.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "speed.json").read_text("utf-8"))["rows"]
    assert len(rows) > 5
    assert {row["met"] for row in rows} == {None}
    assert all(f"| {row['what']}" in done.stdout for row in rows)
    assert "| yes |" not in done.stdout
