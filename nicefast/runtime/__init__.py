"""What a call runs on: everything that is asked of PyTorch and the machine, not of a flow.

backend.py    kernels or plain PyTorch;  precision.py, the operands of products
devices.py    where a model is;  ranks.py, the processes of torch.distributed
threads.py    threads and memory of a call on the CPU;  captures.py, CUDA graphs
watchers.py   what watches a call: autograd, compilers, torch.func
"""
