"""Exponential moving average of the UNet's weights."""

from contextlib import contextmanager

import torch


def ema_decay(updates: int, decay: float) -> float:
    """Decay for update number `updates` (0 is the first): min((1 + t) / (10 + t), decay), so that the average soon
    forgets the start; the very first update copies. The same warm-up as diffusers' EMAModel."""
    return 0.0 if updates == 0 else min((1 + updates) / (10 + updates), decay)


class EMA:
    """The average, one float32 tensor per parameter, updated in one fused pass.

    With `offload` it lives in CPU memory: less GPU memory, one copy of the weights over the bus per update.
    """

    def __init__(self, parameters, decay: float, offload: bool = False):
        self.live = list(parameters)
        self.decay, self.updates = decay, 0
        device = torch.device("cpu") if offload else None
        self.shadow = [p.detach().to(device=device or p.device, dtype=torch.float32, copy=True) for p in self.live]

    def before_step(self) -> None:
        pass

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay * shadow + (1 - decay) * live."""
        live = [p.detach().to(s.device, s.dtype) for s, p in zip(self.shadow, self.live, strict=True)]
        torch._foreach_lerp_(self.shadow, live, self.advance())

    def advance(self) -> float:
        """Count an update; returns the share that the live weights have in it."""
        share = 1.0 - ema_decay(self.updates, self.decay)
        self.updates += 1
        return share

    @contextmanager
    def swapped_in(self):
        """The model has the averaged weights inside the `with`, and its own again after it, come what may.

        Tensors change places; nothing is copied unless the average lives elsewhere than the model.
        """
        own = [p.data for p in self.live]
        try:
            for p, s in zip(self.live, self.shadow, strict=True):
                p.data = s.to(p.device, p.dtype)
            yield
        finally:
            for p, o in zip(self.live, own, strict=True):
                p.data = o
