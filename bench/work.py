"""What a call has to do, counted from its sizes: operations of products, and the least bytes."""

from __future__ import annotations

from collections.abc import Sequence

from nicefast.roofline import Work, layers_work


def flow_work(
    rows: int,
    features: int,
    hidden: Sequence[int],
    couplings: int,
    direction: str,
    context: int = 0,
) -> Work:
    """What :func:`nicefast.roofline.layers_work` counts, from a flow's sizes.

    Conditioners take ceil(D/2) features, then floor(D/2), in turn, as the half, alternating and
    random partitions have it. ValueError for another direction, and for sizes of no flow.

    >>> from bench.work import flow_work
    >>> flow_work(10, 4, (3,), 2, "log_prob")
    Work(flops=480, bytes=352)
    """
    _at_least("rows", rows, 0)
    _at_least("features", features, 2)
    _at_least("couplings", couplings, 1)
    _at_least("context", context, 0)
    for width in hidden:
        _at_least("hidden", width, 1)
    widths = []
    for i in range(couplings):
        shifted = (features + i % 2) // 2
        widths.append((features - shifted + context, *hidden, shifted))
    return layers_work(rows, features, widths, direction, context)


def elementwise_work(rows: int, features: int, operation: str) -> Work:
    """The least bytes of one element-wise operation on float32 rows; no products, so flops = 0.

    Of N rows and D features, of which S = floor(D/2) are shifted:

        coupling forward, inverse   4 N (2 D + S)    x and shift read, y written
        coupling in place           12 N S           shifted half read and written, shift read
        coupling backward           8 N S            shifted half of grad_y read, grad_shift
                                    written; grad_x is grad_y itself
        scaling forward             4 N D + 4 N      h read, log_prob written
        scaling backward            8 N D + 4 N      h and the gradient of log_prob read, grad_h
                                    written
        sampling                    4 N D            rows written

    What does not grow with N (log_scale, a bias, their gradients) is not counted. ValueError for
    another operation, and for sizes of no rows.

    >>> from bench.work import elementwise_work
    >>> elementwise_work(10, 4, "coupling in place")
    Work(flops=0, bytes=240)
    """
    shifted = features // 2
    numbers = {
        "coupling forward": 2 * features + shifted,
        "coupling inverse": 2 * features + shifted,
        "coupling in place": 3 * shifted,
        "coupling backward": 2 * shifted,
        "scaling forward": features + 1,
        "scaling backward": 2 * features + 1,
        "sampling": features,
    }
    if operation not in numbers:
        raise ValueError(f"operation must be one of {', '.join(numbers)}, got {operation!r}")
    _at_least("rows", rows, 0)
    _at_least("features", features, 2 if operation.startswith("coupling") else 1)
    return Work(0, 4 * rows * numbers[operation])


def _at_least(argument: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")
