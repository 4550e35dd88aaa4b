"""Tests of shardwise; the folders mirror the package."""
