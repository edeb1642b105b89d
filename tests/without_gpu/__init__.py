# SPDX-License-Identifier: Apache-2.0
"""What stands in for a GPU in tests. Each part shows faults that otherwise only a GPU would show.

accesses.py        Triton's interpreter refuses addresses out of bounds and races between programs (in every test)
cuda_on_cpu/       the CUDA kernels, compiled for the CPU (in the tests of surgery, and under sanitizers)
recorded_graph.py  a graph that replays the operations of its capture, and nothing else
pretend_cuda/      a device "cuda" for CPU builds of PyTorch: tensors on the wrong device, captures that wait for the device
"""
