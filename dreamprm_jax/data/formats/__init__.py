"""The public data sets, row by row: a raw row as it was published -> Example or Question. Pure functions, no files."""
