"""The tiers by property: no byte lost, no byte twice, nothing left behind."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from control_groups import control_group
from torch import nn

import fuyou
from fuyou.core.errors import BudgetError, StateError, StorageIOError
from fuyou.core.layout import ALIGN_ELEMENTS, Layout
from fuyou.core.ledger import Ledger
from fuyou.core.sizes import format_bytes, parse_bytes
from fuyou.tiers.folders import check_folders
from fuyou.tiers.host import PAGE_BYTES, Arena
from fuyou.tiers.io import open_engine
from fuyou.tiers.store import Store
from fuyou.tiers.worker import Worker

MIB = 2**20


def ledger(device=MIB, host=64 * MIB, nvme=64 * MIB):
    return Ledger({"device": device, "host": host, "nvme": nvme})


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "count"),
        [("48GiB", 48 * 2**30), ("1.5 TB", 15 * 10**11), ("4096", 4096), (7, 7), ("1kb", 1000), ("0.5KiB", 512)],
    )
    def test_parse(self, text, count):
        assert parse_bytes(text, "ram") == count

    def test_format_keeps_the_order_of_magnitude(self):
        for power in range(1, 50):
            value, unit = format_bytes(2**power).split()
            factor = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[unit]
            assert float(value) * 2**factor == 2**power


class TestLedger:
    def test_random_walk_never_passes_the_budget(self):
        book, held, rng = ledger(device=1000), [], random.Random(0)
        for _ in range(2000):
            if held and rng.random() < 0.5:
                book.discharge("device", *held.pop(rng.randrange(len(held))))
            else:
                charge = (rng.choice(["weights", "gradients", "activations"]), rng.randrange(400))
                total = sum(nbytes for _, nbytes in held)
                assert book.try_charge("device", *charge) == (total + charge[1] <= 1000)
                if total + charge[1] <= 1000:
                    held.append(charge)
            assert book.held("device") == sum(nbytes for _, nbytes in held)
        assert book.summary()["device"]["peak_bytes"] <= 1000

    def test_refusal_has_the_numbers(self):
        book = ledger(device=1000)
        book.charge("device", "weights", 900)
        with pytest.raises(BudgetError) as refusal:
            book.charge("device", "gradients", 300, "layer 3")
        assert (refusal.value.tier, refusal.value.shortfall_bytes) == ("device", 200)
        assert "layer 3" in str(refusal.value) and "1200 bytes" in str(refusal.value)
        assert book.held("device") == 900

    def test_allowance_is_kept_free_of_weights(self):
        book = Ledger({"device": 1000, "host": 0, "nvme": 0}, allowance={"device": 300})
        assert not book.try_charge("device", "weights", 701)
        assert book.try_charge("device", "weights", 700)
        assert book.try_charge("device", "activations", 300)
        assert not book.try_charge("device", "activations", 1)

    def test_released_twice(self):
        with pytest.raises(StateError, match="twice"):
            ledger().discharge("host", "staging", 1)


def test_layout_aligns_every_tensor_and_copies_nothing():
    shapes = [(3, 5), (1237,), (), (128,), (2, 2, 2)]
    layout = Layout(torch.float32, [(str(index), torch.Size(shape)) for index, shape in enumerate(shapes)])
    flat = torch.arange(layout.count, dtype=torch.float32)
    for entry, view, shape in zip(layout.entries, layout.views(flat), shapes, strict=True):
        assert entry.start % ALIGN_ELEMENTS == 0
        assert tuple(view.shape) == shape
        assert view.data_ptr() == flat.data_ptr() + 4 * entry.start
    inside = [index for start in range(0, layout.count, 64) for index, first, last in layout.within(start, start + 64)]
    assert sorted(set(inside)) == list(range(len(shapes)))
    covered = sum(
        last - first for start in range(0, layout.count, 64) for _, first, last in layout.within(start, start + 64)
    )
    assert covered == sum(torch.Size(shape).numel() for shape in shapes)


class TestArena:
    def test_random_leases_never_overlap_and_all_come_back(self):
        book, rng, leases = ledger(), random.Random(1), []
        arena = Arena(4 * MIB, book)
        for _ in range(3000):
            if leases and rng.random() < 0.5:
                leases.pop(rng.randrange(len(leases))).release()
            elif (lease := arena.try_lease(rng.randrange(1, 300_000), "staging")) is not None:
                assert lease.address % PAGE_BYTES == 0
                leases.append(lease)
            spans = sorted((each.offset, each.offset + each.nbytes) for each in leases)
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
        for lease in leases:
            lease.release()
        assert arena.lease_count == 0 and book.held("host") == 0
        arena.lease(4 * MIB, "staging").release()  # the ranges have merged again
        arena.close()

    def test_exact_size_and_waiting(self):
        arena = Arena(3 * MIB, ledger())
        assert arena.nbytes == 3 * MIB
        first = arena.lease(3 * MIB, "staging")
        assert arena.try_lease(1, "staging") is None
        threading.Timer(0.05, first.release).start()
        arena.lease(2 * MIB, "staging").release()
        with pytest.raises(StateError, match="twice"):
            first.release()
        with pytest.raises(BudgetError) as refusal:
            arena.lease(4 * MIB, "staging")
        assert refusal.value.shortfall_bytes == MIB
        arena.close()

    def test_a_forked_child_does_not_inherit_it(self):
        arena = Arena(MIB, ledger())
        arena.bytes.fill_(7)
        child = os.fork()
        if child == 0:
            mapped = open("/proc/self/maps").read()
            os._exit(0 if f"{arena.address:x}-" not in mapped else 1)
        assert os.waitpid(child, 0)[1] == 0
        arena.close()


class TestStore:
    def make(self, folders, sizes, slots=2):
        book = ledger()
        store = Store(check_folders([str(each) for each in folders]), book)
        store.start(lambda folder: (open_engine("auto"), 0.0))
        extents = [store.place(size, "optimizer", slots) for size in sizes]
        store.open()
        arena = Arena(8 * MIB, book)
        return book, store, extents, arena

    def test_what_is_written_is_read_whatever_the_order(self, tmp_path):
        folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
        for folder in folders:
            folder.mkdir()
        sizes = [4096, 5000, 70_000, 300_000, 4095, 65_536] * 3
        book, store, extents, arena = self.make(folders, sizes)
        rng, expected, pending = random.Random(2), {}, []
        for turn in range(400):
            extent = rng.choice(extents)
            lease = arena.lease(extent.nbytes, "staging")
            if extent.written and rng.random() < 0.5:
                pending.append((extent.read(lease.address, lease), lease, expected[extent]))
            else:
                expected[extent] = turn % 251
                lease.data.fill_(turn % 251)
                pending.append((extent.write(lease.address, lease), lease, None))
            while len(pending) > 8:  # several in flight: order is the engine's and the slots' business
                ticket, old, value = pending.pop(0)
                ticket.wait()
                assert value is None or bool((old.data == value).all())
                old.release()
        for ticket, lease, value in pending:
            ticket.wait()
            assert value is None or bool((lease.data == value).all())
            lease.release()
        assert all((folder / "fuyou-store" / "data").stat().st_size > 0 for folder in folders)  # striped over all three
        assert (folders[0] / "fuyou-store").stat().st_mode & 0o777 == 0o700
        store.close(), arena.close()
        assert [os.listdir(folder) for folder in folders] == [[], [], []]
        assert all(book.held(tier) == 0 for tier in ("host", "nvme"))

    def test_an_update_keeps_the_slot_that_it_was_made_from(self, tmp_path):
        _, store, (extent,), arena = self.make([tmp_path], [8192])
        lease = arena.lease(8192, "staging")
        lease.data.fill_(1)
        extent.write(lease.address, lease).wait()
        lease.data.fill_(2)
        extent.write(lease.address, lease).wait()
        content = (tmp_path / "fuyou-store" / "data").read_bytes()
        assert content[:8192] == b"\x01" * 8192 and content[8192:16384] == b"\x02" * 8192
        lease.release(), store.close(), arena.close()

    def test_reads_carry_the_writers_error(self, tmp_path):
        _, store, (extent,), arena = self.make([tmp_path], [8192])
        lease = arena.lease(8192, "staging")
        with pytest.raises(StateError, match="before it was written"):
            extent.read(lease.address, lease)
        extent.write(lease.address, lease).wait()
        os.truncate(tmp_path / "fuyou-store" / "data", 0)
        with pytest.raises(StorageIOError, match="data"):
            extent.read(lease.address, lease).wait()
        lease.release(), store.close(), arena.close()
        with pytest.raises(StateError, match="closed"):
            extent.write(0, None)


def test_worker_runs_in_order_and_tells_each_its_own_error():
    worker, seen = Worker("test"), []

    def fail():
        raise ValueError("mine")

    jobs = [worker.submit(lambda index=index: seen.append(index), f"job {index}") for index in range(50)]
    bad = worker.submit(fail, "bad")
    after = worker.submit(lambda: seen.append(50), "after")
    for job in [*jobs, after]:
        job.wait()
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            bad.wait()
    assert seen == list(range(51))
    worker.close()
    assert not any(thread.name == "test" for thread in threading.enumerate())


class TestClose:
    def make(self, tmp_path, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        config = fuyou.Config(**options)
        run = fuyou.wrap(model, optimizer, nvme=tmp_path, ram="300KiB", gpu="256MiB", device="cpu", config=config)
        model(torch.ones(2, 64)).sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return model, optimizer, run

    def test_weights_that_do_not_fit_are_left_on_disk_and_every_use_says_where(self, tmp_path, monkeypatch):
        from safetensors.torch import load_file

        model, _, run = self.make(tmp_path)
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        monkeypatch.setattr("fuyou.runtime.handing_back.free_host_bytes", lambda: 1000)
        with pytest.warns(UserWarning, match="weights-at-close"):
            run.close()
        with pytest.raises(fuyou.StateError, match="weights-at-close"):
            model[0].weight.sum()
        with pytest.raises(fuyou.StateError, match="weights-at-close"):
            model(torch.ones(2, 64))
        written = load_file(tmp_path / "weights-at-close" / "model.safetensors")
        assert all(torch.equal(written[name], value) for name, value in expected.items())

    def test_a_step_that_failed_half_way_is_refused_afterwards_and_leaks_nothing(self, tmp_path, monkeypatch):
        model, _, run = self.make(
            tmp_path, update="deferred"
        )  # a guess may have been made before it can be interrupted
        model(torch.ones(2, 64)).sum().backward()
        applied = []

        def interrupt(*_):
            applied.append(1)
            if len(applied) == 2:
                raise MemoryError("made up")
            original(*_)

        original = run._updates._compute
        run.settle()
        monkeypatch.setattr(run._updates, "_compute", interrupt)
        with pytest.raises(MemoryError, match="made up"):
            run.optimizer.step()
            run.settle()
        for use in (
            run.optimizer.step,
            run.settle,
            lambda: run.save_pretrained(tmp_path / "out"),
            lambda: model(torch.ones(2, 64)),
        ):
            with pytest.raises(fuyou.StateError, match="half-way"):
                use()
        with pytest.warns(UserWarning, match="half-way"):
            run.close()
        assert run._tiers.lease_count == 0
        assert all(run._ledger.held(tier) == 0 for tier in ("device", "host", "nvme"))

    def test_a_broken_store_is_told_at_close_and_everything_is_still_given_back(self, tmp_path):
        model, _, run = self.make(tmp_path)
        threads = {thread.name for thread in threading.enumerate()}
        assert "fuyou-weights-in" in threads
        run.settle()  # or a write that is still under way would make the file longer again
        os.truncate(tmp_path / "fuyou-store" / "data", 0)
        with pytest.raises(fuyou.StorageIOError):
            run.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fuyou")]
        assert all(run._ledger.held(tier) == 0 for tier in ("device", "host", "nvme"))
        run.close()
        with pytest.raises(fuyou.StateError, match="could not give the weights back"):
            [parameter.sum() for parameter in model.parameters()]

    def test_gradients_that_were_brought_back_and_cleared_leave_no_charge(self, tmp_path):
        model, _, run = self.make(tmp_path)
        for _ in range(3):
            model(torch.ones(2, 64)).sum().backward()
            for parameter in model.parameters():
                parameter.grad[0].mul_(2)  # a view: the gradient is on the device from here on
            assert run._ledger.held("device", "gradients") > 0
            run.optimizer.zero_grad()  # no step
            assert run._ledger.held("device", "gradients") == 0
        run.close()
        assert run._ledger.held("device") == 0


def test_free_memory_is_what_the_own_control_group_has_left():
    """A group below the root one, as systemd and containers make them."""
    with control_group("memory", {"memory.max": str(1 << 30)}) as group:
        found = subprocess.run(
            [
                sys.executable, "-c",
                f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
                "from fuyou.runtime.measure import free_host_bytes; print(free_host_bytes())",
            ],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert 0 < int(found) <= 1 << 30


def test_free_memory_counts_caches_of_files_as_free(tmp_path):
    """The kernel takes them back before it kills; the import of a model leaves as much of them as the group has room for."""
    with control_group("memory", {"memory.max": str(1 << 30)}) as group:
        free = subprocess.run(
            [
                sys.executable, "-c",
                f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
                "from fuyou.runtime.measure import free_host_bytes\n"
                f"before = free_host_bytes(); path = {str(tmp_path / 'file')!r}\n"
                "file = open(path, 'wb'); file.write(bytes(400 << 20)); file.flush(); os.fsync(file.fileno())\n"
                "print(before - free_host_bytes())",
            ],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert int(free) < 100 << 20
