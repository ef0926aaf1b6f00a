"""A place to run in: git, DVC, worktrees, processes, and the parameters that a person overrides."""
