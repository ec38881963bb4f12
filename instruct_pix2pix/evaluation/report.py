"""The evaluation as one page, report.html, that needs no network and no other file.

The worst and the best images, by the first model's gain over doing nothing, are there as pictures; the scores of all in
a table to sort and filter. All that a user gave (names, instructions, labels, settings) is escaped.
"""

import base64
import io
import json
import math
from html import escape
from pathlib import Path
from string import Template

from instruct_pix2pix.evaluation.metrics import METRICS, Metric
from instruct_pix2pix.files import write_text
from instruct_pix2pix.images import read_image

CASES, FEWEST = 40, 12  # shown as pictures: at most, and where there are many models or scores at least
TABLE_IMAGES = 5000  # listed, at most
PAGE_BYTES = 9_500_000  # pictures are added while the page stays below
SIDES = (512, 384, 256)  # the longest one of a picture in pixels, the first with which FEWEST cases would fit
LONGEST_TEXT = 300  # of a name or an instruction, in characters
KINDS = {  # the rows that are no model, as the page calls them
    "identity": "input (doing nothing)",
    "identity_through_vae": "input through autoencoder",
    "vae_ceiling": "target through autoencoder (ceiling)",
}


def write_report(output_dir: Path, metrics: dict, rows: list[dict]) -> None:
    """Write `output_dir`/report.html from what metrics.json and per_image.csv hold and the PNG files beside them.

    `rows`: {"name", "task", "model", "instruction", <metric>: value, ...}, one for every image and row kind, "identity"
    among them. Pictures are <output_dir>/{input,target,<model>}/<name>.png.
    """
    images = {}  # name -> row kind -> row
    for row in rows:
        images.setdefault(row["name"], {})[row["model"]] = row
    kinds = metrics["models"]
    models = [label for label in kinds if label not in KINDS]
    first = models[0] if models else "identity"
    shown = [metric for metric in METRICS.values() if any(metric.name in row for row in rows)]
    gains = {name: _gain(of, first, shown[0]) for name, of in images.items()}  # in PSNR
    ranked = sorted(images, key=gains.get)
    skipped = {
        METRICS[name].label if name in METRICS else name: why for name, why in metrics["skipped_metrics"].items()
    }
    trained = ""
    for label in models:
        facts = {"edit_seconds_per_image": metrics["edit_seconds_per_image"].get(label)}
        trained += f"<h4>{_text(label)}</h4>{_facts(facts | kinds[label].get('training', {}))}"
    parts = {
        "title": escape(f"Evaluation of {', '.join(models or [first])}"),
        "count": f"{len(images):,}",
        "listed": f"{min(len(images), TABLE_IMAGES):,}",
        "left_out": f"{metrics['rows_left_out']:,}",
        "gain": f"{shown[0].label} of {_text(first)}",
        "summary": _summary(kinds, models),
        "differences": _differences(metrics["differences"]),
        "protocol": "".join(f"<li>{_text(line)}</li>" for line in metrics["protocol"]),
        "settings": _facts(metrics["settings"]),
        "environment": _facts(metrics["environment"]),
        "models": trained,
        "skipped": _facts(skipped),
        "data": _data(images, list(kinds), models, shown),
    }
    room = PAGE_BYTES - len("".join(parts.values()).encode("utf-8", "backslashreplace"))
    cases, most = {}, room / FEWEST  # name -> HTML
    for place in range(min(len(ranked), CASES)):  # the worst, the best, the second worst, ...
        name = ranked[-1 - place // 2 if place % 2 else place // 2]
        number = list(images).index(name)
        for side in SIDES:
            case = _case(Path(output_dir), number, images[name], gains[name], models, shown, side)
            if len(case) <= most:
                break
        room -= len(case)
        if room < 0:
            break
        cases[name] = case
    parts |= {"cases": "".join(cases[name] for name in sorted(cases, key=gains.get)), "pictured": len(cases)}
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(Path(output_dir) / "report.html", template.substitute(parts))


def _gain(kinds: dict, label: str, metric: Metric) -> float:
    return kinds[label][metric.name] - kinds["identity"][metric.name]


def _short(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _text(value) -> str:
    """Any text, or the name of a row kind, as HTML; what is written right to left turns nothing beside it."""
    return f"<bdi>{escape(_short(KINDS.get(value, value)))}</bdi>"


def _score(value: float | None, metric: Metric, sign: str = "") -> str:
    return "–" if _rounded(value, metric) is None else f"{value:{sign}.{metric.decimals}f}".replace("-", "−")


def _interval(found: dict, metric: Metric, sign: str = "") -> str:
    """{"mean", "low", "high"} as HTML; of one image, and of a measure of the whole set such as FID, the mean only."""
    low, high = (_score(found.get(end), metric, sign) for end in ("low", "high"))
    return _score(found["mean"], metric, sign) + (f"<small>{low} to {high}</small>" if low != "–" else "")


def _table(heading: str, shown: list[Metric], groups: dict[str, dict[str, list[str]]]) -> str:
    """{a group's title: {a line's heading: a cell for each of the metrics}}, all HTML, as a table."""
    table = f'<table><thead><tr><th scope="col">{heading}</th>'
    for metric in shown:
        unit = f" <i>{metric.unit}</i>" if metric.unit else ""
        table += f'<th scope="col">{metric.label} {"↑" if metric.better == "higher" else "↓"}{unit}</th>'
    table += "</tr></thead>"
    for title, lines in groups.items():
        table += "<tbody>"
        table += f'<tr><th colspan="{1 + len(shown)}" scope="rowgroup">{title}</th></tr>' if title else ""
        for name, cells in lines.items():
            table += f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        table += "</tbody>"
    return table + "</table>"


def _summary(kinds: dict, models: list[str]) -> str:
    """Every row over all images, then for each task where there are several; the best model of a column in bold."""
    groups = {"all images": {kind: of["all"] for kind, of in kinds.items()}}
    tasks = dict.fromkeys(task for of in kinds.values() for task in of["tasks"])
    groups |= {task: {kind: of["tasks"][task] for kind, of in kinds.items()} for task in tasks if len(tasks) > 1}
    shown = [m for m in METRICS.values() if any(m.name in of for group in groups.values() for of in group.values())]
    tables = {}
    for task, group in groups.items():
        lines = tables[f"{_text(task)} ({group['identity']['images']:,})"] = {_text(kind): [] for kind in group}
        for metric in shown:
            means = [group[label][metric.name]["mean"] for label in models if metric.name in group[label]]
            best = (max if metric.better == "higher" else min)(means) if len(means) > 1 else None
            for kind, of in group.items():
                cell = _interval(of[metric.name], metric) if metric.name in of else "–"
                bold = kind in models and metric.name in of and of[metric.name]["mean"] == best
                lines[_text(kind)].append(f"<b>{cell}</b>" if bold else cell)
    return _table("row", shown, tables)


def _differences(differences: list[dict]) -> str:
    """Paired differences; those whose interval leaves zero out are marked as better or worse."""
    shown = [metric for metric in METRICS.values() if any(metric.name == one["metric"] for one in differences)]
    tables = {}
    for one in differences:
        lines = tables.setdefault(f"{_text(one['of'])} minus {_text(one['minus'])}", {})
        task = _text("all images" if one["task"] == "all" else one["task"])
        metric = METRICS[one["metric"]]
        verdict = ""
        if one["low"] is not None and not one["low"] <= 0 <= one["high"]:
            verdict = "better" if (one["low"] > 0) == (metric.better == "higher") else "worse"
        cells = lines.setdefault(task, ["–"] * len(shown))
        cells[shown.index(metric)] = f'<span class="{verdict}">{_interval(one, metric, "+")}</span>'
    return _table("task", shown, tables)


def _facts(facts: dict) -> str:
    """Names and JSON values as a list; a dict within gives a line for each of its own."""
    lines, flat = "", {}
    for name, value in facts.items():
        flat |= {f"{name}: {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    for name, value in flat.items():
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines += f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>"
    return f"<dl>{lines}</dl>" if lines else "<p>none</p>"


def _case(
    folder: Path, number: int, kinds: dict, gain: float, models: list[str], shown: list[Metric], side: int
) -> str:
    """One image: input, target and every model side by side, each with its first scores, and below them all scores."""
    row, figures = kinds["identity"], ""
    brief = [metric for metric in shown if metric.name in ("psnr", "ssim", "lpips")]

    for label in ["input", "target", *models]:
        scores = kinds.get("identity" if label == "input" else label, {})
        said = [f"{m.label} {_score(scores.get(m.name), m)}" for m in brief if scores]
        if label in models:
            said[0] += f" ({_score(_gain(kinds, label, shown[0]), shown[0], '+')})"
        picture = _picture(folder / label / f"{row['name']}.png", label, side)
        figures += f"<figure>{picture}<figcaption><b>{_text(label)}</b>{'<br>'.join(said)}</figcaption></figure>"
    lines = {_text(kind): [_score(of.get(m.name), m) for m in shown] for kind, of in kinds.items()}
    return (
        f'<article id="case-{number}" data-gain="{gain:.4f}"><h3>{_text(row["name"])}</h3>'
        f"<p>{_text(row['task'])}: <q>{_text(row['instruction'])}</q></p>"
        f'<div class="pictures">{figures}</div><details><summary>All scores</summary>'
        f'<div class="wide" tabindex="0">{_table("row", shown, {"": lines})}</div></details></article>\n'
    )


def _picture(path: Path, label: str, side: int) -> str:
    """An image file as an <img> that holds its pixels, scaled down to a longest `side`."""
    image, buffer = read_image(path), io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{source}" alt="{escape(_short(label))}" width="{image.width}" height="{image.height}">'


def _rounded(value: float | None, metric: Metric) -> float | None:
    return round(value, metric.decimals + 1) if value is not None and math.isfinite(value) else None


def _data(images: dict, kinds: list[str], models: list[str], shown: list[Metric]) -> str:
    """What the page's script sorts and filters, as JSON that cannot end the <script> around it.

    "images": [name, place of its task, place of its instruction]; "scores": metric -> image -> row kind -> number.
    """
    tasks, instructions, scores = {}, {}, {metric.name: [] for metric in shown}
    listed = []
    for name, of in list(images.items())[:TABLE_IMAGES]:
        about = of["identity"]
        task = tasks.setdefault(_short(about["task"]), len(tasks))
        listed.append([_short(name), task, instructions.setdefault(_short(about["instruction"]), len(instructions))])
        for metric in shown:
            scores[metric.name].append([_rounded(of[kind].get(metric.name), metric) for kind in kinds])
    data = {
        "kinds": [[kind, _short(KINDS.get(kind, kind))] for kind in kinds],
        "labels": ["input", "target", *map(_short, models)],
        "metrics": [[metric.name, metric.label, metric.unit, metric.decimals] for metric in shown],
        "tasks": list(tasks),
        "instructions": list(instructions),
        "images": listed,
        "scores": scores,
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
