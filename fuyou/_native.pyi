"""fuyou's native extension, built from csrc/. Addresses are integers; nothing here keeps Python objects alive."""

from collections.abc import Sequence

class IoError(OSError):
    """An operation or the set-up failed: `errno`, and a text with file, offset, expected and got bytes."""

class IoStateError(RuntimeError):
    """A closed engine, an unknown file or operation, or a forked child."""

class IoOperation:
    """One read, write or flush under way. It may outlive its engine."""

    @property
    def id(self) -> int: ...
    def done(self) -> bool: ...
    def wait(self, timeout_s: float = 300.0) -> bool:
        """False when it has not ended in time; raises IoError where it failed."""
    def times(self) -> tuple[float, float]:
        """Of one that is done: when its first piece went to the backend and its last one came back, on perf_counter's clock."""

class IoEngine:
    """Asynchronous reads and writes, those of overlapping ranges in the order of submission.

    Operations are cut into pieces of `piece_bytes`, of which `queue_depth` are under way at a time (with the backend
    "threads": on one thread each). While reads and writes both wait, each kind has `burst_bytes` in turn.
    """

    def __init__(self, backend: str, queue_depth: int, piece_bytes: int, burst_bytes: int) -> None: ...
    def add_file(self, fd: int, path: str, alignment_bytes: int = 1) -> int: ...
    def remove_file(self, file: int, timeout_s: float = 300.0) -> bool: ...
    def register_buffer(self, address: int, nbytes: int) -> bool: ...
    def unregister_buffer(self, address: int) -> None: ...
    def read(self, file: int, offset: int, address: int, nbytes: int) -> IoOperation: ...
    def write(self, file: int, offset: int, address: int, nbytes: int) -> IoOperation: ...
    def fsync(self, file: int) -> IoOperation: ...
    def take_finished(self) -> list[int]: ...
    def in_flight(self) -> list[str]: ...
    def note(self) -> str: ...
    def close(self, timeout_s: float = 300.0) -> bool: ...

def adam_fp32(
    param: int, exp_avg: int, exp_avg_sq: int, grad: int, count: int, tail: int,
    scales: Sequence[float], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    step: int, threads: int = 1, cpus: Sequence[int] = (), path: str = "auto",
) -> bool: ...  # fmt: skip
def adam_copy(
    param: int, copy: int, exp_avg: int, exp_avg_sq: int, grad: int, count: int, tail: int,
    scales: Sequence[float], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    step: int, threads: int = 1, cpus: Sequence[int] = (), path: str = "auto",
) -> bool: ...  # fmt: skip
def adam_split(
    hi: int, lo: int, exp_avg: int, exp_avg_sq: int, grad: int, count: int, tail: int,
    scales: Sequence[float], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    step: int, threads: int = 1, cpus: Sequence[int] = (), path: str = "auto",
) -> bool: ...  # fmt: skip
def split_master(
    master: int, hi: int, lo: int, exp_avg_sq: int, count: int, threads: int = 1, cpus: Sequence[int] = (),
    path: str = "auto",
) -> None: ...  # fmt: skip
def merge_master(
    hi: int, lo: int, exp_avg_sq: int, master: int, count: int, threads: int = 1, cpus: Sequence[int] = (),
    path: str = "auto",
) -> None: ...  # fmt: skip
def adam_paths() -> list[str]: ...
def crc32c(address: int, nbytes: int, value: int = 0, path: str = "auto") -> int: ...
def crc32c_paths() -> list[str]: ...
