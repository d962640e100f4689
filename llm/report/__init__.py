"""RunRecord folders in, leaderboards and plots out."""
