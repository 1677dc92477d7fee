"""Run the scripts by their path; nothing of this is installed."""
