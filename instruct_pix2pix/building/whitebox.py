"""White-box CartoonGAN in PyTorch: the generator, its guided filter, and the two as a cartoonizer.

Xinrui Wang and Jinze Yu, "Learning to Cartoonize Using White-Box Cartoon Representations", CVPR 2020. The
weights are licensed CC BY-NC-SA 4.0: no commercial use.
"""

import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate, leaky_relu, pad


def convolution(into: int, out: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    # TensorFlow pads an even size for stride 2 at the right and bottom only; `downsample` does that itself.
    return nn.Conv2d(into, out, side, stride, padding="same" if stride == 1 else 0)


def activate(x):
    return leaky_relu(x, 0.2, inplace=True)


def downsample(layer: nn.Conv2d, x):
    return activate(layer(pad(x, (0, 1, 0, 1))))


def upsample(x):
    """TensorFlow 1's bilinear x2: even places copy, odd places average two neighbours, the last one repeats.

    None of `interpolate`'s modes is that, but with the border repeated once, aligned corners give a step of one half.
    """
    height, width = x.shape[2:]
    x = pad(x, (0, 1, 0, 1), mode="replicate")
    x = interpolate(x, size=(2 * height + 1, 2 * width + 1), mode="bilinear", align_corners=True)
    return x[..., :-1, :-1]


def convolve_to_few(layer: nn.Conv2d, x):
    """`layer(x)` for a wide kernel and few output channels, which processors pad to 16 and compute in vain.

    Each row of the kernel is a convolution with outputs of its own; the results are shifted and added. The same sums,
    less than half the time on a CPU.
    """
    out, into, side, _ = layer.weight.shape
    rows = layer.weight.permute(2, 0, 1, 3).reshape(side * out, into, 1, side)
    y = conv2d(x, rows.contiguous(memory_format=torch.channels_last), padding=(0, side // 2))
    y = pad(y.contiguous(), (0, 0, side // 2, side // 2))
    parts = (y[:, i * out : (i + 1) * out, i : i + x.shape[2]] for i in range(side))
    return sum(parts) + layer.bias[:, None, None]


class Generator(nn.Module):
    """The authors' `unet_generator`: a U-Net whose skips are added; no normalisation, no output activation.

    (B, 3, H, W) float BGR in [-1, 1] -> the same shape, about [-1, 1] but not clipped. H and W are multiples
    of 4.
    """

    def __init__(self):
        super().__init__()
        self.conv0 = convolution(3, 32, side=7)
        self.conv1 = convolution(32, 32, stride=2)
        self.conv2 = convolution(32, 64)
        self.conv3 = convolution(64, 64, stride=2)
        self.conv4 = convolution(64, 128)
        for i in range(4):
            block = nn.ModuleDict({"conv1": convolution(128, 128), "conv2": convolution(128, 128)})
            self.add_module(f"block{i}", block)
        self.conv5 = convolution(128, 64)
        self.conv6 = convolution(64, 64)
        self.conv7 = convolution(64, 32)
        self.conv8 = convolution(32, 32)
        self.conv9 = convolution(32, 3, side=7)

    def forward(self, x):
        x0 = activate(self.conv0(x))  #                          (B,  32, H,   W)
        x1 = activate(self.conv2(downsample(self.conv1, x0)))  # (B,  64, H/2, W/2)
        x = activate(self.conv4(downsample(self.conv3, x1)))  #  (B, 128, H/4, W/4)
        for block in (self.block0, self.block1, self.block2, self.block3):
            x = x + block["conv2"](activate(block["conv1"](x)))
        x = activate(self.conv5(x))  #                           (B,  64, H/4, W/4)
        x = activate(self.conv6(upsample(x) + x1))  #            (B,  64, H/2, W/2)
        x = activate(self.conv7(x))  #                           (B,  32, H/2, W/2)
        x = activate(self.conv8(upsample(x) + x0))  #            (B,  32, H,   W)
        return convolve_to_few(self.conv9, x)  #                 (B,   3, H,   W)


def guided_filter(guide, source, radius: int = 1, eps: float = 5e-3):
    """He, Sun and Tang, "Guided Image Filtering" (2010), equations 5, 6 and 8, for every channel by itself.

    guide, source: (B, C, H, W) float32. In each window of side 2 * radius + 1, cut off at the border, the
    output is a linear function of the guide: `source` with the fine structure of `guide`.
    """

    def box(x):  # rows, then columns: sums of shifted slices, many times faster than avg_pool2d on a CPU
        for axis, margin in ((2, (0, 0, radius, radius)), (3, (radius, radius))):
            padded = pad(x, margin)
            x = sum(padded.narrow(axis, i, x.shape[axis]) for i in range(2 * radius + 1))
        return x

    def mean(x):
        return box(x) / size

    size = box(torch.ones_like(guide[:1, :1]))
    mean_guide, mean_source = mean(guide), mean(source)
    covariance = mean(guide * source) - mean_guide * mean_source
    variance = mean(guide * guide) - mean_guide * mean_guide
    slope = covariance / (variance + eps)
    return mean(slope) * guide + mean(mean_source - slope * mean_guide)


def load_generator(weights: dict, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Generator:
    """The generator with `weights` (see whitebox_weights.py), ready to run."""
    generator = Generator()
    generator.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return generator.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)


def whitebox_cartoonizer(weights: dict, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    """Make a cartoonizer of `weights` (see whitebox_weights.py): (B, H, W, 3) uint8 RGB -> the same shape.

    The sides must be multiples of 4. The generator runs in `dtype` on `device`, the guided filter in float32
    always: the variance in a nearly flat window vanishes in half precision.
    """
    generator = load_generator(weights, device, dtype)
    torch.backends.cudnn.benchmark = False  # the same algorithm in every run: the same bytes
    torch.backends.cudnn.deterministic = True

    @torch.inference_mode()
    def cartoonize(images):
        rgb = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()
        photo = rgb.flip(1).contiguous() / 127.5 - 1  # the network was trained on OpenCV's BGR
        cartoon = guided_filter(photo, generator(photo.to(dtype)).float())
        # Truncated, not rounded, as the reference's conversion to uint8 does.
        bgr = ((cartoon + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return bgr.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    return cartoonize
