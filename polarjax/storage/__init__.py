"""Files, folders and arrays on disk that appear complete or not at all."""
