"""Evaluation: generates images, extracts features, computes metrics, writes records and renders the leaderboard."""
