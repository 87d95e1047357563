"""The judge that nobody here wrote: the logits of `transformers` on the same weights."""

import pytest
import torch

from mamba_train.config import ModelConfig
from mamba_train.model.language_model import MambaLM, padded_vocab_size

transformers = pytest.importorskip("transformers")

# Our name inside a mixer -> theirs, and whether theirs has an extra axis for the single input channel.
MIXER_NAMES = {
    "in_proj.weight": "in_proj.weight",
    "ssm.conv_weight": "conv1d.weight",
    "ssm.conv_bias": "conv1d.bias",
    "ssm.x_proj_weight": "x_proj.weight",
    "ssm.dt_proj_weight": "dt_proj.weight",
    "ssm.dt_bias": "dt_proj.bias",
    "ssm.A_log": "A_log",
    "ssm.D": "D",
    "out_proj.weight": "out_proj.weight",
}


def theirs(model: MambaLM, config: ModelConfig):
    """`MambaForCausalLM` of the same sizes with the weights of `model`; every one of them is replaced."""
    other = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=padded_vocab_size(config),
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.n_layer,
            layer_norm_epsilon=config.norm_eps,
            expand=config.expand,
            conv_kernel=config.d_conv,
            use_bias=False,
            use_conv_bias=True,
            hidden_act="silu",
            residual_in_fp32=True,
            time_step_rank=config.dt_rank,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    ours = model.state_dict()
    named = {
        "backbone.embeddings.weight": ours.pop("embedding.weight"),
        "backbone.norm_f.weight": ours.pop("norm.weight"),
    }
    named["lm_head.weight"] = ours.pop("lm_head.weight", named["backbone.embeddings.weight"])
    for layer in range(config.n_layer):
        named[f"backbone.layers.{layer}.norm.weight"] = ours.pop(f"layers.{layer}.norm.weight")
        for our_name, their_name in MIXER_NAMES.items():
            value = ours.pop(f"layers.{layer}.mixer.{our_name}")
            if their_name == "conv1d.weight":
                value = value.unsqueeze(1)
            named[f"backbone.layers.{layer}.mixer.{their_name}"] = value
    assert not ours, f"weights without a counterpart: {list(ours)}"
    missing, unexpected = other.load_state_dict(named, strict=False)
    assert not missing
    assert not unexpected
    return other


@pytest.mark.parametrize("tie_embeddings", [True, False])
@torch.no_grad()
def test_logits_are_those_of_transformers(perturbed_model: MambaLM, config: ModelConfig, tie_embeddings: bool) -> None:
    if not tie_embeddings:
        config.tie_embeddings = False
        tied, perturbed_model = perturbed_model, MambaLM(config)
        perturbed_model.load_state_dict(tied.state_dict(), strict=False)
        torch.nn.init.normal_(perturbed_model.lm_head.weight)
    tokens = torch.randint(0, 53, (2, 37), generator=torch.Generator().manual_seed(3))
    expected = theirs(perturbed_model, config)(tokens).logits
    actual = perturbed_model(tokens)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    # Each weight matters: the comparison is not blind to one of them.
    for name, parameter in perturbed_model.named_parameters():
        kept = parameter.clone()
        parameter += 0.05 * torch.randn_like(parameter)
        changed = perturbed_model(tokens)
        parameter.copy_(kept)
        assert (changed - expected).abs().max() > 1e-4 * expected.abs().max(), name
