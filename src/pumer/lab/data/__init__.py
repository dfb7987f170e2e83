"""Images, text and the files they come from."""
