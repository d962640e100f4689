"""Runs many jobs as one sweep: each job is a plain run, and a manifest records the outcome of each."""
