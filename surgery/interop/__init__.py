"""Models of other programs: folders, names, adapters of theirs."""
