"""Writes the report of a run as one HTML file, which asks for nothing outside of itself.

`report.html.jinja` beside this file is the page. Jinja2 is the extra `report`, imported when a report is written.
"""

import base64
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import Trainer

from thinned.evaluation import score_tables
from thinned.evaluation.figures import CAPTIONS
from thinned.evaluation.provenance import stored_provenance
from thinned.evaluation.score_tables import TITLES, WORST_CLASSES, Evaluation, interval, missed_classes, worst_first
from thinned.files import whole_file
from thinned.uncertainty.detection import DETECTION
from thinned.uncertainty.scores import SCORES


class EmbeddedFigure(NamedTuple):
    """Holds a figure that is part of the page."""

    caption: str  # also stands for the figure if it cannot be seen
    uri: str  # its content, `data:...`
    width: int  # of its natural size, in CSS pixels


def write_html_report(trainer: Trainer, run: Path, predicted: Path, evaluation: Evaluation) -> None:
    """Writes `report.html` into the folder of a run, whose rows are in `predicted`; ValueError without Jinja2."""
    config = run / "config.yaml"
    provenance = stored_provenance(predicted / "predictions.parquet") or {}
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file() and path != run / "report.html"]
    page = html_report(
        evaluation,
        run,
        config.read_text(encoding="utf-8") if config.exists() else "",
        what_was_run(trainer, provenance),
        embedded_figures([predicted, run]),
        [str(path) for path in files if path.parts[0] not in ("wandb", ".claim")],
    )
    with whole_file(run / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def html_report(
    evaluation: Evaluation,
    run: Path,
    config: str = "",
    facts: Mapping[str, str] | None = None,
    figures: Sequence[EmbeddedFigure] = (),
    files: Sequence[str] = (),
) -> str:
    """Returns the page of an evaluation; `config` is YAML, `facts` say what was run, `files` are paths in the run."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ValueError("Expected the package jinja2 for report.html: pip install 'thinned[report]'") from error
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    with_minus = {"interval": lambda *args: interval(*args).replace("-", "−")}
    environment.filters |= {"number": number, "asides": asides, **with_minus}
    baseline = next(iter(evaluation["ways"].values()))
    return environment.get_template("report.html.jinja").render(
        evaluation=evaluation,
        ways=evaluation["ways"],
        baseline=baseline,
        name=run.parent.name,
        run_id=run.name,
        title=TITLES.get(evaluation["split"], evaluation["split"]),
        task=task_of(yaml.safe_load(config) or {}),
        verdicts=score_tables.verdicts(evaluation),
        remarks=remarks(evaluation),
        labels={key: re.sub(" (?=[↑↓])", "\u00a0", score.label) for key, score in (SCORES | DETECTION).items()},
        headline=score_tables.headline(evaluation),
        classes=worst_first(baseline["recall"]),
        shifted=score_tables.shifted_sets(evaluation),
        foreign=score_tables.foreign_measures(evaluation),
        all_sets={evaluation["split"]: evaluation} | evaluation.get("sets", {}),
        config=config,
        facts=facts or {},
        figures=figures,
        files=files,
    )


def number(value: float | None, digits: int = 4, sign: str = "") -> str:
    """Returns a number with so many decimals and a true minus sign; a dash for None.

    >>> number(-0.25), number(0.25, 2, "+"), number(-0.00001), number(None)
    ('−0.2500', '+0.25', '0.0000', '–')
    """
    return "–" if value is None else f"{value:{sign}z.{digits}f}".replace("-", "−")


def asides(sentence: str) -> list[str]:
    """Splits a sentence at the numbers that stand in brackets, which are every second part.

    >>> asides("better NLL (-0.1), Brier")
    ['better NLL ', '(-0.1)', ', Brier']
    """
    return re.split(r"(\([+-][^)]*\))", sentence)


def remarks(evaluation: Evaluation) -> list[str]:
    """Returns sentences on what to look at beside the verdict: what is left out, missed, worst, or well told."""
    sets, told = evaluation.get("sets", {}), dict[str, list[tuple[float, float, str]]]()
    found = [f"Set {name} is left out: {of_set['left_out']}." for name, of_set in sets.items() if "left_out" in of_set]
    found += missed_classes(evaluation)
    lowest: dict[str, list[str]] = {}
    for way in evaluation["ways"].values():
        recalls = {name: of["value"] for name, of in way["recall"].items()}
        worst = worst_first(way["recall"])[:WORST_CLASSES]
        if listed := ", ".join(f"{name} {number(recalls[name], 3)}" for name in worst if recalls[name] < 1):
            lowest.setdefault(listed, []).append(way["label"])
    found += [f"Lowest recall: class {listed} ({'; '.join(labels)})." for listed, labels in lowest.items()]
    for label, of_set, key in score_tables.foreign_measures(evaluation):
        name, _, measure = label.rpartition(": ")
        for way in of_set["ways"].values():
            if score := way["scores"].get(key):
                auroc = f"{measure} of {way['label']}, AUROC {number(score['value'], 3)} {interval(score, 3)}"
                told.setdefault(name, []).append((score["value"], score["low"] or 0, auroc))
    for name, aurocs in told.items():
        _, low, auroc = max(aurocs)
        best = "Best at telling" if low > 0.5 else "Nothing is known to beat chance at telling"
        found.append(f"{best} {name} from the test: {auroc}.")
    return found


def task_of(config: Mapping[str, Any]) -> str:
    """Names the task, the net and the data of a config.

    >>> task_of({"model": {"class_path": "tasks.Task"}, "data": {"init_args": {"path": "digits"}}})
    'Task, digits'
    """
    model, data = config.get("model", {}), config.get("data", {})
    net = model.get("init_args", {}).get("net", {})
    classes = [part.get("class_path", "").rpartition(".")[2] for part in (model, net)]
    return ", ".join(filter(None, [*classes, str(data.get("init_args", {}).get("path", ""))]))


def what_was_run(trainer: Trainer, provenance: Mapping[str, Any]) -> dict[str, str]:
    """Returns the command, the code, the device and the versions of this process, and what has decided the rows."""
    device, processes = trainer.strategy.root_device, trainer.world_size
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    try:
        commit = subprocess.run([*git, "--abbrev=40", "--dirty=, with changes"], capture_output=True, text=True).stdout
    except OSError:  # there is no git
        commit = ""
    facts = {
        "Command": shlex.join(["python", *sys.argv]),
        "Commit": commit.strip(),
        "Device": f"{kind}, {processes} process{'es' * (processes > 1)}, precision {trainer.precision}",
        "Date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "Versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
        "Dropout": ", ".join(f"{site} {rate}" for site, rate in provenance.get("dropout", {}).items()),
        "Checkpoint": f"SHA-256 {digest}" if (digest := provenance.get("checkpoint")) else "",
    }
    return {name: fact for name, fact in facts.items() if fact}


def embedded_figures(folders: Sequence[Path]) -> list[EmbeddedFigure]:
    """Returns the figures that lie in the folders, in the order of their captions, each in its smaller file."""
    found = []
    for name, caption in CAPTIONS.items():
        if paths := [path for folder in folders for path in folder.glob(f"figures/{name}.*")]:
            path = min(paths, key=lambda path: path.stat().st_size)
            content, kind = path.read_bytes(), {".svg": "svg+xml", ".png": "png"}[path.suffix]
            uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
            found.append(EmbeddedFigure(caption, uri, natural_width(content)))
    return found


def natural_width(content: bytes) -> int:
    """Returns the natural width of a PNG of 150 pixels an inch, or of an SVG in points, in CSS pixels."""
    if points := re.search(rb'<svg[^>]*?\swidth="([\d.]+)pt"', content[:2000]):
        return round(float(points[1]) * 96 / 72)
    return round(int.from_bytes(content[16:20], "big") * 96 / 150)
