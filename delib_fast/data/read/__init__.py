"""Read rows: files, folders and hub datasets become `Row`s, each with its location."""
