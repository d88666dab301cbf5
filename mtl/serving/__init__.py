"""Answers without Spark: what a server process needs at a request."""
