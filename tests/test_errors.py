"""Every refusal names the thing, the numbers and the cure, and leaves the model as it was."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fuyou


def model_and_optimizer(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, "fused": True, **options})


def wrap(model, optimizer, **options):
    return fuyou.wrap(model, optimizer, **{"ram": "64MiB", "gpu": "256MiB", "device": "cpu", **options})


def refused(match, kind=fuyou.ConfigError, model=None, optimizer=None, **options):
    """`wrap` raises `kind` matching `match`, in one paragraph, and the model still computes what it did."""
    if model is None:
        model, made = model_and_optimizer()
        optimizer = optimizer or made
    forwards = [vars(module).get("forward") for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=match) as refusal:
        wrap(model, optimizer, **options)
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, fuyou.FuyouError)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    return refusal.value


class TestConfig:
    def test_unknown_option_names_the_nearest(self):
        with pytest.raises(fuyou.ConfigError, match="did you mean 'precision'"):
            fuyou.Config(precison="bf16")

    @pytest.mark.parametrize("option", ["precision", "activations", "update", "durability", "io", "verify_reads"])
    def test_impossible_value_names_the_choices(self, option):
        with pytest.raises(fuyou.ConfigError, match="is not one of"):
            fuyou.Config(**{option: "sideways"})

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
    def test_micro_batch_that_is_no_number_of_rows(self, value):
        with pytest.raises(fuyou.ConfigError, match="whole number of rows, at least 1"):
            fuyou.Config(micro_batch=value)

    def test_frozen(self):
        with pytest.raises(AttributeError, match="frozen"):
            fuyou.Config().io = "threads"

    def test_block_that_does_not_exist(self):
        refused("names '7'.*nearest name is '2'", config=fuyou.Config(blocks=["7"]))


class TestArguments:
    @pytest.mark.parametrize("value", ["lots", "12 parsecs", 0, -1, "0GiB", True, 1.5])
    def test_budget_that_is_no_size(self, value):
        refused("ram=", ram=value)

    def test_device_that_is_not_there(self):
        refused("device=", device="cuda:93")
        refused("device=", device="abacus")
        refused("device=", device="meta")

    def test_no_folder(self):
        refused("nvme=", nvme=[])

    def test_fp16_and_fp64_parameters_are_named(self):
        for dtype in (torch.float16, torch.float64):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(dtype))
            refused(r"1\.weight is float", model=model, optimizer=torch.optim.AdamW(model.parameters()))

    def test_meta_parameters(self):
        with torch.device("meta"):
            model = nn.Linear(4, 4)
        with pytest.raises(fuyou.ConfigError, match="meta device"):
            wrap(model, torch.optim.AdamW(model.parameters()))


class TestOptimizer:
    def test_another_class(self):
        model, _ = model_and_optimizer()
        refused("SGD", model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

    @pytest.mark.parametrize("flag", ["amsgrad", "maximize", "capturable", "differentiable"])
    def test_flags(self, flag):
        model, _ = model_and_optimizer()
        refused(flag, model=model, optimizer=torch.optim.AdamW(model.parameters(), **{flag: True}))

    def test_parameter_that_is_not_in_the_model(self):
        model, _ = model_and_optimizer()
        stranger = nn.Parameter(torch.zeros(3, 5))
        optimizer = torch.optim.AdamW([("stranger", stranger)])
        refused(r"stranger.*\(3, 5\)", model=model, optimizer=optimizer)

    def test_passed_step_names_the_right_one(self):
        model, optimizer = model_and_optimizer()
        with wrap(model, optimizer), pytest.raises(fuyou.StateError, match=r"run\.optimizer\.step"):
            optimizer.step()
        optimizer.step()  # an ordinary one again

    def test_unfused_arithmetic_is_said(self):
        model, optimizer = model_and_optimizer(fused=None)
        with pytest.warns(UserWarning, match="fused=True"):
            wrap(model, optimizer).close()


class TestWrapped:
    def test_twice(self):
        model, optimizer = model_and_optimizer()
        with wrap(model, optimizer):
            with pytest.raises(fuyou.ConfigError, match="wrapped already"):
                wrap(model, optimizer)
            with pytest.raises(fuyou.ConfigError, match="wrapped already"):
                wrap(nn.Sequential(model), optimizer)
        wrap(model, optimizer).close()

    def test_use_after_close(self):
        model, optimizer = model_and_optimizer()
        run = wrap(model, optimizer)
        run.close()
        run.close()
        with pytest.raises(fuyou.StateError, match="closed"):
            run.optimizer.step()
        with pytest.raises(fuyou.StateError, match="closed"):
            run.save_pretrained("anywhere")
        model(torch.zeros(1, 16)).sum().backward()

    def test_dtype_and_shape_are_fixed(self):
        model, optimizer = model_and_optimizer()
        with wrap(model, optimizer):
            with pytest.raises(fuyou.StateError, match=r"0\.weight"):
                model[0].weight.data = torch.zeros(2, 2)
            with pytest.raises(fuyou.StateError, match=r"0\.weight"):
                model.half()

    def test_fork(self):
        model, optimizer = model_and_optimizer()
        with wrap(model, optimizer) as run:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    model(torch.zeros(1, 16))
                    os.write(writer, b"ran")
                except fuyou.StateError as error:
                    os.write(writer, str(error).encode())
                run.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert b"forked child" in os.read(reader, 4096)
            os.close(reader), os.close(writer)
            model(torch.zeros(1, 16)).sum().backward()
            run.optimizer.step()


class TestFolders:
    def test_missing(self, tmp_path):
        refused("does not exist", fuyou.StoreError, nvme=tmp_path / "nowhere")

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        refused("not a folder", fuyou.StoreError, nvme=tmp_path / "file")

    def test_twice(self, tmp_path):
        refused("twice", fuyou.StoreError, nvme=[tmp_path, tmp_path / "."])

    def test_in_use_by_this_process(self, tmp_path):
        model, optimizer = model_and_optimizer()
        with wrap(model, optimizer, nvme=tmp_path):
            error = refused("in use", fuyou.StoreError, nvme=tmp_path)
            assert str(os.getpid()) in str(error)
        assert list(tmp_path.iterdir()) == []

    def test_in_use_by_another_process_and_free_when_it_is_killed(self, tmp_path):
        script = (
            "import sys, time, torch, fuyou; m = torch.nn.Linear(4, 4)\n"
            "o = torch.optim.AdamW(m.parameters(), fused=True)\n"
            "run = fuyou.wrap(m, o, nvme=sys.argv[1], ram='64MiB', gpu='256MiB', device='cpu')\n"
            "print('ready', flush=True); time.sleep(600)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as holder:
            try:
                assert holder.stdout.readline() == "ready\n"
                error = refused("in use", fuyou.StoreError, nvme=tmp_path)
                assert str(holder.pid) in str(error)
                assert (tmp_path / "fuyou-store").stat().st_mode & 0o777 == 0o700
            finally:
                holder.kill()
        model, optimizer = model_and_optimizer()
        wrap(model, optimizer, nvme=tmp_path).close()
        assert list(tmp_path.iterdir()) == []

    def test_read_only(self, tmp_path):
        if os.getuid() == 0:  # root passes every mode: a read-only file system stands for it
            folder = "/proc/self"
            refused("not writable", fuyou.StoreError, nvme=folder)
        else:
            tmp_path.chmod(0o500)
            refused("not writable", fuyou.StoreError, nvme=tmp_path)

    def test_symbolic_link_in_place_of_the_store(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "nvme").mkdir()
        (tmp_path / "nvme" / "fuyou-store").symlink_to(tmp_path / "elsewhere")
        refused("symbolic link", fuyou.StoreError, nvme=tmp_path / "nvme")
