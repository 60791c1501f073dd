"""The real server around a real model, with gates: `python tests/gated_server.py GATES serve …`, and a process of it.

While the directory GATES holds a file `loading`, the model is not opened; while it holds `scoring`, no forward ends; while it
holds `broken`, forwards give no numbers. So what a page shows meanwhile can be looked at for as long as it takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """A server process on a free port, and the gates in front of its model."""

    def __init__(self, model, gates, *flags, **environment):
        self.model, self.gates = model, gates
        gates.mkdir(exist_ok=True)
        command = [
            sys.executable,
            __file__,
            str(gates),
            "serve",
            "--model_path",
            str(model),
            "--port",
            "0",
            "--use_cpu",
            "True",
        ]
        ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        variables = {**os.environ, **ours, **environment}
        self.process = subprocess.Popen(
            [*command, *flags], env=variables, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(
            target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True
        )
        self._reader.start()
        self.address = re.search(r"http://\S+:\d+", self.wait_for("listening on"))[0]

    def wait_for(self, text):
        """Return the first line of the log that holds `text`."""
        deadline = time.monotonic() + 120
        while not (found := [line for line in list(self.lines) if text in line]):
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.01)
        return found[0]

    @contextlib.contextmanager
    def closed(self, gate):
        """Keep a gate closed while the block runs."""
        (self.gates / gate).touch()
        try:
            yield
        finally:
            (self.gates / gate).unlink(missing_ok=True)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        self.process.stdout.close()


def put_gates(directory: Path) -> None:
    """Put the gates between the server and its model."""
    import numpy as np

    from qlora_moderation.serving import engine

    load, score = engine.load_engine, engine.Engine.score

    def wait_while(gate):
        while (directory / gate).exists():
            time.sleep(0.01)

    def load_behind_gate(config):
        wait_while("loading")
        return load(config)

    def score_behind_gate(self, windows):
        wait_while("scoring")
        logits = score(self, windows)
        return np.full_like(logits, np.nan) if (directory / "broken").exists() else logits

    engine.load_engine, engine.Engine.score = load_behind_gate, score_behind_gate


if __name__ == "__main__":
    from qlora_moderation.cli import main

    put_gates(Path(sys.argv.pop(1)))
    sys.exit(main())
