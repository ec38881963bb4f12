"""Metrics against values known by arithmetic, networks' ones on tiny random backbones."""

from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import correlate
from skimage.metrics import structural_similarity

from instruct_pix2pix.evaluation import metrics, perceptual, protocols
from instruct_pix2pix.evaluation.protocols import PLAIN

GRAY = np.full((32, 32, 3), 100, np.uint8)


def random_image(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_by_arithmetic():
    image = np.full((16, 16, 3), 100, np.uint8)
    assert metrics.psnr(image, image) == 100.0
    assert metrics.psnr(image, image + 5) == pytest.approx(20 * np.log10(255 / 5))
    half = image.copy()
    half[:8] += 10  # mean squared error 50
    assert metrics.psnr(half, image) == pytest.approx(10 * np.log10(255**2 / 50))


def test_ssim_is_one_for_equal_images_and_falls_with_blur_and_noise(photos):
    photo = np.asarray(photos[0])
    small = np.asarray(photos[0].reduce(2).resize(photos[0].size))
    noise = np.random.default_rng(0).normal(0, 40, photo.shape)
    noisy = np.clip(photo + noise, 0, 255).astype(np.uint8)
    assert metrics.ssim(photo, photo) == pytest.approx(1.0)
    assert 0 < metrics.ssim(noisy, photo) < metrics.ssim(small, photo) < 1


def test_y_of_known_colours():
    colours = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert metrics.luma(colours).tolist() == [[235, 16, 81, 145, 41]]
    assert metrics.luma(colours, "swapped")[0] == pytest.approx([235, 16, 40.966, 144.553, 81.481])


def test_rgb_and_y_disagree_by_what_the_formula_says():
    bluer = GRAY + np.array([0, 0, 30], np.uint8)
    found = metrics.pixel_scores(bluer, GRAY, PLAIN)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / 300))  # 30 squared, in one channel of three
    # Y goes from 101.88 to 104.82, which MATLAB rounds to 102 and 105.
    assert found["psnr_y"] == pytest.approx(20 * np.log10(255 / 3)) and found["psnr_y"] > found["psnr"] + 15
    swapped = metrics.pixel_scores(bluer, GRAY, protocols.find("instructir", "Rain100L"))
    assert swapped["psnr_y"] == pytest.approx(20 * np.log10(255 / (65.481 * 30 / 255)))
    assert swapped["psnr"] == found["psnr"]


def test_absolute_and_squared_errors_are_magicbrushs():
    found = metrics.pixel_scores(GRAY + np.array([0, 0, 51], np.uint8), GRAY, PLAIN)
    assert (found["l1"], found["l2"]) == pytest.approx((0.2 / 3, 0.04 / 3))


def one_window(image: np.ndarray, target: np.ndarray, weights: np.ndarray, unbiased: float) -> float:
    """SSIM of a single window, by the formula."""
    mean_i, mean_t = (weights * image).sum(), (weights * target).sum()
    var_i, var_t = (unbiased * (weights * (side - m) ** 2).sum() for side, m in ((image, mean_i), (target, mean_t)))
    covariance = unbiased * (weights * (image - mean_i) * (target - mean_t)).sum()
    c1, c2 = 6.5025, 58.5225  # (0.01 x 255)^2, (0.03 x 255)^2
    return (2 * mean_i * mean_t + c1) * (2 * covariance + c2) / ((mean_i**2 + mean_t**2 + c1) * (var_i + var_t + c2))


def test_ssim_windows_by_the_formula():
    bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    bell = np.outer(bell, bell) / bell.sum() ** 2
    image, target = (random_image(seed, 11, 11).astype(float) for seed in (0, 1))  # as large as the window: one value
    assert metrics.ssim(image, target) == pytest.approx(one_window(image, target, bell, 1), abs=1e-5)
    image, target = image[:7, :7], target[:7, :7]
    expected = one_window(image, target, np.full((7, 7), 1 / 49), 49 / 48)
    assert metrics.ssim(image, target, "uniform") == pytest.approx(expected)


def test_ssim_of_matlab_takes_a_colour_image_for_a_volume():
    image, target = random_image(0, 20, 30, 3), random_image(1, 20, 30, 3)
    padded = [np.pad(side, 5, mode="edge") for side in (image, target)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    assert metrics.ssim(image, target, "matlab") == pytest.approx(structural_similarity(*padded, **options))
    values = {window: metrics.ssim(image, target, window) for window in protocols.WINDOWS}
    assert len({round(value, 3) for value in values.values()}) == 3
    found = metrics.pixel_scores(image, target, protocols.find("restormer", "gopro"))
    assert found["ssim"] == values["matlab"]


def cosine(a, b) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(__file__).parents[1] / "assets/tiny-instruct-pix2pix/tokenizer")


def tiny(**more) -> dict:
    return {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **more}


def standardised(image, mean, deviation) -> torch.Tensor:
    return torch.tensor((image / 255 - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]


@torch.no_grad()
def test_clip_scores_on_a_tiny_backbone(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = tiny(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    vision = tiny(image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    measures = [perceptual.clip_measure(model, tokenizer, "cpu")]
    edit, target, source = (random_image(seed, 32, 32, 3) for seed in range(3))
    found = perceptual.scores(measures, edit, target, source, "blur it")

    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    of = [
        model.get_image_features(standardised(side, mean, deviation)).pooler_output[0]
        for side in (edit, target, source)
    ]
    a, b, c = (features.numpy() / np.linalg.norm(features) for features in of)
    words = model.get_text_features(**tokenizer(["blur it"], return_tensors="pt")).pooler_output[0].numpy()
    expected = {"clip_i": cosine(a, b), "clip_t": cosine(a, words), "clip_direction": cosine(a - c, b - c)}
    assert found == pytest.approx(expected, abs=1e-5)
    assert perceptual.scores(measures, target, target, source, "")["clip_direction"] == pytest.approx(1, abs=1e-5)
    assert perceptual.scores(measures, source, target, source, "word " * 200)["clip_direction"] == 0


@torch.no_grad()
def test_dino_scores_on_a_tiny_backbone():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**tiny(image_size=28, patch_size=7)), add_pooling_layer=False).eval()
    images = [random_image(seed, 32, 40, 3) for seed in range(2)]
    found = perceptual.scores([perceptual.dino_measure(model, "cpu")], *images, images[0], "")
    # The shorter side is 32 = 28 x 256 / 224 already, so that only the centre is cut out.
    views = [standardised(image[2:30, 6:34], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for image in images]
    tokens = [model(view).last_hidden_state[0, 0].numpy() for view in views]
    assert found == {"dino": pytest.approx(cosine(*tokens), abs=1e-5)}


class MeanColour(torch.nn.Module):
    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


def test_frechet_distance_by_the_formula():
    pytest.importorskip("torchmetrics")
    rows = [[random_image(50 * row + seed, 4, 4 + seed % 2, 3) // (1 + row) for seed in range(20)] for row in range(2)]
    (mean_a, cov_a), (mean_b, cov_b) = (
        (features.mean(0), np.cov(features.T)) for features in (np.array([i.mean((0, 1)) for i in row]) for row in rows)
    )
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert perceptual.fid(*rows, feature=MeanColour()) == pytest.approx(expected)
    assert perceptual.fid(rows[0], rows[0], feature=MeanColour()) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No weights in any cache, and nothing to be reached."""
    import huggingface_hub

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(huggingface_hub, "file_exists", fail)
    monkeypatch.setattr(perceptual, "urlopen", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def test_what_cannot_be_had_is_named_with_its_reason(offline):
    measures, skipped = perceptual.load()
    networks = {"lpips", "dists", "clip_i", "clip_t", "clip_direction", "dino", "fid"}
    assert networks <= set(skipped) <= networks | {"gmsd", "haarpsi"}
    assert all(
        "\n" not in reason and ("no network" in reason or "pip install" in reason) for reason in skipped.values()
    )
    had = perceptual.scores(measures, GRAY, GRAY, GRAY, "")
    own = metrics.pixel_scores(GRAY, GRAY, PLAIN)
    assert {*own, *had, *skipped} == set(metrics.METRICS)


def test_weights_of_the_cache_are_loaded_without_asking_the_hub(offline, monkeypatch, tmp_path):
    import huggingface_hub
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**tiny(image_size=28, patch_size=7)), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: str(tmp_path / "vit/config.json"))
    monkeypatch.setattr(perceptual, "DINO", str(tmp_path / "vit"))
    monkeypatch.setattr(perceptual, "CLIP", str(tmp_path / "missing"))
    measures, skipped = perceptual.load()
    assert perceptual.scores(measures, GRAY, GRAY, GRAY, "")["dino"] == pytest.approx(1)
    assert "dino" not in skipped and "missing: neither in the cache" in skipped["clip_i"]
    asked = perceptual._from_hub("cached", SimpleNamespace(from_pretrained=lambda name, **options: options))
    assert asked == {"local_files_only": True}


def test_a_tokenizer_whose_words_are_not_in_the_cache_is_not_taken_from_there(monkeypatch, tmp_path):
    """Of the model alone, transformers makes a tokenizer that knows no word, without a complaint."""
    import huggingface_hub
    from huggingface_hub import constants
    from transformers import CLIPConfig, CLIPTokenizer

    cache = tmp_path / "models--owner--clip"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("1")
    CLIPConfig().save_pretrained(cache / "snapshots/1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: False)
    with pytest.raises(perceptual.Unavailable, match="owner/clip: neither in the cache nor from the Hub"):
        perceptual._from_hub("owner/clip", CLIPTokenizer, "vocab.json")


def test_gmsd_and_haarpsi_of_piq(offline):
    pytest.importorskip("piq")
    measures, _ = perceptual.load()
    target, edit = random_image(0, 32, 32, 3), random_image(1, 32, 32, 3)
    found, same = (perceptual.scores(measures, side, target, target, "") for side in (edit, target))
    assert same == pytest.approx({"gmsd": 0, "haarpsi": 1}, abs=1e-5) and found["haarpsi"] < 0.9
    # Xue et al. 2013: luma halved by averaging, Prewitt gradients, the deviation of their similarity.
    prewitt = np.array([[1, 0, -1]] * 3) / 3

    def gradient(image):
        luma = (image / 255) @ [0.299, 0.587, 0.114]
        half = luma.reshape(16, 2, 16, 2).mean((1, 3))
        return np.hypot(*(correlate(half, kernel, mode="constant") for kernel in (prewitt, prewitt.T)))

    a, b = gradient(edit), gradient(target)
    assert found["gmsd"] == pytest.approx(np.std((2 * a * b + 170 / 255**2) / (a**2 + b**2 + 170 / 255**2)), abs=1e-4)


def test_lpips_of_piq_on_a_random_backbone(offline, monkeypatch):
    piq = pytest.importorskip("piq")
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    features = make_layers([width if width == "M" else width // 16 for width in cfgs["D"]]).eval()
    weights = [torch.rand(1, width // 16, 1, 1) for width in (64, 128, 256, 512, 512)]
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **options: SimpleNamespace(features=features))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **options: weights)
    monkeypatch.setattr(perceptual, "_check_weights", lambda *urls: None)
    edit, target = random_image(0, 32, 32, 3), random_image(1, 32, 32, 3)
    measure = perceptual._load_piq("lpips", "cpu")
    found = perceptual.scores([measure], edit, target, target, "")["lpips"]

    layers, expected = (3, 8, 15, 22, 29), 0.0  # the last activation of each of the five blocks
    a, b = (standardised(side, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for side in (edit, target))
    with torch.no_grad():
        for number, module in enumerate(features):
            a, b = module(a), module(b)
            if number in layers:
                unit = [side / (side.norm(dim=1, keepdim=True) + 1e-10) for side in (a, b)]
                expected += float((weights[layers.index(number)] * (unit[0] - unit[1]) ** 2).sum(1).mean())
    assert found == pytest.approx(expected, rel=1e-3) and found > 0.01
    assert perceptual.scores([measure], target, target, target, "")["lpips"] == 0
