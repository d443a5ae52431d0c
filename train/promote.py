"""The gate: make the registered model `challenger` the `champion`, if it has earned it.

Knows the registry, where the counts of each model are, and the report; the rule itself is `train.gate`'s. Ends with 0
if the challenger was promoted, with 1 if it was refused, with 2 if the two could not be compared.
"""

import argparse
import dataclasses
import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

import copydesk
from copydesk.encoder import sha256_of
from copydesk.network import CopydeskModel
from copydesk.predictor import Document
from copydesk.registry import CHALLENGER, CHAMPION, SCHEME, fetch, tracking_uri
from copydesk.saved import read_description, read_manifest
from train.arguments import load_experiment
from train.config import Experiment
from train.counts import Counts, page_table
from train.evaluate import score_pages
from train.gate import NAMES, Cost, Difference, Verdict, compare, judge
from train.release import TRAINED_ON
from train.rows import load_rows, resplit
from train.sources.articles import read_topics
from train.store import Store, StoreError, Version, connect, read_artifact, registered, write_metrics

log = logging.getLogger(__name__)

NAME = "copydesk"
MARGIN, LABEL_MARGIN, SAMPLES = 0.01, 0.02, 2_000
TABLE = "tables/validation_pages.json"
REPORT = "promotion/report"


class GateError(ValueError):
    """Two models cannot be compared. The message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A registered version and what is known of it."""

    version: str
    run_id: str
    cost: Cost
    counts: Counts
    counted: str
    """Where the counts come from."""
    test: dict[str, float]
    """Its scores on test, where they were logged: for the record."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """What the gate found, as it is reported."""

    model: str
    verdict: Verdict
    challenger: str
    """Its version."""
    report: str
    """Markdown."""


def promote(
    name: str = NAME, *, margin: float = MARGIN, label_margin: float = LABEL_MARGIN, samples: int = SAMPLES
) -> Promotion:
    """Move the alias, or say why not; the report is logged to the challenger's run.

    Args:
        name: of the registered model.
        margin: of macro F1, within which a cheaper model may be worse.
        label_margin: by which no label's F1 may be lower.
        samples: of the bootstrap.

    Raises:
        GateError: there is no challenger, or the two cannot be compared.
        RegistryError: a model cannot be fetched.
    """
    store, _ = connect()
    new, old = (registered(store, name, alias=alias) for alias in (CHALLENGER, CHAMPION))
    if not new:
        raise GateError(
            f"no version of {name} in {tracking_uri()} has the alias {CHALLENGER}: run `python -m train.release` with "
            "release.register_model, and name the model by --model"
        )
    if not old:
        verdict = Verdict(promoted=True, reason=f"there is no {CHAMPION} yet: the first one is promoted unseen")
        return _conclude(store, name, new, verdict, {}, {})
    if new.version == old.version:
        raise GateError(f"version {new.version} of {name} is {CHAMPION} already: release another one to be compared")
    challenger, champion = _candidate(store, new, asked=new), _candidate(store, old, asked=new)
    shared = sorted(set(challenger.counts.keys) & set(champion.counts.keys))
    if not shared:
        raise GateError(
            f"versions {new.version} and {old.version} were not scored on one same page: evaluate both on the same "
            "prepared pages"
        )
    differences = compare(challenger.counts.select(shared), champion.counts.select(shared), samples=samples)
    verdict = judge(
        differences, challenger=challenger.cost, champion=champion.cost, margin=margin, label_margin=label_margin
    )
    details = {
        "pages": len(shared),
        "sites": len(set(challenger.counts.select(shared).sites)),
        "samples": samples,
        "margin": margin,
        "label_margin": label_margin,
        CHAMPION: _described(champion),
        CHALLENGER: _described(challenger),
    }
    return _conclude(store, name, new, verdict, differences, details)


def _candidate(store: Store, version: Version, *, asked: Version) -> Candidate:
    """Gather what the rule needs of a version; `asked` is the one whose validation pages are scored if need be."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(f"{SCHEME}{version.name}/{version.version}", folder=temporary)
        run_id, cost = _run_of(version), _cost(folder)
        table = read_artifact(store, run_id, TABLE)
        if table:
            content = json.loads(table)
            rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
            counted = "its evaluation"
        else:
            rows = _score_again(folder, version, _experiment(store, asked))
            counted = "scored for this comparison: its run has no counts by page"
    metrics = store.get_run(run_id).data.metrics
    test = {one: metrics[f"test/{one}"] for one in NAMES if f"test/{one}" in metrics}
    return Candidate(str(version.version), run_id, cost, Counts.of(rows), counted, test)


def _run_of(version: Version) -> str:
    if not version.run_id:
        raise GateError(f"version {version.version} of {version.name} names no run: register it by `train.release`")
    return str(version.run_id)


def _cost(folder: Path) -> Cost:
    description = read_description(folder)
    with torch.device("meta"):
        network = CopydeskModel(description.network)
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bytes=sum((folder / file).stat().st_size for file in read_manifest(folder).files),
    )


def _experiment(store: Store, version: Version) -> Experiment:
    """Return the experiment that made a version, as its run keeps it."""
    run_id = _run_of(version)
    for file in ("config_changed.yaml", "config.yaml"):
        if content := read_artifact(store, run_id, file):
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / file
                path.write_text(content, "utf-8")
                return load_experiment(path)
    raise GateError(f"the run {run_id} of version {version.version} has no config.yaml: evaluate both models")


def _score_again(folder: Path, version: Version, experiment: Experiment) -> list[dict[str, Any]]:
    """Score a model on prepared validation pages, if these are the ones that it did not train on."""
    if "validation" in read_manifest(folder).run.get(TRAINED_ON, ""):
        raise GateError(
            f"version {version.version} was fitted again on validation pages (fit.refit), so only test can judge it: "
            "compare the model of the same settings before it, and move the alias by hand"
        )
    log.info("version %s has no counts by page: scoring %s", version.version, experiment.prepared)
    file = experiment.prepared / "pages" / "validation.parquet"
    pages = load_rows(experiment.prepared, "pages", "validation")
    if sha256_of(file) != read_manifest(folder).run.get("data/pages/validation"):
        raise GateError(
            f"version {version.version} was made with other validation pages than {file}, and may have trained on "
            "these: run `python -m train.evaluate` with its own config"
        )
    topics = read_topics(experiment.prepare.topics)
    if read_description(folder).topics != list(topics.topics):
        raise GateError(f"version {version.version} has other topics than {experiment.prepare.topics}: compare by hand")
    predictor = copydesk.load(folder, device=experiment.evaluate.device)
    read = predictor.predict([Document(row["content"], kind=row["kind"]) for row in pages])
    scored = score_pages(predictor, read, pages, [resplit(row) for row in pages], topics=topics)
    return page_table(scored, topics=topics, out_of_fold=True)


def _described(candidate: Candidate) -> dict[str, Any]:
    return {
        "version": candidate.version,
        "run_id": candidate.run_id,
        **dataclasses.asdict(candidate.cost),
        "counts": candidate.counted,
        "test": candidate.test,
    }


def _conclude(
    store: Store,
    name: str,
    new: Version,
    verdict: Verdict,
    differences: dict[str, Difference],
    details: dict[str, Any],
) -> Promotion:
    """Log the report, then move the alias."""
    run_id = _run_of(new)
    rows = {one: {**dataclasses.asdict(found), "gain": found.gain} for one, found in differences.items()}
    content = {
        "model": name,
        "version": str(new.version),
        **dataclasses.asdict(verdict),
        **details,
        "scores": rows,
    }
    report = _report(content)
    store.log_text(run_id, json.dumps(content, indent=1) + "\n", f"{REPORT}.json")
    store.log_text(run_id, report, f"{REPORT}.md")
    now = int(time.time() * 1000)
    numbers = {f"{one}_{kind}": row[kind] for one, row in rows.items() for kind in ("gain", "low", "high", "p")}
    numbers["promoted"] = float(verdict.promoted)
    write_metrics(store, run_id, [(f"promotion/{one}", value, now, 0) for one, value in numbers.items()])
    if verdict.promoted:
        store.set_registered_model_alias(name, CHAMPION, new.version)
    return Promotion(name, verdict, str(new.version), report)


def _report(content: dict[str, Any]) -> str:
    done = "is the champion now" if content["promoted"] else "is refused"
    lines = [f"# {content['model']}: version {content['version']} {done}", "", f"{content['reason']}.", ""]
    if content["scores"]:
        new, old = content[CHALLENGER], content[CHAMPION]
        lines.append(
            f"Validation, {content['pages']} pages of {content['sites']} sites that both were scored on, topics out of "
            f"fold; {content['samples']} paired resamples of sites, then pages. The interval is from 5 % to 95 %. "
            f"Margins: {content['margin']} of macro F1 for a cheaper model, {content['label_margin']} of any label."
        )
        lines += ["", "| | champion | challenger | difference | interval | p | test: champion, challenger |"]
        lines.append("|---|---|---|---|---|---|---|")
        for one, row in content["scores"].items():
            test = ", ".join(_shown(side["test"].get(one)) for side in (old, new))
            lines.append(
                f"| {one} | {row['champion']:.4f} | {row['challenger']:.4f} | {row['gain']:+.4f} "
                f"| {row['low']:+.4f} … {row['high']:+.4f} | {row['p']:.4f} | {test} |"
            )
        lines += [f"| {kind} | {old[kind]:,} | {new[kind]:,} | {new[kind] - old[kind]:+,} | | | |" for kind in _COSTS]
        lines.append("")
        for alias, side in ((CHAMPION, old), (CHALLENGER, new)):
            lines.append(f"- {alias}: version {side['version']}, run {side['run_id']}, counts: {side['counts']}")
    return "\n".join(lines) + "\n"


_COSTS = [field.name for field in dataclasses.fields(Cost)]


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{score:.4f}"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description="Make the challenger the champion, if it is better, or cheaper and not worse."
    )
    parser.add_argument("--model", default=NAME, metavar="NAME", help="the registered model; default: %(default)s")
    for option, default, meaning in (
        ("--margin", MARGIN, "of macro F1, within which a cheaper model may be worse"),
        ("--label-margin", LABEL_MARGIN, "by which F1 of no label, nor of the topics, may be lower"),
    ):
        parser.add_argument(option, type=float, default=default, metavar="F1", help=f"{meaning}; default: %(default)s")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the bootstrap; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.margin < 0 or options.label_margin < 0 or options.samples < 100:
        parser.error("expected margins of at least 0, and at least 100 samples")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    try:
        found = promote(
            options.model, margin=options.margin, label_margin=options.label_margin, samples=options.samples
        )
    except (ValueError, OSError, StoreError) as error:
        parser.exit(2, f"promote: {error}\n")
    print(found.report)
    return 0 if found.verdict.promoted else 1


if __name__ == "__main__":
    raise SystemExit(main())
