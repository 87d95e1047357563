"""Run folders as a training run leaves them, with made-up curves."""

import json
import math
from pathlib import Path
from typing import Any

LN_2 = math.log(2)
BYTES_PER_TOKEN = 2.9


def write_run(
    run_dir: Path,
    n_steps: int = 60,
    n_layer: int = 2,
    bias: float = 0.0,
    skipped: tuple[int, ...] = (),
    health: bool = True,
    validation: bool = True,
    bigram: float | None = 2.5,
    **files: str,
) -> Path:
    """Write metrics.jsonl, config.yaml, summary.json, baseline.json; `files`: name (_ for .) and content."""
    run_dir.mkdir(parents=True)
    lines = []
    for step in range(1, n_steps + 1):
        loss = 3.0 + 5.0 * math.exp(-step / 20) + bias
        record: dict[str, Any] = {
            "step": step,
            "tokens": step * 2048,
            "samples": step * 8,
            "loss": None if step in skipped else loss,
            "bits_per_byte": None if step in skipped else loss / LN_2 / BYTES_PER_TOKEN,
            "grad_norm": None if step in skipped else 0.5 + 2 / step,
            "lr": 1e-3 * min(1, step / 10),
            "tokens_per_second": 9000.0 + step,
            "mfu": 0.25,
            "memory_gib": 1.0,
            "eta_seconds": 0.2 * (n_steps - step),
            "step_seconds": 0.2,
            "skipped": step in skipped,
        }
        if validation and step % 20 == 0:
            record["validation/loss"] = loss + 0.1
            record["validation/bits_per_byte"] = (loss + 0.1) / LN_2 / BYTES_PER_TOKEN
        if health and step % 20 == 0:
            for layer in range(n_layer):
                prefix = f"ssm/layer_{layer:02d}/"
                values = (0.001, 0.01, 0.1, -16.0, -1.0 - layer, 1.0, 20.0, 500.0, 0.01 * layer, 0.02, 0.5 + step / 50)
                names = ("dt_p05", "dt_p50", "dt_p95", "a_min", "a_max", "memory_p05", "memory_p50", "memory_p95")
                names += ("dt_floor_share", "dt_saturated_share", "state_rms")
                record.update({prefix + name: value for name, value in zip(names, values, strict=True)})
        lines.append(json.dumps(record) + "\n")
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    (run_dir / "config.yaml").write_text("data:\n  sequence_length: 256\nmodel:\n  name: mamba_tiny\n")
    (run_dir / "summary.json").write_text(json.dumps({"n_parameters": 1234567}))
    if bigram is not None:
        nats = bigram * LN_2 * BYTES_PER_TOKEN
        score = {"bits_per_byte": bigram, "nats_per_token": nats, "n_train_tokens": 900_000}
        (run_dir / "baseline.json").write_text(json.dumps({"bigram": score}))
    for name, content in files.items():
        (run_dir / name.replace("_", ".")).write_text(content)
    return run_dir
