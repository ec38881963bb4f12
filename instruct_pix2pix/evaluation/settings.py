"""recommended_settings.json beside a pipeline: the guidance, steps and scheduler that edit best, over all and by task.

evaluation/sweep.py finds them; inference and the model card use them. Nothing heavy is imported here.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from instruct_pix2pix.cli import UserError, first_line, guidance, whole_number

SETTINGS_FILE = "recommended_settings.json"
SCHEDULERS = {
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


class Setting(NamedTuple):
    """The keywords of `editing.edit` that a sweep chooses."""

    steps: int
    image_guidance_scale: float
    guidance_scale: float
    scheduler: str | None = None  # a key of SCHEDULERS; None is the pipeline's own

    @classmethod
    def of(cls, record: dict) -> "Setting":
        return cls(*(record[name] for name in cls._fields))

    def __str__(self) -> str:
        return f"{self.guidance_scale:g}/{self.image_guidance_scale:g}/{self.steps} {self.scheduler or 'own'}"


def scheduler_name(text: str) -> str | None:
    """An argparse type: a key of SCHEDULERS, or "own"."""
    if text != "own" and text not in SCHEDULERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a scheduler; give own, {', '.join(SCHEDULERS)}")
    return None if text == "own" else text


def read_settings(path: Path) -> dict:
    """{"all": a setting's fields, "tasks": {name: the same and "instructions": [...]}, and how they were found}.

    Raises UserError for a file that is not of this kind.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in [found["all"], *found["tasks"].values()]:
            whole_number(1)(str(entry["steps"]))
            guidance(str(entry["guidance_scale"])), guidance(str(entry["image_guidance_scale"]))
            scheduler_name(entry["scheduler"] or "own")
        [text.casefold() for entry in found["tasks"].values() for text in entry["instructions"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
    except argparse.ArgumentTypeError as error:
        problem = str(error)
    else:
        return found
    raise UserError(f"{path}: holds no settings ({problem}); take it away, or sweep again")


def choose_setting(found: dict, instruction: str) -> tuple[str, Setting]:
    """The name and the setting of the task that knows the instruction, whatever its case; else those over all."""
    text = instruction.strip().casefold()
    known = (name for name, task in found["tasks"].items() if text in map(str.casefold, task["instructions"]))
    name = next(known, "all")
    entry = found["all"] if name == "all" else found["tasks"][name]
    return name, Setting.of(entry)
