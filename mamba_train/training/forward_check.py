"""A forward pass on fixed tokens, noted when a checkpoint is saved and compared when it is loaded.

The hashes of a checkpoint prove that its bytes are those that were written; this proves that they are the weights that
the run had (`checkpoint.verify_forward`).
"""

import torch

from mamba_train.config import ModelConfig
from mamba_train.parallel.engine import Engine

N_TOKENS = 64
# Engines and topologies add in different orders; bf16 has 8 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@torch.no_grad()
def forward_loss(engine: Engine) -> float:
    """Nats of one sequence of fixed tokens; the same on all ranks."""
    config: ModelConfig = engine.model_config
    assert config.vocab_size is not None, "resolve the model config first"
    tokens = torch.arange(N_TOKENS + 1, device=engine.device).mul_(7919).remainder_(config.vocab_size).unsqueeze(0)
    with engine.compute():
        loss = engine.model(tokens[:, :-1], tokens[:, 1:], None)
    return float(engine.sum_over_ranks(loss.double())) / engine.world_size


def check_forward_loss(engine: Engine, saved: float, where: str) -> None:
    """Raise ValueError unless the model computes what it did when the checkpoint was saved."""
    found = forward_loss(engine)
    if not abs(found - saved) <= TOLERANCE[engine.compute_dtype] * abs(saved):
        raise ValueError(
            f"{where}: the weights were loaded, but a forward pass gives a loss of {found:.6f} nats where the run that "
            f"saved them had {saved:.6f}; resume with the code and the engine.precision of that run"
        )
