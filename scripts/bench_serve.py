#!/usr/bin/env python
"""The server under load: how long a request takes, how many it answers, and what it does with more than it can.

    python scripts/bench_serve.py [--rows FILE] [--seconds 20] [--phases lone saturation steady overload many]

A server process on loopback with a random LLaMA of 29 M weights; the load comes from this process over plain sockets, on a
core of its own, which the server may not use (`--shared_cores`: all cores for both, where clients slow the model). `lone`:
one request after the other. `saturation`: 64 in flight, with dynamic batches and with one text a forward. `steady`: random
and even arrivals at 70 % of saturation. `overload`: at three times saturation. `many`: 10,000 short requests with 50 in flight.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from load import Load, build_requests

PHASES = ("lone", "saturation", "steady", "overload", "many")
IN_FLIGHT = 64


def build_model(place, arguments):
    """Write the model and return its path and the texts; in a process of its own, which leaves this one small."""
    code = "\n".join(
        [
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'scripts')!r}]",
            "import json",
            "from bench_predict import build_model",
            "from rivals import build_small_llama, load_rows",
            f"rows = load_rows({arguments.rows!r}, 512)",
            f"built = build_small_llama({str(place / 'backbone')!r}, rows, {arguments.layers}, {arguments.width})",
            f"print(json.dumps([build_model({str(place / 'model')!r}, built, 512), rows[:512]]))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    path, rows = json.loads(done.stdout.splitlines()[-1])
    return path, [(row["prompt"], row["response"]) for row in rows]


def part_cores(shared):
    """Return the server's cores and those of the load: the last one alone, where there are several."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores, cores) if shared or len(cores) == 1 else (cores[:-1], cores[-1:])


@contextlib.contextmanager
def serving(path, cores, *flags):
    """Start a server on these cores and yield its port."""
    command = [sys.executable, "-c", "import sys; from qlora_moderation.cli import main; sys.exit(main())", "serve"]
    command += ["--model_path", path, "--port", "0", "--max_length", "512", "--log_requests", "False", *flags]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the server inherits it, and its threads are counted by it
    try:
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, own)
    try:
        port = 0
        for line in process.stdout:
            port = int(found[1]) if (found := re.search(r"http://127.0.0.1:(\d+)", line)) else port
            if "loaded in" in line:
                print(line.strip().partition("INFO ")[2], flush=True)
            if line.rstrip().endswith(" ready"):
                break
        yield port
        process.terminate()
        if process.wait(60) != 0:
            raise SystemExit("the server did not end well")
    finally:
        process.kill()


def measure(port, play):
    """Run `play(load)` and return what it found."""

    async def run():
        load = Load(port)
        try:
            return await play(load)
        finally:
            load.close()

    return asyncio.run(run())


def read_metric(port, name):
    """Return one figure of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return float(re.search(rf"^{name} (\S+)$", answer.read().decode(), flags=re.MULTILINE)[1])


class OtherWork:
    """How many cores were at work for others: neither for the server nor for this process."""

    def __init__(self, port):
        self._port = port
        self._start = self._look()

    def _look(self):
        # user, nice, system, then behind idle and waiting: interrupts and what a hypervisor took
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = read_metric(self._port, "process_cpu_seconds_total") + time.process_time()
        return busy - own, time.perf_counter()

    def cores(self):
        """Return the average since the start."""
        busy, now = self._look()
        return max(0.0, busy - self._start[0]) / (now - self._start[1])


def split(outcomes):
    """Return milliseconds of the answered ones, those of the refused ones, and the number of all others."""
    good = np.array([1000 * each.seconds for each in outcomes if each.status == 200])
    refused = np.array([1000 * each.seconds for each in outcomes if each.status == 429 and each.retry_after])
    failed = len(outcomes) - len(good) - len(refused)
    if failed:
        print(f"  failed with {sorted({each.status for each in outcomes} - {200, 429})} (0: no answer)")
    return good, refused, failed


def find_saturation(port, requests, seconds, name):
    """Return verdicts a second with so many in flight that the model never waits."""
    started, others = time.perf_counter(), OtherWork(port)
    outcomes = measure(port, lambda load: load.keep_in_flight(requests, IN_FLIGHT, None, seconds))
    rate = count_goodput(outcomes, started, seconds)
    print(f"{name}: {rate:.1f} verdicts/s; others {others.cores():.2f} cores", flush=True)
    return rate


def count_goodput(outcomes, started, seconds):
    """Return verdicts a second between a fifth of the time and its end."""
    begun, ended = started + seconds / 5, started + seconds
    return sum(each.status == 200 and begun < each.due + each.seconds < ended for each in outcomes) / (ended - begun)


def simulate_queue(times, load, even, count=200_000):
    """Return the 99th percentile, in milliseconds, of a queue that serves one request after the other in these times.

    What no server of one model can change: at 70 % of what is possible, requests wait for each other.
    """
    rng = np.random.default_rng(0)
    served = rng.choice(times, count)
    between = np.full(count, times.mean() / load) if even else rng.exponential(times.mean() / load, count)
    steps = np.concatenate([[0.0], np.cumsum(served[:-1] - between[1:])])
    waited = steps - np.minimum.accumulate(steps)  # Lindley's recursion
    return float(np.percentile(waited + served, 99))


def show_times(name, good):
    """Print percentiles in milliseconds."""
    p50, p90, p99 = np.percentile(good, [50, 90, 99])
    spread = f"p50 {p50:.1f} ms, p90 {p90:.1f}, p99 {p99:.1f}, longest {good.max():.1f}"
    print(f"{name}: {len(good)} answers; {spread}", flush=True)
    return {"p50": p50, "p90": p90, "p99": p99, "longest": good.max()}


def run_steady(port, requests, seconds, rounds):
    """Send 70 % of what the server can do, at random instants and evenly, right behind lone requests and saturation.

    A shared machine may change its speed within a minute, so each round measures all of these anew; medians of ratios count.
    """
    found = {"random": [], "even": []}
    for _ in range(rounds):
        outcomes = measure(port, lambda load: load.keep_in_flight(requests, 1, len(requests), seconds / 2))
        lone = split(outcomes)[0]
        p50, p99 = np.percentile(lone, [50, 99])
        rate = find_saturation(port, requests, seconds / 2, f"lone p50 {p50:.1f} ms, p99 {p99:.1f}; saturation")
        for name, rows in found.items():
            even, others = name == "even", OtherWork(port)
            outcomes = measure(
                port, lambda load, rate=rate, even=even: load.arrive(requests, 0.7 * rate, seconds, even)
            )
            good, refused, failed = split(outcomes)
            cores = others.cores()
            shown = show_times(f"70 % of saturation, {name} arrivals; others {cores:.2f} cores", good)
            queued = simulate_queue(lone, 0.7, even)
            rows.append([shown["p99"], shown["p99"] / p50, shown["p99"] / p99, queued / p50, queued / p99])
            if len(refused) + failed:
                print(f"  refused {len(refused)}, failed {failed}")
    figures = {}
    for name, rows in found.items():
        shown, to_p50, to_p99, queued, queued_p99 = (float(value) for value in np.median(rows, axis=0))
        figures[name] = {"p99": shown, "of_lone_p50": to_p50, "of_lone_p99": to_p99}
        print(f"{name}, medians: p99 {shown:.1f} ms is {to_p50:.2f} x p50 and {to_p99:.2f} x p99 of lone requests")
        print(f"  a queue that serves them in turn, at 70 %: {queued:.2f} x p50, {queued_p99:.2f} x p99", flush=True)
    return figures


def run_overload(port, requests, seconds):
    """Send three times what the server can do, between two measurements of that."""
    before = find_saturation(port, requests, seconds / 2, "saturation before")
    started, others = time.perf_counter(), OtherWork(port)
    outcomes = measure(port, lambda load: load.arrive(requests, 3 * before, seconds))
    cores = others.cores()
    good, refused, failed = split(outcomes)
    goodput = count_goodput(outcomes, started, seconds)
    rate = (before + find_saturation(port, requests, seconds / 2, "saturation behind")) / 2
    share = f"{goodput / rate:.0%} of saturation"
    print(f"3 x saturation: {len(outcomes)} requests, {goodput:.1f} verdicts/s, {share}; others {cores:.2f} cores")
    figures = {"goodput": goodput, "share": goodput / rate, "failed": failed, "refused": show_times("  429", refused)}
    print(f"  429 after more than 50 ms: {(refused > 50).sum()} of {len(refused)}; failed {failed}", flush=True)
    return {**figures, "answered": show_times("  answered", good)}


def run_many(port, count):
    """Send very many short requests, 50 in flight, and look at the server's memory before, half way, and after."""
    short = build_requests([(f"What of {i}?", "Fine.") for i in range(200)])
    measure(port, lambda load: load.keep_in_flight(short, 50, 500, 600))
    resident, outcomes = [read_metric(port, "process_resident_memory_bytes") / 2**20], []
    started = time.perf_counter()
    for _ in range(2):
        outcomes += measure(port, lambda load: load.keep_in_flight(short, 50, count // 2, 600))
        resident.append(read_metric(port, "process_resident_memory_bytes") / 2**20)
    spent = time.perf_counter() - started
    good, refused, failed = split(outcomes)
    figures = show_times("50 in flight", good)
    before, half, after = resident
    print(f"  {len(outcomes)} short requests in {spent:.0f} s, {len(refused)} refused, {failed} failed")
    print(f"  resident: {before:.1f} MiB before, {half:.1f} half way, {after:.1f} after")
    return {**figures, "seconds": spent, "failed": failed, "resident_mib": resident}


def main():
    """Run the phases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="JSONL in BeaverTails' layout; default: made-up rows of the same lengths")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase and round")
    parser.add_argument("--rounds", type=int, default=3, help="of the steady phase")
    parser.add_argument("--count", type=int, default=10_000, help="requests of the last phase")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--shared_cores", action="store_true", help="let server and load share all cores")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("flags", nargs="*", help="after --: flags for the server")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a server left running would outlive this process
    seconds, figures = arguments.seconds, {}
    with tempfile.TemporaryDirectory() as place:
        path, pairs = build_model(Path(place), arguments)
        requests = build_requests(pairs)
        cores, own = part_cores(arguments.shared_cores)
        print(f"server on cores {cores}, load on {own}", flush=True)
        os.sched_setaffinity(0, own)
        if "saturation" in arguments.phases:
            with serving(path, cores, "--max_windows_per_micro_batch", "1", *arguments.flags) as port:
                figures["one_by_one"] = find_saturation(port, requests, seconds, "saturation, one text a forward")
        with serving(path, cores, *arguments.flags) as port:
            measure(port, lambda load: load.keep_in_flight(requests, 8, 32, 60))
            if "lone" in arguments.phases:
                outcomes = measure(port, lambda load: load.keep_in_flight(requests, 1, len(requests), seconds))
                figures["lone"] = show_times("lone", split(outcomes)[0])
            if "saturation" in arguments.phases:
                figures["saturation"] = rate = find_saturation(port, requests, seconds, "saturation")
                if "one_by_one" in figures:
                    print(f"  {rate / figures['one_by_one']:.2f} times one text a forward", flush=True)
            if "steady" in arguments.phases:
                figures["steady"] = run_steady(port, requests, seconds, arguments.rounds)
            if "overload" in arguments.phases:
                figures["overload"] = run_overload(port, requests, seconds)
            if "many" in arguments.phases:
                figures["many"] = run_many(port, arguments.count)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
