"""The training loop: for every update fetch, encode and noise, predict, loss, backward, step, EMA."""

import logging
import shlex
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from instruct_pix2pix import evidence, publishing
from instruct_pix2pix.cli import RowError, SourceLost
from instruct_pix2pix.devices import is_out_of_memory
from instruct_pix2pix.files import naming, write_json
from instruct_pix2pix.models.trained import damage
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training import sharding, skips
from instruct_pix2pix.training import step as steps
from instruct_pix2pix.training.config import resolved
from instruct_pix2pix.training.ema import unet_to_export
from instruct_pix2pix.training.log import LOG_EVERY, Log, set_up_logging, start_trackers, write_skipped
from instruct_pix2pix.training.preparation import Run, build, check, print_dry_run, start_accelerator
from instruct_pix2pix.training.stopping import StopRequest
from instruct_pix2pix.training.validation import validate, validation_is_due

logger = logging.getLogger(__name__)


def train(args, expected_in_channels: int) -> None:
    """Train as the flags say and leave a pipeline in --output_dir.

    `expected_in_channels` of the base model's UNet is 4 for the scratch script and 8 for the fine-tuning one.
    """
    set_up_logging()
    accelerator = start_accelerator(args)
    plan = check(args, accelerator, expected_in_channels)
    if plan.config.dry_run:
        if accelerator.is_main_process:
            print_dry_run(plan)
        return
    try:
        with naming(plan.config.output_dir):
            run = build(plan)
            if accelerator.is_main_process:
                config, output_dir = run.config, Path(run.config.output_dir)
                checkpoints.remove_partial(output_dir)
                checkpoints.remove_old(output_dir, config.checkpoints_total_limit, config.keep_best)
                publishing.begin(output_dir, resolved(config))
            write_skipped(run)
            start_trackers(run)
            summary = run_updates(run)
            finish(run, summary)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise steps.memory_shortage(plan.config) from error
        raise


def run_updates(run: Run) -> dict:
    """All updates still to do, with logging, checkpoints and validation in between; returns the summary."""
    config, accelerator, last = run.config, run.accelerator, run.config.max_train_steps
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # of the updates, not of what was tried before them
    where = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    where += ", sharded" if sharding.is_sharded(run.unet) else ""
    logger.info("training %d updates of %d images, %s", last - run.first_step, run.images_per_update, where)
    if run.first_step > 0 and validation_is_due(run, run.first_step):
        validate(run, run.first_step, only_missing=True)  # the run before may have ended between checkpoint and picture
    log = Log(run)
    try:
        with StopRequest() as stop, logging_redirect_tqdm():  # a message on a line of its own, above the bar
            for step in range(run.first_step + 1, last + 1):
                learning_rate = run.learning_rate(step)
                window = next(run.windows)
                inputs = run.make_inputs(window)
                loss, grad_norm, losses = run.update.run(inputs, learning_rate)
                log.add(step, loss, grad_norm, losses, inputs["timesteps"], window["dataset"], learning_rate)

                stopping = step < last and stop.all_ranks_agree(accelerator, step)
                # The last update too: what comes after it may fail for want of disk, network or memory.
                regular = step % config.checkpointing_steps == 0 or step == last
                saving, for_best = stopping or regular, regular and config.keep_best is not None
                validating = for_best or (validation_is_due(run, step) and not stopping)
                if saving or validating or step % LOG_EVERY == 0:
                    log.flush()
                    run.checkpoints.raise_if_failed()
                found = validate(run, step) if for_best else {}  # which the checkpoint holds
                if saving:
                    save(run, step, log.is_finite(), found)
                if validating and not for_best:
                    validate(run, step)
                if stopping:
                    run.checkpoints.wait()
                    accelerator.wait_for_everyone()  # as in `finish`
                    raise KeyboardInterrupt
                if saving or validating:
                    log.restart_clock()
    except (RowError, SourceLost, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        keep_updates_so_far(run, log, error)
        raise
    finally:
        run.windows.close()
        log.progress.close()
        run.checkpoints.close()
        if run.pushes is not None:
            run.pushes.wait()
    run.checkpoints.raise_if_failed()
    return {
        "steps": last,
        "train_seconds": round(log.seconds(), 1),
        "images_per_update": run.images_per_update,
        "epochs": round(run.epoch(last), 2),
        **({"mixture": told} if (told := run.triples.told()) else {}),
        "device": _device_name(accelerator),
        "peak_memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else None,
        "commit": evidence.code_commit(),
    }


def save(run: Run, step: int, sound: bool, found: dict[str, float]) -> None:
    """A checkpoint, with every process at the same update. Replicas are equal, and of sharded tensors all give their
    pieces: the main process keeps a copy and writes it in the background, with what a validation has `found`. Weights
    that are not `sound` must not take a good checkpoint's place."""
    run.accelerator.wait_for_everyone()
    write_skipped(run)
    if not sound:
        logger.warning("no checkpoint-%d: the loss or the gradient of update %d is not finite", step, step)
    elif run.accelerator.is_main_process or sharding.is_sharded(run.unet):
        write_checkpoint(run, step, found)
    run.accelerator.wait_for_everyone()


def _device_name(accelerator) -> str:
    return torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type


def write_checkpoint(run: Run, step: int, found: dict[str, float]) -> None:
    config, scaler = run.config, run.accelerator.scaler
    state = {
        "step": step,
        "samples_seen": run.samples_seen(step),
        "seed": config.seed,
        "loss_scaler": scaler.state_dict() if scaler is not None else None,
        "flags": resolved(config),
        "mixture": run.triples.told(),  # this and the next three for the card of an export
        "instruction": run.triples.first_instruction,
        "device": _device_name(run.accelerator),
        "commit": evidence.code_commit(),
    }
    state |= {"validation": found} if found else {}
    kept = (config.checkpoints_total_limit, config.keep_best)
    output_dir = Path(config.output_dir)
    written = run.checkpoints.save(output_dir, state, run.unet, run.optimizer, run.ema, *kept)
    if run.pushes is not None:
        written.add_done_callback(lambda _: run.pushes.start(output_dir / f"checkpoint-{step}"))


def keep_updates_so_far(run: Run, log: Log, error: Exception) -> None:
    """A row that cannot be used, or memory that ran out, is for the user to mend; the work until then is kept."""
    done = log.last_step
    if sharding.is_sharded(run.unet):  # one process alone has only its pieces
        return
    if run.accelerator.is_main_process and done > run.first_step:
        log.flush(gather=False)
        write_skipped(run, gather=False)
        if log.is_finite():
            run.checkpoints.wait()
            if damage(Path(run.config.output_dir) / f"checkpoint-{done}"):  # else it was written a moment ago
                write_checkpoint(run, done, {})
                run.checkpoints.wait()
            what = {RowError: "a row that cannot be used", SourceLost: "a dataset that cannot be read"}.get(type(error))
            what = what or "an update that needs more memory"
            logger.error("stopped at %s; checkpoint-%d keeps the updates so far", what, done)


def finish(run: Run, summary: dict) -> None:
    """Validate once more, export the pipeline, whose card shows it, and publish it."""
    config, accelerator = run.config, run.accelerator
    accelerator.wait_for_everyone()
    pushed = True
    if config.keep_best is None or run.first_step == config.max_train_steps:  # else its last checkpoint was validated
        validate(run, config.max_train_steps)
    with unet_to_export(run) as unet:
        if accelerator.is_main_process:
            prompt = config.validation_prompt
            instruction = prompt if isinstance(prompt, str) else run.triples.first_instruction
            trained, told = skips.train(run, unet) if config.train_decoder_skips else (None, {})
            summary |= told
            publishing.export(config, resolved(config), unet, summary, run.repo_id, instruction, trained)
    if accelerator.is_main_process:
        write_json(Path(config.output_dir) / publishing.SUMMARY_FILE, summary)
        logger.info("the pipeline is in %s", config.output_dir)
    best = checkpoints.best_checkpoint(Path(config.output_dir), config.keep_best)
    if best is not None and accelerator.is_main_process:
        value = checkpoints.read_state(best)["validation"][config.keep_best]
        command = f"python tools/export_checkpoint.py {shlex.quote(str(best))} --output_dir NEW_FOLDER"
        logger.info("best by %s (%.4g): %s; as a pipeline: %s", config.keep_best, value, best.name, command)
    if run.pushes is not None:  # on the main process only
        pushed = run.pushes.finish(checkpoints.list_checkpoints(Path(config.output_dir)))
    accelerator.wait_for_everyone()  # a process that leaves early ends the others under some launchers
    accelerator.end_training()
    if not pushed:
        raise SystemExit(1)
