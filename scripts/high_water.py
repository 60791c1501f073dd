"""The most memory that this process has held so far. Imported by the benchmarks."""

import re
import resource
import sys
from pathlib import Path


def peak_rss():
    """Return the high-water mark of this process in bytes.

    Linux has it in /proc; what getrusage says there also holds that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
