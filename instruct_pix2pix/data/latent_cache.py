"""Latents and text embeddings computed once, so that training neither decodes images nor runs the frozen encoders.

latent-cache-<fingerprint>/
    cache.json                  what the cache was made of
    moments-<n>.safetensors     ROWS_PER_FILE rows: original_mean, edited_mean, edited_logvar, each (rows, V, C, h, w);
                                zeros for a row that cannot be used, which the file's metadata names
    text-<n>.safetensors        TEXTS_PER_FILE instructions: embedding (texts, L, D)

The V variants of a row are its crops times its orientations. A mirrored picture is encoded, not a picture's latents
mirrored: the encoder pads at the right and below only, so the two differ. The VAE's posterior is kept as mean and
log-variance in the encoder's own precision and sampled anew whenever a row is used, so nothing about training changes.

The folder's name is a hash of everything its numbers depend on, so a changed image, instruction, geometry or encoder
gives another folder. Each file appears whole or not at all: a build that was stopped goes on with the missing ones.
Folders are never removed here; those no longer needed can be deleted.
"""

import hashlib
import json
import logging
import math
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.geometry import crop_is_fixed, crop_pair
from instruct_pix2pix.data.order import stream
from instruct_pix2pix.data.rows import Files
from instruct_pix2pix.data.triples import Triples, diffusion_draws, first_usable, open_pair, to_unit_range
from instruct_pix2pix.files import fingerprint, free_space, in_megabytes, write_json, written_whole
from instruct_pix2pix.images import BadImage, pixel_limit
from instruct_pix2pix.models.sd import PIXELS_PER_PASS, encode_text, tokenize

logger = logging.getLogger(__name__)

LAYOUT = 2  # raised when the files or the way their numbers are made change
BAD_ROWS = "rows that cannot be used"  # [[place, reason], ...] in a file's metadata
ROWS_PER_FILE = 256
TEXTS_PER_FILE = 512
SHARE_OF_DEVICE = 0.1  # a cache no larger than this share of a GPU's memory is kept there


def is_worth_it(args, rows: int, samples: int) -> bool:
    """Whether to cache where --cache_latents was left out: `samples` of `rows` pairs will be trained on."""
    if args.cached_crops is not None:
        return True
    return crop_is_fixed(args.image_geometry, args.center_crop) and num_variants(args) * rows <= samples


def num_variants(args) -> int:
    """Crops times orientations of each row: variant crop * orientations + mirrored."""
    return (args.cached_crops or 1) * (2 if args.random_flip else 1)


class LatentCache:
    """The tables, memory-mapped from disk, or on the training device where they fit."""

    def __init__(
        self,
        moments: list[dict],
        texts: list[dict],
        scaling_factor: float,
        wordings: list[list[int]],
        bad: dict[int, str],
        ids: torch.Tensor,
    ):
        self.scaling_factor = scaling_factor
        self.bad = bad  # places of rows that cannot be used -> why
        self.wordings = wordings  # of each row, as places in the table of texts
        self.ids = ids  # tokens (texts, L)
        self.files = {name: [file[name] for file in moments] for name in moments[0]}
        self.files["embedding"] = [file["embedding"] for file in texts]

    def keep_on(self, device: torch.device) -> None:
        """Move the tables to a GPU if they are small beside its memory."""
        size = sum(table.nbytes for tables in self.files.values() for table in tables)
        if device.type == "cuda" and size <= SHARE_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory:
            self.files = {name: [torch.cat(tables).to(device)] for name, tables in self.files.items()}

    def look_up(self, batch: dict, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the encoders would have given for a batch of CachedTriples.

        Returns text embeddings (B, L, D), original latents and sampled edited latents (B, C, h, w) float32.
        """
        place = (batch["row"], batch["variant"])
        image_latents = self._gather("original_mean", device, *place).float()
        mean = self._gather("edited_mean", device, *place).float()
        std = torch.exp(0.5 * self._gather("edited_logvar", device, *place)).float()
        latents = mean + std * batch["posterior_noise"].to(device, non_blocking=True)
        return self._gather("embedding", device, batch["text"]), image_latents, latents * self.scaling_factor

    def _gather(self, name: str, device: torch.device, *place: torch.Tensor) -> torch.Tensor:
        files = self.files[name]
        if len(files) == 1:
            return files[0][tuple(index.to(files[0].device, non_blocking=True) for index in place)].to(device)
        per_file = len(files[0])
        places = zip(*(index.tolist() for index in place), strict=True)
        picked = [files[first // per_file][(first % per_file, *rest)] for first, *rest in places]
        return torch.stack(picked).to(device, non_blocking=True)


class CachedTriples(torch.utils.data.Dataset):
    """The sample stream of triples.TripleDataset with places in the cache (row, variant, text) instead of pixels and
    instruction. Epoch e takes the crop number e modulo --cached_crops; all else is drawn as ever."""

    def __init__(self, cache: LatentCache, triples: Triples, args, latent_shape, num_timesteps: int):
        self.args, self.triples, self.wordings, self.bad = args, triples, cache.wordings, cache.bad
        self.latent_shape, self.num_timesteps = latent_shape, num_timesteps
        self.order = triples.order(args.seed)

    def __getitem__(self, position: int) -> dict:
        args = self.args
        epoch, index, skipped = first_usable(self.triples, self.order, position, self.bad.get)
        row_index = int(self.triples.indices[index])
        _, _, mirror = stream(args.seed, "augmentation", epoch, row_index).random(3)
        variant = epoch % (args.cached_crops or 1)
        if args.random_flip:
            variant = 2 * variant + int(mirror < 0.5)
        wordings = self.wordings[index]
        wording = stream(args.seed, "instruction", epoch, row_index).integers(len(wordings))
        return {
            "row": torch.tensor(index),
            "variant": torch.tensor(variant),
            "text": torch.tensor(wordings[wording]),
            "dataset": torch.tensor(self.triples.dataset_of(index)),
            "replay": torch.tensor(self.triples.is_replayed(index)),
            "skipped": skipped,
            **diffusion_draws(args, position, self.latent_shape, self.num_timesteps),
        }


class RowVariants(torch.utils.data.Dataset):
    """Row -> its variants, original and edited, uint8 (V, 3, R, R) each, and None; for a row that cannot be used, black
    ones and the reason, or where that is an error, a RowError."""

    def __init__(self, triples: Triples, args):
        self.triples, self.args = triples, args

    def __getitem__(self, index: int):
        args, row_index = self.args, int(self.triples.indices[index])
        try:
            _, *pair = open_pair(self.triples, row_index)
        except RowError as error:
            if self.triples.on_bad_row == "error":
                return error
            blank = torch.zeros(num_variants(args), 3, args.resolution, args.resolution, dtype=torch.uint8)
            return blank, blank, error.reason
        sides = ([], [])
        for crop in range(args.cached_crops or 1):
            rng = stream(args.seed, "augmentation", crop, row_index)
            geometry = self.triples.part_of(row_index)[0].geometry
            cut = crop_pair(*pair, args.resolution, geometry, args.center_crop, False, rng)
            for side, pixels in zip(sides, cut, strict=True):
                side.extend([pixels, pixels[:, ::-1]] if args.random_flip else [pixels])
        return *(torch.from_numpy(np.stack(side).transpose(0, 3, 1, 2).copy()) for side in sides), None


def open_cache(args, accelerator, triples: Triples, tokenizer, text_encoder, vae) -> LatentCache:
    """The cache of these rows, built first where it is missing or unfinished: files are shared out over processes.

    Expects the encoders on the device they are to work on. Raises UserError for a folder that holds something else,
    for a disk that is too small, and RowError for a row that cannot be used.
    """
    main = accelerator.is_main_process
    instructions, wordings = _list_instructions(triples)
    without = {place: triples.bad[int(row)] for place, row in enumerate(triples.indices) if not wordings[place]}
    ids = tokenize(tokenizer, instructions)
    side = args.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    moment = (num_variants(args), vae.config.latent_channels, side, side)
    shapes = dict.fromkeys(("original_mean", "edited_mean", "edited_logvar"), moment)
    text = {"embedding": (ids.shape[1], text_encoder.config.hidden_size)}

    found = [None, None]
    if main:
        content = _describe_content(args, triples, instructions, ids, text_encoder, vae, accelerator)
        folder = Path(args.cache_dir or args.output_dir) / f"latent-cache-{fingerprint(content)[:16]}"
        files = _files(folder, "moments", len(triples), ROWS_PER_FILE, shapes, vae.dtype)
        files |= _files(folder, "text", len(instructions), TEXTS_PER_FILE, text, text_encoder.dtype)
        found = [(folder, files), _prepare_folder(folder, content, files)]
    broadcast_object_list(found)
    if isinstance(found[1], UserError):
        raise found[1]
    (folder, files), missing = found

    share = missing[accelerator.process_index :: accelerator.num_processes]
    _build_texts([path for path in share if path.name.startswith("text")], files, ids, text_encoder)
    _build_moments([path for path in share if path.name.startswith("moments")], files, args, accelerator, triples, vae)
    accelerator.wait_for_everyone()
    unseen = [path.name for path in files if not path.is_file()]
    if unseen:
        raise UserError(f"--cache_dir: {unseen[0]} of {folder} is not visible here; all processes need one folder")
    tables = {kind: [load_file(path) for path in files if path.name.startswith(kind)] for kind in ("moments", "text")}
    bad = without | {place: why for path in files if path.name.startswith("moments") for place, why in _bad_in(path)}
    triples.leave_out((int(triples.indices[place]), why) for place, why in sorted(bad.items()))
    cache = LatentCache(tables["moments"], tables["text"], vae.config.scaling_factor, wordings, bad, ids)
    cache.keep_on(accelerator.device)
    return cache


# ---- what the cache is made of


def _list_instructions(triples: Triples) -> tuple[list[str], list[list[int]]]:
    """The distinct instructions, and for each row the places of its wordings among them, none if it has no usable."""
    places, wordings = {}, []
    for index in triples.indices:
        try:
            texts = triples.instructions(int(index))
        except RowError as error:
            if triples.on_bad_row == "error":
                raise
            triples.leave_out([(error.row, error.reason)])
            texts = []
        wordings.append([places.setdefault(text, len(places)) for text in texts])
    return list(places), wordings


def _describe_content(args, triples, instructions, ids, text_encoder, vae, accelerator) -> dict:
    """Everything the cache's numbers depend on, in a few hashes and plain values."""
    data = hashlib.blake2b(digest_size=16)
    bar = {"desc": "Fingerprinting pairs", "unit": "pair", "disable": not accelerator.is_local_main_process}
    for index in tqdm(triples.indices, leave=False, **bar):
        part, place = triples.part_of(int(index))
        row = part.rows[place]
        for column in (part.original_image, part.edited_image):
            data.update(hashlib.blake2b(_image_bytes(part.files, row[column]), digest_size=16).digest())
    geometry = {name: getattr(args, name) for name in ("resolution", "center_crop", "random_flip")}
    return {
        "layout": LAYOUT,
        "images": data.hexdigest(),
        "most pixels of an image": pixel_limit(),
        "instructions": fingerprint([instructions, ids.tolist()]),
        "geometry": {**geometry, "image_geometry": triples.geometry, "crops": args.cached_crops or 1},
        "seed of the crops": None
        if crop_is_fixed(args.image_geometry, args.center_crop)
        else [args.seed, fingerprint(triples.indices.tolist())],
        "VAE": _hash_model(vae),
        "text encoder": _hash_model(text_encoder),
        "precision": str(vae.dtype).removeprefix("torch."),
    }


def _image_bytes(files: Files, cell) -> bytes:
    try:
        image = files.image(cell)
        return image if isinstance(image, bytes) else Path(image).read_bytes()
    except (OSError, BadImage):  # not there: the build will name the row
        return b""


def _hash_model(model) -> str:
    """Hash of a model's weights, rounded as they are used."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


# ---- the folder


def _files(folder: Path, kind: str, count: int, per_file: int, shapes: dict[str, tuple], dtype) -> dict[Path, dict]:
    """Path of every file of a kind -> its rows, and its tensors' shapes and precision."""
    return {
        folder / f"{kind}-{number:05d}.safetensors": {
            "rows": range(start, min(start + per_file, count)),
            "shapes": {name: (min(per_file, count - start), *shape) for name, shape in shapes.items()},
            "dtype": dtype,
        }
        for number, start in enumerate(range(0, count, per_file))
    }


def _prepare_folder(folder: Path, content: dict, files: dict[Path, dict]) -> list[Path] | UserError:
    """Make the folder and list the files still to build. A UserError is returned, to reach every process."""
    manifest = folder / "cache.json"
    if folder.is_dir() and any(folder.iterdir()):
        if _read_manifest(folder) != content:
            return UserError(f"--cache_latents: {folder} is not the cache its name says; move or delete it")
    missing = [path for path in files if not _is_whole(path, files[path]["shapes"])]
    if not missing:
        logger.info("latents and text come from %s", folder)
        return missing
    needed = sum(
        math.prod(shape) * files[path]["dtype"].itemsize for path in missing for shape in files[path]["shapes"].values()
    )
    place = folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        free = free_space(place)
        size = f"{in_megabytes(needed)} in {place}, where {in_megabytes(free)} are free"
        if needed > 0.95 * free:
            return UserError(f"--cache_latents: the cache needs {size}; name another --cache_dir or --no-cache_latents")
        for other in sorted(place.glob("latent-cache-*")):
            theirs = _read_manifest(other)
            if other != folder and theirs:
                changed = ", ".join(key for key in content if theirs.get(key) != content[key])
                logger.info("%s was made with other %s: not used here", other.name, changed)
        logger.info("building %s: %s%s", folder.name, size, "" if len(missing) == len(files) else " (going on with it)")
        folder.mkdir(exist_ok=True)
        write_json(manifest, content)
    except OSError as error:
        return UserError(f"--cache_latents: {folder} cannot be made ({error}); name another --cache_dir")
    return missing


def _read_manifest(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_whole(path: Path, shapes: dict[str, tuple]) -> bool:
    """Whether a file is there with all its bytes and holds tensors of the right shapes."""
    try:
        with safe_open(path, "pt") as file:  # compares the header with the file's length
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes
    except (OSError, SafetensorError):
        return False


def _bad_in(path: Path) -> list[tuple[int, str]]:
    """The places of rows that cannot be used in a file of moments, each with the reason."""
    with safe_open(path, "pt") as file:
        return [(place, why) for place, why in json.loads((file.metadata() or {}).get(BAD_ROWS, "[]"))]


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        with written_whole(path) as partial:
            save_file(tensors, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--cache_latents: {path} cannot be written ({error}); make room and start again") from error


# ---- building


def _build_texts(paths: list[Path], files: dict[Path, dict], ids: torch.Tensor, text_encoder) -> None:
    for path in tqdm(paths, desc="Encoding instructions", unit="file", disable=len(paths) < 2):
        passes = ids[list(files[path]["rows"])].split(64)
        embeddings = [encode_text(text_encoder, part.to(text_encoder.device)).cpu() for part in passes]
        _write(path, {"embedding": torch.cat(embeddings)})


@torch.no_grad()
def _build_moments(paths: list[Path], files: dict[Path, dict], args, accelerator, triples: Triples, vae) -> None:
    variants = num_variants(args)
    pairs_per_pass = max(1, PIXELS_PER_PASS // args.resolution**2)
    rows_per_pass = max(1, pairs_per_pass // variants)
    passes = [  # a pass ends where its file does, so that the numbers depend on neither processes nor interruptions
        rows[start : start + rows_per_pass]
        for rows in (files[path]["rows"] for path in paths)
        for start in range(0, len(rows), rows_per_pass)
    ]
    loader = iter(
        torch.utils.data.DataLoader(
            RowVariants(triples, args),
            batch_sampler=passes,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )
    )
    total = sum(len(rows) for rows in passes)
    disable = not accelerator.is_local_main_process or not total
    with tqdm(total=total, desc="Encoding images", unit="pair", disable=disable) as progress:
        for path in paths:
            parts = {name: [] for name in files[path]["shapes"]}
            bad, place = [], files[path]["rows"].start
            while sum(map(len, parts["edited_mean"])) < len(files[path]["rows"]):
                rows = next(loader)
                for row in rows:
                    if isinstance(row, RowError):
                        raise row
                    if row[2] is not None:
                        bad.append((place, row[2]))
                    place += 1
                original, edited = (torch.cat([row[side] for row in rows]) for side in (0, 1))
                encoded = [
                    _encode(vae, *part)
                    for part in zip(original.split(pairs_per_pass), edited.split(pairs_per_pass), strict=True)
                ]
                for name, pieces in zip(parts, zip(*encoded, strict=True), strict=True):
                    parts[name].append(torch.cat(pieces).unflatten(0, (-1, variants)))
                progress.update(len(rows))
            metadata = {BAD_ROWS: json.dumps(bad)} if bad else None
            _write(path, {name: torch.cat(pieces) for name, pieces in parts.items()}, metadata)


def _encode(vae, original: torch.Tensor, edited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 pixels (B, 3, R, R) to original mean, edited mean and log-variance (B, C, h, w), in the VAE's precision."""
    pixels = to_unit_range(torch.cat([original, edited]).to(vae.device)).to(vae.dtype)
    posterior = vae.encode(pixels).latent_dist
    (original_mean, edited_mean), (_, edited_logvar) = posterior.mean.cpu().chunk(2), posterior.logvar.cpu().chunk(2)
    return original_mean.clone(), edited_mean.clone(), edited_logvar.clone()
