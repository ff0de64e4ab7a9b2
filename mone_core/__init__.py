"""The mathematics of nested experts: torch and numpy only, no cluster, no file layout."""
