"""The Hugging Face Hub: the repository, what a run pushes there while it goes on, and a checkpoint taken back.

`config` is the training's configuration, or its flags.
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import time
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from instruct_pix2pix import publishing
from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.files import check_folder, write_json
from instruct_pix2pix.models.trained import STATE_FILE, read_state

logger = logging.getLogger(__name__)

LAST = "last-checkpoint"  # what transformers calls the newest checkpoint in a repository
RETRY_AFTER = (10, 60)  # seconds; the client itself repeats most requests that fail, but a commit only with Xet
REFUSED = (400, 401, 403, 404)  # what stays as it is, however often it is asked


@contextlib.contextmanager
def _reaching(config, flag: str):
    """Gives the client with the run's token, and the repository's full id. What goes wrong is a UserError of `flag`."""
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        validate_repo_id(name)
        api = HfApi(token=config.hub_token or get_token())
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        yield api, name
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"--hub_model_id: {name!r} is not a repository name ({error})") from error
    except Exception as error:  # besides its own errors the client raises those of its HTTP library
        raise UserError(f"{flag}: cannot use {name}: {first_line(error)}") from error


def prepare_repo(config) -> str:
    """Make the repository if it is missing, with the right to write, before hours of training; returns its full id."""
    if not (config.hub_token or get_token()):
        raise UserError("--push_to_hub: no Hub token; run `hf auth login`, set HF_TOKEN, or give --hub_token")
    with _reaching(config, "--push_to_hub") as (api, name):
        repo_id = api.create_repo(name, exist_ok=True, private=config.hub_private_repo).repo_id
        api.auth_check(repo_id, write=True)  # which a repository of others, being there already, says nothing of
    return repo_id


class Pushes:
    """A run's pushes, one at a time, of which training waits for the last only. For the main process."""

    def __init__(self, config, repo_id: str):
        self.config, self.repo_id, self.strategy = config, repo_id, config.hub_strategy
        self.api, self.running, self.pushed = HfApi(token=config.hub_token or get_token()), None, set()
        self.stage = Path(config.output_dir) / ".checkpoint-push.partial"  # swept with those of killed runs
        if self.strategy != "end":
            disable_progress_bars()  # training has one

    def start(self, checkpoint: Path) -> None:
        """Push in the background what the strategy wants of a checkpoint that was just written, unless the push before
        still goes on. Called where nothing removes the checkpoint. Raises nothing: training goes on."""
        if self.strategy == "end" or checkpoint.name == f"checkpoint-{self.config.max_train_steps}":
            return
        if self.running is not None and not self.running.done():
            logger.info("%s is not pushed: the push before still goes on, and the end pushes all", checkpoint.name)
            return
        try:
            self._take(checkpoint)
            self.running = self.api.run_as_future(self._push, checkpoint)
        except OSError as error:
            self._say(checkpoint, error)

    def wait(self) -> None:
        """Until the push that goes on has ended: an interpreter that is leaving lets it start no threads."""
        if self.running is not None and not self.running.done():
            logger.info("waiting for the push to %s", self.repo_id)
            self.running.result()

    def finish(self, checkpoints: list[Path]) -> bool:
        """Push the pipeline and its card in one commit and, where the strategy wants them, the newest or all of
        `checkpoints`, the oldest first. A failure loses nothing: it is said, with the command for later."""
        wanted = {"checkpoint": checkpoints[-1:], "all_checkpoints": checkpoints}.get(self.strategy, [])
        folder = self.config.output_dir
        try:
            for checkpoint in wanted:
                if checkpoint.name not in self.pushed:
                    self._take(checkpoint)
                    self._push_checkpoint(checkpoint)
            message = "Upload instruction-tuned Stable Diffusion pipeline"
            url = self._upload(folder, message, allow_patterns=publishing.PUBLISHED)
        except Exception as error:  # whatever goes wrong on the way to the Hub, the model on disk is whole
            command = ["hf", "upload", self.repo_id, str(folder), "."]
            command += [word for pattern in publishing.PUBLISHED for word in ("--include", pattern)]
            said = f"the upload failed ({first_line(error)}); the model is whole in {folder}. Later:"
            logger.error("%s %s", said, shlex.join(command))
            return False
        finally:
            shutil.rmtree(self.stage, ignore_errors=True)
        logger.info("uploaded to %s", url)
        return True

    def _push(self, checkpoint: Path) -> None:
        pipeline = self.stage / "pipeline"
        try:
            if self.strategy != "every_save":
                self._push_checkpoint(checkpoint)
            publishing.export_checkpoint(self.stage / checkpoint.name, pipeline, self.repo_id, self.config)
            self._upload(pipeline, f"Training in progress, {checkpoint.name}")
            logger.info("%s is pushed to %s", checkpoint.name, self.repo_id)
        except Exception as error:
            self._say(checkpoint, error)
        finally:
            shutil.rmtree(self.stage, ignore_errors=True)

    def _say(self, checkpoint: Path, error: Exception) -> None:
        said = "%s is not pushed (%s); it is whole in %s, and the next save or the end pushes again"
        logger.warning(said, checkpoint.name, first_line(error), checkpoint.parent)

    def _take(self, checkpoint: Path) -> None:
        """Keep a checkpoint, whatever training removes, as it is published: without paths of this machine."""
        shutil.rmtree(self.stage, ignore_errors=True)
        copy = Path(shutil.copytree(checkpoint, self.stage / checkpoint.name, copy_function=_link))
        state = read_state(checkpoint)
        write_json(copy / STATE_FILE, state | {"flags": publishing.hide_paths(state["flags"])})

    def _push_checkpoint(self, checkpoint: Path) -> None:
        folder = LAST if self.strategy == "checkpoint" else checkpoint.name
        self._upload(self.stage / checkpoint.name, f"Add {checkpoint.name}, to resume from", path_in_repo=folder)
        self.pushed.add(checkpoint.name)

    def _upload(self, folder: str | os.PathLike, message: str, **options) -> str:
        """Upload a folder in one commit; its address. Trouble that may pass is waited for."""
        options |= {"repo_id": self.repo_id, "folder_path": folder, "commit_message": message}
        for seconds in (*RETRY_AFTER, None):
            try:
                return self.api.upload_folder(**options)
            except Exception as error:  # besides its own errors the client raises those of its HTTP library
                if seconds is None or getattr(getattr(error, "response", None), "status_code", None) in REFUSED:
                    raise
                time.sleep(seconds)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def fetch_checkpoint(config, kept: list[Path]) -> None:
    """Take the newest checkpoint in the repository, if it has one, into --output_dir, as checkpoint-<step>. `kept` are
    those that are there, the oldest first: UserError where the repository's is newer."""
    output_dir, local = Path(config.output_dir), int(kept[-1].name.split("-")[1]) if kept else -1
    with _reaching(config, "--resume_from_checkpoint") as (api, name):
        info, states = None, {}
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            if api.token:
                api.whoami()  # a token that is wrong sees nothing
        for file in info.siblings if info else ():
            if found := re.fullmatch(rf"({LAST}|checkpoint-\d+)/{STATE_FILE}", file.rfilename):
                state_file = Path(api.hf_hub_download(name, file.rfilename, revision=info.sha))
                states[found.group(1)] = read_state(state_file.parent)
        newest = max(states, key=lambda folder: states[folder]["step"], default=None)
        if newest is None or states[newest]["step"] <= local:
            logger.warning("--resume_from_checkpoint: no newer checkpoint in %s, as far as this token sees", name)
            return
        step, files = states[newest]["step"], states[newest]["files"]
        if kept:
            there = f"{name} holds update {step}, {output_dir} {kept[-1].name}"
            raise UserError(f"--resume_from_checkpoint: {there}; give latest, or name another --output_dir")
        check_folder("--output_dir", output_dir, sum(files.values()), f"checkpoint-{step}")
        logger.info("taking update %d back from %s", step, name)
        partial = output_dir / ".hub.partial"  # one that broke off goes on from what it has
        patterns = [f"{newest}/{file}" for file in (*files, STATE_FILE)]  # no others that the folder may hold
        api.snapshot_download(name, revision=info.sha, local_dir=partial, allow_patterns=patterns)
        os.replace(partial / newest, output_dir / f"checkpoint-{step}")
        shutil.rmtree(partial)
