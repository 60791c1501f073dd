"""Whatever stands in a YAML file or on a command line is a configuration, or faults in one line each that name a place."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import tempfile
from pathlib import Path
from typing import Any, get_args

import yaml
from fuzz import Property
from hypothesis import strategies as st

from qlora_moderation import config as config_module
from qlora_moderation import prediction_config
from qlora_moderation.audit_config import AuditConfig
from qlora_moderation.comparison import Rule
from qlora_moderation.errors import ConfigError, ModerationError
from qlora_moderation.faults import report
from qlora_moderation.options import build_parser, dump_options, load_options
from qlora_moderation.serving.config import ServeConfig
from qlora_moderation.taxonomy import load_taxonomy
from qlora_moderation.tuning import Objective

CONFIGS = [
    value
    for module in (config_module, prediction_config)
    for name, value in vars(module).items()
    if name.endswith("Config")
] + [AuditConfig, ServeConfig]
ODD = [
    "",
    "0",
    "-1",
    "1e5",
    "nan",
    "inf",
    "none",
    "yes",
    "off",
    "1/2",
    "f1",
    "~",
    "\0",
    "a\nb",
    "\x1b[1m",
    "\ud800",
    "é",
]
ODD += ["--", "-", "=", "٣", "0x" + "f" * 5000, "9" * 400, "1_000", "1:30", "<<", "*", "a" * 5000, "true"]
TAGS = ["!!map", "!!seq", "!!str", "!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!binary", "!!set", "!!omap"]
TAGS += [
    "!!pairs",
    "!!python/name:os.system",
    "!own",
    "&a",
    "*a",
    "<<:",
    "- ",
    "? ",
    "{",
    "}",
    "[",
    "]",
    ",",
    ": ",
    "|\n",
]


_folder = tempfile.TemporaryDirectory(prefix="qlora-moderation-fuzz-")  # removed when the process ends


def folder() -> Path:
    """Return a folder for what is drawn."""
    return Path(_folder.name)


def check_told(error: ModerationError, starts: str = "") -> None:
    """Check that each line of a message is printable, and that each begins with a place where `starts` says how."""
    for line in str(error).split("\n"):
        assert line.isprintable(), line
        assert re.match(starts, line), line
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert report(error) == 2
    assert all(line.startswith("error: ") and len(line) < 2100 for line in told.getvalue().splitlines())


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400)]),
    st.floats(),
    st.text(st.characters(), max_size=12),
    st.sampled_from(ODD),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_SCALARS, inner, max_size=3),
    max_leaves=6,
)


def _fitting(config_class: type, name: str) -> st.SearchStrategy[Any]:
    """Return values that the field may take, more often than chance would."""
    field = next(field for field in dataclasses.fields(config_class) if field.name == name)
    words = [*re.findall(r"[\w/.]+", str(field.type)), "true", "1", "0.5", "x.jsonl", "f1", "1/8"]
    return st.sampled_from([*words, *get_args(field.type), field.default])


@st.composite
def drawn_configs(draw: st.DrawFn) -> tuple[type, str, list[str]]:
    """Draw a configuration's class, the text of a YAML file and flags."""
    config_class = draw(st.sampled_from(CONFIGS))
    names = [field.name for field in dataclasses.fields(config_class)]
    required = [field.name for field in dataclasses.fields(config_class) if field.metadata["required"]]
    keys = st.sampled_from(names) | st.sampled_from(ODD) | st.text(max_size=8)
    values = {
        key: draw(VALUES | _fitting(config_class, key) if key in names else VALUES) for key in draw(st.sets(keys))
    }
    if draw(st.booleans()):
        values = {**dict.fromkeys(required, "x"), **values}
    flags: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        key = draw(keys)
        value = draw(st.sampled_from(ODD) | st.text(max_size=6))
        flags += draw(st.sampled_from([[f"--{key}={value}"], [f"--{key}", value], [value], [f"-{key}"], [f"--{key}"]]))
    return config_class, yaml.safe_dump(values, allow_unicode=draw(st.booleans())), flags


def check_config(draw: tuple[type, str, list[str]]) -> None:
    """A YAML file and flags give a configuration that reads back equal, or faults."""
    config_class, text, flags = draw
    path = folder() / "drawn.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    parser = build_parser(config_class, "fuzz", "fuzz")
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            config = load_options(config_class, parser, [f"--config={path}", *flags])
    except SystemExit as stop:
        assert stop.code == 0 and any(flag.startswith(("-h", "--help")) for flag in flags), told.getvalue()
    except ConfigError as error:
        check_told(error, rf"--|{re.escape(str(path))}: |unknown flag --|unexpected argument ")
    else:
        again = folder() / "again.yaml"
        again.write_text(dump_options(config), encoding="utf-8")
        assert load_options(config_class, parser, [f"--config={again}"]) == config


YAML_TEXTS = st.lists(
    st.sampled_from([*TAGS, *ODD, "\n", "  ", "a", "b: c", "categories: ", "template: ", "labels_from: ", "lora_r: "])
    | st.text(max_size=4),
    max_size=12,
).map(lambda parts: "".join(f"{part} " if part.startswith("!") else part for part in parts))


def check_yaml(text: str) -> None:
    """Any text is a configuration file or a taxonomy, or no YAML."""
    path = folder() / "drawn.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    check_config((config_module.ReportConfig, text, []))
    try:
        load_taxonomy(path)
    except ConfigError as error:
        check_told(error)


def check_taxonomy(values: Any) -> None:
    """Any mapping is a taxonomy that reads back equal and renders what it is given, or a fault."""
    path = folder() / "taxonomy.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8", errors="replace")
    try:
        taxonomy = load_taxonomy(path)
    except ConfigError as error:
        check_told(error)
        return
    path.write_text(yaml.safe_dump(taxonomy.to_dict()), encoding="utf-8")
    assert load_taxonomy(path) == taxonomy
    before, between, after = taxonomy.template_parts
    assert taxonomy.render("{answer}", "{question}") == f"{before}{{answer}}{between}{{question}}{after}"
    assert all(isinstance(name, str) and name.encode() for name in taxonomy.categories)


_NAMES = st.sampled_from(["a", "b,c", "flagged", "", "\ud800", "x\ny"]) | st.text(max_size=4)
TAXONOMIES = st.fixed_dictionaries(
    {},
    optional={
        "categories": st.lists(_NAMES | VALUES, max_size=3) | st.lists(_NAMES, max_size=3, unique=True) | VALUES,
        "template": st.sampled_from(["{question}{answer}", "{answer}{question}", "a {question}\n{answer}{answer}"])
        | st.text(max_size=5).map(lambda text: f"{text}{{question}}{text[::-1]}{{answer}}")
        | VALUES,
        "labels_from": st.sampled_from(["category", "is_safe"]) | VALUES,
        "other": VALUES,
    },
)
PARSERS = {"--fail_if": Rule.parse, "--objective": Objective.parse}
RULES = st.lists(
    st.sampled_from(
        ["flagged/f1", "<", ">", ">=", "<=", " ", "recall", "fpr", "f1", "-0.01", "1e400", ".5", "٣", "\n", "."]
    )
    | st.text(max_size=3),
    max_size=5,
).map("".join)


def check_rule(draw: tuple[str, str]) -> None:
    """Any text is a rule or an objective that says itself, or a fault."""
    name, text = draw
    parse = PARSERS[name]
    try:
        found = parse(text)
    except ConfigError as error:
        check_told(error)
        return
    if isinstance(found, Rule):
        assert Rule.parse(str(found)) == found and math.isfinite(found.bound)
    else:
        assert 0 <= found.bound <= 1


def check_shard(text: str) -> None:
    """Any text is a shard of so many, or a fault."""
    config = prediction_config.PredictConfig(model_path="m", input=("x",), output_dir="o", shard=text)
    if not config.find_faults():
        number, every = config.share
        assert 0 <= number < every and re.fullmatch(r"[0-9]+/[0-9]+", text)


_KNOWN_CONFIGS = (
    (ServeConfig, "{}\n", ["-host"]),
    (ServeConfig, f"model_path: {'a' * 300}\n", []),
    (config_module.TrainConfig, f"learning_rate: {'9' * 400}\n", []),
    (config_module.BackboneConfig, f"vocab_size: 0x{'f' * 5000}0\n", ["--train_data_name_or_path=x", "--output_dir=x"]),
    (config_module.ReportConfig, '"a\\nb": 1\n', []),
)
_KNOWN_YAML = ("!!map [1]", "!!timestamp soon", "!!bool maybe", "!!int ''", "categories: [{a: 1}]", '"a\\x01": 1')
PROPERTIES = {
    "configuration": Property(drawn_configs(), check_config, _KNOWN_CONFIGS, weight=2),
    "YAML": Property(YAML_TEXTS, check_yaml, _KNOWN_YAML),
    "taxonomy": Property(TAXONOMIES | VALUES, check_taxonomy, ({"categories": ["\ud800"]}, {"categories": [["a"]]})),
    "rules and objectives": Property(
        st.tuples(st.sampled_from([*PARSERS]), RULES), check_rule, (("--fail_if", "f1 < 1e400"),), weight=0.5
    ),
    "shard": Property(
        st.text("0123456789/ ٣\n", max_size=6) | st.from_regex(r"\d{1,7}/\d{1,7}"),
        check_shard,
        ("1/1\u1a80",),
        weight=0.5,
    ),
}
