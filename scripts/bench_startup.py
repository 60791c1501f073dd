#!/usr/bin/env python
"""How long it takes until a command answers: imports, --help of every job, faults in a configuration.

    python scripts/bench_startup.py [--repeats 7]

Every command runs in a fresh interpreter, in turns with `python -c pass`; medians, and their ratio to it. Then what the import
of the package and the slowest --help spend their time on, by -X importtime.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from flags import whole

from qlora_moderation.cli import _JOBS

CALL = "import sys; from qlora_moderation.cli import main; sys.exit(main(sys.argv[1:]))"
LOADED = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "


def build_commands(folder):
    """Return name -> (program, arguments, exit code)."""
    broken = folder / "broken.yaml"
    broken.write_text("lora_r: [", encoding="utf-8")
    needed = ["--model_name_or_path", "m", "--output_dir", str(folder / "run"), "--train_data_name_or_path"]
    faults = {
        "unknown job": ["trian"],
        "unknown flag": ["train", "--lerning_rate", "1"],
        "broken YAML": ["train", "--config", str(broken)],
        "missing file of rows": ["train", *needed, "nowhere.jsonl"],
        "unknown metric": ["train", *needed, "a/b:train", "--metric_for_best_model", "f1"],
    }
    return {
        "import qlora_moderation": ("import qlora_moderation", [], 0),
        **{f"{job} --help": (CALL, [job, "--help"], 0) for job in _JOBS},
        "--version": (CALL, ["--version"], 0),
        "completion bash": (CALL, ["completion", "bash"], 0),
        **{name: (CALL, arguments, 2) for name, arguments in faults.items()},
    }


def run(program, *arguments, flags=()):
    command = [sys.executable, *flags, "-c", program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def measure(program, arguments, code):
    """Return the seconds of one run, which must end with the exit code expected."""
    started = time.perf_counter()
    done = run(program, *arguments)
    seconds = time.perf_counter() - started
    if done.returncode != code:
        sys.exit(f"error: {arguments} ended with {done.returncode}: {done.stderr}")
    return seconds


def print_imports(program, arguments, rows=6):
    """Print the imports that take longest by themselves."""
    lines = [line[12:].split("|") for line in run(program, *arguments, flags=["-X", "importtime"]).stderr.splitlines()]
    own = [(int(parts[0]), parts[2].strip()) for parts in lines if len(parts) == 3 and parts[0].strip().isdigit()]
    print(f"all imports {sum(microseconds for microseconds, _ in own) / 1000:.0f} ms:", end=" ")
    print(", ".join(f"{name} {microseconds / 1000:.1f}" for microseconds, name in sorted(own, reverse=True)[:rows]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=whole(), default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        commands = build_commands(Path(name))
        seconds = {command: [] for command in ["python -c pass", *commands]}
        for _ in range(given.repeats):
            seconds["python -c pass"].append(measure("pass", [], 0))
            for command, what in commands.items():
                seconds[command].append(measure(*what))
        print("| command | median, ms | times python -c pass | imports torch |\n|---|---|---|---|")
        least = statistics.median(seconds["python -c pass"])
        for command, found in seconds.items():
            median = statistics.median(found)
            program, arguments, _ = commands.get(command, ("pass", [], 0))
            torch = run(LOADED + program, *arguments).stdout.rstrip().endswith("True")
            print(
                f"| {command} | {1000 * median:.0f} | {median / least:.1f} | {'yes' if torch else 'no'} |", flush=True
            )
        print("\nimport qlora_moderation:", end=" ")
        print_imports("import qlora_moderation", [])
        slowest = max(_JOBS, key=lambda job: statistics.median(seconds[f"{job} --help"]))
        print(f"{slowest} --help:", end=" ")
        print_imports(CALL, [slowest, "--help"])


if __name__ == "__main__":
    main()
