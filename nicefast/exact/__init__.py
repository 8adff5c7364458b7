"""What an inverse to the last bit is built of (see :meth:`nicefast.NICE.with_grid`).

grid.py         numbers that are added and subtracted without rounding
arithmetic.py   conditioners whose bits depend on nothing but their operands
"""
