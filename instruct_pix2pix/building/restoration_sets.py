"""The public restoration sets as they are downloaded and as others rearrange them: which file is whose ground truth.

A set is recognised by the names of folders and files on the way to an image, at any depth and in any case, so
that an archive may be unpacked as it is, or nested once more, and one part of a set will do. `pairs.py` reads them.
"""

import re
from collections.abc import Callable
from typing import NamedTuple


class RestorationSet(NamedTuple):
    task: str
    layouts: str  # what is looked for, for --help and for a user whose folder has none of it
    about: str
    # Of each layout two patterns, for an input's and a target's path in lower case without its ending. The groups hold
    # what the paths of a pair have in common. The first pattern that fits the whole path counts.
    patterns: list[tuple[str, str]]
    splits: dict[str, str] = {}  # further folder names that tell a split
    several_inputs: bool = False  # whether one ground truth has several degraded images
    second_choice: str = ""  # pattern of inputs that count only where the same frame is in no other format
    halves: str = ""  # pattern of files that hold the ground truth on the left and the input on the right
    lists: str = ""  # pattern of the names of text files that tell the split of the paths in them
    scene: Callable[[str], str] | None = None  # of a path: what stays in one split, for a set without its own splits


def named(train: str = "", test: str = "") -> dict[str, str]:
    return {**dict.fromkeys(train.split(), "train"), **dict.fromkeys(test.split(), "test")}


def sidd_scene(path: str) -> str:
    """<instance>_<scene>_<phone>_... names an instance: ten scenes were taken many times. A file that tells no scene
    begins with the number of its instance or picture."""
    folder, name = path.split("/")[-2:]
    if match := re.match(r"\d+_(\d+)_", folder) or re.match(r"\d+_(\d+)_[a-z]", name):
        return match[1]
    match = re.match(r"\d+(?=[_-])", name)
    return match[0] if match else folder


BESIDE = r"(.*/)input/([^/]+)", r"(.*/)target/([^/]+)"  # .../{input,target}/<name>

SETS = {
    "reds": RestorationSet(
        "deblur",
        "{train,val}_{sharp,blur,blur_jpeg}/<clip>/ or {train,val}/{sharp,blur}/<clip>/",
        "REDS (Nah et al., CVPRW 2019), CC BY 4.0",
        [
            (
                r"(?:.*/)?(train|val)[_/]blur(?:_jpeg)?/([^/]+)/([^/]+)",
                r"(?:.*/)?(train|val)[_/]sharp/([^/]+)/([^/]+)",
            )
        ],
        named(train="train_sharp train_blur train_blur_jpeg")
        | dict.fromkeys(("val_sharp", "val_blur", "val_blur_jpeg"), "validation"),
        second_choice=r"blur_jpeg/",
    ),
    "gopro": RestorationSet(
        "deblur",
        "{train,test}/<clip>/{blur,blur_gamma,sharp}/, {train,test}/{input,target}/ or "
        "{train,test}/{blur_crops,sharp_crops}/",
        "GoPro (Nah et al., CVPR 2017), CC BY 4.0",
        [
            (
                r"(.*/)(?:blur|blur_gamma|input|blur_crops|input_crops)/([^/]+)",
                r"(.*/)(?:sharp|target|sharp_crops|target_crops)/([^/]+)",
            )
        ],
        several_inputs=True,
    ),
    "hide": RestorationSet(
        "deblur",
        "{train,test}/{input,target}/, or train/, test/{test-close-ups,test-long-shot}/ and GT/",
        "HIDE (Shen et al., ICCV 2019), see its page for the terms",
        [BESIDE, (r"(.*/)(?:train|test(?:/test-close-ups|/test-long-shot)?)/([^/]+)", r"(.*/)gt/([^/]+)")],
    ),
    "realblur": RestorationSet(
        "deblur",
        "RealBlur-{J,R}_*/scene<number>/{blur,gt}/ with RealBlur_{J,R}_{train,test}_list.txt, or "
        "{train,test}/[RealBlur_{J,R}/]{input,target}/",
        "RealBlur (Rim et al., ECCV 2020), see its page for the terms",
        [
            (r"(.*/)blur/blur_(\d+)", r"(.*/)gt/gt_(\d+)"),
            (r"(.*/)input/([^/]*?)(?:blur_|gt_)?(\d+)", r"(.*/)target/([^/]*?)(?:blur_|gt_)?(\d+)"),
        ],
        lists=r"realblur_[jr]_(train|test)_list\.txt",
    ),
    "rain13k": RestorationSet(
        "derain",
        "train/[Rain13K/]{input,target}/, test/{Test100,Rain100H,Rain100L,Test2800,Test1200}/{input,target}/",
        "Rain13k (as gathered for MPRNet, CVPR 2021, from several sets, each under its own terms)",
        [BESIDE],
        named(test="test100 rain100h rain100l test2800 test1200"),
    ),
    "rain": RestorationSet(
        "derain",
        "Rain100L and Rain100H (rain_data_{train,test}_{Light,Heavy}/{rain,norain}/, RainTrain{L,H}/[no]rain-<n>.png, "
        "Rain100{L,H}/{input,target}/), Rain800 (rain/{training,test_syn}/), Rain1400 ({training,testing}/"
        "{rainy_image,ground_truth}/), Outdoor-Rain ({train,test}/{in,gt}/)",
        "Rain100L and Rain100H (Yang et al., CVPR 2017), Rain800 (Zhang et al., 2017), Rain1400 (Fu et al., CVPR "
        "2017), Outdoor-Rain (Li et al., CVPR 2019): each under its own terms",
        [
            (r"(.*?/)rainy?/(?:x2/)?(?:(?:no)?rain-?)?([^/]+?)(?:x2)?", r"(.*?/)norain/(?:norain-?)?([^/]+)"),
            (r"(.*/)rain-?(\d+)", r"(.*/)norain-?(\d+)"),
            (r"(.*/)rainy_image/(\d+)_\d+", r"(.*/)ground[_ ]truth/(\d+)"),
            (r"(.*/)(?:in|input|data)/([^/]+?)(?:_s\d+_a\d+)?", r"(.*/)(?:gt|target)/([^/]+)"),
        ],
        named(
            train="rain_data_train_light rain_data_train_heavy rain_light_train rain_heavy_train raintrainl raintrainh "
            "rain12600",
            test="rain_data_test_light rain_data_test_heavy rain_light_test rain_heavy_test rain100l rain100h rain1400 "
            "test_syn test_with_train_param_v5 test100 test1200 test2800",
        ),
        several_inputs=True,
        halves=r".*/rain(?:800)?/(?:training|test_syn)/[^/]+",
    ),
    "sidd": RestorationSet(
        "denoise",
        "Data/<instance>/[<number>_]NOISY_SRGB_010.PNG and [<number>_]GT_SRGB_010.PNG, all of them in one folder, or "
        "[{train,val}/]{input,input_crops}/ and {gt,groundtruth,target,gt_crops,target_crops}/",
        "SIDD (Abdelhamed et al., CVPR 2018), see its page for the terms",
        [
            # Of a crop, the ground truth may be named after the noisy picture: the folder tells.
            tuple(
                rf"(.*/)(?:{folders})/(?:([^/]*?)(?:noisy|gt)_(srgb[^/]*)|([^/]+))"
                for folders in ("input|input_crops|noisy", "gt|groundtruth|target|gt_crops|target_crops|clean")
            ),
            (r"(.*/)(?:([^/]*)_)?noisy_srgb_([^/]+)", r"(.*/)(?:([^/]*)_)?gt_srgb_([^/]+)"),
        ],
        scene=sidd_scene,
    ),
    "lol": RestorationSet(
        "enhance",
        "our485/{low,high}/ and eval15/{low,high}/, {Real_captured,Synthetic}/{Train,Test}/{Low,Normal}/ or "
        "{Train,Test}/{input,target}/",
        "LOL (Wei et al., BMVC 2018; version 2: Yang et al., TIP 2021), see its page for the terms",
        [
            (r"(.*/)low/(?:low(?=\d))?([^/]+)", r"(.*/)(?:high|normal)/(?:normal(?=\d))?([^/]+)"),
            BESIDE,
        ],
        named(train="our485", test="eval15"),
    ),
    "raindrop": RestorationSet(
        "deraindrop",
        "train/{data,gt}/, test_a/{data,gt}/, test_b/{data,gt}/ with <number>_rain and <number>_clean",
        "RainDrop (Qian et al., CVPR 2018), see its page for the terms",
        [(r"(.*/)data/(\d[^/]*?)(?:_rain)?", r"(.*/)gt/(\d[^/]*?)(?:_clean)?")],
        named(test="test_a test_b"),  # test_a is part of test_b
    ),
}
