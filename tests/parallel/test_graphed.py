import logging

import pytest
import torch
from torch import Tensor, nn

from mamba_train.parallel.graphed import GraphedPasses


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine that cannot record a graph")
def test_what_cannot_be_recorded_goes_on_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.ones(3))

    def passes(inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor) -> Tensor:
        loss = ((weight * inputs - targets) ** 2).sum() / n_targets
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    graphed = GraphedPasses(passes, [weight])
    found, expected = [], []
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
            arguments = (inputs, torch.zeros(2, 3), None, torch.tensor(6.0))
            loss = graphed(*arguments)
            found.append((loss.item(), weight.grad.clone()))  # type: ignore[union-attr]
            graphed.clear_gradients()
            loss = passes(*arguments)
            expected.append((loss.item(), weight.grad.clone()))  # type: ignore[union-attr]
            weight.grad = None
    for ours, plain in zip(found, expected, strict=True):
        assert ours[0] == plain[0]
        assert torch.equal(ours[1], plain[1])
    assert [record.message for record in caplog.records if "without a graph" in record.message] != []
    assert len(caplog.records) == 1
