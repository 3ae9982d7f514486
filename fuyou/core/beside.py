"""Small JSON files beside a store: what a run found out and the next one may use. Anybody may have written them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from typing import Any

MOST_BYTES = 1 << 20  # that are read of one


def read_beside(folder: str, name: str) -> Any:
    """What `name` in `folder` holds, unchecked; None where it cannot be read or is no JSON."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(read_text(os.path.join(folder, name)))
    return None


def read_text(path: str) -> str:
    """The beginning, in UTF-8, of a file that may be none: a pipe is not waited for, a link not followed. OSError, ValueError."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, f"{path} is not a file")
        return file.read(MOST_BYTES).decode("utf-8")


def write_beside(folder: str, name: str, content: Any) -> None:
    """Whole or not at all, whoever else writes it. A folder that takes no file is no error: what it would hold is found out
    again."""
    with contextlib.suppress(OSError):
        descriptor, draft = tempfile.mkstemp(dir=folder, prefix=name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(draft, os.path.join(folder, name))
        except BaseException:
            os.unlink(draft)
            raise
