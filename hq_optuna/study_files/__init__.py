"""Study files: finding one, reading its options and settings, building its parts."""
