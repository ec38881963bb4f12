"""Read the weights of White-box CartoonGAN's generator from any of the formats in which they are handed
around.

    read_weights(FILE.npz | FILE.safetensors | FILE.tflite | SAVED_MODEL_FOLDER | HUB_REPOSITORY)

All readers return the same thing: a dict from the names in `SHAPES` to float32 arrays, convolutions as (out,
in, height, width). Neither TensorFlow nor its lite runtime is needed: what TensorBoard has no reader for is
read below, from the published descriptions (the SSTable layout of LevelDB's doc/table_format.md, the messages
of tensor_bundle.proto, and TensorFlow Lite's schema.fbs).

Files come from strangers. Whatever one claims, no more is read, kept in memory or gone through than the
generator's own arrays and tables of a sensible length.
"""

import math
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.numpy import load_file
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.trackable_object_graph_pb2 import TrackableObjectGraph
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from instruct_pix2pix.building.whitebox import Generator
from instruct_pix2pix.cli import UserError, first_line

with torch.device("meta"):
    # name -> shape, in the order in which the network runs: conv0.weight, conv0.bias, conv1.weight, ...
    SHAPES = {name: tuple(array.shape) for name, array in Generator().state_dict().items()}


# Bytes. The generator takes 6 MB, its index two kilobytes; other variables may stand beside it.
MOST_TFLITE, MOST_INDEX, MOST_GRAPH = 256 << 20, 1 << 20, 16 << 20
MOST_KEY, MOST_ENTRIES, MOST_DIMENSIONS = 1000, 10_000, 100


def read_weights(source: str, flag: str = "--cartoonizer_weights") -> dict[str, np.ndarray]:
    """Read and check the weights. Raises UserError, which names the first array that does not fit."""
    path = Path(source)
    readers = {".npz": read_npz, ".safetensors": load_file, ".tflite": read_tflite}
    try:
        if path.is_dir():
            arrays = read_saved_model(path)
        elif path.suffix in readers:
            if not path.is_file():
                raise UserError(f"{flag}: {source}: no such file")
            arrays = readers[path.suffix](path)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not path.exists():
            arrays = read_hub(source, flag)
        else:
            raise UserError(
                f"{flag}: {source}: not a file of weights; give .npz, .safetensors, .tflite, the folder of a "
                "TensorFlow SavedModel or a repository on the Hub"
            )
        arrays = {name: arrays[name].astype(np.float32) for name in SHAPES if name in arrays}
        check(arrays)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the readers raise almost anything
        reason = first_line(error)
        raise UserError(f"{flag}: {source}: {reason}; give the weights of White-box CartoonGAN's generator") from None
    return arrays


def check(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError for the first array that is missing, has another shape or is not finite."""
    for name, shape in SHAPES.items():
        if name not in arrays:
            raise ValueError(f"no array for {name}, shape {shape}")
        check_shape(name, arrays[name].shape)
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} holds values that are not finite")


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    if shape != SHAPES[name]:
        raise ValueError(f"{name} has shape {shape}, not {SHAPES[name]}")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The generator's arrays of an archive; others are not unpacked."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            if name not in SHAPES:
                continue
            with archive.open(member) as file:
                headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
                check_shape(name, shape)
                if dtype.kind != "f":
                    raise ValueError(f"{name} holds {dtype}, not floats")
                file.seek(0)
                arrays[name] = np.lib.format.read_array(file)
    return arrays


def read_hub(repository: str, flag: str) -> dict[str, np.ndarray]:
    """Download a SavedModel's variables, or find them in the Hub's cache."""
    try:
        snapshot = Path(snapshot_download(repository, allow_patterns=["variables/*", "*/variables/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{flag}: {repository}: cannot be had from the Hub ({reason}); give a file instead") from None
    return read_saved_model(snapshot)


# TensorFlow SavedModel: variables/variables.index is a table from variable name to a small message that says
# where in variables/variables.data-0000i-of-0000n the values are.


def read_saved_model(folder: Path) -> dict:
    indices = sorted(folder.rglob("*.index"))
    if len(indices) != 1:
        raise ValueError(f"{len(indices)} files *.index in it, where a SavedModel has variables/variables.index")
    entries = read_bundle(indices[0])
    # Object-based checkpoints name a variable by its place in an object graph, which tells the graph's own
    # name for it.
    graph_names = read_object_graph(entries.pop("_CHECKPOINTABLE_OBJECT_GRAPH", None))
    arrays, keys = {}, {}
    for key, entry in entries.items():
        layer = layer_of(graph_names.get(key, key))
        if layer not in SHAPES or entry.dtype != 1:  # 1 is DT_FLOAT
            continue
        if layer in keys:
            raise ValueError(f"both {keys[layer]} and {key} could be {layer}")
        keys[layer] = key
        # (height, width, in, out) -> (out, in, height, width)
        order = (3, 2, 0, 1) if len(entry.shape) == 4 else range(len(entry.shape))
        check_shape(layer, tuple(entry.shape[place] for place in order))
        values = np.frombuffer(entry.read(4 * int(np.prod(entry.shape))), "<f4")
        arrays[layer] = np.ascontiguousarray(values.reshape(entry.shape).transpose(*order))
    if not arrays:
        raise ValueError(
            f"no variable of the generator in {indices[0].name}: it has {', '.join(list(entries)[:3])}, ..."
        )
    return arrays


def layer_of(variable: str) -> str | None:
    """`.../generator/Conv_5/weights` -> `conv5.weight`; None for what is no weight of the generator.

    Only the tail of the name counts: exports put scopes before it, and `:0` or `/.ATTRIBUTES/VARIABLE_VALUE`
    after it.
    """
    layer = r"(?:^|/)(?:Conv(?:_(\d))?|block_(\d)/conv(\d))"
    match = re.search(layer + r"/(weights|kernel|biases|bias)(?::0)?(?:/\.ATTRIBUTES/.*)?$", variable)
    if not match:
        return None
    conv, block, inner, kind = match.groups()
    layer = f"block{block}.conv{inner}" if block else f"conv{conv or 0}"
    return f"{layer}.weight" if kind in ("weights", "kernel") else f"{layer}.bias"


@dataclass
class Entry:
    """A tensor of a bundle: where its bytes are and what they must be."""

    key: str
    dtype: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    size: int
    checksum: int

    def read(self, most: int) -> bytes:
        """At most `most` bytes, their checksum verified."""
        if self.size > most:
            raise ValueError(f"{self.key} claims {self.size} bytes, of at most {most}")
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise ValueError(f"{self.key} lies beyond the end of the data file")
        if self.dtype != 7 and masked_crc32c(data) != self.checksum:  # 7 is DT_STRING
            raise ValueError(f"{self.key} does not match its checksum: the file is damaged")
        return data


def read_bundle(index: Path) -> dict[str, Entry]:
    """The entries of a tensor bundle by name; their bytes are not read yet."""
    if index.stat().st_size > MOST_INDEX:
        raise ValueError(f"{index.name} has {index.stat().st_size} bytes, more than an index of these weights")
    table = read_table(index.read_bytes())
    header = read_message(table.pop(b"", b""))
    shards = header.get(1, [1])[0]
    if header.get(2, [0])[0] != 0:
        raise ValueError(f"{index.name} is big-endian, which is not supported")
    entries = {}
    for name, value in table.items():
        message = read_message(value)
        shape = (dim.size for dim in TensorShapeProto.FromString(message.get(2, [b""])[0]).dim)
        dtype, shard, offset, size, checksum = (message.get(field, [0])[0] for field in (1, 3, 4, 5, 6))
        file = index.with_suffix(f".data-{shard:05d}-of-{shards:05d}")
        entries[name.decode()] = Entry(name.decode(), dtype, tuple(shape), file, offset, size, checksum)
    return entries


def read_table(data: bytes) -> dict[bytes, bytes]:
    """A sorted string table: blocks of prefix-compressed keys, an index block, a footer that points at it."""
    if len(data) < 48 or data[-8:] != struct.pack("<Q", 0xDB4775248B80FB57):
        raise ValueError("no index of a TensorFlow checkpoint (its last eight bytes are others)")
    # The footer: offset and size of the metaindex block, which is not needed, and of the index block.
    _, _, offset, size, _ = read_varints(data[-48:], 0, 4)
    table, handles = {}, [read_varints(handle, 0, 2)[:2] for handle in read_block(data, offset, size).values()]
    if sum(size for _, size in handles) > len(data):
        raise ValueError("blocks of the index overlap")
    for handle in handles:
        table.update(read_block(data, *handle))
    return table


def read_block(data: bytes, offset: int, size: int) -> dict[bytes, bytes]:
    block, trailer = data[offset : offset + size], data[offset + size : offset + size + 5]
    if len(trailer) != 5 or trailer[0] != 0:
        raise ValueError("a block of the index is cut off or compressed")
    if masked_crc32c(block + trailer[:1]) != struct.unpack("<I", trailer[1:])[0]:
        raise ValueError("a block of the index does not match its checksum: the file is damaged")
    end = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0]  # the restart points and their count
    entries, key, position = {}, b"", 0
    while position < end:
        shared, fresh, length, position = read_varints(block, position, 3)
        key = key[:shared] + block[position : position + fresh]
        if len(key) > MOST_KEY:
            raise ValueError("a key of the index is too long")
        position += fresh
        entries[key] = block[position : position + length]
        position += length
    return entries


def read_varints(data: bytes, position: int, count: int) -> list[int]:
    """`count` little-endian base-128 numbers from `position` on, and the position after them."""
    numbers = []
    for _ in range(count):
        value = shift = 0
        more = True
        while more:
            value |= (data[position] & 0x7F) << shift
            more = data[position] >= 0x80
            position, shift = position + 1, shift + 7
            if shift > 70:
                raise ValueError("a number of the index is too long")
        numbers.append(value)
    return [*numbers, position]


def read_message(data: bytes) -> dict[int, list]:
    """A protocol-buffer message -> {field number: values}: numbers as int, all else as bytes."""
    fields: dict[int, list] = {}
    for field in UnknownFieldSet(Empty.FromString(data)):
        fields.setdefault(field.field_number, []).append(field.data)
    return fields


def read_object_graph(entry: Entry | None) -> dict[str, str]:
    """The string tensor of a TrackableObjectGraph -> {key in the checkpoint: name in the graph}."""
    if entry is None:
        return {}
    data = entry.read(MOST_GRAPH)
    length, position = read_varints(data, 0, 1)
    graph = TrackableObjectGraph.FromString(data[position + 4 : position + 4 + length])  # 4 bytes of checksum between
    return {found.checkpoint_key: found.full_name for node in graph.nodes for found in node.attributes}


# TensorFlow Lite: a FlatBuffer. A table is found through an offset, its fields through a small table of
# offsets before it. Field numbers below are places in schema.fbs.


def read_tflite(path: Path) -> dict:
    """The generator's convolutions, in the order in which they run; float16 values are widened."""
    if path.stat().st_size > MOST_TFLITE:
        raise ValueError(f"it has {path.stat().st_size} bytes, more than these weights")
    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ValueError("not a TensorFlow Lite file")

    def at(position, kind="<I"):
        return struct.unpack_from(kind, data, position)[0]

    def field(table, place):
        """Position of a field, 0 where it is left at its default."""
        offsets = table - at(table, "<i")
        offset = at(offsets + 4 + 2 * place, "<H") if 4 + 2 * place < at(offsets, "<H") else 0
        return table + offset if offset else 0

    def number(table, place, kind="<I"):
        position = field(table, place)
        return at(position, kind) if position else 0

    def vector(table, place, most):
        """(Position of the first element, count)."""
        position = field(table, place)
        position += at(position) if position else 0
        start, count = (position + 4, at(position)) if position else (0, 0)
        if count > most:
            raise ValueError(f"a list of {count} where the generator has at most {most}")
        return start, count

    def tables(table, place):
        start, count = vector(table, place, MOST_ENTRIES)
        return [element + at(element) for element in range(start, start + 4 * count, 4)]

    def integers(table, place):
        start, count = vector(table, place, MOST_DIMENSIONS)
        return struct.unpack_from(f"<{count}i", data, start)

    def add(tensor):
        name = next(name for name in SHAPES if name not in found)
        shape = integers(tensor, 0)
        order = (0, 3, 1, 2) if len(shape) == 4 else range(len(shape))
        check_shape(name, tuple(shape[place] for place in order))
        dtype = {0: "<f4", 1: "<f2"}[number(tensor, 1, "<b")]
        start, count = vector(buffers[number(tensor, 2)], 0, 4 * math.prod(shape))
        array = np.frombuffer(data, dtype, count // int(dtype[-1]), start)
        found[name] = np.ascontiguousarray(array.reshape(shape).transpose(*order).astype(np.float32))

    model = at(0)
    # OperatorCode: 0 deprecated_builtin_code (int8), 3 builtin_code (int32): the larger counts
    codes = [max(number(code, 0, "<b"), number(code, 3)) for code in tables(model, 1)]
    buffers = tables(model, 4)
    graph = tables(model, 2)[0]
    tensors = tables(graph, 0)

    found, source, convolutions = {}, {}, 0  # source: the tensor from which DEQUANTIZE makes another
    for operator in tables(graph, 3):
        code, inputs = codes[number(operator, 0)], integers(operator, 1)
        if code == 6:  # DEQUANTIZE
            source[integers(operator, 2)[0]] = inputs[0]
        elif code == 3:  # CONV_2D: input, weights (out, height, width, in), bias
            convolutions += 1
            for i in inputs[1:3] if len(found) < len(SHAPES) else ():
                add(tensors[source.get(i, i)])
    if 2 * convolutions != len(SHAPES):
        raise ValueError(f"it has {convolutions} convolutions, not {len(SHAPES) // 2}")
    return found
