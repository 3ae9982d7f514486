"""The native code under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: the command that contributors run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fault_tools import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["asan", "tsan"])
def test_native_code_is_clean(which: str, nvme: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here, whose sanitizers scripts/sanitize.sh uses")
    for library in ("libasan.so", "libtsan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"g++ has no {library} here")
    result = subprocess.run(
        ["bash", "scripts/sanitize.sh", which, str(nvme / "work")],
        cwd=REPOSITORY, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.endswith(f"sanitize.sh: {which}: clean\n"), (
        result.stdout[-8000:] + result.stderr[-8000:]
    )
