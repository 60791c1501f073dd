"""Step 1: defaults ← YAML ← flags, all faults at once, before torch is imported."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qlora_moderation import config as config_module
from qlora_moderation.config import (
    BASE_ALTERING_INITS,
    FULL_LEARNING_RATE,
    LORA_LEARNING_RATE,
    EvaluateConfig,
    MergeConfig,
    TrainConfig,
)
from qlora_moderation.errors import ConfigError
from qlora_moderation.options import build_parser, dump_options, load_options

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {"model_name_or_path": "backbone", "train_data_name_or_path": "rows.jsonl", "output_dir": "out"}
NEEDED = [word for name, value in REQUIRED.items() for word in (f"--{name}", value)]
CONFIGS = [value for name, value in vars(config_module).items() if name.endswith("Config")]
ORIGINAL_RECIPE = """
    --model_name_or_path huggyllama/llama-7b --train_data_name_or_path PKU-Alignment/BeaverTails:train
    --eval_data_name_or_path PKU-Alignment/BeaverTails:test --output_dir out --num_train_epochs 3
    --per_device_train_batch_size 16 --per_device_eval_batch_size 16 --gradient_accumulation_steps 1
    --evaluation_strategy steps --eval_steps 100 --save_strategy epoch --save_total_limit 2 --learning_rate 2e-5
    --weight_decay 0.1 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --fsdp "full_shard auto_wrap"
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --gradient_checkpointing --bf16 True --tf32 True
"""


def load(*flags: str, cls: type = TrainConfig):
    return load_options(cls, build_parser(cls, "test", prog="test"), [*(NEEDED if cls is TrainConfig else ()), *flags])


def faults_of(*flags: str, needed: list[str] = NEEDED) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_options(TrainConfig, build_parser(TrainConfig, ""), [*needed, *flags])
    return str(caught.value).splitlines()


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flags_win_over_yaml_and_yaml_over_defaults(config_file):
    path = config_file("lora_r: 8\nseed: 7\n")
    for flags in (["--config", path, "--lora_r", "4"], ["--lora_r", "4", f"--config={path}"]):
        config = load(*flags)
        assert (config.lora_r, config.seed, config.lora_alpha) == (4, 7, TrainConfig.lora_alpha)
    assert TrainConfig.lora_r not in (4, 8) and TrainConfig.seed != 7


def test_a_required_option_may_stand_in_the_yaml(config_file):
    config = load_options(
        TrainConfig, build_parser(TrainConfig, ""), ["--config", config_file(yaml.safe_dump(REQUIRED))]
    )
    assert {name: getattr(config, name) for name in REQUIRED} == REQUIRED


def test_an_empty_yaml_changes_nothing(config_file):
    assert load("--config", config_file("# nothing\n")) == load()


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--gradient_checkpointing --seed 1", "gradient_checkpointing", True),
        ("--gradient_checkpointing False", "gradient_checkpointing", False),
        ("--gradient_checkpointing=yes", "gradient_checkpointing", True),
        ("--gradient_checkpointing", "recomputation", "all"),
        ("--gradient_checkpointing False", "recomputation", "none"),
        ("--gradient_checkpointing none", "gradient_checkpointing", "none"),
        ("--gradient_checkpointing selective", "recomputation", "selective"),
        ("--gradient_checkpointing all", "recomputation", "all"),
        ("--seed 1", "recomputation", "auto"),
        ("--bf16 True", "bf16", True),
        ("--bf16=false", "bf16", False),
        ("--bf16", "bf16", True),
        ("--bf16 none", "bf16", None),
        ("--learning_rate=1e-4", "learning_rate", 1e-4),
        ("--max_steps -1", "max_steps", -1),
        ("--evaluation_strategy steps", "eval_strategy", "steps"),
        ("--eval_strategy=no", "eval_strategy", "no"),
        ("--target_modules q_proj v_proj", "target_modules", ("q_proj", "v_proj")),
        ("--target_modules=q_proj,v_proj", "target_modules", ("q_proj", "v_proj")),  # as in YAML
        ("--eval_data_name_or_path None", "eval_data_name_or_path", None),
        ("--fsdp 'full_shard auto_wrap'", "fsdp", "full_shard auto_wrap"),
        ("--output_dir=a=b", "output_dir", "a=b"),
    ],
)
def test_both_flag_styles(flags, name, value):
    assert getattr(load(*shlex.split(flags)), name) == value


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),  # text in YAML 1.1
        ("learning_rate: null", "learning_rate", None),
        ("adam_epsilon: 1e-08", "adam_epsilon", 1e-8),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("seed: 5.0", "seed", 5),
        ("eval_strategy: no", "eval_strategy", "no"),  # False in YAML 1.1
        ("evaluation_strategy: no", "eval_strategy", "no"),
        ("save_strategy: off", "save_strategy", "no"),
        ("gradient_checkpointing: on", "gradient_checkpointing", True),
        ("gradient_checkpointing: none", "recomputation", "none"),
        ("gradient_checkpointing: off", "recomputation", "none"),
        ("bf16: 'True'", "bf16", True),
        ("target_modules: [q_proj, v_proj]", "target_modules", ("q_proj", "v_proj")),
        ("target_modules: q_proj, v_proj", "target_modules", ("q_proj", "v_proj")),
        ("report_to: none", "report_to", ("none",)),
        ("metric_for_best_model: 2026", "metric_for_best_model", "2026"),
        ("init_lora_weights: gaussian", "init_lora_weights", "gaussian"),
        ("init_lora_weights: true", "init_lora_weights", "true"),  # True in YAML, as PEFT's own configuration has it
    ],
)
def test_yaml_values(config_file, line, name, value):
    found = getattr(load("--config", config_file(line)), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nlora_r: 4\nseed: 2\n", "key seed stands twice"),
        ("eval_strategy: steps\nevaluation_strategy: no\n", "eval"),  # the same option under both of its names
        ("seed: [1\n", "not valid YAML"),
        ("- seed\n", "`key: value` lines, found a list"),
        ("seed\n", "`key: value` lines, found a str"),
        ("? [seed]\n: 1\n", "not valid YAML"),
        ("lerning_rate: 1\n", "unknown key lerning_rate (did you mean learning_rate?)"),
        ("loraRank: 3\n", "unknown key loraRank"),
        ("1: 3\n", "unknown key 1"),
        ("seed: null\n", "expected a whole number"),
        ("seed: 1.5\n", "expected a whole number"),
        ("seed: true\n", "expected a whole number"),
        ("seed: .inf\n", "expected a whole number"),
        ("learning_rate: .nan\n", "expected a finite number"),
        ("learning_rate: true\n", "expected a finite number"),
        ("weight_decay: [1]\n", "expected a finite number"),
        ("use_cpu: 2\n", "expected True or False"),
        ("metric_for_best_model: yes\n", "expected text"),
        ("model_revision: [a]\n", "expected text"),
        ("target_modules: [[a]]\n", "target_modules"),
        ("target_modules: null\n", "target_modules"),
        ("target_modules: {q_proj: 1}\n", "target_modules"),
        ("method: yes\n", "allowed: lora, qlora, full"),
    ],
)
def test_yaml_faults(config_file, text, words):
    path = config_file(text)
    (fault,) = faults_of("--config", path)
    assert words in fault and path in fault


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_an_unreadable_yaml_is_one_fault(tmp_path, content):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    (fault,) = faults_of("--config", str(path))
    assert fault.startswith(f"--config {path}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--learning_rte 1", "unknown flag --learning_rte (did you mean --learning_rate?)"),
        ("--learning-rate=1", "unknown flag --learning-rate (did you mean --learning_rate?)"),
        ("--learning 1", "unknown flag --learning (did you mean --learning_rate?)"),  # no abbreviations
        ("--evaluation_strateg no", "did you mean --evaluation_strategy?"),
        ("--confg x.yaml", "did you mean --config?"),
        ("--batch_size 1", "unknown flag --batch_size (did you mean --per_device_train_batch_size?)"),
        ("--learning_rate", "--learning_rate: needs a value"),
        ("--learning_rate abc", "--learning_rate: 'abc' is not valid, expected a finite number"),
        ("--learning_rate inf", "expected a finite number"),
        ("--method qlra", "allowed: lora, qlora, full (did you mean qlora?)"),
        ("--gradient_checkpointing al", "allowed: auto, none, selective, all (did you mean all?)"),
        ("--use_cpu maybe", "--use_cpu: 'maybe' is not valid, expected True or False"),
        ("--seed 1.5", "expected a whole number"),
        ("--seed none", "expected a whole number"),
    ],
)
def test_flag_faults(flags, words):
    (fault,) = faults_of(*flags.split())
    assert words in fault


def test_a_nearest_name_is_given_only_where_one_is_near():
    assert faults_of("--xyzzy") == ["unknown flag --xyzzy"]
    with pytest.raises(ConfigError, match=r"^unknown flag --version$"):  # overwrite is as far as half of its letters
        load("--adapter_path", "A", "--output_dir", "D", "--version", cls=MergeConfig)


def test_a_stray_word_is_refused():
    (fault,) = faults_of(*NEEDED, needed=["train"])
    assert fault == "unexpected argument 'train'; every option is a flag, see --help"


@pytest.mark.parametrize("flags", ["--target_modules", "--config"])
def test_a_flag_without_its_value_is_a_configuration_error(flags):
    assert len(faults_of(*flags.split(), "--sed", "1")) == 2


def test_all_faults_come_at_once(config_file):
    path = config_file("lora_rr: 3\nseed: x\nlora_dropout: 2\n")
    faults = faults_of(*f"--config {path} --output_dir o --lerning_rate 1 --lora_r 0".split(), needed=[])
    for words in (
        f"{path}: unknown key lora_rr (did you mean lora_r?)",
        f"{path}: seed: 'x' is not valid",
        f"{path}: lora_dropout: 2 is not valid, must be at most 0.9",
        "unknown flag --lerning_rate (did you mean --learning_rate?)",
        "--lora_r: 0 is not valid, must be at least 1",
        "--model_name_or_path is missing",
        "--train_data_name_or_path is missing",
    ):
        assert any(words in fault for fault in faults), words
    assert len(faults) == 7


def test_all_contradictions_come_at_once():
    faults = faults_of("--bf16", "--dtype", "float32", "--init_lora_weights", "pissa", "--report_to", "mlflow")
    assert len(faults) == 3


BOUNDS = [
    (cls, field.name, field.metadata[kind], kind)
    for cls in CONFIGS
    for field in dataclasses.fields(cls)
    for kind in ("minimum", "maximum", "above")
    if kind in field.metadata
]


@pytest.mark.parametrize(("cls", "name", "bound", "kind"), BOUNDS, ids=[f"{b[1]}-{b[3]}" for b in BOUNDS])
def test_bounds(cls, name, bound, kind):
    beyond = {"minimum": bound - 1, "maximum": bound + 1, "above": bound}[kind]
    required = [f"--{field.name}=x" for field in dataclasses.fields(cls) if field.metadata["required"]]
    with pytest.raises(ConfigError, match=rf"--{name}: .* is not valid, must be (at least|at most|above) "):
        load_options(cls, build_parser(cls, ""), [*required, f"--{name}={beyond}"])
    if kind != "above":
        try:
            load_options(cls, build_parser(cls, ""), [*required, f"--{name}={bound}"])
        except ConfigError as error:  # a contradiction with another option; the bound itself is allowed
            assert "is not valid" not in str(error)


def test_the_bounds_are_there():
    bounded = {(name, kind) for _, name, _, kind in BOUNDS}
    assert {("learning_rate", "above"), ("lora_r", "minimum"), ("warmup_ratio", "maximum")} <= bounded
    assert {TrainConfig, EvaluateConfig, MergeConfig} <= set(CONFIGS)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--cache_dir=", "--cache_dir is empty; give a directory, auto, or none"),
        ("--max_tokens_per_micro_batch 511", "is below --max_length 512"),
        ("--eval_strategy no --validation_fraction 0.1", "--eval_strategy no never uses them"),
        ("--eval_data_name_or_path d --validation_fraction 0.1", "both name validation data"),
        ("--validation_fraction 0", "leaves nothing to evaluate"),
        ("--bf16 --dtype float32", "contradicts --dtype float32"),
        ("--use_dora --method full", "--use_dora needs --method lora or qlora"),
        ("--report_to wandb mlflow", "--report_to mlflow: allowed: tensorboard, wandb, trackio, none"),
        ("--init_lora_weights orthogonal", "--init_lora_weights orthogonal: allowed: true, gaussian"),
    ],
)
def test_contradictions(flags, words):
    (fault,) = faults_of(*flags.split())
    assert words in fault


@pytest.mark.parametrize(
    "flags",
    [
        "--max_tokens_per_micro_batch 512",
        "--eval_strategy no --validation_fraction 0",
        "--eval_data_name_or_path d --validation_fraction 0",
        "--bf16 False --dtype float32",
        "--bf16 --dtype bfloat16",
        "--use_dora --method qlora",
        "--report_to wandb tensorboard",
        "--init_lora_weights True",
    ],
)
def test_no_contradiction(flags):
    load(*flags.split())


@pytest.mark.parametrize("init", [*BASE_ALTERING_INITS, "PiSSA", "pissa_niter_16"])
def test_initialisations_that_change_the_base_are_refused_with_the_reason(init):
    (fault,) = faults_of("--init_lora_weights", init)
    assert "changes the base weights" in fault and "use true or gaussian" in fault


def test_the_four_base_altering_initialisations():
    assert set(BASE_ALTERING_INITS) == {"pissa", "olora", "corda", "loftq"}


@pytest.mark.parametrize(
    ("method", "rate", "advised"),
    [
        ("lora", 2e-5, True),
        ("qlora", 4.9e-5, True),
        ("full", 2e-5, False),
        ("lora", 5e-5, False),
        ("qlora", 2e-4, False),
        ("lora", None, False),
        ("full", None, False),
    ],
)
def test_learning_rate_advice(method, rate, advised):
    config = TrainConfig(**REQUIRED, method=method, learning_rate=rate)
    assert bool(config.advice()) == advised
    default = FULL_LEARNING_RATE if method == "full" else LORA_LEARNING_RATE
    assert config.resolved_learning_rate == (rate or default)


def test_the_default_learning_rates():
    assert (LORA_LEARNING_RATE, FULL_LEARNING_RATE) == (2e-4, 2e-5)


@pytest.mark.parametrize(
    ("flags", "fraction"),
    [
        ("", 0.05),
        ("--eval_strategy no", 0),
        ("--eval_data_name_or_path d", 0),
        ("--validation_fraction 0.2", 0.2),
    ],
)
def test_validation_pairs_are_held_out_where_something_is_evaluated(flags, fraction):
    assert load(*flags.split()).holds_out == fraction


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(**REQUIRED),
        TrainConfig(
            **REQUIRED, learning_rate=3e-5, eval_strategy="no", target_modules=("q_proj", "v_proj"), bf16=False, seed=0
        ),
        TrainConfig(**{**REQUIRED, "output_dir": "Läufe/ 1: # x", "model_name_or_path": "123"}, model_revision="1e5"),
        EvaluateConfig("model", "rows", "out", long_text="truncate", max_length=64),
        MergeConfig("adapter", "out", base="original", dtype="float16", overwrite=True),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_dumped_configuration_reads_back_equal(config, config_file):
    path = config_file(dump_options(config))
    assert load_options(type(config), build_parser(type(config), ""), ["--config", path]) == config


def test_the_original_recipe_parses_verbatim():
    config = load_options(TrainConfig, build_parser(TrainConfig, ""), shlex.split(ORIGINAL_RECIPE))
    expected = TrainConfig(
        model_name_or_path="huggyllama/llama-7b",
        train_data_name_or_path="PKU-Alignment/BeaverTails:train",
        eval_data_name_or_path="PKU-Alignment/BeaverTails:test",
        output_dir="out",
        method="lora",
        num_train_epochs=3.0,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        gradient_accumulation_steps=1,
        eval_strategy="steps",
        eval_steps=100,
        save_strategy="epoch",
        save_total_limit=2,
        learning_rate=2e-5,
        weight_decay=0.1,
        warmup_ratio=0.03,
        lr_scheduler_type="cosine",
        logging_steps=1,
        fsdp="full_shard auto_wrap",
        fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer",
        gradient_checkpointing=True,
        bf16=True,
        tf32=True,
    )
    assert config == expected and config.advice()


@pytest.mark.parametrize("name", ["eval_dataset", "eval_data_name_or_path"])
def test_the_command_line_of_evaluate_parses(name):
    flags = f"--{name} F --model_path D --max_length 512 --output_dir D".split()
    assert load(*flags, cls=EvaluateConfig) == EvaluateConfig("D", "F", "D", max_length=512)


def test_an_evaluation_is_not_compared_with_what_it_replaces(tmp_path):
    flags = ["--model_path", "D", "--eval_dataset", "F", "--output_dir", str(tmp_path), "--compare", f"{tmp_path}/."]
    with pytest.raises(ConfigError, match="is --output_dir, too, and would be replaced"):
        load(*flags, cls=EvaluateConfig)


@pytest.mark.parametrize("cls", CONFIGS)
def test_help_names_every_option(cls):
    text = build_parser(cls, "").format_help()
    usage = " ".join(text.split("\n\n")[0].split())
    for field in dataclasses.fields(cls):
        assert f"\n  --{field.name}" in text and field.metadata["help"], field.name
        assert (f"--{field.name} X" in usage) == field.metadata["required"]
    assert not any(word in text for word in ("default: None", "default: ()", "default: )", "[X]"))


def run_cli(job: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a job in a process of its own, which fails when a heavy library was imported."""
    program = (
        "import sys\n"
        "from qlora_moderation.cli import run_job\n"
        "try:\n    code = run_job(sys.argv[1], sys.argv[2:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, job, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("job", ["train", "merge", "evaluate"])
def test_help_needs_no_torch(job):
    done = run_cli(job, "--help")
    assert done.returncode == 0 and "--output_dir" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    ("job", "flags", "words"),
    [
        ("train", "--lerning_rate 3", "error: unknown flag --lerning_rate (did you mean --learning_rate?)"),
        ("train", f"{' '.join(NEEDED)} --bf16 --dtype float32", "error: --bf16 True contradicts"),
        ("merge", "--adapter_path a", "error: --output_dir is missing"),
        ("evaluate", "--config /nowhere.yaml", "error: --config /nowhere.yaml: cannot be read"),
    ],
)
def test_a_fault_is_reported_without_torch_and_without_a_traceback(job, flags, words):
    done = run_cli(job, *flags.split())
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("flags", "kind", "offloads"),
    [
        ("", "auto", False),
        ("--sharding ddp", "ddp", False),
        ("--fsdp 'full_shard auto_wrap'", "fsdp", False),
        ("--fsdp 'full_shard auto_wrap offload'", "fsdp", True),
        ("--sharding fsdp --fsdp_cpu_offload", "fsdp", True),
        ("--sharding fsdp --fsdp shard_grad_op", "fsdp", False),
    ],
)
def test_the_original_words_for_sharding(flags, kind, offloads):
    config = load(*shlex.split(flags))
    assert (config.resolved_sharding, config.offloads) == (kind, offloads)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--fsdp full_shar", "--fsdp full_shar: full_shar is unknown (did you mean full_shard?)"),
        ("--fsdp zzz", "--fsdp zzz: zzz is unknown; allowed: full_shard, shard_grad_op, auto_wrap, offload"),
        ("--fsdp 'full_shard shard_grad_op'", "exclude each other"),
        ("--fsdp full_shard --sharding ddp", "--sharding ddp contradicts --fsdp full_shard"),
        ("--fsdp_cpu_offload", "--fsdp_cpu_offload needs --sharding fsdp"),
        ("--sharding fdsp", "did you mean fsdp?"),
        ("--overwrite_output_dir --resume a/b", "--overwrite_output_dir would remove the checkpoint of --resume a/b"),
    ],
)
def test_wrong_words_for_sharding(flags, words):
    with pytest.raises(ConfigError) as error:
        load(*shlex.split(flags))
    assert words in str(error.value)
