"""The model card of an export: what the model is, what it was trained on, and how."""

from typing import Any

from mamba_train.config import ModelConfig
from mamba_train.convert.names import Layout

LOADING = {
    Layout.transformers: """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")""",
    Layout.state_spaces: """from mamba_ssm import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained("THIS_FOLDER", device="cuda")""",
}
# Keys of a run's config that a reader of the card asks for, by heading.
DATA_KEYS = ("name", "source", "sequence_length", "reset_state_at_documents", "validation_fraction")
RECIPE_GROUPS = ("optim", "schedule", "training")


def model_card(
    config: ModelConfig, layout: Layout, n_parameters: int, run_config: dict[str, Any], step: int | None, checked: str
) -> str:
    """The text of README.md, with the front matter that the Hub reads.

    run_config: the config the run was made with; empty for weights that were not trained here.
    """
    lines = [
        "---",
        "pipeline_tag: text-generation",
        f"library_name: {'transformers' if layout is Layout.transformers else 'mamba_ssm'}",
        "tags:",
        "- mamba",
        "---",
        "",
        f"# {config.name}",
        "",
        f"{n_parameters:,} parameters, fp32, exported by mamba-train for {layout}. {checked[0].upper()}{checked[1:]}.",
        "",
        "```python",
        LOADING[layout],
        "```",
        "",
        "`A_log`, `D` and the bias of Δ are sensitive to rounding: keep them in fp32 when you train on.",
        "",
        "## Model",
        "",
        *_table({key: value for key, value in vars(config).items() if key != "name" and value is not None}),
    ]
    data = run_config.get("data", {})
    if data:
        lines += ["", "## Data", "", *_table({key: data[key] for key in DATA_KEYS if key in data})]
    recipe = {
        f"{group}.{key}": value
        for group in RECIPE_GROUPS
        for key, value in run_config.get(group, {}).items()
        if value is not None
    }
    if recipe:
        sequences, length = recipe.get("training.global_batch_size", 0), data.get("sequence_length", 0)
        lines += [
            "",
            "## Recipe",
            "",
            f"After {step:,} of {recipe['training.total_steps']:,} steps of {sequences * length:,} tokens.",
            "",
            *_table(recipe | {"seed": run_config.get("seed")}),
        ]
    if run_config.get("init_from"):
        lines += ["", f"The weights were not drawn but taken from `{run_config['init_from']}`."]
    return "\n".join(lines) + "\n"


def _table(values: dict[str, Any]) -> list[str]:
    return ["| key | value |", "|---|---|", *(f"| `{key}` | {value} |" for key, value in values.items())]
