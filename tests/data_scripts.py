"""What the tests of data_preparation/ share: run a script as a user does, make small photos, look into a dataset."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "data_preparation"
PHOTOS = sorted((ROOT / "assets/photos/train").glob("*.webp"))


def command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def run(script: str, *arguments, fails: int = 0, env: dict | None = None, cwd: Path | None = None) -> str:
    """Run a script; returns stdout, or where it `fails` with that exit code its one line on stderr.

    env: the whole environment, such as a loopback Hub's; left out, this process's own.
    """
    env = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(script, *arguments), capture_output=True, text=True, env=env, cwd=cwd, timeout=600)
    assert done.returncode == fails, done.stderr
    if not fails:
        return done.stdout
    message = done.stderr.replace("\r", "\n").strip().splitlines()[-1]  # progress bars may stand before it
    assert message.startswith(f"{script}: error: "), done.stderr
    assert "Traceback" not in done.stderr
    return message


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def make_photos(folder: Path, count: int, side: int = 64) -> Path:
    """`count` different small pictures cut out of real photographs, as PNG."""
    folder.mkdir(parents=True)
    for i in range(count):
        photo = Image.open(PHOTOS[i % len(PHOTOS)]).convert("RGB")
        photo.thumbnail((200, 200))
        left, top = 5 * (i // len(PHOTOS)), 3 * (i // len(PHOTOS))
        photo.crop((left, top, left + side + 8 * (i % 2), top + side)).save(folder / f"photo{i:04d}.png")
    return folder


def read_rows(dataset: Path, split: str) -> list[dict]:
    """A split's rows as plain values, images as the bytes that are stored."""
    import pyarrow.parquet as pq

    return [row for path in sorted(dataset.glob(f"data/{split}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def pixels(cell: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])))


def checksums(dataset: Path) -> dict[str, str]:
    return {
        path.relative_to(dataset).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


def plan_of(dataset: Path) -> list[dict]:
    return [json.loads(line) for line in (dataset / "plan.jsonl").read_text().splitlines()[1:]]


def skipped_of(dataset: Path) -> dict[str, str]:
    lines = (dataset / "skipped.jsonl").read_text().splitlines()
    return {record["source"]: record["reason"] for record in map(json.loads, lines)}
