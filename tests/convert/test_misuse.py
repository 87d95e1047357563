"""Weights and configs that cannot be converted: one line that says which, what, and why; nothing left behind."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mamba_train.checkpoint.storage import Checkpoint, save
from mamba_train.convert import transformers_layout, verify
from mamba_train.convert.export import export
from mamba_train.convert.files import new_folder
from mamba_train.convert.import_run import import_run
from mamba_train.convert.names import Layout
from mamba_train.convert.source import load_pretrained
from mamba_train.data.tokenizer import train_tokenizer
from tests.convert.conftest import MakeRun
from tests.convert.models import MAMBA1, MAMBA2, TRANSFORMER


def silent(line: str) -> None:
    pass


@pytest.fixture
def published(make_run: MakeRun, tmp_path: Path) -> Path:
    export(make_run(MAMBA1), tmp_path / "published", Layout.transformers, silent)
    return tmp_path / "published"


@pytest.fixture
def released(make_run: MakeRun, tmp_path: Path) -> Path:
    export(make_run(MAMBA2, "run2"), tmp_path / "released", Layout.state_spaces, silent)
    return tmp_path / "released"


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


A_LOG = "backbone.layers.1.mixer.A_log"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A_LOG), rf"1 weight is missing, first '{A_LOG}' \(of 32 weights expected\)"),
        (
            lambda t: [t.pop(name) for name in list(t) if "conv1d" in name],
            r"6 weights are missing, first 'backbone.layers.0.mixer.conv1d.bias'",
        ),
        (lambda t: t.update(extra=torch.ones(1)), "1 weight is unexpected, first 'extra'"),
        (lambda t: t.update({A_LOG: t[A_LOG].T.contiguous()}), r"another shape, first .*A_log': \(6, 80\) instead of"),
        (lambda t: t.update({"lm_head.weight": torch.ones(320, 40)}), "ties lm_head.weight .* and the two differ"),
        (lambda t: t.update({A_LOG: t[A_LOG] * float("nan")}), "A_log' holds values that are not finite"),
        (lambda t: t.update({A_LOG: t[A_LOG].to(torch.int8)}), r"A_log' holds torch\.int8"),
    ],
)
def test_weights_that_do_not_fit(published: Path, change: Any, message: str, tmp_path: Path) -> None:
    change_weights(published, change)
    with pytest.raises(ValueError, match=message) as caught:
        import_run(published, tmp_path / "out", silent)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_bias": True}, "use_bias=True cannot be imported; expected False"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu cannot be imported"),
        ({"model_type": "llama"}, "model_type=llama cannot be imported; expected mamba or mamba2"),
        ({"intermediate_size": 81}, "intermediate_size=81 cannot be imported; expected 80"),
        ({"expand": 1.5}, "expand=1.5 cannot be imported"),
        ({"hidden_size": None}, r"config\.json: a value in it has the wrong type"),
        ({"num_hidden_layers": 0}, "n_layer=0: expected at least 1"),
        ({"time_step_rank": {}}, r"config\.json: a value in it has the wrong type"),
    ],
)
def test_transformers_configs_that_cannot_be_computed(published: Path, values: dict[str, Any], message: str) -> None:
    change_config(published, **values)
    with pytest.raises(ValueError, match=message):
        load_pretrained(published, silent)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rms_norm": False}, "rms_norm=False cannot be imported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer=Mamba3 cannot be imported; expected Mamba1 or Mamba2"),
        ({"ssm_cfg": {"layer": "Mamba2", "bias": True}}, "ssm_cfg.bias=True cannot be imported"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate=True"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 1.0]}}, "ssm_cfg.dt_limit"),
        ({"ssm_cfg": {"layer": "Mamba2", "new_option": 3}}, "ssm_cfg.new_option=3: this key is not known here"),
        ({"new_option": 3}, "new_option=3: this key is not known here"),
        ({"n_layer": [3]}, r"config\.json: a value in it has the wrong type"),
        ({"d_model": None}, r"config\.json: a value in it has the wrong type"),
        ({"ssm_cfg": [1]}, r"config\.json: a value in it has the wrong type"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": None}}, r"config\.json: a value in it has the wrong type"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple=0: expected at least 1"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 6}}, "attn_cfg.qkv_proj_bias=True cannot be imported"),
    ],
)
def test_mamba_ssm_configs_that_cannot_be_computed(released: Path, values: dict[str, Any], message: str) -> None:
    change_config(released, **values)
    with pytest.raises(ValueError, match=message):
        load_pretrained(released, silent)


def test_the_defaults_of_mamba_ssm_are_those_of_its_first_releases(released: Path) -> None:
    """config.json of state-spaces/mamba-130m names neither the kind of layer nor tying."""
    from mamba_train.convert.model_configs import detect_layout, from_config_json

    values = {
        "d_model": 768,
        "n_layer": 24,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    assert detect_layout(values, "here") is Layout.state_spaces
    config = from_config_json(values, Layout.state_spaces, "mamba-130m", "here")
    assert (config.mixer, config.dt_rank, config.d_state, config.tie_embeddings) == ("mamba1", 48, 16, True)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_the_defaults_of_transformers_are_those_of_its_classes(model_type: str) -> None:
    """A key that is not in config.json means what it means there."""
    transformers = pytest.importorskip("transformers")
    from mamba_train.convert.model_configs import from_config_json, to_config_json

    sizes = {"hidden_size": 4096, "num_hidden_layers": 2, "vocab_size": 320}
    theirs = transformers.AutoConfig.for_model(model_type, **sizes)
    config = from_config_json({"model_type": model_type, **sizes}, Layout.transformers, "x", "here")
    written = to_config_json(config, Layout.transformers, 0)
    for ours, (key, _) in (transformers_layout.KEYS_OF_BOTH | transformers_layout.KEYS[model_type]).items():
        assert written[key] == getattr(theirs, key), ours
    with pytest.raises(ValueError, match="the key 'hidden_size' is missing"):
        from_config_json({"model_type": model_type, "num_hidden_layers": 2}, Layout.transformers, "x", "here")


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("this ran",))


def test_a_bin_file_that_would_run_code_is_refused(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = released / "pytorch_model.bin"
    torch.save({"x": Harmful()}, path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin: refused, .* could run code \(it calls print\); ask its"):
        load_pretrained(released, silent)
    path.write_bytes(pickle.dumps({"x": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model.bin: refused, .* could run code"):
        load_pretrained(released, silent)
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not weights at all", "not a readable|refused"), (b"", "not a readable"), (b"PK\x03\x04cut", "not a readable")],
)
def test_a_damaged_bin_file(released: Path, content: bytes, message: str) -> None:
    (released / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretrained(released, silent)
    assert "\n" not in str(caught.value)


def test_a_bin_file_of_something_else_is_refused(released: Path) -> None:
    torch.save({"state": {"w": torch.ones(1)}}, released / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a plain dictionary of tensors"):
        load_pretrained(released, silent)


def test_files_of_several_parts(published: Path, make_run: MakeRun) -> None:
    whole = load_pretrained(published, silent)
    tensors = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        part = f"model-{number % 3}.safetensors"
        weight_map[name] = part
        path = published / part
        save_file((load_file(path) if path.exists() else {}) | {name: tensor}, path)
    index = published / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    again = load_pretrained(published, silent)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())
    (published / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors: there is no such file, the index"):
        load_pretrained(published, silent)
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(ValueError, match="is not the name of a file of this folder"):
        load_pretrained(published, silent)


def test_places_that_are_nothing(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text('{"d_model": 32, "n_layer": 1, "vocab_size": 300}')
    for name, message in [
        ("empty", "expected a run .* a checkpoint .* or published weights"),
        ("file", "a file; expected the folder"),
        ("no_weights", "no weights here; expected model.safetensors or pytorch_model.bin"),
        ("a/b/c", "there is no such path, and it is no name on the Hub"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / name if name != "a/b/c" else name, silent)


def test_a_hub_name_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def no_network(*args: Any, **options: Any) -> str:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"someone/mamba: there is no such path, .*\(no route to host\); download it"):
        load_pretrained("someone/mamba", silent)


def test_a_hub_name_is_downloaded(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: str(published))
    pretrained = load_pretrained("someone/mamba-x", silent)
    assert pretrained.config.name == "mamba-x"
    assert pretrained.tokenizer is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(MAMBA1, norm_eps=1e-6), "model.norm_eps=1e-06: mamba_ssm computes with 1e-05"),
        (dataclasses.replace(TRANSFORMER, d_intermediate=100), "model.d_intermediate=100: mamba_ssm rounds it up"),
    ],
)
def test_models_that_mamba_ssm_would_compute_otherwise(
    config: Any, message: str, make_run: MakeRun, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(make_run(config), tmp_path / "out", Layout.state_spaces, silent)


def test_an_export_that_computes_something_else_is_not_left_there(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check looks at what was written: here a wrong config goes out with the right weights."""
    from mamba_train.convert import export as module

    def wrong_epsilon(*args: Any) -> dict[str, Any]:
        return right(*args) | {"layer_norm_epsilon": 0.1}

    right = module.to_config_json
    monkeypatch.setattr(module, "to_config_json", wrong_epsilon)
    with pytest.raises(ValueError, match=r"computes other logits than the run: relative difference .* nothing was"):
        export(make_run(MAMBA1), tmp_path / "out", Layout.transformers, silent)
    # Without transformers our own importer is the judge, and finds it as well.
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="loaded by our importer, computes other logits"):
        export(make_run(MAMBA1, "b"), tmp_path / "out", Layout.transformers, silent)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_weights_that_come_back_changed_are_noticed(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mamba_train.convert import export as module

    def last_bit(*args: Any) -> dict[str, torch.Tensor]:
        tensors = right(*args)
        tensors[A_LOG] = torch.nextafter(tensors[A_LOG], torch.tensor(9.0))
        return tensors

    right = module.to_layout
    monkeypatch.setattr(module, "to_layout", last_bit)
    with pytest.raises(ValueError, match=r"other bits in layers.1.mixer.ssm.A_log; nothing was written"):
        export(make_run(MAMBA1), tmp_path / "out", Layout.state_spaces, silent)


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists already"):
        export(make_run(MAMBA1), tmp_path / "there", Layout.state_spaces, silent)
    with pytest.raises(ValueError, match=r"GiB needed, .* GiB free"):
        with new_folder(tmp_path / "big", 2**60):
            pass
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def interrupted(target: Path) -> None:
    with new_folder(target, 1) as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tmp_path: Path, make_run: MakeRun) -> None:
    run_dir = make_run(MAMBA1)
    text = " ".join(f"word{i} other{i * 7}" for i in range(500))
    (tmp_path / "large.json").write_bytes(train_tokenizer([text], 600).serialised)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the model's embedding \d+ rows"):
        export(run_dir, tmp_path / "out", Layout.transformers, silent, tmp_path / "large.json")
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens"):
        import_run(run_dir, tmp_path / "out", silent, tmp_path / "large.json")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        export(make_run(MAMBA1), tmp_path / "out", Layout.transformers, silent, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"--tokenizer .*: there is no such file"):
        import_run(tmp_path / "run", tmp_path / "out", silent, tmp_path / "other.json")


def test_a_checkpoint_of_a_later_version_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(1, {"a": torch.zeros(2)}, config={"model": {"name": "x", "wisdom": 1}})
    save(tmp_path / "checkpoints", checkpoint, reserve_gib=0)
    with pytest.raises(ValueError, match=r"step_00000001: its model is of another version .*wisdom"):
        load_pretrained(tmp_path, print)
