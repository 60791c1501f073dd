#!/usr/bin/env python
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qlora_moderation.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("combine"))
