"""Averages of the UNet's weights: the exponential moving one, that of schedule-free optimizers; what is exported."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel

from instruct_pix2pix.models import adapters
from instruct_pix2pix.training import sharding


def ema_decay(updates: int, decay: float) -> float:
    """Decay for update number `updates` (0 is the first): min((1 + t) / (10 + t), decay), so that the average soon
    forgets the start; the very first update copies. The same warm-up as diffusers' EMAModel."""
    return 0.0 if updates == 0 else min((1 + updates) / (10 + updates), decay)


class EMA:
    """The average, one float32 tensor per parameter, updated in one fused pass; of a sharded parameter each process
    keeps the average of its own piece.

    With `offload` it lives in CPU memory: less GPU memory, one copy of the weights over the bus per update. From a CUDA
    GPU that copy goes into pinned memory, of the same size again, beside the passes of the next update.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float, offload: bool = False):
        self.live = list(parameters)
        self.decay, self.updates = decay, 0
        device = torch.device("cpu") if offload else None
        own = [sharding.local(p.detach()) for p in self.live]
        self._shadow = [p.to(device=device or p.device, dtype=torch.float32, copy=True) for p in own]
        self._landing, self._lerp_weight = [], None  # copies of the weights, and their share in a lerp still to be done
        if offload and self.live[0].is_cuda:
            self._landing = [torch.empty_like(s, pin_memory=True) for s in self._shadow]
            self._stream, self._copied = torch.cuda.Stream(), torch.cuda.Event()

    @property
    def shadow(self) -> list[torch.Tensor]:
        """The average of all updates so far, a tensor per parameter."""
        self.finish_update()
        return self._shadow

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay * shadow + (1 - decay) * live. With `offload` on a GPU finish_update() must follow before the
        weights change again."""
        shadow, lerp_weight = self.shadow, 1.0 - ema_decay(self.updates, self.decay)
        self.updates += 1
        live = [sharding.local(p) for p in self.live]
        if self._landing:
            self._stream.wait_stream(torch.cuda.current_stream())  # until the weights have changed
            with torch.cuda.stream(self._stream):
                torch._foreach_copy_(self._landing, live, non_blocking=True)
                self._copied.record()
            self._lerp_weight = lerp_weight
        else:
            live = [p.to(s.device, s.dtype) for s, p in zip(shadow, live, strict=True)]
            torch._foreach_lerp_(shadow, live, lerp_weight)

    def finish_update(self) -> None:
        """Wait for the copy that update() began, if it did, and average it. Best called when the next passes have been
        launched: the GPU works on them meanwhile."""
        if self._lerp_weight is not None:
            self._copied.synchronize()
            torch._foreach_lerp_(self._shadow, self._landing, self._lerp_weight)
            self._lerp_weight = None

    @contextmanager
    def swapped_in(self):
        """The model has the averaged weights inside the `with`, and its own again after it, come what may.

        Tensors change places; nothing is copied unless the average lives elsewhere than the model. Not for sharded
        parameters, see unet_to_export.
        """
        own = [p.data for p in self.live]
        try:
            for p, s in zip(self.live, self.shadow, strict=True):
                p.data = s.to(p.device, p.dtype)
            yield
        finally:
            for p, o in zip(self.live, own, strict=True):
                p.data = o


@contextmanager
def average_swapped_in(ema: EMA | None, optimizer: torch.optim.Optimizer):
    """Inside the `with` the model has the weights that are validated and exported: the moving average's; with a
    schedule-free optimizer, which has an eval(), its average x in place of y, where gradients are taken (Defazio et al.
    2024: y = (1 - beta1) z + beta1 x, z the steps' own sequence); else its own."""
    if ema is not None:
        with ema.swapped_in():
            yield
    elif hasattr(optimizer, "eval"):
        live = [p for group in optimizer.param_groups for p in group["params"]]
        own = [p.detach().clone() for p in live]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                torch._foreach_copy_(live, own)  # to the bit: on its way there and back the optimizer rounds
    else:
        yield


@contextmanager
def unet_to_export(run, wanted: bool = True) -> Iterator[UNet2DConditionModel | None]:
    """The UNet with the averaged weights, where there is an average, inside the `with`; for the main process.

    All processes enter it. Of a sharded UNet it is a copy on the host, made where the main process `wanted` it.
    """
    if not sharding.is_sharded(run.unet):
        with average_swapped_in(run.ema, run.optimizer) if wanted else nullcontext():
            yield run.unet
        return
    (wanted,) = broadcast_object_list([wanted])
    yield _whole_unet(run) if wanted else None


@torch.no_grad()
def _whole_unet(run) -> UNet2DConditionModel | None:
    tensors = run.unet.state_dict()
    if run.ema is not None:
        trained = adapters.trained_parameters(run.unet)
        tensors |= {n: sharding.joined(s, p) for (n, p), s in zip(trained.items(), run.ema.shadow, strict=True)}
    tensors = {name: sharding.host_copy(tensor) for name, tensor in tensors.items()}
    if not run.accelerator.is_main_process:
        return None
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(run.unet.config)
        if adapters.is_attached(run.unet):
            adapters.attach(unet, run.config)
    unet.load_state_dict(tensors, assign=True)
    return unet.eval()
