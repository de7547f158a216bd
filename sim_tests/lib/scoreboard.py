"""Comparison of what came out with what had to come out."""
from collections import deque


class Scoreboard:
    """In-order comparison that fails on a wrong, an extra, a missing item, and on no items."""

    def __init__(self, name="item"):
        self.name, self.passed = name, 0
        self._want = deque()

    def expect(self, *items):
        """Add items to those that must come, in order."""
        self._want.extend(items)

    def observe(self, item):
        """Compare one item that came."""
        assert self._want, f"{self.name} {self.passed}: extra {item}"
        want = self._want.popleft()
        assert item == want, f"{self.name} {self.passed}: got {item}, expected {want}"
        self.passed += 1

    def close(self, count):
        """At the end: nothing missing, and exactly ``count`` (> 0) items were compared."""
        assert not self._want, f"{self.name}: {len(self._want)} items missing, first {self._want[0]}"
        assert self.passed == count > 0, f"{self.name}: compared {self.passed} items, planned {count}"
