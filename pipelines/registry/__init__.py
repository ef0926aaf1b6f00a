"""MLflow: runs filled from files, versions with their lineage and aliases, and what is read from them again."""
