"""Every knob of training, evaluation and merging, with transformers' and PEFT's own names.

In: YAML and flags through `options`. Out: frozen dataclasses. Step 1 of the straight line; torch is never imported here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from qlora_moderation.options import nearest, option

LORA_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5
BASE_ALTERING_INITS = ("pissa", "olora", "corda", "loftq")
"""LoRA initialisations that change the base weights, so that the adapter no longer belongs to the published base."""

FSDP_WORDS = ("full_shard", "shard_grad_op", "auto_wrap", "offload")
"""What transformers' `--fsdp` may hold here; layers are always wrapped."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What `scripts/train.py` reads."""

    # model
    model_name_or_path: str = option(help="backbone: a directory or a hub name")
    model_revision: str | None = option(None, "revision of a backbone from the hub")
    method: Literal["lora", "qlora", "full"] = option("lora", "LoRA, LoRA on an NF4 base, or all weights")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; auto: bfloat16 on CUDA, float32 on CPU"
    )
    max_length: int = option(512, "longest text in tokens", minimum=16)
    taxonomy: str | None = option(None, "YAML file with categories and template; default BeaverTails' 14")
    layout: Literal["auto", "packed", "padded"] = option("auto", "how a micro-batch is laid out")
    backbone_dropout: float = option(0.0, "dropout inside the backbone", minimum=0.0, maximum=0.9)
    head_prior: bool = option(True, "start a new head at the base rates of the categories")
    gradient_checkpointing: bool | Literal["auto", "none", "selective", "all"] = option(
        "auto",
        "recompute activations: none, selective (every second layer), all; auto: on CUDA as memory asks for, else none",
    )
    use_cpu: bool = option(False, "stay on the CPU even when CUDA is there")

    # LoRA
    lora_r: int = option(16, "rank of the adapters", minimum=1)
    lora_alpha: float = option(32.0, "scale of the adapters: alpha / r, or alpha / sqrt(r) with rsLoRA", above=0)
    lora_dropout: float = option(0.0, "dropout on the adapters' input", minimum=0.0, maximum=0.9)
    target_modules: tuple[str, ...] = option(("all-linear",), "layers that get an adapter")
    use_rslora: bool = option(False, "rank-stabilised LoRA")
    use_dora: bool = option(False, "weight-decomposed LoRA; slower")
    init_lora_weights: bool | str = option("true", "true or gaussian")
    bnb_4bit_use_double_quant: bool = option(True, "quantise the NF4 constants as well (qlora)")

    # data
    train_data_name_or_path: str = option(help="`hub/name:split[@revision]` or a file; several joined with +")
    eval_data_name_or_path: str | None = option(None, "validation data; default: hold prompts of the training data out")
    validation_fraction: float | None = option(
        None, "share of training pairs held out by prompt; default 0.05 when evaluating", minimum=0.0, maximum=0.5
    )
    on_bad_row: Literal["stop", "skip"] = option("stop", "what a broken row does")
    long_text: Literal["window", "truncate"] = option("window", "scoring of texts beyond max_length")
    cache_dir: str | None = option(
        "auto",
        "parsed and tokenised rows, kept for the next start in a directory that you alone can read, for it holds their "
        "texts; auto: $XDG_CACHE_HOME/qlora_moderation, or ~/.cache/qlora_moderation; none: nothing is kept",
    )

    # loop
    output_dir: str = option(help="run directory")
    overwrite_output_dir: bool = option(False, "replace what an earlier run left in output_dir")
    num_train_epochs: float = option(3.0, "passes over the distinct pairs", above=0)
    max_steps: int = option(-1, "stop after this many steps; -1: by epochs", minimum=-1)
    per_device_train_batch_size: int = option(16, "pairs a step, for each accumulation step and process", minimum=1)
    per_device_eval_batch_size: int = option(16, "accepted; scoring is batched by tokens instead", minimum=1)
    gradient_accumulation_steps: int = option(1, "multiplies the pairs of a step", minimum=1)
    max_tokens_per_micro_batch: int | None = option(
        None, "token budget of one forward; default 2048 on CPU, 16384 on CUDA, at least max_length", minimum=1
    )
    learning_rate: float | None = option(
        None, f"default {LORA_LEARNING_RATE} for lora and qlora, {FULL_LEARNING_RATE} for full", above=0
    )
    weight_decay: float = option(0.0, "on matrices only", minimum=0)
    warmup_ratio: float = option(0.03, "share of the steps with a rising rate", minimum=0, maximum=1)
    warmup_steps: int = option(0, "wins over warmup_ratio when above 0", minimum=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = option("cosine", "schedule")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = option(
        "adamw_torch_fused", "optimiser; the 8-bit and paged ones are bitsandbytes'"
    )
    adam_beta1: float = option(0.9, "first-moment decay", minimum=0, maximum=0.999999)
    adam_beta2: float = option(0.999, "second-moment decay", minimum=0, maximum=0.999999)
    adam_epsilon: float = option(1e-8, "added to the denominator", above=0)
    max_grad_norm: float = option(1.0, "gradient norm above which it is scaled down; 0: never", minimum=0)
    seed: int = option(42, "of order, head, adapters, splits", minimum=0, maximum=2**63 - 1)
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "epoch", "when to evaluate", aliases=("evaluation_strategy",)
    )
    eval_steps: int | None = option(None, "steps between evaluations; default logging_steps", minimum=1)
    metric_for_best_model: str = option("micro/average_precision", "metric that picks the adapter; higher is better")
    save_strategy: Literal["no", "steps", "epoch"] = option("no", "when to write a checkpoint")
    save_steps: int = option(500, "steps between checkpoints", minimum=1)
    save_total_limit: int | None = option(None, "checkpoints kept", minimum=1)
    resume: str = option("auto", "auto: go on where output_dir stands; never; or the path of a checkpoint")
    logging_steps: int = option(10, "steps between lines", minimum=1)
    report_to: tuple[str, ...] = option(("none",), "tensorboard, wandb, trackio or none")
    bf16: bool | None = option(None, "True: bfloat16 where the device is CUDA and has it")
    tf32: bool | None = option(None, "TensorFloat-32 products on CUDA")
    sharding: Literal["auto", "none", "ddp", "fsdp"] = option(
        "auto", "one process, replicas, or slices of every layer; auto: replicas where memory allows"
    )
    fsdp: str | None = option(
        None, "`full_shard auto_wrap`, `shard_grad_op`, `offload`: --sharding fsdp, in other words"
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = option(None, "decoder layer class; found by itself")
    fsdp_cpu_offload: bool = option(False, "fsdp: keep the slices in CPU memory between uses")
    dry_run: bool = option(False, "do everything up to the first step, show it, and exit")

    @property
    def resolved_learning_rate(self) -> float:
        """The rate given, or the method's default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_LEARNING_RATE if self.method == "full" else LORA_LEARNING_RATE

    @property
    def resolved_sharding(self) -> str:
        """The sharding given, or what the original recipe's `--fsdp` means; `auto` is decided later."""
        return "fsdp" if self.sharding == "auto" and self.fsdp else self.sharding

    @property
    def recomputation(self) -> Literal["auto", "none", "selective", "all"]:
        """The checkpointing given, or what the original recipe's switch means; `auto` is decided later."""
        if isinstance(self.gradient_checkpointing, bool):
            return "all" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing

    @property
    def offloads(self) -> bool:
        """Whether fsdp keeps its slices in CPU memory."""
        return self.fsdp_cpu_offload or "offload" in (self.fsdp or "").split()

    @property
    def holds_out(self) -> float:
        """Share of the training pairs to hold out as validation data."""
        if self.validation_fraction is not None:
            return self.validation_fraction
        return 0.0 if self.eval_data_name_or_path or self.eval_strategy == "no" else 0.05

    def find_faults(self) -> list[str]:
        """Return contradictions between options, each with its remedy."""
        faults = []
        init = str(self.init_lora_weights).lower()
        if init.startswith(BASE_ALTERING_INITS):
            faults.append(
                f"--init_lora_weights {init}: changes the base weights, so the adapter would not fit the base that it "
                "names and could not be merged faithfully; use true or gaussian"
            )
        elif init not in ("true", "gaussian"):
            faults.append(f"--init_lora_weights {init}: allowed: true, gaussian")
        if self.cache_dir == "":
            faults.append("--cache_dir is empty; give a directory, auto, or none")
        budget = self.max_tokens_per_micro_batch
        if budget is not None and budget < self.max_length:
            faults.append(
                f"--max_tokens_per_micro_batch {budget}: is below --max_length {self.max_length}, so that a long text "
                "would fit no micro-batch; raise it or lower max_length"
            )
        if self.eval_strategy == "no" and self.validation_fraction:
            faults.append("--validation_fraction holds pairs out, but --eval_strategy no never uses them; drop one")
        if self.eval_data_name_or_path and self.validation_fraction:
            faults.append("--validation_fraction and --eval_data_name_or_path both name validation data; drop one")
        if self.validation_fraction == 0 and self.eval_strategy != "no" and not self.eval_data_name_or_path:
            faults.append("--validation_fraction 0 leaves nothing to evaluate; add --eval_strategy no")
        if self.bf16 and self.dtype == "float32":
            faults.append("--bf16 True contradicts --dtype float32; drop one")
        if self.method == "full" and self.use_dora:
            faults.append("--use_dora needs --method lora or qlora")
        if self.max_steps == 0:
            faults.append("--max_steps 0 trains nothing; give a number above 0, -1 to go by epochs, or --dry_run")
        if self.overwrite_output_dir and self.resume not in ("auto", "never"):
            faults.append(f"--overwrite_output_dir would remove the checkpoint of --resume {self.resume}; drop one")
        words = (self.fsdp or "").split()
        wrong = [word for word in words if word not in FSDP_WORDS]
        if wrong:
            hint = nearest(wrong[0], FSDP_WORDS) or f"; allowed: {', '.join(FSDP_WORDS)}"
            faults.append(f"--fsdp {self.fsdp}: {wrong[0]} is unknown{hint}")
        elif "full_shard" in words and "shard_grad_op" in words:
            faults.append(f"--fsdp {self.fsdp}: full_shard and shard_grad_op exclude each other; drop one")
        if words and self.sharding in ("none", "ddp"):
            faults.append(
                f"--sharding {self.sharding} contradicts --fsdp {self.fsdp}; drop one (--fsdp none where a YAML file has it)"
            )
        if self.offloads and self.resolved_sharding != "fsdp":
            faults.append("--fsdp_cpu_offload needs --sharding fsdp")
        unknown = set(self.report_to) - {"none", "tensorboard", "wandb", "trackio"}
        if unknown:
            faults.append(f"--report_to {' '.join(sorted(unknown))}: allowed: tensorboard, wandb, trackio, none")
        return faults

    def advice(self) -> list[str]:
        """Return lines worth reading that stop nothing."""
        lines = []
        if self.method != "full" and self.resolved_learning_rate < 5e-5:
            lines.append(
                f"learning_rate {self.resolved_learning_rate:g} is low for {self.method}: LoRA wants about ten times a "
                f"full fine-tuning rate; the default is {LORA_LEARNING_RATE:g}"
            )
        return lines


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What `scripts/plan.py` reads."""

    model_name_or_path: str | None = option(
        None, "backbone: a directory with config.json or a hub name; default: LLaMA-7B's shape, without a download"
    )
    model_revision: str | None = option(None, "revision of a backbone from the hub")
    methods: tuple[Literal["lora", "qlora", "full"], ...] = option(("lora", "qlora", "full"), "rows of the table")
    cards: tuple[int, ...] = option((8, 16, 24, 48, 80, 141), "memory of the cards in GB")
    gpus: tuple[int, ...] = option((1, 2, 4, 8), "numbers of GPUs")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "compute type")
    max_length: int = option(512, "longest text in tokens", minimum=16)
    max_tokens_per_micro_batch: int = option(16384, "largest token budget that is tried; then its halves", minimum=16)
    lora_r: int = option(16, "rank of the adapters", minimum=1)
    target_modules: tuple[str, ...] = option(("all-linear",), "layers that get an adapter")
    bnb_4bit_use_double_quant: bool = option(True, "quantise the NF4 constants as well (qlora)")
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = option(
        "adamw_torch_fused", "optimiser"
    )
    taxonomy: str | None = option(None, "YAML file with categories and template; default BeaverTails' 14")
    json: str | None = option(None, "file for the same lines with sizes in bytes")

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        faults = [
            f"--{name} {' '.join(map(str, values))}: must be at least 1"
            for name, values in (("cards", self.cards), ("gpus", self.gpus))
            if min(values) < 1
        ]
        if self.max_tokens_per_micro_batch < self.max_length:
            faults.append(
                f"--max_tokens_per_micro_batch {self.max_tokens_per_micro_batch}: is below --max_length {self.max_length}, so "
                "that a long text would fit no micro-batch; raise it or lower max_length"
            )
        return faults


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What `scripts/evaluate.py` reads."""

    model_path: str = option(help="full model, adapter or merged directory")
    eval_dataset: str = option(
        help="labelled rows, or rows with model and flagged {moderator: bool}", aliases=("eval_data_name_or_path",)
    )
    output_dir: str = option(help="where predictions, metrics, figures and report go")
    train_data_name_or_path: str | None = option(None, "training rows, for the TF-IDF baselines")
    max_length: int | None = option(None, "longest text in tokens; default the model's", minimum=16)
    long_text: Literal["window", "truncate"] | None = option(None, "texts beyond max_length; default the model's")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; auto: bfloat16 on CUDA, float32 on CPU"
    )
    max_tokens_per_micro_batch: int | None = option(None, "token budget of one forward", minimum=1)
    on_bad_row: Literal["stop", "skip"] = option("stop", "what a broken row does")
    moderator: tuple[str, ...] = option((), "NAME=FILE: verdicts of other moderators, joined by texts", whole=True)
    moderator_threshold: float = option(0.5, "a moderator's score above it flags", minimum=0, maximum=1)
    compare: str | None = option(None, "output of an earlier evaluation, compared row by row")
    fail_if: tuple[str, ...] = option(
        (), "rules on the difference to it, as 'flagged/recall < -0.01'; exit code 3: broken, 4: undecided", whole=True
    )
    bootstrap_replicates: int = option(1000, "draws of prompts for the intervals; 0: no intervals", minimum=0)
    seed: int = option(0, "of these draws", minimum=0, maximum=2**63 - 1)
    use_cpu: bool = option(False, "stay on the CPU even when CUDA is there")

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        if self.fail_if and self.compare is None:
            return ["--fail_if needs --compare, the output of an earlier evaluation"]
        if self.compare is not None and Path(self.compare).resolve() == Path(self.output_dir).resolve():
            return [f"--compare {self.compare}: is --output_dir, too, and would be replaced; give another --output_dir"]
        if self.fail_if and self.bootstrap_replicates < 100:
            return ["--fail_if decides by an interval, which needs --bootstrap_replicates of at least 100"]
        return []


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What `scripts/tune.py` reads."""

    model_path: str = option(help="full model, adapter or merged directory, whose thresholds.json is replaced")
    eval_dataset: str = option(
        help="labelled validation rows, on which nothing was trained", aliases=("eval_data_name_or_path",)
    )
    objective: str = option("f1", "of each category's threshold: f1, recall>=R or fpr<=A")
    flagged_objective: str | None = option(None, "of the threshold of flagged; default: objective")
    flagged_rule: Literal["max", "calibrated"] = option("max", "flagged by the highest category, or by P(unsafe)")
    calibrate: bool = option(True, "fit calibration maps")
    min_positives: int = option(25, "pairs of each kind below which a category shares a threshold", minimum=1)
    max_missed_harm: float | None = option(
        None,
        "flagged misses at most this share of harmful prompts; wins over flagged_objective",
        minimum=0.001,
        maximum=0.5,
    )
    confidence: float = option(0.95, "with which that holds", minimum=0.5, maximum=0.9999)
    seed: int = option(0, "of the draw of one harmful pair a prompt", minimum=0, maximum=2**63 - 1)
    long_text: Literal["window", "truncate"] | None = option(None, "texts beyond max_length; default the model's")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute type; auto: bfloat16 on CUDA, float32 on CPU"
    )
    max_tokens_per_micro_batch: int | None = option(None, "token budget of one forward", minimum=1)
    on_bad_row: Literal["stop", "skip"] = option("stop", "what a broken row does")
    use_cpu: bool = option(False, "stay on the CPU even when CUDA is there")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What `qlora-moderation report` reads."""

    evaluation_dir: str = option(help="output of an evaluation, whose figures and report are made anew")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """What `scripts/merge_adapter.py` reads."""

    adapter_path: str = option(help="adapter directory written by training")
    output_dir: str = option(help="where the merged model goes")
    base: Literal["auto", "dequantized", "original"] = option(
        "auto", "weights to merge into; auto: dequantized for qlora, original for lora"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "type of the written backbone; auto: the base checkpoint's own"
    )
    overwrite: bool = option(False, "replace an existing output_dir")
    use_cpu: bool = option(False, "stay on the CPU even when CUDA is there")


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """What `scripts/quickstart.sh` reads."""

    model_name_or_path: str | None = option(None, "a real backbone; default: the embedded one, built on the spot")
    train_data_name_or_path: str | None = option(None, "real training rows; default: the embedded sample")
    eval_data_name_or_path: str | None = option(None, "real validation rows; default: held out of the training rows")
    recipe: str = option("configs/quickstart.yaml", "training settings of the embedded run")
    method: Literal["lora", "qlora", "full"] = option("qlora", "how the backbone is trained")
    output_dir: str = option("output/quickstart", "replaced where it is an earlier quick start's")
    max_steps: int = option(-1, "stop after this many steps (real backbone); -1: by epochs", minimum=-1)
    learning_rate: float | None = option(None, "of a real backbone", above=0)
    seed: int = option(0, "of sample, backbone, order and adapters", minimum=0, maximum=2**63 - 1)

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        if (self.model_name_or_path is None) != (self.train_data_name_or_path is None):
            return ["--model_name_or_path and --train_data_name_or_path go together: give both, or neither"]
        return []


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """What `scripts/build_backbone.py` reads."""

    train_data_name_or_path: str = option(help="rows whose texts the language model learns")
    output_dir: str = option(help="must not exist yet")
    taxonomy: str | None = option(None, "YAML file with categories and template; default BeaverTails' 14")
    hidden_size: int = option(256, "width, a multiple of 64", minimum=64)
    num_layers: int = option(4, "decoder layers", minimum=1)
    vocab_size: int = option(4096, "most tokens of the tokenizer", minimum=512)
    max_length: int = option(512, "longest text in tokens", minimum=16)
    steps: int = option(200, "language-model steps", minimum=0)
    seed: int = option(0, "of weights and order", minimum=0, maximum=2**63 - 1)
    on_bad_row: Literal["stop", "skip"] = option("stop", "what a broken row does")

    def find_faults(self) -> list[str]:
        """Return contradictions between options."""
        return [f"--hidden_size {self.hidden_size}: must be a multiple of 64"] if self.hidden_size % 64 else []
