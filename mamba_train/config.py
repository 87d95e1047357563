"""The typed schema of `conf/`: one dataclass per config group.

Hydra composes the YAML files of `conf/` onto these dataclasses, so a misspelt key or a wrong type
fails while the command line is being read. What a type cannot say (sizes that must divide, files
that must exist) is checked by `mamba_train.config_checks`. This module must not import torch: a
mistake in a config should be reported before the second that importing torch takes.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from mamba_train.config_data import DataConfig, DataSource, patience_seconds


class ScheduleKind(StrEnum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay


class DeviceKind(StrEnum):
    """Where the ranks compute."""

    auto = "auto"  # a CUDA device if there is one, else the CPU
    cpu = "cpu"
    cuda = "cuda"


class EngineKind(StrEnum):
    """Who executes the step."""

    auto = "auto"  # single, ddp or fsdp, as processes and memory suggest
    single = "single"  # one device, one process
    ddp = "ddp"  # the whole model on every rank
    deepspeed = "deepspeed"  # ZeRO-1, 2, 3
    fsdp = "fsdp"  # FSDP2: weights, gradients and moments cut over the ranks


class Precision(StrEnum):
    """Arithmetic of the matrix products; masters and SSM parameters are always fp32."""

    auto = "auto"  # bf16 on CUDA, fp32 on the CPU
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    """What the backward pass computes again instead of having kept it."""

    auto = "auto"  # scan on a GPU, none on the CPU
    none = "none"
    scan = "scan"  # what the scan of a Mamba-1 layer returns and the Δ that it reads
    keep_scan = "keep_scan"  # all of a layer but its inputs and what its scan returns
    layer = "layer"  # all of a layer but its inputs


class WandbMode(StrEnum):
    """Whether metrics go to Weights & Biases."""

    auto = "auto"  # online when logged in, offline otherwise
    online = "online"
    offline = "offline"
    disabled = "disabled"


class ProgressMode(StrEnum):
    """How progress is shown."""

    auto = "auto"  # a live bar in a terminal, plain lines otherwise
    bar = "bar"
    plain = "plain"
    silent = "silent"


class MixerKind(StrEnum):
    """What mixes along the length in a layer."""

    mamba1 = "mamba1"
    mamba2 = "mamba2"
    attention = "attention"


class ContainerKind(StrEnum):
    """What runs the training in a container image."""

    none = "none"
    apptainer = "apptainer"
    enroot = "enroot"  # by way of SLURM's Pyxis plugin


@dataclass
class ModelConfig:
    """A language model of Mamba-1, Mamba-2 or attention layers, or of a pattern of them."""

    name: str = MISSING
    n_layer: int = MISSING
    d_model: int = MISSING
    mixer: MixerKind = MixerKind.mamba1  # of every layer that attention_layers does not name
    attention_layers: list[int] = field(default_factory=list)  # counted from 0
    d_intermediate: int = 0  # width of the gated MLP after each mixer; 0: none
    # Mamba-1 and Mamba-2
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2  # d_inner = expand * d_model
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    # Mamba-1
    time_invariant: bool = False  # Δ, B and C do not depend on the input: what selection is compared with
    dt_rank: int | None = None  # null: ceil(d_model / 16)
    dt_scale: float = 1.0
    # Mamba-2
    head_dim: int = 64  # d_inner / head_dim heads
    n_groups: int = 1  # heads of one group share B and C
    chunk_size: int = 256  # how SSD cuts the sequence; changes the speed, not the result
    A_init_min: float = 1.0
    A_init_max: float = 16.0
    # attention
    attention_heads: int | None = None
    attention_kv_heads: int | None = None  # null: attention_heads
    attention_head_dim: int | None = None  # null: d_model / attention_heads
    attention_d_conv: int = 0  # width of a causal convolution over queries, keys and values; 0: none
    rotary_dim: int | None = None  # leading dimensions of a head that rotate; null: all, 0: none
    # embedding, norms, head
    vocab_size: int | None = None  # null: what the tokenizer has
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
    norm_eps: float = 1e-5


@dataclass
class OptimConfig:
    """AdamW."""

    lr: float = MISSING  # peak learning rate
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    kind: ScheduleKind = MISSING
    warmup_steps: int = 50
    min_lr_ratio: float = 0.1  # of the peak, at the last step
    decay_fraction: float = 0.2  # wsd: share of the steps that decay


@dataclass
class EngineConfig:
    """How the step is executed."""

    name: EngineKind = EngineKind.single
    device: DeviceKind = DeviceKind.auto
    precision: Precision = Precision.auto
    layer_grad_norms: bool = False  # the norm of each layer's gradient among the metrics
    kernel_cache: str | None = None  # folder for compiled kernels, best on a disk of the node; null: the user's cache
    compile: bool = False  # torch.compile of each layer (needs a C++ compiler on the CPU)
    cuda_graphs: bool | None = None  # replay forward and backward as one graph; null: on a GPU, if it changes no bit
    recompute: Recompute = Recompute.auto  # activation checkpointing: less memory, more computation
    recompute_layers: int | None = None  # with recompute=scan: in so many layers, from the first; null: in all
    reduce_precision: Precision = Precision.fp32  # of the sum of gradients over the ranks; bf16: half the traffic
    zero_stage: int = 2  # deepspeed: 1 cuts the optimiser's state, 2 gradients too, 3 weights too
    # fsdp
    replicas: int = 1  # more than 1: HSDP, the ranks form that many groups, each with a whole model cut over it
    reshard_after_forward: bool | None = None  # false: gathered weights stay for the backward pass; null: if they fit
    reduce_each_micro_batch: bool = False  # true: more traffic, and no whole fp32 gradient between micro-batches


@dataclass
class LoggingConfig:
    """What is shown and recorded, and how often."""

    progress: ProgressMode = ProgressMode.auto
    progress_interval_steps: int = 10  # plain lines only; the bar moves every step
    ssm_health_interval_steps: int = 20  # 0: never
    profile_steps: list[int] = field(default_factory=list)  # steps of which every rank writes a trace
    memory_snapshot: bool = False  # write who held what when a GPU runs out of memory
    wandb: WandbMode = WandbMode.auto
    wandb_project: str = "mamba-train"
    wandb_name: str | None = None  # null: the name of the run folder


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    resume: bool = True
    interval_steps: int = 100
    keep_last: int = 2
    permanent_interval_steps: int | None = None  # its multiples are saved, too, and never deleted
    keep_best: bool = True  # the best by validation loss, besides the last ones
    reserve_gib: float = 1.0  # disk space a save must leave free
    verify_forward: bool = False  # compare a forward pass on fixed tokens at the save and at the load


@dataclass
class TrainingConfig:
    """Length and batch of the run."""

    total_steps: int = 800
    global_batch_size: int = 8  # sequences per optimiser step, over all ranks
    micro_batch_size: int = 8  # sequences per forward pass on one rank
    validation_interval_steps: int = 100
    validation_sequences: int = 256  # how many are read at each validation


@dataclass
class GuardConfig:
    """Which steps are not applied because of their loss or gradient norm, and when a run goes back."""

    outliers: bool = True  # false: only steps that are not finite are skipped
    window_steps: int = 128  # applied steps that a step is compared with
    min_steps: int = 32  # so many must have been applied before one is compared
    deviations: float = 15.0  # standard deviations above the median that are still usual
    loss_rise: float = 0.75  # nats above the median that are usual in any case
    norm_ratio: float = 10.0  # of a gradient norm to the median that is usual in any case
    rollback_after: int = 5  # skipped steps in a row that lead back to a checkpoint; 0: never
    max_rollbacks: int = 3  # without a full window of applied steps in between; then the run gives up


@dataclass
class WatchdogConfig:
    """When a run counts as hung or a rank as slow."""

    enabled: bool = True  # end a run that hangs, so that it starts again
    first_step_seconds: float = 1800.0  # of a start: something may have to be compiled
    step_seconds: float = 300.0  # of the others
    data_seconds: float | None = None  # for the data of a step; null: step_seconds, with a stream its patience
    between_steps_seconds: float = 3600.0  # validation, evaluation, a save
    heartbeat_seconds: float = 10.0  # between two signs of life of a rank
    straggler_interval_steps: int = 50  # how often the ranks are compared; 0: never
    straggler_ratio: float = 1.3  # of a rank's own time to the median over the ranks, from which on it is named


@dataclass
class AlertsConfig:
    """A command that is run when a run goes back, stops or ends."""

    command: str | None = None  # for the shell; the event is in MAMBA_TRAIN_EVENT and its like
    timeout_seconds: float = 30.0


@dataclass
class EvaluationConfig:
    """What a model is tried on while it is trained, besides its loss on held-out text."""

    tasks: list[str] = field(default_factory=list)  # of lm-evaluation-harness
    interval_steps: int = 0  # how often; 0: after the last step only
    limit: int | None = None  # only the first so many requests of each task
    task_folder: str | None = None  # with definitions of further tasks
    batch_size: int = 16
    sample_tokens: int = 48  # of the text that is written every checkpoint.interval_steps; 0: none
    sample_prompts: list[str] = field(default_factory=lambda: [""])  # what it begins with


@dataclass
class SlurmConfig:
    """The job on a cluster, for `python -m slurm.submit`; `mamba-train plan` reckons with its size."""

    nodes: int | None = None  # null: not decided yet
    gpus_per_node: int = 8  # one process each; 0: one process per node, on its CPU
    time: str = "24:00:00"  # limit of one start: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS
    job_name: str | None = None  # null: the name of the run folder
    # what a site decides: best in a file of conf/slurm/
    gpu: str = "H100"  # what the nodes have, for the plan
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None  # nodes not to be used
    cpus_per_task: int | None = None
    mem: str | None = None  # per node
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch
    python: str | None = None  # null: the one that submits, or `python` in a container
    setup: list[str] = field(default_factory=list)  # shell lines, such as module loads
    environment: list[str] = field(default_factory=list)  # NAME=VALUE
    container: ContainerKind = ContainerKind.none
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)  # besides the folders that the job needs itself
    # coming back
    signal_seconds: int = 180  # SLURM warns the processes so long before the time limit; 0: never
    max_stalled_starts: int = 3  # starts without a new checkpoint before the job is given up
    health_check: bool = True  # look at each node before the training starts
    exclude_bad_nodes: bool = True  # a node that fails the check is excluded when the job is requeued


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    seed: int = 0
    # Weights to begin with: a run, a checkpoint, published weights, a name on the Hub; null: drawn ones.
    init_from: str | None = None
    run_dir: str = MISSING


def data_limit_seconds(config: Config) -> float:
    """How long a rank may wait for the data of a step before the run counts as hung."""
    if config.watchdog.data_seconds is not None:
        return config.watchdog.data_seconds
    streams = config.data.source is DataSource.stream
    return max(config.watchdog.step_seconds, patience_seconds(config.data) if streams else 0.0)


def layer_mixers(model: ModelConfig) -> list[MixerKind]:
    """The mixer of each layer, from the first to the last."""
    attention = set(model.attention_layers)
    return [MixerKind.attention if layer in attention else model.mixer for layer in range(model.n_layer)]


def register_schema() -> None:
    """Put the schema into Hydra's ConfigStore, where `conf/config.yaml` refers to it."""
    ConfigStore.instance().store(name="schema", node=Config)
