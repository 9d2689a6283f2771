"""Commands: each module composes the two stages into one thing a user can run."""
