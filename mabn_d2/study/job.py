"""
The process of one run: `python job.py FOLDER`. It is a program of the standard library alone, of which
nothing but waiting is asked.

FOLDER/job.json says what is run: {"commands": [{"arguments": [...], "creates": ...}, ...], "folder": ...,
"environment": {...}}. A command whose file `creates` exists is not run again; "" is for one that always is. FOLDER/done.json is written at the end.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

TICK = 1.0  # seconds


def execute(folder: str | Path) -> None:
    """Runs the commands, and writes how it went and how many seconds it took, those of earlier calls included."""
    folder = Path(folder)
    job = json.loads((folder / "job.json").read_text())
    log, clock = folder / "output.txt", _Clock(folder)
    error = ""
    for command in job["commands"]:
        if command["creates"] and os.path.exists(command["creates"]):
            continue
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command["arguments"], cwd=job["folder"], env={**os.environ, **job["environment"]},
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            status = clock.wait(process)
        if status:
            error = _reason(log, status)
            break
    done = {
        "error": error,
        "seconds": round(clock.seconds, 1),
        "device": _device(),
        "torch": metadata.version("torch"),
        "date": str(datetime.date.today()),
    }
    (folder / "done.json.new").write_text(json.dumps(done))
    os.replace(folder / "done.json.new", folder / "done.json")


def seconds_of(folder: Path) -> float:
    """How long a run has run so far."""
    with contextlib.suppress(OSError, ValueError):
        return float((folder / "seconds").read_text())
    return 0.0


class _Clock:
    """Seconds in which a process ran. While this program is stopped, so are those that it has started."""

    def __init__(self, folder: Path):
        self._file = folder / "seconds"
        self.seconds = seconds_of(folder)

    def wait(self, process: subprocess.Popen) -> int:
        last = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK)
            now = time.monotonic()
            self.seconds += min(now - last, 2 * TICK)
            last = now
            self._file.write_text(f"{self.seconds:.1f}")
            if process.returncode is not None:
                return process.returncode


def _reason(log: Path, status: int) -> str:
    """What the log says last that looks like an error."""
    ending = f"ended by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    lines = log.read_text(errors="replace").splitlines()[-400:]
    for line in reversed(lines):
        if re.match(r"[\w.]*(Error|Exception|error)\b.*:|[\w.]+: error: ", line):
            return f"{line.strip()[:300]} ({ending})"
    return ending


def _device() -> str:
    """A GPU's name, or the processor's and the number of cores."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        if names[0]:
            return names[0]
    name = platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        pattern, text = r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()
        name = re.search(pattern, text)[1]  # type: ignore[index]
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    execute(sys.argv[1])
