"""Copies between host memory and a GPU, where there is one."""

import numpy as np
import pytest
import torch

from asyncrl.transfer import staged, to_host

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_the_cpu_nothing_is_copied():
    array = np.zeros(3, np.float32)
    assert staged(array, CPU).data_ptr() == array.ctypes.data
    tensor = torch.zeros(3)
    assert staged(tensor, CPU) is tensor
    assert to_host({"x": tensor})["x"].ctypes.data == tensor.data_ptr()


@needs_gpu
def test_a_source_may_be_written_again_while_its_copy_is_under_way():
    device, source = torch.device("cuda"), np.ones((64, 1 << 20), np.uint8)
    busy = torch.rand(4096, 4096, device=device)
    for _ in range(50):  # the copy waits behind this
        busy = busy @ busy / 4096
    copies = [staged(row, device).to(device, non_blocking=True) for row in source]
    source.fill(2)
    assert all(bool((copy == 1).all()) for copy in copies)


@needs_gpu
def test_tensors_of_several_dtypes_come_from_a_gpu():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.ones(4)}
    arrays = to_host({name: tensor.cuda() for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())
