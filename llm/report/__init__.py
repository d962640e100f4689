"""Reads run folders and writes leaderboards and plots."""
