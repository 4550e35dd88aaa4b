"""Tables over many ranks: what lies where, and how ids and vectors travel."""

from shardwise.sharding.placement import Answer, Cell, Placement, Slice, place, place_slices

__all__ = ["Answer", "Cell", "Placement", "Slice", "place", "place_slices"]
