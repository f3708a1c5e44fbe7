"""Other people's systems, one file each; each imports its library when it is used, and is an extra of pip."""
