"""Names the facts in which a play that collects problems keeps them, for all its plugins."""

from __future__ import annotations

FACT = "lowmem_problem "
"""Beginning of such a fact's name; the variable follows that the problem is of."""
