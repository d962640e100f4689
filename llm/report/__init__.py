"""Run folders in, leaderboards and plots out."""
