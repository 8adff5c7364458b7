"""The fast ways through a flow, each in one file: :mod:`nicefast.path` chooses among them."""
