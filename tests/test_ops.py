"""The operations as PyTorch sees them."""

import torch

import nicefast as nf
from helpers import partitions

ops = torch.ops.nicefast


def coupling_arguments(p, device, dtype=torch.float32):
    f = p.locate(device)
    return (f.slots, f.indices, f.start, f.step)


def samples(device):
    """Arguments for every operation."""
    x = torch.randn(3, 6, device=device)
    s = torch.randn(6, device=device)
    for p in partitions(6)[::3]:
        f = p.locate(device)
        shift, bias = torch.randn(3, f.size, device=device), torch.randn(f.size, device=device)
        yield ops.additive_coupling, (x, shift, bias, f.slots, f.indices, f.start, f.step, False)
        yield ops.additive_coupling, (x, shift, None, f.slots, f.indices, f.start, f.step, True)
        yield (
            ops.additive_coupling_,
            (x.clone(), shift, bias, f.slots, f.indices, f.start, f.step, True),
        )
        where = (f.indices, f.start, f.step, f.size)
        yield ops.select_features, (x, *where, True, True, torch.float16)
        yield ops.select_features, (x, *where, False, False, torch.float32)
    for prior in nf.reference.PRIORS:
        for return_z in (False, True):
            yield ops.scale_log_prob, (x, s, prior, return_z)
            g = torch.randn(3, 6, device=device) if return_z else None
            yield ops.scale_log_prob_backward, (g, torch.randn(3, device=device), x, s, prior)
        yield ops.sample_prior, (s, 4, 2, 7, prior, torch.float32)
        seed = torch.tensor(7)
        yield ops.sample_prior_seeded, (s, 4, 2, seed, prior, torch.float32)
    yield ops.sample_prior_backward, (x, x, torch.float32)
    levels = torch.randint(0, 17, (3, 6), device=device)
    yield ops.dequantise, (levels, 17, 2, 7, -1.0, 1.0)
    yield ops.dequantise, (levels, None, 2, 7, 0.0, 1.0)


def test_opcheck(backend, device):
    tested = set()
    for operation, arguments in samples(device):
        torch.library.opcheck(operation.default, arguments)
        tested.add(operation._qualified_op_name)
    assert tested == {f"nicefast::{name}" for name in registered()}


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("nicefast::") for n in names if n.startswith("nicefast::")}


def test_every_operation_has_a_cpu_and_a_cuda_implementation():
    for name in registered():
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nicefast::{name}", key)


def test_fake_tensors_have_the_real_shapes(backend, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for operation, arguments in samples(device):
        real = operation(*arguments)
        mode = FakeTensorMode()
        fake_arguments = [
            mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments
        ]
        with mode:
            fake = operation(*fake_arguments)
        for r, f in zip(
            real if isinstance(real, tuple) else (real,),
            fake if isinstance(fake, tuple) else (fake,),
            strict=True,
        ):
            if r is not None:
                assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_outputs_share_no_memory_with_inputs(backend, device):
    for operation, arguments in samples(device):
        inputs = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        out = operation(*arguments)
        for o in out if isinstance(out, tuple) else (out,):
            if o is not None and o.numel():
                assert o.untyped_storage().data_ptr() not in inputs
