"""The fast ways through a flow: :mod:`nicefast.path` chooses one, :mod:`.calls` makes it a call.

On a GPU a whole narrow flow is one kernel (:mod:`.whole`), a wide one goes between two
(:mod:`.wide`). On the CPU a handful of rows go through NumPy (:mod:`.handful`), small batches, and
those whose activations are kept, in one piece (:mod:`.onepiece`), others in blocks of rows that lie
on their side (:mod:`.sideways`). What no such way serves, or only its couplings, goes through
matrix products (:mod:`.blockwise`). The other files are what these are made of.
"""
