"""The kernels' smaller tests under compute-sanitizer: ``python -m benchmarks.gpu.sanitizer memcheck|racecheck OUT``.

memcheck finds reads and writes outside of tensors, racecheck unordered accesses to shared memory. Where the tool is not
installed, OUT says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

# Launches take up to a hundred times as long, so that tests over drawn shapes would not end.
SMALL = "not equal_the_reference and not candidate"


def command(tool: str, check: str) -> list[str]:
    """What runs the tests on a GPU: it fails if a test fails or the tool finds something."""
    tests = [sys.executable, "-m", "pytest", "-x", "-q", "tests/triton", "-k", SMALL]
    return [tool, "--tool", check, "--error-exitcode", "1", *tests]


def main(check: str, out: Path) -> int:
    """Run a check; the exit status."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        out.write_text(json.dumps({"skipped": "compute-sanitizer is not installed: it comes with the CUDA toolkit"}))
        return 0
    status = subprocess.call(command(tool, check))
    out.write_text(json.dumps({"check": check, "clean": status == 0}))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
