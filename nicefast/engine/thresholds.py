"""The thresholds of the row engine, and the measurements that they rest on.

``python -m bench ablation`` measures the alternatives again on the machine at hand.
"""

from __future__ import annotations

#: Least operations of a float32 product on the CPU for which oneDNN multiplies in MKL's place, on
#: AMD's processors with AVX-512. One call of oneDNN costs 10 us more than one of MKL's, and
#: it computes 257 GFLOP/s a core instead of 118 (AMD Zen 5), so that it pays from 4 MFLOP on.
ONEDNN_FLOPS = 1 << 22

#: The same on AMD's processors without AVX-512, for products of the forward pass alone. Times as
#: fast as MKL (AMD Zen 1): 128 rows of 1000 x 1000, 1.12; 16,384 rows of 64 x 64, 1.2; 1,024 and
#: 4,096 rows of 256 x 256, 1.0; but 1,024 rows of 64 x 64 (8 MFLOP) 0.79. At weight gradients MKL
#: is twice as fast there.
ONEDNN_FLOPS_AVX2 = 1 << 26

#: Up to so many rows, and from so many operations on, MKL computes ``W h^T`` on AMD's processors
#: without AVX-512. Times as fast as ``h W^T`` at 1000 x 1000 (Zen 1): 4 rows 2.2, 16 rows 1.4, 32
#: rows 1.3, 64 rows 1.15, 128 rows 1.0.
FEW_ROWS = 32
FEW_ROWS_FLOPS = 1 << 23

#: Bytes of a block's widest activation. On the CPU, 4 MiB were within 3 % of the best in every
#: case; 1 MiB cost 4 to 25 % (threads meet after every operation) and 16 MiB up to 27 % (Zen 5). On
#: a GPU a block only has to fit into memory; nothing has been measured there.
BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 30}

#: Bytes of the residuals of one batch up to which forward saves them for the gradient; the backward
#: pass recomputes larger ones. Saving was faster in every case that was measured (16,384 rows of
#: 256 x 3: 2.15 times plain PyTorch against 1.7 recomputed), so memory alone sets the limit.
RESIDUAL_BYTES = 1 << 30

#: Bytes of the residuals of one block where the backward pass recomputes them.
RECOMPUTED_BYTES = {"cpu": 1 << 25, "cuda": 1 << 30}
