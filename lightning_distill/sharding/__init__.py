"""Sharded training: strategies, checkpoints, and the interfaces between sharded networks and strategies."""
