"""Memory, one stream, events and replays on doubles of pycuda and cuda-python: no test here ran on a GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edgeprune.errors import EngineError
from edgeprune.ondevice import machine
from edgeprune.ondevice.cuda import INSTALL, Cuda, Gpu, find_gpu
from tests.support.doubles import double_cuda_python, double_pycuda
from tests.support.doubles.double_device import Device, Fault, Work
from tests.support.doubles.install import VERSION, install

pytest_plugins = ("tests.support.doubles.fixtures",)

VERSIONS = {"pycuda": double_pycuda.VERSION_TEXT, "cuda-python": double_cuda_python.VERSION}


def put(cuda: Cuda, device: Device, *works: Work) -> None:
    """What a kernel would be: work on the stream."""
    for work in works:
        device.put(device.stream_at(cuda.stream), work)


def test_on_a_double_the_gpu_is_told(device: Device, layer: str) -> None:
    assert find_gpu() == Gpu("Double of a GPU", 87, 2**28, 12060, f"{layer} {VERSIONS[layer]}")
    found = machine.describe()
    assert found["gpu"]["sm"] == 87
    assert (found["no_gpu"], found["modules"]["tensorrt"]) == ("", VERSION)


def test_on_a_double_bytes_go_there_and_come_back(device: Device) -> None:
    """New memory is zero; an array of any layout arrives in order, and in part where it is shorter."""
    with Cuda() as cuda:
        address = cuda.allocate(24)
        found = np.ones((2, 3), np.float32)
        cuda.download(found, address)
        np.testing.assert_array_equal(found, np.zeros((2, 3)))
        given = np.arange(6, dtype=np.float32).reshape(3, 2).T
        cuda.upload(address, given)
        cuda.download(found, address)
        np.testing.assert_array_equal(found, given)
        cuda.upload(address, np.full(2, 9, np.float32))
        cuda.download(found, address)
        np.testing.assert_array_equal(found.ravel(), [9, 9, *given.ravel()[2:]])
        assert (cuda.size_of(address), cuda.size_of(cuda.allocate(0))) == (24, 1)


def test_on_a_double_what_does_not_fit_or_is_no_buffer_is_not_copied(device: Device) -> None:
    with Cuda() as cuda:
        address = cuda.allocate(8)
        for copy in (lambda array: cuda.upload(address, array), lambda array: cuda.download(array, address)):
            with pytest.raises(ValueError, match="12 bytes into a buffer of 8"):
                copy(np.zeros(3, np.float32))
        with pytest.raises(KeyError):
            cuda.upload(address + 4, np.zeros(1, np.float32))


def test_on_a_double_copies_come_after_the_stream_s_work(device: Device) -> None:
    """It may still read what an upload replaces, and write what a download takes."""
    device.per_thread = True
    with Cuda() as cuda:
        address = cuda.allocate(4)
        seen = []
        put(cuda, device, Work(lambda: seen.append(bytes(device.allocations[address].data))))
        cuda.upload(address, np.ones(1, np.int32))
        assert seen == [bytes(4)]
        put(cuda, device, Work(lambda: device.allocations[address].data.fill(7)))
        found = np.zeros(4, np.uint8)
        cuda.download(found, address)
        assert set(found) == {7}


def test_on_a_double_time_is_the_gpu_s_from_begin_to_end(device: Device) -> None:
    """Of the work alone, not of what the stream had to do before; and what the host took to put it there."""
    with Cuda() as cuda:

        def work() -> None:
            device.host_ms += 2
            put(cuda, device, Work(lambda: None, 5), Work(lambda: None, 6))

        put(cuda, device, Work(lambda: None, 100))
        assert cuda.time_ms(work) == (pytest.approx(11), pytest.approx(2))
        assert cuda.time_ms(lambda: None) == (0, 0)


def test_on_a_double_captured_work_is_replayed_and_not_done_before(device: Device, layer: str) -> None:
    with Cuda() as cuda:
        done = []
        put(cuda, device, Work(lambda: done.append("before")))
        replay = cuda.capture(lambda: put(cuda, device, Work(lambda: done.append("captured"), 3)))
        assert done == ["before"]
        if layer == "pycuda":
            assert replay is None
            return
        for _ in range(2):
            assert cuda.time_ms(replay)[0] == pytest.approx(3)
        assert done == ["before", "captured", "captured"]


@pytest.mark.parametrize("reason", ["refused", "refused but captured", "invalid", "no graph of it"])
def test_on_a_double_what_cannot_be_captured_is_no_replay(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stream works on."""
    device = Device()
    install(monkeypatch, device, ("cuda-python",))
    with Cuda() as cuda:

        def work() -> None:
            if reason in ("refused", "invalid"):
                device.stream_at(cuda.stream).broken = reason
            if reason.startswith("refused"):
                raise EngineError("TensorRT refuses a step", "")

        def refuse(graph: object) -> None:
            raise Fault("CUDA_ERROR_INVALID_VALUE", "no")

        if reason == "no graph of it":
            monkeypatch.setattr(device, "instantiate", refuse)
        assert cuda.capture(work) is None
        done = []
        put(cuda, device, Work(lambda: done.append(1)))
        cuda.synchronize()
        assert done == [1]
    assert device.faults == []


def test_on_a_double_a_bug_in_captured_work_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    install(monkeypatch, device, ("cuda-python",))
    with Cuda() as cuda:
        with pytest.raises(ZeroDivisionError):
            cuda.capture(lambda: 1 / 0)
        cuda.synchronize()  # no longer captured
    assert device.faults == []


def test_on_a_double_all_is_freed_at_the_end_and_only_once(device: Device) -> None:
    cuda = Cuda()
    for size in (1, 1000, 10**6):
        cuda.allocate(size)
    assert device.used == 1 + 1000 + 10**6
    cuda.close()
    assert device.used == 0
    cuda.close()
    with pytest.raises(ZeroDivisionError), Cuda() as cuda:
        cuda.allocate(10)
        raise ZeroDivisionError
    assert device.used == 0


def test_on_a_double_a_full_memory_says_how_much_is_left(device: Device) -> None:
    device.memory = 2**23
    with Cuda() as cuda:
        cuda.allocate(5 * 2**20)
        with pytest.raises(EngineError, match=r"the GPU has no 4 MiB left \(3 MiB free\): .*MEMORY|memory") as caught:
            cuda.allocate(4 * 2**20)
        assert "smaller --batch" in caught.value.remedy
        cuda.allocate(3 * 2**20)


def test_on_a_double_a_failed_kernel_is_told_and_not_hidden(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    install(monkeypatch, device, (layer,))

    def fail() -> None:
        raise Fault("CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal address")

    with pytest.raises(EngineError, match=r"(?i)the GPU failed: .*illegal.address") as caught, Cuda() as cuda:
        cuda.allocate(10)
        put(cuda, device, Work(fail))
        cuda.synchronize()
    assert caught.value.remedy


def test_no_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Device(), ())
    with pytest.raises(EngineError, match=r"no CUDA module works here \(pycuda: .*; cuda-python: .*\)") as caught:
        find_gpu()
    assert caught.value.remedy == INSTALL
    assert machine.describe()["no_gpu"] == caught.value.message


def test_on_a_double_without_a_gpu_nothing_is_to_be_installed(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call fails, as the real modules' does; a count of none is one more way to say so."""
    device = Device(count=0)
    install(monkeypatch, device, (layer,))
    with pytest.raises(EngineError, match=r"CUDA_ERROR_NO_DEVICE|no CUDA-capable device") as caught:
        find_gpu()
    assert "nvidia-smi" in caught.value.remedy
    assert "--target" in caught.value.remedy
    driver = sys.modules["pycuda.driver" if layer == "pycuda" else "cuda.bindings.driver"]
    if layer == "pycuda":
        monkeypatch.setattr(driver, "init", lambda: None)
    else:
        monkeypatch.setattr(driver, "cuInit", lambda flags: (driver.CUresult.CUDA_SUCCESS,))
    with pytest.raises(EngineError, match="no NVIDIA GPU is found") as caught:
        find_gpu()
    assert "--target" in caught.value.remedy


def test_on_a_double_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda-python without libcuda raises at its first call; some releases' errors have no words."""
    install(monkeypatch, Device(), ("cuda-python",))

    class DynamicLibNotFoundError(RuntimeError): ...

    def fail(flags: int) -> None:
        raise DynamicLibNotFoundError

    monkeypatch.setattr(sys.modules["cuda.bindings.driver"], "cuInit", fail)
    with pytest.raises(EngineError, match="cuda-python: DynamicLibNotFoundError") as caught:
        find_gpu()
    assert "nvidia-smi" in caught.value.remedy


def test_on_a_double_pycuda_comes_first_and_cuda_python_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Device(), ("pycuda", "cuda-python"))
    assert find_gpu().layer.startswith("pycuda")

    def fail() -> None:
        raise double_pycuda.LogicError("cuInit failed: unknown error")

    monkeypatch.setattr(sys.modules["pycuda.driver"], "init", fail)
    assert find_gpu().layer.startswith("cuda-python")


def test_on_a_double_cuda_python_s_former_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 12.8 the module was cuda.cuda, without a version of its own."""
    install(monkeypatch, Device(), ())
    made = double_cuda_python.module(Device())
    del made.__version__
    monkeypatch.setitem(sys.modules, "cuda.cuda", made)
    assert find_gpu().layer == "cuda-python of unknown version"


def test_on_a_double_an_error_while_it_opens_leaves_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Fault("CUDA_ERROR_INVALID_VALUE", "no event today")

    monkeypatch.setattr(device, "event", fail)
    with pytest.raises(EngineError, match=r"the GPU cannot be used: .*(no event today|cuEventCreate)") as caught:
        Cuda()
    assert "nvidia-smi" in caught.value.remedy
