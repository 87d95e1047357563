"""FLOPs of a language model by mixer, and the peak they are compared with.

A multiply-add counts as 2. Forward FLOPs per token and layer, with d = d_model, e = d_inner,
n = d_state, w = width of the convolution:

Mamba-1, with r = dt_rank:
    in_proj   2 d 2e          conv   2 w e          x_proj   2 e (r + 2n)
    dt_proj   2 r e           scan   7 e n          out_proj 2 e d

Mamba-2, with h heads, g groups, and q the average number of positions in the chunk of a token:
    in_proj   2 d (2e + 2gn + h)     conv   2 w (e + 2gn)     out_proj 2 e d
    ssd       2 q (gn + e) + 4 e n

Attention, with h heads and k heads of keys and values of dimension p, over length l:
    in_proj   2 d (h + 2k) p         conv   2 w (h + 2k) p    out_proj 2 h p d
    attention 4 l h p

MLP, with m = d_intermediate: 6 d m. And 2 d V once for the head over V vocabulary rows.

The scan's 7 per (token, channel, state) are one exp and six fp32 operations: dt*A, (dt*x)*B, the
multiply-adds of a*h + b and of y + C*h. SSD's four matrix products in a chunk are C Bᵀ, its product
with x, C with the state before the chunk, and x Bᵀ into the state after it. The triangles of SSD and
of attention are counted as whole squares, as is usual (arXiv 2204.02311, appendix B). Norms, gates,
activations and the embedding's look-up are left out: their cost is bytes, not FLOPs. The backward
pass costs twice the forward. Recomputation of activations is not counted, so the ratio is MFU, not
HFU.
"""

import time
from dataclasses import asdict, astuple, dataclass

import torch

from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.model.language_model import padded_vocab_size

SCAN_FLOPS_PER_STATE = 7
MEASURE_SECONDS = 0.15

# Dense peaks in TFLOP/s from NVIDIA's datasheets: fp16/bf16 tensor cores with fp32 accumulation, TF32
# tensor cores, fp32 without tensor cores. The first name contained in the device's name counts, so
# the more specific one of a family comes first. None: the device has no such unit.
_DATASHEET_TFLOPS: dict[str, tuple[float | None, float | None, float]] = {
    "GB200": (2500.0, 1250.0, 80.0),
    "B200": (2250.0, 1125.0, 75.0),
    "GH200": (989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100 PCIe": (756.5, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "H800": (989.4, 494.7, 66.9),
    "A100": (312.0, 156.0, 19.5),
    "A800": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "A10G": (70.0, 35.0, 31.5),
    "A10": (125.0, 62.5, 31.2),
    "A30": (165.0, 82.0, 10.3),
    "A40": (149.7, 74.8, 37.4),
    "RTX 6000 Ada": (364.2, 182.1, 91.1),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 5090": (209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs per token of each component, summed over the layers."""

    in_proj: int = 0
    conv: int = 0
    x_proj: int = 0
    dt_proj: int = 0
    scan: int = 0
    ssd: int = 0
    attention: int = 0
    out_proj: int = 0
    mlp: int = 0
    head: int = 0

    def __add__(self, other: "FlopsPerToken") -> "FlopsPerToken":
        return FlopsPerToken(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def by_component(self) -> dict[str, int]:
        """The components by name."""
        return asdict(self)

    @property
    def forward(self) -> int:
        """FLOPs per token of one forward pass."""
        return sum(astuple(self))

    @property
    def training(self) -> int:
        """FLOPs per token of one forward and backward pass."""
        return 3 * self.forward


@dataclass(frozen=True)
class PeakFlops:
    """The most FLOP/s a device can do, and where the figure is from (`datasheet` or `measured`)."""

    flops_per_second: float
    source: str


def flops_per_token(model: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """Count the FLOPs of a model; the formulas are at the top of this module.

    model: resolved (`resolve_model_config`). sequence_length: tokens the model sees at once, which decides
    the cost of attention and of SSD's last chunk.
    """
    total = FlopsPerToken(head=2 * model.d_model * padded_vocab_size(model))
    for mixer in layer_mixers(model):
        if mixer is MixerKind.attention:
            total += _attention(model, sequence_length)
        elif mixer is MixerKind.mamba2:
            total += _mamba2(model, sequence_length)
        else:
            total += _mamba1(model)
        total += FlopsPerToken(mlp=6 * model.d_model * model.d_intermediate)
    return total


def _mamba1(model: ModelConfig) -> FlopsPerToken:
    d, e, n = model.d_model, model.expand * model.d_model, model.d_state
    assert model.dt_rank is not None, "resolve the model config first"
    return FlopsPerToken(
        in_proj=2 * d * 2 * e,
        conv=2 * model.d_conv * e,
        x_proj=2 * e * (model.dt_rank + 2 * n),
        dt_proj=2 * model.dt_rank * e,
        scan=SCAN_FLOPS_PER_STATE * e * n,
        out_proj=2 * e * d,
    )


def _mamba2(model: ModelConfig, length: int) -> FlopsPerToken:
    d, e, n = model.d_model, model.expand * model.d_model, model.d_state
    heads, BC = e // model.head_dim, model.n_groups * n
    whole_chunks, rest = divmod(length, model.chunk_size)
    chunk = (whole_chunks * model.chunk_size**2 + rest**2) / length
    return FlopsPerToken(
        in_proj=2 * d * (2 * e + 2 * BC + heads),
        conv=2 * model.d_conv * (e + 2 * BC),
        ssd=round(2 * chunk * (BC + e)) + 4 * e * n,
        out_proj=2 * e * d,
    )


def _attention(model: ModelConfig, length: int) -> FlopsPerToken:
    heads, kv_heads, head_dim = model.attention_heads, model.attention_kv_heads, model.attention_head_dim
    assert heads is not None, "config_checks asks for it"
    assert kv_heads is not None, "resolve the model config first"
    assert head_dim is not None, "resolve the model config first"
    channels = (heads + 2 * kv_heads) * head_dim
    return FlopsPerToken(
        in_proj=2 * model.d_model * channels,
        conv=2 * model.attention_d_conv * channels,
        attention=4 * length * heads * head_dim,
        out_proj=2 * heads * head_dim * model.d_model,
    )


def mfu(tokens_per_second: float, flops: FlopsPerToken, peak: PeakFlops) -> float:
    """Model FLOPs utilisation of training: the share of one device's peak that its own tokens need."""
    return tokens_per_second * flops.training / peak.flops_per_second


def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """Peak of one device for matrix products of `dtype` (fp32, bf16 or fp16).

    Known NVIDIA GPUs: the datasheet's dense figure, TF32 for fp32 products when PyTorch may use
    it. Everything else: the best of a few square matrix products, measured in at most 0.3 s with
    the threads PyTorch has now.
    """
    if device.type == "cuda":
        known = datasheet_peak(torch.cuda.get_device_name(device), dtype)
        if known is not None:
            return PeakFlops(known, "datasheet")
    return PeakFlops(_measure_peak(device, dtype), "measured")


def datasheet_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """The datasheet's FLOP/s of matrix products of `dtype` for a device's name; None: not known."""
    name = device_name.lower()
    if "laptop" in name or "mig " in name:  # a slower chip of the same name, or a slice of the chip
        return None
    row = next((peaks for key, peaks in _DATASHEET_TFLOPS.items() if _names(key.lower(), name)), None)
    if row is None:
        return None
    half, tf32, fp32 = row
    single = fp32 if torch.get_float32_matmul_precision() == "highest" else tf32
    tflops = single if dtype is torch.float32 else half
    return None if tflops is None else tflops * 1e12


def _names(key: str, device_name: str) -> bool:
    # "a10" must not be found in "a100", nor "l4" in "l40s".
    start = device_name.find(key)
    if start < 0:
        return False
    before, after = device_name[start - 1 : start], device_name[start + len(key) :][:1]
    return not before.isalnum() and not after.isalnum()


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    size = 512 if device.type == "cpu" else 4096
    # Ones, not random numbers: measuring must not move the generators that training draws from.
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best_seconds = float("inf")
    deadline = time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < deadline or best_seconds == float("inf"):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # .item() waits for the device
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return 2 * size**3 / best_seconds
