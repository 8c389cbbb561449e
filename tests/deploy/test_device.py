"""The measurement on simulated devices, whose files lie in a folder, as pykd-run and pykd make it; and what fails."""

import csv
import json
import os
import re
import resource
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run_command import answered, command, program  # noqa: F401
from torch import nn

import pykd
from pykd.deploy import Model, export
from pykd.deploy.engine import bench
from pykd.errors import PykdError

pytest.importorskip("pykd._runtime")

INA3221 = "sys/bus/i2c/drivers/ina3221"
A78, V3AE, A57 = "0xd42", "0xd83", "0xd07"
# Model, compatible, L4T, JetPack, power modes, the one in force, cores and their part, rails by address in mV and mA.
BOARDS = {
    "orin_nano": (
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        ("nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005", "nvidia,tegra234"),
        ("36.4.3", "6.2"),
        ("15W", "25W", "MAXN_SUPER"),
        2,
        (6, A78, "ARM Cortex-A78AE"),
        {"1-0040": [("VDD_IN", 5000, 1850), ("VDD_CPU_GPU_CV", 5000, 500), ("VDD_SOC", 5000, 300)]},
        (["VDD_IN"], 9.25),
    ),
    "orin_nx": (
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        ("nvidia,p3509-0000+p3767-0000", "nvidia,p3767-0000", "nvidia,tegra234"),
        ("36.4.0", "6.1"),
        ("MAXN", "10W", "15W", "25W"),
        3,
        (8, A78, "ARM Cortex-A78AE"),
        {"1-0040": [("VDD_IN", 19000, 500), ("VDD_CPU_GPU_CV", 19000, 100), ("NC", 0, 0)]},
        (["VDD_IN"], 9.5),
    ),
    "agx_orin": (
        "NVIDIA Jetson AGX Orin Developer Kit",
        ("nvidia,p3737-0000+p3701-0005", "nvidia,p3701-0005", "nvidia,tegra234"),
        ("36.5.0", "6.2.2"),
        ("MAXN", "15W", "30W", "50W"),
        0,
        (12, A78, "ARM Cortex-A78AE"),
        {
            "1-0040": [("VDD_GPU_SOC", 20000, 150), ("VDD_CPU_CV", 20000, 100), ("VIN_SYS_5V0", 5000, 900)],
            "1-0041": [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 80), ("NC", 0, 0)],
        },
        (["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"], 9.5),
    ),
    "thor": (
        "NVIDIA Jetson AGX Thor Developer Kit",
        ("nvidia,p4071-0000+p3834-0008", "nvidia,p3834-0008", "nvidia,tegra264"),
        ("38.4.0", "7.1"),
        ("MAXN",),
        0,
        (14, V3AE, "ARM Neoverse-V3AE"),
        {"2-0040": [("VDD_GPU", 12000, 250), ("VDD_CPU_SOC_MSS", 12000, 350), ("VIN_SYS_5V0", 5000, 800)]},
        (["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"], 11.2),
    ),
    "nano": (
        "NVIDIA Jetson Nano Developer Kit",
        ("nvidia,p3449-0000-b00+p3448-0000-b00", "nvidia,jetson-nano", "nvidia,tegra210"),
        ("32.7.1", "4.6.x"),
        ("MAXN", "5W"),
        1,
        (4, A57, "ARM Cortex-A57"),
        {"iio": [("POM_5V_IN", 5000, 400), ("POM_5V_GPU", 5000, 0), ("POM_5V_CPU", 5000, 60)]},
        (["POM_5V_IN"], 2.0),
    ),
}


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.setenv("PYKD_CACHE", "off")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("device") / "a.pykd.safetensors"
    export(pykd.models.build("mlp", in_shape=(1, 8, 8), classes=10, widths=[16]), path, torch.zeros(1, 1, 8, 8))
    return path


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(str(text))


def device(root, name):
    """The files of a board; returns where the current of its first rail is read."""
    model, compatible, (l4t, _), modes, mode, (cores, part, _), monitors, _ = BOARDS[name]
    release, _, revision = l4t.partition(".")
    files = {
        "proc/device-tree/model": f"{model}\0",
        "proc/device-tree/compatible": "".join(f"{each}\0" for each in compatible),
        "etc/nv_tegra_release": f"# R{release} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n",
        "var/lib/nvpmodel/status": f"pmode:{mode:04d}",
        "etc/nvpmodel.conf": "".join(f"< POWER_MODEL ID={i} NAME={each} >\n" for i, each in enumerate(modes)),
        "proc/cpuinfo": f"processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: {part}\n\n" * cores,
        "proc/meminfo": "MemTotal:        8000000 kB\n",
        "sys/devices/virtual/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/devices/virtual/thermal/thermal_zone0/temp": "45100\n",
        "sys/devices/virtual/thermal/thermal_zone1/type": "cv0-thermal\n",
        "sys/devices/virtual/thermal/thermal_zone1/temp": "",
        "sys/devices/virtual/thermal/cooling_device0/type": "cpu-throttle-alert\n",
        "sys/devices/virtual/thermal/cooling_device0/cur_state": "0\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "115200\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1728000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    }
    for address, rails in monitors.items():
        for i, (label, voltage, current) in enumerate(rails):
            if address == "iio":
                place = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
                names = (f"rail_name_{i}", f"in_voltage{i}_input", f"in_current{i}_input")
            else:
                place = f"{INA3221}/{address}/hwmon/hwmon{address[-1]}"
                names = (f"in{i + 1}_label", f"in{i + 1}_input", f"curr{i + 1}_input")
            files |= {
                f"{place}/{each}": f"{value}\n" for each, value in zip(names, (label, voltage, current), strict=True)
            }
    write(root, files)
    address = next(iter(monitors))
    if address == "iio":
        return root / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_current0_input"
    return root / INA3221 / address / "hwmon" / f"hwmon{address[-1]}" / "curr1_input"


def measured(program, file, root, out, *words, code=0):  # noqa: F811
    words = ("--bench", "--power", "--seconds", "0.2", "--root", root, "--json", out / "a.json", *words)
    answered(program, file, *words, code=code)
    return json.loads((out / "a.json").read_bytes())


@pytest.mark.parametrize("name", BOARDS)
def test_boards(program, file, tmp_path, name):  # noqa: F811
    device(tmp_path / "root", name)
    model, compatible, (l4t, jetpack), modes, mode, (cores, _, processor), monitors, (total, watts) = BOARDS[name]
    record = measured(program, file, tmp_path / "root", tmp_path, "--samples", tmp_path / "a.csv", "--batch", "4")
    machine = record["machine"]
    assert (machine["name"], machine["soc"]) == (model, compatible[-1].removeprefix("nvidia,"))
    assert machine["module"] == re.search(r"\+(p\d{4}-\d{4})", compatible[0])[1]
    assert (machine["l4t"], machine["jetpack"]) == (l4t, jetpack)
    assert machine["power_mode"] == {"name": modes[mode], "id": mode}
    assert (machine["processor"], machine["cores"], machine["memory_bytes"]) == (processor, cores, 8_000_000 * 1024)
    assert machine["emulated"] is False
    (run,) = record["runs"]
    power = run["power"]
    assert (power["source"], power["rails"], power["scope"]) == ("ina3221", total, "module")
    assert power["samples"] >= 50
    assert power["samples_per_second"] == pytest.approx(power["samples"] / power["window_seconds"])
    assert power["watts"] == pytest.approx(watts)
    assert power["idle_watts"] == pytest.approx(watts)
    rows = 4 * run["latency_us"]["runs"]
    energy = power["millijoules_per_row"]
    assert energy["total"] == pytest.approx(1000 * watts * power["window_seconds"] / rows)
    assert energy["above_idle"] == pytest.approx(0, abs=1e-6)
    assert run["clocks_mhz"]["cpu"] == {"min": 115.2, "max": 1728, "seen": pytest.approx(1510.4)}
    assert run["clocks_mhz"]["gpu"] == {"min": 306, "max": 1020, "seen": pytest.approx(306)}
    assert run["celsius"] == {"start": {"cpu": 45.1}, "end": {"cpu": 45.1}}
    assert run["throttled"] is False
    assert run["missing"] == []
    with (tmp_path / "a.csv").open() as stream:
        head, *samples = csv.reader(stream)
    rails = [(label, mv * ma / 1e6) for rails in monitors.values() for label, mv, ma in rails if label != "NC"]
    assert head == ["time_s", *(label for label, _ in rails)]
    assert len(samples) >= power["samples"] + 50
    table = np.array(samples, float)
    assert (np.diff(table[:, 0]) > 0).all()
    np.testing.assert_allclose(table[:, 1:], [[watts for _, watts in rails]] * len(table), rtol=1e-5)


def test_energy_above_idle(file, tmp_path):
    """The load is a thread's: idle takes 5 W, whatever is measured 10 W."""
    current = device(tmp_path, "orin_nano")
    current.write_text("1000\n")

    def say(doing):
        if doing.endswith("measuring"):
            current.write_text("2000\n")

    record = bench(file, power=True, seconds=0.2, root=tmp_path, say=say)
    power = record["runs"][0]["power"]
    assert power["idle_watts"] == pytest.approx(5)
    assert power["watts"] == pytest.approx(10, rel=0.01)
    energy = power["millijoules_per_row"]
    assert energy["above_idle"] == pytest.approx(energy["total"] / 2, rel=0.02)


def test_what_fails_while_it_is_read(file, tmp_path):
    """A rail vanishes, and something throttles, once the measurement has begun."""
    current = device(tmp_path, "agx_orin")

    def say(doing):
        if doing.endswith("measuring"):
            current.write_text("")
            write(tmp_path, {"sys/devices/virtual/thermal/cooling_device0/cur_state": "1\n"})

    (run,) = bench(file, power=True, seconds=0.2, root=tmp_path, say=say)["runs"]
    assert run["throttled"] is True
    assert run["latency_us"]["runs"] >= 60
    power = run["power"]
    assert power["idle_watts"] == pytest.approx(9.5)
    assert power["watts"] is None
    assert power["millijoules_per_row"] == {"total": None, "above_idle": None}
    assert any(re.match("power: (only .* samples|power could not be read for)", why) for why in run["missing"])


def test_too_few_samples(file, tmp_path):
    device(tmp_path, "thor")
    (run,) = bench(file, power=True, seconds=0.01, root=tmp_path)["runs"]
    assert run["power"]["millijoules_per_row"] == {"total": None, "above_idle": None}
    assert any("samples fell into the window" in why for why in run["missing"])


def test_an_unknown_board(file, tmp_path):
    device(tmp_path, "orin_nano")
    for label in tmp_path.glob(f"{INA3221}/*/hwmon/*/in1_label"):
        label.write_text("VDD_SECRET\n")
    for state in tmp_path.glob("sys/devices/virtual/thermal/*/*"):
        state.unlink()
    (tmp_path / "etc/nvpmodel.conf").unlink()
    write(
        tmp_path,
        {"etc/nv_tegra_release": "# R99 (release), REVISION: 9.9, x\n", "proc/device-tree/compatible": "a,b\0"},
    )
    record = bench(file, power=True, seconds=0.05, root=tmp_path)
    machine, (run,) = record["machine"], record["runs"]
    assert (machine["l4t"], machine["jetpack"], machine["soc"], machine["module"]) == ("99.9.9", None, None, None)
    assert machine["power_mode"] is None
    assert any("which JetPack has L4T 99.9.9 is not known" in why for why in machine["missing"])
    assert run["power"] is None
    assert run["throttled"] is None
    assert run["celsius"] == {"start": {}, "end": {}}
    assert run["latency_us"]["p50"] > 0
    assert any("VDD_SECRET, VDD_CPU_GPU_CV, VDD_SOC it is not known which" in why for why in run["missing"])


def test_a_machine_without_anything(file, tmp_path):
    record = bench(file, power=True, devices=["cuda", "cpu"], seconds=0.01, root=tmp_path / "nowhere")
    machine = record["machine"]
    assert {machine[key] for key in ("name", "soc", "module", "l4t", "power_mode", "processor", "cores")} == {None}
    cuda, cpu = record["runs"]
    if machine["cuda"] is None:
        assert cuda["latency_us"]["p50"] is None
        assert any(why.startswith("cuda float32, batch 1: ") for why in cuda["missing"])
    assert cpu["latency_us"]["p50"] > 0
    assert any("no INA3221" in why for why in cpu["missing"])


def test_tegrastats_in_place_of_sensors(program, file, tmp_path):  # noqa: F811
    """On a machine without an INA3221: here."""
    if list(Path("/").glob(f"{INA3221}/*/hwmon")):
        pytest.skip("this machine has an INA3221")
    line = "RAM 1/2MB (lfb 1x4MB) CPU [1%@729] cpu@53C VDD_IN 4000mW/4000mW VDD_SOC 1000mW/1000mW"
    script = f"#!/bin/sh\n[ $1 = --interval ] || exit 1\nwhile echo '{line}'; do sleep 0.004; done\n"
    write(tmp_path, {"bin/tegrastats": script})
    (tmp_path / "bin/tegrastats").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    words = ("--bench", "--power", "--seconds", "1", "--json", tmp_path / "a.json")
    subprocess.run([program, file, *words], env=environment, check=True, capture_output=True)
    (run,) = json.loads((tmp_path / "a.json").read_bytes())["runs"]
    assert (run["power"]["source"], run["power"]["rails"]) == ("tegrastats", ["VDD_IN"])
    assert run["power"]["watts"] == pytest.approx(4), run["missing"]
    deadline = time.monotonic() + 5
    while any(_runs(process, f"{tmp_path}/bin/tegrastats") for process in os.listdir("/proc") if process.isdigit()):
        assert time.monotonic() < deadline, "it goes on when the measurement has ended"
        time.sleep(0.05)


def _runs(process, path):
    try:
        return path in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def test_too_large_for_the_memory(program, tmp_path):  # noqa: F811
    """One batch of it needs more than the process may have; the other one is measured."""
    export(nn.Conv2d(3, 8, 3), tmp_path / "a.pykd.safetensors", torch.zeros(1, 3, 64, 64))
    words = ("a.pykd.safetensors", "--bench", "--batch", "65536,1", "--seconds", "0.01", "--json", "a.json")

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

    done = subprocess.run(
        [program, *words], cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    large, small = json.loads((tmp_path / "a.json").read_bytes())["runs"]
    assert large["latency_us"] == dict.fromkeys(large["latency_us"])
    assert any("give a smaller batch" in why for why in large["missing"])
    assert small["latency_us"]["p50"] > 0


def test_trtexec_beside_it(program, file, tmp_path):  # noqa: F811
    (tmp_path / "empty-float16-8.log").write_text("nothing\n")
    words = ("--bench", "--seconds", "0.01", "--json", tmp_path / "a.json", "--trtexec")
    answered(program, file, *words, f"{tmp_path}/empty-float16-8.log,{tmp_path}/nowhere.log")
    _, empty, nowhere = json.loads((tmp_path / "a.json").read_bytes())["runs"]
    assert (empty["engine"], empty["form"], empty["device"]) == ("tensorrt", "dense", "cuda")
    assert (empty["precision"], empty["batch"], empty["threads"]) == ("float16", 8, None)
    assert (nowhere["precision"], nowhere["batch"]) == ("float32", 1)
    assert any("nowhere.log says no precision and batch" in why for why in nowhere["missing"])
    assert not any("says no precision" in why for why in empty["missing"])
    for run, why in ((empty, "tensorrt: "), (nowhere, "cannot read ")):
        assert run["latency_us"]["p50"] is None
        assert any(why in sentence for sentence in run["missing"])


def test_what_could_not_be_checked_is_told(program, file, tmp_path):  # noqa: F811
    """One device answers rightly, the other one not at all: the check does not speak for both."""
    if json.loads(pykd._runtime.machine())["cuda"]:
        pytest.skip("there is a CUDA device")
    np.save(tmp_path / "rows.npy", np.ones((2, 1, 8, 8), np.float32))
    answered(program, file, "--input", tmp_path / "rows.npy", "--output", tmp_path / "answers.npy")
    words = ("--seconds", "0.01", "--input", tmp_path / "rows.npy", "--check", tmp_path / "answers.npy")
    answered(program, file, "--bench", "--device", "cpu,cuda", *words, "--json", tmp_path / "a.json")
    result = json.loads((tmp_path / "a.json").read_bytes())
    assert result["check"]["equal"]
    told = [any("could not be checked" in why for why in run["missing"]) for run in result["runs"]]
    assert told == [False, True]


def test_no_rows_are_no_check(program, file, tmp_path):  # noqa: F811
    np.save(tmp_path / "rows.npy", np.ones((0, 1, 8, 8), np.float32))
    np.save(tmp_path / "answers.npy", np.ones((0, 10), np.float32))
    rows, answers = ("--input", tmp_path / "rows.npy"), ("--check", tmp_path / "answers.npy")
    assert "no rows whose answers" in answered(program, file, *rows, *answers, code=1).stderr
    for words in (rows, (*rows, *answers)):
        assert "rows.npy has no rows" in answered(program, file, "--bench", *words, code=1).stderr


def test_devices_below_a_root(program, tmp_path):  # noqa: F811
    device(tmp_path, "thor")
    said = answered(program, "--devices", "--root", tmp_path).stdout
    assert said.startswith("board      NVIDIA Jetson AGX Thor Developer Kit (tegra264, ")
    assert "--device5 is not known" in answered(program, "--devices", "--device5", code=2).stderr


def test_interrupted(file):
    """What say raises, and Control-C, end the measurement."""

    def say(doing):
        raise KeyError(doing)

    with pytest.raises(KeyError, match="planning"):
        bench(file, say=say)
    threading.Timer(0.3, os.kill, (os.getpid(), 2)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        bench(file, batches=[1] * 100, seconds=0.05)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"devices": ["gpu"]}, "device should be cpu or cuda, got gpu"),
        ({"precisions": ["int8"]}, "precision should be float32, float16 or bfloat16, got int8"),
        ({"seconds": 0}, "seconds should be 0.001 to 86400"),
        ({"seconds": float("nan")}, "seconds should be 0.001 to 86400"),
        ({"samples": "/proc/a.csv"}, "cannot write /proc/a.csv"),
        ({"root": "a\0b"}, "no null characters"),
    ],
)
def test_wrong_options(file, options, sentence):
    with pytest.raises(PykdError, match=sentence):
        bench(file, **options)


def test_devices_of_a_model(file):
    with pytest.raises(PykdError, match="device should be cpu or cuda, got 'gpu'"):
        Model(file, device="gpu")
    with pytest.raises(PykdError, match="precision should be float32 or float16 or bfloat16, got 'int8'"):
        Model(file, precision="int8")
    zeros = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(PykdError, match="leave precision at float32"):
        Model(file, precision="float16")(zeros)
    if json.loads(pykd._runtime.machine())["cuda"] is None:
        with pytest.raises(PykdError, match="CUDA"):
            Model(file, device="cuda")(zeros)


def test_the_command_shows_power(file, tmp_path, monkeypatch):
    """The column is there where it is asked for, whatever this machine has."""
    monkeypatch.setenv("PATH", str(tmp_path))
    said = command("bench", file, "--power", "--seconds", 0.01)
    assert "above idle" in said.stdout
    assert "above idle" not in command("bench", file, "--seconds", 0.01).stdout


def test_the_doctor_names_the_engine(monkeypatch):
    from pykd import _runtime
    from pykd.deploy.doctor import examine

    machine = json.loads(_runtime.machine())
    assert machine["isa"] in examine()[0]["engine"]
    known = machine | {"name": "Orin", "l4t": "36.4.3", "jetpack": "6.2", "power_mode": {"name": "MAXN", "id": 0}}
    monkeypatch.setattr(_runtime, "machine", lambda: json.dumps(known))
    assert examine()[0]["board"] == "Orin, L4T 36.4.3, JetPack 6.2, power mode MAXN"
