"""The evaluation's page, read as a browser reads it: whole, escaped, with the numbers and pictures it was given."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.evaluation import report
from instruct_pix2pix.evaluation.metrics import METRICS

BASELINES = ["identity", "identity_through_vae", "vae_ceiling"]
VOID = {"meta", "img", "input", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"quotes' & &amp; `ticks`",
    "{{ title }} {% if %} $title ${data} <!--data--> %s",
    "\u202eright to left \u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "emoji \U0001f469\u200d\U0001f3a8 and a line separator \u2028 here",
]


class Page(HTMLParser):
    """A page's elements as (tag, attributes, text of all that is within); fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open = [], []
        text = path.read_text(encoding="utf-8")
        self.feed(text)
        self.close()
        assert not self.open
        self.size = len(text.encode())
        self.data = json.loads(next(text for tag, attributes, text in self.all("script") if "type" in attributes))

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag):
        return [element for element in self.elements if element[0] == tag]

    def texts(self, tag):
        return [text for _, _, text in self.all(tag)]


def interval(values) -> dict:
    return {"mean": float(np.mean(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def summarize(rows, kinds, tasks) -> dict:
    names = [name for name in METRICS if name in rows[0]]

    def group(kind, task=None):
        chosen = [row for row in rows if row["model"] == kind and task in (None, row["task"])]
        return {"images": len(chosen)} | {name: interval([row[name] for row in chosen]) for name in names}

    models = {}
    for label in kinds:
        kind = {"kind": label.partition("-")[0] if label.startswith(tuple(BASELINES)) else "model"}
        models[label] = kind | {"all": group(label), "tasks": {task: group(label, task) for task in tasks}}
    return {
        "models": models,
        "protocol": ["set: photos"],
        "settings": {"models": {"a": "folder/a"}, "seed": 0},
        "environment": {"device": "cpu"},
        "skipped_metrics": {"fid": "torchmetrics is not installed"},
        "rows_left_out": 2,
        "edit_seconds_per_image": {kind: 0.5 for kind in kinds if kind not in BASELINES},
    }


@pytest.fixture
def evaluated(tmp_path):
    """`evaluated(names, models, ...)` -> the folder, metrics and rows of an evaluation, images of several sizes."""

    def make(
        names,
        models,
        tasks=("blur", "noise"),
        instructions=("edit it",),
        metrics=("psnr", "ssim"),
        files=True,
        bounds=BASELINES,
    ):
        rng, rows, labels = np.random.default_rng(0), [], [*bounds, *models]
        drawn = rng.uniform(10, 40, (len(names), len(labels), len(metrics))).round(6).tolist()
        for kind in ["input", "target", *models] if files else ():
            (tmp_path / kind).mkdir()
            for number, name in enumerate(names):
                pixels = rng.integers(0, 256, (40 + 8 * number, 64, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / kind / f"{name}.png")
        for number, name in enumerate(names):
            about = {"name": name, "task": tasks[number % len(tasks)]}
            about["instruction"] = instructions[number % len(instructions)]
            for kind, scores in zip(labels, drawn[number], strict=True):
                rows.append(about | {"model": kind} | dict(zip(metrics, scores, strict=True)))
        return tmp_path, summarize(rows, labels, tasks), rows

    return make


def write(folder, metrics, rows) -> Page:
    report.write_report(folder, metrics, rows)
    return Page(folder / "report.html")


def test_the_page_holds_every_score_and_the_pictures_worst_first(evaluated):
    models = ["first", "second"]
    folder, metrics, rows = evaluated([f"photo{number}" for number in range(7)], models)
    page = write(folder, metrics, rows)
    titles = ["input (doing nothing)", "input through autoencoder", "target through autoencoder (ceiling)", *models]
    assert page.data["rows"] == titles
    for row in rows:
        place = [name for name, _, _ in page.data["images"]].index(row["name"])
        _, task, instruction = page.data["images"][place]
        assert task == row["task"] and page.data["instructions"][instruction] == row["instruction"]
        for name in ("psnr", "ssim"):
            value = page.data["scores"][name][place][[*BASELINES, *models].index(row["model"])]
            assert value == round(row[name], METRICS[name].decimals + 1)
    assert dict(zip(page.texts("dt"), page.texts("dd"), strict=True)) == {
        **{"models: a": "folder/a", "seed": "0", "device": "cpu", "edit_seconds_per_image": "0.5"},
        **{"FID": "torchmetrics is not installed"},
    }
    cells = page.texts("td")
    for of in metrics["models"].values():
        for group in (of["all"], *of["tasks"].values()):
            ends = group["psnr"]
            assert f"{ends['mean']:.2f}[{ends['low']:.2f}, {ends['high']:.2f}]" in cells
    by_kind = {kind: [row["psnr"] for row in rows if row["model"] == kind] for kind in ("identity", "first")}
    gains = [first - start for first, start in zip(by_kind["first"], by_kind["identity"], strict=True)]
    order = [f"photo{number}" for number in np.argsort(gains)]
    assert page.texts("h3")[:7] == order
    assert [float(attributes["data-gain"]) for _, attributes, _ in page.all("article")] == pytest.approx(
        sorted(gains), abs=1e-4
    )
    images = [attributes for _, attributes, _ in page.all("img") if "src" in attributes]
    assert [image["alt"] for image in images] == ["input", "target", *models] * 7
    for image, name in zip(images, np.repeat(order, 4), strict=True):
        kind, content = image["src"].split(",")
        assert kind == "data:image/webp;base64"
        shown = Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")
        saved = Image.open(folder / image["alt"] / f"{name}.png")
        assert shown.size == saved.size == (int(image["width"]), int(image["height"]))
        distance = [
            np.abs(np.asarray(shown, float) - np.asarray(other, float)).mean() for other in (saved, saved.rotate(180))
        ]
        assert distance[0] < distance[1]


def test_nothing_is_fetched(evaluated):
    page = write(*evaluated(["a", "b", "c"], ["first"]))
    for tag, attributes, _ in page.elements:
        assert tag not in ("link", "iframe", "object") and "srcset" not in attributes
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes
    text = (page.texts("style")[0] + page.texts("script")[-1]).lower()
    assert not any(word in text for word in ("url(", "@import", "http:", "https:", "fetch(", "xmlhttprequest"))
    policy = next(a["content"] for _, a, _ in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_what_a_user_typed_is_text(evaluated):
    names = ["<script>alert(1)", '"><img src=x onerror=alert(1)>', "'$title {{", *HOSTILE[4:], "plain"]
    models = ["<b onclick=alert(1)>&amp;", '" autofocus onfocus="alert(1)']
    folder, metrics, rows = evaluated(names, models, HOSTILE[:3], HOSTILE)
    metrics["settings"] = dict(zip(HOSTILE, reversed(HOSTILE), strict=True))
    metrics["protocol"] = HOSTILE
    difference = {"images": 6, "psnr": interval([1])}
    metrics["models"][models[1]]["minus"] = {
        models[0]: {"all": difference, "tasks": dict.fromkeys(HOSTILE[:3], difference)}
    }
    page = write(folder, metrics, rows)
    said = [" ".join(text.split()) for text in HOSTILE]  # line separators, too, are spaces in a line of text
    assert len(page.all("script")) == 2
    assert not any(
        name.startswith("on") or name == "autofocus" for _, attributes, _ in page.elements for name in attributes
    )
    assert page.texts("title") == page.texts("h1") == [f"Evaluation of {', '.join(models)}"]
    assert set(page.texts("h3")[:6]) == {" ".join(name.split()) for name in names}
    assert set(page.texts("q")) == set(said) == set(page.data["instructions"])
    assert page.texts("li") == said and page.texts("dt")[:6] == said and page.texts("dd")[:6] == said[::-1]
    assert [task for _, task, _ in page.data["images"][:3]] == said[:3] and page.data["labels"] == [
        "input",
        "target",
        *models,
    ]
    assert {attributes["alt"] for _, attributes, _ in page.all("img")} == {"", "input", "target", *models}
    isolated = page.texts("bdi")  # right-to-left text turns nothing beside it
    assert all(isolated.count(text) for text in (*page.texts("h3")[:6], *said, *models))


def test_better_and_worse_follow_the_metric(evaluated):
    tasks = ["better", "worse", "open"]
    folder, metrics, rows = evaluated(["a", "b", "c"], ["first", "second"], tasks, metrics=("psnr", "lpips"))
    ends = dict(zip(tasks, ((0.5, 2.0), (-2.0, -0.5), (-0.5, 0.5)), strict=True))
    found = {task: {"images": 1} | dict.fromkeys(("psnr", "lpips"), interval(ends[task])) for task in tasks}
    one = {"images": 3, "psnr": {"mean": 1.0, "low": None, "high": None}}
    metrics["models"]["second"]["minus"] = {"first": {"all": one, "tasks": found}}
    page = write(folder, metrics, rows)
    verdicts = [attributes["class"] for _, attributes, _ in page.all("span") if attributes.get("class") != "quiet"]
    assert verdicts == ["", "better", "worse", "worse", "better", "", ""]
    assert "−1.25[−2.00, −0.50]" in page.texts("td") and "+1.00" in page.texts("td")
    assert page.texts("th").count("second minus first") == 4


def test_a_second_autoencoders_rows_are_no_models(evaluated):
    bounds = [*BASELINES, "identity_through_vae-second", "vae_ceiling-second"]
    page = write(*evaluated(["a", "b", "c"], ["first", "second"], bounds=bounds))
    titles = ["input through autoencoder of second", "target through autoencoder (ceiling) of second"]
    assert page.data["rows"][3:] == [*titles, "first", "second"]
    assert page.data["labels"] == ["input", "target", "first", "second"]
    assert page.texts("h1") == ["Evaluation of first, second"]
    assert len([attributes for _, attributes, _ in page.all("img") if "src" in attributes]) == 3 * 4


def test_the_best_model_is_bold_and_a_missing_score_a_dash(evaluated):
    folder, metrics, rows = evaluated(["a", "b", "c"], ["first", "second"], ["all"], metrics=("psnr", "lpips"))
    rows[3]["lpips"] = float("nan")
    del rows[4]["lpips"]
    for label, psnr, lpips in (("first", 20.0, 0.5), ("second", 21.0, 0.75), ("vae_ceiling", 90.0, 0.0)):
        metrics["models"][label]["all"] |= {"psnr": interval([psnr]), "lpips": interval([lpips])}
    metrics["models"]["first"]["all"]["fid"] = {"mean": 12.5, "low": None, "high": None}
    page = write(folder, metrics, rows)
    bold = [text for text in page.texts("b") if text not in ("input", "target", "first", "second")]
    assert sorted(bold) == ["0.500[0.500, 0.500]", "21.00[21.00, 21.00]"]
    assert "12.5" in page.texts("td") and "–" in page.texts("td")
    assert page.data["scores"]["lpips"][0][3:] == [None, None]


def test_identity_alone_has_a_page(evaluated):
    folder, metrics, rows = evaluated(["a", "b", "c"], [])
    page = write(folder, metrics, rows)
    assert len(page.all("article")) == 3 and page.texts("h1") == ["Evaluation of identity"]
    assert page.data["labels"] == ["input", "target"]


def test_pictures_come_from_both_ends_and_only_while_there_is_room(evaluated, monkeypatch):
    folder, metrics, rows = evaluated([f"photo{number:02}" for number in range(30)], ["first"])
    monkeypatch.setattr(report, "CASES", 9)
    gains = [float(attributes["data-gain"]) for _, attributes, _ in write(folder, metrics, rows).all("article")]
    identity, first = ([row["psnr"] for row in rows if row["model"] == kind] for kind in ("identity", "first"))
    every = sorted(np.subtract(first, identity))
    assert gains == pytest.approx([*every[:5], *every[-4:]], abs=1e-4)
    monkeypatch.setattr(report, "PAGE_BYTES", 100_000)
    page = write(folder, metrics, rows)
    assert 2 <= len(page.all("article")) < 9 and page.size < 100_000 + 20_000  # the template is counted apart
    assert max(float(attributes["data-gain"]) for _, attributes, _ in page.all("article")) == pytest.approx(
        every[-1], abs=1e-4
    )


def test_thousands_of_images_of_six_models_stay_below_ten_megabytes(evaluated, monkeypatch):
    monkeypatch.setattr(report, "CASES", 0)
    names = [f"a_name_of_some_length_{number:05}" for number in range(5200)]
    instructions = [f"{number} " + "words " * 200 for number in range(1000)]
    page = write(*evaluated(names, list("abcdef"), ["x"], instructions, list(METRICS), files=False))
    assert len(page.data["images"]) == 5000 and page.size < 7_000_000
    assert max(map(len, page.data["instructions"])) == 300
