"""Where the tests find the checkout, their fixtures, and real data that may lie outside the checkout."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""absent on most machines: tests that read it skip where it is missing"""
