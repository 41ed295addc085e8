"""Read rows: files, folders and hub data sets become `Row`s, each with its location."""
