"""The CUDA scan where few channels leave the GPU empty: segments of time side by side, warps that take turns."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.selective_scan import selective_scan
from kernels.selective_scan.cuda import device, variants
from tests.gpu.test_selective_scan import (
    ROUNDING,
    check,
    make_inputs,
    poisoned,  # noqa: F401  (a fixture, of each test)
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def side_by_side(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As many segments of time side by side, whatever the sizes would choose."""
    monkeypatch.setattr(variants, "_side_by_side", lambda variant, batch, length, *_: min(count, -(-length // 16)))


def chained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward whose warps take turns in time, whatever the sizes would choose."""
    monkeypatch.setattr(variants, "CHAINED", variants.Chained(0, 10**9, 1))


@pytest.mark.parametrize("count", [1, 3])
def test_many_states_and_few_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that takes one group of channels after another adds to its own part of dB and dC."""
    monkeypatch.setattr(variants, "FREE_PARTS_BYTES", 0)
    side_by_side(monkeypatch, count)
    check(make_inputs(2, 50, 200, 64, torch.bfloat16, packed=True, initial=True))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("states", [1, 8, 16, 64, 200])
def test_segments_side_by_side(dtype: torch.dtype, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    side_by_side(monkeypatch, 5)
    channels = 24 if states > 64 else 96
    check(make_inputs(2, 131, channels, states, dtype, packed=True, initial=True))
    inputs = make_inputs(2, 97, channels, states, dtype, ("z", "D", "dt_bias"))
    inputs["dt"] = F.softplus(inputs["dt"].detach()).requires_grad_()
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize(("length", "channels"), [(17, 1), (32, 50), (160, 320), (1501, 136)])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_lengths_and_channels_side_by_side(
    length: int, channels: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    side_by_side(monkeypatch, count)
    check(make_inputs(2, length, channels, 16, torch.bfloat16, packed=length < 1000, initial=True, strided=count == 3))


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("without", [(), ("z",), ("z", "D", "dt_bias")])
@pytest.mark.parametrize("strided", [False, True])
def test_chained_options(
    dtype: torch.dtype, without: tuple[str, ...], strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chained(monkeypatch)
    inputs = make_inputs(2, 453, 72, 16, dtype, without, packed=strided, initial=not strided, strided=strided)
    if "dt_bias" in without:
        inputs["dt"] = F.softplus(inputs["dt"].detach()).requires_grad_()
    check(inputs, dt_softplus="dt_bias" not in without)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 127, 128, 130, 1501])
@pytest.mark.parametrize(("channels", "states"), [(1, 16), (50, 9), (320, 16)])
def test_chained_lengths_and_channels(length: int, channels: int, states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chained(monkeypatch)
    check(make_inputs(2, length, channels, states, torch.bfloat16, packed=length < 1000, initial=True))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 127, 128, 130])
def test_chained_blocks_that_share_units(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins where another has left off."""
    chained(monkeypatch)
    check(make_inputs(2, length, 4000, 16, torch.bfloat16, packed=True, initial=True))


def test_chained_results_depend_on_no_one_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many blocks share the chunks changes no bit."""
    chained(monkeypatch)
    inputs = make_inputs(1, 700, 2048, 16, torch.bfloat16, initial=True)
    results = []
    for processors in (1, 3, 7, 100, 132, 1000):
        monkeypatch.setattr(device, "processors", lambda index, count=processors: count)
        with torch.no_grad():
            results.append(selective_scan(**inputs, return_final_state=True))  # type: ignore[arg-type]
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


def test_a_long_sequence_of_few_channels() -> None:
    """The sizes themselves choose segments side by side."""
    assert variants.forward_plan(16, 1, 2050, 200, 132)[1] > 3
    assert variants.backward_plan(16, 1, 2050, 200, 132)[1] > 3
    check(make_inputs(1, 2050, 200, 16, torch.bfloat16, initial=True))


def test_the_number_of_segments_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, 400, 72, 16, torch.float32, initial=True)
    grads = torch.randn(2, 400, 72, device="cuda"), torch.randn(2, 72, 16, device="cuda")
    results = []
    for count in (1, 2, 4, 25):
        side_by_side(monkeypatch, count)
        results.append(run(inputs, grads, True))
    for result in results[1:]:
        for name, value in result.items():
            assert (value - results[0][name]).norm() < 1e-5 * results[0][name].norm(), name


@pytest.mark.large_memory(75)
@pytest.mark.parametrize("count", [1, 3, "chained"])
def test_more_than_2_to_the_31_elements(count: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole equals its parts, whose offsets fit in 32 bits: rows, batches, saved states, and parts of dB and dC."""
    if isinstance(count, str):
        chained(monkeypatch)
    side_by_side(monkeypatch, 3 if isinstance(count, str) else count)
    batch, length, channels, states, width = 3, 2**18 + 17, 4160, 16, 64
    torch.use_deterministic_algorithms(False)  # filling outputs of this size takes long

    def activation() -> Tensor:
        return torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)

    x, dt, grad = activation(), activation(), activation()
    assert 2 * x.stride(0) > 2**31
    small = make_inputs(batch, length, width, states, torch.bfloat16)
    A = -4 * torch.rand(channels, states, device="cuda") - 0.05

    def grads_of(batches: slice, part: slice) -> tuple[Tensor, ...]:
        inputs = [t[batches, :, part].contiguous().requires_grad_() for t in (x, dt)]
        inputs += [small[name][batches].detach().requires_grad_() for name in ("B", "C")]
        y = selective_scan(*inputs[:2], A[part], *inputs[2:])  # type: ignore[misc]
        y_grad = grad[batches, :, part].contiguous()
        return (y.detach(), *torch.autograd.grad(y, inputs, y_grad))  # type: ignore[arg-type,union-attr]

    everything = slice(None)
    whole = grads_of(everything, everything)
    for start in (0, 2048, channels - width):
        part = slice(start, start + width)
        for a, b in zip(whole[:3], grads_of(everything, part)[:3], strict=True):
            assert torch.equal(a[..., part], b)
    for a, b in zip(whole, grads_of(slice(2, 3), everything), strict=True):
        torch.testing.assert_close(a[2:], b, rtol=2e-2, atol=2e-2)
