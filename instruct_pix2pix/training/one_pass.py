"""Clipping, AdamW, the average and half-precision copies of the weights in one pass over memory: a Triton kernel.

An update of few images is bound by the memory that its optimizer touches. Here that is 38 bytes a parameter: the
gradient read twice (2 + 2, the norm comes first), weight, two moments and average read and written (8 each), the copy
written (2). Fused AdamW and an average, with autocast's casts of weights and gradients beside them, touch 56.

Used by --compile on one GPU, see speed.py.
"""

import copy

import torch
import triton
import triton.language as tl

from instruct_pix2pix.training.ema import EMA

CHUNK = 1024  # numbers that one program of the kernel works on: a 16-byte load of halves for each of 128 threads
ALIGNMENT = 16  # bytes, of every tensor's address: what the widest loads need
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def update_chunk(
    tensors,  # int64 (tensors, 6): how many numbers; addresses of weight, first and second moment, average, copy
    gradients,  # int64 (tensors,): addresses
    chunks,  # int32 (programs, 2): which tensor, which of its chunks
    numbers,  # float32 (6,): see OnePass.step
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPSILON: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
    GRADIENT: tl.constexpr,  # type of the gradients, and of the copies
    HAS_AVERAGE: tl.constexpr,
    HAS_COPY: tl.constexpr,
    WHOLE: tl.constexpr,  # whether every chunk is a whole one
    CHUNK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """AdamW (Loshchilov and Hutter, algorithm 2) of one chunk, in PyTorch's order of operations."""
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    row = tensors + 6 * tensor
    places = tl.load(chunks + 2 * program + 1) * CHUNK + tl.arange(0, CHUNK)
    if WHOLE:  # no mask: the loads become wide ones
        inside = tl.full([CHUNK], 1, tl.int1)
    else:
        inside = places < tl.load(row)
    gradient_at = tl.multiple_of(tl.load(gradients + tensor).to(tl.pointer_type(GRADIENT)), ALIGNMENT) + places
    weight_at = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), ALIGNMENT) + places
    first_at = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), ALIGNMENT) + places
    second_at = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), ALIGNMENT) + places
    divisor, rate, correction = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    root_correction, toward, apply = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5) != 0

    gradient = tl.div_rn(tl.load(gradient_at, mask=inside).to(tl.float32), divisor)
    old_weight = tl.load(weight_at, mask=inside)
    old_first = tl.load(first_at, mask=inside)
    old_second = tl.load(second_at, mask=inside)
    weight = old_weight - rate * WEIGHT_DECAY * old_weight
    first = old_first + (1 - BETA1) * (gradient - old_first)
    second = BETA2 * old_second + (1 - BETA2) * gradient * gradient
    denominator = tl.div_rn(tl.sqrt_rn(second), root_correction) + EPSILON
    weight -= tl.div_rn(rate / correction * first, denominator)
    weight = tl.where(apply, weight, old_weight)
    tl.store(weight_at, weight, mask=inside)
    tl.store(first_at, tl.where(apply, first, old_first), mask=inside)
    tl.store(second_at, tl.where(apply, second, old_second), mask=inside)
    if HAS_AVERAGE:
        average_at = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.float32)), ALIGNMENT) + places
        average = tl.load(average_at, mask=inside)
        # As torch.lerp: exact at both ends, so that the first update copies.
        near, far = average + toward * (weight - average), weight - (1 - toward) * (weight - average)
        tl.store(average_at, tl.where(toward < 0.5, near, far), mask=inside)
    if HAS_COPY:
        copy_at = tl.multiple_of(tl.load(row + 5).to(tl.pointer_type(GRADIENT)), ALIGNMENT) + places
        tl.store(copy_at, weight.to(GRADIENT), mask=inside)


def half_twin(unet: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module that is `unet`, sharing its norms, but for copies in `dtype` of what autocast casts: the parameters of
    convolutions and linear layers. Their gradients are what autocast would have cast to float32 afterwards."""
    layers = [m for m in unet.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    copied = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
    memo = {id(p): p for p in (*unet.parameters(), *unet.buffers())}
    memo |= {i: torch.nn.Parameter(p.detach().to(dtype)) for i, p in copied.items()}
    return copy.deepcopy(unet, memo)


class OnePass:
    """The second half of an update, on the tensors of an AdamW and an EMA, which stay their owners: checkpoints, export
    and validation see nothing new.

    unet    what forward passes are to use: the given one, or its half twin
    leaves  its parameters, where gradients gather
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        optimizer: torch.optim.AdamW,
        ema: EMA | None,
        max_grad_norm: float,
        half: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        """`unet` is in float32. `half` is autocast's type where forward passes are to use copies in it; gradients are
        in it too, so they must not add up over micro-batches. `scaler` is what scales the loss.

        Raises:
            ValueError: tensors that belong together are laid out differently in memory.
        """
        self.unet = unet if half is None else half_twin(unet, half)
        self.leaves = list(self.unet.parameters())
        self.ema, self.max_grad_norm, self.scaler = ema, max_grad_norm, scaler
        (group,) = optimizer.param_groups
        self.constants = {
            "BETA1": group["betas"][0],
            "BETA2": group["betas"][1],
            "EPSILON": group["eps"],
            "WEIGHT_DECAY": group["weight_decay"],
            "HAS_AVERAGE": ema is not None,
        }
        weights = list(unet.parameters())
        device = weights[0].device
        for weight in weights:
            if not optimizer.state[weight]:  # as AdamW would begin
                optimizer.state[weight] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [optimizer.state[weight] for weight in weights]
        self.steps = [state["step"] for state in states]
        self.rate, self.toward, self.one = (torch.ones((), device=device) for _ in range(3))

        averages = ema.shadow if ema is not None else weights
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        columns = (weights, *moments, averages, self.leaves)
        for tensors in zip(*columns, strict=True):
            if not all(_alike(tensor, tensors[0]) for tensor in tensors):
                raise ValueError(f"weight, moments and average of shape {tuple(tensors[0].shape)} lie differently")
        rows = [[tensors[0].numel(), *(t.data_ptr() for t in tensors)] for tensors in zip(*columns, strict=True)]
        self.tensors = torch.tensor(rows, device=device)
        # Where the gradients are: of a step launched by the host, and of a recorded one, which must stay as they are.
        # Two tensors, not rows of one: an address that is aligned otherwise would take another build of the kernel.
        tables = (torch.zeros(len(rows), dtype=torch.int64, device=device) for _ in range(2))
        self.addresses, self.recorded_addresses = tables
        self.recorded = []
        self.launches = list(self._launches(device))

    def _launches(self, device):
        """(chunks, constants of the kernel) for every combination of a gradient's type and whole or cut chunks."""
        for dtype in dict.fromkeys(leaf.dtype for leaf in self.leaves):
            whole, cut = [], []
            for number, leaf in enumerate(self.leaves):
                if leaf.dtype == dtype:
                    full, rest = divmod(leaf.numel(), CHUNK)
                    whole += [(number, chunk) for chunk in range(full)]
                    cut += [(number, full)] if rest else []
            constants = {**self.constants, "GRADIENT": TYPES[dtype], "HAS_COPY": dtype != torch.float32}
            for chunks in (whole, cut):
                if chunks:
                    table = torch.tensor(chunks, dtype=torch.int32, device=device)
                    yield table, {**constants, "WHOLE": chunks is whole}

    def set_rate(self, learning_rate: float) -> None:
        """Before a step: what changes from one to the next."""
        self.rate.fill_(learning_rate)
        if self.ema is not None:
            self.toward.fill_(self.ema.advance())

    @torch.no_grad()
    def step(self, dry: bool = False, recording: bool = False) -> torch.Tensor:
        """Clip and step with the leaves' gradients, and move the average; returns the gradients' norm before clipping.

        Nothing here waits for the device, so that a CUDA graph can record it. A gradient that is not finite under a
        loss scale leaves the weights alone and lowers the scale, as GradScaler does. `dry` changes nothing. While
        `recording`, nothing can be copied from the host: finish_recording() does it afterwards.
        """
        gradients = [_laid_out_as(leaf, leaf.grad) for leaf in self.leaves]
        addresses = self.recorded_addresses if recording else self.addresses
        if recording:
            self.recorded = gradients
        else:
            _write_addresses(addresses, gradients)
        scale = self.scaler.scale(self.one) if self.scaler is not None else self.one
        by_type = ([g for g in gradients if g.dtype == dtype] for dtype in dict.fromkeys(g.dtype for g in gradients))
        norms = [norm for same in by_type for norm in torch._foreach_norm(same, 2, dtype=torch.float32)]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
        divisor = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) * scale
        apply = torch.zeros_like(self.one) if dry else self.one
        if self.scaler is not None:
            apply = apply * torch.isfinite(norm)
        torch._foreach_add_(self.steps, [apply] * len(self.steps))
        step = self.steps[0].double()
        correction = 1 - self.constants["BETA1"] ** step
        root_correction = (1 - self.constants["BETA2"] ** step).sqrt()
        toward = torch.zeros_like(self.one) if dry else self.toward
        numbers = torch.stack([divisor, self.rate, correction, root_correction, toward, apply]).float()
        sizes = {"CHUNK": CHUNK, "ALIGNMENT": ALIGNMENT}
        for chunks, constants in self.launches:
            update_chunk[(len(chunks),)](self.tensors, addresses, chunks, numbers, **constants, **sizes)
        if self.scaler is not None:
            # What GradScaler.update does with the infinities that its own pass over the gradients would have found.
            state = (self.scaler._scale, self.scaler._growth_tracker)
            if dry:
                state = [tensor.clone() for tensor in state]
            factors = (self.scaler.get_growth_factor(), self.scaler.get_backoff_factor())
            torch._amp_update_scale_(*state, 1 - apply, *factors, self.scaler.get_growth_interval())
        return norm

    def finish_recording(self) -> None:
        """Tell the recorded kernel where the recorded gradients are; they stay there for every replay."""
        _write_addresses(self.recorded_addresses, self.recorded)


def _write_addresses(table: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    """From pinned memory, so that the host need not wait for the GPU to come to it."""
    addresses = torch.tensor([gradient.data_ptr() for gradient in gradients], pin_memory=table.is_cuda)
    table.copy_(addresses, non_blocking=True)


def _alike(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the numbers of two tensors of a shape follow each other in the same order, from an aligned address."""
    strides = ((a, b) for a, b, size in zip(tensor.stride(), other.stride(), tensor.shape, strict=True) if size > 1)
    return all(a == b for a, b in strides) and tensor.data_ptr() % ALIGNMENT == 0


def _laid_out_as(leaf: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient itself, as good as always."""
    return gradient if _alike(gradient, leaf) else torch.empty_like(leaf).copy_(gradient)
