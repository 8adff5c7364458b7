"""The tests that normflows ships for its couplings, with the fast class put in place of theirs."""

import unittest

import pytest

pytest.importorskip("normflows", reason="needs normflows")

from nicefast.compat.normflows import MaskedAffineFlow


def test_normflows_own_tests_pass(monkeypatch):
    theirs = pytest.importorskip(
        "normflows.flows.affine.coupling_test", reason="this release of normflows has no tests"
    )
    assert hasattr(theirs, "MaskedAffineFlow")
    monkeypatch.setattr(theirs, "MaskedAffineFlow", MaskedAffineFlow)
    calls = []
    both = MaskedAffineFlow._both
    monkeypatch.setattr(MaskedAffineFlow, "_both", lambda *a: (calls.append(1), both(*a))[1])
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(theirs).run(result)
    assert result.testsRun
    assert result.wasSuccessful(), result.failures + result.errors
    assert calls  # it was the fast class that was tested
