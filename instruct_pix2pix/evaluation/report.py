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

from instruct_pix2pix.evaluation.edits import CEILING, IDENTITY, MODEL, THROUGH_VAE
from instruct_pix2pix.evaluation.metrics import METRICS, Metric
from instruct_pix2pix.evaluation.summary import by_task, cell
from instruct_pix2pix.files import write_text
from instruct_pix2pix.images import read_image

CASES = 40  # shown as pictures, at most
TABLE_IMAGES = 5000  # listed, at most
PAGE_BYTES = 9_500_000  # pictures are added while the page stays below
SIDE = 512  # the longest one of a picture, in pixels
LONGEST_TEXT = 300  # of a name or an instruction, in characters
TITLES = {  # of the kinds of rows that are no model
    IDENTITY: "input (doing nothing)",
    THROUGH_VAE: "input through autoencoder",
    CEILING: "target through autoencoder (ceiling)",
}


def write_report(output_dir: Path, metrics: dict, rows: list[dict]) -> None:
    """Write `output_dir`/report.html from what metrics.json and per_image.csv hold and the PNG files beside them.

    `rows`: {"name", "task", "model", "instruction", <metric>: value, ...}, one for every image and row kind, "identity"
    among them. Pictures are <output_dir>/{input,target,<model>}/<name>.png.
    """
    images = {}  # name -> label -> row
    for row in rows:
        images.setdefault(row["name"], {})[row["model"]] = row
    lines = metrics["models"]
    models = [label for label, of in lines.items() if of["kind"] == MODEL]
    titles = {}  # a second autoencoder's rows are labelled KIND-MODEL
    for label, of in lines.items():
        kind = of["kind"]
        titles[label] = TITLES[kind] + label.removeprefix(kind).replace("-", " of ", 1) if kind in TITLES else label
    first = models[0] if models else IDENTITY
    shown = [metric for metric in METRICS.values() if any(metric.name in row for row in rows)]
    gains = {name: _gain(of, first, shown[0]) for name, of in images.items()}  # in PSNR
    ranked = sorted(images, key=gains.get)
    trained = ""
    for label in models:
        facts = {"edit_seconds_per_image": metrics["edit_seconds_per_image"].get(label)}
        trained += f"<h4>{_text(label)}</h4>{_facts(facts | lines[label].get('training', {}))}"
    parts = {
        "title": escape(f"Evaluation of {', '.join(models or [first])}"),
        "count": f"{len(images):,}",
        "listed": f"{min(len(images), TABLE_IMAGES):,}",
        "left_out": f"{metrics['rows_left_out']:,}",
        "gain": f"{shown[0].label} of {_text(titles[first])}",
        "summary": _summary(lines, titles),
        "protocol": "".join(f"<li>{_text(line)}</li>" for line in metrics["protocol"]),
        "settings": _facts(metrics["settings"]),
        "environment": _facts(metrics["environment"]),
        "models": trained,
        "skipped": _facts({METRICS[name].label: why for name, why in metrics["skipped_metrics"].items()}),
        "data": _data(images, titles, models, shown),
    }
    room = PAGE_BYTES - len("".join(parts.values()).encode("utf-8", "backslashreplace"))
    cases = {}  # name -> HTML
    for place in range(min(len(ranked), CASES)):  # the worst, the best, the second worst, ...
        name = ranked[-1 - place // 2 if place % 2 else place // 2]
        number = list(images).index(name)
        case = _case(Path(output_dir), number, images[name], gains[name], models, titles, shown)
        room -= len(case)
        if room < 0:
            break
        cases[name] = case
    parts |= {"cases": "".join(cases[name] for name in sorted(cases, key=gains.get)), "pictured": len(cases)}
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(Path(output_dir) / "report.html", template.substitute(parts))


def _gain(of: dict, label: str, metric: Metric) -> float:
    return of[label][metric.name] - of[IDENTITY][metric.name]


def _short(value) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _text(value) -> str:
    """Any text as HTML; what is written right to left turns nothing beside it."""
    return f"<bdi>{escape(_short(value))}</bdi>"


def _score(value: float | None, metric: Metric, sign: str = "") -> str:
    return "–" if _rounded(value, metric) is None else f"{value:{sign}.{metric.decimals}f}".replace("-", "−")


def _table(shown: list[Metric], groups: dict[str, dict[str, list[str]]]) -> str:
    """{a group's title: {a line's heading: a cell for each of the metrics}}, the cells HTML, as a table."""
    table = '<table><thead><tr><th scope="col">row</th>'
    table += "".join(f'<th scope="col">{metric.title}</th>' for metric in shown) + "</tr></thead>"
    for title, lines in groups.items():
        table += "<tbody>"
        table += f'<tr><th colspan="{1 + len(shown)}" scope="rowgroup">{_text(title)}</th></tr>' if title else ""
        for name, cells in lines.items():
            table += f'<tr><th scope="row">{_text(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        table += "</tbody>"
    return table + "</table>"


def _summary(models: dict[str, dict], titles: dict[str, str]) -> str:
    """What `summarize` gives. The best model of a column is in bold; differences whose interval leaves zero out are
    marked as better or worse."""
    shown = [metric for metric in METRICS.values() if any(metric.name in of["all"] for of in models.values())]
    groups = {}
    for task, group in by_task(models).items():
        edits = [found for label, minus, found in group if models[label]["kind"] == MODEL and minus is None]
        lines = groups[f"{'all images' if task == 'all' else task} ({group[0][2]['images']:,})"] = {}
        for label, minus, found in group:
            title = titles[label] if minus is None else f"{label} minus {'input' if minus == IDENTITY else minus}"
            lines[title] = [_mean(found, metric, minus is not None, edits) for metric in shown]
    return _table(shown, groups)


def _mean(found: dict, metric: Metric, is_difference: bool, edits: list[dict]) -> str:
    """{metric: {"mean", "low", "high"}} as HTML; of one image, and of a measure of the whole set, the mean only."""
    if (of := found.get(metric.name)) is None:
        return "–"
    mean, _, ends = cell(of, metric.decimals, "+" if is_difference else "").replace("-", "−").partition(" ")
    text = mean + (f"<small>{ends}</small>" if ends else "")
    if is_difference:
        clear = of["low"] is not None and not of["low"] <= 0 <= of["high"]
        verdict = ("better" if (of["low"] > 0) == (metric.better == "higher") else "worse") if clear else ""
        return f'<span class="{verdict}">{text}</span>'
    means = [other[metric.name]["mean"] for other in edits if metric.name in other]
    is_best = found in edits and len(means) > 1 and of["mean"] == (max if metric.better == "higher" else min)(means)
    return f"<b>{text}</b>" if is_best else text


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
    folder: Path, number: int, rows: dict, gain: float, models: list[str], titles: dict, shown: list[Metric]
) -> str:
    """One image: input, target and every model side by side, each with its first scores, and below them all scores."""
    row, figures = rows[IDENTITY], ""
    brief = [metric for metric in shown if metric.name in ("psnr", "ssim", "lpips")]
    for label in ["input", "target", *models]:
        scores = rows.get(IDENTITY if label == "input" else label, {})
        said = [f"{m.label} {_score(scores.get(m.name), m)}" for m in brief if scores]
        if label in models:
            said[0] += f" ({_score(_gain(rows, label, shown[0]), shown[0], '+')})"
        picture = _picture(folder / label / f"{row['name']}.png", label)
        figures += f"<figure>{picture}<figcaption><b>{_text(label)}</b>{'<br>'.join(said)}</figcaption></figure>"
    lines = {titles[label]: [_score(of.get(m.name), m) for m in shown] for label, of in rows.items()}
    return (
        f'<article id="case-{number}" data-gain="{gain:.4f}"><h3>{_text(row["name"])}</h3>'
        f"<p>{_text(row['task'])}: <q>{_text(row['instruction'])}</q></p>"
        f'<div class="pictures">{figures}</div><details><summary>All scores</summary>'
        f'<div class="wide" tabindex="0">{_table(shown, {"": lines})}</div></details></article>\n'
    )


def _picture(path: Path, label: str) -> str:
    """An image file as an <img> that holds its pixels, scaled down to SIDE."""
    image, buffer = read_image(path), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(buffer, "WEBP", quality=85)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{source}" alt="{escape(_short(label))}" width="{image.width}" height="{image.height}">'


def _rounded(value: float | None, metric: Metric) -> float | None:
    return round(value, metric.decimals + 1) if value is not None and math.isfinite(value) else None


def _data(images: dict, titles: dict[str, str], models: list[str], shown: list[Metric]) -> str:
    """What the page's script sorts and filters, as JSON that cannot end the <script> around it.

    "images": [name, task, place of its instruction]; "scores": metric -> image -> row -> number, the input's first.
    """
    instructions, scores, listed = {}, {metric.name: [] for metric in shown}, []
    for name, of in list(images.items())[:TABLE_IMAGES]:
        place = instructions.setdefault(_short(of[IDENTITY]["instruction"]), len(instructions))
        listed.append([_short(name), _short(of[IDENTITY]["task"]), place])
        for metric in shown:
            scores[metric.name].append([_rounded(of[label].get(metric.name), metric) for label in titles])
    data = {
        "rows": list(map(_short, titles.values())),
        "labels": ["input", "target", *map(_short, models)],
        "metrics": [[metric.name, metric.title, metric.decimals] for metric in shown],
        "instructions": list(instructions),
        "images": listed,
        "scores": scores,
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
