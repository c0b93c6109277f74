"""From generated images to a ranked row: generate, features, moments, metrics, record, leaderboard."""
