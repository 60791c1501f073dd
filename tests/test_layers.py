"""Who may import whom: one ordered list, no cycles, arguments read in one place, torch only where it computes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "qlora_moderation"

# A module imports only from those above it. A new module goes below everything that it imports, and as high as that allows.
LAYERS = """
    errors refusals environment
    strict_yaml options config audit_config prediction_config taxonomy metadata calibration thresholds results candidates
    sources rows annotation data audit
    verdicts pair_columns blocks text_tables json_tables csv_tables columnar_tables tables
    token_ids windows tokenization stock_tokenizer leakage token_cache
    batching prefix layout
    distributed interruption progress staging
    tensor_files nf4
    memory attention last_layer products fused_layers backbone adapter model loss
    blueprint recomputation activations estimate capacity shortage
    sharding export classifier cards scoring assembly
    optim prior checkpoint
    intervals metrics baselines tuning
    plots card
    tracking run_directory start plan best loop train
    sample embedded
    merged_weights streaming whole_merge proof merge
    moderators predictions analysis comparison rendering sections report
    evaluate tune moderation classify_api data_audit
    workload row_check state_files parts proportions summary combine block_scoring local_engine ray_engine predict
    quickstart
    serving serving.config serving.faults serving.conversation serving.requests serving.keys serving.bodies
    serving.instruments serving.rule serving.engine serving.planning serving.queue serving.batcher serving.answers serving.page
    serving.schema serving.service serving.app serving.server
    inputs faults completion cli
"""
ORDER = LAYERS.split()
READS_ARGUMENTS = {
    "cli",
    "options",
    "completion",
}  # options builds the parser that cli fills, completion one that nobody fills
SERVING = [module for module in ORDER if module.startswith("serving") and module != "serving.engine"]
WITHOUT_TORCH = [*ORDER[: ORDER.index("tables") + 1], "batching", *SERVING]
WITHOUT_TORCH += ["combine", "predict", "inputs", "faults", "completion", "cli"]
SOURCES = {
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}


def find_imports(source: str, known: set[str]) -> set[str]:
    """Return the modules of this package that a source imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] or "__init__" for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            module = f"{PACKAGE}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            if is_ours(module) and module != PACKAGE:
                found.add(module.partition(".")[2])
            elif is_ours(module):
                found |= {alias.name if alias.name in known else "__init__" for alias in node.names}
    return found


def is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def reads_arguments(source: str) -> bool:
    """Say whether a source imports argparse or getopt, or touches sys.argv."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"argparse", "getopt"}:
            return True
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.module in ("argparse", "getopt") or (node.module == "sys" and "argv" in names):
                return True
        if isinstance(node, ast.Attribute) and node.attr in ("argv", "orig_argv"):
            return True
    return False


def test_the_list_names_every_module_once():
    assert sorted(ORDER) == sorted(set(SOURCES) - {"__init__"}), "add a new module to ORDER, below what it imports"


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module):
    above = set(ORDER[: ORDER.index(module)])
    below = find_imports(SOURCES[module], set(ORDER)) - above
    assert not below, f"{module} imports {', '.join(sorted(below))}, which stand below it or nowhere in ORDER"


def test_the_package_itself_imports_only_errors_before_it_is_asked_for_more():
    top = ast.Module([node for node in ast.parse(SOURCES["__init__"]).body if isinstance(node, ast.ImportFrom)], [])
    assert find_imports(ast.unparse(top), set(ORDER)) == {"errors"}


@pytest.mark.parametrize("module", SOURCES)
def test_arguments_are_read_in_one_place(module):
    assert reads_arguments(SOURCES[module]) == (module in READS_ARGUMENTS)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"import {PACKAGE}.train", {"train"}),
        (f"import {PACKAGE}.train as t, {PACKAGE}.cli", {"train", "cli"}),
        (f"import {PACKAGE}", {"__init__"}),
        (f"from {PACKAGE} import train as t, __version__", {"train", "__init__"}),
        (f"from {PACKAGE}.train import train", {"train"}),
        ("from . import train", {"train"}),
        ("from .train import train", {"train"}),
        (f"def f():\n    if x:\n        from {PACKAGE}.train import train", {"train"}),
        (f"import {PACKAGE}_other, os\nfrom transformers import train", set()),
    ],
)
def test_imports_are_found_however_they_are_written(line, found):
    assert find_imports(line, set(ORDER)) == found


@pytest.mark.parametrize(
    ("line", "reads"),
    [
        ("import sys\nprint(sys.argv)", True),
        ("import sys as s\ns.argv[1:]", True),
        ("from sys import argv", True),
        ("import argparse", True),
        ("def f():\n    from argparse import ArgumentParser", True),
        ("import sys\nsys.stderr.write(argv)", False),
    ],
)
def test_reading_of_arguments_is_found_however_it_is_written(line, reads):
    assert reads_arguments(line) == reads


@pytest.mark.parametrize("modules", [[], WITHOUT_TORCH], ids=["package", "modules"])
def test_nothing_heavy_is_imported(modules):
    program = "\n".join(
        [
            f"import sys, {PACKAGE}",
            *(f"import {PACKAGE}.{module}" for module in modules),
            "heavy = {'torch', 'transformers', 'peft', 'datasets', 'bitsandbytes', 'matplotlib'} & set(sys.modules)",
            "sys.exit(f'imported {heavy}' if heavy else 0)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_asking_for_what_is_not_there_is_an_attribute_error():
    import qlora_moderation

    assert set(qlora_moderation.__all__) <= set(dir(qlora_moderation)) | {"QAModeration"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = qlora_moderation.nothing
