"""A build on Ray: actors, on one machine or a cluster, each make whole shards and put them at their places.

The unit of work is a shard: its planned rows travel to the actor, its checksum comes back, and no image does. An actor
that dies, with its machine or without, is replaced, and its shard made again, to the same bytes.
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property

from instruct_pix2pix.building.plan import Row
from instruct_pix2pix.cli import UserError, first_line


def connect(address: str):
    """The `ray` module, connected to the cluster that --ray names (or to one that is started here)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers where it is not told
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--ray: {first_line(error)}; pip install -r requirements-ray.txt") from None
    if not ray.is_initialized():
        try:
            ray.init(address or None, logging_level="warning", log_to_driver=False)
        except Exception as error:  # a wrong address, a cluster that does not answer, another version of Ray
            raise UserError(f"--ray: {address}: {first_line(error)}; give the address of a running cluster") from None
    return ray


def gpus_of_an_actor(args, on_gpu: bool) -> float:
    """What --ray_gpus says, or 1 for work on a GPU where the cluster has one."""
    if args.ray_gpus is not None:
        return args.ray_gpus
    return float(on_gpu and connect(args.ray).cluster_resources().get("GPU", 0) > 0)


def there(args, function: Callable, on_gpu: bool):
    """What `function()` returns where the shards are made: in this process or, with --ray, where an actor would be."""
    if args.ray is None:
        return function()
    ray = connect(args.ray)
    folder = os.getcwd()

    def in_folder():
        enter(folder)
        return function()

    try:
        return ray.get(ray.remote(in_folder).options(num_gpus=gpus_of_an_actor(args, on_gpu)).remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise


def enter(folder: str) -> None:
    """Relative paths mean on other machines what they mean in the command, where the folder is there."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


class ShardMaker:
    """An actor: of each shard's rows it makes the file, and returns the checksum or what is wrong."""

    def __init__(self, work, folder: str):
        enter(folder)
        self.work = work

    @cached_property
    def make_rows(self):
        return self.work.open_rows()

    def __call__(self, batch: dict) -> dict:
        from instruct_pix2pix.building.build import write_shard

        name, rows = str(batch["name"][0]), [Row(**row) for row in json.loads(batch["rows"][0])]
        digest = error = ""
        try:
            digest = write_shard(self.work, name, rows, self.make_rows)
        except UserError as wrong:
            error = str(wrong)
        except OSError as wrong:
            where = wrong.filename or name
            error = f"{where}: {first_line(wrong)}; what is finished is kept: put it right and run the command again"
        return {"name": [name], "rows": [len(rows)], "digest": [digest], "error": [error]}


def make_shards(work, shards: dict[str, list[Row]], progress: Callable[[int], None]) -> dict[str, str]:
    """As `build.make_shards`, by actors: --ray_actors of them, or as many as the cluster has CPUs (GPUs) for."""
    if not shards:
        return {}
    ray = connect(work.args.ray)
    gpus = gpus_of_an_actor(work.args, work.on_gpu)
    most = min(work.args.ray_actors or len(shards), len(shards))
    # Without a number, a cluster that grows by itself is asked for more actors as long as shards wait.
    pool = ray.data.ActorPoolStrategy(min_size=most if work.args.ray_actors else 1, max_size=most)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a shard may take its time
    items = [{"name": name, "rows": json.dumps([*map(asdict, rows)])} for name, rows in shards.items()]
    # A block a shard: what is handed out, and what is done again, is one.
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        ShardMaker, fn_constructor_args=[work, os.getcwd()], batch_size=1, compute=pool, num_gpus=gpus
    )
    checksums = {}
    for shard in made.iter_rows():
        if shard["error"]:
            raise UserError(shard["error"])
        checksums[shard["name"]] = shard["digest"]
        progress(shard["rows"])
    return checksums
