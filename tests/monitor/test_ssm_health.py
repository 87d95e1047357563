"""SSM health figures are the quantiles of what the scan used."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from mamba_train.model.observe import observe_scans
from mamba_train.monitor.ssm_health import ssm_health

NAMES = ["dt_p05", "dt_p50", "dt_p95", "a_min", "a_max", "memory_p05", "memory_p50", "memory_p95"]
SIGNS = ["dt_floor_share", "dt_saturated_share", "state_rms"]


def observe(dt: torch.Tensor, A: torch.Tensor, dt_bias: torch.Tensor | None, dt_softplus: bool = True) -> list:
    batch, length, _ = dt.shape
    B = torch.ones(batch, length, A.shape[1])
    with observe_scans() as calls:
        selective_scan(torch.ones_like(dt), dt, A, B, B, dt_bias=dt_bias, dt_softplus=dt_softplus)
    return calls


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    channels=st.integers(1, 40),
    states=st.integers(1, 5),
    biased=st.booleans(),
    softplus=st.booleans(),
)
def test_quantiles_equal_numpys_where_nothing_is_left_out(
    seed: int, batch: int, length: int, channels: int, states: int, biased: bool, softplus: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dt = torch.randn(batch, length, channels, generator=generator)
    dt = dt if softplus else dt.abs() + 0.1
    A = -torch.rand(channels, states, generator=generator) - 0.1
    dt_bias = torch.rand(channels, generator=generator) if biased else None
    health = ssm_health(observe(dt, A, dt_bias, softplus))

    raw = dt.double().numpy() + (0 if dt_bias is None else dt_bias.double().numpy())
    step = np.logaddexp(0, raw) if softplus else raw
    decay = np.abs(A.double().numpy())
    memory = 1 / (step[..., None] * decay)
    expected = [*np.quantile(step, [0.05, 0.5, 0.95]), -decay.max(), -decay.min()]
    expected += list(np.quantile(memory, [0.05, 0.5, 0.95]))
    state = np.zeros((batch, channels, states))
    for position in range(length):
        now = step[:, position, :, None]
        state = state * np.exp(-now * decay) + now  # x and B are 1
    expected += [np.mean(step < 1e-4), np.mean(step * decay.min(axis=1) > np.log(100)), np.sqrt(np.mean(state**2))]
    assert list(health) == [f"ssm/layer_00/{name}" for name in NAMES + SIGNS]
    np.testing.assert_allclose(list(health.values()), expected, rtol=2e-5)


def test_steps_at_the_floor_and_steps_that_leave_no_memory_are_counted() -> None:
    dt = torch.tensor([-20.0, -20.0, 0.0, 30.0]).repeat(1, 4, 1)  # softplus: 2e-9, 0.69, 30
    signs = ssm_health(observe(dt, torch.full((4, 2), -0.5), None))
    assert signs["ssm/layer_00/dt_floor_share"] == 0.5
    assert signs["ssm/layer_00/dt_saturated_share"] == 0.25
    # A channel with one slow state remembers by it.
    A = torch.tensor([[-0.5, -0.01]]).repeat(4, 1)
    assert ssm_health(observe(dt, A, None))["ssm/layer_00/dt_saturated_share"] == 0.0


def test_layers_are_numbered_in_the_order_of_the_forward_pass() -> None:
    calls = []
    for layer in range(11):
        calls += observe(torch.zeros(1, 3, 4), torch.full((4, 2), -1.0 - layer), None)
    health = ssm_health(calls)
    assert [health[f"ssm/layer_{layer:02d}/a_max"] for layer in range(11)] == [-1.0 - i for i in range(11)]
    assert ssm_health([]) == {}


def test_a_large_layer_is_sampled_close_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(0)
    dt = torch.randn(4, 512, 1000, generator=generator)
    A = -torch.arange(1.0, 17.0).repeat(1000, 1)
    health = ssm_health(observe(dt[:, :8], A, None) * 1)
    step = torch.nn.functional.softplus(dt).flatten().numpy()
    for name, level in (("dt_p05", 0.05), ("dt_p50", 0.5), ("dt_p95", 0.95)):
        assert health[f"ssm/layer_00/{name}"] == pytest.approx(np.quantile(step, level), rel=0.15)


def test_every_channel_of_the_range_of_a_counts_even_when_quantiles_are_sampled() -> None:
    A = torch.full((1000, 16), -1.0)
    A[777, 3], A[501, 5] = -99.0, -0.001
    health = ssm_health(observe(torch.zeros(1, 2, 1000), A, None))
    assert health["ssm/layer_00/a_min"] == -99.0
    assert health["ssm/layer_00/a_max"] == pytest.approx(-0.001)


def test_sampling_reaches_the_last_positions_and_channels() -> None:
    dt = torch.zeros(2, 400, 1024)
    dt[1], dt[..., 512:] = 3.0, 3.0  # later sequence, later channels: three quarters of the values
    health = ssm_health(observe(dt, torch.full((1024, 1), -1.0), None, dt_softplus=True))
    assert health["ssm/layer_00/dt_p50"] == pytest.approx(float(np.logaddexp(0, 3.0)))
    assert health["ssm/layer_00/dt_p05"] == pytest.approx(np.log(2))


def test_heads_of_mamba2_are_like_channels_with_one_state() -> None:
    generator = torch.Generator().manual_seed(1)
    dt, A = torch.randn(1, 12, 5, generator=generator), -torch.rand(5, generator=generator) - 0.1
    B, dt_bias = torch.ones(1, 12, 1, 3), torch.rand(5, generator=generator)
    with observe_scans() as calls:
        ssd(torch.ones(1, 12, 5, 2), dt, A, B, B, dt_bias=dt_bias)
    assert ssm_health(calls) == pytest.approx(ssm_health(observe(dt, A[:, None], dt_bias)))


def test_layers_without_an_ssm_keep_their_numbers() -> None:
    calls = observe(torch.zeros(1, 3, 4), torch.full((4, 2), -1.0), None) * 2
    health = ssm_health(calls, layers=[0, 3])
    assert {key.split("/")[1] for key in health} == {"layer_00", "layer_03"}


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_state_of_ssd_is_seen_where_the_caller_asks_for_none(with_gradients: bool) -> None:
    x, dt, A = torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3), -torch.rand(3)
    B = torch.randn(2, 7, 1, 5)
    with torch.no_grad():
        _, state = ssd(x, dt, A, B, B, return_final_state=True)
    with observe_scans() as calls:
        y = ssd(x.requires_grad_(with_gradients), dt, A, B, B)
    assert y.requires_grad == with_gradients
    assert torch.equal(calls[0]["final_state"], state)
    assert ssm_health(calls)["ssm/layer_00/state_rms"] == pytest.approx(float(state.square().mean().sqrt()))
    if with_gradients:
        y.sum().backward()
        assert x.grad is not None
