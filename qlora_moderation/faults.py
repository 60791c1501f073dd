"""How a job that failed says so: one line for what a user can mend, once, whatever the number of processes.

In: an exception. Out: lines on standard error, and the exit code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import time
import traceback

from qlora_moderation.errors import Interrupted, ModerationError, SaidByMainError, brief
from qlora_moderation.interruption import Terminated

_LONGEST_LINE = 2000
_REFUSALS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EROFS)


def report(error: ModerationError) -> int:
    """Print what can be mended and return 2."""
    if not isinstance(error, SaidByMainError):
        print("\n".join(f"{_speaker()}error: {_shorten(line)}" for line in str(error).split("\n")), file=sys.stderr)
    return 2


def _shorten(line: str) -> str:
    """Return a line short enough for a terminal, whatever names and values from outside it holds."""
    if len(line) > _LONGEST_LINE:
        return f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    return line


def report_early(error: ModerationError) -> int:
    """Report what every process meets before they know each other: once on each machine, which has files of its own."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return report(error)
    time.sleep(3)  # torchrun ends all processes with the first: leave it time to speak
    return 2


def report_once(error: ModerationError) -> int:
    """Report what several ranks may have met: once, by rank 0 where it is among them.

    torchrun ends all processes with the first, so the ranks that have nothing to say wait for the one that has.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return report(error)
    from qlora_moderation.distributed import speaks_first

    time.sleep(3 if isinstance(error, SaidByMainError) else 1 if _speaker() else 0)
    return report(error) if speaks_first(str(error)) else 2


def report_stop(stop: Interrupted) -> int:
    """Say why a run stopped on request, once."""
    if not _speaker():
        print(stop, file=sys.stderr)
    return stop.exit_code


def report_interrupt(stop: KeyboardInterrupt, advice: str) -> int:
    """Answer to Ctrl-C, or to SIGTERM, once."""
    terminated = isinstance(stop, Terminated)
    if not _speaker():
        print(f"{'stopped by SIGTERM' if terminated else 'interrupted'}{advice}", file=sys.stderr)
    return 143 if terminated else 130


def describe_missing(error: ModuleNotFoundError) -> ModerationError | None:
    """Return what to say where a package is not installed, or None where a part of this one is missing."""
    package = str(error.name).partition(".")[0]
    if package in ("None", "qlora_moderation"):
        return None
    return ModerationError(
        f"{package} is not installed in {sys.prefix}; install it, or take the environment of ./scripts/quickstart.sh: "
        "source .venv/bin/activate"
    )


def is_unread() -> bool:
    """Say whether nobody reads standard output any more, as behind `| head`; a connection may break, too."""
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no output, or none of the system's
        watch = select.poll()  # what was not buffered is gone with the error, and nothing is left to be flushed
        watch.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))
    return False


def report_unread(goes_on: str) -> int:
    """Say why a job stopped whose output is not read."""
    with contextlib.suppress(OSError, ValueError):
        print(f"stopped: nobody reads the output any more{goes_on}", file=sys.stderr)
    sys.stdout = None  # nothing is left to be flushed at the end
    return 128 + signal.SIGPIPE


def describe_refusal(error: OSError) -> ModerationError | None:
    """Return what to say of a path that the system does not take, or None where it is another error."""
    if error.errno not in _REFUSALS or error.filename is None:
        return None
    return ModerationError(f"{error.filename}: cannot be used ({error.strerror}); give another path")


def report_fault(error: Exception, job: str) -> int:
    """Report what no message was written for: the first rank to fail with its traceback, the others in a line.

    What a rank meets when another one has gone is often its consequence, whatever its type. Memory that is used up, or a path
    that the system refuses, is no fault of this library, and is said in a line.

    Raises:
        Exception: the given one, in a run of one process.
    """
    from qlora_moderation.distributed import first_to_fail, is_lost_contact
    from qlora_moderation.memory import is_shortage

    if is_shortage(error):
        return report_once(
            ModerationError(
                f"{job}: ran out of memory ({brief(error)}); use a machine or a device that has more of it free"
            )
        )
    if isinstance(error, OSError) and (refusal := describe_refusal(error)):
        return report_once(refusal)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of pathlib, before Python 3.13
        return report_once(ModerationError(f"{brief(error)}: these links lead to each other; give another path"))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise error
    lines = traceback.format_exception(error)
    own = int(os.environ.get("RANK", "0"))
    if is_lost_contact(error):
        lines = [
            f"lost contact with another rank, whose error, if it had one, stands in the same log ({lines[-1].strip()})"
        ]
    elif (first := first_to_fail()) != own:
        other = "another rank" if first is None else f"rank {first}"
        lines = [f"lost contact with {other}, whose error stands in the same log ({lines[-1].strip()})"]
    print("".join(f"{_speaker() or '[rank 0] '}{line}\n" for line in "".join(lines).splitlines()), file=sys.stderr)
    return 1


def _speaker() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "
